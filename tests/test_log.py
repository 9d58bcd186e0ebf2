"""The session file under damage, full disks, two screens, and input of every kind."""

import contextlib
import errno
import fcntl
import json
import os
import random
import stat
import subprocess
import sys
import time
import zlib
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_session import ACTIONS
from ui import make_app, press, shown

from vocabulary import log
from screen.session import Session, State, read_session
from techniques.output.requests import Run
from tui import first_state
from utils import ROOT
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt
from vocabulary.wire import Frame, encode, to_json

QUIET = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
HUNT = (
    ("intervene", {"intervention": "L0H1=zero"}),
    ("keep", {"part": "L3H2"}),
    ("keep", {"part": "L0H1->L3H3.q"}),
    ("open_set", {"path": "a.jsonl", "prompts": to_json([Prompt("größer 日本"), Prompt("b\n\t\x1b")]), "index": 1}),
    ("undo", {}),
    ("redo", {}),
    ("metric", {"kind": "prob", "pos": -2}),
    ("keep", {"part": "L3H2"}),
    ("open_set", {"path": "a.jsonl", "prompts": to_json([Prompt("größer 日本"), Prompt("b\n\t\x1b")]), "index": 0}),
    ("view", {"name": "mode", "value": "number"}),
)


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def hunt(path, state=None) -> tuple[Session, list[State]]:
    """A session of HUNT, closed, and the state after each of its actions."""
    session = Session(state or State(prompt_set=(Prompt("of the start"),)), path)
    states = [session.do(name, **args) for name, args in HUNT]
    session.close()
    return session, states


# ------------------------------------------------------------------ values out of range

NASTY = st.sampled_from(
    [
        10**30,
        -(10**30),
        2**63,
        2**64,
        1e308,
        -1,
        "",
        "\ud800",
        "a\x00b",
        "x" * 3000,
        "²",
        "--5",
        "9" * 5000,
        None,
        True,
        [],
        {},
        [[]],
        {"a": 1},
        [10**30],
        ["\udcff"],
    ]
)
GOOD = {
    "model": {"load": to_json(State().model)},
    "prompt": {"prompt": to_json(Prompt("a b", "a c", (" d",), (" e",), (("S1", 0),), None, (), ((0, 0),)))},
    "open_set": {"path": "a", "prompts": to_json([Prompt("a")]), "index": 0},
    "go": {"index": 0},
    "metric": {"kind": "prob", "pos": -1},
    "base": {"value": "clean"},
    "intervene": {"intervention": "L0H1=zero"},
    "drop": {"intervention": "L0H1=zero"},
    "clear": {},
    "enable": {"value": True},
    "ablation": {"kind": "mean"},
    "lens": {"kind": "tuned", "artefact": "a"},
    "view": {"name": "mode", "value": "number"},
    "new_circuit": {"name": "a"},
    "put_circuit": {"circuit": {"name": "a", "model": "zoo", "nodes": ["L0H1"], "edges": ["L0H1->L3H3.q"], "groups": {"g": ["L0H1"]}, "found": ""}},
    "select_circuit": {"name": "circuit"},
    "rename_circuit": {"name": "circuit", "to": "b"},
    "delete_circuit": {"name": "circuit"},
    "keep": {"part": "L0H2"},
    "receivers": {"addresses": ["L2H3.q"]},
    "senders": {"addresses": ["L0H1"]},
    "group": {"name": "g", "nodes": ["L0H1"]},
    "combine": {"how": "union", "one": "circuit", "other": "circuit", "name": "c"},
    "saes": {"sources": ["zoo/a"]},
    "show_sae": {"source": "zoo/a"},
    "align": {"how": "diff"},
    "sae_error": {"value": False},
    "bos": {"value": True},
    "generation": {"tokens": 8, "temperature": 0.5, "seed": 3, "held": "prompt"},
    "text": {"path": "a.txt", "tokens": 10},
    "chat": {"value": True},
    "against": {"name": "a"},
    "adapter_scale": {"value": 0.5},
    "mark_graph": {"marks": {"model": "zoo", "ids": [1, 2], "target": "logits", "sources": ["a"], "pins": ["0_1_2"], "names": [["0_1_2", "x"]]}},
    "open_graph": {"path": "a.json"},
    "transcoders": {"sources": ["a"]},
    "jump": {"to": to_json(State()), "prompts": to_json([Prompt("a")])},
}


def spoiled(value: object, at: int, by: object) -> tuple[object, int]:
    """The value with its leaf number `at` (in order of reading, objects and lists count too) replaced; what is left of `at`."""
    if at == 0:
        return by, -1
    at -= 1
    if isinstance(value, dict | list):
        out = dict(value) if isinstance(value, dict) else list(value)
        for key in list(out) if isinstance(out, dict) else range(len(out)):
            out[key], at = spoiled(out[key], at, by)
            if at < 0:
                return out, at
        return out, at
    return value, at


def started(path) -> Session:
    session = Session(State(prompt_set=(Prompt("a"), Prompt("b"))), path)
    session.do("keep", part="L0H1")
    session.do("saes", sources=["zoo/a"])
    return session


def test_there_is_an_example_of_every_kind_of_line():
    from screen.session import ACTIONS as KINDS

    assert GOOD.keys() == KINDS.keys()


@settings(max_examples=150, **QUIET)
@given(st.sampled_from(sorted(GOOD)), st.integers(1, 12), NASTY)
def test_what_can_not_be_kept_changes_nothing_and_what_can_comes_back(tmp_path_factory, name, at, by):
    path = tmp_path_factory.mktemp("s") / "s.jsonl"
    session, args = started(path), spoiled(GOOD[name], at, by)[0]
    before, size = session.state, path.stat().st_size
    try:
        session.do(name, **args)
    except UserError as error:
        assert session.state is before and path.stat().st_size == size and len(str(error)) < 6000
    encode(Frame("ask", body=Run(replace(session.state.study, prompt_set=session.state.prompt_set))))
    session.do("view", name="mode", value="number")
    session.close()
    again, warning = read_session(path)
    assert not warning and again.state == session.state
    # the very line in a file that an older version wrote, which did not check
    lines = path.read_bytes().splitlines(keepends=True)[:4]
    with contextlib.suppress(UserError):
        lines.append(log.encoded({"n": 4, "t": "2026-01-01", "do": name, "args": args}))
    path.write_bytes(b"".join([*lines, log.encoded({"n": len(lines), "t": "2026-01-01", "do": "view", "args": {"name": "mode", "value": "number"}})]))
    again, warning = read_session(path)
    assert again.state.views["mode"] == "number" and ("line 5" in warning or again.actions == len(lines) - 1)
    encode(Frame("ask", body=Run(replace(again.state.study, prompt_set=again.state.prompt_set))))


async def test_a_number_of_many_digits_typed_as_a_position(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(100, 30)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "d")
        for typed in ("prob@9999999999999999999999", "prob@-9999999999999999999999"):
            before = app.session.path.read_bytes()
            await press(app, pilot, "m")
            app.focused.value = typed
            await press(app, pilot, "enter")
            assert "is not a position" in shown(app) and app.session.path.read_bytes() == before
        await press(app, pilot, "d")
    again, warning = read_session(app.session.path)
    assert not warning and again.state == app.state and len(again.past) == 2


# ------------------------------------------------------------------ damage


def test_a_file_cut_at_any_byte_gives_what_stands_before(tmp_path):
    path = tmp_path / "s.jsonl"
    session, states = hunt(path)
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    places = random.Random(0).sample(range(len(whole)), 150) + [e + d for e in ends[:-1] for d in (-1, 0, 1)]
    for cut in places:
        path.write_bytes(whole[:cut])
        n = sum(e <= cut + 1 for e in ends) - 1  # whole lines but the header; without its newline a line still is whole
        n -= (n >= 1) + (n >= 5)  # those of sets
        if n < 1 and cut < len(whole):
            with contextlib.suppress(UserError):
                assert read_session(path)[0].state.interventions == ()
            continue
        again, warning = read_session(path)
        assert again.state == states[min(n, len(states)) - 1], (cut, n)
        assert bool(warning) == (cut not in (*ends, *(e - 1 for e in ends))), cut


def flip(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]


def join(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines) - 1)
    return b"".join([*lines[:at], lines[at][:-1], *lines[at + 1 :]])


def half_join(data: bytes, rng: random.Random) -> bytes:
    """As a full disk did it: a line stops, the next begins on it."""
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines) - 1)
    return b"".join([*lines[:at], lines[at][: rng.randrange(1, len(lines[at]))], *lines[at + 1 :]])


def double(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    return b"".join([*lines[: at + 1], *lines[at:]])


def lose(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines) - 1)
    return b"".join([*lines[:at], *lines[at + 1 :]])


def swap(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines) - 1)
    return b"".join([*lines[:at], lines[at + 1], lines[at], *lines[at + 2 :]])


def zeros(data: bytes, rng: random.Random) -> bytes:
    """As some file systems leave a page after a crash."""
    at = rng.randrange(len(data))
    n = min(rng.randrange(1, 600), len(data) - at)
    return data[:at] + bytes(n) + data[at + n :]


def insert(data: bytes, rng: random.Random) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + bytes(rng.choices((10, 13, 0, 123, 34, 255, 27), k=rng.randrange(1, 4))) + data[at:]


@pytest.mark.parametrize("harm", [flip, join, half_join, double, lose, swap, zeros, insert])
def test_damage_is_said_and_what_is_whole_is_kept(tmp_path, harm):
    path, rng = tmp_path / "s.jsonl", random.Random(harm.__name__)
    session, states = hunt(path)
    whole, mended = path.read_bytes(), 0
    for _ in range(60):
        damaged = harm(whole, rng)
        path.write_bytes(damaged)
        try:
            again, warning = read_session(path)
        except UserError as error:  # the header's own format number, or the whole file
            assert damaged.split(b"\n")[0] != whole.split(b"\n")[0], error
            continue
        if damaged != whole and again.state != states[-1]:
            assert warning, "another state in silence"
        assert again.actions >= len(HUNT) - 3 or damaged.count(b"\0") > 20 or "set" in warning, warning
        mended += again.state == states[-1]
        if warning:
            assert again.path != path and not again.close() and not again.path.exists(), "looked at, not gone on with: no new file"
            again.do("view", name="mode", value="shade")
            again.close()
            third, warning = read_session(again.path)
            assert not warning and third.state == again.state and [n for _, n in third.past] == [n for _, n in again.past]
        assert path.read_bytes() == damaged
    assert mended > (40 if harm in (join, double) else 0)


def test_a_session_of_format_1_goes_on_in_its_file(tmp_path):
    path = tmp_path / "old.jsonl"
    lines = [{"loupe": 1, "start": to_json(State())}, *({"t": "2026-01-01T00:00:00", "do": name, "args": args} for name, args in HUNT)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    old = path.read_bytes()
    again, warning = read_session(path)
    assert not warning and again.path == path and again.actions == len(HUNT)
    again.do("open_set", **HUNT[3][1])
    again.do("clear")
    again.close()
    assert path.read_bytes().startswith(old)
    third, warning = read_session(path)
    assert not warning and third.state == again.state and third.actions == len(HUNT) + 2
    path.write_bytes(path.read_bytes().replace(b'"do": "clear"', b'"do": "cleat"'))
    assert "checksum" in read_session(path)[1]


def test_checksums_are_those_of_zlib(tmp_path):
    hunt(tmp_path / "s.jsonl")
    for n, line in enumerate((tmp_path / "s.jsonl").read_bytes().splitlines()):
        entry = json.loads(line)
        total = entry.pop("sum")
        assert entry.get("n") == n and zlib.crc32(json.dumps(entry, ensure_ascii=False).encode()) == int(total, 16)


def test_a_set_stands_there_once_and_resuming_is_fast(tmp_path):
    some = [Prompt(f"{n} When Mary and John went to the store, John gave a drink to", f"{n} other", (" Mary",), (" John",), (("IO", 5),)) for n in range(1000)]
    session = Session(State(), tmp_path / "s.jsonl")
    for n in range(60):
        session.do("open_set", path="big.jsonl", prompts=some, index=n)
    session.close()
    begun = time.process_time()
    again, warning = read_session(session.path)
    assert not warning and again.state == session.state and len(again.past) == 60
    assert time.process_time() - begun < 1 and session.path.stat().st_size < 400_000


# ------------------------------------------------------------------ failing writes


class Failing:
    """os.write, os.ftruncate, os.fsync and os.open that fail as told: at the n-th call, after half of the bytes."""

    def __init__(self, monkeypatch, name: str, at: range, code: int = errno.ENOSPC):
        self.real, self.count, self.at, self.code = getattr(os, name), 0, at, code
        monkeypatch.setattr(os, name, self)

    def __call__(self, *args, **kw):
        self.count += 1
        if self.count - 1 in self.at:
            if self.real is REAL_WRITE:
                self.real(args[0], args[1][: len(args[1]) // 2])
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*args, **kw)


REAL_WRITE = os.write


@pytest.mark.parametrize("name", ["write", "fsync", "open"])
@pytest.mark.parametrize("first", range(5))
@pytest.mark.parametrize("times", [1, 3])
def test_a_failed_write_loses_nothing(tmp_path, monkeypatch, name, first, times):
    path = tmp_path / "s.jsonl"
    session, states = Session(State(prompt_set=(Prompt("of the start"),)), path), []
    with monkeypatch.context() as m:
        failing = Failing(m, name, range(first, first + times))
        for step, args in HUNT:
            states.append(session.do(step, **args))
            if session.log.waiting:
                assert "NOT SAVED" in session.trouble and "No space" in session.trouble
                assert not path.exists() or path.read_bytes()[-1:] == b"\n", "cut to what was whole"
            else:
                assert not session.trouble
        assert failing.count > first or name == "open"
    assert states == hunt(tmp_path / "plain.jsonl")[1]
    session.close()
    again, warning = read_session(path)
    assert not warning and again.state == states[-1] and again.actions == len(HUNT)


def test_a_disk_that_stays_full_leaves_the_whole_among_temporary_files(tmp_path, monkeypatch):
    import tempfile

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "other"))
    session = Session(State(), tmp_path / "full" / "s.jsonl")
    real = os.open
    full = lambda path, *a, **kw: real(path, *a, **kw) if "/full/" not in str(path) else (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))  # noqa: E731
    monkeypatch.setattr(os, "open", full)
    session.do("keep", part="L0H1")
    session.do("keep", part="L0H2")
    assert session.state.circuits[0].nodes == ("L0H1", "L0H2") and "NOT SAVED" in session.trouble
    said = session.close()
    assert str(session.path) in said and session.path.parent == tmp_path / "other"
    again, warning = read_session(session.path)
    assert not warning and again.state == session.state


FULL = """
import os, sys
sys.path.insert(0, {root!r})
from pathlib import Path
import tui
from screen.session import Session, State, read_session
from vocabulary.files import write_text
from vocabulary.nodes import UserError
where = Path({where!r})
session = Session(State(), where / "s.jsonl")
n = 0
while not session.trouble:
    session.do("prompt", prompt={{"clean": "x" * 3000, "corrupt": str(n)}})
    n += 1
    assert n < 200
kept = (where / "s.jsonl").read_bytes()
assert kept.endswith(b"\\n") and n > 3, n
read, warning = read_session(where / "s.jsonl")
assert not warning and read.actions == n - 1, (warning, read.actions, n)
(where / "old.txt").unlink(missing_ok=True) if {small} else None
try:
    write_text(where / "export.txt", "y" * 10**6)
    raise SystemExit("a full disk took a megabyte")
except UserError as error:
    assert "can't be written" in str(error), error
assert not list(where.glob(".part*")) and not (where / "export.txt").exists()
{more_room}
session.do("keep", part="L0H1")
assert not session.trouble, session.trouble
session.close()
read, warning = read_session(where / "s.jsonl")
assert not warning and read.state == session.state and read.actions == n + 1
print("kept", n)
"""


def test_a_real_full_disk(tmp_path):
    """A file system of 64 kB in a namespace of its own; where none can be mounted, a limit on the size of files."""
    where = tmp_path / "disk"
    where.mkdir()
    fields = {"root": str(ROOT), "where": str(where)}
    mount = f"mount -t tmpfs -o size=64k tmpfs {where} && dd if=/dev/zero of={where}/old.txt bs=1k count=32 status=none && exec "
    code = FULL.format(**fields, small=False, more_room='(where / "old.txt").unlink()')
    done = subprocess.run(["unshare", "-rm", "sh", "-c", f'{mount} "$0" -c "$1"', sys.executable, code], capture_output=True, text=True)
    if "mount" in done.stderr or "unshare" in done.stderr:
        limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (32000, -1))\n"
        room = "resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))"
        done = subprocess.run([sys.executable, "-c", limit + FULL.format(**fields, small=True, more_room=room)], capture_output=True, text=True)
    assert done.returncode == 0 and "kept" in done.stdout, done.stderr


# ------------------------------------------------------------------ two screens


def test_the_second_screen_goes_on_in_a_copy(tmp_path):
    path = tmp_path / "s.jsonl"
    first = Session(State(), path)
    first.do("keep", part="L0H1")
    second, warning = read_session(path)
    assert not warning and "is open in another screen" in (said := second.log.claim()) and str(second.path) in said and second.path != path
    second.do("keep", part="L0H2")
    first.do("keep", part="L0H3")
    for session, nodes in ((first, ("L0H1", "L0H3")), (second, ("L0H1", "L0H2"))):
        session.close()
        again, warning = read_session(session.path)
        assert not warning and again.state.circuits[0].nodes == nodes
    third, _ = read_session(path)
    assert third.log.claim() == "" and third.path == path, "closed: it can be had"


def test_a_file_that_changed_since_it_was_read_is_left_alone(tmp_path):
    path = tmp_path / "s.jsonl"
    hunt(path)
    one, other = read_session(path)[0], read_session(path)[0]
    one.do("clear")
    one.close()
    other.do("clear")
    assert other.path != path and "was changed" in other.trouble
    other.do("clear")
    assert not other.trouble
    one, _ = read_session(path)
    one.do("clear")
    path.unlink()
    one.do("clear")
    assert path.exists() and read_session(path)[0].state == one.state, "deleted under it: written again"


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch):
    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    hunt(tmp_path / "s.jsonl")
    monkeypatch.setattr(fcntl, "flock", none)
    session, _ = read_session(tmp_path / "s.jsonl")
    assert "no locks" in session.log.claim() and session.path == tmp_path / "s.jsonl"
    session.do("clear")
    session.do("keep", part="L0H1")
    session.close()
    assert read_session(session.path)[0].state == session.state


@settings(max_examples=30, **QUIET)
@given(st.lists(st.tuples(st.booleans(), ACTIONS), max_size=14))
def test_two_screens_in_any_order(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("s") / "s.jsonl"
    hunt(path)
    both = [read_session(path)[0], read_session(path)[0]]
    both[0].log.claim(), both[1].log.claim()
    for which, (name, args) in steps:
        with contextlib.suppress(UserError):
            both[which].do(name, **args)
    for session in both:
        session.close()
        if session.written:
            again, warning = read_session(session.path)
            assert not warning and again.state == session.state


def test_a_file_that_is_there_already_is_left_alone(tmp_path, own_home):
    (tmp_path / "s.jsonl").write_text("mine")
    session, states = hunt(tmp_path / "s.jsonl")
    assert (tmp_path / "s.jsonl").read_text() == "mine" and session.path.parent == own_home / "sessions"
    assert read_session(session.path)[0].state == states[-1]


def test_files_are_ones_own(tmp_path):
    session, _ = hunt(tmp_path / "a" / "b" / "s.jsonl")
    assert stat.S_IMODE(session.path.stat().st_mode) == 0o600
    assert [stat.S_IMODE(f.stat().st_mode) for f in (session.path.parent, session.path.parent.parent)] == [0o700, 0o700]


async def test_restoring_a_session_in_the_screen(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(100, 30)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "d")
        mine = app.session.path
        other = hunt(tmp_path / "other.jsonl")[0].path
        for path, words in ((mine, "1 steps back"), (other, "steps back"), (mine, "1 steps back")):
            await press(app, pilot, "r")
            app.focused.value = str(path)
            await press(app, pilot, "enter")
            assert words in shown(app) and app.session.path == path, "its own, let go of and taken again"
        held, _ = read_session(other)
        assert held.log.claim() == ""
        await press(app, pilot, "r")
        app.focused.value = str(other)
        await press(app, pilot, "enter")
        assert "another screen" in shown(app).replace("\n", "") and app.session.path not in (mine, other)
        await press(app, pilot, "d")
        assert held.do("clear") and not held.trouble
        held.close()


async def test_not_saved_stays_on_the_screen_until_it_is(engines, tmp_path, monkeypatch):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(100, 30)) as pilot:
        await press(app, pilot)
        with monkeypatch.context() as m:
            Failing(m, "fsync", range(3))
            await press(app, pilot, "d")
            assert "NOT SAVED" in shown(app) and app.state.base == "corrupt"
            await press(app, pilot, "j")
            assert "NOT SAVED" in shown(app)
        await press(app, pilot, "d")
        assert "NOT SAVED" not in shown(app) and app.state.base == "clean"
    again, warning = read_session(app.session.path)
    assert not warning and again.state == app.state and len(again.past) == 2
