"""Pane 8 and the list of directions: continuations side by side, a token sent back as the prompt, draws, steering with its coefficient on keys and its curve."""

import pytest
from ui import asked, grid, make_app, press, reply, shown

from screen.overlays import Editor, Panel, Picker
from screen.session import read_session
from techniques.generation.directions import stepped
from techniques.generation.requests import Curve, Generate
from tui import first_state
from vocabulary.nodes import parse_intervention


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


async def typed(app, pilot, *fields: str) -> None:
    """Fill the open editor and enter."""
    editor = app.query_one(Editor)
    for field, text in zip(editor.fields, fields):
        field.value = text
    await press(app, pilot, "enter")


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
async def test_side_by_side(zoo, tmp_path, size):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, "8")
        assert "no interventions · greedy · 16 tokens" in shown(app) and "Mary." in shown(app)
        app.act("intervene", intervention=parse_intervention("L2.mlp=zero"))
        app.act("intervene", intervention=parse_intervention("L1.mlp=zero"))
        await press(app, pilot)
        found = reply(app, "generate")
        assert "held on every new token · greedy" in shown(app) and "now (2 on clean)" in shown(app)
        parted = found.runs[1].samples[0].parted
        assert parted >= 0 and "≠" in shown(app)
        assert grid(app).values[1, 0] == found.runs[1].samples[0].probs[0]
        await press(app, pilot, "Z")
        assert "held on the prompt only" in shown(app) and asked(app, Generate)[-1].how.held == "prompt"
        await press(app, pilot, "u")
        assert app.state.generation.held == "all"
        await press(app, pilot, "j", *["l"] * parted)
        assert f"now +{parted}" in shown(app) and "parts here" in shown(app)

        before, more = app.state.prompt, found.runs[1].samples[0]
        await press(app, pilot, "enter")
        text = more.text[: more.ends[parted]]
        assert app.state.prompt.clean == before.clean + text and app.state.prompt.corrupt == before.corrupt + text
        assert f"grown by {parted + 1} token" in shown(app)
        assert reply(app, "generate").runs[1].samples[0].ids[: len(more.ids) - parted - 1] == more.ids[parted + 1 :][:16], "it goes on as it did"
        await press(app, pilot, "u")
        assert app.state.prompt == before

        await press(app, pilot, "S")
        assert "every draw is the same" in shown(app)
        await press(app, pilot, "b")
        await typed(app, pilot, "0")
        assert "tokens 0: from 1" in shown(app)
        await typed(app, pilot, "6", "0.9", "0.95", "4", "5", "a", "on")
        how = app.state.generation
        assert (how.tokens, how.temperature, how.top_p, how.seed, how.samples, how.contains, how.other) == (6, 0.9, 0.95, 4, 5, "a", True)
        assert "held on every new token · T 0.9, top-p 0.95, seed 4" in app.panes["generate"].said[0]
        assert "of 5 contain a" in shown(app) and len(reply(app, "generate").runs) == 3
        await press(app, pilot, "j", "j", "S")
        assert app.state.generation.seed == 5 and grid(app).values.shape[0] == 15
        for mode in ("number", "cells", "blocks", "shade"):
            await press(app, pilot, "V")
            assert app.state.views["mode"] == mode and "clean" in shown(app)
    assert read_session(app.session.path)[0].state.generation == app.state.generation


async def test_steering(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "8", "-")
        assert "nothing is steered" in shown(app)
        await press(app, pilot, "$")
        assert "new: prompts" in shown(app)
        await press(app, pilot, *"prompts", "enter")
        await typed(app, pilot, "L2.resid_post@END", "truth")
        assert "steer along truth-" in shown(app)
        await typed(app, pilot, "L2.resid_post@END", "x")
        assert "'x' is not a number" in shown(app)
        await typed(app, pilot, "L2.resid_post@END", "-1")
        (steer,) = app.state.interventions
        assert str(steer).startswith("L2.resid_post@END=steer:truth-") and steer.value == -1
        await press(app, pilot, "-", "-", "~")
        assert app.state.interventions[0].value == -1.5 and reply(app, "run").now.metric != reply(app, "run").clean.metric
        metric = reply(app, "run").now.metric
        await press(app, pilot, "L")
        found = next(r for r in reversed(asked(app, Curve)))
        assert -1.5 in found.coefficients and app.query(Panel) and f"now -1.5: {metric:+.4f}" in shown(app)
        await press(app, pilot, "~")
        assert "now -1" in shown(app) and app.state.interventions[0].value == -1.0 and app.query(Panel)
        await press(app, pilot, "escape", "u")
        assert app.state.interventions[0].value == -1.5
        await press(app, pilot, "$")
        assert "clean minus corrupted prompt" in shown(app)
        await press(app, pilot, *"truth", "enter", *"put", "enter")
        assert "is put away" in shown(app) and reply(app, "run").now.metric == metric
        await press(app, pilot, "$")
        assert not [i for i in app.query_one(Picker).items if i.key.startswith("truth")]
        await press(app, pilot, *"nowhere.npy", "enter")
        assert "there is no direction 'nowhere.npy'" in shown(app)


@pytest.mark.parametrize("value, by, new", [(1.0, 1, 1.5), (0.5, -1, 0.0), (0.0, -1, -0.5), (9.5, 1, 10.0), (10.0, 1, 15.0), (-120.0, -1, -170.0)])
def test_steps(value, by, new):
    assert stepped(value, by) == new
