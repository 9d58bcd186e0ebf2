"""From a QK attribution to a picture: the largest rows and columns with their margins, the rest together, and lines in words. Pure functions."""

import numpy as np

from screen.pictures import signed, texts_of
from techniques.qk.requests import QKResult
from techniques.qk.table import table
from utils import show_token
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, Grid, Spans


def qk_grid(result: QKResult, order: str, most: tuple[int, int]) -> Grid:
    """Query components (rows) × key components (columns), at most so many of each by size; the first row and column are sums."""
    rows, cols, values = table(result, order, most)
    hi = max(float(np.abs(values).max()), 1e-6)
    return Grid(values, rows, cols, -hi, hi, signed=True, cell=(7, 9), corner="query \\ key", faint=hi * 0.02, listed=False)


def place(result: QKResult, pos: int) -> str:
    return f"{pos} {show_token(texts_of(result.tokens)[pos])}"


def cell_line(result: QKResult, grid: Grid, row: int, col: int) -> Spans:
    """The entry under the cursor, and the sum beside the model's own score."""
    value, over = float(grid.values[row, col]), result.prompts.size > 0
    ok = result.error <= 1e-4 * max(1.0, abs(result.score))
    spans: Spans = [(f" {grid.rows[row]} × {grid.cols[col]} ", BOLD), (signed(value, 4), PLAIN)]
    if over and grid.rows[row] in result.queries and grid.cols[col] in result.keys:
        i, j = result.queries.index(grid.rows[row]), result.keys.index(grid.cols[col])
        spans.append((f" [{float(result.low[i, j]):+.3f}, {float(result.high[i, j]):+.3f}]", PLAIN))
    spans += [("  │ ", DIM), (f"sum {result.total:+.4f}  model {result.score:+.4f}  error {result.error:.1e}", GOOD if ok else BAD)]
    spans += [(f"  after the soft cap {result.capped:+.4f}", BOLD)] if result.cap else []
    return [*spans, (f"  attention {result.attention:.3f}", DIM)]
