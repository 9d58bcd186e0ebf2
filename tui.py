"""
The screen: one cursor, one state, panes drawn from the engine's results. Keys come from the table in actions.py; each action is a method do_<id>.

1. An action changes the session's state (or the cursor); `refresh_wants` derives from it which requests the visible panes need.
2. A request whose answer is at hand is drawn at once; others are asked, one slot a pane, and drawn when they arrive. A failed request shows its line.
3. Nothing here imports torch: the model lives in engine.py's process, at the other end of link.py.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import textwrap
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

os.environ.setdefault("ESCDELAY", "30")  # ms in which esc and a key are one; the default of 100 joins what was typed one after the other
if "SSH_CONNECTION" in os.environ:  # remote mode: fewer frames; textual reads these when it is imported
    os.environ.setdefault("TEXTUAL_FPS", "15")
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from textual import work
from rich.cells import cell_len
from textual.app import App, ComposeResult
from textual.binding import Binding
from textual.containers import Container
from textual.geometry import Region
from textual.reactive import var
from textual.worker import Worker, WorkerState

import pictures
from actions import TABLE, Action, key_table, remapped, show_key
from deeds import Deeds
from link import EngineDied, EngineError, Job, Link, Superseded
from techniques.circuits.requests import Discover, DiscoverResult
from techniques.features.requests import FeaturesResult, PreflightResult, SaeInfo
from techniques.lens.requests import LensResult
from techniques.output.requests import Run, RunResult
from vocabulary.nodes import Node, UserError
from vocabulary.prompts import Prompt, read_prompt_set, Study
from vocabulary.requests import Check, CheckResult, Load, ModelInfo, Status
from pictures import RUN_NAMES
from circuit_deeds import Circuits
from circuit_pane import CircuitPane
from feature_deeds import Dictionaries
from feature_pane import FeaturePane
from panes import PANES as FIRST_PANES
from panes import Pane
from quests import Quests
from session import Session, State, newest_session, read_session
from utils import ROOT, settings, show_token, visible
from tight import TightScreen
from widgets import (
    BAD,
    BOLD,
    DIM,
    GOOD,
    PLAIN,
    WARN,
    Grid,
    Lines,
    Overlay,
    Spans,
)

LOG = ROOT / "logs" / "engine.log"
PANES: dict[str, type[Pane]] = {p.key: p for p in sorted((*FIRST_PANES.values(), CircuitPane, FeaturePane), key=lambda p: (p.number == "0", p.number))}


@dataclass(frozen=True)
class Cursor:
    """Shared by all panes: a layer, a head or component, a hook point of the residual stream, a position and a source position."""

    layer: int = 0
    head: int = 0
    comp: str = "head"
    point: str = "resid_post"
    pos: int = -1
    src: int = 0


class Quiet(TightScreen, inherit_bindings=False):
    """A screen that does not repaint as a whole when the focus moves (held by the byte-budget test)."""

    focused = var(None)


def bindings(table: tuple[Action, ...]) -> list[Binding]:
    """Priority, so that keys that come in a burst are taken in order; check_action lets them through to an open overlay."""
    return [Binding(a.keys, f"do('{a.id}')", a.title, show=False, id=a.id, priority=True) for a in table if a.keys]


class Loupe(Deeds, Quests, Circuits, Dictionaries, App):
    BINDINGS = bindings(TABLE)
    CSS = """
    Screen { layers: base overlay; overflow: hidden; background: ansi_default; color: ansi_default; }
    #top { height: 5; } #status { height: 1; } #hint { height: 1; }
    #body { height: 1fr; }
    Field { width: 1fr; background: ansi_default; border: none; height: 1; padding: 0; }
    .hidden { display: none; }
    """
    ENABLE_COMMAND_PALETTE = False
    theme = "ansi-dark"

    def __init__(self, session: Session, via: str = "", note: str = "", log: Path = LOG, table: tuple[Action, ...] = TABLE, **kw):
        super().__init__(ansi_color=True, **kw)
        self.session, self.table = session, table
        self.link = Link(log, via, self.on_progress, self.on_death)
        self.info: ModelInfo | None = None
        self.loaded: Load | None = None  # what the engine was last asked to load
        self.busy = "starting the engine…"
        self.cursor = Cursor()
        self.at_end = True
        self.pane, self.recent = "lens", ["lens", "attention", "output", *(p for p in PANES if p not in ("lens", "attention", "output"))]
        self.zoomed = self.drilled = False
        self.scopes = {p.key: p.scope for p in PANES.values()}
        self.places: dict[str, Region] = {}
        self.wanted: dict[str, object] = {}
        self.have: dict[str, tuple[object, object]] = {}  # slot -> (request, result or error line)
        self.answers: dict[object, object] = {}  # request -> result, the newest 64
        self.grids: dict[str, tuple[tuple, Grid]] = {}
        self.known_saes: dict[str, SaeInfo] = {}
        self.found: dict[str, DiscoverResult] = {}  # of circuits that were discovered here
        self.found_by: dict[str, Discover] = {}  # and how
        self.status: Spans = [(note, WARN)] if note else []
        self.memory = (0, 0, 0)
        self.failed = self.progress_of = ""
        self.said_lines = 1
        self.matches: list[dict] = []
        self.started: set[object] = set()  # sweeps that were asked for
        self.needle = ""
        self.edited: tuple[Prompt, CheckResult] | None = None
        self.slow = False
        self.first_paint = self.first_lens = 0.0
        if table is not TABLE:
            self.set_keymap({b.id: ",".join(c.key for c in Binding.make_bindings([b])) for b in bindings(table)})

    # -------------------------------------------------------------- layout and life

    def get_default_screen(self) -> TightScreen:
        return Quiet(id="_default")

    def compose(self) -> ComposeResult:
        self.top, self.status_line, self.hint_line = Lines(id="top"), Lines(id="status"), Lines(id="hint")
        self.panes: dict[str, Pane] = {key: pane() for key, pane in PANES.items()}
        yield self.top
        with Container(id="body"):
            yield from self.panes.values()
        yield self.status_line
        yield self.hint_line

    def on_mount(self) -> None:
        if self.no_color and self.state.views["mode"] == "colour":
            self.session.state = replace(self.state, views={**self.state.views, "mode": "shade"})
        if not self.is_headless:
            loop = asyncio.get_running_loop()
            for sig in (signal.SIGHUP, signal.SIGTERM):
                loop.add_signal_handler(sig, self.exit)
            self.app_resume_signal.subscribe(self, lambda app: self.screen.forget())
        self.arrange()
        self.call_after_refresh(self.start_engine)

    async def on_unmount(self) -> None:
        await self.link.stop()

    def on_resize(self) -> None:
        if self.is_mounted:
            self.call_after_refresh(self.arrange)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While an overlay is open its keys are text, not commands."""
        return not (action == "do" and self.is_mounted and any(not o.closing for o in self.query(Overlay)))

    @property
    def state(self) -> State:
        return self.session.state

    def start_engine(self) -> None:
        self.first_paint = self.first_paint or time.monotonic()
        self.run_engine()

    @work(group="engine", exclusive=True)
    async def run_engine(self) -> None:
        await self.link.stop()
        self.info, self.loaded = None, None
        try:
            await self.link.start()
        except OSError as error:
            self.say(f"the engine does not start: {error}", BAD)
            return
        self.refresh_wants()

    def on_death(self, reason: str) -> None:
        self.info, self.loaded, self.busy = None, None, f"no engine ({reason})"
        self.say(f"the engine died ({reason}): ctrl+e restarts it; model, prompts and interventions are kept; its log is {self.link.log}", BAD)
        self.draw()

    def on_progress(self, job: Job) -> None:
        p = job.progress
        if job.slot == "load":
            self.busy = p.text or "loading…"
            self.draw_top()
        elif p.total > 1 and time.monotonic() - job.started > 0.4:
            self.say(f"{p.text or job.slot} {p.done}/{p.total}{'' if 'left' in p.text else f' {job.left}'.rstrip()}", DIM)
            self.progress_of = job.slot

    @work(group="load", exclusive=True)
    async def load(self, request: Load) -> None:
        self.info, self.loaded, self.busy = None, request, f"loading {request.model}…"
        self.have.clear()
        self.answers.clear()
        self.draw()
        try:
            self.info = await self.link.ask("load", request, 0)
        except Superseded:
            return
        except EngineError as error:
            self.busy = "not loaded: M chooses a model"
            if self.link.alive and self.session.past and self.session.past[-1][1] == "model" and not isinstance(error, EngineDied):
                self.session.do("undo")  # back to the model before, which the engine still has
                self.refresh_wants()
            self.say(str(error), BAD)
            self.draw()
            self.failed = str(error)
            return
        broken = [c.name for c in self.info.checks if c.ok is False]
        line = f"loaded {self.info.name} in {self.info.seconds:.1f} s"
        self.say(
            f"{line}; self-check FAILED: {', '.join(broken)}"
            if broken
            else f"{line}; self-check passed ({sum(c.ok is True for c in self.info.checks)} identities)",
            BAD if broken else GOOD,
        )
        if self.failed:
            self.say(f"{self.info.name} stays: {self.failed}", BAD)
            self.failed = ""
        if self.cursor == Cursor():
            self.cursor = Cursor(layer=self.info.n_layers - 1)
        self.clamp()
        self.refresh_wants()

    # -------------------------------------------------------------- what the panes need, and asking for it

    def visible_panes(self) -> list[str]:
        """One, two or three panes by size, the most recently used first, in the order of their numbers."""
        w, h = self.size
        fixed = settings().get("LOUPE_PANES", "") if not hasattr(self, "fixed") else self.fixed
        self.fixed = fixed
        n = 1 if self.zoomed else int(fixed) if fixed in ("1", "2", "3") else 1 if w < 100 or h < 30 else 2 if w < 160 or h < 40 else 3
        shown = self.recent[:n]
        return [p for p in PANES if p in shown]

    def refresh_wants(self) -> None:
        """Ask for what the visible panes lack, draw what is there."""
        if self.loaded != self.state.model and self.link.alive:
            self.load(self.state.model)
            return
        if self.info is None:
            self.wanted = {}
            self.draw()
            return
        self.wanted = {"check": Check(self.state.prompt, self.state.align), "run": Run(self.study)}
        for name in self.visible_panes():
            self.wanted |= self.panes[name].wants(self)
        known = False
        for slot, request in self.wanted.items():
            if request in self.answers:
                known = known or (slot == "run" and self.have.get(slot, (None,))[0] != request)
                self.have[slot] = (request, self.answers[request])
                self.cancel_group(slot)
            elif self.have.get(slot, (None,))[0] != request and self.asking.get(slot) != request:
                self.ask(slot, request)
        if known:
            self.clamp()
        self.draw()

    @property
    def study(self) -> Study:
        """The state's study; without answers that are not single tokens in this model, so that everything else still runs (the top line says so)."""
        study, check = self.state.study, self.answers.get(Check(self.state.prompt, self.state.align))
        if isinstance(check, CheckResult) and any(len(r.ids) != 1 for r in (*check.answers, *check.foils)):
            return replace(study, prompt=replace(study.prompt, answers=(), foils=()))
        return study

    @property
    def asking(self) -> dict[str, object]:
        return {j.slot: j.request for j in self.link.jobs.values()}

    def left(self, slot: str) -> str:
        """Time left of what a slot asks for, in words."""
        return next((f", {j.left}" for j in self.link.jobs.values() if j.slot == slot and j.left), "")

    def cancel_group(self, slot: str) -> None:
        for job in [j for j in self.link.jobs.values() if j.slot == slot]:
            self.link.cancel(job.id)

    def ask(self, slot: str, request: object) -> None:
        self.run_worker(partial(self.answer, slot, request), group=slot, exclusive=True, exit_on_error=True)

    async def answer(self, slot: str, request: object) -> None:
        parts: list[LensResult] = []
        drawn = [0.0]

        def on_partial(part: object) -> None:
            if self.wanted.get(slot) != request:
                return
            if isinstance(part, LensResult):
                parts.append(part)
                part = pictures.joined(parts)
            self.have[slot] = (("partial", request), part)
            if isinstance(part, RunResult):
                self.clamp()
            if time.monotonic() - drawn[0] > 0.3:  # at most a few pictures a second over the wire to the terminal
                drawn[0] = time.monotonic()
                self.draw()

        slow = self.set_timer(0.2, lambda: self.mark_slow())
        try:
            result = await self.link.ask(slot, request, 0 if slot in ("check", "run", "attention") else 1, on_partial)
        except Superseded:
            return
        except EngineError as error:
            if not isinstance(error, EngineDied):
                self.say(str(error), BAD)
            result = str(error)
        finally:
            slow.stop()
        self.have[slot] = (request, result)
        if self.progress_of == slot:
            self.say("")
        if not isinstance(result, str):
            self.answers[request] = result
            while len(self.answers) > 64:
                del self.answers[next(iter(self.answers))]
        if slot == "lens" and not self.first_lens:
            self.first_lens = time.monotonic()
        if isinstance(result, RunResult):
            self.clamp()
        if isinstance(result, CheckResult | PreflightResult | FeaturesResult):  # what a pane wants next depends on these
            self.refresh_wants()
        self.draw()
        if not self.link.jobs:
            self.poll_memory()

    def mark_slow(self) -> None:
        self.slow = True
        self.draw()

    @work(group="status", exclusive=True)
    async def poll_memory(self) -> None:
        with contextlib.suppress(Superseded, EngineError):
            s = await self.link.ask("status", Status(), 2)
            self.memory = (s.memory // 10**7 * 10**7, s.device_memory // 10**7 * 10**7, s.cache)
            self.draw_top()

    async def settle(self) -> None:
        """Wait until nothing is being asked (for tests and benchmarks; no sleeping by the clock)."""
        while True:
            running = [w for w in self.workers if w.state in (WorkerState.PENDING, WorkerState.RUNNING)]
            if not running:
                return
            await asyncio.wait([asyncio.ensure_future(self.finished(w)) for w in running])
            await asyncio.sleep(0)

    async def finished(self, worker: Worker) -> None:
        with contextlib.suppress(Exception):
            await worker.wait()

    def stale(self, slot: str) -> bool:
        return self.have.get(slot, (None,))[0] != self.wanted.get(slot)

    def result(self, slot: str, kind: type | tuple[type, ...]) -> object | None:
        """What a pane draws: the slot's result, unless its request failed."""
        got = self.have.get(slot, (None, None))[1]
        return got if isinstance(got, kind) else None

    def fresh(self, slot: str, kind: type) -> object | None:
        """The slot's result, whole or in part, only if it answers what is asked for now."""
        wanted, got = self.wanted.get(slot), self.have.get(slot, (None, None))[0]
        return self.result(slot, kind) if wanted is not None and got in (wanted, ("partial", wanted)) else None

    def fresh_or_known(self, slot: str, request: object) -> object | None:
        """The answer to a request, if it is at hand."""
        got = self.have.get(slot, (None, None))
        return got[1] if got[0] == request else self.answers.get(request)

    def error(self, slot: str) -> str:
        got = self.have.get(slot, (None, None))
        return got[1] if isinstance(got[1], str) and got[0] == self.wanted.get(slot) else ""

    # -------------------------------------------------------------- the cursor

    @property
    def tokens(self):
        run = self.result("run", RunResult)
        if run is None:
            return None
        which = self.state.views["which"].split("-")[0]
        return run.corrupt if which == "corrupt" and run.corrupt else run.clean if which == "clean" else run.now

    def length(self) -> int:
        return len(self.tokens.tokens.ids) if self.tokens else 0

    def counted(self) -> bool:
        """Whether the tokens at hand are those of the prompt in the state, so that positions can be asked for."""
        request = self.have.get("run", (None,))[0]
        request = request[1] if isinstance(request, tuple) else request
        return (
            bool(self.length()) and isinstance(request, Run) and request.study.prompt.clean == self.state.prompt.clean and request.study.base == self.state.base
        )

    def clamp(self) -> None:
        """Keep the cursor inside the model and the prompt; at the end it stays at the end."""
        if self.info is None:
            return
        n, c = self.length(), self.cursor
        pos = n - 1 if self.at_end or c.pos < 0 else min(c.pos, n - 1)
        point = "resid_post" if self.info.parallel and c.point == "resid_mid" else c.point
        before = self.cursor
        self.cursor = replace(
            c,
            layer=min(c.layer, self.info.n_layers - 1),
            head=min(c.head, self.info.n_heads - 1),
            point=point,
            pos=max(pos, 0),
            src=min(c.src, max(pos, 0)),
        )
        if before != self.cursor:
            self.refresh_wants()

    def move(self, **where: object) -> None:
        old = self.cursor
        self.cursor = replace(old, **where)
        if self.cursor == old:
            return
        self.at_end = self.cursor.pos == self.length() - 1
        self.refresh_wants()

    def node(self) -> Node:
        """The node that an action acts on: the current pane's, at all positions or at the cursor's."""
        return self.panes[self.pane].node(self, self.cursor.pos if self.scopes[self.pane] == "here" else None)

    def step(self, rows: int, cols: int) -> None:
        if self.info is not None:
            self.panes[self.pane].step(self, rows, cols)

    # -------------------------------------------------------------- drawing

    def draw(self) -> None:
        if not self.is_mounted or not hasattr(self, "panes"):
            return
        self.draw_top()
        for name in self.visible_panes():
            self.panes[name].paint(self)
        self.place()
        self.draw_hint()
        self.slow = self.slow and any(self.stale(s) for s in self.wanted)

    def say(self, text: str, style=PLAIN) -> None:
        self.progress_of = ""
        self.status = [(f" {visible(text)}", style)]
        self.draw_hint()

    def draw_hint(self) -> None:
        if not hasattr(self, "hint_line"):
            return
        text, style = self.status[0] if self.status else ("", PLAIN)
        lines = textwrap.wrap(text.strip(), max(self.size.width - 2, 10))[: 3 if self.size.height >= 20 else 1] or [""]
        if len(lines) != self.said_lines:
            self.said_lines = len(lines)
            self.status_line.styles.height = len(lines)
            self.place()
        self.status_line.show([[(f" {line}", style)] for line in lines])
        letter = self.panes[self.pane].number
        hints: Spans = [(f" {self.node()!s:18}" if self.info else " ", BOLD), (" ?", BOLD), (" help ", DIM)]
        shown = {a.keys.split(",")[0]: a for a in self.table if letter in a.hint and (a.group != "Move" or a.id == "enter")}
        first = ("enter", "sweep", "view")  # then what only this pane has
        own = sorted(shown.items(), key=lambda item: (first.index(item[1].id) if item[1].id in first else len(first), len(item[1].hint)))
        for key, title in (*((show_key(k), a.title) for k, a in own), ("hjkl", "move")):
            if sum(cell_len(text) for text, _ in hints) + cell_len(key + title) + 3 > self.size.width:
                break
            hints += [(f" {key}", BOLD), (f" {title} ", DIM)]
        self.hint_line.show([hints])

    def draw_top(self) -> None:
        if not hasattr(self, "top"):
            return
        s, run = self.state, self.result("run", RunResult)
        w, c, colour = self.size.width, self.cursor, self.state.views["mode"] != "shade"
        error = self.error("run")
        lines = [pictures.model_line(self.info, s.model.model, self.busy, self.memory)]
        metric = pictures.metric_line(run, s.metric.kind, str(s.metric.pos), RUN_NAMES[s.base], self.fresh("run", RunResult) is None, w)
        dropped = self.state.prompt.answers and not self.study.prompt.answers
        if dropped:
            metric = [(f" {s.metric.kind} —  an answer or foil is not one token in this model: t edits them", WARN)]
        lines.append([(f" {visible(error)}", BAD)] if error else metric)
        ids = s.views["ids"] == "on"
        clean, corrupt = (run.clean.tokens, run.corrupt.tokens if run.corrupt else None) if run else (None, None)
        heat = self.panes["attention"].reading(self) if "attention" in self.visible_panes() else None
        on_corrupt = (s.views["which"].split("-")[0] == "corrupt") or (s.views["which"].startswith("now") and s.base == "corrupt")
        heats = (None, heat) if on_corrupt else (heat, None)
        lines.append(pictures.token_line("clean", clean, c.pos, w, None, ids, colour, s.prompt.clean, heats[0]))
        other = s.prompt.corrupt or "none: E types one, o opens a prompt set"
        lines.append(pictures.token_line("corrupted", corrupt, c.pos, w, clean, ids, colour, other, heats[1]))
        label = [k for k, v in (clean.labels if clean else {}).items() if v == c.pos]
        state: Spans = [(" " + ("off " if not s.enabled and s.interventions else ""), WARN)]
        state += [(" ".join(str(i) for i in s.interventions) or "no interventions", (BOLD if s.enabled else DIM) if s.interventions else DIM)]
        if s.set_path:
            edited = s.prompt != s.prompt_set[s.index]
            state.append((f"  set {Path(s.set_path).stem} {s.index + 1}/{len(s.prompt_set)}{' (edited)' if edited else ''}", WARN if edited else DIM))
        state.append(
            (
                f"  answer {' '.join(show_token(a) for a in s.prompt.answers[:3]) or '—'} foil {' '.join(show_token(a) for a in s.prompt.foils[:3]) or '—'}",
                DIM,
            )
        )
        if s.align or s.prompt.alignment:
            state.append((f"  aligned {'by hand' if s.prompt.alignment else f'by {s.align}'}", WARN))
        state.append((f"  @{c.pos}{' ' + ' '.join(label) if label else ''}" if run else "", DIM))
        lines.append(state)
        self.top.show(lines)

    def picture(self, slot: str, key: tuple, make) -> Grid:
        """A grid, made anew only when what it shows changed."""
        if slot not in self.grids or self.grids[slot][0] != key:
            self.grids[slot] = (key, make())
        return self.grids[slot][1]

    def waiting(self, slot: str) -> Spans:
        error = self.error(slot)
        return [(f"  {visible(error)}", BAD)] if error else [("  " + (self.busy if self.info is None else "computing…"), DIM)]

    def run_name(self, which: str) -> str:
        s = self.state
        now = f"now ({len(s.interventions)} on {RUN_NAMES[s.base]})" if s.interventions and s.enabled else f"now = {RUN_NAMES[s.base]}"
        return RUN_NAMES[which].replace("now", now)

    def late(self, slots: tuple[str, ...]) -> str:
        """Said in a title when what is drawn is not what the state asks for."""
        if not any(s in self.wanted and self.stale(s) for s in slots):
            return ""
        return "NOT CURRENT (no engine) · " if self.info is None and self.have else "⟳ computing, below is what was before · " if self.slow else ""

    def arrange(self) -> None:
        """Show the panes that fit, in their places, and put the focus on the current one."""
        shown = self.visible_panes()
        for name, pane in self.panes.items():
            pane.set_class(name not in shown, "hidden")
        self.query_one("#top").styles.height = 5 if self.size.height >= 12 else 2
        if all(o.closing for o in self.query(Overlay)):
            self.panes[self.pane].focus()
        self.refresh_wants()
        self.call_after_refresh(self.draw)

    def place(self) -> None:
        """One pane fills the body; two are stacked, each as high as it can use; a third that is narrow stands on the right."""
        shown, w, h = self.visible_panes(), self.size.width, max(self.size.height - (6 if self.size.height >= 12 else 3) - self.said_lines, 1)
        right = [p for p in shown if not self.panes[p].wide][-1:] or shown[2:] if len(shown) == 3 else []
        stack, left = [p for p in shown if p not in right], w - 78 if right else w
        first = h
        if len(stack) == 2:
            a, b = (self.panes[p].height_needed() for p in stack)
            first = a if a + b <= h else h - b if b < h // 2 else min(a, h // 2)
        places = {stack[0]: Region(0, 0, left, first)} | {p: Region(0, first, left, h - first) for p in stack[1:]}
        places |= {p: Region(left + 2, 0, w - left - 2, h) for p in right}
        for name, r in places.items():
            if self.places.get(name) != r:
                pane = self.panes[name]
                pane.styles.offset, pane.styles.width, pane.styles.height = r.offset, r.width, r.height
        self.places = {**self.places, **places}

    def show_pane(self, name: str) -> None:
        before = self.visible_panes()
        self.pane = name
        self.recent.remove(name)
        self.recent.insert(0, name)
        self.drilled = False
        if self.visible_panes() != before:
            self.arrange()
        else:
            self.panes[name].focus()
            self.draw()

    def on_overlay_closed(self) -> None:
        open_ones = [o for o in self.query(Overlay) if not o.closing]
        open_ones[-1].take_focus() if open_ones else self.panes[self.pane].focus()


def first_state(values: dict[str, str]) -> State:
    """What opens first: the model of .env, and the zoo's IOI prompts."""
    state = State(
        Load(
            values.get("LOUPE_MODEL") or "zoo",
            None,
            values.get("LOUPE_DTYPE") or "auto",
            values.get("LOUPE_DEVICE") or "auto",
            values.get("LOUPE_DEVICE_MAP") or None,
        )
    )
    path = ROOT / "zoo" / "prompts" / "ioi_abba.jsonl"
    prompts = read_prompt_set(path)
    return replace(state, prompt=prompts[0], set_path=str(path), prompt_set=prompts)


def main() -> None:
    parser = argparse.ArgumentParser(prog="tui.py", description="Loupe: a terminal microscope for transformer circuits")
    parser.add_argument("--model", help="zoo, a Hugging Face folder, or a hub name (default: LOUPE_MODEL of .env)")
    parser.add_argument("--base", help="the architecture's model, when --model holds fine-tuned weights only")
    parser.add_argument("--dtype", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--device-map", help="a Hugging Face device_map, such as auto")
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help="open the newest session again, or this one")
    parser.add_argument("--via", default="", help='what carries the engine: "srun --gres=gpu:1", "ssh gpu01 cd loupe &&"')
    parser.add_argument("--mouse", action="store_true", help="mouse reporting on (takes the terminal's own selection away)")
    parser.add_argument("--keys", action="store_true", help="print the key table in Markdown and leave")
    args = parser.parse_args()
    if args.keys:
        print(key_table(), end="")
        return
    note = ""
    try:
        values = settings()
        table = remapped(values.get("LOUPE_KEYMAP", ""))
        if args.resume is not None:
            session, note = read_session(args.resume or newest_session())
            note = note or f" restored {session.path.name}: {len(session.past)} steps back"
        else:
            given = {k: v for k in ("model", "base", "dtype", "device", "device_map") if (v := getattr(args, k))}
            state = first_state(values)
            session = Session(replace(state, model=replace(state.model, **given)))
    except UserError as error:
        sys.exit(f"loupe: {error}")
    app = Loupe(session, args.via, note, table=table)
    app.run(mouse=args.mouse)
    sys.exit(app.return_code or 0)


if __name__ == "__main__":
    main()
