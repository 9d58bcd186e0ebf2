"""
Errors that no one foresaw: the whole story goes to a file, one line to the screen, and the app lives on with its state as it was.

Textual ends the app at an exception in a handler, an action, a timer or a worker: `MessagePump._dispatch_message` (wrapped below, for every widget there is)
and `App._handle_exception` are where all of them pass. A headless app, that is a test, sees them as they are.
"""

import os
import time
import traceback
from pathlib import Path

from textual.message import Message
from textual.message_pump import MessagePump
from textual.worker import WorkerFailed

from vocabulary.files import open_log
from vocabulary.nodes import UserError
from screen.overlays import opened
from widgets import BAD

AGAIN = 1.0  # seconds in which an error that comes again and again is told once


class Faults:
    """What went wrong in an app."""

    def __init__(self, app):
        self.app, self.last, self.told = app, "", 0.0

    @property
    def log(self) -> Path:
        return Path(self.app.client.log).with_name("screen.log")

    def survive(self, error: Exception) -> bool:
        """Say it and write it down; False where the app can't go on, or is a test's. A UserError is only said."""
        error = error.error if isinstance(error, WorkerFailed) and isinstance(error.error, Exception) else error
        if isinstance(error, UserError):
            self.say(str(error))
            return True
        if not self.app.is_mounted or self.app.is_headless:
            return False
        story = "".join(traceback.format_exception(error))
        again = story == self.last and time.monotonic() - self.told < AGAIN
        self.last, self.told = story, time.monotonic()
        if not again:
            self.tell(error, story)
        return True

    def say(self, line: str) -> None:
        """Where the eye is: in the open overlay, which hides the status line, and in that."""
        for overlay in opened(self.app)[-1:]:
            overlay.complain(line)
        self.app.say(line, BAD)

    def tell(self, error: Exception, story: str) -> None:
        where = f"the whole story is in {self.log}"
        try:
            with os.fdopen(open_log(self.log), "a", encoding="utf-8", errors="backslashreplace") as f:
                f.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}\n{story}\n")
        except OSError as wrong:
            where = f"{self.log} can't be written ({wrong.strerror})"
        line = " ".join(str(error).split())[:200]
        self.say(f"a fault of the program: {type(error).__name__}{f': {line}' if line else ''}; what you did stays, {where}")


dispatch = MessagePump._dispatch_message


async def dispatch_or_survive(pump: MessagePump, message: Message) -> None:
    try:
        await dispatch(pump, message)
    except Exception as error:
        faults = getattr(pump.app, "faults", None)
        if faults is None or not faults.survive(error):
            raise


MessagePump._dispatch_message = dispatch_or_survive
