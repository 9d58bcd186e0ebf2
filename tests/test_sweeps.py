"""Sweeps against transformer_lens.patching, against plain torch hooks on Hugging Face's modules, and against what must hold on any model."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, CLEAN, PROMPT, SHORT
from hypothesis import given, settings
from hypothesis import strategies as st

from model import base_run
from model.variants import Base
from techniques.patching import plan as plans
from techniques.patching.table import SweepTable
from vocabulary.statistics import FLIPS
from techniques.patching.requests import Estimate, Sweep, SweepResult
from vocabulary.nodes import parse_intervention, parse_node, UserError
from vocabulary.prompts import Metric, Prompt, read_prompt_set, Study
from vocabulary.requests import Progress
from vocabulary.wire import encode, Frame
from utils import ROOT

TOL = 1e-4
STUDY = Study(PROMPT)
BY_POSITION = ("resid_pre", "resid_mid", "resid_post", "attn", "mlp", "attn_mlp", "z_pos")
BY_HEAD = ("z", "q", "k", "v", "pattern")
NODE = {"cells": "L1H2", "neurons": "L1.mlp"}
KINDS = (*BY_POSITION, *BY_HEAD, "nodes", "cells", "neurons")
NAMES = ("Alice", "Tom", "Anna", "she")
SET = tuple(replace(PROMPT, corrupt=CLEAN.replace("John gave", f"{n} gave")) for n in NAMES)
ZOO_SET = tuple(replace(PROMPT, corrupt=CLEAN.replace("John gave", f"{n} gave")) for n in ("Alice", "Luke", "Emma", "Lucy"))


def sweep(engine, kind: str, study: Study = STUDY, **more) -> SweepResult:
    return engine.run(Sweep(study, kind, node=NODE.get(kind, ""), **more))


def missing(arch: str, kind: str) -> bool:
    return arch == "neox" and kind == "resid_mid"


def difference(engine, logits: np.ndarray) -> float:
    check = engine.model.check(PROMPT)
    return float(logits[-1, check.answers[0].ids[0]] - logits[-1, check.foils[0].ids[0]])


# ------------------------------------------------------------------ Hugging Face


def place_of(reference, node) -> tuple[tuple, slice]:
    """Where a node lives in Hugging Face's modules: (site, layer), and its columns."""
    match node.site:
        case "head":
            return (node.part, node.layer), reference.columns(node.part, node.head)
        case "neuron":
            return (node.site, node.layer), slice(node.index, node.index + 1)
    return (node.site, node.layer), slice(None)


def hooked(engine, reference, node, op: str, base: str, source: int | None = None) -> float:
    """The metric by hooks on Hugging Face's modules: the base run with a node's value from the other run, or zero."""
    check = engine.model.check(PROMPT)
    rows = {"clean": check.clean.ids, "corrupt": check.corrupt.ids}
    own, other = rows[base], rows["corrupt" if base == "clean" else "clean"]
    pos = slice(None) if node.pos is None else node.pos
    if node.site == "head" and node.part == "pattern":
        pattern, theirs = (reference.patterns([ids])[node.layer][0, node.head].copy() for ids in (own, other))
        where = (pos, slice(None) if source is None else source)
        pattern[where] = 0 if op == "zero" else theirs[where]
        values = reference.read(own, ("v", node.layer))[0, :, reference.columns("v", node.head)]
        spot, cols, new = ("z", node.layer), reference.columns("z", node.head), t.tensor(pattern) @ values
        pos = slice(None)
    else:
        spot, cols = place_of(reference, node)
        value = reference.read(other, spot)[0, pos, cols]
        new = t.zeros_like(value) if op == "zero" else value

    def edit(x: t.Tensor) -> None:
        x[0, pos, cols] = new

    return difference(engine, reference.run([own], edits=[(spot, edit)])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_hugging_face(engine, reference, arch, kind):
    """Some cells of every kind: patches both ways, and zero."""
    if missing(arch, kind):
        with pytest.raises(UserError, match="parallel"):
            sweep(engine, kind)
        return
    rng = np.random.default_rng(KINDS.index(kind))
    for op, direction in (("patch", "denoise"), ("patch", "noise"), ("zero", "noise")):
        got = sweep(engine, kind, op=op, direction=direction)
        assert got.done == got.total and "resumed" in got.mechanism
        base = "corrupt" if (op, direction) == ("patch", "denoise") else "clean"
        moved = np.argwhere(np.abs(got.values - got.base) > 1e-5)
        cells = [*rng.permutation(np.argwhere(np.isfinite(got.values)))[:2].tolist(), *rng.permutation(moved)[:2].tolist()]
        assert len(moved), "nothing moves the metric: a weak test"
        for r, c in cells:
            if kind == "cells":
                want = hooked(engine, reference, parse_node(f"L1H2.pattern@{r}"), op, base, c)
            else:
                want = hooked(engine, reference, parse_node(got.address(r, c)), op, base)
            assert abs(got.values[r, c] - want) < TOL, (op, direction, r, c)
        ends = [difference(engine, reference.run([ids])[0][0]) for ids in (engine.model.check(PROMPT).clean.ids, engine.model.check(PROMPT).corrupt.ids)]
        np.testing.assert_allclose([got.clean, got.corrupt], ends, atol=TOL)
        np.testing.assert_allclose(got.normalised, (got.values - ends[1]) / (ends[0] - ends[1]), atol=1e-3)


# ------------------------------------------------------------------ transformer_lens.patching


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gpt2", "zoo"])
def test_equal_to_transformer_lens(engines, arch, monkeypatch):
    """Every function of transformer_lens.patching whose table is a sweep's."""
    monkeypatch.setitem(os.environ, "TQDM_DISABLE", "1")
    from transformer_lens import patching as tl

    engine, bridge = engines[arch], engines[arch].model.bridge
    check = engine.model.check(PROMPT)
    clean, corrupt = (t.tensor([r.ids]) for r in (check.clean, check.corrupt))
    metric = lambda logits: logits[0, -1, check.answers[0].ids[0]] - logits[0, -1, check.foils[0].ids[0]]  # noqa: E731
    theirs = {
        "resid_pre": tl.get_act_patch_resid_pre, "resid_mid": tl.get_act_patch_resid_mid, "attn": tl.get_act_patch_attn_out,
        "mlp": tl.get_act_patch_mlp_out, "z": tl.get_act_patch_attn_head_out_all_pos, "q": tl.get_act_patch_attn_head_q_all_pos,
        "k": tl.get_act_patch_attn_head_k_all_pos, "v": tl.get_act_patch_attn_head_v_all_pos, "pattern": tl.get_act_patch_attn_head_pattern_all_pos,
    }  # fmt: skip
    if arch == "gpt2":
        theirs["z_pos"] = tl.get_act_patch_attn_head_out_by_pos
    with t.no_grad():
        _, cache = bridge.run_with_cache(clean)
        for kind, function in theirs.items():
            want = function(bridge, corrupt, cache, metric).numpy()
            want = want.transpose(0, 2, 1).reshape(-1, want.shape[1]) if kind == "z_pos" else want
            np.testing.assert_allclose(sweep(engine, kind).values, want, atol=TOL, err_msg=kind)


# ------------------------------------------------------------------ identities


def test_identities(engine, arch):
    """Patch nothing, patch everything, pre of a layer = post of the one before, and the same table for swapped prompts the other way round."""
    pre, post = sweep(engine, "resid_pre"), sweep(engine, "resid_post")
    np.testing.assert_allclose(pre.values[1:], post.values[:-1], atol=TOL)
    np.testing.assert_allclose(post.values[-1, -1], post.clean, atol=TOL)
    np.testing.assert_allclose(pre.normalised[:, : engine.model.check(PROMPT).clean.labels["S2"]], 0, atol=TOL)
    same = replace(STUDY, prompt=replace(PROMPT, corrupt=CLEAN))
    nothing = sweep(engine, "nodes", same)
    np.testing.assert_allclose(nothing.values, nothing.clean, atol=TOL)
    assert np.isnan(nothing.normalised).all() and "not normalised" in nothing.warning
    everything = engine.run(Sweep(STUDY, "cumulative", nodes=tuple(f"L0.resid_pre@{i}" for i in range(len(pre.cols)))))
    np.testing.assert_allclose([everything.values[0, 0], everything.values[0, -1]], [pre.corrupt, pre.clean], atol=TOL)
    swapped = replace(STUDY, prompt=replace(PROMPT, clean=PROMPT.corrupt, corrupt=PROMPT.clean, labels=()))
    for kind in ("z", "attn", "q"):
        one, two = sweep(engine, kind), sweep(engine, kind, swapped, direction="noise")
        np.testing.assert_allclose(one.values, two.values, atol=TOL)
        assert (one.clean, one.corrupt) == pytest.approx((two.corrupt, two.clean), abs=TOL)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["z", "attn_mlp", "pattern"])
def test_batch_of_one_is_batch_of_many(engine, arch, kind):
    some = ZOO_SET if arch == "zoo" else SET
    both = [sweep(engine, kind, replace(STUDY, prompt_set=some), over_set=True, plain=p) for p in (False, True)]
    np.testing.assert_allclose(both[0].per_prompt, both[1].per_prompt, atol=TOL)
    for i, prompt in enumerate(some):
        np.testing.assert_allclose(both[0].per_prompt[i], sweep(engine, kind, Study(prompt)).values, atol=TOL)
    np.testing.assert_allclose(both[0].values, both[0].per_prompt.mean(0), atol=TOL)


@pytest.mark.parametrize("op", ["mean", "mean_all", "resample", "noise"])
def test_ablations(engine, arch, op):
    """A cell of an ablation is the run under that one change: by interventions where there is one, else by whole passes."""
    some = ZOO_SET if arch == "zoo" else SET
    study = replace(STUDY, prompt_set=some)
    got = sweep(engine, "nodes", study, op=op, seed=3)
    np.testing.assert_allclose(got.values, sweep(engine, "nodes", study, op=op, seed=3, plain=True).values, atol=TOL)
    assert np.abs(got.values - got.base).max() > 1e-4 and got.base == pytest.approx(got.clean)
    if op in ("mean", "mean_all"):
        for address in ("L1H2", "L1.mlp"):
            want = now(engine, replace(study, interventions=(parse_intervention(f"{address}={op}"),)))
            assert got.values.flat[got.nodes.index(address)] == pytest.approx(want, abs=TOL)
    else:
        again, other = (sweep(engine, "nodes", study, op=op, seed=s).values for s in (3, 6))
        np.testing.assert_array_equal(again, got.values)
        assert np.abs(other - got.values).max() > 1e-4
        assert f"seed {3}" in got.convention


def now(engine, study: Study) -> float:
    from techniques.output.requests import Run

    return engine.run(Run(study)).now.metric


@pytest.mark.slow
def test_under_interventions(engine, arch):
    """The study's interventions stay in force, before and after the changed node."""
    do = ("L0.resid_pre@2=scale:1.5", "L0H1=zero", "L1.mlp@S2=scale:0.5", "L2H3.q=scale:-1", "L2.attn@-1=patch")
    do += () if arch == "neox" else ("L1.resid_mid@5=scale:0.3",)
    study = replace(STUDY, interventions=tuple(parse_intervention(d) for d in do))
    for kind in ("resid_pre", "z", "mlp", "pattern", "resid_post"):
        one, two = (sweep(engine, kind, study, plain=p) for p in (False, True))
        assert "resumed" in one.mechanism
        np.testing.assert_allclose(one.values, two.values, atol=TOL)
        assert one.base == pytest.approx(now(engine, replace(study, base="corrupt")), abs=TOL)
    one = sweep(engine, "z", study)
    want = now(engine, replace(study, base="corrupt", interventions=(*study.interventions, parse_intervention("L1H2=patch"))))
    assert one.values[1, 2] == pytest.approx(want, abs=TOL)


@pytest.mark.parametrize("kind", ["prob", "prob_diff", "logprob", "rank", "loss", "kl"])
def test_metrics(engines, kind):
    for arch in ("gpt2", "gemma2"):
        study = replace(STUDY, metric=Metric(kind))
        got, plain = (sweep(engines[arch], "attn_mlp", study, plain=p) for p in (False, True))
        np.testing.assert_allclose(got.values, plain.values, atol=TOL)
        assert got.base == pytest.approx(now(engines[arch], replace(study, base="corrupt")), abs=TOL)
        assert kind == "rank" or np.abs(got.values - got.base).max() > 1e-4
        i, j = np.argwhere(np.abs(got.values - got.base) == np.abs(got.values - got.base).max())[0]
        patched = replace(study, base="corrupt", interventions=(parse_intervention(f"{got.address(i, j)}=patch"),))
        assert got.values[i, j] == pytest.approx(now(engines[arch], patched), abs=TOL)


def test_metric_at_an_early_position(engine, arch):
    for pos in (3, "S2", -2):
        study = replace(STUDY, metric=Metric("logit_diff", pos))
        for kind in ("resid_pre", "z"):
            got, plain = (sweep(engine, kind, study, plain=p) for p in (False, True))
            np.testing.assert_allclose(got.values, plain.values, atol=TOL)
    assert np.abs(got.values - got.base).max() > 1e-5


# ------------------------------------------------------------------ many at a time, and not enough memory


@pytest.mark.slow
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_nodes_and_chunks(engines, references, data):
    arch = data.draw(st.sampled_from(ARCHS))
    kind = data.draw(st.sampled_from([k for k in KINDS if not missing(arch, k)]))
    op, direction = data.draw(st.sampled_from([("patch", "denoise"), ("patch", "noise"), ("zero", "noise")]))
    size = data.draw(st.integers(1, 40))
    engine, plain = engines[arch], Base.room
    ask = Sweep(STUDY, kind, op, direction, node=NODE.get(kind, ""))
    shape = plans.read_plan(engine.model, ask).layout
    r, c = data.draw(st.sampled_from(sorted(shape.cells)))
    only = tuple(data.draw(st.lists(st.sampled_from(sorted(shape.cells)), max_size=12, unique=True).filter(lambda x: (r, c) not in x)))
    try:
        Base.room = lambda self, length: size
        got = engine.run(replace(ask, only=(*only, (r, c))))
    finally:
        Base.room = plain
    assert got.at_once <= size and np.isfinite(got.values).sum() == len(only) + 1
    node = parse_node(f"L1H2.pattern@{r}" if kind == "cells" else got.address(r, c))
    base = "corrupt" if (op, direction) == ("patch", "denoise") else "clean"
    assert abs(got.values[r, c] - hooked(engine, references[arch], node, op, base, c if kind == "cells" else None)) < TOL


def test_out_of_memory_halves_the_chunk(engines, monkeypatch):
    engine = engines["gpt2"]
    want, words = sweep(engine, "z_pos").values, []
    step = Base.step

    def limited(self, layer, x, *more):
        if x.shape[1] > 1 and x.shape[:2].numel() > 30:
            raise t.OutOfMemoryError("fake: tried to allocate")
        return step(self, layer, x, *more)

    monkeypatch.setattr(Base, "step", limited)
    got = engine.run(Sweep(STUDY, "z_pos"), lambda part: words.append(part.text) if isinstance(part, Progress) else None)
    np.testing.assert_allclose(got.values, want, atol=TOL)
    assert got.at_once < 30 and any("out of memory" in w for w in words)

    def never(self, layer, x, *more):
        raise t.OutOfMemoryError("fake: tried to allocate")

    monkeypatch.setattr(Base, "step", never)
    with pytest.raises(UserError, match="out of memory"):
        sweep(engine, "z")
    engine.check_hooks()


def test_partial_results_and_cancel(engines):
    """Cells come in as they are ready, no hook is on the model while others may run, and a cancelled sweep leaves nothing behind."""
    engine = engines["zoo"]
    want, parts = sweep(engine, "z_pos"), []
    jobs = engine.jobs(Sweep(STUDY, "z_pos"))
    for part in jobs:
        assert engine.model.leaks() == 0 and not any("forward" in b.__dict__ or "forward" in b.mlp.__dict__ for b in engine.model.bridge.blocks)
        if isinstance(part, SweepResult):
            parts.append(part)
            seen = np.isfinite(part.values)
            np.testing.assert_allclose(part.values[seen], want.values[seen], atol=TOL)
            encode(Frame("partial", body=part))
    assert len(parts) > 1 and [p.done for p in parts] == sorted(p.done for p in parts) and want.done == want.total
    assert parts[1].done - parts[0].done <= 0.3 * want.total
    jobs = engine.jobs(Sweep(STUDY, "z_pos"))
    for _ in range(5):
        next(jobs)
    jobs.close()
    engine.check_hooks()
    np.testing.assert_allclose(sweep(engine, "z").values, sweep(engine, "z", plain=True).values, atol=TOL)


def test_what_cannot_be_resumed_runs_whole(engines, monkeypatch):
    engine = engines["llama"]
    want = sweep(engine, "resid_post").values
    monkeypatch.setattr(engine.model.notes, "trials", {})
    step = Base.step
    monkeypatch.setattr(Base, "step", lambda self, *a: step(self, *a) * 1.01)
    got = sweep(engine, "resid_post")
    np.testing.assert_allclose(got.values, want, atol=TOL)
    assert "whole forward passes" in got.mechanism and "off by" in got.mechanism


# ------------------------------------------------------------------ statistics, several nodes


def test_statistics_over_a_set(engines):
    study = replace(STUDY, prompt_set=read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:10])
    got = engines["zoo"].run(Sweep(study, "z", over_set=True))
    x = got.per_prompt.astype(np.float64)
    assert x.shape == (10, 4, 4) and got.prompts == tuple(range(10))
    ends = [engines["zoo"].run(Sweep(Study(p), "z")) for p in study.prompt_set]
    paired = x - np.array([e.corrupt for e in ends])[:, None, None]
    np.testing.assert_allclose(got.std, paired.std(0, ddof=1), atol=1e-4)
    np.testing.assert_allclose(got.low, paired.mean(0) - 2.262 * paired.std(0, ddof=1) / 10**0.5, atol=1e-4)
    np.testing.assert_allclose(got.high + got.low, 2 * paired.mean(0), atol=1e-4)
    clean, corrupt = (np.mean([getattr(e, n) for e in ends]) for n in ("clean", "corrupt"))
    np.testing.assert_allclose(got.normalised, (x.mean(0) - corrupt) / (clean - corrupt), atol=1e-4)
    effect = x[:, 3, 3] - np.array([e.corrupt for e in ends])
    flips = [abs(sum(e if i >> j & 1 else -e for j, e in enumerate(effect))) >= abs(effect.sum()) - 1e-9 for i in range(1024)]
    assert got.p[3, 3] == pytest.approx(np.mean(flips), abs=1e-6)
    again = engines["zoo"].run(Sweep(replace(study, prompt_set=study.prompt_set * 2), "z", over_set=True))
    np.testing.assert_array_equal(again.p, engines["zoo"].run(Sweep(replace(study, prompt_set=study.prompt_set * 2), "z", over_set=True)).p)
    assert again.p.min() == pytest.approx(1 / (FLIPS + 1), rel=1e-3)


def test_answer_key_of_the_zoo(engines):
    """The heads of zoo/README.md, both ways; and they make up the whole table."""
    study = Study(PROMPT, prompt_set=read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl"))
    for direction in ("denoise", "noise"):
        got = engines["zoo"].run(Sweep(study, "z", direction=direction, over_set=True))
        share = np.abs(got.normalised - (1 if direction == "noise" else 0))
        top = {got.nodes[i] for i in np.argsort(-share, axis=None)[:4]}
        assert top == {"L0H1", "L0H3", "L3H2", "L3H3"} and np.sort(share, None)[-4] > 0.35 and np.sort(share, None)[-5] < 0.1


def test_pairs_and_cumulative(engine, arch):
    study = replace(STUDY, prompt_set=ZOO_SET if arch == "zoo" else SET)
    single = sweep(engine, "nodes", study, op="zero")
    pairs = engine.run(Sweep(study, "pairs", "zero", k=3))
    order = np.argsort(-np.abs(single.values - single.base), axis=None, kind="stable")[:3]
    assert pairs.rows == pairs.cols == tuple(single.nodes[i] for i in order)
    np.testing.assert_allclose(np.diag(pairs.values), single.values.flat[order], atol=TOL)
    np.testing.assert_allclose(pairs.values, pairs.values.T, atol=TOL)
    together = engine.run(Sweep(study, "cumulative", "zero", k=3))
    for values, n in ((pairs.values[0, 1], 2), (together.values[0, 2], 2), (together.values[0, 3], 3)):
        do = tuple(parse_intervention(f"{a}=zero") for a in pairs.rows[:n])
        assert values == pytest.approx(now(engine, replace(study, interventions=do)), abs=TOL)
    assert together.values[0, 0] == pytest.approx(together.base)
    mixed = ("L1H2.q", "L0.resid_pre@3", "L2H1.pattern", "L1.attn@S2", "L1.mlp.n5") + (() if arch == "neox" else ("L2.resid_mid@-1",))
    one, two = (engine.run(Sweep(study, "pairs", nodes=mixed, plain=p)) for p in (False, True))
    np.testing.assert_allclose(one.values, two.values, atol=TOL)


# ------------------------------------------------------------------ estimates and direct effects


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resid_mid", "attn_mlp", "z", "q", "v", "pattern", "neurons", "cells"])
def test_small_step_of_attribution_patching_is_a_finite_difference(engine, arch, kind):
    """The sweep with new values a little off the base run's, both ways, against the gradient."""
    if missing(arch, kind):
        return
    slope, estimate = slopes(engine, Sweep(STUDY, kind, node=NODE.get(kind, "")))
    np.testing.assert_allclose(estimate, slope, atol=2e-3 + 0.01 * np.nanmax(np.abs(estimate)))


def slopes(engine, ask: Sweep) -> list[np.ndarray]:
    eps, ends = 0.02, []
    for sign in (1, -1):
        plan = plans.read_plan(engine.model, ask)
        board = SweepTable(plan)

        def fill(members, base, sides, plan=plan, board=board, sign=sign):
            for key, name in {s.key: plans.reads(engine.model, s) for s in plan.spots}.items():
                base.source[key] = base.acts[name] + sign * eps * (base.source[key] - base.acts[name])
            board.begin(members, base, sides)
            for step in base.all(board.waiting):
                if not isinstance(step, Progress):
                    board.fill(*step)
            yield Progress(0, 0)

        list(plans.over_bases(plan, fill))
        ends.append(board.values[0])
    found = engine.run(Estimate(ask.study, ask.kind, node=ask.node))
    estimate = (found.values - found.base).ravel()
    assert np.nanmax(np.abs(estimate)) > 1e-4
    return [(ends[0] - ends[1]) / (2 * eps), estimate]


def test_estimates_are_transformer_lens_attribution_patching(engine, arch):
    """Heads and MLPs by position, against transformer_lens.tools.analysis.attribution_patching (gradients on the corrupted run)."""
    from transformer_lens.tools.analysis.attribution_patching import Node, attribution_patch

    check = engine.model.check(PROMPT)
    a, b = check.answers[0].ids[0], check.foils[0].ids[0]
    ids = [t.tensor([row.ids]) for row in (check.clean, check.corrupt)]
    bridge = engine.model.bridge
    try:
        with t.enable_grad():
            theirs = attribution_patch(bridge.requires_grad_(True), *ids, lambda logits: logits[0, -1, a] - logits[0, -1, b]).node_scores
    finally:
        bridge.requires_grad_(False)
    scale, info, seq = max(map(abs, theirs.values())), engine.model.info, ids[0].shape[1]
    heads, mlps = (engine.run(Estimate(STUDY, kind)) for kind in ("z_pos", "mlp"))
    for layer in range(info.n_layers):
        want = [[theirs[Node("attn_head_out", p, layer, h)] for p in range(seq)] for h in range(info.n_heads)]
        rows = slice(layer * info.n_heads, (layer + 1) * info.n_heads)
        np.testing.assert_allclose((heads.values - heads.base)[rows], want, atol=TOL * max(1, scale))
        np.testing.assert_allclose((mlps.values - mlps.base)[layer], [theirs[Node("mlp_out", p, layer)] for p in range(seq)], atol=TOL * max(1, scale))


@pytest.mark.slow
def test_estimates_know_their_limits(engines):
    """On the zoo the estimates rank cells as the truth does; integrated gradients add up to the whole effect at the first layer."""
    engine = engines["zoo"]
    study = replace(STUDY, prompt_set=read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:8])
    truth = engine.run(Sweep(study, "attn_mlp", over_set=True))
    errors = []
    for method in ("atp", "ig"):
        guess = engine.run(Estimate(study, "attn_mlp", method, over_set=True))
        assert guess.method == method and guess.rows == truth.rows and guess.nodes == truth.nodes and guess.per_prompt.shape == truth.per_prompt.shape
        assert np.corrcoef(guess.values.ravel(), truth.values.ravel())[0, 1] > 0.9
        errors.append(np.abs(guess.values - truth.values).max())
    assert errors[1] < errors[0]
    whole = engine.run(Estimate(STUDY, "resid_pre", "ig", steps=40))
    assert (whole.values[0] - whole.base).sum() == pytest.approx(whole.clean - whole.corrupt, rel=0.02)


@pytest.mark.parametrize("kind", ["prob", "prob_diff", "logprob", "loss", "kl"])
def test_estimates_of_every_metric(engines, kind):
    for arch in ("llama", "gemma2"):
        slope, estimate = slopes(engines[arch], Sweep(replace(STUDY, metric=Metric(kind)), "attn_mlp"))
        np.testing.assert_allclose(estimate, slope, atol=1e-5 + 0.01 * np.nanmax(np.abs(estimate)))
    with pytest.raises(UserError, match="gradient"):
        engines["gpt2"].run(Estimate(replace(STUDY, metric=Metric("rank")), "z"))


@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama", "gemma2"])
@pytest.mark.parametrize("address", ["L1H2", "L0.attn", "L1.mlp", "L2.attn", "L1H2.q", "L0H1.k", "L1H3.v", "L0.mlp.n5", "L1.resid_pre", "L1.resid_post"])
def test_direct_effect(engines, references, arch, address):
    """Later attention and MLPs held at the base run by hooks on Hugging Face's modules, and the final norm's scale by hand."""
    engine, reference, node = engines[arch], references[arch], parse_node(address)
    if node.part in ("k", "v"):
        node = replace(node, head=node.head - node.head % (reference.heads // reference.kv_heads))
    if arch == "gemma2" and node.site in ("head", "neuron"):
        return  # there is a norm behind it, frozen too
    check = engine.model.check(PROMPT)
    spot, cols = place_of(reference, node)
    new = reference.read(check.corrupt.ids, spot)[0, -1, cols]
    if node.site == "head" and node.part != "z":  # of z under the changed part, of its group of heads
        theirs, edit = reference.read(check.corrupt.ids, spot)[0, :, cols], [(spot, lambda x, cols=cols: x[0, :, cols].copy_(theirs))]
        per = reference.heads // reference.kv_heads if node.part in ("k", "v") else 1
        first, spot = node.head // per * per, ("z", node.layer)
        cols = slice(reference.columns("z", first).start, reference.columns("z", first + per - 1).stop)
        new = reference.run([check.clean.ids], edits=edit, read=[spot])[1][spot][0, -1, cols]
    for i in range(3):
        for s in ("attn", "mlp"):
            reference.read(check.clean.ids, (s, i))
    later = [
        (s, i)
        for i in range(3)
        for s in ("attn", "mlp")
        if i > node.layer or i == node.layer and s == "mlp" and node.site not in ("mlp", "neuron", "resid_post")
    ]
    later += [("attn", node.layer)] * (node.site == "resid_pre")
    edits = [(spot, lambda x: x[0, -1, cols].copy_(new))]
    edits += [(s, lambda x, s=s: x.copy_(reference.read(check.clean.ids, s))) for s in later]
    x = reference.run([check.clean.ids], edits=edits, read=[("resid_post", 2)])[1]["resid_post", 2][0, -1].double()
    own = reference.read(check.clean.ids, ("resid_post", 2))[0, -1].double()
    weight, bias = reference.norm.weight.detach().double(), getattr(reference.norm, "bias", None)
    rms, gain = bias is None, weight + 1 if arch == "gemma2" else weight
    centre = lambda v: v if rms else v - v.mean()  # noqa: E731
    eps = getattr(reference.norm, "eps", None) or reference.norm.variance_epsilon
    normed = centre(x) / (centre(own).pow(2).mean() + eps).sqrt() * gain + (0 if rms else bias.detach().double())
    logits = normed.numpy() @ reference.unembed.T + reference.b_u
    logits = reference.softcap * np.tanh(logits / reference.softcap) if reference.softcap else logits
    kind = {"head": "z" if node.part == "z" else node.part, "neuron": "neurons"}.get(node.site, node.site)
    got = engine.run(Sweep(STUDY, kind, direction="noise", effect="direct", node=f"L{node.layer}.mlp" if kind == "neurons" else ""))
    value = got.values.flat[[i for i, n in enumerate(got.nodes) if parse_node(n) in (node, replace(node, pos=len(check.clean.ids) - 1))][0]]
    assert value == pytest.approx(difference(engine, logits[None]), abs=TOL) and "direct" in got.convention
    assert abs(value - got.base) > 1e-5 or node.site == "neuron"
    if node.site not in ("head", "neuron"):
        np.testing.assert_allclose(got.values[:, :-1], got.base, atol=TOL)


def test_direct_effects_add_up(engine, arch):
    """What reaches the final norm is linear in what was written: resid_mid = resid_pre + attention, resid_post = the next resid_pre, z and pattern."""
    study = replace(STUDY, metric=Metric("logit_diff"))
    change = {k: (r := sweep(engine, k, study, effect="direct")).values - r.base for k in ("resid_pre", "attn", "resid_post", "mlp", "z", "q", "pattern")}
    np.testing.assert_allclose(change["resid_pre"][1:], change["resid_post"][:-1], atol=TOL)
    if engine.model.softcap:
        return
    np.testing.assert_allclose(change["resid_pre"] + change["attn"] + change["mlp"], change["resid_post"], atol=TOL)
    if arch != "neox":
        mid = sweep(engine, "resid_mid", study, effect="direct")
        np.testing.assert_allclose(mid.values - mid.base, change["resid_pre"] + change["attn"], atol=TOL)
    if not hasattr(engine.model.bridge.blocks[0], "ln1_post"):
        np.testing.assert_allclose(change["z"].sum(1), change["attn"][:, -1], atol=TOL)
    neurons = engine.run(Sweep(study, "neurons", node="L1.mlp", effect="direct"))
    np.testing.assert_allclose((neurons.values - neurons.base).sum(), change["mlp"][1, -1], atol=TOL * 10)


# ------------------------------------------------------------------ order, progress, memory


@pytest.mark.parametrize("op", ["patch", "zero"])
def test_the_largest_estimates_come_first(engines, op):
    """Values do not depend on the order; the first round holds the tenth of the largest estimates, the early layers and MLP 0."""
    for arch, kind in (("zoo", "z_pos"), ("gpt2", "attn_mlp"), ("llama", "nodes"), ("gemma2", "z_pos")):
        engine, parts = engines[arch], []
        want = sweep(engine, kind, op=op, direction="noise")
        for known in (False, True):
            if known and op == "patch":
                guess = engine.run(Estimate(STUDY, kind, direction="noise"))
            parts.clear()
            got = engine.run(Sweep(STUDY, kind, op, "noise", first="estimate"), lambda p, parts=parts: parts.append(p) if isinstance(p, SweepResult) else None)
            np.testing.assert_allclose(got.values, want.values, atol=TOL)
        if op == "patch" and kind != "nodes":
            size = np.abs(guess.values - guess.base)
            known = np.isfinite(parts[0].values)
            size[known] = -1
            round_one = next(p for p in parts if np.isfinite(p.values)[: 1 if kind != "attn_mlp" else 2].all())
            top = np.argsort(-size, axis=None)[: (size >= 0).sum() // 10]
            assert np.isfinite(round_one.values.flat[top]).all() and round_one.done < want.total
    rank = sweep(engines["gpt2"], "z", replace(STUDY, metric=Metric("rank")), first="estimate")
    assert rank.done == rank.total


def test_progress_and_memory(engines):
    engine, words = engines["gpt2"], []
    got = engine.run(Sweep(STUDY, "z_pos", chunk_mb=1), lambda p: words.append(p) if isinstance(p, Progress) else None)
    shares = [p.done / p.total for p in words]
    assert shares == sorted(shares) and 0.3 < np.median(shares) < 0.9 and all(p.text.startswith("z_pos ") for p in words)
    assert 0 < got.peak_mb <= 1
    assert sweep(engine, "z", plain=True).peak_mb > 0


def test_resid_mid_sees_resid_pre(engine, arch):
    """A write at resid_mid counts from the stream as other changes left it: in sweeps under such an intervention, in pairs, in gradients."""
    if arch == "neox":
        return
    do = tuple(parse_intervention(d) for d in ("L1.resid_mid@S2=scale:0.3", "L2.resid_mid@-1=scale:1.5"))
    study = replace(STUDY, interventions=do, base="corrupt")
    got = sweep(engine, "resid_pre", study)
    s2 = engine.model.check(PROMPT).corrupt.labels["S2"]
    for node in (f"L1.resid_pre@{s2}", "L2.resid_pre@14"):
        if got.nodes.count(node):
            want = now(engine, replace(study, interventions=(parse_intervention(f"{node}=patch"), *do)))
            assert got.values.flat[got.nodes.index(node)] == pytest.approx(want, abs=TOL)
    pair = engine.run(Sweep(STUDY, "pairs", nodes=("L1.resid_pre@S2", "L1.resid_mid@S2")))
    both = tuple(parse_intervention(f"L1.{site}@S2=patch") for site in ("resid_pre", "resid_mid"))
    assert pair.values[0, 1] == pytest.approx(now(engine, replace(STUDY, base="corrupt", interventions=both)), abs=TOL)
    slope, estimate = slopes(engine, Sweep(study, "resid_pre"))
    np.testing.assert_allclose(estimate, np.broadcast_to(slope, estimate.shape), atol=2e-3 + 0.01 * np.nanmax(np.abs(estimate)))


def test_estimates_without_single_blocks(engines, monkeypatch):
    """A model whose blocks can't be run one by one: gradients of whole runs, the same numbers."""
    engine = engines["gemma2"]
    want = {m: engine.run(Estimate(STUDY, "attn_mlp", m)).values for m in ("atp", "ig")}
    monkeypatch.setattr(engine.model.notes, "trials", {})
    monkeypatch.setattr(Base, "trial", lambda self: "not today")
    for m, values in want.items():
        np.testing.assert_allclose(engine.run(Estimate(STUDY, "attn_mlp", m)).values, values, atol=TOL)


def test_a_trial_that_runs_out_of_memory_is_no_answer(engines, monkeypatch):
    """The next run tries again: nothing stays slow because memory was short once."""
    engine = engines["llama"]
    monkeypatch.setattr(engine.model.notes, "trials", {})

    def never(self) -> str:
        raise t.OutOfMemoryError("fake: tried to allocate")

    with monkeypatch.context() as patched:
        patched.setattr(Base, "trial_attention", never)
        with pytest.raises(UserError, match="out of memory"):
            sweep(engine, "resid_post")
    sweep(engine, "resid_post")
    assert engine.model.notes.trials["attention"] == ""


def test_heads_that_see_one_another_are_run_in_full(engines, monkeypatch):
    engine = engines["qwen3"]
    want = sweep(engine, "q").values
    monkeypatch.setattr(engine.model.notes, "trials", {})
    plain = Base.z_of
    monkeypatch.setattr(Base, "z_of", lambda self, layer, part: plain(self, layer, part) * 1.01)
    np.testing.assert_allclose(sweep(engine, "q").values, want, atol=TOL)
    with pytest.raises(UserError, match="no direct effect of its own"):
        sweep(engine, "q", effect="direct")


# ------------------------------------------------------------------ bad input


BAD = [
    (Sweep(Study(replace(PROMPT, corrupt=None)), "z"), "no corrupted prompt"),
    (Sweep(Study(replace(PROMPT, answers=())), "z"), "no answer"),
    (Sweep(Study(replace(PROMPT, foils=())), "z"), "no foil"),
    (Sweep(Study(replace(PROMPT, corrupt=SHORT)), "z"), "clean has 15 tokens and corrupted"),
    (Sweep(Study(PROMPT, metric=Metric("logit_diff", 99)), "z"), "position 99 is outside"),
    (Sweep(STUDY, "neurons", node="L1.mlp@77"), "position 77 is outside"),
    (Sweep(STUDY, "nonsense"), "is not a sweep"),
    (Sweep(STUDY, "z", "nonsense"), "is not an operation"),
    (Sweep(STUDY, "z", direction="up"), "is not a direction"),
    (Sweep(STUDY, "z", effect="half"), "is not an effect"),
    (Sweep(STUDY, "cells", effect="direct", node="L1H2"), "direct effect"),
    (Sweep(STUDY, "z", effect="direct", plain=True), "direct effects"),
    (Sweep(STUDY, "z", first="luck"), "what runs first"),
    (Sweep(STUDY, "cells"), "needs one head"),
    (Sweep(STUDY, "cells", node="L1H9"), "heads 0 to 3"),
    (Sweep(STUDY, "neurons", node="L1H1"), "needs one MLP"),
    (Sweep(STUDY, "z", only=((0, 77),)), "no cell"),
    (Sweep(STUDY, "z", "mean"), "prompt set"),
    (Sweep(STUDY, "z", "resample"), "prompt set"),
    (Sweep(STUDY, "pattern", "mean_all"), "pattern"),
    (Sweep(STUDY, "z", over_set=True), "no prompt set"),
    (Sweep(Study(PROMPT, prompt_set=(PROMPT, Prompt(SHORT, SHORT, PROMPT.answers, PROMPT.foils))), "attn", over_set=True), "1 with 14 tokens, 1 with 15"),
    (Sweep(Study(PROMPT, prompt_set=(replace(PROMPT, corrupt=None),)), "z", over_set=True), "prompt 1 of the set"),
    (Estimate(STUDY, "z", "magic"), "is not an estimate"),
    (Estimate(STUDY, "pairs"), "several nodes"),
]


@pytest.mark.parametrize("ask, words", BAD, ids=[w for _, w in BAD])
def test_bad_input(engines, ask, words):
    with pytest.raises(UserError, match=words):
        engines["gpt2"].run(ask)
    engines["gpt2"].check_hooks()


def test_nan_in_the_model(engines):
    engine = engines["qwen3"]
    weight = engine.model.bridge.blocks[1].mlp.out.weight
    kept = weight.detach().clone()
    try:
        weight.data[0, 0] = float("nan")
        for ask in (Sweep(STUDY, "z"), Sweep(STUDY, "z", plain=True), Estimate(STUDY, "z")):
            with pytest.raises(UserError, match="not finite"):
                engine.run(ask)
    finally:
        weight.data.copy_(kept)
    engine.check_hooks()


@pytest.mark.slow
def test_command_line(capsys):
    import json

    from engine import main

    some = str(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")
    assert main(["sweep", "--set", some, "--kind", "z", "--mean"]) == 0
    out = capsys.readouterr().out
    assert "L3H3" in out and "denoise" in out and "32 prompts" in out
    assert main(["sweep", "--set", some, "--kind", "attn", "--estimate", "atp", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "atp" and len(found["values"]) == 4
    assert main(["sweep", "--kind", "z"]) == 2 and "no corrupted prompt" in capsys.readouterr().err


# ------------------------------------------------------------------ base runs are kept


@pytest.mark.slow
def test_base_runs_stay_in_the_cache(engine, arch, monkeypatch):
    """The second sweep of the same prompts, of another kind or the other way, runs no base prompt; what is kept is not written to, and the numbers are the same."""
    model = engine.model
    model.cache.clear()
    kinds = [k for k in ("z", "q", "pattern", "resid_pre", "mlp", "z_pos") if not missing(arch, k)]
    cold = {}
    for kind in kinds:
        for direction in ("denoise", "noise"):
            model.cache.clear()
            cold[kind, direction] = sweep(engine, kind, direction=direction).values
    model.cache.clear()
    sweep(engine, "v")
    assert any("a sweep's base run" in line for line in model.cache.entries())
    versions = {key: x._version for key, x in model.cache.items.items() if key[1] == base_run.DONE}
    calls, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda *args, **kw: calls.append(1) or forward(*args, **kw))
    for (kind, direction), values in cold.items():
        np.testing.assert_allclose(sweep(engine, kind, direction=direction).values, values, atol=1e-5)
    assert not calls
    assert versions and all(model.cache.items[key]._version == n for key, n in versions.items())
    sweep(engine, "z", replace(STUDY, interventions=(parse_intervention("L0.mlp=zero"),)))
    assert calls, "under interventions the base run is another one"
