"""A QK attribution as a table: the largest rows and columns with their margins, and the rest together; a check in words. Pure functions, for screen and shell."""

import math

import numpy as np

from techniques.qk.requests import QKCheckResult, QKFeaturesResult, QKResult

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


def pair_rows(r: QKFeaturesResult, most: int) -> list[tuple[str, str, str, str, str]]:
    """The largest pairs of features: query's and key's, what they add, over a set its interval and in how many prompts both fire; then what other pairs add, and all that is no feature's."""
    over, n = r.prompts.size > 0, min(most, len(r.pair))
    rows = [
        (a, b, f"{x:+.4f}", f"[{r.pair_low[i]:+.3f}, {r.pair_high[i]:+.3f}]" if over else "", f"{r.pair_fires[i]}/{r.prompts.size}" if over else "")
        for i, ((a, b), x) in enumerate(zip(r.pair_names[:n], r.pair[:n].tolist()))
    ]
    shown = float(r.pair[:n].astype(float).sum())
    features = float(r.pair.astype(float).sum()) + r.other_pairs
    sums = ((f"{r.pairs - n} other pairs of features", features - shown), ("with errors, biases, components", r.total - features), ("sum", r.total))
    return rows + [(name, "", f"{x:+.4f}", "", "") for name, x in sums]


def check_words(r: QKCheckResult) -> str:
    """What a path did for real beside what the sum says."""
    way = "patched" if r.op == "patch" else "taken away"
    held = "" if math.isnan(r.frozen) else f", with norms frozen {r.frozen:+.4f}"
    words = f"{r.edge.replace('->', ' → ')} {way}: moves the score by {r.true:+.4f} (the sum says {r.predicted:+.4f}{held}), attention {r.attention[0]:.3f} → {r.attention[1]:.3f}"
    return words + ("" if r.metric is None else f", metric {r.metric[0]:+.3f} → {r.metric[1]:+.3f}")
