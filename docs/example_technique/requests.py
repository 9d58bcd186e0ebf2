"""What is asked and what is answered: the norm of the residual stream at every point and position."""

import numpy as np

from vocabulary.prompts import OneRun, Study, TokenRow
from vocabulary.wire import message, request


@request
class Norms:
    """The L2 norm of the residual stream at every point and position of a run."""

    study: Study
    which: OneRun = "now"
    """now, clean or corrupt"""


@message
class NormsResult:
    """`norms` [point, position]; `points` are addresses such as L2.resid_mid, `tokens` the columns."""

    tokens: TokenRow
    points: tuple[str, ...]
    norms: np.ndarray
    convention: str
