"""The run and the logit lens against Hugging Face's own forward pass, module hooks and numpy."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import CLEAN, PROMPT, SHORT
from reference import log_softmax

from model import metrics
from techniques.lens import reading as lens
from model.top_tokens import largest
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Metric, METRICS, Prompt, Study

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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in METRICS if k not in ("logprob_sum", "own")])  # those: test_sets.py, test_own_metric.py
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


@pytest.mark.parametrize("kind", [k for k in METRICS if k not in ("logprob_sum", "own")])  # those: test_sets.py, test_own_metric.py
@pytest.mark.parametrize("pos", ["END", 4])
def test_first_answer_of_a_run(engine, monkeypatch, kind, pos):
    """Of a prompt longer than a chunk the metric's position and the last one come first, one row of logits each; then the rest, to the same result."""
    ask = Run(Study(PROMPT, metric=Metric(kind, pos), interventions=(parse_intervention("L1H0=zero"),)), k=4)
    engine.model.cache.clear()
    whole = engine.run(ask)
    engine.model.cache.clear()
    monkeypatch.setattr(metrics, "VOCAB_BYTES", 4 * engine.model.info.d_vocab * 4)
    rows, parts, real = [], [], engine.model.unembed
    monkeypatch.setattr(engine.model, "unembed", lambda x: rows.append(len(x)) or real(x))
    again = engine.run(ask, lambda part: parts.append((part, sum(rows))) if hasattr(part, "clean") else None)
    n = len(again.now.tokens.ids)
    for side, want in ((again.clean, whole.clean), (again.corrupt, whole.corrupt), (again.now, whole.now)):
        np.testing.assert_allclose(side.top_logits, want.top_logits, atol=1e-5)
        np.testing.assert_allclose(side.top_probs, want.top_probs, atol=1e-5)
        assert side.metric == pytest.approx(want.metric, abs=1e-5) and (side.top_ids >= 0).all()
    if kind == "loss":  # which is over all positions
        assert not parts
        return
    first, read = parts[0]
    known = {n - 1, n - 1 if pos == "END" else pos}
    assert read == 3 * len(known) + 3 * (kind == "kl") and len(parts) == 1 + 3 * -(-(n - len(known)) // 4)
    for side, want in ((first.clean, again.clean), (first.corrupt, again.corrupt), (first.now, again.now)):
        assert side.metric == want.metric and set(np.flatnonzero(side.top_ids[:, 0] >= 0)) == known
        assert np.isnan(side.top_probs[[i for i in range(n) if i not in known]]).all() and set(first.texts) >= set(side.top_ids[-1].tolist())
    assert first.normalised == again.normalised and first.convention == again.convention


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
    monkeypatch.setattr(metrics, "VOCAB_BYTES", 4 * engine.model.info.d_vocab * rows)
    parts = []
    again = engine.run(Lens(Study(PROMPT)), lambda part: parts.append(part))
    for name in ("top_probs", *lens.STATS, "kl_pair", "up_values", "down_values"):
        np.testing.assert_allclose(getattr(again, name), getattr(whole, name), atol=1e-5, rtol=1e-5)
    seen = [p for part in parts if hasattr(part, "points") for p in part.points]
    assert seen == list(whole.points)[: len(seen)] and bool(seen) == (rows >= len(whole.positions))
    assert again.points == whole.points and again.positions == whole.positions


def test_chosen_points(engine):
    whole = engine.run(Lens(Study(PROMPT)))
    some = engine.run(Lens(Study(PROMPT), points=("L2.resid_post", "L0.resid_pre", "L2.resid_pre"), k=3))
    assert some.points == ("L2.resid_post", "L0.resid_pre", "L2.resid_pre") and some.top_ids.shape[-1] == 3
    rows = [whole.points.index(p) for p in ("L2.resid_post", "L0.resid_pre", "L1.resid_post")]
    np.testing.assert_allclose(some.entropy, whole.entropy[rows], atol=1e-5)


def direct_logits(reference, node: str, ids) -> np.ndarray:
    """What a component adds to the final logits, in double: Hugging Face's modules, the final norm's scale frozen, no biases, no soft cap."""
    layer = int(node[1])
    final = reference.read(ids, ("resid_post", len(reference.blocks) - 1)).double().numpy()[0]
    eps = getattr(reference.norm, "eps", None) or getattr(reference.norm, "variance_epsilon", 0)

    def frozen(norm, x: np.ndarray, c: np.ndarray, centre: bool) -> np.ndarray:
        weight = norm.weight.detach().double().numpy() + (reference.arch == "gemma2")
        if centre:
            x, c = (v - v.mean(-1, keepdims=True) for v in (x, c))
        return c / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight

    if "H" in node:
        head = int(node[3:])
        z, out = reference.read(ids, ("z", layer)).double(), reference.attn(layer)
        module = out.c_proj if reference.arch == "gpt2" else out.dense if reference.arch == "gpt_neox" else out.o_proj
        weight = module.weight.detach().double().numpy()
        weight = weight if reference.arch == "gpt2" else weight.T
        part = reference.columns("z", head)
        c = z.numpy()[0][:, part] @ weight[part]
        if reference.arch == "gemma2":
            c = frozen(reference.blocks[layer].post_attention_layernorm, z.numpy()[0] @ weight, c, centre=False)
    else:
        c = reference.read(ids, (node[3:], layer)).double().numpy()[0]
    return frozen(reference.norm, final, c, centre=reference.arch in ("gpt2", "gpt_neox")) @ reference.unembed.T


@pytest.mark.parametrize("node", ["L0.attn", "L1.mlp", "L2.attn", "L0H1", "L2H3"])
def test_components(engine, reference, node):
    """A component's direct logits and their statistics, among residual rows."""
    got = engine.run(Lens(Study(PROMPT), "clean", points=("L0.resid_pre", node, "L1.resid_post"), k=4))
    assert got.points == ("L0.resid_pre", node, "L1.resid_post")
    z = direct_logits(reference, node, got.tokens.ids)
    final = reference.run([got.tokens.ids])[0][0].astype(np.float64)
    check = engine.model.check(PROMPT)
    answers, foils = [check.answers[0].ids[0]], [check.foils[0].ids[0]]
    for name, values in expected(z[None], final, answers, foils).items():
        np.testing.assert_allclose(getattr(got, name)[1], values[0], atol=TOL, err_msg=name)
    centred = z - z.mean(-1, keepdims=True)
    np.testing.assert_allclose(got.up_values[1], -np.sort(-centred, -1)[:, :3], atol=TOL)
    np.testing.assert_allclose(np.take_along_axis(centred, got.up_ids[1].astype(int), -1), got.up_values[1], atol=TOL)
    np.testing.assert_allclose(np.take_along_axis(centred, got.down_ids[1].astype(int), -1), got.down_values[1], atol=TOL)
    np.testing.assert_allclose(got.down_values[1], np.sort(centred, -1)[:, :3], atol=TOL)


def test_components_sum_to_the_logits(engine, reference):
    """Embeddings, attentions, MLPs and the biases make the logit difference before the soft cap."""
    i = engine.model.info
    names = tuple(f"L{layer}.{s}" for layer in range(i.n_layers) for s in ("attn", "mlp"))
    got = engine.run(Lens(Study(PROMPT), "clean", points=names))
    ids, check = got.tokens.ids, engine.model.check(PROMPT)
    answer, foil = check.answers[0].ids[0], check.foils[0].ids[0]
    final = reference.read(ids, ("resid_post", i.n_layers - 1))
    start = reference.read(ids, ("resid_pre", 0))
    with t.no_grad():
        normed = (reference.norm(final) - reference.norm(t.zeros_like(final))).double().numpy()[0] @ reference.unembed.T
    centred = (lambda x: x - x.mean(-1, keepdim=True)) if i.norm == "LN" else (lambda x: x)
    whole = normed[:, answer] - normed[:, foil]
    direction = (reference.unembed[answer] - reference.unembed[foil])[None]
    weight = reference.norm.weight.detach().double().numpy() + (reference.arch == "gemma2")
    eps = getattr(reference.norm, "eps", None) or getattr(reference.norm, "variance_epsilon", 0)
    scale = (centred(final).double() ** 2).mean(-1, keepdim=True).add(eps).sqrt().numpy()[0]
    embedded = (centred(start).double().numpy()[0] / scale * weight * direction).sum(-1)
    np.testing.assert_allclose(got.logit_diff.sum(0, dtype=np.float64) + embedded, whole, atol=5 * TOL)


@pytest.mark.parametrize("which", ["clean", "corrupt", "now"])
def test_pair_and_promoted(engine, reference, which):
    got = engine.run(Lens(Study(PROMPT), which))
    spots, check = points(reference), engine.model.check(PROMPT)
    logp = {}
    for name, row in (("clean", check.clean), ("corrupt", check.corrupt)):
        acts = reference.run([row.ids], read=spots)[1]
        logp[name] = log_softmax(np.stack([reference.logits(acts[s])[0] for s in spots]))
    clean, corrupt = logp["clean"], logp["corrupt"]
    np.testing.assert_allclose(got.kl_pair, (np.exp(clean) * (clean - corrupt)).sum(-1), atol=TOL)
    change = np.diff(logp["corrupt" if which == "corrupt" else "clean"], axis=0)
    assert np.isnan(got.up_values[0]).all() and np.isnan(got.down_values[0]).all()
    np.testing.assert_allclose(got.up_values[1:], -np.sort(-change, -1)[..., :3], atol=TOL)
    np.testing.assert_allclose(got.down_values[1:], np.sort(change, -1)[..., :3], atol=TOL)
    for ids, values in ((got.up_ids, got.up_values), (got.down_ids, got.down_values)):
        np.testing.assert_allclose(np.take_along_axis(change, ids[1:].astype(int), -1), values[1:], atol=TOL)
        assert set(got.texts) >= set(ids.ravel().tolist())


def test_pair_under_interventions_and_without_a_pair(engines):
    engine = engines["llama"]
    plain = engine.run(Lens(Study(PROMPT)))
    edited = engine.run(Lens(Study(PROMPT, (parse_intervention("L1.mlp=zero"),))))
    np.testing.assert_allclose(edited.kl_pair, plain.kl_pair, atol=1e-5)
    assert not np.allclose(edited.entropy, plain.entropy)
    for ask in (Lens(Study(Prompt(CLEAN))), Lens(Study(replace(PROMPT, corrupt=SHORT))), Lens(Study(PROMPT), pair=False)):
        assert np.isnan(engine.run(ask).kl_pair).all()
    assert engine.run(Lens(Study(PROMPT, base="corrupt"))).kl_pair == pytest.approx(plain.kl_pair, abs=1e-5)


def test_positions(engine):
    whole = engine.run(Lens(Study(PROMPT)))
    some = engine.run(Lens(Study(PROMPT), positions=(-1, 3, -1)))
    assert some.positions == (len(whole.tokens.ids) - 1, 3) and whole.positions == tuple(range(len(whole.tokens.ids)))
    assert some.tokens == whole.tokens
    for name in lens.CELLS:
        if not name.endswith("ids"):
            np.testing.assert_allclose(getattr(some, name), getattr(whole, name)[:, list(some.positions)], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 5.0])
def test_statistics_of_a_large_vocabulary(scale):
    """Sums over 50 000 tokens keep their digits."""
    rng = t.Generator().manual_seed(0)
    z, q, other = (scale * t.randn(3, 50_257, generator=rng) - 90 for _ in range(3))
    want = expected(z.double().numpy()[None], q.double().numpy(), [7, 11], [13])
    logp, corrupt = log_softmax(z.double().numpy()), log_softmax(other.double().numpy())
    final = q.log_softmax(-1)
    np.testing.assert_allclose(lens.pair_kl(z, other), (np.exp(logp) * (logp - corrupt)).sum(-1), atol=3e-5, rtol=1e-5)
    got = lens.statistics(z.clone(), (final.exp(), lens.dot(final.exp(), final)), [7, 11], [13], 5)
    for name, values in want.items():
        np.testing.assert_allclose(got[name], values[0], atol=3e-5, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(got["top_probs"], -np.sort(-np.exp(logp), -1)[:, :5], atol=1e-6)


@pytest.mark.parametrize("n", [3, 200, 1000, 2049])
@pytest.mark.parametrize("k", [1, 3])
def test_largest_is_topk(n, k):
    x = t.randn(5, n, generator=t.Generator().manual_seed(n))
    values, ids = largest(x, k)
    want = x.topk(k, -1)
    assert t.equal(values, want.values) and t.equal(ids, want.indices)
    values, ids = largest(x, k, False)
    want = x.topk(k, -1, False)
    assert t.equal(values, want.values) and t.equal(ids, want.indices)


def test_convention(engines):
    assert "soft cap 5" in engines["gemma2"].run(Lens(Study(PROMPT))).convention
    assert "no resid_mid" in engines["neox"].run(Lens(Study(PROMPT))).convention
    text = engines["gpt2"].run(Lens(Study(PROMPT))).convention
    assert text.startswith("final norm recomputed · raw weights · float32 · no soft cap")
    parts = engines["gemma2"].run(Lens(Study(PROMPT), points=("L1.mlp", "L1H1"))).convention
    assert parts.startswith("final norm's scale frozen") and "before the soft cap" in parts and "the norm after attention" in parts


@pytest.mark.parametrize(
    "request_, text",
    [
        (Lens(Study(PROMPT), "clean-corrupt"), "'clean-corrupt' is not a run"),
        (Lens(Study(Prompt(CLEAN)), "corrupt"), "there is no corrupted prompt"),
        (Lens(Study(PROMPT), points=("L9.resid_post",)), "layers 0 to 2"),
        (Lens(Study(PROMPT), points=("L1H1.q",)), "the lens reads resid_pre"),
        (Lens(Study(PROMPT), points=("L1.mlp.n3",)), "the lens reads resid_pre"),
        (Lens(Study(PROMPT), points=("L1H7",)), "heads 0 to 3"),
        (Lens(Study(PROMPT), positions=(99,)), "position 99 is outside"),
        (Lens(Study(PROMPT), kind="magic"), "'magic' is not a lens"),
        (Lens(Study(PROMPT), points=("L1.resid_mid@3",)), "at every position"),
        (Lens(Study(PROMPT), k=0), "k must be at least 1"),
        (Run(Study(PROMPT, metric=Metric("luck"))), "'luck' is not a metric"),
        (Run(Study(PROMPT, metric=Metric(pos="S9"))), "no position labelled 'S9'"),
        (Run(Study(PROMPT, metric=Metric(pos=99))), "position 99 is outside the clean prompt"),
        (Run(Study(PROMPT, base="now")), "'now' is not a prompt"),
        (Run(Study(Prompt(CLEAN), base="corrupt")), "there is none: E types one"),
    ],
)
def test_bad_requests(engines, request_, text):
    with pytest.raises(UserError) as error:
        engines["gpt2"].run(request_)
    assert text in str(error.value) and "\n" not in str(error.value)
