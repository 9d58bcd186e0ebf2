"""Driving a generator that reports its progress, and the time that is left in words."""

from collections.abc import Callable, Generator

from vocabulary.requests import Progress


def forward_progress(steps: Generator, say: Callable[[object], Progress | None]) -> Generator[Progress, None, object]:
    """A generator's result; of everything it yields on the way, what `say` makes of it (None: nothing). Notices stay as they are."""
    while True:
        try:
            part = next(steps)
        except StopIteration as stop:
            return stop.value
        if (said := part if isinstance(part, Progress) and part.notice else say(part)) is not None:
            yield said


def time_left(seconds: float) -> str:
    return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"
