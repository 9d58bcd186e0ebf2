"""The table of edges against names and loops, at a small shape; and that a large model's stays small and quick."""

import time
from dataclasses import replace

import numpy as np
import pytest

from techniques.circuits.edge_index import EdgeIndex, edge_index, own_edge, receivers, seen, senders
from vocabulary.circuit import Edge, owners, parse_edge, prune
from vocabulary.nodes import parse_node, UserError
from vocabulary.requests import ModelInfo

SMALL = ModelInfo("m", "Llama", 3, 4, 2, 32, 8, 48, 420, 64, 0, "float32", "cpu", "rotary", "RMS", False, 0.0, "", True, 0.0)
LARGE = replace(SMALL, n_layers=32, n_heads=32, n_kv_heads=8, d_model=4096, d_head=128, d_mlp=14336)


def slow_edges(info: ModelInfo) -> tuple[str, ...]:
    names = senders(info)
    return tuple(str(Edge(s, r)) for r in receivers(info) for s in names[: seen(info, r)])


def slow_to_logits(kept: tuple[str, ...], group: int) -> set[str]:
    wanted, out = {"logits"}, set()
    while True:
        more = {e for e in kept if owners(parse_edge(e).receiver, group) & wanted}
        if more == out:
            return out
        out, wanted = more, wanted | {parse_edge(e).sender for e in more}


@pytest.mark.parametrize("info", [SMALL, replace(SMALL, n_kv_heads=4), replace(SMALL, parallel=True)])
def test_the_table_is_the_names(info):
    index, edges, rng, group = EdgeIndex(info), slow_edges(info), np.random.default_rng(0), info.n_heads // info.n_kv_heads
    assert index.edges == edges and index.exists.sum() == len(edges)
    assert [index.name(r, c) for r, c in np.argwhere(index.exists)] == list(edges) and all(index.exists[index.place(e)] for e in edges)
    for share in (0.02, 0.05, 0.1, 0.3, 1.0):
        kept = tuple(e for e in edges if rng.random() < share)
        table = index.array(kept)
        assert table.sum() == len(kept)
        assert (index.on_paths(table) == index.array(prune(kept, group))).all()
        assert (index.to_logits(table) == index.array(slow_to_logits(kept, group))).all()


def test_own_spelling():
    assert own_edge(SMALL, "L0H1->L2H3.k") == "L0H1->L2H2.k" and own_edge(SMALL, " 0.1->L1.mlp") == "L0H1->L1.mlp"
    for bad in ("L2H1->L2H1.q", "L0H0->L1H4.q", "L3.mlp->logits", "embed->L0H0@1.q", "L0H0->L1H1", "x"):
        with pytest.raises(UserError):
            own_edge(SMALL, bad)
    with pytest.raises(AssertionError):
        edge_index(SMALL).place("L2H0->L1H0.q")


def test_eight_billion():
    """805,681 edges: the table in seconds, a set of edges in milliseconds, two megabytes each."""
    begun = time.process_time()
    index = EdgeIndex(LARGE)
    assert index.exists.sum() == 805_681 and len(index.edges) == 805_681 and index.exists.nbytes < 2 << 20
    assert time.process_time() - begun < 5
    some = [index.edges[i] for i in np.random.default_rng(0).choice(len(index.edges), 300, replace=False)]
    begun = time.process_time()
    for _ in range(10):
        kept = index.on_paths(index.array(own_edge(LARGE, e) for e in some))
    assert (time.process_time() - begun) / 10 < 0.1 and kept.sum() <= len(some)
    assert parse_node(index.names[-1]).site == "mlp"
