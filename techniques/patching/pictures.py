"""From sweeps to the map of their cells. Pure functions."""

import numpy as np

from techniques.patching.requests import SweepResult
from screen.pictures import cells_of, change, texts_of
from utils import show_token
from widgets import FAINT, Grid


def sweep_grid(truth: SweepResult | None, estimate: SweepResult | None, show: str) -> Grid:
    """Rows and columns of a sweep: the truth where it is known, the estimate elsewhere; marked where the two disagree, and of spread and p where the corrected p is below .05."""
    result = truth or estimate
    true, guess = (change(r) if r is not None else np.full(result.values.shape, np.nan) for r in (truth, estimate))
    blank = np.full(true.shape, np.nan)
    spread, p, holm = (getattr(truth, n).astype(float) if truth is not None and getattr(truth, n).size else blank for n in ("std", "p", "holm"))
    both = {"effect": np.where(np.isfinite(true), true, guess), "estimate": guess, "disagreement": guess - true, "spread": spread, "p": p, "corrected p": holm}
    values = (np.where(np.isfinite(true), truth.values, np.nan) if truth else estimate.values).astype(float) if show == "metric" else both[show]
    numbers = None
    tested = show in ("p", "corrected p")
    if tested:  # the smaller, the stronger the colour: 1 at .001 and below
        lo, hi, sign, numbers = 0.0, 1.0, False, values
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.clip(-np.log10(values) / 3, 0.0, 1.0)
    else:
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = (0.0, False) if show == "spread" else (-hi, True)
    far = np.argwhere(np.abs(guess - true) > np.maximum(0.1, 0.3 * np.abs(true))).tolist() if show in ("effect", "estimate", "disagreement") else []
    with np.errstate(invalid="ignore"):
        far = np.argwhere(holm < 0.05).tolist() if tested or show == "spread" else far
    texts, places = texts_of(result.tokens), tuple(map(str, range(len(result.tokens.ids))))
    rows = [f"{n:>2} {show_token(text, 12, fill=False)}" for n, text in enumerate(texts)] if result.rows == places else list(result.rows)
    cols = texts if result.cols == places else list(result.cols)
    noise = below(truth, estimate, show) if show in ("effect", "metric", "estimate") else np.zeros(values.shape, bool)
    more = {"positions": result.cols == places, "ends": ("1", "≤ .001") if tested else ("", ""), "noise": cells_of(noise), "floor": result.floor}
    return Grid(values, rows, cols, lo, hi, None, numbers, sign, (5, 8), 0.0 if tested else FAINT, marks=frozenset(map(tuple, far)), **more)


def below(truth: SweepResult | None, estimate: SweepResult | None, show: str) -> np.ndarray:
    """Where [row, column] what is shown is a change below the noise floor: of the truth where it is known, else of the estimate."""
    if truth is None or show == "estimate":
        return estimate.noise if estimate is not None else np.zeros(truth.values.shape, bool)
    return np.where(np.isfinite(truth.values) | (estimate is None), truth.noise, False if estimate is None else estimate.noise)
