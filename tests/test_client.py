"""The screen's end of the wire, with processes that are only pipes."""

import asyncio
import io
import random
import time
from types import SimpleNamespace

import numpy as np
import pytest

from screen import client
from screen.client import Client, EngineDied, EngineError
from vocabulary.flow import Piece
from vocabulary.requests import Progress, Status, StatusResult
from vocabulary.wire import DAMAGED, HEAD, MARK, Frame, WireError, encode, read_sealed, sealed

HELLO = sealed(encode(Frame("hello")))


class Pipe:
    """A process: what it prints is fed by hand, and it ends when told."""

    def __init__(self):
        self.stdout, self.returncode, self.pid, self.ended = asyncio.StreamReader(), None, 0, asyncio.Event()
        self.stdout.feed_data(HELLO)
        self.stdin = SimpleNamespace(is_closing=lambda: False, write=lambda data: None, close=self.end)

    async def attach(self) -> None: ...

    async def wait(self) -> int:
        await self.ended.wait()
        return self.returncode

    def end(self, code: int = 0) -> None:
        self.returncode = code
        self.ended.set()
        self.stdout.feed_eof()


@pytest.fixture
def pipes(monkeypatch):
    made = []

    def process(started: None) -> Pipe:
        made.append(Pipe())
        return made[-1]

    monkeypatch.setattr(client, "spawn", lambda command, log: (None, "", log.stat().st_size if log.is_file() else 0))
    monkeypatch.setattr(client, "Process", process)
    return made


def answer(ident: int) -> bytes:
    return sealed(encode(Frame("result", ident, "status", 1, StatusResult(ident, 0, 0, 0, 0, ()))))


async def asked(link: Client, slot: str = "status") -> asyncio.Task:
    """A request on its way."""
    task = asyncio.create_task(link.ask(slot, Status()))
    await asyncio.sleep(0)
    return task


async def test_a_dead_engines_reader_leaves_the_new_engines_jobs_alone(pipes, tmp_path):
    deaths = []
    link = Client(tmp_path / "log", on_death=deaths.append)
    await link.start()
    old, reader, first = pipes[0], link.reader, await asked(link, "before")
    old.returncode = -9  # dead, and its reader does not know it yet
    await link.start()
    second = await asked(link, "after")
    old.end(-9)
    await reader
    with pytest.raises(EngineDied, match="SIGKILL"):
        await first
    assert not second.done() and deaths == []
    pipes[1].stdout.feed_data(answer(link.count))
    assert (await second).memory == link.count
    await link.stop()


async def test_a_death_ends_the_jobs_and_is_told_once(pipes, tmp_path):
    deaths, seen = [], []
    link = Client(tmp_path / "log", on_progress=lambda job: seen.append(job.progress), on_death=deaths.append)
    await link.start()
    task = await asked(link)
    pipes[0].stdout.feed_data(sealed(encode(Frame("progress", link.count, "status", 1, Progress(1, 2)))))
    pipes[0].end(3)
    with pytest.raises(EngineDied, match="exit code 3"):
        await task
    assert seen == [Progress(1, 2)] and deaths == ["exit code 3"] and link.jobs == {}
    with pytest.raises(EngineDied, match="not running"):
        await link.ask("status", Status())


async def test_a_screen_that_closes_cancels_nothing(pipes, tmp_path):
    """What it asked goes on in an engine that stays; a key that cancels does so."""
    link = Client(tmp_path / "log")
    await link.start()
    sent = []
    pipes[0].stdin.write = sent.append
    for leaving, kinds in ((False, 2), (True, 1)):
        sent.clear()
        link.leaving, task = leaving, await asked(link)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(sent) == kinds
    await link.stop()


NOISE = bytes(random.Random(0).randbytes(30_000))


@pytest.mark.parametrize("said", [b"Welcome to gpu01\nLoading cuda/12.4\n", b"no newline", b"\x00" * 3000, NOISE, b"y\n" * 50_000, MARK[:3], MARK[:2] + b"\n"])
async def test_what_others_print_between_frames_is_passed_over(pipes, tmp_path, said):
    """A banner, noise, 100 kB: before the engine's first word, and after it."""
    deaths = []
    link = Client(tmp_path / "log", on_death=deaths.append)
    await link.start()
    pipe = pipes[0]
    pipe.stdout._buffer.clear()
    pipe.stdout.feed_data(said + HELLO + said)
    for _ in range(2):
        task = await asked(link)
        whole = answer(link.count)
        pipe.stdout.feed_data(whole[:9])  # arrives in two pieces
        await asyncio.sleep(0)
        pipe.stdout.feed_data(whole[9:] + said)
        assert (await task).memory == link.count and deaths == []
    await link.stop()


async def test_what_was_started_before_the_screen_is_its_engine(pipes, tmp_path):
    link = Client(tmp_path / "log")
    link.early = (None, "said of the log", 0)
    assert await link.start() == "said of the log" and link.early is None and link.alive
    await link.stop()
    assert await link.start() == ""  # the next is started as ever
    await link.stop()


@pytest.mark.parametrize(
    "came, reason",
    [
        (b"bash: uv: command not found\n", "not an engine: it says 'bash: uv: command not found'"),
        (b"\x00" * 3000 + NOISE, "not an engine: it says "),
        (b"y\n" * 600_000, "not an engine: it says 'y y y"),
        (HELLO, "exit code 0"),
        (HELLO + b"CANCELLED DUE TO TIME LIMIT\n", "exit code 0; it said 'CANCELLED DUE TO TIME LIMIT'"),
        (HELLO + HELLO[:30], "exit code 0"),
        (HELLO + HELLO[:20] + b"Loading cuda" + HELLO[20:], DAMAGED),
        (HELLO + HELLO[:-3] + b"\x00\x00\x00", DAMAGED),
    ],
)
async def test_what_is_no_engine_or_is_damaged_is_one_line(pipes, tmp_path, came, reason):
    deaths = []
    link = Client(tmp_path / "log", on_death=deaths.append)
    await link.start()
    pipe = pipes[0]
    pipe.stdout._buffer.clear()
    pipe.kill = pipe.end
    pipe.stdout.feed_data(came)
    pipe.end()
    await link.reader
    assert len(deaths) == 1 and deaths[0].startswith(reason) and deaths[0].isprintable() and len(deaths[0]) < 200


@pytest.mark.parametrize("said", [b"Loading cuda/12.4\n", b"\0\0"])
@pytest.mark.parametrize("at", range(1, len(MARK) + HEAD + 1))
async def test_noise_in_the_head_of_a_frame_is_said_at_once(pipes, tmp_path, said, at):
    """Not when as many bytes have come as the noise says; the line stays open. In its mark: when the next frame comes."""
    deaths, came = [], HELLO[:at] + said + HELLO[at:] + HELLO
    link = Client(tmp_path / "log", on_death=deaths.append)
    await link.start()
    pipes[0].kill = pipes[0].end
    pipes[0].stdout.feed_data(came)
    await asyncio.wait_for(link.reader, 5)
    assert deaths == [DAMAGED]
    with pytest.raises(WireError, match="damaged" if at >= len(MARK) else "not Loupe's wire"):
        read_sealed(io.BytesIO(came).read)


@pytest.mark.parametrize("first", [b"", HELLO])
@pytest.mark.parametrize("at", range(len(MARK)))
async def test_noise_in_a_mark_is_said_of_a_line_that_is_silent_then(pipes, tmp_path, monkeypatch, first, at):
    """Where no other frame comes; not of noise before a frame, nor of noise alone."""
    link = Client(tmp_path / "log")
    await link.start()
    for said, words in ((b"mail\xff\n", ""), (HELLO[:at] + b"mail\n" * (at > 0) + HELLO[at:], f"{DAMAGED}: ctrl+e connects again" * (at > 0))):
        pipes[0].stdout.feed_data(first + said)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        link.line.began, link.line.heard = time.monotonic() - 30, link.line.heard and time.monotonic() - 30
        assert link.line.words() == (words or ("line silent for 30 s" if link.line.heard else "no word from an engine yet (has its checkout this version?)"))
    link.reader.cancel()


async def test_a_fault_of_the_reader_ends_the_jobs_in_words(pipes, tmp_path, monkeypatch):
    for came in (sealed(encode(Frame("piece", 1))), sealed(encode(Frame("piece", 1, body=Status()))), answer(1)):
        deaths = []
        link = Client(tmp_path / "log", on_death=deaths.append)
        await link.start()
        task = await asked(link)
        if came == answer(1):
            monkeypatch.setattr(link.line, "hear", lambda frame: 1 / 0)
        pipes[-1].kill = pipes[-1].end
        pipes[-1].stdout.feed_data(came)
        with pytest.raises(EngineDied):
            await task
        await link.reader
        assert deaths == [
            "a piece without a part of a frame" if came != answer(1) else "a fault in reading what it sent: ZeroDivisionError('division by zero')"
        ]


async def test_a_question_too_large_to_be_sent_is_refused(pipes, tmp_path):
    link = Client(tmp_path / "log")
    await link.start()
    with pytest.raises(EngineError, match="5.0 GB of arrays .* too large for one message"):
        await link.ask("x", Piece(np.broadcast_to(np.uint8(0), 5 * 10**9), 1))
    assert link.jobs == {} and not link.flow.waiting
    await link.stop()


@pytest.mark.parametrize(
    "log, said",
    [
        ("srun: job 7 queued and waiting for resources\n", "srun: job 7 queued and waiting for resources"),
        (
            "Loading weights: 100%\nsrun: Job step aborted\nslurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***\nsrun: error: n1: task 0: Terminated\n",
            "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***",
        ),
        ("ssh: connect to host gpu01 port 22: Connection refused\n", "ssh: connect to host gpu01 port 22: Connection refused"),
        ("me@gpu01: Permission denied (publickey).\n", "me@gpu01: Permission denied (publickey)."),
        ("Traceback\nPermissionError: [Errno 13] Permission denied: 'x'\nLoading weights\n", ""),
    ],
)
async def test_what_carries_the_engine_says_why(pipes, tmp_path, log, said):
    """While it waits, and when it ends; what stood in the log before is not of this engine."""
    deaths = []
    (tmp_path / "log").write_text("ssh: an older word\n")
    link = Client(tmp_path / "log", "srun -p a", on_death=deaths.append)
    await link.start()
    pipes[0].stdout._buffer.clear()
    with open(tmp_path / "log", "a") as f:
        f.write(log)
    assert link.line.words() == said
    pipes[0].end(255)
    await link.reader
    assert deaths == [f"exit code 255: {said}" if said else "exit code 255: the line broke, or ssh could not connect"]


def test_srun_keeps_nothing_back(tmp_path):
    assert Client(tmp_path, "ssh n1 /opt/slurm/bin/srun --gres=gpu:1").command()[:4] == ["ssh", "n1", "/opt/slurm/bin/srun", "--unbuffered"]
    words = Client(tmp_path, "ssh n1 'cd a && /bin/srun -p b'").command()  # in one that a shell reads
    assert words[:3] == ["ssh", "n1", "cd a && /bin/srun --unbuffered -p b"] and Client(tmp_path, "ssh mysrun 'cd srun.d'").command()[2] == "cd srun.d"
