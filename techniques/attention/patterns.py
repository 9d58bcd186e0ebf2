"""Attention: the patterns of a layer, statistics and pattern detectors of every head, means over the prompt set."""

import math
from collections.abc import Callable, Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Edit, Model, has_sink
from model.interventions import prepare
from model.memory import Chunks
from model.places import visible
from model.replacements import prompts_at_once
from model.runs import Runs, read_study
from model.writes import output_matrix, require_values
from techniques.attention.requests import DETECTORS, STATS, AttentionResult, AttentionSetResult, DetectResult, HeadStatsResult
from vocabulary.nodes import UserError
from vocabulary.prompts import RUNS, WHICH, Prompt, Study
from vocabulary.requests import Progress
from vocabulary.sets import EmptyPart, LeftOut, Members, fitting, in_part, left_out

RANDOM_ROWS, RANDOM_LENGTH = 4, 50
PATTERN_BYTES = 16 << 20  # of a layer's patterns are read at once


def check_which(which: str) -> None:
    if which not in WHICH:
        raise UserError(f"{which!r} is not a run or a difference: use one of {', '.join(WHICH)}")


def pattern_name(layer: int) -> str:
    return f"blocks.{layer}.attn.hook_pattern"


def check_layer(model: Model, layer: int) -> None:
    if not 0 <= layer < model.info.n_layers:
        raise UserError(f"there is no layer {layer}: the model has layers 0 to {model.info.n_layers - 1}")


def kv_head(model: Model, head: int) -> int:
    """The key/value head that a query head reads."""
    return head // (model.info.n_heads // model.info.n_kv_heads)


def subtract(sides: list[dict]) -> dict:
    """The first, or the first minus the second."""
    return sides[0] if len(sides) == 1 else {k: sides[0][k] - sides[1][k] for k in sides[0]}


@t.no_grad()
def value_norms(model: Model, layer: int, v: Tensor) -> Tensor:
    """|| v W_O || of every head and position, [head, seq], from values [seq, kv head, d_head] (b_V inside, b_O and later norms not)."""
    w = output_matrix(model, layer, "attn")
    rows = []
    for h in range(model.info.n_heads):
        rows.append((v[:, kv_head(model, h)].float() @ w[h]).norm(dim=-1))
    return t.stack(rows)


def attention(runs: Runs, layer: int, which: str, weighted: bool = False) -> AttentionResult:
    """Patterns of one layer's heads, [head, destination, source], of a run or a difference; weighted by the norms of what the values write. NaN where a head can't look."""
    check_which(which)
    model = runs.model
    check_layer(model, layer)
    sides = runs.sides(which)
    name, value = pattern_name(layer), f"blocks.{layer}.attn.hook_v"
    if weighted:
        require_values(model)
    patterns, sinks = [], []
    for s in sides:
        acts = runs.trace(s, [name, value] if weighted else [name])
        pattern = acts[name][0].float()
        sinks.append((1 - pattern.sum(-1)).cpu().numpy())
        patterns.append((pattern * value_norms(runs.of(s), layer, acts[value][0])[:, None] if weighted else pattern).cpu().numpy())
    if not all(np.isfinite(p).all() for p in patterns):
        raise UserError("the attention patterns are not finite: load the model in float32")
    hidden = ~visible(model, layer, len(patterns[0][0])).numpy() & np.all([(p == 0).all(0) for p in patterns], 0)
    pattern = patterns[0] - patterns[1] if len(patterns) == 2 else patterns[0]
    pattern = np.where(hidden, np.float32(math.nan), pattern)  # a copy: the cache holds the runs' own
    what = "attention x || v W_O || (b_V inside, b_O not" + (", values of kv groups)" if model.info.n_kv_heads < model.info.n_heads else ")")
    parts = [f"{what if weighted else 'attention after the softmax'}, [destination, source], of query heads, {which}", model.info.dtype, runs.convention]
    sink = None
    if has_sink(model, layer) and not weighted:
        sink = sinks[0] - sinks[1] if len(sinks) == 2 else sinks[0]
        parts.append("sink: one less the row's sum, a learned score without a value")
    return AttentionResult(runs.row(sides[0]), layer, pattern, which, ", ".join(p for p in parts if p), weighted, sink)


@t.no_grad()
def masks(ids: Tensor) -> dict[str, Tensor]:
    """For each statistic the cells [row, destination, source] whose attention is summed, from the tokens [row, seq]."""
    seq = ids.shape[1]
    i, j = t.arange(seq, device=ids.device)[:, None], t.arange(seq, device=ids.device)[None]
    copies = (ids[:, :, None] == ids[:, None, :]) & (j < i)
    after = t.zeros_like(copies)
    after[:, :, 1:] = copies[:, :, :-1]
    later = (i > 0).expand(len(ids), seq, seq)
    return {"previous": later & (j == i - 1), "duplicate": copies, "induction": after, "first": later & (j == 0)}


class HeadStatistics:
    """STATS of one layer's patterns after the other, over tokens [row, seq]; NaN without an instance. The sums stay on the patterns' device."""

    def __init__(self, ids: Tensor, pair: tuple[int, int] | None = None):
        self.pair, self.sums = pair, []
        self.counts, self.cells = {}, {}
        for name, mask in masks(ids).items():
            self.counts[name] = mask.any(-1).sum().item()
            self.cells[name] = mask.flatten(1).nonzero(as_tuple=True)
        self.counts["entropy"] = len(ids) * (ids.shape[1] - 1)

    @t.no_grad()
    def add(self, pattern: Tensor) -> None:
        """Sums over patterns [row, head, destination, source], some heads at a time: no copy of a whole layer is made."""
        rows, heads, seq, _ = pattern.shape
        self.cells = {name: tuple(c.to(pattern.device) for c in where) for name, where in self.cells.items()}
        size, parts = max(1, PATTERN_BYTES // (4 * rows * seq * seq)), []
        for h in range(0, heads, size):
            some = pattern[:, h : h + size].float()
            sums = [some.flatten(2).transpose(0, 1)[:, *where].sum(-1) for where in self.cells.values()]
            sums.append(entropy(some[:, :, 1:]).sum((0, 2)))
            parts.append(t.stack(sums + ([] if self.pair is None else [some[0, :, *self.pair]])))
        self.sums.append(t.cat(parts, 1))

    def numbers(self) -> dict[str, np.ndarray]:
        """Each statistic [layer, head]."""
        sums = t.stack([s.to(self.sums[0].device) for s in self.sums], 1).cpu()
        out = {name: (x / n).numpy() if n else np.full(x.shape, math.nan, np.float32) for (name, n), x in zip(self.counts.items(), sums)}
        assert list(out) == list(STATS)
        return out if self.pair is None else out | {"pair": sums[-1].numpy()}


def entropy(p: Tensor) -> Tensor:
    """Of distributions [..., n], in nats. (`entr` takes one number at a time on a CPU.)"""
    return p.clamp_min(t.finfo(p.dtype).tiny).log_().mul_(p).sum(-1).neg_()


def random_repeats(model: Model) -> Tensor:
    """[row, seq]: BOS where the model has one, then random tokens, twice."""
    bos = [] if model.bos is None else [model.bos]
    n = min(RANDOM_LENGTH, (model.info.n_ctx - len(bos)) // 2)
    half = model.random_ids(n, RANDOM_ROWS)
    return t.cat([t.tensor([bos] * RANDOM_ROWS, dtype=half.dtype).reshape(RANDOM_ROWS, -1), half, half], 1)


def check_pair(runs: Runs, which: str, source: str, pair: tuple[int, int]) -> None:
    n = len(runs.row(which.partition("-")[0]).ids)
    if source == "random":
        raise UserError("a pair of positions belongs to the prompt, not to random tokens")
    if not all(0 <= p < n for p in pair) or pair[1] > pair[0]:
        raise UserError(f"positions {pair[0]} and {pair[1]}: the destination comes after the source, and the prompt has {n} tokens (0 to {n - 1})")


def head_stats(runs: Runs, which: str, source: str, pair: tuple[int, int] | None = None) -> Generator[Progress, None, HeadStatsResult]:
    """The statistics of every head, [layer, head]: of a run or a difference on the prompt, or on random repeated tokens."""
    check_which(which)
    runs = runs if "-" in which else runs.at(which)
    model = runs.model
    if source not in ("prompt", "random"):
        raise UserError(f"{source!r} is not a source of tokens: use prompt or random")
    if source == "random" and which not in RUNS:
        raise UserError("random tokens have no clean and corrupted run to subtract: use the prompt, or one run")
    if pair is not None:
        check_pair(runs, which, source, pair)
    names, note = [pattern_name(layer) for layer in range(model.info.n_layers)], ""
    sides = runs.sides(which)
    both = []
    for i, s in enumerate(sides):
        yield Progress(i, len(sides), "head statistics")
        ids = t.tensor([runs.row(s).ids]) if source == "prompt" else random_repeats(model)
        found = HeadStatistics(ids.to(model.device), pair)
        take = lambda _, x, found=found: found.add(x)  # noqa: E731
        if source == "prompt":
            runs.visit(s, names, take)
        else:
            edits, left_out = runs.edits_anywhere() if which == "now" else ([], [])
            model.forward(ids, names, edits, keep=None, take=take)
            first = "" if model.bos is None else "BOS, then "
            note = f"{RANDOM_ROWS} rows of {first}{ids.shape[1] // 2} tokens twice" + (f", without {' '.join(left_out)}" if left_out else "")
        both.append(found.numbers())
    stats = {k: both[0][k] - both[1][k] if len(both) == 2 else both[0][k] for k in both[0]}
    parts = [f"head statistics on {'the prompt' if source == 'prompt' else 'random repeated tokens'}, {which}", note]
    parts += [model.info.dtype, runs.convention if source == "prompt" else ""]
    return HeadStatsResult(stats, which, source, ", ".join(p for p in parts if p))


# ------------------------------------------------------------------ pattern detectors


def wanted(ids: tuple[int, ...], pattern: str, cells: tuple[tuple[int, int], ...]) -> Tensor:
    """The detection pattern, ones in the wanted cells, [destination, source]."""
    n = len(ids)
    if cells:
        for cell in cells:
            if len(cell) != 2 or not 0 <= cell[1] <= cell[0] < n:
                raise UserError(f"cell {tuple(cell)}: write (destination, source) with the source not after the destination, positions 0 to {n - 1}")
        out = t.zeros(n, n)
        out[tuple(t.tensor(cells).T)] = 1
        return out
    if pattern not in DETECTORS:
        raise UserError(f"{pattern!r} is not a detector: use one of {', '.join(DETECTORS)}, or give cells")
    kind = {"previous_token_head": "previous", "duplicate_token_head": "duplicate", "induction_head": "induction"}[pattern]
    return masks(t.tensor([ids]))[kind][0].float()


def detector_scores(pattern: Tensor, want: Tensor, exclude_bos: bool, exclude_current_token: bool, error_measure: str) -> Tensor:
    """transformer_lens.head_detector's score of patterns [head, destination, source]; NaN where everything a head attends to is excluded."""
    keep = t.ones_like(want)
    if exclude_bos:
        keep[:, 0] = 0
    if exclude_current_token:
        keep.fill_diagonal_(0)
    if error_measure == "mul":
        kept = pattern * keep
        return (kept * want).sum((1, 2)) / kept.sum((1, 2))
    return 1 - ((pattern - want).abs() * keep).sum((1, 2)) / len(want)


def detect(
    runs: Runs, which: str, pattern: str, cells: tuple[tuple[int, int], ...], exclude_bos: bool, exclude_current_token: bool, error_measure: str
) -> DetectResult:
    """How well every head's attention matches a pattern, [layer, head]."""
    check_which(which)
    if error_measure not in ("mul", "abs"):
        raise UserError(f"{error_measure!r} is not a measure: use mul or abs")
    model = runs.model
    sides = runs.sides(which)
    hooks, scores, found = [pattern_name(layer) for layer in range(model.info.n_layers)], [], []
    for s in sides:
        found.append(wanted(runs.row(s).ids, pattern, cells))
        rows = []

        def score(_: str, x: Tensor, want: Tensor = found[-1], rows: list[Tensor] = rows) -> None:
            x = x[0] if x.device.type == "cuda" else x[0].cpu()  # others have no float64
            want = want.to(x.device).double()
            parts = [detector_scores(one.double(), want, exclude_bos, exclude_current_token, error_measure) for one in x.split(1)]
            rows.append(t.cat(parts).cpu())

        runs.visit(s, hooks, score)
        scores.append(t.stack(rows).numpy())
    if np.isinf(np.stack(scores)).any():
        raise UserError("the attention patterns are not finite: load the model in float32")
    out = scores[0] - scores[1] if len(scores) == 2 else scores[0]
    what = f"attention in {len(cells)} given cells" if cells else DETECTORS[pattern]
    measure = "part of all attention that lies there" if error_measure == "mul" else "1 - mean absolute difference per destination"
    left_out = [w for w, on in (("first token", exclude_bos), ("current token", exclude_current_token)) if on]
    parts = [
        f"{what}, {which}",
        f"{error_measure}: {measure}",
        f"without the {' and the '.join(left_out)}" if left_out else "",
        model.info.dtype,
        runs.convention,
    ]
    spots = tuple((int(i), int(j)) for i, j in found[0].nonzero().tolist())
    return DetectResult(runs.row(sides[0]), which, out.astype(np.float32), spots, ", ".join(p for p in parts if p))


# ------------------------------------------------------------------ the prompt set


def read_set(study: Study) -> list[tuple[int, Prompt]]:
    """The prompts of the set, with their indices."""
    if not study.prompt_set:
        raise UserError("there is no prompt set: open one first")
    return list(enumerate(study.prompt_set))


Check = Callable[[Runs, str], object]
Work = Callable[[list[Runs], str, Tensor, list[Edit]], list[dict[str, np.ndarray]]]


def over_set(
    model: Model, study: Study, members: list[tuple[int, Prompt]], which: str, check: Check, work: Work, text: str
) -> Generator[Progress, None, tuple[Members, list[dict[str, np.ndarray]], LeftOut]]:
    """
    The members that can be asked, work(runs, side, ids [batch, seq], edits) of each, one dict a prompt (subtracted for a difference), and why others can't. Runs
    in batches of prompts of equal length, after `check` of each; under interventions, whose values differ from prompt to prompt, one prompt at a time.
    """
    sides, done = which.split("-"), 0

    def read(prompt: Prompt) -> Runs:
        runs = read_study(model, replace(study, prompt=prompt, interventions=()))
        for side in runs.sides(which):
            check(runs, side)
        return runs

    members, everyone, left = fitting(members, read)
    members, everyone = ([some[k] for k in in_part(members, study.part)] for some in (members, everyone))
    order: list[list[dict | None]] = [[None] * len(members) for _ in sides]
    chunks = Chunks("prompts", lambda _: prompts_at_once(model, length))
    for place, side in enumerate(sides):
        if side == "now" and study.interventions:
            for j, (i, prompt) in enumerate(members):
                try:
                    runs = yield from prepare(model, replace(study, prompt=prompt))
                    order[place][j] = work([runs.at(side)], side, t.tensor([runs.row(side).ids]), runs.edits)[0]
                except UserError as error:
                    left = (*left, (i, str(error)))
                done += 1
                yield Progress(done, len(members) * len(sides), text)
            continue
        for length in sorted({len(r.row(side).ids) for r in everyone}):
            same = [j for j, r in enumerate(everyone) if len(r.row(side).ids) == length]

            def batch(start: int, stop: int, same: list[int] = same, side: str = side) -> tuple[list[int], list[dict]]:
                these = same[start:stop]
                return these, work([everyone[j].at(side) for j in these], side, t.tensor([everyone[j].row(side).ids for j in these]), [])

            for part in chunks.over(len(same), batch):
                if isinstance(part, Progress):
                    yield part
                    continue
                for j, value in zip(*part):
                    order[place][j] = value
                done += len(part[0])
                yield Progress(done, len(members) * len(sides), text)
    good = [j for j in range(len(members)) if all(side[j] is not None for side in order)]
    if not good:
        raise (UserError if study.part is None else EmptyPart)(f"prompt {left[0][0] + 1} of the set: {left[0][1]}")
    return [members[j] for j in good], [subtract([side[j] for side in order]) for j in good], left


def attention_set(model: Model, study: Study, which: str, labels: tuple[str, ...] = ()) -> Generator[Progress, None, AttentionSetResult]:
    """Mean attention between labelled positions over the prompt set, [layer, head, destination label, source label]."""
    check_which(which)
    members = read_set(study)
    names = labels or common_labels(model, study, members, which)
    hooks = [pattern_name(layer) for layer in range(model.info.n_layers)]
    seen = np.zeros((model.info.n_layers, len(names), len(names)), bool)  # in some prompt

    def work(group: list[Runs], side: str, ids: Tensor, edits: list[Edit]) -> list[dict[str, np.ndarray]]:
        spots = t.tensor([[r.position(side, n) for n in names] for r in group])
        rows, got = t.arange(len(group))[:, None, None], []

        def grab(x: Tensor) -> None:
            where = [i.to(x.device) for i in (rows, spots[:, :, None], spots[:, None, :])]
            got.append(x.detach()[where[0], :, where[1], where[2]].float().permute(0, 3, 1, 2).cpu())

        for layer in range(model.info.n_layers):
            mask = visible(model, layer, ids.shape[1])
            seen[layer] |= mask[spots[:, :, None], spots[:, None, :]].any(0).numpy()
        group[0].model.forward(ids, hooks, edits, keep=None, take=lambda _, x: grab(x))
        cells = t.stack(got, 1).double()
        for j, spot in enumerate(spots):
            cells[j][:, :, spot[:, None] < spot[None, :]] = math.nan
        return [{"cells": c.numpy()} for c in cells]

    check = lambda r, side: [r.position(side, n) for n in names]  # noqa: E731
    members, found, left = yield from over_set(model, study, members, which, check, work, "attention over the prompt set")
    cells = np.stack([row["cells"] for row in found])
    counts = (~np.isnan(cells[:, 0, 0])).sum(0)
    if np.isinf(cells).any() or (np.isnan(cells).all((1, 2)) != np.isnan(cells).any((1, 2))).any():
        raise UserError("the attention patterns are not finite: load the model in float32")
    safe = np.maximum(counts, 1)
    mean = np.where(counts > 0, np.nansum(cells, 0) / safe, math.nan)
    std = np.where(counts > 0, np.sqrt(np.nansum((cells - mean) ** 2, 0) / safe), math.nan)
    mean, std = (np.where(seen[:, None] | (mean != 0), x, math.nan) for x in (mean, std))
    done = f"now = {study.base} under {', '.join(str(i) for i in study.interventions)}" if "now" in which and study.interventions else ""
    parts = [
        f"mean attention after the softmax over {len(members)} prompts of the set, [destination, source] labels, {which}",
        model.info.dtype,
        done,
        left_out(left, len(study.prompt_set)),
    ]
    used = np.array([i for i, _ in members], np.int32)
    words = ", ".join(p for p in parts if p)
    return AttentionSetResult(which, tuple(names), mean.astype(np.float32), std.astype(np.float32), counts.astype(np.int32), used, words)


def common_labels(model: Model, study: Study, members: list[tuple[int, Prompt]], which: str) -> tuple[str, ...]:
    """The labels that every prompt of the set has in the runs that are read, in the first prompt's order of positions."""
    read = lambda prompt: [read_study(model, replace(study, prompt=prompt, interventions=())).row(s) for s in which.split("-")]  # noqa: E731
    rows = [row for pair in fitting(members, read)[1] for row in pair]
    shared = [n for n in sorted(rows[0].labels, key=rows[0].labels.get) if all(n in r.labels for r in rows)]
    if len(shared) < 2:
        raise UserError('the prompts of the set share no label but END: give them labels, such as "labels": {"S2": 38}')
    return tuple(shared)
