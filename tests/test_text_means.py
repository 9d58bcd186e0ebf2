"""Means over a text against Hugging Face's own runs of its windows: as interventions, in sweeps, outside a circuit, of features; on disk; what is refused."""

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, PROMPT
from model.artefacts import fingerprint
from ui import make_app, press, shown

from screen.overlays import Editor
from screen.session import read_session
from techniques.circuits.requests import Score
from techniques.generation.requests import Generate, Sampling
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from tui import first_state
from vocabulary.circuit import Circuit
from vocabulary.files import folder
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import ReferenceText, Study

DEFAULT = ("gemma2",)
families = pytest.mark.parametrize("arch", [pytest.param(a, marks=[] if a in DEFAULT else pytest.mark.table) for a in ARCHS])
WORDS = "When Mary and Tom went to school, Anna gave milk to Tom. then she went to the store and gave it to Mary. red green blue school " * 6


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def study(file, *done: str, tokens: int = 120, **kw) -> Study:
    return Study(PROMPT, tuple(map(parse_intervention, done)), text=ReferenceText(str(file), tokens), **kw)


def rows_of(engine, tokens: int, length: int, whole: bool) -> list[tuple[int, ...]]:
    """The windows, cut here once more."""
    model = engine.model
    bos = (model.bos,) * model.info.default_bos
    ids = model.encode(WORDS)[0][:tokens]
    own = length - len(bos)
    return [(*bos, *ids[i : i + own]) for i in range(0, len(ids), own) if len(ids[i : i + own]) == own or not whole]


@families
def test_interventions_and_sweeps(engine, reference, file):
    ids = engine.run(Run(study(file))).clean.tokens.ids
    n = len(ids)
    everywhere = t.cat([reference.read(r, ("mlp", 1))[0, 1:] for r in rows_of(engine, 120, min(128, engine.model.info.n_ctx), False)]).mean(0)
    by_position = t.stack([reference.read(r, ("mlp", 1))[0] for r in rows_of(engine, 120, n, True)]).mean(0)
    for op, value in (("mean_text", everywhere.expand(n, -1)), ("mean_text_pos", by_position)):
        found = engine.run(Run(study(file, f"L1.mlp={op}"), k=5))
        logits = reference.run([ids], [(("mlp", 1), lambda x, v=value: x.copy_(v[None]))])[0][0]
        np.testing.assert_allclose(found.now.top_logits, np.sort(logits, -1)[:, :-6:-1], atol=1e-4, rtol=1e-4)
        assert f"text {file.name} " in found.convention and "its first 120 tokens" in found.convention
        sweep = engine.run(Sweep(study(file), "mlp", op))
        assert "its first 120 tokens" in sweep.convention
        row, col = next((r, c) for r in range(len(sweep.rows)) for c in range(len(sweep.cols)) if sweep.address(r, c) == "L1.mlp@4")
        one = engine.run(Run(study(file, f"L1.mlp@4={op}"))).now.metric
        assert sweep.values[row, col] == pytest.approx(one, abs=1e-4)


def test_outside_a_circuit(engines, file):
    """What is left out carries the text's mean: each node that is not kept, as an intervention."""
    engine = engines["zoo"]
    kept = ("L0H0", "L3H1", "L2H2")
    nodes = [f"L{layer}H{h}" for layer in range(4) for h in range(4) if f"L{layer}H{h}" not in kept]
    found = engine.run(Score(study(file), Circuit("c", "zoo", kept), ("faithfulness",), "mean_text"))
    want = engine.run(Run(study(file, *(f"{n}=mean_text" for n in nodes)))).now.metric
    assert found.alone.mean == pytest.approx(want, abs=1e-4)
    assert "its first 120 tokens" in found.convention


def test_on_disk(engines, file, monkeypatch):
    """The second time it is read, also by another process; another text, model or number of tokens is another mean."""
    engine = engines["zoo"]
    engine.model.cache.items.clear()
    first = engine.run(Run(study(file, "L1.mlp=mean_text"))).now.metric
    (kept,) = folder("means").glob("*.safetensors")
    engine.model.cache.items.clear()

    def never(*args):
        raise AssertionError("the mean is on disk")

    with monkeypatch.context() as m:
        m.setattr("model.replacements.averaged", never)
        assert engine.run(Run(study(file, "L1.mlp=mean_text"))).now.metric == first
    kept.write_bytes(b"broken")
    engine.model.cache.items.clear()
    assert engine.run(Run(study(file, "L1.mlp=mean_text"))).now.metric == first
    assert engine.run(Run(study(file, "L1.mlp=mean_text", tokens=60))).now.metric != first
    file.write_text(WORDS.replace("Tom", "Mary"))
    assert engine.run(Run(study(file, "L1.mlp=mean_text"))).now.metric != first
    found = engine.run(Generate(study(file, "L1.mlp=mean_text"), Sampling(tokens=3)))
    assert len(found.runs) == 2, "a new token gets the mean too"


def test_every_weight_counts_in_the_fingerprint(engines):
    """It keys what is kept on disk: one changed number is another model, and back is the same."""
    model = engines["zoo"].model
    weight = max(model.bridge.original_model.parameters(), key=lambda p: p.numel())

    def now() -> str:
        model.notes.measured.pop(("fingerprint", None), None)
        return fingerprint(model)

    first, held = now(), weight.data[7, 3].clone()
    with t.no_grad():
        weight[7, 3] += 0.5
        changed = now()
        weight[7, 3] = held
    assert changed != first == now()


@pytest.mark.parametrize(
    "done, text, words",
    [
        ("L1.mlp=mean_text", ReferenceText(), "needs one: --mean-text FILE"),
        ("L1.mlp=mean_text", ReferenceText("/nowhere.txt"), "there is no text file /nowhere.txt"),
        ("L1.mlp=mean_text_pos", ReferenceText("FILE", 3), "a row needs"),
        ("L1.mlp=mean_text", ReferenceText("FILE", 0), "0 tokens of a text"),
        ("L1.mlp=mean_text", ReferenceText("FILE", 500, "00000000"), "has changed since it was chosen"),
        ("L1H1.pattern=mean_text", ReferenceText("FILE", 500), "a pattern has no mean over positions"),
    ],
)
def test_refusals(engines, file, done, text, words):
    text = ReferenceText(text.path.replace("FILE", str(file)), text.tokens, text.digest)
    with pytest.raises(UserError, match=words):
        engines["zoo"].run(Run(Study(PROMPT, (parse_intervention(done),), text=text)))


async def test_on_the_screen(engines, file, tmp_path):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "A", *"mean_text", "enter")
        editor = app.query_one(Editor)
        editor.fields[0].value, editor.fields[1].value = str(file), "0"
        await press(app, pilot, "enter")
        assert "a positive whole number" in shown(app)
        editor.fields[1].value = "150"
        await press(app, pilot, "enter")
        assert "its first 150 tokens" in shown(app) and app.state.text.digest
        await press(app, pilot, "a")
        assert app.state.interventions[0].op == "mean_text" and "now" in shown(app)
        await press(app, pilot, "u", "u")
        assert app.state.text.path == ""
        await press(app, pilot, "a")
        assert "A, then text, names it" in shown(app)
        await press(app, pilot, "ctrl+r")
    assert read_session(app.session.path)[0].state.text == app.state.text
