"""
Who asks and what waits: the jobs of one engine, a seat for each screen that looks at its model, and whose turn it is.

1. Each `step` advances one job to its next yield: of the lowest priority, then of the screen that had no turn for longest, then the oldest.
2. A newer request in a slot drops the older one of that screen. While a Load waits or runs, jobs that need a model wait for it.
3. A screen that went leaves its jobs behind: they go on, after all others, and a new screen that asks for the same gets them, with what they have found.
"""

import itertools
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from utils import model_name
from vocabulary.flow import adds
from vocabulary.nodes import UserError
from vocabulary.requests import Failure, Load, News, Progress
from vocabulary.wire import Frame, needs_model

PATIENCE = 8  # steps of other screens before one that waits has its turn whatever the priorities
LONG = 1.0  # seconds of computing; what took less is asked again without a word
LEFT_AT_MOST = 32  # finished jobs that are kept for the next screen


class OthersLook(UserError):
    """Other screens look at the model that would go: they should be asked about."""


def internal(error: Exception) -> Failure:
    """The whole story to the log, one line to the screen."""
    traceback.print_exception(error)
    return Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


@dataclass(eq=False)
class Seat:
    """
    A screen, as the scheduler sees it. `behind`: the model it knows was changed by another; what it asks is cancelled until it loads one. `apart`: a coding
    agent, which takes over nothing that a screen left, leaves nothing behind, and replaces no model that a screen needs.
    """

    send: Callable[[Frame], None]
    name: str = ""
    looks: bool = False  # at a model that was loaded for it
    behind: bool = False
    gone: bool = False
    apart: bool = False
    served: int = 0  # the number of its last turn
    passed: int = 0  # turns of others since, while it waited
    finished: list["Job"] = field(default_factory=list)  # what took long, for the next screen: it may never have arrived

    @property
    def away(self) -> bool:
        """Whether nobody hears what is sent."""
        return self.gone

    @property
    def full(self) -> bool:
        """Whether so much waits to be sent that its jobs wait too."""
        return False


@dataclass(order=True)
class Job:
    priority: int
    number: int
    ask: Frame = field(compare=False)
    seat: Seat = field(compare=False)
    steps: Generator | None = field(default=None, compare=False)
    parts: list[object] = field(default_factory=list, compare=False)  # what a screen that takes the job over is shown
    end: tuple[str, object] | None = field(default=None, compare=False)
    spent: float = field(default=0.0, compare=False)  # seconds
    sure: bool = field(default=False, compare=False)  # a Load that was confirmed: others who look at the model lose it


class Scheduler:
    """Interleaves generators of one or several screens. `keeps`: jobs outlive their screen."""

    def __init__(
        self,
        start: Callable[[object], Generator],
        send: Callable[[Frame], None] = lambda frame: None,
        after: Callable[[], None] = lambda: None,
        model: Callable[[], str] = str,
        keeps: bool = False,
    ):
        self.start, self.after, self.model, self.keeps = start, after, model, keeps
        self.seat = Seat(send)  # of frames that come without one
        self.seats: list[Seat] = []
        self.jobs: list[Job] = []
        self.left: list[Job] = []  # finished, for nobody
        self.current: Job | None = None
        self.numbers, self.turns = itertools.count(), 0

    # ---------------------------------------------------------------- screens

    def leave(self, seat: Seat) -> None:
        """A screen went. What it asked goes on for the next one, where the engine outlives it."""
        seat.gone = True
        if seat in self.seats:
            self.seats.remove(seat)
        self.left = [*self.left, *seat.finished][-LEFT_AT_MOST:]
        keeps = self.keeps and not seat.apart
        self.drop(lambda job: job.seat is seat and not (keeps and (needs_model(job.ask.body) or isinstance(job.ask.body, Load))))

    def unclaimed(self) -> list[Job]:
        """Jobs, finished or not, whose screen went or is silent."""
        return [*self.left, *(job for seat in self.seats if seat.away for job in seat.finished), *(job for job in self.jobs if job.seat.away)]

    def told(self) -> list[Job]:
        """Those of them that a new screen is told of."""
        return [job for job in self.unclaimed() if not isinstance(job.ask.body, Load)]

    def adopt(self, frame: Frame, seat: Seat, sure: bool = False) -> bool:
        """Hand a job that nobody waits for to the screen that asks for the same: what it found, and what it will find. A screen that was only silent is told."""
        job = next((job for job in self.unclaimed() if job.ask.body == frame.body), None)
        if job is None:
            return False
        for some in (self.left, job.seat.finished):
            if job in some:
                some.remove(job)
        if job.end is None and not job.seat.gone:
            self.reply(job, "cancelled")
        job.seat, job.ask, job.priority, job.sure = seat, frame, frame.priority, job.sure or sure
        if job.end is None:
            for part in job.parts:
                self.reply(job, "partial", part)
        else:
            self.deliver(job)
        return True

    def behind(self) -> None:
        """The model goes: of all screens but that which loads another, every job that needs it; those screens are told."""
        load = self.current
        seat = load.seat if load else self.seat
        self.left = [job for job in self.left if not needs_model(job.ask.body)]
        for other in self.seats:
            other.finished = [job for job in other.finished if not needs_model(job.ask.body)]
        for other in (s for s in self.seats if s is not seat and s.looks):
            other.behind, other.looks = True, False
            if load is not None:
                other.send(Frame("news", body=News(f"the model was changed to {model_name(load.ask.body.model)} by another screen", load.ask.body)))
        self.drop(lambda job: needs_model(job.ask.body) and (job.steps is not None or job.seat is not seat))

    def ask_first(self, request: Load) -> None:
        """OthersLook where other screens look at the model that `request` replaces, and nobody said that this is meant."""
        job = self.current
        others = [s for s in self.seats if s.looks and not s.away and job is not None and s is not job.seat]
        if job is not None and job.seat.apart and not others and self.told():
            raise OthersLook("a screen that went left results or work of the model that would go")
        if others and not job.sure:
            raise OthersLook(f"{len(others)} other screen{'s look' if len(others) > 1 else ' looks'} at the model that would go")

    # ---------------------------------------------------------------- jobs

    def reply(self, job: Job, kind: str, body: object = None) -> None:
        job.seat.send(Frame(kind, job.ask.id, job.ask.slot, job.ask.priority, body, self.model()))

    def put(self, frame: Frame, seat: Seat | None = None, sure: bool = False) -> None:
        seat = seat or self.seat
        if frame.kind == "cancel":
            self.drop(lambda job: job.seat is seat and job.ask.id == frame.id)
        elif frame.kind == "ask":
            if frame.slot:
                self.drop(lambda job: job.seat is seat and job.ask.slot == frame.slot)
            if isinstance(frame.body, Load):
                seat.behind = False
            if isinstance(frame.body, Load) and not seat.apart:
                self.drop(lambda job: job.seat.away and isinstance(job.ask.body, Load) and job.ask.body != frame.body)
            if seat.behind and needs_model(frame.body):
                seat.send(Frame("cancelled", frame.id, frame.slot, frame.priority, None, self.model()))
            elif not (self.keeps and not seat.apart and self.adopt(frame, seat, sure)):
                self.jobs.append(Job(frame.priority, next(self.numbers), frame, seat, sure=sure))

    def drop(self, which: Callable[[Job], bool]) -> None:
        gone = sorted(job for job in self.jobs if which(job))
        self.jobs = [job for job in self.jobs if not which(job)]
        for job in gone:
            if job.steps is not None:
                job.steps.close()
            self.reply(job, "cancelled")

    def turn(self, job: Job) -> tuple:
        """What is least has the next turn."""
        return job.seat.away, job.seat.passed < PATIENCE, job.priority, job.seat.served, job.number

    def next_job(self) -> Job | None:
        loads = [job for job in self.jobs if isinstance(job.ask.body, Load)]
        ready = [job for job in self.jobs if not loads or not needs_model(job.ask.body) and (job is min(loads) or job not in loads)]
        ready = [job for job in ready if not job.seat.full or job.seat.away]
        job = min(ready, key=self.turn, default=None)
        if job is not None:
            self.turns += 1
            for seat in {id(j.seat): j.seat for j in ready if j.seat is not job.seat}.values():
                seat.passed += 1
            job.seat.served, job.seat.passed = self.turns, 0
        return job

    def step(self) -> bool:
        """Advance one job by one yield; False when there is nothing to do."""
        job = self.current = self.next_job()
        if job is None:
            return False
        try:
            if job.steps is None:
                job.steps = self.start(job.ask.body)
            begun = time.monotonic()
            try:
                part = next(job.steps)
            finally:
                job.spent += time.monotonic() - begun
        except StopIteration as stop:
            self.finish(job, "result", stop.value)
        except UserError as error:
            self.finish(job, "error", Failure(str(error), "others" if isinstance(error, OthersLook) else "user"))
        except Exception as error:
            self.finish(job, "error", internal(error))
        else:
            if self.keeps and not isinstance(part, Progress):
                job.parts = [*job.parts, part] if adds(part) else [part]
            self.reply(job, "progress" if isinstance(part, Progress) else "partial", part)
        return True

    def finish(self, job: Job, kind: str, body: object) -> None:
        self.jobs.remove(job)
        try:
            self.after()
        except AssertionError as error:
            kind, body = "error", internal(error)
        job.end, job.parts = (kind, body), []
        self.deliver(job)

    def deliver(self, job: Job) -> None:
        """The end of a job to its screen; what took long, and wrote no file, is kept for the next one, which may ask for the same."""
        seat, (kind, body) = job.seat, job.end
        if isinstance(job.ask.body, Load) and kind == "result":
            seat.looks, seat.behind = True, False
        if self.keeps and not seat.apart and needs_model(job.ask.body) and job.spent >= LONG and not getattr(job.ask.body, "out", ""):
            (self.left if seat.gone else seat.finished).append(job)
            del self.left[:-LEFT_AT_MOST], seat.finished[:-LEFT_AT_MOST]
        self.reply(job, kind, body)
