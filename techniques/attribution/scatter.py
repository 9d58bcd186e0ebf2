"""Direct logit attribution over parts of a prompt set, joined."""

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np

from techniques.attribution.requests import AttributionCells, AttributionSet, AttributionSetResult
from vocabulary.parts import Scattered, counted, pooled
from vocabulary.requests import ModelInfo


def join(ask: AttributionSet, parts: Sequence[AttributionSetResult], info: ModelInfo) -> AttributionSetResult:
    """Mean and deviation of every cell over the prompts of all parts; each prompt's own sums as they are."""
    sizes, cells = [len(r.prompts) for r in parts], {}
    for f in fields(AttributionCells):
        means, spreads = ([getattr(getattr(r, name), f.name) for r in parts] for name in ("mean", "std"))
        both = (None, None) if means[0] is None else pooled(means, spreads, sizes)
        cells[f.name] = [x if x is None else x.astype(np.float32) if x.ndim else float(x) for x in both]
    prompts = np.concatenate([r.prompts for r in parts])
    order = np.argsort(prompts)
    totals, logits, capped = (np.concatenate([getattr(r, name) for r in parts]) for name in ("totals", "logits", "capped"))
    logits = logits[order]
    return replace(
        parts[0], mean=AttributionCells(**{k: m for k, (m, _) in cells.items()}), std=AttributionCells(**{k: s for k, (_, s) in cells.items()}),
        prompts=prompts[order], totals=totals[order], logits=logits, capped=capped[order] if len(capped) else capped,
        worst=int(prompts[order][logits.argmin()]), error=max(r.error for r in parts), convention=counted(parts[0].convention, parts),
    )  # fmt: skip


SCATTERED = {AttributionSet: Scattered(lambda ask: None, join)}
