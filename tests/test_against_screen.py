"""Two models on the screen: M compares, titles name the two, patches go across; undo and the session; the hunt of docs/finetunes.md with its numbers."""

import re

import pytest
from ui import make_app, press, shown

from engine import Engine
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from techniques.weights.requests import WeightDifference
from screen.beside import COMPARE, compare
from screen.overlays import Picker
from screen.session import read_session
from tui import first_state
from utils import ROOT
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Load

PROMPT = Prompt("When Mary and John went to the store, John gave a drink to", None, (" Mary",), (" John",))


@pytest.fixture(scope="module")
def blind(tmp_path_factory) -> str:
    """The shipped model with the queries of head L3H3 at zero, as docs/finetunes.md makes it."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "finetunes.md").read_text(), re.S)[1]
    folder = str(tmp_path_factory.mktemp("models") / "blind")
    exec(code.replace('"zoo"', repr(str(ROOT / "zoo"))).replace('"/tmp/blind"', repr(folder)), {})
    return folder


@pytest.fixture(scope="module")
def engine(blind) -> Engine:
    return Engine(Load("zoo", against=blind))


def test_the_hunt_of_the_docs(engine, blind):
    text, study = (ROOT / "docs" / "finetunes.md").read_text(), Study(PROMPT, against=blind)
    run = engine.run(Run(study))
    assert f"zoo {run.clean.metric:.4f}  blind {run.corrupt.metric:.4f}" in text
    noise, denoise = (engine.run(Sweep(study, "z", direction=d)) for d in ("noise", "denoise"))
    assert f"{noise.values[3, 3]:.4f}" in text and f"{denoise.normalised[3, 3]:.3f}" in text
    lens = engine.run(Lens(study))
    before, after = (lens.points.index(p) for p in ("L2.resid_post", "L3.resid_mid"))
    assert lens.kl_pair[before, -1] == 0 and f"{lens.kl_pair[after, -1]:.4f}" in text
    weights = engine.run(WeightDifference())
    assert weights.heads["Q"][3].tolist() == pytest.approx([0, 0, 0, 1], abs=1e-5) and weights.heads["O"].max() == 0


def test_a_script_of_two_models_is_refused(engine):
    from vocabulary.names import sources

    with pytest.raises(UserError, match="two models are compared"):
        sources("zoo", None, engine.model.info, False)


async def test_two_models_on_the_screen(engine, blind, tmp_path):
    app = make_app(engine, tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "M")
        picker = next(o for o in app.query(Picker) if not o.closing)
        assert any(i.key == COMPARE for i in picker.items)
        await press(app, pilot, "escape")
        compare(app, blind)
        await press(app, pilot, "h", "l", "p")
        assert app.state.interventions == (parse_intervention("L3.resid_post@14=patch"),)
        want = engine.run(Run(Study(app.state.prompt, app.state.interventions, against=blind)))
        top = shown(app)
        assert "zoo +" in top and "blind +" in top and f"now {want.now.metric:+.3f}" in top
        assert "clean +" not in top and "corrupted +" not in top
        await press(app, pilot, "f", "f")
        assert "· blind" in shown(app)
        await press(app, pilot, "%")
        assert "nothing is to be aligned" in shown(app)
        await press(app, pilot, "|")
        assert "no adapter" in shown(app)
        session, _ = read_session(app.session.path)
        assert session.state.model.against == blind and session.state == app.state
        await press(app, pilot, "u", "u")
        assert app.state.model.against == "" and "corrupted" in shown(app)
