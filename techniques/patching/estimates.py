"""
A sweep's table without a forward pass a cell: by gradients (attribution patching, integrated gradients), and the direct effects.

Gradients are read at zeros that are added at every hook point (LIBRARIES: values kept by retain_grad are lost where the Bridge converts a tensor).
"""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from techniques.patching.requests import Estimate, ESTIMATES, Sweep, SweepResult
from vocabulary.nodes import UserError
from vocabulary.requests import Progress
from model.bridge import FINAL, Edit
from model.base_run import PatchSite
from model.metrics import metric
from model.writes import frozen_norm
from model.variants import Base, Variant
from model.runs import Runs
from techniques.patching.sweeps import Board, Plan, aligned, bases, read_plan, reads

SCALE = "ln_final.hook_scale"
FIRST = "blocks.0.hook_resid_pre"


# ------------------------------------------------------------------ gradients


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
    if ask.kind in ("pairs", "cumulative"):
        raise UserError(f"{ask.kind}: gradients say nothing of several nodes at once; run the sweep itself")
    plan = read_plan(model, Sweep(ask.study, ask.kind, "patch", ask.direction, node=ask.node, over_set=ask.over_set))
    board = Board(plan, ask.method)
    for part in bases(plan):
        if isinstance(part, Progress):
            yield part
            continue
        members, base, sides = part
        board.begin(members, base, sides)
        runs = [plan.runs[i] for i in members]
        total, fractions = {}, [None] if ask.method == "atp" else [(i + 0.5) / ask.steps for i in range(ask.steps)]
        for done, fraction in enumerate(fractions):
            path = None if fraction is None else between(plan, base, runs, fraction)
            for name, g in (yield from gradients(base, {s.name for s in plan.spots}, path)).items():
                total[name] = total.get(name, 0.0) + g / len(fractions)
            yield Progress(done + 1, len(fractions), f"{ask.method}: gradients")
        if board.waiting:
            board.fill(board.waiting, sides[0] + linear(plan, base, board.waiting, total))
    model.notes.estimate = (same_question(plan), board.values.copy(), board.sides[0].copy())
    return board.result(True)


def same_question(plan: Plan) -> tuple:
    ask = plan.ask
    return replace(ask.study, prompt_set=()), tuple(p for _, p in plan.members), ask.kind, ask.op, plan.side, ask.node


def guess(plan: Plan, base: Base, board: Board) -> Generator[Progress, None, np.ndarray]:
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
    theirs = base.model.forward(ids, [FIRST], keep=None)[1][FIRST].to(own)
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
    """The same by one forward and one backward pass."""
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


# ------------------------------------------------------------------ direct effects


def direct_names(plan: Plan) -> tuple[str, ...]:
    """The hook points that direct effects are read from; what has no direct effect of its own is refused."""
    if plan.ask.kind in ("pairs", "cumulative", "cells"):
        raise UserError("a direct effect is that of one node: use another kind than pairs, cumulative and cells (pattern has one)")
    if plan.ask.study.metric.kind == "loss":
        raise UserError("a direct effect is read at one position, and loss has none: use another metric")
    if plan.ask.plain:
        raise UserError("direct effects are not run by whole forward passes")
    plan.model.point(SCALE)
    blocks = [(n, post) for n, b in enumerate(plan.model.bridge.blocks) for post in ("ln1_post", "ln2_post") if hasattr(b, post)]
    layers = {s.node.layer for s in plan.spots if s.node.site == "head"}
    return (FINAL, SCALE, *(f"blocks.{n}.{post}.hook_scale" for n, post in blocks), *(f"blocks.{n}.attn.hook_z" for n in layers))


@t.no_grad()
def direct(base: Base, variants: list[Variant], begun: bool = False) -> Generator[tuple[list[Variant], np.ndarray]]:
    """The metric when only the final norm, its scale frozen, sees what changed: the base run's normed row plus the change behind that frozen norm."""
    model, rows = base.model, t.arange(len(base.ids))
    places = t.tensor(base.score.places)
    at = lambda x: x[rows, places]  # noqa: E731
    groups: dict[tuple, list[Variant]] = {}
    for v in variants:
        groups.setdefault(v.spots[0].key, []).append(v)
    size = max(1, base.limit // (8 * len(rows) * (model.info.d_mlp + model.info.d_model)))
    for mine in (some[i : i + size] for some in groups.values() for i in range(0, len(some), size)):
        change = written(base, [v.spots[0] for v in mine], at).to(model.final_device)
        scale = at(base.acts[SCALE]).to(model.final_device)
        normed = at(base.acts[FINAL]).to(model.final_device) + frozen_norm(model.bridge.ln_final, scale, change, model)
        base.at_once = max(base.at_once, len(mine))
        yield mine, base.score.of_normed(normed)


def written(base: Base, spots: list[PatchSite], at) -> Tensor:
    """What changed nodes of one hook point add to the stream at the metric's positions [spot, prompt, d_model]; q, k, v and pattern by their head's z."""
    node, key = spots[0].node, spots[0].key
    block = base.model.bridge.blocks[node.layer]
    if node.site not in ("head", "neuron"):
        x = at(base.source[key]) - at(base.acts[reads(base.model, spots[0])])
        x = x.expand(len(spots), *x.shape)
    else:
        head = node.site == "head"
        if head and node.part != "z" and not base.heads_apart(node.part):
            raise UserError(f"{base.model.info.architecture}: a head's {node.part} reaches other heads' z, so it has no direct effect of its own")
        new, own = (base.z_of(node.layer, node.part), f"blocks.{node.layer}.attn.hook_z") if head else (base.source[key], spots[0].name)
        change = at(new) - at(base.acts[own])
        alone = change.new_zeros(len(spots), *change.shape)
        for row, s in zip(alone, spots):
            i = base.heads_of(s) if head else s.node.index
            row[:, i] = change[:, i]
        out, post = (block.attn.o, "ln1_post") if head else (block.mlp.out, "ln2_post")
        alone = alone.flatten(2)
        x = out(alone) - out(t.zeros_like(alone[:1]))
        if hasattr(block, post):
            x = frozen_norm(getattr(block, post), at(base.acts[f"blocks.{node.layer}.{post}.hook_scale"]), x, base.model)
    here = t.tensor([[s.node.pos is None or s.node.pos == p for p in base.score.places] for s in spots], device=x.device)
    return x * here[..., None]
