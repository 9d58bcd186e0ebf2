"""
An engine and the screens that look at its model: threads read what they ask and write what is answered; the main thread computes.

1. `serve` has one screen, at its standard streams, and ends with it. `keep` listens on a Unix socket (model/relay.py) and ends some minutes after its last.
2. What is asked goes through one inbox to the scheduler, so that nothing is computed by two threads.
3. A ping is answered by the thread that reads it, also while a step takes long. A screen that has not been heard for AWAY seconds looks no more.
"""

import contextlib
import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from model import relay
from model.scheduler import Job, Scheduler, Seat
from vocabulary.files import folder
from vocabulary.flow import Flow
from vocabulary.requests import Failure, LoadForAll, News, Where, WhereResult
from vocabulary.wire import Frame, WireError, read_sealed

AWAY = 60.0  # seconds
FULL = 4 << 20  # bytes that wait to be sent; a screen's jobs wait with them


class Screen(Seat):
    """A screen at the other end of a stream. `gone_by` is called by the thread that finds it gone."""

    def __init__(self, read: Callable[[int], bytes], out, gone_by: Callable[[], None], pings: bool = False):
        super().__init__(self.put)
        self.read, self.out, self.gone_by = read, out, gone_by
        self.flow, self.ready, self.writing = Flow(), threading.Condition(), False  # the flow belongs to three threads
        self.heard, self.pings = time.monotonic(), pings
        self.drained: Callable[[], None] = lambda: None

    @property
    def away(self) -> bool:
        return self.gone or self.pings and time.monotonic() - self.heard > AWAY

    @property
    def full(self) -> bool:
        return self.flow.size > FULL

    @property
    def silent(self) -> bool:
        """Whether all was written that is to be sent."""
        return not self.flow.waiting and not self.writing

    def put(self, frame: Frame) -> None:
        if not self.gone:
            with self.ready:
                self.flow.put(frame)
                self.ready.notify()

    def arrived(self, frame: Frame) -> Frame | None:
        with self.ready:
            try:
                return self.flow.arrived(frame)
            except WireError as error:
                return unreadable(error)
            finally:
                self.ready.notify()

    def forget(self, frame: Frame) -> None:
        """What waits to be sent for a job that is cancelled or replaced is not."""
        with self.ready:
            self.flow.forget(frame.id, frame.slot)

    def next(self) -> bytes | None:
        with self.ready:
            self.writing = False
            while not self.gone:
                before = self.full
                if (data := self.flow.take()) is not None:
                    self.writing = True
                    if before and not self.full:
                        self.drained()
                    return data
                self.ready.wait()
        return None

    def write_all(self) -> None:
        """A thread's whole work."""
        try:
            while (data := self.next()) is not None:
                self.out.write(data)
                self.out.flush()
        except OSError:
            self.gone_by()
        except Exception:
            traceback.print_exc()
            self.gone_by()

    def close(self) -> None:
        with self.ready:
            self.gone = True
            self.ready.notify()


def unreadable(error: WireError) -> Frame:
    """What stands for a frame whose body can't be read: why. The error itself where nothing of it can be."""
    if error.frame is None:
        raise error
    return replace(error.frame, body=Failure(str(error), "user"))


class Host:
    """The engine, the scheduler and the inbox; `path` and `told`: the socket, and the pipe that says when it listens."""

    def __init__(self, engine, path: str = "", told: str = ""):
        self.engine, self.path, self.told = engine, Path(path) if path else None, int(told or 0)
        self.inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self.scheduler = Scheduler(self.start, after=engine.check_hooks, model=lambda: engine.model.info.key if engine.model else "", keeps=bool(path))
        engine.swap, engine.ask_first = self.scheduler.behind, self.scheduler.ask_first
        self.started, self.minutes, self.since, self.gate = time.time(), 0, time.monotonic(), threading.Lock()

    # ---------------------------------------------------------------- screens

    def join(self, screen: Screen) -> None:
        """Take a screen in: say hello, before anything that it asks is answered."""
        screen.drained = partial(self.inbox.put, lambda: None)
        screen.put(Frame("hello"))
        self.inbox.put(partial(self.scheduler.seats.append, screen))
        for work in (screen.write_all, partial(self.read_all, screen)):
            threading.Thread(target=work, daemon=True).start()

    def tell(self, screen: Screen) -> None:
        """Which jobs nobody waits for."""
        for job in self.scheduler.told():
            screen.put(Frame("left", body=job.ask.body))

    def read_all(self, screen: Screen) -> None:
        """Owns what the screen says, until its end. With its first word it is told what goes on: then it is known whether the line is paced."""
        first = True
        while True:
            try:
                try:
                    frame = read_sealed(screen.read)
                except WireError as error:
                    frame = unreadable(error)
                whole = frame and screen.arrived(frame)
            except OSError:
                frame = None
            except Exception as error:
                words = str(error) if isinstance(error, WireError) else f"a fault in reading it: {error!r}"
                print(f"stdin: {words}", file=sys.stderr, flush=True)
                self.say_last(f"the engine can't read what this screen sends: {words}", [screen])
                if self.path is None:
                    os._exit(1)
                break
            if frame is None:
                break
            screen.heard = self.since = time.monotonic()
            if first:
                self.inbox.put(partial(self.tell, screen))
                first = False
            if (frame := whole) is None:
                continue
            if frame.kind == "ping":
                screen.put(frame)
            elif frame.kind == "stop":
                self.stop(screen)
            else:
                self.inbox.put(partial(self.take, frame, screen))
        screen.gone_by()

    def take(self, frame: Frame, screen: Screen) -> None:
        sure = isinstance(frame.body, LoadForAll)
        screen.forget(frame)
        self.scheduler.put(replace(frame, body=frame.body.load) if sure else frame, screen, sure)

    def start(self, body: object):
        """What a request does: of itself the host knows, of the model the engine."""
        if not isinstance(body, Where):
            return (yield from self.engine.jobs(body))
        seat = self.scheduler.current.seat
        seat.name = body.name
        return self.where(seat)

    def where(self, seat: Seat) -> WhereResult:
        others = [s for s in self.scheduler.seats if s is not seat and not s.away]
        running = [words(job) for job in self.scheduler.jobs if job.seat in others]
        left = [f"{words(job)}{', done' if job.end else ''}" for job in self.scheduler.told()]
        memory, log = self.engine.status().memory, folder("logs") / "engine.log"
        place = str(self.path or "")
        names = tuple(f"{s.name or 'a screen'}{'' if s.looks else ', which loads'}" for s in others)
        return WhereResult(
            socket.gethostname(), os.getpid(), str(log), place, memory, self.minutes, self.started, self.engine.loaded, names, (*running,), (*left,)
        )

    # ---------------------------------------------------------------- the loop

    def run(self) -> None:
        while True:
            while not self.inbox.empty():
                self.inbox.get()()
            if not self.scheduler.step():
                self.inbox.get()()

    # ---------------------------------------------------------------- what outlives its screens

    def keep(self) -> None:
        """Listen at `path`, and answer every screen that comes, until the last has been gone for the set time."""
        self.minutes, self.version = relay.minutes(), relay.version()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        listener.bind(str(self.path))
        os.umask(before)
        listener.listen(64)
        os.write(self.told, b"1")
        os.close(self.told)
        threading.Thread(target=self.accept, args=(listener,), daemon=True).start()
        threading.Thread(target=self.watch, daemon=True).start()
        self.run()

    def accept(self, listener: socket.socket) -> None:
        while True:
            line, _ = listener.accept()
            threading.Thread(target=self.greet, args=(line,), daemon=True).start()

    def greet(self, line: socket.socket) -> None:
        """Say what this engine is, and do what is wanted."""
        try:
            loaded = self.engine.loaded
            with self.gate:
                self.since = time.monotonic()
                line.sendall(
                    json.dumps({"version": self.version, "pid": os.getpid(), "busy": self.busy(), "model": loaded.model if loaded else ""}).encode() + b"\n"
                )
            stream = line.makefile("rwb")
            word = stream.readline(16).strip()
        except OSError:
            return
        if word in (b"look", b"apart"):
            screen = Screen(stream.read, stream, lambda: self.inbox.put(partial(self.leave, screen, line)), pings=word == b"look")
            screen.apart = word == b"apart"
            self.join(screen)
        elif word == b"stop":
            self.stop(None)

    def leave(self, screen: Screen, line: socket.socket) -> None:
        if not screen.gone:
            self.since = time.monotonic()
            self.scheduler.leave(screen)
            screen.close()
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
            line.close()

    def busy(self) -> str:
        """Who or what needs this engine, in words; "" for nobody."""
        looking, left = sum(not s.away for s in self.scheduler.seats), sum(job.end is None for job in self.scheduler.told())
        words = [f"{looking} screen{'s look' if looking > 1 else ' looks'} at it"] if looking else []
        words += [f"{left} job{'s go' if left > 1 else ' goes'} on in it"] if left else []
        return " and ".join(words)

    def left_for(self) -> float:
        """Seconds since anybody looked."""
        looking = any(not s.away for s in self.scheduler.seats)
        return 0.0 if looking else time.monotonic() - max([self.since, *(s.heard for s in self.scheduler.seats)])

    def watch(self) -> None:
        """End the process when nobody has looked for the set time, whatever it is doing. The gate: no screen is greeted by an engine that ends."""
        while (left := 60 * self.minutes - self.left_for()) > 0:
            time.sleep(min(1.0, left))
        with relay.locked(self.path), self.gate:
            if self.left_for() >= 60 * self.minutes:
                self.path.unlink(missing_ok=True)
                os._exit(0)
        self.watch()

    def stop(self, by: Screen | None) -> None:
        """End the process now; the other screens are told."""
        if self.path is None:
            os._exit(0)
        words = "the engine was stopped by another screen" if by else "the engine was stopped (engine.py stop)"
        self.say_last(words, [s for s in self.scheduler.seats if s is not by])
        self.path.unlink(missing_ok=True)
        os._exit(0)

    def say_last(self, words: str, screens: list[Screen]) -> None:
        """Why there is no engine for them any more."""
        for screen in screens:
            screen.put(Frame("news", body=News(words, stopped=True)))
        until = time.monotonic() + 0.5
        while not all(s.silent for s in screens) and time.monotonic() < until:
            time.sleep(0.01)


def words(job: Job) -> str:
    return type(job.ask.body).__name__
