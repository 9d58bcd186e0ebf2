"""
`J` with the engine reached by `--via "ssh …"`, through a real sshd: a scattered job is started, watched, drawn in part, cancelled and goes on, also after the line
broke, and every file of it lies on the engine's side. And `--via "ssh HOST … srun …"`, whose words two shells read. Skipped where sshd (or Slurm) isn't there.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from remote.slurm import THERE as SLURM_THERE, slurm
from remote.sshd import THERE, sshd
from test_far import alive, until
from ui import shown

from engine import Engine
from screen import line as lines
from screen.client import Client
from screen.session import Session, State
from techniques.lens.requests import LensResult
from tui import Loupe
from utils import ROOT
from vocabulary.prompts import read_prompt_set
from vocabulary.requests import Load

pytestmark = [pytest.mark.skipif(not THERE, reason="no sshd: apt-get install openssh-server"), pytest.mark.table]
SET = ROOT / "zoo" / "prompts" / "ioi_abba.jsonl"
LEFT_OUT = (".git", ".venv", "__pycache__", "sessions", "exports", "logs", ".*_cache", ".hypothesis", "runs", ".env.local", "saes", "chosen_metrics.json")


@pytest.fixture
def far(tmp_path, monkeypatch):
    """Another checkout, whose engine stays, and a `uv` that is this Python; the words of an ssh to them."""
    far, here = tmp_path / "far side", tmp_path / "bin"
    shutil.copytree(ROOT, far, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (far / ".env.local").write_text("LOUPE_KEEP_ENGINE_MINUTES=1\n")
    here.mkdir()
    (here / "uv").write_text(f'#!/bin/sh\necho Loading module cuda/12.4\nshift\nexec {sys.executable} "$@"\n')
    (here / "uv").chmod(0o755)
    monkeypatch.setattr(lines, "EVERY", 0.2)
    monkeypatch.setattr(Client, "kept", True)
    with sshd(tmp_path) as words:
        yield words
        subprocess.run([*shlex.split(words), f"cd '{far}' && {sys.executable} engine.py stop"], check=True)


def there(folder: Path) -> str:
    """What the far shell reads before `uv`: where the checkout lies, and where uv does. In the quotes of --via and of that shell."""
    return f"cd \\'{folder / 'far side'}\\' && PATH={folder / 'bin'}:$PATH"


def app_of(tmp_path: Path, via: str, copies: int = 4) -> Loupe:
    prompts = read_prompt_set(SET) * copies
    state = State(Load("zoo"), prompts[0], set_path="the_set.jsonl", prompt_set=prompts)
    return Loupe(Session(state, tmp_path / "session.jsonl"), via, log=tmp_path / "screen.log")


def working(folder: Path) -> list[int]:
    """The processes that run tasks of a folder."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"work\0{folder}\0--task".encode() in Path(f"/proc/{entry}/cmdline").read_bytes():
                found.append(int(entry))
    return found


async def start(app, pilot, *fields: str) -> None:
    """In pane 4, over the set: J, scatter this, with these values of its fields."""
    await until(lambda: isinstance(app.requests.result("lens", LensResult), LensResult), 120)
    await pilot.press("4")
    app.act("view", name="patching.over", value="set")
    await pilot.press("J")
    await pilot.pause()
    await pilot.press("G", "k", "enter")
    await pilot.pause()
    assert "scatter sweep z patch over" in shown(app)
    for n, text in enumerate(fields):
        app.screen.focused.value = text
        await pilot.press(*["tab"] * (n < len(fields) - 1))
    await pilot.press("enter")


async def test_j_at_the_end_of_a_line(far, tmp_path):
    folder = tmp_path / "far side" / "runs" / "x"
    before = {*ROOT.rglob("*.bin")}
    app = app_of(tmp_path, f"{far} {there(tmp_path)}")
    scattered = app.requests.scattered
    async with app.run_test(size=(120, 36)) as pilot:
        await start(app, pilot, "2", "here", "", "runs/x")
        await until(lambda: any(folder.glob("part-*.bin")), 120)
        stopped = working(folder)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)  # so that there is time to look
        await until(lambda: "of 8 shards, " in shown(app).split("4 Patching")[1].splitlines()[0], 30)
        await pilot.press("J")
        assert "runs/x · sweep z patch · " in shown(app) and "tasks 2 running" in shown(app)
        await pilot.press("x")
        await pilot.pause()
        await pilot.press("enter")
        await until(lambda: " shards · cancelled · ⏎ goes on" in shown(app), 60)
        assert not any(map(alive, stopped)), "stopped ones too"
        done = {p: p.stat().st_mtime_ns for p in folder.glob("part-*.bin")}
        assert 0 < len(done) < 8
        await pilot.press("enter")
        await pilot.pause()
        await pilot.press("down", "enter")  # show, then: go on
        await until(lambda: len([*folder.glob("part-*.bin")]) > len(done), 120)
        for pid in working(folder):
            os.kill(pid, signal.SIGSTOP)
        pid = app.shared.where.pid
        os.killpg(app.client.process.pid, signal.SIGKILL)  # the line breaks
        await until(lambda: not app.client.alive and app.info is None, 30)
        await pilot.press("J")
        await pilot.pause()
        assert " shards · tasks 2 running · as it was when the engine went" in " ".join(shown(app).split())
        await pilot.press("escape", "ctrl+e")
        await until(lambda: app.info is not None and app.shared.where is not None, 60)
        assert app.shared.where.pid == pid, "the engine stayed"
        await pilot.press("J")
        await until(lambda: "tasks 2 running" in shown(app) or "tasks 1 running" in shown(app), 30)
        for pid in working(folder):
            os.kill(pid, signal.SIGCONT)
        await until(lambda: scattered.tables[str(folder)].whole, 120)
        table = scattered.tables[str(folder)]
        assert all(p.stat().st_mtime_ns == at for p, at in done.items()), "what was done stayed"
        await pilot.press("escape")
        await until(lambda: app.panes["patching"].shown(app)[0] is not None and "shards" not in shown(app).split("4 Patching")[1], 30)
        whole = Engine(Load("zoo")).run(table.request)
        np.testing.assert_allclose(table.result.values, whole.values, atol=1e-5)
        np.testing.assert_allclose(table.result.p, whole.p, atol=1e-5)
    assert not [p for p in tmp_path.iterdir() if p.name in ("runs", "exports")] and not (ROOT / "runs" / "x").exists() and before == {*ROOT.rglob("*.bin")}


@pytest.mark.skipif(not SLURM_THERE, reason="no Slurm: apt-get install slurm-wlm munge, as root")
@pytest.mark.parametrize("quoted", [False, True])
async def test_srun_behind_ssh(far, tmp_path, quoted):
    """Slurm's step holds the engine, whose `J` submits an array; words with blanks come through both shells."""
    with tempfile.TemporaryDirectory() as place, slurm(Path(place)) as env:
        more = f"SLURM_CONF={env['SLURM_CONF']}"
        words = f"{there(tmp_path)}:/usr/sbin {more} srun -p short --mem=0 --time=5 --comment=\\'two words\\'"
        app = app_of(tmp_path, f'{far} "{words}"'.replace("\\'", "'") if quoted else f"{far} {words}", 1)
        async with app.run_test(size=(120, 36)) as pilot:
            await start(app, pilot, "2", "slurm", "-p short --mem=0", "runs/y")
            said = subprocess.run(["squeue", "-h", "-o", "%k|%j"], env=env, capture_output=True, text=True).stdout
            assert "two words|" in said
            await until(lambda: (t := app.requests.scattered.tables.get(str(tmp_path / "far side/runs/y"))) and t.whole, 120)
            assert app.info.device == "cpu"
        await until(lambda: not subprocess.run(["squeue", "-h"], env=env, capture_output=True, text=True).stdout, 60)
