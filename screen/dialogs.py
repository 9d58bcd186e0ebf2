"""What the keys do that open a list or a panel: help, palette, models, the convention in full, copying."""

import time

from vocabulary.files import folder, short, write_text
from vocabulary.nodes import UserError
from vocabulary.prompts import line_of
from screen import exports
from screen.explain import paragraphs, wrapped
from screen.glyphs import SIGNS
from screen.keys import Action, helped, show_keys
from screen.overlays import Item, Overlay, Panel, Picker
from screen.pane import Host
from screen.session import VIEWS
from screen.template import end_of
from widgets import GOOD

# ------------------------------------------------------------------ keys and commands


def show_help(app: Host) -> None:
    """Every key: the pane's own first, each with what it is for; then what the signs on the screen stand for."""
    items = [Item(show_keys(a), text, section, a) for section, a, text in helped(app.table, app.panes[app.pane])]
    items += [Item(sign, text, "signs") for sign, text in SIGNS.items()]
    app.open(Picker("keys", items, lambda item, typed: item and item.value and app.action_do(item.value.id)))


def palette(app: Host) -> None:
    items = [Item(a.id, a.help, show_keys(a), a) for a in app.table]
    views = [Item(f"{n}={v}", "view", "", (n, v)) for n, values in VIEWS.items() for v in values]

    def chosen(item: Item | None, typed: str) -> None:
        if item is None:
            return
        app.action_do(item.value.id) if isinstance(item.value, Action) else app.guard(lambda: app.act("view", name=item.value[0], value=item.value[1]))

    app.open(Picker("command", items + views, chosen))


def convention(app: Host) -> None:
    """What is measured, by which formula and whose; then what the title says in full, and how it was done on this model and prompt."""
    pane, width = app.panes[app.pane], max(20, app.size.width - 4)
    title, note = pane.said
    lines = paragraphs((pane.explained[v] for v in pane.variants(app) if v in pane.explained), width)
    lines += wrapped("shown", title, width) + (wrapped("here", note, width) if note else [])
    if isinstance(app.state.prompt.clean, tuple):
        end = f"END is the last token before what is predicted, {end_of(app.state.prompt)}; \\ dims or folds the tokens of the chat template"
        lines += wrapped("chat", end, width)
    for row in pane.info_line.text().splitlines():
        lines += wrapped("cursor", row.strip(), width)
    app.open(Panel(f"{pane.number} {pane.label}", lines, ""))


# ------------------------------------------------------------------ out

CLIPBOARD = (".txt", ".tsv", ".py", ".jsonl", ".json", "")  # what is copied too; the rest are files to open


def copy(app: Host) -> None:
    app.ready()
    pane = app.panes[app.pane]
    if any(app.requests.stale(s) for s in app.requests.wanted):
        raise UserError("the screen is still computing: copy when it is done")
    node, grids = app.node(), pane.grids()
    choices = [
        Item("text", "this pane as text", ".txt", pane.as_text),
        *(Item("tsv" if len(grids) == 1 else f"tsv {n}", f"{n}: every number, tab-separated", ".tsv", g.tsv) for n, g in grids.items()),
        *exports.choices(app, pane),
        Item("svg", "the screen as a picture", ".svg", lambda: app.export_screenshot(title="loupe")),
        Item("node", f"the address {node}", ".txt", lambda: f"{node}\n"),
        *pane.copies(app),
        Item("prompt", "the prompt as a line of a prompt set", ".jsonl", lambda: line_of(app.state.prompt)),
    ]
    app.open(Picker("copy", choices, lambda item, typed: item and app.guard(lambda: export(app, pane.key, item))))


def export(app: Host, name: str, item: Item) -> None:
    if item.key == "svg" and app.query(Overlay):
        app.call_after_refresh(export, app, name, item)  # the picture without the menu
        return
    text = item.value()
    path = folder("exports") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}-{item.key.replace(' ', '-')}{item.note}"
    write_text(path, text)
    app.panes[name].copied(app, item, path)
    copied = item.note in CLIPBOARD
    if copied:
        app.copy_to_clipboard(text)
    app.say(f"{'copied; also' if copied else 'written'} {short(path)} ({len(text.splitlines())} lines)", GOOD)
