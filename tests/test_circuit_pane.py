"""Pane 5: keep and drop anywhere, scores, paths, discovery, files; at three sizes."""

import json

import pytest
from ui import asked, grid, make_app, press, shown

from techniques.circuits import discovery
from techniques.circuits.requests import Discover, PathPatch, Score
from vocabulary.prompts import Prompt
from screen.session import read_session
from tui import first_state
from screen.overlays import Panel, Picker


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


def small(count: int = 4):
    from dataclasses import replace

    state = first_state({})
    return replace(state, prompt_set=state.prompt_set[:count])


@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 50)])
async def test_keep_score_and_path(zoo, tmp_path, size):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=size) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5")
        assert "no circuit yet" in shown(app) and "c keeps the node" in shown(app)
        await press(app, pilot, "l", "l", "c", "l", "c")
        assert app.state.current.nodes == ("L3H2", "L3H3") and "•" in shown(app) and "in circuit" in shown(app)
        for _ in range(3):
            await press(app, pilot, "k")
        await press(app, pilot, "c", "h", "h", "c")
        assert app.state.current.nodes == ("L0H1", "L0H3", "L3H2", "L3H3")
        await press(app, pilot, "S")
        assert "faithfulness +" in shown(app) and "F circuit" in shown(app) and len(asked(app, Score)) == 1
        assert "drawing · faithfulness" in shown(app) and "L3H3 -" in shown(app), "the nodes by layer, with their effects"
        await press(app, pilot, "v", "v", "v", "v")
        assert "edges · faithfulness" in shown(app) and "L3" in shown(app)
        await press(app, pilot, "v", "v")
        assert "alone away" in shown(app)
        await press(app, pilot, "v", "v", "S")
        assert "every node → logits" in shown(app) and "direct edge" in shown(app) and len(asked(app, PathPatch)) == 1
        await press(app, pilot, "Z")
        assert "through MLPs" in shown(app) and len(asked(app, PathPatch)) == 1, "another convention waits for S"
        await press(app, pilot, "backspace", "G", "l", "enter")
        assert len(app.state.current.edges) == 1 and "->logits" in app.state.current.edges[0]
        await press(app, pilot, "u", "v", "v", "S")
        assert "incompleteness" in shown(app) and "K = " in shown(app)
        await press(app, pilot, "v", "v")
        assert "U" in shown(app)
        await press(app, pilot, "1", "c", "u")
        assert "a circuit holds heads" in shown(app) or app.state.current is not None
    again, warning = read_session(app.session.path)
    assert not warning and again.state.circuits == app.state.circuits and again.state.circuit == "circuit"


def test_cells_of_a_circuit():
    from screen.pictures import kept_cells, map_addresses

    head_map = map_addresses(2, 3, 4)
    assert kept_cells(("L1H2", "L0.mlp", "L0H1@S2", "L0H0.v"), head_map, {}) == {(1, 2), (0, 4), (0, 1)}
    places = [((0, p), f"L0H1@{p}") for p in range(4)]
    assert kept_cells(("L0H1@S2",), places, {"S2": 3}) == {(0, 3)} and kept_cells(("L0H1",), places, {}) == {(0, p) for p in range(4)}
    values = [((0, h), f"L0H{h}.v") for h in range(3)]
    assert kept_cells(("L0H1", "L0H2.k", "L0H0.v"), values, {}) == {(0, 1), (0, 0)}, "a head is its q, k and v too"


async def test_kept_cells_are_marked_everywhere(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(160, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "2", "c", "l")
        assert shown(app).count("•") == 1, "L3H0 in the heads' map"
        await press(app, pilot, "3")
        assert any("•" in line for line in shown(app).splitlines() if "L3" in line)
        await press(app, pilot, "4", "S")
        assert grid(app).kept == {(3, 0)} and "•" in shown(app)
        await press(app, pilot, "u")
        assert "•" not in shown(app)


@pytest.mark.slow
async def test_nodes_or_edges_names_and_receivers(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(140, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5")
        for part in ("L0H1", "L0H3", "L3H2", "L3H3"):
            app.act("keep", part=part)
        await press(app, pilot, "S")
        before = app.panes["circuit"].scored(app).faithfulness.mean
        assert before > 0.9
        app.act("group", name="copying", nodes=["L3H2", "L3H3"])
        app.act("rename_circuit", name="circuit", to="mine")
        await press(app, pilot)
        assert app.panes["circuit"].scored(app).faithfulness.mean == before, "names do not change a score"
        app.act("view", name="circuit.view", value="path")
        await press(app, pilot, "S", "enter")
        assert len(app.state.current.edges) == 1 and "scored by nodes until" in shown(app)
        app.act("view", name="circuit.view", value="map")
        await press(app, pilot, "S")
        assert app.panes["circuit"].scored(app).faithfulness.mean == pytest.approx(before, abs=1e-4) and "nodes: what is not" in app.panes["circuit"].said[1]
        app.act("view", name="circuit.by", value="edges")
        await press(app, pilot, "S")
        result = app.panes["circuit"].scored(app)
        assert result.faithfulness.mean == pytest.approx(0, abs=1e-4) and "no path of its edges" in result.warning and "no path of its edges" in shown(app)
        for typed, words in (("L9H9.q", "is not in this model"), ("L3H2.z", "does not receive"), ("L3H2.v@40", "the prompt has 15 tokens")):
            await press(app, pilot, "Q", *typed, "enter")
            assert words in shown(app) and app.state.receivers == ("logits",), typed
        await press(app, pilot, "U", *"acdc", "enter", "ctrl+u", *"nan", "enter")
        assert "finite" in shown(app)
        await press(app, pilot, "escape", "U", *"eap-ig", "enter", "ctrl+u", *"1.5", "enter")
        assert "whole ones" in shown(app)


def test_the_curve_is_to_scale():
    from screen import pictures

    lines = pictures.chart("x", ["0", "14", "40"], {"x": [0.0, 0.5, 1.0]}, 80, 16, [0.0, 14.0, 40.0])
    ticks = "".join(text for text, _ in next(line for line in reversed(lines) if any("40" in t for t, _ in line)))
    first, middle, last = (ticks.index(x) for x in ("0", "14", "40"))
    assert (middle - first) / (last - first) == pytest.approx(14 / 40, abs=0.06)


@pytest.mark.slow
async def test_paths_by_position_from_embeddings_and_from_several(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(140, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5")
        app.act("view", name="circuit.view", value="path")
        app.act("receivers", addresses=["L0H1.v"])
        await press(app, pilot, "S", "k", "k", "k")
        assert app.cursor.layer == 0 and str(app.node()) == "L0H0"
        await press(app, pilot, "k", "enter")
        assert str(app.node()) == "embed" and app.state.current.edges == ("embed->L0H1.v",)
        await press(app, pilot, "j")
        assert str(app.node()) == "L0H0"
        app.act("receivers", addresses=["L0H1.v"])
        app.act("keep", part="L0H1->logits")
        app.act("view", name="circuit.view", value="map")
        assert app.panes["circuit"].by_edges(app), "embed -> L0H1 -> logits"
        app.act("view", name="circuit.view", value="path")
        app.act("receivers", addresses=["L3H2.v", "L3H3.v"])
        await press(app, pilot, "P", "S")
        ask = asked(app, PathPatch)[-1]
        assert ask.by_pos and "by position" in shown(app) and "L0H1" in shown(app)
        for _ in range(3):
            await press(app, pilot, "j")
        row, col = app.panes["circuit"].map.at
        got = app.requests.answers[ask].result
        assert got.rows[row] == str(app.node()) and col == app.cursor.pos
        app.act("group", name="givers", nodes=["L0H1"])
        await press(app, pilot, "Q", *"from givers", "enter", "S")
        ask = asked(app, PathPatch)[-1]
        assert ask.each == "receiver" and ask.senders == ("L0H1",) and app.state.senders == ("L0H1",)
        await press(app, pilot, "Q", *"from L0H1 L0H3", "enter", "S")
        assert asked(app, PathPatch)[-1].senders == ("L0H1", "L0H3") and "L0H1, L0H3 → each receiver" in shown(app) and not app.requests.error("path")
        await press(app, pilot, "Q", *"from nowhere", "enter")
        assert app.state.senders == ("L0H1", "L0H3") and "nowhere" in shown(app)


@pytest.mark.slow
async def test_what_a_finished_job_leaves_alone(zoo, tmp_path):
    """The redo stack; and scores say that interventions are left out, curves how they were found; H ranks paths."""
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(150, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5")
        app.act("keep", part="L0H1")
        app.act("intervene", intervention="L1H1=zero")
        await press(app, pilot, "S")
        assert "interventions left out" in shown(app)
        await press(app, pilot, "u")
        discovery.run(app.panes["circuit"], app, Discover(app.panes["circuit"].study(app), "greedy", rest="patch", name="found-by-greedy"))
        await press(app, pilot)
        assert "found found-by-greedy" in shown(app) and app.state.circuit == "circuit"
        await press(app, pilot, "ctrl+r")
        assert [str(i) for i in app.state.interventions] == ["L1H1=zero"]
        await press(app, pilot, "Y", *"found found", "enter")
        assert app.state.circuit == "found-by-greedy"
        app.act("view", name="circuit.view", value="curve")
        app.act("view", name="circuit.rest", value="mean")
        await press(app, pilot)
        assert "rest patch, over 4 prompts" in shown(app)
        app.act("view", name="circuit.view", value="path")
        await press(app, pilot, "S", "H")
        assert "paths by effect" in shown(app)


async def test_keep_from_other_panes(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(160, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "2", "c")
        assert app.state.current.nodes == ("L3H0",) and "L3H0 kept in circuit" in shown(app)
        await press(app, pilot, "c")
        assert app.state.current.nodes == () and "dropped" in shown(app)
        await press(app, pilot, "u", "u")
        assert app.state.circuits == ()
        await press(app, pilot, "1", "c")
        assert "a circuit holds heads" in shown(app) and app.state.circuits == ()


@pytest.mark.slow
async def test_discovery_and_files(zoo, tmp_path, own_home):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(140, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5", "U")
        assert isinstance(app.focused.parent, Picker) or "discover a circuit by" in shown(app)
        await press(app, pilot, *"eap-ig", "enter")
        await press(app, pilot, "enter")
        assert any(isinstance(w, Panel) for w in app.query(Panel)) and "about" in shown(app) and asked(app, Discover)[0].dry
        assert not app.state.circuits, "nothing runs before the estimate was seen"
        await press(app, pilot, "enter")
        found = app.state.current
        assert found.name.startswith("eap-ig") and found.edges and "faithfulness" in shown(app)
        for _ in range(6):
            await press(app, pilot, "v", "v")
        assert "faithfulness against edges" in shown(app)
        await press(app, pilot, "Y", *"save", "enter")
        path = own_home / "exports" / "circuits" / f"{found.name}.json"
        assert json.loads(path.read_text())["edges"] == list(found.edges)
        for kind in ("dot", "mermaid", "table", "text", "python"):
            await press(app, pilot, "Y", *f"export {kind}", "enter")
            assert "written /" in shown(app), kind
        assert {p.suffix for p in path.parent.iterdir()} == {".json", ".dot", ".mmd", ".tsv", ".txt", ".py"}
        assert all(p.stat().st_mode & 0o777 == 0o600 for p in path.parent.iterdir()) and path.parent.stat().st_mode & 0o777 == 0o700
        await press(app, pilot, "Y", *"greater", "enter")
        assert app.state.current.name == "greater-than" and "does not have all its nodes" in shown(app)
        await press(app, pilot, "S")
        assert "is not a node of zoo" in shown(app)
        await press(app, pilot, "Y", *"compare", "enter", *"ioi", "enter")
        assert "overlap of nodes" in shown(app) and "only in ioi" in shown(app)
        bad = tmp_path / "bad.json"
        bad.write_text('{"nodes": ["L0H1", "L0Q1"], "edges": []}')
        await press(app, pilot, "Y", *str(bad), "enter")
        assert "nodes 2" in shown(app) and app.state.current.nodes == ("L0H1",)


@pytest.mark.slow
async def test_bad_input(zoo, tmp_path):
    state = first_state({})
    from dataclasses import replace

    app = make_app(
        zoo,
        tmp_path,
        replace(state, prompt=Prompt("When Mary and John went to the store, John gave a drink to", None, (" Mary",), (" John",)), prompt_set=(), set_path=""),
    )
    async with app.run_test(size=(140, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "5", "S")
        assert "no circuit yet" in shown(app)
        await press(app, pilot, "c", *"vv" * 4, "S")
        assert "no corrupted prompt" in shown(app)
        await press(app, pilot, "Q", *"L9", "enter")
        assert "does not receive" in shown(app) or "is not a node" in shown(app)
        await press(app, pilot, "Q", *"L3H2.q L3H3.q", "enter")
        assert app.state.receivers == ("L3H2.q", "L3H3.q")
        await press(app, pilot, "Y", *"nowhere.json", "enter")
        assert "no circuit at" in shown(app)
