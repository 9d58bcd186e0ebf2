"""The screen's end of the wire: starts the engine, asks, cancels, and says when it died. Never imports torch."""

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from vocabulary.flow import Flow
from vocabulary.requests import Failure, News, Progress
from vocabulary.wire import DAMAGED, NO_ENGINE, Frame, WireError, holds_head, read_sealed_async
from screen.early import command, kept, spawn
from screen.line import Line, carriers_words


LEFT = re.compile(r"[\d.,]+ (?:s|min) left(?: in this step)?")  # as the engine words it (vocabulary/progress.time_left)
ENDS = {75: "its process is gone", 127: "exit code 127: the command was not found", 255: "exit code 255: the line broke, or ssh could not connect"}
STEP = re.compile(r"[^\d:]*")  # the words of a progress that name its step


class EngineError(Exception):
    """A request failed; the message is the line for the screen. `kind`: that of its Failure."""

    def __init__(self, message: str, kind: str = ""):
        super().__init__(message)
        self.kind = kind


class EngineDied(EngineError): ...


class Superseded(Exception):
    """A newer request took the slot, or this one was cancelled."""


def in_words(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def surface(error: Exception) -> None:
    raise error


class Process:
    """An engine's process, its streams on the event loop."""

    def __init__(self, started: subprocess.Popen):
        self.started, self.pid, self.kill = started, started.pid, started.kill

    async def attach(self) -> None:
        loop, self.stdout = asyncio.get_running_loop(), asyncio.StreamReader()
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(self.stdout), self.started.stdout)
        self.stdin, _ = await loop.connect_write_pipe(asyncio.BaseProtocol, self.started.stdin)

    @property
    def returncode(self) -> int | None:
        return self.started.poll()

    async def wait(self) -> int:
        while self.returncode is None:
            await asyncio.sleep(0.01)
        return self.returncode


@dataclass
class Job:
    id: int
    slot: str
    request: object
    future: asyncio.Future
    on_partial: Callable[[object], None] | None
    progress: Progress = Progress(0, 0)
    started: float = field(default_factory=time.monotonic)
    step: str | None = None  # which of its steps it is in, by its words; None before the first
    since: float = 0.0  # when that began

    def goes_on(self, progress: Progress, step: str) -> None:
        if step != self.step:
            self.step, self.since = step, time.monotonic()
        self.progress = progress

    @property
    def left(self) -> str:
        """Time left of the job where the engine or the count of what it answers says it, else of the step it is in; "" while there is nothing to judge by."""
        p, taken = self.progress, time.monotonic() - self.since
        if found := LEFT.search(p.text):
            return found[0]
        if not 0 < p.done < p.total or taken < 0.5:
            return ""
        return f"{in_words(taken * (p.total - p.done) / p.done)} left{' in this step' if self.step else ''}"

    @property
    def more(self) -> str:
        """What a line about its progress ends with: the time left, unless the engine's own text says it."""
        return "" if LEFT.search(self.progress.text) or not self.left else f" {self.left}"


class Client:
    """
    One engine process. `ask` sends a request and awaits its result; a newer ask in the same slot replaces the older one.
    `on_progress(job)`, `on_death(reason)`, `on_fault(error)`, of drawing a reply, and `on_news(frame)`, of what comes unasked, are called on the event loop.
    """

    def __init__(
        self,
        log: Path,
        via: str = "",
        on_progress: Callable = lambda job: None,
        on_death: Callable = lambda reason: None,
        on_fault: Callable = surface,
        on_news: Callable = lambda frame: None,
    ):
        self.log, self.via, self.on_progress, self.on_death, self.on_fault, self.on_news = log, via, on_progress, on_death, on_fault, on_news
        self.line, self.flow, self.stopped = Line(), Flow(), ""
        self.process: Process | None = None
        self.early: tuple[subprocess.Popen, str, int] | None = None  # what was started before the screen
        self.reader: asyncio.Task | None = None
        self.jobs: dict[int, Job] = {}
        self.count = 0
        self.stopping, self.since = False, 0
        self.leaving = False  # the screen closes: what it asked goes on in an engine that stays

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def start(self) -> str:
        """Start the engine. What there is to say of its log, or ""."""
        self.stopping, self.jobs, self.stopped, self.flow = False, {}, "", Flow(bool(self.via))  # the reader of an engine before this one ends that one's jobs
        self.line = Line(self.said_on_the_way, self.lies_damaged)
        started, note, self.since = self.early or spawn(self.command(), self.log)
        self.early, process = None, Process(started)
        await process.attach()
        self.process = process
        self.reader = asyncio.create_task(self.read(self.process, self.jobs))
        self.write()
        if self.kept:
            self.line.pings = asyncio.create_task(self.line.ping(self.send))
        return note

    @property
    def kept(self) -> bool:
        return kept(self.via)

    def said_on_the_way(self) -> str:
        return carriers_words(self.log, self.since) if self.via else ""

    def lies_damaged(self) -> str:
        """Of a line that is silent: that a frame without its mark lies there, which the next frame would tell."""
        return f"{DAMAGED}: ctrl+e connects again" if self.process is not None and holds_head(bytes(self.process.stdout._buffer)) else ""

    def command(self) -> list[str]:
        return command(self.via)

    async def read(self, process: Process, jobs: dict[int, Job]) -> None:
        """Answer this process's jobs until it ends; then those left have died with it."""
        reason, flow, greeted = "", self.flow, False
        try:
            while True:
                frame, greeted = await read_sealed_async(process.stdout), True
                self.line.hear(frame)
                whole = flow.arrived(frame)
                self.write()
                try:
                    if whole is not None:
                        self.receive(whole, jobs)
                except Exception as error:  # of what draws it: the other jobs go on
                    self.on_fault(error)
        except EOFError as end:
            code, said = await process.wait(), str(end)
            reason = f"killed by {signal.Signals(-code).name}" if code < 0 else ENDS.get(code, f"exit code {code}")
            if said:
                reason = f"{reason}; it said {said!r}" if greeted else f"{NO_ENGINE} {said!r}"
            elif way := self.said_on_the_way():
                reason = f"{reason.partition(':')[0]}: {way}"
            reason = self.stopped or reason
        except Exception as error:
            reason = str(error) if isinstance(error, WireError) else f"a fault in reading what it sent: {error!r}"
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        if process is self.process:
            self.line.end()
        for job in jobs.values():
            if not job.future.done():
                job.future.set_exception(EngineDied(f"the engine died ({reason})"))
        jobs.clear()
        if not self.stopping and process is self.process:
            self.on_death(reason)

    def receive(self, frame: Frame, jobs: dict[int, Job]) -> None:
        if frame.kind in ("news", "left"):
            self.stopped = frame.body.text if isinstance(frame.body, News) and frame.body.stopped else self.stopped
            self.on_news(frame)
        job = jobs.get(frame.id)
        if job is None:
            return  # an answer to a request that was replaced
        match frame.kind:
            case "progress":
                job.goes_on(frame.body, STEP.match(frame.body.text)[0])
                self.on_progress(job)
            case "partial":
                if getattr(frame.body, "total", 0):
                    job.goes_on(Progress(frame.body.done, frame.body.total), "")
                if job.on_partial:
                    job.on_partial(frame.body)
            case "result" | "error" | "cancelled":
                del jobs[frame.id]
                if job.future.done():
                    return
                if frame.kind == "result":
                    job.future.set_result(frame.body)
                elif frame.kind == "cancelled":
                    job.future.set_exception(Superseded())
                else:
                    failure = frame.body if isinstance(frame.body, Failure) else Failure("an error without a message")
                    job.future.set_exception(EngineError(failure.message, failure.kind))

    def send(self, frame: Frame) -> None:
        self.flow.put(frame)
        self.write()

    def write(self) -> None:
        """What may go now."""
        while self.alive and not self.process.stdin.is_closing() and (data := self.flow.take()) is not None:
            self.process.stdin.write(data)

    async def ask(self, slot: str, request: object, priority: int = 1, on_partial: Callable[[object], None] | None = None) -> object:
        """The request's result. EngineError with one line when it fails, Superseded when a newer ask took the slot."""
        if not self.alive:
            raise EngineDied("the engine is not running: ctrl+e starts it")
        for old in [j for j in self.jobs.values() if slot and j.slot == slot]:
            del self.jobs[old.id]
            self.flow.forget(old.id)
            if not old.future.done():
                old.future.set_exception(Superseded())
        self.count += 1
        job = self.jobs[self.count] = Job(self.count, slot, request, asyncio.get_running_loop().create_future(), on_partial)
        try:
            self.send(Frame("ask", job.id, slot, priority, request))
        except WireError as error:
            del self.jobs[job.id]
            raise EngineError(str(error), "user") from error
        try:
            return await job.future
        except asyncio.CancelledError:
            if not self.leaving:
                self.cancel(job.id)
            raise

    def cancel(self, ident: int) -> None:
        """Cancel a job between two of its chunks."""
        if job := self.jobs.pop(ident, None):
            if not self.flow.forget(ident):
                self.send(Frame("cancel", ident))
            if not job.future.done():
                job.future.set_exception(Superseded())

    async def stop(self) -> None:
        """End the engine: EOF first, SIGKILL when it does not go."""
        self.stopping = True
        self.line.end()
        if self.process is None:
            return
        if self.process.returncode is None:
            self.process.stdin.close()
            try:
                await asyncio.wait_for(self.process.wait(), 2)
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                await self.process.wait()
        if self.reader:
            await self.reader
