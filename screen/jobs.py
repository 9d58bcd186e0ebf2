"""Running jobs: the list of them, what ends them, and what asks before it does."""

import time
from collections.abc import Callable

from techniques.cluster.requests import cut_along, named
from vocabulary.nodes import UserError
from screen.client import Job
from screen.overlays import Panel
from screen.pane import Host
from widgets import BOLD, DIM, PLAIN, Spans

ENDED = object()  # what a line is of that is gone
LONG = 3.0  # seconds; what has run for so long is not ended without asking


def row(job: Job) -> Spans:
    p = job.progress
    return [(f" {job.slot:12}", BOLD), (f"{type(job.request).__name__:12}", PLAIN), (f" {p.done}/{p.total} {p.text}{job.more}".rstrip(), DIM)]


class Jobs(Panel):
    """
    The list of running jobs and of scattered ones, which follows them; x cancels the one that is selected (a scattered one after a key more), enter says what
    else can be done with a scattered one, or starts one. The cursor stays on its line, wherever that goes; what ended under it stays there until it moves on,
    so that no key acts on the line that comes next.
    """

    def __init__(self, app: Host, **kw):
        self.host, self.shown, self.marks = app, [], []
        super().__init__("jobs", self.lines(), "x cancels · ⏎ opens what is scattered · esc closes", True, {"x": self.cancel, "enter": self.enter}, **kw)

    def on_mount(self) -> None:
        super().on_mount()
        self.set_interval(1, self.follow)

    def hints(self) -> list[tuple[str, str]]:
        return [("jk", "choose"), ("x", "cancel"), ("⏎", "open what is scattered"), ("esc", "close")]

    def lines(self) -> list[Spans]:
        """Each with what it is of: a job, the folder of a scattered one, or what enter does."""
        app, scattered = self.host, self.host.requests.scattered
        rows: list[tuple[Spans, object]] = [(row(j), j) for j in app.client.jobs.values() if not j.slot.startswith("scatter")] + scattered.rows()
        rows = rows or [([(" no jobs are running" if app.client.alive else " no jobs are running: the engine is not", DIM)], None)]
        if app.info is not None and (asked := app.panes[app.pane].scatters(app)) is not None:
            text = f" scatter this: {named(asked)} {cut_along(asked)}, as processes or a Slurm array"
            rows.append(([(text, PLAIN)], lambda: scattered.scatter(asked)))
        if app.client.alive:
            rows.append(([(" watch a folder of a scattered job", PLAIN)], scattered.watch))
        self.shown = [of for _, of in rows]
        self.marks = [of.id if isinstance(of, Job) else of if isinstance(of, str) else line[0][0] for line, of in rows]
        return [line for line, _ in rows]

    def follow(self) -> None:
        at, before = min(self.at, len(self.marks) - 1), self.marks
        mark, old, was = before[at], self.rows[at], self.shown[at]
        lines = self.lines()
        if mark not in self.marks:  # it ended: its line stays below those that stood above it
            self.at = max((self.marks.index(m) + 1 for m in before[:at] if m in self.marks), default=0)
            lines.insert(self.at, old if was is ENDED else [*old[:2], (" ended", DIM)] if isinstance(was, Job) else [(" not now:", DIM), *old])
            self.marks.insert(self.at, mark)
            self.shown.insert(self.at, ENDED)
        self.at = self.marks.index(mark)
        self.replace(lines)

    def cancel(self, at: int) -> None:
        of = self.shown[at] if at < len(self.shown) else None
        if isinstance(of, Job) and of.id in self.host.client.jobs:
            self.host.requests.cancel(of)
        elif isinstance(of, str):
            try:
                self.host.requests.scattered.check_live(of)
            except UserError as error:
                self.complain(str(error))
                return
            ask_first(self.host, "this ends the tasks of a scattered job", [self.rows[at]], lambda: self.host.requests.scattered.cancel(of))
            return
        self.follow()
        self.say_ended(of)

    def enter(self, at: int) -> None:
        of = self.shown[at] if at < len(self.shown) else None
        if isinstance(of, Job):
            self.complain("its pane shows it as it comes: ⏎ opens scattered jobs alone, x cancels this one")
        elif isinstance(of, str):
            self.action_close()
            self.host.requests.scattered.choose(of)
        elif callable(of):
            self.action_close()
            self.host.guard(of)
        self.say_ended(of)

    def say_ended(self, of: object) -> None:
        if of is ENDED:
            self.complain("it has ended: j and k choose another")


def jobs(app: Host) -> None:
    app.open(Jobs(app))


def interrupt(app: Host) -> None:
    some = [j for j in app.client.jobs.values() if j.slot != "load"]
    for job in some:
        app.requests.cancel(job)
    app.say(f"cancelled {len(some)} jobs" if some else "nothing is running; q quits")


def worth_asking(app: Host) -> list[Job]:
    """Jobs that a key started, or that have run for a while."""
    some = [j for j in app.client.jobs.values() if j.slot not in ("load", "status")]
    return [j for j in some if j.request in app.requests.started or time.monotonic() - j.started > LONG]


def ends_jobs(app: Host, what: str, go: Callable[[], object]) -> None:
    """Do what ends every running job; where one is worth asking about, only after a key."""
    if not (some := worth_asking(app)):
        go()
        return
    ask_first(app, f"{what} ends {'this job' if len(some) == 1 else f'these {len(some)} jobs'}", [row(j) for j in some], go)


def ask_first(app: Host, title: str, rows: list[Spans], go: Callable[[], object]) -> None:
    """Say what ends, and end it only after a key."""
    sure = lambda at: (panel.action_close(), app.guard(go))  # noqa: E731
    panel = Panel(title, rows, "enter: all the same · esc: go on with it", False, {"enter": sure})
    app.open(panel)
