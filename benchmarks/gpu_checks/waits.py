"""What a person waits for: the cursor over the wire while sweeps run, the engine's process killed and started again, the screen."""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import torch as t

from gpu_checks.bench import Bench, Outcome, number, prompts
from gpu_checks.card import nvidia_smi
from gpu_checks.loupe import Attention, Client, EngineDied, Lens, Load, Status, Study, Sweep, screen as open_screen


def words(times: list[float]) -> dict:
    at = lambda q: number(float(np.quantile(times, q)), 3)  # noqa: E731
    return {"n": len(times), "p50_ms": at(0.5), "p95_ms": at(0.95), "max_ms": at(1)}


def column(s: Study, layers: int, i: int) -> Lens:
    """A lens column, as the output pane asks for it when the cursor moves."""
    return Lens(s, positions=(i,), points=("L0.resid_pre", *(f"L{n}.resid_post" for n in range(layers))))


# ------------------------------------------------------------------ the cursor


def cursor_llama(b: Bench) -> Outcome:
    """8 B, no wire: the first column of a prompt, then the cursor's moves over a kept run: lens columns and patterns."""
    e = b.engine("llama-3.1-8b")
    s, layers = b.study(e, 64), e.model.info.n_layers
    moves = lambda make: words([1000 * b.measured(lambda i=i: e.run(make(i)))[1] for i in range(3 if b.tiny else 30)])  # noqa: E731
    b.fresh(e, column(s, layers, 0))
    out = {"first_column_ms": number(1000 * b.wall(lambda: b.fresh(e, column(s, layers, 0))), 3)}
    out["lens_column"], out["patterns"] = moves(lambda i: column(s, layers, i + 1)), moves(lambda i: Attention(s, i % layers))
    return out["lens_column"]["p95_ms"] <= 40, out


def cursor(b: Bench) -> Outcome:
    """Over the wire: a lens column and a layer's patterns when nothing else runs, and while sweeps do."""
    return asyncio.run(cursor_moves(b))


async def cursor_moves(b: Bench) -> Outcome:
    link = Client(b.work / "cursor.log")
    await link.start()
    try:
        start = time.monotonic()
        info = await link.ask("load", Load(str(b.saved("gpt2")), device=b.device), 0)
        out = {"start_and_load_s": number(time.monotonic() - start, 3), "device": info.device}
        s, layers, n = Study(prompts(1, 64, info.d_vocab)[0]), info.n_layers, 3 if b.tiny else 30

        async def once(request: object) -> float:
            begun = time.monotonic()
            await link.ask("pane", request, 0)
            return 1000 * (time.monotonic() - begun)

        out["lens_table_first_ms"] = number(await once(Lens(s)), 4)
        out["lens_table_again_ms"] = number(await once(Lens(s)), 4)
        await once(column(s, layers, 0))
        out["lens_column"] = words([await once(column(s, layers, i)) for i in range(n)])
        out["patterns"] = words([await once(Attention(s, i % layers)) for i in range(n)])
        for kind in ("z", "z_pos"):
            found = {"lens_column": [], "patterns": []}
            end, i, sweeps = time.monotonic() + (1 if b.tiny else 6), 0, 0
            while time.monotonic() < end:
                job = asyncio.create_task(link.ask("sweep", Sweep(s, kind), 2, lambda part: None))
                sweeps += 1
                while not job.done():
                    i += 1
                    found["lens_column"].append(await once(column(s, layers, i % 60)))
                    found["patterns"].append(await once(Attention(s, i % layers)))
                    await asyncio.wait([job], timeout=0.02)
                await job
            out[f"during {kind}"] = {"sweeps": sweeps} | {k: words(v) for k, v in found.items()}
        return out["lens_column"]["p95_ms"] < 100, out
    finally:
        await link.stop()


# ------------------------------------------------------------------ the process


def used_by(pid: int) -> float | None:
    """What the driver says a process holds (GiB)."""
    rows = dict(line.split(", ") for line in nvidia_smi("--query-compute-apps=pid,used_memory").splitlines() if ", " in line)
    return int(rows[str(pid)]) / 1024 if rows.get(str(pid), "").isdigit() else None


async def settled(b: Bench, target: float) -> float:
    """Free memory, after waiting up to 10 s for it to come back."""
    for _ in range(100):
        if not b.cuda or b.free() >= target - 0.3:
            break
        await asyncio.sleep(0.1)
    return b.free()


def process(b: Bench) -> Outcome:
    """The engine's process on the device: killed in the middle of a sweep, started again; memory comes back each time."""
    b.let_go()
    b.engines.clear()
    b.forget()
    return asyncio.run(process_life(b))


async def process_life(b: Bench) -> Outcome:
    path, other, died = b.saved("gpt2"), b.saved("pythia-410m"), []
    b.forget()
    link, before = Client(b.work / "process.log", on_death=died.append), b.free()
    out = {"free_before_gib": number(before)}
    await link.start()
    try:
        start = time.monotonic()
        info = await link.ask("load", Load(str(path), device=b.device), 0)
        out |= {"start_and_load_s": number(time.monotonic() - start, 3), "device": info.device, "free_loaded_gib": number(b.free())}
        out["driver_says_gib"] = used_by(link.process.pid)
        s = Study(prompts(1, b.long, info.d_vocab)[0])
        got = await link.ask("a", Sweep(s, "z"), 1)
        out |= await killed(b, link, s)
        out["free_killed_gib"] = number(await settled(b, before))
        start = time.monotonic()
        await link.start()
        await link.ask("load", Load(str(path), device=b.device), 0)
        again = await link.ask("a", Sweep(s, "z"), 1)
        out |= {"restart_to_sweep_s": number(time.monotonic() - start, 3), "same": number(float(np.abs(again.values - got.values).max()), 2)}
        small = b.free()
        await link.ask("load", Load(str(other), device=b.device), 0)
        await link.ask("load", Load(str(path), device=b.device), 0)
        out["free_after_two_swaps_gib"] = [number(small), number(b.free())]
        out["cancel_to_answer_ms"] = await cancelled(b, link, s)
    finally:
        await link.stop()
    after = await settled(b, before)
    out |= {"free_after_gib": number(after), "deaths": died}
    return "killed" in out and (not b.cuda or after > before - 0.3) and (out["same"] or 0) < 1e-3, out


async def killed(b: Bench, link: Client, s: Study) -> dict:
    job = asyncio.create_task(link.ask("b", Sweep(s, "z_pos"), 2))
    await asyncio.sleep(0.05 if b.tiny else 0.5)
    os.killpg(link.process.pid, signal.SIGKILL)
    with contextlib.suppress(EngineDied):
        await asyncio.wait_for(job, 20)
        return {"killed": "the sweep ended before"}
    return {"killed": str(job.exception())}


async def cancelled(b: Bench, link: Client, s: Study) -> float | None:
    """Milliseconds from cancelling a sweep to the next answer."""
    job = asyncio.create_task(link.ask("c", Sweep(s, "z_pos"), 2))
    await asyncio.sleep(0.02 if b.tiny else 0.3)
    start = time.monotonic()
    job.cancel()
    await asyncio.wait([job], timeout=20)
    await link.ask("s", Status(), 0)
    return number(1000 * (time.monotonic() - start), 3)


# ------------------------------------------------------------------ the screen


def screen(b: Bench) -> Outcome:
    """The real screen at 120x36 on the zoo's model and this device: keys to a settled picture."""
    return asyncio.run(screen_moves(b))


async def screen_moves(b: Bench) -> Outcome:
    folder = b.work / "screen"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    app, times = open_screen(b.device, folder), []
    async with app.run_test(size=(120, 36)) as pilot:
        start = time.monotonic()
        while app.info is None and time.monotonic() - start < 90:
            await pilot.pause(0.05)
        await app.settle()
        first = time.monotonic() - start
        for key in ("2", "j") if b.tiny else ("2", "j", "j", "l", "k", "h", "3", "j", "1", "j"):
            start = time.monotonic()
            await pilot.press(key)
            await pilot.pause()
            await app.settle()
            times.append(1000 * (time.monotonic() - start))
        info, picture = app.info, app.export_screenshot()
    (Path(os.environ.get("OUT") or folder) / "screen.svg").write_text(picture)
    right = t.device(info.device).type == t.device(b.device).type
    return right, {"device": info.device, "first_settled_s": number(first, 3), "key_to_settled_ms": [number(x, 3) for x in times]}
