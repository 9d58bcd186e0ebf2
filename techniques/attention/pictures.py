"""From attention results to pictures: the map of heads, one pattern, all patterns of a layer. Pure functions."""

import math

import numpy as np

from techniques.attention.requests import AttentionResult, HeadStatsResult
from screen.colours import half_block, heat_code, shade
from screen.pictures import texts_of
from utils import show_token
from widgets import BOLD, CURSOR_PLAIN, PLAIN, Grid, Spans


def heads_grid(result: HeadStatsResult, stat: str, marks: frozenset[tuple[int, int]]) -> Grid:
    """Layers × heads of a statistic, with two blank columns for the whole attention and MLP output, so that the cursor can stand there."""
    values = result.stats[stat].astype(float)
    n_layers, n_heads = values.shape
    values = np.concatenate([values, np.full((n_layers, 2), np.nan)], axis=1)
    lo, hi, sign = 0.0, 1.0, False
    if "-" in result.which:
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = -hi, True
    elif stat == "entropy":
        hi = max(float(np.nanmax(values, initial=0)), 1e-6)
    rows, cols = [f"L{n}" for n in range(n_layers)], [*(f"H{n}" for n in range(n_heads)), "attn", "mlp"]
    return Grid(values, rows, cols, lo, hi, signed=sign, cell=(5, 7), marks=marks, blanks=("attn", "mlp"))


def pattern_grid(result: AttentionResult, head: int) -> Grid:
    """Destinations × sources of one head; sources where the head can't look are blank, not zero."""
    values = result.pattern[head].astype(float)
    if result.sink is not None:
        values = np.column_stack([values, result.sink[head]])
    lo, hi, sign = 0.0, 1.0, False
    if "-" in result.which:
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = -hi, True
    tokens = texts_of(result.tokens)
    rows = [f"{n:>2} {show_token(tok, 9, fill=False)}" for n, tok in enumerate(tokens)]
    return Grid(
        values,
        rows,
        list(tokens) + ["sink"] * (result.sink is not None),
        lo,
        hi,
        signed=sign,
        cell=(4, 7 if len(tokens) <= 10 else 4),
        faint=(hi - lo) * 0.15,
        corner="to \\ from",
        positions=True,
        listed=False,
    )


def small_patterns(result: AttentionResult, head: int, width: int, height: int, mode: str) -> list[Spans]:
    """Every head's pattern of a layer, two destinations a line by half blocks (shades without colour), wrapped to the width; pooled when long."""
    n_heads, seq, _ = result.pattern.shape
    top = max(float(np.nanmax(np.abs(result.pattern), initial=0)), 1e-6)
    signed_ = "-" in result.which
    across = max(1, width // (min(seq, 24) + 2))
    down = -(-n_heads // across)
    lines_each = max(2, height // down - 1)
    pool = max(1, -(-seq // min(width // across - 2, 2 * lines_each)))
    size = -(-seq // pool)
    blocks: list[list[Spans]] = []
    for h in range(n_heads):
        values = np.full((size * pool, size * pool), np.nan, np.float32)
        values[:seq, :seq] = result.pattern[h]
        cells = values.reshape(size, pool, size, pool).transpose(0, 2, 1, 3).reshape(size, size, -1)
        cells = np.take_along_axis(cells, np.nan_to_num(np.abs(cells), nan=-1.0).argmax(-1)[..., None], -1)[..., 0]  # NaN where all of them are
        block: list[Spans] = [[(f"H{h}".ljust(size + 2), CURSOR_PLAIN if h == head else BOLD)]]
        for y in range(0, size, 2):
            spans: Spans = []
            for x in range(size):
                pair = [float(cells[r, x]) / top if r < size else math.nan for r in (y, y + 1)]
                if mode == "shade":
                    spans.append((shade(max((abs(v) for v in pair if not math.isnan(v)), default=math.nan)), PLAIN))
                else:
                    spans.append(half_block(*(None if math.isnan(v) else heat_code(v, signed_) for v in pair)))
            block.append([*spans, ("  ", PLAIN)])
        blocks.append(block)
    out: list[Spans] = []
    for start in range(0, n_heads, across):
        group = blocks[start : start + across]
        out += [[span for block in group for span in block[y]] for y in range(len(group[0]))]
    return out


def pattern_cell(result: AttentionResult, head: int, pos: int, src: int, drilled: bool) -> Spans:
    """One line: what the head reads at the cursor's destination."""
    if not (head < len(result.pattern) and pos < len(result.tokens.texts)):
        return []
    row, tokens = result.pattern[head][pos][: pos + 1], texts_of(result.tokens)
    order = [s for s in np.argsort(-np.abs(row), kind="stable")[:3].tolist() if not math.isnan(row[s])]
    read = [f"{s} {show_token(tokens[s])} {float(row[s]):.3f}" for s in order] + ([] if result.sink is None else [f"sink {float(result.sink[head][pos]):.3f}"])
    spans: Spans = [(f" L{result.layer}H{head} ", BOLD)]
    if drilled and src <= pos:
        value = "outside its window" if math.isnan(row[src]) else f"{float(row[src]):.4f}"
        spans.append((f"cursor {src} {show_token(tokens[src])} {value}  ", BOLD))
    spans.append((f"{pos} {show_token(tokens[pos])} attends to {read[0] if read else 'nothing'}", PLAIN))
    return [*spans, *((f"  {text}", PLAIN) for text in read[1:])]
