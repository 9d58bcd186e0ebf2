"""Running jobs: the list of them, what ends them, and what asks before it does."""

import time
from collections.abc import Callable

from screen.client import Job
from screen.overlays import Panel
from screen.pane import Host
from widgets import BOLD, DIM, PLAIN, Spans

LONG = 3.0  # seconds; what has run for so long is not ended without asking


def row(job: Job) -> Spans:
    p = job.progress
    return [(f" {job.slot:12}", BOLD), (f"{type(job.request).__name__:12}", PLAIN), (f" {p.done}/{p.total} {p.text}{job.more}".rstrip(), DIM)]


class Jobs(Panel):
    """The list of running jobs, which follows them; x cancels the one that is selected."""

    def __init__(self, app: Host, **kw):
        self.host, self.shown = app, []
        super().__init__("jobs", self.lines(), "x cancels · esc closes", bool(app.client.jobs), {"x": self.cancel}, **kw)

    def on_mount(self) -> None:
        super().on_mount()
        self.set_interval(1, self.follow)

    def lines(self) -> list[Spans]:
        self.shown = [*self.host.client.jobs.values()]
        return [row(j) for j in self.shown] or [[(" no jobs are running" if self.host.client.alive else " no jobs are running: the engine is not", DIM)]]

    def follow(self) -> None:
        self.replace(self.lines())

    def cancel(self, at: int) -> None:
        if at < len(self.shown) and self.shown[at].id in self.host.client.jobs:
            self.host.requests.cancel(self.shown[at])
        self.follow()


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
    sure = lambda at: (panel.action_close(), app.guard(go))  # noqa: E731
    panel = Panel(
        f"{what} ends {'this job' if len(some) == 1 else f'these {len(some)} jobs'}",
        [row(j) for j in some],
        "enter: all the same · esc: go on with it",
        False,
        {"enter": sure},
    )
    app.open(panel)
