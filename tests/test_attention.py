"""Patterns against Hugging Face's output_attentions; head statistics against naive loops."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import CLEAN, CORRUPT, PROMPT, SHORT
from transformer_lens import head_detector

from techniques.attention import patterns as attribution
from techniques.attention.requests import Attention, AttentionSet, Detect, DETECTORS, HeadStats, STATS
from vocabulary.nodes import Intervention, Node, parse_intervention, UserError
from vocabulary.prompts import Prompt, Study
from model.interventions import prepare

TOL = 1e-4
REPEATS = "Mary and John went to Mary and John and the store went red red green"


def yield_all(steps):
    """What a generator returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def naive(pattern: np.ndarray, ids: list[int]) -> dict[str, float]:
    """The statistics of one head on one row, word by word as STATS says, as (sum, count)."""
    n = len(ids)
    out = {name: [] for name in STATS}
    for i in range(n):
        copies = [j for j in range(i) if ids[j] == ids[i]]
        if copies:
            out["duplicate"].append(sum(pattern[i][j] for j in copies))
            out["induction"].append(sum(pattern[i][j + 1] for j in copies))
        if i > 0:
            out["previous"].append(pattern[i][i - 1])
            out["first"].append(pattern[i][0])
            out["entropy"].append(-sum(p * math.log(p) for p in pattern[i] if p > 0))
    return out


def expected(patterns: list[np.ndarray], rows: list[list[int]]) -> dict[str, np.ndarray]:
    """[layer, head] from patterns of each layer [row, head, destination, source]."""
    layers, heads = len(patterns), patterns[0].shape[1]
    out = {name: np.full((layers, heads), np.nan) for name in STATS}
    for layer in range(layers):
        for h in range(heads):
            per_row = [naive(patterns[layer][r, h].astype(float), ids) for r, ids in enumerate(rows)]
            for name in STATS:
                values = [v for one in per_row for v in one[name]]
                if values:
                    out[name][layer, h] = np.mean(values)
    return out


def compare(got: dict, want: dict) -> None:
    assert list(got)[: len(STATS)] == list(STATS)
    for name in STATS:
        np.testing.assert_allclose(got[name], want[name], atol=TOL, err_msg=name)


def test_patterns(engine, reference):
    check = engine.model.check(PROMPT)
    both = [reference.patterns([row.ids]) for row in (check.clean, check.corrupt)]
    for layer in range(engine.model.info.n_layers):
        for which, want in (("clean", both[0][layer][0]), ("corrupt", both[1][layer][0]), ("clean-corrupt", both[0][layer][0] - both[1][layer][0])):
            got = engine.run(Attention(Study(PROMPT), layer, which))
            assert got.pattern.shape == (engine.model.info.n_heads, len(check.clean.ids), len(check.clean.ids))
            np.testing.assert_allclose(np.nan_to_num(got.pattern), want, atol=TOL)


def test_rows_sum_to_one_and_causal(engine):
    got = engine.run(Attention(Study(PROMPT), 1))
    np.testing.assert_allclose(np.nansum(got.pattern, -1), 1, atol=TOL)
    assert np.isnan(got.pattern[:, *np.triu_indices(got.pattern.shape[1], 1)]).all()


@pytest.mark.parametrize("text", [CLEAN, REPEATS, CORRUPT])
def test_statistics_on_the_prompt(engine, reference, text):
    got = engine.run(HeadStats(Study(Prompt(text))))
    ids = engine.model.check(Prompt(text)).clean.ids
    compare(got.stats, expected(reference.patterns([ids]), [ids]))


def test_statistics_on_random_repeats(engine, reference):
    got = engine.run(HeadStats(Study(PROMPT), source="random"))
    ids = attribution.random_repeats(engine.model)
    model, bos = engine.model, engine.model.bos
    n = (ids.shape[1] - (bos is not None)) // 2
    assert ids.shape[0] == 4 and n == min(50, (model.info.n_ctx - (bos is not None)) // 2)
    assert bos is None or (ids[:, 0] == bos).all()
    assert (ids[:, -n:] == ids[:, -2 * n : -n]).all()
    assert not set(ids[:, -2 * n :].ravel().tolist()) & set(model.tokenizer.all_special_ids)
    assert (ids == attribution.random_repeats(model)).all()
    compare(got.stats, expected(reference.patterns(ids.tolist()), ids.tolist()))


@pytest.fixture
def long(engine, monkeypatch):
    """The engine on a prompt whose patterns do not go into the cache together, and the blocks that a request runs."""
    model, ran = engine.model, []
    model.cache.clear()
    assert model.resumes
    monkeypatch.setattr(model, "likely", lambda seq: [])

    def run(request) -> tuple[object, list[int]]:
        ran.clear()
        hooks = [b.attn.register_forward_pre_hook(lambda *_, i=i: ran.append(i)) for i, b in enumerate(model.bridge.blocks)]
        try:
            return engine.run(request), list(ran)
        finally:
            for h in hooks:
                h.remove()

    yield run
    model.cache.clear()


@pytest.mark.parametrize("do", [(), ("L0.mlp=scale:0.5",), ("L1H2=zero", "L1.resid_pre=scale:2"), ("L2.resid_mid=patch",)])
def test_a_layer_runs_the_blocks_it_needs(engine, long, do):
    """A layer's pattern is that of a whole pass; blocks behind it do not run, nor those before it whose output is at hand, but one that is edited."""
    study, which = Study(PROMPT, tuple(parse_intervention(d.replace("mid", "post") if engine.model.parallel else d) for d in do)), "now" if do else "clean"
    runs = yield_all(prepare(engine.model, study))
    names = [attribution.pattern_name(layer) for layer in range(engine.model.info.n_layers)]
    want = engine.model.forward(t.tensor([runs.row(which).ids]), names, runs.edits if do else [], keep=0)[1]
    edited = {i.node.layer for i in study.interventions}
    for layer in (0, 2, 1):
        got, ran = long(Attention(study, layer, which))
        np.testing.assert_allclose(np.nan_to_num(got.pattern), want[names[layer]][0].float().numpy(), atol=1e-6)
        begun = 1 if layer == 1 and 1 not in edited else 0  # the pass to layer 2 left the input of layer 1
        assert ran == list(range(begun, layer + 1)), (layer, ran)


def test_statistics_layer_by_layer(engine, long):
    """As a pass goes, without holding patterns, the same numbers as from patterns that are all at hand."""
    ask = HeadStats(Study(PROMPT), "clean-corrupt", pair=(7, 3))
    got, ran = long(ask)
    n = engine.model.info.n_layers
    assert ran == [*range(n), *range(n)] and not engine.model.cache.items
    sides = []
    for which in ("clean", "corrupt"):
        patterns = [np.nan_to_num(engine.run(Attention(Study(PROMPT), layer, which)).pattern) for layer in range(n)]
        row = engine.model.check(PROMPT).clean if which == "clean" else engine.model.check(PROMPT).corrupt
        sides.append(expected([p[None] for p in patterns], [row.ids]) | {"pair": np.stack([p[:, 7, 3] for p in patterns])})
    for name, values in got.stats.items():
        np.testing.assert_allclose(values, sides[0][name] - sides[1][name], atol=1e-6, err_msg=name)


def test_a_model_that_can_not_begin_at_a_block(engines, monkeypatch):
    """Whole passes, then: where blocks hand on more than the stream, a pass that begins at one would give other numbers."""
    model = engines["llama"].model
    monkeypatch.delitem(model.__dict__, "resumes", raising=False)
    real = model.forward
    monkeypatch.setattr(
        model, "forward", lambda *a, begin=None, **k: real(*a, **k) if begin is None else (None, {n: x + 1 for n, x in real(*a, **k)[1].items()})
    )
    assert not model.resumes
    monkeypatch.delitem(model.__dict__, "resumes")


def test_undefined_is_nan(engines):
    engine = engines["gpt2"]
    none = engine.run(HeadStats(Study(Prompt("When Mary and John went to the store"))))
    assert np.isnan(none.stats["duplicate"]).all() and np.isnan(none.stats["induction"]).all()
    assert np.isfinite(none.stats["previous"]).all()
    one = engine.run(HeadStats(Study(Prompt("When", bos=False))))
    assert all(np.isnan(v).all() for v in one.stats.values())


def test_difference_of_statistics(engine):
    a, b, d = (engine.run(HeadStats(Study(PROMPT), which)).stats for which in ("clean", "corrupt", "clean-corrupt"))
    for name in STATS:
        np.testing.assert_allclose(d[name], a[name] - b[name], atol=1e-6)


def test_pair(engine, reference):
    ids = engine.model.check(PROMPT).clean.ids
    want = np.stack([p[0, :, 9, 3] for p in reference.patterns([ids])])
    np.testing.assert_allclose(engine.run(HeadStats(Study(PROMPT), pair=(9, 3))).stats["pair"], want, atol=TOL)


# ------------------------------------------------------------------ weighted patterns, detectors, means over the prompt set


@pytest.mark.parametrize("which", ["clean", "clean-corrupt"])
def test_weighted_patterns(engine, reference, which):
    """Pattern x || v W_O ||, the value of the kv head that the query head reads, from Hugging Face's modules."""
    check, ref = engine.model.check(PROMPT), reference

    def want(ids: tuple, layer: int, head: int) -> np.ndarray:
        w = ref.place("z", layer)[0].weight.detach().double().numpy()
        w = (w if ref.arch == "gpt2" else w.T)[ref.columns("z", head)]
        v = ref.read(ids, ("v", layer))[0].double().numpy()[:, ref.columns("v", head)]
        return ref.patterns([ids])[layer][0, head] * np.linalg.norm(v @ w, axis=-1)

    for layer in range(engine.model.info.n_layers):
        got = engine.run(Attention(Study(PROMPT), layer, which, weighted=True))
        assert got.weighted and "|| v W_O ||" in got.convention
        for head in range(engine.model.info.n_heads):
            sides = [want(getattr(check, s).ids, layer, head) for s in which.split("-")]
            size = max(1.0, *(np.abs(side).max() for side in sides))  # values are up to some tens long, and so is what float32 leaves of them
            np.testing.assert_allclose(np.nan_to_num(got.pattern[head]), sides[0] - sides[1] if len(sides) == 2 else sides[0], atol=TOL * size)
    assert not engine.run(Attention(Study(PROMPT))).weighted


@pytest.mark.parametrize("measure", ["mul", "abs"])
@pytest.mark.parametrize("bos, current", [(False, False), (True, False), (False, True), (True, True)])
def test_detectors_equal_transformer_lens(engine, measure, bos, current):
    """Its "abs" is rounded to three digits; ours is not. On one prompt: on several it would forget the exclusions."""
    bridge, model = engine.model.bridge, engine.model
    ids = t.tensor([model.check(Prompt(REPEATS)).clean.ids])
    with t.no_grad():
        _, cache = bridge.run_with_cache(ids, remove_batch_dim=True)
    tolerance = 1e-5 if measure == "mul" else 5.1e-4
    cells = ((9, 4), (12, 0), (3, 3), (7, 5))
    tensor = t.zeros(ids.shape[1], ids.shape[1])
    for i, j in cells:
        tensor[i, j] = 1
    how = {"exclude_bos": bos, "exclude_current_token": current, "error_measure": measure}
    own = bridge.to_tokens
    bridge.to_tokens = lambda seq: ids
    try:
        for name in DETECTORS:
            theirs = head_detector.detect_head(bridge, REPEATS, name, cache=cache, **how)
            got = engine.run(Detect(Study(Prompt(REPEATS)), pattern=name, **how))
            np.testing.assert_allclose(got.scores, theirs.numpy(), atol=tolerance)
            table = getattr(head_detector, f"get_{name}_detection_pattern")(ids)
            assert set(got.cells) == {(int(i), int(j)) for i, j in table.nonzero().tolist()}
        theirs = head_detector.detect_head(bridge, REPEATS, tensor, cache=cache, **how)
    finally:
        bridge.to_tokens = own
    got = engine.run(Detect(Study(Prompt(REPEATS)), cells=cells, **how))
    np.testing.assert_allclose(got.scores, theirs.numpy(), atol=tolerance)
    assert set(got.cells) == set(cells)


def test_detector_of_a_difference(engine):
    a, b, d = (engine.run(Detect(Study(PROMPT), w, "induction_head", error_measure="abs")).scores for w in ("clean", "corrupt", "clean-corrupt"))
    np.testing.assert_allclose(d, a - b, atol=1e-6)


SHORTER = Prompt(SHORT, None, labels=(("S2", 38), ("IO", 5)))
FAR = Prompt("the red milk then " + CLEAN, None, labels=(("IO", 23), ("S2", 56), ("S1", 32)))


def test_mean_between_labels(engine, reference):
    """By loops over Hugging Face's patterns; a cell whose source comes after the destination is blank, and counted where it does not."""
    swapped = replace(PROMPT, labels=(("IO", 14), ("S1", 5), ("S2", 38)))
    prompts = (PROMPT, SHORTER, FAR, swapped)
    got = engine.run(AttentionSet(Study(PROMPT, prompt_set=prompts), "clean"))
    assert got.labels == ("IO", "S2", "END") and got.prompts.tolist() == [0, 1, 2, 3]
    check_means(engine, reference, got, prompts)
    got = engine.run(AttentionSet(Study(PROMPT, prompt_set=(PROMPT, FAR, swapped)), "clean", ("S1", "IO", "END")))
    check_means(engine, reference, got, (PROMPT, FAR, swapped))
    assert got.counts[0, 1] == 2 and got.counts[1, 0] == 1 and got.counts[2].tolist() == [3, 3, 3] and got.counts[0, 2] == 0
    assert np.isnan(got.mean[:, :, 0, 2]).all()


def check_means(engine, reference, got, prompts: tuple[Prompt, ...]) -> None:
    rows = [engine.model.check(p).clean for p in prompts]
    patterns = [reference.patterns([r.ids]) for r in rows]
    for i, a in enumerate(got.labels):
        for j, b in enumerate(got.labels):
            spots = [(p, r.labels[a], r.labels[b]) for p, r in zip(patterns, rows) if r.labels[a] >= r.labels[b]]
            assert got.counts[i, j] == len(spots)
            for layer in range(len(patterns[0])):
                values = np.array([p[layer][0, :, dest, src] for p, dest, src in spots])
                if spots:
                    np.testing.assert_allclose(np.nan_to_num(got.mean[layer, :, i, j]), values.mean(0), atol=TOL)
                    np.testing.assert_allclose(np.nan_to_num(got.std[layer, :, i, j]), values.std(0), atol=TOL)


def test_mean_of_a_difference_and_under_interventions(engine):
    other = replace(PROMPT, clean=CORRUPT, corrupt=CLEAN)
    do = (Intervention(Node("head", 0, 1), "patch"), Intervention(Node("attn", 0, pos="S2"), "zero"))
    study = Study(PROMPT, do, prompt_set=(PROMPT, other))
    got = engine.run(AttentionSet(study, "now-clean"))
    for layer in range(engine.model.info.n_layers):
        single = [engine.run(Attention(replace(study, prompt=p), layer, "now-clean")) for p in study.prompt_set]
        for i, a in enumerate(got.labels):
            for j, b in enumerate(got.labels[: i + 1]):
                want = np.mean([s.pattern[:, s.tokens.labels[a], s.tokens.labels[b]] for s in single], 0)
                np.testing.assert_allclose(got.mean[layer, :, i, j], want, atol=1e-5)
    assert np.nanmax(np.abs(got.mean[1:])) > 1e-3


def test_an_unmoved_now_is_clean(engine):
    same = engine.run(Attention(Study(PROMPT), 2, "now-clean"))
    assert np.nanmax(np.abs(same.pattern)) == 0
    moved = engine.run(Attention(Study(PROMPT, (Intervention(Node("mlp", 0), "zero"),)), 2, "now-clean"))
    assert np.nanmax(np.abs(moved.pattern)) > 1e-3


def test_interventions_on_random_tokens(engines):
    """Those that fit any tokens apply; the others are named as left out."""
    engine = engines["llama"]
    do = (Intervention(Node("mlp", 0), "zero"), Intervention(Node("head", 0, 1), "patch"), Intervention(Node("attn", 0, pos=3), "zero"))
    got = engine.run(HeadStats(Study(PROMPT, do), source="random"))
    assert "without L0H1=patch L0.attn@3=zero" in got.convention
    alone = engine.run(HeadStats(Study(PROMPT, do[:1]), source="random"))
    plain = engine.run(HeadStats(Study(PROMPT), source="random"))
    np.testing.assert_array_equal(got.stats["entropy"], alone.stats["entropy"])
    assert np.abs(got.stats["entropy"] - plain.stats["entropy"])[1:].max() > 1e-3
    clean = engine.run(HeadStats(Study(PROMPT, do), "clean", "random"))
    np.testing.assert_array_equal(clean.stats["entropy"], plain.stats["entropy"])


def test_induction_by_hand():
    """A head that looks exactly at the token after the earlier copy scores 1, and the others 0."""
    ids = t.tensor([[9, 1, 2, 3, 1, 2, 3]])
    pattern = t.zeros(1, 1, 7, 7)
    for i in range(7):
        pattern[0, 0, i, i - 2 if i >= 4 else i] = 1
    statistics = attribution.HeadStatistics(ids)
    statistics.add(pattern)
    got = statistics.numbers()
    assert got["induction"] == 1 and got["duplicate"] == 0 and got["entropy"] == 0 and got["first"] == 0


@pytest.mark.parametrize(
    "ask, text",
    [
        (Attention(Study(PROMPT), 7), "there is no layer 7: the model has layers 0 to 2"),
        (Attention(Study(PROMPT), 0, "corrupt-now"), "'corrupt-now' is not a run or a difference"),
        (Attention(Study(replace(PROMPT, corrupt=SHORT)), 0, "clean-corrupt"), "clean has 15 tokens and corrupt has 14"),
        (Attention(Study(Prompt(CLEAN)), 0, "clean-corrupt"), "there is no corrupted prompt"),
        (HeadStats(Study(replace(PROMPT, corrupt=SHORT)), "now-corrupt"), "now has 15 tokens and corrupt has 14"),
        (HeadStats(Study(PROMPT), "clean-corrupt", "random"), "random tokens have no clean and corrupted run"),
        (HeadStats(Study(PROMPT), source="dreams"), "'dreams' is not a source"),
        (Attention(Study(PROMPT), 3, weighted=True), "there is no layer 3"),
        (Detect(Study(PROMPT), pattern="name_mover"), "'name_mover' is not a detector: use one of previous_token_head"),
        (Detect(Study(PROMPT), cells=((3, 9),)), "cell (3, 9): write (destination, source)"),
        (Detect(Study(PROMPT), cells=((15, 9),)), "positions 0 to 14"),
        (Detect(Study(PROMPT), error_measure="div"), "'div' is not a measure"),
        (Detect(Study(PROMPT), "now-then"), "'now-then' is not a run"),
        (AttentionSet(Study(PROMPT)), "there is no prompt set"),
        (AttentionSet(Study(PROMPT, prompt_set=(PROMPT, Prompt(CLEAN)))), "share no label but END"),
        (AttentionSet(Study(PROMPT, prompt_set=(SHORTER,)), labels=("S1", "S2")), "prompt 1 of the set: the prompt has no position labelled 'S1'"),
        (AttentionSet(Study(PROMPT, prompt_set=(Prompt(""),))), "prompt 1 of the set: the clean prompt is empty"),
        (HeadStats(Study(PROMPT), pair=(3, 9)), "the destination comes after the source"),
        (HeadStats(Study(PROMPT), source="random", pair=(9, 3)), "a pair of positions belongs to the prompt"),
    ],
)
def test_bad_requests(engines, ask, text):
    with pytest.raises(UserError) as error:
        engines["gpt2"].run(ask)
    assert text in str(error.value)
