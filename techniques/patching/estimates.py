"""
A sweep's table by gradients, without a forward pass a cell: attribution patching, integrated gradients, and AtP* (Kramár et al. 2024, arXiv 2403.00745; atp_star.py).
"""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model.runs import Runs
from model.variants import Base
from techniques.patching.atp_star import STAR, Star
from techniques.patching.backward import FIRST, backward, linear
from techniques.patching.plan import Plan, aligned, over_bases, read_plan
from techniques.patching.requests import ESTIMATES, Estimate, Sweep, SweepResult
from techniques.patching.table import SweepTable
from vocabulary.integral import fractions, steps_in_words
from vocabulary.nodes import UserError
from vocabulary.requests import Progress


def estimate(model, ask: Estimate) -> Generator[Progress | SweepResult, None, SweepResult]:
    """The whole table at once: two runs and one backward pass (`atp`), or `steps` of them (`ig`)."""
    if ask.method not in ESTIMATES:
        raise UserError(f"{ask.method!r} is not an estimate: use one of {', '.join(ESTIMATES)}")
    if ask.steps < 1:
        raise UserError("steps must be at least 1")
    if ask.study.metric.kind == "rank":
        raise UserError("a rank has no gradient: use logit_diff, prob, logprob, kl or loss, or run the sweep itself")
    if ask.kind == "features":
        raise UserError("estimates of features are their attributions: order pane 6 by attribution, or run the sweep itself")
    if ask.study.against and ask.method == "ig":
        raise UserError(
            f"ig goes from one prompt's embeddings to another's in one model, and {ask.study.against} is a second one: use atp, or run the sweep itself"
        )
    if ask.kind in ("pairs", "cumulative"):
        raise UserError(f"{ask.kind}: gradients say nothing of several nodes at once; run the sweep itself")
    plan = read_plan(model, Sweep(ask.study, ask.kind, "patch", ask.direction, node=ask.node, over_set=ask.over_set))
    board = SweepTable(plan, ask.method, steps_in_words(ask.steps, ask.steps_at, "base to source") if ask.method == "ig" else "")

    def fill(members: list[int], base: Base, sides: tuple[np.ndarray, ...]) -> Generator[Progress]:
        board.begin(members, base, sides)
        runs = [plan.runs[i] for i in members]
        if ask.method in STAR:
            star = Star(plan, base, board.waiting, ask.method)
            yield from star.run()
            board.fill(board.waiting, sides[0] + star.effects())
            return
        total, shares = {}, [None] if ask.method == "atp" else fractions(ask.steps, ask.steps_at)
        for done, share in enumerate(shares):
            path = None if share is None else between(plan, base, runs, share)
            for name, g in (yield from gradients(base, {s.name for s in plan.spots}, path)).items():
                total[name] = total.get(name, 0.0) + g / len(shares)
            yield Progress(done + 1, len(shares), f"{ask.method}: gradients")
        if board.waiting:
            board.fill(board.waiting, sides[0] + linear(plan, base, board.waiting, total))

    yield from over_bases(plan, fill, undo=board.forget)
    model.notes.estimate = (same_question(plan), board.values.copy(), board.sides[0].copy())
    yield board.result(False)
    return (yield from board.finish())


def same_question(plan: Plan) -> tuple:
    ask = plan.ask
    return replace(ask.study, prompt_set=()), tuple(p for _, p in plan.members), ask.kind, ask.op, plan.side, ask.node


def guess(plan: Plan, base: Base, board: SweepTable) -> Generator[Progress, None, np.ndarray]:
    """How large the effect of each waiting cell is by gradients [variant]: of the last estimate when that answered the same question, else made here."""
    question, values, sides = plan.model.notes.estimate or (None, None, None)
    if question == same_question(plan):
        rows = values[board.members][:, [v.cell for v in board.waiting]] - sides[board.members, None]
        return np.abs(rows.mean(0))
    found = yield from gradients(base, {s.name for v in board.waiting for s in v.spots}, None)
    return np.abs(linear(plan, base, board.waiting, found).mean(1))


def between(plan: Plan, base: Base, runs: list[Runs], fraction: float) -> Tensor:
    """The input of block 0, some way from the base run's to the source run's."""
    own, ids = base.resid[0], t.tensor([r.row(plan.other).ids for r in runs])
    theirs = runs[0].of(plan.other).forward(ids, [FIRST], keep=None)[1][FIRST].to(own)
    return own + fraction * (aligned(plan, theirs, own, (0, "resid_pre", "z"), runs[0]) - own)


def gradients(base: Base, names: set[str], path: Tensor | None) -> Generator[Progress, None, dict[str, Tensor]]:
    """The metric's gradient at hook points [prompt, ...] of the base run; along a path, of the run whose block 0 gets `path`."""
    found: dict[str, Tensor] = {}
    yield from backward(base, names, lambda _, some: found.update(some), path)
    return found
