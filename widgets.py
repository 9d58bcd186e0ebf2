"""
What draws lines and maps, by the Line API. Quantise -> style table -> merge -> cache; a cursor move repaints the lines it touches and no more.
Widgets hold no state of the hunt: they are given a picture and draw it. Never imports torch.
"""

import textwrap
from functools import lru_cache

import numpy as np
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from screen.colours import (
    BAD, BOLD, CHANGED, CURSOR, CURSOR_PLAIN, DIM, FOCUS, GOOD, HEAD, NEGATIVE, PLAIN, POSITIVE, RULE, SHADES, WARN, half_block, half_style, on,
)  # fmt: skip
from screen.maps import (
    FAINT, KEPT, SMALL, Grid, Spans, cell_line, choose, header_height, label_width, ranked, show_value, strip_of_maxima, tall_of, thinned, whole,
)  # fmt: skip
from utils import fit, printable, show_token, width_of

__all__ = [
    "BAD", "BOLD", "CHANGED", "CURSOR", "CURSOR_PLAIN", "DIM", "FAINT", "FOCUS", "GOOD", "HEAD", "NEGATIVE", "PLAIN", "POSITIVE", "RULE", "SHADES", "WARN",
    "Grid", "GridView", "Lines", "Same", "Spans", "on", "strip_of",
]  # fmt: skip


def strip_of(spans: Spans) -> Strip:
    return Strip([Segment(printable(text), style) for text, style in spans if text]).simplify()


def whole_spans(spans: Spans, width: int) -> Spans:
    """Without the last parts that do not fit whole: spans, or what stands between ` · ` in the last one."""
    spans = list(spans)
    while spans and sum(width_of(text) for text, _ in spans) > width:
        text, style = spans.pop()
        if " · " in text.strip(" ·"):
            spans.append((text.rpartition(" · ")[0], style))
        elif not spans:
            return [(f"{text[: len(text) - len(text.lstrip())]}{textwrap.shorten(text, width - 1, placeholder=' …')}", style)]
    return spans


class Lines(Widget):
    """Lines of styled text. `show` repaints only the lines that changed; lines beyond the height are cut, `top` scrolls. `whole`: a line's last parts go rather than be cut."""

    DEFAULT_CSS = "Lines { height: 1; width: 1fr; }"
    ALLOW_SELECT = False

    def __init__(self, whole: bool = False, **kw):
        super().__init__(**kw)
        self.lines: list[Strip] = []
        self.whole, self.spans = whole, []
        self.top = 0
        self.rule: tuple[str, Style] | None = None  # what fills the rest of a line

    def show(self, lines: list[Spans], top: int = 0) -> None:
        self.spans = lines if self.whole else []
        new = [strip_of(whole_spans(spans, self.size.width) if self.whole and self.size else spans) for spans in lines]
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

    def on_resize(self) -> None:
        if self.spans:
            self.show(self.spans, self.top)

    def render_line(self, y: int) -> Strip:
        y += self.top
        strip = self.lines[y] if y < len(self.lines) else Strip.blank(0)
        if self.rule and strip.cell_length < self.size.width:
            strip = Strip([*strip, Segment(self.rule[0] * (self.size.width - strip.cell_length), self.rule[1])])
        return strip.adjust_cell_length(self.size.width, PLAIN)

    def text(self) -> str:
        return "\n".join(s.text.rstrip() for s in self.lines)


# ------------------------------------------------------------------ maps


class Same:
    """A result as part of a key: equal only to itself, and kept alive, so that no other one can have its place in memory (as with id)."""

    def __init__(self, it: object):
        self.it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.it is other.it

    __hash__ = None


class GridView(Widget):
    """
    A Grid with one cursor, drawn as densely as the room demands (maps.choose). Labels stay. Where even half blocks do not show everything, the view jumps
    by half a page and strips show the largest of what is outside; where room is left, the largest cells are listed in it.
    """

    DEFAULT_CSS = "GridView { width: 1fr; height: 1fr; }"
    ALLOW_SELECT = False

    def __init__(self, **kw):
        super().__init__(**kw)
        self.grid: Grid | None = None
        self.at = (0, 0)
        self.origin = (0, 0)  # the first line and column in view
        self.mode = "colour"
        self.message: Spans = []
        self.laid = None  # what the cell widths were computed for
        self.rows: list[int] = []  # of the grid, in view or to scroll to; fewer than all where text is thinned
        self.thinned = ""  # what those are, when they are not all
        self.tall = 1  # lines of a row, where a small map leaves room
        self.strip = lru_cache(512)(self.draw)

    def show(self, grid: Grid | None, at: tuple[int, int], mode: str, message: Spans | None = None) -> None:
        """Draw a grid with the cursor at (row, column) of the whole grid; without a grid, a message."""
        message, at = message or [], grid.cell_of(at) if grid is not None else at
        if grid is self.grid and mode == self.mode and message == self.message:
            self.move(at)
            return
        self.grid, self.mode, self.message, self.at = grid, mode, message, at
        self.laid = None
        self.lay_out()
        self.refresh()

    # ---------------------------------------------------------------- what goes where

    def lay_out(self) -> None:
        """Density, thinned rows, what the strips and the list take, then the scroll origin."""
        if self.grid is None or not self.size or self.laid == (self.mode, self.size):
            return
        self.strip.cache_clear()
        self.laid = (self.mode, self.size)
        g, (width, height) = self.grid, self.size
        self.density = choose(g, width, height, self.mode)
        self.head = header_height(g, self.density)
        self.thin()
        self.label = label_width(g, width)
        fits = whole(g, self.density, width, height, len(self.rows))
        self.beside = fits and width - self.label - self.density.width * len(g.cols) >= 30
        self.tall = tall_of(g, self.density, height, not self.beside) if fits else 1
        cut_rows = -(-len(self.rows) // self.density.per) + self.head > height
        self.across = max(1, (width - self.label - 2 * cut_rows) // self.density.width)
        cut_cols = self.across < len(g.cols)
        self.down = max(1, height - self.head - (cut_cols and height > 8))
        self.right = strip_of_maxima(g, self.down, 0) if cut_rows and len(self.rows) == len(g.rows) else np.array([], int)
        self.below = strip_of_maxima(g, self.across, 1) if cut_cols and height > 8 else np.array([], int)
        used, lines = self.label + self.density.width * len(g.cols), self.head + self.lines_of()
        self.list = []
        if fits and self.beside:
            self.list = [strip_of([("   ", PLAIN), *line]) for line in ranked(g, width - used - 3, height)]
        elif fits and height - lines >= 2:
            self.list = [Strip.blank(0), *(strip_of([(" ", PLAIN), *line]) for line in ranked(g, width - 1, height - lines - 1))]
        self.origin = self.origin_for(self.at)

    def thin(self) -> bool:
        """The rows of a text that is too high, by the cursor; whether they changed."""
        before, g = self.rows, self.grid
        self.thinned, self.rows = thinned(g, self.size.height - self.head, self.at[0]) if self.density.kind != "cell" else ("", list(range(len(g.rows))))
        return self.rows != before

    def lines_of(self) -> int:
        return -(-len(self.rows) // self.density.per) * self.tall

    def line_of(self, row: int) -> int:
        """The first line of a row of the grid, of all lines."""
        return (self.rows.index(row) if row in self.rows else 0) // self.density.per * self.tall

    def origin_for(self, at: tuple[int, int]) -> tuple[int, int]:
        line, cols = self.line_of(at[0]), len(self.grid.cols)
        return self.page(line, self.origin[0], self.down, self.lines_of()), self.page(at[1], self.origin[1], self.across, cols)

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
            self.laid = None
            self.refresh()
            return
        self.lay_out()
        if self.thinned and old[0] != at[0] and self.thin():
            self.strip.cache_clear()
            self.refresh()
        if (origin := self.origin_for(at)) != self.origin:
            self.origin = origin
            self.refresh()
            return
        w, lines = self.density.width, [self.line_of(p[0]) for p in (old, at)]
        x0, x1 = (self.label + (f(old[1], at[1]) - self.origin[1]) * w for f in (min, max))
        span = (0, x1 + w) if old[0] != at[0] else (x0, x1 + w - x0)  # another row: its label too
        regions = [Region(span[0], line - self.origin[0] + self.head, span[1], self.tall) for line in set(lines)]
        if old[1] != at[1]:
            regions.append(Region(0 if self.density.width < 4 else x0, 0, self.size.width if self.density.width < 4 else x1 + w - x0, self.head))
        bounds = Region(0, 0, *self.size)
        self.refresh(*(r.intersection(bounds) for r in regions))

    def about(self) -> Spans:
        """The cell under the cursor in words, where the map shows no numbers."""
        self.lay_out()
        return cell_line(self.grid, *self.at) if self.grid is not None and self.laid is not None and self.density.kind == "cell" else []

    # ---------------------------------------------------------------- drawing

    def render_line(self, y: int) -> Strip:
        if not self.size:  # drawn before its first resize
            return Strip.blank(self.region.width, PLAIN)
        if self.grid is None:
            lines = textwrap.wrap("".join(text for text, _ in self.message), max(self.size.width - 4, 10))
            n = y - self.size.height // 3
            return strip_of([(f"  {lines[n]}", self.message[0][1])] if 0 <= n < len(lines) else []).adjust_cell_length(self.size.width, PLAIN)
        self.lay_out()
        line, width = y - self.head + self.origin[0], self.size.width
        if y < self.head:
            strip = self.header(y)
        elif y - self.head < self.down and line < self.lines_of():
            here = line // self.tall * self.tall == self.line_of(self.at[0])
            strip = self.strip(line, self.at if here else None)
            if y - self.head < len(self.right):
                place = range(self.origin[0] * len(self.right) // self.lines_of(), (self.origin[0] + self.down) * len(self.right) // self.lines_of())
                mark = self.maximum(int(self.right[y - self.head]), y - self.head in place)
                strip = Strip.join([strip.adjust_cell_length(width - 1, PLAIN), strip_of([mark])])
        elif y == self.head + min(self.down, self.lines_of()) and len(self.below):
            place = range(self.origin[1] * len(self.below) // len(self.grid.cols), (self.origin[1] + self.across) * len(self.below) // len(self.grid.cols))
            strip = strip_of([("max".ljust(self.label), DIM), *(self.maximum(int(n), i in place) for i, n in enumerate(self.below))])
        else:
            strip = Strip.blank(0)
        strip = self.with_list(strip, y)
        return strip.adjust_cell_length(width, PLAIN)

    def with_list(self, strip: Strip, y: int) -> Strip:
        """The list of the largest cells beside the map, or below it."""
        y -= 0 if self.beside else self.head + self.lines_of()
        if not 0 <= y < len(self.list):
            return strip
        used = self.label + self.density.width * len(self.grid.cols)
        return Strip.join([strip.adjust_cell_length(used, PLAIN), self.list[y]]) if self.beside else self.list[y]

    def maximum(self, level: int, in_view: bool) -> tuple[str, Style]:
        """A cell of a strip: the largest of a part of the map; a line where that part is in view."""
        text = "│" if in_view else " "
        if level < 0:
            return text, DIM
        return (text if in_view else self.shade(level), PLAIN) if self.mode == "shade" else (text, on(self.grid.ramp[level]))

    def header(self, y: int) -> Strip:
        """Names of the columns; above those of positions their numbers; where cells are narrow, numbers at every fifth or tenth."""
        g, w, at = self.grid, self.density.width, self.at[1]
        cols = range(self.origin[1], min(self.origin[1] + self.across, len(g.cols)))
        cut = self.across < len(g.cols)
        place = f"{g.place(cols[0])}–{g.place(cols[-1])}/{len((g.whole or g).cols)}" if cols and cut else g.corner
        corner = place if y == self.head - 1 and (not cut or len(place) < self.label) else ""
        spans: Spans = [(fit(corner, self.label), DIM)]
        if w < 4:
            return strip_of([*spans, *self.ticks(cols)])
        for c in cols:
            text = show_token(str(g.place(c)), w - 1) if y < self.head - 1 else short(g.cols[c], w - 1)
            spans.append((text + " ", BOLD if c == at else DIM if y < self.head - 1 or c in g.faded[1] else PLAIN))
        return strip_of(spans)

    def ticks(self, cols: range) -> Spans:
        """Numbers of columns that do not touch, and the cursor's own, which hides those that it touches."""
        g, w = self.grid, self.density.width
        names = {c: (str(g.place(c)) if g.positions or g.cols[c][:1] == "H" else g.cols[c]) for c in cols}
        step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if s * w > max(len(str(g.place(cols[-1]))), 1)) if cols else 1
        line, wide = [" "] * (len(cols) * w + 6), len(cols) * w
        for c in cols:
            x, text = (c - cols[0]) * w, names[c]
            if (c % step == 0 if text.isdigit() else True) and x + len(text) <= wide + 6 and all(k == " " for k in line[max(0, x - 1) : x + len(text)]):
                line[x : x + len(text)] = text
        if self.at[1] not in cols:
            return [("".join(line), DIM)]
        x, text = (self.at[1] - cols[0]) * w, names[self.at[1]]
        x0, x1 = x, x + len(text)
        while x0 > 0 and line[x0 - 1] != " " and line[x0] != " ":
            x0 -= 1
        before = "".join(line[:x0]).ljust(x)
        while x1 < len(line) and line[x1 - 1] != " " and line[x1] != " ":
            x1 += 1
        return [(before, DIM), (text, BOLD), (" " * (x1 - x - len(text)) + "".join(line[x1:]), DIM)]

    def draw(self, line: int, cursor: tuple[int, int] | None) -> Strip:
        g, per = self.grid, self.density.per
        line, part = divmod(line, self.tall)
        named = part == (self.tall - 1) // 2  # the other lines of a row are of its colours alone
        rows = self.rows[line * per : line * per + per]
        shown = cursor[0] if cursor else rows[0]
        cols = range(self.origin[1], min(self.origin[1] + self.across, len(g.cols)))
        spans: Spans = [
            (
                fit(g.rows[shown] if named else "", self.label - 1) + " ",
                BOLD if cursor else PLAIN if (per == 1 or line % 2 == 0) and shown not in g.faded[0] else DIM,
            )
        ]
        make = self.pair if per == 2 else self.cell
        for c in cols:
            cell = make(rows, c, cursor is not None and c == cursor[1], shown)
            spans += cell if named else [(" " * width_of(text), style + Style(underline=False)) for text, style in cell]
        return strip_of(spans)

    def cell(self, rows: list[int], c: int, at: bool, row: int) -> Spans:
        """One cell of a line: its text on its colour."""
        g, w, level, value = self.grid, self.density.width, int(self.grid.level[row, c]), float(self.grid.shown[row, c])
        text, noise = self.cell_text(row, c, level, value, w), (row, c) in g.noise
        coloured = self.density.kind == "cell"
        rank = g.largest.get((row, c))
        if (row, c) in g.kept:
            text = fit(text, w - 1) + KEPT
        elif rank and coloured and w >= 2:
            text = str(rank) + text[1:]
        if self.mode == "shade":
            return [(text, CURSOR_PLAIN if at else DIM if noise else BOLD if (row, c) in g.marks else PLAIN)]
        middle = (len(g.ramp) // 2 - 1, len(g.ramp) // 2) if g.signed else (0,)
        small = self.mode == "colour" and not coloured and g.text is None and (level in middle or abs(value) < g.faint)
        style = (
            CURSOR
            if at
            else DIM
            if noise
            else PLAIN
            if level < 0 or small
            else half_style(None, g.ramp[level])
            if text.isspace()
            else on(g.ramp[level], g.text is not None)
        )
        if (row, c) in g.marks and not at:
            style += Style(underline=True, bold=True)
        return [(text, style)]

    def pair(self, rows: list[int], c: int, at: bool, row: int) -> Spans:
        """Two cells above each other: half blocks. A kept cell ends in its mark, on its own colour."""
        g, w = self.grid, self.density.width
        levels = [int(g.level[r, c]) if r is not None and (r, c) not in g.noise else -1 for r in (*rows, None)[:2]]
        if self.mode == "shade":
            text = max((self.shade(n) for n in levels), key=SHADES.index) * w
            return [(text, CURSOR_PLAIN if at else PLAIN)]
        codes: list[int | None] = [None if n < 0 else g.ramp[n] for n in levels]
        if at:
            codes[rows.index(row)] = int(CURSOR.bgcolor.number)
        char, style = half_block(codes[0], codes[1])
        kept = next((n for n, r in enumerate(rows) if (r, c) in g.kept), None)
        if kept is None:
            return [(char * w, style)]
        return [(char * (w - 1), style), (KEPT, CURSOR if at and rows[kept] == row else PLAIN if codes[kept] is None else on(codes[kept]))]

    def cell_text(self, row: int, col: int, level: int, value: float, w: int) -> str:
        g = self.grid
        if self.density.kind == "text":
            token = g.text[row][col]
            return (self.shade(level) + show_token(token, w - 1)) if self.mode == "shade" else show_token(token, w - 1) + " "
        if self.density.kind == "cell":
            return "~".rjust(w) if (row, col) in g.noise else (self.shade(level) if self.mode == "shade" else " ") * w
        if level < 0:
            name = g.cols[col] if g.cols[col] in g.blanks else ""
            return name.center(w - 1)[: w - 1] + " "
        if (row, col) in g.noise:
            return (f"~{show_value(value, w - 2)}" if self.mode == "number" else " ~"[-w:]).ljust(w)
        if self.mode != "number" and abs(value) < g.faint:
            return SMALL.rjust(w - 1) + " "
        number = show_value(value, w - 1 if self.mode != "shade" else w - 2)
        return (self.shade(level) if self.mode == "shade" else "") + number + " "

    def shade(self, level: int) -> str:
        n = len(self.grid.ramp)
        if level < 0:
            return " "
        share = abs(2 * level + 1 - n) / n if self.grid.signed else level / (n - 1)
        return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]


def short(name: str, width: int) -> str:
    """A column's name in few characters: a token that does not fit loses its leading space before its end."""
    text = show_token(name)
    return show_token(name, width) if width_of(text) <= width or width > 5 or len(text) < 2 else fit(text.removeprefix("·"), width)
