"""`--via "srun …"` on a real Slurm of one node: the real engine, a job that is ended, one that waits, one that can't be. Skipped where Slurm isn't there."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import PROMPT
from remote.slurm import THERE, slurm
from test_far import until
from ui import shown

import screen.client
from screen import line as lines
from screen.session import Session, State
from techniques.lens.requests import LensResult
from tui import Loupe
from vocabulary.requests import Load

pytestmark = [pytest.mark.skipif(not THERE, reason="no Slurm: apt-get install slurm-wlm munge, as root"), pytest.mark.table]
WORDS = "srun -p short --mem=0 --exclusive --time=5"


@pytest.fixture
def node(monkeypatch):
    """A Slurm, and a `uv` that is this Python; what calls its commands."""
    with tempfile.TemporaryDirectory() as place, slurm(Path(place)) as env:
        uv = Path(place) / "uv"
        uv.write_text(f'#!/bin/sh\necho Loading module cuda/12.4\nshift\nexec {sys.executable} "$@"\n')
        uv.chmod(0o755)
        monkeypatch.setenv("SLURM_CONF", env["SLURM_CONF"])
        monkeypatch.setenv("PATH", f"{place}:{env['PATH']}")
        yield lambda *words: subprocess.run(words, check=True, capture_output=True, text=True).stdout


async def test_an_engine_in_a_step_of_slurms(node, tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "EVERY", 0.2)
    monkeypatch.setattr(screen.client.Client, "kept", True)
    app = Loupe(Session(State(Load("zoo"), PROMPT), tmp_path / "session.jsonl"), WORDS, log=tmp_path / "engine.log")
    async with app.run_test(size=(120, 36)) as pilot:
        await until(lambda: isinstance(app.requests.result("lens", LensResult), LensResult), 120)
        first = app.requests.result("lens", LensResult)
        (job,) = node("squeue", "-h", "-o", "%i").split()
        node("scancel", job)
        await until(lambda: not app.client.alive and app.info is None, 60)
        await pilot.pause()
        assert (
            "the engine died (exit code 143: slurmstepd" in (text := " ".join(shown(app).split())) and "CANCELLED AT" in text and "ctrl+e restarts it" in text
        )
        await until(lambda: not node("squeue", "-h"), 60)
        busy = subprocess.Popen(["srun", "-p", "short", "--mem=0", "--exclusive", "--time=5", "sleep", "300"], stderr=subprocess.DEVNULL)
        await until(lambda: node("squeue", "-h", "-o", "%t").split() == ["R"], 60)
        await pilot.press("ctrl+e")  # asks again, and waits behind another job
        await until(lambda: "queued and waiting for resources" in shown(app), 60)
        busy.terminate()
        node("scancel", "-u", "root", "-t", "R")
        await until(lambda: app.info is not None and app.requests.result("lens", LensResult) is not None and not app.client.jobs, 120)
        assert (app.requests.result("lens", LensResult).top_ids == first.top_ids).all() and "queued" not in shown(app)
    await until(lambda: not node("squeue", "-h"), 60)  # the screen went, and the job with it


async def test_a_job_that_can_not_be(node, tmp_path):
    deaths = []
    link = screen.client.Client(tmp_path / "log", "srun -p nowhere", on_death=deaths.append)
    await link.start()
    await link.reader
    assert deaths == ["exit code 1: srun: error: Unable to allocate resources: Invalid partition name specified"]
