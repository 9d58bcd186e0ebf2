"""
What is asked of the engine and what came back.

1. `wanted` says which requests the visible panes need, by slot; `refresh` asks for what is not at hand. The newest ask of a slot replaces the one before.
2. A `Reply` carries the model it was computed for. Loading a model forgets all replies; one that still arrives for the model before is dropped.
3. `ask` and `asked` are for what is asked once, by a key: a failure is one line, said by whoever asks.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from textual.worker import Worker

from techniques.output.requests import Run, RunResult
from vocabulary.prompts import Study
from vocabulary.requests import Check, CheckResult, Load
from vocabulary.wire import needs_model
from screen.held import Held
from screen.client import EngineDied, EngineError, Job, Superseded
from screen.scattered import Scattered
from utils import visible
from widgets import BAD, DIM, WARN, Spans

REMEMBERED = 64  # results that are drawn again without asking


@dataclass(frozen=True)
class Reply:
    """What came back for a request: its result, whole or in part, or the line that says why there is none; and the model it was computed for."""

    request: object
    result: object | None = None
    error: str = ""
    partial: bool = False
    model: Load | None = None

    def of(self, request: object, kind: type | tuple[type, ...]) -> object | None:
        """The result, if it answers exactly this request."""
        return self.result if self.request == request and isinstance(self.result, kind) else None


class Requests:
    """The app's questions and answers; `model` is what the engine was last asked to load, and no reply of another one is drawn."""

    def __init__(self, app):
        self.app = app
        self.model: Load | None = None
        self.wanted: dict[str, object] = {}
        self.askers: dict[str, object] = {}  # slot -> the pane whose it is
        self.replies: dict[str, Reply] = {}
        self.answers: dict[object, Reply] = {}  # request -> its whole reply, the newest REMEMBERED
        self.started: set[object] = set()  # sweeps and other work that waits for a key
        self.slow = False  # whether what is drawn has been behind for a while
        self.progress_of = ""
        self.held = Held(app)
        self.scattered = Scattered(app)
        self.notices: dict[str, str] = {}  # slot -> what its running job has to say when it is over

    # ---------------------------------------------------------------- what is there

    def forget(self, model: Load | None = None) -> None:
        """Another model: nothing of the one before is shown."""
        self.model = model
        self.replies.clear()
        self.answers.clear()

    def died(self) -> None:
        """The engine is gone, and its jobs with it: none starts again by itself, what it was for may have killed it."""
        self.model = None
        self.started.clear()
        for panel in self.app.query("Jobs"):
            panel.follow()

    def reply(self, slot: str) -> Reply | None:
        """The slot's newest reply of the present model; without any model, what was there before (its title says so)."""
        reply = self.replies.get(slot)
        return reply if reply is not None and (self.model is None or reply.model is self.model) else None

    def result(self, slot: str, kind: type | tuple[type, ...]) -> object | None:
        """What a pane draws: the slot's result, unless its request failed, or nothing is asked for there any more (while the run is on its way: not yet)."""
        reply = self.reply(slot)
        if slot not in self.wanted and (self.error("run") or not self.stale("run")):
            return None
        return reply.result if reply is not None and isinstance(reply.result, kind) else None

    def fresh(self, slot: str, kind: type | tuple[type, ...]) -> object | None:
        """The slot's result, whole or in part, only if it answers what is asked for now."""
        reply, wanted = self.reply(slot), self.wanted.get(slot)
        return reply.of(wanted, kind) if reply is not None and wanted is not None else None

    def answer_to(self, request: object, kind: type | tuple[type, ...], slot: str = "") -> object | None:
        """The result of exactly this request, if it is at hand; whole, or in part where the slot is named or it was scattered."""
        reply = self.reply(slot)
        found = reply.of(request, kind) if reply is not None else None
        if found is None and request in self.answers:
            found = self.answers[request].of(request, kind)
        if found is None and (table := self.scattered.table(request)) is not None and isinstance(table.result, kind):
            found = table.result
        return found

    def error(self, slot: str) -> str:
        """Why there is nothing in a slot: its own request failed, or the run's, for which it waits."""
        slot = slot if slot in self.wanted else "run"
        reply = self.reply(slot)
        return reply.error if reply is not None and reply.request == self.wanted.get(slot) else ""

    def stale(self, slot: str) -> bool:
        reply = self.reply(slot)
        return reply is None or reply.partial or reply.request != self.wanted.get(slot)

    def waiting(self, slot: str) -> Spans:
        """What stands where a picture will be."""
        error, app = self.error(slot), self.app
        if not error and self.wanted.get(slot) is not None and self.scattered.covers(self.wanted[slot]) == (None, False):
            return [("  its tasks run, no part is there yet: J", DIM)]
        return [(f"  {visible(error)}", BAD)] if error else [("  " + (app.busy if app.info is None else "computing…"), DIM)]

    def late(self, slots: tuple[str, ...]) -> str:
        """Said in a title when what is drawn is not what the state asks for."""
        if self.app.info is None:
            return "NOT CURRENT (no engine) · " if any(s in self.replies for s in slots) else ""
        apart = (
            self.scattered.partial(r.result) for s in slots if (r := self.reply(s)) is not None and r.result is not None and r.request == self.wanted.get(s)
        )
        if words := next(filter(None, apart), ""):
            return words
        if not self.slow or not any(s in self.wanted and self.stale(s) for s in slots):
            return ""
        before = any(s in self.replies and self.replies[s].request != self.wanted.get(s) for s in slots)
        return "⟳ computing, shown is what was before · " if before else "⟳ computing · "

    def left(self, slot: str) -> str:
        """Time left of what a slot asks for, in words."""
        return next((f", {j.left}" for j in self.app.client.jobs.values() if j.slot == slot and j.left), "")

    def check(self) -> CheckResult | None:
        """The tokens of the state's prompts, and how they are aligned."""
        state = self.app.state
        return self.answer_to(Check(state.prompt, state.align), CheckResult)

    # ---------------------------------------------------------------- what the panes need

    def refresh(self, study: Study, panes: list) -> bool:
        """Ask for what these panes lack; whether another run is at hand at once."""
        state, jobs = self.app.state, self.app.client.jobs
        self.scattered.follow()
        wanted, self.askers = {"check": Check(state.prompt, state.align), "run": Run(study)}, {}
        for pane in panes:
            mine = pane.wants(self.app)
            wanted |= mine
            self.askers |= dict.fromkeys(mine, pane)
        self.wanted = wanted
        asking, known = {j.slot: j.request for j in jobs.values()}, False
        for slot, request in self.wanted.items():
            before = self.replies.get(slot)
            if (at_hand := self.at_hand(request)) is not None:
                known = known or (slot == "run" and (before is None or before.request != request))
                self.replies[slot] = at_hand
                for job in [j for j in jobs.values() if j.slot == slot]:
                    self.app.client.cancel(job.id)
            elif (before is None or before.partial or before.request != request) and asking.get(slot) != request:
                self.app.run_worker(partial(self.answer, slot, request), group=slot, exclusive=True, exit_on_error=True)
        return known

    def at_hand(self, request: object) -> Reply | None:
        """What needs no asking: it is remembered, or scattered tasks do it, unless a key asks for it here."""
        if request in self.answers:
            return self.answers[request]
        apart = self.scattered.covers(request) if request not in self.started else None
        return Reply(request, apart[0], partial=not apart[1], model=self.model) if apart is not None else None

    async def answer(self, slot: str, request: object) -> None:
        """Ask for what is wanted in a slot, and have it drawn when it is there, or as its parts come."""
        pane, model, app, drawn = self.askers.get(slot), self.model, self.app, 0.0
        shown: Reply | None = None

        def on_partial(part: object) -> None:
            nonlocal shown, drawn
            if self.wanted.get(slot) != request or model is not self.model:
                return
            part = pane.merge(shown.result if shown else None, part) if pane else part
            shown = self.replies[slot] = Reply(request, part, partial=True, model=model)
            if isinstance(part, RunResult):
                app.clamp()
            if time.monotonic() - drawn > 0.3:  # at most a few pictures a second over the wire to the terminal
                drawn = time.monotonic()
                app.draw()

        slow = app.set_timer(0.2, self.mark_slow)
        first = slot in ("check", "run") or (pane is not None and slot in pane.urgent)
        try:
            reply = Reply(request, await app.client.ask(slot, request, 0 if first else 1, on_partial), model=model)
        except Superseded:
            return
        except EngineError as error:
            if not isinstance(error, EngineDied):
                app.say(str(error), BAD)
            reply = Reply(request, error=str(error), model=model)
        finally:
            slow.stop()
        if model is not self.model and self.model is not None:
            return  # of a model that is no longer there
        self.replies[slot] = reply
        if self.progress_of == slot:
            app.say("")
        if notice := self.notices.pop(slot, ""):
            app.say(reply.error or notice, BAD if reply.error else WARN)
        if not reply.error:
            self.remember(reply)
            self.record(request, reply.result, request in self.started)
        app.answered(reply.result, isinstance(reply.result, (CheckResult, *pane.leads_on) if pane else CheckResult))

    def remember(self, reply: Reply) -> None:
        self.answers[reply.request] = reply
        while len(self.answers) > REMEMBERED:
            del self.answers[next(iter(self.answers))]

    def record(self, request: object, result: object, by_key: bool) -> None:
        """Keep the numbers of a result in the session."""
        if needs_model(request) and self.model is not None and self.app.info is not None:
            self.app.session.record.add(request, result, self.model, self.app.info, by_key)

    def mark_slow(self) -> None:
        self.slow = True
        self.app.draw()

    def start(self, request: object) -> None:
        """A key was pressed for what is not computed by itself."""
        self.started.add(request)
        self.app.refresh_wants()

    def cancel(self, job: Job) -> None:
        """A sweep that was cancelled does not start again by itself; what it found stays."""
        self.app.client.cancel(job.id)
        self.slow = True  # what is drawn stays behind what is asked for
        if job.slot == "load":
            self.app.busy = "not loaded, it was cancelled: M chooses a model"
            self.app.draw_top()
        if job.request in self.started:
            self.started.discard(job.request)
            self.app.refresh_wants()

    # ---------------------------------------------------------------- what is asked once

    def ask(self, slot: str, request: object, then: Callable, priority: int = 1, group: str = "", opens: str = "", **said) -> None:
        """Ask, and hand the result to `then`; a failure is said (`asked`). Where `then` opens a list, `opens` says what is looked up, and keys wait for it."""

        async def work() -> None:
            result = await self.asked(slot, request, priority, **said)
            notice = self.notices.pop(slot, "")
            if result is not None:
                self.app.guard(lambda: then(result))
                if opens:
                    self.held.hand_over()
                if notice:
                    self.app.say("; ".join(text for text in (*(s.strip() for s, _ in self.app.status[:1]), notice) if text), WARN)

        worker = self.app.run_worker(work, group=group or slot, exclusive=True, exit_on_error=True)
        if opens:
            self.held.until(worker, opens)

    async def asked(
        self,
        slot: str,
        request: object,
        priority: int = 1,
        failed: Callable[[EngineError], None] | None = None,
        cancelled: str = "",
        any_model: bool = False,
        on_partial: Callable[[object], None] | None = None,
    ) -> object | None:
        """
        The result; None when there is none: `failed` shows why (else the status line does), `cancelled` is said when it was cancelled. `on_partial` gets
        what comes before.
        """
        model = self.model
        try:
            result = await self.app.client.ask(slot, request, priority, on_partial)
        except Superseded:
            if cancelled:
                self.app.say(cancelled, WARN)
            return None
        except EngineError as error:
            (failed or (lambda error: self.app.say(str(error), BAD)))(error)
            return None
        if any_model or model is self.model:
            self.record(request, result, True)
            return result
        self.app.say(f"{type(request).__name__} was for the model before: it is not shown", WARN)
        return None

    async def settle(self) -> None:
        """Wait until nothing is being asked; no sleeping by the clock."""

        async def finished(worker: Worker) -> None:
            with contextlib.suppress(Exception):
                await worker.wait()

        while running := [w for w in self.app.workers if not w.is_finished]:
            await asyncio.wait([asyncio.ensure_future(finished(w)) for w in running])
            await asyncio.sleep(0)

    def progress(self, job: Job) -> None:
        """Say how far a job is, once it takes a while; a notice at once, and again when the job is over."""
        p = job.progress
        if p.notice:
            self.notices[job.slot] = p.text
            self.app.say(p.text, WARN)
        elif p.total > 1 and time.monotonic() - job.started > 0.4:
            self.app.say(f"{p.text or job.slot} {p.done}/{p.total}{job.more}", DIM)
            self.progress_of = job.slot
