"""The run and the logit lens against Hugging Face's own forward pass, module hooks and numpy."""

from dataclasses import replace

import numpy as np
import pytest
from conftest import CLEAN, PROMPT, SHORT
from reference import log_softmax

import lens
from messages import METRICS, Lens, Metric, Prompt, Run, Study, UserError

TOL = 1e-4


def expected(logits: np.ndarray, final: np.ndarray, answers: list[int], foils: list[int]) -> dict[str, np.ndarray]:
    """Statistics of logits [point, seq, vocab], position by position."""
    logp, last = log_softmax(logits), log_softmax(final)
    p = np.exp(logp)
    best = logits[..., answers].max(-1)
    return {
        "prob": p[..., answers].sum(-1),
        "rank": (logits > best[..., None] + 1e-9).sum(-1),
        "entropy": -(p * logp).sum(-1),
        "kl": (np.exp(last) * (last - logp)).sum(-1),
        "logit_diff": logits[..., answers].mean(-1) - logits[..., foils].mean(-1),
    }


def points(reference) -> list[tuple]:
    sites = ("resid_post",) if reference.arch == "gpt_neox" else ("resid_mid", "resid_post")
    return [("resid_pre", 0)] + [(s, i) for i in range(len(reference.blocks)) for s in sites]


@pytest.mark.parametrize("which", ["clean", "corrupt"])
def test_lens_every_point(engine, reference, which):
    got = engine.run(Lens(Study(PROMPT), which, k=5))
    spots = points(reference)
    assert got.points == tuple(f"L{i}.{s}" for s, i in spots)
    logits, acts = reference.run([got.tokens.ids], read=spots)
    stack = np.stack([reference.logits(acts[s])[0] for s in spots])
    check = engine.model.check(PROMPT)
    answers, foils = [check.answers[0].ids[0]], [check.foils[0].ids[0]]
    want = expected(stack, logits[0].astype(np.float64), answers, foils)
    for name, values in want.items():
        np.testing.assert_allclose(getattr(got, name), values, atol=TOL, err_msg=name)
    p = np.exp(log_softmax(stack))
    np.testing.assert_allclose(got.top_probs, -np.sort(-p, -1)[..., :5], atol=TOL)
    np.testing.assert_allclose(np.take_along_axis(p, got.top_ids.astype(int), -1), got.top_probs, atol=TOL)
    assert set(got.texts) >= set(got.top_ids.ravel().tolist())
    assert np.abs(stack[-1] - logits[0]).max() < TOL


def test_run_is_the_forward_pass(engine, reference):
    got = engine.run(Run(Study(PROMPT), k=7))
    for side in (got.clean, got.corrupt):
        logits = reference.run([side.tokens.ids])[0][0]
        order = -np.sort(-logits, -1)[:, :7]
        np.testing.assert_allclose(side.top_logits, order, atol=TOL)
        np.testing.assert_allclose(np.take_along_axis(logits, side.top_ids.astype(int), -1), side.top_logits, atol=TOL)
        probs = np.take_along_axis(np.exp(log_softmax(logits.astype(np.float64))), side.top_ids.astype(int), -1)
        np.testing.assert_allclose(side.top_probs, probs, atol=TOL)
    assert got.now.metric == got.clean.metric and got.normalised == 1.0


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("pos", ["END", "S2", -3, 4])
def test_metrics(engine, reference, kind, pos):
    prompt = replace(PROMPT, answers=(" Mary", " Alice"), foils=(" John", " the"))
    got = engine.run(Run(Study(prompt, metric=Metric(kind, pos))))
    check = engine.model.check(prompt)
    answers, foils = [r.ids[0] for r in check.answers], [r.ids[0] for r in check.foils]
    index = pos if isinstance(pos, int) else check.clean.labels[pos]
    clean = reference.run([check.clean.ids])[0][0].astype(np.float64)
    for side in (got.clean, got.corrupt):
        logits = reference.run([side.tokens.ids])[0][0].astype(np.float64)
        z, logp = logits[index], log_softmax(logits)[index]
        want = {
            "logit_diff": z[answers].mean() - z[foils].mean(),
            "prob": np.exp(logp[answers]).sum(),
            "prob_diff": np.exp(logp[answers]).sum() - np.exp(logp[foils]).sum(),
            "logprob": np.log(np.exp(logp[answers]).sum()),
            "rank": (z > z[answers].max()).sum(),
            "loss": -np.mean([log_softmax(logits)[i, token] for i, token in enumerate(side.tokens.ids[1:])]),
            "kl": (np.exp(log_softmax(clean)[index]) * (log_softmax(clean)[index] - logp)).sum(),
        }[kind]
        assert side.metric == pytest.approx(want, abs=TOL)


def test_metric_without_answers(engines):
    engine = engines["llama"]
    bare = engine.run(Run(Study(Prompt(CLEAN))))
    assert bare.clean.metric is None and bare.normalised is None and "answer" in bare.warning
    one = engine.run(Run(Study(Prompt(CLEAN, answers=(" Mary",)))))
    assert one.clean.metric is None and "foil" in one.warning
    prob = engine.run(Run(Study(Prompt(CLEAN, answers=(" Mary",)), metric=Metric("prob"))))
    assert prob.clean.metric is not None and prob.normalised is None and "corrupted" in prob.warning
    same = engine.run(Run(Study(replace(PROMPT, corrupt=CLEAN))))
    assert same.normalised is None and "not normalised" in same.warning
    empty = engine.run(Lens(Study(Prompt(CLEAN))))
    assert np.isnan(empty.prob).all() and np.isnan(empty.rank).all() and np.isnan(empty.logit_diff).all()
    assert np.isfinite(empty.entropy).all() and np.isfinite(empty.kl).all()


def test_corrupted_of_another_length(engine, reference):
    got = engine.run(Run(Study(replace(PROMPT, corrupt=SHORT))))
    logits = reference.run([got.corrupt.tokens.ids])[0][0]
    assert len(got.corrupt.tokens.ids) != len(got.clean.tokens.ids)
    np.testing.assert_allclose(got.corrupt.top_logits[:, 0], logits.max(-1), atol=TOL)


@pytest.mark.parametrize("rows", [1, 4, 15, 37])
def test_chunks_give_the_same_numbers(engine, monkeypatch, rows):
    """However small the bound on vocabulary-sized tensors, the same numbers, in parts that lie in order."""
    whole = engine.run(Lens(Study(PROMPT)))
    monkeypatch.setattr(lens, "VOCAB_BYTES", 4 * engine.model.info.d_vocab * rows)
    parts = []
    again = engine.run(Lens(Study(PROMPT)), lambda part: parts.append(part))
    for name in ("top_probs", *lens.STATS):
        np.testing.assert_allclose(getattr(again, name), getattr(whole, name), rtol=1e-5, atol=1e-5)
    seen = [p for part in parts if hasattr(part, "points") for p in part.points]
    assert seen and seen == list(whole.points)[: len(seen)]


def test_chosen_points(engine):
    whole = engine.run(Lens(Study(PROMPT)))
    some = engine.run(Lens(Study(PROMPT), points=("L2.resid_post", "L0.resid_pre", "L2.resid_pre"), k=3))
    assert some.points == ("L2.resid_post", "L0.resid_pre", "L2.resid_pre") and some.top_ids.shape[-1] == 3
    rows = [whole.points.index(p) for p in ("L2.resid_post", "L0.resid_pre", "L1.resid_post")]
    np.testing.assert_allclose(some.entropy, whole.entropy[rows], atol=1e-5)


def test_convention(engines):
    assert "soft cap 5" in engines["gemma2"].run(Lens(Study(PROMPT))).convention
    assert "no resid_mid" in engines["neox"].run(Lens(Study(PROMPT))).convention
    text = engines["gpt2"].run(Lens(Study(PROMPT))).convention
    assert "final norm recomputed at each point, raw weights" in text and "no soft cap" in text


@pytest.mark.parametrize(
    "request_, text",
    [
        (Lens(Study(PROMPT), "clean-corrupt"), "'clean-corrupt' is not a run"),
        (Lens(Study(Prompt(CLEAN)), "corrupt"), "there is no corrupted prompt"),
        (Lens(Study(PROMPT), points=("L9.resid_post",)), "layers 0 to 2"),
        (Lens(Study(PROMPT), points=("L1H1",)), "the lens reads resid_pre"),
        (Lens(Study(PROMPT), points=("L1.resid_mid@3",)), "at every position"),
        (Lens(Study(PROMPT), k=0), "k must be at least 1"),
        (Run(Study(PROMPT, metric=Metric("luck"))), "'luck' is not a metric"),
        (Run(Study(PROMPT, metric=Metric(pos="S9"))), "no position labelled 'S9'"),
        (Run(Study(PROMPT, metric=Metric(pos=99))), "position 99 is outside the clean prompt"),
        (Run(Study(PROMPT, base="now")), "'now' is not a prompt"),
        (Run(Study(Prompt(CLEAN), base="corrupt")), "there is none: type one first"),
    ],
)
def test_bad_requests(engines, request_, text):
    with pytest.raises(UserError) as error:
        engines["gpt2"].run(request_)
    assert text in str(error.value) and "\n" not in str(error.value)
