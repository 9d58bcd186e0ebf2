"""Going far with few keys: pages, ends, counts, a position by number or label, where the prompts differ, marks. Each takes the app."""

from collections.abc import Callable
from dataclasses import asdict

from textual import events

from vocabulary.nodes import UserError
from screen import actions
from screen.keys import show_key
from screen.overlays import Overlay
from screen.pane import Host, differing
from utils import show_token
from widgets import BOLD, DIM, HEAD, Lines, Spans

FAR = 10**6


# ------------------------------------------------------------------ far along


def page(app: Host, by: float) -> None:
    """Rows, or lines of text, by pages."""
    if app.info is not None:
        rows = max(1, round(abs(by) * app.panes[app.pane].page()))
        actions.step(app, rows if by > 0 else -rows, 0)


def next_difference(app: Host, by: int = 1) -> None:
    """The position after (or before) the cursor's where clean and corrupted have different tokens."""
    app.ready()
    if app.state.model.against:
        raise UserError("both models read the same tokens: there is no position where the two runs differ")
    if app.state.prompt.corrupt is None:
        raise UserError("there is no corrupted prompt to differ from: E types one, o opens a set")
    places, pos = sorted(differing(app)), app.cursor.pos
    if not places:
        raise UserError("clean and corrupted have the same tokens")
    beyond = [n for n in places if (n - pos) * by > 0]
    n = len(beyond) and (beyond[min(by, len(beyond)) - 1] if by > 0 else beyond[max(by, -len(beyond))])
    at = n if beyond else places[0 if by > 0 else -1]
    app.move(pos=at)
    app.say(f"difference {places.index(at) + 1} of {len(places)}, at {at} {show_token(app.tokens.tokens.texts[at]) if app.tokens else ''}")


# ------------------------------------------------------------------ keys after a key


class Prefix(Overlay):
    """One line that takes the keys after a prefix key; `take(keys so far)` returns whether they are complete."""

    def __init__(self, title: str, hint: str, take: Callable[[tuple[str, ...]], bool], rows: list[Spans] = (), **kw):
        super().__init__(**kw)
        self.title, self.hint, self.take, self.rows, self.typed, self.head = title, hint, take, list(rows), (), Lines()

    def compose(self):
        self.list = Lines()
        self.list.styles.height = len(self.rows)
        yield self.head
        yield self.list

    def on_mount(self) -> None:
        self.take_focus()
        self.list.show(self.rows)
        self.draw()

    def draw(self) -> None:
        self.head.show([[(f" {self.title} ", HEAD), (f"{''.join(self.typed)} ", BOLD), (f" {self.hint}", DIM)]])

    def on_key(self, event: events.Key) -> None:
        event.stop()
        event.prevent_default()
        if event.key == "escape":
            self.action_close()
            return
        self.typed = (*self.typed, event.character if event.is_printable else event.key)
        done: list[bool] = []
        self.app.guard(lambda: done.append(self.take(self.typed)))
        if done != [False]:  # complete, or a line says what was wrong
            self.action_close()
        else:
            self.draw()


COUNTED: dict[str, Callable[[Host, int], None]] = {
    "left": lambda app, n: actions.step(app, 0, -n),
    "right": lambda app, n: actions.step(app, 0, n),
    "down": lambda app, n: actions.step(app, n, 0),
    "up": lambda app, n: actions.step(app, -n, 0),
    "layer_down": lambda app, n: actions.step_layer(app, -n),
    "layer_up": lambda app, n: actions.step_layer(app, n),
    "pos_left": lambda app, n: actions.across(app, -n),
    "pos_right": lambda app, n: actions.across(app, n),
    "page_down": page,
    "page_up": lambda app, n: page(app, -n),
    "half_down": lambda app, n: page(app, n / 2),
    "half_up": lambda app, n: page(app, -n / 2),
    "next_difference": next_difference,
    "previous_difference": lambda app, n: next_difference(app, -n),
    "find_next": actions.find_next,
    "find_previous": lambda app, n: actions.find_next(app, -n),
    "next_prompt": lambda app, n: repeat(app, "next_prompt", n),
    "previous_prompt": lambda app, n: repeat(app, "previous_prompt", n),
}


def repeat(app: Host, name: str, n: int) -> None:
    do = next(a for a in app.table if a.id == name).do
    for _ in range(min(n, len(app.state.prompt_set))):
        do(app)


def count(app: Host) -> None:
    """12l: twelve to the right; 12⏎: to position 12."""
    app.ready()
    by_key = {show_key(k): a.id for a in app.table for k in a.keys.split(",") if a.id in COUNTED}

    def take(keys: tuple[str, ...]) -> bool:
        *digits, last = keys
        if last.isascii() and last.isdigit() or last in ("-", "@") and not digits:
            return len(keys) > 9
        number = "".join(digits)
        if last == "enter" and number:
            actions.to_position(app, actions.position_of(app, number))
        elif show_key(last) in by_key and number.isdigit():
            COUNTED[by_key[show_key(last)]](app, int(number))
        else:
            raise UserError("; takes a number, then a key that moves (12l) or ⏎ (to position 12; -1⏎ is the last)")
        return True

    app.open(Prefix("count", "then h j k l , . [ ] } n or a page: so many · ⏎: to that position, -1⏎ the last", take))


# ------------------------------------------------------------------ marks


def set_mark(app: Host) -> None:
    app.ready()

    def take(keys: tuple[str, ...]) -> bool:
        if not (len(keys[0]) == 1 and keys[0].isalnum()):
            raise UserError("a mark is a letter or a digit")
        app.marks[keys[0]] = (app.pane, app.cursor)
        app.say(f"mark {keys[0]} is {place(app, app.pane, app.cursor)}: '{keys[0]} comes back")
        return True

    app.open(Prefix("mark as", "a letter", take))


def go_to_mark(app: Host) -> None:
    app.ready()
    if not app.marks:
        raise UserError('no marks yet: "a marks this place as a')

    def take(keys: tuple[str, ...]) -> bool:
        if keys[0] not in app.marks:
            raise UserError(f"there is no mark {keys[0]}: there are {' '.join(sorted(app.marks))}")
        pane, there = app.marks[keys[0]]
        if pane != app.pane:
            app.show_pane(pane)
        app.move(**asdict(there))
        app.clamp()
        return True

    rows: list[Spans] = [[(f" {name} ", BOLD), (place(app, *where), DIM)] for name, where in sorted(app.marks.items())]
    app.open(Prefix("go to mark", "its letter", take, rows[-8:]))


def place(app: Host, pane: str, cursor) -> str:
    """A cursor in words."""
    what = f"L{cursor.layer}H{cursor.head}" if cursor.comp == "head" else f"L{cursor.layer}.{cursor.comp}"
    texts = app.tokens.tokens.texts if app.tokens else ()
    token = f" {show_token(texts[cursor.pos])}" if 0 <= cursor.pos < len(texts) else ""
    return f"{app.panes[pane].label} {what} @{cursor.pos}{token}"


def end(app: Host, by: int) -> None:
    """The first or the last position."""
    actions.across(app, by * FAR)


def turn_text(app: Host) -> None:
    """The pane's view of the prompt as text, on and off."""
    pane = app.panes[app.pane]
    if not pane.text_view:
        able = " ".join(p.number for p in app.panes.values() if p.text_view)
        raise UserError(f"{pane.label} has no numbers for the tokens of the prompt: T shows it as text in the panes {able}")
    actions.turn(app, pane.text_view)
