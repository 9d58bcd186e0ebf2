"""Features as nodes of a circuit (Marks et al. 2403.19647): what the SAEs write when only some of their features are left."""

from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Edit, Model
from model.replacements import corrupted_rows
from model.sae import SparseAutoencoder
from model.sae_fit import check
from model.sae_loading import for_layer
from model.steering import write
from techniques.circuits.node_runs import Counted, NodeRun
from vocabulary.nodes import FROM_TEXT, UserError, parse_node
from vocabulary.requests import Progress


def dictionaries(model: Model, sources: tuple[str, ...], nodes: tuple[str, ...]) -> Generator[Progress, None, dict[SparseAutoencoder, list[int]]]:
    """The SAEs of a circuit's features, each with the indices of its features."""
    out: dict[SparseAutoencoder, list[int]] = {}
    for node in map(parse_node, nodes):
        d = yield from for_layer(model, sources, node.layer)
        d.check_index(node.index)
        out.setdefault(d, [])
        if node.index not in out[d]:
            out[d].append(node.index)
    return out


class FeatureRun(NodeRun):
    """
    Nodes may be features. Outside the circuit are the other features of the same SAEs, at every position but the first (unless it is named); heads only
    where the circuit has one. The SAEs' error terms stay, or go in runs of the circuit alone.
    """

    def __init__(self, *prompts, known: dict[SparseAutoencoder, list[int]], counted: Counted, more: tuple[str, ...] = ()):
        super().__init__(*prompts, counted=counted, more=(*more, *(d.point for d in known)))
        self.known = known  # the features that are in the circuit

    def prepare(self) -> Generator[Progress]:
        yield from super().prepare()
        for d in self.known:
            if not d.passed:
                check(self.group[0], d)
        self.others = {}
        for d in self.known:
            self.others[d] = yield from self.rest_of(d)

    @t.no_grad()
    def rest_of(self, d: SparseAutoencoder) -> Generator[Progress, None, Tensor]:
        """What a feature outside the circuit is set to, [prompt, seq, feature] or with 1 where it is the same for all."""
        if self.rest in ("patch", "resample"):
            return self.encode(d, self.acts[d.point])
        if self.rest in FROM_TEXT:
            raise UserError("features that are left out have no mean over a text yet: use zero, mean, mean_all or resample")
        if self.rest == "zero":
            return t.zeros(1, 1, 1, device=d.device)
        rows = [r.ids for r in corrupted_rows(self.model, self.plan.ask.study.prompt_set)]
        if self.rest == "mean" and any(len(ids) != self.seq for ids in rows):
            raise UserError("features' means position by position need prompts of one length: use mean_all, or a set of one template")
        total, count = 0.0, 0
        for done, ids in enumerate(rows):
            f = self.encode(d, self.model.trace(ids, [d.point])[d.point])
            total, count = (total + f, count + 1) if self.rest == "mean" else (total + f[:, 1:].sum((0, 1), keepdim=True), count + len(ids) - 1)
            yield Progress(done + 1, len(rows), "mean activations of the features")
        if not count:
            raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
        return total / count

    def encode(self, d: SparseAutoencoder, x: Tensor) -> Tensor:
        return t.stack([t.cat([d.encode(one[p]) for p in d.pieces(len(one))]) for one in x])

    def set_bytes(self, masks: list) -> int:
        return max(super().set_bytes(masks), len(masks) * 12 * self.ids.numel() * max(d.d_sae for d in self.known))

    # ---------------------------------------------------------------- sets

    def places(self, nodes: frozenset[str], d: SparseAutoencoder) -> np.ndarray:
        """1 where a feature of the circuit is named [prompt, seq, feature]; the first position only by name."""
        out = np.zeros((len(self.group), self.seq, len(self.known[d])), np.float32)
        for node, places in map(self.place, nodes):
            if node.site == "sae" and node.layer == d.layer:
                for i, pos in enumerate(places):
                    out[i, slice(1, None) if pos is None else pos, self.known[d].index(node.index)] = 1
        return out

    def mask(self, kept: frozenset[str] | None, gone: frozenset[str] = frozenset()) -> tuple[Tensor, bool, dict[SparseAutoencoder, Tensor]]:
        """The heads' mask; whether all other features are replaced; and where those of the circuit are [prompt, seq, feature]."""
        heads = lambda nodes: frozenset(n for n in nodes if parse_node(n).site != "sae")  # noqa: E731
        whole = super().mask(heads(kept) if kept is not None else None, heads(gone))
        if not self.counted.heads:
            whole[:, :, : 4 * self.info.n_heads] = 0
        listed = {}
        for d in self.known:
            away = self.places(gone, d)
            listed[d] = away
            if kept is not None:
                listed[d] = 1 - self.places(kept, d) * (1 - away)
                listed[d][:, 0] = away[:, 0]
        return whole, kept is not None, {d: t.tensor(x, device=d.device) for d, x in listed.items()}

    def edits(self, cuts: list) -> list[Edit]:
        found = super().edits([heads for heads, _, _ in cuts])
        for d in self.known:
            found += write(d, lambda x, y, d=d: self.written_by(d, x, y, cuts))
        return found

    def written_by(self, d: SparseAutoencoder, x: Tensor, y: Tensor, cuts: list) -> Tensor:
        """What the SAE reads and what is written there [set x prompt, seq, ...]: the same with features replaced, y + decode(f') - decode(f), or decode(f')."""
        x, b = d.flat(x), len(self.ids)
        out = y.clone()
        for i, (_, others, listed) in enumerate(cuts):
            if not others and not listed[d].any():
                continue
            rows = slice(i * b, (i + 1) * b)
            f, rest = self.encode(d, x[rows]), self.others[d].expand(b, self.seq, d.d_sae)
            new = f.clone()
            if others:
                new[:, 1:] = rest[:, 1:]
            index = self.known[d]
            new[..., index] = t.where(listed[d] > 0, rest[..., index], f[..., index])
            if others and not self.counted.error:
                out[rows, 1:] = d.decode(new, x[rows])[:, 1:].to(y).view(y[rows, 1:].shape)
                new[:, 1:] = f[:, 1:]  # what is left to write is the first position's
            out[rows] += (d.weigh(new - f) @ d.sae.W_dec * d.scale(x[rows])).to(y).view(y[rows].shape)
        return out
