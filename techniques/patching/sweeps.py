"""Sweeps: the metric under one change a cell, over one prompt or a set. The plan says what runs, the table fills as cells come in."""

import math
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t

from model.bridge import Model
from model.variants import Base, Variant
from techniques.patching import feature_sweep
from techniques.patching.direct import direct, direct_names
from techniques.patching.estimates import guess
from techniques.patching.plan import Plan, check, over_bases, read_plan
from techniques.patching.requests import Sweep, SweepResult
from techniques.patching.table import SweepTable
from vocabulary.progress import forward_progress
from vocabulary.requests import Progress


def sweep(model: Model, ask: Sweep) -> Generator[Progress | SweepResult, None, SweepResult]:
    """Progress and partial results as cells come in; then the result, with statistics over the prompts."""
    if ask.kind in ("pairs", "cumulative") and not ask.nodes:
        check(ask)
        ask = replace(ask, nodes=(yield from largest(model, ask)))
    if ask.kind == "features":
        check(ask)
        ask = replace(ask, nodes=(yield from feature_sweep.find_nodes(model, ask)))
    plan = read_plan(model, ask)
    if ask.effect == "direct":
        more, run = direct_names(plan), direct
    else:
        more, run = (), lambda base, variants, begun: base.all(variants, begun)
    board = SweepTable(plan)
    if model.device.type == "cuda":
        t.cuda.reset_peak_memory_stats(model.device)

    def fill(members: list[int], base: Base, sides: tuple[np.ndarray, ...]) -> Generator[Progress | SweepResult]:
        board.begin(members, base, sides)
        yield board.result(False)
        for i, some in enumerate((yield from rounds(plan, base, board))):
            for step in run(base, some, i > 0):
                if isinstance(step, Progress):
                    yield board.progress(step)
                    continue
                board.fill(*step)
                if board.done < board.total:
                    yield board.result(False)

    yield from over_bases(plan, fill, more, board.forget)
    yield board.result(False)
    return (yield from board.finish())


def rounds(plan: Plan, base: Base, board: SweepTable) -> Generator[Progress, None, list[list[Variant]]]:
    """
    What runs first when that is asked for: the tenth of the cells with the largest estimated effects, the first quarter of the layers and MLP 0;
    then the rest. One round where an estimate says nothing (a rank, a metric of your own, several nodes at once, a direct effect).
    """
    ask, waiting = plan.ask, board.waiting
    if (
        ask.first != "estimate"
        or ask.effect == "direct"
        or ask.study.metric.kind in ("rank", "own")
        or any(len(v.spots) != 1 for v in waiting)
        or len(waiting) < 20
    ):
        return [waiting]
    size = yield from guess(plan, base, board)
    top = set(sorted(range(len(waiting)), key=lambda i: -size[i])[: math.ceil(len(waiting) / 10)])
    early = max(1, plan.model.info.n_layers // 4)
    soon = [i in top or v.layer < early for i, v in enumerate(waiting)]
    return [[v for v, now in zip(waiting, soon) if now == which] for which in (True, False)]


def largest(model: Model, ask: Sweep) -> Generator[Progress | SweepResult, None, tuple[str, ...]]:
    """The k nodes of the largest effect, heads and MLPs, the largest first."""
    singles = sweep(model, replace(ask, kind="nodes", only=()))
    found = yield from forward_progress(singles, lambda part: part if isinstance(part, Progress) else None)
    order = np.argsort(-np.abs(found.values - found.base), axis=None, kind="stable")[: ask.k]
    return tuple(found.nodes[i] for i in order.tolist())
