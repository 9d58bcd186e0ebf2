"""
From a cold command to the first paint and to the first lens, in a pseudo-terminal of 120×36, as a user would see it. Medians of `--runs`.

`uv run benchmarks/startup.py`; the last line is one JSON object. Also says whether torch was loaded into the screen's process.
"""

import argparse
import json
import os
import pty
import select
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import ROOT, cyan, endc, gray

PAINTED, LENS = b"loupe", b"L3.resid_post"


def once(command: list[str]) -> tuple[float, float, bool]:
    """Seconds to the first paint and to the first lens row, and whether the UI process had torch mapped."""
    master, slave = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color"}
    start = time.monotonic()
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=env, start_new_session=True)
    os.close(slave)
    seen, paint, lens, torch = b"", 0.0, 0.0, False
    while not lens and time.monotonic() - start < 120:
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 65536)
        paint = paint or (time.monotonic() - start if PAINTED in seen else 0.0)
        lens = time.monotonic() - start if LENS in seen else 0.0
    for pid in [process.pid, *children(process.pid)]:
        line = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"tui.py" in line and b"libtorch" in Path(f"/proc/{pid}/maps").read_bytes():
            torch = True
    os.write(master, b"q")
    while select.select([master], [], [], 0.2)[0]:
        try:
            os.read(master, 65536)
        except OSError:
            break
    process.wait(20)
    os.close(master)
    assert paint and lens, "no lens within two minutes; see logs/engine.log"
    return paint, lens, torch


def children(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *children(int(child))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    figures = {}
    for name, command in (("uv run tui.py", ["uv", "run", "tui.py"]), ("python tui.py", [sys.executable, "tui.py"])):
        once(command)  # fills the file cache; bytecode is there after `uv sync --compile-bytecode` or one start
        runs = [once(command) for _ in range(args.runs)]
        paint, lens = (statistics.median(r[i] for r in runs) for i in (0, 1))
        print(
            f"{gray}{name:14}{endc} first paint {cyan}{paint:.2f} s{endc}, first lens {cyan}{lens:.2f} s{endc}, torch in the UI process: {any(r[2] for r in runs)}"
        )
        figures[name] = {"first_paint_s": round(paint, 3), "first_lens_s": round(lens, 3), "torch_in_ui": any(r[2] for r in runs)}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
