"""The door of this room: a prompt's attribution graph, pruned; its features changed for real, one by one or together; and groups of like ones."""

from collections.abc import Generator
from dataclasses import dataclass, fields

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from model.interventions import prepare
from model.memory import KEPT
from model.notes import Notes
from model.runs import Runs
from model.sae import SparseAutoencoder
from model.sae_fit import check
from model.sae_loading import find, load
from techniques.graphs.building import Built, build
from techniques.graphs.effects import effects
from techniques.graphs.file_transcoders import folder_of, read_all
from techniques.graphs.influence import cumulative, flow, prune, replacement_and_completeness, shares
from techniques.graphs.replacement import AnyTranscoder, check_transcoder
from techniques.graphs.requests import KINDS, AttributionGraph, GraphEffects, GraphGroups, GraphResult, GraphSteer, OfGraph, difference
from techniques.graphs.steering import groups, steer
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

ZOO = "zoo/transcoders/L{}"


def answer(model: Model, ask: OfGraph) -> Generator:
    if ask.which not in ("clean", "corrupt"):
        raise UserError(f"{ask.which!r} is not a run that a graph is made of: use clean or corrupt")
    if ask.target not in ("logits", "diff"):
        raise UserError(f"{ask.target!r} is not a target: use logits or diff")
    if isinstance(ask, AttributionGraph) and not (0 < ask.node_threshold <= 1 and 0 < ask.edge_threshold <= 1):
        raise UserError("thresholds are shares: above 0 and at most 1")
    runs = (yield from prepare(model, ask.study)).at(ask.which)
    runs.require_first("a transcoder", ask.which)
    coders = yield from transcoders(runs, ask)
    if isinstance(ask, GraphGroups):
        return groups(coders, ask)
    built = yield from graph_of(runs, ask, coders)
    match ask:
        case GraphEffects():
            return (yield from effects(built, ask, text_of(built, 0)))
        case GraphSteer():
            return (yield from steer(built, ask, tuple(text_of(built, i) for i in range(len(built.logits)))))
    return result(built, ask)


@dataclass(eq=False)
class Last:
    """A whole graph, kept for the next question about it; it gives way when memory runs out."""

    notes: Notes
    key: tuple
    built: Built

    @property
    def size(self) -> int:
        return self.built.matrix.nbytes if self.notes.graph is self else 0

    def clear(self) -> None:
        self.notes.graph = None if self.notes.graph is self else self.notes.graph


def graph_of(runs: Runs, ask: OfGraph, coders: dict[int, AnyTranscoder]) -> Generator[Progress, None, Built]:
    """The whole graph: the last one if it answers this question (model and its adapter's scale, prompt, target, size, transcoders as they lie on the disk now)."""
    notes = runs.model.notes
    key = (runs.model.info.key, *(getattr(ask, f.name) for f in fields(OfGraph)), *((d.key, d.stamp) for d in coders.values()))
    if notes.graph is None or notes.graph.key != key:
        notes.graph = None
        notes.graph = Last(notes, key, (yield from build(runs, ask, coders)))
        KEPT.add(notes.graph)
    return notes.graph.built


def transcoders(runs: Runs, ask: OfGraph) -> Generator[Progress, None, dict[int, AnyTranscoder]]:
    """By layer, loaded and checked on the prompt. A layer without one has its whole MLP as an error."""
    model, named = runs.model, sources(runs.model, ask)
    some: list[AnyTranscoder] = []
    for source in named:
        if (folder := folder_of(source)) is not None:
            yield Progress(0, 0, f"reading {source}")
            some += read_all(model, source, folder)
        else:
            some.append((yield from load(model, source, len(named))))
    found: dict[int, AnyTranscoder] = {}
    for d in some:
        check_transcoder(model, d)
        if d.layer in found:
            raise UserError(f"{found[d.layer].source} and {d.source} are both of layer {d.layer}: keep one of them")
        if isinstance(d, SparseAutoencoder):
            check(runs, d)
        found[d.layer] = d
    return dict(sorted(found.items()))


def sources(model: Model, ask: OfGraph) -> list[str]:
    """The sources that were named, {} being every layer that there is one for; else the study's transcoders, else the zoo's."""
    mine = tuple(
        s for s in ask.study.saes if is_transcoder(model, s) and not s.startswith(ZOO.removesuffix("L{}"))
    )  # one of these, loaded to be changed, is no choice
    named = ask.transcoders or mine or ((ZOO,) if model.info.name == "zoo" else ())
    if not named:
        raise UserError(
            "a graph needs transcoders of this model's MLPs: z names them (in a shell --transcoders): a folder of circuit-tracer's, one for each layer, or RELEASE:layer_{}/ID; or z in pane 6 loads some"
        )
    out = []
    for source in named:
        each = [source.replace("{}", str(layer)) for layer in range(model.info.n_layers)] if "{}" in source else [source]
        out += [s for s in each if len(each) == 1 or ":" in s or exists(s)]
    if not out:
        raise UserError(f"there is no transcoder at {named[0]} for any layer")
    return out


def is_transcoder(model: Model, source: str) -> bool:
    """Of one that was loaded, what it is; else what its name says."""
    d = model.notes.saes.get(source)
    return "transcoder" in source.lower() if d is None else d.transcoder


def exists(source: str) -> bool:
    try:
        return folder_of(source) is not None or find(source) is not None
    except UserError:
        return False


def text_of(built: Built, i: int) -> str:
    """A logit node in words."""
    token = built.logits[i]
    model, runs = built.local.model, built.local.runs
    if token >= 0:
        return repr(model.token_text(token))
    return difference(*([model.token_text(x) for x in some] for some in (runs.answers, runs.foils)))


def facts(built: Built) -> dict[str, Tensor]:
    """Of every node: kind, layer, position, index, value."""
    local, seq, n = built.local, len(built.local.ids), len(built.local.layers)
    k, some = len(built.logits), built.some
    counts = [len(some), n * seq, seq, k]
    cat = lambda *parts: t.cat([p.double().cpu() for p in parts])  # noqa: E731
    positions = t.arange(seq)
    return {
        "kind": cat(*(t.full((c,), i) for i, c in enumerate(counts))),
        "layer": cat(local.layer[some], t.arange(n).repeat_interleave(seq), t.full((seq,), -1), t.full((k,), n)),
        "at": cat(local.where[some], positions.repeat(n), positions, t.full((k,), built.pos)),
        "index": cat(local.index[some], t.full((n * seq,), -1), t.tensor(local.ids), t.tensor(built.logits)),
        "value": cat(local.value[some], *(e.norm(dim=-1) for e in local.errors), local.tokens.norm(dim=-1), built.end.value),
    }


def result(built: Built, ask: AttributionGraph) -> GraphResult:
    """Pruned, its nodes in their order; edges by share."""
    local, a, f = built.local, built.matrix, len(built.some)
    influence = flow(shares(a), built.weights)
    nodes, edges, scores = prune(a, built.weights, f, len(local.ids) + len(built.logits), ask.node_threshold, ask.edge_threshold)
    keep = nodes.nonzero()[:, 0]
    name = {int(i): j for j, i in enumerate(keep)}
    to, source = edges.nonzero(as_tuple=True)
    order = scores[to, source].argsort(descending=True, stable=True)
    to, source = to[order], source[order]
    take = {k: v[keep].numpy() for k, v in facts(built).items()}
    floats = lambda x: x[keep].numpy()  # noqa: E731
    indices = lambda x: np.array([name[int(i)] for i in x], np.int32)  # noqa: E731
    texts = tuple(node_text(built, KINDS[int(take["kind"][j])], int(i), take, j) for j, i in enumerate(keep))
    scored = replacement_and_completeness(a, built.weights, built.errors, built.tokens)
    return GraphResult(
        local.runs.row(ask.which), ask.which, built.pos, ask.target, len(local.layers), tuple(dict.fromkeys(d.source for d in local.coders.values())),
        *(take[n].astype(np.int32) for n in ("kind", "layer", "at", "index")), take["value"], floats(influence), floats(cumulative(influence)),
        floats(built.probability), floats(built.bias), floats(built.left_out), floats(built.whole), texts, indices(source), indices(to),
        a[to, source].numpy(), scores[to, source].numpy(), len(local.value), f, int((a != 0).sum()), *scored, ask.node_threshold, ask.edge_threshold,
        built.error, convention(built, ask),
    )  # fmt: skip


def node_text(built: Built, kind: str, i: int, take: dict, j: int) -> str:
    layer, at, index = (int(take[k][j]) for k in ("layer", "at", "index"))
    match kind:
        case "feature":
            return f"L{layer} f{index} @{at}"
        case "error":
            return f"L{layer} error @{at}"
        case "token":
            return f"token @{at} {built.local.model.token_text(index)!r}"
    return f"logit {text_of(built, i - (len(built.matrix) - len(built.logits)))}"


def convention(built: Built, ask: AttributionGraph) -> str:
    local, model = built.local, built.local.model
    bare = [f"L{layer}" for layer in local.layers if layer not in local.coders and bool(local.errors[layer].any())]
    words = [
        f"attribution graph, {ask.which}, position {built.pos}", "attention patterns and norm scales frozen",
        "logits less their mean over the vocabulary, weighted by probability" if ask.target == "logits" else f"target {text_of(built, 0)}",
        "before the soft cap" * bool(model.softcap), f"position 0 has no features, {'what MLPs write there and ' * local.bos}position embeddings are biases", f"whole MLP as error in {', '.join(bare)}" * bool(bare),
        f"nodes {ask.node_threshold:g}, edges {ask.edge_threshold:g} of influence", model.info.dtype,
    ]  # fmt: skip
    return ", ".join(w for w in words if w)
