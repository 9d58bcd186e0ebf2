"""
The command line of this room: mcp, which makes tools of the shell's commands: a JSON schema from a command's options, a command from JSON, and its result as
text and JSON. The protocol is in server.py.
"""

import inspect
import io
import json
import re
import time
import typing
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import MISSING, dataclass, fields
from importlib.util import find_spec
from typing import ClassVar

import msgspec
from rich.console import Console

import techniques
from model import relay
from techniques.agents.shared import SharedEngine, steps
from techniques.shell import ModelOptions, console, draw, helps, plain, plots_to, tables
from vocabulary.nodes import UserError
from vocabulary.progress import time_left
from vocabulary.requests import Progress
from vocabulary.wire import to_json

WRITES = ("out", "plot", "wandb", "own", "away")  # options that leave something behind, or run code
LARGE = 50_000  # characters of JSON that are given unasked
TRY = 3.0  # seconds after which a pace says how long it takes
WIDTH = 240


def commands(write: bool) -> dict[str, type[ModelOptions]]:
    """Every command that asks something of a model; what always writes files (fits, trainings, directions) only with `write`."""
    every = {name: kind for part in techniques.parts("command") for name, kind in part.COMMANDS.items()}
    return {
        name: kind
        for name, kind in every.items()
        if issubclass(kind, ModelOptions) and not hasattr(kind, "alone") and (write or not kind.interruptible and name != "direction")
    }


def options_of(kind: type[ModelOptions], write: bool) -> dict[str, tuple[object, str, object]]:
    """The type, text and default of each option that makes a difference."""
    texts, plain_types, full = helps(kind), typing.get_type_hints(kind), typing.get_type_hints(kind, include_extras=True)
    out = {}
    for f in fields(kind):
        if f.name in kind.unused or not write and f.name in WRITES:
            continue
        said = next((m.help for m in getattr(full[f.name], "__metadata__", ()) if getattr(m, "help", None)), texts.get(f.name, ""))
        assert f.default is not MISSING, f"{kind.__name__}.{f.name} has no default"
        out[f.name] = plain_types[f.name], said, f.default
    return out


def schema(kind: type[ModelOptions], write: bool) -> dict:
    """The JSON schema of a command's options. None is required: what has to be given, the command says."""
    properties = {}
    for name, (typed, text, default) in options_of(kind, write).items():
        some = [kind for kind in typing.get_args(typed) if kind is not type(None)]
        typed = some[0] if type(None) in typing.get_args(typed) and len(some) == 1 else typed  # unset is left out
        shape = msgspec.json.schema(typed, schema_hook=lambda kind: {"type": "string"})
        text = {"description": re.sub(r"--(?=[a-z])", "", text)} if text else {}
        properties[name] = shape | text | ({"default": to_json(default)} if default not in (None, "", (), False) else {})
    properties["json"]["description"] = f"give the result as JSON too, however large; unset, JSON of up to {LARGE} characters comes along"
    properties["run_anyway"] = {
        "type": "boolean",
        "default": False,
        "description": "run it although it takes long; unset, a long one is refused with an estimate",
    }
    return {"type": "object", "properties": properties, "additionalProperties": False}


def described(kind: type[ModelOptions]) -> str:
    """What a command does, and what its request says."""
    texts = [inspect.cleandoc(k.__doc__) for k in (kind, *kind.asks) if k.__doc__]
    return "\n\n".join(dict.fromkeys(texts))


def read(kind: type[ModelOptions], given: dict, write: bool) -> ModelOptions:
    """A command from JSON. UserError for an option that it has not, or a value of another type."""
    known, made = options_of(kind, write), {}
    for name, value in given.items():
        if name not in known:
            raise UserError(f"there is no option {name!r}: there are {', '.join(known)}")
        try:
            made[name] = msgspec.convert(value, known[name][0], dec_hook=lambda kind, value: kind(value))
        except (msgspec.ValidationError, TypeError) as error:
            raise UserError(f"{name}: {error}") from error
    return kind(**made)


class Watch:
    """Passes progress on; UserError where what runs will take longer than `seconds`, or `stopped()`."""

    def __init__(self, say: Callable[[Progress], None], seconds: float, stopped: Callable[[], bool] = lambda: False):
        self.say, self.seconds, self.stopped, self.began = say, seconds, stopped, time.monotonic()

    def __call__(self, part: object) -> None:
        if self.stopped():
            raise UserError("cancelled")
        if not isinstance(part, Progress):
            return
        self.say(part)
        spent = time.monotonic() - self.began
        whole = spent / part.done * part.total if part.done and part.total else spent
        if spent >= min(TRY, self.seconds) and whole > self.seconds:
            text = part.text or f"{part.done} of {part.total}"
            far = f"about {time_left(whole - spent)} ({text}, after {spent:.0f} s)" if part.done else f"no end in sight after {spent:.0f} s"
            raise UserError(f"{far}: calls of more than {self.seconds:.0f} s are refused. Ask for less, or call again with run_anyway: true")


def call(
    engine, kind: type[ModelOptions], given: dict, write: bool, seconds: float, say: Callable[[Progress], None], stopped: Callable[[], bool]
) -> tuple[str, object]:
    """A tool's answer: text with tables, and the result as JSON (None where it is large and not asked for). Loading a model is never refused as long."""
    if stopped():
        raise UserError("cancelled")
    anyway = given.pop("run_anyway", False)
    command = read(kind, given, write)
    plots_to(command.plot)
    request = command.request()
    info = engine.run(command.load(), Watch(say, float("inf"), stopped))
    notes, out = (console(file=io.StringIO(), width=WIDTH) for _ in range(2))
    result = command.printed(info)
    if result is None:
        watch = Watch(say, float("inf") if anyway is True else seconds, stopped)
        result = steps(engine, request, watch)
        result = command.finish(result, engine, watch)
    draw(command.plot, result, info, notes)
    if isinstance(result, str):
        return result, None
    notes.print(plain(f"{info.key}; {info.architecture}, {info.n_layers} layers x {info.n_heads} heads"))
    for line in filter(None, (info.warning, info.beside)):
        notes.print(plain(line))
    tables()[type(result)](out, result)
    broken = [
        f"identity broken: {i.name}, error {i.error:.2g} against {i.tolerance:.2g}. {i.note}\n"
        for i in (*info.checks, *command.checked(result))
        if i.ok is False
    ]
    body = to_json(result)
    size = len(json.dumps(body))
    keep = size <= LARGE or command.json
    left = "" if keep else f"\nThe JSON has {size:,} characters and was left out: json: true gives it."
    return text_of(notes) + text_of(out) + "".join(dict.fromkeys(broken)) + left, body if keep else None


def text_of(out: Console) -> str:
    return "\n".join(line.rstrip() for line in out.file.getvalue().splitlines()) + "\n"


@dataclass
class McpCommand:
    """
    Serve every command as a tool to coding agents, over the Model Context Protocol on stdin and stdout. No tool writes a file, unless --write. With
    LOUPE_KEEP_ENGINE_MINUTES the tools use the engine that stays, and its screens' model.
    """

    write: bool = False
    """also tools that write files: fits, trainings, --out and --plot"""
    seconds: float = 60
    """what would take longer is refused with an estimate, unless the call says run_anyway"""
    asks: ClassVar[tuple[type, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        if find_spec("mcp") is None:
            raise UserError("mcp needs the package of that name: `uv sync --group mcp`")
        if not self.seconds > 0:
            raise UserError("--seconds is a positive number")
        from techniques.agents.server import serve

        serve(served(SharedEngine() if relay.minutes() else engine, self.write, self.seconds))
        return 0


def served(engine, write: bool = False, seconds: float = 60):
    """The server whose tools run on this engine."""
    from techniques.agents.server import server

    known = commands(write)

    def answer(name: str, given: dict, say: Callable[[Progress], None], stopped: Callable[[], bool]) -> tuple[str, object]:
        if name not in known:
            raise UserError(f"there is no tool {name!r}: there are {', '.join(known)}")
        with engine if isinstance(engine, SharedEngine) else nullcontext(engine) as here:
            return call(here, known[name], dict(given), write, seconds, say, stopped)

    return server([(name, described(kind), schema(kind, write)) for name, kind in known.items()], answer, not write)


COMMANDS = {"mcp": McpCommand}
SHOW: dict = {}
