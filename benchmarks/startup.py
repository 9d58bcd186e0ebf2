"""
From a command to the first paint and to the first lens, in a pseudo-terminal of 120×36, as a user would see it. Medians of `--runs`, and times the first paint of an
empty Textual app, which is run in turn with it: a ratio that other work on the machine disturbs little.

`uv run benchmarks/startup.py`; the last line is one JSON object. Cold, unless `.env.local` sets LOUPE_KEEP_ENGINE_MINUTES: then the engine is there from the first run on
(`uv run engine.py stop` ends it). Also says whether torch was loaded into the screen's process.
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

from utils import ROOT, cyan, endc, gray, settings

PAINTED, LENS = b"loupe", b"L3.resid_post"
EMPTY = """
from textual.app import App
from textual.widgets import Static
class Empty(App):
    BINDINGS = [("q", "quit")]
    def compose(self):
        yield Static("loupe L3.resid_post")
Empty().run()
"""


def once(command: list[str]) -> tuple[float, float, bool]:
    """Seconds to the first paint and to the first lens row, and whether the UI process had torch mapped."""
    master, slave = pty.openpty()
    import fcntl
    import struct
    import termios

    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 36, 120, 0, 0))
    env = {**os.environ, "TERM": "xterm-256color"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # set in some containers: then every start compiles the program's own modules
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
    warm = settings().get("LOUPE_KEEP_ENGINE_MINUTES", "0") not in ("", "0")
    commands = {"uv run tui.py": ["uv", "run", "tui.py"], "python tui.py": [sys.executable, "tui.py"], "an empty app": [sys.executable, "-c", EMPTY]}
    for command in commands.values():
        once(command)  # fills the file cache; bytecode is there after `uv sync --compile-bytecode` or one start
    turns = [{name: once(command) for name, command in commands.items()} for _ in range(args.runs)]
    figures = {"engine": "there" if warm else "started"}
    floor = statistics.median(turn["an empty app"][0] for turn in turns)
    for name in commands:
        paint, lens = (statistics.median(turn[name][i] for turn in turns) for i in (0, 1))
        torch = any(turn[name][2] for turn in turns)
        times = f"{paint / floor:.1f} and {lens / floor:.1f} times an empty app's first paint"
        print(f"{gray}{name:14}{endc} first paint {cyan}{paint:.2f} s{endc}, first lens {cyan}{lens:.2f} s{endc}, {times}, torch in the UI process: {torch}")
        figures[name] = {"first_paint_s": round(paint, 3), "first_lens_s": round(lens, 3), "torch_in_ui": torch}
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
