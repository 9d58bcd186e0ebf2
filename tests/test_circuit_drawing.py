"""The circuit as a drawing by layer: where nodes stand, which rows are joined, and the walk along its edges."""

from dataclasses import replace

import numpy as np
import pytest
from ui import make_app, press, screen, shown

from techniques.circuits.graph import draw, edges_beside, fitted_to, graph_of
from techniques.circuits.requests import Discover, DiscoverResult
from vocabulary.circuit import Circuit
from vocabulary.wire import to_json
from screen.replies import Reply
from tui import first_state

EDGES = (
    "embed->L0H1.v",
    "embed->L0.mlp",
    "L0H1->L0.mlp",
    "L0.mlp->L3H2.v",
    "L0H1->L3H2.q",
    "L0H1->L3H2.v",
    "L3H2->logits",
    "L3H3->logits",
    "L0H3->L3H3.v",
    "embed->L0H3.v",
)
NODES = ("L0H1", "L0H3", "L0.mlp", "L3H2", "L3H3")
CIRCUIT = Circuit("drawn", "zoo", NODES, EDGES)
SCORES = dict(zip(EDGES, (0.1, 0.2, -0.3, 0.4, 0.5, 1.0, 2.0, -1.5, 0.05, 0.3)))


def text(spans) -> str:
    return "".join(t for t, _ in spans)


def test_rows_are_layers_and_an_mlp_after_its_heads_stands_above_them():
    graph = graph_of(CIRCUIT, SCORES, 4, {}, 15)
    assert graph.rows == (("logits",), ("L3H2", "L3H3"), ("L0.mlp",), ("L0H1", "L0H3"), ("embed",))
    assert graph.top == 2.0 and graph.signed and graph.edges[("L0H1", "L3H2")] == (("L0H1->L3H2.v", 1.0), ("L0H1->L3H2.q", 0.5))
    assert [e for e, _, _ in graph.of("L3H2")] == ["L0H1->L3H2.v", "L0H1->L3H2.q", "L0.mlp->L3H2.v", "L3H2->logits"], (
        "into it, then from it, the strongest first"
    )
    apart = graph_of(replace(CIRCUIT, edges=("embed->L0H1.v", "L0H1->L3H2.v", "embed->L0.mlp", "L0.mlp->L3H2.v", "L3H2->logits")), {}, 4, {}, 15)
    assert ("L0H1", "L0H3", "L0.mlp") in apart.rows, "no edge between them: one row"


def test_rows_are_joined_only_where_no_edge_is_between_them():
    chain = tuple(f"L{n}H0->L{n + 1}H0.v" for n in range(12))
    nodes = (*(f"L{n}H0" for n in range(13)), "L4H3", "L5H2")
    graph = graph_of(
        Circuit("c", "", nodes, ("embed->L0H0.v", *chain, "L12H0->logits", "embed->L4H3.v", "L4H3->logits", "embed->L5H2.v", "L5H2->logits")), {}, 4, {}, 9
    )
    assert fitted_to(graph, 80, 17, {}) is None, "13 layers in a chain need 15 rows and a line between any two"
    fits, _ = fitted_to(graph, 80, 29, {})
    assert len(fits.rows) == 15
    loose = graph_of(Circuit("c", "", nodes, tuple(e for n in nodes for e in (f"embed->{n}.v", f"{n}->logits"))), {}, 4, {}, 9)
    fits, _ = fitted_to(loose, 80, 17, {})
    assert len(fits.rows) <= 9 and sorted(n for row in fits.rows for n in row) == sorted(("embed", "logits", *nodes))


def test_the_drawing():
    graph = graph_of(CIRCUIT, SCORES, 4, {}, 15)
    lines = draw(graph, {"L3H2": -1.2}, 70, 15, "L3H2", "L0H1->L3H2.v", "colour", {"L3H2": -1.2})
    shown_lines = [text(line) for line in lines]
    assert len(lines) == 15 and all(len(line) == 70 for line in shown_lines)
    assert "logits" in shown_lines[0] and "L3H2 -1.20" in shown_lines[3] and shown_lines[3].startswith("L3 ") and "embed" in shown_lines[-1]
    order = [shown_lines[3].index("L3H2"), shown_lines[3].index("L3H3")]
    assert order == sorted(order) and any("\u2801" <= c <= "\u28ff" for c in shown_lines[1]), "edges are lines of dots"
    beside = [text(line) for line in edges_beside(graph, "L3H2", "L0H1->L3H2.q", 38, 20)]
    assert beside[0] == "into L3H2" and "from L3H2" in beside and [line for line in beside if line.startswith("▸")][0].split()[:4] == ["▸", "L0H1", "→", ".q"]


def test_nodes_with_positions_stand_by_position():
    graph = graph_of(Circuit("c", "", ("L1H0@S2", "L1H3@IO", "L2H1@END")), {}, 4, {"IO": 2, "S2": 10, "END": 14}, 15)
    assert graph.rows == (("L2H1@END",), ("L1H3@IO", "L1H0@S2"))
    assert graph.across["L1H3@IO"] < graph.across["L1H0@S2"] < graph.across["L2H1@END"] < 1


async def walk(zoo, tmp_path, size):
    state = first_state({})
    app = make_app(zoo, tmp_path, replace(state, prompt_set=state.prompt_set[:4]))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5")
        pane = app.panes["circuit"]
        scored = DiscoverResult(CIRCUIT, "eap-ig", EDGES, np.array(list(SCORES.values())), np.zeros(0), np.zeros(0), 0.9, 0, 0, "", "")
        pane.found["drawn"] = Reply(Discover(pane.study(app)), scored, model=app.requests.model)
        app.act("put_circuit", circuit=to_json(CIRCUIT))
        await press(app, pilot)
        assert "eap-ig's score" in shown(app) and "L0.mlp" in shown(app) and all(len(line) <= size[0] for line in screen(app))
        await press(app, pilot, "/", *"L3H2", "enter")
        assert str(app.node()) == "L3H2" and "L0H1->L3H2.v +1.0000" in shown(app) and "edge 1 of 4" in shown(app)
        await press(app, pilot, "l")
        assert str(app.node()) == "L3H3", "the next node of the row"
        await press(app, pilot, "h", ".", ".", "j")
        assert str(app.node()) == "L0.mlp", "down the edge that was chosen: the third into it"
        await press(app, pilot, "k")
        assert str(app.node()) == "L3H2"
        await press(app, pilot, "j", "j", "j")
        assert str(app.node()) == "embed" and "embed" in shown(app)
        await press(app, pilot, "k", "k")
        await press(app, pilot, "a")
        assert [str(i) for i in app.state.interventions] == [f"{app.node()}=zero"], "an action is on the node under the cursor"
        kept = str(app.node())
        await press(app, pilot, "c")
        assert kept not in app.state.current.nodes and "not in" in shown(app)
        await press(app, pilot, "j", "v", "v")
        assert str(app.node()) in app.state.current.nodes and app.state.views["circuit.view"] == "map"


async def test_the_walk_along_edges(zoo, tmp_path):
    await walk(zoo, tmp_path, (80, 24))


@pytest.mark.table
@pytest.mark.parametrize("size", [(120, 36), (200, 50)])
async def test_the_walk_at_other_sizes(zoo, tmp_path, size):
    await walk(zoo, tmp_path, size)


@pytest.mark.table
async def test_words_where_the_drawing_does_not_fit(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(80, 12)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5")
        app.act("put_circuit", circuit=to_json(CIRCUIT))
        await press(app, pilot, "/", *"L3H2", "enter")
        assert "L3H2" in shown(app) and ".v ◂" in shown(app) and "L0.mlp->L3H2.v  edge 1 of 4" in shown(app)
        await press(app, pilot, "j")
        assert str(app.node()) == "L0.mlp" and "in ◂ embed" in shown(app), "down the edge that was chosen"


@pytest.fixture
def zoo(engines):
    return engines["zoo"]
