"""
Attribution graphs against a second computation: Hugging Face's own modules with plain torch hooks, their attention and norms frozen, a source's write taken
away; and the graph's influence, pruning, scores and files against their definitions.
"""

import json
import os
from contextlib import ExitStack
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, PROMPT
from dictionaries import build, build_cross, save
from safetensors.torch import load_file, save as to_bytes
from ui import asked, grid, make_app, press, reply, shown

from engine import main
from model.sae_loading import load
from techniques.features.requests import Examples
from techniques.graphs import building, files, replacement, supernodes
from techniques.graphs.requests import KINDS, AttributionGraph, GraphEffects, GraphGroups, GraphMarks, GraphResult, GraphSteer
from techniques.graphs.file_transcoders import read_all
from techniques.graphs.pane import GraphPane
from techniques.graphs.replacement import LocalModel
from techniques.graphs.walk import place, steps
from techniques.graphs.influence import cut, flow, prune, replacement_and_completeness, shares
from screen import graph_steps, history
from screen.keys import hints
from screen.session import State, read_session
from techniques.qk.pane import QKPane
from utils import ROOT
from tui import PANES, TABLE
from vocabulary.files import folder
from vocabulary.wire import to_json
from vocabulary.nodes import UserError
from vocabulary.prompts import Metric, Prompt, Study

STUDY = Study(PROMPT)
IOI = Prompt("When Mary and John went to the store, John gave a drink to", None, (" Mary",), (" John",))
SITES = ("mlp.hook_in", "ln2.hook_normalized", "hook_mlp_in")


def transcoders(engine, folder, kinds=("jumprelu_transcoder", "skip_transcoder", "transcoder")) -> dict:
    """One at every MLP but the last layer's, reading at different places; by layer, as sae_lens has them, and where they lie."""
    model, out = engine.model, {}
    ids, info = model.row(PROMPT.clean, None, PROMPT.labels).ids, model.info
    for layer in range(info.n_layers - 1):
        hook = f"blocks.{layer}.{SITES[layer % 3]}"
        hook = hook if hook in model.points or hook.endswith("mlp_in") else f"blocks.{layer}.mlp.hook_in"
        read = f"blocks.{layer}.hook_resid_{'pre' if model.parallel else 'mid'}" if hook.endswith("mlp_in") else hook
        acts = model.trace(ids, [read, f"blocks.{layer}.hook_mlp_out"])
        sae = build(kinds[layer % len(kinds)], hook, info.d_model, info.d_model, layer, tuple(acts[n][0].float() for n in acts))
        out[layer] = sae, save(sae, folder / f"{info.name.replace('/', '_')}.L{layer}")
    return out


class Frozen:
    """Hugging Face's model, its patterns and norms' scales those of a clean run, its MLPs writing what they wrote there (and `more`): streams and logits."""

    def __init__(self, reference, ids, skip=None):
        self.ref, self.ids, self.n, self.skip, self.into = reference, ids, reference.config.num_hidden_layers, skip or {}, {}
        self.pattern, self.seen = reference.patterns([ids]), {}
        body = reference.hf
        self.norms = [m for m in body.modules() if "Norm" in type(m).__name__ and m not in self.inner_norms()]
        self.mlps = {("mlp", i) for i in range(self.n)}
        with ExitStack() as stack, t.no_grad():
            for m in self.norms:
                stack.callback(m.register_forward_pre_hook(lambda m, args: self.seen.__setitem__(m, args[0].double())).remove)
            for i in range(self.n):
                stack.callback(reference.blocks[i].mlp.register_forward_pre_hook(lambda m, args, i=i: self.into.__setitem__(i, args[0])).remove)
            _, self.clean = reference.run([ids], read=[*self.mlps, ("resid_pre", 0)])

    def inner_norms(self):
        """Norms of queries and keys, which a frozen pattern makes idle."""
        return {m for i in range(self.n) for m in self.ref.attn(i).modules() if "Norm" in type(m).__name__}

    def linear(self, m, x):
        seen = self.seen[m]
        eps = getattr(m, "eps", getattr(m, "variance_epsilon", None))
        if "RMS" in type(m).__name__:
            gain = m.weight.double() + ("Gemma" in type(m).__name__)
            return x / (seen.square().mean(-1, keepdim=True) + eps).sqrt() * gain
        return (x - x.mean(-1, keepdim=True)) / (seen.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * m.weight.double() + m.bias.double()

    def attention(self, i, x):
        """Pattern times values, by the attention's own weights."""
        a, ref, h = self.ref.attn(i), self.ref, self.ref.heads
        x = x.double()
        if ref.arch == "gpt2":
            v = (x @ a.c_attn.weight.double() + a.c_attn.bias.double())[..., 2 * h * ref.d_head :].unflatten(-1, (h, ref.d_head))
            out = (a.c_proj.weight.double().T, a.c_proj.bias.double())
        elif ref.arch == "gpt_neox":
            v = t.nn.functional.linear(x, a.query_key_value.weight.double(), a.query_key_value.bias.double()).unflatten(-1, (h, 3, ref.d_head))[..., 2, :]
            out = (a.dense.weight.double(), a.dense.bias.double())
        else:
            bias = None if a.v_proj.bias is None else a.v_proj.bias.double()
            v = t.nn.functional.linear(x, a.v_proj.weight.double(), bias).unflatten(-1, (ref.kv_heads, ref.d_head)).repeat_interleave(h // ref.kv_heads, 2)
            out = (a.o_proj.weight.double(), None if a.o_proj.bias is None else a.o_proj.bias.double())
        z = t.einsum("bhds,bshe->bdhe", t.tensor(self.pattern[i]).double(), v)
        return t.nn.functional.linear(z.flatten(2), *out)

    def run(self, more=(), live=False):
        """What is read with `more` [(place, tensor)] added to what is written there: streams in front of the MLPs and logits. `live`: MLPs and their norms run."""
        now, add = {}, dict(more)
        with ExitStack() as stack, t.no_grad():
            for m in self.norms if not live else [m for m in self.norms if m not in [b.ln_2 for b in self.ref.blocks]]:
                stack.callback(m.register_forward_hook(lambda m, args, out: self.linear(m, args[0].double()).to(out)).remove)
            for i in range(self.n):

                def attend(m, args, kwargs, out, i=i):
                    new = self.attention(i, args[0] if args else kwargs["hidden_states"]).float()
                    return (new, *out[1:]) if isinstance(out, tuple) else new

                stack.callback(self.ref.attn(i).register_forward_hook(attend, with_kwargs=True).remove)

                def write(m, args, out, i=i):
                    skipped = (now[i] - self.into[i]) @ self.skip[i].T if i in self.skip else 0
                    return (out if live else self.clean["mlp", i] + skipped) + add.get(("mlp", i), 0)

                stack.callback(self.ref.blocks[i].mlp.register_forward_pre_hook(lambda m, args, i=i: now.__setitem__(i, args[0])).remove)
                stack.callback(self.ref.place("mlp", i)[0].register_forward_hook(write).remove)
            edits = [(("resid_pre", 0), lambda x: x.add_(add.get(("resid_pre", 0), t.zeros(1))))]
            parallel = self.ref.arch == "gpt_neox"
            reads = [("resid_pre" if parallel else "resid_mid", i) for i in range(self.n)]
            logits, got = self.ref.run([self.ids], edits, reads)
        return {i: got[place, i][0].double() for place, i in reads}, t.tensor(logits)[0].double()


def pre_activation(frozen, sae, layer, stream, pos, index):
    """A feature's, of the stream in front of its MLP."""
    hook, ref = sae.cfg.metadata.hook_name, frozen.ref
    block = ref.blocks[layer]
    norm = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm"}.get(ref.arch, "post_attention_layernorm")
    m = getattr(block, norm)
    x = stream[pos]
    if not hook.endswith("hook_mlp_in"):
        whole = frozen.linear(m, stream[None])[0]
        if hook.endswith("normalized"):
            gain = m.weight.double() + ("Gemma" in type(m).__name__)
            whole = (whole - (m.bias.double() if getattr(m, "bias", None) is not None else 0)) / gain
        x = whole[pos]
    return (x @ sae.W_enc[:, index].double()).item() + sae.b_enc[index].item()


def write_of(frozen, found, kind, layer, pos, index, value, coders, gone):
    """What a node writes, as a change that takes it away: (place, tensor [1, seq, d_model])."""
    place = ("resid_pre", 0) if kind == "token" else ("mlp", layer)
    out = t.zeros_like(frozen.clean[place])
    if kind == "token":
        whole = frozen.clean[place] if frozen.ref.arch != "gpt2" else frozen.ref.embed(t.tensor([frozen.ids]))
        out[0, pos] = -whole[0, pos].detach()
    elif kind == "feature":
        out[0, pos] = -value * coders[layer][0].W_dec[index]
    else:
        out[0, pos] = -gone[layer][pos]
    return place, out


def errors(engine, coders, ids):
    """What transcoders leave of each MLP [seq, d_model], by sae_lens's own forward; position 0 has no features."""
    out = {}
    for layer in range(engine.model.info.n_layers):
        y = engine.model.trace(ids, [f"blocks.{layer}.hook_mlp_out"])[f"blocks.{layer}.hook_mlp_out"][0].float()
        if layer in coders:
            sae, _ = coders[layer]
            hook = sae.cfg.metadata.hook_name
            hook = hook.replace("hook_mlp_in", f"hook_resid_{'pre' if engine.model.parallel else 'mid'}")
            x = engine.model.trace(ids, [hook])[hook][0].float()
            f = sae.encode(x)
            f[0] = 0
            y = y - f @ sae.W_dec - sae.b_dec - (x @ sae.W_skip.T if hasattr(sae, "W_skip") else 0)
        out[layer] = y
    return out


def compare(engine, reference, folder, kinds, n=6, **more):
    """Edges of a graph that is not pruned against a source's write taken away, in the frozen model; at most `n` sources."""
    coders = transcoders(engine, folder, kinds)
    ask = AttributionGraph(STUDY, tuple(c[1] for c in coders.values()), node_threshold=1, edge_threshold=1, logits=2, mass=1, batch=64, **more)
    r = engine.run(ask)
    ids = r.tokens.ids
    skip = {layer: sae.W_skip.detach() for layer, (sae, _) in coders.items() if hasattr(sae, "W_skip")}
    frozen, gone = Frozen(reference, ids, skip), errors(engine, coders, ids)
    base, logits = frozen.run()
    assert np.abs(logits[-1].numpy() - reference.run([ids])[0][0, -1]).max() < 1e-3 or reference.softcap
    names = [KINDS[k] for k in r.kind]
    edge = {(s, d): w for s, d, w in zip(r.source.tolist(), r.to.tolist(), r.weight)}
    rng, some = np.random.default_rng(0), []
    for kind in ("feature", "error", "token"):
        of = [i for i, k in enumerate(names) if k == kind and np.isfinite(r.value[i]) and r.value[i] != 0]
        some += rng.permutation(of)[: n // 3].tolist()
    targets = [i for i, k in enumerate(names) if k == "feature"]
    targets = rng.permutation(targets)[:25].tolist() + [i for i, k in enumerate(names) if k == "logit"]
    size = max(1.0, np.abs(r.weight).max())
    tried = 0
    for s in some:
        kind, layer, pos, index = names[s], int(r.layer[s]), int(r.at[s]), int(r.index[s])
        change = write_of(frozen, r, kind, layer, pos, index, float(r.value[s]), coders, gone)
        streams, out = frozen.run([change])
        for d in targets:
            if names[d] == "logit":
                if reference.softcap:
                    continue
                before, after = (x[-1].numpy()[int(r.index[d])] - x[-1].numpy().mean() for x in (logits, out))
                got = before - after
            else:
                at = int(r.layer[d])
                sae = coders[at][0]
                got = np.subtract(*(pre_activation(frozen, sae, at, x[at], int(r.at[d]), int(r.index[d])) for x in (base, streams)))
            assert edge.get((s, d), 0.0) == pytest.approx(got, abs=1e-4 * size), (kind, names[d])
            tried += 1
    assert tried > 20
    return r


def test_activations_come_in_the_order_asked_for_whatever_is_at_hand(engines):
    model = engines["gpt2"].model
    ids, names = (5, 7, 9, 11), ["blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", "blocks.0.hook_mlp_out"]
    model.trace(ids, names[1:2])
    assert list(model.trace(ids, names)) == names


@pytest.mark.parametrize("name", ["gpt2", pytest.param("all", marks=pytest.mark.table)])
def test_edges_are_what_taking_the_source_away_does_in_the_frozen_model(engines, references, tmp_path, name):
    for arch in [name] if name != "all" else [a for a in ARCHS if a != "zoo"]:
        r = compare(engines[arch], references[arch], tmp_path / arch, ("skip_transcoder", "jumprelu_transcoder"))
        assert r.selected == r.active and r.error < 1e-3
        adds_up(r)


@pytest.mark.parametrize("name, reads, crosses", [
    ("gpt2", "hook_resid_mid", True), *(pytest.param(*x, marks=pytest.mark.table) for x in [
        ("llama", "mlp.hook_in", True), ("gemma2", "hook_resid_mid", True), ("qwen3", "ln2.hook_normalized", True), ("gpt2", "mlp.hook_in", False), ("llama", "hook_resid_mid", False)])
])  # fmt: skip
def test_a_folder_of_circuit_tracers_and_the_writes_of_a_cross_layer_transcoder(engines, references, tmp_path, name, reads, crosses):
    """Its edges are what taking all of a feature's writes away does in Hugging Face's modules; errors are what its files leave of each MLP."""
    model, ref = engines[name].model, references[name]
    study = Study(Prompt("When Mary and John went to the store"))
    n, ids = model.info.n_layers, model.row(study.prompt.clean, None).ids
    at = lambda hook: [model.trace(ids, [f"blocks.{i}.{hook}"])[f"blocks.{i}.{hook}"][0].float() for i in range(n)]  # noqa: E731
    x, y = at(reads), at("hook_mlp_out")
    source = build_cross(tmp_path / "clt", reads, x, y, crosses=crosses)
    r = engines[name].run(AttributionGraph(study, (source,), node_threshold=1, edge_threshold=1, logits=2, mass=1, batch=40))
    assert r.sources == (source,) and r.selected == r.active > 200 and r.error < 1e-3
    adds_up(r)
    tensors = {k: v for file in (tmp_path / "clt").glob("*.safetensors") for k, v in load_file(file).items()}
    if not crosses:
        tensors = {f"{k.split('.')[-1]}_{i}": v for i in range(n) for k, v in load_file(tmp_path / f"clt/layer_{i}.safetensors").items()}
    saes, gone = {}, {i: v.clone() - tensors[f"b_dec_{i}"] for i, v in enumerate(y)}
    active = set()
    for i in range(n):
        f = x[i] @ tensors[f"W_enc_{i}"].T + tensors[f"b_enc_{i}"]
        f = f * (f > tensors[f"threshold_{i}"])
        f[0] = 0
        active |= {(i, int(j), int(p)) for p, j in f.nonzero()}
        rows = tensors[f"W_dec_{i}"] if crosses else tensors[f"W_dec_{i}"][:, None]
        for k in range(rows.shape[1]):
            gone[i + k] -= f @ rows[:, k]
        metadata = SimpleNamespace(hook_name=f"blocks.{i}.{reads.replace('hook_resid_mid', 'hook_mlp_in')}")
        saes[i] = SimpleNamespace(cfg=SimpleNamespace(metadata=metadata), W_enc=tensors[f"W_enc_{i}"].T, b_enc=tensors[f"b_enc_{i}"], rows=rows)
    names = [KINDS[k] for k in r.kind]
    without = active - {(int(r.layer[i]), int(r.index[i]), int(r.at[i])) for i, k in enumerate(names) if k == "feature"}
    assert r.active == len(active) and all(layer == n - 1 and pos < r.pos for layer, _, pos in without), "only those that lead nowhere are not there"
    frozen = Frozen(ref, ids)
    base, logits = frozen.run()
    edge, rng = {(s, d): w for s, d, w in zip(r.source.tolist(), r.to.tolist(), r.weight)}, np.random.default_rng(0)
    of = {kind: [i for i, k in enumerate(names) if k == kind and r.value[i] != 0] for kind in ("feature", "error")}
    early = [i for i in of["feature"] if r.layer[i] == 0]
    some, size = [*rng.permutation(early)[:3], *rng.permutation(of["feature"])[:2], *rng.permutation(of["error"])[:2]], np.abs(r.weight).max()
    for s in map(int, some):
        layer, pos, index = (int(a[s]) for a in (r.layer, r.at, r.index))
        writes = [gone[layer]] if names[s] == "error" else [float(r.value[s]) * row.expand_as(y[0]) for row in saes[layer].rows[index]]
        mine = t.arange(len(ids)) == pos
        streams, out = frozen.run([(("mlp", layer + k), -(w * mine[:, None])[None]) for k, w in enumerate(writes)])
        for d in [*map(int, rng.permutation(of["feature"])[:40]), *(i for i, k in enumerate(names) if k == "logit" and not ref.softcap)]:
            if names[d] == "logit":
                got = (logits[-1] - out[-1] - (logits[-1] - out[-1]).mean())[int(r.index[d])].item()
            else:
                i = int(r.layer[d])
                got = np.subtract(*(pre_activation(frozen, saes[i], i, z[i], int(r.at[d]), int(r.index[d])) for z in (base, streams)))
            assert edge.get((s, d), 0.0) == pytest.approx(got, abs=1e-4 * max(1, size)), (names[s], names[d])

    assert model.notes.graph.size > 0 and model.notes.graph.built.local.streams == {}
    s = int(some[0])
    layer, index, pos = (int(a[s]) for a in (r.layer, r.index, r.at))
    steered = engines[name].run(GraphSteer(study, (source,), logits=2, mass=1, steer=(f"{layer}_{index}_{pos}",), factor=3))
    more = t.zeros(len(saes[layer].rows[index]), 1, *y[0].shape)
    more[:, 0, pos] = 2 * float(r.value[s]) * saes[layer].rows[index]
    before = t.tensor(ref.run([ids])[0][0, -1]).double()
    after = t.tensor(ref.run([ids], [(("mlp", layer + k), lambda x, w=w: x.add_(w)) for k, w in enumerate(more)])[0][0, -1]).double()
    change = after - before - (after - before).mean()
    tokens = [int(i) for i in r.index[r.kind == KINDS.index("logit")]]
    assert ref.softcap or steered.true == pytest.approx([change[i].item() for i in tokens], abs=1e-3)


def adds_up(r):
    """What comes in, with biases, is the pre-activation, which is the activation where a feature is no more than its positive part."""
    for i, k in enumerate(r.kind):
        if KINDS[k] in ("feature", "logit"):
            assert r.weight[r.to == i].sum() + r.bias[i] + r.left_out[i] == pytest.approx(r.whole[i], abs=1e-4 * max(1, np.abs(r.weight).max()))
            assert r.whole[i] == pytest.approx(r.value[i], abs=1e-4 * max(1, abs(r.value[i])))


def chain(n=9, features=4, errors=2, tokens=2, seed=0, density=0.8):
    """A random graph's matrix: features in order, errors and tokens without inputs, one logit at the end."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(n, n)) * (rng.random((n, n)) < density)
    for i in range(n):
        for j in range(n):
            source = features <= j < n - 1 or j < features and (i == n - 1 or j < i)
            a[i, j] *= source and (i < features or i == n - 1)
    return a


def test_influence_scores_and_pruning_are_their_definitions():
    for seed in range(5):
        a = chain(seed=seed)
        weights = np.zeros(9)
        weights[-1] = 0.7
        part = np.abs(a) / np.maximum(np.abs(a).sum(1, keepdims=True), 1e-10)
        want = weights @ (np.linalg.inv(np.eye(9) - part) - np.eye(9))
        A, W = t.tensor(a), t.tensor(weights)
        assert np.allclose(flow(shares(A), W), want)
        replacement, completeness = replacement_and_completeness(A, W, slice(4, 6), slice(6, 8))
        assert replacement == pytest.approx(want[6:8].sum() / want[4:8].sum())
        out = want + weights
        assert completeness == pytest.approx(((1 - part[:, 4:6].sum(1)) * out).sum() / out.sum())
        nodes, edges, scores = prune(A, W, 4, 3, 0.8, 0.9)
        assert nodes[-3:].all() and not edges[~nodes].any() and not edges[:, ~nodes].any()
        for i in np.flatnonzero(nodes[:4]):
            assert edges[:, i].any() and edges[i].any()
        whole = prune(A, W, 4, 3, 1, 1)
        assert (whole[1].numpy() == ((a != 0) & whole[0].numpy()[:, None] & whole[0].numpy())).all()


def test_a_kept_feature_has_an_edge_in_and_one_out():
    """Also where pruning takes them all, and where that takes another feature's."""
    bare = 0
    for seed in range(60):
        a, weights = t.tensor(chain(16, 8, 4, 3, seed, 0.3)), t.zeros(16, dtype=t.float64)
        weights[-1] = 1
        if not a[-1].any():
            continue
        nodes, edges, _ = prune(a, weights, 8, 4, 0.6, 0.6)
        assert nodes[-4:].all() and not edges[~nodes].any() and not edges[:, ~nodes].any()
        assert edges[:8][nodes[:8]].any(1).all() and edges[:, :12][:, nodes[:12]].any(0).all()
        influence = flow(shares(a), weights)
        bare += int((influence[:8] >= cut(influence, 0.6)).sum() > nodes[:8].sum())
    assert bare > 5, "some were taken for that alone"


# ------------------------------------------------------------------ on the zoo, by its own transcoders


ITALY = Prompt("The capital of Italy is", "The capital of Turkey is", (" Rome",), (" Ankara",))


def test_the_zoos_graph_is_what_circuit_tracer_makes_of_it(engines):
    """circuit-tracer 0.5.0 on these transcoders: 69,874 edges, none farther than 1.7e-5 from these; its scores, and what it keeps."""
    zoo = engines["zoo"]
    r = zoo.run(AttributionGraph(Study(IOI)))
    assert (r.active, r.selected, r.edges, len(r.kind), len(r.weight)) == (582, 582, 69874, 61, 434)
    assert (r.replacement, r.completeness) == pytest.approx((0.9004539, 0.9656305), abs=2e-6) and r.error < 1e-3
    whole = zoo.run(AttributionGraph(Study(IOI), node_threshold=1, edge_threshold=1))
    adds_up(whole)
    assert not np.isin(whole.source, np.flatnonzero((whole.at == 0) & (whole.kind == 1))).any(), "what MLPs write at the BOS is a bias"
    few = zoo.run(AttributionGraph(Study(IOI, saes=("zoo/transcoders/L1", "zoo/L2.resid_post")), features=100, batch=7))
    assert few.selected == 100 and few.error < 1e-3 and np.abs(few.left_out).max() > 0
    known = {(files.node_id(whole, s), files.node_id(whole, d)): w for s, d, w in zip(whole.source, whole.to, whole.weight)}
    edges = [((files.node_id(few, s), files.node_id(few, d)), w) for s, d, w in zip(few.source, few.to, few.weight)]
    assert all(known[e] == pytest.approx(w, abs=1e-4) for e, w in edges)


def test_a_graph_is_the_same_however_its_targets_are_batched(engines, monkeypatch):
    """One backward pass for all layers, a few targets at a time, decoders read again each time, memory that runs out in the middle; and influence by layers is the sum over all paths."""
    zoo, ask, seen = engines["zoo"], AttributionGraph(Study(ITALY), target="diff", features=200), []
    put_together, edges = building.put_together, LocalModel.edges
    monkeypatch.setattr(building, "put_together", lambda rows, *more: seen.append(rows) or put_together(rows, *more))

    def graph(**more):
        zoo.run(replace(ask, **more))
        return zoo.model.notes.graph.built

    whole = graph(features=4096, batch=500)
    assert seen[-1].passes == 2, "one for the logit, one for the features of all layers"
    flows = flow(shares(whole.matrix), whole.weights)[: len(whole.some)]
    assert t.allclose(seen[-1].influence(t.ones(1)), flows, atol=1e-9) and flows.max() > 0.01

    def part_of_it(built):
        rows = [*built.some.tolist(), *range(len(whole.some), len(whole.matrix))]
        assert len(built.some) == 200 and flows[built.some].sum() > 0.95 * flows.sort(descending=True).values[:200].sum()
        assert t.allclose(built.matrix, whole.matrix[rows][:, rows], atol=1e-4) and t.allclose(built.bias, whole.bias[rows], atol=1e-4)

    part_of_it(graph(batch=25))
    monkeypatch.setattr(replacement, "SHARE", 1 << 60)
    part_of_it(graph(batch=26))
    assert seen[-1].local.left == 0

    def short_of_memory(local, targets, out):
        bias = edges(local, targets, out)
        if len(out) > 9:
            raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return bias

    monkeypatch.setattr(LocalModel, "edges", short_of_memory)
    said = []
    zoo.run(replace(ask, batch=27), lambda part: said.append(getattr(part, "text", "")))
    assert {f"out of memory at {n} targets at a time: going on with {n // 2}" for n in (27, 13)} <= {*said}
    part_of_it(zoo.model.notes.graph.built)


def test_effects_are_those_of_the_model_with_plain_hooks(engines, references):
    zoo, ref = engines["zoo"], references["zoo"]
    r = zoo.run(GraphEffects(Study(ITALY), target="diff", k=20))
    g = zoo.run(AttributionGraph(Study(ITALY), target="diff", node_threshold=1, edge_threshold=1))
    ids, model = list(r.tokens.ids), zoo.model
    frozen, (good, bad) = Frozen(ref, ids), (model.tokens.encode(x)[0][0] for x in (" Rome", " Ankara"))
    score = lambda logits: float(logits[-1][good] - logits[-1][bad])  # noqa: E731
    base, held = score(ref.run([ids])[0][0]), score(frozen.run(live=True)[1])
    assert held == pytest.approx(base, abs=1e-4)
    edge = {(s, d): w for s, d, w in zip(g.source.tolist(), g.to.tolist(), g.weight)}
    place = {(int(g.layer[i]), int(g.index[i]), int(g.at[i])): i for i in range(len(g.kind)) if KINDS[g.kind[i]] == "feature"}
    end = len(g.kind) - 1
    for n in range(0, 20, 3):
        key = int(r.layer[n]), int(r.index[n]), int(r.at[n])
        row = loaded(zoo, f"zoo/transcoders/L{key[0]}").rows([key[1]])[0]
        change = t.zeros(1, len(ids), 128)
        change[0, key[2]] = -row * float(r.value[n])
        spot = ("mlp", key[0])
        assert score(ref.run([ids], [(spot, lambda x, change=change: x.add_(change))])[0][0]) - base == pytest.approx(r.true[n], abs=1e-3)
        assert score(frozen.run([(spot, change)], live=True)[1]) - held == pytest.approx(r.frozen[n], abs=1e-3)
        gain = dict.fromkeys(place.values(), 0.0) | {(here := place[key]): -1.0}
        for i in sorted(place.values(), key=lambda i: int(g.layer[i])):
            if g.layer[i] > key[0]:
                gain[i] = sum(edge.get((s, i), 0.0) * gain[s] for s in place.values() if gain[s]) / g.value[i]
        assert r.direct[n] == pytest.approx(-edge.get((here, end), 0.0), abs=1e-6)
        assert r.predicted[n] == pytest.approx(sum(edge.get((s, end), 0.0) * x for s, x in gain.items()), abs=1e-5)
    assert r.pearson == pytest.approx([np.corrcoef(r.predicted, x)[0, 1] for x in (r.frozen, r.true)])


def test_features_steered_together_are_held_at_their_values(engines, references):
    """Two features, one of which feeds the other, to half: in Hugging Face's model with plain hooks; the prediction by the edges, layer by layer, the held ones fixed."""
    zoo, ref, names = engines["zoo"], references["zoo"], ("1_597_5", "2_71_5")
    r = zoo.run(GraphSteer(Study(ITALY), target="diff", steer=names, factor=0.5, watch=("2_54_5", "2_465_5")))
    g = zoo.run(AttributionGraph(Study(ITALY), target="diff", node_threshold=1, edge_threshold=1))
    ids, model = list(r.tokens.ids), zoo.model
    coders = {layer: loaded(zoo, f"zoo/transcoders/L{layer}").sae for layer in (1, 2)}
    good, bad = (model.tokens.encode(x)[0][0] for x in (" Rome", " Ankara"))
    place = {files.node_id(g, i): i for i in range(len(g.kind))}
    value = {x: float(g.value[place[x]]) for x in (*names, "2_54_5", "2_465_5")}

    def run(changes):
        """The difference, and what layer 2's MLP reads at the last position, with so much more of features written."""
        edits = [(("mlp", layer), lambda x, layer=layer, index=index, by=by: x[0, 5].add_(by * coders[layer].W_dec[index])) for layer, index, by in changes]
        logits, got = ref.run([ids], edits, [("resid_mid", 2)])
        return float(logits[0, -1, good] - logits[0, -1, bad]), ref.blocks[2].ln_2(got["resid_mid", 2])[0, 5].detach()

    one = (1, 597, -0.5 * value["1_597_5"])
    _, x = run([one])
    live = coders[2].encode(x[None])[0]
    after, _ = run([one, (2, 71, 0.5 * value["2_71_5"] - float(live[71]))])
    assert r.held == pytest.approx([0.5 * value[x] for x in names], rel=1e-5) and r.steered == names
    assert r.true[0] == pytest.approx(after - run([])[0], abs=1e-3)
    assert r.activation[0] == pytest.approx([value["2_54_5"], value["2_465_5"]], rel=1e-4) and r.activation[3] == pytest.approx(
        live[[54, 465]].tolist(), abs=1e-3
    )
    edge = {(s, d): w for s, d, w in zip(g.source.tolist(), g.to.tolist(), g.weight)}
    change = {place[x]: -0.5 * value[x] for x in names}
    features = [i for i in range(len(g.kind)) if KINDS[g.kind[i]] == "feature"]
    for i in sorted(features, key=lambda i: int(g.layer[i])):
        if i not in change:
            change[i] = sum(edge.get((s, i), 0.0) * by / g.value[s] for s, by in list(change.items()) if by)
    assert r.predicted[0] == pytest.approx(sum(edge.get((s, len(g.kind) - 1), 0.0) * by / g.value[s] for s, by in change.items()), abs=1e-5)
    assert r.activation[1] == pytest.approx([value[x] + change[place[x]] for x in ("2_54_5", "2_465_5")], abs=1e-4)
    said = []
    alone = zoo.run(GraphSteer(Study(ITALY), target="diff", steer=("2_71_5",), value=0.0), lambda part: said.append(getattr(part, "text", "")))
    assert not any(x.startswith("direct effects") for x in said), "the graph was there"
    effect = zoo.run(GraphEffects(Study(ITALY), target="diff", only="2_71_5"))
    assert [alone.predicted[0], alone.frozen[0], alone.true[0]] == pytest.approx([effect.predicted[0], effect.frozen[0], effect.true[0]], abs=1e-5)


def test_supernodes_sum_edges_as_circuit_tracer_s_viewer_does(engines):
    """Its definition, edge by edge; and groups of like decoders by brute force over their cosines."""
    zoo = engines["zoo"]
    r = zoo.run(AttributionGraph(Study(ITALY), target="diff"))
    ids = [files.node_id(r, i) for i in range(len(r.kind))]
    names = {"2_71_5": "city", "2_54_5": "city", "1_597_5": "early", "E_870_4": "early", "1_455_5": "alone"}
    g, group = supernodes.folded(r, names), lambda x: names.get(x, x)
    outside = {i: 0.0 for i in ids} | {}
    whole, edges = dict(outside), [(ids[s], ids[d], float(w)) for s, d, w in zip(r.source, r.to, r.weight)]
    for s, d, w in edges:
        whole[d] += abs(w)
        outside[d] += abs(w) * (group(s) != group(d))
    part = {x: outside[x] / whole[x] for x in ids if whole[x]}
    total = {}
    for x in part:
        total[group(x)] = total.get(group(x), 0.0) + part[x]
    want, share = {}, {}
    for s, d, w in edges:
        if group(s) != group(d):
            key = group(s), group(d)
            want[key] = want.get(key, 0.0) + w
            share[key] = share.get(key, 0.0) + w / outside[d] * part[d] / total[group(d)]
    called = [g.texts[i].split("“")[1].split("”")[0] if KINDS[g.kind[i]] == "supernode" else files.node_id(g, i) for i in range(len(g.kind))]
    assert sorted(called) == sorted({group(x) for x in ids})
    for numbers, held in ((g.weight, want), (g.share, share)):
        assert {(called[s], called[d]): pytest.approx(x, abs=1e-9) for s, d, x in zip(g.source, g.to, numbers)} == held
    nodes = tuple(x for x, k in zip(ids, r.kind) if KINDS[k] == "feature")
    rows = t.stack([loaded(zoo, f"zoo/transcoders/L{x.split('_')[0]}").rows([int(x.split("_")[1])])[0] for x in nodes])
    cosine = t.nn.functional.normalize(rows.double(), dim=1)
    cosine = (cosine @ cosine.T).numpy()
    for same in (True, False):
        found = zoo.run(GraphGroups(Study(ITALY), nodes=nodes, threshold=0.3, same_position=same))
        assert found.groups and len({x for some in found.groups for x in some}) == sum(map(len, found.groups))
        for some, least in zip(found.groups, found.cosine):
            at = [nodes.index(x) for x in some]
            assert cosine[np.ix_(at, at)].min() == pytest.approx(least, abs=1e-6) and least >= 0.3
            assert not same or len({x.split("_")[2] for x in some}) == 1
        alone = [*found.groups, *((x,) for x in nodes if not any(x in some for some in found.groups))]
        for a in range(len(alone)):  # no two groups could be one
            for b in range(a):
                both = [nodes.index(x) for x in alone[a] + alone[b]]
                assert cosine[np.ix_(both, both)].min() < 0.3 or same and len({nodes[i].split("_")[2] for i in both}) > 1


def loaded(engine, source):
    steps = load(engine.model, source)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_the_page_tells_what_is_there(engines, capsys):
    """docs/graphs.md: every figure of its hunt and its table."""
    text, zoo = " ".join((ROOT / "docs" / "graphs.md").read_text().split()), engines["zoo"]
    g = zoo.run(AttributionGraph(Study(ITALY), target="diff"))
    name = lambda i: files.node_id(g, int(i))  # noqa: E731
    of = np.flatnonzero(g.to == len(g.kind) - 1)
    best = [e for e in of[np.argsort(-g.weight[of])] if KINDS[g.kind[g.source[e]]] == "feature"][0]
    said = [f"`{name(g.source[best])}` adds {g.weight[best]:.2f} of {g.value[-1]:.2f}", f"replacement {g.replacement:.3f}, completeness {g.completeness:.3f}"]
    into = np.flatnonzero(g.to == g.source[best])
    first = into[np.argsort(-np.abs(g.weight[into]))][:2]
    said += [f"`{name(g.source[e])}` ({g.weight[e]:.1f})" for e in first]
    effects = zoo.run(GraphEffects(Study(ITALY), target="diff", k=20))
    said.append("r = {:.2f} with attention frozen and {:.2f} in the model".format(*effects.pearson))
    for layer in range(3):
        card = json.loads((ROOT / f"zoo/saes/transcoders/L{layer}/cfg.json").read_text())["metadata"]
        said.append(f"| `L{layer}` | {card['explained_variance']:.3f} | {card['l0']:.1f} | {card['dead_fraction']:.0%} |")
    assert not [x for x in said if x not in text]


def test_a_graph_is_a_file_that_circuit_tracer_s_viewer_reads_and_that_opens_again(tmp_path, capsys, monkeypatch, engines):
    file = tmp_path / "graph.json"
    monkeypatch.setattr("engine.Engine", lambda *a, **k: engines["zoo"])
    args = ["graph", "--clean", ITALY.clean, "--answer", " Rome", "--foil", " Ankara", "--target", "diff"]
    assert main([*args, "--out", str(file)]) == 0
    out = capsys.readouterr().out
    whole = json.loads(file.read_text())
    assert set(whole) == {"metadata", "qParams", "nodes", "links", "loupe"} and whole["metadata"]["slug"] == "graph" and whole["metadata"]["scan"]
    ids = [n["node_id"] for n in whole["nodes"]]
    assert len(set(ids)) == len(ids) and {x for e in whole["links"] for x in (e["source"], e["target"])} <= set(ids)
    for n in whole["nodes"]:
        assert {
            "node_id",
            "feature",
            "layer",
            "ctx_idx",
            "feature_type",
            "token_prob",
            "is_target_logit",
            "jsNodeId",
            "clerp",
            "influence",
            "activation",
        } <= set(n)
        if n["feature_type"] == "cross layer transcoder":
            layer, index = int(n["layer"]), int(n["node_id"].split("_")[1])
            assert n["feature"] == (layer + index) * (layer + index + 1) // 2 + index
    r = files.read(file)[0]
    again = engines["zoo"].run(AttributionGraph(Study(replace(ITALY, corrupt=None)), target="diff"))
    for f in fields(r):
        a, b = getattr(r, f.name), getattr(again, f.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b, f.name
    assert main([*args, "--open", str(file), "--node", "2_71_5"]) == 0
    walked, best = capsys.readouterr().out, np.flatnonzero(r.to == ids.index("2_71_5"))
    assert "into L2 f71 @5" in walked and "L2 f71 @5" in out and "share of influence" in walked
    assert f"{r.share[best[np.argmax(np.abs(r.weight[best]))]]:.4f}" in walked, "no supernodes: the shares are of influence"
    assert main([*args, "--groups", "--cosine", "0.3", "--out", str(file)]) == 0 and "“≈ 2_71_5” (2)" in capsys.readouterr().out
    marks = files.read(file)[1]
    assert dict(marks.names)["2_71_5"] == "≈ 2_71_5" and marks.graph == files.marks_of(r, "zoo").graph
    assert main(["graph", "--open", str(file), "--node", "≈ 2_71_5"]) == 0 and "into “≈ 2_71_5” (2)" in (folded := capsys.readouterr().out)
    assert "of inputs" in folded and "share of influence" not in folded
    before = json.loads(file.read_text())
    del before["loupe"]["marks"]
    file.write_text(json.dumps(before))
    assert set(files.read(file)[1].names) == set(marks.names), "of a file from before, those that its drawing has"
    assert main(["graph", "--clean", ITALY.clean, "--steer", "2_71_5", "--factor", "2"]) == 0 and "2_71_5 at 120.92" in capsys.readouterr().out
    damaged = json.loads(file.read_text())
    damaged["loupe"]["to"][0] = 10**6
    file.write_text(json.dumps(damaged))
    for path in (file, ROOT / "zoo" / "config.json", tmp_path / "none.json"):
        with pytest.raises(UserError):
            files.read(path)


def test_the_viewer_draws_every_node_by_name_and_what_it_saves_is_read_again(engines, tmp_path):
    """What circuit-tracer 0.5.0's page asks of a file, as a browser showed: its list, the slider's end, words in double quotes, its own form of what was saved."""
    (file := tmp_path / "graph.json").write_text("")
    graphs = {target: engines["zoo"].run(AttributionGraph(Study(ITALY), target=target)) for target in ("logits", "diff")}
    for target, r in graphs.items():
        marks = replace(files.marks_of(r, "zoo"), pins=("1_597_5",), names=(("2_71_5", "city"), ("2_54_5", "city")))
        files.save(file, r, marks)
        whole = json.loads(file.read_text())
        node = {n["node_id"]: n for n in whole["nodes"]}
        assert all(n["influence"] <= whole["metadata"]["node_threshold"] for n in node.values() if n["feature_type"] != "logit")
        assert r.cumulative[r.kind <= 1].max() > r.node_threshold == 0.8, "one node crosses it"
        assert node["2_71_5"]["clerp"] == "city (L2 f71 @5)" and node["1_597_5"]["clerp"] == "L1 f597 @5"
        out = [n for n in node.values() if n["feature_type"] == "logit"]
        said = [(n["clerp"].split('"')[1], float(n["clerp"].split("(p=")[1].split(")")[0])) for n in out]
        assert said[0] == ((" Rome", pytest.approx(r.probability[-1], abs=5e-4)) if target == "logits" else ("' Rome' less ' Ankara'", 1.0))
        assert [n["token_prob"] for n in out] == [pytest.approx(p, abs=5e-4) for _, p in said], "what influence weighs it by"
    files.save(tmp_path / "other.json", r, marks)
    listed = json.loads((tmp_path / files.LIST).read_text())["graphs"]
    assert [g["slug"] for g in listed] == ["graph", "other"] and listed[0] == whole["metadata"]
    saved = whole | {"qParams": {"pinnedIds": None, "supernodes": None, "linkType": None, "clickedId": "undefined", "sg_pos": None, "clerps": "[]"}}
    file.write_text(json.dumps(saved))
    assert files.read(file)[1] == marks, "the viewer saves nothing of what it left alone"
    saved["qParams"] |= {
        "pinnedIds": "1_455_5,2_71_5,2_54_5,E_870_4",
        "supernodes": json.dumps([["city (L2 f71 @5)", "2_71_5", "1_455_5"], ["new", "E_870_4"]]),
    }
    file.write_text(json.dumps(saved))
    again = files.read(file)[1]
    assert again.pins == ("1_455_5", "E_870_4") and again.graph == marks.graph
    assert dict(again.names) == {"2_71_5": "city", "2_54_5": "city", "1_455_5": "city", "E_870_4": "new"}
    file.write_text(json.dumps({k: v for k, v in whole.items() if k != "qParams"}))
    assert files.read(file)[1] == marks
    for name in ("my graph.json", "größe.json", files.LIST):
        with pytest.raises(UserError, match="viewer can't open"):
            files.check_name(tmp_path / name)
    (tmp_path / files.LIST).write_text("{}")
    with pytest.raises(UserError, match="is written, but"):
        files.save(file, r, marks)
    assert files.read(file)[1] == marks


def test_examples_beside_a_graph_are_those_of_the_features_room(engines, tmp_path, monkeypatch, capsys):
    """A file for every feature that is drawn, where circuit-tracer's viewer looks for it; what it holds is the answer of `examples`."""
    monkeypatch.setattr("engine.Engine", lambda *a, **k: engines["zoo"])
    (text := tmp_path / "text.txt").write_text((ROOT / "zoo" / "corpus.txt").read_text()[:8000])
    args = ["graph", "--clean", ITALY.clean, "--out", str(tmp_path / "g.json"), "--examples", "--text", str(text)]
    assert main(args) == 0
    whole = json.loads((tmp_path / "g.json").read_text())
    assert whole["metadata"]["scan"] == "./data/g-features" and json.loads((tmp_path / files.LIST).read_text())["graphs"][0]["scan"] == "zoo"
    drawn = {n["feature"]: n for n in whole["nodes"] if n["feature_type"] == "cross layer transcoder"}
    assert {f"{n}.json" for n in drawn} == {p.name for p in (tmp_path / "g-features").iterdir()}
    layer, index = 2, 71
    found = engines["zoo"].run(Examples(f"zoo/transcoders/L{layer}", str(text), (index,)))
    page = json.loads((tmp_path / "g-features" / f"{files.pair(layer, index)}.json").read_text())
    shown = page["examples_quantiles"][0]["examples"]
    assert page["index"] == index and page["activation_frequency"] == pytest.approx(float(found.density[0])) and len(shown) == len(found.examples[0]) > 0
    assert [e["tokens_acts_list"] for e in shown] == [list(e.activation) for e in found.examples[0]]
    assert all(max(e["tokens_acts_list"]) == e["tokens_acts_list"][e["train_token_ind"]] <= page["act_max"] for e in shown)
    assert files.read(tmp_path / "g.json")[1].model == "zoo"
    assert main(["graph", "--examples"]) == 2 and "--examples stand beside" in capsys.readouterr().err


def test_what_can_t_be_a_graph_is_refused_in_words(engines, tmp_path, monkeypatch):
    zoo, study = engines["zoo"], Study(ITALY)
    hooks, width = ("hook_resid_mid", "hook_resid_mid"), t.randn(4, 9, 128, generator=t.Generator().manual_seed(0))
    folders = [build_cross(tmp_path / str(n), hooks[0], list(width[: 3 + n]), list(width[: 3 + n])) for n in range(2)]
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "layer_0.safetensors").touch()
    asks = {
        "is an SAE": AttributionGraph(study, ("zoo/L1.resid_post",)),
        "no transcoder at": AttributionGraph(study, ("nowhere/L{}",)),
        "both of layer 1": AttributionGraph(study, ("zoo/transcoders/L1", str(ROOT / "zoo/saes/transcoders/L1"))),
        "answer and a foil": AttributionGraph(Study(Prompt(ITALY.clean)), target="diff"),
        "thresholds": AttributionGraph(study, node_threshold=0),
        "at least 1": AttributionGraph(study, batch=0),
        "no feature of a graph": GraphEffects(study, only="L1"),
        "not in the graph": GraphEffects(study, only="1_1_1"),
        "not a run": AttributionGraph(study, which="now"),
        "no corrupted prompt": AttributionGraph(Study(IOI), which="corrupt"),
        "other layers than the model": AttributionGraph(study, (folders[0],)),
        r"does not explain this prompt.s MLPs \(cosine": AttributionGraph(study, (folders[1],)),
        "config.yaml can't be read": AttributionGraph(study, (str(tmp_path / "2"),)),
        "at least one feature": GraphSteer(study),
        "finite": GraphSteer(study, steer=("2_71_5",), factor=float("nan")),
        "multiplied by a finite": GraphEffects(study, only="2_71_5", factor=float("inf")),
        "'99999999999999999999_1_1' is no feature": GraphSteer(study, steer=("99999999999999999999_1_1",)),
        "no feature 9_1_1": GraphGroups(study, nodes=("9_1_1",)),
        "a cosine is": GraphGroups(study, threshold=2),
    }
    for words, ask in asks.items():
        with pytest.raises(UserError, match=words):
            zoo.run(ask)
    with pytest.raises(UserError, match="needs transcoders"):
        engines["gpt2"].run(AttributionGraph(STUDY))
    said = []
    zoo.run(AttributionGraph(study, batch=31), lambda part: said.append(getattr(part, "text", "")))
    stated = next(x for x in said if x.startswith("graph: "))
    assert "373 active features, 403 sources; transcoders hold 2.4 MB" in stated and said.index(stated) < min(
        n for n, x in enumerate(said) if x.startswith("direct effects")
    )
    with monkeypatch.context() as little:
        little.setattr(building, "free_bytes", lambda device: 1 << 20)
        with pytest.raises(UserError, match=r"does not fit: 373 active.*at most 8.6 MB.*1.0 MB are free. Lower --features"):
            zoo.run(AttributionGraph(study, batch=30))
    bare = zoo.run(AttributionGraph(study, ("zoo/transcoders/L1",), node_threshold=1))
    assert "whole MLP as error in L0, L2" in bare.convention and set(bare.layer[bare.kind == 0].tolist()) == {1}
    adds_up(zoo.run(AttributionGraph(study, which="corrupt", node_threshold=1, edge_threshold=1)))


async def test_on_the_screen(engines, tmp_path):
    """The pane: the logit's inputs, a walk and back, a pin, a name, a feature ablated, the file with all of it; sizes down to 80×24."""
    app = make_app(engines["zoo"], tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "grave_accent")
        assert app.pane == "graph" and "` Graph" in shown(app)
        r = reply(app, "graph")
        assert isinstance(r, GraphResult) and f"replacement {r.replacement:.3f}" in shown(app)
        last = len(r.kind) - 1
        into = np.sort(np.abs(r.weight[r.to == last]))[::-1]
        assert np.allclose(np.abs(grid(app).values[:, 0]), into) and grid(app).rows[1] == "← L2 f755 @14"
        await press(app, pilot, "C")
        assert "no feature" in shown(app)
        await press(app, pilot, "j", "C")
        true = engines["zoo"].run(GraphEffects(Study(IOI), only="2_755_14"))
        assert f"true {true.true[0]:+.3f}" in shown(app) and str(app.node()) == "L2.sae.f755@14"
        await press(app, pilot, "P", "B", *"name", "enter")
        assert "← L2 f755 @14 * “name”" in grid(app).rows
        await press(app, pilot, "enter")
        assert "into" not in shown(app) and "→ logit ' Mary'" in grid(app).rows
        await press(app, pilot, "escape")
        assert grid(app).rows[0] == "← token @2 ' Mary'"
        whole = json.loads(app.panes["graph"].as_file(app))
        assert whole["qParams"]["pinnedIds"] == ["2_755_14"] and whole["qParams"]["supernodes"] == [["name", "2_755_14"]]
        await press(app, pilot, "y", *"graph", "enter")
        listed = json.loads((folder("exports") / files.LIST).read_text())["graphs"][-1]
        assert (folder("exports") / f"{listed['slug']}.json").is_file() and listed["prompt"] == whole["metadata"]["prompt"]
        await press(app, pilot, "v", "d")
        assert reply(app, "graph").target == "diff" and "less" in shown(app) and "*" not in "".join(grid(app).rows), "pins are of the other target"
        await pilot.resize_terminal(80, 24)
        await press(app, pilot, "j")
        assert "` Graph" in shown(app)
        await press(app, pilot, "H", *"2_142_10", "enter")
        assert app.panes["graph"].here == "2_142_10"


async def test_pins_names_and_the_opened_graph_are_the_sessions(engines, tmp_path):
    """Kept, undone, restored with the session; supernodes proposed, folded, steered; a file's graph with its own pins, walked, and never changed for real on another prompt."""
    app = make_app(engines["zoo"], tmp_path)
    marks = lambda app: app.panes["graph"].marks(app)  # noqa: E731
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "grave_accent", "O")
        assert "U proposes supernodes" in shown(app)
        await press(app, pilot, "j", "enter")
        assert grid(app).cols[1] == "share"
        await press(app, pilot, "escape", "O", "P", "B", *"by hand", "enter", "P")
        assert marks(app).names == (("2_755_14", "by hand"),) and not marks(app).pins
        await press(app, pilot, "u")
        assert marks(app).pins == ("2_755_14",) and "graph: unpinned 2_755_14" in history.words("mark_graph", app.state, app.session.future[-1][0])
        await press(app, pilot, "U", *["backspace"] * 3, *"0.3", "enter", "enter")
        names = dict(marks(app).names)
        assert len(names) > 10 and names["2_755_14"] == "by hand" and names["0_365_14"] == names["0_178_14"] == "≈ 0_365_14", "what is named by hand stays"
        await press(app, pilot, "O")
        assert any("“≈ 0_365_14” (2)" in row for row in grid(app).rows) and " of inputs" in shown(app)
        row = next(n for n, x in enumerate(grid(app).rows) if "“≈ 0_365_14” (2)" in x)
        await press(app, pilot, *"j" * (row - app.panes["graph"].row), "C")
        both = engines["zoo"].run(GraphSteer(Study(IOI), steer=("0_365_14", "0_178_14")))
        assert f"predicted {both.predicted[0]:+.3f}, attention frozen {both.frozen[0]:+.3f}, true {both.true[0]:+.3f}" in shown(app)
        await press(app, pilot, "s", *["backspace"] * 3, *"=9", "enter")
        steered = asked(app, GraphSteer)[-1]
        assert steered.value == 9 and set(steered.steer) == {"0_365_14", "0_178_14"} and steered.watch == ("2_755_14",) and "predicted" in shown(app)
        await press(app, pilot, "escape", "P")
        assert "is a supernode" in shown(app)
        (file := tmp_path / "here.json").write_text(app.panes["graph"].as_file(app))
        saved = marks(app)
    session, warning = read_session(tmp_path / "session.jsonl")
    assert not warning and session.state.marks == (saved,)
    app = make_app(engines["zoo"], tmp_path / "b", session.state)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "grave_accent")
        assert marks(app) == saved and app.state.views["graph.rows"] == "supernodes"
        app.act("mark_graph", marks=to_json(replace(saved, pins=("E_918_2",), names=())))
        await press(app, pilot, "o", *str(file), "enter")
        assert app.state.graph == str(file) and marks(app).pins == ("E_918_2", "2_755_14") and marks(app).names == saved.names and "here.json" in shown(app)
        await press(app, pilot, "C")
        assert "true" in shown(app) or "no feature" in shown(app), "it is of the prompt at hand"
        app.act("prompt", prompt=to_json(replace(IOI, clean="When Tom and John went to the store, John gave a drink to")))
        await press(app, pilot, "C")
        assert "another prompt" in shown(app) and not asked(app, AttributionGraph)[1:]
        file.unlink()
        await press(app, pilot, "j")
        assert "can't be read" in shown(app)
        await press(app, pilot, "u", "u")
        assert not app.state.graph and marks(app).pins == ("E_918_2",)


async def test_a_files_graph_is_changed_at_its_own_position_and_for_its_own_answers(engines, tmp_path):
    """With the session's metric at another position, what is said is what the file's position gives; with other answers, nothing."""
    zoo, at = engines["zoo"], Study(IOI, metric=Metric(pos=10))
    r = zoo.run(AttributionGraph(at, target="diff"))
    feature = next(files.node_id(r, i) for i in np.argsort(-r.influence) if KINDS[r.kind[i]] == "feature")
    files.save(tmp_path / "ten.json", r, files.marks_of(r, "zoo"))
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "grave_accent")
        app.act("open_graph", path=str(tmp_path / "ten.json"))
        app.panes["graph"].row = next(n for n, x in enumerate(steps(r, place(r, ""))) if files.node_id(r, x.node) == feature)
        await press(app, pilot, "C")
        want = zoo.run(GraphSteer(at, target="diff", steer=(feature,)))
        assert f"predicted {want.predicted[0]:+.3f}, attention frozen {want.frozen[0]:+.3f}, true {want.true[0]:+.3f}" in " ".join(shown(app).split())
        files.save(tmp_path / "other.json", r, files.marks_of(r, "another"))  # whose tokens are the same
        app.act("open_graph", path=str(tmp_path / "other.json"))
        for key in "Csa":
            before = len(asked(app, GraphSteer)), app.state.study.interventions
            await press(app, pilot, key)
            assert (len(asked(app, GraphSteer)), app.state.study.interventions) == before
        await press(app, pilot, "C")
        assert "of another prompt or model" in shown(app)
        app.act("open_graph", path=str(tmp_path / "ten.json"))
        app.act("prompt", prompt=to_json(replace(IOI, answers=(" John",), foils=(" Mary",))))
        await press(app, pilot, "C")
        assert "this graph is of ' Mary' less ' John', and the prompt's answers and foils are ' John' less ' Mary'" in " ".join(shown(app).split())


def test_what_is_wrong_in_a_folder_of_transcoders_is_said_with_its_file(engines, tmp_path):
    model, x = engines["gpt2"].model, list(t.randn(engines["gpt2"].model.info.n_layers, 9, engines["gpt2"].model.info.d_model))
    source = build_cross(tmp_path := tmp_path / "clt", "hook_resid_mid", x, x)
    encoder, decoder, config = (tmp_path / name for name in ("W_enc_0.safetensors", "W_dec_1.safetensors", "config.yaml"))
    assert read_all(model, source, tmp_path)

    def refused(path, content, words):
        before = path.read_bytes()
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path.name}.*{words}"):
            read_all(model, source, tmp_path)
        path.write_bytes(before)

    held = load_file(encoder)
    for name, tensor in (
        ("threshold_0", held["threshold_0"][:1]),
        ("threshold_0", held["threshold_0"][1:]),
        ("b_enc_0", held["b_enc_0"][:1]),
        ("W_enc_0", held["b_enc_0"]),
    ):
        refused(encoder, to_bytes(held | {name: tensor.clone()}), "has the shape")
    refused(encoder, to_bytes({k: v for k, v in held.items() if k != "W_enc_0"}), "has no W_enc_0")
    refused(decoder, to_bytes({"other": held["b_enc_0"]}), "has no W_dec_1")
    text = config.read_text()
    refused(config, text.replace("hook_resid_mid", "hook_resid_mid twice").encode(), "one word each")
    refused(config, text.replace("hook_resid_mid", "[1, 2]").encode(), "one word each")
    refused(config, text.encode() + b"# \xe9\n", "can't be read")


def test_another_hook_in_config_yaml_is_another_graph(engines, tmp_path):
    model, study = engines["gpt2"].model, Study(Prompt("When Mary and John went to the store"))
    ids = model.row(study.prompt.clean, None).ids
    at = lambda hook: [model.trace(ids, [f"blocks.{i}.{hook}"])[f"blocks.{i}.{hook}"][0].float() for i in range(model.info.n_layers)]  # noqa: E731
    source = build_cross(tmp_path / "clt", "hook_resid_mid", at("hook_resid_mid"), at("hook_mlp_out"))
    coders = read_all(model, source, tmp_path / "clt")
    config = tmp_path / "clt" / "config.yaml"
    config.write_text(config.read_text().replace("resid_mid", "resid_pre"))
    other = read_all(model, source, tmp_path / "clt")
    assert all(a.point != b.point and a.key == b.key and a.stamp != b.stamp for a, b in zip(coders, other))


def test_a_graph_file_that_can_t_be_read_is_tried_once(tmp_path, monkeypatch):
    """A pipe is not opened, one that is too large is not read, and what was wrong is kept until the file is another."""
    os.mkfifo(tmp_path / "pipe")
    (bad := tmp_path / "bad.json").write_text("{}")
    tried, whole = [], files.read
    monkeypatch.setattr("techniques.graphs.pane.read", lambda path: tried.append(path) or whole(path))
    pane, host = GraphPane(), SimpleNamespace(state=SimpleNamespace(graph=""))
    for path, why in ((tmp_path / "pipe", "a folder or a pipe"), (tmp_path, "a folder or a pipe"), (bad, "not written by Loupe")):
        host.state.graph = str(path)
        for _ in range(3):
            with pytest.raises(UserError, match=why):
                pane.of_file(host)
    assert len(tried) == 3
    bad.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not JSON"):
        pane.of_file(host)
    monkeypatch.setattr(files, "LARGEST", 1000)
    with pytest.raises(UserError, match="at most 1 kB"):
        files.read(bad)


def test_a_feature_that_is_written_twice_is_steered_once_and_held_ones_tell_no_correlation(engines, capsys, monkeypatch):
    zoo, watch = engines["zoo"], ("2_54_5", "2_465_5", "02_54_5", "2_71_5")
    once, twice = (zoo.run(GraphSteer(Study(ITALY), target="diff", steer=some, watch=watch)) for some in (("1_597_5",), ("1_597_5", "01_597_5")))
    assert twice.steered == ("1_597_5",) and twice.watched == ("2_54_5", "2_465_5", "2_71_5") and np.array_equal(once.frozen, twice.frozen)
    both = zoo.run(GraphSteer(Study(ITALY), target="diff", steer=("1_597_5",), watch=("1_597_5", *watch)))
    assert both.pearson == once.pearson and np.isfinite(both.pearson).all()
    monkeypatch.setattr("engine.Engine", lambda *a, **k: zoo)
    assert main(["graph", "--clean", ITALY.clean, "--steer", "1_597_5", "--watch", "1_597_5", "2_54_5", "2_465_5"]) == 0
    assert "no correlation" in capsys.readouterr().out


async def test_any_node_may_be_in_a_supernode(engines, tmp_path):
    """Logits, tokens, errors: the walk begins at what holds the logit; only features are changed, and the words say how many; the cursor's node is its first."""
    app = make_app(engines["zoo"], tmp_path, State(prompt=ITALY))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "grave_accent", "v", "d")
        pane, r = app.panes["graph"], reply(app, "graph")
        last = files.node_id(r, len(r.kind) - 1)
        sources = lambda kind: [files.node_id(r, i) for i in np.unique(r.source) if KINDS[r.kind[i]] == kind]  # noqa: E731
        errors, token = sources("error")[:2], next(x for x in sources("token") if x != "E_870_4")
        names = {
            last: "answer",
            "1_597_5": "answer",
            "2_71_5": "both",
            "E_870_4": "both",
            token: "tokens",
            **dict.fromkeys(errors, "errors"),
            "2_99_99": "both",
        }
        app.act("mark_graph", marks=to_json(replace(pane.marks(app), names=tuple(names.items()))))
        await press(app, pilot, "O")
        g = pane.shown(app)
        called = {g.texts[i].split("“")[1].split("”")[0]: i for i in range(len(g.kind)) if KINDS[g.kind[i]] == "supernode"}
        assert "“answer” (2)" in g.texts[place(g, pane.here)] and "“both” (2)" in g.texts, "a member that the graph has not is not counted"
        for label, node in (
            ("tokens", f"embed@{token.split('_')[2]}"),
            ("both", "L2.sae.f71@5"),
            ("errors", f"L{errors[0].split('_')[0]}.mlp@{errors[0].split('_')[2]}"),
        ):
            at = next(i for i in range(len(g.kind)) if called[label] in [s.node for s in steps(g, i)])
            pane.here = files.node_id(g, at)
            pane.row = next(n for n, s in enumerate(steps(g, at)) if s.node == called[label])
            assert str(app.node()) == node
            if label == "both":
                await press(app, pilot, "C")
                want = engines["zoo"].run(GraphSteer(Study(ITALY), target="diff", steer=("2_71_5",)))
                assert f"the 1 feature of “both” (2) to zero, change of ' Rome' less ' Ankara': predicted {want.predicted[0]:+.3f}" in " ".join(
                    shown(app).split()
                )


async def test_a_name_is_given_to_the_graph_that_was_at_hand(engines, tmp_path):
    """Also where another graph came while the name was typed."""
    app = make_app(engines["zoo"], tmp_path, State(prompt=ITALY))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "grave_accent", "j", "B")
        mine = app.panes["graph"].marks(app)
        app.act("prompt", prompt=to_json(IOI))
        await press(app, pilot, *"city", "enter")
        assert app.panes["graph"].marks(app).ids != mine.ids and not app.panes["graph"].marks(app).names
        assert [(m.ids, m.names[0][1]) for m in app.state.marks] == [(mine.ids, "city")]


def test_marks_of_a_file_join_those_of_the_session():
    """A node that has a name here keeps it; another graph's marks are left alone; the last mark taken away leaves none."""
    here = GraphMarks("zoo", (1, 2), "logits", ("a",), pins=("1_1_1",), names=(("1_1_1", "mine"),))
    other, file = replace(here, ids=(1, 3)), replace(here, pins=("2_2_2", "1_1_1"), names=(("1_1_1", "theirs"), ("2_2_2", "new")))
    state = graph_steps.mark_graph(graph_steps.mark_graph(State(), to_json(here)), to_json(other))
    after = graph_steps.open_graph(state, "a.json", to_json(file))
    mine = next(m for m in after.marks if m.graph == here.graph)
    assert mine.pins == ("1_1_1", "2_2_2") and dict(mine.names) == {"1_1_1": "mine", "2_2_2": "new"}
    assert [m for m in after.marks if m.graph != here.graph] == [other] and after.graph == "a.json"
    assert graph_steps.mark_graph(after, to_json(replace(here, pins=(), names=()))).marks == (other,)


def test_what_a_step_names_is_text():
    for step, args in (
        (graph_steps.open_graph, (3,)),
        (graph_steps.open_graph, (["a.json"],)),
        (graph_steps.transcoders, ([1],)),
        (graph_steps.transcoders, ("ab",)),
    ):
        with pytest.raises(UserError):
            step(State(), *args)
    assert graph_steps.transcoders(graph_steps.open_graph(State(), "a.json"), ["b"]).transcoders == ("b",)


def test_the_line_of_keys_says_what_they_do_in_these_panes():
    for pane in (GraphPane, QKPane):
        assert all(x.title for x in pane.keys)
    said = dict(hints(TABLE, GraphPane, PANES.values()))
    assert (said["B"], said["O"], said["C"], said["s"], said["P"]) == ("name", "supernodes", "check", "steer", "pin")
    said = dict(hints(TABLE, QKPane, PANES.values()))
    assert (said["⏎"], said["C"], said["P"], said["R"]) == ("source", "check", "order", "prompt or set")
