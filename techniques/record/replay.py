"""A session without a screen: every result that it holds is computed again, written as JSON and CSV, and held against the session's numbers."""

import csv
import io
import json
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

from utils import ROOT
from vocabulary.chosen import is_chosen, refusal
from vocabulary.files import folder, make_folder, reason, typed_path, write_text
from vocabulary.log import read_lines
from vocabulary.nodes import UserError
from vocabulary.notebook import as_notebook, session_cells
from vocabulary.parts import pack
from vocabulary.results import Kept, Result, differences, digest, headline, numbers, worth
from vocabulary.wire import to_json
from techniques.record.requests import Step

PACKAGES = ("torch", "transformers", "transformer_lens", "sae_lens", "numpy")
ROWS = {"SweepResult": ("rows", "cols"), "LensResult": ("points", "positions")}  # what the first two axes of a table are called in its result


# ------------------------------------------------------------------ the session


def find_session(text: str) -> Path:
    """The file of a session: a path, or the stem or the name of one in sessions/. UserError when there is none."""
    path = typed_path(text)
    if path.is_file():
        return path
    files = sorted(folder("sessions").glob("*.jsonl"), key=lambda p: -p.stat().st_mtime)
    for file in files:
        if file.stem == text or name_of(file.read_bytes()) == text:
            return file
    raise UserError(f"no session {text!r}: give a .jsonl file, or the name of one of {len(files)} in {folder('sessions')}")


def name_of(data: bytes) -> str:
    """What the user calls a session."""
    entries = (line.entry or {} for line in read_lines(data)[0])
    return next((str(e["args"].get("text", "")) for e in reversed([*entries]) if e.get("do") == "name" and isinstance(e.get("args"), dict)), "")


def session_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {reason(error)}") from error


def read_results(data: bytes, path: Path) -> tuple[list[Result], list[dict], list[str]]:
    """The results that a session's bytes hold, each once with its newest numbers, in their order; its notes as lines; and what is wrong with its lines."""
    lines, ended = read_lines(data)
    if not any(line.entry and "loupe" in line.entry for line in lines):
        raise UserError(f"{path.name} is not a session of Loupe: it has no header")
    kept, found, wrong = Kept(), {}, [f"line {line.place}: {line.wrong}" for line in lines if line.entry is None]
    for entry in (line.entry for line in lines if line.entry):
        if "set" in entry:
            kept.sets[str(entry["set"])] = entry.get("prompts")
    for line in lines:
        if line.entry and ("got" in line.entry or "study" in line.entry):
            try:
                result = kept.read(line.entry)
            except UserError as error:
                wrong.append(f"line {line.place}: {error}")
                continue
            if result is not None:
                key = (to_json(result.load), result.kind, to_json(result.request))
                found[digest(key)] = result
    if not found:
        steps = sum(bool(line.entry and "do" in line.entry) for line in lines)
        raise UserError(
            f"{path.name} holds {steps} actions and no result: it is of a version that kept none. Open it with `uv run tui.py --resume {path}` "
            "and press a key that acts: what is computed from then on is kept"
        )
    notes = [e for e in (line.entry or {} for line in lines) if e.get("do") == "note" and isinstance(e.get("args"), dict)]
    return [*found.values()], notes, wrong + ([] if ended else ["its last line is cut"])


# ------------------------------------------------------------------ running it


def versions() -> dict[str, str]:
    """Of the program and of what computes."""
    out = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            out[name] = "?"
    project = next((line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")), "?")
    return {"loupe": project} | out


def seeds(request: object) -> dict[str, int]:
    """Every seed in a request, by its field."""
    found = {}
    for f in fields(request):
        value = getattr(request, f.name)
        if "seed" in f.name and type(value) is int:
            found[f.name] = value
        elif is_dataclass(value) and f.name == "study":
            found |= {f"study.{k}": v for k, v in seeds(value).items()}
    return found


def notebook(name: str, results: list[Result], steps: Sequence[Step], notes: list[dict]) -> str:
    """The session as a notebook: prompts, notes, every result worth showing with its picture, the circuits."""
    shown = {id(r) for r in worth(results[s.number - 1] for s in steps)}
    kept = [(results[s.number - 1], s) for s in steps]
    rows = [(result.time, "result", result, *reversed(s.computed)) for result, s in kept if id(result) in shown]
    rows += [(str(e.get("t", "")), "note", e["args"]) for e in notes]
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    return as_notebook(session_cells(name, f"A session of Loupe, run again: {about}.", [row[1:] for row in sorted(rows, key=lambda row: row[0])]))


def replay(
    engine, results: list[Result], out: Path, change: dict[str, str], train: bool, show: Callable[[object], None], told: Callable[[Step], None]
) -> list[Step]:
    """Run every result again, in order, on the model it was computed on (`change`: fields of Load in place of its own); each goes into its files at once."""
    make_folder(out)
    done = []
    try:
        for number, result in enumerate(results, 1):
            done.append(one(engine, number, result, out, change, train, show))
            write_step(done[-1], result, out)
            told(done[-1])
    finally:  # also of the steps before one that broke
        write_summary(done, out)
    return done


def one(engine, number: int, result: Result, out: Path, change: dict[str, str], train: bool, show: Callable[[object], None]) -> Step:
    """One step: run, compare. What a fit or training writes goes into `out`."""
    request, step = result.request, Step(number, result.time, result.kind, result.says)
    if isinstance(request, dict):
        return replace(step, verdict="no request", why=f"{result.kind} is not a request of this version, or its technique is not here")
    study = getattr(request, "study", None)
    if study is not None and not is_chosen(study.metric):
        return replace(step, verdict="refused", why=refusal(study.metric))
    if getattr(request, "away", ""):
        return replace(step, verdict="not run", why="it puts a direction away")
    if hasattr(request, "out") and not train:
        return replace(step, verdict="not run", why=f"{result.kind} writes {request.out}: --train runs it too, into {out}")
    if getattr(request, "out", ""):
        request = replace(request, out=str(out / f"{number:03}-{Path(request.out).name}"))
    try:
        info = engine.run(replace(result.load, **change), show)
        now = engine.run(request, show)
    except UserError as error:
        return replace(step, verdict="refused", why=str(error))
    rows = differences(result.numbers, numbers(now), info.dtype, getattr(now, "floor", math.nan))
    worst = rows[0] if rows else None
    verdict, frames = "differs" if worst is not None and worst.over else "equal", np.frombuffer(pack([(0, info), (0, now)]), np.uint8)
    return replace(step, verdict=verdict, says=headline(request, now), worst=worst, frames=frames)


def write_step(step: Step, result: Result, out: Path) -> None:
    """What a step that ran computed, as JSON and CSV."""
    info, now = step.computed
    if info is None:
        return
    stem = out / f"{step.number:03}-{result.kind}"
    about = {
        "versions": versions(), "model": info.name, "dtype": info.dtype, "device": info.device, "seeds": seeds(result.request), "session": {"time": result.time,
        "on": result.on, "says": result.says, "numbers": result.numbers}, "replay": step.row(), "load": to_json(result.load), "kind": result.kind,
        "request": to_json(result.request), "result": to_json(now),
    }  # fmt: skip
    write_text(stem.with_suffix(".json"), json.dumps(about, ensure_ascii=False) + "\n")
    write_text(stem.with_suffix(".csv"), long_table(now))


def write_summary(steps: Sequence[Step], out: Path) -> None:
    if rows := [step.row() for step in steps]:
        write_text(out / "summary.json", json.dumps({"versions": versions(), "steps": rows}, ensure_ascii=False, indent=1) + "\n")
        write_text(out / "summary.csv", table([[*rows[0]], *([*row.values()] for row in rows)]))


# ------------------------------------------------------------------ tables


def table(rows: list[list]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([["" if v is None else v for v in row] for row in rows])
    return out.getvalue()


def long_table(result: object) -> str:
    """Every number of a result, a line each: its field, its place (names of rows and columns where the result has them), its value."""
    names = [getattr(result, field) for field in ROWS.get(type(result).__name__, ())]
    rows: list[list] = [["field", "row", "column", "further", "value"]]

    def place(shape: tuple, at: tuple) -> list[str]:
        named = [str(names[i][n]) if i < len(names) and len(names[i]) == shape[i] else str(n) for i, n in enumerate(at)]
        return [*named[:2], *[""] * (2 - len(named)), ",".join(named[2:])]

    def walk(value: object, name: str) -> None:
        match value:
            case np.ndarray():
                rows.extend([name, *place(value.shape, at), x if math.isfinite(x) else None] for at, x in np.ndenumerate(value))
            case bool() | None | str():
                return
            case int() | float():
                rows.append([name, "", "", "", value if math.isfinite(value) else None])
            case dict():
                for key, inner in value.items():
                    walk(inner, f"{name}.{key}".lstrip("."))
            case tuple() | list():
                for key, inner in enumerate(value):
                    walk(inner, f"{name}.{key}")
            case _ if is_dataclass(value):
                for f in fields(value):
                    walk(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))

    walk(result, "")
    return table(rows)
