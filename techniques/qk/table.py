"""A QK attribution as a table: the largest rows and columns with their margins, and the rest together; a check in words. Pure functions, for screen and shell."""

import numpy as np

from techniques.qk.requests import QKCheckResult, QKResult

ALL, REST = "all", "rest"


def shown(values: np.ndarray, order: str, most: int) -> list[int]:
    """Which components of a side are shown on their own, of entries [component, other side]: those with the largest margins or entries, by margin."""
    if order == "model":
        return list(range(len(values)))
    margins = np.abs(values.sum(1))
    best = np.argsort(-np.maximum(margins, np.abs(values).max(1)), kind="stable")[:most]
    return sorted(best.tolist(), key=lambda i: -float(margins[i]))


def table(result: QKResult, order: str, most: tuple[int, int] = (24, 12)) -> tuple[list[str], list[str], np.ndarray]:
    """Row names, column names and the numbers [row, column]: margins first, then at `most` so many components, then what is left of them."""
    v = result.values.astype(float)
    rows, cols = shown(v, order, most[0]), shown(v.T, order, most[1])
    sides = []
    for some, names in ((rows, result.queries), (cols, result.keys)):
        left = [i for i in range(len(names)) if i not in set(some)]
        sides.append(([list(range(len(names))), *([i] for i in some), *([left] if left else [])], [ALL, *(names[i] for i in some), *([REST] if left else [])]))
    (by_row, row_names), (by_col, col_names) = sides
    half = np.stack([v[some].sum(0) for some in by_row])
    return row_names, col_names, np.stack([half[:, some].sum(1) for some in by_col], 1)


def check_words(r: QKCheckResult) -> str:
    """What a path did for real beside what the sum says."""
    way = "patched" if r.op == "patch" else "taken away"
    words = f"{r.edge.replace('->', ' → ')} {way}: moves the score by {r.true:+.4f} (the sum says {r.predicted:+.4f}), attention {r.attention[0]:.3f} → {r.attention[1]:.3f}"
    return words + ("" if r.metric is None else f", metric {r.metric[0]:+.3f} → {r.metric[1]:+.3f}")
