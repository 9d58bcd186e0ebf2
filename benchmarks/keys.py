"""
From a key to the screen's own answer, on a prompt of 1,000 tokens: the real screen and engine in a pseudo-terminal, keys pressed when nothing has been drawn for
a while (the engine may compute), in the lens, the attention and the text view. `uv run benchmarks/keys.py FOLDER` prints one JSON line a key: median and largest time to the first bytes and to the end of
the first burst of them (the cursor, the header and what is at hand), their number, and the screen's own processor time, which other work disturbs least.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from soak import Terminal, marked

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from screen.session import Session
from tui import first_state
from utils import bold, cyan, endc, gray
from vocabulary.prompts import Prompt
from vocabulary.requests import Load

SENTENCE = " When Mary and John went to the store,"
WAYS = {"PgUp": "\x1b[5~", "PgDn": "\x1b[6~", "Home": "\x1b[H", "End": "\x1b[F", "⏎": "\r"}
WALK = ("h", "l", "k", "j", "PgUp", "PgDn", "Home", "End", ";500⏎", "l", "h", "j", "k", "End")
VIEWS = {"lens": "1", "attention": "2", "text of the lens": "1T", "text of attention": "2"}  # what is typed to come there from the one before
PAUSE = 0.05  # seconds without bytes that end a burst


class Watched(Terminal):
    """Keeps when bytes came."""

    def drain(self, master: int) -> None:
        self.came: list[tuple[float, int]] = []
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                self.came.append((time.monotonic(), len(data)))

    def work(self) -> float:
        """Seconds of processor time that the screen and its engine have taken."""
        total = 0
        for pid in marked(self.mark):
            with contextlib.suppress(OSError):
                total += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]))
        return total / os.sysconf("SC_CLK_TCK")

    def on_cpu(self) -> float:
        """Milliseconds that the screen's main thread was on a processor."""
        return int(Path(f"/proc/{self.process.pid}/schedstat").read_text().split()[0]) / 1e6

    def rest(self, quiet: float, most: float, still: bool = False) -> None:
        """Wait until nothing came (and, to be `still`, nothing was computed) for `quiet` seconds, at most for `most`."""
        until = time.monotonic() + most
        while time.monotonic() < until:
            n, work = len(self.came), self.work()
            time.sleep(quiet)
            if len(self.came) == n and (not still or self.work() - work < 0.2 * quiet):
                return

    def press(self, key: str, quiet: float) -> dict[str, float]:
        """Milliseconds to the first bytes and to the end of their burst; how many they are; and the screen's processor time in the quarter of a second after the key."""
        *before, last = key if key.startswith(";") else [key]
        for part in before:  # a count is typed first: the last key is the one that moves
            self.send(WAYS.get(part, part))
            time.sleep(0.3)
        n, cpu, begun = len(self.came), self.on_cpu(), time.monotonic()
        self.send(WAYS.get(last, last))
        time.sleep(0.25)
        cpu = self.on_cpu() - cpu
        self.rest(quiet, 5)
        times = [(1000 * (at - begun), size) for at, size in self.came[n:]]
        if not times:
            return {}
        end = next((i for i in range(1, len(times)) if times[i][0] - times[i - 1][0] > 1000 * PAUSE), len(times))
        return {"first": times[0][0], "answer": times[end - 1][0], "bytes": sum(size for _, size in times[:end]), "screen_cpu": cpu}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a folder or a hub name of a model with so long a context")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--quiet", type=float, default=0.7, help="seconds without bytes that are rest")
    parser.add_argument("--views", default=",".join(VIEWS))
    args = parser.parse_args()
    text = (SENTENCE * (args.tokens // 9))[1:]  # nine tokens of most tokenizers each
    prompt = Prompt(text, text.replace("Mary", "John", 1), (" Mary",), (" John",))
    folder = Path(tempfile.mkdtemp())
    session = Session(
        replace(first_state({}), model=Load(str(Path(args.model).resolve()) if Path(args.model).is_dir() else args.model), prompt=prompt), folder / "s.jsonl"
    )
    session.do("metric", kind="logit_diff")
    session.close()
    screen, worst = Watched(folder / "s.jsonl"), 0.0
    try:
        screen.rest(6, 180, True)
        for view in args.views.split(","):
            for key in VIEWS[view]:
                said = screen.press(key, 2)
                print(json.dumps({"benchmark": "keys", "view": view, "key": key, **{k: round(v) for k, v in said.items()}}, ensure_ascii=False), flush=True)
            found: dict[str, list[dict]] = {}
            for _ in range(args.rounds):
                for key in WALK:
                    if said := screen.press(key, args.quiet):
                        found.setdefault(key, []).append(said)
            for key, some in found.items():
                median = {name: round(float(np.median([s[name] for s in some]))) for name in ("first", "answer", "bytes", "screen_cpu")}
                most = max(s["answer"] for s in some)
                worst = max(worst, most)
                print(
                    json.dumps({"benchmark": "keys", "view": view, "key": key, "n": len(some), **median, "answer_max": round(most)}, ensure_ascii=False),
                    flush=True,
                )
        print(f"{gray}the slowest answer of all{endc} {bold}{cyan}{worst:.0f} ms{endc}")
    finally:
        os.killpg(screen.process.pid, signal.SIGTERM)
        screen.process.wait(20)


if __name__ == "__main__":
    main()
