"""Are the numbers of the device right? Against the CPU in float32, against Hugging Face in float64, and what half precision does to them."""

import os

import numpy as np
import torch as t
import transformers as tr

from gpu_checks.bench import ARCHITECTURES, Bench, Outcome, difference, number, one_line
from gpu_checks.loupe import SMALL, Engine, Identities, Lens, Load, Sweep, UserError

SLOW_ON_CPU = ("sweep z_pos", "sweep estimate first", "sweep pairs", "greedy", "score", "eap-ig", "clean-corrupted")
ORDERED = ("sweep rank", "run", "detect")  # ranks and lists of tokens may change places where two values are equal


def numbers(b: Bench) -> Outcome:
    """Every analysis of the gpt2 shape in float32, its seconds and peak memory over the weights, against the CPU's; a few long ones without the CPU."""
    e, cpu = b.engine("gpt2", "float32"), b.engine("gpt2", "float32", "cpu")
    if not b.tiny:
        t.set_num_threads(min(16, os.cpu_count() or 1))
    rows, broken, off = {}, {}, []
    for name, ask in b.every(e).items():
        if b.late:
            rows["left out"] = name
            break
        try:
            got, seconds, gib = b.measured(lambda ask=ask: b.fresh(e, ask))
        except Exception as error:
            broken[name] = one_line(error)
            continue
        rows[name] = {"s": number(seconds, 3), "gib": number(gib, 3)}
        if name == "identities":
            off += [f"identities: {r.name} {r.error:.2g} > {r.tolerance:.2g}" for r in got.rows if r.ok is False]
        elif b.tiny or name not in SLOW_ON_CPU:
            found = difference(b.fresh(cpu, ask), got)
            rows[name] |= {"error": number(found["max_error"], 2), "relative": number(found["relative"], 2)}
            if name not in ORDERED and not found["relative"] < 5e-4:
                off.append(f"{name}: {found['relative']:.2g} of {found['where']}")
    worst = max((r["relative"] for r in rows.values() if isinstance(r, dict) and r.get("relative") is not None), default=None)
    return not broken and not off, {"worst_relative": worst, "broken": broken, "off": off, "analyses": rows}


def reference(b: Bench) -> Outcome:
    """Logits of the device in float32 against Hugging Face's own forward pass in float64 on the CPU."""
    e = b.engine("gpt2", "float32")
    ids = e.model.random_ids(32)
    hf = tr.AutoModelForCausalLM.from_pretrained(b.folder("gpt2"), attn_implementation="eager").double().eval()
    with t.no_grad():
        want = hf(ids).logits
    got = e.model.forward(ids, keep=0)[0].double().cpu()
    error = ((got - want).norm() / want.norm()).item()
    return error < 1e-4, {"relative_error": number(error, 3), "max_error": number((got - want).abs().max().item(), 3)}


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's, of absolute effects."""
    rank = lambda x: np.argsort(np.argsort(np.abs(x.ravel())))  # noqa: E731
    return float(np.corrcoef(rank(a), rank(b))[0, 1])


def noise(b: Bench) -> Outcome:
    """What bfloat16 does to a sweep of the gpt2 shape, and the noise floor that the identities show."""
    exact, half_ = b.engine("gpt2", "float32"), b.engine("gpt2", "bfloat16")
    rows, floors = {}, {}
    for kind in ("z", "attn_mlp"):
        s = b.study(exact)
        one, two = b.fresh(exact, Sweep(s, kind)), b.fresh(half_, Sweep(s, kind))
        effect = one.values - one.base
        error = np.abs((two.values - two.base) - effect)
        rows[kind] = {
            "largest_effect": number(float(np.abs(effect).max())),
            "median_effect": number(float(np.median(np.abs(effect)))),
            "largest_error": number(float(error.max())),
            "median_error": number(float(np.median(error))),
            "rank_correlation": number(rank_correlation(effect, two.values - two.base)),
            "below_error": number(float((np.abs(effect) < error.max()).mean())),
            "convention_names_dtype": "bfloat16" in two.convention,
            "warning": two.warning,
        }
    for name, e in (("float32", exact), ("bfloat16", half_)):
        found = e.run(Identities(b.study(e))).rows
        floors[name] = {r.name: [number(r.error, 2), number(r.tolerance, 2), r.ok] for r in found if r.ok is False or "noise floor" in r.name}
    return all(any("noise floor" in n for n in f) for f in floors.values()), {"sweeps": rows, "identities": floors}


def half(b: Bench) -> Outcome:
    """Every analysis in half precision: what breaks, and what is refused in words. At tiny shapes on all four architectures."""
    broken, refused, count = {}, {}, 0
    for name in ARCHITECTURES if b.tiny else ("gpt2",):
        for dtype in ("bfloat16", "float16") if b.tiny or b.cuda else ("bfloat16",):
            if name.startswith("llama") and dtype != "bfloat16":
                continue
            e = b.engine(name, dtype)
            for key, ask in b.every(e).items():
                if b.late:
                    break
                count += 1
                try:
                    got = b.fresh(e, ask)
                    if bad := [f"{r.name} {r.error:.2g} > {r.tolerance:.2g}" for r in got.rows if r.ok is False] if key == "identities" else []:
                        broken[f"{name} {dtype} identities"] = "; ".join(bad)
                except UserError as error:
                    refused[f"{name} {dtype} {key}"] = str(error)[:120]
                except Exception as error:
                    broken[f"{name} {dtype} {key}"] = one_line(error)
    return not broken, {"asked": count, "broken": broken, "refused": refused}


def auto(b: Bench) -> Outcome:
    """dtype auto by size, device auto, and device_map auto with the numbers of one device."""
    name = "gemma-2-2b"
    e = b.engine(name)
    s, info = b.study(e), e.model.info
    asks = {"lens": Lens(s), "z": Sweep(s, "z"), "resid_pre": Sweep(s, "resid_pre")}
    want = {key: b.fresh(e, ask) for key, ask in asks.items()}
    del e
    b.let_go()
    mapped = Engine(Load(str(b.saved(name)), dtype="auto", device=b.device, device_map="auto"))
    found = {"dtype": mapped.model.info.dtype, "device": mapped.model.info.device, "failed": [c.name for c in mapped.model.info.checks if c.ok is False]}
    right = info.dtype == ("bfloat16" if info.n_params > SMALL else "float32")
    for key, ask in asks.items():
        try:
            got = mapped.run(ask)
            found[key] = number(difference(want[key], got)["relative"], 2)
            right = right and found[key] is not None and found[key] < 0.05
            if key == "z":
                found["mechanism"] = got.mechanism
        except Exception as error:
            right, found[key] = False, one_line(error)
    plain = Engine(Load(str(b.saved("gpt2")), device="auto" if b.device == "cuda" else b.device)).model.info
    right = right and plain.dtype == "float32" and t.device(plain.device).type == t.device(b.device).type
    return right, {"dtype": info.dtype, "device": info.device, "mapped": found, "gpt2": [plain.dtype, plain.device]}
