"""The real screen in a pseudo-terminal, killed in every way: nothing that was done is lost, the terminal is left as it was, no process stays. The long form: benchmarks/soak.py."""

import os
import random
import shlex
import signal
import sys
import time
import uuid

import pytest

from benchmarks.soak import Terminal, marked
from screen.session import Session, read_session
from tui import first_state

pytestmark = pytest.mark.slow


@pytest.fixture
def storm(tmp_path):
    """Opens terminals on a session; their engine is one that never answers, so that no torch is imported."""
    stub = tmp_path / "engine.py"
    stub.write_text("import sys\nsys.stdin.buffer.read()\n")
    session = Session(first_state({}), tmp_path / "s.jsonl")
    session.do("base", value="corrupt")
    session.close()
    opened = []

    def open_one() -> Terminal:
        opened.append(Terminal(session.path, uuid.uuid4().hex, "--via", f"{shlex.quote(sys.executable)} {shlex.quote(str(stub))}"))
        return opened[-1]

    yield open_one
    for terminal in opened:
        for pid in marked(terminal.mark):
            os.kill(pid, signal.SIGKILL)
        terminal.close()


def test_kills_lose_nothing(storm):
    ui, rng = storm(), random.Random(0)
    for how in (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL):
        assert ui.answers(30), ui.seen[-2000:]
        before = ui.session.read_bytes()
        ui.send("d" * rng.randrange(1, 30))
        time.sleep(rng.random() / 20)
        assert ui.end(how), "a process stays"
        assert how == signal.SIGHUP or how == signal.SIGKILL or b"\x1b[?1049l" in ui.seen
        assert ui.session.read_bytes().startswith(before)
        session, warning = read_session(ui.session)
        session.close()
        assert session.actions >= before.count(b'"do": ') and (not warning or how == signal.SIGKILL), warning
        ui.session = session.path
        assert not warning, "a line was cut by the kill; the rest would be in a copy"
        ui.start()
    assert ui.answers(30)
    os.kill(ui.engine(), signal.SIGKILL)
    assert ui.answers(30), "the engine is dead, the screen is not"
    ui.send("\x05")
    assert ui.wait_for(ui.engine, 10) and ui.answers(30)


@pytest.mark.parametrize("delay", [0, 0.01, 0.05])
def test_a_signal_while_it_starts_leaves_the_terminal_as_it_was(storm, delay):
    ui = storm()
    assert ui.wait_for(lambda: b"\x1b[?1049h" in ui.seen, 30)
    time.sleep(delay)
    assert ui.end(signal.SIGTERM) and ui.process.returncode == 0
    assert ui.seen.rindex(b"\x1b[?1049l") > ui.seen.rindex(b"\x1b[?1049h")


def test_the_second_screen_says_that_it_is_a_copy(storm):
    first = storm()
    assert first.answers(30)
    second = storm()
    assert second.wait_for(lambda: b"another" in second.seen, 30), second.seen[-2000:]
    before = first.lines()
    second.send("d")
    assert first.answers(30) and first.lines() == before + 1
    assert second.end(signal.SIGTERM) and first.end(signal.SIGTERM)
    assert not read_session(first.session)[1]
