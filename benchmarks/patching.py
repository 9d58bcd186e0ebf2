"""
Loupe's sweeps against transformer_lens.patching: a random model of gpt2-small's shape, 15 tokens, prompts that share their first 2 or 10 tokens.

Both sides take turns in one process, on one thread; CPU seconds, medians. The other tool runs one whole forward pass a cell whatever the cell, so
it is timed on some random cells of each table and scaled to the whole; on these cells both have to agree to 1e-4 before anything is timed.
"limit" is the time that the fewest FLOPs with every reuse would take at the speed of this machine's matrix product.

    uv run benchmarks/patching.py            # five rounds
    uv run benchmarks/patching.py --quick    # fewer rounds and cells
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
import torch as t
from transformer_lens import HookedTransformer, HookedTransformerConfig, patching
from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from engine import Engine
from techniques.patching.requests import Sweep, SweepResult
from vocabulary.prompts import Prompt, Study
from utils import bold, cyan, endc, gray, purple

SEQ, TOL = 15, 1e-4
GPT2 = GPT2Config()


def build(folder: Path) -> None:
    """A random model in which heads attend somewhere and patches move the logits; every word of its tokenizer is a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    t.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2)
    gains = {"c_attn.weight": 1.4 / 768**0.5, "c_proj.weight": 0.35 / 768**0.5, "c_fc.weight": 1.4 / 768**0.5, "wte.weight": 0.06, "wpe.weight": 0.2}
    with t.no_grad():
        for name, p in hf.named_parameters():
            if gain := next((g for end, g in gains.items() if name.endswith(end)), None):
                p.normal_(0, gain)
    hf.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(GPT2.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)


def hooked_transformer(hf: t.nn.Module) -> HookedTransformer:
    """The same weights in TransformerLens's own model, as they are."""
    cfg = HookedTransformerConfig(
        n_layers=12, d_model=768, n_heads=12, d_head=64, d_mlp=3072, d_vocab=GPT2.vocab_size, n_ctx=1024, act_fn="gelu_new", normalization_type="LN",
        device="cpu", init_weights=False,
    )  # fmt: skip
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    return model.eval().requires_grad_(False)


def prompts(n: int, shared: int) -> list[Prompt]:
    rng = np.random.default_rng(shared)
    text = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    out = []
    for _ in range(n):
        clean = rng.integers(0, GPT2.vocab_size, SEQ)
        corrupt = clean.copy()
        corrupt[shared] = rng.integers(0, GPT2.vocab_size)
        a, b = rng.integers(0, GPT2.vocab_size, 2)
        out.append(Prompt(text(clean), text(corrupt), (f" w{a}",), (f" w{b}",), bos=False))
    return out


# ------------------------------------------------------------------ the other tool


def setter(kind: str) -> tuple[str, Callable, list[str]]:
    """Hook point, patch setter and index columns of transformer_lens.patching for a kind of sweep; ablation as its users write it."""
    p = patching
    match kind:
        case "resid_pre" | "attn" | "mlp":
            return {"resid_pre": "resid_pre", "attn": "attn_out", "mlp": "mlp_out"}[kind], p.layer_pos_patch_setter, ["layer", "pos"]
        case "z" | "q" | "k" | "v":
            return kind, p.layer_head_vector_patch_setter, ["layer", "head"]
        case "pattern":
            return "pattern", p.layer_head_pattern_patch_setter, ["layer", "head_index"]
        case "z_pos":
            return "z", p.layer_pos_head_vector_patch_setter, ["layer", "pos", "head"]
        case "ablate":

            def zero(x, index, _):
                x[:, :, index[1]] = 0
                return x

            return "z", zero, ["layer", "head"]
    raise AssertionError(kind)


def columns(kind: str, row: int, col: int) -> list[int]:
    """A cell of ours as the other tool's index."""
    return [row // 12, col, row % 12] if kind == "z_pos" else [row, col]


class Peer:
    def __init__(self, model, pairs: list[Prompt], ablate: bool):
        ids = lambda texts: t.tensor([[int(w[1:]) for w in x.split()] for x in texts])  # noqa: E731
        self.model, clean, corrupt = model, ids([p.clean for p in pairs]), ids([p.corrupt for p in pairs])
        answers, foils = (ids([x[0].strip() for x in side])[:, 0] for side in ([p.answers for p in pairs], [p.foils for p in pairs]))
        rows = t.arange(len(pairs))
        self.metric = lambda logits: (logits[rows, -1, answers] - logits[rows, -1, foils]).mean()
        self.base = clean if ablate else corrupt
        _, self.cache = model.run_with_cache(clean)

    def run(self, kind: str, cells: list[tuple[int, int]]) -> np.ndarray:
        name, fn, names = setter(kind)
        frame = pd.DataFrame([columns(kind, *c) for c in cells], columns=names)
        return patching.generic_activation_patch(self.model, self.base, self.cache, self.metric, fn, name, index_df=frame).numpy()


# ------------------------------------------------------------------ the FLOP limit


def limit(kinds: tuple[str, ...], batch: int, shared: int) -> float:
    """FLOPs (2 a multiply-add) of a sweep with every reuse: from the changed place on, only changed positions, in the last block only the last row."""
    d, h, dh, m, n = 768, 12, 64, 3072, 12
    q, kv, o, mlp, pair = 2 * d * h * dh, 4 * d * h * dh, 2 * d * h * dh, 4 * d * m, 4 * h * dh

    def tail(layer: int, mid: bool, start: int) -> float:
        rows, total = SEQ - start, 0.0
        if mid:
            total += mlp * (1 if layer == n - 1 else rows)
            layer += 1
        for i in range(layer, n):
            last = i == n - 1
            total += kv * rows + q + o + mlp + pair * SEQ if last else (q + kv + o + mlp) * rows + pair * rows * SEQ
        return total

    total = 0.0
    for kind in kinds:
        for layer in range(n):
            places = [max(shared, p) for p in range(shared, SEQ)]
            match kind:
                case "resid_pre":
                    total += sum(tail(layer, False, p) for p in places)
                case "attn":
                    total += sum(tail(layer, True, p) for p in places)
                case "mlp":
                    total += sum(tail(layer + 1, False, p) for p in places)
                case "z_pos":
                    total += h * sum(tail(layer, True, p) for p in places)
                case "ablate":
                    total += h * tail(layer, True, 0)
                case _:
                    total += h * tail(layer, True, shared)
    return total * batch


def matmul_rate() -> float:
    a, times = t.randn(2048, 2048), []
    for _ in range(8):
        start = time.process_time()
        a @ a
        times.append(time.process_time() - start)
    return 2 * 2048**3 / statistics.median(times[1:])


# ------------------------------------------------------------------ taking turns

CASES = {
    "heads z": (("z",), 1),
    "heads z, q, k, v, pattern": (("z", "q", "k", "v", "pattern"), 1),
    "ablate every head": (("ablate",), 1),
    "resid x position": (("resid_pre",), 1),
    "attn + mlp x position": (("attn", "mlp"), 1),
    "head x position": (("z_pos",), 1),
    "heads z, 8 prompts": (("z",), 8),
}


def ask(kinds: tuple[str, ...], pairs: list[Prompt]) -> list[Sweep]:
    """Our side of a case: one sweep a kind, attention and MLP together."""
    study = Study(pairs[0], prompt_set=tuple(pairs) if len(pairs) > 1 else ())
    if kinds == ("attn", "mlp"):
        return [Sweep(study, "attn_mlp", over_set=len(pairs) > 1)]
    return [Sweep(study, "z", "zero") if k == "ablate" else Sweep(study, k, over_set=len(pairs) > 1) for k in kinds]


def ours(engine: Engine, asks: list[Sweep], pauses: list[float], firsts: list[float]) -> list[SweepResult]:
    out = []
    for one in asks:
        begin = last = time.process_time()
        marks, jobs = [], engine.jobs(one)
        while True:
            try:
                part = next(jobs)
            except StopIteration as stop:
                out.append(stop.value)
                break
            now = time.process_time()
            pauses.append(now - last)
            last = now
            if isinstance(part, SweepResult):
                marks.append((part.done, now - begin))
        whole = time.process_time() - begin
        firsts.append(next((at for done, at in marks if done > marks[0][0]), whole) / whole)
    return out


def values(found: list[SweepResult], kinds: tuple[str, ...], i: int) -> np.ndarray:
    return found[0].values[i::2] if kinds == ("attn", "mlp") else found[i].values


def measure(engine: Engine, models: dict, name: str, shared: int, rounds: int, cells: int, rate: float) -> dict:
    kinds, n = CASES[name]
    pairs, rng = prompts(n, shared), np.random.default_rng(0)
    peers = {who: Peer(model, pairs, kinds == ("ablate",)) for who, model in models.items()}
    asks, seconds, pauses, firsts = ask(kinds, pairs), {who: [] for who in (*peers, "loupe")}, [], []
    found = ours(engine, asks, pauses, firsts)
    sizes = [values(found, kinds, i).shape for i in range(len(kinds))]
    total, worst = sum(a * b for a, b in sizes), 0.0
    pauses.clear()
    firsts.clear()
    for _ in range(rounds):
        start = time.process_time()
        found = ours(engine, asks, pauses, firsts)
        seconds["loupe"].append(time.process_time() - start)
        for who, peer in peers.items():
            spent, count = 0.0, 0
            for i, kind in enumerate(kinds):
                table = values(found, kinds, i)
                some = [
                    tuple(divmod(int(j), table.shape[1])) for j in rng.choice(table.size, max(2, cells // len(kinds) // (4 if n > 1 else 1)), replace=False)
                ]
                start = time.process_time()
                theirs = peer.run(kind, some)
                spent, count = spent + time.process_time() - start, count + len(some)
                worst = max(worst, float(np.abs(theirs - [table[c] for c in some]).max()))
            seconds[who].append(spent / count * total)
    assert worst < TOL, f"{name}: off by {worst:.1e}"
    mid = {who: statistics.median(s) for who, s in seconds.items()}
    out = {"case": name, "shared": shared, "cells": total, "error": worst} | {f"vs_{who}": round(mid[who] / mid["loupe"], 1) for who in peers}
    out |= {"vs_limit": round(mid["loupe"] * rate / limit(kinds, n, 0 if kinds == ("ablate",) else shared), 2)}
    out |= {"first_cells": round(statistics.median(firsts), 3), "pause_p95_ms": round(1000 * float(np.quantile(pauses, 0.95)), 1)}
    return out


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--quick", action="store_true", help="three rounds, few cells of the other tool")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--shared", type=int, nargs="*", default=[2, 10])
    parser.add_argument("--alone", action="store_true", help="time only our side against the limit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder))
        engine = Engine(folder)
        models = {} if args.alone else {"hooked": hooked_transformer(GPT2LMHeadModel.from_pretrained(folder)), "bridge": engine.model.bridge}
    t.set_num_threads(args.threads)
    t.set_grad_enabled(False)
    rounds, cells = (3, 8) if args.quick else (5, 24)
    rate, rows = matmul_rate(), []
    print(f"{gray}CPU seconds on {args.threads} thread(s), {rounds} rounds, medians; matrix product at {rate / 1e9:.0f} GFLOP/s{endc}", flush=True)
    print(f"{purple}{'case':28} shared  HookedTransformer   Bridge    limit  first cells   pause p95     error{endc}", flush=True)
    for shared in args.shared:
        for name in CASES:
            if args.only not in name or name == "heads z, 8 prompts" and shared != 2:
                continue
            r = measure(engine, models, name, shared, rounds, cells, rate)
            rows.append(r)
            peer = f"{r.get('vs_hooked', 0):16.1f}x {r.get('vs_bridge', 0):7.1f}x"
            line = f"{r['case']:28} {shared:6} {bold}{cyan}{peer}{endc} {r['vs_limit']:7.2f}x {r['first_cells']:11.1%} {r['pause_p95_ms']:9.1f} ms  {r['error']:.0e}"
            print(line, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(json.dumps({"benchmark": "patching", "threads": args.threads, "rounds": rounds, "peak_mb": peak, "cases": rows}))
