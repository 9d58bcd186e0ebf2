"""From runs to their likeliest next tokens, side by side. Pure functions."""

import numpy as np

from techniques.output.requests import RunResult, Side
from utils import show_token
from widgets import BAD, DIM, GOOD, HEAD, PLAIN, Spans


def output_lines(result: RunResult, pos: int, other: tuple[str, int], k: int, wide: bool, answers: set[str], foils: set[str]) -> list[Spans]:
    """Top-k next tokens at a position for clean, corrupted and now, side by side; `other` is the prompt that is read elsewhere (-1: nowhere)."""
    sides: list[tuple[str, Side]] = [(result.names[0], result.clean)]
    if result.corrupt is not None:
        sides.append((result.names[1], result.corrupt))
    if result.now is not result.clean and not same(result.now, result.clean):
        sides.append(("now", result.now))
    w = 17 if wide else 12
    lines: list[Spans] = [[("   ", DIM), *((set_width(name[: w + 7], w + 8), HEAD) for name, _ in sides)]]
    for n in range(k):
        spans: Spans = [(f"{n:2} ", DIM)]
        for name, side in sides:
            at = other[1] if name == other[0] else pos
            if not 0 <= at < len(side.tokens.ids) or n >= side.top_ids.shape[1]:
                spans.append((" " * (w + 8), PLAIN))
                continue
            if side.top_ids[at, n] < 0:  # not yet read
                spans.append((set_width("…", w + 8), DIM))
                continue
            text = result.texts[int(side.top_ids[at, n])]
            style = GOOD if text in answers else BAD if text in foils else PLAIN
            spans += [(show_token(text, w), style), (f" {float(side.top_probs[at, n]):.4f} ", PLAIN)]
        lines.append(spans)
    return lines


def same(a: Side, b: Side) -> bool:
    return a.tokens == b.tokens and np.array_equal(a.top_ids, b.top_ids) and np.array_equal(a.top_probs, b.top_probs)


def set_width(text: str, width: int) -> str:
    return text[:width].ljust(width)
