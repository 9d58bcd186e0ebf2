"""Direct effects: the metric when only the final norm, its scale frozen, sees what a node writes. No forward pass a cell."""

from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import PatchSite
from model.bridge import FINAL
from model.memory import Chunks
from model.variants import Base, Variant
from model.writes import SCALE, adds, frozen_norm, post_norm, post_scales, require_parts
from techniques.patching.plan import Plan, reads
from vocabulary.nodes import UserError
from vocabulary.requests import Progress


def direct_names(plan: Plan) -> tuple[str, ...]:
    """The hook points that direct effects are read from; what has no direct effect of its own is refused."""
    if plan.ask.kind in ("pairs", "cumulative", "cells"):
        raise UserError("a direct effect is that of one node: use another kind than pairs, cumulative and cells (pattern has one)")
    if plan.ask.study.metric.whole:
        raise UserError(f"a direct effect is read at one position, and {plan.ask.study.metric.kind} at several: use another metric")
    if plan.ask.plain:
        raise UserError("direct effects are not run by whole forward passes")
    plan.model.require("parts", "heads")
    plan.model.point(SCALE)
    require_parts(plan.model)
    layers = {s.node.layer for s in plan.spots if s.node.site == "head"}
    return (FINAL, SCALE, *post_scales(plan.model, "attn", "mlp"), *(f"blocks.{n}.attn.hook_z" for n in layers))


@t.no_grad()
def direct(base: Base, variants: list[Variant], begun: bool = False) -> Generator[Progress | tuple[list[Variant], np.ndarray]]:
    """The metric when only the final norm, its scale frozen, sees what changed: the base run's normed row plus the change behind that frozen norm."""
    model, rows = base.model, t.arange(len(base.ids))
    places = t.tensor(base.score.places)
    at = lambda x: x[rows, places]  # noqa: E731
    groups: dict[tuple, list[Variant]] = {}
    for v in variants:
        groups.setdefault(v.spots[0].key, []).append(v)
    chunks = Chunks("nodes", max(1, base.limit // (8 * len(rows) * (model.info.d_mlp + model.info.d_model))))

    def effects(mine: list[Variant]) -> tuple[list[Variant], np.ndarray]:
        change = written(base, [v.spots[0] for v in mine], at).to(model.final_device)
        scale = at(base.acts[SCALE]).to(model.final_device)
        normed = at(base.acts[FINAL]).to(model.final_device) + frozen_norm(model, model.bridge.ln_final, scale, change)
        found = base.score.of_normed(normed)
        base.at_once = max(base.at_once, len(mine))
        return mine, found

    for some in groups.values():
        yield from chunks.over(len(some), lambda i, stop, some=some: effects(some[i:stop]))


def written(base: Base, spots: list[PatchSite], at) -> Tensor:
    """What changed nodes of one hook point add to the stream at the metric's positions [spot, prompt, d_model]; q, k, v and pattern by their head's z."""
    node, key = spots[0].node, spots[0].key
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
        part = "attn" if head else "mlp"
        post = post_norm(base.model, node.layer, part)
        x = adds(base.model, node.layer, part, alone.flatten(2), at(base.acts[post[1]]) if post else None)
    here = t.tensor([[s.node.pos is None or s.node.pos == p for p in base.score.places] for s in spots], device=x.device)
    return x * here[..., None]
