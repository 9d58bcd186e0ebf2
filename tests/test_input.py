"""Nothing typed or opened ends the program: every reader of the user's input gives a value or one line that says why not; an error no one foresaw is survived."""

import contextlib
import json
import random
import shutil
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ui import EngineDied, LocalClient, Wire, make_app, press, shown

import utils
from screen.early import words_of
from screen.keys import remapped
from screen.overlays import Editor, Picker, escape_line, unescape_line
from vocabulary.script import python_script
from screen.session import Session, State, apply, read_session
from techniques.circuits import drawings
from techniques.lens.requests import Lens
from techniques.output.requests import Run, RunResult
from techniques.shell import place_or_none, read_cells, read_command
from tui import TABLE, Loupe, first_state
from utils import ROOT
from vocabulary.circuit import Circuit, check_receivers, grouped, parse_edge, toggled
from vocabulary.typed import parse_json, read_text, user_path, whole_number
from vocabulary.nodes import UserError, parse_intervention, parse_node
from vocabulary.prompts import Metric, Prompt, Study, read_place, read_prompt, read_prompt_set
from vocabulary.requests import Load
from vocabulary.wire import Frame, encode, from_json, to_json

fixed = settings(deadline=None, derandomize=True, max_examples=60)
SPICE = "²³٣--5 9999999999999999999999 L0H1 prob@ ~nosuchuser/ ../ \x00 \x1b \ud83d 0x1 1e999 nan { [ \" ' \\ @ = : -> |".split(" ")
texts = st.text(st.characters(exclude_categories=()), max_size=12)
typed = st.lists(texts | st.sampled_from(SPICE) | st.integers().map(str), max_size=4).map("".join) | st.sampled_from(
    ["9" * 5000, "x" * 300, "/" * 5000, "[" * 3000]
)
jsons = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | typed,
    lambda some: (
        st.lists(some, max_size=3)
        | st.dictionaries(st.sampled_from(["clean", "corrupt", "answer", "labels", "alignment", "nodes", "name"]) | texts, some, max_size=4)
    ),
    max_leaves=8,
)


def refused_or(read, *args) -> object:
    """What `read` gives, or the line of its UserError: one line, that can be printed."""
    try:
        return read(*args)
    except UserError as error:
        assert str(error) and len(str(error)) < 6000
        utils.printable(str(error)).encode("utf-8")
        return None


# ------------------------------------------------------------------ what is typed

READERS = [
    parse_node, parse_intervention, parse_edge, read_place, place_or_none, whole_number, words_of, user_path, parse_json,
    lambda text: read_cells((text,)), lambda text: check_receivers((text,)), lambda text: toggled(Circuit(), text), lambda text: grouped(Circuit(), text, (text,)),
    lambda text: read_prompt_set(text), lambda text: drawings.read_circuit(text), lambda text: read_session(text), lambda text: remapped(text, TABLE),
]  # fmt: skip


@pytest.mark.parametrize("read", READERS, ids=lambda r: r.__code__.co_names[-1] if r.__name__ == "<lambda>" else r.__name__)
def test_readers_of_typed_text(read):
    @fixed
    @given(typed)
    def each(text):
        refused_or(read, text)

    each()


@fixed
@given(typed)
def test_the_editor_never_makes_half_a_character(text):
    clean = text.encode("utf-8", "ignore").decode()
    unescape_line(clean).encode("utf-8")
    assert unescape_line(escape_line(clean)) == clean
    assert unescape_line(r"\u{d83d}") == r"\u{d83d}"


@fixed
@given(st.sampled_from([*State.__dataclass_fields__, "metric", "go", "intervene", "keep", "group", "combine", "put_circuit", "open_set"]), st.dictionaries(st.sampled_from(["kind", "pos", "value", "name", "to", "part", "nodes", "prompt", "circuit", "load", "path", "prompts", "index", "how", "addresses"]), jsons, max_size=3))  # fmt: skip
def test_any_action_gives_a_state_that_can_be_sent(name, args):
    state = refused_or(apply, State(), name, args)
    if state is not None:
        encode(Frame("ask", body=Run(state.study)))
        json.dumps(to_json(state)).encode("utf-8")


async def test_a_metrics_position(tmp_path):
    app = make_app(Silent(False), tmp_path, first_state({}))
    async with app.run_test(size=(80, 24)) as pilot:
        for pos in ("²", "--5", "9" * 22, "9" * 5000, "-", "a b", "\ud83d", "@"):
            with pytest.raises(UserError, match="is not a position"):
                apply(State(), "metric", {"kind": "prob", "pos": pos})
            await pilot.press("m")
            await pilot.pause()
            app.query_one(Picker).field.value = f"prob@{pos}"
            await pilot.press("enter")
            await pilot.pause()
            assert "is not a position" in app.status[0][0] and app.state.metric == Metric()


@settings(fixed, max_examples=25)
@given(st.sampled_from(["--clean", "--answer", "--do", "--pos", "--set", "--circuit", "--out", "--model", "--device", "--sae", "--k"]), typed)
def test_words_of_a_command(option, text):
    command = None
    with contextlib.suppress(SystemExit):  # tyro's own line about an option
        command = read_command(["run", "--clean", "a b", option, text])
    if command is not None:
        request = refused_or(command.request)
        refused_or(command.load)
        if request is not None and text.isprintable():
            encode(Frame("ask", body=request))


def test_the_command_line_says_what_is_not_utf8(capsys):
    import engine as program

    assert program.main(["run", "--clean", "caf\udce9"]) == 2
    assert "word 3 of the command holds half a character" in capsys.readouterr().err


# ------------------------------------------------------------------ what is opened


@pytest.mark.parametrize("read", [read_prompt_set, lambda p: drawings.read_circuit(p), lambda p: remapped(str(p), TABLE)], ids=["set", "circuit", "keymap"])
def test_any_json_may_be_opened(read, tmp_path):
    file = tmp_path / "x.jsonl"

    @fixed
    @given(jsons)
    def each(obj):
        file.write_text(json.dumps(obj), encoding="utf-8")
        refused_or(read, file)

    each()
    for text in ("[" * 10_000 + "]" * 10_000, '{"clean": ' * 5000, "9" * 5000, '{"clean": "\\ud83d"}', '{"clean": 1e999}', "NaN", ""):
        file.write_text(text)
        with pytest.raises(UserError):
            read(file)


@fixed
@given(jsons)
def test_any_object_is_a_prompt_or_not(obj):
    prompt = refused_or(read_prompt, obj) if not isinstance(obj, str) or obj.isprintable() else None
    if prompt is not None and json.dumps(obj, ensure_ascii=False).isprintable():
        encode(Frame("ask", body=Run(Study(prompt))))
    for kind in (Prompt, Circuit, Load, tuple[Prompt, ...]):
        refused_or(from_json, obj, kind)


def test_what_a_file_is_refused_for(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"clean": "a"}\n{"clean": "caf\xe9"}\n'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.jsonl line 2 is not UTF-8 \(byte 0xe9 at column 15\): save the file as UTF-8"):
        read_prompt_set(latin)
    for path, why in (("~nosuchuser/x", "no user of that name"), ("x" * 300, "File name too long"), ("a\x00b", "null"), ("\ud83d", "half a character")):
        with pytest.raises(UserError, match=why):
            user_path(path)
    for path in (tmp_path, "/dev/null", "/dev/zero"):
        with pytest.raises(UserError, match="is not a file"):
            read_text(user_path(path))
    strange = tmp_path / "strange.jsonl"
    strange.write_text('{"clean": "one\u2028line"}\n', encoding="utf-8")
    assert read_prompt_set(strange)[0].clean == "one\u2028line"


def test_settings_that_can_not_be_read(tmp_path, monkeypatch):
    (tmp_path / ".env").write_bytes(b"LOUPE_MODEL=caf\xe9\n")
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        utils.settings(tmp_path)
    monkeypatch.setattr(utils, "settings", lambda: {"LOUPE_CACHE_MB": "²"})
    with pytest.raises(UserError, match="LOUPE_CACHE_MB in .env .* a number of megabytes"):
        utils.setting_of_megabytes("LOUPE_CACHE_MB", 512)


# ------------------------------------------------------------------ damage

FLIPS = 8  # of each file of a folder


def damage(data: bytes, seed: int) -> bytes:
    """A file with some bytes changed, cut, doubled, or of another kind."""
    r = random.Random(seed)
    match r.randrange(6):
        case 0:
            return data[: r.randrange(len(data) + 1)]
        case 1:
            return data.replace(b"1", r.choice([b"-1", b"1e999", b"NaN", b'"x"', b"9" * 30, b"null", b"[]"]), r.randrange(1, 4))
        case 2:
            return bytes(r.randrange(256) for _ in range(200))
        case 3:
            return b"[" * 5000 + data
        case 4:
            return data.replace(b'"', b"\x00", 1)
    changed = bytearray(data)
    for _ in range(r.randrange(1, 30)):
        changed[r.randrange(min(len(changed), 4000))] = r.randrange(256)
    return bytes(changed)


def test_damaged_sets_circuits_and_sessions(tmp_path):
    session = Session(State(), tmp_path / "session.jsonl")
    for name, args in (("metric", {"kind": "prob", "pos": -2}), ("intervene", {"intervention": "L0H1@-1=zero"}), ("keep", {"part": "L0H1->L1H2.q"})):
        session.do(name, **args)
    fixtures = ROOT / "tests" / "fixtures"
    files = [(fixtures / "few.jsonl", read_prompt_set), (fixtures / "circuit.json", drawings.read_circuit), (session.path, read_session)]
    for source, read in files:
        data = source.read_bytes()
        for seed in range(60):
            file = tmp_path / f"damaged{source.suffix}"
            file.write_bytes(damage(data, seed))
            got = refused_or(read, file)
            if read is read_session and got is not None:
                encode(Frame("ask", body=Run(got[0].state.study)))


@pytest.mark.slow
@pytest.mark.parametrize("what", ["sae", "lens", "model"])
def test_damaged_folders(engines, folders, tmp_path, what):
    """A changed weight may be read as it is; everything else is refused in one line, and the model that was there still answers."""
    from engine import Engine
    from techniques.features.requests import Preflight
    from techniques.lens.requests import TuneLens

    model = str(folders["gpt2"])
    engine = Engine(model)
    study = Study(Prompt("When Mary and John went", None, (" Mary",), (" John",)))
    if what == "lens":
        engine.run(TuneLens("", str(tmp_path / "good"), 1, batch=2, length=8))
    source = {"sae": ROOT / "zoo" / "saes" / "L1.resid_post", "lens": tmp_path / "good", "model": folders["gpt2"]}[what]
    if what == "sae":
        engine = engines["zoo"]
    for name in sorted(p.name for p in source.iterdir() if p.suffix in (".json", ".safetensors") and p.name != "generation_config.json"):
        for seed in range(FLIPS):
            folder = shutil.copytree(source, tmp_path / f"{name}-{seed}")
            (folder / name).write_bytes(damage((source / name).read_bytes(), seed))
            ask = {"sae": Preflight(study, str(folder)), "lens": Lens(study, kind="tuned", artefact=str(folder)), "model": Load(str(folder))}[what]
            refused_or(engine.run, ask)
            shutil.rmtree(folder)
    assert engine.run(Run(study)).now.metric is not None if what != "model" else Engine(model).run(Run(study)).now.metric is not None


@pytest.mark.parametrize("kind", ["tuned", "jacobian"])
def test_a_pickle_that_could_run_a_program(engines, tmp_path, kind):
    import os

    import torch as t

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was here"),)

    info = engines["zoo"].model.info
    t.save({"J": Evil(), "jacobians": Evil()}, tmp_path / "params.pt")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": info.d_model, "num_hidden_layers": info.n_layers}))
    with pytest.raises(UserError) as error:
        engines["zoo"].run(Lens(Study(Prompt("a b")), kind=kind, artefact=str(tmp_path / ("" if kind == "tuned" else "params.pt"))))
    assert "could run any program" in str(error.value) and "weights_only" not in str(error.value) and not (tmp_path / "was here").exists()


# ------------------------------------------------------------------ exported scripts

NAMES = [
    'x"""\nimport os; os.mkdir("was here")\n"""',
    "x'''\nimport os; os.mkdir('was here')\n'''",
    "a\\",
    "{name} %s \u202e\u2028\x00",
    '";os.mkdir("was here");"',
]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_scripts_with_hostile_names(engines, tmp_path, monkeypatch, capsys, name):
    """They compile, run, and do nothing but what they are for."""
    import torch as t

    monkeypatch.chdir(tmp_path)
    zoo = engines["zoo"]
    info = replace(zoo.model.info, name=name)
    prompt = Prompt(f"When Mary {name} John went", f"When Mary {name} Tom went", (" Mary",), (" John",))
    prompts = (prompt, replace(prompt, clean=prompt.clean + " on", corrupt=prompt.corrupt + " on"))
    state = State(prompt=prompt, prompt_set=prompts[:1], interventions=(parse_intervention("L1H1=mean"),), set_path=name)
    run = zoo.run(Run(state.study))
    circuit = Circuit(name, name, ("L0H1", "L1.mlp"), (), {name: ("L0H1",)}, name)
    edges = Circuit(name, name, ("L0H1", "L3H2"), ("embed->L0H1.q", "L0H1->L3H2.v", "L3H2->logits"), {}, name)
    scripts = [python_script(state, info, run)]
    scripts += [drawings.circuit_script(c, Study(prompt), info, Load("zoo"), "patch") for c in (circuit, edges)]
    grad = t.is_grad_enabled()
    try:
        for code in scripts:
            exec(compile(code, "exported.py", "exec"), {})
    finally:
        t.set_grad_enabled(grad)
    out = capsys.readouterr().out
    assert f"{run.now.metric:.4f}"[:6] in out and out.count("faithfulness") == 2 and not (tmp_path / "was here").exists()
    for text in (drawings.dot(circuit), drawings.mermaid(circuit), drawings.table(circuit), "\n".join(drawings.draw(circuit))):
        text.encode("utf-8")
    assert len(drawings.table(circuit).splitlines()) == 3 and all(len(row.split("\t")) == 4 for row in drawings.table(circuit).splitlines())


# ------------------------------------------------------------------ errors that no one foresaw


class Silent(LocalClient):
    """An engine that is loading for ever, or is dead."""

    def __init__(self, dead: bool):
        super().__init__(None)
        self.dead = dead

    async def ask(self, slot, request, priority=1, on_partial=None):
        if self.dead:
            raise EngineDied("the engine died")
        import asyncio

        await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("dead", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_every_key_before_there_is_a_model(tmp_path, monkeypatch, dead):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Loupe, "action_suspend_process", lambda app: None)
    app = make_app(Silent(dead), tmp_path, first_state({}))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        for action in TABLE:
            if action.id != "quit":
                app.action_do(action.id)
                await pilot.pause()
                while app.focused is not None and app.query("Overlay"):
                    await pilot.press("escape")
        assert app.is_running and "Mary" in shown(app)


@pytest.mark.parametrize("where", ["action", "reply", *(pytest.param(w, marks=pytest.mark.slow) for w in ("editor", "picker", "timer", "worker", "paint"))])
async def test_an_error_that_no_one_foresaw(engines, tmp_path, monkeypatch, where):
    """One line on the screen, all of it in a file, and the next key works; a test sees it as it is."""

    def fail(*args):
        raise ZeroDivisionError(f"in the {where}")

    async def fail_later():
        fail()

    async def cause(app, pilot):
        match where:
            case "action":
                app.guard(lambda: None)
                monkeypatch.setattr(app, "table", tuple(replace(a, do=fail) if a.id == "zoom" else a for a in app.table))
                await press(app, pilot, "+")
            case "editor":
                app.open(Editor("x", [("a", "b")], fail))
                await press(app, pilot, "enter", "escape")
            case "picker":
                app.open(Picker("x", [], fail, free=True, start="y"))
                await press(app, pilot, "enter")
            case "reply":
                app.requests.ask("x", Run(app.study), fail)
                await press(app, pilot)
            case "timer":
                app.set_timer(0.01, fail)
                await pilot.pause(0.1)
            case "worker":
                app.run_worker(fail_later)
                await press(app, pilot)
            case "paint":
                with monkeypatch.context() as m:
                    m.setattr(app.panes[app.pane], "paint", fail)
                    await press(app, pilot, "[")

    app = make_app(engines["zoo"], tmp_path, first_state({}), driver_class=Wire)
    app.client.log = tmp_path / "engine.log"
    async with app.run_test(size=(120, 36), headless=False) as pilot:
        await press(app, pilot)
        await cause(app, pilot)
        story = (tmp_path / "screen.log").read_text()
        assert f"ZeroDivisionError: in the {where}" in story and "def fail" not in story and "in fail" in story
        assert "a fault of the program: ZeroDivisionError" in app.status[0][0] and "screen.log" in app.status[0][0]
        await press(app, pilot, "3")
        assert app.pane == "output" or app.pane != "lens"
        assert app.requests.result("run", RunResult) is not None and app.is_running
    with pytest.raises(Exception, match="in the"):
        app = make_app(engines["zoo"], tmp_path, first_state({}))
        async with app.run_test(size=(120, 36)) as pilot:
            await press(app, pilot)
            await cause(app, pilot)
