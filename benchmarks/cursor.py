"""
A cursor move while a sweep runs: how long the screen waits for what the cursor points at. The real engine process and wire; patterns of another layer
every 50 ms during sweeps of the embedded model and of a random model of gpt2-small's shape. Wall clock. The last line is one JSON object.

    uv run benchmarks/cursor.py
"""

import asyncio
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from screen.client import Client
from techniques.attention.requests import Attention
from techniques.patching.requests import Sweep
from vocabulary.prompts import read_prompt_set, Study
from vocabulary.requests import Load
from utils import ROOT, bold, cyan, endc, gray

spec = importlib.util.spec_from_file_location("setting", Path(__file__).parent / "patching.py")
setting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setting)
SECONDS = 15


async def moves(link: Client, study: Study, sweep: Sweep, layers: int) -> dict:
    """Sweeps again and again for SECONDS; meanwhile moves. Milliseconds of each answer."""
    found, begun, sweeps = [], time.monotonic(), 0
    await link.ask("sweep", sweep, 2)
    while time.monotonic() - begun < SECONDS:
        job = asyncio.create_task(link.ask("sweep", sweep, 2, lambda part: None))
        sweeps += 1
        while not job.done():
            start = time.monotonic()
            await link.ask("attention", Attention(study, len(found) % layers), 0)
            if not job.done():
                found.append(1000 * (time.monotonic() - start))
            await asyncio.wait([job], timeout=0.05)
        await job
    p50, p95 = np.quantile(found, [0.5, 0.95])
    return {"moves": len(found), "sweeps": sweeps, "p50_ms": round(float(p50), 1), "p95_ms": round(float(p95), 1), "max_ms": round(max(found), 1)}


async def main() -> None:
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        setting.build(Path(folder) / "gpt2-small shape")
        ioi = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")
        cases = (("zoo", "zoo", Study(ioi[0], prompt_set=ioi), 4), ("gpt2-small shape", f"{folder}/gpt2-small shape", Study(setting.prompts(1, 2)[0]), 12))
        for name, model, study, layers in cases:
            link = Client(Path(folder) / "engine.log")
            await link.start()
            await link.ask("load", Load(model), 0)
            for kind in ("z", "z_pos", "attn_mlp", "nodes"):
                ask = Sweep(study, kind, over_set=bool(study.prompt_set), op="zero" if kind == "nodes" else "patch")
                r = rows[f"{name} {kind}"] = await moves(link, study, ask, layers)
                print(
                    f"{gray}{name:18}{kind:10}{endc} p50 {r['p50_ms']:6.1f} ms  p95 {bold}{cyan}{r['p95_ms']:6.1f} ms{endc}  max {r['max_ms']:6.1f} ms  {r['moves']} moves",
                    flush=True,
                )
            await link.stop()
    print(json.dumps({"benchmark": "cursor", "cases": rows}))


if __name__ == "__main__":
    asyncio.run(main())
