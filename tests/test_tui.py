"""The hunt by keyboard, at three sizes, with the real engine in this process; bad input; undo, resume and a killed engine."""

import asyncio
import dataclasses
import os
import signal

import pytest
from ui import LocalClient, make_app, press, reply, screen, shown

from techniques.lens.requests import Lens
from techniques.output.requests import Run
from vocabulary.nodes import Node, parse_intervention
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Load
from screen.client import Client
from screen.overlays import Editor, Overlay, Panel, Picker
from screen.prompts import open_file
from screen.session import Session, State, read_session
from tui import PANES, TABLE, Loupe, first_state

SIZES = [(80, 24), (120, 36), (200, 50)]
PAIR = Prompt(
    "When Mary and John went to the store, John gave a drink to", "When Mary and John went to the store, Alice gave a drink to", (" Mary",), (" John",)
)


def now(app: Loupe) -> float:
    return reply(app, "run").now.metric


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


@pytest.mark.parametrize("size", SIZES)
async def test_the_hunt(zoo, tmp_path, size):
    """Read the lens, see which head attends from the end to the answer, ablate it, undo, patch it from the corrupted prompt."""
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot)
        assert app.cursor.pos == 14 and "·Mary" in shown(app) and "L3.resid_post@14" in shown(app)
        clean = now(app)
        reference = zoo.run(Run(Study(PAIR)))
        assert clean == pytest.approx(reference.clean.metric) and f"clean {clean:+.3f}" in shown(app)
        table = zoo.run(Lens(Study(PAIR)))
        top = table.texts[int(table.top_ids[-1, -1, 0])].strip()
        assert top in "".join(screen(app)[5:])

        await press(app, pilot, "2")
        assert app.pane == "attention" and "Attention" in shown(app)
        await press(app, pilot, "g", "l", "j")
        assert app.node() == Node("head", 1, 1)
        await press(app, pilot, "enter")
        while app.cursor.src != 2:
            await press(app, pilot, "h" if app.cursor.src > 2 else "l")
        assert "2 ·Mary" in shown(app)
        await press(app, pilot, "escape")
        app.act("view", name="attention.stat", value="pair")
        await press(app, pilot)
        assert "14 ·to → 2 ·Mary" in shown(app)

        await press(app, pilot, "a")
        study = Study(PAIR, (parse_intervention("L1H1=zero"),))
        ablated = zoo.run(Run(study)).now.metric
        assert app.state.study == study and now(app) == pytest.approx(ablated) and ablated != pytest.approx(clean)
        assert "L1H1=zero" in shown(app) and f"now {ablated:+.3f}" in shown(app)
        await press(app, pilot, "u")
        assert now(app) == pytest.approx(clean) and "no interventions" in shown(app)
        await press(app, pilot, "p")
        patched = zoo.run(Run(Study(PAIR, (parse_intervention("L1H1=patch"),))))
        assert now(app) == pytest.approx(patched.now.metric) and "L1H1=patch" in shown(app)
        assert patched.normalised == pytest.approx((patched.now.metric - reference.corrupt.metric) / (clean - reference.corrupt.metric))
        await press(app, pilot, "x")
        assert now(app) == pytest.approx(clean)
        await press(app, pilot, "x", "X", "u")
        assert now(app) == pytest.approx(patched.now.metric)


async def test_panes_by_size(zoo, tmp_path):
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot)
        for size, count in (((80, 24), 1), ((120, 36), 2), ((200, 50), 3), ((20, 5), 1), ((120, 36), 2)):
            await pilot.resize_terminal(*size)
            await press(app, pilot)
            assert len(app.visible_panes()) == count
            assert all(len(line) <= size[0] for line in screen(app))
            assert ("no interventions" in shown(app)) == (size[1] >= 12), "the top has its five lines again"
        await press(app, pilot, "2", "+")
        assert app.visible_panes() == ["attention"]
        await press(app, pilot, "escape")
        assert app.visible_panes() == ["lens", "attention"]
        await press(app, pilot, "tab")
        assert app.pane == "attribution" and "Attribution" in shown(app)
        await press(app, pilot, "shift+tab", "0")
        assert app.pane == "output" and "Output" in shown(app)


@pytest.mark.slow
async def test_every_key_has_an_action_and_every_view_draws(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    for action in app.table:
        assert callable(action.do)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        for pane in "12":
            await press(app, pilot, pane)
            for key in ("v", "f", "V"):  # statistics, runs, modes
                seen = set()
                for _ in range(7):
                    await press(app, pilot, *key * (2 if key == "v" else 1))
                    seen.add(shown(app))
                    if not (key == "f" and "random" in app.state.views["attention.source"]):
                        assert "computing" not in shown(app) and not app.requests.error("lens") and not app.requests.error("attention")
                assert len(seen) >= 2
        await press(app, pilot, "R")
        assert "random" in shown(app)
        for _ in range(3):
            await press(app, pilot, "P")
        await press(app, pilot, "i")
        assert f":{reply(app, 'run').clean.tokens.ids[-1]}" in shown(app)


@pytest.mark.slow
async def test_the_editor_shows_tokens_and_refuses_what_cannot_work(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "e")
        editor = app.query_one(Editor)
        editor.fields[0].value = ""
        await press(app, pilot, "enter")
        assert app.query(Editor) and "empty prompt" in shown(app)
        editor.fields[0].value = "When Mary and John went"
        await press(app, pilot)
        assert "6 tokens" in shown(app)
        editor.fields[2].value = "Mary Ann"
        await press(app, pilot)
        assert "stands for it" in shown(app) and "all of them" in shown(app), "of an answer of several tokens the first counts"
        editor.fields[2].value = "drink"
        await press(app, pilot, "enter")
        assert app.query(Editor) and "leading space" in shown(app), "what is meant otherwise is refused and nothing typed is lost"
        assert editor.fields[0].value == "When Mary and John went"
        editor.fields[2].value = "Qzxv"
        await press(app, pilot)
        assert "tokens" in shown(app)
        editor.fields[2].value = " Mary"
        await press(app, pilot, "enter")
        await press(app, pilot)
        assert not app.query(Editor) and app.state.prompt.clean == "When Mary and John went" and "now" in shown(app)
        await press(app, pilot, "u")
        assert app.state.prompt == PAIR
        long = "a " * 400
        await press(app, pilot, "e")
        app.query_one(Editor).fields[0].value = long
        await press(app, pilot, "enter")
        assert app.query(Editor) and "context" in shown(app)
        await press(app, pilot, "escape")
        assert app.state.prompt == PAIR


async def test_unequal_lengths_are_allowed_until_something_is_patched(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=dataclasses.replace(PAIR, corrupt="When Mary went to")))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        assert "clean" in shown(app) and not app.requests.error("run")
        await press(app, pilot, "2", "p")
        assert "clean has 15 tokens, corrupted 5" in shown(app) and not app.state.interventions and not app.requests.error("run")
        app.act("intervene", intervention="L0H0=patch")  # as a restored session might
        await press(app, pilot)
        assert "15" in app.requests.error("run") and "5" in app.requests.error("run")
        await press(app, pilot, "u")
        assert not app.requests.error("run")


async def test_a_burst_of_keys_goes_into_the_prompt_that_it_opens(zoo, tmp_path):
    """Over SSH keys come several at a time: those after / are text, not commands."""
    from textual import events

    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        for key, character in (("slash", "/"), ("upper_x", "X"), ("q", "q"), ("a", "a")):
            app.post_message(events.Key(key, character))
        await press(app, pilot)
        await press(app, pilot)
        assert app.is_running and app.query_one(Editor).fields[0].value == "Xqa" and not app.state.interventions
        await press(app, pilot, "b", "escape")
        assert not app.query(Editor)
        for key, character in (("s", "s"), ("minus", "-"), ("0", "0"), ("full_stop", "."), ("5", "5")):  # replaces the factor that is proposed, as slow keys do
            app.post_message(events.Key(key, character))
        await press(app, pilot)
        await press(app, pilot)
        assert app.query_one(Editor).fields[0].value == "-0.5"


async def test_undoing_a_longer_prompt_leaves_no_cursor_behind(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(200, 50)) as pilot:
        await press(app, pilot, "3")
        app.act("prompt", prompt=dataclasses.replace(PAIR, clean=PAIR.clean + " Mary and John went to the store", corrupt=None))
        await press(app, pilot)
        assert app.cursor.pos == 21
        await press(app, pilot, "u")
        assert app.cursor.pos == 14 and not any(app.requests.error(s) for s in app.requests.wanted) and "sum +8.8358" in shown(app)


async def test_a_pane_that_comes_back_shows_what_is_now(zoo, tmp_path):
    """Lines that changed while their pane was hidden are drawn anew: at 80×24 the lens's line about a cell was that of the prompt before."""
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, "1")
        for index in (3, 1):
            await press(app, pilot, "7")
            app.act("go", index=index)
            await press(app, pilot)
            app.show_pane("lens")
            await press(app, pilot)
            for line in (app.panes["lens"].title_line, app.panes["lens"].info_line):
                assert line.text()[:70].rstrip() in shown(app), index


@pytest.mark.slow
async def test_nodes_outside_the_model_are_refused(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2")
        for text, words in (
            ("L9H3=zero", "4 layers"),
            ("L0H0@99=zero", "15 tokens"),
            ("L0H0@S9=zero", "labels"),
            ("L0H0=scale:nan", "finite"),
            ("L0.sae.f1=zero", "SAE"),
        ):
            await press(app, pilot, "I")
            app.query_one(Editor).fields[0].value = text
            await press(app, pilot, "enter")
            assert words in shown(app) and not app.state.interventions, text
            await press(app, pilot, "escape")


@pytest.mark.slow
async def test_keys_before_a_model_is_there_and_after_the_engine_died(zoo, tmp_path):
    """They say so in the status line, whichever pane has the focus; an editor that was open too."""
    client = LocalClient(zoo)
    client.alive = False
    app = make_app(client, tmp_path)
    client.start = client.stop  # it does not come
    async with app.run_test(size=(120, 36)) as pilot:
        for pane in PANES.values():
            for key in "ac":
                app.say("")
                await press(app, pilot, pane.number, key)
                assert "no model yet" in shown(app), (pane.key, key)
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "I")
        app.info, app.busy = None, "no engine (killed)"
        await press(app, pilot, "enter")
        assert "no model yet: no engine (killed)" in shown(app) and not app.state.interventions


async def test_a_pane_is_mounted_when_it_is_first_shown(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot)
        assert [key for key, pane in app.panes.items() if pane.is_attached] == app.visible_panes()
        for pane in PANES.values():
            await press(app, pilot, pane.number)
            assert app.panes[pane.key].is_attached and f"{pane.number} {pane.label} " in shown(app), pane.key


async def test_of_an_answer_of_several_tokens_the_first_is_scored(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=dataclasses.replace(PAIR, answers=(" Wolfeschlegelstein",))))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        assert "answer ·W… (1 of 18)" in shown(app) and "L3.resid_post" in shown(app) and not app.requests.error("lens")


async def test_messages_say_what_to_do(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=dataclasses.replace(PAIR, corrupt=None)))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        for key, words in (("p", "no corrupted prompt"), ("u", "nothing to undo"), (")", "no prompt set"), ("x", "no interventions"), ("n", "/ searches")):
            await press(app, pilot, key)
            assert words in shown(app)
        app.act("ablation", kind="mean")
        await press(app, pilot, "a")
        assert "prompt set" in shown(app)
        await press(app, pilot, "ctrl+c")
        assert "q quits" in shown(app)


@pytest.mark.slow
async def test_prompt_sets_and_mean_ablation(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "o")
        for c in "ioi_abba":
            await pilot.press(c)
        await press(app, pilot, "enter")
        assert "ioi_abba 1/" in shown(app) and not app.query(Overlay)
        await press(app, pilot, ")")
        assert app.state.index == 1 and app.state.prompt == app.state.prompt_set[1]
        await press(app, pilot, "(", "(")
        assert app.state.index == len(app.state.prompt_set) - 1
        await press(app, pilot, "A")
        await press(app, pilot, "m", "e", "a", "n", "enter")
        assert app.state.ablation == "mean"
        await press(app, pilot, "2", "a")
        assert "=mean" in shown(app) and not app.requests.error("run")
        bad = tmp_path / "bad.jsonl"
        bad.write_text('{"clean": "a"}\n{"clean": 3}\n')
        app.guard(lambda: open_file(app, bad))
        await press(app, pilot)
        assert "bad.jsonl line 2" in shown(app)


@pytest.mark.slow
async def test_search_help_palette_copy(zoo, tmp_path, monkeypatch, own_home):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "/")
        await press(app, pilot)
        app.query_one(Editor).fields[0].value = "L2H3@S2"
        await press(app, pilot, "enter")
        assert (app.cursor.layer, app.cursor.head, app.cursor.comp, app.cursor.pos) == (2, 3, "head", 10)
        await press(app, pilot, "/")
        app.query_one(Editor).fields[0].value = "L99H3"
        await press(app, pilot, "enter")
        assert "not in this model" in shown(app)
        await press(app, pilot, "escape")
        await press(app, pilot, "0", "/")
        app.query_one(Editor).fields[0].value = "john"
        await press(app, pilot, "enter")
        first = app.cursor.pos
        await press(app, pilot, "n")
        assert app.cursor.pos != first
        await press(app, pilot, "N")
        assert app.cursor.pos == first
        await press(app, pilot, "?")
        assert app.query_one(Picker) and "filter" in shown(app)
        for c in "heads map":
            await pilot.press("space" if c == " " else c)
        await press(app, pilot, "enter")
        assert app.pane == "attention"
        await press(app, pilot, "1", ":")
        for c in "lens.stat=kl":
            await pilot.press({".": "full_stop", "=": "equals_sign"}.get(c, c))
        await press(app, pilot, "enter")
        assert app.state.views["lens.stat"] == "kl"
        copied = []
        monkeypatch.setattr(app, "copy_to_clipboard", copied.append)
        for kind in ("text", "tsv", "node", "prompt", "python", "svg"):
            await press(app, pilot, "y")
            for c in kind:
                await pilot.press(c)
            await press(app, pilot, "enter")
            await press(app, pilot)
        files = {f.suffix: f.read_text() for f in (own_home / "exports").iterdir()}
        assert len(copied) == 5 and "hook point\t" in files[".tsv"] and "<svg" in files[".svg"] and "TransformerBridge" in files[".py"]
        assert "Lens" in copied[0] and copied[2].strip() == str(app.node())


async def test_honesty_panel(zoo, tmp_path):
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "D")
        await press(app, pilot)
        assert app.query_one(Panel) and "all hold" in shown(app) and "✗" not in shown(app)
        await press(app, pilot, "escape")
        assert not app.query(Panel)
        await press(app, pilot, "J")
        assert "no jobs" in shown(app)


@pytest.mark.slow
async def test_hostile_tokens_are_harmless(zoo, tmp_path):
    text = "[/INST] [red]x\x1b[31m 日本語 👩‍👩‍👧 a\x00b\n\t[link=http://x]"
    app = make_app(zoo, tmp_path, State(prompt=Prompt(text, text + "!", (" Mary",))))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        for key in ("2", "0", "1", "e", "escape", "i", "V", "V", "D", "escape"):
            await press(app, pilot, key)
            assert not [c for c in shown(app).replace("\n", "") if not c.isprintable()]
        assert "[/INST]" in "".join(t for t in reply(app, "run").clean.tokens.texts) and not app.requests.error("run")


async def test_no_color_starts_with_shades(zoo, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    app = make_app(zoo, tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2")
        assert app.state.views["mode"] == "shade" and any(c in shown(app) for c in "░▒▓█")


async def test_keymap(zoo, tmp_path):
    from screen.keys import remapped
    from vocabulary.nodes import UserError

    path = tmp_path / "keys.json"
    path.write_text('{"ablate": "z", "quit": "Q"}')
    table = {a.id: a.keys for a in remapped(str(path), TABLE)}
    assert table["ablate"] == "z" and table["quit"] == "Q,ctrl+q"
    app = make_app(zoo, tmp_path, State(prompt=PAIR), table=remapped(str(path), TABLE))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2", "z")
        assert len(app.state.interventions) == 1
    for text, words in (("[1]", "JSON"), ('{"nonsense": "z"}', "nonsense"), ("{", "JSON")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            remapped(str(path), TABLE)


async def test_a_failed_load_keeps_everything(zoo, tmp_path):
    class Broken(LocalClient):
        async def ask(self, slot, request, priority=1, on_partial=None):
            if isinstance(request, Load) and request.model != "zoo":
                request = Load(str(tmp_path / "no-such-model"))
            return await super().ask(slot, request, priority, on_partial)

    app = make_app(Broken(zoo), tmp_path, State(prompt=PAIR))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2", "a")
        app.act("model", load=Load("nowhere"))
        await press(app, pilot)
        assert app.info is not None and app.state.model.model == "zoo" and "zoo stays" in shown(app), app.status
        assert len(app.state.interventions) == 1 and "L3H0=zero" in shown(app)


@pytest.mark.slow
async def test_a_killed_engine_is_said_and_restarted_on_a_key(tmp_path):
    """The real process: the UI says that it died, and ctrl+e brings back model, prompt and interventions. Then resume after the UI itself is gone."""
    app = Loupe(Session(State(prompt=PAIR), tmp_path / "session.jsonl"), log=tmp_path / "engine.log")
    assert isinstance(app.client, Client)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "2", "a")
        before = now(app)
        assert app.info and len(app.state.interventions) == 1
        died = asyncio.Event()
        said, app.client.on_death = app.client.on_death, lambda reason: (said(reason), died.set())
        os.kill(app.client.process.pid, signal.SIGKILL)
        await asyncio.wait_for(died.wait(), 30)
        await press(app, pilot)
        assert "the engine died (killed by SIGKILL): ctrl+e restarts it" in shown(app)
        assert all("NOT CURRENT" in app.panes[name].said[0] for name in app.visible_panes())
        await press(app, pilot, "ctrl+e")
        await press(app, pilot)
        assert app.info and now(app) == before and "L3H0=zero" in shown(app)
        engine = app.client.process
    assert engine.returncode == 0
    session, warning = read_session(tmp_path / "session.jsonl")
    assert not warning and session.state == app.state
