"""Interventions against plain torch hooks on Hugging Face's modules; and the identities that need no second implementation."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import CLEAN, CORRUPT, PROMPT, SHORT

from techniques.identities.requests import Identities
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from vocabulary.nodes import Intervention, Node, parse_intervention, UserError
from vocabulary.prompts import Prompt, Study

TOL = 1e-4
NAMES = ("Alice", "Tom", "Anna", "she")
SET = tuple(replace(PROMPT, corrupt=CLEAN.replace("John gave", f"{n} gave")) for n in NAMES)
RAGGED = (*SET, replace(PROMPT, corrupt=SHORT))
ZOO_SET = tuple(replace(PROMPT, corrupt=CLEAN.replace("John gave", f"{n} gave")) for n in ("Alice", "Luke", "Emma", "Lucy"))
ZOO_RAGGED = (*ZOO_SET, replace(PROMPT, corrupt="When Mary and John went to the store, Alice gave it to"))
NODES = [
    "L1H2", "L1H2@-1", "L1H3.q", "L1H3.k", "L1H2.v@5", "L1.attn", "L1.attn@S2", "L2.mlp@END", "L0.mlp", "L1.resid_pre@3", "L1.resid_mid", "L1.resid_mid@S2",
    "L1.resid_post@-2", "embed@S2", "embed", "L1.mlp.n5", "L2.mlp.n7@4",
]  # fmt: skip
OPS = ("zero", "scale:-0.5", "patch", "mean", "mean_all")


def prompts(arch: str, ragged: bool) -> tuple[Prompt, ...]:
    return (ZOO_RAGGED if ragged else ZOO_SET) if arch == "zoo" else (RAGGED if ragged else SET)


def spot(node: Node) -> tuple[str, int | None]:
    return ("z" if node.part == "z" else node.part, node.layer) if node.site == "head" else (node.site, node.layer)


def columns(reference, node: Node) -> slice:
    if node.site == "head":
        return reference.columns(node.part, node.head)
    return slice(node.index, node.index + 1) if node.site == "neuron" else slice(None)


def now(engine, study: Study) -> np.ndarray:
    """All logits of the run under interventions, by the model's own forward pass."""
    from model.interventions import prepare

    gen = prepare(engine.model, study)
    while True:
        try:
            next(gen)
        except StopIteration as stop:
            runs = stop.value
            break
    return engine.model.forward(t.tensor([runs.row("now").ids]), edits=runs.edits, keep=0)[0][0].numpy()


def expected(engine, reference, text: str, base: str, some: tuple[Prompt, ...]) -> np.ndarray:
    """The same by hooks on Hugging Face's modules."""
    do = parse_intervention(text)
    check = engine.model.check(PROMPT)
    row, other = (check.clean, check.corrupt) if base == "clean" else (check.corrupt, check.clean)
    place, cols = spot(do.node), columns(reference, do.node)
    pos = slice(None) if do.node.pos is None else row.labels[do.node.pos] if isinstance(do.node.pos, str) else do.node.pos % len(row.ids)
    sources = [engine.model.check(Prompt(p.corrupt)).clean.ids for p in some]
    value = None
    match do.op:
        case "patch":
            value = reference.read(other.ids, place)[0, pos, cols]
        case "mean":
            value = t.stack([reference.read(s, place)[0] for s in sources]).mean(0)[pos, cols]
        case "mean_all":
            value = t.cat([reference.read(s, place)[0, 1:] for s in sources]).mean(0)[cols]

    def edit(x: t.Tensor) -> None:
        match do.op:
            case "zero":
                x[0, pos, cols] = 0
            case "scale":
                x[0, pos, cols] *= do.value
            case _:
                x[0, pos, cols] = value

    return reference.run([row.ids], edits=[(place, edit)])[0][0]


@pytest.mark.slow
@pytest.mark.parametrize("node", NODES)
def test_every_site_and_operation(engine, reference, arch, node):
    if arch == "neox" and "resid_mid" in node:
        with pytest.raises(UserError, match="parallel"):
            engine.run(Run(Study(PROMPT, (parse_intervention(f"{node}=zero"),))))
        return
    clean = reference.run([engine.model.check(PROMPT).clean.ids])[0][0]
    for op in OPS:
        some = prompts(arch, ragged=op == "mean_all")
        study = Study(PROMPT, (parse_intervention(f"{node}={op}"),), prompt_set=some)
        got, want = now(engine, study), expected(engine, reference, f"{node}={op}", "clean", some)
        np.testing.assert_allclose(got, want, atol=TOL, err_msg=f"{node}={op}")
        before_the_change = op in ("patch", "mean") and node.partition("@")[2] in ("3", "4", "5")
        assert arch == "zoo" or before_the_change or np.abs(want - clean).max() > 1e-5, f"{node}={op} does nothing here: a weak test"


@pytest.mark.parametrize("node", ["L1H2", "L0.attn@S2", "L1.resid_pre", "L1.mlp"])
def test_base_corrupt(engine, reference, node):
    """Denoising: the corrupted prompt under patches from the clean one."""
    study = Study(PROMPT, (parse_intervention(f"{node}=patch"),), base="corrupt")
    np.testing.assert_allclose(now(engine, study), expected(engine, reference, f"{node}=patch", "corrupt", ()), atol=TOL)


@pytest.mark.parametrize("op", ["zero", "scale:0.5"])
def test_pattern_by_its_head(engine, reference, op):
    """Scaling a head's pattern scales its z."""
    do = parse_intervention(f"L1H1.pattern@-1={op}"), parse_intervention(f"L1H1@-1={op}")
    one, two = (now(engine, Study(PROMPT, (d,))) for d in do)
    np.testing.assert_allclose(one, two, atol=TOL)
    np.testing.assert_allclose(one, expected(engine, reference, f"L1H1@-1={op}", "clean", ()), atol=TOL)


@pytest.mark.parametrize("op", ["patch", "mean"])
def test_pattern_from_elsewhere(engine, reference, arch, op):
    """z of a head under another pattern is that pattern times its own values."""
    check, some = engine.model.check(PROMPT), prompts(arch, ragged=False)
    sources = [check.corrupt.ids] if op == "patch" else [engine.model.check(Prompt(p.corrupt)).clean.ids for p in some]
    pattern = np.mean([reference.patterns([ids])[1][0, 2] for ids in sources], 0)
    v = reference.read(check.clean.ids, ("v", 1))[0, :, reference.columns("v", 2)]

    def edit(x: t.Tensor) -> None:
        x[0, :, reference.columns("z", 2)] = t.tensor(pattern) @ v

    want = reference.run([check.clean.ids], edits=[(("z", 1), edit)])[0][0]
    got = now(engine, Study(PROMPT, (parse_intervention(f"L1H2.pattern={op}"),), prompt_set=some))
    np.testing.assert_allclose(got, want, atol=TOL)


def test_several_at_once_in_order(engine, reference, arch):
    """Two at one node apply one after the other; those at others add up as in one forward pass."""
    do = tuple(parse_intervention(s) for s in ("L0H1=zero", "L1H2=scale:3", "L1H2@-1=patch", "L2.mlp@S2=scale:0.5", "L1.attn@3=zero"))
    check = engine.model.check(PROMPT)
    source = reference.read(check.corrupt.ids, ("z", 1))
    z0, z1 = reference.columns("z", 1), reference.columns("z", 2)

    def z_one(x: t.Tensor) -> None:
        x[0, :, z1] *= 3
        x[0, -1, z1] = source[0, -1, z1]

    edits = [
        (("z", 0), lambda x: x[0, :, z0].zero_()),
        (("z", 1), z_one),
        (("mlp", 2), lambda x: x[0, check.clean.labels["S2"]].mul_(0.5)),
        (("attn", 1), lambda x: x[0, 3].zero_()),
    ]
    np.testing.assert_allclose(now(engine, Study(PROMPT, do)), reference.run([check.clean.ids], edits=edits)[0][0], atol=TOL)
    other_way = now(engine, Study(PROMPT, (do[2], do[1])))
    assert np.abs(other_way - now(engine, Study(PROMPT, (do[1], do[2])))).max() > 1e-4


def test_lens_reads_after_the_intervention(engine, reference, arch):
    """A point under an intervention holds what the intervention left there."""
    do = (parse_intervention("L1.resid_pre=zero"), parse_intervention("L1.resid_post@-1=scale:2"))
    do += () if arch == "neox" else (parse_intervention("L2.resid_mid@-1=zero"),)
    got = engine.run(Lens(Study(PROMPT, do), points=("L1.resid_pre", "L1.resid_post", "L2.resid_post") + (() if arch == "neox" else ("L2.resid_mid",))))
    check = engine.model.check(PROMPT)
    edits = [(("resid_pre", 1), lambda x: x.zero_()), (("resid_post", 1), lambda x: x[0, -1].mul_(2))]
    edits += [] if arch == "neox" else [(("resid_mid", 2), lambda x: x[0, -1].zero_())]
    reads = [("resid_pre", 1), ("resid_post", 1), ("resid_post", 2)] + ([] if arch == "neox" else [("resid_mid", 2)])
    acts = reference.run([check.clean.ids], edits=edits, read=reads)[1]
    for i, r in enumerate(reads):
        z = reference.logits(acts[r])[0]
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        np.testing.assert_allclose(got.prob[i], p[:, check.answers[0].ids[0]], atol=TOL, err_msg=str(r))


# ------------------------------------------------------------------ identities


def test_patch_nothing_and_everything(engine, reference):
    check = engine.model.check(PROMPT)
    clean, corrupt = (reference.run([r.ids])[0][0] for r in (check.clean, check.corrupt))
    np.testing.assert_allclose(now(engine, Study(PROMPT, base="corrupt")), corrupt, atol=TOL)
    everything = (Intervention(Node("resid_pre", 0), "patch"),)
    np.testing.assert_allclose(now(engine, Study(PROMPT, everything, "corrupt")), clean, atol=TOL)
    last = (Intervention(Node("resid_post", engine.model.info.n_layers - 1, pos="END"), "patch"),)
    np.testing.assert_allclose(now(engine, Study(PROMPT, last, "corrupt"))[-1], clean[-1], atol=TOL)
    result = engine.run(Run(Study(PROMPT, everything, "corrupt")))
    assert result.normalised == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("op", ["patch", "mean", "scale:1"])
@pytest.mark.parametrize("node", ["L1H2", "L1H1.pattern", "L1H1.k", "L0.attn", "L1.mlp", "L2.resid_pre", "L1.resid_mid", "L0.mlp.n3", "embed"])
def test_own_value_is_a_no_op(engine, reference, arch, node, op):
    if arch == "neox" and "resid_mid" in node:
        return
    same = replace(PROMPT, corrupt=CLEAN)
    got = now(engine, Study(same, (parse_intervention(f"{node}={op}"),), prompt_set=(same, same)))
    np.testing.assert_allclose(got, reference.run([engine.model.check(PROMPT).clean.ids])[0][0], atol=TOL)


def test_batch_of_one_is_batch_of_many(engine):
    check = engine.model.check(PROMPT)
    both = engine.model.forward(t.tensor([check.clean.ids, check.corrupt.ids]), keep=0)[0]
    for row, ids in zip(both, (check.clean.ids, check.corrupt.ids)):
        np.testing.assert_allclose(row, engine.model.forward(t.tensor([ids]), keep=0)[0][0], atol=TOL)


def test_swapping_roles(engine):
    """Clean patched from corrupted is the swapped prompt's corrupted patched from clean."""
    do = (parse_intervention("L1H2=patch"), parse_intervention("L1.mlp@-1=patch"))
    swapped = replace(PROMPT, clean=CORRUPT, corrupt=CLEAN, labels=())
    np.testing.assert_allclose(now(engine, Study(PROMPT, do)), now(engine, Study(swapped, do, "corrupt")), atol=1e-6)


def test_cache_and_order_change_nothing(engine):
    """The same requests, from the cache, after others, and after forgetting everything, give the same numbers."""
    studies = [Study(PROMPT, (parse_intervention(s),), prompt_set=()) for s in ("L1H2=patch", "L1H2@-1=patch", "L1.mlp=zero", "L1.mlp=scale:2.0")]
    first = [engine.run(Run(s)).now.metric for s in studies]
    again = [engine.run(Run(s)).now.metric for s in reversed(studies)][::-1]
    engine.model.cache.clear()
    fresh = [engine.run(Run(s)).now.metric for s in studies]
    assert first == again == fresh and len(set(first)) == len(first)


def test_patch_follows_its_source(engine):
    """The cache tells apart the same patch from another corrupted prompt."""
    do = (parse_intervention("L1.resid_pre=patch"),)
    one = engine.run(Run(Study(PROMPT, do))).now.top_logits
    two = engine.run(Run(Study(replace(PROMPT, corrupt=CLEAN.replace("Mary", "Alice")), do))).now.top_logits
    assert np.abs(one - two).max() > 1e-3


def test_mean_follows_its_set(engine, arch):
    do, some = (parse_intervention("L1.mlp=mean_all"),), prompts(arch, False)
    one = engine.run(Run(Study(PROMPT, do, prompt_set=some))).now.top_logits
    two = engine.run(Run(Study(PROMPT, do, prompt_set=some[:2]))).now.top_logits
    assert np.abs(one - two).max() > 1e-5


def test_identities_hold(engine):
    rows = engine.run(Identities(Study(PROMPT))).rows
    assert all(r.ok for r in rows if r.name != "noise floor of the metric"), [r for r in rows if not r.ok]
    names = " ".join(r.name for r in rows)
    for what in ("lens at the last point", "rows sum to one", "sum of its terms", "patch nothing", "patch everything", "Hugging Face", "noise floor", "heads"):
        assert what in names


def test_identities_say_what_does_not_apply(engines):
    rows = {r.name: r for r in engines["gpt2"].run(Identities(Study(replace(PROMPT, corrupt=SHORT)))).rows}
    row = rows["patch everything = clean run"]
    assert row.ok is None and "clean 15 tokens, corrupted 14" in row.note


def test_a_broken_model_is_red(engines, monkeypatch):
    """An engine that forgets the unembedding's bias or cap must show it."""
    model = engines["gemma2"].model
    monkeypatch.setattr(model, "softcap", 0.0)
    rows = {r.name: r.ok for r in engines["gemma2"].run(Identities(Study(PROMPT))).rows}
    assert rows["lens at the last point = logits"] is False


# ------------------------------------------------------------------ what can't be done


@pytest.mark.parametrize(
    "do, study, text",
    [
        ("L1H1=patch", Study(Prompt(CLEAN)), "patching needs a corrupted prompt"),
        ("L1H1=patch", Study(replace(PROMPT, corrupt=SHORT)), "clean has 15 tokens and corrupted 14"),
        ("L1H1=mean", Study(PROMPT), "open one first"),
        ("L1H1=mean", Study(PROMPT, prompt_set=(Prompt(CLEAN),)), "prompt set with corrupted prompts"),
        ("L1H1.pattern=mean", Study(PROMPT, prompt_set=RAGGED), "needs corrupted prompts as long as the prompt"),
        ("L1H1.pattern=mean_all", Study(PROMPT, prompt_set=SET), "a pattern has no mean over positions"),
        ("L9H1=zero", Study(PROMPT), "L9H1: the model has layers 0 to 2"),
        ("L1H4=zero", Study(PROMPT), "L1H4: the model has heads 0 to 3"),
        ("L1.mlp.n999=zero", Study(PROMPT), "the layer has neurons 0 to"),
        ("L1.sae.f3=zero", Study(PROMPT), "no SAE is chosen"),
        ("L1H1@15=zero", Study(PROMPT), "position 15 is outside the clean prompt, which has 15 tokens"),
        ("L1H1@-16=zero", Study(PROMPT), "position -16 is outside"),
        ("L1H1@X=zero", Study(PROMPT), "no position labelled 'X': it has IO, S1, S2, END"),
        ("L1H1@S2=zero", Study(replace(PROMPT, corrupt=SHORT), base="corrupt"), "the corrupted prompt has no position labelled 'S2'"),
    ],
)
def test_refusals(engines, do, study, text):
    with pytest.raises(UserError) as error:
        engines["gpt2"].run(Run(replace(study, interventions=(parse_intervention(do),))))
    assert text in str(error.value) and "\n" not in str(error.value)
    assert engines["gpt2"].model.leaks() == 0


def test_bad_operations(engines):
    for do, text in ((Intervention(Node("attn", 0), "explode"), "not an operation"), (Intervention(Node("attn", 0), "scale"), "needs a factor")):
        with pytest.raises(UserError, match=text):
            engines["gpt2"].run(Run(Study(PROMPT, (do,))))
    with pytest.raises(UserError, match="is not a site"):
        engines["gpt2"].run(Run(Study(PROMPT, (Intervention(Node("soul", 0), "zero"),))))
