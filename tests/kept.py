"""
A relay and an engine that stays, without a model: `python tests/kept.py BASE MINUTES [keep PATH FD]`. A `Run` takes as many steps of 5 ms as its number says,
a Load 20; each step of a Run is shown as a partial result, from 500 on with 20 kB in it, from 1000 on (of half a
millisecond) as progress.
"""

import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))

from model import relay, scheduler
from model.host import Host
from techniques.output.requests import Run
from vocabulary.requests import Load, ModelChoice, ModelInfo, ModelsResult, Progress

INFO = ModelInfo("zoo", "x", 1, 1, 1, 1, 1, 1, 1, 1, 1, "float32", "cpu", "", "", False, 0.0, "", False, 0.0)


class Pretended:
    """What Host uses of an Engine."""

    def __init__(self):
        self.model = self.loaded = None
        self.swap = self.ask_first = None

    def check_hooks(self) -> None: ...

    def status(self):
        return SimpleNamespace(memory=1)

    def jobs(self, body: object):
        if isinstance(body, Load) and body != self.loaded:
            if self.model is not None:
                self.ask_first(body)
            for n in range(20):
                time.sleep(0.005)
                yield Progress(n, 20, "loading")
            self.swap()
            self.loaded, self.model = body, SimpleNamespace(info=INFO)
        if isinstance(body, Run):
            for n in range(steps := body.k):
                time.sleep(0.005 if steps < 1000 else 0.0005)
                yield ModelsResult((ModelChoice(str(n), os.urandom(10_000).hex() if steps >= 500 else "part"),)) if steps < 1000 else Progress(n, steps)
            return ModelsResult((ModelChoice(str(body.k), str(os.getpid())),))
        return INFO


if __name__ == "__main__":
    base, minutes, *rest = sys.argv[1:]
    relay.BASE, relay.minutes, scheduler.LONG = Path(base), lambda: float(minutes), 0.0
    relay.PROGRAM = (sys.executable, __file__, base, minutes)
    if rest:
        with open(Path(base) / "started", "a") as f:
            f.write(f"{os.getpid()}\n")
        Host(Pretended(), *rest[1:]).keep()
    relay.attach()
