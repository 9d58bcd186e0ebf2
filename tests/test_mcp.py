"""The commands as tools of the Model Context Protocol, through the package's own client in memory."""

import queue
import socket
import sys
import threading
import time

import pytest

from engine import Engine, main
from model import relay
from model.host import Host
from techniques.agents import command as tools
from techniques.agents.shared import SharedEngine
from techniques.lens.requests import Lens
from techniques.patching.requests import Sweep
from utils import ROOT
from vocabulary.nodes import UserError
from vocabulary.prompts import Study
from vocabulary.requests import Load, Progress
from vocabulary.wire import Frame, encode, read_sealed, sealed

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


# ------------------------------------------------------------------ the engine that stays


class Beside:
    """A screen that looks at the model of a shared engine, and the engine."""

    def __init__(self, zoo, monkeypatch):
        engine = Engine()
        engine.model, engine.loaded = zoo.model, Load("zoo", device="cpu")
        self.host = Host(engine, "/nowhere")
        self.host.version = ""
        threading.Thread(target=self.host.run, daemon=True).start()
        monkeypatch.setattr(relay, "connect", self.connect)
        self.line, self.frames, self.count = self.connect("look"), queue.SimpleQueue(), 0
        threading.Thread(target=self.read, daemon=True).start()

    def connect(self, word: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        threading.Thread(target=self.host.greet, args=(theirs,), daemon=True).start()
        while ours.recv(1) != b"\n":
            pass
        ours.sendall(f"{word}\n".encode())
        return ours

    def read(self) -> None:
        stream = self.line.makefile("rb")
        while frame := read_sealed(stream.read):
            self.frames.put(frame)

    def ask(self, body: object, slot: str = "", priority: int = 1) -> int:
        self.count += 1
        self.line.sendall(sealed(encode(Frame("ask", self.count, slot, priority, body))))
        return self.count

    def end(self, ident: int) -> Frame:
        while (frame := self.frames.get(timeout=20)).id != ident or frame.kind in ("progress", "partial"):
            pass
        return frame


@pytest.fixture
def beside(zoo, monkeypatch):
    some = Beside(zoo, monkeypatch)
    yield some
    some.line.close()


async def test_a_tool_uses_the_engine_that_stays(zoo, beside):
    """With the answer of one's own engine; a model that a screen looks at is not replaced, and the refusal says how to ask for it; after a call nobody is there."""
    assert beside.end(beside.ask(Load("zoo", device="cpu"))).kind == "result"
    ask = {"kind": "z", "set": SET, "device": "cpu"}
    async with mcp.Client(tools.served(SharedEngine())) as client, mcp.Client(tools.served(zoo)) as alone:
        shared, own = await client.call_tool("sweep", ask), await alone.call_tool("sweep", ask)
        assert not shared.is_error and shared.content[0].text == own.content[0].text and shared.structured_content == own.structured_content
        refused = await client.call_tool("lens", {"model": "gpt2"})
        assert refused.is_error and "1 other screen looks" in words(refused) and "give model: zoo, device: cpu" in words(refused)
        assert beside.host.engine.loaded.model == "zoo"
        wrong = await client.call_tool("sweep", {"kind": "z", "corrupt": "one two", "device": "cpu"})
        assert wrong.is_error and "there is no answer" in words(wrong)
    until = time.monotonic() + 5
    while len(beside.host.scheduler.seats) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(beside.host.scheduler.seats) == 1 and not beside.host.scheduler.told() and not beside.host.scheduler.left


async def test_a_screens_questions_come_first_and_stay_its_own(zoo, beside, monkeypatch):
    """While a tool's sweep runs, a screen's lens is answered before it ends; a tool that is stopped cancels its own sweep alone."""
    beside.end(beside.ask(Load("zoo", device="cpu")))
    study, order = Study(tools.read(tools.commands(False)["lens"], {"set": SET}, False).study().prompt), []
    with SharedEngine() as engine:
        engine.run(Load("zoo", device="cpu"))

        def show(part: object) -> None:
            if not order:
                order.append(beside.ask(Sweep(study, "z"), "sweep"))
                order.append(beside.end(beside.ask(Lens(study), "lens", 0)).kind)
                raise UserError("stopped")

        with pytest.raises(UserError, match="stopped"):
            engine.run(Sweep(study, "z_pos", chunk_mb=1), show)
        assert order[1] == "result" and beside.end(order[0]).kind == "result"
        assert engine.run(Lens(study)) is not None


def test_without_the_package(monkeypatch, capsys):
    monkeypatch.setattr("techniques.agents.command.find_spec", lambda name: None)
    assert main(["mcp"]) == 2 and "uv sync --group mcp" in capsys.readouterr().err


@pytest.mark.table
async def test_over_stdin_and_stdout():
    from mcp.client.stdio import StdioServerParameters, stdio_client

    async with mcp.Client(stdio_client(StdioServerParameters(command=sys.executable, args=[str(ROOT / "engine.py"), "mcp"], cwd=ROOT))) as client:
        result = await client.call_tool("run", {"answer": [" Mary"], "foil": [" John"]})
        assert not result.is_error and result.structured_content["now"]["metric"]
