"""What a session keeps of its results, and a session run again without a screen."""

import csv
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ui import make_app, press

import engine as program
from screen.session import Session, State, read_session
from techniques.circuits.requests import Discover, Score
from techniques.cluster.folder import Folder
from techniques.generation.requests import MakeDirection
from techniques.lens.requests import Lens, TuneLens
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from tui import first_state
from vocabulary import log
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.requests import Load
from vocabulary.prompts import Metric
from vocabulary.results import STEP, differences, headline, numbers, summary
from vocabulary.wire import to_json
from techniques.record.replay import read_results


@pytest.fixture
def program_on_zoo(engines, monkeypatch):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    return program


def kept(engine, path, requests) -> Session:
    """A session of one action that holds these results."""
    session = Session(first_state({}), path)
    session.do("intervene", intervention="L3H3=zero")
    for request in requests:
        session.record.add(request, engine.run(request), Load(), engine.model.info, True)
    session.record.flush()
    session.close()
    return session


def rewritten(path, change) -> None:
    """The file with its entries changed, and their checksums right."""
    lines = [line.entry for line in log.read_lines(path.read_bytes())[0]]
    path.write_bytes(b"".join(log.encoded({k: v for k, v in change(e).items() if k != "sum"}) for e in lines))


async def test_replay_of_a_hunt_on_the_screen(engines, tmp_path, program_on_zoo, capsys):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        for keys in ("", "a", "4", "S", "l", "a", "u", "3", "2", "k"):
            await press(app, pilot, *keys)
        results = {**app.session.record.results}
    app.session.close()
    assert {r.kind for r in results.values()} >= {"Run", "Lens", "Sweep", "Attribution", "Attention"}
    assert program_on_zoo.main(["replay", str(app.session.path), "--out", str(tmp_path / "out"), "--strict"]) == 0
    said = capsys.readouterr().out
    assert f"{len(results)} equal; largest difference" in said and "differs" not in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [s["verdict"] for s in summary["steps"]] == ["equal"] * len(results) and {"loupe", "torch", "transformers", "transformer_lens"} <= set(
        summary["versions"]
    )
    run = json.loads((tmp_path / "out" / "001-Run.json").read_text())
    assert run["dtype"] == "float32" and run["device"] == "cpu" and run["seeds"]["study.seed"] == 0 and run["model"] == "zoo"
    assert run["result"]["now"]["metric"] == pytest.approx(next(r.numbers["now.metric"] for r in results.values() if r.kind == "Run"), abs=1e-4)
    again, warning = read_session(app.session.path)
    assert not warning and again.record.results.keys() == results.keys() and again.record.place["pane"] == app.pane


def test_every_kind_of_step(engines, tmp_path, program_on_zoo, capsys):
    engine, state = engines["zoo"], first_state({})
    few = replace(state.study, prompt_set=state.prompt_set[:3])
    done = replace(few, interventions=(parse_intervention("L3H2=mean"),))
    circuit = engine.run(Discover(few, "eap", edges=12)).circuit
    kept(
        engine,
        tmp_path / "s.jsonl",
        [
            Run(done),
            Lens(few),
            Discover(few, "eap", edges=12),
            Score(few, circuit),
            Sweep(few, "nodes", "mean", over_set=True),
            Sweep(few, "z", "resample", seed=3),
        ],
    )
    assert program_on_zoo.main(["replay", str(tmp_path / "s.jsonl"), "--out", str(tmp_path / "out"), "--strict", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["kind"] for r in rows] == ["Run", "Lens", "Discover", "Score", "Sweep", "Sweep"] and all(r["verdict"] == "equal" for r in rows)
    body = json.loads((tmp_path / "out" / "006-Sweep.json").read_text())
    assert body["seeds"] == {"study.seed": 0, "seed": 3}
    table = [*csv.DictReader((tmp_path / "out" / "006-Sweep.csv").open())]
    cell = next(r for r in table if (r["field"], r["row"], r["column"]) == ("values", "L3", "H3"))
    assert float(cell["value"]) == pytest.approx(body["result"]["values"][3][3], rel=1e-6)
    text = (tmp_path / "s.jsonl").read_text()
    assert text.count("When Eric and Paul") < 5 and len(text) < 60_000, "sets and studies stand there once"


def test_a_number_that_differs_fails_loudly(engines, tmp_path, program_on_zoo, capsys):
    path = tmp_path / "s.jsonl"
    kept(engines["zoo"], path, [Run(first_state({}).study)])

    def change(entry: dict) -> dict:
        if "got" in entry:
            entry["numbers"]["now.metric"] += 0.01
        return entry

    rewritten(path, change)
    words = ["replay", str(path), "--out", str(tmp_path / "out")]
    assert program_on_zoo.main(words) == 0 and "differs" in (said := capsys.readouterr().out) and "now.metric" in said
    assert program_on_zoo.main([*words, "--strict"]) == 1


def test_what_is_not_run_and_what_can_not_be(engines, tmp_path, program_on_zoo, capsys):
    path = tmp_path / "s.jsonl"
    session = kept(engines["zoo"], path, [Run(first_state({}).study)])
    found = next(iter(session.record.results.values()))
    rows = [line.entry for line in log.read_lines(path.read_bytes())[0]]
    got = next(r for r in rows if "got" in r)
    more = [got | {"got": "Vanished", "request": {"x": 1}}, got | {"got": "TuneLens", "request": {"out": "somewhere"}}, got | {"request": {"study": "nowhere"}}]
    path.write_bytes(b"".join(log.encoded({**{k: v for k, v in r.items() if k != "sum"}, "n": n}) for n, r in enumerate([*rows, *more])))
    assert program_on_zoo.main(["replay", str(path), "--out", str(tmp_path / "out"), "--strict"]) == 1
    said = capsys.readouterr()
    assert (
        "Vanished is not a request of this version" in said.out
        and "TuneLens writes somewhere: --train" in said.out
        and "the study that it is of is missing" in said.err
    )
    assert found.numbers and not (tmp_path / "out" / "003-TuneLens.json").exists() and TuneLens
    assert read_session(path)[1].count("the study that it is of is missing") == 1, "such a line is left out on the screen too"


def test_bad_input(tmp_path, program_on_zoo, capsys):
    empty, old = tmp_path / "e.jsonl", tmp_path / "o.jsonl"
    empty.write_text("garbage\n")
    session = Session(State(), old)
    session.do("clear")
    session.close()
    for words, line in (
        ([str(empty)], "is not a session of Loupe: it has no header"),
        ([str(old)], "holds 1 actions and no result"),
        ([str(tmp_path / "none.jsonl")], "no session"),
        (["no name"], "no session 'no name'"),
    ):
        assert program_on_zoo.main(["replay", *words, "--out", str(tmp_path / "out")]) == 2
        assert line in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_file_cut_at_any_byte_keeps_the_results_before(engines, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda fd: None)
    path, study = tmp_path / "s.jsonl", first_state({}).study
    session = kept(engines["zoo"], path, [Run(study), Run(replace(study, base="corrupt"))])
    whole, keys = path.read_bytes(), [*session.record.results]
    ends = [n for n, byte in enumerate(whole) if byte == 10]
    got = [n for n, line in enumerate(whole.split(b"\n")) if b'"got": ' in line]
    rng = np.random.default_rng(0)
    for cut in sorted({*rng.integers(ends[2] + 1, len(whole), 60).tolist(), *(e + d for e in ends[3:] for d in (-1, 0, 1))}):
        path.write_bytes(whole[:cut])
        again, warning = read_session(path)
        left = sum(ends[n] <= cut for n in got)  # a line without its newline is whole too
        assert [*again.record.results] == keys[:left] and again.state == session.state, cut
        if left and cut < len(whole):
            assert len(read_results(path.read_bytes(), path)[0]) == left


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(2, 40), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_a_change_of_any_cell_is_seen(n, seed, scale):
    from techniques.attention.requests import HeadStatsResult

    x = np.random.default_rng(seed).normal(0, 1, n).astype(np.float32)
    result = HeadStatsResult({"a": x}, "now", "prompt", "")
    was = numbers(result)
    assert not any(d.over for d in differences(was, numbers(result), "float32"))
    y = x.copy()
    y[seed % n] += scale
    worst = differences(was, numbers(replace(result, stats={"a": y})), "float32")[0]
    weight = abs(math.cos(1 + seed % n)) / math.sqrt(n)
    if weight * scale > 1e-4 * max(1, float(np.abs(x).max()), float(np.abs(y).max())) * 1.1:
        assert worst.over


def test_headlines(engines):
    engine, study = engines["zoo"], first_state({}).study
    sweep = Sweep(study, "z", "patch", "noise")
    assert headline(sweep, engine.run(sweep)) == "Sweep z patch: largest L3H3, 8.8358 → 0.5155"
    assert headline(Run(study), engine.run(Run(study))) == "logit_diff 8.8358"


def test_a_session_that_is_only_looked_at_is_not_written(engines, tmp_path):
    path = tmp_path / "s.jsonl"
    kept(engines["zoo"], path, [Run(first_state({}).study)])
    before = path.read_bytes()
    session, _ = read_session(path)
    session.record.add(Run(replace(session.state.study, base="corrupt")), engines["zoo"].run(Run(session.state.study)), Load(), engines["zoo"].model.info)
    session.close()
    assert path.read_bytes() == before
    with pytest.raises(UserError):
        session.do("nonsense")
    alone = Session(first_state({}), tmp_path / "alone.jsonl")
    for asked in (False, True):  # a sweep that a key asked for is work: it is kept without any action
        alone.record.add(Run(alone.state.study), engines["zoo"].run(Run(alone.state.study)), Load(), engines["zoo"].model.info, asked)
        alone.close()
        assert (tmp_path / "alone.jsonl").exists() == asked
    again, warning = read_session(tmp_path / "alone.jsonl")
    assert not warning and again.state == alone.state and again.record.results.keys() == alone.record.results.keys()


def test_a_session_is_found_by_its_name(tmp_path, monkeypatch):
    from techniques.record import replay

    monkeypatch.setattr(replay, "folder", lambda name: tmp_path)
    session = Session(State(), tmp_path / "2026.jsonl")
    session.do("name", text="first")
    session.do("name", text="my hunt")
    session.close()
    assert replay.find_session("my hunt") == replay.find_session("2026") == replay.find_session(str(tmp_path / "2026.jsonl")) == tmp_path / "2026.jsonl"
    with pytest.raises(UserError, match="no session 'first'"):
        replay.find_session("first")


def test_the_numbers_of_a_result_are_what_they_say():
    """In pieces as at once: cells that are not finite, ties, several axes, the edges of a piece."""
    rng = np.random.default_rng(0)
    for shape in ((1,), (3, 4), (STEP,), (STEP + 1,), (5, 7, 999)):
        x = rng.standard_normal(shape).astype(np.float32)
        x.flat[:: 3 if x.size > 1 else 2] = np.nan if x.size > 1 else 2
        x.flat[-1] = x.flat[x.size // 2] = -9.0
        whole = np.nan_to_num(x.ravel().astype(np.float64))
        mixture = (whole * np.cos(1.0 + np.arange(x.size))).sum() / np.sqrt(x.size)
        root = np.sqrt(np.nanmean(x.astype(np.float64) ** 2))
        assert summary(x) == [x.size, pytest.approx(root, rel=1e-6), pytest.approx(mixture, rel=1e-6, abs=1e-9), x.size // 2, -9.0]
    assert summary(np.full(4, np.nan)) is None and summary(np.array([np.inf, 0.0])) == [2, 0.0, 0.0, 0, 0.0]


def work(engine, path, tasks: int) -> None:
    """All tasks of a scattered request, one after the other, in this process."""
    for k in range(tasks):
        assert Folder(path).work(k, tasks, engine, lambda part: None, lambda line: None) == 0


def test_a_scattered_replay_says_what_one_machine_says(engines, tmp_path, program_on_zoo, capsys):
    """Line for line, as JSON, in its files and by its exit code: equal, differing, refused and unreadable steps of several models."""
    engine, state, path = engines["zoo"], first_state({}), tmp_path / "s.jsonl"
    few = replace(state.study, prompt_set=state.prompt_set[:3])
    evil = replace(few, metric=Metric("own", own="evil.py:m"))
    kept(engine, path, [Run(few), Lens(few), Sweep(few, "z", "resample", seed=3), Run(replace(few, base="corrupt"))])

    def change(entry: dict) -> dict:
        if entry.get("got") == "Lens":
            entry["numbers"]["kl"][1] += 1.0
        return entry

    rewritten(path, change)
    rows = [line.entry for line in log.read_lines(path.read_bytes())[0]]
    got = next(r for r in rows if "got" in r)
    more = [
        got | {"got": "Vanished", "request": {"x": 1}},
        got | {"got": "TuneLens", "request": {"out": "somewhere"}},
        got | {"request": {"study": "nowhere"}},
        got | {"load": {"model": str(tmp_path / "no_model")}},
        got | {"request": to_json(Run(evil))},
    ]
    path.write_bytes(b"".join(log.encoded({**{k: v for k, v in r.items() if k != "sum"}, "n": n}) for n, r in enumerate([*rows, *more])))
    assert program_on_zoo.main(["replay", str(path), "--out", str(tmp_path / "one"), "--strict"]) == 1
    one = capsys.readouterr()
    assert program_on_zoo.main(["scatter", "replay", str(path), "--tasks", "3", "--strict", "--out", str(tmp_path / "many")]) == 0
    assert "8 steps in 8 shards, 3 tasks" in capsys.readouterr().err
    work(engine, tmp_path / "many", 3)
    assert program_on_zoo.main(["gather", str(tmp_path / "many")]) == 1
    many = capsys.readouterr()
    verdicts = [line.split()[1] for line in one.out.splitlines()[1:-1]]
    assert verdicts == ["equal", "differs", "equal", "equal", "no", "not", "refused", "refused"] and "the study that it is of is missing" in many.err
    assert one.out.replace("/one", "/many") == many.out
    for name in ("summary.csv", "003-Sweep.csv", "session.ipynb"):
        assert (tmp_path / "one" / name).read_text().replace("/one", "/many") == (tmp_path / "many" / name).read_text(), name
    assert program_on_zoo.main(["gather", str(tmp_path / "many"), "--json"]) == 1
    summary = json.loads((tmp_path / "many" / "summary.json").read_text())["steps"]
    assert json.loads(capsys.readouterr().out) == summary
    Folder(tmp_path / "many").part(1).unlink()
    assert program_on_zoo.main(["gather", str(tmp_path / "many"), "--partial"]) == 1
    assert "partial: 7 of 8 shards" in (said := capsys.readouterr().out) and "   2 differs" not in said


@pytest.mark.table
def test_a_task_makes_the_directions_that_its_steps_steer_along(engines, tmp_path, program_on_zoo, capsys, monkeypatch):
    """A step that another task would have made one for: --train makes it, without --train it is refused in words."""
    engine, state, path = engines["zoo"], first_state({}), tmp_path / "s.jsonl"
    monkeypatch.setattr("vocabulary.files.home", lambda: tmp_path / "home")
    few = replace(state.study, prompt_set=state.prompt_set[:3])
    made = engine.run(ask := MakeDirection(few, "set", "L2.resid_post@END", name="mine"))
    kept(engine, path, [ask, Run(replace(few, interventions=(parse_intervention(f"L2.resid_post=steer:{made.name}:2"),)))])
    for words, verdicts, code in (([], ["not", "refused"], 1), (["--train"], ["equal", "equal"], 0)):
        Path(made.path).unlink(missing_ok=True)
        out = tmp_path / f"many{len(words)}"
        assert program_on_zoo.main(["scatter", "replay", str(path), "--tasks", "2", "--strict", *words, "--out", str(out)]) == 0
        assert Folder(out).work(1, 2, engine, lambda part: None, lambda line: None) == 0, "the second step first"
        work(engine, out, 2)
        capsys.readouterr()
        assert program_on_zoo.main(["gather", str(out)]) == code
        assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:-1]] == verdicts
