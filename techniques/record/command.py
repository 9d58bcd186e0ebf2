"""The command line of this room: replay."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.console import Console

from techniques.record.replay import Outcome, find_session, notebook, read_results, replay
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

    def changed(self, load: Load) -> Load:
        """The session's model, with what this command line names instead."""
        given = {"model": self.model, "base": self.base_model, "dtype": self.dtype, "device": self.device, "device_map": self.device_map}
        return replace(load, **{k: v for k, v in given.items() if v})

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        """Runs by itself: several models, many requests. The exit code."""
        path, out = find_session(self.session) if self.session else newest_session(), console(quiet=self.json)
        if self.plot is not None:
            raise UserError("--plot draws one result: a replay writes session.ipynb, with a picture of each, into --out")
        results, notes, wrong = read_results(path)
        for line in wrong:
            errors.print(plain(f"{path.name} {line}; left out", YELLOW), soft_wrap=True)
        out.print(plain(f"{path.name}: {len(results)} results", GRAY))

        def told(o: Outcome) -> None:
            apart = f" ({o.worst.name}: {o.worst.was:.6g} → {o.worst.now:.6g}, {o.worst.size:.2g} apart, {o.worst.allowed:.2g} allowed)" if o.worst else ""
            words = o.why or (f"{o.result.says}{f' | now {o.says}' if o.says != o.result.says else ''}" + (apart if o.verdict == "differs" else ""))
            out.print(plain(f"{o.number:4} {o.verdict:10} {words}", STYLES[o.verdict]), soft_wrap=True)

        done = replay(engine, results, typed_path(self.out), self.changed, self.train, show, told)
        write_text(typed_path(self.out) / "session.ipynb", notebook(path, done, notes))
        counts = {v: sum(o.verdict == v for o in done) for v in STYLES}
        failed = sum(o.failed for o in done)
        worst = max((o.worst.size for o in done if o.worst), default=0.0)
        words = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
        out.print(plain(f"{words}; largest difference {worst:.2g}; written to {self.out}", RED if failed else GREEN), soft_wrap=True)
        if self.json:
            put(json.dumps(to_json([o.row() for o in done]), ensure_ascii=False, allow_nan=False) + "\n")
        return 1 if self.strict and (failed or wrong) else 0


COMMANDS = {"replay": ReplayCommand}
SHOW: dict = {}
