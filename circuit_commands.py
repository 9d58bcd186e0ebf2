"""The command line of circuits: path patching, scores, discovery, comparison, and what a circuit's file can be turned into."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

import drawings
from commands import CYAN, GRAY, YELLOW, Options, plain, table
from messages import UserError
from utils import show_number
from wiring import LOGITS, Circuit, Compare, CompareResult, Discover, DiscoverResult, Interval, PathPatch, Score, ScoreResult


def read(path: str) -> Circuit:
    """A circuit of a file or a published one; what was left out of it is an error here, since nobody would see it."""
    circuit, wrong = drawings.published(path)
    if wrong:
        raise UserError("; ".join(wrong))
    return circuit


@dataclass
class PathCommand(Options):
    """Path patching: from senders (unset: every node) to receivers."""

    sender: tuple[str, ...] = ()
    """L0H1, L3.mlp, embed; with @S2 for a position"""
    receiver: tuple[str, ...] = (LOGITS,)
    """L2H3.q, .k, .v, L3.mlp, logits"""
    each: Literal["sender", "receiver"] = "sender"
    """a cell is one sender (to all receivers), or one receiver (from all senders; --receiver is not used)"""
    convention: str = PathPatch.convention
    """direct (all else frozen) or mlps (through MLPs, other heads frozen)"""
    direction: str = PathPatch.direction
    """noise (corrupted value into the clean run) or denoise"""
    by_pos: bool = False
    mean: bool = False
    """over --set, with statistics"""
    chunk_mb: int = 0
    dry: bool = False
    """only the first paths, and the estimate of the time"""

    def request(self) -> PathPatch:
        receivers = () if self.each == "receiver" else self.receiver
        return PathPatch(self.study(), self.sender, receivers, self.each, self.convention, self.direction, self.by_pos, self.mean, self.chunk_mb, self.dry)


@dataclass
class ScoreCommand(Options):
    """Faithfulness, completeness, minimality and single effects of a circuit, over --set or the prompt."""

    circuit: str = ""
    """a .json file, or ioi, greater-than"""
    nodes: tuple[str, ...] = ()
    """instead of a file: L0H1 L3H2.v L2.mlp"""
    what: tuple[str, ...] = ("faithfulness", "effects")
    """faithfulness, completeness, minimality, effects"""
    rest: str = Score.rest
    """what is not in it is set to: mean, mean_all, resample, zero, patch"""
    edges: bool = True
    """score it by its edges when it has any"""
    mlps: bool = False
    """replace MLPs that are not in it too"""
    subsets: int = Score.subsets
    greedy: int = Score.greedy
    samples: int = Score.samples
    """minimality of so many parts, and as many tries in a greedy step, drawn with the seed; 0: all"""
    seed: int = 0
    dry: bool = False
    """only faithfulness, and the estimate of the time"""

    def request(self) -> Score:
        if bool(self.circuit) == bool(self.nodes):
            raise UserError("give --circuit FILE or --nodes L0H1 L3H2")
        circuit = read(self.circuit) if self.circuit else Circuit("these nodes", self.model or "zoo", self.nodes)
        return Score(self.study(), circuit, self.what, self.rest, self.edges, True, self.mlps, self.subsets, self.greedy, self.seed, self.samples, self.dry)


@dataclass
class DiscoverCommand(Options):
    """Find a circuit, over --set or the prompt; --out saves it."""

    method: str = Discover.method
    """eap, eap-ig, eap-ig-activations, clean-corrupted, acdc, greedy, features (of --sae)"""
    edges: int = Discover.edges
    nodes: int = Discover.nodes
    """greedy: stop at so many heads (0: at --target); features: so many (0: 30)"""
    threshold: float = Discover.threshold
    """acdc, in units of the metric"""
    steps: int = Discover.steps
    target: float = Discover.target
    """greedy: the faithfulness to stay at"""
    rest: str = Discover.rest
    dry: bool = False
    """only the estimate of the time"""
    out: Path | None = None

    def request(self) -> Discover:
        name = self.out.stem if self.out else ""
        return Discover(self.study(), self.method, self.edges, self.nodes, self.threshold, self.steps, self.target, self.rest, name, self.dry)

    def finish(self, result: DiscoverResult) -> None:
        if self.out and not self.dry:
            drawings.write_circuit(result.circuit, self.out)


@dataclass
class CompareCommand(Options):
    """A circuit's overlap with a published one (ioi, greater-than) or another file."""

    circuit: str = ""
    other: str = "ioi"

    def request(self) -> Compare:
        if not self.circuit:
            raise UserError("give --circuit FILE")
        return Compare(read(self.circuit), read(self.other))


@dataclass
class CircuitCommand(Options):
    """Turn a circuit's file into text, Graphviz, Mermaid, a table, or a TransformerLens script."""

    circuit: str = ""
    form: Literal["text", "dot", "mermaid", "table", "python"] = "text"
    rest: str = "mean"
    mlps: bool = False

    def request(self) -> Score:
        if not self.circuit:
            raise UserError("give --circuit FILE")
        return Score(self.study(), read(self.circuit), ("faithfulness",), self.rest, mlps=self.mlps)

    def text(self, info) -> str:
        """What is printed; no model is run."""
        ask = self.request()
        if self.form == "python":
            return drawings.circuit_script(ask.circuit, ask.study, info, self.load(), self.rest, self.mlps)
        return {"text": lambda c: "\n".join(drawings.draw(c)) + "\n", "dot": drawings.dot, "mermaid": drawings.mermaid, "table": drawings.table}[self.form](
            ask.circuit
        )


COMMANDS = {"path": PathCommand, "score": ScoreCommand, "discover": DiscoverCommand, "compare": CompareCommand, "circuit": CircuitCommand}


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
            rows.add_row(part, effect, minimal, " ".join(r.minimal_with[i]) if r.minimal.size else "")
        out.print(rows)
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
