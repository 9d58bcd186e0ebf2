"""
Which pairs of features a head attends by, over one prompt or many: the largest rows, columns and pairs by their mean, what is left of them in sums. Exact: ranked by
all pairs, some rows at a time; held are a prompt's rows [name, d_head + 1] alone. What a prompt has not is 0 there.
"""

from dataclasses import dataclass

import numpy as np
import torch as t
from torch import Tensor

from techniques.qk.parts import Sides
from techniques.qk.requests import OTHERS
from utils import show_bytes
from vocabulary.nodes import UserError
from vocabulary.statistics import interval

BLOCK = 1 << 21  # pairs that are ranked at once
MOST_BYTES = 1 << 30  # of all prompts' rows


def is_feature(name: str) -> bool:
    return ".sae.f" in name


def check_size(found: list[Sides], of: int) -> None:
    """UserError where the prompts' rows would fill the memory."""
    size = sum(s.query.nbytes + s.key.nbytes for s in found)
    if size > MOST_BYTES:
        raise UserError(
            f"what features write into queries and keys takes {show_bytes(size)} for {len(found)} of {of} prompts, and {show_bytes(MOST_BYTES)} are the limit: "
            "take fewer prompts, or a single other source (instead), whose keys are those of two positions"
        )


class Side:
    """The names of all prompts on one side, numbered; each prompt's own, and which are features."""

    def __init__(self, names: list[list[str]]):
        self.number: dict[str, int] = {}
        self.own = [t.tensor([self.number.setdefault(n, len(self.number)) for n in some]) for some in names]
        self.names = list(self.number)
        self.features = t.tensor([is_feature(n) for n in self.names])

    def listed(self, margin: Tensor, peak: Tensor, most: int) -> tuple[list[str], Tensor]:
        """The names of a table's lines, largest first, and each name's line: what is no feature, the features of largest margin or entry, then the others in one."""
        size = t.where(self.features, t.maximum(margin.abs(), peak), t.inf)
        shown = size.argsort(descending=True, stable=True)[: int((~self.features).sum()) + most]
        shown = shown[margin[shown].abs().argsort(descending=True, stable=True)]
        line = t.full((len(self.names),), len(shown))
        line[shown] = t.arange(len(shown))
        return [self.names[i] for i in shown] + [OTHERS] * (len(shown) < len(self.names)), line


@dataclass
class Table:
    """
    Each prompt's query lines [line, d_head + 1] and key lines, and in how many prompts both of an entry are there; the largest pairs of features with their values
    [prompt, pair]; features a side, pairs in all, and the mean of all pairs' sum.
    """

    queries: list[str]
    keys: list[str]
    query: list[Tensor]
    key: list[Tensor]
    fires: np.ndarray
    names: list[tuple[str, str]]
    pairs: np.ndarray
    pair_fires: np.ndarray
    fired: tuple[int, int]
    count: int
    sum: float


class Ranking:
    """Means over the prompts of all pairs, some query names at a time: margins and largest entries of both sides, and the largest pairs of features."""

    def __init__(self, found: list[Sides], q: Side, k: Side, most: int):
        self.found, self.q, self.k = found, q, k
        n, m = len(q.names), len(k.names)
        self.margin, self.peak = [t.zeros(n, dtype=t.float64), t.zeros(m, dtype=t.float64)], [t.zeros(n, dtype=t.float64), t.zeros(m, dtype=t.float64)]
        self.best, self.best_at, self.count, self.sum = t.zeros(0, dtype=t.float64), t.zeros(0, 2, dtype=t.long), 0, 0.0
        step = max(1, BLOCK // m)
        for begin in range(0, n, step):
            self.take(begin, min(begin + step, n), most)

    def take(self, begin: int, end: int, most: int) -> None:
        mean, there = t.zeros(end - begin, len(self.k.names), dtype=t.float64), t.zeros(end - begin, len(self.k.names), dtype=t.bool)
        for some, mine, keys in zip(self.found, self.q.own, self.k.own):
            here = (mine >= begin) & (mine < end)
            at = (mine[here] - begin)[:, None], keys[None]
            mean[at] += some.query[here] @ some.key.T / len(self.found)
            there[at] = True
        self.margin[0][begin:end], self.peak[0][begin:end] = mean.sum(1), mean.abs().amax(1)
        self.margin[1] += mean.sum(0)
        self.peak[1] = t.maximum(self.peak[1], mean.abs().amax(0))
        there &= self.q.features[begin:end, None] & self.k.features[None]
        self.count += int(there.sum())
        self.sum += float(mean[there].sum())
        rows, cols = there.nonzero(as_tuple=True)
        self.best = t.cat([self.best, mean[rows, cols]])
        self.best_at = t.cat([self.best_at, t.stack([rows + begin, cols], 1)])
        top = self.best.abs().argsort(descending=True, stable=True)[:most]
        self.best, self.best_at = self.best[top], self.best_at[top]


def spread(mine: Tensor, values: Tensor, n: int) -> Tensor:
    """A prompt's rows [own name, d] at their place among all names [n, d]; zero where it has none."""
    return t.zeros(n, values.shape[1], dtype=values.dtype).index_add(0, mine, values)


def ranked(found: list[Sides], most: int) -> Table:
    """The table of the largest `most` features a side, and of the largest pairs, of the sides of one prompt or several."""
    if most < 1:
        raise UserError("most must be at least 1")
    q, k = Side([s.queries for s in found]), Side([s.keys for s in found])
    rank = Ranking(found, q, k, most)
    queries, line = q.listed(rank.margin[0], rank.peak[0], most)
    keys, column = k.listed(rank.margin[1], rank.peak[1], most)
    query, key, fires, pairs, pair_fires = [], [], np.zeros((len(queries), len(keys)), np.int32), [], np.zeros(len(rank.best), np.int32)
    for s, mine, theirs in zip(found, q.own, k.own):
        query.append(spread(line[mine], s.query, len(queries)))
        key.append(spread(column[theirs], s.key, len(keys)))
        rows, cols = np.isin(np.arange(len(queries)), line[mine]), np.isin(np.arange(len(keys)), column[theirs])
        fires += np.outer(rows, cols)
        places = [t.full((len(side.names),), -1).index_put((own,), t.arange(len(own))) for side, own in ((q, mine), (k, theirs))]
        i, j = (place[rank.best_at[:, n]] for n, place in enumerate(places))
        both = (i >= 0) & (j >= 0)
        pairs.append(((s.query[i] * s.key[j]).sum(1) * both).numpy())
        pair_fires += both.numpy()
    names = [(q.names[i], k.names[j]) for i, j in rank.best_at.tolist()]
    fired = int(q.features.sum()), int(k.features.sum())
    return Table(queries, keys, query, key, fires, names, np.stack(pairs), pair_fires, fired, rank.count, rank.sum)


def means(query: list[Tensor], key: list[Tensor], over: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over prompts of all entries [query, key], `over` a set with the ends of their intervals: a query line at a time, so that no prompt's table is held."""
    q, k, lines = t.stack(query), t.stack(key), []
    for i in range(q.shape[1]):
        values = t.einsum("pw,pkw->pk", q[:, i], k).numpy()
        found = interval(values) if over else {}
        lines.append([values.mean(0), *(found[end] for end in ("low", "high") if over)])
    columns = [np.stack(x).astype(np.float32) for x in zip(*lines)]
    return tuple(columns) if over else (*columns, np.zeros(0, np.float32), np.zeros(0, np.float32))


def fields(found: list[Sides], most: int, over: bool) -> dict[str, object]:
    """What a QKFeaturesResult says of the sides: means, `over` a set with intervals."""
    table, pair_low, pair_high = ranked(found, most), np.zeros(0, np.float32), np.zeros(0, np.float32)
    values, low, high = means(table.query, table.key, over)
    if over:
        pair_low, pair_high = (interval(table.pairs)[end].astype(np.float32) for end in ("low", "high"))
    pair = table.pairs.mean(0)
    return {
        "queries": tuple(table.queries), "keys": tuple(table.keys), "values": values, "low": low, "high": high, "fired": table.fired, "fires": table.fires,
        "pair_names": tuple(table.names), "pair": pair.astype(np.float32), "pair_low": pair_low, "pair_high": pair_high, "pair_fires": table.pair_fires,
        "pairs": table.count, "other_pairs": table.sum - float(pair.sum()),
    }  # fmt: skip
