"""What opens over the screen and takes the keys: a list to choose from, fields to edit, lines to read."""

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.style import Style
from rich.text import Text
from textual import events
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widgets import Input

from utils import GLYPHS, shortened, width_of
from vocabulary.nodes import UserError
from widgets import BAD, CURSOR_PLAIN, DIM, HEAD, PLAIN, GridView, Lines, Spans

ESCAPES = {"\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
LONGEST = 50_000  # characters of a field: a prompt of any context that fits the screen, and each key still drawn at once
CONSOLE = Console()  # what Rich wraps and takes styles apart with
UNESCAPE = re.compile(r"\\(?:([ntr\\])|u\{([0-9a-fA-F]{1,6})\})")


def escape_line(text: str) -> str:
    """A text in one editable line: newline as \\n, tab as \\t, what can't be printed as \\u{1b}, backslash doubled."""
    return "".join(ESCAPES.get(c) or (c if GLYPHS[ord(c)] == c else f"\\u{{{ord(c):x}}}") for c in text)


def unescape_line(text: str) -> str:
    """What `escape_line` wrote; a code that is no character (a lone surrogate) stays as it is typed."""
    names = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
    is_char = lambda code: code < 0xD800 or 0xDFFF < code < 0x110000  # noqa: E731
    return UNESCAPE.sub(lambda m: names[m[1]] if m[1] else chr(int(m[2], 16)) if is_char(int(m[2], 16)) else m[0], text)


class Field(Input):
    """A one-line input that does not blink and pastes several lines as \\n instead of dropping all but the first."""

    BINDINGS = [Binding("ctrl+c", "app.noop", show=False)]

    def __init__(self, value: str = "", **kw):
        super().__init__(value, compact=True, select_on_focus=False, **kw)
        self.cursor_blink = False

    def _on_paste(self, event: events.Paste) -> None:
        event.stop()
        event.prevent_default()
        text = event.text if len(event.text) > LONGEST else escape_line(event.text)
        if len(self.value) + len(text) > LONGEST:
            raise UserError(f"a field holds {LONGEST} characters, and the pasted text has {len(text)}: put a long prompt into a .jsonl file, which o opens")
        self.insert_text_at_cursor(text)


class Overlay(Vertical, can_focus=True):
    """
    What opens over the lower part of the screen and takes the keys until esc. It has the focus from the moment it is mounted, and what is typed
    before its field is there goes into the field, so that a burst of keys never runs as commands.
    """

    DEFAULT_CSS = "Overlay { dock: bottom; height: auto; max-height: 80%; layer: overlay; background: ansi_default; border-top: solid ansi_bright_blue; }"
    BINDINGS = [Binding("escape", "close", show=False)]
    closing = False
    head: Lines | None = None  # the line that names it

    @dataclass
    class Closed(Message):
        pass

    def action_close(self) -> None:
        self.closing = True
        self.remove()
        self.post_message(self.Closed())

    def first_field(self) -> "Field | None":
        return None

    def hints(self) -> list[tuple[str, str]]:
        """Its keys and what they do, for the hint line."""
        return [("esc", "close")]

    def take_focus(self) -> None:
        """Focus what takes the keys here."""
        self.screen.set_focus(self.first_field() or self)

    def complain(self, text: str) -> None:
        """An error, where the eye is."""
        if self.head is not None:
            lines = textwrap.wrap(text, max(self.app.size.width - 2, 10))
            self.head.styles.height = len(lines)
            self.head.show([[(f" {line} ", BAD)] for line in lines])

    def on_paste(self, event: events.Paste) -> None:
        if (field := self.first_field()) is not None:
            field._on_paste(event)

    def on_key(self, event: events.Key) -> None:
        field = self.first_field()
        if field is not None and event.is_printable:  # typed before the field had the focus
            field.replace(event.character, *field.selection)
            event.stop()
            event.prevent_default()


def opened(app) -> list[Overlay]:
    """The overlays that are open, the topmost last."""
    return [o for o in app.screen.children if isinstance(o, Overlay) and not o.closing]


@dataclass(frozen=True)
class Item:
    key: str
    label: str
    note: str = ""
    value: object = None


def columns(items: list[Item], width: int) -> Callable[[Item], tuple[str, str, str]]:
    """What stands in a list's three columns: a label that needs the room of its note has it, and what does not fit ends in …."""
    widest = lambda texts: max(map(width_of, texts), default=0)  # noqa: E731
    wide = min(widest(i.key for i in items) + 2, max(width // 2, 14))
    room = width - wide
    name = min(widest(i.label for i in items) + 2, max(12, room // 2, room - widest(i.note for i in items)))

    def texts(item: Item) -> tuple[str, str, str]:
        needs = max(name, width_of(item.label) + 1)
        beside = item.note if needs == name or needs + width_of(item.note) <= room else ""
        return shortened(item.key, wide - 2) + "  ", shortened(item.label, needs if beside else room), shortened(beside, room - needs).rstrip()

    return texts


class Picker(Overlay):
    """
    A list to filter by typing and run from by enter. `chosen(item, typed)` is called with the item, or None and what was typed; `gone()` when it closes.
    """

    BINDINGS = [
        Binding("up,ctrl+p", "step(-1)", show=False),
        Binding("down,ctrl+n,tab", "step(1)", show=False),
        Binding("pageup", "step(-10)", show=False),
        Binding("pagedown", "step(10)", show=False),
    ]
    DEFAULT_CSS = "Picker > .list { height: auto; }"

    def __init__(
        self,
        title: str,
        items: list[Item],
        chosen: Callable[[Item | None, str], None],
        free: bool = False,
        start: str = "",
        gone: Callable[[], None] = lambda: None,
        **kw,
    ):
        super().__init__(**kw)
        self.title, self.items, self.chosen, self.free, self.gone, self.at = title, items, chosen, free, gone, 0
        self.head, self.field, self.list = Lines(), Field(start), Lines(classes="list")

    def compose(self) -> ComposeResult:
        yield self.head
        yield self.field
        yield self.list

    def first_field(self) -> Field:
        return self.field

    def hints(self) -> list[tuple[str, str]]:
        return [("type", "to filter, or what is not listed" if self.free else "to filter"), ("↑↓", "choose"), ("⏎", "take"), ("esc", "close")]

    def on_mount(self) -> None:
        self.take_focus()
        self.draw()

    def action_close(self) -> None:
        super().action_close()
        self.gone()

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
        texts, rows = columns(self.items, self.app.size.width - 1), []
        for n, i in enumerate(found):
            style = CURSOR_PLAIN if n == self.at else PLAIN
            key, label, note = texts(i)
            rows.append([(" " + key, style or HEAD), (label, style), (note, DIM if n != self.at else style)])
        if not found:
            rows = [[("  enter takes what you typed" if self.free and self.field.value else "  nothing matches", DIM)]]
        self.list.styles.height = height
        self.list.show(rows, top)
        self.head.show([[(f" {self.title} ", HEAD), (f" {len(found)} of {len(self.items)}", DIM)]])

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
    """Fields to edit, with lines below that `edited` may fill as one types. `accept(values)` returns an error line, or "" to close."""

    BINDINGS = [
        Binding("tab,down", "field(1)", show=False, priority=True),
        Binding("shift+tab,up", "field(-1)", show=False, priority=True),
        Binding("ctrl+t", "ids", show=False, priority=True),
    ]
    DEFAULT_CSS = "Editor > Horizontal { height: 1; } Editor .name { width: 12; } Editor > .preview { height: 6; }"

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
        self.title, self.names, self.accept, self.start, self.rows, self.hint = title, [n for n, _ in fields], accept, focus, preview, hint
        self.fields = [Field(escape_line(v)) for _, v in fields]
        self.head, self.preview, self.ids = Lines(), Lines(classes="preview"), False
        if select:  # at once: a burst of keys replaces what is proposed, as slow ones do
            self.first_field().action_select_all()

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
        self.edited()

    def first_field(self) -> Field:
        return self.fields[self.start]

    def hints(self) -> list[tuple[str, str]]:
        return [("⏎", "accept"), ("esc", "leave it as it was"), *([("tab", "next field")] if len(self.fields) > 1 else [])]

    def edited(self) -> None:
        """Called when it opens and whenever something was typed."""

    def values(self) -> list[str]:
        return [unescape_line(f.value) for f in self.fields]

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        self.edited()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        error = self.accept(self.values())
        if error:
            self.complain(error)
        else:
            self.action_close()

    def action_field(self, by: int) -> None:
        at = next((n for n, f in enumerate(self.fields) if f.has_focus), 0)
        self.fields[(at + by) % len(self.fields)].focus()

    def action_ids(self) -> None:
        self.ids = not self.ids
        self.edited()


def wrapped(row: Spans, width: int) -> list[Spans]:
    """A row as lines of whole words, each indented as the row is."""
    if sum(width_of(text) for text, _ in row) <= width:
        return [row]
    text = Text.assemble(*row)
    indent = len(text.plain) - len(text.plain.lstrip())
    lines = text[indent:].wrap(CONSOLE, max(width - indent - 1, 8))
    return [[(" " * indent, PLAIN), *((s.text, s.style or PLAIN) for s in line.render(CONSOLE))] for line in lines]


class Panel(Overlay):
    """Lines to read; j and k scroll or select, `keys` maps further keys to functions of the selected line's number; any other key closes it and acts."""

    DEFAULT_CSS = "Panel > .list { height: auto; }"

    def __init__(
        self,
        title: str,
        rows: list[Spans],
        hint: str = "",
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

    def hints(self) -> list[tuple[str, str]]:
        return [("jk", "choose" if self.select else "scroll"), *([("⏎", "take")] if "enter" in self.keys else []), ("esc", "close")]

    def replace(self, rows: list[Spans]) -> None:
        self.rows = rows
        self.draw()

    def draw(self) -> None:
        shown = self.rows if self.select else [line for row in self.rows for line in wrapped(row, self.app.size.width)]
        height = max(1, min(len(shown), self.app.size.height * 4 // 5 - 3))
        self.at = max(0, min(self.at, len(shown) - (1 if self.select else height)))
        top = GridView.page(self.at, 0, height, len(shown)) if self.select else self.at
        rows = [[(t, s + Style(reverse=True)) for t, s in r] if self.select and n == self.at else r for n, r in enumerate(shown)]
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
