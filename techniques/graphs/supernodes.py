"""Supernodes: nodes of one name as one node, edges summed; and groups of like features. Pure functions."""

from dataclasses import replace

import numpy as np

from techniques.graphs.files import node_id
from techniques.graphs.requests import FEATURE, KINDS, SUPERNODE, GraphResult


def groups_of(r: GraphResult, names: dict[str, str]) -> dict[str, list[int]]:
    """The nodes of each name, of those that the graph has."""
    groups: dict[str, list[int]] = {}
    for i in range(len(r.kind)):
        if (label := names.get(node_id(r, i))) is not None:
            groups.setdefault(label, []).append(i)
    return groups


def title(label: str, some: list[int]) -> str:
    return f"“{label}” ({len(some)})"


def has_supernodes(r: GraphResult) -> bool:
    """Whether shares of edges are those that circuit-tracer's viewer draws, and not of influence."""
    return KINDS.index(SUPERNODE) in r.kind


def folded(r: GraphResult, names: dict[str, str]) -> GraphResult:
    """
    The graph with a supernode in the place of the nodes of each name; itself where it has none. An edge is the sum of its edges (those within a supernode fall away); its share is that of
    circuit-tracer's viewer: each edge by the absolute inputs that come to its target from outside, targets weighted by the part of their inputs that does.
    """
    if not (groups := groups_of(r, names)):
        return r
    grouped = {i for some in groups.values() for i in some}
    alone, n = [i for i in range(len(r.kind)) if i not in grouped], len(r.kind)
    m = len(alone) + len(groups)
    now = np.zeros(n, np.int64)
    now[alone] = np.arange(len(alone))
    for at, some in enumerate(groups.values(), len(alone)):
        now[some] = at
    sums = lambda where, x, size: np.bincount(where, x, minlength=size)  # noqa: E731
    a, b = now[r.source], now[r.to]
    outer = a != b
    whole, outside = sums(r.to, np.abs(r.weight), n), sums(r.to, np.abs(r.weight) * outer, n)
    part = np.divide(outside, whole, out=np.zeros(n), where=whole > 0)
    total = sums(now, part, m)[now]
    part = np.divide(part, total, out=np.zeros(n), where=total > 0)
    pairs, edge = np.unique(np.stack([a[outer], b[outer]]), axis=1, return_inverse=True)
    weight, into = r.weight[outer], r.to[outer]
    share = sums(edge, weight / np.maximum(outside[into], 1e-30) * part[into], pairs.shape[1])
    of = lambda x, f: np.array([*x[alone], *(f(x[some]) for some in groups.values())], x.dtype)  # noqa: E731
    nothing = lambda x: np.nan  # noqa: E731
    first = {name: of(getattr(r, name), lambda x: x[0]) for name in ("at", "index", "probability", "cumulative")}
    first["layer"] = of(r.layer, np.max)  # with a logit in it, the logits'
    added = {name: of(getattr(r, name), np.sum) for name in ("influence", "bias", "left_out", "whole")}
    texts = (*(r.texts[i] for i in alone), *(title(label, some) for label, some in groups.items()))
    edges = {"source": pairs[0].astype(np.int32), "to": pairs[1].astype(np.int32), "weight": sums(edge, weight, pairs.shape[1]), "share": share}
    kind = of(r.kind, lambda x: KINDS.index(SUPERNODE))
    return replace(r, kind=kind, value=of(r.value, nothing), texts=texts, **first, **added, **edges)


def alike(cosine: np.ndarray, threshold: float, apart: np.ndarray) -> list[list[int]]:
    """
    Groups in which any two have at least this cosine (complete linkage: the two groups whose least cosine is largest join first); `apart`: pairs that never
    join. Groups of one are left out.
    """
    least = np.where(apart, -np.inf, cosine)
    np.fill_diagonal(least, -np.inf)
    groups = {i: [i] for i in range(len(least))}
    while len(groups) > 1:
        i, j = sorted(map(int, np.unravel_index(least.argmax(), least.shape)))
        if not least[i, j] >= threshold:
            break
        least[i] = least[:, i] = np.minimum(least[i], least[j])
        least[j] = least[:, j] = least[i, i] = -np.inf
        groups[i] += groups.pop(j)
    return [sorted(some) for some in groups.values() if len(some) > 1]


def features_of(r: GraphResult, some: list[int]) -> tuple[str, ...]:
    """The ids of the features among nodes."""
    return tuple(node_id(r, i) for i in some if KINDS[r.kind[i]] == FEATURE)
