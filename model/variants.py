"""
Many changed runs of one model at the price of a few: what sweeps run on. No model maths of its own, the Bridge's blocks do all of it.

1. A `Base` is one kept run of a few prompts of equal length (base_run.py). `source` gives every spot's new values.
2. A `Variant` is that run with other values at some spots. Variants are the batch.
3. A wave passes over the blocks once. A variant joins at the first block it changes, as the kept residual stream; positions before its first change
   come from the kept keys and values; after the last block only the metric's position is read.
4. Where one position of one block's output changes, the block runs on that single token (its attention is overwritten), and the variant joins after it.
5. Such variants differ in length, so that many are packed into one row: a mask lets each see the kept run before it, and itself.
Between two blocks no hook is on the model, so that a wave is a generator that others may interrupt.
"""

from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import PatchSite
from model.changed_blocks import ROWWISE, ChangedBlocks
from vocabulary.progress import forward_progress
from vocabulary.requests import Progress
from model.memory import Chunks, block_bytes

PACK = 160  # tokens of a packed row
FIRST = 12  # variants of a sweep's first wave, so that something is on the screen


@dataclass(frozen=True)
class Variant:
    """A cell and the spots that are changed for it."""

    cell: int
    spots: tuple[PatchSite, ...]

    @property
    def first(self) -> int:
        return min(s.node.pos or 0 for s in self.spots) if self.spots else 0

    @property
    def layer(self) -> int:
        return min((s.node.layer for s in self.spots), default=0)


class Base(ChangedBlocks):
    """A kept run, and its variants."""

    # ---------------------------------------------------------------- blocks in pieces

    def steps(self, layer: int, x: Tensor, rows: list[Variant], start: int, firsts: tuple[int, ...] = ()) -> Generator[None, None, Tensor]:
        """A block in pieces of some variants, with a pause after each; edits for those that have some in it."""
        b, out, per = len(self.ids), [], self.piece(x.shape[1])
        for a in range(0, len(x) // b, per):
            piece = x[a * b : (a + per) * b]
            changed = [(j, s) for j, v in enumerate(rows[a : a + per]) if self.moves(v) is None for s in v.spots if s.node.layer == layer]
            out.append(self.step(layer, piece, start, self.write(changed, len(piece) // b, start), firsts))
            self.worked += len(piece) // b * x.shape[1]
            yield
        return out[0] if len(out) == 1 else t.cat(out)

    # ---------------------------------------------------------------- a wave

    def enters(self, v: Variant) -> int:
        """The block a variant joins at."""
        return v.layer + bool(self.moves(v)) if v.spots else self.n

    def moves(self, v: Variant) -> bool | None:
        """Whether what a variant changes is known as a new residual stream: after its block (True), before it (False), or not (None)."""
        if len(v.spots) != 1 or self.edits:
            return None if v.spots else True
        spot = v.spots[0]
        site, pos = spot.node.site, spot.node.pos
        if site == "resid_pre":
            return False
        one = pos is not None and site in ROWWISE and (site != "head" or spot.node.part == "z")
        return True if one or site in ("resid_post", "mlp") or site == "attn" and self.model.parallel or self.by_heads(spot) else None

    def join(self, variants: list[Variant], layer: int, start: int) -> Generator[None, None, Tensor]:
        """The rows of variants that join at a block: the kept stream, changed where the change is known as such."""
        x = self.resid[layer][:, start : self.stop]
        x = x.expand(len(variants), *x.shape).clone()
        single, heads = [], []
        for i, v in enumerate(variants):
            if not v.spots or self.moves(v) is None:
                continue
            spot = v.spots[0]
            if self.by_heads(spot):
                heads.append((i, spot))
            elif self.runs_alone(spot):
                single.append((i, spot))
            else:
                index = (slice(None), *spot.index(start, self.per_kv))
                new = self.values(spot, start)[index].to(x)
                if spot.node.site in ("mlp", "attn"):
                    new = x[i][index] + new - self.acts[spot.name][:, start : self.stop][index]
                x[i][index] = new
        if single:
            for (i, spot), rows in zip(single, self.alone(single)):
                x[i, :, spot.node.pos - start] = rows
            yield
        for a in range(0, len(heads), per := self.piece(x.shape[2])):
            part = heads[a : a + per]
            x[[i for i, _ in part]] = self.attended(layer - 1, [s for _, s in part], start).view(-1, *x.shape[1:])
            yield
        return x.flatten(0, 1)

    def wave(self, variants: list[Variant], start: int) -> Generator[None, None, np.ndarray]:
        """Metrics [variant, prompt] of variants that change nothing before `start`; pauses after every block."""
        order = sorted(range(len(variants)), key=lambda i: self.enters(variants[i]))
        waiting, rows, x = [variants[i] for i in order], [], None
        for layer in range(self.enters(waiting[0]), self.n + 1):
            new = [v for v in waiting[len(rows) :] if self.enters(v) == layer]
            if new:
                joined = yield from self.join(new, layer, start)
                x, rows = joined if x is None else t.cat([x, joined]), rows + new
            if layer < self.n:
                x = yield from self.steps(layer, x, rows, start)
        out = np.empty((len(variants), len(self.ids)))
        out[order] = self.score.of(x, start)
        return out

    def packed(self, variants: list[Variant]) -> Generator[None, None, np.ndarray]:
        """Metrics [variant, prompt] of variants known as a new row of the stream at one position: a packed row holds one for every position, where there is one."""
        b, firsts = len(self.ids), tuple(sorted({v.first for v in variants}))
        tokens = t.cat([t.arange(p, self.stop) for p in firsts])
        begins = dict(zip(firsts, np.cumsum([0, *(self.stop - p for p in firsts)]).tolist()))
        ends = [begins[p] + self.stop - p - 1 for p in firsts]
        place: dict[int, tuple[int, int]] = {}  # of a variant: its packed row and its segment; segments without variant go on as the kept run
        full = dict.fromkeys(firsts, 0)
        n, x = 0, None
        for layer in range(min(self.enters(v) for v in variants), self.n + 1):
            new = [(i, v) for i, v in enumerate(variants) if self.enters(v) == layer]
            if new:
                for i, v in new:
                    place[i] = (full[v.first], firsts.index(v.first))
                    full[v.first] += 1
                if (count := max(full.values()) - n) > 0:
                    kept = self.resid[layer][:, tokens].expand(count, b, len(tokens), -1).flatten(0, 1)
                    x, n = kept.clone() if x is None else t.cat([x, kept]), n + count
                for (i, v), row in zip(new, self.moved([v for _, v in new], layer)):
                    x.view(n, b, len(tokens), -1)[place[i][0], :, begins[v.first]] = row
                yield
            if layer < self.n:
                x = yield from self.steps(layer, x, [], 0, firsts)
        last = x.view(n, b, len(tokens), -1)[:, :, ends].transpose(1, 2)
        picked = t.stack([last[place[i]] for i in range(len(variants))])
        return self.score.of(picked.flatten(0, 1)[:, None], self.stop - 1)

    def moved(self, variants: list[Variant], layer: int) -> list[Tensor]:
        """The new row [prompt, d_model] of each variant's position in the stream that enters a block."""
        alone: dict[int, list] = {}
        for i, v in enumerate(variants):
            if self.runs_alone(v.spots[0]):
                alone.setdefault(v.layer, []).append((i, v.spots[0]))
        rows = {i: row for some in alone.values() for (i, _), row in zip(some, self.alone(some))}
        for i, v in enumerate(variants):
            if i not in rows:
                spot = v.spots[0]
                new = self.source[spot.key][:, v.first]
                add = spot.node.site in ("mlp", "attn")
                rows[i] = self.resid[layer][:, v.first] + new - self.acts[spot.name][:, v.first] if add else new
        return [rows[i].to(self.resid[layer]) for i in range(len(variants))]

    def whole(self, variants: list[Variant]) -> np.ndarray:
        """Metrics [variant, prompt] by whole forward passes under hooks."""
        last = f"blocks.{self.n - 1}.hook_resid_post"
        stop, self.stop = self.stop, self.ids.shape[1]
        changed = [(i, s) for i, v in enumerate(variants) for s in v.spots]
        _, got = self.model.forward(self.ids.repeat(len(variants), 1), [last], [*self.edits, *self.write(changed, len(variants), 0)], None)
        self.stop = stop
        return self.score.of(got[last], 0)

    # ---------------------------------------------------------------- all of them

    def room(self, length: int) -> int:
        """How many variants of so many positions fit into the limit of bytes."""
        return max(1, self.limit // (self.token_bytes() * length))

    def token_bytes(self) -> int:
        """Bytes of one position of a variant in the widest block, of all prompts."""
        return block_bytes(self.model.info, self.stop, self.model.dtype.itemsize) * len(self.ids)

    def plan_work(self, variants: list[Variant]) -> None:
        """Before the first variant: how many tokens have to go through a block."""
        if self.reason:
            self.work = max(1, self.n * self.ids.shape[1] * len(variants))
        else:
            self.work = max(1, sum((self.n - self.enters(v)) * (self.stop - (0 if self.edits else max(self.shared, v.first))) for v in variants))

    @property
    def progress(self) -> float:
        return min(1.0, self.worked / self.work)

    def all(self, variants: list[Variant], begun: bool = False) -> Generator[Progress | tuple[list[Variant], np.ndarray]]:
        """
        Every variant's metric [variant, prompt], in waves: late positions and late layers first, since they are the cheapest. The first wave of a
        sweep (`begun` False) is a small one.
        """
        if self.reason or self.edits or not variants:  # interventions count positions from 0
            groups = [(0, variants, False)] if variants else []
        else:
            some = [v for v in variants if self.packs and self.moves(v) is not None and v.spots[0].node.pos is not None]
            packed = set(some)
            rest = [v for v in variants if v not in packed]
            groups = [*pack_groups(some, self.stop), *((a, g, False) for a, g in position_groups(rest, self.shared, len(self.ids)))]
        for start, group, pack in groups:
            yield from self.in_waves(start, group, pack, begun)
            begun = True

    def in_waves(self, start: int, group: list[Variant], pack: bool, begun: bool) -> Generator[Progress | tuple[list[Variant], np.ndarray]]:
        """A group of variants that change nothing before `start`, as many at a time as fit."""
        length = self.ids.shape[1] if self.reason else self.stop - start
        group = sorted(group, key=lambda v: -(v.layer if self.reason else self.enters(v)))

        def fits(i: int) -> int:
            if begun or self.reason:
                return self.room(length)
            return min(self.room(length), FIRST, sum(self.enters(v) == self.enters(group[i]) for v in group[i:]))

        def work(i: int, stop: int) -> Generator | tuple:
            part = group[i:stop]
            return (part, self.whole(part)) if self.reason else self.paused(part, self.packed(part) if pack else self.wave(part, start))

        def smaller(size: int) -> None:  # for the groups that follow, and for other prompts
            self.most, self.limit = size, min(self.limit, size * length * self.token_bytes())

        for out in Chunks("runs", lambda i: min(fits(i), self.most), smaller).over(len(group), work):
            if not isinstance(out, Progress):
                n, begun = len(out[0]), True
                self.at_once, self.peak = max(self.at_once, n), max(self.peak, n * length * self.token_bytes())
                self.worked += self.n * length * n if self.reason else 0
            yield out

    def paused(self, part: list[Variant], wave: Generator) -> Generator[Progress, None, tuple[list[Variant], np.ndarray]]:
        """A wave's variants and metrics; its pauses as progress."""
        return part, (yield from forward_progress(wave, lambda _: Progress(0, 0)))


def pack_groups(variants: list[Variant], stop: int) -> list[tuple[int, list[Variant], bool]]:
    """Variants of positions with about as many of them, whose segments make up a packed row; late ones first."""
    counts = Counter(v.first for v in variants)
    groups: list[list[int]] = []
    for p in sorted(counts, key=lambda p: (-counts[p], -p)):
        if groups and sum(stop - q for q in groups[-1]) + stop - p <= PACK and counts[p] > 0.7 * counts[groups[-1][0]]:
            groups[-1].append(p)
        else:
            groups.append([p])
    return [(min(g), [v for v in variants if v.first in g], True) for g in groups]


def position_groups(variants: list[Variant], shared: int, prompts: int) -> list[tuple[int, list[Variant]]]:
    """
    Variants by first changed position, in groups that start at their earliest: more groups save rows, and each costs a pass over the weights
    (worth about 80 rows). Late ones first.
    """
    by_first: dict[int, list[Variant]] = {}
    for v in variants:
        by_first.setdefault(max(shared, v.first), []).append(v)
    firsts = sorted(by_first)
    n = len(firsts)
    wanted = max(1, min(n, round(n * (len(variants) * prompts / max(1, n) / 320) ** 0.5)))
    parts = [p.tolist() for p in np.array_split(firsts, wanted)]
    return [(p[0], [v for f in p for v in by_first[f]]) for p in reversed(parts) if p]
