"""What the keys do that open a list or a panel: help, palette, models, jobs, sessions, the convention in full, copying."""

import json
import time
from pathlib import Path

from techniques.output.requests import RunResult
from vocabulary.files import folder, short, write_text
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Models
from screen.explain import paragraphs, wrapped
from screen.glyphs import SIGNS
from screen.keys import Action, helped, show_keys
from screen.overlays import Item, Overlay, Panel, Picker
from screen.pane import Host
from screen.script import python_script
from screen.session import VIEWS, read_session
from utils import model_name
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Spans

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
    for row in pane.info_line.text().splitlines():
        lines += wrapped("cursor", row.strip(), width)
    app.open(Panel(f"{pane.number} {pane.label}", lines, ""))


# ------------------------------------------------------------------ the engine


def models(app: Host) -> None:
    start = [Item("zoo", "the embedded model", "")]
    title = "model (or type a folder or hub name, then dtype=bfloat16 base=gpt2 …)"
    picker = Picker(title, start, lambda item, typed: load_model(app, [item.key] if item else typed.split()), free=True)
    app.open(picker)

    def fill(found) -> None:
        picker.items = [Item(c.name, c.where, c.note, c.name) for c in found.choices]
        if picker.is_mounted and not picker.closing:
            picker.draw()

    app.requests.ask("models", Models(), fill, 0, failed=lambda error: None, any_model=True)


def load_model(app: Host, words: list[str]) -> None:
    """A model as it is typed: its name, then base=, dtype=, device=, device_map=."""
    options = dict(w.partition("=")[::2] for w in words[1:])
    old = app.state.model
    if unknown := set(options) - {"base", "dtype", "device", "device_map"}:
        app.say(f"{min(unknown)}=: a model takes base=, dtype=, device=, device_map=", BAD)
        return
    kept = {name: options.get(name, getattr(old, name)) for name in ("dtype", "device", "device_map")}
    load = Load(words[0], options.get("base"), **kept)
    if load == old and app.info is not None:
        app.say(f"{model_name(load.model)} is loaded already: ctrl+e restarts the engine, which reads its weights from disk again", WARN)
        return
    app.guard(lambda: app.act("model", load=load))


def jobs(app: Host) -> None:
    shown: list = []

    def rows() -> list[Spans]:
        shown[:] = app.client.jobs.values()
        return [
            [
                (f" {j.slot:12}", BOLD),
                (f"{type(j.request).__name__:12}", PLAIN),
                (f" {j.progress.done}/{j.progress.total} {j.progress.text}{j.more}".rstrip(), DIM),
            ]
            for j in shown
        ] or [[(" no jobs are running", DIM)]]

    def cancel(at: int) -> None:
        if at < len(shown):
            app.requests.cancel(shown[at])
            panel.replace(rows())

    panel = Panel("jobs", rows(), "x cancels · esc closes", bool(app.client.jobs), {"x": cancel})
    app.open(panel)
    panel.set_interval(1, lambda: panel.replace(rows()))


def interrupt(app: Host) -> None:
    some = [j for j in app.client.jobs.values() if j.slot != "load"]
    for job in some:
        app.requests.cancel(job)
    app.say(f"cancelled {len(some)} jobs" if some else "nothing is running; q quits")


def restart(app: Host) -> None:
    app.busy = "starting the engine…"
    app.say("restarting the engine; model, prompts and interventions are kept")
    app.requests.forget()
    app.start_engine()


# ------------------------------------------------------------------ sessions


def where_written(app: Host) -> None:
    session = app.session
    if not session.actions:
        app.say("nothing has been done yet: the first action starts the session file")
    elif session.log.waiting and session.trouble:
        app.say(f"{session.log.waiting} lines of this session could not be written to {session.path}", BAD)
    elif session.log.waiting:
        app.say(f"{session.actions} actions were restored; the next one writes them and itself to {session.path}")
    else:
        app.say(f"this session is {session.path}: {session.actions} actions, written as they happen; uv run tui.py --resume opens it again")


def actions_in(file: Path) -> str:
    try:
        return f"{file.read_bytes().count(b'"do": ')} actions"
    except OSError as error:
        return f"can't be read: {error.strerror}"


def choose_session(app: Host) -> None:
    files = sorted(folder("sessions").glob("*.jsonl"), key=lambda p: -p.stat().st_mtime)[:200]
    items = [Item(f.stem, actions_in(f), "", f) for f in files]

    def chosen(item: Item | None, typed: str) -> None:
        app.guard(lambda: restore(app, item.value if item else Path(typed)))

    app.open(Picker("restore a session", items, chosen, free=True))


def restore(app: Host, path: Path) -> None:
    session, warning = read_session(path)
    left = app.session.close()  # before the other is claimed: it may be the same file
    app.session = session
    warning = " · ".join(filter(None, (left, session.log.claim(), warning)))
    app.at_end = True
    app.say(warning or f"restored {path.name}: {len(app.session.past)} steps back", WARN if warning else GOOD)
    app.refresh_wants()


# ------------------------------------------------------------------ out


def copy(app: Host) -> None:
    app.ready()
    pane = app.panes[app.pane]
    if any(app.requests.stale(s) for s in app.requests.wanted):
        raise UserError("the screen is still computing: copy when it is done")
    node, s, grids = app.node(), app.state, pane.grids()
    script = lambda: python_script(s, app.info, app.requests.result("run", RunResult))  # noqa: E731
    choices = [
        Item("text", "this pane as text", ".txt", pane.as_text),
        *(Item("tsv" if len(grids) == 1 else f"tsv {n}", f"{n}: every number, tab-separated", ".tsv", g.tsv) for n, g in grids.items()),
        Item("python", "a script that uses TransformerLens alone and prints the metric", ".py", script),
        Item("svg", "the screen as a picture", ".svg", lambda: app.export_screenshot(title="loupe")),
        Item("node", f"the address {node}", ".txt", lambda: f"{node}\n"),
        *pane.copies(app),
        Item("prompt", "the prompt as a line of a prompt set", ".jsonl", lambda: prompt_line(app)),
    ]
    app.open(Picker("copy", choices, lambda item, typed: item and app.guard(lambda: export(app, pane.key, item))))


def prompt_line(app: Host) -> str:
    p = app.state.prompt
    line = {"clean": p.clean, "corrupt": p.corrupt, "answer": list(p.answers), "foil": list(p.foils), "labels": dict(p.labels)}
    return json.dumps(line | ({} if p.bos is None else {"bos": p.bos}), ensure_ascii=False) + "\n"


def export(app: Host, name: str, item: Item) -> None:
    if item.key == "svg" and app.query(Overlay):
        app.call_after_refresh(export, app, name, item)  # the picture without the menu
        return
    text = item.value()
    path = folder("exports") / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}-{item.key.replace(' ', '-')}{item.note}"
    write_text(path, text)
    if item.key != "svg":
        app.copy_to_clipboard(text)
    app.say(f"{'written' if item.key == 'svg' else 'copied; also'} {short(path)} ({len(text.splitlines())} lines)", GOOD)
