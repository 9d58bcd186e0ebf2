"""BOS is one key and one option away, for a prompt and its set, and what is shown says which."""

import contextlib
import io
import json

import pytest
from ui import make_app, press, reply, shown

import engine as program
from engine import Engine
from conftest import CLEAN, CORRUPT, PROMPT
from screen.prompts import open_file
from screen.session import State, read_session
from techniques.identities import published
from vocabulary.prompts import Prompt
from vocabulary.requests import Load


@pytest.mark.parametrize("name", ("zoo", "neox"))
async def test_one_key_changes_it_for_the_prompt_and_its_set(folders, tmp_path, name):
    own = name == "zoo"
    lines = [{"clean": CLEAN, "corrupt": CORRUPT, "answer": " Mary", "foil": " John"}] * 2
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    app = make_app(Engine(), tmp_path, State(Load(str(folders[name])), PROMPT))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        open_file(app, tmp_path / "set.jsonl")
        await press(app, pilot)
        for asked in (not own, None):
            await press(app, pilot, "<")
            bos = own if asked is None else asked
            assert reply(app, "run").clean.tokens.bos == bos and app.state.prompt.bos == asked and {p.bos for p in app.state.prompt_set} == {asked}
            assert ("⟨bos⟩" in shown(app)) == bos and ("BOS asked for" in shown(app)) == (asked is not None)
        assert app.info.bos_habit in shown(app)
        await press(app, pilot, "<", "u", "<")
        state = app.state
    assert read_session(tmp_path / "session.jsonl")[0].state == state and state.prompt.bos == (not own)


async def test_the_key_says_what_it_cannot_do(folders, tmp_path):
    for name, text, words in (("qwen3", CLEAN, "this tokenizer has none"), ("neox", "<|bos|>" + CLEAN, "starts with <|bos|> itself")):
        app = make_app(Engine(), tmp_path, State(Load(str(folders[name])), Prompt(text)))
        async with app.run_test(size=(120, 36)) as pilot:
            await press(app, pilot)
            await press(app, pilot, "<")
            assert words in shown(app) and app.state.prompt.bos is None


def test_the_command_line_says_which_and_the_option_holds_for_the_set(engines, monkeypatch):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])

    def call(*args: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert program.main(["run", "--set", "tests/fixtures/few.jsonl", *args]) == 0
        return out.getvalue()

    assert "BOS in front: the model's config says" in call().splitlines()[0] and "no BOS: asked for" in call("--no-bos").splitlines()[0]
    assert json.loads(call("--json"))["clean"]["tokens"]["bos"] and not json.loads(call("--no-bos", "--json"))["clean"]["tokens"]["bos"]


def test_published_figures_name_their_bos():
    measured = {f"{g.title}: {name}": value for g in published.GROUPS for name, value in g.values.items()}
    assert all(published.WITH_BOS in row.note for row in published.compare(measured))
