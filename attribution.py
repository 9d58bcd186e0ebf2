"""Attention: the patterns of a layer, and a few statistics of every head."""

import math
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from messages import RUNS, STATS, WHICH, AttentionResult, HeadStatsResult, Progress, UserError
from model import Edit, Model
from patching import Runs

RANDOM_ROWS, RANDOM_LENGTH = 4, 50


def check_which(which: str) -> None:
    if which not in WHICH:
        raise UserError(f"{which!r} is not a run or a difference: use one of {', '.join(WHICH)}")


def pattern_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"


def attention(runs: Runs, layer: int, which: str) -> AttentionResult:
    """Patterns of one layer's heads, [head, destination, source], of a run or a difference."""
    check_which(which)
    model = runs.model
    if not 0 <= layer < model.info.n_layers:
        raise UserError(f"there is no layer {layer}: the model has layers 0 to {model.info.n_layers - 1}")
    sides = runs.pair(which) if "-" in which else (which,)
    name = pattern_name(layer)
    patterns = [runs.trace(s, [name])[name][0].float().cpu().numpy() for s in sides]
    if not all(np.isfinite(p).all() for p in patterns):
        raise UserError("the attention patterns are not finite: load the model in float32")
    pattern = patterns[0] - patterns[1] if len(patterns) == 2 else patterns[0]
    parts = [f"attention after the softmax, [destination, source], of query heads, {which}", model.info.dtype, runs.convention]
    return AttentionResult(runs.row(sides[0]), layer, pattern, which, ", ".join(p for p in parts if p))


@t.no_grad()
def masks(ids: Tensor) -> dict[str, Tensor]:
    """For each statistic the cells [row, destination, source] whose attention is summed, from the tokens [row, seq]."""
    seq = ids.shape[1]
    i, j = t.arange(seq)[:, None], t.arange(seq)[None]
    copies = (ids[:, :, None] == ids[:, None, :]) & (j < i)
    after = t.zeros_like(copies)
    after[:, :, 1:] = copies[:, :, :-1]
    later = (i > 0).expand(len(ids), seq, seq)
    return {"previous": later & (j == i - 1), "duplicate": copies, "induction": after, "first": later & (j == 0)}


@t.no_grad()
def statistics(pattern: Tensor, ids: Tensor) -> dict[str, np.ndarray]:
    """STATS of patterns [row, head, destination, source] over tokens [row, seq], one number a head; NaN without an instance."""
    pattern = pattern.float().cpu()
    out = {}
    for name, mask in masks(ids).items():
        has = mask.any(-1)
        n = has.sum().item()
        total = (pattern * mask[:, None]).sum((0, 2, 3))
        out[name] = (total / n).numpy() if n else np.full(pattern.shape[1], math.nan, np.float32)
    entropy = t.special.entr(pattern[:, :, 1:]).sum(-1)
    out["entropy"] = entropy.mean((0, 2)).numpy() if entropy.shape[2] else np.full(pattern.shape[1], math.nan, np.float32)
    assert list(out) == list(STATS)
    return out


def random_repeats(model: Model) -> Tensor:
    """[row, seq]: BOS where the model has one, then random tokens, twice."""
    bos = [] if model.bos is None else [model.bos]
    n = min(RANDOM_LENGTH, (model.info.n_ctx - len(bos)) // 2)
    half = model.random_ids(n, RANDOM_ROWS)
    return t.cat([t.tensor([bos] * RANDOM_ROWS, dtype=half.dtype).reshape(RANDOM_ROWS, -1), half, half], 1)


def random_patterns(model: Model, ids: Tensor, names: list[str], edits: list[Edit]) -> dict[str, Tensor]:
    """Patterns of a batch of rows; from the cache when nothing is done to the model."""
    key = (tuple(map(tuple, ids.tolist())), ("random",))
    found = {n: v for n in names if not edits and (v := model.cache.get((*key, n))) is not None}
    if len(found) < len(names):
        found = model.forward(ids, names, edits)[1]
        for n, v in found.items() if not edits else ():
            model.cache.put((*key, n), v)
    return found


def check_pair(runs: Runs, which: str, source: str, pair: tuple[int, int]) -> None:
    n = len(runs.row(which.partition("-")[0]).ids)
    if source == "random":
        raise UserError("a pair of positions belongs to the prompt, not to random tokens")
    if not all(0 <= p < n for p in pair) or pair[1] > pair[0]:
        raise UserError(f"positions {pair[0]} and {pair[1]}: the destination comes after the source, and the prompt has {n} tokens (0 to {n - 1})")


def head_stats(runs: Runs, which: str, source: str, pair: tuple[int, int] | None = None) -> Generator[Progress, None, HeadStatsResult]:
    """The statistics of every head, [layer, head]: of a run or a difference on the prompt, or on random repeated tokens."""
    check_which(which)
    model = runs.model
    if source not in ("prompt", "random"):
        raise UserError(f"{source!r} is not a source of tokens: use prompt or random")
    if source == "random" and which not in RUNS:
        raise UserError("random tokens have no clean and corrupted run to subtract: use the prompt, or one run")
    if pair is not None:
        check_pair(runs, which, source, pair)
    layers, note = range(model.info.n_layers), ""
    names = [pattern_name(layer) for layer in layers]
    sides = runs.pair(which) if "-" in which else (which,)
    both = []
    for s in sides:
        if source == "prompt":
            ids, acts = t.tensor([runs.row(s).ids]), runs.trace(s, names)
        else:
            ids = random_repeats(model)
            edits, left_out = runs.edits_anywhere() if which == "now" else ([], [])
            acts = random_patterns(model, ids, names, edits)
            note = f"{RANDOM_ROWS} rows of {ids.shape[1]} tokens" + (f", without {' '.join(left_out)}" if left_out else "")
        rows = []
        for layer, name in zip(layers, names):
            rows.append(statistics(acts[name], ids) | ({} if pair is None else {"pair": acts[name][0, :, *pair].float().cpu().numpy()}))
            yield Progress(layer + 1, len(layers), "head statistics")
        both.append({k: np.stack([r[k] for r in rows]) for k in rows[0]})
    stats = {k: both[0][k] - both[1][k] if len(both) == 2 else both[0][k] for k in both[0]}
    parts = [f"head statistics on {'the prompt' if source == 'prompt' else 'random repeated tokens'}, {which}", note]
    parts += [model.info.dtype, runs.convention if source == "prompt" else ""]
    return HeadStatsResult(stats, which, source, ", ".join(p for p in parts if p))
