"""
Loupe's engine on a GPU, in one run of some ten minutes: one JSON line a check; a check that fails does not stop the next one.

    uv run benchmarks/gpu.py                             # every check that the budget holds
    uv run benchmarks/gpu.py --only numbers,profile      # some checks, after `environment`; --list names them
    uv run benchmarks/gpu.py --budget 300 --each 60      # seconds after which no further check starts, and after which one is broken off
    uv run benchmarks/gpu.py --device cpu --tiny         # the same code on tiny shapes, without a GPU

Models are random weights of real shapes, made on the device. A line: {"check", "ok", "seconds", ...}; "ok" is null where there is nothing to judge, "error"
says what broke. Times are wall clock between synchronisations, medians; memory is what torch's allocator held, in GiB. docs/gpu.md explains every figure.
"""

import argparse
import json
import os
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
# Check: module of gpu_checks. By worth, and such that a large model is made once: what does not fit into the budget is left out from the end.
CHECKS = {
    "environment": "card",
    "shapes": "card",
    "speed_llama": "speed",
    "memory_llama": "memory",
    "cursor_llama": "waits",
    "profile_llama": "profiles",
    "eap_ig_llama": "memory",
    "out_of_memory": "memory",
    "later_llama": "later",
    "numbers": "accuracy",
    "profile": "profiles",
    "speed_gpt2": "speed",
    "cursor": "waits",
    "process": "waits",
    "noise": "accuracy",
    "gemma": "memory",
    "auto": "accuracy",
    "beside": "later",
    "features": "learned",
    "fits": "learned",
    "reference": "accuracy",
    "speed_pythia": "speed",
    "screen": "waits",
    "half": "accuracy",
    "out_of_memory_load": "memory",
}


def arguments(args: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes of the same architectures, few repeats")
    parser.add_argument("--only", default="", help="checks by name, with commas")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no further check starts")
    parser.add_argument("--each", type=int, default=120, help="seconds after which a check is broken off")
    parser.add_argument("--work", type=Path, default=Path("/tmp/loupe_gpu"), help="folder for models and logs")
    parser.add_argument("--list", action="store_true", help="name the checks")
    found = parser.parse_args(args)
    found.only = [name for name in found.only.split(",") if name]
    if unknown := [name for name in found.only if name not in CHECKS]:
        parser.error(f"no check {unknown[0]}; there are {', '.join(CHECKS)}")
    return found


def run_checks(ask: argparse.Namespace, lines: TextIO) -> bool:
    """Write a JSON line for each check and one for all; whether none failed and none was left out."""
    begun = time.monotonic()
    import_module("gpu_checks.loupe")  # first: it takes the imports' time
    from gpu_checks.bench import Bench, deadline, one_line

    bench, end = Bench(ask.device, ask.tiny, ask.work), begun + ask.budget
    failed, left = [], []

    def say(name: str, ok: bool | None, start: float, **more) -> None:
        print(json.dumps({"check": name, "ok": ok, "seconds": round(time.monotonic() - start, 1)} | more), file=lines, flush=True)

    for name, module in CHECKS.items():
        if ask.only and name not in ask.only and name != "environment":
            continue
        start = time.monotonic()
        if start > end:
            left.append(name)
            continue
        bench.end = min(end, start + ask.each)
        try:
            with deadline(ask.each):
                ok, more = getattr(import_module(f"gpu_checks.{module}"), name)(bench)
            ok = None if ok is None else bool(ok)
            say(name, ok, start, **more)
        except Exception as error:
            traceback.print_exc()
            ok = False
            say(name, ok, start, error=one_line(error))
        if ok is False:
            failed.append(name)
        bench.lift_limit()
    say("summary", not failed and not left, begun, failed=failed, left_out=left)
    return not failed and not left


def main() -> int:
    ask = arguments()
    if ask.list:
        print(" ".join(CHECKS))
        return 0
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    os.environ["TQDM_DISABLE"] = "1"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.path.insert(0, str(ROOT))
    return 0 if run_checks(ask, lines) else 1


if __name__ == "__main__":
    sys.exit(main())
