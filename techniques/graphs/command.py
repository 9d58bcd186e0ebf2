"""The shell command: graph, a prompt's attribution graph; a node's inputs and outputs; its features changed for real; as a file."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from techniques.graphs.examples import write_examples
from techniques.graphs.files import check_name, marks_of, node_id, read, save
from techniques.graphs.requests import (
    FEATURE,
    KINDS,
    SUPERNODE,
    AttributionGraph,
    GraphEffects,
    GraphEffectsResult,
    GraphGroups,
    GraphMarks,
    GraphResult,
    GraphSteer,
    GraphSteerResult,
    OfGraph,
)
from techniques.graphs.supernodes import features_of, folded, has_supernodes
from techniques.shell import CYAN, GRAY, PURPLE, YELLOW, options, plain, table
from utils import show_number, show_token
from vocabulary.files import check_place, typed_path
from vocabulary.names import canonical
from vocabulary.nodes import UserError
from vocabulary.requests import ModelInfo

SHOWN = 15  # nodes and edges of a table


@dataclass
class GraphCommand(options(AttributionGraph, GraphEffects, GraphSteer, GraphGroups, hide=("nodes",), names={"threshold": "cosine"})):
    """
    The attribution graph of a prompt (circuit tracing), with a transcoder at every MLP: the nodes of most influence, --node NODE its inputs and outputs,
    --effects the features changed for real beside what the graph predicts, --steer some of them together, --groups supernodes of features with like decoders,
    --out FILE.json for circuit-tracer's viewer, --open FILE.json to read it again.
    """

    node: str = ""
    """LAYER_FEATURE_POSITION, as the table writes it: this node's inputs and outputs"""
    effects: bool = False
    """change the k features of most influence (or --only) one by one"""
    groups: bool = False
    """show features of like decoders as supernodes: each as one node, its edges summed"""
    out: Path | None = None
    """write the graph here, in circuit-tracer's JSON, and name it in graph-metadata.json beside it, from which its viewer opens graphs; with --groups these supernodes too"""
    examples: bool = False
    """with --out: where each feature fires most in a text, for the viewer's feature panel, in a folder beside the graph (not for Neuronpedia)"""
    text: str = ""
    """the text file of --examples; unset, the zoo's corpus"""
    open: Path | None = None
    """read a graph from here instead of making one, with its supernodes, and those that circuit-tracer's viewer saved into it"""

    def request(self) -> OfGraph:
        changed = "--effects" if self.effects else "--steer" if self.steer else ""
        if changed and (self.out or self.open or self.node or self.groups):
            raise UserError(f"{changed} has no graph to write, open or walk: leave --out, --open, --node and --groups away")
        if self.effects and self.steer:
            raise UserError("--effects changes features one by one, --steer together: take one of them")
        if self.open and self.groups:
            raise UserError("--groups compares decoders, which a file does not hold: leave --open away")
        if self.examples and (self.open or not self.out or self.out.suffix != ".json"):
            raise UserError("--examples stand beside a graph that is made now and written as .json: give --out FILE.json, and leave --open away")
        if self.out:
            check_name(typed_path(self.out))
            check_place(typed_path(self.out))
        return self.ask(GraphEffects if self.effects else GraphSteer if self.steer else AttributionGraph)

    def printed(self, info: ModelInfo) -> str | None:
        if not self.open:
            return None
        out = Console(file=(text := io.StringIO()), width=120, color_system=None)
        r, marks = read(typed_path(self.open))
        if self.out:
            save(typed_path(self.out), r, marks)
        show_graph(out, folded(r, dict(marks.names)), self.node)
        return text.getvalue()

    def finish(self, result: object, engine, show) -> object:
        if not isinstance(result, GraphResult):
            return result
        marks = marks_of(result, canonical(engine.model.info.name))
        if self.groups:
            order = [int(i) for i in np.argsort(-result.influence, kind="stable")]
            found = engine.run(self.ask(GraphGroups, nodes=features_of(result, order)), show)
            marks = replace(marks, names=tuple((x, label) for label, some in zip(found.labels, found.groups) for x in some))
        if self.out:
            save(path := typed_path(self.out), result, marks)
            if self.examples:  # the graph is safe by then
                save(path, result, marks, self.write_examples(path, result, engine, show))
        return Walk(result, self.node, marks) if (self.node or self.groups) and not self.json else result

    def write_examples(self, path: Path, r: GraphResult, engine, show) -> str:
        loaded = engine.model.notes.saes
        return write_examples(path, r, {loaded[s].layer: s for s in r.sources if s in loaded}, self.text, lambda ask: engine.run(ask, show))


@dataclass(frozen=True)
class Walk:
    """A graph with its supernodes, and the node that is shown of it."""

    graph: GraphResult
    node: str
    marks: GraphMarks


COMMANDS = {"graph": GraphCommand}


# ------------------------------------------------------------------ tables


def find(r: GraphResult, name: str) -> int:
    """The node of an id, or a supernode by its name. UserError where the pruned graph has none."""
    for i in range(len(r.kind)):
        if node_id(r, i) == name or KINDS[r.kind[i]] == SUPERNODE and r.texts[i].startswith(f"“{name}” ("):
            return i
    raise UserError(f"the graph has no node {name!r}: write it as the table does, or raise --node-threshold, which pruned it")


def show_graph(out: Console, r: GraphResult, node: str = "") -> None:
    out.print(plain(" ".join(show_token(x) for x in r.tokens.texts), PURPLE))
    if node:
        show_node(out, r, find(r, node))
    else:
        show_nodes(out, r)
    counts = f"{len(r.kind)} nodes and {len(r.weight)} edges of {r.selected} features ({r.active} active), {r.edges} edges"
    out.print(f"{counts}; replacement {r.replacement:.4f}, completeness {r.completeness:.4f}; sums off by {r.error:.1e} at most")
    if r.selected < r.active:
        out.print(plain(f"{r.active - r.selected} active features left out: raise --features", YELLOW))
    out.print(plain(r.convention, GRAY))


def show_nodes(out: Console, r: GraphResult) -> None:
    rows = table("nodes of most influence", "node", "", "value", "influence", "inputs", "largest input")
    order = [i for i in np.argsort(-r.influence, kind="stable") if KINDS[r.kind[i]] != "logit"][:SHOWN]
    for i in [*np.flatnonzero(r.kind == KINDS.index("logit")), *order]:
        into = np.flatnonzero(r.to == i)
        best = into[np.argmax(np.abs(r.weight[into]))] if len(into) else None
        largest = "" if best is None else f"{r.texts[r.source[best]]} {show_number(r.weight[best], 7)}"
        rows.add_row(
            plain(node_id(r, i)), plain(r.texts[i], CYAN if KINDS[r.kind[i]] == FEATURE else ""), show_number(r.value[i], 7),
            f"{r.influence[i]:.4f}", str(len(into)), plain(largest),
        )  # fmt: skip
    out.print(rows)


def show_node(out: Console, r: GraphResult, i: int) -> None:
    into, away = np.flatnonzero(r.to == i), np.flatnonzero(r.source == i)
    for title, some, other in ((f"into {r.texts[i]}", into, r.source), (f"out of {r.texts[i]}", away, r.to)):
        rows = table(title, "node", "", "adds", "of inputs" if has_supernodes(r) else "share of influence")
        for e in some[np.argsort(-np.abs(r.weight[some]), kind="stable")][:SHOWN]:
            rows.add_row(plain(node_id(r, other[e])), plain(r.texts[other[e]]), show_number(r.weight[e], 7), f"{r.share[e]:.4f}")
        if len(some):
            out.print(rows)
    if len(into):
        rest = r.whole[i] - r.weight[into].sum() - r.left_out[i] - r.bias[i]
        words = f"inputs {r.weight[into].sum():.4f}, pruned {rest:.4f}, biases {r.bias[i]:.4f}"
        out.print(f"{words}{f', left out {r.left_out[i]:.4f}' if r.left_out[i] else ''}: together {r.whole[i]:.4f}")


def show_effects(out: Console, r: GraphEffectsResult) -> None:
    out.print(plain(" ".join(show_token(x) for x in r.tokens.texts), PURPLE))
    rows = table(f"change of {r.target}", "feature", "activation", "direct", "predicted", "frozen", "true")
    for i in range(len(r.value)):
        name = f"{r.layer[i]}_{r.index[i]}_{r.at[i]}"
        rows.add_row(name, show_number(r.value[i], 7), *(show_number(x[i], 7) for x in (r.direct, r.predicted, r.frozen, r.true)))
    out.print(rows)
    both = lambda x: f"{x[0]:.3f} with frozen, {x[1]:.3f} with true"  # noqa: E731
    if len(r.value) > 2:
        out.print(f"predicted: Pearson's r {both(r.pearson)}; Spearman's {both(r.spearman)}")
    out.print(plain(r.convention, GRAY))


def show_steer(out: Console, r: GraphSteerResult) -> None:
    out.print(plain(" ".join(show_token(x) for x in r.tokens.texts), PURPLE))
    out.print(plain(", ".join(f"{x} at {value:.5g}" for x, value in zip(r.steered, r.held)), CYAN))
    rows = table("logits, and their change", "logit", "was", "predicted", "frozen", "true")
    for i, name in enumerate(r.names):
        rows.add_row(plain(name), *(show_number(x[i], 7) for x in (r.before, r.predicted, r.frozen, r.true)))
    out.print(rows)
    if r.watched:
        rows = table("activations", "feature", "was", "predicted", "frozen", "true")
        for name, column in zip(r.watched, r.activation.T):
            rows.add_row(name, *(show_number(x, 7) for x in column))
        out.print(rows)
    if len(set(r.watched) - set(r.steered)) > 2:
        out.print("changes of those that are not steered: predicted has Pearson's r {:.3f} with frozen, {:.3f} with true".format(*r.pearson))
    elif r.watched:
        out.print("no correlation: fewer than three of them are not steered")
    out.print(plain(r.convention, GRAY))


SHOW = {
    GraphResult: show_graph,
    GraphEffectsResult: show_effects,
    GraphSteerResult: show_steer,
    Walk: lambda out, w: show_graph(out, folded(w.graph, dict(w.marks.names)), w.node),
}
