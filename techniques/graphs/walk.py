"""A walk through a graph: one node's inputs and outputs in their order. Pure functions of a result."""

from dataclasses import dataclass

import numpy as np

from techniques.graphs.requests import FEATURE, KINDS, LOGIT, SUPERNODE, GraphResult
from techniques.graphs.files import node_id
from utils import show_number


@dataclass(frozen=True)
class Step:
    """An edge of the node at hand: its number, the node at its other end, and whether it comes in."""

    edge: int
    node: int
    into: bool


def steps(r: GraphResult, i: int) -> list[Step]:
    """Of node i: what comes in, then where it goes, each by size."""
    into, away = np.flatnonzero(r.to == i), np.flatnonzero(r.source == i)
    by_size = lambda some: some[np.argsort(-np.abs(r.weight[some]), kind="stable")].tolist()  # noqa: E731
    return [Step(e, int(r.source[e]), True) for e in by_size(into)] + [Step(e, int(r.to[e]), False) for e in by_size(away)]


def top(r: GraphResult) -> int:
    """Where a walk begins: the first logit node, or the supernode that holds it."""
    return int(r.layer.argmax())


def place(r: GraphResult, name: str) -> int:
    """The node of an id, or the first logit where the graph has none such."""
    return next((i for i in range(len(r.kind)) if node_id(r, i) == name), top(r))


def balance(r: GraphResult, i: int) -> str:
    """What a node's value is made of, in words; "" for nodes that nothing comes into."""
    into = r.weight[r.to == i].sum()
    if KINDS[r.kind[i]] == SUPERNODE:
        return f"from outside {show_number(into, 7).strip()}, to outside {show_number(r.weight[r.source == i].sum(), 7).strip()}"
    if KINDS[r.kind[i]] not in (FEATURE, LOGIT):
        return ""
    show = lambda x: show_number(x, 7).strip()  # noqa: E731
    pruned = r.whole[i] - into - r.left_out[i] - r.bias[i]
    more = f" + left out {show(r.left_out[i])}" if r.left_out[i] else ""
    return f"{show(r.whole[i])} = inputs {show(into)} + pruned {show(pruned)} + biases {show(r.bias[i])}{more}"
