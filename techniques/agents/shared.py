"""
The engine that stays (LOUPE_KEEP_ENGINE_MINUTES), asked as an `Engine` is: a connection for each call, so that between calls an agent needs no model. Its seat there is
apart (model/scheduler.py): it gives way to screens, takes over and leaves nothing, and loads no other model while anybody needs the one that is there.
"""

import os
import select
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import fields

from model import relay
from vocabulary.nodes import UserError
from vocabulary.requests import Failure, Load, ModelInfo, Progress, Where
from vocabulary.wire import Frame, WireError, encode, read_sealed, sealed

PRIORITY = 9  # screens ask at 0 to 3
EVERY = 0.25  # seconds after which one who waits may cancel
NAMES = {"base": "base_model", "scale": "adapter_scale"}  # options that are called otherwise than the field of Load
GONE = "the engine ended: call again, which starts one"


def steps(engine, request: object, show: Callable[[object], None] = lambda part: None) -> object:
    """A request's result. Where `show` ends it, it is closed before the next is asked."""
    with closing(engine.jobs(request)) as jobs:
        while True:
            try:
                show(next(jobs))
            except StopIteration as stop:
                result = stop.value
                break
    engine.check_hooks()
    return result


class Far:
    """What is known of a model in another process."""

    def __init__(self, info: ModelInfo):
        self.info = info

    def __getattr__(self, name: str):
        raise UserError("the model is in the engine that stays, and this needs it here: `uv run engine.py check` in a shell has one of its own")


class SharedEngine:
    """As a context it is one call's connection."""

    run = steps
    where = Where(f"coding agent (mcp), process {os.getpid()}")

    def __enter__(self) -> "SharedEngine":
        try:
            self.line = relay.connect("apart")
        except OSError as error:
            raise UserError(f"the engine can't be reached: {error}") from error
        self.count, self.model = 0, None
        self.put(Frame("ask", 0, "", 0, self.where))  # so that screens know who it is; what is answered goes unread
        return self

    def __exit__(self, *_) -> None:
        self.line.close()

    def check_hooks(self) -> None:
        """The engine does, after each job."""

    def jobs(self, request: object) -> Generator[object, None, object]:
        """Progress (also while it waits) and partial results, then the result. UserError for what the engine refuses; closed early, it is cancelled there."""
        self.count += 1
        number, last, ended = self.count, Progress(0, 0, "waiting for the engine, which screens use too"), False
        self.put(Frame("ask", number, "", PRIORITY, request))
        try:
            while True:
                frame = self.next()
                if frame is None:
                    yield last
                elif frame.id == number:
                    ended = frame.kind in ("result", "error", "cancelled")
                    if frame.kind == "result":
                        self.model = Far(frame.body) if isinstance(request, Load) else self.model
                        return frame.body
                    if ended:
                        raise self.refused(request, frame.body)
                    last = frame.body if isinstance(frame.body, Progress) else last
                    yield frame.body
        finally:
            if not ended:
                self.put(Frame("cancel", number))

    def refused(self, request: object, failure: Failure | None) -> Exception:
        if failure is None:
            return UserError("a screen changed the model while this ran: call again")
        if failure.kind == "internal":
            return RuntimeError(failure.message)
        return UserError(self.theirs(failure.message) if failure.kind == "others" else failure.message)

    def theirs(self, why: str) -> str:
        """Which model is there, for whom, and how to ask for it."""
        where = steps(self, self.where)
        if where.loaded is None:
            return why
        options = [f"{NAMES.get(f.name, f.name)}: {v}" for f in fields(Load) if (v := getattr(where.loaded, f.name)) != f.default or f.name == "model"]
        return f"{why}: give {', '.join(options)} to use the model that is there, or ask its user to load the other one"

    # ---------------------------------------------------------------- frames

    def put(self, frame: Frame) -> None:
        try:
            self.line.sendall(sealed(encode(frame)))
        except OSError as error:
            raise UserError(GONE) from error

    def next(self) -> Frame | None:
        """The next frame; None where none comes for a moment."""
        if not select.select([self.line], [], [], EVERY)[0]:
            return None
        try:
            frame = read_sealed(self.exactly)
        except (OSError, WireError) as error:
            raise UserError(GONE) from error
        if frame is None:
            raise UserError(GONE)
        return frame

    def exactly(self, n: int) -> bytes:
        data = bytearray()
        while len(data) < n and (some := self.line.recv(n - len(data))):
            data += some
        return bytes(data)
