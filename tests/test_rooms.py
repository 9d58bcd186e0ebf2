"""Rooms: requests are registered where they are declared, each room answers through one door, and its commands are its requests."""

import contextlib
import dataclasses
import io
import json
import re
from typing import get_args

import pytest

import engine as program
import techniques
from engine import Engine
from techniques import shell
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Status
from vocabulary.wire import REQUESTS, TYPES, door, message, needs_model, request


def help_of(*args: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        program.main([*args, "--help"])
    return out.getvalue()


def test_every_request_has_a_door():
    own = {kind for kind in REQUESTS.values() if kind.__module__ == "vocabulary.requests"}
    assert {kind.__name__ for kind in own} == {"Load", "LoadForAll", "Check", "Status", "Where", "Models"}
    for kind in set(REQUESTS.values()) - own:
        if kind.__module__.startswith("techniques."):
            assert callable(door(kind).answer) and kind.needs_model != kind.__module__.startswith("techniques.cluster."), kind  # scattered jobs need none
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
        if not issubclass(kind, shell.ModelOptions):  # scatter, gather, mcp: what runs other commands
            assert kind.__doc__
            continue
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


def test_a_folder_without_requests_is_no_technique(tmp_path, monkeypatch):
    monkeypatch.setattr(techniques, "settings", lambda: {"LOUPE_TECHNIQUES": str(tmp_path)})
    with pytest.raises(UserError, match="has no requests.py"):
        techniques.rooms()


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
