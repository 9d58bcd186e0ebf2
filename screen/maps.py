"""
Maps: a grid of numbers or tokens, and how densely it is drawn in the room there is. Numbers, then three characters, then a coloured cell of two characters
or one, then half blocks (two rows a line), so that a whole model is in view. Pure functions; widgets.GridView draws what is chosen here.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from rich.style import Style

from screen.colours import BOLD, DIM, NEGATIVE, PLAIN, POSITIVE, RAMP, SHADES, SIGNED_RAMP, bars
from utils import show_number, show_token, visible, width_of

FAINT = 0.005  # numbers that would read .00 are drawn as SMALL, and the lowest level has no background: legible, and cheap to send
SMALL, KEPT = ".", "•"  # a number too small to print; a cell of the circuit
MARKED, ENOUGH = 5, 20  # how many of the largest cells are marked in a map without numbers, if it has more cells than ENOUGH

Spans = list[tuple[str, Style]]


@dataclass(frozen=True, eq=False)
class Grid:
    """
    A picture: values [rows, columns] (NaN is blank) on the scale lo..hi, what stands in the cells (the number unless there is `text`), labels, and
    how wide a cell may be; numbers under `faint` are SMALL; `blanks` are columns that show their name. `numbers` are shown when they differ from what is coloured (ranks on a log
    scale; `ends` then names the ends of the colours). `signed` draws outward from zero. `marks` are underlined; `kept`, the circuit's cells, end in KEPT; `noise`, cells below the noise floor `floor`, are a dim ~ (their numbers in number mode and exports), without colour in half blocks. `positions`: columns are
    positions, numbered above. `listed`: the largest cells are marked, and listed in room that is left (not where every step of the cursor brings another picture). `thin`: names and row numbers of coarser choices of rows, for text that is too high.
    `faded`: rows and columns whose names are dim. `whole`: the grid that this one shows some rows and columns of, those of `shown_rows` and `shown_cols`.
    """

    values: np.ndarray
    rows: list[str]
    cols: list[str]
    lo: float
    hi: float
    text: list[list[str]] | None = None
    numbers: np.ndarray | None = None
    signed: bool = False
    cell: tuple[int, int] = (4, 9)
    faint: float = FAINT
    corner: str = ""
    blanks: tuple[str, ...] = ()
    marks: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    kept: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    noise: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    floor: float = math.nan
    positions: bool = False
    listed: bool = True
    ends: tuple[str, str] = ("", "")
    thin: tuple[tuple[str, tuple[int, ...]], ...] = ()
    faded: tuple[frozenset[int], frozenset[int]] = (frozenset(), frozenset())
    whole: "Grid | None" = None
    shown_rows: tuple[int, ...] = ()
    shown_cols: tuple[int, ...] = ()

    def place(self, col: int) -> int:
        """A column's number in the whole grid."""
        return self.shown_cols[col] if self.whole else col

    def cell_of(self, at: tuple[int, int]) -> tuple[int, int]:
        """Where a cell of the whole grid is here; one that is not shown, the next that is."""
        near = lambda shown, n: min(bisect_left(shown, n), len(shown) - 1)  # noqa: E731
        return (near(self.shown_rows, at[0]), near(self.shown_cols, at[1])) if self.whole else at

    @cached_property
    def level(self) -> np.ndarray:
        """[rows, columns] int, -1 where blank."""
        span, n = max(self.hi - self.lo, 1e-12), len(self.ramp)
        with np.errstate(invalid="ignore"):
            level = np.clip((self.values - self.lo) / span * n, 0, n - 1)
        return np.where(np.isfinite(level), level, -1).astype(int)

    @cached_property
    def magnitude(self) -> np.ndarray:
        """Sizes of the values [rows, columns], -inf where blank."""
        return np.nan_to_num(np.abs(self.values), nan=-np.inf)

    @cached_property
    def widest(self) -> int:
        """Columns of the widest name of a row, or of the corner."""
        return max([width_of(r) for r in self.rows] + [width_of(self.corner)], default=0)

    @property
    def ramp(self) -> list[int]:
        return SIGNED_RAMP if self.signed else RAMP

    @property
    def shown(self) -> np.ndarray:
        return self.values if self.numbers is None else self.numbers

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Cells by size, the largest first."""
        size = np.abs(self.values) if self.signed else self.values
        flat = np.argsort(-np.nan_to_num(size, nan=-np.inf), axis=None, kind="stable")[: int(np.isfinite(size).sum())]
        return list(zip(*(x.tolist() for x in np.unravel_index(flat, size.shape))))

    @cached_property
    def largest(self) -> dict[tuple[int, int], int]:
        """Rank of the few largest cells of a large map."""
        return (
            {rc: n for n, rc in enumerate(self.order[:MARKED], 1) if self.values[rc] != 0}
            if self.text is None and self.listed and len(self.order) > ENOUGH
            else {}
        )

    def name(self, row: int, col: int) -> str:
        """A cell in words: L23H3, L3.mlp, L2.resid_post @4 ·Mary."""
        r, c = visible(self.rows[row].strip()), visible(self.cols[col])
        if self.positions:
            return f"{r} → {self.place(col)} {c}" if r[:1].isdigit() else f"{r} @{self.place(col)} {c}"
        return r + c if c[:1] == "H" else f"{r}.{c}" if r[:1] == "L" else f"{r} × {c}"

    def tsv(self) -> str:
        if self.whole:
            return self.whole.tsv()
        corner = self.corner if math.isnan(self.floor) else f"{self.corner} noise floor {self.floor:.2g}".strip()
        head = "\t".join([corner, *(visible(c) for c in self.cols)])
        body = ("\t".join([visible(r).strip(), *("" if math.isnan(v) else f"{v:.6g}" for v in row)]) for r, row in zip(self.rows, self.shown.tolist()))
        return "\n".join([head, *body]) + "\n"


def without(grid: Grid, rows: frozenset[int], cols: frozenset[int]) -> Grid:
    """The grid on the same scale without some of its rows and columns; those that are left keep their numbers. Its columns all stay where none would be left."""
    kept = [tuple(n for n in range(len(names)) if n not in gone) or tuple(range(len(names))) for names, gone in ((grid.rows, rows), (grid.cols, cols))]
    if [*map(len, kept)] == [*grid.values.shape]:
        return grid
    here = [{n: i for i, n in enumerate(some)} for some in kept]
    cells = lambda some: frozenset((here[0][r], here[1][c]) for r, c in some if r in here[0] and c in here[1])  # noqa: E731
    part = lambda array: None if array is None else array[np.ix_(*kept)]  # noqa: E731
    return replace(
        grid,
        values=part(grid.values),
        rows=[grid.rows[n] for n in kept[0]],
        cols=[grid.cols[n] for n in kept[1]],
        text=grid.text and [[grid.text[r][c] for c in kept[1]] for r in kept[0]],
        numbers=part(grid.numbers),
        **{name: cells(getattr(grid, name)) for name in ("marks", "kept", "noise")},
        thin=tuple((name, tuple(here[0][r] for r in some if r in here[0])) for name, some in grid.thin),
        faded=tuple(frozenset(here[i][n] for n in grid.faded[i] if n in here[i]) for i in (0, 1)),
        whole=grid,
        shown_rows=kept[0],
        shown_cols=kept[1],
    )


# ------------------------------------------------------------------ density


@dataclass(frozen=True)
class Density:
    """How a cell is drawn: "text", "number" or "cell" (colour alone), its width in characters, and the rows in a line (2: half blocks)."""

    kind: str
    width: int
    per: int = 1


def label_width(grid: Grid, width: int) -> int:
    """Columns of the row labels."""
    return min(grid.widest + 1, max(width // 3, 6))


def header_height(grid: Grid, density: Density) -> int:
    """Positions have a line of numbers above their tokens, where those can be read."""
    return 2 if grid.positions and density.width >= 4 else 1


def whole(grid: Grid, density: Density, width: int, height: int, rows: int | None = None) -> bool:
    """Whether every cell is in view."""
    n = len(grid.rows) if rows is None else rows
    across = label_width(grid, width) + density.width * len(grid.cols)
    return across <= width and -(-n // density.per) + header_height(grid, density) <= height


def choose(grid: Grid, width: int, height: int, mode: str) -> Density:
    """The most legible density that shows the whole map in width × height; where none does, the one that shows most and can still be read. `mode` overrides."""
    low, high = grid.cell
    n, m = max(len(grid.rows), 1), max(len(grid.cols), 1)
    room = width - label_width(grid, width)
    if mode == "number":
        low = max(low, 7 if grid.signed else 6)
        return Density("number", max(low, min(max(low, high), room // m)))
    if grid.text is not None and mode in ("colour", "shade"):
        return Density("text", max(low, min(high, room // m)))
    plain = mode in ("colour", "shade")
    widest = min(high + (mode == "shade"), room // m)
    options = [Density("number", w) for w in ([widest] if widest >= low else []) + [4] if w >= 4] if plain else []
    options += [Density("cell", w) for w in (2, 1)] if mode != "blocks" else []
    options += [Density("cell", w, 2) for w in (4, 3, 2, 1)]
    if mode == "cells":
        options = options[:2]
    for option in options:
        if whole(grid, option, width, height):
            return option
    if mode == "cells":
        return Density("cell", 2)
    if -(-n // 2) + 1 <= height:  # all rows
        return Density("cell", 1, 2 if n + 1 > height else 1)
    if m <= room:  # all columns
        return Density("cell", min(4, room // m), 2)
    most = mode == "blocks" or 2 * room >= m and 4 * height >= n  # half of it at least in either direction
    return Density("cell", 1 if most else 2, 2 if most else 1)


def tall_of(grid: Grid, density: Density, height: int, above_list: bool) -> int:
    """Lines of a row where a small map leaves room: one to three, after the list of the largest cells below it has its own."""
    if density.kind != "number" or grid.positions or len(grid.rows) > 12:
        return 1
    room = height - header_height(grid, density) - (min(len(grid.order), 24) + 5) * (above_list and grid.listed)
    return max(1, min(3, room // max(len(grid.rows), 1)))


def least_height(grid: Grid) -> int:
    """Lines in which all rows are in view: half blocks, or text that is thinned."""
    return min(len(grid.rows), 6) + header_height(grid, Density("text", 4)) if grid.text is not None else -(-len(grid.rows) // 2) + 1


def most_height(grid: Grid) -> int:
    return len(grid.rows) + header_height(grid, Density("text", 4))


def columns_of(grid: Grid, width: int, height: int, mode: str) -> int:
    """Columns that the map takes of `width`."""
    density = choose(grid, width, height, mode)
    strip = 0 if whole(grid, density, width, height) else 2
    return min(width, label_width(grid, width) + density.width * len(grid.cols) + strip)


def thinned(grid: Grid, room: int, at: int) -> tuple[str, list[int]]:
    """
    Rows of a text that fit into `room` lines, and what they are: all; else the first of `grid.thin` that fits; else every k-th row of the last of
    them. The cursor's row and its neighbours are always among them.
    """
    rows = list(range(len(grid.rows)))
    if len(rows) <= room or not grid.thin or room < 3:
        return "", rows
    for name, some in grid.thin:
        here = sorted({*some, at})
        if len(here) <= room:
            return name, here
    name, last = grid.thin[-1][0], here
    place = last.index(at)
    near = [last[i] for d in range(len(last)) for i in ((place - d, place + d) if d else (place,)) if 0 <= i < len(last)]
    k, kept = len(last), {at}
    for k in range(2, len(last) + 1):
        kept = {last[i] for i in range(0, len(last), k)} | {last[-1], *near[:3]}
        if len(kept) <= room:
            break
    kept = kept if len(kept) <= room else set(near[:room])
    for row in near:  # the room that is left goes to the neighbours, so that the lines far from the cursor stay where they are
        if len(kept) >= room:
            break
        kept.add(row)
    return f"every {k}{'nd' if k == 2 else 'rd' if k == 3 else 'th'} {name}", sorted(kept)


# ------------------------------------------------------------------ numbers beside the colours


def show_value(value: float, width: int) -> str:
    """A number without its leading zero where that buys a digit: .93, -.07, 1.0, 12.3."""
    if value != value:
        return " " * width
    for digits in (2, 1, 0) if width < 5 else (3, 2, 1, 0):
        text = f"{value:.{digits}f}"
        short = text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text
        if len(short) <= width:
            return short.rjust(width)
    return show_number(value, width)


def ends_of(grid: Grid) -> tuple[str, str]:
    """The numbers at the two ends of the colours."""
    return grid.ends if grid.ends != ("", "") else (f"{grid.lo:.3g}", f"{grid.hi:.3g}")


def legend(grid: Grid, mode: str, room: int = 40) -> Spans:
    """The colours (or shades) with the numbers at their ends, and what ~ stands for where a grid has such cells."""
    note = f" ~ noise < {grid.floor:.2g}" if grid.noise else ""
    return [*scale_of(grid, mode, room - len(note)), (note, DIM)]


def scale_of(grid: Grid, mode: str, room: int) -> Spans:
    """The colours (or shades) with the numbers at their ends, and at the middle of those outward from zero; in little room fewer of them, or the numbers alone."""
    low, high = ends_of(grid)
    codes = SIGNED_RAMP if grid.signed else RAMP
    step = next((n for n in (1, 2, 3) if len(codes) // n + len(low + high) + 3 <= room), 0)
    if not step:
        return [(f"{low} … {high}", DIM)]
    if mode == "shade":
        return [(f"{low} {SHADES[:0:-1] if grid.signed else ''}{'0' if grid.signed else ' '}{SHADES[1:]} {high}", DIM)]
    swatches: Spans = [(" ", Style(bgcolor=f"color({c})")) for c in codes]
    if grid.signed:  # the two of the middle are one
        half = len(codes) // 2
        scale = [*swatches[: half - 1 : step], ("0", DIM), *reversed(swatches[:half:-step])]
    else:
        scale = [*reversed(swatches[::-step])]
    return [(f"{low} ", DIM), *scale, (f" {high}", DIM)]


def cell_line(grid: Grid, row: int, col: int) -> Spans:
    """A cell's name, its number, its rank, and its neighbours' numbers: what colours alone do not say. Numbers keep their places as the cursor moves."""
    if not (0 <= row < len(grid.rows) and 0 <= col < len(grid.cols)) or math.isnan(grid.shown[row, col]):
        return []
    size = np.abs(grid.values) if grid.signed else grid.values
    rank = 1 + int((size > size[row, col]).sum())
    near = [
        (arrow, float(grid.shown[r, c]))
        for arrow, r, c in (("←", row, col - 1), ("→", row, col + 1), ("↑", row - 1, col), ("↓", row + 1, col))
        if 0 <= r < len(grid.rows) and 0 <= c < len(grid.cols) and not math.isnan(grid.shown[r, c])
    ]
    return [
        (f" {grid.name(row, col)} ", BOLD),
        (f"{float(grid.shown[row, col]):{'+' if grid.signed else ''}.3f}", BOLD),
        (f" rank {rank:{len(str(len(grid.order)))}} of {len(grid.order)}  ", PLAIN),
        (" ".join(f"{arrow} {show_value(x, 5)}" for arrow, x in near) + " ", DIM),
    ]


def ranked(grid: Grid, width: int, height: int) -> list[Spans]:
    """In the room that a map leaves: its largest cells with their numbers, and how its values are distributed."""
    if grid.text is not None or not grid.listed or len(grid.order) < 6 or height < 1 or width < 24:
        return []
    if height < 4:  # in one line
        line: Spans = [("largest ", DIM)]
        for rc in grid.order[:12]:
            text = f"{grid.name(*rc)} {float(grid.shown[rc]):{'+' if grid.signed else ''}.3f}   "
            if sum(width_of(t) for t, _ in line) + width_of(text) > width:
                break
            line.append((text, PLAIN))
        return [line]
    spread = height >= 9
    count = min(len(grid.order), height - 1 - 3 * spread, 24)
    names = [grid.name(*rc) for rc in grid.order[:count]]
    wide = min(max(map(width_of, names)), width - 14)
    top = max(float(np.abs(grid.values[grid.order[0]])), 1e-12)
    room = min(24, width - wide - 14)
    lines: list[Spans] = [[(f"largest of {len(grid.order)}", DIM)]]
    for n, (rc, name) in enumerate(zip(grid.order[:count], names), 1):
        value = float(grid.values[rc])
        colour = PLAIN if not grid.signed else POSITIVE if value > 0 else NEGATIVE
        lines.append(
            [
                (f"{n:2} ", DIM),
                (show_token(name, wide), PLAIN),
                (f"{float(grid.shown[rc]):{'+' if grid.signed else ''}9.3f} ", BOLD),
                ("█" * round(abs(value) / top * room), colour),
            ]
        )
    if spread:
        values = grid.values[np.isfinite(grid.values)]
        low, high = f"{values.min():.2g} ", f" {values.max():.2g}"
        counts, _ = np.histogram(values, bins=max(4, min(30, width - len(low + high) - 1)))
        lines += [
            [],
            [("distribution of the values (log counts)" if width > 39 else "distribution (log counts)", DIM)],
            [(low, DIM), (bars(np.log1p(counts).tolist()), PLAIN), (high, DIM)],
        ]
    return lines


def strip_of_maxima(grid: Grid, n: int, along: int) -> np.ndarray:
    """The largest size in each of n equal parts of the rows (along 0) or the columns (along 1), as levels of the ramp; -1 where there is none."""
    size = grid.magnitude.max(axis=1 - along, initial=-np.inf)
    where = grid.magnitude.argmax(axis=1 - along) if grid.values.size else np.zeros(len(size), int)
    levels = grid.level[np.arange(len(size)), where] if along == 0 else grid.level[where, np.arange(len(size))]
    parts = np.array_split(np.arange(len(size)), min(n, len(size)))
    return np.array([levels[part[int(size[part].argmax())]] if len(part) else -1 for part in parts])
