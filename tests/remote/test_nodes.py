"""
A real Slurm of three nodes with two GPUs each (three slurmd on this machine; character devices stand for the GPUs): a scattered sweep of which a node dies, GPUs that
Slurm hands out, an engine that stays inside steps. Skipped where Slurm isn't there.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from remote.slurm import THERE, comes_back, dies, of_node, slurm, wait

import techniques
from engine import main
from techniques.cluster import analysis, tasks
from techniques.cluster.folder import Folder
from utils import ROOT

pytestmark = [pytest.mark.skipif(not THERE, reason="no Slurm: apt-get install slurm-wlm munge, as root"), pytest.mark.table]
ABBA = ROOT / "zoo" / "prompts" / "ioi_abba.jsonl"
WORDS = ["sweep", "--kind", "z", "--op", "resample"]


@pytest.fixture(scope="module")
def cluster():
    techniques.parts("requests")
    with tempfile.TemporaryDirectory() as place, slurm(Path(place), 3, 2) as env, pytest.MonkeyPatch.context() as patch:
        for name in ("SLURM_CONF", "PATH"):
            patch.setenv(name, env[name])
        yield Path(place)


def call(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def scatter(out: Path, prompts: Path, sbatch: str, *words: str) -> Folder:
    assert (
        main(["scatter", *WORDS, "--set", str(prompts), "--tasks", "4", "--shard", "1", *words, "--sbatch", f"-p short --mem=0 {sbatch}", "--out", str(out)])
        == 0
    )
    return Folder(out)


def seen(folder: Folder):
    """As J shows it."""
    analysis.DESK.look((str(folder.path),))
    return analysis.DESK.states[str(folder.path)]


def ended(folder: Folder) -> bool:
    return not tasks.of_folder(tasks.queue(), folder)


@pytest.mark.parametrize("requeue", [False, True])
def test_a_node_dies(cluster, tmp_path, capsys, monkeypatch, requeue):
    """Nothing is lost, and what is missing runs again: by Slurm itself, or when it is told to go on."""
    monkeypatch.setattr(analysis, "PATIENCE", 0.0)
    prompts = tmp_path / "set.jsonl"
    prompts.write_text(ABBA.read_text() * 4)
    folder = scatter(tmp_path / "a", prompts, "--exclusive" + " --no-requeue" * (not requeue))
    tasks.start(folder, tasks.queue())
    wait(lambda: [k for k in range(4) if on(folder, k) == "n2" and folder.part(k).exists()], 60)
    (task,) = (k for k in range(4) if on(folder, k) == "n2")
    dies(cluster, "n2")
    there = {p: p.stat().st_mtime_ns for p in folder.path.glob("part-*.bin")}
    if requeue:
        wait(lambda: seen(folder).tasks.startswith("tasks 1 pending (BeginTime: "), 120)
        assert "starts again after its node failed" in seen(folder).tasks and seen(folder).live
        (job,) = {*call("squeue", "-h", "-r", "-o", "%A").split()}
        call("scontrol", "update", f"JobId={job}", "StartTime=now")
    else:
        wait(lambda: ended(folder), 120)
        state = seen(folder)
        assert state.error == "1 of its tasks lost their node (NODE_FAIL)" and state.more and 0 < state.done < state.total
        assert {i % 4 for i in folder.missing()} == {task}
        tasks.start(folder, tasks.queue())
        assert f"--array={task}\n" in (folder.path / "job.sbatch").read_text()
    wait(lambda: ended(folder), 120)
    assert not folder.missing() and seen(folder).whole and there == {p: p.stat().st_mtime_ns for p in there}, "no part was computed twice"
    comes_back(cluster, "n2")
    capsys.readouterr()
    assert main(["gather", str(folder.path), "--json"]) == 0
    joined = json.loads(capsys.readouterr().out)
    assert main([*WORDS, "--set", str(prompts), "--mean", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    for name in ("values", "normalised", "low", "high", "p", "holm", "per_prompt"):
        np.testing.assert_allclose(joined[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name)
    wait(lambda: call("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 3)


def on(folder: Folder, task: int) -> str:
    """The node on which a task is; "" for none."""
    words = f"work\0{folder.path}\0--task\0{task}\0".encode()
    for node in ("n1", "n2", "n3"):
        for pid in of_node(node):
            with contextlib.suppress(OSError):
                if words in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return node
    return ""


def test_gpus_that_slurm_hands_out(cluster, tmp_path, capsys):
    """Each task has its own; torch sees none here, which is one line, and the model is on the CPU; where --device says cuda, one line says why it can't be."""
    folder = scatter(tmp_path / "a", ABBA, "--gres=gpu:1 -c 1", "--shard", "8")
    call("sbatch", "--wait", str(folder.path / "job.sbatch"))
    logs = [(folder.path / f"log-{k}.txt").read_text() for k in range(4)]
    assert {re.search(r"CUDA_VISIBLE_DEVICES=(\S*)", log)[1] for log in logs} == {"0", "1"}
    assert all("GPU not used: Slurm gave this job GPU" in log and "float32 on cpu" in log for log in logs)
    capsys.readouterr()
    assert main(["gather", str(folder.path)]) == 0
    assert "GPU not used: Slurm gave this job GPU" in capsys.readouterr().err
    folder = scatter(tmp_path / "b", ABBA, "--gres=gpu:1 -c 1", "--device", "cuda", "--shard", "8")
    assert subprocess.run(["sbatch", "--wait", folder.path / "job.sbatch"]).returncode == 2
    assert seen(folder).error.startswith("4 of its tasks failed: torch sees no device cuda. GPU not used: Slurm gave this job GPU ")


def test_processes_inside_a_job_share_its_gpus(cluster, tmp_path):
    """`--local 2` inside a job with two GPUs: one each."""
    words = ["--set", str(ABBA), "--shard", "16", "--local", "2", "--out", str(tmp_path / "a")]
    call("srun", "-p", "short", "--mem=0", "--gres=gpu:2", sys.executable, str(ROOT / "engine.py"), "scatter", *WORDS, *words)
    logs = [(tmp_path / "a" / f"log-{k}.txt").read_text() for k in range(2)]
    assert [re.search(r"CUDA_VISIBLE_DEVICES=(\S*)", log)[1] for log in logs] == ["0", "1"]


LOOK = """
import os, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
import kept
from model import relay
from pathlib import Path
relay.BASE, relay.PROGRAM = Path({base!r}), (sys.executable, kept.__file__, {base!r}, "1")
for _ in range(2):
    line, facts = relay.call(relay.place(), "look") or (relay.connect(), relay.call(relay.place(), "look")[1])
    print(os.environ.get("CUDA_VISIBLE_DEVICES", "none"), facts["pid"], flush=True)
time.sleep(3)
"""


def test_an_engine_that_stays_is_a_steps_own(cluster, near):
    """Two screens in a step find one engine; a step with another GPU, another job, and a shell outside have their own."""
    (near / "look.py").write_text(LOOK.format(root=str(ROOT), tests=str(ROOT / "tests"), base=str(near)))
    look = f"{sys.executable} {near}/look.py"
    steps = f"srun --exact -n1 --gres=gpu:1 {look} & srun --exact -n1 --gres=gpu:1 {look} & wait; srun --overlap -n1 {look}"
    try:
        said = call("salloc", "-Q", "-p", "short", "--mem=0", "-n", "2", "--gres=gpu:2", "bash", "-c", steps)
        said += call("srun", "-p", "short", "--mem=0", "--gres=gpu:1", *look.split())
        said += call(*look.split())
        found = [line.split() for line in said.splitlines()]
        engines = {pid: [visible for visible, p in found if p == pid] for _, pid in found}
        assert sorted(engines.values()) == [["0", "0"], ["0", "0"], ["0,1", "0,1"], ["1", "1"], ["none", "none"]]
    finally:
        for pid in map(int, (near / "started").read_text().split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
