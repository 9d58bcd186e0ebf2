"""What comes after the map: generation, QK attribution, AtP* and certified cells of the 8 B shape; a second model beside the first."""

import time
from dataclasses import replace

import numpy as np
import torch as t

from gpu_checks.bench import Bench, Outcome, number, one_line
from gpu_checks.loupe import Certify, Engine, Estimate, Generate, Lens, Load, QK, Sampling, Sweep, UserError, WeightDifference, parse_intervention


def later_llama(b: Bench) -> Outcome:
    """8 B: seconds and peak of each; a token of a continuation with and without an intervention; the QK sum against the model's own score."""
    e, new = b.engine("llama-3.1-8b"), 4 if b.tiny else 64
    s, layer = b.study(e, b.long), e.model.info.n_layers // 2
    hurt = replace(s, interventions=(parse_intervention("L1H1=zero"),))
    rows, right = {}, True
    asks = {
        "generate": Generate(hurt, Sampling(new)),
        "qk": QK(s, layer, 1, source=2),
        "estimate z": Estimate(s, "z"),
        "estimate q, atp": Estimate(s, "q"),
        "estimate q, atp*": Estimate(s, "q", "atp_star"),
        "certify": Certify(s, "z", top=1 if b.tiny else 10, direction="noise", share=1.0 if b.tiny else 0.25),
    }
    for name, ask in asks.items():
        if b.late:
            rows["left out"] = name
            break
        try:
            got, seconds, gib = b.measured(lambda ask=ask: b.fresh(e, ask))
        except Exception as error:
            rows[name], right = {"error": one_line(error)}, False
            continue
        rows[name] = {"s": number(seconds, 3), "above_weights_gib": number(gib, 3)}
        if name == "generate":
            rows[name] |= {"new_tokens": new, "ms_a_token_and_run": number(1000 * seconds / (2 * new), 3), "convention": got.convention[:200]}
        if name == "qk":
            rows[name] |= {k: number(float(getattr(got, k))) for k in ("total", "score", "error") if hasattr(got, k)}
        if name == "certify":
            rows[name] |= {"certified": bool(got.certified), "ran": got.ran, "cells": got.cells}
    return right, {"tokens": b.long, "asks": rows}


def beside(b: Bench) -> Outcome:
    """gemma-2-2b's shape beside itself with one matrix changed: memory of the two, and what differs between them."""
    name = "gemma-2-2b"
    folder = b.saved(name)
    other = folder.parent / f"{name}-changed"
    if not other.is_dir():
        hf = b.build(name, t.bfloat16)
        with t.no_grad():
            hf.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
        hf.save_pretrained(other, max_shard_size="8GB")
        for file in folder.glob("tokenizer*"):
            (other / file.name).write_bytes(file.read_bytes())
        del hf
    b.let_go()
    e = Engine(Load(str(folder), device=b.device))
    one, begun = b.allocated(), time.perf_counter()
    try:
        info = e.run(Load(str(folder), device=b.device, against=str(other)))
    except UserError as error:
        return False, {"refused": str(error)[:200]}
    found = {"load_s": number(time.perf_counter() - begun, 3), "one_gib": number(one), "both_gib": number(b.allocated()), "said": info.beside[:200]}
    s = replace(b.study(e), against=str(other))
    s = replace(s, prompt=replace(s.prompt, corrupt=None))
    sweep, seconds, gib = b.measured(lambda: e.run(Sweep(s, "attn_mlp")))
    effect = np.abs(sweep.values - sweep.base)
    row, col = np.unravel_index(np.nanargmax(effect), effect.shape)
    found |= {
        "sweep_s": number(seconds, 3),
        "above_weights_gib": number(gib, 3),
        "largest": f"{sweep.rows[row]} {sweep.cols[col]}",
        "effect": number(float(effect[row, col])),
    }
    weights = e.run(WeightDifference())
    changed = {k: [int(i) for i in np.flatnonzero(np.nan_to_num(v).max(-1) > 0)] for k, v in weights.heads.items() if len(k) == 1}
    e.run(Lens(s))
    return changed == {"Q": [], "K": [], "V": [], "O": [1]}, found | {"changed_layers": changed}
