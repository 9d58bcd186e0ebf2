"""Which device a model goes to, and a word about a GPU that is there and can't be used, or that others fill."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import torch as t

from vocabulary.nodes import UserError
from utils import show_bytes

DRIVER_FILE = Path("/proc/driver/nvidia/version")
OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}  # by torch's CUDA; NVIDIA, "CUDA Compatibility", minor version compatibility
OTHER_TORCH = "uv pip install --torch-backend=auto --reinstall-package torch torch, then uv run --no-sync tui.py"
ASK = "ask Slurm for one (srun --gres=gpu:1)"


def pick_device(name: str) -> t.device:
    """The device of a name of the user's: auto, cpu, cuda, cuda:1, mps. UserError where it is not there."""
    if name == "auto":
        return t.device("cuda" if t.cuda.is_available() else "cpu")
    try:
        device = t.device(name)
    except RuntimeError as error:
        raise UserError(f"{name!r} is not a device: write auto, cpu, cuda, cuda:1 or mps") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"{name!r} is not a device that Loupe uses: write auto, cpu, cuda, cuda:1 or mps")
    if device.type == "cuda" and (why := unused_gpu()):
        raise UserError(f"torch sees no device {name}. {why}")
    if device.type == "cuda" and (device.index or 0) >= t.cuda.device_count():
        slices = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        slices = f"; of MIG slices CUDA takes one, the first of CUDA_VISIBLE_DEVICES={slices!r}: write cuda" if "MIG-" in slices else ""
        raise UserError(f"there is no device {name}: torch sees {t.cuda.device_count()} CUDA devices{slices}")
    if device.type == "mps" and not t.backends.mps.is_available():
        raise UserError("there is no mps device here: write auto or cpu")
    return device


def driver_version(file: Path | None = None) -> str:
    """The version of NVIDIA's driver by its kernel module, else by nvidia-smi; "" where there is no GPU of theirs."""
    file = file or DRIVER_FILE
    if file.is_file():
        found = re.search(r"\d{3,}\.\d+(\.\d+)?", file.read_text(errors="replace"))
        return found[0] if found else "of an unknown version"
    if shutil.which("nvidia-smi") is None:
        return ""
    try:
        asked = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return asked.stdout.split()[0] if asked.returncode == 0 and asked.stdout.strip() else ""


def unused_gpu(file: Path | None = None) -> str:
    """A line on a GPU that is here, or that Slurm gave, while torch has none: the driver, torch's CUDA and what to do; "" where torch has one, or where there is none."""
    if t.cuda.is_available():
        return ""
    if not (driver := driver_version(file)):
        given = os.environ.get("CUDA_VISIBLE_DEVICES") and (os.environ.get("SLURM_STEP_GPUS") or os.environ.get("SLURM_JOB_GPUS"))  # else another job's
        return f"GPU not used: Slurm gave this job GPU {given}, and {os.uname().nodename} has no driver of NVIDIA's; torch {t.__version__}" if given else ""
    cuda, visible = t.version.cuda, os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None:
        return f"GPU not used: driver {driver}, torch {t.__version__} has no CUDA (docs/hpc.md): {OTHER_TORCH}"
    oldest = OLDEST_DRIVER.get(int(cuda.split(".")[0]), 0)
    if driver[0].isdigit() and int(driver.split(".")[0]) < oldest:
        return f"GPU not used: driver {driver}, torch's CUDA {cuda} needs {oldest} (docs/hpc.md): {OTHER_TORCH}"
    both = f"driver {driver}, torch's CUDA {cuda}"
    if visible is not None and visible.strip() in ("", "-1"):
        return f"GPU not used: CUDA_VISIBLE_DEVICES={visible!r} hides it (docs/hpc.md): unset it, or {ASK}; {both}"
    ask = f"CUDA_VISIBLE_DEVICES={visible!r} names none that is here: nvidia-smi -L lists them" if visible and not visible.isdigit() else ASK
    return f"GPU not used: {both} (docs/hpc.md): {ask}; torch says {torchs_reason()!r}"


def torchs_reason() -> str:
    """Why torch has no CUDA device, in its own words."""
    try:
        t.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())[:160]
    return "no CUDA device"


def filled_by_others(device: t.device) -> str:
    """
    A line on a CUDA device of which other processes hold more than a tenth: how much is free. Asked before anything of ours is loaded; else "".
    UserError where they leave so little that the device can't be opened at all.
    """
    if device.type != "cuda":
        return ""
    try:
        free, total = t.cuda.mem_get_info(device)
    except RuntimeError as error:
        raise UserError(f"{device} can't be opened (nvidia-smi says who uses it): take another one or --device cpu. {str(error).splitlines()[0]}") from error
    others = total - free - t.cuda.memory_reserved(device)
    if others < total / 10 + (1 << 30):  # a process's own context is below a gigabyte
        return ""
    return f"other processes hold {show_bytes(others)} of {device}'s {show_bytes(total)}: {show_bytes(free)} are free (nvidia-smi says who)"
