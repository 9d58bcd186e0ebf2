"""Rooms: requests are registered where they are declared, each room answers through one door, and its commands are its requests."""

import contextlib
import dataclasses
import io
import json
import re
import sys
from typing import get_args

import pytest

import engine as program
import techniques
from engine import Engine
from techniques import shell
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Status
from vocabulary.wire import REQUESTS, TYPES, door, message, needs_model, request

REQUESTS_PY = '''
"""How large the residual stream is."""

from vocabulary.prompts import Study
from vocabulary.wire import message, request


@request
class Norms:
    """The norm of the residual stream before every layer at one position."""

    study: Study
    pos: int | str | None = None
    """a position"""
    cells: tuple[tuple[int, int], ...] = ()
    half: bool = False


@message
class NormsResult:
    norms: tuple[float, ...]
'''
ANALYSIS_PY = """
import torch as t

from model.interventions import prepare
from techniques.norms.requests import Norms, NormsResult


def answer(model, request):
    runs = yield from prepare(model, request.study)
    names = [f"blocks.{i}.hook_resid_pre" for i in range(model.info.n_layers)]
    _, acts = model.forward(t.tensor([runs.row("clean").ids]), names)
    place = runs.position("clean", request.pos if request.pos is not None else "END")
    return NormsResult(tuple(float(x[0, place].norm()) / (1 + request.half) for x in acts.values()))
"""
COMMAND_PY = """
from techniques.norms.requests import Norms, NormsResult
from techniques.shell import options

COMMANDS = {"norms": options(Norms)}
SHOW = {NormsResult: lambda out, r: out.print(r.norms)}
"""


def help_of(*args: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        program.main([*args, "--help"])
    return out.getvalue()


def test_every_request_has_a_door():
    own = {kind for kind in REQUESTS.values() if kind.__module__ == "vocabulary.requests"}
    assert {kind.__name__ for kind in own} == {"Load", "Check", "Status", "Models"}
    for kind in set(REQUESTS.values()) - own:
        if kind.__module__.startswith("techniques."):
            assert callable(door(kind).answer) and kind.needs_model, kind
    assert not needs_model(Load()) and not needs_model(Status()) and not needs_model("text")
    assert set(REQUESTS.items()) <= set(TYPES.items())


def test_two_messages_of_one_name_and_what_is_no_request():
    with pytest.raises(AssertionError, match="two messages are called Load"):

        @message
        class Load:
            pass

    with pytest.raises(UserError, match="int is not a request"):
        door(int)
    with pytest.raises(UserError, match="is not a request"):
        Engine.run(Engine("zoo"), 3)


def test_every_field_of_a_request_is_an_option():
    """But those that a command chooses by itself."""
    every = {name: kind for part in techniques.parts("command") for name, kind in part.COMMANDS.items()}
    for name, kind in every.items():
        options = {f.name for f in dataclasses.fields(kind)}
        assert kind.asks and (options >= {"model", "json"}) and kind.__doc__, name
    assert {f.name for f in dataclasses.fields(REQUESTS["TrainSae"])} <= {f.name for f in dataclasses.fields(every["train-sae"])}
    assert {f.name for f in dataclasses.fields(REQUESTS["Sweep"])} - {f.name for f in dataclasses.fields(every["sweep"])} == {"study", "over_set"}


@pytest.mark.parametrize(
    "name, shown, absent",
    [
        ("run", "--answer --foil --do --metric --pos --k --json", "--which"),
        ("train-sae", "--hook --out --model", "--answer --foil --clean --sae"),
        ("tune-lens", "--steps --model", "--answer --set"),
        ("weights", "--head --view --mlp0", "--clean --answer"),
        ("saes", "--every", "--clean"),
        ("preflight", "--clean --view --sae", "--answer --do --metric"),
        ("attention", "--mean --layer --do", "--answer --metric"),
        ("path", "--sender --receiver --each --mean", "--receivers --over-set"),
        ("score", "--circuit --nodes --rest", "--do"),
        ("check", "--corrupt", "--which"),
    ],
)
def test_help_shows_what_a_command_uses(name, shown, absent):
    words = set(re.findall(r"^\W*?(--[\w-]+)", help_of(name), re.M))
    assert set(shown.split()) <= words and not set(absent.split()) & words


def test_preflight_of_the_only_sae(engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    assert program.main(["preflight", "--sae", "zoo/L1.resid_post", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["info"]["source"] == "zoo/L1.resid_post"
    assert program.main(["preflight"]) == 2 and "no SAE is named" in capsys.readouterr().err


def test_options_that_can_not_be(monkeypatch):
    @request
    class Wild:
        needed: int

    with pytest.raises(AssertionError, match="needs a default"):
        shell.options(Wild)

    @request
    class Tame:
        model: str = "the same name as every command's --model"

    with pytest.raises(AssertionError, match="another name"):
        shell.options(Tame)
    for kind in (Wild, Tame):
        del TYPES[kind.__name__], REQUESTS[kind.__name__]


def test_a_folder_is_a_technique(tmp_path, engines, monkeypatch, capsys):
    """It answers by Python, over the wire and from the shell, and no existing file knows of it."""
    from vocabulary.prompts import Prompt, Study
    from vocabulary.wire import Frame, encode, read_frame

    folder = tmp_path / "norms"
    folder.mkdir()
    for name, text in (("requests", REQUESTS_PY), ("analysis", ANALYSIS_PY), ("command", COMMAND_PY)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setattr(techniques, "settings", lambda: {"LOUPE_TECHNIQUES": str(folder)})
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    assert "techniques.norms.requests" in {m.__name__ for m in techniques.parts("requests")}
    from techniques.norms.requests import Norms

    ask = read_frame(io.BytesIO(encode(Frame("ask", 1, body=Norms(Study(Prompt("The capital of France is")), -1)))).read).body
    norms = engines["zoo"].run(ask).norms
    assert len(norms) == 4
    assert program.main(["norms", "--clean", "The capital of France is", "--at", "-1", "--half", "--cells", "1,2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["norms"] == pytest.approx([x / 2 for x in norms])
    assert program.main(["norms"]) == 0 and capsys.readouterr().out.count(",") >= 3
    monkeypatch.setattr(techniques, "settings", lambda: {"LOUPE_TECHNIQUES": str(tmp_path)})
    with pytest.raises(UserError, match="has no requests.py"):
        techniques.rooms()
    techniques.__path__.remove(str(tmp_path))
    del TYPES["Norms"], TYPES["NormsResult"], REQUESTS["Norms"]
    for name in ("requests", "analysis", "command"):
        del sys.modules[f"techniques.norms.{name}"]


def test_words_of_a_field_are_those_of_its_table():
    from techniques.circuits.requests import CONVENTIONS, METHODS, REST, Method, PathKind, Rest
    from techniques.lens.requests import LENSES, LensKind
    from techniques.patching.requests import SWEEP_OPS, SWEEPS, SweepKind, SweepOp
    from techniques.weights.requests import SINGULAR, Matrix
    from vocabulary.nodes import OPS, Op
    from vocabulary.prompts import ALIGNMENTS, METRICS, Align, MetricKind

    for table, kind in (
        (CONVENTIONS, PathKind), (METHODS, Method), (REST, Rest), (LENSES, LensKind), (SWEEPS, SweepKind), (SWEEP_OPS, SweepOp),
        (SINGULAR, Matrix), (OPS, Op), (ALIGNMENTS, Align), (METRICS, MetricKind),
    ):  # fmt: skip
        assert tuple(table) == get_args(kind), kind
