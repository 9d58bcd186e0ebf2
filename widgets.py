"""
The panes, drawn from results by the Line API. Quantise -> style table -> merge -> cache; a cursor move repaints the lines it touches and no more.
Widgets hold no state of the hunt: they are given a picture and draw it. Never imports torch.
"""

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from utils import fit, printable, show_number, show_token, visible, width_of

# xterm-256 colours, dark to bright (a test holds them monotone in luminance); the signed ramp goes outward from the middle
RAMP = (233, 17, 18, 53, 54, 90, 126, 161, 167, 203, 209, 215, 221, 227, 229, 230)
BELOW = (233, 17, 18, 19, 25, 32, 74, 117)
ABOVE = (233, 52, 88, 124, 160, 202, 208, 215)
SHADES = " ░▒▓█"
FAINT = 0.005  # numbers that would read .00 are drawn as a dot, and the lowest level has no background: legible, and cheap to send


def luminance(code: int) -> float:
    """Relative luminance of an xterm-256 colour (cube or grey ramp), 0 to 1."""
    steps = (0, 95, 135, 175, 215, 255)
    rgb = (8 + 10 * (code - 232),) * 3 if code >= 232 else tuple(steps[(code - 16) // n % 6] for n in (36, 6, 1))
    lin = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]


def on(code: int) -> Style:
    return Style(color="bright_white" if luminance(code) < 0.18 else "color(16)", bgcolor=f"color({code})")  # short codes: there is one a cell


PLAIN = Style()
DIM = Style(color="color(245)")
BOLD = Style(bold=True)
HEAD = Style(color="color(117)", bold=True)
GOOD = Style(color="color(114)")
WARN = Style(color="color(221)")
BAD = Style(color="color(203)", bold=True)
CHANGED = Style(color="color(215)")
POSITIVE = Style(color="color(208)")  # as in the signed maps: warm is above zero, cold below
NEGATIVE = Style(color="color(74)")
CURSOR = Style(color="color(16)", bgcolor="color(214)", bold=True)
CURSOR_PLAIN = Style(reverse=True, bold=True)
FOCUS = Style(color="color(16)", bgcolor="color(117)", bold=True)
HEATS = tuple(on(c) for c in RAMP)
SIGNED = tuple(on(c) for c in (*reversed(BELOW), *ABOVE))

Spans = list[tuple[str, Style]]


def strip_of(spans: Spans) -> Strip:
    return Strip([Segment(printable(text), style) for text, style in spans if text]).simplify()


class Lines(Widget):
    """Lines of styled text. `show` repaints only the lines that changed; lines beyond the height are cut, `top` scrolls."""

    DEFAULT_CSS = "Lines { height: 1; width: 1fr; }"
    ALLOW_SELECT = False

    def __init__(self, **kw):
        super().__init__(**kw)
        self.lines: list[Strip] = []
        self.top = 0

    def show(self, lines: list[Spans], top: int = 0) -> None:
        new = [strip_of(spans) for spans in lines]
        old, self.lines = self.lines, new
        if top != self.top:
            self.top = top
            self.refresh()
            return
        changed = [y for y in range(max(len(old), len(new))) if y >= len(old) or y >= len(new) or old[y] != new[y]]
        if changed and not self.size:  # hidden: what was rendered before must not come back when it is shown again
            self.refresh()
        elif changed:
            self.refresh(*(Region(0, y - top, self.size.width, 1) for y in changed if 0 <= y - top < self.size.height))

    def render_line(self, y: int) -> Strip:
        y += self.top
        strip = self.lines[y] if y < len(self.lines) else Strip.blank(0)
        return strip.adjust_cell_length(self.size.width, PLAIN)

    def text(self) -> str:
        return "\n".join(s.text.rstrip() for s in self.lines)


# ------------------------------------------------------------------ heat maps and token tables


class Same:
    """A result as part of a key: equal only to itself, and kept alive, so that no other one can have its place in memory (as with id)."""

    def __init__(self, it: object):
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    __hash__ = None


@dataclass(frozen=True, eq=False)
class Grid:
    """
    A picture: values [rows, columns] (NaN is blank) on the scale lo..hi, what stands in the cells (the number unless there is `text`), labels, and
    how wide a cell may be; numbers under `faint` are dots; `blanks` are columns that show their name. `numbers` are shown when they differ from what is coloured (ranks on a log scale). `signed` draws outward from zero. `marks` are underlined; `kept`, the circuit's cells, end in a dot; `noise`, cells below the noise floor `floor`, are a dim ~ (their numbers in number mode and exports).
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

    def level(self) -> np.ndarray:
        """[rows, columns] int, -1 where blank."""
        span = max(self.hi - self.lo, 1e-12)
        n = len(SIGNED) if self.signed else len(HEATS)
        with np.errstate(invalid="ignore"):
            level = np.clip((self.values - self.lo) / span * n, 0, n - 1)
        return np.where(np.isfinite(level), level, -1).astype(int)

    @property
    def shown(self) -> np.ndarray:
        return self.values if self.numbers is None else self.numbers

    def tsv(self) -> str:
        corner = self.corner if math.isnan(self.floor) else f"{self.corner} noise floor {self.floor:.2g}".strip()
        head = "\t".join([corner, *(visible(c) for c in self.cols)])
        body = ("\t".join([visible(r).strip(), *("" if math.isnan(v) else f"{v:.6g}" for v in row)]) for r, row in zip(self.rows, self.shown.tolist()))
        return "\n".join([head, *body]) + "\n"


class GridView(Widget):
    """A Grid with one cursor. Row and column labels stay; when the cursor leaves the view it jumps by half a page."""

    DEFAULT_CSS = "GridView { width: 1fr; height: 1fr; }"
    ALLOW_SELECT = False

    def __init__(self, **kw):
        super().__init__(**kw)
        self.grid: Grid | None = None
        self.at = (0, 0)
        self.origin = (0, 0)
        self.mode = "colour"
        self.message: Spans = []
        self.laid = None  # what the cell widths were computed for
        self.strip = lru_cache(512)(self.draw)

    def show(self, grid: Grid | None, at: tuple[int, int], mode: str, message: Spans | None = None) -> None:
        """Draw a grid with the cursor at (row, column); without a grid, a message."""
        message = message or []
        if grid is self.grid and mode == self.mode and message == self.message:
            self.move(at)
            return
        self.grid, self.mode, self.message, self.at = grid, mode, message, at
        self.layout_cells()
        self.refresh()

    def layout_cells(self) -> None:
        """Cell width: as wide as allowed while everything fits, else the narrowest; then the scroll origin."""
        if self.grid is None or not self.size or self.laid == (self.grid, self.mode, self.size):
            return
        self.strip.cache_clear()
        self.laid = (self.grid, self.mode, self.size)
        g, (low, high) = self.grid, self.grid.cell
        self.label = min(max([width_of(r) for r in g.rows] + [width_of(g.corner)], default=0) + 1, max(self.size.width // 3, 6))
        if self.mode == "number":
            low = max(low, 7 if g.signed else 6)
            high = max(low, high)
        elif self.mode == "shade" and g.text is None:
            low, high = min(low, 2), high + 1
        room = self.size.width - self.label
        self.width = max(low, min(high, room // max(len(g.cols), 1)))
        self.across = max(1, room // self.width)
        self.down = max(1, self.size.height - 1)
        self.origin = (
            self.page(self.at[0], self.origin[0], self.down, len(g.rows)),
            self.page(self.at[1], self.origin[1], self.across, len(g.cols)),
        )

    @staticmethod
    def page(at: int, origin: int, view: int, total: int) -> int:
        if not origin <= at < origin + view:
            origin = at - view // 2
        return max(0, min(origin, total - view))

    def move(self, at: tuple[int, int]) -> None:
        if at == self.at or self.grid is None:
            return
        old, self.at = self.at, at
        if not self.size:
            self.refresh()
            return
        self.layout_cells()
        g = self.grid
        origin = (self.page(at[0], self.origin[0], self.down, len(g.rows)), self.page(at[1], self.origin[1], self.across, len(g.cols)))
        if origin != self.origin:
            self.origin = origin
            self.refresh()
            return
        lines = {old[0], at[0]}
        regions = []
        for r in lines:
            cells = [c for (rr, c) in (old, at) if rr == r]
            x0, x1 = (self.label + (f(cells) - self.origin[1]) * self.width for f in (min, max))
            regions.append(Region(0 if old[0] != at[0] else x0, r - self.origin[0] + 1, x1 + self.width - (0 if old[0] != at[0] else x0), 1))
        if old[1] != at[1]:
            x0, x1 = (self.label + (f(old[1], at[1]) - self.origin[1]) * self.width for f in (min, max))
            regions.append(Region(x0, 0, x1 + self.width - x0, 1))
        bounds = Region(0, 0, *self.size)
        self.refresh(*(r.intersection(bounds) for r in regions))

    def render_line(self, y: int) -> Strip:
        if not self.size:  # drawn before its first resize
            return Strip.blank(self.region.width, PLAIN)
        if self.grid is None:
            text = self.message if y == self.size.height // 3 else []
            return strip_of(text).adjust_cell_length(self.size.width, PLAIN)
        self.layout_cells()
        if y == 0:
            return self.strip(-1, self.at[1])
        row = y - 1 + self.origin[0]
        if row >= len(self.grid.rows):
            return Strip.blank(self.size.width, PLAIN)
        return self.strip(row, self.at[1] if row == self.at[0] else -1)

    def draw(self, row: int, cursor: int) -> Strip:
        g, w = self.grid, self.width
        cols = range(self.origin[1], min(self.origin[1] + self.across, len(g.cols)))
        more = (len(g.cols) > self.origin[1] + self.across) or self.origin[1] > 0
        if row < 0:
            corner = (f"{self.origin[1]}–{cols[-1]}/{len(g.cols)}" if more else g.corner) if cols else ""
            spans = [(fit(corner, self.label), DIM)]
            spans += [(show_token(g.cols[c], w - 1) + " ", BOLD if c == cursor else PLAIN) for c in cols]
            return strip_of(spans).adjust_cell_length(self.size.width, PLAIN)
        marked = cursor >= 0
        spans = [(fit(g.rows[row], self.label - 1) + " ", BOLD if marked else PLAIN)]
        levels, values = self.levels()[row], g.shown[row]
        palette, middle = (SIGNED, (len(BELOW) - 1, len(BELOW))) if g.signed else (HEATS, (0,))
        for c in cols:
            level, value = int(levels[c]), float(values[c])
            text = self.cell_text(row, c, level, value, w)
            if (row, c) in g.kept:
                text = fit(text, w - 1) + "•"
            if self.mode == "shade":
                style = CURSOR_PLAIN if c == cursor else DIM if (row, c) in g.noise else BOLD if (row, c) in g.marks else PLAIN
            else:
                faint = level < 0 or (g.text is None and self.mode == "colour" and (level in middle or abs(value) < g.faint))
                style = CURSOR if c == cursor else DIM if (row, c) in g.noise else PLAIN if faint else palette[level]
                if (row, c) in g.marks and c != cursor:
                    style += Style(underline=True, bold=True)
            spans.append((text, style))
        return strip_of(spans).adjust_cell_length(self.size.width, PLAIN)

    def levels(self) -> np.ndarray:
        if getattr(self, "level_of", None) is not self.grid:
            self.level_of, self.level_array = self.grid, self.grid.level()
        return self.level_array

    def cell_text(self, row: int, col: int, level: int, value: float, w: int) -> str:
        g = self.grid
        if g.text is not None and self.mode != "number":
            token = g.text[row][col]
            if self.mode == "shade":
                return self.shade(level) + show_token(token, w - 1)
            return show_token(token, w - 1) + " "
        if level < 0:
            name = g.cols[col] if g.cols[col] in g.blanks else ""
            return name.center(w - 1)[: w - 1] + " "
        if (row, col) in g.noise:
            return (f"~{show_value(value, w - 2)}" if self.mode == "number" else " ~"[-w:]).ljust(w)
        if self.mode != "number" and abs(value) < g.faint:
            return " ·".ljust(w)
        if self.mode == "shade" and w < 4:
            return (self.shade(level) * (w - 1 if w > 2 else w)).ljust(w)
        if self.mode == "colour" and w < 4:
            return " " * w
        number = show_value(value, w - 1 if self.mode != "shade" else w - 2)
        return (self.shade(level) if self.mode == "shade" else "") + number + " "

    def shade(self, level: int) -> str:
        n = len(SIGNED) if self.grid.signed else len(HEATS)
        if level < 0:
            return " "
        share = abs(2 * level + 1 - n) / n if self.grid.signed else level / (n - 1)
        return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]


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
