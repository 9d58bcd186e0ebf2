"""Path patching and the edge machine: identities, an independent computation under plain hooks, both conventions, positions, sets, bad input."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import PROMPT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from techniques.circuits.edges import all_edges, edge_values, own_edge, receivers, senders
from engine import Engine
from techniques.circuits.requests import PathPatch
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from vocabulary.circuit import parse_edge
from vocabulary.nodes import parse_node, UserError
from vocabulary.prompts import Metric, Prompt, read_prompt_set, Study
from model.places import where
from utils import ROOT

STUDY = Study(PROMPT)
IOI = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:6]


def ended(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def everything(info) -> tuple[str, ...]:
    heads = [f"L{n}H{h}.{p}" for n in range(info.n_layers) for h in range(info.n_heads) for p in "qkv"]
    return (*heads, *(f"L{n}.mlp" for n in range(info.n_layers)), "logits")


@pytest.mark.slow
@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_to_everything_is_activation_patching(engine, direction):
    """All receivers and the logits at once: the sender's whole effect."""
    paths = engine.run(PathPatch(STUDY, receivers=everything(engine.model.info), direction=direction))
    patched = engine.run(Sweep(STUDY, "nodes", direction=direction))
    shared = slice(0, patched.values.shape[1])
    assert np.nanmax(np.abs(paths.values[1:, shared] - patched.values)) < 1e-4
    other = engine.run(Run(STUDY))
    assert paths.values[0, 0] == pytest.approx((other.corrupt if direction == "noise" else other.clean).metric, abs=1e-4), (
        "embed to everything is the other run"
    )


def by_hand(engine, sender: str, receiver: str, mlps: bool) -> float:
    """Four runs under hooks on whole forward passes: both prompts, the frozen run in which the receiver is read, and the run that gets what was read."""
    model = engine.model
    ids = [t.tensor([model.row(text, None).ids]) for text in (PROMPT.clean, PROMPT.corrupt)]
    n, per = model.info.n_layers, model.info.n_heads // model.info.n_kv_heads
    zs, ms = [f"blocks.{i}.attn.hook_z" for i in range(n)], [f"blocks.{i}.hook_mlp_out" for i in range(n) if f"blocks.{i}.hook_mlp_out" in model.points]
    (_, clean), (_, corrupt) = model.forward(ids[0], [*zs, *ms]), model.forward(ids[1], [*zs, *ms])
    node, end = parse_node(sender), None if receiver == "logits" else parse_node(receiver)
    spot = where(model, node, model.row(PROMPT.clean, None, PROMPT.labels), "the prompt")

    def freeze(name: str):
        def fn(x):
            y = clean[name].clone()
            if name == (f"blocks.{node.layer}.attn.hook_z" if node.site == "head" else f"blocks.{node.layer}.hook_mlp_out"):
                y[spot] = corrupt[name][spot]
            return y

        return name, fn

    frozen = [freeze(z) for z in zs] + [freeze(m) for m in ms if not mlps or node.site == "mlp" and m.startswith(f"blocks.{node.layer}.")]
    if mlps:  # what comes before the sender is unchanged anyway
        frozen = [f for f in frozen if f]
    last = f"blocks.{n - 1}.hook_resid_post"
    if end is None:
        _, got = model.forward(ids[0], [last], frozen)
        final = got[last]
    else:
        name = f"blocks.{end.layer}.attn.hook_{end.part}" if end.site == "head" else f"blocks.{end.layer}.hook_mlp_out"
        read = [f for f in frozen if f[0] != name]
        _, got = model.forward(ids[0], [name], read)
        index = where(model, end, model.row(PROMPT.clean, None, PROMPT.labels), "the prompt")

        def put(x):
            x = x.clone()
            x[index] = got[name][index]
            return x

        final = model.forward(ids[0], [last], [(name, put)])[1][last]
    assert per >= 1
    logits = model.unembed(model.norm(final[:, -1]))[0]
    answer, foil = (model.answer(PROMPT.clean, a).ids[0] for a in (PROMPT.answers[0], PROMPT.foils[0]))
    return float(logits[answer] - logits[foil])


@pytest.mark.parametrize("mlps", [False, True])
def test_equal_to_plain_hooks(engine, mlps):
    last = engine.model.info.n_layers - 1
    pairs = [
        ("L0H1", f"L{last}H2.q"),
        ("L0H0@S2", f"L{last}H1.k"),
        ("L0H2", f"L{last}H3.v@-1"),
        ("L0.mlp", f"L{last}H2.v"),
        ("L1H3", "logits"),
        ("L0H3", "L1.mlp"),
    ]
    for sender, receiver in pairs:
        found = engine.run(PathPatch(STUDY, (sender,), (receiver,), convention="mlps" if mlps else "direct"))
        value = found.values[np.isfinite(found.values)]
        assert value.size == 1 and value[0] == pytest.approx(by_hand(engine, sender, receiver, mlps), abs=1e-4), (sender, receiver)
        assert ("computed again" in found.convention) == mlps or "ln1_post" in str(engine.model.bridge.blocks[0])


def test_one_sender_to_each_receiver(engine):
    """The table of receivers holds what each receiver's own request gives; a receiver before the sender has no cell."""
    table = engine.run(PathPatch(STUDY, ("L1H1",), (), each="receiver"))
    assert table.rows[-1] == "logits" and np.isnan(table.values[0]).all()
    for row, col, receiver in ((1, 12, "L1.mlp"), (2, 3, "L2H1.q"), (2, 5, "L2H1.v"), (2, 12, "L2.mlp"), (len(table.rows) - 1, 0, "logits")):
        if np.isnan(table.values[row, col]):
            assert engine.model.parallel or row >= len(table.rows) - 1
            continue
        alone = engine.run(PathPatch(STUDY, ("L1H1",), (receiver,)))
        assert table.values[row, col] == pytest.approx(float(alone.values[2, 1]), abs=1e-5), receiver


@pytest.mark.parametrize("name", ["END", -1])
def test_each_receiver_at_a_named_position(engine, name):
    """A label or a number from the end is the index it stands for: against the cell's own path, receiver by receiver."""
    end = len(engine.run(PathPatch(STUDY, ("L0H1",), (), each="receiver")).tokens.ids) - 1
    table = engine.run(PathPatch(STUDY, ("L0H1",), (f"L1H1.q@{name}",), each="receiver"))
    want = engine.run(PathPatch(STUDY, ("L0H1",), (f"L1H1.q@{end}",), each="receiver"))
    np.testing.assert_array_equal(table.values, want.values)
    assert table.nodes == want.nodes and f"L1H1.q@{end}" in table.nodes
    one = engine.run(PathPatch(STUDY, ("L0H1",), (f"L1H1.q@{end}",)))
    assert table.values[1, 3] == pytest.approx(float(one.values[1, 1]), abs=1e-5)


def test_positions_and_sets(engines):
    zoo = engines["zoo"]
    by_pos = zoo.run(PathPatch(Study(IOI[0]), ("L0H1",), ("L3H2.k", "L3H3.k"), by_pos=True))
    assert by_pos.rows == ("L0H1",) and by_pos.values.shape[1] == len(by_pos.tokens.ids)
    differ = next(i for i, (a, b) in enumerate(zip(by_pos.tokens.ids, zoo.model.row(IOI[0].corrupt, None).ids)) if a != b)
    assert np.allclose(by_pos.values[0, :differ], by_pos.base)
    study = Study(IOI[0], prompt_set=IOI)
    whole = zoo.run(PathPatch(study, receivers=("L3H3.v",), over_set=True))
    each = [zoo.run(PathPatch(Study(p), receivers=("L3H3.v",))).values for p in IOI]
    assert np.allclose(whole.values, np.mean(each, 0), atol=1e-4, equal_nan=True) and whole.per_prompt.shape[0] == len(IOI)
    assert np.nanargmax(np.abs(whole.values[1:] - whole.base)) // 5 < 3
    small = zoo.run(PathPatch(study, receivers=("L3H3.v",), over_set=True, chunk_mb=1))
    assert np.allclose(whole.values, small.values, atol=1e-5, equal_nan=True)


def test_an_estimate_runs_the_first_paths(engines):
    study = Study(IOI[0], prompt_set=IOI)
    dry = engines["zoo"].run(PathPatch(study, receivers=("L3H3.v",), over_set=True, chunk_mb=1, dry=True))
    assert 0 < dry.done < dry.total and "the whole table: about" in dry.warning


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (PathPatch(STUDY, ("L2H1",), ("L1H1.q",)), "after its sender"),
        (PathPatch(STUDY, ("L9H1",)), "layers 0 to"),
        (PathPatch(STUDY, ("L1H1.q",)), "does not send"),
        (PathPatch(STUDY, (), ("L1H1",)), "does not receive"),
        (PathPatch(STUDY, (), ()), "needs a receiver"),
        (PathPatch(STUDY, (), (), each="receiver"), "needs? a sender|need a sender"),
        (PathPatch(STUDY, convention="all"), "not a convention"),
        (PathPatch(Study(replace(PROMPT, corrupt=None))), "no corrupted prompt"),
        (PathPatch(Study(replace(PROMPT, corrupt="When Mary"))), "equal length"),
        (PathPatch(replace(STUDY, metric=Metric("loss"))), "loss has none or several"),
        (PathPatch(STUDY, ("L1H1@40",)), "outside"),
        (PathPatch(STUDY, ("nonsense",)), "is not a node"),
    ],
)
def test_bad_input(engines, ask, words):
    with pytest.raises(UserError, match=words):
        engines["gpt2"].run(ask)


# ------------------------------------------------------------------ edges


def test_no_edge_cut_and_every_edge_cut(engine):
    """All edges: the clean run. None: the corrupted one. One cut edge: the path patch along it."""
    info, run = engine.model.info, engine.run(Run(STUDY))
    every = frozenset(all_edges(info))
    cut = ["L0H1->L1H2.q", "L0.mlp->logits", "embed->L1H0.v"]
    values = ended(edge_values(engine.model, STUDY, [every, frozenset(), *(every - {own_edge(info, e)} for e in cut)]))[:, 0]
    assert values[0] == pytest.approx(run.clean.metric, abs=1e-4) and values[1] == pytest.approx(run.corrupt.metric, abs=1e-4)
    for edge, value in zip(cut, values[2:]):
        ends = parse_edge(edge)
        found = engine.run(PathPatch(STUDY, (ends.sender,), (ends.receiver,)))
        tolerance = (
            0.05 if info.architecture.startswith("Gemma") and "H" in ends.sender else 1e-4
        )  # the norm after attention: frozen here, computed again there
        assert value == pytest.approx(float(found.values[np.isfinite(found.values)][0]), abs=tolerance), edge


def test_the_order_of_edges(engine):
    info = engine.model.info
    edges = all_edges(info)
    assert len(set(edges)) == len(edges) and all(own_edge(info, e) == e for e in edges)
    assert edges[0].startswith("embed->L0H0.q") and edges[-1].endswith("->logits")
    assert {parse_edge(e).sender for e in edges} == set(senders(info)) and {parse_edge(e).receiver for e in edges} == set(receivers(info))
    for bad, words in (("L1H0->L0H0.q", "before the sender"), ("L0H0->L9H0.q", "layers 0 to"), ("L0H0@1->L1H0.q", "without positions")):
        with pytest.raises(UserError, match=words):
            own_edge(info, bad)


@pytest.mark.parametrize("rest", ["zero", "mean", "mean_all", "resample"])
def test_what_cut_edges_carry(engines, rest):
    """Cutting every edge into the logits leaves the final stream that the other values add up to."""
    zoo = engines["zoo"]
    study = Study(IOI[0], prompt_set=IOI)
    every = frozenset(all_edges(zoo.model.info))
    full, none = ended(edge_values(zoo.model, study, [every, frozenset()], rest))
    clean = [zoo.run(Run(Study(p))).clean.metric for p in IOI]
    assert np.allclose(full, clean, atol=1e-4) and none.shape == (len(IOI),)
    if rest == "mean":
        assert np.allclose(none, none[0], atol=20) and not np.allclose(none, clean, atol=1)


@pytest.mark.slow
@settings(max_examples=10, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_cut_edges_one_by_one_are_cut_edges_in_a_batch(engines, data):
    engine = engines[data.draw(st.sampled_from(["gpt2", "neox", "llama", "qwen3"]))]
    edges = all_edges(engine.model.info)
    sets = data.draw(st.lists(st.frozensets(st.sampled_from(edges)), min_size=2, max_size=4))
    together = ended(edge_values(engine.model, STUDY, sets))
    alone = np.concatenate([ended(edge_values(engine.model, STUDY, [s])) for s in sets])
    assert np.allclose(together, alone, atol=1e-5)


def test_unequal_prompts_of_a_set(engines):
    other = Prompt(PROMPT.clean + " the", PROMPT.corrupt + " the", PROMPT.answers, PROMPT.foils)
    engine: Engine = engines["gpt2"]
    every = frozenset(all_edges(engine.model.info))
    values = ended(edge_values(engine.model, Study(PROMPT, prompt_set=(other, PROMPT, other)), [every]))[0]
    assert np.allclose(values, [engine.run(Run(Study(p))).clean.metric for p in (other, PROMPT, other)], atol=1e-4)
