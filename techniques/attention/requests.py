"""Attention patterns, statistics of heads, means over a set, heads that match a pattern."""

from typing import Literal

import numpy as np

from vocabulary.prompts import Study, TokenRow, Which
from vocabulary.wire import message, request

STATS = {
    "previous": "attention to the previous token, mean over destinations after the first",
    "duplicate": "attention to earlier copies of the destination's token, mean over destinations that have one",
    "induction": "attention to the token after an earlier copy of the destination's token, mean over destinations that have one",
    "first": "attention to the first token, mean over destinations after the first",
    "entropy": "entropy of a destination's attention in nats, mean over destinations after the first",
}
DETECTORS = {
    "previous_token_head": "attention to the previous token",
    "duplicate_token_head": "attention to earlier copies of the destination's token",
    "induction_head": "attention to the token after an earlier copy of the destination's token",
}


@request
class Attention:
    """Attention patterns of one layer's heads, of one run or a difference of two (WHICH); `weighted`: times the norm of the value's output."""

    study: Study
    layer: int = 0
    which: Which = "now"
    """now, clean or corrupt, or a difference such as clean-corrupt"""
    weighted: bool = False
    """times the norm of what the source's value writes"""


@request
class HeadStats:
    """
    The statistics of STATS for every head, on the prompt or on `random` repeated tokens (BOS, then 50 random tokens twice, 4 rows, fixed seed).
    `pair` (destination, source) adds the statistic "pair": attention from one position of the prompt to another.
    """

    study: Study
    which: Which = "now"
    """now, clean or corrupt, or a difference such as clean-corrupt"""
    source: Literal["prompt", "random"] = "prompt"
    """random: repeated tokens"""
    pair: tuple[int, int] | None = None
    """destination and source: their attention is one more statistic"""


@request
class AttentionSet:
    """Mean attention between labelled positions over `study.prompt_set`; `labels` empty: every label that all its prompts have."""

    study: Study
    which: Which = "now"
    """now, clean or corrupt, or a difference such as clean-corrupt"""
    labels: tuple[str, ...] = ()
    """of positions, over a set; unset, all that its prompts share"""


@request
class Detect:
    """
    Score heads against a pattern: one of DETECTORS, or `cells` (destination, source), as transformer_lens.head_detector does. "mul": the part of
    the attention that lies in the cells; "abs": 1 - mean absolute difference to the pattern of ones in the cells.
    """

    study: Study
    which: Which = "now"
    """now, clean or corrupt, or a difference such as clean-corrupt"""
    pattern: str = "previous_token_head"
    """previous_token_head, duplicate_token_head or induction_head"""
    cells: tuple[tuple[int, int], ...] = ()
    """instead of a pattern: destination,source pairs such as 14,2"""
    exclude_bos: bool = False
    exclude_current_token: bool = False
    error_measure: Literal["mul", "abs"] = "mul"
    """mul or abs"""


# ------------------------------------------------------------------ results


@message
class AttentionResult:
    """
    Patterns of every head of one layer, [head, destination, source]; for a difference the two runs' patterns are subtracted. Weighted: each cell
    times the norm of what the source's value writes, || v W_O ||, so that rows do not sum to one. `sink` [head, destination]: what a row gives to the
    learned sink of models that have one (gpt-oss), which has no value: one less the row's sum.
    """

    tokens: TokenRow
    layer: int
    pattern: np.ndarray
    which: Which
    convention: str
    weighted: bool = False
    sink: np.ndarray | None = None


@message
class HeadStatsResult:
    """Per-head statistics, each [layer, head]; NaN where the tokens hold no instance (no repeated token, say)."""

    stats: dict[str, np.ndarray]
    which: Which
    source: str
    convention: str


@message
class AttentionSetResult:
    """
    Mean attention over the prompt set between labelled positions, [layer, head, destination label, source label], and its (population) standard
    deviation; a cell counts the prompts [destination, source] in which the source is not after the destination, NaN where there is none.
    """

    which: Which
    labels: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    counts: np.ndarray
    prompts: np.ndarray
    convention: str


@message
class DetectResult:
    """How well each head's pattern matches the wanted one, [layer, head]: scores of transformer_lens.head_detector. `cells` (destination, source)."""

    tokens: TokenRow
    which: Which
    scores: np.ndarray
    cells: tuple[tuple[int, int], ...]
    convention: str
