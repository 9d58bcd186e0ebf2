"""
A sweep's table by gradients, without a forward pass a cell: attribution patching and integrated gradients.

Gradients are read at zeros that are added at every hook point (LIBRARIES: values kept by retain_grad are lost where the Bridge converts a tensor).
"""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import PatchSite
from model.bridge import Edit
from model.metrics import metric
from model.runs import Runs
from model.variants import Base, Variant
from techniques.patching.plan import Plan, aligned, over_bases, read_plan, reads
from techniques.patching.requests import ESTIMATES, Estimate, Sweep, SweepResult
from techniques.patching.table import SweepTable
from vocabulary.integral import fractions, steps_in_words
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

FIRST = "blocks.0.hook_resid_pre"


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
    """
    The metric's gradient at hook points [prompt, ...] of the base run; along a path, of the run whose block 0 gets `path`. From the last block to the
    first, each run once more from its kept input; whole runs where blocks can't be run one by one.
    """
    if base.reason:
        return whole(base, names, path)
    stream, found = list(base.resid), {}
    if path is not None:
        stream[0] = path
        for layer in range(base.n):
            stream[layer + 1] = base.step(layer, stream[layer], 0, [])
            yield Progress(layer, base.n, "gradients: the path")
    with t.enable_grad():
        end = stream[-1].detach().requires_grad_(True)
        g = t.autograd.grad(metric(base.score, end).sum(), end)[0]
    for layer in reversed(range(min(layer_of(n) for n in names), base.n)):
        leaves: dict[str, Tensor] = {}
        x = stream[layer].detach().requires_grad_(True)
        out = base.step(layer, x, 0, [leaf(n, leaves) for n in names if layer_of(n) == layer], grad=True)
        # a point that the metric does not see (the last block's keys, say, of one token) has no gradient
        g, *more = t.autograd.grad(out, [x, *leaves.values()], g, allow_unused=True)
        found |= {name: t.zeros_like(z) if y is None else y for (name, z), y in zip(leaves.items(), more)}
        yield Progress(base.n - layer, base.n, "gradients")
    return found


def layer_of(name: str) -> int:
    return int(name.split(".")[1])


def leaf(name: str, leaves: dict[str, Tensor]) -> Edit:
    def add(x: Tensor) -> Tensor:
        leaves[name] = t.zeros_like(x).requires_grad_(True)
        return x + leaves[name]

    return name, add


def whole(base: Base, names: set[str], path: Tensor | None) -> dict[str, Tensor]:
    """The gradients by one forward and one backward pass of the whole model."""
    leaves, kept = {}, {}
    last = f"blocks.{base.n - 1}.hook_resid_post"
    begin = [] if path is None else [(FIRST, lambda x: path)]
    points = [*begin, *base.edits, *(leaf(n, leaves) for n in names), (last, lambda x: kept.__setitem__("end", x))]
    with t.enable_grad(), base.model.hooks(points):
        base.model.bridge(base.ids.to(base.model.device), use_cache=False, logits_to_keep=1)
        found = t.autograd.grad(metric(base.score, kept["end"]).sum(), list(leaves.values()), allow_unused=True)
    return {name: t.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), found)}


def linear(plan: Plan, base: Base, variants: list[Variant], gradients: dict[str, Tensor]) -> np.ndarray:
    """The sum of (new value - base value) . gradient over each variant's spots [variant, prompt]; a hook point's products leave the device together."""
    products: dict[tuple, np.ndarray] = {}

    def of(spot: PatchSite) -> np.ndarray:
        if spot.key not in products:
            change = base.source[spot.key] - base.acts[reads(plan.model, spot)]
            x = change.double() * gradients[spot.name].double()
            single = spot.node.site == "neuron" or spot.node.part == "pattern" and spot.node.site == "head"  # the last axis is one that a spot picks from
            products[spot.key] = (x if single else x.sum(-1)).cpu().numpy()
        found = products[spot.key][(slice(None), *spot.index(0, base.per_kv))]
        return found.reshape(len(found), -1).sum(1)

    return np.array([sum(of(s) for s in v.spots) for v in variants])
