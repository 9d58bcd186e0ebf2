"""Every analysis once in bfloat16, and once on a CPU that acts as a CUDA device, against the same analysis on the CPU beside it; benchmarks/gpu.py."""

import io
import json
import sys

import pytest
from conftest import ROOT
from pretended import pretended_cuda

sys.path.append(str(ROOT / "benchmarks"))  # last: modules there have names of the project's

import gpu
import torch as t
from gpu_checks import learned
from gpu_checks.bench import Bench, difference, prompts
from gpu_checks.requests import every
from vocabulary.prompts import Study
from vocabulary.wire import REQUESTS

pytestmark = pytest.mark.slow

SET = prompts(4, 15, 600)
TABLE = every(Study(SET[0]), Study(SET[0], prompt_set=SET), 1, "random")
LEARNED = {"TuneLens", "FitJacobian", "Saes", "Preflight", "Features", "Feature", "Examples", "FeatureGraph", "CheckEdge", "TrainSae"}
ELSEWHERE = (  # of folders, a second model, transcoders, words, scattered jobs
    "Load LoadForAll Status Where Models MakeDirection Directions Curve MakeSet WeightDifference AttributionGraph GraphEffects GraphSteer GraphGroups "
    "WatchShards StartShards TakeShards CancelShards GoOnShards"
)


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return Bench("cpu", True, tmp_path_factory.mktemp("host"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with pretended_cuda():
        yield Bench("cuda", True, tmp_path_factory.mktemp("device"))


def test_the_table_has_every_analysis():
    assert {type(ask).__name__ for ask in TABLE.values()} == set(REQUESTS) - LEARNED - {*ELSEWHERE.split()}


@pytest.mark.parametrize("name", TABLE)
def test_in_bfloat16(host, name):
    for model in ("gpt2", "gemma-2-2b"):
        host.fresh(host.engine(model, "bfloat16"), TABLE[name])


@pytest.mark.slow
def test_the_benchmark(host, tmp_path):
    lines = io.StringIO()
    gpu.run_checks(gpu.arguments(["--device", "cpu", "--tiny", "--only", "reference,memory_llama,profile_llama,auto", "--work", str(tmp_path)]), lines)
    found = {row.pop("check"): row for row in map(json.loads, lines.getvalue().splitlines())}
    assert set(found) == {"environment", "memory_llama", "profile_llama", "auto", "reference", "summary"}
    assert not [name for name, row in found.items() if "error" in row or row["ok"] is False], found
    assert found["memory_llama"]["lens table, 64 tokens"]["s"] > 0 and found["profile_llama"]["requests"]["lens table, 64 tokens"]["wall_ms"] > 0


def test_a_failing_check_does_not_stop_the_next(monkeypatch, tmp_path):
    monkeypatch.setattr("gpu_checks.memory.gemma", lambda b: 1 / 0)
    lines = io.StringIO()
    assert not gpu.run_checks(gpu.arguments(["--device", "cpu", "--tiny", "--only", "gemma,reference", "--work", str(tmp_path)]), lines)
    found = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [row["check"] for row in found] == ["environment", "gemma", "reference", "summary"] and found[-1]["failed"] == ["gemma"]
    assert "ZeroDivisionError" in found[1]["error"] and found[2]["ok"] and found[1]["ok"] is False


# ------------------------------------------------------------------ the pretended device


def test_the_pretence_and_its_end():
    with pretended_cuda() as mode:
        x, y = t.ones(2, device="cuda"), t.ones(2)
        assert x.device == (x + 1).device == t.device("cuda:0") and y.device == x.cpu().device == t.device("cpu") and x.to("cpu").sum().item() == 2
        for wrong in (lambda: x + y, lambda: y.add_(x), lambda: t.cat([x, y]), lambda: y[x.long()], lambda: x.__setitem__(slice(None), y[[0, 1]]) or x * y):
            with pytest.raises(RuntimeError, match="pretended"):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        waits = sum(mode.waits.values())
        x.tolist(), x.cpu(), x.to("cpu"), bool(x[0] > 0)
        assert sum(mode.waits.values()) == waits + 4
    assert not t.cuda.is_available() and (t.ones(2) + y).device == t.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_on_a_device(bench, name):
    """The engine on the CPU beside it was told so: that the machine has a device is no reason to use it."""
    got, want = (bench.fresh(bench.engine("gpt2", "float32", device), TABLE[name]) for device in ("cuda", "cpu"))
    found = difference(want, got)
    assert found["relative"] < 1e-5, found


@pytest.mark.slow
def test_what_is_learned_on_a_device(bench):
    for check in (learned.features, learned.fits):
        ok, found = check(bench)
        assert ok, found
