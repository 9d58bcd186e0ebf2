"""A model being loaded by the engine, and what stays when that fails."""

from dataclasses import replace

from vocabulary.requests import Load, Status
from screen import resume
from screen.client import EngineDied, EngineError
from screen.cursor import Cursor
from screen.history import VIEW
from screen.pane import Host
from utils import model_name
from widgets import BAD, GOOD


async def load(app: Host, request: Load) -> None:
    """Load a model; nothing of the one before is shown any more."""
    app.info, app.busy = None, f"loading {model_name(request.model)}…"
    app.requests.forget(replace(request))
    app.draw()
    info = await app.requests.asked("load", request, 0, failed=lambda error: not_loaded(app, error), any_model=True)
    if info is None:
        return
    app.info = info
    broken, line = [c.name for c in info.checks if c.ok is False], f"loaded {model_name(info.name)} in {info.seconds:.1f} s; self-check"
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


def not_loaded(app: Host, error: EngineError) -> None:
    """Back to the model before, which the engine still has."""
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
