"""
The noise floor of a metric: how far apart roundings of the same run lie. A patch that changes nothing is exact in every dtype and says nothing of it.

The same runs are made again from inputs of which every number is moved by less than one rounding; the metric's spread over them is the error that the dtype
makes. In bfloat16 it is within a factor of two or three of the true distance to float32 (tests/test_noise.py holds that).
"""

import math
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Edit, Model
from model.memory import in_chunks
from model.metrics import MetricReader
from model.runs import Runs
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

DRAWS = 3  # roundings of each run
PROMPTS = 4  # of a set that are looked at
FIRST = "blocks.0.hook_resid_pre"
ROWS = 3  # at once on a CPU, so that a request of the cursor's can come in between


def moved(x: Tensor, draw: int) -> Tensor:
    """Numbers [...] each moved by up to half the dtype's eps of their size, and rounded again."""
    amount = t.rand(x.shape, generator=t.Generator().manual_seed(draw)).to(x.device) - 0.5
    return (x.float() + x.float() * amount * t.finfo(x.dtype).eps).to(x.dtype)


def key(runs: Runs) -> tuple:
    """What the floor of one prompt depends on."""
    ids = tuple(row.ids if (row := runs.rows[w]) is not None else None for w in ("clean", "corrupt"))
    return ids, runs.study.metric, runs.study.against, tuple(runs.answers), tuple(runs.foils)


def known_floor(group: list[Runs]) -> float:
    """The noise floor of the mean metric over these prompts, NaN while it is not measured: twice the standard deviation over roundings."""
    found = [group[0].model.notes.noise.get(key(r), math.nan) for r in group[:PROMPTS]]
    return 2 * math.sqrt(sum(found) / len(found) / len(group))


def noise_floor(group: list[Runs]) -> Generator[Progress, None, float]:
    """The noise floor of the mean metric over these prompts. Measured once a prompt and metric: 12 rows each, of a few prompts of a set."""
    for i, runs in enumerate(group[:PROMPTS]):
        if key(runs) not in (known := runs.model.notes.noise):
            yield Progress(i, min(len(group), PROMPTS), "noise floor")
            if len(known) > 256:
                known.clear()
            known[key(runs)] = yield from variance(runs)
    return known_floor(group)


def variance(runs: Runs) -> Generator[Progress, None, float]:
    """Of one prompt's metric over roundings: of the clean and the corrupted run, as they are and each without the middle layer's attention; the mean of these."""
    found = []
    for which in ("clean", "corrupt"):
        if runs.rows[which] is None:
            continue
        try:
            clean = (
                runs.trace("clean", ["ln_final.hook_out"])["ln_final.hook_out"][0, runs.metric_position("clean")][None]
                if runs.study.metric.kind == "kl"
                else None
            )
            score = MetricReader([runs], clean, which)
        except UserError:  # the metric's position is not in this prompt
            continue
        found += yield from spreads(runs, which, score)
    finite = [v for v in found if np.isfinite(v)]
    return float(np.mean(finite)) if finite else math.nan


def spreads(runs: Runs, which: str, score: MetricReader) -> Generator[Progress, None, list[float]]:
    """The metric's variance over DRAWS roundings, of the run as it is and of one that lacks the middle layer's attention."""
    model, ids, last = runs.of(which), runs.row(which).ids, f"blocks.{runs.model.info.n_layers - 1}.hook_resid_post"
    middle = model.info.n_layers // 2
    without = [None] + [middle] * model.has(f"blocks.{middle}.hook_attn_out")
    rows = [(layer, draw) for layer in without for draw in range(DRAWS)]
    values = []

    def work(start: int, stop: int) -> np.ndarray:
        _, got = model.forward(t.tensor([ids] * (stop - start)), [last], edits(rows[start:stop]), keep=None)
        return score.of(got[last], 0)[:, 0]

    for part in in_chunks(len(rows), rows_at_once(model, len(ids)), work, "roundings of the run"):
        if isinstance(part, Progress):
            yield part
        else:
            values += part.tolist()
            yield Progress(len(values), len(rows), "noise floor")
    return np.array(values).reshape(len(without), DRAWS).var(1, ddof=1).tolist()


def edits(rows: list[tuple[int | None, int]]) -> list[Edit]:
    """Row by row of a batch, (a layer whose attention writes nothing, or None; a draw): the first block's input moved by the draw, and that attention at zero."""

    def silence(x: Tensor, layer: int) -> Tensor:
        new = x.clone()
        new[[i for i, (n, _) in enumerate(rows) if n == layer]] = 0
        return new

    layers = sorted({n for n, _ in rows if n is not None})
    start: Edit = (FIRST, lambda x: t.stack([moved(row, draw) for row, (_, draw) in zip(x, rows)]))
    return [start, *((f"blocks.{n}.hook_attn_out", lambda x, n=n: silence(x, n)) for n in layers)]


def rows_at_once(model: Model, seq: int) -> int:
    """How many rows of a prompt run together: on a GPU what a quarter of the free memory holds."""
    if model.device.type != "cuda":
        return ROWS
    i, limit = model.info, t.cuda.mem_get_info(model.device)[0] // 4
    return max(1, limit // (t.finfo(model.dtype).bits // 8 * seq * (12 * i.d_model + 3 * i.d_mlp + 3 * i.n_heads * seq)))
