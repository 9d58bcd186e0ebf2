"""A model being loaded by the engine, and what stays when that fails."""

from dataclasses import replace
from functools import partial

from vocabulary.requests import Load, LoadForAll, Status
from screen import resume
from screen.client import EngineDied, EngineError
from screen.cursor import Cursor
from screen.engines import ask_others
from screen.history import VIEW
from screen.pane import Host
from utils import model_name
from widgets import BAD, GOOD


async def load(app: Host, request: Load, sure: bool = False) -> None:
    """Load a model; nothing of the one before is shown any more. `sure`: also where other screens look at that."""
    app.info, app.busy = None, (busy := f"loading {model_name(request.model)}…")
    app.requests.forget(replace(request))
    app.draw()
    asked = LoadForAll(request) if sure else request
    info = await app.requests.asked("load", asked, 0, failed=lambda error: not_loaded(app, request, error), any_model=True)
    if info is None:
        return
    how = "found {} in the engine that stayed, loaded in" if app.client.kept and app.busy == busy else "loaded {} in"
    app.info = info
    broken, line = [c.name for c in info.checks if c.ok is False], f"{app.shared.loaded()}{how.format(model_name(info.name))} {info.seconds:.1f} s; self-check"
    passed = f"{line} passed ({sum(c.ok is True for c in info.checks)} identities); {info.bos_habit}"
    passed = " · ".join(filter(None, (info.beside, passed)))
    app.say(f"{line} FAILED: {', '.join(broken)}" if broken else passed, BAD if broken else GOOD)
    if app.failed:
        app.say(f"{model_name(info.name)} stays: {app.failed}", BAD)
        app.failed = ""
    if app.cursor == Cursor():
        app.cursor = Cursor(layer=info.n_layers - 1)
    app.clamp()
    app.refresh_wants()


def not_loaded(app: Host, request: Load, error: EngineError) -> None:
    """Back to the model before, which the engine still has; or to that of other screens."""
    if error.kind == "others":
        app.run_worker(partial(ask_others, app, request, load), group="others", exclusive=True, exit_on_error=True)
        return
    app.busy = "not loaded: M chooses a model"
    last = next((name for _, name in reversed(app.session.past) if name != VIEW), "")
    if app.client.alive and last in ("model", "against", "adapter_scale") and not isinstance(error, EngineDied):
        app.session.do("undo", of="work")
        app.refresh_wants()
    app.say(str(error), BAD)
    app.draw()
    app.failed = str(error)


async def poll_memory(app: Host) -> None:
    """When nothing is being computed: memory for the top line, and what waits goes to the session file."""
    resume.keep(app)
    s = await app.requests.asked("status", Status(), 2, failed=lambda error: None, any_model=True)
    if s is not None:
        app.memory = (s.memory // 10**7 * 10**7, s.device_memory // 10**7 * 10**7, s.cache)
        app.draw_top()
