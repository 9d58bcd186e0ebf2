"""The session log: apply, undo, redo, resume; damage is said and nothing is lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vocabulary.log import newest_session
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt
from vocabulary.wire import from_json, to_json
import tui  # noqa: F401  (the panes' views)
from screen.session import VIEWS, Session, State, apply, read_session

ACTIONS = st.one_of(
    st.tuples(st.just("intervene"), st.fixed_dictionaries({"intervention": st.sampled_from(["L0H1=zero", "L2.mlp@-1=scale:0.5", "L1.resid_mid@S2=patch"])})),
    st.tuples(st.just("drop"), st.just({"intervention": "L0H1=zero"})),
    st.tuples(
        st.just("prompt"), st.fixed_dictionaries({"prompt": st.builds(Prompt, st.text(min_size=1, max_size=8), st.none() | st.text(max_size=8)).map(to_json)})
    ),
    st.tuples(st.just("open_set"), st.just({"path": "a.jsonl", "prompts": to_json([Prompt("a"), Prompt("b")]), "index": 0})),
    st.tuples(st.just("go"), st.fixed_dictionaries({"index": st.integers(-1, 2)})),
    st.tuples(st.just("metric"), st.just({"kind": "prob", "pos": -2})),
    st.tuples(st.just("base"), st.sampled_from([{"value": "corrupt"}, {"value": "clean"}])),
    st.tuples(st.just("enable"), st.fixed_dictionaries({"value": st.booleans()})),
    st.tuples(st.just("clear"), st.just({})),
    st.tuples(st.sampled_from(["undo", "redo"]), st.just({})),
    st.sampled_from([(k, v) for k, vs in VIEWS.items() for v in vs]).map(lambda kv: ("view", {"name": kv[0], "value": kv[1]})),
)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(ACTIONS, max_size=12))
def test_a_file_read_back_is_the_same_session(tmp_path_factory, steps):
    path = tmp_path_factory.mktemp("s") / "s.jsonl"
    session = Session(State(), path)
    for name, args in steps:
        before = session.state
        try:
            session.do(name, **args)
        except UserError:
            assert session.state == before, "a refused action changes nothing"
    if not session.written:
        assert not path.exists()
        return
    session.close()
    again, warning = read_session(path)
    assert not warning and again.state == session.state
    assert [s for s, _ in again.past] == [s for s, _ in session.past] and [s for s, _ in again.future] == [s for s, _ in session.future]
    while again.past:
        again.do("undo")
    assert again.state == State()
    assert from_json(json.loads(json.dumps(to_json(session.state))), State) == session.state


def test_a_damaged_file_is_kept_and_said(tmp_path):
    path = tmp_path / "s.jsonl"
    session = Session(State(), path)
    for node in ("L0H1", "L1H1", "L2H1"):
        session.do("intervene", intervention=f"{node}=zero")
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])  # cut by a kill in the middle of a write
    again, warning = read_session(path)
    assert len(again.state.interventions) == 2 and "line 4" in warning and again.path != path
    again.do("clear")
    assert path.read_bytes() == whole[:-20]
    third, warning = read_session(again.path)
    assert not warning and len(third.past) == 3 and third.state.interventions == ()
    lines = whole.decode().splitlines()
    path.write_text("\n".join([lines[0], lines[1], "garbage", lines[3]]) + "\n")
    again, warning = read_session(path)
    assert len(again.state.interventions) == 2 and "line 3" in warning and "the other 2 steps" in warning
    for text in ("", "garbage\n", "[]\n", '{"loupe": 99}\n', '{"loupe": 1, "start": {"base": 3}}\n', "\x00\xff\n"):
        path.write_text(text)
        with pytest.raises(UserError):
            read_session(path)
    with pytest.raises(UserError, match="no session"):
        read_session(tmp_path / "none.jsonl")
    assert newest_session() == third.path
    third.close()
    third.path.unlink()
    with pytest.raises(UserError, match="no session"):
        newest_session()


def test_actions_refuse_what_does_not_fit():
    for name, args, words in (
        ("explode", {}, "unknown action"),
        ("go", {"index": 0}, "no prompt"),
        ("metric", {"kind": "vibes"}, "vibes"),
        ("view", {"name": "mode", "value": "sepia"}, "sepia"),
        ("intervene", {"intervention": "L0H0=explode"}, "explode"),
        ("intervene", {"nonsense": 1}, "nonsense"),
        ("prompt", {"prompt": {"text": "a"}}, "text"),
    ):
        with pytest.raises(UserError, match=words):
            apply(State(), name, args)


def test_one_intervention_a_node():
    state = apply(State(), "intervene", {"intervention": "L0H0=zero"})
    state = apply(state, "intervene", {"intervention": "0.0=patch"})
    assert [str(i) for i in state.interventions] == ["L0H0=patch"]
