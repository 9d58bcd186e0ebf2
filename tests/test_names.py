"""The names of models: every alias of TransformerLens is the model; a choice by `M` with its size; what is made for one name belongs to the others."""

import subprocess
import sys

import huggingface_hub
import pytest
from transformer_lens.loading_from_pretrained import make_model_alias_map

from engine import Engine
from model import catalogue, loading
from model.sae_catalogue import trained_on
from screen.models import size
from techniques.circuits.compare import compare
from techniques.circuits.requests import Compare
from ui import make_app, press, shown
from utils import ROOT
from vocabulary.circuit import Circuit, combined
from vocabulary.names import aliases, by_alias, canonical, same_model, spellings
from vocabulary.nodes import UserError
from vocabulary.requests import Load, ModelChoice, Models, ModelsResult, Progress
from vocabulary.sizes import Room, ways


def drained(steps):
    """What a generator returns, and what it yielded."""
    parts = []
    while True:
        try:
            parts.append(next(steps))
        except StopIteration as stop:
            return stop.value, parts


def test_every_alias_is_its_model():
    """TransformerLens's own map, name by name; and the hub's second name of the models that have no owner there."""
    theirs = make_model_alias_map()
    assert theirs.items() <= by_alias().items()
    assert {n: m for n, m in by_alias().items() if n not in theirs} == {
        f"{o}/{n}": n for o, n in [("distilbert", "distilgpt2"), *(("openai-community", f"gpt2{s}") for s in ("", "-medium", "-large", "-xl"))]
    }
    for name in ("gpt2-small", "GPT2-Small", "openai-community/gpt2", "gpt2"):
        assert canonical(name) == "gpt2" and spellings(name) == ("gpt2", "openai-community/gpt2")
    assert canonical("pythia-410m") == "EleutherAI/pythia-410m" and canonical("gemma-2b") == "google/gemma-2b"
    assert [canonical(n) for n in ("zoo", "someone/gpt2-small", "/models/gpt2-small", "")] == ["zoo", "someone/gpt2-small", "/models/gpt2-small", ""]


def test_names_are_read_without_torch_and_at_no_start():
    code = "import sys, tui; assert 'supported_models' not in sys.modules; from vocabulary.names import canonical; canonical('gpt2-small'); "
    done = subprocess.run([sys.executable, "-c", code + "sys.exit(bool({'torch', 'transformer_lens'} & set(sys.modules)))"], cwd=ROOT)
    assert done.returncode == 0


@pytest.fixture
def hub(tmp_path, monkeypatch, folders):
    """A hub cache with GPT-2 under its owner's name, and of a Pythia the config alone."""
    for name, files in (("openai-community--gpt2", sorted(folders["gpt2"].iterdir())), ("EleutherAI--pythia-70m", [folders["neox"] / "config.json"])):
        repo = tmp_path / "hub" / f"models--{name}"
        snapshot = repo / "snapshots" / ("a" * 40)
        snapshot.mkdir(parents=True)
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("a" * 40)
        for file in files:
            (snapshot / file.name).symlink_to(file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading.huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["gpt2-small", "openai-community/gpt2"])
def test_an_alias_loads(hub, name):
    """Under one name, whatever was typed; the same model under another name is not read again."""
    engine = Engine(name)
    assert engine.model.info.name == "gpt2"
    before = engine.model
    assert engine.run(Load("gpt2")) == before.info and engine.model is before


def test_a_folder_of_an_aliass_name_comes_first(tmp_path, monkeypatch, folders):
    (tmp_path / "gpt2-small").symlink_to(folders["llama"])
    monkeypatch.chdir(tmp_path)
    assert loading.resolved(Load("gpt2-small", "pythia-70m")) == Load("gpt2-small", "EleutherAI/pythia-70m")
    assert drained(loading.find_folder("gpt2-small"))[0].resolve() == folders["llama"]


def test_what_is_made_for_one_name_belongs_to_the_others():
    assert trained_on("gpt2-small") == trained_on("openai-community/gpt2") == trained_on("models/gpt2-small") == "gpt2"
    assert same_model("pythia", "EleutherAI/pythia-70m") and not same_model("pythia-70m", "pythia-70m-deduped") and same_model("", "gpt2")
    one, other = Circuit("a", "gpt2-small", ("L0H0",)), Circuit("b", "openai-community/gpt2", ("L0H1",))
    assert combined(one, other, "union", "c").nodes == ("L0H0", "L0H1")
    assert compare(Compare(one, published="ioi")) is not None
    with pytest.raises(UserError, match="is a circuit of gpt2-small and b one of gpt2-medium"):
        combined(one, Circuit("b", "gpt2-medium", ("L0H1",)), "union", "c")


def test_models_with_their_sizes(hub, folders):
    """Names first; sizes by weights, config or table, exactly; blanks where none is at hand."""
    result, parts = drained(Engine().jobs(Models("bfloat16", "cpu")))
    first = parts[0]
    assert isinstance(first, ModelsResult) and [c.name for c in first.choices] == [c.name for c in result.choices] and result.room.free > 1 << 20
    assert any(isinstance(p, Progress) for p in parts)
    found = {c.name: c for c in result.choices}
    assert set(found) >= set(aliases()) | {"zoo"}
    count = lambda folder: sum(p.numel() for p in loading.transformers.AutoModelForCausalLM.from_pretrained(folder).parameters())  # noqa: E731
    gpt2, pythia, gemma, large = (found[n] for n in ("gpt2", "EleutherAI/pythia-70m", "google/gemma-2b", "gpt2-large"))
    assert (gpt2.where, gpt2.n_layers, gpt2.n_heads, gpt2.n_params, gpt2.at_least) == ("hub cache", 3, 4, count(folders["gpt2"]), False)
    assert "gpt2-small" in gpt2.aliases and gpt2.need == 2 * gpt2.n_params and gpt2.dtype == "bfloat16"
    assert (pythia.where, pythia.n_layers, pythia.n_params) == ("hub", 3, count(folders["neox"]))
    assert (gemma.n_layers, gemma.n_heads, gemma.at_least) == (18, 8, True) and 2_506_172_416 - gemma.n_params == 37 * 2048  # its norms
    assert (large.n_layers, large.n_params, large.need) == (0, 0, 0)


def test_sizes_in_words():
    some = ModelChoice("m", "hub", "", (), 18, 8, 2_506_000_000, True, "bfloat16", 5_012_000_000)
    assert size(some, ModelsResult((), Room("cpu", 4_000_000_000))) == "18×8  ≥ 2,506 M  ≥ 5.0 GB, 1.0 GB too much"
    assert size(ModelChoice("m", "hub", "needs download"), ModelsResult(())) == "needs download"
    one = Room("cuda:0", 8 * 10**9, 8 * 10**9, 64 * 10**9)
    assert ways(12 * 10**9, "float32", one) == [
        ("dtype=bfloat16", "6.0 GB of 8.0 GB, which fits"),
        ("device=cpu", "in this machine's memory, slower: 12.0 GB of 64.0 GB, which fits"),
    ]
    assert [option for option, _ in ways(20 * 10**9, "bfloat16", Room("cuda:0", 8 * 10**9, 16 * 10**9, 64 * 10**9))] == ["device_map=auto", "device=cpu"]
    assert "still 2.0 GB too much" in ways(12 * 10**9, "float32", Room("cpu", 4 * 10**9))[0][1]


async def test_a_model_that_is_too_large_is_asked_about(engines, tmp_path, monkeypatch):
    """M says by how much, and its ways out are loads."""
    monkeypatch.setattr(catalogue, "room", lambda device, held: Room("cpu", 1_000_000))
    app = make_app(engines["zoo"], tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "M")
        await pilot.press(*"zoo")
        await pilot.pause()
        assert "4×4" in shown(app) and "too much" in shown(app)
        await press(app, pilot, "enter")
        assert "too large in float32" in shown(app) and "dtype=bfloat16" in shown(app) and "as it is" in shown(app)
