"""A session's results computed again: what is asked (in parts too: techniques/cluster) and what came of each. Never imports torch."""

from dataclasses import field

import numpy as np

from vocabulary.parts import unpack
from vocabulary.requests import ModelInfo
from vocabulary.results import Difference
from vocabulary.wire import message

FAILED = ("differs", "refused", "no request")


@message
class Replay:
    """
    The results of a session, by the bytes and the name of its file, computed again and held against its numbers. `change`: fields of Load that take the place of the session's;
    `train`: fits and trainings run too. `strict`: the exit code is 1 where a step failed. `part`: results from one up to another.
    """

    session: bytes
    name: str
    change: dict[str, str] = field(default_factory=dict)
    train: bool = False
    strict: bool = False
    part: tuple[int, int] | None = None


@message
class Step:
    """One result: what the session says, what came now; `verdict` equal, differs, refused, not run, no request. `frames` (bytes): the model that computed it and what it computed."""

    number: int
    time: str
    kind: str
    session: str
    verdict: str = ""
    says: str = ""
    worst: Difference | None = None
    why: str = ""
    frames: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def failed(self) -> bool:
        return self.verdict in FAILED

    @property
    def computed(self) -> tuple[ModelInfo | None, object]:
        """The model and the result; None of a step that did not run."""
        return tuple(frame.body for frame in unpack(self.frames.tobytes())) if self.frames.size else (None, None)

    def row(self) -> dict:
        w = self.worst
        return {
            "step": self.number, "time": self.time, "kind": self.kind, "session": self.session, "replay": self.says, "verdict": self.verdict,
            "worst": w.name if w else "", "difference": w.size if w else None, "allowed": w.allowed if w else None, "why": self.why,
        }  # fmt: skip


@message
class ReplayResult:
    """A session that ran again: the steps, of how many results, what is wrong with its lines, and where the results lie."""

    name: str
    steps: tuple[Step, ...]
    results: int
    wrong: tuple[str, ...] = ()
    strict: bool = False
    out: str = ""
    warning: str = ""

    @property
    def code(self) -> int:
        """The exit code."""
        return int(self.strict and bool(self.wrong or any(step.failed for step in self.steps)))

    @property
    def listed(self) -> list[dict]:
        """What is printed as JSON."""
        return [step.row() for step in self.steps]
