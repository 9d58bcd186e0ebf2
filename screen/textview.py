"""
The prompt as wrapped text, each token coloured by a number: `row_of` and `text_grid` say which numbers (a Grid of one row), `wrap` says what stands on
which line, `TextView` draws it. Tokens stand with the spaces of the text, so that it reads as one; the modes of maps apply (`shown_as`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from rich.style import Style
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from utils import fit, printable, show_token, width_of
from widgets import BOLD, CHANGED, CURSOR, CURSOR_PLAIN, DIM, PLAIN, SHADES, Grid, GridView, Spans, on, strip_of, strip_of_maxima

LARGEST = 3  # tokens of the largest values, named in the line below
FOLDED = "⋯{}⋯"  # so many folded tokens
NUMBER = 6  # columns of a number under its token

Lines = tuple[tuple[int, int], ...]  # the first token of each line, and the one after its last


def text_grid(name: str, tokens: Sequence[str], values: np.ndarray, lo: float, hi: float, signed: bool = False) -> Grid:
    """A number for each token [position] on the scale lo..hi (`signed`: outward from zero)."""
    return Grid(np.asarray(values, float)[None], [name], list(tokens), lo, hi, signed=signed, positions=True, listed=False, faint=(hi - lo) * 0.02)


def row_of(grid: Grid, row: int, name: str, tokens: Sequence[str], column: bool = False) -> Grid:
    """One row of a map by position, or one of its columns, as numbers of the tokens; columns that are no position are left out."""
    turn = (lambda a: a.T) if column else (lambda a: a)
    n = len(tokens)
    cells = lambda some: frozenset((0, c) for r, c in ((c, r) if column else (r, c) for r, c in some) if r == row and c < n)  # noqa: E731
    return replace(
        text_grid(name, tokens, turn(grid.values)[row, :n], grid.lo, grid.hi, grid.signed),
        numbers=None if grid.numbers is None else turn(grid.numbers)[row : row + 1, :n],
        marks=cells(grid.marks),
        noise=cells(grid.noise),
        floor=grid.floor,
        ends=grid.ends,
    )


def as_written(token: str) -> str:
    """A token as it stands in a text: its spaces are spaces."""
    return printable(token) or "∅"


def fold_texts(texts: list[str], folded: frozenset[int]) -> list[str]:
    """Texts of tokens in which a run of folded ones is its number, at the first of them."""
    out, first = list(texts), -1
    for n in sorted(folded):
        first = first if n - 1 in folded else n
        out[n], out[first] = "", FOLDED.format(n + 1 - first)
    return out


def wrap(tokens: Sequence[str], widths: Sequence[int], room: int) -> Lines:
    """Whole words on a line as long as they fit; a word wider than the room breaks between its tokens; a line ends after a newline."""
    lines, first, word, used, in_word = [], 0, 0, 0, 0
    for n, token in enumerate(tokens):
        if n and (token[:1].isspace() or tokens[n - 1][-1:].isspace()):
            word, in_word = n, 0
        after_newline = n > first and tokens[n - 1].endswith("\n")
        while n > first and (after_newline or used + widths[n] > room):
            start = n if after_newline or word <= first else word
            lines.append((first, start))
            first, used, after_newline = start, in_word if start < n else 0, False
        used, in_word = used + widths[n], in_word + widths[n]
    return (*lines, (first, len(tokens))) if tokens else ()


def largest(grid: Grid) -> Spans:
    """The tokens of the largest values."""
    shown = [f"{c} {show_token(grid.cols[c], 12, fill=False)} {float(grid.shown[0, c]):{'+' if grid.signed else ''}.3f}" for _, c in grid.order[:LARGEST]]
    return [("largest ", DIM), ("  ".join(shown), PLAIN)] if shown else []


class TextView(Widget):
    """
    The tokens of a Grid of one row as wrapped text with one cursor. `changed` are the positions where the other prompt has another token. A text that
    does not fit scrolls by half a page; a strip on the right then shows the largest value of every part of it.
    """

    DEFAULT_CSS = "TextView { width: 1fr; height: 1fr; padding-left: 1; }"
    ALLOW_SELECT = False

    def __init__(self, **kw):
        super().__init__(**kw)
        self.grid: Grid | None = None
        self.at, self.origin, self.mode = 0, 0, "colour"
        self.message: Spans = []
        self.changed: frozenset[int] = frozenset()
        self.faded: frozenset[int] = frozenset()
        self.folded: frozenset[int] = frozenset()
        self.laid: tuple | None = None  # what the lines were wrapped for
        self.lines: Lines = ()
        self.texts: list[str] = []
        self.drawn: list[Strip] = []

    def show(
        self,
        grid: Grid | None,
        at: int,
        mode: str,
        message: Spans | None = None,
        changed: frozenset[int] = frozenset(),
        faded: frozenset[int] = frozenset(),
        folded: frozenset[int] = frozenset(),
    ) -> None:
        """
        Draw these numbers with the cursor at a token; without a grid, a message. Lines that stay as they are are not painted again. Tokens that are `faded` are
        dim, and of those that are `folded` only their number stands there.
        """
        self.grid, self.at, self.mode, self.message, self.changed, self.faded, self.folded = grid, at, mode, message or [], changed, faded, folded
        before, self.drawn = self.drawn, self.strips() if self.size else []
        if not self.size or len(before) != len(self.drawn):
            self.refresh()
        elif rows := [y for y, (a, b) in enumerate(zip(before, self.drawn)) if a != b]:
            self.refresh(*(Region(self.gutter.left, y, self.size.width, 1) for y in rows))

    # ---------------------------------------------------------------- what goes where

    @property
    def per(self) -> int:
        """Rows of the screen to a line of text: numbers stand under their tokens."""
        return 2 if self.mode == "number" else 1

    @property
    def down(self) -> int:
        """Lines of text in view."""
        return max(1, self.size.height // self.per)

    @property
    def layout_key(self) -> tuple:
        return tuple(self.grid.cols), self.mode, self.size.width, self.folded

    def lay_out(self) -> None:
        if self.layout_key == self.laid:
            return
        self.laid = self.layout_key
        self.texts = fold_texts([self.shown_as(token) for token in self.grid.cols], self.folded)
        self.margin = len(str(len(self.texts))) + 1
        tokens = [text if n in self.folded else token for n, (token, text) in enumerate(zip(self.grid.cols, self.texts))]
        self.lines = wrap(tokens, [width_of(text) for text in self.texts], max(4, self.size.width - self.margin - 1))

    def shown_as(self, token: str) -> str:
        """Cells and blocks are for an overview: two characters of a token, or one of colour alone."""
        room = max(4, self.size.width - self.margin_of() - 1)
        text = as_written(token)
        match self.mode:
            case "cells":
                return fit(text.strip() or text, 2)
            case "blocks":
                return " "
            case "number":
                return fit(text, min(max(width_of(text) + 1, NUMBER + 1), room))
            case "shade":
                return fit(" " + text, min(width_of(text) + 1, room))
        return text if width_of(text) <= room else show_token(text, room)

    def margin_of(self) -> int:
        return len(str(len(self.grid.cols))) + 1

    def line_of(self, at: int) -> int:
        return next((n for n, (_, last) in enumerate(self.lines) if at < last), max(len(self.lines) - 1, 0))

    def walk(self, at: int, rows: int, cols: int) -> int:
        """The token so many lines and tokens further: in another line the one below or above."""
        if self.grid is None or not self.size:
            return at + cols
        self.lay_out()
        if rows and self.lines:
            here = self.line_of(at)
            first = self.lines[here][0]
            x = sum(width_of(t) for t in self.texts[first:at])
            line = max(0, min(here + rows, len(self.lines) - 1))
            first, last = self.lines[line]
            if line == here:
                at = 0 if rows < 0 else len(self.texts) - 1
            else:
                ends = np.cumsum([width_of(t) for t in self.texts[first:last]])
                at = min(first + int((ends <= x).sum()), last - 1)
        return max(0, min(at + cols, len(self.texts) - 1))

    def about(self) -> Spans:
        """The token under the cursor: its number and rank, and the largest of all."""
        g, c = self.grid, self.at
        if g is None or not c < len(g.cols):
            return []
        value = float(g.shown[0, c])
        size = np.abs(g.values[0]) if g.signed else g.values[0]
        rank = f" rank {1 + int((size > size[c]).sum())} of {len(g.order)}" if value == value else ""
        said = f"{value:{'+' if g.signed else ''}.3f}" if value == value else "—"
        return [(f" {g.rows[0]} @{c} {show_token(g.cols[c])} ", BOLD), (said, BOLD), (f"{rank}  ", PLAIN), *largest(g)]

    # ---------------------------------------------------------------- drawing

    def strips(self) -> list[Strip]:
        """Every row of the screen that the widget has."""
        width, height = self.size
        if self.grid is None:
            return [strip_of(self.message if y == height // 3 else []).adjust_cell_length(width, PLAIN) for y in range(height)]
        self.lay_out()
        self.origin = GridView.page(self.line_of(self.at), self.origin, self.down, len(self.lines))
        rows = [row for line in self.lines[self.origin : self.origin + self.down] for row in self.rows_of(*line)]
        out = [strip_of(spans).adjust_cell_length(width, PLAIN) for spans in rows[:height]]
        out += [Strip.blank(width, PLAIN)] * (height - len(out))
        return self.with_bar(out) if len(self.lines) > self.down else out

    def rows_of(self, first: int, last: int) -> list[Spans]:
        """A line of text: the number of its first token, its tokens, and in number mode their numbers below."""
        here = first <= self.at < last
        text: Spans = [(f"{first:>{self.margin - 1}} ", BOLD if here else DIM)]
        text += [(self.shaded(c), self.style_of(c)) for c in range(first, last)]
        if self.per == 1:
            return [text]
        numbers = [(fit("" if c in self.folded else self.number(c), width_of(self.texts[c])), BOLD if c == self.at else DIM) for c in range(first, last)]
        return [text, [(" " * self.margin, PLAIN), *numbers]]

    def number(self, c: int) -> str:
        value = float(self.grid.shown[0, c])
        digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
        return "" if value != value else f"{'~' if (0, c) in self.grid.noise else ''}{value:.{digits}f}"

    def shaded(self, c: int) -> str:
        """The token; without colour a shade stands before it, or in its place."""
        if self.mode == "shade":
            return self.texts[c] if c in self.folded else self.shade(int(self.grid.level[0, c])) + self.texts[c][1:]
        return self.texts[c]

    def shade(self, level: int) -> str:
        n = len(self.grid.ramp)
        share = 0.0 if level < 0 else abs(2 * level + 1 - n) / n if self.grid.signed else level / (n - 1)
        return SHADES[min(int(share * len(SHADES)), len(SHADES) - 1)]

    def style_of(self, c: int) -> Style:
        g, level = self.grid, int(self.grid.level[0, c])
        if c == self.at:
            return CURSOR_PLAIN if self.mode == "shade" else CURSOR
        plain = CHANGED if c in self.changed else DIM if c in self.faded else PLAIN
        if c in self.folded:
            return DIM
        middle = (len(g.ramp) // 2 - 1, len(g.ramp) // 2) if g.signed else (0,)
        dark = self.mode in ("cells", "blocks")  # there the token is seen by its colour
        if level < 0 or (0, c) in g.noise or self.mode == "shade" or level in middle and not dark:
            style = plain
        else:
            style = on(g.ramp[level], True)
        return style + Style(underline=True) if (0, c) in g.marks else style

    def with_bar(self, rows: list[Strip]) -> list[Strip]:
        """Where in the text the view is, and the largest value of each part of it."""
        g, n = self.grid, len(self.lines)
        first = [a for a, _ in self.lines]
        sizes = np.nan_to_num(np.abs(g.values[0]), nan=-np.inf)
        best = np.array([a + int(sizes[a:b].argmax()) for a, b in self.lines])
        levels = strip_of_maxima(replace(g, values=g.values[0][best][:, None], rows=[""] * len(first), cols=["max"], marks=frozenset()), len(rows), 0)
        place = range(self.origin * len(levels) // n, -(-(self.origin + self.down) * len(levels) // n))
        out = []
        for y, row in enumerate(rows):
            level = int(levels[y]) if y < len(levels) else -1
            text = "│" if y in place else self.shade(level) if self.mode == "shade" else " "
            colour = DIM if level < 0 or self.mode == "shade" else on(g.ramp[level])
            out.append(Strip.join([row.adjust_cell_length(self.size.width - 1, PLAIN), strip_of([(text, colour)])]))
        return out

    def render_line(self, y: int) -> Strip:
        if not self.size:
            return Strip.blank(self.region.width, PLAIN)
        if len(self.drawn) != self.size.height or self.grid is not None and self.laid != self.layout_key:
            self.drawn = self.strips()
        return self.drawn[y]
