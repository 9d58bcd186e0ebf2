"""Sessions as one finds them again: the list with what each one holds, restoring one, its name, where it is written."""

import time
from pathlib import Path

from vocabulary.chat import as_typed
from vocabulary.files import folder
from vocabulary.nodes import UserError
from screen import history, resume
from screen.actions import accepted
from screen.jobs import ends_jobs
from screen.overlays import Editor, Item, Picker
from screen.pane import Host
from screen.session import Session, read_session
from utils import fit
from widgets import BAD, DIM, GOOD, WARN

READING = 0.4  # seconds that the list may take; older sessions are then listed by their size only
LISTED = 200


def where_written(app: Host) -> None:
    """Where the session is written, and a field for its name."""
    session, style = app.session, DIM
    if not session.actions:
        line = "nothing has been done yet: the first action starts the session file"
    elif session.log.waiting and session.trouble:
        line, style = f"{session.log.waiting} lines of this session could not be written to {session.path}", BAD
    elif session.log.waiting:
        line = f"{session.actions} actions were restored; the next one writes them and itself to {session.path}"
    else:
        line = f"this session is {session.path}: {session.actions} actions, written as they happen; uv run tui.py --resume opens it again"

    def name(values: list[str]) -> None:
        if values[0].strip() != session.name:
            app.act("name", text=values[0].strip())
            app.say(f"this session is called {session.name}: r finds it by its name" if session.name else "this session has no name any more")

    app.open(Editor("session", [("name", session.name)], accepted(name), 0, 0, "⏎ names it"))
    app.say(line, style)


def listed(file: Path, until: float) -> Item:
    """A session by its time, with name, model, prompt, last action and length; read as far as there is time."""
    try:
        if time.monotonic() > until:
            return Item(file.stem, f"{file.read_bytes().count(b'"do": ')} actions", "", file)
        session, _ = read_session(file)
    except (OSError, UserError) as error:
        return Item(file.stem, f"can't be read: {getattr(error, 'strerror', None) or error}", "", file)
    return Item(file.stem, about(session), f"{session.actions} actions", file)


def about(session: Session) -> str:
    state = session.state
    name = f"{session.name}: " if session.name else ""
    return f"{name}{Path(state.model.model).name} · {fit(as_typed(state.prompt.clean), 30).strip()} · last {last_action(session)}"


def last_action(session: Session) -> str:
    at = next((n for n in reversed(range(len(session.past))) if history.concerns(session.past[n][1], "work")), None)
    if at is None:
        return "nothing but views"
    after = session.past[at + 1][0] if at + 1 < len(session.past) else session.state
    return history.words(session.past[at][1], session.past[at][0], after)


def choose_session(app: Host) -> None:
    until = time.monotonic() + READING
    files = sorted(folder("sessions").glob("*.jsonl"), key=lambda p: -p.stat().st_mtime)[:LISTED]

    def chosen(item: Item | None, typed: str) -> None:
        path = item.value if item else Path(typed)
        app.guard(lambda: ends_jobs(app, "another session", lambda: restore(app, path)))

    app.open(Picker("restore a session (w names this one)", [listed(f, until) for f in files], chosen, free=True))


def restore(app: Host, path: Path) -> None:
    session, warning = read_session(path)
    left = app.session.close()  # before the other is claimed: it may be the same file
    app.session = session
    warning = " · ".join(filter(None, (left, session.log.claim(), warning)))
    app.at_end = True
    resume.put_back(app)
    app.say(warning or f"restored {path.name}: {history.count(session.past)} steps back", WARN if warning else GOOD)
    app.refresh_wants()
