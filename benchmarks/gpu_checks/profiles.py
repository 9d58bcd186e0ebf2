"""Where the time of a request goes: the card's kernels, launching them, or waiting for them."""

import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch as t
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from gpu_checks.bench import Bench, Outcome, number, one_line
from gpu_checks.loupe import Engine, Lens, Sweep

LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")
TOP = 8


def count(events: object, starts: tuple[str, ...]) -> int:
    return sum(e.count for e in events if e.key.startswith(starts))


def top(events: list, cost: str) -> dict[str, list]:
    """The dearest operations: milliseconds and calls of each."""
    dear = sorted((e for e in events if getattr(e, cost) > 0), key=lambda e: -getattr(e, cost))[:TOP]
    return {e.key[:60]: [number(getattr(e, cost) / 1000, 3), e.count] for e in dear}


def waits(fn: Callable) -> dict[str, int]:
    """How often the host waits for the card, by the line of Python that waits; the most frequent ones."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        t.cuda.set_sync_debug_mode("warn")
        try:
            fn()
        finally:
            t.cuda.set_sync_debug_mode("default")
    lines = Counter(f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message))
    return dict(lines.most_common(TOP))


def profile_one(b: Bench, e: Engine, ask: object) -> dict:
    run = lambda: b.fresh(e, ask)  # noqa: E731
    wall = b.wall(run)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if b.cuda else [])]
    with t.profiler.profile(activities=activities) as found:
        run()
        b.sync()
    events = list(found.key_averages())
    kernels = [x for x in events if x.device_type == DeviceType.CUDA and not getattr(x, "is_user_annotation", False)]
    host = [x for x in events if x.device_type == DeviceType.CPU]
    kernel = sum(x.self_device_time_total for x in kernels) / 1e6
    return {
        "wall_ms": number(1000 * wall, 4),
        "kernel_ms": number(1000 * kernel, 4),
        "kernel_share": number(kernel / wall, 3),
        "launches": count(host, LAUNCHES),
        "stream_synchronisations": count(host, ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")),
        "copies": count(host, ("cudaMemcpy",)),
        "allocations": count(host, ("cudaMalloc", "cudaFree")),
        "host_ms": top(host, "self_cpu_time_total"),
        "device_ms": top(host, "self_device_time_total"),
        "kernels_ms": top(kernels, "self_device_time_total"),
        "waits": waits(run) if b.cuda else {},
    }


def profile_all(b: Bench, e: Engine, asks: dict[str, object]) -> Outcome:
    rows, ok = {}, True
    for name, ask in asks.items():
        if b.late:
            rows[name] = "left out: budget"
            continue
        try:
            rows[name] = profile_one(b, e, ask)
        except Exception as error:
            ok, rows[name] = False, {"error": one_line(error)}
    return (ok if b.cuda or not ok else None), {"dtype": e.model.info.dtype, "requests": rows}


def profile(b: Bench) -> Outcome:
    """Sweeps of the gpt2 shape."""
    e = b.engine("gpt2")
    asks = {
        "z, 15 tokens, 1 prompt": Sweep(b.study(e), "z"),
        f"z, {b.long} tokens, 8 prompts": Sweep(b.study(e, b.long, 8), "z", over_set=True),
        "resid_pre, 15 tokens, 1 prompt": Sweep(b.study(e), "resid_pre"),
    }
    return profile_all(b, e, asks)


def profile_llama(b: Bench) -> Outcome:
    """8 B: a head sweep and a lens table."""
    e, n = b.engine("llama-3.1-8b"), 64 if b.tiny else 1024
    asks = {
        f"z, {b.long} tokens, 1 prompt": Sweep(b.study(e, b.long), "z"),
        f"lens table, {n} tokens": Lens(b.study(e, n)),
    }
    return profile_all(b, e, asks)
