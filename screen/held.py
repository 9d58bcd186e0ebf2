"""Keys that are typed while a list is on its way: they are meant for the list, so they wait for it."""

from textual import events
from textual.worker import Worker

from screen.overlays import opened

ALWAYS = ("interrupt", "redraw", "suspend", "restart")  # actions on control keys, which are never text


class Held:
    """`worker` is what asks for the list. When it ends without one, what was typed is dropped; esc gives the list up."""

    def __init__(self, app):
        self.app, self.worker, self.keys = app, None, []

    @property
    def waiting(self) -> bool:
        return self.worker is not None and not self.worker.is_finished

    def until(self, worker: Worker, what: str) -> None:
        """Hold keys until this worker has opened something; the status line says so when that takes a while."""
        self.worker, self.keys = worker, []
        said = lambda: self.waiting and self.worker is worker and self.app.say(f"{what}… keys wait for it, esc gives it up")  # noqa: E731
        self.app.set_timer(0.3, said)

    def take(self, event: events.Key) -> None:
        event.stop()
        if event.key == "escape":
            self.worker.cancel()
            self.app.say("given up")
        elif event.key == "ctrl+q":
            self.app.exit()
        else:
            self.keys.append(event)

    def hand_over(self) -> None:
        """What was to open is open: the keys go to it where they are text; what has no field was not seen when they were typed, so they are dropped."""
        keys, self.keys, self.worker = self.keys, [], None
        if keys and any(o.first_field() is not None for o in opened(self.app)):
            self.app.call_after_refresh(lambda: [self.app.post_message(events.Key(e.key, e.character)) for e in keys])
