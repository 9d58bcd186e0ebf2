"""
What a session remembers beside its state: every step in its order, what was computed with its numbers, notes, and where one was looking.

A session that was only looked at writes nothing: results and the place wait for the first action, or the first result that a key asked for (a sweep), then go to
the file whenever the engine is idle.
"""

import datetime
from dataclasses import dataclass

from vocabulary.requests import Load, ModelInfo
from vocabulary.results import Kept, Result, entries, headline, key_of, numbers


@dataclass(frozen=True)
class Step:
    """A line of the session: its time, the action (`note`; "result" for what was computed), its arguments, and the states before and after it."""

    time: str
    name: str
    args: dict
    before: object
    after: object


class Record:
    """Steps, results by (model, request), and the place; `waiting` are lines that are not in the log yet."""

    def __init__(self, session):
        self.session = session
        self.steps: list[Step] = []
        self.results: dict[tuple, Result] = {}
        self.place: dict = {}
        self.waiting: list[dict] = []
        self.acted, self.said = 0, set()  # actions that were read from a file; digests of studies that stand there
        self.asked = False  # whether a key asked for a result since the session was opened

    # ---------------------------------------------------------------- reading

    def read(self, entry: dict, kept: Kept) -> bool:
        """Take in a line that is no action; False for one that is."""
        if "got" in entry or "study" in entry:
            result = kept.read(entry)
            if result is None:
                self.said.add(entry["study"])
            else:
                self.take(result)
        elif isinstance(entry.get("at"), dict):
            self.place = entry["at"]
        else:
            return False
        return True

    def take(self, result: Result) -> None:
        self.results[result.key] = result
        if result.asked:
            self.steps.append(Step(result.time, "result", {"says": result.says, "key": result.key}, self.session.state, self.session.state))

    # ---------------------------------------------------------------- writing

    def add(self, request: object, result: object, load: Load, info: ModelInfo, asked: bool = False) -> None:
        """Keep what came back for a request: once, and again when a key asked for it."""
        found = numbers(result)
        known = self.result(info.key, request)
        if not found or getattr(request, "dry", False) or known is not None and known.numbers == found and (known.asked or not asked):
            return
        now = datetime.datetime.now().isoformat(timespec="milliseconds")
        new = Result(now, type(request).__name__, request, load, info.key, headline(request, result), found, asked)
        self.take(new)
        self.asked = self.asked or asked
        for line in entries(new):
            name = line.get("set") or line.get("study")
            if "set" in line:
                if line["set"] not in self.session.sets:
                    self.session.refer({"prompts": line["prompts"]})  # `Session.keep` writes it
            elif name not in self.said:
                self.waiting.append(line)
                self.said |= {name} - {None}

    def stand(self, place: dict) -> None:
        """Where one is looking now."""
        if place != self.place:
            self.place = place
            self.waiting = [line for line in self.waiting if "at" not in line] + [
                {"t": datetime.datetime.now().isoformat(timespec="milliseconds"), "at": place}
            ]

    def flush(self) -> None:
        """Write what waits, if something was done or asked here and all before is on the disk."""
        session = self.session
        if self.waiting and self.changed and not session.log.waiting:
            session.keep(self.waiting)
            self.waiting = []
            session.trouble = session.log.save()

    @property
    def changed(self) -> bool:
        """Whether something was done here since the session was opened."""
        return self.asked or self.session.actions > self.acted

    # ---------------------------------------------------------------- looking up

    def result(self, on: str, request: object) -> Result | None:
        return self.results.get(key_of(on, request))

    def metric(self, on: str, request: object) -> float | None:
        """The metric that a run was seen to have."""
        found = self.result(on, request)
        return None if found is None else found.numbers.get("now.metric")
