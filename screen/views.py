"""The list of a pane's views, each under a letter."""

from screen.overlays import Panel
from screen.pane import Host
from widgets import BOLD, DIM, HEAD, PLAIN, Spans
from utils import fit, width_of

TAKEN = "jkgGqv"  # what the list itself uses


def letters(values: tuple[str, ...]) -> dict[str, str]:
    """A letter for each value: one of its own that is still free, else a capital or a digit."""
    out: dict[str, str] = {}
    for value in values:
        free = (c for c in (*value.lower(), *value.upper(), *"123456789abcdefhilmnoprstuwxyz") if c.isalnum() and c not in TAKEN and c not in out.values())
        out[value] = next(free)
    return out


def choose_view(app: Host) -> None:
    """All views of the pane with what each shows; a letter takes one, `v` the next."""
    pane = app.panes[app.pane]
    values, now = pane.choices(app), app.state.views.get(pane.view, "")
    by, width = letters(values), app.size.width
    names = {v: pane.explained[v].name if v in pane.explained else v for v in values}
    wide = max(width_of(n) for n in names.values()) + 2
    rows: list[Spans] = []
    for v in values:
        about = pane.explained[v].what if v in pane.explained else ""
        room = max(width - wide - 8, 0)
        rows.append(
            [(f" {by[v]} ", HEAD), ("▸ " if v == now else "  ", BOLD), (fit(names[v], wide), BOLD if v == now else PLAIN), (sentence(about, room), DIM)]
        )

    def take(value: str) -> None:
        panel.action_close()
        if value != now:
            app.act("view", name=pane.view, value=value)

    at = values.index(now) if now in values else -1
    keys = {letter: lambda n, v=v: take(v) for v, letter in by.items()} | {
        "enter": lambda n: take(values[n]),
        "v": lambda n: take(values[(at + 1) % len(values)]),
    }
    panel = Views(f"{pane.label}: view", rows, "", True, keys)
    panel.at = max(at, 0)
    app.open(panel)


class Views(Panel):
    def hints(self) -> list[tuple[str, str]]:
        return [("letter", "that view"), ("v", "the next"), ("↑↓ ⏎", "choose"), ("esc", "close")]


def sentence(text: str, room: int) -> str:
    """As much of a text as fits in whole words."""
    if width_of(text) <= room:
        return text
    words, out = text.split(" "), ""
    for word in words:
        if width_of(f"{out} {word}") + 2 > room:
            break
        out = f"{out} {word}" if out else word
    return f"{out} …" if out else ""
