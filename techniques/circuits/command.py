"""The command line of this room: path, score, discover, compare, and what a circuit's file can be turned into."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from techniques.circuits import drawings
from techniques.circuits.requests import Compare, CompareResult, Discover, DiscoverResult, Interval, PathPatch, Score, ScoreResult
from techniques.shell import CYAN, DO, GRAY, YELLOW, options, plain, table
from utils import show_number
from vocabulary.circuit import Circuit
from vocabulary.files import check_place, typed_path
from vocabulary.nodes import UserError
from vocabulary.requests import ModelInfo


def read(path: str) -> Circuit:
    """A circuit of a file or a published one; what was left out of it is an error here, since nobody would see it."""
    circuit, wrong = drawings.published(path)
    if wrong:
        raise UserError("; ".join(wrong))
    return circuit


def named(path: str) -> Circuit:
    if not path:
        raise UserError("give --circuit FILE")
    return read(path)


@dataclass
class PathCommand(options(PathPatch, names={"senders": "sender", "receivers": "receiver"})):
    """Path patching: from senders (unset: every node) to receivers."""

    def request(self) -> PathPatch:
        return self.ask(PathPatch, receivers=() if self.each == "receiver" else self.receiver)


@dataclass
class ScoreCommand(options(Score, hide=("circuit",), unused=DO, what=("faithfulness", "effects"))):
    """Faithfulness, completeness, minimality and single effects of a circuit, over --set or the prompt."""

    circuit: str = ""
    """a .json file, or ioi, greater-than"""
    nodes: tuple[str, ...] = ()
    """instead of a file: L0H1 L3H2.v L2.mlp"""

    def request(self) -> Score:
        if bool(self.circuit) == bool(self.nodes):
            raise UserError("give --circuit FILE or --nodes L0H1 L3H2")
        return self.ask(Score, circuit=read(self.circuit) if self.circuit else Circuit("these nodes", self.model or "zoo", self.nodes))


@dataclass
class DiscoverCommand(options(Discover, hide=("name",), unused=DO)):
    """Find a circuit, over --set or the prompt; --out saves it."""

    out: Path | None = None

    def request(self) -> Discover:
        if self.out and not self.dry:
            check_place(typed_path(self.out))
        return self.ask(Discover, name=self.out.stem if self.out else "")

    def finish(self, result: DiscoverResult, engine, show: Callable[[object], None]) -> DiscoverResult:
        if self.out and not self.dry:
            try:
                drawings.write_circuit(result.circuit, self.out)
            except UserError as error:
                kept = drawings.write_circuit(result.circuit, Path(tempfile.mkdtemp()) / "circuit.json")
                raise UserError(f"{error}; the circuit is in {kept}") from error
        return result


@dataclass
class CompareCommand(options(Compare, hide=("circuit", "other", "published", "edges", "scores"))):
    """A circuit's overlap with a published one (ioi, greater-than) or another file."""

    circuit: str = ""
    other: str = "ioi"

    def request(self) -> Compare:
        return Compare(named(self.circuit), read(self.other))


@dataclass
class CircuitCommand(options(Score, hide=("circuit", "what", "edges", "positions", "subsets", "greedy", "seed", "samples", "dry"), unused=DO)):
    """Turn a circuit's file into text, Graphviz, Mermaid, a table, or a TransformerLens script."""

    circuit: str = ""
    form: Literal["text", "dot", "mermaid", "table", "python"] = "text"

    def request(self) -> Score:
        return self.ask(Score, circuit=named(self.circuit))

    def printed(self, info: ModelInfo) -> str:
        circuit = named(self.circuit)
        match self.form:
            case "text":
                return "\n".join(drawings.draw(circuit)) + "\n"
            case "python":
                return drawings.circuit_script(circuit, self.study(), info, self.load(), self.rest, self.mlps)
        return {"dot": drawings.dot, "mermaid": drawings.mermaid, "table": drawings.table}[self.form](circuit)


COMMANDS = {"path": PathCommand, "score": ScoreCommand, "discover": DiscoverCommand, "compare": CompareCommand, "circuit": CircuitCommand}


# ------------------------------------------------------------------ tables


def said(x: Interval) -> str:
    return f"{x.mean:.6f}" + (f" (95 % {x.low:.4f} to {x.high:.4f})" if np.isfinite(x.low) else "")


def show_score(out: Console, r: ScoreResult) -> None:
    out.print(plain(f"{r.circuit.name}: faithfulness {said(r.faithfulness)}", CYAN))
    if r.dry:
        out.print(plain(f"the scores: {r.sets:,} sets, about {r.expected:.1f} s", CYAN))
    out.print(plain(f"F model {said(r.model)}  circuit alone {said(r.alone)}  nothing {said(r.empty)}"))
    if r.effects.size or r.minimal.size:
        rows = table("parts", "part", "alone away", "minimality", "with K away too")
        for i, part in enumerate(r.parts):
            effect, minimal = (show_number(float(x[i]), 9) if x.size else "" for x in (r.effects, r.minimal))
            rows.add_row(part, "~" * r.noise(i) + effect, minimal, " ".join(r.minimal_with[i]) if r.minimal.size else "")
        out.print(rows)
    if r.floor == r.floor:
        out.print(plain(f"noise floor {r.floor:.2g} of the metric: ~ marks effects below it", GRAY))
    if r.subsets:
        worst = int(np.abs(r.without_circuit - r.without_model).argmax())
        out.print(
            plain(
                f"incompleteness {r.incompleteness:.4f}, difference {said(r.worst)}, the worst of {len(r.subsets)} subsets: {' '.join(r.subsets[worst]) or 'nothing'}",
                CYAN,
            )
        )
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(f"{r.convention}; {r.seconds:.1f} s", GRAY))


def show_discovery(out: Console, r: DiscoverResult) -> None:
    if not r.counts.size:
        out.print(plain(f"{r.method}: about {r.expected:.1f} s", CYAN))
        return
    out.print(plain(f"{r.circuit.name}: {len(r.circuit.nodes)} nodes, {len(r.circuit.edges)} edges, faithfulness {r.score:.4f}, {r.seconds:.1f} s", CYAN))
    for line in drawings.draw(r.circuit, width=100):
        out.print(plain(line))
    rows = table("faithfulness by size", "parts", "faithfulness")
    step = max(1, len(r.counts) // 20)
    for n, v in list(zip(r.counts.tolist(), r.faithfulness.tolist()))[::step]:
        rows.add_row(str(n), show_number(v))
    out.print(rows)
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


def show_compare(out: Console, r: CompareResult) -> None:
    out.print(plain(f"{r.here} and {r.there}: overlap of nodes {r.nodes:.3f}, of edges {'none' if r.edges != r.edges else f'{r.edges:.3f}'}", CYAN))
    for title, some in (("in both", r.both), (f"only in {r.here}", r.only_here), (f"only in {r.there}", r.only_there)):
        out.print(plain(f"{title} ({len(some)}): {' '.join(some)}"))
    out.print(plain(r.convention, GRAY))


SHOW = {ScoreResult: show_score, DiscoverResult: show_discovery, CompareResult: show_compare}
