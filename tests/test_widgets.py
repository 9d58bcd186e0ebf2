"""Pictures as plain text, ramps, token display; and that the screen side never imports the model side."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from screen.colours import THEMES, luminance
from screen.keys import key_page
from screen.maps import show_value
from techniques.attention.requests import AttentionResult, HeadStatsResult
from techniques.lens.requests import LensResult
from vocabulary.prompts import TokenRow
from vocabulary.requests import Identity
from screen.top import token_line
from techniques.attention.pictures import heads_grid, pattern_grid
from techniques.identities.pane import identity_rows
from techniques.lens.pictures import lens_cell, lens_grid
from tui import TABLE
from utils import ROOT, printable, show_number, show_token, visible, width_of
from screen.overlays import Item, columns, escape_line, unescape_line, wrapped
from screen.pictures import fitted
from widgets import BOLD, PLAIN, GridView, whole_spans


def test_the_screen_side_never_imports_the_model_side():
    """Nor what takes long to import and no first picture needs."""
    absent = ("torch", "transformer_lens", "sae_lens", "transformers", "plotly", "nbformat", "wandb", "PIL", "pandas", "tyro", "markdown_it", "pygments")
    code = f"import tui, widgets, sys; print([m for m in {absent} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("theme", THEMES)
def test_ramps_are_of_the_terminals_colours_and_monotone_in_luminance(theme):
    """So that they survive a look without colour; the cursor's colour is in none of them."""
    for ramp in (THEMES[theme].sizes, THEMES[theme].below, THEMES[theme].above):
        lums = [luminance(c) for c in ramp]
        assert len(ramp) <= 16 and all(0 <= c < 16 if theme == "16" else 16 <= c <= 255 for c in ramp) and THEMES[theme].cursor not in ramp
        assert lums in (sorted(lums), sorted(lums, reverse=True)) and len(set(lums)) == len(lums)
    assert THEMES[theme].below[0] == THEMES[theme].above[0]


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=20), st.integers(1, 12))
def test_tokens_fit_and_never_escape(text, width):
    shown = show_token(text, width)
    assert cell_len(shown) == width
    assert all(c.isprintable() for c in visible(text)) and "\x1b" not in visible(text)


@settings(deadline=None, derandomize=True)
@given(st.text(max_size=30))
def test_a_text_survives_the_editor(text):
    assert unescape_line(escape_line(text)) == text and "\n" not in escape_line(text)


@settings(deadline=None, derandomize=True)
@given(st.floats(-1e4, 1e4), st.integers(5, 9))
def test_numbers_fit(x, width):
    assert len(show_number(x, width)) == width and len(show_value(x, width)) == width


def view(grid, mode, size, at=(0, 0)) -> list[str]:
    """A grid as the widget would draw it, without an app."""
    widget = GridView()
    type(widget).size, saved = property(lambda self: size), type(widget).size
    try:
        widget.grid, widget.mode, widget.at = grid, mode, at
        lines = [widget.render_line(y).text.rstrip() for y in range(size.height)]
        while lines and not lines[-1]:
            lines.pop()
        return lines
    finally:
        type(widget).size = saved


TOKENS = TokenRow((0, 5, 6), ("<|bos|>", " Mary", "\n"), {"END": 2}, True)


def test_golden_pattern():
    from textual.geometry import Size

    pattern = np.array([[[1, np.nan, np.nan], [0.25, 0.75, np.nan], [0.004, 0.1, 0.896]]], "f4")
    grid = pattern_grid(AttentionResult(TOKENS, 0, pattern, "now", ""), 0)
    head = ["          0      1      2", "to \\ from ⟨bos⟩  ·Mary  ↵"]
    assert view(grid, "colour", Size(40, 8)) == [*head, " 0 ⟨bos⟩   1.000", " 1 ·Mary    .250   .750", " 2 ↵           .      .   .896"]
    assert view(grid, "number", Size(40, 8)) == [*head, " 0 ⟨bos⟩   1.000", " 1 ·Mary    .250   .750", " 2 ↵        .004   .100   .896"]
    head = ["          0       1       2", "to \\ from ⟨bos⟩   ·Mary   ↵"]
    assert view(grid, "shade", Size(40, 8)) == [*head, " 0 ⟨bos⟩  █ 1.000", " 1 ·Mary  ░  .250 ▓  .750", " 2 ↵            .       . █  .896"]
    assert view(grid, "colour", Size(24, 5)) == ["        0    1    2", "to \\ fro⟨bos Mary ↵", " 0 ⟨bos 1.00", " 1 ·Mar  .25  .75", " 2 ↵       .    .  .90"]
    assert view(grid, "colour", Size(20, 3)) == ["to \\ f0  1  2", " 0 ⟨b ▀▀▀▄▄▄", " 2 ↵  ▀▀▀▀▀▀▀▀▀"], "two destinations a line"


def test_golden_lens_and_heads():
    from textual.geometry import Size

    nan = np.full((2, 3), np.nan, "f4")
    result = LensResult(
        TOKENS, ("L0.resid_pre", "L0.resid_post"), np.array([[[1, 2]] * 3, [[2, 1]] * 3], "i4"), np.full((2, 3, 2), 0.5, "f4"),
        nan, nan, np.ones((2, 3), "f4"), np.zeros((2, 3), "f4"), nan, {1: " a", 2: "[/INST]"}, "",
    )  # fmt: skip
    grid = lens_grid(result, "prob", 100)
    assert view(grid, "colour", Size(60, 5)) == [
        "              0         1         2",
        "hook point    ⟨bos⟩     ·Mary     ↵",
        "L0.resid_pre  ·a        ·a        ·a",
        "L0.resid_post [/INST]   [/INST]   [/INST]",
    ]
    line = "".join(t for t, _ in lens_cell(result, 1, 1))
    assert line.startswith(" L0.resid_post@1 H 1.000 KL 0.0000") and "[/INST] 0.500" in line and "nan" not in line
    heads = heads_grid(HeadStatsResult({"first": np.array([[0.5, np.nan], [0.25, 1]], "f4")}, "now", "prompt", ""), "first", frozenset())
    assert view(heads, "colour", Size(40, 3)) == ["   H0     H1     attn   mlp", "L0   .500         attn   mlp", "L1   .250  1.000  attn   mlp"]
    assert grid.tsv().splitlines()[1] == "L0.resid_pre\t0.5\t0.5\t0.5"


def test_token_lines_page_and_mark():
    row = TokenRow(tuple(range(30)), tuple(f" w{n}" for n in range(30)), {}, False)
    text = "".join(t for t, _ in token_line("clean", row, 29, 60, frozenset(), False, True))
    assert "·w29" in text and "·w0·" not in text and text.startswith(" clean     ‹") and cell_len(text) <= 60


def test_identities_are_red_when_broken():
    rows = identity_rows((Identity("a", 0.5, 1e-4, False, "[x]"), Identity("b", 0, 1e-4, True), Identity("c", 0, 0, None)))
    assert ["".join(t for t, _ in r).split()[0] for r in rows] == ["✗", "✓", "–"] and "5.0e-01 > 1e-04" in "".join(t for t, _ in rows[0])


def test_the_table_has_no_clash_and_the_readme_its_keys():
    keys = [k for a in TABLE for k in a.keys.split(",") if k]
    assert len(keys) == len(set(keys)) and len({a.id for a in TABLE}) == len(TABLE)
    assert (ROOT / "docs" / "keys.md").read_text(encoding="utf-8") == key_page(TABLE), "uv run tui.py --keys > docs/keys.md"


def test_parts_of_a_line_go_whole_by_importance():
    parts = [(0, [("name", PLAIN)]), (3, [(" least", PLAIN)]), (1, [(" label", PLAIN), (" 12", PLAIN)]), (2, [(" more", PLAIN)])]
    said = lambda width: "".join(t for t, _ in fitted(parts, width))  # noqa: E731
    assert [said(w) for w in (40, 18, 13, 12, 2)] == ["name least label 12 more", "name label 12 more", "name label 12", "name more", "name"]
    line = [("L3H2 ", PLAIN), ("effect · rank 2 · near", PLAIN), ("  tail", PLAIN)]
    cut = lambda width: "".join(t for t, _ in whole_spans(line, width))  # noqa: E731
    assert [cut(w) for w in (40, 30, 20, 8)] == ["L3H2 effect · rank 2 · near  tail", "L3H2 effect · rank 2 · near", "L3H2 effect · rank 2", "L3H2 "]
    line = [(" of the written token, final gain folded", PLAIN)]
    assert [cut(w) for w in (40, 30, 14)] == [" of the written token, final gain folded", " of the written token, final …", " of the …"]


def test_a_row_to_read_is_wrapped_between_words_in_its_styles():
    row = [("  about 8 s", BOLD), (" over 32 prompts of the set", PLAIN)]
    lines = wrapped(row, 20)
    assert ["".join(t for t, _ in line).rstrip() for line in lines] == ["  about 8 s over 32", "  prompts of the", "  set"]
    assert [t for line in lines for t, style in line if style.bold] == ["about 8 s"] and wrapped(row, 60) == [row]


@given(st.lists(st.tuples(*[st.text(max_size=70)] * 3), min_size=1, max_size=5), st.integers(40, 130))
def test_columns_of_a_list_never_touch_and_say_what_is_cut(rows, width):
    items = [Item(*map(printable, row)) for row in rows]
    texts = columns(items, width)
    for item in items:
        key, label, note = texts(item)
        assert width_of(key + label + note) <= width and key.endswith(" ")
        assert key.rstrip() == item.key.rstrip() or key.rstrip().endswith("…")
        assert label.rstrip() == item.label.rstrip() or label.rstrip().endswith("…")
        assert not note.strip() or label.endswith(" ")
