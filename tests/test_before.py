"""A session file of an earlier format opens as it was."""

import json
from pathlib import Path

import tui  # noqa: F401 (its panes add their views)
from screen.session import Session, read_session
from vocabulary.wire import to_json

HERE = Path(__file__).parent / "fixtures"
BEFORE = json.loads((HERE / "session_before_state.json").read_text(encoding="utf-8"))["state"]


def seen(session: Session) -> dict:
    """The state as JSON, without fields and views that came later."""
    return alike(to_json(session.state), BEFORE)


def alike(state: object, before: object) -> object:
    """Of JSON what an older one has too, in objects at any depth."""
    if isinstance(state, dict) and isinstance(before, dict):
        return {key: alike(value, before[key]) for key, value in state.items() if key in before}
    if isinstance(state, list) and isinstance(before, list) and before:
        return [alike(value, before[min(n, len(before) - 1)]) for n, value in enumerate(state)]
    return state


def test_a_session_file_of_before_opens_unchanged():
    before = json.loads((HERE / "session_before_state.json").read_text(encoding="utf-8"))
    session, warning = read_session(HERE / "session_before.jsonl")
    assert not warning and seen(session) == before["state"]
    assert [name for _, name in session.past] == before["past"] and [name for _, name in session.future] == before["future"]
    for _ in range(12):
        session.step("undo", {})
    assert seen(session) == before["undone"]
    for _ in range(12):
        session.step("redo", {})
    assert seen(session) == before["state"]
    while session.past:
        session.step("undo", {})
    assert session.state == session.start
