"""Which device is taken, and what is said of a GPU that can't be used or that others fill. No GPU here: torch's answers are put in its mouth."""

import dataclasses
import subprocess

import pytest
import torch as t
from conftest import CLEAN

from model import devices
from model.devices import driver_version, filled_by_others, pick_device, unused_gpu
from model.relay import place
from engine import Engine, main
from vocabulary.nodes import UserError
from vocabulary.requests import Load

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.161.08  Sat Feb 24 12:01:03 UTC 2024\nGCC version:  gcc version 12.2.0 (Debian)\n"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n"


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Put a driver on this machine, seen by torch or not, with a CUDA of torch's."""

    def put(text: str = CLOSED, cuda: str | None = "13.2", visible: str | None = None, said: str = "No CUDA GPUs are available"):
        file = tmp_path / "version"
        file.write_text(text)
        monkeypatch.setattr(devices, "DRIVER_FILE", file)
        monkeypatch.setattr(t.version, "cuda", cuda)
        monkeypatch.setattr(t.cuda, "is_available", lambda: False)
        monkeypatch.setattr(t.cuda, "init", lambda: (_ for _ in ()).throw(RuntimeError(said)))
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        return file

    return put


def test_the_drivers_version(tmp_path, monkeypatch):
    file = tmp_path / "version"
    for text, version in ((CLOSED, "535.161.08"), (OPEN, "580.65.06"), ("?", "of an unknown version")):
        file.write_text(text)
        assert driver_version(file) == version
    file.unlink()
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert driver_version(file) == ""
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    for code, out, version in ((0, "470.57.02\n470.57.02\n", "470.57.02"), (9, "NVIDIA-SMI has failed", ""), (0, "", "")):
        monkeypatch.setattr(devices.subprocess, "run", lambda *a, code=code, out=out, **k: subprocess.CompletedProcess(a, code, out, ""))
        assert driver_version(file) == version


@pytest.mark.parametrize(
    "given, words",
    [
        (
            {},
            [
                "driver 535.161.08",
                "torch's CUDA 13.2 needs 580",
                "uv pip install --torch-backend=auto --reinstall-package torch torch",
                "uv run --no-sync tui.py",
            ],
        ),
        ({"cuda": None}, ["driver 535.161.08", f"torch {t.__version__} has no CUDA", "uv pip install --torch-backend=auto --reinstall-package torch torch"]),
        ({"text": OPEN, "visible": ""}, ["CUDA_VISIBLE_DEVICES='' hides it", "unset it", "driver 580.65.06, torch's CUDA 13.2"]),
        ({"text": OPEN, "visible": "-1"}, ["CUDA_VISIBLE_DEVICES='-1' hides it"]),
        ({"text": OPEN, "visible": "0"}, ["srun --gres=gpu:1", "No CUDA GPUs are available", "driver 580.65.06"]),
        ({"text": OPEN, "visible": "MIG-0a1b"}, ["CUDA_VISIBLE_DEVICES='MIG-0a1b' names none that is here: nvidia-smi -L lists them", "No CUDA GPUs"]),
        ({"cuda": "12.8", "said": "out of luck"}, ["out of luck", "driver 535.161.08, torch's CUDA 12.8"]),
    ],
)
def test_a_gpu_that_torch_cannot_use(driver, given, words):
    driver(**given)
    line = unused_gpu()
    assert line.startswith("GPU not used: ") and "docs/hpc.md" in line[:110] and "\n" not in line
    assert all(w in line for w in words), line
    with pytest.raises(UserError, match="torch sees no device cuda:1. GPU not used") as error:
        pick_device("cuda:1")
    assert str(error.value).endswith(line)
    assert pick_device("auto") == pick_device("cpu") == t.device("cpu")


def test_nothing_is_said_without_a_gpu_or_with_one_that_works(driver, tmp_path, monkeypatch):
    file = driver()
    monkeypatch.setattr(t.cuda, "is_available", lambda: True)
    assert unused_gpu() == "" and pick_device("auto") == t.device("cuda")
    monkeypatch.setattr(t.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert unused_gpu(file.with_name("absent")) == ""
    monkeypatch.setenv("SLURM_JOB_GPUS", "3")
    assert unused_gpu(file.with_name("absent")) == "", "of the step that submitted this job, which has none"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert unused_gpu(file.with_name("absent")).startswith("GPU not used: Slurm gave this job GPU 3, and ")


def test_a_slice_of_a_gpu(monkeypatch):
    """MIG: one slice is seen, as cuda, with its own memory; a second one that is named is not."""
    for name, answer in (("is_available", True), ("device_count", 1), ("memory_reserved", 0), ("mem_get_info", (9 << 30, 10 << 30))):
        monkeypatch.setattr(t.cuda, name, lambda *args, answer=answer: answer)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-a,MIG-b")
    assert pick_device("auto") == t.device("cuda") and filled_by_others(t.device("cuda")) == ""
    with pytest.raises(UserError, match="there is no device cuda:1: .* the first of CUDA_VISIBLE_DEVICES='MIG-a,MIG-b': write cuda"):
        pick_device("cuda:1")
    one = place()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-b")
    assert place() != one, "a slice has an engine of its own"
    places = set()
    for step in ("0", "1"):  # each sees its GPU as 0, where Slurm hides the others
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        monkeypatch.setenv("SLURM_STEP_GPUS", step)
        places.add(place())
    assert len(places) == 2


def test_a_device_that_others_fill(monkeypatch):
    monkeypatch.setattr(t.cuda, "memory_reserved", lambda device: 0)
    for free, words in ((17, "other processes hold 63.0 GB of cuda:0's 80.0 GB: 17.0 GB are free (nvidia-smi says who)"), (75, "")):
        monkeypatch.setattr(t.cuda, "mem_get_info", lambda device, free=free: (free * 10**9, 80 * 10**9))
        assert filled_by_others(t.device("cuda:0")) == words
    assert filled_by_others(t.device("cpu")) == ""
    monkeypatch.setattr(t.cuda, "mem_get_info", lambda device: (17 * 10**9, 80 * 10**9))
    monkeypatch.setattr(t.cuda, "memory_reserved", lambda device: 62 * 10**9)
    assert filled_by_others(t.device("cuda:0")) == ""  # that is ours
    monkeypatch.setattr(t.cuda, "mem_get_info", lambda device: (_ for _ in ()).throw(RuntimeError("CUDA error: out of memory\nmore")))
    with pytest.raises(UserError, match="cuda:0 can't be opened .* --device cpu. CUDA error: out of memory$"):
        filled_by_others(t.device("cuda:0"))


def test_it_is_said_when_the_device_is_auto(driver, folders, capsys):
    driver()
    folder = str(folders["gpt2"])
    info = Engine(Load(folder)).model.info
    assert info.device == "cpu" and info.warning == unused_gpu()
    assert Engine(Load(folder, device="cpu")).model.info.warning == ""
    assert main(["run", "--model", folder, "--clean", CLEAN, "--json"]) == 0
    assert info.warning in capsys.readouterr().err
    assert main(["run", "--model", folder, "--clean", CLEAN, "--device", "cuda"]) == 2
    assert info.warning in capsys.readouterr().err
    old = {f.name: getattr(info, f.name) for f in dataclasses.fields(info) if f.name != "warning"}
    assert type(info)(**old).warning == ""
