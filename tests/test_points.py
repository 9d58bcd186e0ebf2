"""The log in words, going to a point of it, two points side by side, notes, and where one was looking."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ui import make_app, press, shown

from screen import points
from screen.session import Session, State, read_session
from techniques.output.requests import Run
from tui import first_state
from vocabulary.nodes import UserError


async def type_line(app, pilot, text: str) -> None:
    app.focused.value = text
    await press(app, pilot, "enter")


async def test_history_note_jump_compare_resume(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(140, 40)) as pilot:
        for keys in ("", "3", "l", "a", "!"):
            await press(app, pilot, *keys)
        await type_line(app, pilot, "the mover")
        node, ablated = str(app.node()), app.state
        await press(app, pilot, "[", "a")
        rows = [points.words(app, p) for p in points.points(app)]
        assert rows[0].startswith("began with zoo → logit_diff 8.836") and rows[1].startswith(f"ablated {node} → logit_diff 8.836 → ")
        assert rows[2] == f"! the mover  ({node} · logit_diff {engines['zoo'].run(Run(ablated.study)).now.metric:.4f})"
        last = app.state
        await press(app, pilot, ":")
        await type_line(app, pilot, "history")
        assert "history, " in shown(app) and "! the mover" in shown(app)
        await press(app, pilot, *"kkkkkkkkkk", "j", "m", "G", "c")
        assert "two points" in shown(app) and "interventions" in shown(app) and "largest change cells." in shown(app)
        await press(app, pilot, "escape", "g", "enter")
        assert app.state.interventions == () and "u goes back" in app.status[0][0]
        await press(app, pilot, "u")
        assert app.state == last
        await press(app, pilot, "+")
        cursor = app.cursor
    app.session.close()
    session, warning = read_session(app.session.path)
    assert not warning and [s.name for s in session.record.steps].count("note") == 1 and session.state == last
    again = make_app(engines["zoo"], tmp_path)
    again.session = session
    async with again.run_test(size=(140, 40)) as pilot:
        await press(again, pilot)
        assert (again.pane, again.zoomed, again.cursor) == ("attribution", True, cursor)
        with pytest.raises(UserError, match="this is where you stand"):
            points.jump(again, points.points(again)[-1])
        await press(again, pilot, "!")
        for text, wrong in (("  ", "type a line"), ("x" * 501, "at most 500 characters")):
            await type_line(again, pilot, text)
            assert wrong in shown(again)


def test_a_place_that_does_not_fit_is_not_taken(tmp_path):
    from screen import resume

    class App:
        panes, pane, zoomed, cursor, at_end = {"lens": None}, "lens", False, "as it was", True
        session = Session(State(), tmp_path / "s.jsonl")

    for place in (
        {},
        {"pane": "nowhere"},
        {"pane": ["x"], "cursor": 3},
        {"cursor": {"layer": "a"}},
        {"cursor": {"depth": 1}},
        {"cursor": None, "zoomed": "yes"},
    ):
        App.session.record.place = place
        resume.put_back(App)
        assert App.cursor == "as it was" and not App.zoomed
    App.session.record.place = {"cursor": {"layer": -3, "comp": "nonsense", "point": "", "src": -1}}
    resume.put_back(App)
    assert (App.cursor.layer, App.cursor.comp, App.cursor.point, App.cursor.src) == (0, "head", "resid_post", 0)


DEEDS = st.one_of(
    st.tuples(st.just("intervene"), st.fixed_dictionaries({"intervention": st.sampled_from(["L3H3=zero", "L0H1=patch", "L2.mlp@-1=scale:0.5", "L3H2=mean"])})),
    st.tuples(st.just("go"), st.fixed_dictionaries({"index": st.integers(0, 3)})),
    st.tuples(st.just("metric"), st.fixed_dictionaries({"kind": st.sampled_from(["prob", "logit_diff", "kl"])})),
    st.tuples(st.just("base"), st.fixed_dictionaries({"value": st.sampled_from(["clean", "corrupt"])})),
    st.tuples(st.just("enable"), st.fixed_dictionaries({"value": st.booleans()})),
    st.tuples(st.just("clear"), st.just({})),
    st.tuples(st.just("view"), st.just({"name": "mode", "value": "number"})),
    st.tuples(st.just("note"), st.just({"text": "here", "node": "L3H3"})),
    st.tuples(st.just("jump"), st.fixed_dictionaries({"point": st.integers(0, 9)})),
    st.tuples(st.sampled_from(["undo", "redo"]), st.just({"of": "work"})),
)


def undone_and_redone(engine, path, deeds) -> None:
    """Every state and every metric on the way back is that of the way there; and again when all is redone, and when the file is read."""

    def metric(state: State) -> float:
        return engine.run(Run(state.study)).now.metric

    session = Session(replace(first_state({}), prompt_set=first_state({}).prompt_set[:4]), path)
    for name, args in deeds:
        if name == "jump":
            steps = session.record.steps
            to = steps[args["point"] % len(steps)].after if steps else session.start
            args = {"to": replace(to, prompt_set=()), "prompts": list(to.prompt_set)}
        try:
            session.do(name, **args)
        except UserError:
            continue
    end, there, number = session.state, [(s, metric(s)) for s, name in session.past if name != "view"], metric(session.state)
    bare = lambda s: replace(s, views={})  # noqa: E731
    for state, was in reversed(there):
        session.do("undo", of="work")
        assert bare(session.state) == bare(state) and metric(session.state) == pytest.approx(was, abs=1e-5)
    for state, was in [*there[1:], (end, number)][: len(there)]:
        session.do("redo", of="work")
        assert bare(session.state) == bare(state) and metric(session.state) == pytest.approx(was, abs=1e-5)
    assert session.state == end
    session.close()
    if session.written:
        again, warning = read_session(path)
        assert not warning and again.state == end and [s.after for s in again.record.steps] == [s.after for s in session.record.steps]


QUIET = dict(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


@settings(max_examples=4, **QUIET)
@given(st.lists(DEEDS, min_size=3, max_size=8))
def test_undone_and_redone_is_the_same(engines, tmp_path_factory, deeds):
    undone_and_redone(engines["zoo"], tmp_path_factory.mktemp("s") / "s.jsonl", deeds)


@pytest.mark.table
@settings(max_examples=80, **QUIET)
@given(st.lists(DEEDS, max_size=14))
def test_undone_and_redone_is_the_same_of_many(engines, tmp_path_factory, deeds):
    undone_and_redone(engines["zoo"], tmp_path_factory.mktemp("s") / "s.jsonl", deeds)
