"""A head's QK sum over parts of a prompt set, joined."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from techniques.qk.requests import QKResult, QKSet
from vocabulary.nodes import UserError
from vocabulary.parts import Scattered, counted, pooled
from vocabulary.requests import ModelInfo
from vocabulary.statistics import half_width


def join(ask: QKSet, parts: Sequence[QKResult], info: ModelInfo) -> QKResult:
    """Means with intervals over the prompts of all parts; a part's deviation is read from its interval."""
    sizes = [len(r.prompts) for r in parts]
    average = lambda name: float(np.average([getattr(r, name) for r in parts], weights=sizes))  # noqa: E731
    sample = [np.zeros(r.values.shape) if n < 2 else (r.high.astype(float) - r.low) / 2 / half_width(n) for r, n in zip(parts, sizes)]
    mean, std = pooled([r.values for r in parts], [s * np.sqrt((n - 1) / n) for s, n in zip(sample, sizes)], sizes)
    total = sum(sizes)
    half = half_width(total) * std * np.sqrt(total / (total - 1)) if total > 1 else np.full(mean.shape, np.nan)
    prompts = np.concatenate([r.prompts for r in parts])
    order = np.argsort(prompts)
    return replace(
        parts[0], values=mean.astype(np.float32), total=average("total"), score=average("score"), error=max(r.error for r in parts),
        capped=average("capped"), attention=average("attention"), low=(mean - half).astype(np.float32), high=(mean + half).astype(np.float32),
        prompts=prompts[order], totals=np.concatenate([r.totals for r in parts])[order], convention=counted(parts[0].convention, parts),
    )  # fmt: skip


def check(ask: QKSet) -> None:
    if ask.features:
        raise UserError("which pairs of features are the largest is decided over the whole set: scatter the components, without --features")


SCATTERED = {QKSet: Scattered(check, join)}
