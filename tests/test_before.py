"""A session file of an earlier format opens as it was."""

import json
from pathlib import Path

import tui  # noqa: F401 (its panes add their views)
from screen.session import Session, read_session
from vocabulary.wire import to_json

HERE = Path(__file__).parent / "fixtures"
VIEWS = json.loads((HERE / "session_before_state.json").read_text(encoding="utf-8"))["state"]["views"]


def seen(session: Session) -> dict:
    """The state as JSON, without views that came later."""
    state = to_json(session.state)
    return state | {"views": {name: state["views"][name] for name in VIEWS}}


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
