"""
Fewer bytes to the terminal: what Textual renders is compared, cell by cell, with what the terminal already shows, and only the difference is written.

Textual 8.2 re-emits whole regions (from the pane's left edge, and the full screen on a layout change), which is what costs over SSH. It has no public
hook for this, so `Compositor` is subclassed; the pinned version and tests/test_bytes.py hold it in place. `forget()` when the terminal may differ.
"""

from functools import lru_cache

from rich.cells import cell_len
from rich.color import ColorSystem
from rich.console import Console, ConsoleOptions
from rich.style import Style
from textual._compositor import ChopsUpdate, Compositor, CompositorUpdate, LayoutUpdate
from textual.geometry import Region, Size
from textual.screen import Screen
from textual.strip import Strip

from utils import GLYPHS

Cell = tuple[str, Style | None]  # text of one column; "" is the right half of a wide character
GAP = 4  # equal cells of one style between two differing ones are cheaper to write than to jump over


@lru_cache(4096)
def lean(style: Style | None) -> Style | None:
    """The style without default colours, which a reset gives anyway, and without what is not drawn."""
    if style is None or not style:
        return None
    colour, back = (None if c is None or c.is_default else c for c in (style.color, style.bgcolor))
    plain = Style(
        color=colour, bgcolor=back, bold=style.bold or None, dim=style.dim or None, italic=style.italic or None,
        underline=style.underline or None, reverse=style.reverse or None, strike=style.strike or None,
    )  # fmt: skip
    return plain or None


def cells_of(strip: Strip) -> list[Cell]:
    """One entry a column; combining characters stay with the column they follow. What a terminal would obey is a picture here, whoever drew it."""
    cells: list[Cell] = []
    for text, style, control in strip:
        if control:
            continue
        style = lean(style)
        if text.isascii() and text.isprintable():
            cells += [(c, style) for c in text]
            continue
        for c in text.translate(GLYPHS):
            width = cell_len(c)
            if width == 0 and cells:
                cells[-1] = (cells[-1][0] + c, cells[-1][1])
            else:
                cells += [(c, style), ("", style)][:width] if width else []
    if len(cells) > (size := strip.cell_length):  # a picture takes more cells than were counted for what it stands for
        halved = cells[size][0] == ""
        cells = cells[: size - halved] + [(" ", None)] * halved
    return cells


class Difference(CompositorUpdate):
    """An update that is reduced to what differs at the moment it is written."""

    def __init__(self, owner: "TightCompositor", lines: list[tuple[int, int, list[Cell]]], size: Size, whole: CompositorUpdate | None = None):
        self.owner, self.lines, self.size, self.whole = owner, lines, size, whole

    def __rich_console__(self, console: Console, options: ConsoleOptions):
        yield from self.whole.__rich_console__(console, options)  # a screenshot, not the terminal

    def render_segments(self, console: Console) -> str:
        """The escape sequences, given console's colour system."""
        shown, pen, row = self.owner.screen_cells(self.size), Pen(console._color_system), -1
        for y, x, new in self.lines:
            old = shown[y]
            for start, stop in changes(old[x : x + len(new)], new):
                pen.out.append(f"\x1b[{x + start + 1}G" if y == row else f"\x1b[{y + 1};{x + start + 1}H")
                for text, style in new[start:stop]:
                    pen.write(text, style)
                row = y
            old[x : x + len(new)] = new
        return pen.close()


class Pen:
    """Writes text with as few style changes as the last style allows."""

    def __init__(self, system: ColorSystem | None):
        self.system, self.style, self.out = system, None, []

    def write(self, text: str, style: Style | None) -> None:
        if style != self.style:
            if self.system is not None:
                self.out.append(transition(self.style, style, self.system))
            self.style = style
        self.out.append(text)

    def close(self) -> str:
        if self.style is not None and self.system is not None:
            self.out.append("\x1b[0m")
        return "".join(self.out)


@lru_cache(4096)
def codes(style: Style | None, system: ColorSystem) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """SGR codes of a style: attributes, foreground, background."""
    if style is None:
        return (), (), ()
    attributes = ((style.bold, "1"), (style.dim, "2"), (style.italic, "3"), (style.underline, "4"), (style.reverse, "7"), (style.strike, "9"))
    colours = (tuple(c.downgrade(system).get_ansi_codes(foreground=f)) if c else () for c, f in ((style.color, True), (style.bgcolor, False)))
    return (tuple(code for wanted, code in attributes if wanted), *colours)


@lru_cache(16384)
def transition(old: Style | None, new: Style | None, system: ColorSystem) -> str:
    """The shortest escape sequence from one style to another."""
    was, now = codes(old, system), codes(new, system)
    if any(a and not b for a, b in zip(was[1:], now[1:])) or set(was[0]) - set(now[0]):
        parts = ["0", *now[0], *now[1], *now[2]]
    else:
        parts = [c for c in now[0] if c not in was[0]] + [c for a, b in zip(was[1:], now[1:]) if a != b for c in b]
    return f"\x1b[{';'.join(parts)}m" if parts else ""


def changes(old: list[Cell | None], new: list[Cell]) -> list[tuple[int, int]]:
    """Ranges of `new` to write, widened to whole wide characters, near ones joined."""
    runs: list[list[int]] = []
    for n, (a, b) in enumerate(zip(old, new)):
        if a != b:
            if runs and len(gap := new[runs[-1][1] : n]) <= GAP and all(c[1] == new[runs[-1][1] - 1][1] for c in gap):
                runs[-1][1] = n + 1
            else:
                runs.append([n, n + 1])
    for run in runs:
        while run[0] > 0 and new[run[0]][0] == "":
            run[0] -= 1
        while run[1] < len(new) and new[run[1]][0] == "":
            run[1] += 1
    return [(a, b) for a, b in runs]


class TightCompositor(Compositor):
    """A compositor that remembers what the terminal shows."""

    shown: list[list[Cell | None]] | None = None
    shown_size: Size | None = None

    def forget(self) -> None:
        self.shown = None

    def screen_cells(self, size: Size) -> list[list[Cell | None]]:
        if self.shown is None or self.shown_size != size:
            self.shown, self.shown_size = [[None] * size.width for _ in range(size.height)], size
        return self.shown

    def render_partial_update(self) -> CompositorUpdate | None:
        update = super().render_partial_update()
        if not isinstance(update, ChopsUpdate):
            return update
        lines = []
        for y, x1, x2 in update.spans:
            for end, (x, strip) in zip(update.chop_ends[y], update.chops[y].items()):
                if strip is not None and x < x2 and end > x1:
                    first, last = max(x, x1), min(end, x2)
                    lines.append((y, first, cells_of(strip.crop(first - x, last - x))))
        return Difference(self, lines, self.size, update)

    def render_full_update(self, simplify: bool = False) -> CompositorUpdate:
        update = super().render_full_update(simplify)
        assert isinstance(update, LayoutUpdate)
        region: Region = update.region
        lines = [(y, region.x, cells_of(Strip.join(line).crop(0, region.width))) for y, line in enumerate(update.strips, region.y)]
        return Difference(self, lines, self.size, update)


class TightScreen(Screen):
    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self._compositor = TightCompositor()

    def forget(self) -> None:
        """The terminal may show something else now: write everything once more."""
        self._compositor.forget()
        self.refresh(layout=True)

    def on_screen_resume(self) -> None:
        self._compositor.forget()
