"""A session file of an earlier format opens as it was."""

import json
from pathlib import Path

import tui  # noqa: F401 (its panes add their views)
from screen.session import read_session
from vocabulary.wire import to_json

HERE = Path(__file__).parent / "fixtures"


def test_a_session_file_of_before_opens_unchanged():
    before = json.loads((HERE / "session_before_state.json").read_text(encoding="utf-8"))
    session, warning = read_session(HERE / "session_before.jsonl")
    assert not warning and list(session.state.views) == list(before["state"]["views"])
    assert to_json(session.state) == before["state"]
    assert [name for _, name in session.past] == before["past"] and [name for _, name in session.future] == before["future"]
    for _ in range(12):
        session.step("undo", {})
    assert to_json(session.state) == before["undone"]
    for _ in range(12):
        session.step("redo", {})
    assert to_json(session.state) == before["state"]
    while session.past:
        session.step("undo", {})
    assert session.state == session.start
