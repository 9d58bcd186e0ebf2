"""Sweeps against transformer_lens.patching on the same card in the same run, and as a share of the card's matrix product."""

import time

import numpy as np
import torch as t
import transformers as tr

from gpu_checks.bench import SHARED, Bench, Outcome, number, one_line
from gpu_checks.loupe import Engine, Progress, Study, Sweep, SweepResult


def limit(info: object, kinds: tuple[str, ...], seq: int, batch: int, shared: int) -> float:
    """FLOPs of a sweep with every reuse: from the changed place on, only changed positions, in the last block only the last row."""
    d, h, kv, dh, mlp, n = info.d_model, info.n_heads, info.n_kv_heads, info.d_head, info.d_mlp, info.n_layers
    gated = info.norm == "RMS"
    q, keys, o, wide, pair = 2 * d * h * dh, 4 * d * kv * dh, 2 * d * h * dh, (6 if gated else 4) * d * mlp, 4 * h * dh

    def tail(layer: int, mid: bool, start: int) -> float:
        rows, total = seq - start, 0.0
        if mid:
            total += wide * (1 if layer == n - 1 else rows)
            layer += 1
        for i in range(layer, n):
            total += keys * rows + q + o + wide + pair * seq if i == n - 1 else (q + keys + o + wide) * rows + pair * rows * seq
        return total

    def after(layer: int, start: int) -> float:
        """What a change of attention's output has after it: in a parallel block the next layer."""
        return tail(layer + 1, False, start) if info.parallel else tail(layer, True, start)

    total = 0.0
    for kind in kinds:
        for layer in range(n):
            match kind:
                case "resid_pre":
                    total += sum(tail(layer, False, p) for p in range(shared, seq))
                case "attn":
                    total += sum(after(layer, p) for p in range(shared, seq))
                case "mlp":
                    total += sum(tail(layer + 1, False, p) for p in range(shared, seq))
                case _:
                    total += (kv if kind in ("k", "v") else h) * after(layer, shared)
    return total * batch


class Peer:
    """transformer_lens.patching on the same prompts; some cells, scaled to the whole."""

    def __init__(self, model: object, s: Study, device: str):
        from transformer_lens import patching

        self.patching, self.model = patching, model
        pairs = s.prompt_set or (s.prompt,)
        ids = lambda texts: t.tensor([[int(w[1:]) for w in x.split()] for x in texts], device=device)  # noqa: E731
        clean, self.corrupt = ids([p.clean for p in pairs]), ids([p.corrupt for p in pairs])
        a, f = (ids([x[0].strip() for x in side])[:, 0] for side in ([p.answers for p in pairs], [p.foils for p in pairs]))
        rows = t.arange(len(pairs), device=device)
        self.metric = lambda logits: (logits[rows, -1, a].float() - logits[rows, -1, f].float()).mean()
        self.cache = model.run_with_cache(clean, names_filter=lambda n: n.endswith(("attn.hook_z", "hook_resid_pre", "hook_attn_out", "hook_mlp_out")))[1]

    def run(self, kind: str, cells: list[tuple[int, int]]) -> np.ndarray:
        import pandas as pd

        p, out = self.patching, []
        for row, col in cells:
            if kind == "z":
                name, fn, frame = "z", p.layer_head_vector_patch_setter, pd.DataFrame([[row, col]], columns=["layer", "head"])
            else:
                layer = row // 2 if kind == "attn_mlp" else row
                name = ("attn_out", "mlp_out")[row % 2] if kind == "attn_mlp" else kind
                fn, frame = p.layer_pos_patch_setter, pd.DataFrame([[layer, col]], columns=["layer", "pos"])
            out.append(p.generic_activation_patch(self.model, self.corrupt, self.cache, self.metric, fn, name, index_df=frame).float().cpu().numpy()[0])
        return np.array(out)


def hooked(b: Bench, e: Engine) -> object:
    """The gpt2 shape in TransformerLens's own class, the same weights, on the device."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf = tr.GPT2LMHeadModel.from_pretrained(b.folder("gpt2")).to(b.device)
    i = e.model.info
    sizes = {"n_layers": i.n_layers, "d_model": i.d_model, "n_heads": i.n_heads, "d_head": i.d_head, "d_mlp": i.d_mlp, "d_vocab": i.d_vocab}
    cfg = HookedTransformerConfig(**sizes, n_ctx=hf.config.n_positions, act_fn="gelu_new", normalization_type="LN", device=b.device, init_weights=False)
    model = HookedTransformer(cfg)
    model.load_state_dict(convert_gpt2_weights(hf, cfg), strict=False)
    return model.to(b.device).eval().requires_grad_(False)


def first_cells(b: Bench, e: Engine, ask: Sweep) -> tuple[float, SweepResult, list[str]]:
    """Seconds to the first cells, the result, and what progress said of memory."""
    first, words, least = None, [], None
    b.sync()
    start = time.perf_counter()

    def show(part: object) -> None:
        nonlocal first, least
        if isinstance(part, SweepResult):
            least = part.done if least is None else least
            if first is None and part.done > least:
                first = time.perf_counter() - start
        elif isinstance(part, Progress) and "out of memory" in part.text:
            words.append(part.text.split(";")[0])

    result = b.fresh(e, ask, show)
    return (time.perf_counter() - start if first is None else first), result, words


def race(b: Bench, e: Engine, peers: dict[str, object], kind: str, seq: int, batch: int, cells: int) -> dict:
    """One sweep: its time, rate and peak, and the time and numbers of each peer on some random cells."""
    s = b.study(e, seq, batch)
    ask = Sweep(s, kind, over_set=batch > 1)
    seconds = b.wall(lambda: b.fresh(e, ask), 3)
    (first, result, _), _, gib = b.measured(lambda: first_cells(b, e, ask))
    flops = limit(e.model.info, ("attn", "mlp") if kind == "attn_mlp" else (kind,), seq, batch, SHARED)
    rate, table = b.rates.get(str(e.model.dtype)), result.values
    out = {
        "cells": int(table.size),
        "s": number(seconds),
        "first_s": number(first, 3),
        "at_once": result.at_once,
        "tflops": number(flops / seconds / 1e12, 3),
        "matmul_share": number(flops / seconds / rate, 3) if rate else None,
        "mechanism": result.mechanism,
        "above_weights_gib": number(gib, 3),
        "peak_says_gib": number(result.peak_mb / 1024, 3),
    }
    rng = np.random.default_rng(0)
    for who, model in peers.items():
        peer = Peer(model, s, b.device)
        some = [tuple(divmod(int(j), table.shape[1])) for j in rng.choice(table.size, min(cells, table.size), replace=False)]
        peer.run(kind, some[:1])
        theirs, taken, _ = b.measured(lambda peer=peer, some=some: peer.run(kind, some))
        whole = taken / len(some) * table.size
        out[f"{who}_s"], out[f"vs_{who}"] = number(whole), number(whole / seconds, 3)
        out[f"error_{who}"] = number(float(np.abs(theirs - [table[c] for c in some]).max()), 2)
    return out


@t.no_grad()
def race_all(b: Bench, name: str, peers: dict[str, object], cases: list[tuple[str, int, int]], cells: int, tolerance: float) -> Outcome:
    e, rows, ok = b.engine(name), {}, True
    for kind, seq, batch in cases:
        key = f"{kind}, {seq} tokens, {batch} prompt" + "s" * (batch > 1)
        if b.late:
            rows[key] = "left out: budget"
            continue
        try:
            rows[key] = r = race(b, e, peers, kind, seq, batch, cells)
            ok = ok and all(v is not None and v < tolerance for k, v in r.items() if k.startswith("error"))
        except Exception as error:
            ok, rows[key] = False, {"error": one_line(error)}
        b.forget()
    return ok, {"model": name, "dtype": e.model.info.dtype, "tolerance": tolerance, "cases": rows}


def speed_gpt2(b: Bench) -> Outcome:
    """Against TransformerLens's own class and against its Bridge."""
    e = b.engine("gpt2")
    cases = [(k, s, n) for k in ("z", "resid_pre", "attn_mlp") for s, n in ((15, 1), (15, 8), (b.long, 1), (b.long, 8))]
    return race_all(b, "gpt2", {"hooked": hooked(b, e), "bridge": e.model.bridge}, cases, 3 if b.tiny else 10, 1e-3)


def speed_pythia(b: Bench) -> Outcome:
    cases = [("z", 15, 1), ("resid_pre", 15, 1), ("z", b.long, 8)]
    return race_all(b, "pythia-410m", {"bridge": b.engine("pythia-410m").model.bridge}, cases, 2 if b.tiny else 5, 2e-3)


def speed_llama(b: Bench) -> Outcome:
    cases = [("z", 15, 1), ("z", b.long, 1), ("resid_pre", 15, 1), ("z", 15, 8)]
    return race_all(b, "llama-3.1-8b", {"bridge": b.engine("llama-3.1-8b").model.bridge}, cases, 1 if b.tiny else 2, 0.5)
