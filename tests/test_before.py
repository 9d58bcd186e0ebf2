"""What was before the screen was taken apart into rooms: a session file, every key, every word of help and hints."""

import json
from pathlib import Path

from screen.keys import hints, key_table, show_key, show_keys
from screen.session import VIEWS, read_session
from vocabulary.wire import to_json
from tui import PANES, TABLE

HERE = Path(__file__).parent / "fixtures"
KEYS = json.loads((HERE / "keys_before.json").read_text(encoding="utf-8"))


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


def test_keys_help_palette_and_hints_are_what_they_were():
    assert key_table(TABLE) == KEYS["table"]
    assert {a.id: a.title for a in TABLE} == KEYS["titles"]
    assert [[show_keys(a), a.help, a.group] for a in TABLE] == KEYS["help"]
    views = [[f"{n}={v}", "view", ""] for n, values in VIEWS.items() for v in values]
    assert [[a.id, a.help, show_keys(a)] for a in TABLE] + views == KEYS["palette"]
    assert list(PANES) == KEYS["panes"] and show_key("enter") == "⏎"
    for name, line in KEYS["hints"].items():
        assert "".join(f" {key} {title} " for key, title in hints(TABLE, PANES[name], PANES.values())).rstrip() == line.split("help ")[1].rstrip()
