"""
From a key to its answer over a slow line, simulated (tests/remote/slow_line.py): `uv run benchmarks/slow_line.py [MODEL] [--rtt 200] [--rate 20]`. Each key
alone, then while a lens is on its way; the seconds of every answer. `--rate 0`: without that line, which leaves what is computed.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import vocabulary.files  # noqa: E402
from screen.client import Client, EngineError, Superseded  # noqa: E402
from screen.session import Session  # noqa: E402
from tui import Loupe, first_state  # noqa: E402

SKIPPED = ("status",)


class Timed(Client):
    """A client that keeps how long each answer took."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.took: list[tuple[str, float]] = []

    async def ask(self, slot, request, priority=1, on_partial=None):
        begun, parts = time.monotonic(), []

        def part(body):
            parts.append(time.monotonic() - begun)
            if on_partial:
                on_partial(body)

        try:
            return await super().ask(slot, request, priority, part)
        except (EngineError, Superseded):
            parts.append(-1.0)
            raise
        finally:
            first = f" (first part {parts[0]:.2f})" if parts and parts[0] >= 0 else " replaced" if parts else ""
            self.took.append((f"{slot}{first}", time.monotonic() - begun))

    def said(self) -> str:
        some, self.took = self.took, []
        return ", ".join(f"{slot} {took:.2f}" for slot, took in some if slot not in SKIPPED) or "at once"


async def settle(app) -> None:
    """Until nothing is asked for."""
    for _ in range(3):
        await asyncio.sleep(0.02)
        while any(job.slot not in SKIPPED for job in app.client.jobs.values()):
            await asyncio.sleep(0.005)


async def main(model: str, via: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        vocabulary.files.home = lambda: Path(folder)
        state = first_state({})
        app = Loupe(Session(replace(state, model=replace(state.model, model=model)), Path(folder) / "session.jsonl"), via, log=Path(folder) / "engine.log")
        old, app.client = app.client, Timed(Path(folder) / "engine.log", via)
        for name in ("on_progress", "on_death", "on_fault", "on_news"):
            setattr(app.client, name, getattr(old, name))
        async with app.run_test(size=(120, 36)) as pilot:
            while app.info is None:
                await asyncio.sleep(0.1)
            await settle(app)
            print(f"start: {app.client.said()}", flush=True)
            for key in ("k", "a", "u", "p", "u", "3", "4", "5", "7", "1"):
                await pilot.press(key)
                await settle(app)
                print(f"{key}: {app.client.said()}", flush=True)
            print("half a second after a key that asks for run, lens and attention anew:", flush=True)
            for key in ("3", "4", "3"):
                await pilot.press("1", "j", "a")
                await asyncio.sleep(0.5)
                app.client.took.clear()
                await pilot.press(key)
                await settle(app)
                print(f"{key}: {app.client.said()}", flush=True)
            print(f"line {[round(1000 * t) for t in app.client.line.times]} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="zoo")
    parser.add_argument("--rtt", type=float, default=200.0)
    parser.add_argument("--rate", type=float, default=20.0)
    given = parser.parse_args()
    slow = f"{sys.executable} {ROOT}/tests/remote/slow_line.py --rtt {given.rtt} --rate {given.rate} --"
    asyncio.run(main(given.model, slow if given.rate else "env"))
