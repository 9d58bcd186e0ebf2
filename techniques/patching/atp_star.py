"""
AtP* (Kramár et al. 2024, arXiv 2403.00745): attribution patching with its two known ways to miss a cell mended.

1. Queries and keys act through a softmax, which is flat where attention is saturated: the pattern is computed again with the source's queries or keys, and
   its change taken times the gradient at the pattern.
2. Effects of two ways can cancel in the gradient: GradDrop takes the gradient L times, each with one layer's attention and MLP left out, and the mean of the sizes.
"""

from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.variants import Base, Variant
from techniques.patching.backward import backward, linear
from techniques.patching.plan import Plan
from vocabulary.requests import Progress

STAR = ("atp_qk", "graddrop", "atp_star")


class Star:
    """The estimates of some cells of a base run, each of one layer, as gradients come in [variant, prompt]."""

    def __init__(self, plan: Plan, base: Base, variants: list[Variant], method: str):
        self.plan, self.base, self.variants = plan, base, variants
        self.fixed = method != "graddrop" and plan.ask.kind in ("q", "k")
        self.drops = method != "atp_qk" and base.n > 1
        self.stream = plan.ask.kind.startswith("resid")
        if self.fixed:
            plan.model.require("pattern")
        self.signed = np.zeros((len(variants), len(base.ids)))
        self.sizes = np.zeros_like(self.signed)
        self.changes: dict[int, Tensor] = {}  # of a layer's patterns

    def run(self) -> Generator[Progress]:
        if self.variants:
            yield from backward(self.base, {n for v in self.variants for n in self.names(v)}, self.take, drops=self.drops, behind=self.stream)

    def names(self, v: Variant) -> set[str]:
        return {f"blocks.{v.layer}.attn.hook_pattern"} if self.fixed else {s.name for s in v.spots}

    def take(self, drop: int | None, gradients: dict[str, Tensor]) -> None:
        """Dropping a layer below a cell changes nothing, and is counted with the gradient as it is."""
        rows = [i for i, v in enumerate(self.variants) if self.names(v) <= gradients.keys() and (drop is None or v.layer <= drop)]
        if not rows:
            return
        some = [self.variants[i] for i in rows]
        found = self.by_pattern(some, gradients) if self.fixed else linear(self.plan, self.base, some, gradients)
        if drop is None:
            self.signed[rows] = found
            self.sizes[rows] += np.abs(found) * np.array([[v.layer] for v in some])
        else:
            self.sizes[rows] += np.abs(found)

    def effects(self) -> np.ndarray:
        """[variant, prompt]; of GradDrop the paper's mean: a cell's own layer left out leaves nothing of it, so L - 1 (of the stream, which stays, L)."""
        if not self.drops:
            return self.signed
        return np.sign(self.signed) * self.sizes / (self.base.n - (not self.stream))

    # ---------------------------------------------------------------- queries and keys

    def by_pattern(self, variants: list[Variant], gradients: dict[str, Tensor]) -> np.ndarray:
        """(pattern with a head's queries, or a group's keys, of the source - base) . gradient at the pattern [variant, prompt]."""
        per, out = self.base.per_kv if self.plan.ask.kind == "k" else 1, []
        for v in variants:
            (spot,) = v.spots
            g = gradients[f"blocks.{v.layer}.attn.hook_pattern"]
            if self.joint(v.layer):  # one head's change moves the others'
                out.append((self.pattern(v.layer, v) - self.pattern(v.layer, None)) * g)
            else:
                if v.layer not in self.changes:
                    self.changes[v.layer] = self.pattern(v.layer, "all") - self.pattern(v.layer, None)
                first = spot.node.head // per * per
                out.append((self.changes[v.layer] * g)[:, first : first + per])
        return np.array([x.double().flatten(1).sum(1).cpu().numpy() for x in out])

    def joint(self, layer: int) -> bool:
        """Whether queries and keys are normalised over all heads together (OLMo 2)."""
        return getattr(self.base.model.bridge.blocks[layer].attn, "_qk_norm_phase", None) == "pre_reshape"

    @t.no_grad()
    def pattern(self, layer: int, who: Variant | str | None) -> Tensor:
        """A layer's patterns [prompt, head, destination, source] in the base run with the source's queries or keys of one cell, of all heads, or of none."""
        base, kind, name, got = self.base, self.plan.ask.kind, f"blocks.{layer}.attn.hook_pattern", {}

        def put(x: Tensor) -> Tensor:
            new = base.source[layer, "head", kind].to(x)
            if isinstance(who, str):
                return new.clone()
            index = (slice(None), *who.spots[0].index(0, base.per_kv))
            x = x.clone()
            x[index] = new[index]
            return x

        edits = [] if who is None else [(f"blocks.{layer}.attn.hook_{kind}", put)]
        edits.append((name, lambda x: got.__setitem__("x", x.detach())))
        if base.reason:
            base.model.forward(base.ids, edits=[*base.edits, *edits], keep=None)
        else:
            base.step(layer, base.resid[layer], 0, edits)
        return got["x"].float()
