"""The command line of this room: replay."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.console import Console

from techniques.record.replay import find_session, name_of, notebook, read_results, replay, session_bytes
from techniques.record.requests import Replay, ReplayResult, Step
from techniques.shell import GRAY, GREEN, RED, YELLOW, ModelOptions, console, plain, put
from vocabulary.files import typed_path, write_text
from vocabulary.log import newest_session
from vocabulary.nodes import UserError
from vocabulary.requests import Load
from vocabulary.wire import to_json

STYLES = {"equal": GREEN, "differs": RED, "refused": RED, "no request": RED, "not run": YELLOW}


@dataclass
class ReplayCommand(ModelOptions):
    """Compute everything that a session computed again, write each result as JSON and CSV, and compare it with the session's numbers. --device, --dtype and --model take the place of the session's."""

    session: Annotated[str, tyro.conf.Positional] = ""
    """a session's file, or its name; unset, the newest"""
    out: Path = Path("exports/replay")
    """the folder for the results"""
    strict: bool = False
    """exit with 1 when a number differs by more than the noise floor, or a step can't be run"""
    train: bool = False
    """run fits and trainings too; what they write goes into the folder"""

    asks: ClassVar[tuple[type, ...]] = (Load,)

    @property
    def change(self) -> dict[str, str]:
        """What this command line names in place of the session's model."""
        given = {"model": self.model, "base": self.base_model, "dtype": self.dtype, "device": self.device, "device_map": self.device_map}
        return {k: v for k, v in given.items() if v}

    def read(self) -> tuple[Path, bytes]:
        """The session's file, and its bytes."""
        path = find_session(self.session) if self.session else newest_session()
        return path, session_bytes(path)

    def scattered(self) -> tuple[Load, Replay]:
        """The model of the first result, and the request that runs in parts."""
        path, data = self.read()
        results, _, wrong = read_results(data, path)
        say_wrong(path.name, wrong)
        return replace(results[0].load, **self.change), Replay(data, path.name, self.change, self.train, self.strict)

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        """Runs by itself: several models, many requests. The exit code."""
        path, data = self.read()
        out = console(quiet=self.json)
        if self.plot is not None:
            raise UserError("--plot draws one result: a replay writes session.ipynb, with a picture of each, into --out")
        results, notes, wrong = read_results(data, path)
        say_wrong(path.name, wrong)
        show_head(out, path.name, len(results))
        steps = replay(engine, results, typed_path(self.out), self.change, self.train, show, lambda step: show_step(out, step))
        write_text(typed_path(self.out) / "session.ipynb", notebook(name_of(data) or path.stem, results, steps, notes))
        show_end(out, steps, str(self.out))
        done = ReplayResult(path.name, tuple(steps), len(results), tuple(wrong), self.strict)
        if self.json:
            put(json.dumps(to_json(done.listed), ensure_ascii=False, allow_nan=False) + "\n")
        return done.code


def say_wrong(name: str, wrong: Sequence[str]) -> None:
    for line in wrong:
        console(stderr=True).print(plain(f"{name} {line}; left out", YELLOW), soft_wrap=True)


def show_head(out: Console, name: str, results: int) -> None:
    out.print(plain(f"{name}: {results} results", GRAY))


def show_step(out: Console, s: Step) -> None:
    apart = f" ({s.worst.name}: {s.worst.was:.6g} → {s.worst.now:.6g}, {s.worst.size:.2g} apart, {s.worst.allowed:.2g} allowed)" if s.worst else ""
    words = s.why or (f"{s.session}{f' | now {s.says}' if s.says != s.session else ''}" + (apart if s.verdict == "differs" else ""))
    out.print(plain(f"{s.number:4} {s.verdict:10} {words}", STYLES[s.verdict]), soft_wrap=True)


def show_end(out: Console, steps: Sequence[Step], place: str) -> None:
    counts = {v: sum(s.verdict == v for s in steps) for v in STYLES}
    worst = max((s.worst.size for s in steps if s.worst), default=0.0)
    words = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    where = f"; written to {place}" * bool(place)
    out.print(plain(f"{words}; largest difference {worst:.2g}{where}", RED if any(s.failed for s in steps) else GREEN), soft_wrap=True)


def show_replay(out: Console, r: ReplayResult) -> None:
    """What was scattered, as a replay on one machine says it."""
    say_wrong(r.name, r.wrong)
    if r.warning:
        out.print(plain(r.warning, YELLOW), soft_wrap=True)
    show_head(out, r.name, r.results)
    for step in r.steps:
        show_step(out, step)
    show_end(out, r.steps, r.out)


COMMANDS = {"replay": ReplayCommand}
SHOW = {ReplayResult: show_replay}
