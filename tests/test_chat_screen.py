"""Chats on the screen: > and the editor, the template's tokens dim and folded, undo and resume."""

import numpy as np
import pytest
from conftest import build
from test_chat import CHATML, PREFIX, TALK
from transformers import AutoTokenizer
from ui import grid, make_app, press, reply, shown

from engine import Engine
from screen.maps import Grid, without
from screen.session import read_session, State
from screen.textview import fold_texts
from vocabulary.chat import messages, Turn
from vocabulary.prompts import Prompt
from vocabulary.requests import Load

TEXT = "When Mary and John went to"


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> Engine:
    folder = build("llama", tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return Engine(str(folder))


def opened(engine, tmp_path, prompt):
    load = Load(str(engine.model.folder))
    return make_app(engine, tmp_path, State(load, prompt, prompt_set=(prompt,), set_path="few.jsonl"))


async def test_a_key_turns_prompt_and_set_and_the_editor_edits_turns(engine, tmp_path):
    app = opened(engine, tmp_path, Prompt(TEXT, TEXT.replace("Mary", "Anna"), ("a",), (), (("IO", 5),)))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "<", ">")
        assert app.state.prompt.clean == (Turn("user", TEXT),) and app.state.prompt_set == (app.state.prompt,) and app.state.prompt.bos is None
        row = reply(app, "run").clean.tokens
        own = engine.model.tokenizer
        assert list(row.ids) == own.apply_chat_template(messages(app.state.prompt.clean), add_generation_prompt=True, return_dict=False)
        assert row.texts[row.labels["IO"]] == " Mary" and "  chat" in shown(app) and "⟨bos⟩" not in shown(app)
        await press(app, pilot, "<")
        assert "as its template has it: > makes plain text" in shown(app)
        await press(app, pilot, "e")
        assert "user: When Mary and John went to" in shown(app) and "begin a turn" in shown(app)
        await press(app, pilot, "end", *r"\nassistant: the milk", "tab", "ctrl+k", "enter")
        assert app.state.prompt.clean == (Turn("user", TEXT), Turn("assistant", "the milk")) and app.state.prompt.corrupt is not None
        assert reply(app, "run").clean.tokens.texts[-1] == " milk" and not app.state.members
        state = app.state
        await press(app, pilot, ">")
        assert app.state.prompt.clean == TEXT and "the other turns are gone, u brings them back" in shown(app)
        await press(app, pilot, "u")
        assert app.state == state and "undid: plain text" in shown(app)
        await press(app, pilot, "e", "end", *r"\nassistant: ")
        assert "the assistant's turn at the end is empty" in shown(app)
        await press(app, pilot, "escape")
    assert read_session(tmp_path / "session.jsonl")[0].state == state


async def test_a_model_without_a_template_says_so(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, ">")
        assert "no chat template, so it can't be asked in turns" in shown(app) and isinstance(app.state.prompt.clean, str)
        await press(app, pilot, "\\")
        assert "> asks it as a chat" in shown(app)


async def test_the_template_folds_and_the_cursor_skips_it(engine, tmp_path):
    app = opened(engine, tmp_path, Prompt(TALK, None, ("a",), ()))
    async with app.run_test(size=(120, 40)) as pilot:
        await press(app, pilot)
        row = reply(app, "run").clean.tokens
        n, end = len(row.ids), len(row.ids) - 1
        whole = grid(app)
        await press(app, pilot, "\\")
        assert f"{len(row.template)} of {n} tokens are the chat template's: dim" in shown(app) and grid(app).faded[1] == frozenset(row.template)
        await press(app, pilot, "\\")
        left = [i for i in range(n) if i not in row.template or i == end]
        assert f"{n - len(left)} folded (\\)" in shown(app)
        lens = grid(app)
        assert lens.shown_cols == tuple(left) and (lens.values == whole.values[:, left]).all() and lens.tsv() == whole.tsv()
        assert (lens.lo, lens.hi, lens.cols) == (whole.lo, whole.hi, [whole.cols[i] for i in left])
        assert app.cursor.pos == end and app.panes["lens"].table.at[1] == len(left) - 1
        for _ in range(2):
            await press(app, pilot, "h")
        assert app.cursor.pos == left[-3] and app.panes["lens"].table.at[1] == len(left) - 3
        await press(app, pilot, "home")
        assert app.cursor.pos == left[0] > 0
        await press(app, pilot, ";", "1", "enter")
        assert app.cursor.pos == left[0] and "1 is a token of the chat template that is folded away" in shown(app)
        await press(app, pilot, "end", "T")
        text = app.panes["lens"].text
        first = row.template.index(left[0] - 1) + 1
        assert text.texts[0] == f"⋯{first}⋯" and "".join(text.texts[1 : left[0]]) == "" and text.texts[left[0]] == row.texts[left[0]]
        await press(app, pilot, "T", "2")
        pattern = app.panes["attention"].grids()["pattern"]
        assert pattern.shown_rows == pattern.shown_cols == tuple(left)
        gone = sorted(set(range(n)) - set(left))
        away = float(np.nansum(pattern.whole.values[end, gone]))
        assert f"folded {away:.3f}" in app.panes["attention"].as_text()
        await press(app, pilot, "enter", "h", "h")
        assert app.cursor.src in left
        await press(app, pilot, "\\")
        assert grid(app).whole is None and app.state.views["template"] == "shown"


async def test_the_metrics_position_and_labels_are_not_folded(engine, tmp_path):
    app = opened(engine, tmp_path, Prompt(PREFIX, None, ("a",), ()))
    async with app.run_test(size=(160, 40)) as pilot:
        await press(app, pilot)
        app.act("metric", kind="prob", pos=2)
        await press(app, pilot, "\\", "\\")
        row = reply(app, "run").clean.tokens
        assert 2 in row.template and 2 in grid(app).shown_cols and len(row.ids) - 1 not in row.template
        app.act("metric", kind="prob", pos="END")
        await press(app, pilot)
        assert 2 not in grid(app).shown_cols and "(the assistant's next token after its prefix)" in shown(app)
        await press(app, pilot, "=")
        assert "END is the last token before what is predicted" in shown(app)


def test_a_part_of_a_grid_keeps_places_scale_and_marks():
    rng = np.random.default_rng(0)
    whole = Grid(rng.normal(size=(4, 6)), list("abcd"), list("uvwxyz"), -2, 2, signed=True, marks=frozenset({(1, 4), (0, 0)}), positions=True)
    part = without(whole, frozenset({0}), frozenset({0, 2}))
    assert part.rows == list("bcd") and part.cols == list("vxyz") and part.marks == {(0, 2)} and (part.values == whole.values[1:][:, [1, 3, 4, 5]]).all()
    assert part.name(0, 2) == "b @4 y" and part.cell_of((2, 2)) == (1, 1) and part.cell_of((0, 5)) == (0, 3) and part.tsv() == whole.tsv()
    assert without(whole, frozenset(), frozenset()) is whole and without(whole, frozenset(), frozenset(range(6))) is whole
    assert fold_texts(list("abcdef"), frozenset({0, 1, 3})) == ["⋯2⋯", "", "c", "⋯1⋯", "e", "f"]
