"""An engine that outlives its screens: seats in the scheduler, the relay and the socket, dropped lines, and what the screen says. No model, but the last."""

import asyncio
import contextlib
import io
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import PROMPT
from kept import INFO, Pretended
from ui import LocalClient, make_app, press, shown

from model import relay
from model.host import Host, Screen
import model.scheduler as scheduling
from model.scheduler import PATIENCE, OthersLook, Scheduler, Seat
from screen import line as lines
from screen.client import Client, Job, EngineDied, EngineError, Superseded
from techniques.output.requests import Run
from tui import first_state
from vocabulary.nodes import UserError
from vocabulary.prompts import Study
from vocabulary.requests import Load, LoadForAll, News, Progress, Where
from vocabulary.wire import Frame, encode, read_sealed, sealed

LONG_ENOUGH = 1.0  # minutes that an engine of a test stays


def run(steps: int) -> Run:
    return Run(Study(PROMPT), steps)


# ------------------------------------------------------------------ seats


class Desk:
    """A scheduler with screens; what each of them was sent."""

    def __init__(self, *names: str, keeps: bool = True):
        self.sent, self.closed = {n: [] for n in names}, []
        self.scheduler = Scheduler(self.start, keeps=keeps)
        self.seats = {n: Seat(self.sent[n].append, n, looks=True) for n in names}
        self.scheduler.seats = [*self.seats.values()]

    def start(self, body: object):
        try:
            if isinstance(body, Load):
                self.scheduler.ask_first(body)
                self.scheduler.behind()
                return INFO
            for n in range(body.k):
                yield INFO if n % 2 else Progress(n, body.k)
            return INFO
        finally:
            self.closed.append(body)

    def ask(self, name: str, ident: int, steps: int = 1, slot: str = "", priority: int = 1, body: object = None, sure: bool = False) -> None:
        self.scheduler.put(Frame("ask", ident, slot, priority, body or run(steps)), self.seats[name], sure)

    def run(self, steps: int = 10**6) -> None:
        while steps and self.scheduler.step():
            steps -= 1

    def kinds(self, name: str, ident: int) -> list[str]:
        return [f.kind for f in self.sent[name] if f.id == ident]


def test_slots_and_cancels_are_each_screens_own():
    desk = Desk("a", "b")
    for name in "ab":
        desk.ask(name, 1, 5, "lens")
    desk.run(3)
    desk.ask("b", 2, 1, "lens")
    desk.scheduler.put(Frame("cancel", 1), desk.seats["b"])
    desk.run()
    assert desk.kinds("a", 1)[-1] == "result" and desk.kinds("b", 1)[-1] == "cancelled" and desk.kinds("b", 2)[-1] == "result"
    assert {f.id for f in desk.sent["a"]} == {1}


def test_screens_take_turns_and_none_waits_for_ever():
    desk = Desk("a", "b")
    desk.ask("a", 1, 20)
    desk.ask("a", 2, 20)
    desk.ask("b", 1, 10)
    desk.run(20)
    assert len(desk.sent["a"]) == len(desk.sent["b"]) == 10
    desk = Desk("a", "b")
    desk.ask("a", 1, 1000, priority=0)
    desk.ask("b", 1, 3, priority=2)
    desk.run(4 * (PATIENCE + 1))
    assert desk.kinds("b", 1)[-1] == "result" and len(desk.sent["a"]) == 4 * PATIENCE


def test_what_a_gone_screen_asked_goes_to_the_next_that_asks_for_it(monkeypatch):
    monkeypatch.setattr(scheduling, "LONG", 0.0)
    desk = Desk("a", "b", "c")
    desk.ask("a", 1, 6)
    desk.run(4)
    desk.scheduler.leave(desk.seats["a"])
    desk.ask("b", 9, 4)  # a new screen's own comes first
    desk.run(4)
    assert desk.kinds("a", 1) == ["progress", "partial"] * 2 and [j.ask.id for j in desk.scheduler.told()] == [1]
    desk.ask("b", 7, 6)
    assert desk.kinds("b", 7) == ["partial"], "what was found before"
    desk.run()
    assert desk.kinds("b", 7)[-1] == "result" and desk.closed.count(run(6)) == 1
    desk.scheduler.leave(desk.seats["b"])  # the line broke before the result arrived, or after: it is there
    desk.ask("c", 3, 6)
    assert desk.kinds("c", 3) == ["result"] and desk.closed.count(run(6)) == 1
    desk.run()
    assert desk.scheduler.jobs == []


def test_an_agent_takes_and_leaves_nothing(monkeypatch):
    """A seat apart adopts no job of a screen that went, ends none, replaces no model of theirs, and its own end with it."""
    monkeypatch.setattr(scheduling, "LONG", 0.0)
    desk = Desk("a", "agent")
    desk.seats["agent"].apart, desk.seats["agent"].looks = True, False
    desk.ask("a", 1, 6)
    desk.ask("a", 2, body=Load("slow"))
    desk.scheduler.leave(desk.seats["a"])
    desk.ask("agent", 1, body=Load("other"))
    assert [j.ask.id for j in desk.scheduler.jobs if j.seat.gone] == [1, 2], "a load of theirs goes on"
    desk.run()
    assert desk.kinds("agent", 1) == ["error"] and "left results or work" in desk.sent["agent"][-1].body.message
    desk.ask("agent", 2, 6)
    desk.run(2)
    assert len(desk.scheduler.told()) == 1 and desk.kinds("agent", 2)[0] == "progress", "not the finished one"
    desk.scheduler.leave(desk.seats["agent"])
    assert desk.scheduler.jobs == [] and len(desk.scheduler.told()) == 1


def test_hello_comes_before_any_answer(monkeypatch):
    """Also where the screen has asked before the engine greets it: what comes before hello is passed over as a banner."""
    host, asked, sent = Host(Pretended()), io.BytesIO(sealed(encode(Frame("ask", 1, "load", 1, Load("model "))))), io.BytesIO()
    screen = Screen(asked.read, sent, lambda: None)

    class AtOnce:
        def __init__(self, target, daemon):
            self.target = target

        def start(self) -> None:
            if self.target != screen.write_all:
                self.target()
                while not host.inbox.empty():
                    host.inbox.get()()
                while host.scheduler.step():
                    pass

    monkeypatch.setattr(threading, "Thread", AtOnce)
    host.join(screen)
    while data := screen.flow.take():
        sent.write(data)
    sent.seek(0)
    frames = [read_sealed(sent.read)]
    while frames[-1] is not None:
        frames.append(read_sealed(sent.read))
    assert frames[0].kind == "hello" and frames[-2].kind == "result"


@pytest.mark.parametrize("frame", [Frame("piece", 1), Frame("piece", 1, body=Load("x")), Frame("ping")])
def test_a_fault_of_a_screens_threads_ends_that_screen_in_words(frame, monkeypatch, capsys):
    """A piece that is none, a fault in reading; and in writing."""
    host, gone, sent = Host(Pretended(), "socket"), [], io.BytesIO()
    screen = Screen(io.BytesIO(sealed(encode(frame))).read, sent, lambda: gone.append(1))
    if frame.kind == "ping":
        monkeypatch.setattr(screen.flow, "arrived", lambda frame: 1 / 0)
    writer = threading.Thread(target=screen.write_all)
    writer.start()
    host.read_all(screen)
    screen.close()
    writer.join()
    sent.seek(0)
    last = read_sealed(sent.read).body
    assert gone == [1] and last.stopped and "can't read what this screen sends: " in last.text
    assert last.text.endswith("a piece without a part of a frame" if frame.kind == "piece" else "ZeroDivisionError('division by zero')")
    screen = Screen(None, None, lambda: gone.append(2))
    screen.put(Frame("hello"))
    screen.write_all()
    assert gone == [1, 2] and "Traceback" in capsys.readouterr().err


def test_without_keeping_nothing_outlives_its_screen():
    desk = Desk("a", keeps=False)
    desk.ask("a", 1, 6)
    desk.run(2)
    desk.scheduler.leave(desk.seats["a"])
    assert desk.scheduler.jobs == [] and desk.closed == [run(6)]


def test_a_model_change_asks_and_then_ends_what_ran_on_the_old_one():
    desk = Desk("a", "b")
    desk.ask("a", 1, 50)
    desk.run(2)
    desk.ask("b", 1, body=Load("other"))
    desk.run(2)
    refused = desk.sent["b"][-1]
    assert refused.kind == "error" and refused.body.kind == "others" and "1 other screen looks" in refused.body.message
    desk.ask("b", 2, body=Load("other"), sure=True)
    desk.run(1)
    assert desk.kinds("b", 2) == ["result"] and desk.kinds("a", 1)[-1] == "cancelled"
    assert [f.body for f in desk.sent["a"] if f.kind == "news"] == [News("the model was changed to other by another screen", Load("other"))]
    desk.ask("a", 3)  # sent before the news came: it would be answered by a model that this screen does not know of
    desk.run()
    assert desk.kinds("a", 3) == ["cancelled"]
    desk.ask("a", 4, body=Load("other"), sure=True)
    desk.ask("a", 5)
    desk.run()
    assert desk.kinds("a", 5)[-1] == "result"


def test_one_who_only_arrives_is_not_moved_to_anothers_model():
    desk = Desk("a", "b")
    desk.seats["b"].looks = False
    desk.ask("a", 1, body=Load("first"))
    desk.run()
    assert desk.sent["b"] == [] and not desk.seats["b"].behind


def test_a_refusal_is_a_users_error():
    assert issubclass(OthersLook, UserError)


# ------------------------------------------------------------------ processes


class Bench:
    """Screens' ends, and the engine behind them, in a folder of the test."""

    def __init__(self, base: Path, minutes: float, monkeypatch):
        self.base, self.clients, self.heard = base, [], []
        command = [sys.executable, str(Path(__file__).with_name("kept.py")), str(base), str(minutes)]
        self.command = command
        monkeypatch.setattr(Client, "command", lambda client: command)
        monkeypatch.setattr(Client, "kept", True)
        monkeypatch.setattr(relay, "BASE", base)

    async def client(self) -> Client:
        link = Client(self.base / "screen.log", on_news=self.heard.append)
        await link.start()
        self.clients.append(link)
        return link

    async def drop(self, link: Client) -> None:
        """The line breaks."""
        link.process.kill()
        await link.reader

    def engines(self) -> list[int]:
        return [int(p) for p in (self.base / "started").read_text().split()]

    async def close(self) -> None:
        for link in self.clients:
            await link.stop()
        for pid in self.engines() if (self.base / "started").exists() else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def minutes():
    return LONG_ENOUGH


@pytest.fixture
async def bench(near, minutes, monkeypatch):
    found = Bench(near, minutes, monkeypatch)
    yield found
    await found.close()


async def until(what, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z" if Path(f"/proc/{pid}/stat").exists() else True


async def dropped(bench: Bench, what: str, n: int) -> None:
    """A line that breaks in the middle of `what`, and the next screen."""
    link, parts = await bench.client(), []
    load, sweep = Load(f"model {n if what == 'load' else ''}"), run({"sweep": 150, "discovery": 1040, "load": 40}[what] + n)
    if what != "load":
        await link.ask("load", load)
    request = load if what == "load" else sweep
    task = asyncio.create_task(link.ask("slot", request, 1, parts.append))
    await until(lambda: len(parts) > 2 if what == "sweep" else any(job.progress.done > 2 for job in link.jobs.values()))
    bench.heard.clear()
    await bench.drop(link)
    with pytest.raises(EngineDied):
        await task
    link, again = await bench.client(), []
    result = await link.ask("load", load)
    assert result == INFO
    if what != "load":
        await until(lambda: bench.heard)
        assert request in [f.body for f in bench.heard if f.kind == "left"]
    if what != "load":
        assert (await link.ask("slot", request, 1, again.append)).choices[0].name == str(sweep.k)
        numbers = [int(p.choices[0].name) for p in again]
        assert numbers == sorted(set(numbers)), "parts in order, and none twice"
    await link.stop()


@pytest.mark.table
@pytest.mark.parametrize("what", ["sweep", "load", "discovery"])
async def test_a_dropped_line_loses_nothing(bench, what):
    for n in range(2):
        await dropped(bench, what, n)
    assert len(bench.engines()) == 1, "no second engine"


@pytest.mark.table
@pytest.mark.parametrize("what", ["sweep", "load", "discovery"])
async def test_forty_dropped_lines(bench, what):
    for n in range(40):
        await dropped(bench, what, n)
    assert len(bench.engines()) == 1
    (line,) = relay.stop()
    assert "goes on" not in line and "go on" not in line, "every job was taken up again"
    await until(lambda: not alive(bench.engines()[0]))


@pytest.mark.table
async def test_screens_that_come_at_once_find_one_engine_and_share_it(bench):
    a, b, *others = await asyncio.gather(*(bench.client() for _ in range(4)))
    await asyncio.gather(*(link.ask("load", Load("model ")) for link in (a, b, *others)))
    assert len(bench.engines()) == 1
    await others[0].stop()
    await others[1].stop()
    first = asyncio.create_task(a.ask("lens", run(30)))
    await asyncio.sleep(0)
    with pytest.raises(Superseded):
        await asyncio.gather(asyncio.create_task(b.ask("lens", run(2000))), b.ask("lens", run(3)))
    assert (await first).choices[0].name == "30"
    where = await a.ask("engine", Where("me"))
    assert where.pid == bench.engines()[0] and len(where.screens) == 1 and where.loaded == Load("model ")
    with pytest.raises(EngineError, match="1 other screen looks") as refused:
        await a.ask("load", Load("another"))
    assert refused.value.kind == "others"
    assert await a.ask("load", LoadForAll(Load("another"))) == INFO
    await until(lambda: [f for f in bench.heard if f.kind == "news"])
    with pytest.raises(Superseded):
        await b.ask("lens", run(1))
    await until(lambda: a.line.times)


@pytest.mark.table
async def test_a_stale_socket_and_a_stopped_engine(bench):
    link = await bench.client()
    await link.ask("load", Load("model "))
    os.kill(bench.engines()[0], signal.SIGKILL)  # leaves its socket
    await link.reader
    again = await bench.client()
    await again.ask("load", Load("model "))
    first, second = bench.engines()
    assert not alive(first) and alive(second)
    (line,) = relay.stop()
    assert str(second) in line and "1 screen looks at it" in line
    await again.reader
    assert again.stopped == "the engine was stopped (engine.py stop)" and relay.stop() == [] and not [*bench.base.rglob("*.sock")]


@pytest.mark.table
async def test_an_engine_of_other_code(bench, monkeypatch):
    link = await bench.client()
    await link.ask("load", Load("model "))
    monkeypatch.setattr(relay, "version", lambda: "other")
    monkeypatch.setattr(relay, "PROGRAM", tuple(bench.command))
    with pytest.raises(UserError, match="runs other code than is here now, and 1 screen looks at it"):
        relay.connect()
    pid = bench.engines()[0]
    await link.stop()
    await until(lambda: not (found := relay.call(relay.place(), "only ask")) or not (found[0].close() or found[1]["busy"]))
    with pytest.raises(UserError, match="no engine stays"):  # those that it starts are of the code that is here: other again
        relay.connect()
    assert not alive(pid) and len(bench.engines()) > 1


@pytest.mark.table
@pytest.mark.parametrize("minutes", [0.005])
async def test_no_orphan_after_the_set_time(bench):
    link = await bench.client()
    await link.ask("load", Load("model "))
    task = asyncio.create_task(link.ask("slot", run(10**5)))
    await until(lambda: any(job.progress.done for job in link.jobs.values()))
    await bench.drop(link)
    with pytest.raises(EngineDied):
        await task
    await until(lambda: not alive(bench.engines()[0]), 10)
    assert not [*bench.base.rglob("*.sock")]


@pytest.mark.table
async def test_only_its_owner_may_enter(bench):
    await bench.client()
    await until(lambda: [*bench.base.rglob("*.sock")])
    (place,) = [p for p in bench.base.iterdir() if p.is_dir()]
    assert stat.S_IMODE(place.stat().st_mode) == 0o700 and {stat.S_IMODE(f.stat().st_mode) for f in place.iterdir()} == {0o600}
    assert len(str(relay.place())) < 107 and len(str(Path("/tmp/loupe-4294967294") / relay.place().name)) < 107
    place.chmod(0o755)
    with pytest.raises(UserError, match="nobody else may enter"):
        relay.place()
    place.chmod(0o700)
    place.rename(bench.base / "moved")
    place.symlink_to(bench.base / "moved")
    with pytest.raises(UserError, match="nobody else may enter"):
        relay.place()
    place.unlink()
    (bench.base / "moved").rename(place)


def test_a_setting_that_is_no_number_is_one_line(monkeypatch):
    monkeypatch.setattr(relay, "settings", lambda: {"LOUPE_KEEP_ENGINE_MINUTES": "a while"})
    with pytest.raises(UserError, match="write a whole number of minutes"):
        relay.minutes()
    code = "from model import relay; relay.settings = lambda: {'LOUPE_KEEP_ENGINE_MINUTES': 'x'}; relay.attach()"
    done = subprocess.run([sys.executable, "-c", code], cwd=relay.ROOT, stdin=subprocess.DEVNULL, capture_output=True)
    assert done.returncode == 1 and b"write a whole number" in done.stdout and b"Traceback" not in done.stderr


def test_a_relay_needs_little():
    code = "import sys, model.relay; sys.exit(any(m in sys.modules for m in ('numpy', 'torch', 'msgspec', 'textual')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=relay.ROOT).returncode == 0


# ------------------------------------------------------------------ the screen


def test_what_is_said_of_a_line(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lines.time, "monotonic", lambda: now[0])
    line = lines.Line()
    now[0] += 21
    assert line.words().startswith("no word from an engine yet")
    line.hear(Frame("hello"))
    assert line.words() == ""
    for _ in range(3):
        line.number, line.asked = line.number + 1, now[0]
        now[0] += 0.23
        line.hear(Frame("ping", line.number))
    assert line.words() == "line 200 ms"
    now[0] += 12
    assert line.words() == "line silent for 10 s"
    line.hear(Frame("hello"))
    assert line.words() == "line 200 ms"


async def test_what_the_engine_says_unasked_is_shown(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        request = run(7)
        app.shared.heard(Frame("left", body=request))
        app.shared.heard(Frame("news", body=News("the model was changed to zoo by another screen", app.state.model)))
        await press(app, pilot)
        text = " ".join(shown(app).split())
        assert (
            "the model was changed to zoo by another screen · here from a screen that went: Run (its session shows it: r, or --resume) · loaded zoo" in text
            and "loaded zoo" in text
        )
        assert request in app.requests.started and app.info is not None
        app.client.line.said = "line silent for 10 s"
        app.draw_top()
        await pilot.pause()
        assert "line silent for 10 s" in shown(app)


def test_the_pretended_engine_has_what_a_host_uses():
    from engine import Engine

    assert all(hasattr(Engine(), name) for name in vars(Pretended()))


class Rounds(LocalClient):
    """A line on which answers arrive together, a round trip after they were asked for."""

    def __init__(self, engine):
        super().__init__(engine)
        self.gate, self.waiting = asyncio.Event(), []

    async def ask(self, slot, request, priority=1, on_partial=None):
        self.waiting.append(slot)
        job = self.jobs[len(self.asked) + len(self.waiting)] = Job(0, slot, request, None, on_partial)
        try:
            await self.gate.wait()
            return await super().ask(slot, request, priority, on_partial)
        finally:
            self.jobs = {n: j for n, j in self.jobs.items() if j is not job}

    async def round(self) -> list[str]:
        """Let what was asked be answered; the slots of that."""
        some, self.waiting = self.waiting, []
        gate, self.gate = self.gate, asyncio.Event()
        gate.set()
        return [slot for slot in some if slot != "status"]


async def test_a_keys_answer_takes_two_round_trips_at_most(engines, tmp_path):
    """Whatever the line's delay: no key asks, waits, asks and waits a third time."""
    client = Rounds(engines["zoo"])
    app, trips = make_app(client, tmp_path, first_state({})), {}
    async with app.run_test(size=(120, 36)) as pilot:
        seen = []

        async def count(*keys: str) -> int:
            await pilot.press(*keys)
            for n in range(9):
                for _ in range(4):
                    await pilot.pause()
                if not (some := await client.round()):
                    return n
                seen.append((keys, some))
            raise AssertionError("it goes on and on")

        assert await count() <= 4  # the model, the run, what depends on it
        for key in ("k", "h", "]", "a", "u", "p", "X", ")", "d", "f", "2", "enter", "h", "3", "4", "j", "5", "6", "7", "0", "1", "x"):
            trips[key] = max(await count(key), trips.get(key, 0))
    assert max(trips.values()) <= 2, str((trips, seen))
