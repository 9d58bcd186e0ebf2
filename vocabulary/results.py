"""
What a session keeps of what was computed: the request, the model, the headline, and a few numbers by which another run of it is held. Never imports torch.

1. `numbers` makes a result small: of each array its size, root mean square, a fixed mixture of all cells, and its largest cell.
2. `entries` are the lines of the session file for it; prompt sets and studies stand there once, under their digest. `Kept` reads them back.
3. `differences` holds the numbers of a second run against the first, within the noise floor.
"""

import dataclasses
import functools
import hashlib
import json
import math
from dataclasses import dataclass

import numpy as np

from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Load
from vocabulary.wire import TYPES, from_json, to_json

NOT_HELD = (
    "seconds",
    "expected",
    "peak_mb",
    "floor",
    "normalised",
    "p",
    "holm",
    "bytes",
    "normalised_low",
    "rows",
)  # times, sizes, errors of identities, and what follows from the rest
ALLOWED = {"float32": 1e-4, "float64": 1e-4, "float16": 4e-3, "bfloat16": 3e-2}  # of a number's size, at least of 1: what roundings in another order make
Numbers = dict[str, float | list]
EMPTY = {"prompt": {"clean": ""}}  # a study as JSON


def digest(obj: object) -> str:
    return hashlib.sha256(json.dumps(obj).encode()).hexdigest()[:20]


# ------------------------------------------------------------------ a result made small


def rounded(x: float) -> float:
    return float(f"{x:.7g}")


STEP = 1 << 13  # short enough for BLAS to start no threads
ANGLES = np.arange(STEP)
COS, SIN = np.cos(ANGLES), np.sin(ANGLES)


def summary(x: np.ndarray) -> list | None:
    """[size, root mean square, mixture, index of the largest, that cell] of the finite cells; None where there is none. The mixture: the sum of cos(1 + i) x_i over √size."""
    x = x.ravel()
    squares = mixture = largest = 0.0
    at = count = 0
    for start in range(0, x.size, STEP):  # cos(a + b) from two tables: attention over 1,000 tokens has 10 million cells, and a picture waits for this
        part = x[start : start + STEP].astype(np.float64)
        found = np.isfinite(part)
        part[~found] = 0.0
        mixture += math.cos(1 + start) * float(part @ COS[: part.size]) - math.sin(1 + start) * float(part @ SIN[: part.size])
        squares += float(part @ part)
        count += int(found.sum())
        most = int(np.abs(part).argmax())
        if abs(part[most]) > abs(largest):
            at, largest = start + most, float(part[most])
    return [x.size, rounded(math.sqrt(squares / count)), rounded(mixture / math.sqrt(x.size)), at, rounded(largest)] if count else None


FEW = 8  # of what a result holds many of: the runs of a continuation, its samples


def numbers(result: object) -> Numbers:
    """The numbers of a result, by the names of its fields; texts, token ids and times are left out."""
    out: Numbers = {}

    def walk(value: object, name: str) -> None:
        match value:
            case bool() | None:
                return
            case float() if math.isfinite(value):
                out[name] = rounded(value)
            case np.ndarray() if value.dtype.kind == "f" and value.size and (row := summary(value)):
                out[name] = row
            case tuple() | list() if value and all(type(v) is float for v in value) and (row := summary(np.array(value))):
                out[name] = row
            case dict():
                for key, inner in value.items():
                    walk(inner, f"{name}.{key}")
            case tuple() if value and all(map(dataclasses.is_dataclass, value)):
                for n, inner in enumerate(value[:FEW]):
                    walk(inner, f"{name}.{n}")
            case _ if dataclasses.is_dataclass(value):
                for f in dataclasses.fields(value):
                    if f.name not in NOT_HELD:
                        walk(getattr(value, f.name), f"{name}.{f.name}".lstrip("."))

    walk(result, "")
    return out


def worth(results) -> list["Result"]:
    """Those that a notebook shows: what a key asked for, every run, and the last of each other kind."""
    results = list(results)
    last = {r.kind: r for r in results}
    return [r for r in results if r.asked or r.kind == "Run" or last[r.kind] is r]


def metric_of(result: object) -> float | None:
    """The metric of a run as it is now; None for other results."""
    value = getattr(getattr(result, "now", None), "metric", None)
    return value if isinstance(value, float) and math.isfinite(value) else None


def headline(request: object, result: object) -> str:
    """What a result says, in a few words."""
    kind, shown = type(request).__name__, lambda x: f"{float(x):.4g}"
    if (metric := metric_of(result)) is not None:
        study = request.study
        return f"{study.metric.name} {metric:.4f}" + (f" under {' '.join(map(str, study.interventions))}" if study.interventions else "")
    if hasattr(result, "values") and hasattr(result, "address") and np.isfinite(result.values).any():
        effect = np.nan_to_num(np.abs(result.values - result.base), nan=-1.0)
        row, col = map(int, np.unravel_index(effect.argmax(), effect.shape))
        name = result.address(row, col) or f"{result.rows[row]} × {result.cols[col]}"
        return f"{kind} {result.kind} {result.op}: largest {name}, {result.base:.4f} → {float(result.values[row, col]):.4f}"
    if hasattr(result, "faithfulness") and hasattr(result, "alone"):
        return f"{kind} of {result.circuit.name}: faithfulness {shown(result.faithfulness.mean)}"
    if hasattr(result, "circuit") and hasattr(result, "method"):
        found = result.circuit
        return f"{kind} {result.method}: {len(found.edges)} edges, {len(found.nodes)} nodes, faithfulness {shown(result.score)}"
    row = next(((name, v) for name, v in numbers(result).items()), None)
    if row is None:
        return kind
    name, value = row
    return f"{kind} {name} {shown(value)}" if isinstance(value, float) else f"{kind} {name}: largest {shown(value[4])} of {value[0]}"


# ------------------------------------------------------------------ two runs


@dataclass(frozen=True)
class Difference:
    """Two values of one number, how far apart they are, and how far they may be."""

    name: str
    was: float
    now: float
    allowed: float

    @property
    def size(self) -> float:
        return abs(self.now - self.was) if math.isfinite(self.now) and math.isfinite(self.was) else math.inf

    @property
    def over(self) -> bool:
        return not self.size <= self.allowed


def differences(was: Numbers, now: Numbers, dtype: str, floor: float = math.nan) -> list[Difference]:
    """Every number of the first run against the second, the worst first. `floor`: the measured noise floor of the metric, where there is one."""
    share, out = ALLOWED.get(dtype, 1e-4), []
    least = floor if math.isfinite(floor) else 0.0
    for name, a in was.items():
        b = now.get(name)
        if type(b) is not type(a) or isinstance(a, list) and (len(a) != 5 or a[0] != b[0]):
            out.append(Difference(f"{name} (size)", a[0] if isinstance(a, list) else a, math.nan, 0.0))
            continue
        pairs = [("", a, b)] if isinstance(a, float) else [(" rms", a[1], b[1]), (" mixture", a[2], b[2]), (" largest", abs(a[4]), abs(b[4]))]
        scale = abs(a) if isinstance(a, float) else max(abs(a[4]), abs(b[4]))
        allowed = max(share * max(1.0, scale), least)
        out += [Difference(f"{name}{part}", x, y, allowed) for part, x, y in pairs]
    return sorted(out, key=lambda d: d.size / d.allowed if d.allowed else math.inf, reverse=True)


# ------------------------------------------------------------------ lines of the session file


def key_of(on: str, request: object) -> tuple:
    """By what a result is looked up: the model, and the request (as JSON where that has no hash)."""
    try:
        hash(request)
    except TypeError:
        return on, digest(to_json(request))
    return on, request


@dataclass(frozen=True)
class Result:
    """One result as a session keeps it. `request` is its JSON where this program has no such request; `on` the model, its dtype and device; `asked`: by a key."""

    time: str
    kind: str
    request: object
    load: Load
    on: str
    says: str
    numbers: Numbers
    asked: bool = False

    @property
    def key(self) -> tuple:
        return key_of(self.on, self.request)


@functools.lru_cache(8)
def set_line(prompts: tuple[Prompt, ...]) -> dict:
    body = to_json(prompts)
    return {"set": digest(body), "prompts": body}


def packed(request: object) -> tuple[dict, list[dict]]:
    """A request as JSON with its study and prompt set as digests, and the lines that these stand in, to be written once."""
    study, lines = getattr(request, "study", None), []
    if not isinstance(study, Study):
        return to_json(request), []
    body = {f.name: to_json(getattr(request, f.name)) for f in dataclasses.fields(request) if f.name != "study"}
    inside = to_json(dataclasses.replace(study, prompt_set=()))
    if study.prompt_set:
        lines.append(set_line(study.prompt_set))
        inside["prompt_set"] = lines[0]["set"]
    lines.append({"study": digest(inside), "is": inside})
    body["study"] = lines[-1]["study"]
    return body, lines


def entries(result: Result) -> list[dict]:
    """The lines of a result: what it refers to, then itself."""
    body, lines = packed(result.request)
    row = {"t": result.time, "got": result.kind, "request": body, "load": to_json(result.load), "on": result.on, "says": result.says, "numbers": result.numbers}
    return [*lines, row | ({"asked": True} if result.asked else {})]


class Kept:
    """Reads results back from a session's lines, in their order. `sets` are prompt sets by digest, as JSON or as prompts; `studies` by digest, as JSON."""

    def __init__(self, sets: dict | None = None):
        self.sets, self.studies, self.read_studies = {} if sets is None else sets, {}, {}

    def read(self, entry: dict) -> Result | None:
        """The result of a line; None for a line that only says what others refer to. UserError for what is no result."""
        if "study" in entry:
            self.studies[entry["study"]] = entry.get("is")
            return None
        body, numbers = entry.get("request"), entry.get("numbers")
        if not (isinstance(body, dict) and isinstance(numbers, dict) and isinstance(entry.get("got"), str)):
            raise UserError("it is not a result")
        asked = {"asked": True} if entry.get("asked") else {}
        return Result(
            str(entry.get("t", "")), entry["got"], self.request(entry["got"], body), from_json(entry.get("load", {}), Load), str(entry.get("on", "")),
            str(entry.get("says", "")), numbers, **asked,
        )  # fmt: skip

    def request(self, kind: str, body: dict) -> object:
        """The request; its JSON where it can't be read (of another version, or a technique that is not here). UserError where its study is missing."""
        named = isinstance(body.get("study"), str)
        study = self.study(body["study"]) if named else None
        try:
            read = from_json(body | {"study": EMPTY} if named else body, TYPES[kind])
        except (UserError, LookupError):
            return body
        return dataclasses.replace(read, study=study) if named else read

    def study(self, name: str) -> Study:
        """The study of a digest, read once."""
        if name not in self.read_studies:
            body = self.studies.get(name)
            if not isinstance(body, dict):
                raise UserError("the study that it is of is missing")
            of = body.get("prompt_set")
            if isinstance(of, str) and of not in self.sets:
                raise UserError("its prompt set is missing")
            some = self.sets[of] if isinstance(of, str) else ()
            if some and not isinstance(some[0], Prompt):
                self.sets[of] = some = from_json(some, tuple[Prompt, ...])
            self.read_studies[name] = dataclasses.replace(from_json(body | {"prompt_set": []}, Study), prompt_set=tuple(some))
        return self.read_studies[name]
