"""Peak memory over the weights, and what happens where there is too little."""

import re
import time
from dataclasses import replace

import numpy as np
import torch as t

from gpu_checks.bench import GIB, Bench, Outcome, deadline, number, one_line
from gpu_checks.loupe import Attention, Attribution, Discover, Engine, Estimate, Lens, Load, PathPatch, Progress, Sweep, SweepResult, UserError
from gpu_checks.speed import first_cells


def weigh(b: Bench, e: Engine, asks: dict[str, object], each: int = 50) -> tuple[bool, dict]:
    """Seconds and peak of each request, computed anew; a request that takes longer than `each` seconds is broken off."""
    rows, ok = {}, True
    for name, ask in asks.items():
        if b.late:
            rows[name] = "left out: budget"
            continue
        start = time.monotonic()
        b.forget()
        try:
            with deadline(each):
                result, seconds, gib = b.measured(lambda ask=ask: b.fresh(e, ask))
            rows[name] = {"s": number(seconds, 3), "above_weights_gib": number(gib, 3)}
            if isinstance(result, SweepResult):
                rows[name] |= {"at_once": result.at_once, "peak_says_gib": number(result.peak_mb / 1024, 3)}
        except Exception as error:
            ok, rows[name] = False, one_line(error) + f" (after {time.monotonic() - start:.0f} s)"
    return ok, rows


def memory_llama(b: Bench) -> Outcome:
    e = b.engine("llama-3.1-8b")
    weights, n, s = b.allocated(), 64 if b.tiny else 1024, b.study(e)
    long, longest = b.study(e, b.long), b.study(e, n)
    asks = {
        f"lens table, {n} tokens": Lens(longest),
        f"lens column, {n} tokens": Lens(longest, positions=(-1,)),
        f"attention, {n} tokens": Attention(longest, 1),
        f"attribution, {n} tokens": Attribution(longest),
        "sweep z, 15 tokens": Sweep(s, "z"),
        f"sweep z, {b.long} tokens": Sweep(long, "z"),
        f"sweep resid_pre, {b.long} tokens": Sweep(long, "resid_pre"),
        "estimate z": Estimate(s, "z"),
        "path to one q": PathPatch(s, receivers=(f"L{e.model.info.n_layers - 1}H0.q",)),
    }
    ok, rows = weigh(b, e, asks)
    return ok, {"weights_gib": number(weights)} | rows


def gemma(b: Bench) -> Outcome:
    """Softcaps, grouped heads and norms after attention, bfloat16."""
    e = b.engine("gemma-2-2b")
    names = ("lens", "attention", "attribution", "sweep z", "sweep k", "sweep resid_pre", "estimate", "path", "eap")
    ok, rows = weigh(b, e, {k: v for k, v in b.every(e).items() if k in names})
    return ok, {"analyses": rows}


def eap_ig_llama(b: Bench) -> Outcome:
    """EAP-IG at 8 B: 5 steps, 8 prompts of 64 tokens, 40 edges. `stages` says after how many seconds each kind of progress was first told."""
    e = b.engine("llama-3.1-8b")
    seq, batch = (15, 2) if b.tiny else (64, 8)
    ask, stages = Discover(b.study(e, seq, batch), "eap-ig", edges=40, steps=5), {}
    start = time.perf_counter()

    def show(part: object) -> None:
        if isinstance(part, Progress):
            stages.setdefault(re.sub(r"[\d.]+", "#", part.text)[:60], number(time.perf_counter() - start, 3))

    b.forget()
    before = b.allocated()
    try:
        result, seconds, gib = b.measured(lambda: b.fresh(e, ask, show))
    except Exception as error:
        taken = time.perf_counter() - start
        peak = t.cuda.max_memory_allocated() / GIB - before if b.cuda else None
        return False, {"error": one_line(error), "broken_off_s": number(taken, 3), "stages": stages, "above_weights_gib": number(peak, 3)}
    out = {"tokens": seq, "prompts": batch, "s": number(seconds, 3), "expected_s": number(result.expected, 3), "above_weights_gib": number(gib, 3)}
    return b.tiny or seconds <= 60, out | {"edges": len(result.edges), "stages": stages}


def out_of_memory(b: Bench) -> Outcome:
    """A sweep that is promised more memory than it gets: it halves its batch, says so, and gives the same table."""
    if not b.cuda:
        return None, {"skipped": "needs a GPU"}
    e = b.engine("llama-3.1-8b")
    ask = Sweep(b.study(e, b.long), "resid_pre", chunk_mb=64 if b.tiny else 0)
    b.forget()
    (_, want, _), _, gib = b.measured(lambda: first_cells(b, e, ask))
    b.forget()
    weights = t.cuda.memory_allocated()
    cap = weights + max(int(0.35 * gib * GIB), 256 << 20)
    t.cuda.set_per_process_memory_fraction(min(1.0, cap / t.cuda.mem_get_info()[1]))
    try:
        _, got, words = first_cells(b, e, replace(ask, chunk_mb=2 * max(1, int(gib * 1024))))
    finally:
        t.cuda.set_per_process_memory_fraction(1.0)
    error = float(np.nanmax(np.abs(got.values - want.values)))
    largest = float(np.nanmax(np.abs(want.values - want.base)))
    return bool(words) and error < 0.2 * largest, {
        "peak_uncapped_gib": number(gib, 3),
        "cap_above_weights_gib": number((cap - weights) / GIB, 3),
        "halvings": len(words),
        "words": words[:6],
        "at_once": [want.at_once, got.at_once],
        "error": number(error, 2),
        "largest_effect": number(largest, 2),
        "done": [got.done, got.total],
    }


def out_of_memory_load(b: Bench) -> Outcome:
    """A model that does not fit is an error in words, and the engine goes on."""
    if not b.cuda:
        return None, {"skipped": "needs a GPU"}
    b.let_go()
    e = Engine(Load(str(b.saved("gpt2")), device=b.device))
    path = b.saved("gemma-2-2b")
    room = 0 if b.tiny else 1 << 30
    t.cuda.set_per_process_memory_fraction((t.cuda.memory_allocated() + room) / t.cuda.mem_get_info()[1])
    try:
        e.run(Load(str(path), device=b.device))
        said = "loaded all the same"
    except UserError as error:
        said = str(error)
    finally:
        t.cuda.set_per_process_memory_fraction(1.0)
    left = b.allocated()
    e.run(Load(str(b.folder("gpt2")), device=b.device))
    return said.startswith("out of memory"), {"said": said[:200], "left_gib": number(left, 3), "reloaded": e.model.info.device}
