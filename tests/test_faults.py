"""Faults that misled: each kind with inputs of its own. Results under another model or set, keys that went elsewhere, undo of views, jobs that ended without a word."""

import asyncio
import json
import re
import time
from dataclasses import replace

import numpy as np
import pytest
from test_circuit_pane import small
from test_replies import TwoModels
from ui import LocalClient, Superseded, asked, make_app, press, reply, screen, shown

from screen import history, sessions
from screen.client import Client, Job
from screen.overlays import Editor, Overlay, Panel, Picker
from screen.session import Session, State, read_session
from techniques.attribution.requests import AttributionSet
from techniques.circuits import discovery, pictures
from techniques.circuits.requests import Discover, Score
from techniques.features.requests import Saes
from techniques.patching.requests import Estimate, Sweep
from techniques.weights.requests import HeadWeights
from tui import first_state
from utils import ROOT
from vocabulary.circuit import Circuit
from vocabulary.names import same_model
from vocabulary.nodes import UserError
from vocabulary.prompts import Study, read_prompt_set
from vocabulary.requests import Load, Progress
from vocabulary.typed import parse_json
from vocabulary.wire import Frame


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


def flat(app) -> str:
    return " ".join(shown(app).split())


# ------------------------------------------------------------------ whose a circuit and its scores are


@pytest.mark.parametrize("one, other, same", [("gpt2", "openai-community/gpt2", True), ("/x/zoo/", "zoo", True), ("zoo", "gpt2", False), ("", "gpt2", True)])
def test_two_names_of_one_model(one, other, same):
    assert same_model(one, other) == same_model(other, one) == same


async def test_a_circuit_is_of_its_model(engines, tmp_path):
    """Under another model it says whose it is, marks nothing in other panes, and what is kept begins a circuit of the model at hand."""
    app, other = make_app(TwoModels(engines, False), tmp_path, small()), str(engines["gpt2"].model.info.name)
    async with app.run_test(size=(130, 45)) as pilot:
        await press(app, pilot, "5", "l", "l", "c", "l", "c")
        assert app.panes["circuit"].said[0].startswith("drawing · circuit (2 nodes") and app.state.current.model == "zoo"
        app.act("model", load=Load(other))
        await press(app, pilot)
        assert "NOT OF THIS MODEL: of zoo" in app.panes["circuit"].said[0]
        await press(app, pilot, "2")
        assert not app.panes["attention"].map.grid.kept
        await press(app, pilot, "c")
        assert app.state.current.name == "circuit-2" and same_model(app.state.current.model, other) and len(app.state.current.nodes) == 1
        assert app.panes["attention"].map.grid.kept and len(app.state.circuits[0].nodes) == 2
        await press(app, pilot, "5", "Y", *"circuit", "down")
        assert "NOT OF THIS MODEL: of zoo" in shown(app)
        await press(app, pilot, "escape", "Y", *"compare", "enter")
        assert {i.key for i in app.query_one(Picker).items} == {"greater-than", "ioi"}, "published ones of gpt2, none of the zoo"
        await press(app, pilot, "escape", "Y")
        assert "union" not in [i.key for i in app.query_one(Picker).items], "of two models none is joined"
        await press(app, pilot, "escape")
        app.act("select_circuit", name="circuit")
        await press(app, pilot, "Y", *"compare", "enter")
        assert "no other circuit of zoo" in shown(app) and not app.query(Picker)


async def test_a_score_names_the_prompts_it_is_of(zoo, tmp_path):
    """In the title, and in the list of circuits, also when another set is open; the score of another set is not drawn."""
    app = make_app(zoo, tmp_path, small(3))
    async with app.run_test(size=(160, 45)) as pilot:
        await press(app, pilot, "5", "l", "l", "c", "l", "c", "S")
        first = app.panes["circuit"].scored(app).faithfulness.mean
        assert f"faithfulness {first:.3f} over 3 prompts of ioi_abba" in app.panes["circuit"].said[0]
        await press(app, pilot, "Y", *"score")
        assert f"faithfulness {first:.3f} over 3 prompts of ioi_abba, rest patch" in shown(app)
        await press(app, pilot, "escape")
        app.act("open_set", path="other.jsonl", prompts=list(app.state.prompt_set[1:]), index=0)
        await press(app, pilot)
        assert "faithfulness" not in app.panes["circuit"].said[0] and app.panes["circuit"].scored(app) is None
        await press(app, pilot, "Y", *"score")
        assert f"faithfulness {first:.3f} over 3 prompts of ANOTHER SET" in shown(app)
        await press(app, pilot, "enter")
        assert "over 2 prompts of other" in app.panes["circuit"].said[0]
        await press(app, pilot, "R", "S")
        assert "on this prompt" in app.panes["circuit"].said[0]
        app.act("go", index=1)
        await press(app, pilot, "Y", *"score")
        assert "on another prompt" in shown(app)


async def test_a_comparison_is_of_the_circuit_as_it_was(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(140, 45)) as pilot:
        await press(app, pilot, "5", "c", "l", "c")
        app.act("new_circuit", name="second")
        app.act("keep", part="L3H1")
        await press(app, pilot, "Y", *"compare", "enter", "enter")
        assert "overlap of nodes 0.500" in shown(app)
        app.act("keep", part="L0H0")
        await press(app, pilot)
        assert "overlap of nodes" not in shown(app) and "Y, then compare" in shown(app)


async def test_a_typed_prompt_leaves_its_set(zoo, tmp_path):
    """Scores, paths, sweeps, sums and labels are over the set only while the prompt is one of it."""
    app = make_app(zoo, tmp_path, small(3))
    async with app.run_test(size=(150, 45)) as pilot:
        await press(app, pilot, "5", "l", "l", "c")
        pane = app.panes["circuit"]
        assert len(pane.study(app).prompt_set) == 3 and pane.path(app).over_set
        await press(app, pilot, "e")
        app.query_one(Editor).fields[0].value = app.state.prompt.clean.replace("store", "school")
        await press(app, pilot, "enter")
        assert "typed: not of the set ioi_abba" in shown(app) and app.state.members == ()
        assert pane.study(app).prompt == app.state.prompt and pane.study(app).prompt_set == () and not pane.path(app).over_set
        await press(app, pilot, "S")
        assert asked(app, Score)[-1].study.prompt == app.state.prompt and "on this prompt" in pane.said[0]
        app.act("view", name="patching.over", value="set")
        await press(app, pilot, "4", "S")
        assert "not of the set ioi_abba: ( and ) go back" in flat(app) and not asked(app, Sweep) and not asked(app, Estimate)[-1].over_set
        app.act("view", name="attribution.view", value="set")
        await press(app, pilot, "3")
        assert "not of the set ioi_abba" in flat(app) and not asked(app, AttributionSet)
        await press(app, pilot, "B")
        assert "not of the set ioi_abba" in flat(app)
        await press(app, pilot, ")")
        assert app.state.members == app.state.prompt_set and asked(app, AttributionSet) and "typed" not in shown(app)
        app.act("prompt", prompt=replace(app.state.prompt, alignment=((0, 0),)))
        assert app.state.members, "an alignment by hand is not another text"
        app.act("prompt", prompt=replace(app.state.prompt, answers=(" John",)))
        assert not app.state.members, "another answer is another question"


# ------------------------------------------------------------------ what stays on the screen


@pytest.mark.parametrize("pane", ["3", "6"])
async def test_nothing_old_stays_where_the_run_failed(zoo, tmp_path, pane):
    """What can't even be asked without a run is not drawn from before: the run's own error stands there."""
    app = make_app(zoo, tmp_path, replace(small(), saes=("zoo/L2.resid_post",), sae="zoo/L2.resid_post"))
    async with app.run_test(size=(110, 30)) as pilot:
        await press(app, pilot, pane)
        before = "\n".join(screen(app)[5:])
        app.act("prompt", prompt=replace(app.state.prompt, corrupt="When Mary went to"))
        await press(app, pilot)
        app.act("intervene", intervention="L0H0=patch")
        await press(app, pilot)
        app.say("")
        app.draw()
        await press(app, pilot)
        body = "\n".join(line for line in screen(app)[5:-2])
        assert "sum +" in before or "reconstruction" in before
        assert "clean has 15 tokens" in body and "sum +" not in body and "reconstruction" not in body and "computing" not in body


async def test_a_feature_that_is_not_listed_is_seen_all_the_same(zoo, tmp_path):
    """The one under the cursor, on which a acts, always has a line; j goes on from it to the first of the list."""
    app = make_app(zoo, tmp_path, replace(small(), saes=("zoo/L2.resid_post",), sae="zoo/L2.resid_post"))
    async with app.run_test(size=(130, 40)) as pilot:
        await press(app, pilot, "6")
        pane = app.panes["features"]
        chosen = pane.index
        seen = 0
        for _ in range(8):
            await press(app, pilot, "h")
            listed = reply(app, "features").index.tolist()
            assert pane.index == chosen and any(line.lstrip().startswith(f"f{chosen} ") for line in screen(app)), app.cursor
            if chosen not in listed:
                seen += 1
                line = next(line for line in screen(app) if f"f{chosen} " in line and "not in this list" in line)
                assert f"{float(reply(app, 'feature').activation[app.cursor.pos]):.3f}" in line
        assert seen
        while chosen in reply(app, "features").index.tolist():
            await press(app, pilot, "h")
        await press(app, pilot, "j")
        assert pane.index == reply(app, "features").index[0] and "not in this list" not in shown(app)


@pytest.mark.parametrize("size", [(80, 24), (120, 36)])
async def test_the_output_names_the_cursors_position(zoo, tmp_path, size):
    """However it was moved: in this pane, in another one, by a search, by another prompt, in any run."""
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=size) as pilot:
        for keys in (
            ("0", "h"),
            ("0", "comma", "comma"),
            ("1", "h", "0"),
            ("3", "comma", "0"),
            ("0", "/", *"Mary", "enter"),
            ("0", ")"),
            ("0", "f", "l"),
            ("0", "d", "h"),
        ):
            await press(app, pilot, *keys)
            run, pos = reply(app, "run"), app.cursor.pos
            assert f"next token after {pos} " in shown(app), keys
            first = f"{float(run.clean.top_probs[pos, 0]):.4f}"
            assert first in shown(app), keys


@pytest.mark.parametrize("width, n", [(24, 6), (37, 12), (60, 20), (120, 40)])
def test_the_curve_is_whole(width, n):
    """Every line within its width and height, and the words above it complete."""
    counts = np.array([0, 5, 20, 40])
    done = type("Done", (), {"counts": counts, "faithfulness": counts / 40, "method": "eap-ig"})
    asks = type("Asked", (), {"rest": "patch"})
    lines = pictures.curve(type("R", (), {"result": done, "request": asks}), width, n, "over 32 prompts of ioi_abba")
    rows = ["".join(text for text, _ in line) for line in lines]
    assert len(rows) <= max(n, 6 + sum("┤" not in r and "│" not in r for r in rows)) and all(len(r.rstrip()) <= width for r in rows)
    assert "faithfulness against edges (eap-ig, rest patch, over 32 prompts of ioi_abba)" in " ".join(" ".join(rows).split())


async def test_escape_leaves_what_enter_drilled_into(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "3", "enter")
        assert app.state.views["attribution.view"] == "drill" and "by source" in shown(app)
        await press(app, pilot, "escape")
        assert app.state.views["attribution.view"] == "ranked" and "by source" not in shown(app)
        await press(app, pilot, "+", "escape")
        assert not app.zoomed


async def test_a_pattern_remembers_the_source_that_was_chosen(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2", "enter")
        first = app.cursor.src
        assert first == app.panes["attention"].pattern.at[1]
        for _ in range(2):
            await press(app, pilot, "h")
        chosen = app.cursor.src
        await press(app, pilot, "escape", "enter")
        assert app.cursor.src == chosen != first and app.panes["attention"].pattern.at[1] == chosen
        await press(app, pilot, "enter", "1", "2", "enter")
        assert app.cursor.src == chosen, "also after another pane"
        await press(app, pilot, "escape", "l", "enter")
        pattern = reply(app, "attention").pattern[app.cursor.head][app.cursor.pos]
        assert app.cursor.src == int(np.nan_to_num(pattern, nan=-1).argmax()), "another head: where that one looks most"


async def test_the_tours_step_8_ends_where_step_14_reads(zoo, tmp_path):
    tour = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    step = tour[tour.index("8. **") : tour.index("9. **")]
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        for keys in re.findall(r"`/` `(\S+)` `enter`", step):
            await press(app, pilot, "/", *keys, "enter")
        assert app.cursor.pos == 14 and app.node().pos == 14 and app.pane == "attention"
        app.act("saes", sources=["zoo/L2.resid_post"])
        await press(app, pilot, "6", "P")
        assert [int(i) for i in reply(app, "features").index[:2]] == [263, 690]


# ------------------------------------------------------------------ keys and lists


class Slow(LocalClient):
    """A client whose answers to one kind of request wait until they are let go."""

    def __init__(self, engine, kind):
        super().__init__(engine)
        self.kind, self.go = kind, asyncio.Event()

    async def ask(self, slot, request, priority=1, on_partial=None):
        if isinstance(request, self.kind):
            await self.go.wait()
        return await super().ask(slot, request, priority, on_partial)


async def idle(pilot):
    for _ in range(10):
        await pilot.pause()


@pytest.mark.parametrize("keys, kind, typed", [(("6", "z"), Saes, "L2"), (("5", "U", *"greedy", "enter", "enter"), Discover, "x")])
async def test_keys_wait_for_a_list_that_opens_late(zoo, tmp_path, keys, kind, typed):
    app = make_app(Slow(zoo, kind), tmp_path, small(2))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await pilot.press(*keys)
        await idle(pilot)
        assert not app.query(Overlay) and app.requests.held.waiting
        before = app.state
        await pilot.press(*typed, "a", "q")
        await idle(pilot)
        assert app.state == before and app.is_running and app.pane in ("features", "circuit")
        app.client.go.set()
        await press(app, pilot)
        await press(app, pilot)
        if kind is Saes:
            assert app.query_one(Picker).field.value == f"{typed}aq"
        assert app.state.interventions == () and not app.requests.held.waiting


async def test_a_list_that_is_given_up_takes_no_keys(zoo, tmp_path):
    app = make_app(Slow(zoo, Saes), tmp_path, small())
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await pilot.press("6", "z", "a", "escape")
        await idle(pilot)
        assert not app.requests.held.waiting
        app.client.go.set()
        await press(app, pilot)
        assert not app.query(Overlay), "it does not open any more"
        await press(app, pilot, "2", "a")
        assert len(app.state.interventions) == 1, "keys are commands again"


async def test_a_list_that_fails_drops_what_was_typed(zoo, tmp_path):
    app = make_app(Slow(zoo, Saes), tmp_path, small())
    app.client.engine = type("Broken", (), {"run": lambda self, request, show: zoo.run(request, show) if not isinstance(request, Saes) else 1 / 0})()
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2")
        await pilot.press("6", "z", "a")
        app.client.go.set()
        await press(app, pilot)
        assert "ZeroDivisionError" in shown(app) and app.state.interventions == () and not app.requests.held.waiting


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"clean": "a" "x"}', "line 2: not JSON: Expecting ',' delimiter at column 15"),
        ("[1,]", "line 2: not JSON"),
        ('{"clean": 3}', "line 2: a prompt needs"),
        ("{", "line 2: not JSON"),
    ],
)
def test_one_line_number_in_a_message(tmp_path, text, words):
    path = tmp_path / "set.jsonl"
    path.write_text(f'{{"clean": "a"}}\n{text}\n')
    with pytest.raises(UserError) as error:
        read_prompt_set(path)
    assert words in str(error.value) and str(error.value).count("line") == 1


def test_json_of_several_lines_says_which():
    with pytest.raises(UserError, match="at line 2 column 3"):
        parse_json("{\n  oops\n}")


def test_a_damaged_session_line_has_one_number(tmp_path):
    session = Session(State(), tmp_path / "s.jsonl")
    session.do("base", value="corrupt")
    session.close()
    with open(session.path, "ab") as f:
        f.write(b'{"do": oops}\n')
    _, warning = read_session(session.path)
    assert warning.count("line") == 1 and "column 8" in warning


# ------------------------------------------------------------------ undo


def test_undo_and_views_are_independent(tmp_path):
    """Any mixture of work, views, undo and redo: each kind is what it would be without the other, also when the file is read again."""
    rng = np.random.default_rng(0)
    for case in range(12):
        both, work, looks = (Session(State(), tmp_path / f"{case}-{name}.jsonl") for name in ("both", "work", "looks"))
        for step in range(25):
            match int(rng.integers(5)):
                case 0:
                    some = [(("intervene", {"intervention": f"L0H{rng.integers(4)}=zero"}), work)]
                case 1:
                    some = [(("view", {"name": "mode", "value": str(rng.choice(["colour", "number", "shade"]))}), looks)]
                case 2:
                    some = [(("undo", {"of": "work"}), work)]
                case 3:
                    some = [(("redo", {"of": "work"}), work)]
                case _:
                    some = [(("undo", {"of": "view"}), looks)]
            (name, args), alone = some[0]
            outcome = []
            for session in (both, alone):
                try:
                    session.do(name, **args)
                    outcome.append("done")
                except UserError as error:
                    outcome.append(str(error))
            assert outcome[0] == outcome[1], (case, step, name)
            assert both.state == replace(work.state, views=looks.state.views), (case, step, name)
        again, warning = read_session(both.path) if both.actions else (both, "")
        assert not warning and (again.state, again.past, again.future) == (both.state, both.past, both.future)
        for session in (both, work, looks):
            session.close()


async def test_undo_says_what_and_leaves_views(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small(3))
    async with app.run_test(size=(140, 40)) as pilot:
        await press(app, pilot, "2", "a", "v", "v", "V")
        views = app.state.views
        await press(app, pilot, "u")
        assert "undid: L3H0=zero (0 back, 1 forward)" in shown(app) and app.state.views == views and not app.state.interventions
        await press(app, pilot, "v", "v", "ctrl+r")
        assert "did again: L3H0=zero" in shown(app) and app.state.interventions, "a view in between does not end redo"
        await press(app, pilot, "backspace")
        assert "back to attention.stat previous" in shown(app) and app.state.interventions and app.state.views == views
        await press(app, pilot, "backspace", "backspace", "backspace")
        assert "no other view to go back to" in shown(app)
        for act, words in (
            (lambda: app.act("go", index=2), "prompt 3 of the set"),
            (lambda: app.act("metric", kind="prob", pos="-1"), "metric prob@-1"),
            (lambda: app.act("base", value="corrupt"), "base corrupt"),
            (lambda: app.act("ablation", kind="mean"), "ablation mean"),
            (lambda: app.act("enable", value=False), "interventions off"),
            (lambda: app.act("clear"), "cleared L3H0=zero"),
            (lambda: app.act("keep", part="L1H2"), "circuit circuit"),
            (lambda: app.act("keep", part="L1H3"), "kept L1H3 in circuit"),
            (lambda: app.act("delete_circuit", name="circuit"), "deleted circuit circuit"),
            (lambda: app.act("bos", value=False), "BOS off"),
            (lambda: app.act("receivers", addresses=["L2H3.q"]), "receivers L2H3.q"),
            (lambda: app.act("prompt", prompt=replace(app.state.prompt, answers=(" John",))), "the typed prompt"),
        ):
            act()
            await press(app, pilot, "u")
            assert f"undid: {words} (" in shown(app), words
            await press(app, pilot, "ctrl+r")
            assert f"did again: {words} (" in shown(app), words


def test_every_action_has_words_for_undo():
    """None of those that change what is computed is called by its bare name where the states differ."""
    before = first_state({})
    prompts = before.prompt_set
    after = {
        "model": replace(before, model=Load("/models/gpt2")),
        "open_set": replace(before, set_path="a/b.jsonl", prompt_set=prompts[:2]),
        "lens": replace(before, lens="tuned"),
        "sae_error": replace(before, sae_error=False),
        "saes": replace(before, saes=("x",), sae="x"),
        "align": replace(before, align="diff"),
        "senders": replace(before, senders=("L0H1",)),
    }
    said = {name: history.words(name, before, state) for name, state in after.items()}
    assert said == {
        "model": "model gpt2",
        "open_set": "set b",
        "lens": "lens tuned",
        "sae_error": "error term dropped",
        "saes": "SAE x",
        "align": "alignment diff",
        "senders": "senders L0H1",
    }


# ------------------------------------------------------------------ jobs


class Running(LocalClient):
    """A client on which discoveries run until they are cancelled."""

    async def ask(self, slot, request, priority=1, on_partial=None):
        if not isinstance(request, Discover) or request.dry:
            return await super().ask(slot, request, priority, on_partial)
        self.asked.append((slot, request))
        job = self.jobs[len(self.asked)] = Job(len(self.asked), slot, request, asyncio.get_running_loop().create_future(), None)
        job.started = time.monotonic() - 100
        return await job.future

    def cancel(self, ident):
        if job := self.jobs.pop(ident, None):
            job.future.set_exception(Superseded())


async def test_nothing_ends_a_long_job_without_asking(zoo, tmp_path):
    """Another model, the engine again, another session, undo of a model."""
    app = make_app(Running(zoo), tmp_path, small(2))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        app.act("model", load=Load("zoo", dtype="float32"))
        await press(app, pilot, "5")
        study = app.panes["circuit"].study(app)
        for name in ("one", "two"):
            discovery.run(app.panes["circuit"], app, Discover(study, "greedy", rest="patch", name=name))
            await idle(pilot)
        assert [j.slot for j in app.client.jobs.values()] == ["discover", "discover 2"], "one does not take the other's place"
        loads = len(asked(app, Load))
        for keys in (("M", *"nowhere", "enter"), ("ctrl+e",), ("u",), ("r", *"nowhere.jsonl", "enter")):
            await pilot.press(*keys)
            await idle(pilot)
            assert "ends these 2 jobs" in shown(app) and "Discover" in shown(app) and len(app.client.jobs) == 2, keys
            await pilot.press("escape")
            await idle(pilot)
            assert len(app.client.jobs) == 2 and len(asked(app, Load)) == loads and not app.query(Overlay), keys
        await pilot.press("u")
        await idle(pilot)
        await pilot.press("enter")
        await idle(pilot)
        assert len(asked(app, Load)) == loads + 1 and app.state.model == Load("zoo")
        for job in [*app.client.jobs]:
            app.client.cancel(job)
        await press(app, pilot)


async def test_what_ends_nothing_does_not_ask(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        app.client.jobs[1] = Job(1, "lens", "a short one", asyncio.get_running_loop().create_future(), None)
        await press(app, pilot, "ctrl+e")
        assert not app.query(Panel)


async def test_a_discovery_that_ends_does_not_leave_the_paths_of_another_open(zoo, tmp_path):
    app = make_app(zoo, tmp_path, small(2))
    async with app.run_test(size=(130, 40)) as pilot:
        await press(app, pilot, "5")
        app.act("keep", part="L0H1")
        app.act("view", name="circuit.view", value="path")
        for name in ("found", "found"):
            discovery.run(app.panes["circuit"], app, Discover(app.panes["circuit"].study(app), "eap", edges=5, rest="patch", name=name))
            await press(app, pilot)
            assert app.state.views["circuit.view"] == "drawing" and "over 2 prompts of ioi_abba" in flat(app)
        assert [c.name for c in app.state.circuits] == ["circuit", "found", "found-2"], "none takes the place of another"


def test_the_time_left_is_that_of_the_job(zoo):
    """A score counts all its sets from the first one on; the numbers rise to the total it was to have."""
    state = small(2)
    study = Study(state.prompt_set[0], prompt_set=state.prompt_set)
    what = ("faithfulness", "effects", "completeness", "minimality")
    parts: list[Progress] = []
    zoo.run(Score(study, Circuit("c", "zoo", ("L0H1", "L3H2", "L3H3")), what, "patch", subsets=4, greedy=2), parts.append)
    sets = [p for p in parts if " sets, " in p.text]
    assert len(sets) > 3 and all("in this step" not in p.text and "left" in p.text for p in sets)
    totals = {p.total for p in sets}
    assert max(totals) - min(totals) <= 2 and sets[-1].done <= sets[-1].total
    assert {p.text.partition(":")[0] for p in sets} >= {"faithfulness", "how long it takes", "completeness", "minimality"}


def test_a_step_of_a_job_is_called_one(monkeypatch):
    """What the client works out by itself is a step's; the engine's words and the count of what is answered are the job's."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    client = Client(log=None)
    job = client.jobs[1] = Job(1, "score", None, None, None)

    def at(seconds, kind, body):
        clock[0] = seconds
        client.receive(Frame(kind, 1, "score", 1, body), client.jobs)
        return job.left

    class Part:
        done, total = 30, 120

    assert at(60, "progress", Progress(0, 10, "runs of the prompts")) == ""
    assert at(62, "progress", Progress(5, 10, "runs of the prompts")) == "2 s left in this step", "not of the 62 seconds before"
    assert at(64, "progress", Progress(1, 10, "noise floor")) == ""
    assert at(66, "progress", Progress(5, 10, "noise floor: 5 of 10")) == "2 s left in this step"
    assert at(70, "progress", Progress(5, 99, "effects: 5 of 99 sets, 3 min left")) == "3 min left" and job.more == ""
    assert at(80, "partial", Part()) == ""
    assert at(90, "partial", Part()) == "30 s left"


async def test_no_job_is_listed_that_has_ended(zoo, tmp_path):
    """Of an engine that dies while the list is open; and what it ran does not start again with the next one."""
    app = make_app(Running(zoo), tmp_path, small(2))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4", "5")
        discovery.run(app.panes["circuit"], app, Discover(app.panes["circuit"].study(app), "greedy", rest="patch"))
        app.requests.started.add(app.panes["patching"].request(app))
        await idle(pilot)
        await pilot.press("J")
        await idle(pilot)
        assert "Discover" in shown(app)
        app.client.alive = False
        app.client.cancel(next(iter(app.client.jobs)))
        app.on_death("killed by SIGKILL")
        await idle(pilot)
        text = shown(app)
        assert text.count("Discover") == 1 and "Discover     ended" in text and "no jobs are running: the engine is not" in text, (
            "what was selected says so until j"
        )
        await press(app, pilot, "j", "J")
        await press(app, pilot, "J")
        assert "Discover" not in shown(app)
        assert not app.requests.started, "a sweep waits for its key again"


# ------------------------------------------------------------------ what is expensive


async def test_what_is_expensive_waits_for_a_key_with_its_estimate(zoo, tmp_path, monkeypatch):
    from techniques.weights import pane

    app = make_app(zoo, tmp_path, small())
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "7")
        assert all(r.pairs for r in asked(app, HeadWeights)), "a small vocabulary is looked through on sight"
        monkeypatch.setattr(pane, "ON_SIGHT", 1000)
        await press(app, pilot, "l", "j")
        few = asked(app, HeadWeights)[-1]
        assert not few.pairs and "S looks through all 2 × " in shown(app) and "at most about" in shown(app) and "copying" in shown(app)
        whole = zoo.run(replace(few, pairs=True))
        alone = zoo.run(few)
        assert alone.copying == whole.copying and np.array_equal(alone.eigenvalues, whole.eigenvalues) and alone.expected > 0 and np.isnan(whole.expected)
        await press(app, pilot, "S")
        assert asked(app, HeadWeights)[-1] == replace(few, pairs=True) and "S looks" not in shown(app)
        await press(app, pilot, "v", "v", "v", "v", "S")
        assert "v turns to ov or qk" in shown(app)


# ------------------------------------------------------------------ sessions


async def test_sessions_are_listed_by_what_they_hold(zoo, tmp_path, own_home):
    app = make_app(zoo, tmp_path, small())
    where = own_home / "sessions"
    where.mkdir(exist_ok=True)
    other = Session(small(), where / "2026-01-01-000000.jsonl")
    other.do("intervene", intervention="L2H1=zero")
    other.do("go", index=2)
    other.do("undo", of="work")
    other.do("view", name="mode", value="number")
    other.do("name", text="the name mover")
    other.close()
    (where / "broken.jsonl").write_text("nonsense\n")
    async with app.run_test(size=(140, 36)) as pilot:
        await press(app, pilot, "r")
        line = next(x for x in screen(app) if "2026-01-01" in x)
        assert "the name mover: zoo · When Mary and John" in line and "last L2H1=zero" in line and "5 actions" in line
        assert "can't be read" in next(x for x in screen(app) if "broken" in x)
        await press(app, pilot, *"mover", "enter")
        assert app.session.name == "the name mover" and str(app.state.interventions[0]) == "L2H1=zero"
        await press(app, pilot, "w", "ctrl+u", *"again", "enter")
        assert app.session.name == "again" and "called again" in shown(app)
        past = app.session.past
        await press(app, pilot, "w", "enter")
        assert app.session.past == past and app.session.actions == 6, "the same name is not written twice"
    again, warning = read_session(where / "2026-01-01-000000.jsonl")
    assert not warning and again.name == "again" and again.state.index == 0
    assert [line["do"] for line in map(json.loads, (where / "2026-01-01-000000.jsonl").read_text().splitlines()) if "do" in line][-1] == "name"


def test_a_long_list_of_sessions_takes_no_longer_than_it_may(tmp_path, monkeypatch):
    session = Session(State(), tmp_path / "s.jsonl")
    session.do("base", value="corrupt")
    session.close()
    item = sessions.listed(session.path, time.monotonic() - 1)
    assert item.label == "1 actions" and "zoo" not in item.label and "base corrupt" in sessions.listed(session.path, time.monotonic() + 9).label
