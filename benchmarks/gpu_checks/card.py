"""The card, and the four models on it."""

import contextlib
import importlib.metadata
import os
import subprocess
import sys
import time

import torch as t

from gpu_checks.bench import ARCHITECTURES, GIB, Bench, Outcome, number, one_line
from gpu_checks.loupe import SECONDS

PACKAGES = ("torch", "transformers", "transformer-lens", "sae-lens", "textual", "numpy", "accelerate", "msgspec")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def nvidia_smi(query: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=20).stdout.strip()
    return ""


def environment(b: Bench) -> Outcome:
    """Versions, and the card's own rates: the matrix product that `matmul_share` is a share of, copying, and one launch."""
    out = {"python": sys.version.split()[0], "versions": versions(), "imports_s": SECONDS, "cores": os.cpu_count(), "threads": t.get_num_threads()}
    out["matmul_precision"] = t.get_float32_matmul_precision()
    if b.cuda:
        p = t.cuda.get_device_properties(0)
        out |= {"device": p.name, "cuda": t.version.cuda, "memory_gib": number(p.total_memory / GIB), "processors": p.multi_processor_count}
        out["driver"] = nvidia_smi("--query-gpu=driver_version")
    n = 256 if b.tiny else 8192
    for kind in (t.float32, t.bfloat16):
        x, y = (t.randn(n, n, device=b.device).to(kind) for _ in range(2))
        b.rates[str(kind)] = 2 * n**3 / b.wall(lambda x=x, y=y: x @ y, 7, 2)
        out[f"{str(kind).removeprefix('torch.')}_tflops"] = number(b.rates[str(kind)] / 1e12)
    x = t.randn((1 << 20) if b.tiny else (1 << 28), device=b.device)
    y = t.empty_like(x)
    out["copy_tb_s"] = number(2 * x.nbytes / b.wall(lambda: y.copy_(x), 5) / 1e12)
    out["launch_us"] = number(1e6 * b.wall(lambda: [x[:1].add_(0) for _ in range(1000)], 3) / 1000)
    return b.cuda or None, out


def shapes(b: Bench) -> Outcome:
    """Each shape is built, wrapped and checks itself."""
    rows, ok = {}, True
    for name in ARCHITECTURES:
        before, start = b.allocated(), time.monotonic()
        try:
            e = b.engine(name)
            b.sync()
            info = e.model.info
            bad = {c.name: [number(c.error), number(c.tolerance)] for c in info.checks if c.ok is False}
            rows[name] = {
                "seconds": round(time.monotonic() - start, 1),
                "loaded_s": round(info.seconds, 1),
                "parameters_m": number(info.n_params / 1e6),
                "dtype": info.dtype,
                "device": info.device,
                "gib": number(b.allocated() - before),
                "weights_gib": number(info.n_params * t.finfo(e.model.dtype).bits / 8 / GIB),
                "failed": bad,
                "checks": len(info.checks),
                "worst": max((c.error / c.tolerance for c in info.checks if c.tolerance), default=None),
            }
            ok = ok and not bad and t.device(info.device).type == t.device(b.device).type
        except Exception as error:
            ok, rows[name] = False, {"error": one_line(error)}
    return ok, {"shapes": rows}
