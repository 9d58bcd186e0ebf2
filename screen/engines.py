"""An engine that stays when its screen goes, and that several screens share: joining it, what it says unasked, `:engine`, asking before others lose their model."""

import asyncio
import os
import socket
import time
from dataclasses import replace
from functools import partial

from vocabulary.requests import Load, News, Where, WhereResult
from vocabulary.wire import Frame
from screen.jobs import ends_jobs
from screen.overlays import Panel
from screen.pane import Host
from utils import model_name, show_bytes
from widgets import BOLD, DIM, PLAIN, WARN, Spans

ANSWERS_IN = 3.0  # seconds in which an engine says who looks, before it is restarted


class Shared:
    """What the app knows of its engine. `takes`: a session that says nothing of a model takes the one that is there."""

    def __init__(self, app):
        self.app, self.takes = app, False
        self.where: WhereResult | None = None
        self.left: list[str] = []  # requests of screens that went, by their kinds
        self.changed = ""  # said when the model of another screen is there

    async def join(self) -> None:
        """After the engine was reached: learn what it is and, for a new session, take its model."""
        app = self.app
        app.client.line.changed, self.left, self.changed = app.draw_top, [], ""
        self.where = await self.ask() if app.client.kept else None
        loaded = self.where.loaded if self.where else None
        if self.takes and loaded is not None and not app.session.actions:
            app.session.state = app.session.start = replace(app.session.state, model=loaded)
        self.takes = False

    async def ask(self) -> WhereResult | None:
        return await self.app.requests.asked("engine", Where(who()), 0, failed=lambda error: None, any_model=True)

    def heard(self, frame: Frame) -> None:
        """What the engine says unasked: jobs that nobody waits for, a model that another screen loads, its end."""
        app, news = self.app, frame.body
        if frame.kind == "left":
            app.requests.started.add(news)
            self.left.append(type(news).__name__)
        elif isinstance(news, News) and news.load is not None:
            self.changed = f"{news.text}; u goes back" if news.load != app.state.model else news.text
            app.requests.forget()
            app.act("model", load=news.load) if news.load != app.state.model else app.refresh_wants()
        elif isinstance(news, News) and not news.stopped:
            app.say(news.text, WARN)

    def loaded(self) -> str:
        """What is said before the line about a model that was loaded: who changed it, and what goes on here for no screen."""
        text, self.changed = self.changed, ""
        if self.left:
            goes = f"here from a screen that went: {', '.join(dict.fromkeys(self.left))} (its session shows it: r, or --resume)"
            text, self.left = f"{text} · {goes}" if text else goes, []
        return f"{text} · " if text else ""

    def obituary(self, reason: str) -> str:
        """The line about an engine that is gone."""
        if self.app.client.stopped:
            return f"{self.app.client.stopped}{'' if 'ctrl+e' in self.app.client.stopped else ': ctrl+e starts a new one'}"
        return f"the engine died ({reason}): ctrl+e restarts it; model, prompts and interventions are kept; its log is {self.app.client.log}"

    def farewell(self) -> str:
        """What the shell shows after the screen: that the engine stays; "" where it does not."""
        if self.where is None or not self.where.minutes or not self.app.client.alive:
            return ""
        return f"the engine stays for {self.where.minutes:g} min on {self.where.host} (process {self.where.pid}): uv run tui.py finds it, uv run engine.py stop ends it"


def who() -> str:
    """What other screens are told about this one."""
    try:
        terminal = os.ttyname(0).removeprefix("/dev/")
    except OSError:
        terminal = "no terminal"
    return f"{socket.gethostname()} {terminal}, process {os.getpid()}"


def rows(where: WhereResult, line: str, log: str) -> list[Spans]:
    """`:engine`, a line a fact."""
    several = lambda some, none: some or (none,)  # noqa: E731
    stays = (
        f"{where.minutes:g} min after its last screen went (LOUPE_KEEP_ENGINE_MINUTES)"
        if where.minutes
        else "it ends with this screen (LOUPE_KEEP_ENGINE_MINUTES)"
    )
    facts = [("where", f"{where.host}, process {where.pid}, since {time.strftime('%Y-%m-%d %H:%M', time.localtime(where.started))}"), ("stays", stays)]
    facts += [("socket", where.socket)] if where.socket else []
    facts += [("memory", show_bytes(where.memory)), ("log", where.log if where.socket else log), ("line", line)]
    facts += [("model", where.loaded.model if where.loaded else "none")]
    facts += [("who else" if n == 0 else "", s) for n, s in enumerate(several(where.screens, "no other screen looks"))]
    facts += [("computes" if n == 0 else "", f"{s} for another screen") for n, s in enumerate(where.running)]
    facts += [("left" if n == 0 else "", f"{s} of a screen that went") for n, s in enumerate(where.left)]
    return [[(f" {name:10}", DIM), (text, PLAIN)] for name, text in facts]


def show(app: Host) -> None:
    """`:engine`: where it runs, its memory, its log, who else looks."""
    if not app.client.alive:
        app.say("no engine runs: ctrl+e starts one", WARN)
        return

    def opened(where: WhereResult) -> None:
        times = app.client.line.times
        quick = (
            f"{1000 * times[-1]:.0f} ms there and back, last heard {time.monotonic() - app.client.line.heard:.0f} s ago" if times else "a pipe on this machine"
        )
        app.open(Panel("engine", rows(where, quick, str(app.client.log)), "uv run engine.py stop ends one that stays · ctrl+e restarts"))

    app.requests.ask("engine", Where(who()), opened, 0, any_model=True)


# ------------------------------------------------------------------ what concerns other screens


def restart(app: Host) -> None:
    """End the engine and start a new one; where other screens look at it, or it says nothing, only after a key."""

    def go(stop: bool = True) -> None:
        app.busy = "starting the engine…"
        app.say("restarting the engine; model, prompts and interventions are kept" if stop else "connecting to the engine again")
        app.requests.forget()
        if app.client.kept and stop:
            app.client.send(Frame("stop"))
        app.start_engine()

    def offer(title: str, rows: list[Spans], hint: str, **keys: bool) -> None:
        take = lambda stop: lambda at: (panel.action_close(), app.guard(partial(go, stop)))  # noqa: E731
        panel = Panel(title, rows, hint, False, {key: take(stop) for key, stop in keys.items()})
        app.open(panel)

    async def look() -> None:
        try:
            where = await asyncio.wait_for(app.shared.ask(), ANSWERS_IN)
        except TimeoutError:  # a stop that lay in a dead line would end the engine when that comes back
            stays = app.shared.where is not None and app.shared.where.minutes
            then = "⏎: the engine goes on · x: it ends, for others too" if stays else "both end it, since it does not stay (LOUPE_KEEP_ENGINE_MINUTES)"
            why = [[(f" {line}", DIM)] for line in ("the line is dead, or the engine is in a long step, or hangs", then)]
            offer("the engine does not answer", why, "⏎ connect again · x end it · esc wait", enter=False, x=True)
            return
        if where is not None and where.screens:
            offer("restarting ends the engine for others too", others(where), "⏎ all the same · esc goes on with it", enter=True)
        elif where is not None:
            go()

    if app.client.kept and app.client.alive and app.info is not None:
        ends_jobs(app, "restarting the engine", lambda: app.run_worker(look, group="engine", exclusive=True, exit_on_error=True))
    else:
        ends_jobs(app, "restarting the engine", go)


def others(where: WhereResult) -> list[Spans]:
    return [[(f" {s}", BOLD)] for s in where.screens] + [[(f" {s} runs for another screen", DIM)] for s in where.running]


async def ask_others(app: Host, request: Load, load) -> None:
    """The engine did not load a model because other screens look at the one it has: theirs, or this one for all."""
    app.busy = "other screens look at another model"
    where = await app.shared.ask()
    if where is None or where.loaded is None:
        return
    theirs = where.loaded

    def take(at: int) -> None:
        panel.action_close()
        app.act("model", load=theirs)

    def sure(at: int) -> None:
        panel.action_close()
        app.run_worker(partial(load, app, request, True), group="load", exclusive=True, exit_on_error=True)

    name, mine = model_name(theirs.model), model_name(request.model)
    keys = {"enter": sure, "escape": take, "q": take}
    panel = Panel(
        f"others look at {name}: loading {mine} changes it for them too", others(where), f"enter: {mine} for all · esc: {name} with them", False, keys
    )
    app.open(panel)
