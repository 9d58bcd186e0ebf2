"""From lens results to pictures: the table of tokens, the line about a cell, the top tokens beside it. Pure functions."""

import dataclasses
import math

import numpy as np

from techniques.lens.requests import LensResult
from screen.pictures import texts_of
from utils import show_token
from widgets import BOLD, DIM, PLAIN, Grid, Spans

LENS_KINDS = {"logit": "logit lens", "tuned": "tuned lens", "jacobian": "Jacobian lens"}


def lens_values(result: LensResult, stat: str) -> np.ndarray:
    """[point, position] of a statistic of the lens."""
    match stat:
        case "prob":
            values = result.top_probs[..., 0]
        case "answer":
            values = result.prob
        case "promoted" | "suppressed":
            values = (result.up_values if stat == "promoted" else result.down_values)[..., 0]
        case _:
            values = getattr(result, stat)
    return values.astype(float)


def lens_grid(result: LensResult, stat: str, d_vocab: int) -> Grid:
    """Hook points × positions; each cell the top token, coloured by the statistic."""
    values = lens_values(result, stat)
    numbers, lo, hi, sign, ends = None, 0.0, 1.0, False, ("", "")
    if stat == "rank":
        numbers, values, ends = values, 1 - np.log1p(values) / math.log1p(d_vocab), (f"{d_vocab}", "0")
    elif stat == "entropy":
        hi = math.log(d_vocab)
    elif stat in ("kl", "kl_pair"):
        hi = max(float(np.nanmax(values, initial=0)), 1e-6)
    elif stat in ("logit_diff", "rank_pair", "promoted", "suppressed"):
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = -hi, True
    ids = {"promoted": result.up_ids, "suppressed": result.down_ids}.get(stat, result.top_ids)[..., 0]
    text = [
        ["" if math.isnan(v) and stat in ("promoted", "suppressed") else result.texts[i] for i, v in zip(*row)] for row in zip(ids.tolist(), values.tolist())
    ]
    thin = tuple(
        (n, some) for n in ("resid_post",) if (some := tuple(i for i, p in enumerate(result.points) if p.endswith(n))) and len(some) < len(result.points)
    )
    thin = thin or (("row", tuple(range(len(result.points)))),)
    look = {"corner": "hook point", "positions": True, "ends": ends, "thin": thin}
    return Grid(values, list(result.points), texts_of(result.tokens), lo, hi, text, numbers, sign, (6, 10), **look)


def lens_cell(result: LensResult, row: int, pos: int, k: int = 5) -> Spans:
    """One line about a cell: its top tokens and statistics."""
    if not (row < len(result.points) and pos < len(result.tokens.texts)):
        return []
    tops = [(f"{show_token(result.texts[i])} {p:.3f}  ", PLAIN) for i, p in zip(result.top_ids[row, pos, :k].tolist(), result.top_probs[row, pos, :k].tolist())]
    spans: Spans = [(f" {result.points[row]}@{pos}", BOLD), (f" {lens_numbers(result, row, pos)} ", PLAIN)]
    if tops:
        tops[0] = (f"{show_token(texts_of(result.tokens)[pos])} → {tops[0][0]}", PLAIN)
    return [*spans, *tops]


def lens_numbers(result: LensResult, row: int, pos: int) -> str:
    rank, prob, diff = (float(a[row, pos]) for a in (result.rank, result.prob, result.logit_diff))
    answer = "" if math.isnan(prob) else f"answer p {prob:.4f} rank {rank:.0f} "
    diff_text = "" if math.isnan(diff) else f"LD {diff:+.3f} "
    return f"{answer}{diff_text}H {float(result.entropy[row, pos]):.3f} KL {float(result.kl[row, pos]):.4f}"


def lens_side(result: LensResult, row: int, pos: int, k: int) -> list[Spans]:
    """The top-k beside the table."""
    if not (row < len(result.points) and pos < len(result.tokens.texts)):
        return []
    lines: list[Spans] = [[(f"{result.points[row]}@{pos}", BOLD), (" after " + show_token(texts_of(result.tokens)[pos], 12, fill=False), DIM)]]
    lines += [
        [(f"{n:2} ", DIM), (show_token(result.texts[i], 12) + f" {p:.4f}", PLAIN)]
        for n, (i, p) in enumerate(zip(result.top_ids[row, pos, :k].tolist(), result.top_probs[row, pos, :k].tolist()))
    ]
    rank, prob, diff = (float(a[row, pos]) for a in (result.rank, result.prob, result.logit_diff))
    named = [("answer's probability", prob, 4), ("answer's rank", rank, 0), ("logit difference", diff, 3)]
    lines.append([])
    lines += [[(f"{name:23}", DIM), (f"{x:.{d}f}", PLAIN)] for name, x, d in named if not math.isnan(x)]
    lines.append([("entropy, nats          ", DIM), (f"{float(result.entropy[row, pos]):.3f}", PLAIN)])
    lines.append([("KL(final ‖ this), nats ", DIM), (f"{float(result.kl[row, pos]):.4f}", PLAIN)])
    return lines


def joined(parts: list[LensResult]) -> LensResult:
    """The rows that have come so far as one table."""
    arrays = {
        f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(LensResult) if isinstance(getattr(parts[0], f.name), np.ndarray)
    }
    texts = {k: v for p in parts for k, v in p.texts.items()}
    return dataclasses.replace(parts[0], points=tuple(x for p in parts for x in p.points), texts=texts, **arrays)
