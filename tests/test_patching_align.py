"""Prompts of unequal length: alignments, and patching across them against plain torch hooks on Hugging Face's modules."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import CLEAN, CORRUPT, PROMPT, SHORT
from hypothesis import given
from hypothesis import strategies as st
from test_sweeps import TOL, ZOO_SET, difference, missing, place_of, slopes, sweep

from vocabulary import alignment as align
from techniques.attention.requests import Attention
from techniques.attribution.requests import Attribution, AttributionSet
from techniques.circuits.requests import PathPatch
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from vocabulary.nodes import parse_intervention, parse_node, UserError
from vocabulary.prompts import Metric, Prompt, read_prompt, Study, TokenRow
from vocabulary.requests import Check

LONG = "When Mary and John went to the red store, Alice gave a drink to"
UNEQUAL = replace(PROMPT, corrupt=LONG)
KINDS = ("resid_pre", "resid_mid", "resid_post", "attn_mlp", "z", "q", "k", "v", "nodes", "z_pos", "cells", "neurons")


def row(ids: str, bos: bool = False, **labels: int) -> TokenRow:
    return TokenRow(tuple(map(ord, ids)), tuple(ids), labels | {"END": len(ids) - 1}, bos)


# ------------------------------------------------------------------ alignments


def test_by_diff():
    cases = {
        ("abcd", "abxd"): [(0, 0), (1, 1), (2, 2), (3, 3)],
        ("abcd", "abxcd"): [(0, 0), (1, 1), (2, 3), (3, 4)],
        ("abcd", "abyxd"): [(0, 0), (1, 1), (3, 4)],
        ("abcd", "xbcz"): [(0, 0), (1, 1), (2, 2), (3, 3)],
        ("aab", "aaab"): [(0, 0), (1, 1), (2, 3)],
        ("a", "xyz"): [(0, 2)],
        ("abcabc", "xbcabc"): [(i, i) for i in range(6)],
    }
    for (a, b), want in cases.items():
        assert align.by_diff(row(a), row(b)) == tuple(want), (a, b)
    assert align.by_diff(row("abc", bos=True), row("xyzw", bos=True)) == ((0, 0), (2, 3))


@given(st.text("abc", min_size=1, max_size=12), st.text("abc", min_size=1, max_size=12))
def test_a_diff_is_one_to_one_and_in_order(a, b):
    pairs = align.by_diff(row(a), row(b))
    assert align.check_pairs(pairs, len(a), len(b)) == pairs and (len(a) - 1, len(b) - 1) in pairs
    assert [j for _, j in pairs] == sorted(j for _, j in pairs)
    assert pairs == tuple((j, i) for i, j in align.by_diff(row(b), row(a))) or len(set(a) & set(b))
    if a == b:
        assert align.is_by_index(pairs, len(a), len(b))


def test_by_labels_and_given_pairs(engines):
    check = lambda p, how="": engines["gpt2"].run(Check(p, how))  # noqa: E731
    assert check(UNEQUAL).alignment == () and any("or an alignment" in h for h in check(UNEQUAL).hints)
    diff = check(UNEQUAL, "diff")
    assert diff.alignment[-1] == (14, 15) and len(diff.alignment) == 15 and "corrupted 8" in diff.hints[-1]
    assert diff.corrupt.labels == {"IO": 1, "S1": 3, "S2": 11, "END": 15} or diff.clean.bos
    by_label = check(UNEQUAL, "labels")
    assert dict(by_label.alignment) == {0: 0} | {i: dict(diff.alignment)[i] for i in by_label.clean.labels.values()}
    swapped = replace(UNEQUAL, corrupt_labels=(("S1", LONG.index("Mary")), ("IO", LONG.index("John"))))
    labels = check(swapped, "labels")
    assert labels.corrupt.labels["S1"] < labels.corrupt.labels["IO"] and (labels.clean.labels["S1"], labels.corrupt.labels["S1"]) in labels.alignment
    own = replace(UNEQUAL, alignment=((3, 2), (0, 0)))
    assert check(own).alignment == check(own, "diff").alignment == ((0, 0), (3, 2))
    assert check(PROMPT).alignment == tuple((i, i) for i in range(len(check(PROMPT).clean.ids)))
    for pairs, words in ((((0, 99),), "no position 99"), (((0, 0), (0, 1)), "paired twice"), (((-1, 0),), "no position -1")):
        assert words in check(replace(UNEQUAL, alignment=pairs)).problems[0]
    twice = replace(UNEQUAL, corrupt_labels=(("S1", 6), ("IO", 6)))
    assert "paired twice" in check(twice, "labels").problems[0]
    assert "is not an alignment" in check(UNEQUAL, "magic").problems[0]
    obj = {"clean": CLEAN, "corrupt": LONG, "corrupt_labels": {"IO": 5}, "alignment": [[0, 0], [3, 2]]}
    assert read_prompt(obj) == Prompt(CLEAN, LONG, corrupt_labels=(("IO", 5),), alignment=((0, 0), (3, 2)))
    for wrong in ({"alignment": [[0]]}, {"alignment": "0-0"}, {"corrupt_labels": {"IO": 999}}):
        with pytest.raises(UserError):
            read_prompt(obj | wrong)


# ------------------------------------------------------------------ patching across


def hooked(engine, reference, node, prompt: Prompt, how: str, base: str, source: int | None = None) -> float:
    """The metric by hooks on Hugging Face's modules: a node's value from the aligned positions of the other run."""
    check = engine.model.check(prompt, how)
    rows = {"clean": check.clean.ids, "corrupt": check.corrupt.ids}
    own, other = rows[base], rows["corrupt" if base == "clean" else "clean"]
    partner = {p[base == "corrupt"]: p[base == "clean"] for p in check.alignment}
    here = [node.pos] if node.pos is not None else sorted(partner)
    if source is not None:
        pattern, theirs = (reference.patterns([ids])[node.layer][0, node.head].copy() for ids in (own, other))
        pattern[node.pos, source] = theirs[partner[node.pos], partner[source]]
        spot, cols, here = ("z", node.layer), reference.columns("z", node.head), list(range(len(own)))
        new = t.tensor(pattern) @ reference.read(own, ("v", node.layer))[0, :, reference.columns("v", node.head)]
    else:
        spot, cols = place_of(reference, node)
        new = reference.read(other, spot)[0, [partner[i] for i in here], cols]

    def edit(x: t.Tensor) -> None:
        x[0, here, cols] = new

    return difference(engine, reference.run([own], edits=[(spot, edit)])[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_sweeps_across_an_alignment(engine, reference, arch, kind):
    """Some cells of every kind, both ways, by diff and by labels; cells without partner are none."""
    if missing(arch, kind):
        return
    rng = np.random.default_rng(KINDS.index(kind))
    for how, direction in (("diff", "denoise"), ("diff", "noise"), ("labels", "noise")):
        study, base = Study(UNEQUAL, align=how), "corrupt" if direction == "denoise" else "clean"
        got, plain = (sweep(engine, kind, study, direction=direction, plain=p) for p in (False, True))
        np.testing.assert_allclose(got.values, plain.values, atol=TOL)
        assert got.done == got.total and "across an alignment, by " + how in got.convention and "resumed" in got.mechanism
        moved = np.argwhere(np.abs(got.values - got.base) > 1e-5)
        for r, c in [*rng.permutation(np.argwhere(np.isfinite(got.values)))[:2].tolist(), *rng.permutation(moved)[:2].tolist()]:
            node = parse_node(f"L1H2.pattern@{r}" if kind == "cells" else got.address(r, c))
            want = hooked(engine, reference, node, UNEQUAL, how, base, c if kind == "cells" else None)
            assert abs(got.values[r, c] - want) < TOL, (how, direction, r, c)
        if kind in ("resid_pre", "z_pos"):
            pairs = engine.model.check(UNEQUAL, how).alignment
            assert np.isfinite(got.values).any(0).tolist() == [i in {p[base == "corrupt"] for p in pairs} for i in range(len(got.cols))]
        ends = [difference(engine, reference.run([ids])[0][0]) for ids in (engine.model.check(UNEQUAL).clean.ids, engine.model.check(UNEQUAL).corrupt.ids)]
        np.testing.assert_allclose([got.clean, got.corrupt], ends, atol=TOL)


@pytest.mark.parametrize("address", ["L1H2", "L1H1.k", "L0.mlp@S2", "embed@IO", "L1.resid_pre", "L1.mlp.n3@3"])
def test_interventions_across_an_alignment(engine, reference, arch, address):
    for base, study in (("clean", Study(UNEQUAL, align="diff")), ("corrupt", Study(UNEQUAL, align="diff", base="corrupt"))):
        node = parse_node(address)
        labels = {"clean": engine.model.check(UNEQUAL, "diff").clean, "corrupt": engine.model.check(UNEQUAL, "diff").corrupt}[base].labels
        where = replace(node, pos=labels[node.pos]) if isinstance(node.pos, str) else node
        got = engine.run(Run(replace(study, interventions=(parse_intervention(f"{address}=patch"),))))
        assert got.now.metric == pytest.approx(hooked(engine, reference, where, UNEQUAL, "diff", base), abs=TOL)
        assert "patched across an alignment, by diff" in got.convention


def test_equal_lengths_under_an_alignment(engine, arch):
    """The alignment by index is none at all; a partial one leaves the rest alone; swapped prompts with swapped pairs are the same table."""
    same = replace(PROMPT, alignment=engine.model.check(PROMPT).alignment)
    for kind in ("z", "attn"):
        np.testing.assert_allclose(sweep(engine, kind, Study(same)).values, sweep(engine, kind).values, atol=TOL)
    n = len(engine.model.check(PROMPT).clean.ids)
    partial = replace(PROMPT, alignment=((2, 3), (n - 1, n - 1)))
    one = sweep(engine, "resid_post", Study(partial))
    assert np.isfinite(one.values).any(0).sum() == 2 and one.values[-1, -1] == pytest.approx(one.clean, abs=TOL)
    swapped = replace(partial, clean=PROMPT.corrupt, corrupt=PROMPT.clean, labels=(), alignment=((3, 2), (n - 1, n - 1)))
    for kind in ("z", "resid_post"):
        a, b = sweep(engine, kind, Study(partial)), sweep(engine, kind, Study(swapped), direction="noise")
        np.testing.assert_allclose(a.values, b.values, atol=TOL)
    with pytest.raises(UserError, match="look at one run at a time"):
        engine.run(Attention(Study(partial), 0, "clean-corrupt"))


def test_set_of_several_alignments(engines):
    """Each prompt by its own alignment; cells are those that all of them have."""
    some = (UNEQUAL, replace(UNEQUAL, corrupt=CORRUPT), replace(UNEQUAL, corrupt=LONG.replace("red store", "store then red")))
    engine, study = engines["gpt2"], Study(PROMPT, prompt_set=some, align="diff")
    for kind, direction in (("z", "noise"), ("resid_pre", "noise")):
        got = sweep(engine, kind, study, direction=direction, over_set=True)
        for i, prompt in enumerate(some):
            alone = sweep(engine, kind, Study(prompt, align="diff"), direction=direction).values
            seen = np.isfinite(got.values)
            np.testing.assert_allclose(got.per_prompt[i][seen], alone[seen], atol=TOL)
        assert not (np.isnan(alone) & np.isfinite(got.values)).any()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attn_mlp", "z", "k"])
def test_estimates_across_an_alignment(engine, kind):
    slope, estimate = slopes(engine, Sweep(Study(UNEQUAL, align="diff"), kind))
    some = np.isfinite(estimate)
    np.testing.assert_allclose(estimate[some], np.broadcast_to(slope, estimate.shape)[some], atol=2e-3 + 0.01 * np.nanmax(np.abs(estimate)))
    whole = engine.run(Estimate(Study(UNEQUAL, align="diff"), "resid_pre", "ig", direction="noise", steps=20))
    assert np.isfinite(whole.values[0]).all()


def test_metric_position_across_an_alignment(engines):
    """A number is the clean prompt's position, in the corrupted one its partner; labels are each prompt's own."""
    engine = engines["gpt2"]
    corrupt = [engine.run(Run(Study(UNEQUAL, align="diff", metric=Metric("logit_diff", pos)))).corrupt.metric for pos in (11, "S2")]
    labels = engine.model.check(UNEQUAL, "diff").clean.labels
    assert engine.model.check(UNEQUAL, "diff").corrupt.labels["S2"] == labels["S2"] + 1
    got = sweep(engine, "z", Study(UNEQUAL, align="diff", metric=Metric("logit_diff", labels["S2"])))
    label = sweep(engine, "z", Study(UNEQUAL, align="diff", metric=Metric("logit_diff", "S2")))
    np.testing.assert_allclose(got.values, label.values, atol=TOL)
    assert got.corrupt == pytest.approx(corrupt[1], abs=TOL)


BAD = [
    (Sweep(Study(UNEQUAL), "z"), "align them"),
    (Sweep(Study(UNEQUAL, align="magic"), "z"), "is not an alignment"),
    (Sweep(Study(UNEQUAL, align="diff"), "pattern"), "a pattern's row"),
    (Sweep(Study(UNEQUAL, align="diff"), "pairs", nodes=("L1H1.pattern", "L0.mlp")), "a pattern's row"),
    (Sweep(Study(replace(UNEQUAL, alignment=((0, 0),))), "pairs", nodes=("L1.mlp@3", "L0.mlp")), "position 3 has no partner"),
    (Sweep(Study(replace(UNEQUAL, alignment=((0, 0),))), "neurons", node="L1.mlp@3"), "position 3 has no partner"),
    (Sweep(Study(replace(UNEQUAL, alignment=((0, 0),)), metric=Metric("logit_diff", 3)), "z"), "metric's position 3 has no partner"),
    (Run(Study(UNEQUAL, (parse_intervention("L1H1=patch"),))), "align them"),
    (Run(Study(replace(UNEQUAL, alignment=((0, 0),)), (parse_intervention("L1H1@4=patch"),))), "no partner"),
    (Run(Study(UNEQUAL, (parse_intervention("L1H1.pattern=patch"),), align="diff")), "a pattern's row"),
    (
        Sweep(Study(PROMPT, prompt_set=(PROMPT, Prompt(SHORT, CLEAN, PROMPT.answers, PROMPT.foils)), align="diff"), "mlp", direction="noise", over_set=True),
        "with 14",
    ),
]


@pytest.mark.parametrize("ask, words", BAD, ids=[f"{i} {w}" for i, (_, w) in enumerate(BAD)])
def test_bad_input(engines, ask, words):
    with pytest.raises(UserError, match=words):
        engines["gpt2"].run(ask)
    engines["gpt2"].check_hooks()


# ------------------------------------------------------------------ interventions: resample, noise, freeze, add


def plain(engine, reference, node, prompt: Prompt, value) -> float:
    """The metric when a node of the clean run gets a value."""
    ids = engine.model.check(prompt).clean.ids
    spot, cols = place_of(reference, node)
    return difference(engine, reference.run([ids], edits=[(spot, lambda x: x[0, :, cols].copy_(value))])[0][0])


@pytest.mark.parametrize("address", ["L1H2", "L0.mlp", "L1H1.q", "L1.resid_pre"])
def test_resample_and_noise(engine, reference, arch, address):
    """An intervention is the sweep's cell with the same seed; resampled values are those of another prompt's run; noise has the embedding's scale."""
    some = ZOO_SET if arch == "zoo" else tuple(replace(PROMPT, corrupt=CLEAN.replace("John gave", f"{n} gave")) for n in ("Alice", "Tom", "Anna", "she"))
    node = parse_node(address)
    kind, cell = {"L1H2": ("z", (1, 2)), "L0.mlp": ("nodes", (0, -1)), "L1H1.q": ("q", (1, 1)), "L1.resid_pre": ("", ())}[address]
    for seed in (0, 5):
        study = Study(PROMPT, prompt_set=some, seed=seed)
        got = {
            op: engine.run(Run(replace(study, interventions=(parse_intervention(f"{address}={op}"),)))) for op in ("resample", "noise", "noise:3", "noise:1")
        }
        assert got["noise"].now.metric == got["noise:3"].now.metric != got["noise:1"].now.metric and f"seed {seed}" in got["noise"].convention
        if kind:
            for op in ("resample", "noise"):
                table = sweep(engine, kind, study, op=op, direction="noise", seed=seed)
                assert got[op].now.metric == pytest.approx(table.values[cell], abs=TOL)
        spot, cols = place_of(reference, node)
        others = [engine.model.check(Prompt(p.corrupt)).clean.ids for p in some if p != PROMPT]
        wants = [plain(engine, reference, node, PROMPT, reference.read(ids, spot)[0, :, cols]) for ids in others]
        assert min(abs(got["resample"].now.metric - w) for w in wants) < TOL
    from model.replacements import noise_scale

    embed = reference.hf.get_input_embeddings().weight.detach()
    scale = (embed.std() * (embed.shape[1] ** 0.5 if arch == "gemma2" else 1)).item()
    assert noise_scale(engine.model) == pytest.approx(scale, rel=0.1)


def test_freeze_and_add(engine, reference, arch):
    """freeze: the node keeps its own run's value under other interventions. add: steps along the answer's minus the foil's unembedding."""
    check = engine.model.check(PROMPT)
    ids = check.clean.ids
    study = Study(PROMPT, tuple(parse_intervention(d) for d in ("L0.mlp=zero", "L1.attn=freeze", "L2H1@-1=freeze")))
    attn = reference.read(ids, ("attn", 1))
    edits = [(("mlp", 0), lambda x: x.zero_()), (("attn", 1), lambda x: x.copy_(attn))]
    z, cols = reference.read(ids, ("z", 2)), reference.columns("z", 1)
    edits.append((("z", 2), lambda x: x[0, -1, cols].copy_(z[0, -1, cols])))
    want = difference(engine, reference.run([ids], edits=edits)[0][0])
    assert engine.run(Run(study)).now.metric == pytest.approx(want, abs=TOL)
    u = t.tensor(reference.unembed[check.answers[0].ids[0]] - reference.unembed[check.foils[0].ids[0]]).float()
    for site in ("resid_pre", "mlp"):
        do = parse_intervention(f"L1.{site}@-1=add:-2.5")
        want = difference(engine, reference.run([ids], edits=[((site, 1), lambda x: x[0, -1].add_(-2.5 * u / u.norm()))])[0][0])
        assert engine.run(Run(Study(PROMPT, (do,)))).now.metric == pytest.approx(want, abs=TOL)
    with pytest.raises(UserError, match="residual stream"):
        engine.run(Run(Study(PROMPT, (parse_intervention("L1H1=add:1"),))))
    with pytest.raises(UserError, match="no answer"):
        engine.run(Run(Study(replace(PROMPT, answers=()), (parse_intervention("L1.mlp=add:1"),))))
    with pytest.raises(UserError, match="another corrupted prompt"):
        engine.run(Run(Study(PROMPT, (parse_intervention("L1.mlp=resample"),))))


@pytest.mark.parametrize("base", ["clean", "corrupt"])
def test_paths_across_an_alignment(engine, arch, base):
    """From a sender to all receivers and the logits at once: the activation patch of the sender across the same alignment; embeddings too."""
    from techniques.circuits.edges import receivers

    study, every = Study(UNEQUAL, base=base, align="diff"), tuple(receivers(engine.model.info))
    for node, done in (("L0H1", "L0H1=patch"), ("embed", "L0.resid_pre=patch")):
        want = engine.run(Run(replace(study, interventions=(parse_intervention(done),)))).now.metric
        ask = PathPatch(study, (node,), every, direction="noise" if base == "clean" else "denoise")
        got = engine.run(ask)
        assert float(got.values[np.isfinite(got.values)][0]) == pytest.approx(want, abs=TOL), node


def test_attribution_without_a_position_is_at_the_metrics_partner(engine):
    """Without a position, attribution of the corrupted prompt is that of the token that the metric is read at there, as `Run` reads it."""
    study = Study(UNEQUAL, align="diff", metric=Metric("logit_diff", 12), prompt_set=(UNEQUAL,) * 2)
    want, there = engine.run(Run(study)).corrupt.metric, engine.run(Attribution(study, "corrupt"))
    assert there.pos == 13 and max(abs((there.logit if there.capped is None else there.capped) - want), there.error) < TOL
    of_set = engine.run(AttributionSet(study, "corrupt"))
    np.testing.assert_allclose(of_set.mean.heads, there.cells.heads, atol=TOL)
