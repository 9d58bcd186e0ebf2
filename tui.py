"""
The app: layout, the cursor, asking the engine, drawing. The panes are the rooms' (techniques/*/pane.py), the keys theirs and the screen's (screen/table.py).

1. An action changes the session's state or the cursor; `refresh_wants` derives from it which requests the visible panes need.
2. A request whose answer is at hand is drawn at once; others are asked, one slot each, and drawn when they arrive. A failed request shows its line.
3. Nothing here imports torch: the model lives in engine.py's process, at the other end of screen/client.py.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ctrl+c while this is imported: no traceback

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from screen import early

if __name__ == "__main__":
    gc.disable()  # until everything is imported
    ARGS = early.parser().parse_args()
    ENGINE = early.start(ARGS)
if "SSH_CONNECTION" in os.environ:  # remote mode: fewer frames; textual reads these when it is imported
    os.environ.setdefault("TEXTUAL_FPS", "15")
    os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")
if "OPENBLAS_NUM_THREADS" not in os.environ:  # the screen multiplies no matrices: no thread a core, all of which wait busily at first
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    import numpy  # noqa: F401, reads it

    del os.environ["OPENBLAS_NUM_THREADS"]  # for an engine that is started later

from textual import events, work
from textual.app import App, ComposeResult
from textual.containers import Container
from textual.geometry import Region
from textual.reactive import var

from techniques.features.requests import SaeInfo
from techniques.output.requests import Run, RunResult, Side
from vocabulary.files import folder
from vocabulary.log import newest_session
from vocabulary.typed import check_text
from vocabulary.nodes import Node, UserError
from vocabulary.prompts import read_prompt_set, Study
from vocabulary.requests import Load, ModelInfo
from screen import layout, loading, resume, top
from screen.client import Client, Job
from screen.colours import LIGHT, SIXTEEN, THEME, use
from screen.compositor import TightScreen
from screen.cursor import Cursor, clamped
from screen.engines import Shared
from screen.faults import Faults
from screen.held import ALWAYS
from screen.keys import Action, bindings, collect, key_page, keymap, remapped
from screen.overlays import Overlay, opened
from screen.pane import Pane
from screen.replies import Requests
from screen.session import Session, State, add_views, read_session
from screen.table import SCREEN
from screen.template import skipped
from screen.terminal import Terminal
from screen.tour import Tour
from techniques import parts
from utils import ROOT, printable, settings, visible
from widgets import BAD, PLAIN, WARN, Lines, Spans

MODEL_OPTIONS = ("model", "base", "dtype", "device", "device_map", "against")
EARLY: list[int] = []  # those that came before the app could leave the terminal as it was
try:
    MODULES = parts("pane")
except UserError as error:
    sys.exit(printable(f"loupe: {error}"))
OF_ROOMS: list[type[Pane]] = [m.PANE for m in MODULES if hasattr(m, "PANE")]
PANES = {p.key: p for p in sorted(OF_ROOMS, key=lambda p: (p.number == "0", p.number))}
TABLE = collect(SCREEN, OF_ROOMS, [a for m in MODULES for a in getattr(m, "ACTIONS", ())])
for each in OF_ROOMS:
    add_views(each.views)


class Quiet(TightScreen, inherit_bindings=False):
    """A screen that does not repaint as a whole when the focus moves (held by the byte-budget test)."""

    focused = var(None)


STYLES = """
Screen { layers: base overlay; overflow: hidden; background: ansi_default; color: ansi_default; }
#top { height: 3; } #status { height: 1; } #hint { height: 1; }
#body { height: 1fr; }
Field { width: 1fr; background: ansi_default; border: none; height: 1; padding: 0; }
.hidden { display: none; }
"""


class Loupe(App):
    BINDINGS = bindings(TABLE)
    CSS = STYLES
    ENABLE_COMMAND_PALETTE = False
    theme = "ansi-light" if THEME is LIGHT else "ansi-dark"

    def __init__(self, session: Session, via: str = "", note: str = "", log: Path | None = None, table: tuple[Action, ...] = TABLE, **kw):
        super().__init__(ansi_color=True, **{"driver_class": Terminal} | kw)
        self.session, self.table = session, table
        self.faults, self.tour = Faults(self), Tour(self)
        log = log or folder("logs") / "engine.log"
        self.requests, self.shared = Requests(self), Shared(self)
        self.client = Client(log, via, self.on_progress, self.on_death, self._handle_exception, self.shared.heard)
        self.info: ModelInfo | None = None
        self.busy = "starting the engine…"
        self.cursor, self.at_end = Cursor(), True
        self.panes: dict[str, Pane] = {}
        self.pane, self.recent = "lens", ["lens", "attention", "output", *(p for p in PANES if p not in ("lens", "attention", "output"))]
        self.zoomed, self.fixed = False, settings().get("LOUPE_PANES", "")
        self.scopes = {p.key: p.scope for p in PANES.values()}
        self.places: dict[str, Region] = {}
        self.known_saes: dict[str, SaeInfo] = {}
        self.status: Spans = [(note, WARN)] if note else []
        self.said_lines, self.failed = 1, ""
        self.memory = (0, 0, 0)
        self.needle, self.matches, self.marks = "", [], {}
        if table is not TABLE:
            self.set_keymap(keymap(table))

    # -------------------------------------------------------------- layout and life

    def get_default_screen(self) -> TightScreen:
        return Quiet(id="_default")

    def compose(self) -> ComposeResult:
        self.top, self.status_line, self.hint_line = Lines(id="top"), Lines(id="status"), Lines(id="hint")
        self.panes = {key: pane(classes="hidden") for key, pane in PANES.items()}
        self.body = Container(*(self.panes[name] for name in self.visible_panes()), id="body")
        yield from (self.top, self.body, self.status_line, self.hint_line)

    def on_mount(self) -> None:
        use(SIXTEEN if self.console.color_system == "standard" and not self.is_headless else THEME)
        if self.no_color and self.state.views["mode"] == "colour":
            self.session.state = replace(self.state, views={**self.state.views, "mode": "shade"})
        if not self.is_headless:
            if EARLY:
                self.exit()
            self.app_resume_signal.subscribe(self, lambda app: self.screen.forget())
        self.arrange()
        resume.put_back(self)
        self.start_engine()

    def exit(self, *args, **kw) -> None:
        self.client.leaving = True
        super().exit(*args, **kw)

    async def on_unmount(self) -> None:
        resume.keep(self)
        await self.client.stop()

    def on_resize(self) -> None:
        if self.is_mounted:
            self.call_after_refresh(self.arrange)

    def visible_panes(self) -> list[str]:
        """One, two or three panes by size, the most recently used first, in the order of their numbers."""
        n = 1 if self.zoomed else layout.count_that_fit(*self.size, self.fixed)
        shown = self.recent[:n]
        return [p for p in PANES if p in shown]

    def arrange(self) -> None:
        """Show the panes that fit, in their places, and put the focus on the current one. One that was never shown is mounted."""
        shown = self.visible_panes()
        self.body.mount(*(self.panes[name] for name in shown if not self.panes[name].is_attached))
        for name, pane in self.panes.items():
            pane.set_class(name not in shown, "hidden")
        self.query_one("#top").styles.height = 3 if self.size.height >= 12 else 2
        if not opened(self):
            self.panes[self.pane].focus()
        self.refresh_wants()
        self.call_after_refresh(self.draw)

    def place(self) -> None:
        width, height = self.size
        height = max(height - (4 if height >= 12 else 3) - self.said_lines - self.tour.height, 1)
        places = layout.regions([self.panes[p] for p in self.visible_panes()], width, height)
        moved = {name: r for name, r in places.items() if self.places.get(name) != r}
        for name, r in moved.items():
            styles = self.panes[name].styles
            styles.offset, styles.width, styles.height = r.offset, r.width, r.height
            self.panes[name].set_class(r.x > 0, "aside")
        self.places = {**self.places, **places}
        if moved:  # what is drawn depends on the room
            self.call_after_refresh(self.draw)

    def show_pane(self, name: str) -> None:
        before = self.visible_panes()
        self.panes[self.pane].leave()
        self.pane = name
        self.recent.remove(name)
        self.recent.insert(0, name)
        if self.visible_panes() != before:
            self.arrange()
        else:
            self.panes[name].focus()
            self.draw()

    # -------------------------------------------------------------- the engine

    @work(group="engine", exclusive=True)
    async def start_engine(self) -> None:
        await self.client.stop()
        self.info = None
        self.requests.forget()
        try:
            note = await self.client.start()
        except OSError as error:
            self.say(f"the engine does not start: {error}", BAD)
            return
        if note:
            self.say(note, WARN)
        await self.shared.join()
        self.refresh_wants()

    def on_death(self, reason: str) -> None:
        self.info, self.busy = None, f"no engine ({reason})"
        self.requests.died()
        self.say(self.shared.obituary(reason), BAD)
        self.draw()

    def on_progress(self, job: Job) -> None:
        if job.slot == "load":
            self.busy = job.progress.text or "loading…"
            self.draw_top()
        else:
            self.requests.progress(job)

    async def settle(self) -> None:
        """Wait until nothing is being asked (for tests and benchmarks)."""
        await self.requests.settle()

    # -------------------------------------------------------------- state, and what it needs

    @property
    def state(self) -> State:
        return self.session.state

    @property
    def study(self) -> Study:
        """The state's study; without answers that are not single tokens in this model, so that everything else still runs (the top line says so)."""
        study, check = self.state.study, self.requests.check()
        if check is not None and check.problems and any(len(r.ids) != 1 for r in (*check.answers, *check.foils)):
            return replace(study, prompt=replace(study.prompt, answers=(), foils=()))
        return study

    def act(self, name: str, /, **args: object) -> None:
        """Change the state through the session, then show it."""
        before = self.state.prompt
        self.session.do(name, **args)
        if self.state.prompt != before:
            self.at_end, self.matches = True, []
        self.refresh_wants()

    def refresh_wants(self) -> None:
        """Ask for what the visible panes lack, draw what is there."""
        if self.requests.model != self.state.model and self.client.alive:
            self.run_worker(partial(loading.load, self, self.state.model), group="load", exclusive=True, exit_on_error=True)
            return
        if self.info is None:
            self.requests.wanted = {}
        elif self.requests.refresh(self.study, [self.panes[name] for name in self.visible_panes()]):
            self.clamp()
        self.draw()

    def answered(self, result: object, more: bool) -> None:
        """A reply has come; `more`: what the panes want next depends on it."""
        if isinstance(result, RunResult):
            self.clamp()
        if more:
            self.refresh_wants()
        self.draw()
        if not self.client.jobs:
            self.run_worker(partial(loading.poll_memory, self), group="status", exclusive=True, exit_on_error=True)

    # -------------------------------------------------------------- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While an overlay is open, or one is on its way, its keys are text, not commands."""
        if action == "do" and self.requests.held.waiting:
            return parameters[0] in ALWAYS
        return not (action == "do" and self.is_mounted and opened(self))

    def action_do(self, name: str) -> None:
        self.say("")
        self.guard(lambda: next(a for a in self.table if a.id == name).do(self))

    def action_noop(self) -> None: ...

    def guard(self, what: Callable[[], object]) -> None:
        """Run it; what the user did wrong is said in the status line."""
        try:
            what()
        except UserError as error:
            self.say(str(error), BAD)

    def _handle_exception(self, error: Exception) -> None:
        if not self.faults.survive(error):
            super()._handle_exception(error)

    def on_key(self, event: events.Key) -> None:
        if self.requests.held.waiting:
            self.requests.held.take(event)

    def on_paste(self) -> None:
        self.say("a pasted text goes into a field: e edits the prompt", WARN)

    def ready(self) -> None:
        if self.info is None:
            raise UserError(f"no model yet: {self.busy}" + ("" if self.client.alive else ": ctrl+e restarts the engine"))

    def open(self, overlay: Overlay) -> None:
        """Show an overlay; it has the focus at once."""
        overlay.styles.margin = (0, 0, 1 + (self.tour.height + self.said_lines if self.tour.open else 0), 0)
        self.mount(overlay)
        self.screen.set_focus(overlay)
        self.draw_hint()

    def on_overlay_closed(self) -> None:
        some = opened(self)
        some[-1].take_focus() if some else self.panes[self.pane].focus()
        self.draw_hint()

    # -------------------------------------------------------------- the cursor

    @property
    def tokens(self) -> Side | None:
        """The side of the run that is shown: clean, corrupted or now."""
        run = self.requests.result("run", RunResult)
        if run is None:
            return None
        which = self.state.views["which"].split("-")[0]
        return run.corrupt if which == "corrupt" and run.corrupt else run.clean if which == "clean" else run.now

    def length(self) -> int:
        return len(self.tokens.tokens.ids) if self.tokens else 0

    def counted(self) -> bool:
        """Whether the tokens at hand are those of the prompt in the state, so that positions can be asked for."""
        reply, state = self.requests.reply("run"), self.state
        request = reply.request if reply is not None and self.length() else None
        return isinstance(request, Run) and request.study.prompt.clean == state.prompt.clean and request.study.base == state.base

    def clamp(self) -> None:
        """Keep the cursor inside the model and the prompt; at the end it stays at the end."""
        if self.info is None:
            return
        before, row = self.cursor, self.tokens.tokens if self.tokens else None
        self.cursor = skipped(self.state, row, before, clamped(before, self.info, self.length(), self.at_end))
        if before != self.cursor:
            self.refresh_wants()

    def move(self, **where: object) -> None:
        old, row = self.cursor, self.tokens.tokens if self.tokens else None
        self.cursor = skipped(self.state, row, old, replace(old, **where))
        if self.cursor != old:
            self.at_end = self.cursor.pos == self.length() - 1
            self.refresh_wants()

    def node(self) -> Node:
        """The node that an action acts on: the current pane's, at all positions or at the cursor's."""
        return self.panes[self.pane].node(self, self.cursor.pos if self.scopes[self.pane] == "here" else None)

    # -------------------------------------------------------------- drawing

    def draw(self) -> None:
        if not self.is_mounted or not self.panes:
            return
        self.draw_top()
        for name in self.visible_panes():
            self.panes[name].paint(self)
        self.tour.look()
        self.place()
        self.draw_hint()
        self.requests.slow = self.requests.slow and any(map(self.requests.stale, self.requests.wanted))

    def draw_top(self) -> None:
        if self.panes:
            self.top.show(top.top_lines(self))

    def say(self, text: str, style=PLAIN) -> None:
        self.requests.progress_of = ""
        self.status = [(f" {visible(text)}", style)]
        self.draw_hint()

    def draw_hint(self) -> None:
        """The status line, wrapped, and the hint line below it."""
        if self.panes:
            top.draw_hint(self)


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


def main(args: argparse.Namespace, engine: tuple[subprocess.Popen, str, int] | None) -> None:
    gc.freeze()
    gc.enable()
    if args.keys:
        print(key_page(TABLE), end="")
        return
    note = ""
    try:
        if why := early.no_terminal():
            raise UserError(f"the screen needs a terminal: {why}. Without one: uv run engine.py --help")
        for name, value in vars(args).items():
            check_text(str(value), f"--{name}")
        early.words_of(args.via)
        values = settings()
        table = remapped(values.get("LOUPE_KEYMAP", ""), TABLE)
        if args.resume is not None:
            session, note = read_session(args.resume or newest_session())
            note = " · ".join(filter(None, (session.log.claim(), note))) or f" restored {session.path.name}: {len(session.past)} steps back"
        else:
            given = {k: v for k in MODEL_OPTIONS if (v := getattr(args, k))}
            state = first_state(values)
            session = Session(replace(state, model=replace(state.model, **given)))
            note = "" if any(folder("sessions").glob("*.jsonl")) else "new here? :tour and enter begin a guided hunt; ? lists the keys"
    except UserError as error:
        sys.exit(printable(f"loupe: {error}"))
    app = Loupe(session, args.via, note, table=table)
    app.client.early = engine
    app.shared.takes = args.resume is None and not any(getattr(args, name) for name in MODEL_OPTIONS)
    for sig in early.ENDING:
        signal.signal(sig, lambda number, frame: EARLY.append(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app.run(mouse=args.mouse)
    finally:
        if left := app.session.close():
            print(f"loupe: {left}", file=sys.stderr)
        if stays := app.shared.farewell():
            print(f"loupe: {stays}")
    sys.exit(app.return_code or 0)


if __name__ == "__main__":
    main(ARGS, ENGINE)
