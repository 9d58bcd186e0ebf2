"""What goes to the terminal in 256 colours: idle nothing; to 120×36 a cursor move at most 1.2 KB, a pane switch at most 8 KB (200×50: 1.4, 10); a full screen at most 35 KB."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from textual.geometry import Size
from textual.strip import Strip
from rich.segment import Segment
from rich.style import Style
from ui import LocalClient, Wire, make_app, over_the_wire, press

from techniques.patching.requests import Sweep
from vocabulary.prompts import read_prompt_set
from screen.compositor import Difference, TightCompositor, cells_of, changes
from tui import first_state
from utils import ROOT

MOVES = {"1": "hhlkjk", "0": "hhl", "2": "hlkj", "3": "hlh", "4": "hljk", "5": "hljkc"}


async def cost(app, pilot, *keys) -> int:
    Wire.take()
    await press(app, pilot, *keys)
    for _ in range(4):
        await pilot.pause()
    return Wire.take()


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 50)])
async def test_byte_budgets(engines, tmp_path, monkeypatch, size):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    app = make_app(engines["zoo"], tmp_path, first_state({}), driver_class=Wire)
    async with app.run_test(size=size, headless=False) as pilot:
        await press(app, pilot)
        await cost(app, pilot)
        assert app.console.color_system == "256"
        most, other = (1_400, 10_000) if size == (200, 50) else (1_200, 8_000)
        for pane, moves in MOVES.items():
            switch = await cost(app, pilot, pane)
            assert switch <= other, f"switch to pane {pane}: {switch} bytes"
            assert await cost(app, pilot) == 0, "idle"
            for key in moves:
                move = await cost(app, pilot, key)
                assert move <= most, f"pane {pane}, key {key}: {move} bytes"
        await press(app, pilot, "1", "0", "2", "enter")
        for key in "hkjl":
            move = await cost(app, pilot, key)
            assert move <= most, f"pattern, key {key}: {move} bytes"
        Wire.take()
        app.screen.forget()
        assert 1_000 < await cost(app, pilot) <= 35_000, "a full screen"
        assert await cost(app, pilot) == 0


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
async def test_features_on_the_wire(engines, tmp_path, monkeypatch, size):
    """Another feature brings another detail: at most 2.5 KB; idle is nothing."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    app = make_app(engines["zoo"], tmp_path, replace(first_state({}), saes=("zoo/L2.resid_post",), sae="zoo/L2.resid_post"), driver_class=Wire)
    async with app.run_test(size=size, headless=False) as pilot:
        await press(app, pilot)
        assert await cost(app, pilot, "6") <= 8_000
        await cost(app, pilot)
        assert await cost(app, pilot) == 0, "idle"
        for key in "jjk":
            move = await cost(app, pilot, key)
            assert move <= 2_500, f"key {key}: {move} bytes"


class Slow(LocalClient):
    """Delivers a sweep in thirty parts a tenth of a second apart by the clock it moves, and takes down what each cost on the terminal."""

    def __init__(self, engine):
        super().__init__(engine)
        self.clock, self.costs, self.pilot = 1000.0, [], None

    async def ask(self, slot, request, priority=1, on_partial=None):
        if not isinstance(request, Sweep):
            return await super().ask(slot, request, priority, on_partial)
        whole = over_the_wire(self.engine.run(over_the_wire(request)))
        cells = np.random.default_rng(0).permutation(np.argwhere(np.isfinite(whole.values)))
        Wire.take()
        for done in range(0, len(cells), max(1, len(cells) // 30)):
            hide = np.full(whole.values.shape, np.nan)
            hide[tuple(cells[:done].T)] = 0
            self.clock += 0.1
            on_partial(replace(whole, values=whole.values + hide, normalised=whole.normalised + hide, done=done))
            for _ in range(3):
                await self.pilot.pause()
            self.costs.append(Wire.take())
        return whole


@pytest.mark.parametrize("size", [(120, 36), (200, 50)])
async def test_a_filling_heat_map(engines, tmp_path, monkeypatch, size):
    """At most 10 KB a second, and something new is drawn."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    link = Slow(engines["zoo"])
    monkeypatch.setattr("screen.replies.time", SimpleNamespace(monotonic=lambda: link.clock))
    prompts = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:4]
    state = replace(first_state({}), prompt=prompts[0], prompt_set=prompts)
    state = replace(state, views={**state.views, "patching.kind": "z_pos", "patching.over": "set"})
    app = make_app(link, tmp_path, state, driver_class=Wire)
    async with app.run_test(size=size, headless=False) as pilot:
        link.pilot = pilot
        await press(app, pilot)
        await press(app, pilot, "4", "S")
        assert len(link.costs) >= 30 and sum(c > 0 for c in link.costs) > 3
        assert max(sum(link.costs[i : i + 10]) for i in range(len(link.costs))) <= 10_000, link.costs


def test_the_difference_restores_the_screen():
    """Played on a small terminal of cells, the differences give the same picture as the whole."""
    red, plain = Style(color="red"), None
    first = cells_of(Strip([Segment("hello 日本 x", red)]))
    second = cells_of(Strip([Segment("hello 語本 y", red)]))
    assert len(first) == 12 and first[7] == ("", red)
    assert changes(first, second) == [(6, 12)] or changes(first, second) == [(6, 8), (11, 12)]
    assert changes(first, first) == []
    owner = TightCompositor()
    size = Size(12, 1)
    from rich.console import Console

    console = Console(color_system="256", force_terminal=True)
    full = Difference(owner, [(0, 0, first)], size).render_segments(console)
    assert "hello 日本 x" in full and full.startswith("\x1b[1;1H") and full.endswith("\x1b[0m")
    assert Difference(owner, [(0, 0, first)], size).render_segments(console) == ""
    part = Difference(owner, [(0, 0, second)], size).render_segments(console)
    assert "hello" not in part and "語" in part
    owner.forget()
    assert "hello" in Difference(owner, [(0, 0, second)], size).render_segments(console)
    assert cells_of(Strip([Segment("e\u0301x", plain)])) == [("e\u0301", None), ("x", None)]
