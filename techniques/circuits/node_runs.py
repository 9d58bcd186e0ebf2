"""Runs in which nodes outside a circuit have other values (zero, a mean, the corrupted run's, ...), a few prompts of equal length at a time."""

from dataclasses import dataclass

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Edit
from model.places import find_position
from techniques.circuits.edges import PARTS, EdgeRun
from vocabulary.nodes import Node, parse_node


@dataclass(frozen=True)
class Counted:
    """What lies outside a circuit of nodes: heads, and MLPs or not; at the nodes' positions or at all; and whether SAEs keep their error term."""

    heads: bool = True
    mlps: bool = False
    positions: bool = True
    error: bool = True


class NodeRun(EdgeRun):
    """A few prompts of equal length, on which nodes are set to the rest's values. A set is (kept or None for everything, taken away)."""

    by_edges = False

    def __init__(self, *prompts, counted: Counted, more: tuple[str, ...] = ()):
        super().__init__(*prompts, more)
        self.counted = counted
        self.read: dict[str, tuple[Node, list[int | None]]] = {}

    def place(self, address: str) -> tuple[Node, list[int | None]]:
        """A node, read once, and its position in each prompt as an index (None: all)."""
        if address not in self.read:
            node, rows = parse_node(address), [r.row("clean") for r in self.group]
            some = node.pos is not None and self.counted.positions
            self.read[address] = node, [find_position(node.pos, row, f"prompt {i + 1}") if some else None for i, row in zip(self.indices, rows)]
        return self.read[address]

    def spread(self, nodes: set[str]) -> np.ndarray:
        """1 where some of the nodes are [prompt, layer, column, seq]; columns are heads' z, q, k, v, then the MLP."""
        h = self.info.n_heads
        out = np.zeros((len(self.group), self.info.n_layers, 4 * h + 1, self.seq), np.float32)
        for node, places in map(self.place, nodes):
            column = 4 * h if node.site == "mlp" else h * ("z", *PARTS).index(node.part) + node.head
            for i, pos in enumerate(places):
                out[i, node.layer, column, slice(None) if pos is None else pos] = 1
        return out

    def mask(self, kept: frozenset[str] | None, gone: frozenset[str] = frozenset()) -> Tensor:
        """1 where a value is replaced [prompt, layer, column, seq]."""
        h, away = self.info.n_heads, self.spread(gone)
        if kept is None:
            return t.tensor(away)
        here = self.spread(kept) * (1 - away)
        z, parts = here[:, :, :h], here[:, :, h : 4 * h].reshape(*here.shape[:2], 3, h, self.seq)
        out = np.zeros_like(here)
        out[:, :, :h] = 1 - np.maximum(z, parts.max(2))  # a head with a part in the circuit is alive
        lacking = (1 - np.maximum(z[:, :, None], parts)) * np.maximum(z, parts.max(2))[:, :, None]
        whole = away[:, :, h : 4 * h].reshape(lacking.shape)
        out[:, :, h : 4 * h] = np.maximum(lacking, whole).reshape(*here.shape[:2], 3 * h, self.seq)
        if self.counted.mlps:
            out[:, :, 4 * h] = 1 - here[:, :, 4 * h]
        return t.tensor(out)

    def set_bytes(self, masks: list) -> int:
        i = self.info
        return len(masks) * 4 * (14 * i.d_model + 4 * i.d_mlp + 3 * i.n_heads * self.seq) * self.ids.numel()

    @t.no_grad()
    def metrics(self, cuts: list) -> np.ndarray:
        """The metric [set, prompt]."""
        _, got = self.model.forward(self.ids.repeat(len(cuts), 1), [self.last], self.edits(cuts), keep=None)
        return self.score.of(got[self.last], 0)

    def edits(self, cuts: list[Tensor]) -> list[Edit]:
        model, h, kv = self.model, self.info.n_heads, self.info.n_kv_heads
        cut = t.cat(cuts).to(model.device)  # [row, layer, column, seq]
        n, edits = len(cuts), []

        def put(name: str, mask: Tensor) -> None:
            other = self.acts[name].repeat(n, *[1] * (self.acts[name].ndim - 1))
            edits.append((name, lambda x: t.where(mask > 0, other.to(x), x)))

        for layer in range(self.info.n_layers):
            here = cut[:, layer]
            for k, part in enumerate(PARTS):
                some = here[:, h * (k + 1) : h * (k + 2)]
                if some.any():
                    if part != "q" and kv < h:  # a group's keys or values go when no living head of it keeps them
                        alive = 1 - here[:, :h]
                        wanted = (alive * (1 - some)).view(len(some), kv, h // kv, -1).amax(2)
                        some = some.view(len(some), kv, h // kv, -1).amax(2) * (1 - wanted)
                    put(f"blocks.{layer}.attn.hook_{part}", some.transpose(1, 2)[..., None])
            if here[:, :h].any():
                put(self.zs[layer], here[:, :h].transpose(1, 2)[..., None])
            if here[:, 4 * h].any() and self.mlps[layer] in model.points:
                put(self.mlps[layer], here[:, 4 * h][..., None])
        return edits


def features_of(nodes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in nodes if parse_node(n).site == "sae")


def by_parts(nodes: tuple[str, ...]) -> bool:
    """Whether some node is a head's q, k or v."""
    return any(n.site == "head" and n.part != "z" for n in map(parse_node, nodes))
