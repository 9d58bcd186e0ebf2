"""The likeliest next tokens and the metric."""

from dataclasses import dataclass

import numpy as np

from vocabulary.prompts import Study, TokenRow
from vocabulary.wire import message, request


@request
class Run:
    """The k likeliest next tokens at each position, and the metric for clean, corrupted and now."""

    study: Study
    k: int = 10


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Side:
    """
    One run: its tokens, the k likeliest next tokens at each position with their probabilities and logits [seq, k], and its metric. In a partial
    result, where not yet read: token -1, NaN.
    """

    tokens: TokenRow
    top_ids: np.ndarray
    top_probs: np.ndarray
    top_logits: np.ndarray
    metric: float | None


@message
class RunResult:
    """Clean, corrupted and now (the base prompt under the interventions). `normalised` is (now - corrupted) / (clean - corrupted); ids of the answers."""

    clean: Side
    corrupt: Side | None
    now: Side
    normalised: float | None
    warning: str
    texts: dict[int, str]
    convention: str
    answers: tuple[int, ...] = ()
    foils: tuple[int, ...] = ()
