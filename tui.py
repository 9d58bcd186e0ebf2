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
import time
from dataclasses import dataclass, replace
from pathlib import Path

if "SSH_CONNECTION" in os.environ:  # remote mode: fewer frames; textual reads these when it is imported
    os.environ.setdefault("TEXTUAL_FPS", "15")
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

import numpy as np
from textual import work
from textual.app import App, ComposeResult
from textual.containers import Horizontal, Vertical
from textual.reactive import var
from textual.screen import Screen
from textual.worker import Worker, WorkerState

import pictures
from actions import TABLE, Action, key_table, remapped, show_key
from export import EXPORTS, python_script
from link import EngineDied, EngineError, Job, Link, Superseded
from messages import (
    METRICS,
    OPS,
    ABLATIONS,
    WHICH,
    Attention,
    Check,
    CheckResult,
    HeadStats,
    Identities,
    Intervention,
    Lens,
    LensResult,
    Load,
    ModelInfo,
    Models,
    Node,
    Prompt,
    Run,
    RunResult,
    Status,
    UserError,
    parse_intervention,
    parse_node,
    read_prompt_set,
)
from pictures import HEAD_STATS, LENS_STATS, RUN_NAMES
from session import SESSIONS, VIEWS, Session, State, newest_session, read_session
from utils import ROOT, settings, show_token, visible
from widgets import (
    BAD,
    BOLD,
    DIM,
    GOOD,
    PLAIN,
    WARN,
    AttentionPane,
    Editor,
    Grid,
    Item,
    Lines,
    LensPane,
    OutputPane,
    Overlay,
    Pane,
    Panel,
    Picker,
    Spans,
)

LOG = ROOT / "logs" / "engine.log"
PANES = ("lens", "attention", "output")
SITES_OF = {"attn": "attn", "mlp": "mlp"}


@dataclass(frozen=True)
class Cursor:
    """Shared by all panes: a layer, a head or component, a hook point of the residual stream, a position and a source position."""

    layer: int = 0
    head: int = 0
    comp: str = "head"
    point: str = "resid_post"
    pos: int = -1
    src: int = 0


class Quiet(Screen):
    """A screen that does not repaint as a whole when the focus moves (held by the byte-budget test)."""

    focused = var(None)


class Loupe(App):
    CSS = """
    Screen { layers: base overlay; overflow: hidden; background: ansi_default; color: ansi_default; }
    #top { height: 5; } #status { height: 1; } #hint { height: 1; }
    #body { height: 1fr; } #left { width: 1fr; } #right { width: 46; padding-left: 2; }
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
        self.pane, self.recent = "lens", ["lens", "attention", "output"]
        self.zoomed = self.drilled = False
        self.scopes = {"lens": "here", "attention": "all"}
        self.wanted: dict[str, object] = {}
        self.have: dict[str, tuple[object, object]] = {}  # slot -> (request, result or error line)
        self.answers: dict[object, object] = {}  # request -> result, the newest 64
        self.grids: dict[str, tuple[tuple, Grid]] = {}
        self.status: Spans = [(note, WARN)] if note else []
        self.memory = (0, 0, 0)
        self.matches: list[tuple[int, int]] = []
        self.needle = ""
        self.edited: tuple[Prompt, CheckResult] | None = None
        self.slow = False
        self.first_paint = self.first_lens = 0.0
        for a in table:
            self._bindings.bind(a.keys, f"do('{a.id}')", a.title, show=False)

    # -------------------------------------------------------------- layout and life

    def get_default_screen(self) -> Screen:
        return Quiet(id="_default")

    def compose(self) -> ComposeResult:
        self.top, self.status_line, self.hint_line = Lines(id="top"), Lines(id="status"), Lines(id="hint")
        self.panes: dict[str, Pane] = {"lens": LensPane(), "attention": AttentionPane(), "output": OutputPane()}
        yield self.top
        with Horizontal(id="body"):
            with Vertical(id="left"):
                yield self.panes["lens"]
                yield self.panes["attention"]
            with Vertical(id="right"):
                yield self.panes["output"]
        yield self.status_line
        yield self.hint_line

    def on_mount(self) -> None:
        if self.no_color and self.state.views["mode"] == "colour":
            self.session.state = replace(self.state, views={**self.state.views, "mode": "shade"})
        if not self.is_headless:
            loop = asyncio.get_running_loop()
            for sig in (signal.SIGHUP, signal.SIGTERM):
                loop.add_signal_handler(sig, self.exit)
        self.arrange()
        self.call_after_refresh(self.start_engine)

    async def on_unmount(self) -> None:
        await self.link.stop()

    def on_resize(self) -> None:
        if self.is_mounted:
            self.arrange()

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
        self.say(
            f"the engine died ({reason}): ctrl+e restarts it; model, prompts and interventions are kept; its log is {self.link.log}", BAD
        )
        self.draw()

    def on_progress(self, job: Job) -> None:
        p = job.progress
        if job.slot == "load":
            self.busy = p.text or "loading…"
            self.draw_top()
        elif p.total > 1:
            self.say(f"{p.text or job.slot} {p.done}/{p.total}", DIM)

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
            self.busy = "not loaded: M chooses a model, u goes back"
            self.say(str(error), BAD)
            self.draw()
            return
        broken = [c.name for c in self.info.checks if c.ok is False]
        line = f"loaded {self.info.name} in {self.info.seconds:.1f} s"
        self.say(
            f"{line}; self-check FAILED: {', '.join(broken)}"
            if broken
            else f"{line}; self-check passed ({sum(c.ok is True for c in self.info.checks)} identities)",
            BAD if broken else GOOD,
        )
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

    def wants(self) -> dict[str, object]:
        study, views, shown = self.state.study, self.state.views, self.visible_panes()
        which, wants = views["which"], {"run": Run(study)}
        if "lens" in shown:
            wants["lens"] = Lens(study, which if which in RUN_NAMES and "-" not in which else "now", self.lens_points())
        if "attention" in shown:
            wants["attention"] = Attention(study, self.cursor.layer, which)
            pair = (self.cursor.pos, self.cursor.src) if views["attention.stat"] == "pair" else None
            wants["heads"] = HeadStats(study, which, "prompt" if pair else views["attention.source"], pair)
        return wants

    def lens_points(self) -> tuple[str, ...]:
        kind, n, mid = self.state.views["lens.points"], self.info.n_layers, not self.info.parallel
        if kind == "all":
            return tuple(f"L{i}.{s}" for i in range(n) for s in ("resid_pre", "resid_mid", "resid_post") if mid or s != "resid_mid")
        sites = ("resid_mid", "resid_post") if kind == "mid+post" and mid else ("resid_post",)
        return ("L0.resid_pre", *(f"L{i}.{s}" for i in range(n) for s in sites))

    def refresh_wants(self) -> None:
        """Ask for what the visible panes lack, draw what is there."""
        if self.loaded != self.state.model and self.link.alive:
            self.load(self.state.model)
            return
        if self.info is None:
            self.draw()
            return
        self.wanted = self.wants()
        for slot, request in self.wanted.items():
            if request in self.answers:
                self.have[slot] = (request, self.answers[request])
                self.cancel_group(slot)
            elif self.have.get(slot, (None,))[0] != request and self.asking.get(slot) != request:
                self.ask(slot, request)
        self.draw()

    @property
    def asking(self) -> dict[str, object]:
        return {j.slot: j.request for j in self.link.jobs.values()}

    def cancel_group(self, slot: str) -> None:
        for job in [j for j in self.link.jobs.values() if j.slot == slot]:
            self.link.cancel(job.id)

    def ask(self, slot: str, request: object) -> None:
        self.run_worker(self.answer(slot, request), group=slot, exclusive=True, exit_on_error=True)

    async def answer(self, slot: str, request: object) -> None:
        partial: list[LensResult] = []

        def on_partial(part: object) -> None:
            if isinstance(part, LensResult) and self.wanted.get(slot) == request:
                partial.append(part)

        slow = self.set_timer(0.2, lambda: self.mark_slow())
        try:
            result = await self.link.ask(slot, request, 1 if slot in ("lens", "heads") else 0, on_partial)
        except Superseded:
            return
        except EngineError as error:
            if not isinstance(error, EngineDied):
                self.say(str(error), BAD)
            result = str(error)
        finally:
            slow.stop()
        self.have[slot] = (request, result)
        if not isinstance(result, str):
            self.answers[request] = result
            while len(self.answers) > 64:
                del self.answers[next(iter(self.answers))]
        if slot == "lens" and not self.first_lens:
            self.first_lens = time.monotonic()
        if isinstance(result, RunResult):
            self.clamp()
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

    def result(self, slot: str, kind: type) -> object | None:
        got = self.have.get(slot, (None, None))[1]
        return got if isinstance(got, kind) else None

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
        if before.layer != self.cursor.layer:
            self.refresh_wants()

    def move(self, **where: object) -> None:
        old = self.cursor
        self.cursor = replace(old, **where)
        if self.cursor == old:
            return
        self.at_end = self.cursor.pos == self.length() - 1
        if self.cursor.layer != old.layer or (
            self.state.views["attention.stat"] == "pair" and (self.cursor.pos, self.cursor.src) != (old.pos, old.src)
        ):
            self.refresh_wants()
        else:
            self.draw()

    def node(self) -> Node:
        """The node that an action acts on: in the lens a point of the residual stream, elsewhere the head, attention or MLP output."""
        c = self.cursor
        kind = "lens" if self.pane == "lens" else "attention"
        pos = c.pos if self.scopes[kind] == "here" else None
        if kind == "lens":
            return Node(c.point, c.layer, pos=pos)
        return Node("head", c.layer, c.head, pos=pos) if c.comp == "head" else Node(c.comp, c.layer, pos=pos)

    def lens_row(self, result: LensResult) -> int:
        name = f"L{self.cursor.layer}.{self.cursor.point}"
        if name in result.points:
            return result.points.index(name)
        return next((n for n, p in enumerate(result.points) if p.startswith(f"L{self.cursor.layer}.")), 0)

    def step(self, rows: int, cols: int) -> None:
        if self.info is None:
            return
        c, n = self.cursor, self.length()
        if self.pane == "lens" or self.pane == "output":
            points = self.lens_points()
            name = f"L{c.layer}.{c.point}"
            at = points.index(name) if name in points else 0
            row = parse_node(points[max(0, min(at + rows, len(points) - 1))])
            self.move(layer=row.layer, point=row.site, pos=max(0, min(c.pos + cols, n - 1)))
        elif self.drilled:
            self.move(pos=max(0, min(c.pos + rows, n - 1)), src=max(0, min(c.src + cols, n - 1)))
        else:
            columns = [("head", h) for h in range(self.info.n_heads)] + [("attn", c.head), ("mlp", c.head)]
            at = next((i for i, (k, h) in enumerate(columns) if k == c.comp and (k != "head" or h == c.head)), 0)
            comp, head = columns[max(0, min(at + cols, len(columns) - 1))]
            self.move(layer=max(0, min(c.layer + rows, self.info.n_layers - 1)), comp=comp, head=head)

    # -------------------------------------------------------------- drawing

    def draw(self) -> None:
        if not self.is_mounted or not hasattr(self, "panes"):
            return
        self.draw_top()
        shown = self.visible_panes()
        for name in shown:
            {"lens": self.draw_lens, "attention": self.draw_attention, "output": self.draw_output}[name]()
        self.draw_hint()
        self.slow = self.slow and any(self.stale(s) for s in self.wanted)

    def say(self, text: str, style=PLAIN) -> None:
        self.status = [(f" {visible(text)}", style)]
        self.draw_hint()

    def draw_hint(self) -> None:
        if not hasattr(self, "hint_line"):
            return
        self.status_line.show([self.status])
        letter = self.pane[0]
        hints: Spans = [(f" {self.node()} " if self.info else " ", BOLD)]
        shown = {a.keys.split(",")[0]: a for a in self.table if letter in a.hint and a.group != "Move" or a.id == "enter" and letter == "a"}
        for key, a in shown.items():
            hints += [(f" {show_key(key)}", BOLD), (f" {a.title} ", DIM)]
        hints += [(" hjkl", BOLD), (" move ", DIM)]
        self.hint_line.show([hints])

    def draw_top(self) -> None:
        if not hasattr(self, "top"):
            return
        s, run = self.state, self.result("run", RunResult)
        w, c, colour = self.size.width, self.cursor, self.state.views["mode"] != "shade"
        error = self.error("run")
        lines = [pictures.model_line(self.info, s.model.model, self.busy, self.memory)]
        metric = pictures.metric_line(run, s.metric.kind, str(s.metric.pos), RUN_NAMES[s.base], self.stale("run"))
        lines.append([(f" {visible(error)}", BAD)] if error else metric)
        ids = s.views["ids"] == "on"
        clean, corrupt = (run.clean.tokens, run.corrupt.tokens if run.corrupt else None) if run else (None, None)
        lines.append(pictures.token_line("clean", clean, c.pos, w, None, ids, colour, s.prompt.clean))
        lines.append(
            pictures.token_line(
                "corrupted", corrupt, c.pos, w, clean, ids, colour, s.prompt.corrupt or "none: E types one, o opens a prompt set"
            )
        )
        label = [k for k, v in (clean.labels if clean else {}).items() if v == c.pos]
        state: Spans = [(" " + ("off " if not s.enabled and s.interventions else ""), WARN)]
        state += [
            (" ".join(str(i) for i in s.interventions) or "no interventions", (BOLD if s.enabled else DIM) if s.interventions else DIM)
        ]
        if s.set_path:
            state.append((f"  set {Path(s.set_path).stem} {s.index + 1}/{len(s.prompt_set)}", DIM))
        state.append(
            (
                f"  answer {' '.join(show_token(a) for a in s.prompt.answers[:3]) or '—'} foil {' '.join(show_token(a) for a in s.prompt.foils[:3]) or '—'}",
                DIM,
            )
        )
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

    def late(self, slot: str) -> str:
        return "⟳ " if self.slow and self.stale(slot) and self.info else ""

    def draw_lens(self) -> None:
        pane, views = self.panes["lens"], self.state.views
        result, stat = self.result("lens", LensResult), views["lens.stat"]
        which = views["which"] if "-" not in views["which"] else "now"
        if result is None or self.error("lens"):
            pane.show_title(self.run_name(which), "", self.pane == "lens")
            pane.table.show(None, (0, 0), views["mode"], self.waiting("lens"))
            pane.side.show([])
            pane.info_line.show([])
            return
        grid = self.picture("lens", (id(result), stat), lambda: pictures.lens_grid(result, stat, self.info.d_vocab if self.info else 2))
        pane.show_title(
            f"{self.late('lens')}{self.run_name(which)} · {LENS_STATS[stat]} {pictures.scale(grid)}", result.convention, self.pane == "lens"
        )
        row, pos = self.lens_row(result), max(0, min(self.cursor.pos, len(result.tokens.texts) - 1))
        pane.table.show(grid, (row, pos), views["mode"])
        beside = pane.size.width >= 110
        pane.side.set_class(not beside, "hidden")
        if beside:
            pane.side.show(pictures.lens_side(result, row, pos))
        pane.info_line.show([pictures.lens_cell(result, row, pos, 5 if pane.size.width >= 110 else 3)])

    def draw_attention(self) -> None:
        pane, views, c = self.panes["attention"], self.state.views, self.cursor
        from messages import AttentionResult, HeadStatsResult

        heads, pattern = self.result("heads", HeadStatsResult), self.result("attention", AttentionResult)
        stat, focused = views["attention.stat"], self.pane == "attention"
        marks = frozenset((i.node.layer, i.node.head) for i in self.state.interventions if i.node.site == "head" and self.state.enabled)
        title, note = self.run_name(views["which"]), ""
        if heads is None or stat not in heads.stats or self.error("heads"):
            pane.map.show(None, (0, 0), views["mode"], self.waiting("heads"))
        else:
            grid = self.picture("heads", (id(heads), stat, marks), lambda: pictures.heads_grid(heads, stat, marks))
            column = c.head if c.comp == "head" else len(grid.cols) - (2 if c.comp == "attn" else 1)
            pane.map.show(grid, (min(c.layer, len(grid.rows) - 1), column), views["mode"])
            title += f" · {HEAD_STATS[stat]} {pictures.scale(grid)}"
            note = f"on {'random repeated tokens' if heads.source == 'random' else 'the prompt'}"
            if stat == "pair" and self.tokens:
                t = self.tokens.tokens.texts
                note = f"{c.pos} {show_token(t[c.pos])} → {c.src} {show_token(t[c.src])}" if max(c.pos, c.src) < len(t) else ""
        pane.show_title(self.late("heads") + title, note + (" · pattern: hjkl, esc" if self.drilled else ""), focused)
        if pattern is None or pattern.layer != c.layer or self.error("attention"):
            pane.pattern.show(None, (0, 0), views["mode"], self.waiting("attention"))
            pane.info_line.show([])
            return
        grid = self.picture("pattern", (id(pattern), c.head), lambda: pictures.pattern_grid(pattern, c.head))
        pos = max(0, min(c.pos, len(grid.rows) - 1))
        row = np.nan_to_num(np.abs(grid.values[pos]), nan=-1.0)
        src = c.src if self.drilled or stat == "pair" else int(row.argmax())
        pane.pattern.show(grid, (pos, min(src, len(grid.cols) - 1)), views["mode"])
        pane.info_line.show([pictures.pattern_cell(pattern, c.head, pos, src, self.drilled)])

    def draw_output(self) -> None:
        pane, run = self.panes["output"], self.result("run", RunResult)
        pos = self.cursor.pos
        if run is None or self.error("run"):
            pane.show_title("", "", self.pane == "output")
            pane.table.show([self.waiting("run")])
            pane.info_line.show([])
            return
        token = self.tokens.tokens.texts[pos] if self.tokens and pos < self.length() else ""
        pane.show_title(f"{self.late('run')}next token after {pos} {show_token(token)}", "", self.pane == "output")
        prompt = self.state.prompt
        k = max(1, min(10, pane.size.height - 3))
        pane.table.show(pictures.output_lines(run, pos, k, pane.size.width >= 84, set(prompt.answers), set(prompt.foils)))
        pane.info_line.show([[(f" {run.convention}", DIM)]])

    def arrange(self) -> None:
        """Show the panes that fit and put the focus on the current one."""
        shown = self.visible_panes()
        for name, pane in self.panes.items():
            pane.set_class(name not in shown, "hidden")
        self.query_one("#left").set_class(not {"lens", "attention"} & set(shown), "hidden")
        right = self.query_one("#right")
        right.set_class("output" not in shown, "hidden")
        right.styles.width = "1fr" if shown == ["output"] or len(shown) == 2 else 60
        self.query_one("#top").styles.height = 5 if self.size.height >= 12 else 2
        if not self.query(Overlay):
            self.panes[self.pane].focus()
        self.refresh_wants()
        self.call_after_refresh(self.draw)

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

    # -------------------------------------------------------------- actions

    def action_do(self, name: str) -> None:
        try:
            getattr(self, f"do_{name}")()
        except UserError as error:
            self.say(str(error), BAD)

    def action_noop(self) -> None: ...

    def act(self, name: str, **args: object) -> None:
        """Change the state through the session, then show it."""
        try:
            self.session.do(name, **args)
        except OSError as error:
            raise UserError(
                f"the session can't be written to {self.session.path}: {error.strerror}; free space or permissions, then repeat"
            ) from error
        if name in ("prompt", "go", "open_set"):
            self.at_end, self.matches = True, []
        self.refresh_wants()

    def do_pane_lens(self) -> None:
        self.show_pane("lens")

    def do_pane_attention(self) -> None:
        self.show_pane("attention")

    def do_pane_output(self) -> None:
        self.show_pane("output")

    def do_next_pane(self, by: int = 1) -> None:
        self.show_pane(PANES[(PANES.index(self.pane) + by) % len(PANES)])

    def do_previous_pane(self) -> None:
        self.do_next_pane(-1)

    def do_zoom(self) -> None:
        self.zoomed = True
        self.arrange()

    def do_unzoom(self) -> None:
        self.zoomed = False
        self.arrange()

    def do_back(self) -> None:
        if self.drilled:
            self.drilled = False
            self.draw()
        elif self.zoomed:
            self.do_unzoom()

    def do_left(self) -> None:
        self.step(0, -1)

    def do_right(self) -> None:
        self.step(0, 1)

    def do_up(self) -> None:
        self.step(-1, 0)

    def do_down(self) -> None:
        self.step(1, 0)

    def do_first(self) -> None:
        self.step(-(10**6), 0)

    def do_last(self) -> None:
        self.step(10**6, 0)

    def do_layer_up(self, by: int = 1) -> None:
        if self.info:
            self.move(layer=max(0, min(self.cursor.layer + by, self.info.n_layers - 1)))

    def do_layer_down(self) -> None:
        self.do_layer_up(-1)

    def do_pos_right(self, by: int = 1) -> None:
        self.move(pos=max(0, min(self.cursor.pos + by, self.length() - 1)))

    def do_pos_left(self) -> None:
        self.do_pos_right(-1)

    def do_enter(self) -> None:
        pattern = self.panes["attention"].pattern
        if self.pane == "attention" and pattern.grid is not None:
            self.drilled = not self.drilled
            self.cursor = replace(self.cursor, src=pattern.at[1])
            self.draw()

    # -------------------------------------------------------------- prompts

    def edit(self, focus: int) -> None:
        p = self.state.prompt
        fields = [("clean", p.clean), ("corrupted", p.corrupt or ""), ("answer", "|".join(p.answers)), ("foil", "|".join(p.foils))]
        self.edited = None
        self.mount(
            Editor(
                "prompt",
                fields,
                self.accept_prompt,
                focus,
                7,
                "enter accepts · tab next field · | between several answers · \\n newline · ctrl+t ids · esc",
            )
        )

    def typed_prompt(self, values: list[str]) -> Prompt:
        clean, corrupt, answers, foils = values
        p = self.state.prompt
        split = lambda text: tuple(part for part in text.split("|") if part)  # noqa: E731
        return Prompt(clean, corrupt or None, split(answers), split(foils), p.labels if clean == p.clean else (), p.bos)

    def accept_prompt(self, values: list[str]) -> str:
        prompt = self.typed_prompt(values)
        if not prompt.clean:
            return "an empty prompt: type a text"
        if self.edited and self.edited[0] == prompt and self.edited[1].problems:
            return self.edited[1].problems[0]
        if prompt != self.state.prompt:
            try:
                self.act("prompt", prompt=prompt)
            except UserError as error:
                return str(error)
        return ""

    async def on_editor_changed(self, event: Editor.Changed) -> None:
        editors = self.query(Editor)
        if editors and editors.first().rows > 1 and self.info:
            self.preview(editors.first(), self.typed_prompt(event.values))

    @work(group="edit", exclusive=True)
    async def preview(self, editor: Editor, prompt: Prompt) -> None:
        try:
            check: CheckResult = await self.link.ask("edit", Check(prompt), 0)
        except Superseded:
            return
        except EngineError as error:
            editor.preview.show([[(f" {visible(str(error))}", BAD)]])
            return
        self.edited = (prompt, check)
        ids, w = editor.ids, self.size.width
        row = lambda name, r: pictures.token_line(name, r, -1, w, None, ids, True)  # noqa: E731
        lines = [row(f"{len(check.clean.ids)} tokens", check.clean)]
        lines.append(row(f"{len(check.corrupt.ids)} tokens", check.corrupt) if check.corrupt else [])
        for name, rows in (("answer", check.answers), ("foil", check.foils)):
            spans: Spans = [(f" {name:9}  ", DIM)]
            for r in rows:
                spans += [
                    (" ".join(show_token(t) + (f":{i}" if ids else "") for t, i in zip(r.texts, r.ids)), GOOD if len(r.ids) == 1 else BAD),
                    ("  ", PLAIN),
                ]
            lines.append(spans)
        lines += [[(f" {visible(p)}", BAD)] for p in check.problems] + [[(f" {visible(h)}", WARN)] for h in check.hints]
        editor.preview.show(lines[:7])

    def do_edit(self) -> None:
        self.edit(0)

    def do_edit_corrupt(self) -> None:
        self.edit(1)

    def do_edit_answer(self) -> None:
        self.edit(2)

    def do_open(self) -> None:
        files = sorted((ROOT / "zoo" / "prompts").glob("*.jsonl")) + sorted(Path.cwd().glob("*.jsonl"))
        items = [Item(f.stem, str(f.relative_to(ROOT) if f.is_relative_to(ROOT) else f), "", f) for f in files]

        def chosen(item: Item | None, typed: str) -> None:
            self.guard(lambda: self.open_file(item.value if item else Path(typed)))

        self.mount(Picker("prompt set", items, chosen, free=True))

    def guard(self, what) -> None:
        try:
            what()
        except UserError as error:
            self.say(str(error), BAD)

    def open_file(self, path: Path) -> None:
        prompts = read_prompt_set(path)
        self.act("open_set", path=str(path), prompts=prompts, index=0)
        self.say(
            f"{len(prompts)} prompts of {path.name}: ( and ) step through them; mean ablation averages over their corrupted prompts", GOOD
        )

    def do_next_prompt(self, by: int = 1) -> None:
        if not self.state.prompt_set:
            raise UserError("no prompt set is open: o opens one")
        self.act("go", index=(self.state.index + by) % len(self.state.prompt_set))

    def do_previous_prompt(self) -> None:
        self.do_next_prompt(-1)

    def do_metric(self) -> None:
        items = [Item(k, v) for k, v in METRICS.items()]

        def chosen(item: Item | None, typed: str) -> None:
            kind, _, pos = (typed if "@" in typed else item.key if item else typed).partition("@")
            pos = int(pos) if pos.lstrip("-").isdigit() else pos
            self.guard(lambda: self.act("metric", kind=item.key if item and not pos else kind, pos=pos or "END"))

        self.mount(Picker("metric (type kind@position for another position: prob@-2, logit_diff@S2)", items, chosen, free=True))

    def do_ids(self) -> None:
        self.turn("ids")

    # -------------------------------------------------------------- interventions

    def toggle(self, new: Intervention) -> None:
        if new in self.state.interventions:
            self.act("drop", intervention=new)
            self.say(f"restored {new.node}", GOOD)
        else:
            self.act("intervene", intervention=new)
            self.say(f"{new}: {OPS[new.op]}", GOOD)

    def ready(self) -> None:
        if self.info is None:
            raise UserError(f"no model yet: {self.busy}")

    def do_ablate(self) -> None:
        self.ready()
        kind = self.state.ablation
        if kind.startswith("mean") and not self.state.prompt_set:
            raise UserError("mean ablation averages over the corrupted prompts of a prompt set: o opens one, A chooses another kind")
        self.toggle(Intervention(self.node(), kind))

    def do_patch(self) -> None:
        self.ready()
        if self.state.prompt.corrupt is None:
            raise UserError("patching takes the value from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        self.toggle(Intervention(self.node(), "patch"))

    def do_ablation(self) -> None:
        items = [Item(k, OPS[k]) for k in ABLATIONS]
        self.mount(
            Picker(
                f"kind of ablation (now {self.state.ablation})",
                items,
                lambda item, typed: item and self.guard(lambda: self.act("ablation", kind=item.key)),
            )
        )

    def do_scale(self) -> None:
        self.ready()
        node = self.node()

        def accept(values: list[str]) -> str:
            try:
                self.act("intervene", intervention=parse_intervention(f"{node}=scale:{values[0]}"))
            except UserError as error:
                return str(error)
            return ""

        self.mount(Editor(f"scale {node}", [("factor", "2.0")], accept, 0, 1, "enter · esc"))

    def do_type_node(self) -> None:
        self.ready()

        def accept(values: list[str]) -> str:
            try:
                for text in values[0].split():
                    self.act("intervene", intervention=parse_intervention(text))
            except UserError as error:
                return str(error)
            return ""

        node = self.node()
        self.mount(
            Editor(
                "interventions",
                [("node=op", f"{node}={self.state.ablation}")],
                accept,
                0,
                1,
                "L2H3@S2=zero 1.2.q=patch L3.mlp=scale:0.5 · enter · esc",
            )
        )

    def do_scope(self) -> None:
        kind = "lens" if self.pane == "lens" else "attention"
        self.scopes[kind] = "all" if self.scopes[kind] == "here" else "here"
        self.say(f"a, p and s act on {self.node()}: " + ("this position only" if self.scopes[kind] == "here" else "all positions"))

    def do_base(self) -> None:
        new = "corrupt" if self.state.base == "clean" else "clean"
        self.act("base", value=new)
        self.say(
            "denoising: interventions act on the corrupted prompt, p patches from the clean one"
            if new == "corrupt"
            else "noising: interventions act on the clean prompt, p patches from the corrupted one"
        )

    def do_enable(self) -> None:
        if not self.state.interventions:
            raise UserError("no interventions: a ablates the node under the cursor, p patches it")
        self.act("enable", value=not self.state.enabled)
        self.say("interventions are on" if self.state.enabled else "interventions are off: x turns them on again")

    def do_clear(self) -> None:
        if self.state.interventions:
            self.act("clear")
            self.say("interventions cleared; u brings them back")

    def do_undo(self) -> None:
        self.walk("undo")

    def do_redo(self) -> None:
        self.walk("redo")

    def walk(self, way: str) -> None:
        stack = self.session.past if way == "undo" else self.session.future
        name = stack[-1][1] if stack else ""
        self.act(way)
        self.say(f"{'undid' if way == 'undo' else 'did again'}: {name} ({len(self.session.past)} back, {len(self.session.future)} forward)")

    # -------------------------------------------------------------- views

    def turn(self, name: str, allowed: tuple[str, ...] | None = None) -> None:
        values, now = allowed or VIEWS[name], self.state.views[name]
        self.act("view", name=name, value=values[(values.index(now) + 1) % len(values) if now in values else 0])

    def do_view(self) -> None:
        if self.pane == "output":
            raise UserError("the output has one view; 1 and 2 have several")
        stats = VIEWS["lens.stat"] if self.state.prompt.answers else ("prob", "entropy", "kl")
        self.turn(f"{self.pane}.stat", stats if self.pane == "lens" else None)

    def do_mode(self) -> None:
        self.turn("mode")

    def do_which(self) -> None:
        has_corrupt = self.state.prompt.corrupt is not None
        kinds = WHICH if has_corrupt else ("now", "clean", "now-clean")
        self.turn("which", kinds if self.pane != "lens" else tuple(k for k in kinds if "-" not in k))

    def do_source(self) -> None:
        self.turn("attention.source")

    def do_points(self) -> None:
        self.turn("lens.points")

    # -------------------------------------------------------------- finding

    def do_search(self) -> None:
        def accept(values: list[str]) -> str:
            try:
                return self.find(values[0])
            except UserError as error:
                return str(error)

        self.mount(
            Editor("find", [("find", self.needle)], accept, 0, 1, "a token, or a node such as L2H3 or L1.resid_mid@S2 · enter · esc")
        )

    def find(self, needle: str) -> str:
        self.ready()
        if not needle:
            return "type a token or a node"
        with contextlib.suppress(UserError):
            node = parse_node(needle)
            if node.layer is None or node.layer >= self.info.n_layers or (node.head or 0) >= self.info.n_heads:
                return f"{needle} is not in this model: {self.info.n_layers} layers, {self.info.n_heads} heads"
            labels = self.tokens.tokens.labels if self.tokens else {}
            pos = (
                labels.get(node.pos, self.cursor.pos)
                if isinstance(node.pos, str)
                else self.cursor.pos
                if node.pos is None
                else node.pos % max(self.length(), 1)
            )
            where = (
                {"point": node.site} if node.site.startswith("resid") else {"comp": node.site if node.site in ("attn", "mlp") else "head"}
            )
            self.move(layer=node.layer, pos=pos, **where, **({"head": node.head} if node.head is not None else {}))
            return ""
        self.needle, self.matches = needle, []
        lens = self.result("lens", LensResult)
        if self.pane == "lens" and lens is not None:
            tops = lens.top_ids[..., 0].tolist()
            self.matches = [(r, c) for r, row in enumerate(tops) for c, i in enumerate(row) if needle.lower() in lens.texts[i].lower()]
        elif self.tokens:
            self.matches = [(-1, c) for c, text in enumerate(self.tokens.tokens.texts) if needle.lower() in text.lower()]
        if not self.matches:
            return f"{needle!r} is not on this pane"
        self.do_find_next(0)
        return ""

    def do_find_next(self, by: int = 1) -> None:
        if not self.matches:
            raise UserError("nothing to find: / searches")
        lens = self.result("lens", LensResult)
        here = (self.lens_row(lens) if lens and self.matches[0][0] >= 0 else -1, self.cursor.pos)
        at = self.matches.index(here) if here in self.matches else -by if by > 0 else 0
        row, pos = self.matches[(at + by) % len(self.matches)]
        node = parse_node(lens.points[row]) if row >= 0 and lens else None
        self.move(pos=pos, **({"layer": node.layer, "point": node.site} if node else {}))
        self.say(f"{self.needle!r}: match {self.matches.index((row, pos)) + 1} of {len(self.matches)}")

    def do_find_previous(self) -> None:
        self.do_find_next(-1)

    # -------------------------------------------------------------- lists

    def do_help(self) -> None:
        items = [Item(" ".join(show_key(k) for k in a.keys.split(",")), a.help, a.group, a) for a in self.table]
        self.mount(Picker("keys", items, lambda item, typed: item and self.action_do(item.value.id)))

    def do_palette(self) -> None:
        items = [Item(a.id, a.help, " ".join(show_key(k) for k in a.keys.split(",")), a) for a in self.table]
        views = [Item(f"{n}={v}", "view", "", (n, v)) for n, values in VIEWS.items() for v in values]

        def chosen(item: Item | None, typed: str) -> None:
            if item is None:
                return
            self.action_do(item.value.id) if isinstance(item.value, Action) else self.guard(
                lambda: self.act("view", name=item.value[0], value=item.value[1])
            )

        self.mount(Picker("command", items + views, chosen))

    @work(group="models", exclusive=True)
    async def do_models(self) -> None:
        items = [Item("zoo", "the embedded model", "")]
        with contextlib.suppress(Superseded, EngineError):
            found = await self.link.ask("models", Models(), 0)
            items = [Item(c.name, c.where, c.note, c.name) for c in found.choices]

        def chosen(item: Item | None, typed: str) -> None:
            words = [item.key] if item else typed.split()
            options = dict(w.partition("=")[::2] for w in words[1:])
            old = self.state.model
            unknown = set(options) - {"base", "dtype", "device", "device_map"}
            if unknown:
                self.say(f"{min(unknown)}=: a model takes base=, dtype=, device=, device_map=", BAD)
                return
            load = Load(
                words[0],
                options.get("base"),
                options.get("dtype", old.dtype),
                options.get("device", old.device),
                options.get("device_map", old.device_map),
            )
            self.guard(lambda: self.act("model", load=load))

        self.mount(Picker("model (or type a folder or hub name, then dtype=bfloat16 base=gpt2 …)", items, chosen, free=True))

    @work(group="identities", exclusive=True)
    async def do_honesty(self) -> None:
        if self.info is None:
            self.say(f"no model yet: {self.busy}", BAD)
            return
        panel = Panel("honesty", [[(" checking the identities on this model and prompt…", DIM)]], "esc closes")
        await self.mount(panel)
        try:
            found = await self.link.ask("identities", Identities(self.state.study), 1)
        except Superseded:
            return
        except EngineError as error:
            panel.replace([[(f" {visible(str(error))}", BAD)]])
            return
        rows = pictures.identity_rows((*found.rows, *self.info.checks))
        bad = sum(r.ok is False for r in (*found.rows, *self.info.checks))
        head: Spans = [(f" {bad} broken" if bad else " all hold", BAD if bad else GOOD), (f"  {found.convention}", DIM)]
        panel.replace([head, *rows])

    def do_jobs(self) -> None:
        jobs = list(self.link.jobs.values())
        rows = [
            [
                (f" {j.slot:12}", BOLD),
                (f"{type(j.request).__name__:12}", PLAIN),
                (f" {j.progress.done}/{j.progress.total} {j.progress.text}", DIM),
            ]
            for j in jobs
        ]

        def cancel(at: int) -> None:
            if jobs:
                self.link.cancel(jobs[at].id)
                panel.rows.pop(at)
                jobs.pop(at)
                panel.replace(panel.rows or [[(" no jobs", DIM)]])

        panel = Panel("jobs", rows or [[(" no jobs are running", DIM)]], "x cancels · esc closes", bool(rows), {"x": cancel})
        self.mount(panel)

    def do_write(self) -> None:
        path = self.session.path
        self.say(
            f"this session is {path}: {len(self.session.lines)} actions, written as they happen; uv run tui.py --resume opens it again"
            if self.session.written
            else "nothing has been done yet: the first action starts the session file"
        )

    def do_restore(self) -> None:
        files = sorted(SESSIONS.glob("*.jsonl"), key=lambda p: -p.stat().st_mtime)[:200]
        items = [Item(f.stem, f"{max(f.read_bytes().count(b'\n') - 1, 0)} actions", "", f) for f in files]

        def chosen(item: Item | None, typed: str) -> None:
            self.guard(lambda: self.restore(item.value if item else Path(typed)))

        self.mount(Picker("restore a session", items, chosen, free=True))

    def restore(self, path: Path) -> None:
        self.session, warning = read_session(path)
        self.at_end = True
        self.say(warning or f"restored {path.name}: {len(self.session.past)} steps back", WARN if warning else GOOD)
        self.refresh_wants()

    def do_restart(self) -> None:
        self.busy = "starting the engine…"
        self.say("restarting the engine; model, prompts and interventions are kept")
        self.have.clear()
        self.run_engine()

    def do_suspend(self) -> None:
        self.action_suspend_process()

    def do_interrupt(self) -> None:
        jobs = [j for j in self.link.jobs.values() if j.slot != "load"]
        for job in jobs:
            self.link.cancel(job.id)
        self.say(f"cancelled {len(jobs)} jobs" if jobs else "nothing is running; q quits")

    def do_quit(self) -> None:
        self.exit()

    # -------------------------------------------------------------- out

    def do_copy(self) -> None:
        pane, name = self.panes[self.pane], self.pane
        if any(self.stale(s) for s in self.wanted):
            raise UserError("the screen is still computing: copy when it is done")
        node, s = self.node(), self.state
        choices = [
            Item("text", "this pane as text", ".txt", lambda: pane.as_text()),
            *(
                Item("tsv" if len(pane.grids()) == 1 else f"tsv {n}", f"{n}: every number, tab-separated", ".tsv", g.tsv)
                for n, g in pane.grids().items()
            ),
            Item(
                "python",
                "a script that uses TransformerLens alone and prints the metric",
                ".py",
                lambda: python_script(s, self.info, self.result("run", RunResult)),
            ),
            Item("svg", "the screen as a picture", ".svg", lambda: self.export_screenshot(title="loupe")),
            Item("node", f"the address {node}", ".txt", lambda: f"{node}\n"),
            Item("prompt", "the prompt as a line of a prompt set", ".jsonl", lambda: self.prompt_line()),
        ]
        self.mount(Picker("copy", choices, lambda item, typed: item and self.guard(lambda: self.export(name, item))))

    def prompt_line(self) -> str:
        import json

        p = self.state.prompt
        return (
            json.dumps(
                {
                    "clean": p.clean,
                    "corrupt": p.corrupt,
                    "answer": list(p.answers),
                    "foil": list(p.foils),
                    "labels": dict(p.labels),
                    **({} if p.bos is None else {"bos": p.bos}),
                },
                ensure_ascii=False,
            )
            + "\n"
        )

    def export(self, name: str, item: Item) -> None:
        text = item.value()
        path = EXPORTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}-{name}-{item.key.replace(' ', '-')}{item.note}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path} can't be written: {error.strerror}") from error
        if item.key != "svg":
            self.copy_to_clipboard(text)
        self.say(f"{'written' if item.key == 'svg' else 'copied; also'} {path.relative_to(ROOT)} ({len(text.splitlines())} lines)", GOOD)

    def on_overlay_closed(self) -> None:
        self.panes[self.pane].focus()


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
