"""Sweeps and estimates over parts of a prompt set, joined: the statistics are those of the whole set, from each prompt's own values."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from techniques.patching.requests import Certify, Estimate, Sweep, SweepResult
from vocabulary.nodes import UserError
from vocabulary.parts import Scattered
from vocabulary.requests import ModelInfo
from vocabulary.statistics import normalise, paired_effects, too_few


def check(ask: Sweep | Estimate) -> None:
    """Nodes that are chosen by their effect over the set can't be chosen in each part."""
    if ask.kind in ("pairs", "cumulative", "features") and not getattr(ask, "nodes", ()):
        raise UserError(f"{ask.kind} chooses its nodes over the whole set: name them (--nodes), then it can be scattered")


def join(ask: object, parts: Sequence[SweepResult], info: ModelInfo) -> SweepResult:
    """A table over the prompts of all parts."""
    first, cells = parts[0], parts[0].total // len(parts[0].prompts)
    assert all((r.rows, r.cols, r.nodes, r.convention) == (first.rows, first.cols, first.nodes, first.convention) for r in parts), "parts of different tables"
    prompts = np.concatenate([r.prompts for r in parts])
    order = np.argsort(prompts)
    each, sides = np.concatenate([r.per_prompt for r in parts])[order], np.concatenate([r.sides for r in parts], 1)[:, order]
    flat, wide = each.reshape(len(each), -1).astype(float), sides.astype(float)
    base, clean, corrupt = wide.mean(1).tolist()
    mean = flat.mean(0)
    normalised, words = normalise(mean, base, wide, first.names)
    table = lambda x: np.asarray(x, np.float32).reshape(each.shape[1:])  # noqa: E731
    return replace(
        first, values=table(mean), normalised=table(normalised), base=base, clean=clean, corrupt=None if math.isnan(corrupt) else corrupt,
        done=sum(r.done for r in parts), total=sum(r.total for r in parts), per_prompt=each, prompts=tuple(prompts[order].tolist()), sides=sides,
        at_once=max(r.at_once for r in parts), peak_mb=max(r.peak_mb for r in parts), mechanism="; ".join(dict.fromkeys(r.mechanism for r in parts)),
        warning="; ".join(filter(None, (words, first.warning, too_few(len(each), cells)))),
        **{name: table(x) for name, x in paired_effects(flat, wide[0], getattr(ask, "seed", 0)).items()},
    )  # fmt: skip


SCATTERED = {Sweep: Scattered(check, join), Estimate: Scattered(check, join)}
REFUSED = {Certify: "it decides by the whole set after each batch of runs what to run next; scatter the sweep itself"}
