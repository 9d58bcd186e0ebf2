"""Statistics over the prompts of a set: intervals, and a test by sign flips, corrected for the size of the table."""

import math

import numpy as np

FLIPS = 4096  # at least, where not all are tried
PER_CELL = 40  # flips for each cell of the table, so that the smallest p times the cells is .025
ENOUGH = 20  # flips that reach the effect's size: a p this well known takes no more of them
WORK = 4e10  # multiplications
DRAWS = 2000
ROUNDING = 32 * float(np.finfo(np.float32).eps)  # of a metric's size: what the order of float32 sums changes
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086)


def paired_effects(values: np.ndarray, base: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """
    Of the effects value - base [prompt, cell], paired by prompt: standard deviation (n - 1), the mean effect's 95 % confidence interval (Student's t),
    its two-sided p-value by sign flips, and `holm`, that p corrected for all cells. For p, an effect within float32's rounding of its prompt's largest metric is none.
    """
    effect = values - base[:, None]
    found = interval(effect)
    rounding = ROUNDING * np.nanmax(np.abs(np.column_stack([values, base])), axis=1, keepdims=True)
    p = sign_flips(np.where(np.abs(effect) < rounding, 0.0, effect), seed) if len(values) > 1 else found["std"]
    return found | {"p": p, "holm": holm(p)}


def interval(values: np.ndarray) -> dict[str, np.ndarray]:
    """Standard deviation (n - 1) over prompts of values [prompt, ...], and their mean's 95 % confidence interval (Student's t); NaN for one prompt."""
    n, mean = len(values), values.mean(0)
    if n < 2:
        return dict.fromkeys(("std", "low", "high"), np.full(mean.shape, math.nan))
    std = values.std(0, ddof=1)
    half = half_width(n) * std
    return {"std": std, "low": mean - half, "high": mean + half}


def half_width(n: int) -> float:
    """Half of a mean's 95 % confidence interval over n values, in standard deviations (n - 1)."""
    df = n - 1
    return (T95[df - 1] if df <= len(T95) else 1.959964 + 2.3723 / df + 2.823 / df**2) / math.sqrt(n)


def tries(n: int, cells: int) -> tuple[int, bool]:
    """How many sign flips of n prompts a table of so many cells gets, and whether these are all there are (up to the sign of the whole)."""
    wanted = max(FLIPS, PER_CELL * cells)
    every = 2 ** (n - 1)
    return (every, True) if every <= wanted and every * n * cells <= WORK else (wanted, False)


def smallest_p(n: int, cells: int) -> float:
    """The smallest p that n prompts can have in a table of so many cells."""
    flips, every = tries(n, cells)
    return 1 / flips if every else 1 / (flips + 1)


def sign_flips(effect: np.ndarray, seed: int) -> np.ndarray:
    """
    The two-sided p [cell] of the mean of effects [prompt, cell]: how often it is as large with each prompt's sign flipped or not. All flips are tried where
    they are few, else random ones (seed): a cell whose p is known well takes no more of them (Besag and Clifford 1991). NaN where an effect is.
    """
    n, cells = effect.shape
    p, (total, every) = np.full(cells, math.nan), tries(n, cells)
    left = np.flatnonzero(np.isfinite(effect).all(0))
    rng, hits, done = np.random.default_rng(seed), np.zeros(cells), 0
    while done < total and len(left):
        count = min(FLIPS, total - done)
        numbers = done + np.arange(count)
        signs = 1.0 - 2.0 * ((numbers[:, None] >> np.arange(n)) & 1) if every else 2.0 * rng.integers(0, 2, (count, n)) - 1
        some = effect[:, left]
        hits[left] += (np.abs(signs @ some) >= np.abs(some.sum(0)) * (1 - 1e-9) - 1e-12).sum(0)
        done += count
        p[left] = hits[left] / done if every else (1 + hits[left]) / (1 + done)
        left = left if every else left[hits[left] < ENOUGH]
    return p


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's step-down correction of p-values [cell] for all of them; NaN stays (Holm 1979)."""
    out, some = np.full(p.shape, math.nan), np.flatnonzero(np.isfinite(p))
    order = some[np.argsort(p[some], kind="stable")]
    out[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return out


def ratio_of_means(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """mean(a) / mean(b), paired by prompt, and its 95 % interval over prompts drawn again (percentiles, fixed seed); NaN where mean(b) is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = float(a.mean() / b.mean()) if abs(b.mean()) > 1e-9 else np.nan
        low = high = np.nan
        if len(a) > 1 and np.isfinite(mean):
            draw = np.random.default_rng(0).integers(len(a), size=(DRAWS, len(a)))
            low, high = np.percentile(a[draw].mean(1) / b[draw].mean(1), [2.5, 97.5])
    return mean, float(low), float(high)


def normalise(mean: np.ndarray, base: float, sides: np.ndarray, names: tuple[str, str] = ("clean", "corrupted")) -> tuple[np.ndarray, str]:
    """(mean - corrupted) / (clean - corrupted), a ratio of means; without a corrupted prompt mean / base. NaN, and why, where that says nothing."""
    clean, corrupt = sides[1], sides[2]
    if np.isnan(corrupt).any():
        if abs(base) < 1e-6:
            return np.full(mean.shape, math.nan), "the base run's metric is 0: not normalised"
        return mean / base, "no corrupted prompt: normalised as a share of the base run's metric"
    gaps = clean - corrupt
    gap, size = gaps.mean(), max(abs(clean.mean()), abs(corrupt.mean()))
    if abs(gap) < 1e-3 * size or gap == 0:
        return np.full(mean.shape, math.nan), f"{names[0]} and {names[1]} differ by {gap:.2g} only: not normalised"
    small = int((np.abs(gaps) < 0.1 * abs(gap)).sum())
    words = f"{small} of {len(gaps)} prompts have a {names[0]} - {names[1]} below a tenth of the mean" if small else ""
    if abs(gap) < 0.05 * size:
        words = f"{names[0]} and {names[1]} differ by {gap:.2g} only: normalised values are large and noisy"
    return (mean - corrupt.mean()) / gap, words


def too_few(prompts: int, cells: int) -> str:
    """Where no cell can be significant once p is corrected, the words that say so."""
    floor = smallest_p(prompts, cells) if prompts > 1 else 1.0
    return f"{prompts} prompts give no p below {floor:.2g}, so that none of {cells} cells can have a corrected p below .05" if floor * cells >= 0.05 else ""
