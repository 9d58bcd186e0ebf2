"""Metrics of one's own: a function's value against the same function on Hugging Face's logits, in runs, sweeps and estimates; errors of the file; the session."""

import json

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, CLEAN, CORRUPT, PROMPT
from ui import make_app, press, reply, shown

import engine as program
from model import own_metric
from screen import prompts
from screen.session import read_session
from techniques.circuits.requests import Score
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from tui import first_state
from vocabulary import chosen
from vocabulary.circuit import Circuit
from vocabulary.files import folder
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Metric, Study

DEFAULT = ("gemma2",)
families = pytest.mark.parametrize("arch", [pytest.param(a, marks=[] if a in DEFAULT else pytest.mark.table) for a in ARCHS])
TEXT = '''"""Metrics."""
import torch as t


def margin(logits, tokens):
    """Of the last token over the first, at the last and the middle position."""
    logp = logits.log_softmax(-1)
    return logp[0, -1, tokens[0, 2]] - logp[0, 5, tokens[0, 3]] + logits[0, 1].std()


def hard(logits, tokens):
    return float((logits[0, -1] > logits[0, -1, tokens[0, 2]]).sum())


def wrong(logits, tokens):
    x = logits[0, 10**6]
    return x


def many(logits, tokens):
    return logits[0, -1]


def words(logits, tokens):
    return "no"


def _own(logits, tokens):
    return 0
'''


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(TEXT)
    return path


def study(file, name: str = "margin", *done: str) -> Study:
    return Study(PROMPT, tuple(map(parse_intervention, done)), metric=Metric("own", own=f"{file}:{name}"))


def value(file, reference, ids, name: str = "margin", edits=()) -> float:
    """The function itself, on Hugging Face's logits."""
    space: dict = {}
    exec(file.read_text(), space)
    return float(space[name](t.tensor(reference.run([ids], edits)[0]), t.tensor([ids])))


@families
def test_runs_sweeps_and_estimates(engine, reference, file):
    found = engine.run(Run(study(file, "margin", "L1H2=zero"), k=1))
    ids, theirs = found.clean.tokens.ids, found.corrupt.tokens.ids

    def silence(x):
        x[..., reference.columns("z", 2)] = 0

    want = value(file, reference, ids), value(file, reference, theirs), value(file, reference, ids, edits=[(("z", 1), silence)])
    np.testing.assert_allclose([found.clean.metric, found.corrupt.metric, found.now.metric], want, atol=1e-4)
    assert "margin (mine.py " in found.convention

    sweep = engine.run(Sweep(study(file), "resid_post", "patch", "denoise"))
    assert (sweep.clean, sweep.corrupt) == pytest.approx(want[:2], abs=1e-4)
    clean = reference.read(ids, ("resid_post", 1))
    row, col = next((r, c) for r, name in enumerate(sweep.rows) for c in range(len(sweep.cols)) if sweep.address(r, c) == "L1.resid_post@10")
    patched = value(file, reference, theirs, edits=[(("resid_post", 1), lambda x: x[:, 10].copy_(clean[0, 10]))])
    assert sweep.values[row, col] == pytest.approx(patched, abs=1e-4)

    got = engine.run(Estimate(study(file), "resid_post", "atp", "denoise"))
    x = reference.read(theirs, ("resid_post", 1)).clone().requires_grad_()
    with t.enable_grad():
        hook = reference.place("resid_post", 1)[0].register_forward_hook(lambda m, a, out: (x, *out[1:]) if isinstance(out, tuple) else x)
        space: dict = {}
        exec(file.read_text(), space)
        y = space["margin"](reference.hf(t.tensor([theirs]), use_cache=False).logits, t.tensor([theirs]))
        hook.remove()
        (g,) = t.autograd.grad(y, x)
    linear = y.item() + (g[0, 10] * (clean[0, 10] - x.detach()[0, 10])).sum().item()
    assert got.values[row, col] == pytest.approx(linear, abs=1e-3)


def test_what_has_no_gradient(engines, file):
    engine = engines["zoo"]
    assert engine.run(Sweep(study(file, "hard"), "z", "zero")).values.shape
    with pytest.raises(UserError, match="hard of mine.py has no gradient"):
        engine.run(Estimate(study(file, "hard"), "z"))
    with pytest.raises(UserError, match="a metric of your own has none"):
        engine.run(Score(study(file), Circuit("c", "zoo", ("L1H2",))))


@pytest.mark.parametrize(
    "text, name, words",
    [
        (TEXT, "wrong", r"mine.py line 16: IndexError: "),
        (TEXT, "many", r"many returns a tensor of shape \[\d+\]; a metric is one number"),
        (TEXT, "words", "words returns no number"),
        (TEXT, "other", "mine.py has no function 'other': it has margin, hard, wrong, many, words"),
        (TEXT, "_own", "has no function '_own'"),
        ("def f(:\n", "f", "mine.py line 1: "),
        ("import torch\n\nraise ValueError('no')\n", "f", "mine.py line 3: ValueError: no"),
        ("import sys\nsys.exit(3)\n", "f", "mine.py line 2: SystemExit: 3"),
        ("def f(logits):\n    return 0\n", "f", "mine.py line"),
    ],
)
def test_errors_of_the_file(engines, tmp_path, text, name, words):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=words) as found:
        engines["zoo"].run(Run(study(path, name)))
    assert "\n" not in str(found.value)


def test_a_changed_file_is_not_run(engines, file):
    engine = engines["zoo"]
    digest = engine.run(Run(study(file))).convention.split("mine.py ")[1][:8]
    pinned = Study(PROMPT, metric=Metric("own", own=f"{file}:margin", digest=digest))
    engine.run(Run(pinned))
    file.write_text(TEXT + "\n")
    with pytest.raises(UserError, match=f"mine.py has changed since this metric was chosen \\({digest}, now "):
        engine.run(Run(pinned))
    for own in ("", "margin", "/nowhere/x.py:f"):
        with pytest.raises(UserError):
            engine.run(Run(Study(PROMPT, metric=Metric("own", own=own))))


def test_from_the_shell(engines, references, monkeypatch, capsys, file):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    words = ["run", "--clean", CLEAN, "--corrupt", CORRUPT]
    assert program.main([*words, "--own", f"{file}:margin", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["clean"]
    assert found["metric"] == pytest.approx(value(file, references["zoo"], tuple(found["tokens"]["ids"])), abs=1e-4)
    assert program.main([*words, "--metric", "own"]) == 2
    assert "--metric own needs --own FILE.py:NAME" in capsys.readouterr().err


async def test_on_the_screen(engines, tmp_path, file, monkeypatch):
    monkeypatch.setattr(prompts, "settings", lambda: {"LOUPE_METRICS": str(file)})
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "m")
        assert "Of the last token over the first" in shown(app)
        await press(app, pilot, *"margin", "enter")
        assert "margin (mine.py " in shown(app) and app.state.metric.digest
        want = engines["zoo"].run(Run(study(file))).clean.metric
        assert reply(app, "run").clean.metric == pytest.approx(want, abs=1e-6)
        await press(app, pilot, "u")
        assert app.state.metric.kind == "logit_diff"
        await press(app, pilot, "m", *f"{file}:hard", "enter")
        assert "hard (mine.py " in shown(app)
        await press(app, pilot, "m", *"/nowhere/x.py:f", "enter")
        assert "there is no file /nowhere/x.py" in shown(app)
    assert read_session(app.session.path)[0].state.metric == app.state.metric
    elsewhere = make_app(engines["zoo"], tmp_path, read_session(app.session.path)[0].state)
    chosen.known.clear()
    folder(chosen.FILE).unlink()  # another's machine, or another's session
    ran = []
    monkeypatch.setattr(own_metric, "read", lambda metric: ran.append(metric))
    async with elsewhere.run_test(size=(160, 36)) as pilot:
        await press(elsewhere, pilot)
        assert "is code that this session names: m chooses it and lets it run" in shown(elsewhere) and not ran
