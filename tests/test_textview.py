"""The prompt as text: how it wraps, that each pane's numbers are those of its result, what the keys do in it; at three sizes."""

import random
from dataclasses import replace

import numpy as np
import pytest
from test_bytes import cost
from ui import Wire, make_app, press, reply, screen, shown

from screen.session import State
from screen.textview import TextView, row_of, text_grid, wrap
from tui import first_state
from vocabulary.prompts import Prompt
from widgets import Grid

SIZES = [(80, 24), (120, 36), (200, 50)]
SAE = "zoo/L2.resid_post"


def long_prompt(n: int) -> Prompt:
    """About n tokens of the zoo's words, with another name in two places of the corrupted one."""
    words = [" Mary", " and", " John", " went", " to", " the", " store", ","]
    some = [words[k % 8] for k in range(n)]
    other = [w if k not in (n // 3 // 8 * 8, n // 2 // 8 * 8) else " Alice" for k, w in enumerate(some)]
    return Prompt("".join(some).strip(), "".join(other).strip(), (" Mary",), (" John",))


# ------------------------------------------------------------------ wrapping


def test_wrap():
    """Every token once and in order; no line wider than the room; words whole where they fit; a newline ends its line."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.choice([" a", "b", " long", "er", ",", "\n", " wordy", "xyz", " "]) for _ in range(rng.randrange(0, 60))]
        widths, room = [max(len(t), 1) for t in tokens], rng.randrange(7, 30)
        lines = wrap(tokens, widths, room)
        assert [n for a, b in lines for n in range(a, b)] == list(range(len(tokens))) and all(a < b for a, b in lines)
        starts = {0} | {n for n in range(1, len(tokens)) if tokens[n][0].isspace() or tokens[n - 1][-1].isspace()}
        for a, b in lines:
            assert sum(widths[a:b]) <= room
            assert not any(t.endswith("\n") for t in tokens[a : b - 1])
            if b < len(tokens) and b not in starts:
                word = max(s for s in starts if s < b)
                end = min([s for s in starts if s > b], default=len(tokens))
                assert sum(widths[word:end]) > room, "a word that fits on a line was broken"


def test_rows_and_columns_of_a_map():
    values = np.arange(12.0).reshape(3, 4)
    grid = Grid(values, list("abc"), ["x", "y", "z", "sink"], 0, 11, marks=frozenset({(1, 2), (0, 0)}), noise=frozenset({(1, 3)}))
    row, column = row_of(grid, 1, "b", ["x", "y", "z"]), row_of(grid, 2, "z", ["a", "b", "c"], column=True)
    assert row.values.tolist() == [[4, 5, 6]] and row.marks == {(0, 2)} and not row.noise and (row.lo, row.hi) == (0, 11)
    assert column.values.tolist() == [[2, 6, 10]] and column.marks == {(0, 1)}
    assert text_grid("t", ["a"], np.array([1.0]), -1, 1, True).signed


# ------------------------------------------------------------------ panes


def text(app) -> TextView:
    return app.panes[app.pane].text


def numbers(app) -> np.ndarray:
    return text(app).grid.shown[0]


@pytest.mark.parametrize("size", SIZES)
async def test_every_pane_shows_its_own_numbers(engines, tmp_path, size):
    state = replace(first_state({}), saes=(SAE,), sae=SAE)
    app = make_app(engines["zoo"], tmp_path, replace(state, views={**state.views, "patching.kind": "resid_pre"}))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, "T", "h")
        lens = reply(app, "lens")
        assert (numbers(app) == lens.top_probs[-1, :, 0].astype(float)).all() and text(app).at == 13
        assert "When Mary and John went" in shown(app) and "L3.resid_post" in app.panes["lens"].said[0]
        await press(app, pilot, "2", "T")
        pattern, pos, c = reply(app, "attention"), 13, app.cursor
        assert np.array_equal(numbers(app), pattern.pattern[c.head, pos].astype(float), equal_nan=True)
        await press(app, pilot, "T", "enter", "h", "h")
        assert app.cursor.pos == 11 and np.array_equal(numbers(app), reply(app, "attention").pattern[c.head, :, 11].astype(float), equal_nan=True)
        await press(app, pilot, "escape", "h", "T")
        assert app.cursor.pos == 11 and text(app).grid is None and app.panes["attention"].pattern.display
        await press(app, pilot, "3", "T", "enter", "h", "escape")
        drill = reply(app, "drill")
        assert drill.pos == 10 == app.cursor.pos and np.array_equal(numbers(app), drill.sources.astype(float)) and text(app).grid.signed
        for _ in range(5):
            await press(app, pilot, "l")
        assert app.cursor.comp == "mlp" and text(app).grid is None and "the sources of a head" in shown(app)
        await press(app, pilot, "4", "T")
        estimate = reply(app, "estimate")
        row = app.panes["patching"].at(app, estimate)[0]
        base, span = estimate.base, estimate.clean - estimate.corrupt
        assert np.allclose(numbers(app), (estimate.values[row] - base) / span, atol=1e-4)
        await press(app, pilot, *"vv" * 8)
        assert text(app).grid is not None or "has no positions" in shown(app)
        await press(app, pilot, "6", "T", "h")
        feature = reply(app, "feature")
        assert (numbers(app) == feature.activation.astype(float)).all() and text(app).grid.name(0, 0).startswith(f"f{app.panes['features'].index}")
        await press(app, pilot, "7", "T")
        assert "has no numbers for the tokens" in shown(app).replace("\n ", " ")


async def test_modes_of_the_text(engines, tmp_path):
    """Numbers stand under their tokens; shades without colour; cells and blocks for an overview."""
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, "T", "V")
        lines, values = [s.text for s in text(app).drawn], numbers(app)
        assert f"{values[1]:.2f}" in lines[1] and lines[0].index("When") == lines[1].index(f"{values[1]:.2f}")
        await press(app, pilot, "V")
        assert "Wh" in text(app).drawn[0].text and "When" not in text(app).drawn[0].text
        await press(app, pilot, "V", "V")
        assert "█" in text(app).drawn[0].text and "Mary" in text(app).drawn[0].text


# ------------------------------------------------------------------ keys


@pytest.mark.parametrize("size", SIZES)
async def test_going_far(engines, tmp_path, size):
    """Ends, pages, counts, positions by number, from the end and by label, differences, marks; in the text and in maps."""
    app = make_app(engines["zoo"], tmp_path, State(prompt=long_prompt(120)))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, "T")
        n = app.length()
        assert app.cursor.pos == n - 1 and n > 100
        await press(app, pilot, "home")
        assert app.cursor.pos == 0
        await press(app, pilot, *";12l")
        assert app.cursor.pos == 12
        await press(app, pilot, *";40", "enter")
        assert app.cursor.pos == 40
        await press(app, pilot, *";-2", "enter")
        assert app.cursor.pos == n - 2
        await press(app, pilot, *"/@5", "enter")
        assert app.cursor.pos == 5
        await press(app, pilot, *"/@99999", "enter")
        assert f"the prompt has {n} tokens" in shown(app) and app.cursor.pos == 5
        await press(app, pilot, "escape", *";;", "escape", *'"a', "end")
        assert app.cursor.pos == n - 1
        before = text(app).line_of(n - 1)
        await press(app, pilot, "ctrl+u")
        assert text(app).line_of(app.cursor.pos) == max(0, before - max(1, round(text(app).down / 2)))
        await press(app, pilot, "pageup", "pageup", "pageup", "pageup", "pageup")
        assert text(app).line_of(app.cursor.pos) == 0
        await press(app, pilot, "pagedown", "ctrl+d", "2", *"'a")
        assert (app.pane, app.cursor.pos) == ("lens", 5)
        clean, other = (app.requests.check().clean.ids, app.requests.check().corrupt.ids)
        places = [k for k in range(n) if clean[k] != other[k]]
        await press(app, pilot, "}")
        assert app.cursor.pos == places[0] and f"difference 1 of {len(places)}" in shown(app)
        await press(app, pilot, "T", *";2}")
        assert app.cursor.pos == places[min(2, len(places) - 1)]
        await press(app, pilot, "{", "{", "{")
        assert app.cursor.pos in places
        before = app.cursor.layer
        await press(app, pilot, *";2[")
        assert app.cursor.layer == before - 2
        await press(app, pilot, *"'z")
        assert "there is no mark z" in shown(app) and not app.query("Prefix")


async def test_no_corrupted_prompt_has_no_difference(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path, State())
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "}")
        assert "there is no corrupted prompt" in shown(app)
        await press(app, pilot, "'")
        assert "no marks yet" in shown(app)


# ------------------------------------------------------------------ bytes


@pytest.mark.parametrize("size", SIZES)
async def test_text_on_the_wire(engines, tmp_path, monkeypatch, size):
    """A step in the text costs what one in a map may; turning to it, what a pane may; idle is nothing."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    app = make_app(engines["zoo"], tmp_path, State(prompt=long_prompt(300)), driver_class=Wire)
    async with app.run_test(size=size, headless=False) as pilot:
        await press(app, pilot)
        await cost(app, pilot)
        for keys in (["T"], ["2"], ["T"], ["enter"]):
            assert await cost(app, pilot, *keys) <= 8_000, keys
            assert await cost(app, pilot) == 0, "idle"
            for key in "hlkj":
                assert await cost(app, pilot, key) <= 1_200, (keys, key)
        assert all(len(line) <= size[0] for line in screen(app))
