"""A reply belongs to the model it was computed for: after another one is loaded, every pane shows what an app shows that never saw the first."""

import asyncio
from dataclasses import replace

import pytest
from ui import EngineError, LocalClient, asked, make_app, press, reply, screen

from techniques.circuits.requests import Discover, Score
from techniques.lens.requests import Lens
from vocabulary.requests import Check, Load, ModelInfo, Progress
from screen.client import Job
from screen.session import VIEWS
from techniques.circuits import discovery
from tui import PANES, first_state


class TwoModels(LocalClient):
    """The zoo, and a random GPT-2 in its place once that is loaded; `fails`: which then answers nothing but what it is and its tokens."""

    def __init__(self, engines, fails: bool):
        super().__init__(engines["zoo"])
        self.engines, self.fails = engines, fails

    async def ask(self, slot, request, priority=1, on_partial=None):
        if isinstance(request, Load):
            self.engine = self.engines["zoo" if request.model == "zoo" else "gpt2"]
            return self.engine.model.info
        if self.fails and self.engine is not self.engines["zoo"] and not isinstance(request, Check):
            self.asked.append((slot, request))
            raise EngineError("out of memory")
        return await super().ask(slot, request, priority, on_partial)


def pane_lines(app) -> list[str]:
    """The screen's words without its first line (memory) and the line in which the app speaks."""
    return [" ".join(line.split()) for n, line in enumerate(screen(app)) if 0 < n < app.size.height - 2]


def small():
    state = first_state({})
    return replace(state, prompt_set=state.prompt_set[:1] * 3, views={**state.views, "patching.kind": "z"})


async def work_on_the_zoo(app, pilot) -> None:
    """Something of every kind is computed: a sweep, scores, paths, a discovery, a comparison, features."""
    await press(app, pilot, "4", "S", "7", "3", "2", "0", "1")
    for part in ("L0H1", "L2H2", "L2H3"):
        app.act("keep", part=part)
    await press(app, pilot, "5", "S")
    assert app.panes["circuit"].scored(app) is not None
    discovery.run(app.panes["circuit"], app, Discover(app.panes["circuit"].study(app), "greedy", rest="patch", name="found"))
    await press(app, pilot)
    app.act("view", name="circuit.view", value="curve")
    await press(app, pilot)
    assert "curve · found" in "\n".join(screen(app)) and "draws this curve" not in "\n".join(screen(app))
    app.act("select_circuit", name="circuit")
    app.act("view", name="circuit.view", value="path")
    await press(app, pilot, "S")
    assert isinstance(app.requests.model, Load) and all(r.model is app.requests.model for r in app.requests.replies.values())


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
async def test_nothing_of_another_model_is_shown(engines, tmp_path, fails):
    app = make_app(TwoModels(engines, fails), tmp_path, small())
    other = str(engines["gpt2"].model.info.name)
    async with app.run_test(size=(90, 28)) as pilot:
        await press(app, pilot)
        await work_on_the_zoo(app, pilot)
        app.act("model", load=Load(other))
        await press(app, pilot)
        assert isinstance(app.info, ModelInfo) and app.info is engines["gpt2"].model.info
        assert all(r.model is app.requests.model for r in app.requests.replies.values())
        seen, cursor = {}, app.cursor
        shows = [(p, "") for p in PANES if p != "circuit"] + [("circuit", v) for v in VIEWS["circuit.view"]] + [("circuit", "found")]

        async def show(some, driver, pane, view):
            some.act("select_circuit", name="found" if view == "found" else "circuit")
            if view:
                some.act("view", name="circuit.view", value="curve" if view == "found" else view)
            some.show_pane(pane)
            await press(some, driver)
            some.say("")
            await press(some, driver)
            return pane_lines(some)

        for pane, view in shows:
            seen[pane, view] = await show(app, pilot, pane, view)
        if fails:
            assert asked(app, Score) and app.panes["circuit"].scored(app) is None
        started, state = app.requests.started, app.state
    fresh = make_app(TwoModels(engines, fails), tmp_path / "fresh", state)
    async with fresh.run_test(size=(90, 28)) as pilot:
        fresh.requests.started |= started
        await press(fresh, pilot)
        fresh.cursor = cursor
        for pane, view in shows:
            assert await show(fresh, pilot, pane, view) == seen[pane, view], (pane, view)


class Late(TwoModels):
    """The first lens is answered only when it is told to."""

    async def ask(self, slot, request, priority=1, on_partial=None):
        result = await super().ask(slot, request, priority, on_partial)
        if isinstance(request, Lens) and self.engine is self.engines["zoo"]:
            await self.go.wait()
        return result


class Short(LocalClient):
    """The lens says on its way that memory ran out, and goes on."""

    async def ask(self, slot, request, priority=1, on_partial=None):
        if isinstance(request, Lens):
            for part in (Progress(0, 9, "out of memory at 64 points at a time: going on with 32", notice=True), Progress(5, 9, "logit lens")):
                self.app.requests.progress(Job(1, slot, request, asyncio.Future(), None, part, started=0.0))
        return await super().ask(slot, request, priority, on_partial)


async def test_a_notice_is_on_the_screen_when_the_answer_is_there(engines, tmp_path):
    """Progress after it does not take it away for good."""
    app = make_app(Short(engines["zoo"]), tmp_path, small())
    app.client.app = app
    async with app.run_test(size=(90, 28)) as pilot:
        await press(app, pilot)
        assert "out of memory at 64 points at a time: going on with 32" in "\n".join(screen(app))
        app.requests.notices["lens"] = "going on with 16"
        app.requests.ask("lens", Lens(app.state.study), lambda result: app.say("found"))
        await press(app, pilot)
        assert "found; out of memory at 64 points" in "\n".join(screen(app)) and not app.requests.notices


async def test_a_reply_that_comes_after_another_model_was_loaded_is_dropped(engines, tmp_path):
    client = Late(engines, False)
    client.go = asyncio.Event()
    app = make_app(client, tmp_path, small())
    async with app.run_test(size=(90, 28)) as pilot:
        for _ in range(20):
            await pilot.pause()
        assert app.info is not None and "lens" not in app.requests.replies
        asking = app.requests.wanted["lens"]
        app.act("model", load=Load(str(engines["gpt2"].model.info.name)))
        for _ in range(20):
            await pilot.pause()
        client.go.set()
        await press(app, pilot)
        assert app.info is engines["gpt2"].model.info and len(reply(app, "lens").points) != len(asking.points or ())
        assert all(r.model is app.requests.model for r in (*app.requests.replies.values(), *app.requests.answers.values()))
