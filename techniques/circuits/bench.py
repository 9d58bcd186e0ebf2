"""A circuit on its prompts: the metric of any set of its parts alone, or of the model without some."""

import time
from collections.abc import Generator
from functools import partial

import numpy as np

from model.bridge import Model
from model.runs import Runs
from model.sae import SparseAutoencoder
from techniques.circuits.edges import PARTS, EdgeRun, each, edge_runs, gather
from techniques.circuits.feature_nodes import FeatureRun, dictionaries
from techniques.circuits.node_runs import Counted, NodeRun, by_parts, features_of
from vocabulary.nodes import parse_node
from vocabulary.prompts import Study
from vocabulary.progress import forward_progress, time_left
from vocabulary.requests import Progress
from vocabulary.sets import left_out

NONE: frozenset[str] = frozenset()
Parts = tuple[frozenset[str] | None, frozenset[str]]  # kept (None: everything), and taken away


class Bench:
    """A circuit on its prompts: the metric of any set of parts alone, or of the model without some."""

    def __init__(self, model: Model, study: Study, rest: str, seed: int, edges: bool, mlps: bool, positions: bool, nodes: tuple[str, ...] = ()):
        self.model, self.study, self.rest, self.seed, self.edges = model, study, rest, seed, edges
        self.mlps, self.positions, self.nodes = mlps, positions, nodes
        self.known: dict[Parts, np.ndarray] = {}
        self.done, self.total, self.spent = 0, 0, 0.0  # sets cut, of how many in the whole job (0: not known), and the seconds that took

    def prepare(self) -> Generator[Progress]:
        make, info = EdgeRun, self.model.info
        if not self.edges:
            more = tuple(f"blocks.{n}.attn.hook_{p}" for n in range(info.n_layers) for p in PARTS) if by_parts(self.nodes) else ()
            some = features_of(self.nodes)
            heads = not some or any(parse_node(n).site == "head" for n in self.nodes)
            counted = Counted(heads, self.mlps, self.positions, self.study.sae_error)
            make = partial(NodeRun, counted=counted, more=more)
            if some:
                known = yield from dictionaries(self.model, self.study.saes, some)
                make = partial(FeatureRun, known=known, counted=counted, more=more)
        labels = {n.pos for n in map(parse_node, self.nodes) if isinstance(n.pos, str)} if self.positions and not self.edges else ()
        self.runs = yield from edge_runs(self.model, self.study, self.rest, self.seed, make, tuple(labels))
        self.plan = self.runs[0].plan
        self.whole = gather(self.runs, [r.value for r in self.runs])

    @property
    def left_out(self) -> str:
        """Which prompts of the set are left out and why, in words."""
        return left_out(self.plan.left, len(self.study.prompt_set))

    @property
    def by_length(self) -> list[Runs]:
        """The runs of the whole set, those of one length together."""
        return sorted(self.plan.whole, key=lambda r: tuple(len(row.ids) if (row := r.rows[w]) else 0 for w in ("clean", "corrupt")))

    def look_at(self, known: dict[SparseAutoencoder, list[int]]) -> None:
        """Other features of the SAEs (or of some of them) than before, those of a circuit found meanwhile."""
        self.known.clear()
        for run in self.runs:
            run.known = known

    def values(self, sets: list[Parts], text: str) -> Generator[Progress, None, np.ndarray]:
        """The metric [set, prompt] of (kept or None for everything, taken away). A set that was cut before is not cut again."""
        todo = [s for s in dict.fromkeys(sets) if s not in self.known]
        begun, before = time.monotonic(), self.done
        total = self.total or before + len(todo)

        def say(part: Progress, run: EdgeRun) -> Progress:
            done = (self.runs.index(run) + part.done / part.total) / len(self.runs) * len(todo)
            seconds = (self.spent + time.monotonic() - begun) * max(0, total - before - done) / (before + done)
            return Progress(
                round(before + done), total, f"{text}: {before + done:,.0f} of {total:,} sets, {time_left(seconds)}{'' if self.total else ' in this step'}"
            )

        work = lambda run: forward_progress(run.run([partial(run.mask, *some) for some in todo]), partial(say, run=run))  # noqa: E731
        found = yield from each(self.runs if todo else [], work)
        self.spent += time.monotonic() - begun
        self.done += len(todo)
        if todo:
            self.known |= dict(zip(todo, gather(self.runs, found)))
        return np.stack([self.known[s] for s in sets])
