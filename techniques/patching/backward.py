"""
The metric's gradients at hook points of a kept run, and what they say of a change.

Gradients are read at zeros that are added at every hook point (LIBRARIES: values kept by retain_grad are lost where the Bridge converts a tensor).
"""

from collections.abc import Callable, Generator

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import PatchSite
from model.bridge import Edit
from model.metrics import metric
from model.variants import Base, Variant
from techniques.patching.plan import Plan, reads
from vocabulary.requests import Progress

FIRST = "blocks.0.hook_resid_pre"
Take = Callable[[int | None, dict[str, Tensor]], None]


def backward(base: Base, names: set[str], take: Take, path: Tensor | None = None, drops: bool = False, behind: bool = False) -> Generator[Progress]:
    """
    Give take(None, gradients) the metric's gradients at hook points [prompt, ...] of the base run (along a path: of the run whose block 0 gets `path`), a few
    points at a time. With `drops` also take(layer, gradients) for every layer, with what that layer's attention and MLP add left out of the gradient: at the
    points of that layer and below, where it makes a difference; `behind`: at a dropped layer the points are behind what is left out (the stream's own are).
    From the last block to the first, each run once more from its kept input; whole runs where blocks can't be run one by one.
    """
    layers = range(base.n) if drops else ()
    if base.reason:
        for done, drop in enumerate((None, *layers)):
            take(drop, whole(base, names, path, drop, behind))
            yield Progress(done + 1, 1 + len(layers), "gradients")
        return
    stream = list(base.resid)
    if path is not None:
        stream[0] = path
        for layer in range(base.n):
            stream[layer + 1] = base.step(layer, stream[layer], 0, [])
            yield Progress(layer, base.n, "gradients: the path")
    with t.enable_grad():
        end = stream[-1].detach().requires_grad_(True)
        flows: dict[int | None, Tensor] = {None: t.autograd.grad(metric(base.score, end).sum(), end)[0]}
    lowest = min(layer_of(n) for n in names)
    for layer in reversed(range(lowest, base.n)):
        if drops:
            flows[layer] = flows[None]
        for part in filter(None, [[d for d in flows if d != layer], [layer] * drops]):  # the block as it is, and without what it adds
            leaves: dict[str, Tensor] = {}
            x = stream[layer].detach().requires_grad_(True)
            out = base.step(layer, x, 0, edits(layer, names, leaves, part == [layer], behind), grad=True)
            for drop in part:
                # a point that the metric does not see (the last block's keys, say, of one token) has no gradient
                g, *more = t.autograd.grad(out, [x, *leaves.values()], flows[drop], allow_unused=True, retain_graph=len(part) > 1)
                flows[drop] = g
                if leaves:
                    take(drop, {name: t.zeros_like(z) if y is None else y for (name, z), y in zip(leaves.items(), more)})
        yield Progress(base.n - layer, base.n - lowest, "gradients")


def edits(layer: int | None, names: set[str], leaves: dict[str, Tensor], dropped: bool, behind: bool) -> list[Edit]:
    """Zeros at the named points of a layer (None: of all); where it is dropped, what its attention and MLP add is cut from the gradient before or behind them."""
    mine = [leaf(n, leaves) for n in names if layer is None or layer_of(n) == layer]
    cut = [(f"blocks.{layer}.hook_{part}_out", lambda x: x.detach()) for part in ("attn", "mlp")] if dropped else []
    return [*cut, *mine] if behind else [*mine, *cut]


def layer_of(name: str) -> int:
    return int(name.split(".")[1])


def leaf(name: str, leaves: dict[str, Tensor]) -> Edit:
    def add(x: Tensor) -> Tensor:
        leaves[name] = t.zeros_like(x).requires_grad_(True)
        return x + leaves[name]

    return name, add


def whole(base: Base, names: set[str], path: Tensor | None, drop: int | None = None, behind: bool = False) -> dict[str, Tensor]:
    """The gradients by one forward and one backward pass of the whole model."""
    leaves, kept = {}, {}
    last = f"blocks.{base.n - 1}.hook_resid_post"
    begin = [] if path is None else [(FIRST, lambda x: path)]
    own, rest = ({n for n in names if (layer_of(n) == drop) == same} for same in (True, False))
    points = [*begin, *base.edits, *edits(None, rest, leaves, False, behind), *edits(drop, own, leaves, drop is not None, behind)]
    with t.enable_grad(), base.model.hooks([*points, (last, lambda x: kept.__setitem__("end", x))]):
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
