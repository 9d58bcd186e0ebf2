"""The commands as tools of the Model Context Protocol, through the package's own client in memory."""

import sys

import pytest

from engine import Engine, main
from techniques.agents import command as tools
from utils import ROOT
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

mcp = pytest.importorskip("mcp", reason="uv sync --group mcp")

SET = str(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")


@pytest.fixture(scope="module")
def zoo(engines) -> Engine:
    return engines["zoo"]


def words(result) -> str:
    return result.content[0].text


async def test_tools_are_the_commands_with_their_options(zoo):
    async with mcp.Client(tools.served(zoo)) as client:
        listed = {tool.name: tool for tool in (await client.list_tools()).tools}
        assert {"lens", "attention", "sweep", "path", "score", "discover", "features", "qk"} <= set(listed)
        assert not {"direction", "train-sae", "tune-lens", "fit-jacobian", "replay", "scatter", "work", "gather", "serve", "mcp"} & set(listed)
        sweep = listed["sweep"]
        assert sweep.description.startswith("Patch or ablate one cell") and "denoise" in sweep.description and sweep.annotations.read_only_hint
        options = sweep.input_schema["properties"]
        assert options["kind"]["enum"] and options["kind"]["default"] == "resid_pre" and options["set"]["type"] == "string"
        assert options["mean"]["description"] == "over set, with statistics" and "run_anyway" in options
        assert not any({"out", "plot", "wandb", "own", "away"} & set(tool.input_schema["properties"]) for tool in listed.values())
        with_write = tools.commands(True)
        assert {"train-sae", "tune-lens"} <= set(with_write) and "out" in tools.schema(with_write["discover"], True)["properties"]


async def test_a_call_answers_with_tables_and_json(zoo):
    seen = []

    async def note(done: float, total: float | None, text: str | None) -> None:
        seen.append((done, total, text))

    async with mcp.Client(tools.served(zoo)) as client:
        result = await client.call_tool("sweep", {"kind": "z", "set": SET, "mean": True}, progress_callback=note)
        assert not result.is_error and "zoo, float32 on cpu" in words(result) and "largest effects" in words(result) and "L3H3" in words(result)
        assert result.structured_content["kind"] == "z" and len(result.structured_content["per_prompt"]) == 32
        assert seen
        for arguments, line in (
            ({"kind": "nonsense"}, "kind: Invalid enum value"),
            ({"kinds": "z"}, "there is no option 'kinds'"),
            ({"out": "x.json"}, "there is no option 'out'"),
            ({"kind": "z", "corrupt": "one two"}, "there is no answer"),
        ):
            refused = await client.call_tool("sweep", arguments)
            assert refused.is_error and line in words(refused)
        assert (await client.call_tool("none", {})).is_error


async def test_what_takes_long_is_refused_with_an_estimate(zoo, monkeypatch):
    monkeypatch.setattr(tools, "TRY", 0.0)
    async with mcp.Client(tools.served(zoo, seconds=1e-3)) as client:
        ask = {"kind": "z", "set": SET, "mean": True}
        refused = await client.call_tool("sweep", ask)
        assert refused.is_error and "are refused" in words(refused) and "run_anyway: true" in words(refused)
        assert zoo.model.leaks() == 0
        assert not (await client.call_tool("sweep", ask | {"run_anyway": True})).is_error


def test_an_estimate_from_the_pace(monkeypatch):
    clock = iter((0.0, 2.0, 10.0, 10.0))
    monkeypatch.setattr(tools.time, "monotonic", lambda: next(clock))
    watch = tools.Watch(lambda part: None, 60)
    watch(Progress(1, 100, "cells"))
    watch(Progress(20, 100, "cells"))
    with pytest.raises(UserError, match=r"about 8 min left \(cells, after 10 s\): calls of more than 60 s are refused"):
        watch(Progress(2, 100, "cells"))


def test_large_json_is_left_out_unless_asked(zoo, monkeypatch):
    monkeypatch.setattr(tools, "LARGE", 100)
    run = lambda given: tools.call(zoo, tools.commands(False)["run"], given, False, 60, lambda part: None, lambda: False)  # noqa: E731
    text, body = run({"answer": [" Mary"], "foil": [" John"]})
    assert body is None and "json: true gives it" in text
    assert run({"answer": [" Mary"], "foil": [" John"], "json": True})[1]["now"]["metric"]
    with pytest.raises(UserError, match="cancelled"):
        tools.call(zoo, tools.commands(False)["lens"], {}, False, 60, lambda part: None, lambda: True)


def test_without_the_package(monkeypatch, capsys):
    monkeypatch.setattr("techniques.agents.command.find_spec", lambda name: None)
    assert main(["mcp"]) == 2 and "uv sync --group mcp" in capsys.readouterr().err


@pytest.mark.table
async def test_over_stdin_and_stdout():
    from mcp.client.stdio import StdioServerParameters, stdio_client

    async with mcp.Client(stdio_client(StdioServerParameters(command=sys.executable, args=[str(ROOT / "engine.py"), "mcp"], cwd=ROOT))) as client:
        result = await client.call_tool("run", {"answer": [" Mary"], "foil": [" John"]})
        assert not result.is_error and result.structured_content["now"]["metric"]
