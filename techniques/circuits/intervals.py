"""A circuit's scores from each prompt's own values: means with their intervals, ratios, and what to be warned of. Never imports torch."""

import numpy as np

from techniques.circuits.requests import Interval
from vocabulary.statistics import paired_effects, ratio_of_means


def interval(values: np.ndarray) -> Interval:
    """Mean over prompts with Student's t."""
    some = paired_effects(values[:, None], values * 0, 0)
    return Interval(float(values.mean()), float(some["low"][0]), float(some["high"][0]), values.astype(np.float32))


def ratio(alone: np.ndarray, empty: np.ndarray, whole: np.ndarray) -> Interval:
    """(alone - empty) / (whole - empty) as a ratio of means over prompts; values are each prompt's own ratio."""
    a, b = alone - empty, whole - empty
    with np.errstate(divide="ignore", invalid="ignore"):
        return Interval(*ratio_of_means(a, b), (a / b).astype(np.float32))


def warnings(whole: np.ndarray, empty: np.ndarray, floor: float, connected: bool) -> str:
    """What makes fractions of model - empty (values [prompt]) worth little."""
    gap = float((whole - empty).mean())
    if abs(gap) < floor:
        return f"model and empty circuit differ by {gap:.2g}, less than the noise floor {floor:.2g}: fractions are noise"
    if abs(gap) < 0.05 * max(abs(float(whole.mean())), abs(float(empty.mean()))):
        return f"model and empty circuit differ by {gap:.2g} only: fractions are large and noisy"
    return "" if connected else "no path of its edges leads from embed to the logits: it is worth nothing; score it by its nodes"
