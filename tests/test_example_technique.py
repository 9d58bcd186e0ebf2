"""docs/example_technique, found through LOUPE_TECHNIQUES alone: in Python, over the wire, from the shell and on the screen. A template for others' tests."""

import io
import json
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy as np
import pytest
from conftest import PROMPT
from ui import LocalClient, grid, press, reply, shown

import engine as program
import techniques
from screen import session
from utils import ROOT, settings
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Study
from vocabulary.wire import REQUESTS, TYPES, Frame, encode, read_frame

FOLDER = ROOT / "docs" / "example_technique"


@pytest.fixture
def room(tmp_path, monkeypatch):
    """The folder's requests.py, found because a .env.local names the folder. Afterwards nothing in the process knows of it."""
    (tmp_path / ".env.local").write_text(f"LOUPE_TECHNIQUES={FOLDER}\n")
    monkeypatch.setattr(techniques, "settings", lambda: settings(tmp_path))
    monkeypatch.setattr(techniques, "__path__", [*techniques.__path__])
    tables = (TYPES, REQUESTS, session.VIEWS)
    before = [dict(table) for table in tables]
    yield next(m for m in techniques.parts("requests") if m.__name__.startswith("techniques.example_technique."))
    for table, then in zip(tables, before):
        table.clear()
        table.update(then)
    for name in [n for n in sys.modules if n.startswith("techniques.example_technique")]:
        del sys.modules[name]


@pytest.mark.parametrize("which, done", [("clean", ""), ("corrupt", ""), ("now", "L1H2=zero")])
def test_norms_are_hugging_faces(room, engine, reference, which, done):
    """In Python, against hooks on Hugging Face's own modules, on every architecture."""
    study = Study(PROMPT, tuple(parse_intervention(d) for d in done.split()))
    found = engine.run(room.Norms(study, which))
    assert found.norms.shape == (len(found.points), len(found.tokens.ids)) and found.points[0] == "L0.resid_pre"

    def silence(z):
        z[..., reference.columns("z", 2)] = 0

    spots = [(p.split(".")[1], int(p[1])) for p in found.points]
    _, got = reference.run([found.tokens.ids], [(("z", 1), silence)] if done else [], spots)
    want = np.stack([np.sqrt((got[spot][0].double().numpy() ** 2).sum(-1)) for spot in spots])
    np.testing.assert_allclose(found.norms, want, rtol=1e-4)


def test_over_the_wire(room, engines):
    """Request and result are the same at the other end; what can't be asked is an error in words."""
    for body in (ask := room.Norms(Study(PROMPT), "corrupt"), engines["zoo"].run(ask)):
        there = read_frame(io.BytesIO(encode(Frame("ask", 1, body=body))).read).body
        assert type(there) is type(body)
        for name, value in vars(body).items():
            np.testing.assert_equal(getattr(there, name), value)
    with pytest.raises(UserError, match="there is no corrupted prompt"):
        engines["zoo"].run(room.Norms(Study(PROMPT.__class__(PROMPT.clean)), "corrupt"))


def test_from_the_shell(room, engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    assert program.main(["norms", "--clean", PROMPT.clean, "--do", "L0H3=zero", "--json"]) == 0
    norms = json.loads(capsys.readouterr().out)["norms"]
    want = engines["zoo"].run(room.Norms(Study(PROMPT, (parse_intervention("L0H3=zero"),)))).norms
    np.testing.assert_allclose(norms, want, rtol=1e-6)
    assert program.main(["norms", "--clean", PROMPT.clean, "--do", "L0H3=zero"]) == 0
    assert f"{want[-1, -1]:.2f}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        program.main(["norms", "--help"])
    assert "--which" in capsys.readouterr().out


@pytest.fixture
def own_tui(room):
    """tui.py as it is when a start finds the technique: a second copy, so that the other tests keep theirs."""
    module = module_from_spec(spec_from_file_location("tui_with_the_example", ROOT / "tui.py"))
    module.__spec__.loader.exec_module(module)
    return module


async def test_on_the_screen(room, own_tui, engines, tmp_path):
    app = own_tui.Loupe(session.Session(own_tui.first_state({}), tmp_path / "session.jsonl"), log=tmp_path / "engine.log")
    app.client = LocalClient(engines["zoo"])
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "#")
        result = engines["zoo"].run(room.Norms(app.study))
        np.testing.assert_array_equal(grid(app).values, reply(app, "norms").norms)
        np.testing.assert_array_equal(reply(app, "norms").norms, result.norms)
        assert "# Norms" in shown(app) and f"L3.resid_post@{app.cursor.pos}" in shown(app) and f"norm {result.norms[-1, -1]:.3f}" in shown(app)
        assert "& position 0" in shown(app), "the hint line"
        await press(app, pilot, "v", "v")
        np.testing.assert_allclose(grid(app).values[1:], result.norms[1:] / result.norms[:-1], rtol=1e-6)
        await press(app, pilot, "&")
        assert np.isnan(grid(app).values[:, 0]).all() and np.isfinite(grid(app).values[1:, 1:]).all()
        await press(app, pilot, "k", "h", "a")
        assert [str(i) for i in app.state.interventions] == [f"L3.resid_mid@{app.cursor.pos}=zero"]
        assert reply(app, "norms").norms[-2, -2] == 0, "now is asked again under the intervention"
        await press(app, pilot, "?", *"position 0")
        assert "Norms: with or without position 0" in shown(app), "the help"
    assert "| `&` | Norms: with or without position 0, where the norm is often huge | `norms_first` |" in own_tui.key_page(own_tui.TABLE)
