"""From a QK attribution to a picture: the largest rows and columns with their margins, the rest together, and lines in words. Pure functions."""

import re

import numpy as np
from rich.style import Style

from screen.pictures import signed, texts_of
from techniques.qk.requests import OTHERS, QKFeaturesResult, QKResult
from techniques.qk.table import pair_rows, table
from utils import fit, shortened, show_token
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, Grid, Spans

REVERSE = Style(reverse=True)


def qk_grid(result: QKResult, order: str, most: tuple[int, int]) -> Grid:
    """Query components (rows) × key components (columns), at most so many of each by size; the first row and column are sums."""
    rows, cols, values = table(result, order, most)
    hi = max(float(np.abs(values).max()), 1e-6)
    features = isinstance(result, QKFeaturesResult)
    return Grid(
        values, *(list(map(short, names)) for names in (rows, cols)), -hi, hi, signed=True, cell=(8, 10) if features else (7, 9),
        corner="query \\ key", faint=hi * 0.02, listed=False,
    )  # fmt: skip


def short(name: str) -> str:
    """A row as a map of features names it: L1.f7, L1.error, L1.b_dec, others."""
    return "others" if name == OTHERS else name.replace(".sae.bias", ".b_dec").replace(".sae.", ".")


def whole(name: str) -> str:
    """The row that `short` named."""
    return OTHERS if name == "others" else re.sub(r"^(L\d+)\.(f\d+|error)$", r"\1.sae.\2", name).replace(".b_dec", ".sae.bias")


def place(result: QKResult, pos: int) -> str:
    return f"{pos} {show_token(texts_of(result.tokens)[pos])}"


def pair_lines(result: QKFeaturesResult, at: int, width: int, n: int) -> list[Spans]:
    """Pairs of features by size with their labels, and below them the sums of what is not listed."""
    rows, over = pair_rows(result, len(result.pair)), result.prompts.size > 0
    pairs, sums = rows[:-3], rows[-3:]
    side = max(12, min(40, (width - (44 if over else 14)) // 2))
    text = lambda name: shortened(f"{short(name)} {result.labels.get(name, '')}".rstrip(), side)  # noqa: E731
    fitting = max(2, n - len(sums) - 1)
    top = max(0, min(at - fitting // 2, len(pairs) - fitting))
    head = f" {fit('query', side)} {fit('key', side)} {'adds':>9}" + ("  95 % interval     prompts" if over else "")
    lines: list[Spans] = [[(head, BOLD)]]
    for k, (a, b, adds, between, fires) in enumerate(pairs[top : top + fitting], top):
        lines.append([(f" {text(a)} {text(b)} {adds:>9}  {between:18}{fires}".rstrip() + " ", PLAIN + (REVERSE if k == at else Style()))])
    return lines + [[(f" {fit(name, 2 * side + 1)} {adds:>9}", BOLD if name == "sum" else DIM)] for name, _, adds, *_ in sums]


def sum_spans(result: QKResult) -> Spans:
    """The sum beside the model's own score."""
    ok = result.error <= 1e-4 * max(1.0, abs(result.score))
    spans: Spans = [(f"  │ sum {result.total:+.4f}  model {result.score:+.4f}  error {result.error:.1e}", GOOD if ok else BAD)]
    spans += [(f"  after the soft cap {result.capped:+.4f}", BOLD)] if result.cap else []
    return [*spans, (f"  attention {result.attention:.3f}", DIM)]


def pair_line(result: QKFeaturesResult, at: int) -> Spans:
    """The pair under the cursor in full."""
    names = result.pair_names[at]
    return [(f" {' × '.join(names)} ", BOLD), (signed(float(result.pair[at]), 4), PLAIN), *sum_spans(result), *label_spans(result, names)]


def label_spans(result: QKFeaturesResult, names: tuple[str, ...]) -> Spans:
    """What the features are called, last: a narrow line loses it first."""
    return [(f"  {name} {result.labels[name]}", DIM) for name in dict.fromkeys(names) if result.labels.get(name)]


def cell_line(result: QKResult, grid: Grid, row: int, col: int) -> Spans:
    """The entry under the cursor, and the sum beside the model's own score."""
    value, names = float(grid.values[row, col]), (whole(grid.rows[row]), whole(grid.cols[col]))
    spans: Spans = [(f" {' × '.join(names)} ", BOLD), (signed(value, 4), PLAIN)]
    if result.prompts.size and names[0] in result.queries and names[1] in result.keys:
        i, j = result.queries.index(names[0]), result.keys.index(names[1])
        spans.append((f" [{float(result.low[i, j]):+.3f}, {float(result.high[i, j]):+.3f}]", PLAIN))
        spans += [(f" in {result.fires[i, j]}/{result.prompts.size}", DIM)] * isinstance(result, QKFeaturesResult)
    return [*spans, *sum_spans(result), *(label_spans(result, names) if isinstance(result, QKFeaturesResult) else [])]
