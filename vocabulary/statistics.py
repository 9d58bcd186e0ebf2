"""Statistics over the prompts of a set: intervals, and a test by sign flips."""

import math

import numpy as np

FLIPS = 4096
DRAWS = 2000
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086)


def paired_effects(values: np.ndarray, base: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """
    Of the effects value - base [prompt, cell], paired by prompt: standard deviation (n - 1), the mean effect's 95 % confidence interval (Student's t), and
    its p-value by sign flips: all of them for up to 12 prompts, else FLIPS drawn with the seed.
    """
    n = len(values)
    effect = values - base[:, None]
    mean = effect.mean(0)
    if n < 2:
        nan = np.full(mean.shape, math.nan)
        return {"std": nan, "low": nan, "high": nan, "p": nan}
    std = effect.std(0, ddof=1)
    df = n - 1
    quantile = T95[df - 1] if df <= len(T95) else 1.959964 + 2.3723 / df + 2.823 / df**2
    half = quantile * std / math.sqrt(n)
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.concatenate([np.ones((1, n)), np.random.default_rng(seed).choice((-1.0, 1.0), (FLIPS, n))])
    real = np.abs(effect.sum(0))
    hits = sum((np.abs(part @ effect) >= real * (1 - 1e-9) - 1e-12).sum(0) for part in np.array_split(signs, 16))
    return {"std": std, "low": mean - half, "high": mean + half, "p": np.where(np.isnan(mean), math.nan, hits / len(signs))}


def ratio_of_means(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """mean(a) / mean(b), paired by prompt, and its 95 % interval over prompts drawn again (percentiles, fixed seed); NaN where mean(b) is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = float(a.mean() / b.mean()) if abs(b.mean()) > 1e-9 else np.nan
        low = high = np.nan
        if len(a) > 1 and np.isfinite(mean):
            draw = np.random.default_rng(0).integers(len(a), size=(DRAWS, len(a)))
            low, high = np.percentile(a[draw].mean(1) / b[draw].mean(1), [2.5, 97.5])
    return mean, float(low), float(high)
