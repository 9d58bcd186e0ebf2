"""Every edge of a model as a table [receiver, sender]: names to places and back, sets of edges as arrays of booleans, and which of them lie on a path."""

from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property

import numpy as np

from vocabulary.circuit import ARROW, Edge, LOGITS, owner, parse_edge
from vocabulary.nodes import Node, parse_node, UserError
from vocabulary.requests import ModelInfo

PARTS = ("q", "k", "v")


def senders(info: ModelInfo) -> tuple[str, ...]:
    """Every sender in the order of its writing."""
    layers = ([str(Node("head", n, h)) for h in range(info.n_heads)] + [str(Node("mlp", n))] for n in range(info.n_layers))
    return ("embed", *(s for layer in layers for s in layer))


def receivers(info: ModelInfo) -> tuple[str, ...]:
    """Every receiver in the order of its reading; with grouped heads k and v are those of the group, named by its first head."""
    per, out = info.n_heads // info.n_kv_heads, []
    for n in range(info.n_layers):
        out += [str(Node("head", n, h, p)) for p in PARTS for h in range(0, info.n_heads, 1 if p == "q" else per)] + [str(Node("mlp", n))]
    return (*out, LOGITS)


def seen(info: ModelInfo, receiver: str) -> int:
    """How many of `senders` a receiver reads: those before it."""
    if receiver == LOGITS:
        return 1 + info.n_layers * (info.n_heads + 1)
    node = parse_node(receiver)
    return 1 + node.layer * (info.n_heads + 1) + (info.n_heads if node.site == "mlp" and not info.parallel else 0)


class EdgeIndex:
    """
    The table of a model's edges: `names` of senders and `readers` (receivers) in their order, `seen` [receiver] how many senders each reads, `exists`
    [receiver, sender]. A set of edges is an array of booleans of that shape; its edges in order are those of `all_edges`.
    """

    def __init__(self, info: ModelInfo):
        self.info, self.names, self.readers = info, senders(info), receivers(info)
        self.column, self.row = ({name: i for i, name in enumerate(some)} for some in (self.names, self.readers))
        self.seen = np.array([seen(info, r) for r in self.readers])
        self.exists = np.arange(len(self.names)) < self.seen[:, None]
        self.first, self.stop = (np.array(x) for x in zip(*map(self.owners, self.readers)))  # the senders that a receiver belongs to; none: the logits
        self.per_layer = info.n_heads + 2 * info.n_kv_heads + 1
        first = range(0, len(self.readers) - 1, self.per_layer)
        self.stages = [slice(*ends) for a in first for ends in ((a, a + self.per_layer - 1), (a + self.per_layer - 1, a + self.per_layer))]

    @cached_property
    def edges(self) -> tuple[str, ...]:
        """The name of every edge, receivers in the order of their reading."""
        return tuple(f"{s}{ARROW}{r}" for r, n in zip(self.readers, self.seen.tolist()) for s in self.names[:n])

    def name(self, row: int, column: int) -> str:
        return f"{self.names[column]}{ARROW}{self.readers[row]}"

    def place(self, edge: str) -> tuple[int, int]:
        """The row and column of an edge in this model's spelling (own_edge)."""
        sender, _, receiver = edge.partition(ARROW)
        row, column = self.row[receiver], self.column[sender]
        assert column < self.seen[row], f"{edge}: the receiver comes before the sender"
        return row, column

    def array(self, edges: Iterable[str]) -> np.ndarray:
        """True at some edges [receiver, sender]."""
        out, places = np.zeros(self.exists.shape, bool), [self.place(e) for e in edges]
        if places:
            out[tuple(np.array(places).T)] = True
        return out

    def owners(self, receiver: str) -> tuple[int, int]:
        """The first of the senders that a receiver belongs to, and the one behind the last: keys and values are those of all heads of their group."""
        if receiver == LOGITS:
            return 0, 0
        first, node = self.column[owner(receiver)], parse_node(receiver)
        return first, first + (self.info.n_heads // self.info.n_kv_heads if node.part in ("k", "v") else 1)

    def owned(self, some: np.ndarray) -> np.ndarray:
        """Which receivers belong to one of some senders, and the logits [receiver]."""
        count = np.concatenate([[0], some.cumsum()])
        return (count[self.stop] > count[self.first]) | (self.stop == 0)

    def to_logits(self, kept: np.ndarray) -> np.ndarray:
        """Those kept edges that lie on a path to the logits."""
        wanted = kept[-1].copy()
        for rows in reversed(self.stages):
            wanted |= kept[rows][self.owned(wanted)[rows]].any(0)
        return kept & self.owned(wanted)[:, None]

    def on_paths(self, kept: np.ndarray) -> np.ndarray:
        """Those kept edges that lie on a path from embed to the logits."""
        reached = np.arange(len(self.names)) == 0
        for rows in self.stages:
            hit = np.flatnonzero((kept[rows] & reached).any(1)) + rows.start
            for a, b in set(zip(self.first[hit].tolist(), self.stop[hit].tolist())):
                reached[a:b] = True
        return self.to_logits(kept) & reached

    def strongest(self, scores: np.ndarray, count: int) -> np.ndarray:
        """Of the `count` edges with the largest |score| (scores [edge], in the order of `edges`) those on a path."""
        kept, order = np.zeros_like(self.exists), np.argsort(-np.abs(scores), kind="stable")[:count]
        rows, columns = np.nonzero(self.exists)
        kept[rows[order], columns[order]] = True
        return self.on_paths(kept)

    def named(self, scores: np.ndarray, kept: np.ndarray) -> tuple[str, ...]:
        """The names of some edges, the largest |score| first."""
        rows, columns = np.nonzero(self.exists)
        return tuple(self.name(rows[i], columns[i]) for i in np.argsort(-np.abs(scores), kind="stable").tolist() if kept[rows[i], columns[i]])


def strongest_in_words(asked: int, found: int) -> str:
    dropped = f", {asked - found} of them dropped that are on no path from embed to logits" if found < asked else ""
    return f"the {asked} edges of the largest |score|{dropped}"


def senders_of(edges: Iterable[str]) -> tuple[str, ...]:
    """The nodes of edges that lie on paths, in the order of their writing: there every receiver belongs to a sender."""
    nodes = {e.sender for e in map(parse_edge, edges)} - {"embed"}
    return tuple(sorted(nodes, key=lambda a: (parse_node(a).layer, parse_node(a).site == "mlp", parse_node(a).head or 0)))


INDICES: dict[tuple, EdgeIndex] = {}  # of the shapes met last


def edge_index(info: ModelInfo) -> EdgeIndex:
    """The table of a model's edges, made once for each shape."""
    shape = (info.n_layers, info.n_heads, info.n_kv_heads, info.parallel)
    if shape not in INDICES:
        if len(INDICES) > 3:
            INDICES.clear()
        INDICES[shape] = EdgeIndex(info)
    return INDICES[shape]


def all_edges(info: ModelInfo) -> tuple[str, ...]:
    """Every edge of the model, receivers in the order of their reading."""
    return edge_index(info).edges


def own_edge(info: ModelInfo, text: str) -> str:
    """An edge in this model's spelling: no positions, k and v named by their group's first head. UserError when the model has no such edge."""
    index, (sender, _, receiver) = edge_index(info), text.partition(ARROW)
    if sender in index.column and receiver in index.row and index.column[sender] < index.seen[index.row[receiver]]:
        return text
    edge = parse_edge(text)
    if "@" in text:
        raise UserError(f"{text}: edges are scored without positions; write it without @")
    receiver = edge.receiver
    if receiver != LOGITS:
        node = parse_node(receiver)
        per = info.n_heads // info.n_kv_heads
        if node.site == "head" and node.part in ("k", "v"):
            receiver = str(replace(node, head=node.head // per * per))
    if edge.sender not in index.column or receiver not in index.row:
        raise UserError(f"{text}: the model has layers 0 to {info.n_layers - 1} with heads 0 to {info.n_heads - 1}")
    if index.column[edge.sender] >= index.seen[index.row[receiver]]:
        raise UserError(f"{text}: the receiver comes before the sender")
    return str(Edge(edge.sender, receiver))
