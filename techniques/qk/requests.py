"""QK attribution: an attention score as a sum over pairs of what wrote into the query and what wrote into the key."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from techniques.features.requests import SaeInfo
from vocabulary.prompts import OneRun, Study, TokenRow
from vocabulary.wire import message, request

Place = int | str | None
MEAN, NONE = "mean", "none"  # what a score is taken against, besides another source
BIAS, WRITTEN = "bias", "interventions"  # rows that are no component's
OTHERS = "other features"  # the row of those that are not listed


@dataclass(frozen=True)
class HeadScore:
    """A head's score from a destination to a source, and by what it is split: what all requests of this room have."""

    study: Study
    layer: int = 0
    head: int = 0
    dest: Place = None
    """the destination: a position or a label; unset, the metric's"""
    source: Place = None
    """the source; unset, where the head looks most"""
    instead: Place = None
    """the score less that of this source; unset or mean, less the mean over the sources in sight; none: the score itself"""
    which: OneRun = "now"
    """now, clean or corrupt"""
    features: bool = False
    """by the features of the SAEs that are named (--sae), where these stand in the sum"""
    most: int = 40
    """features of a side, and pairs of features, that are listed at most; the others are summed"""


@request
class QK(HeadScore):
    """
    The score of a head from a destination to a source, before the softmax: by what wrote into the query (rows) and the key (columns), norms' scales frozen.
    The softmax sees differences only, so the score is taken against another source, or the mean over all that the destination can see.
    """


@request
class QKSet(HeadScore):
    """A head's QK sum (`QK`) over the prompts of `study.prompt_set`, at labels that all of them have: means with 95 % intervals. What a prompt lacks counts as 0."""


@request
class QKCheck(HeadScore):
    """
    One component's path into the query (or into the key, at all sources) changed for real, every norm computed again: what it did to the score, the attention
    and the metric, beside what the sum says. "patch": its value in the other prompt's run; "zero": nothing.
    """

    component: str = "embed"
    """a row of the sum: embed, position, L0H1, L0.mlp; with --features L1.sae.f7, L1.sae.error"""
    side: Literal["q", "k"] = "q"
    """into the query at the destination, or into the keys"""
    op: Literal["patch", "zero"] = "zero"


# ------------------------------------------------------------------ results


@message
class QKResult:
    """
    `values` [query component, key component], whose sum is `total`; `score` is the model's own, before a soft cap, and `error` their distance. Components:
    embed, position, L0H1, L0.bias (of attention), L0.mlp, bias (of the norm and of the query or key itself), interventions. `instead` says what it is taken
    against. Over a set: means, with `low` and `high` (95 %, Student's t), the prompts used, and `totals` of each; else these are empty.
    """

    tokens: TokenRow
    which: OneRun
    layer: int
    head: int
    kv_head: int
    dest: int
    source: int
    instead: str
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    values: np.ndarray
    total: float
    score: float
    error: float
    cap: float
    capped: float
    attention: float
    convention: str
    low: np.ndarray
    high: np.ndarray
    prompts: np.ndarray
    totals: np.ndarray


@message
class QKFeaturesResult(QKResult):
    """
    Rows and columns are features (L1.sae.f7), each SAE's error (L1.sae.error) and what it adds without features (L1.sae.bias), components that none of `saes`
    stands for, and `other features`; `fired` features in all, of query and key. `fires` [query, key]: prompts in which both do. Pairs of features,
    largest mean first: names, `pair` [n], its interval, `pair_fires`; of `pairs` in all, the others sum to `other_pairs`.
    """

    saes: tuple[SaeInfo, ...]
    labels: dict[str, str]
    fired: tuple[int, int]
    fires: np.ndarray
    pair_names: tuple[tuple[str, str], ...]
    pair: np.ndarray
    pair_low: np.ndarray
    pair_high: np.ndarray
    pair_fires: np.ndarray
    pairs: int
    other_pairs: float


@message
class QKCheckResult:
    """
    Of the score's change: `predicted` by the sum, `frozen` with norms' scales held (must agree), and `true`, norms computed again; attention and metric (None:
    the prompt has no answer) before and after.
    """

    edge: str
    op: str
    predicted: float
    true: float
    attention: tuple[float, float]
    metric: tuple[float, float] | None
    convention: str
    frozen: float = math.nan
