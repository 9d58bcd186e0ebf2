"""Mean attention between labels over parts of a prompt set, joined."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from techniques.attention.requests import AttentionSet, AttentionSetResult
from vocabulary.parts import Scattered, counted, pooled
from vocabulary.requests import ModelInfo


def join(ask: AttentionSet, parts: Sequence[AttentionSetResult], info: ModelInfo) -> AttentionSetResult:
    """Means and deviations over the prompts of all parts; a cell that no prompt's mask lets a head see stays NaN."""
    assert len({r.labels for r in parts}) == 1, "parts with different labels"
    counts = sum(r.counts for r in parts)
    mean, std = pooled([r.mean for r in parts], [r.std for r in parts], [r.counts for r in parts])
    seen = ~np.isnan([r.mean for r in parts]).all(0)
    mean, std = (np.where(seen, x, np.nan).astype(np.float32) for x in (mean, std))
    prompts = np.sort(np.concatenate([r.prompts for r in parts]))
    return replace(parts[0], mean=mean, std=std, counts=counts, prompts=prompts, convention=counted(parts[0].convention, parts))


SCATTERED = {AttentionSet: Scattered(lambda ask: None, join)}
