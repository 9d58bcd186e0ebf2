"""What a terminal gets and what it sends: no text is a command, sequences are whole, pastes are pastes, and the app ends with its terminal."""

import contextlib
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.segment import Segment
from textual import events
from textual.strip import Strip
from ui import Wire, make_app, press, shown

from screen.compositor import cells_of
from screen.overlays import LONGEST, Field
from screen.session import State
from screen.terminal import BURST, SILENCE, Parser
from techniques.shell import console, plain, table
from tui import PANES, first_state
from utils import ROOT, fit, printable, visible, width_of
from vocabulary.circuit import Circuit
from vocabulary.prompts import Prompt

anything = st.text(st.characters(exclude_categories=()) | st.sampled_from("\x00\x07\x1b\x7f\x85\x9b\u200b\u202e\u2066\ud83d\ufe0f\U0001f3fd"), max_size=20)
EVIL = "\x1b]0;PWN\x07\x9b31m\u202eevil\u200b\x7f\r\n"
SEQUENCE = re.compile(r"\x1b\[[0-9;]*[mHG]")  # colour, and the cursor's place: all that the compositor writes


def unsafe(text: str) -> list[str]:
    """Characters that a terminal would obey or hide."""
    return [
        c for c in text if c != " " and not c.isprintable() or cell_len(c) == 0 and not re.match(r"\w|[\u0300-\u036f]", c) and c in "\u200b\ufe0f\U0001f3fd"
    ]


# ------------------------------------------------------------------ what it gets


@settings(deadline=None, derandomize=True)
@given(anything, st.integers(1, 12))
def test_no_text_is_a_command(text, width):
    drawn = printable(text)
    assert not unsafe(drawn) and not unsafe(visible(text)) and printable(drawn) == drawn
    assert width_of(text) == sum(map(cell_len, drawn)) and cell_len(fit(text, width)) == width
    drawn.encode("utf-8")


@settings(deadline=None, derandomize=True)
@given(anything)
def test_the_compositor_lets_nothing_through(text):
    """A widget that forgot: its text is drawn in the cells that were counted for it, and is no command."""
    strip = Strip([Segment("ab"), Segment(text), Segment("cd")])
    cells = cells_of(strip)
    assert len(cells) <= strip.cell_length and not unsafe("".join(text for text, _ in cells))
    if not unsafe(text) and printable(text) == text:
        assert len(cells) == strip.cell_length


def test_widths_are_counted_in_one_place():
    """By `width_of` and `fit`, which count what is drawn."""
    own = [p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("tests", "benchmarks", "zoo", ".venv")]
    assert {p.name for p in own if "rich.cells" in p.read_text(encoding="utf-8")} == {"utils.py", "compositor.py"}


def test_emoji_modifiers_keep_the_columns():
    assert printable("👍🏽") == "👍⟨1f3fd⟩" and width_of("👍🏽") == 2 + 7
    assert printable("🇫🇷") == "⟨1f1eb⟩⟨1f1f7⟩" and printable("❤️") == "❤⟨fe0f⟩" and printable("e\u0301 日本") == "e\u0301 日本"


def hostile(folder) -> State:
    """A state with what ends a line or begins a command in every field that a file can bring."""
    prompt = Prompt(f"When {EVIL} gave", f"When {EVIL} took", (f" {EVIL}",), (" John",))
    one, two = (Circuit(f"{EVIL}{n}", f"{EVIL}", ("L0H1", "L1.mlp"), (), {EVIL: ("L0H1",)}, EVIL) for n in "12")
    start = State()
    return replace(
        start, model=replace(start.model, model=str(folder)), prompt=prompt, prompt_set=(prompt, prompt), set_path=f"/tmp/{EVIL}.jsonl",
        circuits=(one, two), circuit=one.name, saes=(f"/tmp/{EVIL}",), sae=f"/tmp/{EVIL}", lens="tuned", artefact=f"/tmp/{EVIL}",
    )  # fmt: skip


@pytest.mark.slow
async def test_hostile_names_everywhere(folders, tmp_path, monkeypatch, own_home):
    from shutil import copytree

    from engine import Engine

    monkeypatch.setenv("TERM", "xterm-256color")
    sessions, cwd = own_home / "sessions", tmp_path / "cwd"
    for folder in (sessions, cwd):
        folder.mkdir()
        (folder / f"{EVIL.replace('/', '')}.jsonl").write_text("{}\n")
    monkeypatch.chdir(cwd)
    folder = copytree(folders["gemma2"], tmp_path / f"model {EVIL}")
    app = make_app(Engine(str(folder)), tmp_path, hostile(folder), driver_class=Wire)
    Wire.out.clear()
    async with app.run_test(size=(120, 36), headless=False) as pilot:
        await press(app, pilot)
        for pane in PANES.values():
            await press(app, pilot, pane.number)
            if pane.number in "56":
                await press(app, pilot, "v", "v")
        for key in ("?", ":", "o", "r", "M", "y", "=", "e", "%", "C", "z", "J", "t", "w", "m"):
            await press(app, pilot, key)
            await press(app, pilot, "escape")
        app.say(f"an error: {EVIL}")
        app.faults.say(EVIL)
        await press(app, pilot)
    written = "".join(Wire.out)
    assert "PWN" in written and "␛]0;PWN␇" in written
    assert not unsafe(SEQUENCE.sub("", written).replace("\x1b]22;default\x07", ""))  # the pointer's shape, which Textual sets


def test_hostile_names_on_the_command_line():
    out = io.StringIO()
    screen = console(file=out, force_terminal=True, width=80, color_system="256")
    rows = table(EVIL, "a", EVIL)
    rows.add_row(EVIL, plain(EVIL))
    screen.print(rows)
    screen.print(f"[red]{EVIL}[/INST]")
    text = SEQUENCE.sub("", out.getvalue())
    assert "[red]" in text and "PWN" in text and not unsafe(text.replace("\n", ""))


# ------------------------------------------------------------------ what it sends


def keys(*reads: str, late: bool = True) -> list[str]:
    parser = Parser()
    out = [m for data in reads for m in parser.feed(data)]
    parser.until = 0.0 if late else parser.until
    out += parser.tick()
    return [m.key if isinstance(m, events.Key) else f"paste {m.text!r}" if isinstance(m, events.Paste) else type(m).__name__ for m in out]


PASTED = "\x1b[200~", "\x1b[201~"


@pytest.mark.parametrize(
    "reads, expected",
    [
        (("jk",), ["j", "k"]),
        (("\x1b[A",), ["up"]),
        (("\x1b", "[A"), ["up"]),  # over a slow line
        (("\x1b[", "A"), ["up"]),
        (("\x1b[1;", "5C"), ["ctrl+right"]),
        (("\x1bOP",), ["f1"]),
        (("\x1bO", "P"), ["f1"]),
        (("\x1b",), ["escape"]),
        (("\x1b\x1b",), ["escape", "escape"]),
        (("\x1b", "d"), ["escape", "d"]),  # typed one after the other
        (("\x1bd",), ["alt+d"]),
        (("\x1bd\x1bd",), ["alt+d", "alt+d"]),  # not the base, twice
        (("\x1b\x1bd",), ["escape", "alt+d"]),
        (("\x1b[",), ["escape", "left_square_bracket"]),
        (("\x1b[999zj",), ["j"]),  # of no known key
        (("\x1b[12;",), []),
        (("\x1b]11;rgb:1111/2222/3333\x07j",), ["j"]),  # an answer to a question of the shell
        (("\x1b[99999999uj", "k"), ["j", "k"]),  # no character has that number
        (("\x1b[55296uj",), ["j"]),  # half a character
        (("\x1b[I\x1b[O",), ["AppFocus", "AppBlur"]),
        ((f"{PASTED[0]}a\rb\x1b[Ac\x00\x1b{PASTED[1]}j",), [r"paste 'a\nb\x1b[Ac\x00\x1b'", "j"]),
        ((f"{PASTED[0]}a\x1b[2", "01~j"), ["paste 'a'", "j"]),
        ((PASTED[0][:3], f"{PASTED[0][3:]}a\r\nb", "\x1b", "c", PASTED[1]), [r"paste 'a\nb\x1bc'"]),
        ((f"{PASTED[0]}a",), ["paste 'a'"]),  # never ended
        (("x\r" * BURST, "y"), [f"paste {'x\n' * BURST + 'y'!r}"]),  # a terminal that does not mark pastes
    ],
)
def test_what_is_typed(reads, expected):
    assert keys(*reads) == expected


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(st.sampled_from("\x1b[]OM;~<u0159aAd\x00\r\x07\x7f"), min_size=1, max_size=12), max_size=6), st.booleans())
def test_anything_may_be_typed(reads, late):
    parser = Parser()
    for data in reads:
        list(parser.feed(data))
        parser.until = 0.0 if late else parser.until
        list(parser.tick())
    parser.until = 0.0
    list(parser.tick())
    assert [m.key for m in parser.feed("q")] == ["q"] or parser.held or parser.paste is not None


async def test_a_paste_has_a_bound_and_a_place(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        app.post_message(events.Paste("qqq"))
        await press(app, pilot)
        assert "a pasted text goes into a field" in shown(app)
        await press(app, pilot, "e")
        field = app.query(Field).first()
        before = field.value
        app.post_message(events.Paste("a\nb"))
        await press(app, pilot)
        assert field.value == before + "a\\nb"
        app.post_message(events.Paste("x" * LONGEST))
        await press(app, pilot)
        assert field.value == before + "a\\nb" and "a field holds" in shown(app)


# ------------------------------------------------------------------ a real terminal


class Screen:
    """tui.py in a terminal of its own; what carries its engine only waits for the end of its input."""

    def __init__(self, *args: str, ignore_hangup: bool = False):
        self.fd, theirs = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))

        def own_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore_hangup else signal.SIG_DFL)

        command, env = [sys.executable, "tui.py", "--via", "sh -c cat>/dev/null", *args], os.environ | {"TERM": "xterm-256color"}
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env, start_new_session=True, preexec_fn=own_terminal)
        self.pid = self.process.pid
        os.close(theirs)
        self.said = b""

    def until(self, words: bytes, seconds: float = 30.0) -> bool:
        end, start = time.monotonic() + seconds, len(self.said)
        while words not in self.said[start:] and time.monotonic() < end:
            if select.select([self.fd], [], [], 0.05)[0]:
                self.said += os.read(self.fd, 1 << 16)
        return words in self.said[start:]

    def send(self, data: bytes) -> None:
        """As a terminal does it: it reads while it writes."""
        os.set_blocking(self.fd, False)
        end = time.monotonic() + 20
        while data and time.monotonic() < end:
            readable, writable, _ = select.select([self.fd], [self.fd], [], 1)
            if readable:
                self.said += os.read(self.fd, 1 << 16)
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self.fd, data[:4096]) if writable else 0 :]
        os.set_blocking(self.fd, True)
        assert not data, "the screen took no more input"

    def memory(self) -> int:
        """MB"""
        with open(f"/proc/{self.pid}/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmRSS")) // 1024

    def ended(self, seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                if select.select([self.fd], [], [], 0)[0]:
                    self.said += os.read(self.fd, 1 << 16)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
                return True
        self.process.kill()
        self.process.wait()
        return False


@pytest.mark.slow
def test_a_megabyte_of_controls_is_pasted():
    """With and without the marks of a paste; the screen answers within seconds and holds no more memory."""
    screen = Screen()
    assert screen.until(b"clean")
    screen.send(b"e")
    assert screen.until(b"several answers")
    before = screen.memory()
    big = (bytes(range(32)) + b"abc \xff\x7f") * 27_000
    screen.send(b"\x1b[200~" + big + b"\x1b[201~")
    assert b"a field holds" in screen.said or screen.until(b"a field holds", 10)
    screen.send(b"x" * 1000 + big)
    screen.until(b"never", 3 * SILENCE)
    screen.send(b"\x1b")
    assert screen.until(b"edit prompt", 10)
    screen.send(b"?")
    assert screen.until(b"Output: likeliest", 5), screen.said[-600:]
    assert screen.memory() < before + 100
    os.kill(screen.pid, signal.SIGTERM)
    assert screen.ended(5) and screen.said.rstrip().endswith(b"\x1b[?1004l") and b"\x1b[?1049l" in screen.said[-200:]


@pytest.mark.slow
@pytest.mark.parametrize("ignore_hangup", [False, True])
def test_it_ends_with_its_terminal(ignore_hangup):
    screen = Screen(ignore_hangup=ignore_hangup)
    assert screen.until(b"clean")
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(screen.pid)], capture_output=True, text=True).stdout.split()
    os.close(screen.fd)
    assert screen.ended(5), "it outlives its terminal"
    assert not [p for p in found if os.path.exists(f"/proc/{p}")], "its engine outlives it"


@pytest.mark.slow
def test_a_signal_at_the_first_paint_leaves_the_terminal_as_it_was():
    screen = Screen()
    assert screen.until(b"\x1b[?1049h")
    os.kill(screen.pid, signal.SIGTERM)
    assert screen.ended(10) and b"\x1b[?1049l" in screen.said and screen.process.returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("stdin, term, why", [(subprocess.DEVNULL, "xterm", "standard input is not a terminal"), ("pty", "dumb", "TERM is dumb")])
def test_without_a_terminal(stdin, term, why):
    ends = pty.openpty() if stdin == "pty" else (None, subprocess.PIPE)
    process = subprocess.Popen(
        [sys.executable, "tui.py"],
        stdin=stdin if ends[0] is None else ends[1],
        stderr=ends[1],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"TERM": term},
    )
    assert process.wait(20) == 1
    said = process.stderr.read() if ends[0] is None else os.read(ends[0], 4096)
    assert why.encode() in said and said.strip().count(b"\n") == 0


@pytest.mark.parametrize("how", ["sys.exit('no such session')", "1 / 0", *(f"signal.raise_signal(signal.{s})" for s in ("SIGINT", "SIGTERM", "SIGHUP"))])
def test_what_carries_the_engine_ends_with_a_screen_that_never_opens(tmp_path, how):
    """A session that isn't there, a fault, a signal while Textual is imported."""
    begin = f"early.no_terminal, early.folder = str, lambda name: Path({str(tmp_path)!r}); print(early.start(early.parser().parse_args(['--via', \"sh -c 'sleep 600; true'\"]))[0].pid, flush=True)"
    code = f"import signal, sys; from pathlib import Path; from screen import early; {begin}; {how}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and done.stdout
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_ctrl_c_while_the_program_is_imported_says_nothing(tmp_path):
    (tmp_path / "dotenv.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")  # what utils.py imports first
    done = subprocess.run([sys.executable, "tui.py"], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and not done.stderr
