"""For tests of the screen: the app with the real engine in this process (no second import of torch), or with any other link; and what it wrote."""

from textual.drivers.headless_driver import HeadlessDriver

from vocabulary.nodes import UserError
from vocabulary.requests import Progress
from screen.client import EngineDied, EngineError, Superseded
from screen.line import Line
from screen.session import Session, State
from tui import Loupe


class LocalClient:
    """Client's interface over an Engine in this process: every request goes through the wire's bytes both ways, then is answered at once."""

    def __init__(self, engine):
        self.engine, self.jobs, self.alive, self.log, self.asked = engine, {}, False, "the log", []
        self.on_death = lambda reason: None
        self.line, self.kept, self.stopped = Line(), False, ""

    async def start(self):
        self.alive = True

    async def stop(self):
        self.alive = False

    def cancel(self, ident):
        pass

    async def ask(self, slot, request, priority=1, on_partial=None):
        if not self.alive:
            raise EngineDied("the engine is not running")
        self.asked.append((slot, request))
        try:
            show = lambda part: on_partial(over_the_wire(part)) if on_partial and not isinstance(part, Progress) else None  # noqa: E731
            return over_the_wire(self.engine.run(over_the_wire(request), show))
        except UserError as error:
            raise EngineError(str(error)) from error
        except Exception as error:  # as the server answers
            raise EngineError(f"{type(error).__name__}: {error}") from error


def over_the_wire(body):
    import io

    from vocabulary.wire import encode, Frame, read_frame

    return read_frame(io.BytesIO(encode(Frame("ask", body=body))).read).body


def make_app(engine, tmp_path, state=None, **kw) -> Loupe:
    """An app whose session lives in tmp_path; `engine` is an Engine or a client."""
    app = Loupe(Session(state or State(), tmp_path / "session.jsonl"), log=tmp_path / "engine.log", **kw)
    app.client = engine if hasattr(engine, "ask") else LocalClient(engine)
    return app


async def press(app, pilot, *keys):
    """Press keys, then wait until nothing is asked and everything is drawn."""
    await pilot.press(*keys)
    await pilot.pause()
    await app.settle()
    await pilot.pause()


def reply(app, slot):
    """What came back in a slot."""
    return app.requests.replies[slot].result


def grid(app):
    """The picture of the pane in focus, or the first of several."""
    return next(iter(app.panes[app.pane].grids().values()))


def asked(app, kind):
    """Every request of a kind, in order."""
    return [r for _, r in app.client.asked if isinstance(r, kind)]


def screen(app) -> list[str]:
    """The screen's lines as plain text."""
    width, height = app.size
    return ["".join(s.text for s in line).rstrip() for line in app.screen._compositor.render_strips(app.size)][:height]


def shown(app) -> str:
    return "\n".join(screen(app))


class Wire(HeadlessDriver):
    """A driver that paints for real and counts what is written."""

    is_headless = property(lambda self: False)
    out: list[str] = []

    def write(self, data: str) -> None:
        Wire.out.append(data)

    @staticmethod
    def take() -> int:
        size = sum(len(s.encode()) for s in Wire.out)
        Wire.out.clear()
        return size


__all__ = ["EngineDied", "LocalClient", "Superseded", "Wire", "asked", "grid", "make_app", "press", "reply", "screen", "shown"]
