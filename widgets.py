"""
The panes, drawn from results by the Line API. Quantise -> style table -> merge -> cache; a cursor move repaints the lines it touches and no more.
Widgets hold no state of the hunt: they are given a picture and draw it. Never imports torch.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input

from utils import show_number, show_token, visible

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
    return Strip([Segment(text, style) for text, style in spans if text]).simplify()


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
        self.refresh(*(Region(0, y - top, self.size.width, 1) for y in changed if 0 <= y - top < self.size.height)) if changed and self.size else None

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
    how wide a cell may be; numbers under `faint` are dots; `blanks` are columns that show their name. `numbers` are shown when they differ from what is coloured (ranks on a log scale). `signed` draws outward from zero. `marks` are underlined; `kept`, the circuit's cells, end in a dot.
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
        head = "\t".join([self.corner, *(visible(c) for c in self.cols)])
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
        self.label = min(max([cell_len(r) for r in g.rows] + [cell_len(g.corner)], default=0) + 1, max(self.size.width // 3, 6))
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
            spans = [(set_cell_size(corner, self.label), DIM)]
            spans += [(show_token(g.cols[c], w - 1) + " ", BOLD if c == cursor else PLAIN) for c in cols]
            return strip_of(spans).adjust_cell_length(self.size.width, PLAIN)
        marked = cursor >= 0
        spans = [(set_cell_size(g.rows[row], self.label - 1) + " ", BOLD if marked else PLAIN)]
        levels, values = self.levels()[row], g.shown[row]
        palette, middle = (SIGNED, (len(BELOW) - 1, len(BELOW))) if g.signed else (HEATS, (0,))
        for c in cols:
            level, value = int(levels[c]), float(values[c])
            text = self.cell_text(row, c, level, value, w)
            if (row, c) in g.kept:
                text = set_cell_size(text, w - 1) + "•"
            if self.mode == "shade":
                style = CURSOR_PLAIN if c == cursor else BOLD if (row, c) in g.marks else PLAIN
            else:
                faint = level < 0 or (g.text is None and self.mode == "colour" and (level in middle or abs(value) < g.faint))
                style = CURSOR if c == cursor else PLAIN if faint else palette[level]
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


# ------------------------------------------------------------------ overlays: a picker, an editor, a panel


ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
UNESCAPE = re.compile(r"\\(?:([ntr\\])|u\{([0-9a-fA-F]{1,6})\})")


def escape_line(text: str) -> str:
    """A text in one editable line: newline as \\n, tab as \\t, what can't be printed as \\u{1b}, backslash doubled."""
    return "".join(ESCAPES.get(c) or (c if c.isprintable() else f"\\u{{{ord(c):x}}}") for c in text)


def unescape_line(text: str) -> str:
    names = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    return UNESCAPE.sub(lambda m: names[m[1]] if m[1] else chr(int(m[2], 16)) if int(m[2], 16) < 0x110000 else m[0], text)


class Field(Input):
    """A one-line input that does not blink and pastes several lines as \\n instead of dropping all but the first."""

    BINDINGS = [Binding("ctrl+c", "app.noop", show=False)]

    def __init__(self, value: str = "", **kw):
        super().__init__(value, compact=True, select_on_focus=False, **kw)
        self.cursor_blink = False

    def _on_paste(self, event: events.Paste) -> None:
        self.insert_text_at_cursor(escape_line(event.text))
        event.stop()
        event.prevent_default()


class Overlay(Vertical, can_focus=True):
    """
    What opens over the lower part of the screen and takes the keys until esc. It has the focus from the moment it is mounted, and what is typed
    before its field is there goes into the field, so that a burst of keys never runs as commands.
    """

    DEFAULT_CSS = "Overlay { dock: bottom; height: auto; max-height: 80%; layer: overlay; background: ansi_default; border-top: solid ansi_bright_blue; }"
    BINDINGS = [Binding("escape", "close", show=False)]
    closing = False

    @dataclass
    class Closed(Message):
        pass

    def action_close(self) -> None:
        self.closing = True
        self.remove()
        self.post_message(self.Closed())

    def first_field(self) -> "Field | None":
        return None

    def take_focus(self) -> None:
        """Focus what takes the keys here."""
        self.screen.set_focus(self.first_field() or self)

    def on_key(self, event: events.Key) -> None:
        field = self.first_field()
        if field is not None and event.is_printable:  # typed before the field had the focus
            field.insert_text_at_cursor(event.character)
            event.stop()
            event.prevent_default()


@dataclass(frozen=True)
class Item:
    key: str
    label: str
    note: str = ""
    value: object = None


class Picker(Overlay):
    """A list to filter by typing and run from by enter. `chosen(item, typed)` is called with the item, or None and what was typed."""

    BINDINGS = [
        Binding("up,ctrl+p", "step(-1)", show=False),
        Binding("down,ctrl+n,tab", "step(1)", show=False),
        Binding("pageup", "step(-10)", show=False),
        Binding("pagedown", "step(10)", show=False),
    ]
    DEFAULT_CSS = "Picker > .list { height: auto; }"

    def __init__(self, title: str, items: list[Item], chosen: Callable[[Item | None, str], None], free: bool = False, start: str = "", **kw):
        super().__init__(**kw)
        self.title, self.items, self.chosen, self.free, self.at = title, items, chosen, free, 0
        self.head, self.field, self.list = Lines(), Field(start), Lines(classes="list")

    def compose(self) -> ComposeResult:
        yield self.head
        yield self.field
        yield self.list

    def first_field(self) -> Field:
        return self.field

    def on_mount(self) -> None:
        self.take_focus()
        self.draw()

    def matching(self) -> list[Item]:
        words = self.field.value.lower().split()
        found = [i for i in self.items if all(w in f"{i.key} {i.label} {i.note}".lower() for w in words)]
        exact = [i for i in found if words and i.key.lower() == words[0]]
        return exact + [i for i in found if i not in exact]

    def draw(self) -> None:
        found = self.matching()
        self.at = max(0, min(self.at, len(found) - 1))
        height = max(3, min(len(self.items), self.app.size.height * 3 // 5 - 3))
        top = GridView.page(self.at, 0, height, len(found))
        wide = max([cell_len(i.key) for i in self.items], default=0) + 2
        note = max([cell_len(i.note) for i in self.items], default=0)
        name = max(12, min(max([cell_len(visible(i.label)) for i in self.items], default=0) + 2, self.app.size.width - wide - note - 2))
        rows = []
        for n, i in enumerate(found):
            style = CURSOR_PLAIN if n == self.at else PLAIN
            rows.append(
                [
                    (" " + set_cell_size(i.key, wide), style or HEAD),
                    (set_cell_size(visible(i.label), name), style),
                    (visible(i.note), DIM if n != self.at else style),
                ]
            )
        if not found:
            rows = [[("  enter takes what you typed" if self.free and self.field.value else "  nothing matches", DIM)]]
        self.list.styles.height = height
        self.list.show(rows, top)
        self.head.show([[(f" {self.title} ", HEAD), (f" {len(found)} of {len(self.items)} · type to filter · enter · esc", DIM)]])

    def on_input_changed(self) -> None:
        self.at = 0
        self.draw()

    def action_step(self, by: int) -> None:
        self.at += by
        self.draw()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        found = self.matching()
        typed = self.field.value
        item = found[self.at] if found else None
        if item is None and not (self.free and typed.strip()):
            return
        self.action_close()
        self.chosen(item, typed)


class Editor(Overlay):
    """Fields to edit, with lines below that the app fills as one types. `accept(values)` returns an error line, or "" to close."""

    BINDINGS = [
        Binding("tab,down", "field(1)", show=False, priority=True),
        Binding("shift+tab,up", "field(-1)", show=False, priority=True),
        Binding("ctrl+t", "ids", show=False, priority=True),
    ]
    DEFAULT_CSS = "Editor > Horizontal { height: 1; } Editor .name { width: 12; } Editor > .preview { height: 6; }"

    @dataclass
    class Changed(Message):
        values: list[str]

    def __init__(
        self,
        title: str,
        fields: list[tuple[str, str]],
        accept: Callable[[list[str]], str],
        focus: int = 0,
        preview: int = 0,
        hint: str = "",
        select: bool = False,
        **kw,
    ):
        super().__init__(**kw)
        self.title, self.names, self.accept, self.start, self.rows, self.hint, self.select = title, [n for n, _ in fields], accept, focus, preview, hint, select
        self.fields = [Field(escape_line(v)) for _, v in fields]
        self.head, self.preview, self.ids = Lines(), Lines(classes="preview"), False

    def compose(self) -> ComposeResult:
        yield self.head
        for name, edit in zip(self.names, self.fields):
            label = Lines(classes="name")
            label.show([[(f" {name}", DIM)]])
            yield Horizontal(label, edit)
        yield self.preview

    def on_mount(self) -> None:
        self.preview.styles.height = self.rows
        self.head.show([[(f" {self.title} ", HEAD), (f" {self.hint}", DIM)]])
        self.take_focus()
        if self.select:
            self.first_field().action_select_all()
        self.post_message(self.Changed(self.values()))

    def first_field(self) -> Field:
        return self.fields[self.start]

    def values(self) -> list[str]:
        return [unescape_line(f.value) for f in self.fields]

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.post_message(self.Changed(self.values()))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        error = self.accept(self.values())
        if error:
            self.head.show([[(f" {error} ", BAD)]])
        else:
            self.action_close()

    def action_field(self, by: int) -> None:
        at = next((n for n, f in enumerate(self.fields) if f.has_focus), 0)
        self.fields[(at + by) % len(self.fields)].focus()

    def action_ids(self) -> None:
        self.ids = not self.ids
        self.post_message(self.Changed(self.values()))


class Panel(Overlay):
    """Lines to read; j and k scroll or select, `keys` maps further keys to functions of the selected line's number; any other key closes it and acts."""

    DEFAULT_CSS = "Panel > .list { height: auto; }"

    def __init__(
        self,
        title: str,
        rows: list[Spans],
        hint: str = "esc",
        select: bool = False,
        keys: dict[str, Callable[[int], None]] | None = None,
        **kw,
    ):
        super().__init__(**kw)
        self.title, self.rows, self.hint, self.select, self.keys, self.at = title, rows, hint, select, keys or {}, 0
        self.head, self.list = Lines(), Lines(classes="list")

    def compose(self) -> ComposeResult:
        yield self.head
        yield self.list

    def on_mount(self) -> None:
        self.take_focus()
        self.draw()

    def replace(self, rows: list[Spans]) -> None:
        self.rows = rows
        self.draw()

    def draw(self) -> None:
        height = max(1, min(len(self.rows), self.app.size.height * 4 // 5 - 3))
        self.at = max(0, min(self.at, len(self.rows) - (1 if self.select else height)))
        top = GridView.page(self.at, 0, height, len(self.rows)) if self.select else self.at
        rows = [[(t, s + Style(reverse=True)) for t, s in r] if self.select and n == self.at else r for n, r in enumerate(self.rows)]
        self.list.styles.height = height
        self.list.show(rows, top)
        self.head.show([[(f" {self.title} ", HEAD), (f" {self.hint}", DIM)]])

    def on_key(self, event: events.Key) -> None:
        name = event.character if event.is_printable else event.key
        step = {"j": 1, "k": -1, "down": 1, "up": -1, "pagedown": 10, "pageup": -10, "g": -(10**6), "G": 10**6}.get(name)
        if step is not None:
            self.at += step
            self.draw()
        elif name in self.keys:
            self.keys[name](self.at)
        elif name in ("q", "escape"):
            self.action_close()
        else:
            self.action_close()
            self.app.post_message(events.Key(event.key, event.character))
        event.stop()
        event.prevent_default()
