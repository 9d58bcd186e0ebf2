"""Scores of circuits against a computation under plain hooks, discovery on the zoo, comparison, files, drawings, and the script."""

import contextlib
import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import PROMPT

from techniques.circuits import drawings
from techniques.circuits.edges import all_edges, edge_runs
from engine import Engine
from techniques.circuits.requests import Compare, Discover, Score
from techniques.output.requests import Run
from vocabulary.circuit import Circuit, combined, grouped, parse_edge, toggled
from vocabulary.nodes import parse_node, UserError
from vocabulary.prompts import Metric, Prompt, read_prompt_set, Study
from vocabulary.requests import Load, Progress
from vocabulary.wire import from_json, to_json
from screen.session import Session, State, read_session
from test_paths import ended
from utils import ROOT

STUDY = Study(PROMPT)
IOI = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:8]
SET = Study(IOI[0], prompt_set=IOI)
INDUCTION = read_prompt_set(ROOT / "zoo" / "prompts" / "induction.jsonl")[:8]


def heads(info) -> tuple[str, ...]:
    return tuple(f"L{n}H{h}" for n in range(info.n_layers) for h in range(info.n_heads))


def by_hand(engine: Engine, kept: set[tuple[int, int]], rest: str) -> float:
    """The metric with all heads but some replaced, by hooks on z in one whole forward pass."""
    model = engine.model
    ids = [t.tensor([model.row(text, None).ids]) for text in (PROMPT.clean, PROMPT.corrupt)]
    zs, last = [f"blocks.{n}.attn.hook_z" for n in range(model.info.n_layers)], f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    _, other = model.forward(ids[1], zs)

    def put(layer: int):
        def fn(x):
            x = x.clone()
            for h in range(model.info.n_heads):
                if (layer, h) not in kept:
                    x[:, :, h] = other[zs[layer]][:, :, h] if rest == "patch" else 0
            return x

        return zs[layer], fn

    _, got = model.forward(ids[0], [last], [put(n) for n in range(model.info.n_layers)])
    logits = model.unembed(model.norm(got[last][:, -1]))[0]
    answer, foil = (model.answer(PROMPT.clean, a).ids[0] for a in (PROMPT.answers[0], PROMPT.foils[0]))
    return float(logits[answer] - logits[foil])


@pytest.mark.parametrize("rest", ["patch", "zero"])
def test_faithfulness_of_nodes(engine, rest):
    """The whole model 1, one head alone as under plain hooks; a part alone away as an intervention on it."""
    every = heads(engine.model.info)
    whole = engine.run(Score(STUDY, Circuit("c", "", every), rest=rest))
    assert whole.faithfulness.mean == pytest.approx(1, abs=1e-4) and whole.alone.mean == pytest.approx(whole.model.mean, abs=1e-4)
    some = engine.run(Score(STUDY, Circuit("c", "", ("L0H1", "L1H2")), ("faithfulness", "effects"), rest))
    alone, empty = by_hand(engine, {(0, 1), (1, 2)}, rest), by_hand(engine, set(), rest)
    assert some.alone.mean == pytest.approx(alone, abs=1e-4) and some.empty.mean == pytest.approx(empty, abs=1e-4)
    assert some.faithfulness.mean == pytest.approx((alone - empty) / (some.model.mean - empty), rel=1e-3, abs=1e-4)
    away = by_hand(engine, {(n, h) for n in range(engine.model.info.n_layers) for h in range(engine.model.info.n_heads)} - {(0, 1)}, rest)
    assert some.effects[0] == pytest.approx(away - some.model.mean, abs=1e-4)


def test_faithfulness_of_edges(engine):
    """All edges 1; the edges of a discovered circuit as the edge machine says."""
    whole = engine.run(Score(STUDY, Circuit("c", "", (), all_edges(engine.model.info)), rest="patch"))
    assert whole.faithfulness.mean == pytest.approx(1, abs=1e-4) and whole.empty.mean == pytest.approx(engine.run(Run(STUDY)).corrupt.metric, abs=1e-4)
    found = engine.run(Discover(STUDY, "eap", edges=12))
    if found.circuit.edges:
        assert engine.run(Score(STUDY, found.circuit, rest="patch")).faithfulness.mean == pytest.approx(found.score, abs=1e-4)


@pytest.mark.parametrize("node", ["embed", "L0.attn", "L0.resid_pre", "L0.mlp.n3", "L0H1.pattern"])
def test_what_no_circuit_holds_is_refused_in_words(engines, node):
    with pytest.raises(UserError, match=f"{node}: a circuit holds heads"):
        engines["zoo"].run(Score(STUDY, Circuit("c", "zoo", ("L0H1", node))))


def test_parts_and_positions(engines):
    """q, k, v of a head together are the head; a head at all its positions, named one by one, is the head."""
    zoo, n = engines["zoo"], len(engines["zoo"].model.row(IOI[0].clean, None).ids)
    score = lambda *nodes: zoo.run(Score(SET, Circuit("c", "", nodes), rest="patch")).alone.mean  # noqa: E731
    assert score("L0H1", "L3H3.q", "L3H3.k", "L3H3.v") == pytest.approx(score("L0H1", "L3H3"), abs=1e-4)
    assert score("L0H1", "L0H3", "L3H3.v") != pytest.approx(score("L0H1", "L0H3", "L3H3"), abs=1e-2)
    assert score("L0H1", *(f"L3H3@{p}" for p in range(n))) == pytest.approx(score("L0H1", "L3H3"), abs=1e-4)
    assert score("L0H1@S2", "L0H3@S2", "L3H3@END") == pytest.approx(score("L0H1", "L0H3", "L3H3"), abs=0.05), "the prompts differ at S2 only"
    assert score("L0H1@1", "L0H3@1", "L3H3@END") != pytest.approx(score("L0H1", "L0H3", "L3H3"), abs=1)
    llama = engines["llama"]
    alone = lambda *nodes: llama.run(Score(STUDY, Circuit("c", "", nodes), rest="patch")).alone.mean  # noqa: E731
    assert alone("L1H2.q", "L1H2.k", "L1H2.v") == pytest.approx(alone("L1H2"), abs=1e-4)


def test_completeness_and_minimality_by_brute_force(engines):
    zoo = engines["zoo"]
    circuit = Circuit("c", "", ("L0H1", "L0H3", "L3H2", "L3H3"), groups={"copy": ("L3H2", "L3H3")})
    r = zoo.run(Score(SET, circuit, ("faithfulness", "completeness", "minimality"), "patch", subsets=30, greedy=4))
    every = set(heads(zoo.model.info))
    f = lambda nodes: zoo.run(Score(SET, Circuit("x", "", tuple(nodes)), rest="patch")).alone.mean  # noqa: E731
    assert () in r.subsets and ("L3H2", "L3H3") in r.subsets
    for k in (("L3H2", "L3H3"), r.subsets[-1]):
        i = r.subsets.index(k)
        left = set(circuit.nodes) - set(k)
        assert r.without_model[i] == pytest.approx(f(every - set(k)), abs=1e-3)
        if left:
            assert r.without_circuit[i] == pytest.approx(f(left), abs=1e-3)
    assert r.incompleteness == pytest.approx(np.abs(r.without_circuit - r.without_model).max(), abs=1e-4)
    for v, size, k in zip(r.parts, r.minimal, r.minimal_with):
        a = set(circuit.nodes) - set(k)
        b = a - {v}
        want = abs(f(a) - (f(b) if b else r.empty.mean)) / abs(r.model.mean)
        assert size == pytest.approx(want, abs=1e-3), (v, k)
    assert "seed 0" in r.convention and "patch" not in r.convention and "corrupted run" in r.convention
    again = zoo.run(Score(SET, circuit, ("faithfulness",), "patch"))
    assert again.faithfulness.low <= again.faithfulness.mean <= again.faithfulness.high and again.faithfulness.values.size == len(IOI)


def test_a_sample_of_parts_and_an_estimate(engines):
    """A bound on samples tries so many parts, with the values all of them have; the estimate counts the sets and cuts none but a few."""
    zoo, circuit = engines["zoo"], Circuit("c", "", ("L0H1", "L0H2", "L0H3", "L1H0", "L3H2", "L3H3"))
    what = ("faithfulness", "effects", "completeness", "minimality")
    whole, some = (zoo.run(Score(SET, circuit, what, "patch", subsets=8, greedy=3, samples=n)) for n in (0, 3))
    tried = np.isfinite(some.minimal)
    assert tried.sum() == 3 and np.allclose(some.minimal[tried], whole.minimal[tried], atol=1e-5) and np.isfinite(whole.minimal).all()
    assert (
        some.minimal_mean.mean == pytest.approx(some.minimal[tried].mean(), abs=1e-5)
        and some.minimal_mean.low < some.minimal_mean.mean < some.minimal_mean.high
    )
    assert "3 of 6 parts drawn" in some.convention and "mean minimality over all parts" in some.convention and whole.minimal_mean is None
    assert some.sets < whole.sets and some.incompleteness <= whole.incompleteness + 1e-6
    for samples, full in ((0, whole), (3, some)):
        dry = zoo.run(Score(SET, circuit, what, "patch", subsets=8, greedy=3, samples=samples, dry=True))
        assert dry.expected > 0 and not dry.minimal.size and not dry.effects.size and not dry.subsets
        assert full.sets <= dry.sets <= 1.5 * full.sets and dry.faithfulness.mean == pytest.approx(full.faithfulness.mean, abs=1e-6)
    with pytest.raises(UserError, match="not negative"):
        zoo.run(Score(SET, circuit, samples=-1))


# ------------------------------------------------------------------ discovery


def test_eap_is_a_finite_difference(engine):
    """The score of an edge is the derivative of the metric along its cut: a small share of the way."""
    run = ended(edge_runs(engine.model, STUDY, "patch"))[0]
    scores = run.slopes(run.change())
    step, edges = 1e-2, all_edges(engine.model.info)
    picked = [edges[i] for i in np.random.default_rng(0).choice(len(edges), 12, replace=False)]
    own, other = run.clean, run.acts
    for scale in run.scales:  # what a head writes is linear in z over the scale
        z = scale.replace("ln1_post.hook_scale", "attn.hook_z")
        other = other | {z: other[z] * (own[scale] / other[scale])[:, :, None], scale: own[scale]}
    run.carry({n: own[n] + step * (x - own[n]) for n, x in other.items()})
    values = ended(run.run([run.mask(None, [e]) for e in picked]))[:, 0]
    full = ended(run.run([run.mask(None)]))[0, 0]
    for edge, value in zip(picked, values):
        score = scores[run.index.place(edge)]
        assert (value - full) / step == pytest.approx(score, abs=5e-3 + 0.05 * abs(score)), edge


@pytest.mark.parametrize("arch", ["gpt2", "zoo"])
def test_eap_on_transformer_lens_own_model(engines, folders, arch):
    """Every edge as EAP's own implementations score it: HookedTransformer with split inputs, gradients by autograd; (corrupted - clean sender) . gradient."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
    from transformers import AutoModelForCausalLM

    hf, engine = AutoModelForCausalLM.from_pretrained(folders[arch], dtype=t.float32), engines[arch]
    c, info = hf.config, engine.model.info
    cfg = HookedTransformerConfig(
        n_layers=c.n_layer, d_model=c.n_embd, n_heads=c.n_head, d_head=c.n_embd // c.n_head, d_mlp=c.n_inner or 4 * c.n_embd, d_vocab=c.vocab_size,
        n_ctx=c.n_positions, act_fn="gelu_new", normalization_type="LN", eps=c.layer_norm_epsilon, device="cpu", init_weights=False,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    model.set_use_attn_result(True)
    study = SET if arch == "zoo" else STUDY
    prompt = study.prompt_set[0] if study.prompt_set else study.prompt
    check = engine.model.check(prompt)
    a, f = check.answers[0].ids[0], check.foils[0].ids[0]
    ends = [f"blocks.{n}.{x}" for n in range(cfg.n_layers) for x in ("hook_q_input", "hook_k_input", "hook_v_input", "hook_mlp_in")]
    ends.append(f"blocks.{cfg.n_layers - 1}.hook_resid_post")
    sends = ["blocks.0.hook_resid_pre", *(f"blocks.{n}.{x}" for n in range(cfg.n_layers) for x in ("attn.hook_result", "hook_mlp_out"))]
    acts: list[dict] = [{}, {}]
    grads: dict = {}
    for side, row in zip(acts, (check.clean, check.corrupt)):

        def keep(x, hook, side=side):
            side[hook.name] = x.detach()

        def leaf(x, hook, side=side):
            if side is acts[0]:
                x = x.detach().requires_grad_(True) if not x.requires_grad else x
                x.retain_grad()
                grads[hook.name] = x
            return x

        with t.enable_grad():
            logits = model.run_with_hooks(t.tensor([row.ids]), fwd_hooks=[*((n, keep) for n in sends), *((n, leaf) for n in ends)])
        if side is acts[0]:
            (logits[0, -1, a] - logits[0, -1, f]).backward()
    change = {n: acts[1][n] - acts[0][n] for n in sends}

    def sent(e):
        if e.sender == "embed":
            return change[sends[0]]
        node = parse_node(e.sender)
        return change[f"blocks.{node.layer}.hook_mlp_out"] if node.site == "mlp" else change[f"blocks.{node.layer}.attn.hook_result"][:, :, node.head]

    def slope(e):
        if e.receiver == "logits":
            return grads[ends[-1]].grad
        node = parse_node(e.receiver)
        return (
            grads[f"blocks.{node.layer}.hook_mlp_in"].grad if node.site == "mlp" else grads[f"blocks.{node.layer}.hook_{node.part}_input"].grad[:, :, node.head]
        )

    found = engine.run(Discover(replace(study, prompt=prompt, prompt_set=()), "eap", edges=20))
    want = [float((sent(e) * slope(e)).sum()) for e in map(parse_edge, found.edges)]
    assert len(want) == len(all_edges(info)) and max(map(abs, want)) > 1e-2
    np.testing.assert_allclose(found.scores, want, atol=1e-4 * max(1, *map(abs, want)))


@pytest.mark.slow
def test_attribution_ranks_edges_as_cutting_them_does(engines):
    """Rank correlation of EAP-IG with every edge really cut, on the zoo's IOI prompts."""
    zoo, study = engines["zoo"], replace(SET, prompt_set=IOI[:4])
    found = zoo.run(Discover(study, "eap-ig", edges=30))
    runs = ended(edge_runs(zoo.model, study, "patch"))
    true = np.concatenate([ended(r.run([r.mask(None, [e]) for e in found.edges])) for r in runs], 1).mean(1) - np.concatenate([r.value for r in runs]).mean()
    rank = lambda x: np.argsort(np.argsort(np.abs(x)))  # noqa: E731
    top = np.argsort(-np.abs(true))[:100]
    assert np.corrcoef(rank(true[top]), rank(found.scores[top]))[0, 1] > 0.7
    assert np.corrcoef(true, found.scores)[0, 1] > 0.7


@pytest.mark.slow
@pytest.mark.parametrize("method", ["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"])
def test_attribution_on_the_zoo(engines, method):
    found = engines["zoo"].run(Discover(SET, method, edges=60))
    assert found.score > 0.6 and {"L3H2", "L3H3", "L0H1"} <= set(found.circuit.nodes)
    assert (np.diff(found.counts) >= 0).all() and found.faithfulness[-1] == pytest.approx(found.score, abs=1e-5)
    assert engines["zoo"].run(Discover(SET, method, dry=True)).expected > 0


@pytest.mark.slow
def test_acdc_finds_the_induction_circuit(engines):
    """With the mean in place of what is cut: the previous-token heads, the induction heads and edges between them."""
    found = engines["zoo"].run(Discover(Study(INDUCTION[0], prompt_set=INDUCTION), "acdc", threshold=0.1, rest="mean"))
    assert "L0H2" in found.circuit.nodes and {"L1H0", "L1H1", "L1H2", "L1H3"} & set(found.circuit.nodes)
    assert [e for e in map(parse_edge, found.circuit.edges) if e.sender == "L0H2" and e.receiver in ("L1H0.k", "L1H1.k", "L1H2.k", "L1H3.k")]
    assert found.score > 0.85


@pytest.mark.slow
def test_circuits_of_ioi_are_small_and_faithful(engines):
    zoo = engines["zoo"]
    found = zoo.run(Discover(SET, "acdc", threshold=0.15))
    assert sum("H" in n for n in found.circuit.nodes) <= 0.4 * 16 and found.score >= 0.85
    small = zoo.run(Discover(SET, "greedy", rest="patch", target=0.85))
    assert len(small.circuit.nodes) <= 0.4 * 16 and small.score >= 0.85
    assert zoo.run(Score(SET, small.circuit, rest="patch")).faithfulness.mean == pytest.approx(small.score, abs=1e-4)
    assert zoo.run(Discover(SET, "greedy", rest="patch", nodes=3)).counts.min() == 0


@pytest.mark.slow
def test_a_chain_of_removals_is_one_after_the_other(engines, monkeypatch):
    """ACDC's batches change nothing: the same circuit with chains of one edge."""
    from techniques.circuits import edge_search as discovery

    gpt2 = engines["gpt2"]
    many = gpt2.run(Discover(STUDY, "acdc", threshold=1e-4))
    monkeypatch.setattr(discovery, "FIRST", 1)
    monkeypatch.setattr(discovery, "MOST", 1)
    one = gpt2.run(Discover(STUDY, "acdc", threshold=1e-4))
    assert one.circuit.edges == many.circuit.edges and len(one.circuit.edges) < len(all_edges(gpt2.model.info))


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (Score(STUDY, Circuit("c")), "is empty"),
        (Score(STUDY, Circuit("c", "", ("L9H9",))), "not a node of"),
        (Score(STUDY, Circuit("c", "", ("L1.mlp",)), rest="zero"), "only MLPs"),
        (Score(STUDY, Circuit("c", "", ("L1.sae.f3",)), rest="zero"), "SAE"),
        (Score(STUDY, Circuit("c", "", ("L1H1",)), rest="mean"), "prompt set"),
        (Score(STUDY, Circuit("c", "", ("L1H1",)), rest="half"), "use one of"),
        (Score(STUDY, Circuit("c", "", ("L1H1",)), ("beauty",)), "not a score"),
        (Score(Study(replace(PROMPT, corrupt=None)), Circuit("c", "", ("L1H1",)), rest="patch"), "no corrupted prompt"),
        (Score(Study(replace(PROMPT, answers=())), Circuit("c", "", ("L1H1",)), rest="zero"), "no answer"),
        (Discover(STUDY, "magic"), "not a way"),
        (Discover(STUDY, edges=0), "at least 1"),
        (Discover(replace(STUDY, metric=Metric("rank"))), "no gradient"),
        (Discover(replace(STUDY, prompt=replace(PROMPT, corrupt="When Mary"))), "equal length"),
        (Compare(Circuit("c", "", ("L1H1",))), "compare with what"),
        (Compare(Circuit("c", "zoo", ("L1H1",)), published="ioi"), "is a circuit of"),
    ],
)
def test_bad_input(engines, ask, words):
    with pytest.raises(UserError, match=words):
        engines["gpt2"].run(ask)


@pytest.fixture(scope="module")
def half(folders):
    """Engines in bfloat16, or float16."""
    return {
        (arch, dtype): Engine(Load(str(folders[arch]), dtype=dtype)) for arch, dtype in (("gpt2", "bfloat16"), ("gemma2", "bfloat16"), ("llama", "float16"))
    }


@pytest.mark.parametrize("arch, dtype", [("gpt2", "bfloat16"), ("gemma2", "bfloat16"), ("llama", "float16")])
def test_half_precision(engines, half, arch, dtype):
    """Discovery and edge scores run in the model's dtype and are close to float32's, what is cut to zero too."""
    own, full = half[arch, dtype], engines[arch]
    for method in ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted"):
        a, b = (e.run(Discover(STUDY, method, edges=20, steps=2)).scores for e in (own, full))
        assert np.corrcoef(a, b)[0, 1] > 0.99 and np.abs(a - b).max() < 0.15 * np.abs(b).max(), method
    circuit = full.run(Discover(STUDY, "eap", edges=60)).circuit
    a, b = (e.run(Run(STUDY)) for e in (own, full))
    noise = 0.05 + 2 * max(abs(a.clean.metric - b.clean.metric), abs(a.corrupt.metric - b.corrupt.metric))  # of the model itself in this dtype
    for rest in ("patch", "zero"):
        a, b = (e.run(Score(STUDY, circuit, ("faithfulness", "effects"), rest)) for e in (own, full))
        for x, y in ((a.model, b.model), (a.alone, b.alone), (a.empty, b.empty)):
            assert x.mean == pytest.approx(y.mean, abs=noise), rest
        assert np.abs(a.effects - b.effects).max() < 2 * noise, rest
    assert own.run(Discover(STUDY, "acdc", threshold=0.3)).scores.size == len(all_edges(own.model.info))


# ------------------------------------------------------------------ the object


def test_keep_group_and_combine():
    c = toggled(toggled(Circuit("a", "zoo"), "1.1"), "L0H1->L2H3.k")
    assert c.nodes == ("L0H1", "L1H1", "L2H3") and c.edges == ("L0H1->L2H3.k",)
    c = grouped(c, "S-inhibition", ("L2H3", "L1H1"))
    assert toggled(c, "L2H3").edges == () and toggled(c, "L2H3").groups == {"S-inhibition": ("L1H1",)}
    other = toggled(toggled(Circuit("b", "zoo"), "L1H1"), "L3.mlp")
    assert combined(c, other, "union", "u").nodes == ("L0H1", "L1H1", "L2H3", "L3.mlp")
    assert combined(c, other, "intersection", "i").nodes == ("L1H1",) and combined(c, other, "difference", "d").nodes == ("L0H1", "L2H3")
    for bad in ("L1.attn", "L1H1.pattern", "L2H3->L1H1.q->x", "L2H3.q->logits", "L2H3->L2.attn"):
        with pytest.raises(UserError):
            toggled(c, bad)
    with pytest.raises(UserError, match="not in a"):
        grouped(c, "x", ("L3H3",))
    assert from_json(json.loads(json.dumps(to_json(c))), Circuit) == c


def test_in_the_session(tmp_path):
    s = Session(State(), tmp_path / "s.jsonl")
    s.do("keep", part="L1H1")
    s.do("keep", part="L0H1->L1H1.k")
    s.do("group", name="g", nodes=["L1H1"])
    s.do("new_circuit", name="b")
    s.do("keep", part="L3.mlp")
    s.do("combine", how="union", one="circuit", other="b", name="both")
    assert s.state.current.nodes == ("L0H1", "L1H1", "L3.mlp") and len(s.state.circuits) == 3
    s.do("rename_circuit", name="both", to="all")
    s.do("delete_circuit", name="b")
    for bad in (("select_circuit", {"name": "b"}), ("new_circuit", {"name": "all"}), ("keep", {"part": "L1.attn"}), ("receivers", {"addresses": ["L1H1"]})):
        with pytest.raises(UserError):
            s.do(bad[0], **bad[1])
    s.do("undo")
    assert [c.name for c in s.state.circuits] == ["circuit", "b", "all"]
    again, warning = read_session(tmp_path / "s.jsonl")
    assert not warning and again.state == s.state


def test_files(tmp_path):
    c = grouped(Circuit("a b", "zoo", ("L0H1", "L2H3.v@S2", "L3.mlp"), ("L0H1->L3.mlp",), found="by hand"), "g", ("L0H1",))
    assert drawings.read_circuit(drawings.write_circuit(c, tmp_path / "c.json")) == (c, ())
    (tmp_path / "bad.json").write_text('{"nodes": ["L0H1", "L0Q1", 7], "edges": ["L0H1->L2H3.k", "L2H3->x"], "groups": {"g": ["L0H1", "L9H9"]}, "colour": 1}')
    got, wrong = drawings.read_circuit(tmp_path / "bad.json")
    assert got.nodes == ("L0H1", "L2H3") and got.edges == ("L0H1->L2H3.k",) and got.groups == {"g": ("L0H1",)}
    assert len(wrong) == 5 and any("nodes 2" in w for w in wrong) and any("edges 2" in w for w in wrong) and any("L9H9" in w for w in wrong)
    for text, words in (("{", "not JSON"), ("[1]", "not a circuit"), ('{"nodes": []}', "holds no node"), ('{"nodes": 3}', "not a circuit")):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(UserError, match=words):
            drawings.read_circuit(tmp_path / "x.json")
    with pytest.raises(UserError, match="no circuit at"):
        drawings.read_circuit(tmp_path / "none.json")
    ioi, wrong = drawings.published("ioi")
    assert len(ioi.nodes) == 26 and not wrong and len(drawings.published("greater-than")[0].nodes) == 17
    with pytest.raises(UserError, match="greater-than, ioi"):
        drawings.published("nothing")


def test_drawings():
    c = grouped(
        Circuit("c", "zoo", ("L0H1", "L1.mlp", "L2H3"), ("L0H1->L2H3.k", "embed->L0H1.v", "L1.mlp->L2H3.v", "L0H1->L1.mlp", "L2H3->logits")), "copy", ("L2H3",)
    )
    assert drawings.draw(c, {"L2H3": -1.5}) == [
        "logits", "     in ◂ L2H3", "L2", "  L2H3  copy  -1.500", "     .k ◂ L0H1", "     .v ◂ L1.mlp", "L1", "  L1.mlp", "     in ◂ L0H1", "L0", "  L0H1", "     .v ◂ embed",
    ]  # fmt: skip
    assert drawings.draw(replace(c, edges=()), {"L2H3": -1.5}) == ["L2  L2H3(copy) -1.500", "L1  L1.mlp", "L0  L0H1"]
    assert '"L0H1" -> "L2H3" [label="k"];' in drawings.dot(c) and "rank=same" in drawings.dot(c)
    assert "  L0H1 -->|k| L2H3" in drawings.mermaid(c) and 'subgraph g0["copy"]' in drawings.mermaid(c)
    assert drawings.table(c).splitlines()[3] == "L2H3\tcopy\t\t"
    assert all(len(line) <= 80 for line in drawings.draw(replace(c, edges=tuple(f"L{n}H{h}->L9.mlp" for n in range(9) for h in range(9)), nodes=("L9.mlp",))))


def printed_by(code: str) -> float:
    """The faithfulness that a script prints."""
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "circuit.py", "exec"), {})
    finally:
        t.set_grad_enabled(True)
    return float(out.getvalue().split("faithfulness")[1])


@pytest.mark.slow
@pytest.mark.parametrize("edges", [False, True])
def test_the_script_prints_the_same_faithfulness(engines, edges):
    zoo = engines["zoo"]
    found = zoo.run(Discover(SET, "eap", edges=40)).circuit
    circuit = found if edges else Circuit("c", "zoo", ("L0H1@S2", "L0H3", "L3H2.v", "L3H3"))
    rest, mlps = ("patch", False) if edges else ("mean", True)
    result = zoo.run(Score(SET, circuit, rest=rest, mlps=mlps))
    assert printed_by(drawings.circuit_script(circuit, SET, zoo.model.info, Load(), rest, mlps, result)) == pytest.approx(result.faithfulness.mean, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("rest, kept", [("patch", True), ("mean", False), ("mean_all", True), ("zero", False)])
def test_the_script_of_features(engines, rest, kept):
    zoo, study = engines["zoo"], replace(SET, saes=("zoo/L2.resid_post", "zoo/L1.resid_post"), sae_error=kept)
    found = zoo.run(Discover(study, "features", nodes=12, rest=rest)).circuit
    circuit = replace(found, nodes=(*found.nodes[:-1], f"{found.nodes[-1]}@END"))
    result = zoo.run(Score(study, circuit, rest=rest))
    assert printed_by(drawings.circuit_script(circuit, study, zoo.model.info, Load(), rest, False, result)) == pytest.approx(result.faithfulness.mean, abs=1e-4)
    with pytest.raises(UserError, match="not both"):
        drawings.circuit_script(replace(circuit, nodes=("L0H1", *circuit.nodes)), study, zoo.model.info, Load(), rest)
    with pytest.raises(UserError, match="none is loaded"):
        drawings.circuit_script(circuit, SET, zoo.model.info, Load(), rest)


def test_an_sae_without_a_feature_in_the_circuit_is_left_alone(engines):
    """Two are loaded, and the circuit is of one: score, script and discovery agree, and the other SAE changes nothing."""
    zoo = engines["zoo"]
    both, one = (replace(SET, saes=saes) for saes in (("zoo/L2.resid_post", "zoo/L1.resid_post"), ("zoo/L2.resid_post",)))
    circuit = Circuit("c", "", ("L2.sae.f30", "L2.sae.f45", "L2.sae.f659"))
    result = zoo.run(Score(both, circuit, rest="patch"))
    assert result.faithfulness.mean == pytest.approx(zoo.run(Score(one, circuit, rest="patch")).faithfulness.mean, abs=1e-6) and result.faithfulness.mean > 0.1
    assert printed_by(drawings.circuit_script(circuit, both, zoo.model.info, Load(), "patch")) == pytest.approx(result.faithfulness.mean, abs=1e-4)
    found = zoo.run(Discover(both, "features", nodes=1))
    assert len({n[:2] for n in found.circuit.nodes}) == 1 and "replaced in zoo/L2" in found.convention
    assert found.score == pytest.approx(zoo.run(Score(both, found.circuit, rest="patch")).faithfulness.mean, abs=1e-4)


def test_compare():
    a = Circuit("a", "gpt2", ("L9H9", "L10H0", "L0H0.q"), ())
    engine = Engine.__new__(Engine)
    from techniques.circuits.compare import compare

    r = compare(Compare(a, published="ioi", edges=("L9H9->logits", "L10H0->logits", "L0H0->logits"), scores=(3.0, 2.0, 1.0)))
    assert set(r.both) == {"L9H9", "L10H0"} and r.only_here == ("L0H0",) and len(r.only_there) == 24 and r.area == pytest.approx(1.0)
    assert r.nodes == pytest.approx(2 / 27) and engine is not None


def test_progress_in_a_log(capsys, monkeypatch):
    """Where stderr is no terminal a line comes every ten seconds."""
    from rich.console import Console

    from techniques import shell

    now = [0.0]
    monkeypatch.setattr(shell.time, "monotonic", lambda: now[0])
    show = shell.shower(Console(stderr=True, highlight=False))
    for now[0] in range(0, 35, 3):
        show(Progress(int(now[0]), 35, f"at {now[0]}"))
    assert capsys.readouterr().err.split("\n")[:-1] == ["at 12", "at 24"]


@pytest.mark.slow
def test_command_line(capsys, tmp_path):
    from engine import main

    data = ROOT / "zoo" / "prompts" / "ioi_abba.jsonl"
    small = tmp_path / "small.jsonl"
    small.write_text("\n".join(data.read_text().splitlines()[:4]))
    assert main(["discover", "--set", str(small), "--method", "eap", "--out", str(tmp_path / "c.json")]) == 0 and (tmp_path / "c.json").exists()
    assert main(["score", "--set", str(small), "--circuit", str(tmp_path / "c.json"), "--rest", "patch", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["faithfulness"]["mean"] > 0.3
    assert (
        main(["score", "--set", str(small), "--circuit", str(tmp_path / "c.json"), "--rest", "patch", "--dry"]) == 0
        and "sets, about" in capsys.readouterr().out
    )
    assert main(["circuit", "--circuit", str(tmp_path / "c.json"), "--form", "dot"]) == 0 and "digraph" in capsys.readouterr().out
    assert main(["score", "--nodes", "L9H9"]) == 2 and main(["compare", "--circuit", "nothing"]) == 2
    assert isinstance(IOI[0], Prompt)
