"""Pane 6 on the zoo's own SAEs: load, list, detail, examples, graph, acting on features; at three sizes."""

import shutil
from dataclasses import replace

import pytest
from ui import asked, make_app, press, shown

from screen.session import read_session
from techniques.features.requests import Examples, FeatureGraph, Preflight
from tui import first_state
from utils import ROOT


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


async def load(app, pilot, *names):
    await press(app, pilot, "6")
    for name in names:
        await press(app, pilot, "z", *name)
        await press(app, pilot, "enter")


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 50)])
async def test_features(zoo, tmp_path, size):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot)
        await press(app, pilot, "6")
        assert "no SAE loaded" in shown(app) and "z lists" in shown(app)
        await load(app, pilot, "L2.res")
        assert app.state.saes == ("zoo/L2.resid_post",) and app.state.sae == "zoo/L2.resid_post"
        assert "features · zoo/L2.resid_post" in shown(app) and "reconstruction" in shown(app) and "error of the sum" in shown(app)
        pane = app.panes["features"]
        first = pane.index
        await press(app, pilot, "j")
        assert pane.index != first and f"L2.sae.f{pane.index}" in shown(app)
        await press(app, pilot, "P")
        assert "by attribution" in " ".join(pane.said) or "attribution" in shown(app)
        before = app.requests.result("run", object).now.metric
        await press(app, pilot, "a")
        assert str(app.state.interventions[0]) == f"L2.sae.f{pane.index}=zero" and app.requests.result("run", object).now.metric != before
        await press(app, pilot, "Z")
        assert app.state.sae_error is False and "error term dropped" in " ".join(pane.said)
        await press(app, pilot, "u", "c")
        assert app.state.current.nodes == (f"L2.sae.f{pane.index}",)
        await press(app, pilot, *"vv" * 3)
        assert "view raw" in shown(app) and "recovered" in shown(app)
    again, warning = read_session(app.session.path)
    assert not warning and again.state.saes == app.state.saes and again.state.interventions == app.state.interventions


@pytest.mark.slow
async def test_examples_and_graph(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(140, 50)) as pilot:
        await press(app, pilot)
        await load(app, pilot, "L2.res")
        await press(app, pilot, *"vv" * 2)
        assert "needs an SAE of a layer below" in shown(app)
        await load(app, pilot, "L1.res")
        await press(app, pilot, "z", *"L2.res", "enter")
        assert app.state.sae == "zoo/L2.resid_post" and "adds" in shown(app) and "sum" in shown(app) and asked(app, FeatureGraph)
        await press(app, pilot, "C")
        assert "the graph says" in shown(app) and "frozen run" in shown(app)
        target = app.panes["features"].index
        await press(app, pilot, "enter")
        assert app.state.sae == "zoo/L1.resid_post" and "esc goes back" in shown(app)
        await press(app, pilot, "escape")
        assert app.state.sae == "zoo/L2.resid_post" and app.panes["features"].index == target
        await press(app, pilot, *"vv" * 2, "S")
        assert "examples ·" in shown(app) and "fires on" in shown(app) and len(asked(app, Examples)) == 1
        await press(app, pilot, "s", *"add 8")
        await press(app, pilot, "enter")
        assert app.state.interventions or "write scale 2" in shown(app)
        await press(app, pilot, "z", *"put away zoo/L2", "enter")
        assert app.state.saes == ("zoo/L1.resid_post",) and not [i for i in app.state.interventions if i.node.site == "sae"]


@pytest.mark.slow
async def test_bad_sources(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(140, 50)) as pilot:
        await press(app, pilot)
        await load(app, pilot, str(tmp_path))
        assert asked(app, Preflight) and "computing" not in shown(app)
        assert str(tmp_path)[:20] in shown(app) and app.state.saes == ()
        shutil.copytree(ROOT / "zoo" / "saes" / "L2.resid_post", tmp_path / "mine")
        await load(app, pilot, "L2.res")
        await load(app, pilot, str(tmp_path / "mine"))
        assert app.state.saes == (str(tmp_path / "mine"),) and "one SAE a layer" in shown(app)
        await press(app, pilot, "u")
        assert app.state.saes == ("zoo/L2.resid_post",), "one step"
        await press(app, pilot, "u")
        await load(app, pilot, "nosuch:thing")
        assert "nosuch" in shown(app) and app.state.saes == (), "what could not be read is not among the loaded ones"
        await load(app, pilot, "L2.res")
        await press(app, pilot, "a")
        assert app.state.saes == ("zoo/L2.resid_post",) and "now +" in shown(app) and len(app.state.interventions) == 1
        await press(app, pilot, "u")
        pane = app.panes["features"]
        await press(app, pilot, "/", *"L2.sae.f690", "enter")
        assert pane.index == 690 and "a, p and s act on L2.sae.f690" in shown(app)
        await press(app, pilot, "/", *"f353", "enter")
        assert pane.index == 353
        await press(app, pilot, "/", *"L2.sae.f9999", "enter")
        assert pane.index == 353 and "features 0 to 767" in shown(app)
        await press(app, pilot, "escape", "P")
        assert pane.index == 263, "another order begins at its first"
        await press(app, pilot, "s", "ctrl+u", *"add abc", "enter")
        assert "write scale 2" in shown(app) and "could not convert" not in shown(app)
        await press(app, pilot, "escape")
        await press(app, pilot, "4")
        app.act("view", name="patching.kind", value="features")
        app.act("prompt", prompt=replace(app.state.prompt, answers=(" John",), foils=(" Mary",)))
        await press(app, pilot)
        assert "None" not in str(app.node())
        await press(app, pilot, "S", "j")
        assert str(app.node()).startswith("L2.sae.f") and "None" not in str(app.node())
        await press(app, pilot, "j", "a", "1")
        assert "Lens" in shown(app), "nothing is lost"
