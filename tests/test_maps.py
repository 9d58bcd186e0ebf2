"""Maps of large models: which density is chosen, that every cell is drawn in its own colour, what is marked, listed and summed up where not all is in view."""

import numpy as np
import pytest
from rich.cells import cell_len
from test_widgets import view
from textual.geometry import Size

from screen import colours
from screen.layout import shared
from screen.maps import Density, Grid, cell_line, choose, legend, ranked, strip_of_maxima, thinned
from widgets import CURSOR, GridView


def heads(n_layers: int, n_heads: int, signed: bool = True) -> Grid:
    values = np.random.default_rng(0).normal(size=(n_layers, n_heads)) * (0.1 if signed else 0)
    values[n_layers // 2, 3], values[1, 1], values[0, 0] = -1.5, 1.0, np.nan
    return Grid(values, [f"L{n}" for n in range(n_layers)], [f"H{n}" for n in range(n_heads)], -1.5, 1.5, signed=signed, cell=(5, 8))


def text(spans) -> str:
    return "".join(t for t, _ in spans)


@pytest.mark.parametrize(
    "shape, size, density",
    [
        ((4, 4), (60, 12), Density("number", 8)),
        ((12, 12), (100, 20), Density("number", 8)),
        ((12, 12), (56, 20), Density("number", 4)),
        ((30, 9), (120, 31), Density("number", 8)),
        ((30, 9), (120, 17), Density("cell", 4, 2)),
        ((32, 32), (76, 34), Density("cell", 2)),
        ((32, 32), (76, 17), Density("cell", 2, 2)),
        ((32, 32), (40, 40), Density("cell", 1)),
        ((48, 64), (76, 25), Density("cell", 1, 2)),
        ((48, 64), (136, 49), Density("cell", 2)),
    ],
)
def test_the_most_legible_density_that_shows_everything(shape, size, density):
    assert choose(heads(*shape), *size, "colour") == density
    assert choose(heads(*shape), *size, "number").kind == "number" and choose(heads(*shape), *size, "blocks").per == 2
    assert choose(heads(*shape), *size, "cells").per == 1 and choose(heads(*shape), *size, "cells").kind == "cell"


def drawn(grid: Grid, size: Size, at: tuple[int, int], mode: str = "colour") -> dict[tuple[int, int], object]:
    """The colour on the screen of every cell that is in view; half blocks are taken apart."""
    widget, found = GridView(), {}
    type(widget).size, saved = property(lambda self: size), type(widget).size
    try:
        widget.grid, widget.mode, widget.at = grid, mode, at
        widget.lay_out()
        per, w = widget.density.per, widget.density.width
        for line in range(widget.down):
            chars = [(c, segment.style) for segment in widget.render_line(line + widget.head) for c in segment.text]
            for n in range(min(widget.across, len(grid.cols))):
                char, style = chars[widget.label + n * w]
                colour = lambda c: None if c is None else c.number  # noqa: E731
                pair = (
                    (colour(style.color), colour(style.bgcolor))
                    if char == "▀"
                    else (None, colour(style.color))
                    if char == "▄"
                    else (colour(style.bgcolor),) * 2
                )
                for k in range(per):
                    if (line + widget.origin[0]) * per + k < len(grid.rows):
                        found[(line + widget.origin[0]) * per + k, widget.origin[1] + n] = pair[k]
    finally:
        type(widget).size = saved
    return found


@pytest.mark.parametrize("shape, size", [((48, 64), (76, 25)), ((49, 64), (76, 26)), ((32, 32), (76, 17)), ((32, 32), (76, 34)), ((200, 300), (60, 20))])
def test_every_cell_has_its_own_colour(shape, size):
    """Against the value, taken to its colour here: the share of the scale, outward from zero."""
    grid, at = heads(*shape), (shape[0] - 3, shape[1] - 1)
    found = drawn(grid, Size(*size), at)
    assert len(found) == (shape[0] * shape[1] if shape[0] < 200 else len(found)) and len(found) > 400 and found.pop(at) == CURSOR.bgcolor.number
    for (r, c), colour in found.items():
        v = grid.values[r, c]
        ramp = colours.ABOVE if v >= 0 else colours.BELOW
        assert colour == (None if np.isnan(v) else ramp[min(int(abs(v) / 1.5 * len(ramp)), len(ramp) - 1)]), (r, c, v)


def test_golden_of_48_by_64_heads():
    lines = view(heads(48, 64), "colour", Size(120, 26), (24, 3))
    assert lines[0].startswith("    0  3 5    10   15   20") and "largest of 3071" in lines[0]
    assert lines[1].startswith("L0  ▄" + "▀" * 63) and lines[13].startswith("L24 " + "▀" * 64) and lines[24].startswith("L46 ")
    assert lines[1].split()[-4:-1] == ["1", "L24H3", "-1.500"] and lines[2].split()[-4:-1] == ["2", "L1H1", "+1.000"]
    assert all(cell_len(line) <= 120 for line in lines) and any("distribution of the values" in line for line in lines)
    narrow = view(heads(48, 64), "colour", Size(76, 27), (47, 63))
    assert narrow[24].startswith("L47 ") and narrow[26].startswith(" largest L24H3 -1.500   L1H1 +1.000")
    marked = view(heads(32, 32), "colour", Size(76, 33), (31, 0))
    assert marked[17][4 + 2 * 3] == "1" and marked[2][4 + 2] == "2", "rank of the largest where there are no numbers"


def test_what_is_out_of_view_has_its_maximum_beside_the_map():
    grid = heads(48, 64)
    right, below = strip_of_maxima(grid, 12, 0), strip_of_maxima(grid, 16, 1)
    assert right[6] == grid.level[24, 3] == 0 and right[0] == grid.level[1, 1] and below[0] == 0 and len(right) == 12 and len(below) == 16
    lines = view(grid, "colour", Size(80, 14), (0, 0))
    assert lines[1].endswith("│") and not lines[12].endswith("│")
    lines = view(grid, "cells", Size(60, 20), (47, 63))
    assert lines[-1].startswith("max ") and lines[-1].endswith("│") and len(lines) == 20


def test_a_text_is_thinned_by_rule():
    points = ["L0.resid_pre", *(f"L{n}.{s}" for n in range(48) for s in ("resid_mid", "resid_post"))]
    post = tuple(i for i, p in enumerate(points) if p.endswith("post"))
    grid = Grid(np.zeros((97, 3)), points, ["a", "b", "c"], 0, 1, [["x"] * 3] * 97, thin=(("resid_post", post),))
    assert thinned(grid, 97, 5) == ("", list(range(97)))
    assert thinned(grid, 48, 4) == ("resid_post", list(post))
    for room in (4, 6, 9, 15, 30, 47):
        for at in (0, 2, 50, 51, 96):
            name, rows = thinned(grid, room, at)
            here = sorted({*post, at})
            near = {here[i] for i in (here.index(at) - 1, here.index(at), here.index(at) + 1) if 0 <= i < len(here)}
            assert name.startswith("every ") and name.endswith(" resid_post") and len(rows) <= room and near <= set(rows), (room, at)
            assert len(rows) == room, "no line is left empty"


def test_cell_line_and_legend():
    grid = Grid(np.array([[0.5, -0.25], [np.nan, 1.0]]), ["L0", "L1"], ["H0", "H1"], -1, 1, signed=True)
    assert text(cell_line(grid, 0, 1)) == " L0H1 -0.250 rank 3 of 3  ←  .500 ↓ 1.000 "
    assert cell_line(grid, 1, 0) == [] == cell_line(grid, 5, 0)
    assert (
        text(legend(grid, "colour")).split() == ["-1", "0", "1"]
        and text(legend(grid, "shade")) == "-1 █▓▒░0░▒▓█ 1"
        and text(legend(grid, "colour", 8)) == "-1 … 1"
    )
    assert [s.bgcolor.number for t, s in legend(grid, "colour") if t == " "] == [*colours.BELOW[:0:-1], *colours.ABOVE[1:]]
    ranks = Grid(np.array([[0.1]]), ["a"], ["b"], 0, 1, ends=("49152", "0"))
    assert text(legend(ranks, "colour")).split() == ["49152", "0"]
    many = Grid(np.arange(12.0).reshape(3, 4), list("abc"), list("wxyz"), 0, 11)
    assert text(ranked(many, 60, 12)[1]).split()[:5] == ["1", "c", "×", "z", "11.000"] and "largest c × z 11.000   c × y 10.000" in text(ranked(many, 60, 1)[0])


def test_two_panes_share_the_height():
    assert shared([(10, 12), (8, 10)], 40) == 12, "there is room for both"
    assert shared([(10, 40), (19, 40)], 29) == 10 and shared([(10, 13), (9, 20)], 29) == 13 and shared([(10, 30), (10, 30)], 30) == 15
    assert shared([(30, 40), (30, 40)], 29) == 14


@pytest.mark.parametrize("size, tall", [(Size(100, 17), 3), (Size(100, 10), 2), (Size(100, 6), 1), (Size(50, 17), 1), (Size(50, 34), 3)])
def test_a_small_map_has_higher_rows_where_there_is_room(size, tall):
    """Every line of a row has its colours, one of them its name and numbers; below a narrow map the list of its largest cells comes first."""
    grid, widget = heads(4, 4), GridView()
    type(widget).size, saved = property(lambda self: size), type(widget).size
    try:
        widget.grid, widget.mode, widget.at = grid, "colour", (2, 3)
        widget.lay_out()
        assert widget.tall == tall and bool(widget.list) and widget.lines_of() + widget.head <= size.height
        lines = [widget.render_line(widget.head + n) for n in range(4 * tall)]
        assert [n // tall for n, line in enumerate(lines) if line.text[:2].strip()] == [0, 1, 2, 3]
        at = widget.label + 3 * widget.density.width
        assert [n // tall for n, line in enumerate(lines) if line.crop(at, at + 1)._segments[0].style.bgcolor == CURSOR.bgcolor] == [2] * tall
    finally:
        type(widget).size = saved
