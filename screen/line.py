"""The line to an engine that is far away, or shared: how long it takes there and back, when it was last heard, what to say of that, and what carries it says."""

import asyncio
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from vocabulary.wire import Frame

EVERY = 2.0  # seconds between two pings
SLOW, SILENT, LATE = 0.15, 6.0, 20.0  # seconds there and back, without a word, without the first word: what is worth saying
STEPS = (6, 10, 20, 30, 60, 120, 300, 600, 1800, 3600)  # the silence is said when it passes one of these, so that an idle screen writes little


CARRIER = re.compile(
    r"(ssh|srun|salloc|slurmstepd\S*|bash|sh|zsh|uv): .+|kex_exchange_identification: .+|Connection (closed|reset|to) .+|Host key .+|\S+: Permission denied \(.+"
)


def carriers_words(log: Path, since: int) -> str:
    """What carries the engine (ssh, srun, a shell) said last in a log from byte `since` on; of a Slurm step or job that was ended, that line. "" for nothing."""
    try:
        with open(log, "rb") as f:
            f.seek(max(since, log.stat().st_size - (1 << 14)))
            said = [s for line in f.read().decode(errors="replace").splitlines() if CARRIER.fullmatch(s := " ".join(line.split()))]
    except OSError:
        return ""
    ended = [s for s in said if "***" in s]
    return (ended or said or [""])[-1][:160]


class Line:
    """Pings that come back. `changed` is called when there is something else to say."""

    def __init__(self, before: Callable[[], str] = str, silent: Callable[[], str] = str):
        self.before, self.silent = before, silent  # what is to be said until the engine's first word, and of a silence
        self.began = time.monotonic()
        self.heard, self.asked, self.came_back = 0.0, 0.0, False  # 0: not yet
        self.times: list[float] = []
        self.number, self.said = 0, ""
        self.pings: asyncio.Task | None = None
        self.changed: Callable[[], None] = lambda: None

    async def ping(self, send: Callable[[Frame], None]) -> None:
        """Ping as long as the line is there, from its first word on; the next when the one before came back."""
        while True:
            if self.came_back:
                self.number, self.asked, self.came_back = self.number + 1, time.monotonic(), False
                send(Frame("ping", self.number))
            await asyncio.sleep(EVERY)
            if self.said != (words := self.words()):
                self.said = words
                self.changed()

    def hear(self, frame: Frame) -> None:
        self.came_back = self.came_back or not self.heard
        self.heard = time.monotonic()
        if frame.kind == "ping" and frame.id == self.number:
            self.times = [*self.times[-4:], self.heard - self.asked]
            self.came_back = True

    def end(self) -> None:
        if self.pings is not None:
            self.pings.cancel()
            self.pings = None
        self.said = ""

    def words(self) -> str:
        """What is to be said of the line; "" while it is quick."""
        if not self.heard:
            late = time.monotonic() - self.began >= LATE
            return self.before() or (self.silent() or "no word from an engine yet (has its checkout this version?)" if late else "")
        silent = time.monotonic() - self.heard
        if silent >= SILENT:
            return self.silent() or f"line silent for {max(s for s in STEPS if s <= silent)} s"
        slow = statistics.median(self.times) if self.times else 0.0
        return f"line {float(f'{1000 * slow:.1g}'):.0f} ms" if slow >= SLOW else ""
