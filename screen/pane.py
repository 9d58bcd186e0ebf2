"""
What a pane is. A technique's pane.py names its class PANE: its views, its keys, what it asks of the engine, how it draws the answers and what the cursor's
keys move. The app holds the state, the cursor and the replies; a pane draws from them, and keeps only what is its own (a scroll position, a walk).
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.geometry import Region, Size
from textual.widget import Widget

from techniques.features.requests import SaeInfo
from techniques.output.requests import Side
from vocabulary.names import same_model
from vocabulary.nodes import Node
from vocabulary.prompts import Study, TokenRow
from vocabulary.requests import ModelInfo
from screen.client import Client
from screen.cursor import Cursor, clip
from screen.explain import Explained
from screen.keys import Action, Part
from screen.maps import least_height, legend, most_height
from screen.overlays import Item, Overlay
from screen.pictures import kept_cells, scale, texts_of
from screen.replies import Requests
from screen.session import VIEWS, Session, State
from screen.template import by_template, faded, folded
from screen.textview import TextView
from utils import width_of
from widgets import BOLD, DIM, FOCUS, HEAD, PLAIN, RULE, Grid, GridView, Lines, Same, Spans


class Host(Protocol):
    """What panes and actions use of the app."""

    session: Session
    state: State
    study: Study  # what analyses run on
    info: ModelInfo | None  # of the loaded model
    busy: str  # what it is doing while there is none
    client: Client
    requests: Requests
    shared: object  # what is known of an engine that others look at too
    cursor: Cursor
    tokens: Side | None  # of the run that is shown
    pane: str  # the key of the pane in focus
    panes: "dict[str, Pane]"
    scopes: dict[str, str]  # of each pane: whether actions act on all positions ("all") or the cursor's ("here")
    table: tuple[Action, ...]
    known_saes: dict[str, SaeInfo]  # of those that were loaded, by source
    marks: "dict[str, tuple[str, Cursor]]"  # places to come back to: pane and cursor, by a letter
    needle: str  # what is searched for, and where it is, as arguments of move
    matches: list[dict]
    memory: tuple[int, int, int]  # bytes of the engine, of its device, of its cache
    failed: str  # why the model that was asked for is not there
    size: Size

    def act(self, name: str, /, **args: object) -> None: ...  # change the state through the session, then show it
    def move(self, **where: object) -> None: ...  # the cursor
    def clamp(self) -> None: ...  # it to the model and the prompt
    def say(self, text: str, style=PLAIN) -> None: ...  # in the status line
    def open(self, overlay: Overlay) -> None: ...
    def draw(self) -> None: ...
    def refresh_wants(self) -> None: ...  # ask for what the panes lack now, and draw
    def show_pane(self, name: str) -> None: ...
    def visible_panes(self) -> list[str]: ...
    def guard(self, what: Callable[[], object]) -> None: ...  # run it; what the user did wrong is said in the status line
    def ready(self) -> None: ...  # UserError while there is no model
    def node(self) -> Node: ...  # that actions act on
    def length(self) -> int: ...  # of the prompt at hand in tokens
    def counted(self) -> bool: ...  # whether that is the prompt of the state


class Pane(Vertical, can_focus=True):
    """A title line (number, name, convention, scale), a body, and one line about the cell under the cursor."""

    DEFAULT_CSS = """
    Pane { position: absolute; width: 100%; height: 100%; } Pane.aside { border-left: solid ansi_bright_black; padding-left: 1; } Pane > Horizontal { height: 1fr; } Pane > Lines.table { height: 1fr; }
    Pane .side { width: 34; height: 1fr; padding-left: 1; } Pane .second { width: 1fr; height: 1fr; padding-left: 1; }
    """
    number, key, label, about, wide = "?", "", "", "", True
    views: dict[str, tuple[str, ...]] = {}  # what it can show: names and values, the first of each at first
    view = ""  # the one of them that `v` lists
    text_view = ""  # the one that turns to the prompt as text, "" where there is none; its first value is off
    explained: dict[str, Explained] = {}  # what each variant measures, by the name that `variants` gives it
    differences = True  # whether `f` turns to differences of runs too
    scope = "all"  # whether actions act on all positions or the cursor's ("here")
    keys: tuple[Action | Part, ...] = ()
    hints: tuple[str, ...] = ()  # ids of the actions that the hint line shows
    urgent: tuple[str, ...] = ()  # slots that are answered before others
    leads_on: tuple[type, ...] = ()  # results on which depends what it asks next

    def __init__(self, **kw):
        super().__init__(**kw)
        self.title_line, self.info_line = Lines(), Lines(whole=True)
        self.text = TextView(classes="second")
        self.said = ("", "")  # title and convention as they stand in the title line
        self.drawn: dict[str, tuple[tuple, Grid]] = {}

    def body(self) -> Widget:
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        yield self.title_line
        yield self.body()
        yield self.info_line

    def on_resize(self) -> None:
        """Also when it is first shown: it is drawn, and again when its parts have the sizes that this gives them."""
        self.app.draw()
        self.call_after_refresh(self.app.draw)

    # ---------------------------------------------------------------- asking

    def wants(self, app: Host) -> dict[str, object]:
        """The requests whose results this pane draws, by slot."""
        return {}

    def merge(self, before: object | None, part: object) -> object:
        """What is shown of a result that comes in parts: the newest part, unless parts have to be put together."""
        return part

    def scatters(self, app: Host) -> object | None:
        """What is asked here over the whole set, which can run in shards."""
        return None

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        """Turn the session to what makes this pane ask for exactly this; False where it is none of its requests."""
        return False

    # ---------------------------------------------------------------- the cursor

    def step(self, app: Host, rows: int, cols: int) -> None:
        """Move the cursor."""

    def across(self, app: Host, by: int) -> None:
        """What , and . do: the position."""
        app.move(pos=clip(app.cursor.pos + by, app.length()))

    def page(self) -> int:
        """Rows that a page has: those in view."""
        shown = [w for w in self.query("GridView, TextView") if w.size and w.display]
        return max((w.down * (w.density.per if isinstance(w, GridView) and w.laid else 1) for w in shown if getattr(w, "grid", None)), default=10)

    def node(self, app: Host, pos: int | None) -> Node:
        """The node under the cursor, that actions act on."""
        c = app.cursor
        return Node("head", c.layer, c.head, pos=pos) if c.comp == "head" else Node(c.comp, c.layer, pos=pos)

    def doing(self, app: Host) -> list[tuple[str, str]]:
        """Keys (and what they do) that matter most just now, for the hint line: what was drilled into, and how to leave it."""
        return []

    def choices(self, app: Host) -> tuple[str, ...]:
        """The values that `v` offers."""
        return VIEWS[self.view]

    def variants(self, app: Host) -> tuple[str, ...]:
        """Which of `explained` is on the screen now."""
        return (app.state.views[self.view],) if self.view else ()

    def back(self, app: Host) -> bool:
        """Leave what was drilled into; whether there was something to leave."""
        return False

    def leave(self) -> None:
        """Another pane gets the focus."""

    # ---------------------------------------------------------------- finding

    def find(self, app: Host, needle: str) -> list[dict]:
        """Where a text occurs, each as arguments of app.move."""
        texts = app.tokens.tokens.texts if app.tokens else ()
        return [{"pos": n} for n, text in enumerate(texts) if needle.lower() in text.lower()]

    def shows(self, node: Node) -> bool:
        """Whether the cursor can stand on such a node here."""
        return False

    def go_to(self, app: Host, node: Node) -> str:
        """Put the cursor on a node (not its position); what stops that, or ""."""
        where = {"point": node.site} if node.site.startswith("resid") else {"comp": node.site if node.site in ("attn", "mlp") else "head"}
        app.move(layer=node.layer, **where, **({"head": node.head} if node.head is not None else {}))
        return ""

    # ---------------------------------------------------------------- drawing

    def paint(self, app: Host) -> None:
        """Draw from the replies; cheap, called at every change."""

    def reads(self, app: Host) -> bool:
        """Whether the prompt is shown as text."""
        return bool(self.text_view) and app.state.views[self.text_view] != VIEWS[self.text_view][0]

    def swap(self, app: Host, *instead: Widget) -> bool:
        """Put the text in the place of what else is shown, or that back; whether the prompt is shown as text."""
        reads = self.reads(app)
        self.text.set_class(not reads, "hidden")
        for widget in instead:
            widget.set_class(reads, "hidden")
        if not reads:
            self.text.grid = None
        return reads

    def show_text(self, app: Host, grid: Grid | None, message: Spans | None = None) -> None:
        """The prompt as text with these numbers (a Grid of one row), or why there are none; the line below names the cursor's."""
        known = grid is not None and app.tokens is not None and grid.cols == texts_of(app.tokens.tokens)
        marked = (f(app.state, app.tokens.tokens) for f in (faded, folded)) if known else ()
        self.text.show(grid, app.cursor.pos, app.state.views["mode"], message, differing(app) if known else frozenset(), *marked)
        self.info_line.show([self.text.about()])

    def height_needed(self) -> int:
        """Lines that the pane can use."""
        text = [max(4, len(self.text.lines) * self.text.per)] if self.text.grid else []
        return 2 + max([*(most_height(g) for g in self.grids().values() if g is not self.text.grid), *text], default=9)

    def height_least(self) -> int:
        """Lines in which its maps are whole."""
        return 2 + max([least_height(g) for g in self.grids().values() if g is not self.text.grid], default=8)

    def width_needed(self) -> int:
        """Columns that the pane can use beside others."""
        return 78

    def show_title(self, app: Host, slots: tuple[str, ...], title: str, note: str, grid: Grid | None = None) -> None:
        """The rule above the pane: its name, what is shown, the colours with their numbers (of `grid`), and as much of the convention as fits whole."""
        late = app.requests.late(slots)
        self.said = (f"{late}{title}{f' {scale(grid)}' if grid else ''}", note)
        parts = note.split(" · ")  # the first says the state: it is there before the colours are, and where there is room before the last of the title
        state = min(width, 20) + 4 if (width := width_of(parts[0])) <= 40 else 2  # what no title has room for is given none
        beside = (18 if grid is not None else 2) + (state if self.size.width >= 100 else 0)
        title = whole_parts(title, self.size.width - width_of(f"━ {self.number} {self.label}   {late}") - beside)
        rule, name = (("━", HEAD), FOCUS) if app.pane == self.key else (("─", RULE), HEAD)
        if self.title_line.rule != rule:
            self.title_line.rule = rule
            self.title_line.refresh()
        spans: Spans = [(rule[0], rule[1]), (f" {self.number} {self.label} ", name)]
        spans.append((f" {late}{title}  ", BOLD))
        if grid is not None:
            left = self.size.width - sum(width_of(text) for text, _ in spans)
            colours = legend(grid, app.state.views["mode"], max(14, left - state))
            spans += colours if sum(width_of(text) for text, _ in colours) <= left else []
        spans.append((" ", PLAIN))
        room = self.size.width - sum(width_of(text) for text, _ in spans) - 2
        fits = next((n for n in range(len(parts), 0, -1) if width_of(" · ".join(parts[:n])) <= room), 0)
        self.title_line.show([[*spans, (f" {' · '.join(parts[:fits])} " if fits and note else "", DIM)]])

    def picture(self, name: str, key: tuple, make: Callable[[], Grid]) -> Grid:
        """A grid, made anew only when what it shows changed."""
        if name not in self.drawn or self.drawn[name][0] != key:
            self.drawn[name] = (key, make())
        return self.drawn[name][1]

    def by_position(self, app: Host, name: str, grid: Grid, row: TokenRow, rows: bool = False) -> Grid:
        """A map whose columns (and `rows`) are positions of a prompt, with a chat template's tokens dim or folded away."""
        key = Same(grid), app.state.views["template"], app.state.metric.pos, rows
        return self.picture(f"{name} by position", key, lambda: by_template(app.state, grid, row, rows))

    def with_circuit(self, app: Host, name: str, key: tuple, make: Callable[[], Grid], cells: Callable[[Grid], Iterable]) -> Grid:
        """A picture in which the circuit's cells are marked; `cells` gives every cell's address."""
        current = app.state.current
        nodes = current.nodes if current and same_model(current.model, app.state.model.model) else ()
        labels = app.tokens.tokens.labels if app.tokens else {}

        def draw() -> Grid:
            grid = make()
            return replace(grid, kept=kept_cells(nodes, cells(grid), labels)) if nodes else grid

        return self.picture(name, (*key, nodes, tuple(labels.items())), draw)

    # ---------------------------------------------------------------- copying

    def copies(self, app: Host) -> list[Item]:
        """What else can be copied from this pane."""
        return []

    def copied(self, app: Host, item: Item, path: Path) -> None:
        """What y wrote of this pane, and where."""

    def grids(self) -> dict[str, Grid]:
        """The numbers behind the picture, for export."""
        return {}

    def as_text(self) -> str:
        """The pane as it stands on the screen."""
        lines = []
        for child in self.walk_children(Widget):
            if isinstance(child, Lines):
                lines.append(child.text())
            elif isinstance(child, GridView | TextView) and child.size:
                lines += [s.text.rstrip() for s in child.render_lines(Region(0, 0, *child.size))]
        return "\n".join(line for line in lines if line.strip()) + "\n"


def differing(app: Host) -> frozenset[int]:
    """Positions of the shown run where clean and corrupted have different tokens: by the alignment where there is one, else by index."""
    check, shown = app.requests.check(), app.tokens
    if shown is None or check is None or check.corrupt is None or app.state.model.against:
        return frozenset()
    a, b = check.clean.ids, check.corrupt.ids
    pairs = check.alignment or tuple((n, n) for n in range(min(len(a), len(b))))
    alike = {pair for pair in pairs if a[pair[0]] == b[pair[1]]}
    on_corrupt = shown.tokens.ids == check.corrupt.ids and check.clean.ids != check.corrupt.ids
    return frozenset(range(len(b if on_corrupt else a))) - {pair[on_corrupt] for pair in alike}


def whole_parts(title: str, room: int) -> str:
    """As many parts of a title (name, view, …, the most important first) as fit whole; the first in any case."""
    parts = title.split(" · ")
    while len(parts) > 1 and width_of(" · ".join(parts)) > room:
        parts.pop()
    return " · ".join(parts)


def step_component(app: Host, rows: int, cols: int) -> None:
    """Through layers and, across, the heads, the attention output and the MLP."""
    c = app.cursor
    columns = [("head", h) for h in range(app.info.n_heads)] + [("attn", c.head), ("mlp", c.head)]
    at = next((i for i, (k, h) in enumerate(columns) if k == c.comp and (k != "head" or h == c.head)), 0)
    comp, head = columns[clip(at + cols, len(columns))]
    app.move(layer=clip(c.layer + rows, app.info.n_layers), comp=comp, head=head)
