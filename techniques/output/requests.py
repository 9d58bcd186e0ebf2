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
    """
    Clean, corrupted and now (the base prompt under the interventions). `normalised` is (now - corrupted) / (clean - corrupted); ids of the answers. `floor`:
    changes of the metric below it are noise of the dtype (model/noise.py); NaN without interventions, while it is not measured, and in
    float32, where it is tiny. `names`: what clean and corrupted are called (two models, of one prompt), `base` which of them the interventions act on.
    """

    clean: Side
    corrupt: Side | None
    now: Side
    normalised: float | None
    warning: str
    texts: dict[int, str]
    convention: str
    answers: tuple[int, ...] = ()
    foils: tuple[int, ...] = ()
    floor: float = float("nan")
    names: tuple[str, str] = ("clean", "corrupted")
    base: str = ""

    @property
    def change(self) -> float | None:
        """What the interventions do to the metric; None without them or without a metric."""
        base = {"clean": self.clean, "corrupt": self.corrupt}.get(self.base)
        base = base or next((s for s in (self.clean, self.corrupt) if s is not None and s.tokens == self.now.tokens), None)
        return None if base is None or base is self.now or None in (base.metric, self.now.metric) else self.now.metric - base.metric

    @property
    def noise(self) -> bool:
        """Whether the interventions change the metric by less than the noise floor."""
        return self.change is not None and 0 < abs(self.change) < self.floor
