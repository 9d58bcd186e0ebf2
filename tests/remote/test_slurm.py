"""A scattered sweep through a real Slurm of one node: an array, a task that is cancelled in its middle, a resubmission. Skipped where Slurm isn't there."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from remote.slurm import THERE, slurm, wait

from engine import main
from techniques.cluster.folder import Folder
from utils import ROOT

pytestmark = [pytest.mark.skipif(not THERE, reason="no Slurm: apt-get install slurm-wlm munge, as root"), pytest.mark.table]

WORDS = ["sweep", "--kind", "z", "--op", "resample", "--set", str(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")]


def test_an_array_that_is_cancelled_and_submitted_again(tmp_path, capsys):
    out = tmp_path / "a"
    with tempfile.TemporaryDirectory() as place, slurm(Path(place)) as env:
        assert main(["scatter", *WORDS, "--tasks", "2", "--shard", "2", "--sbatch", "-p short --mem=0", "--out", str(out)]) == 0
        submit = lambda *more: subprocess.run(["sbatch", *more, out / "job.sbatch"], env=env, check=True, capture_output=True, text=True).stdout  # noqa: E731
        number = submit().split()[-1]
        wait(lambda: any(out.glob("part-*.bin")), 120)
        subprocess.run(["scancel", number], env=env, check=True)
        wait(lambda: not subprocess.run(["squeue", "-h"], env=env, check=True, capture_output=True, text=True).stdout, 120)
        folder = Folder(out)
        before = {p: p.stat().st_mtime_ns for p in out.glob("part-*.bin")}
        assert before and folder.missing(), "cancelled too late: nothing is missing"
        assert main(["gather", str(out)]) == 2
        submit("--wait")
        assert not folder.missing() and before == {p: p.stat().st_mtime_ns for p in before}
    capsys.readouterr()
    assert main(["gather", str(out), "--json"]) == 0
    joined = json.loads(capsys.readouterr().out)
    assert main([*WORDS, "--mean", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    for name in ("values", "normalised", "low", "high", "p", "holm", "per_prompt"):
        np.testing.assert_allclose(joined[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name)
