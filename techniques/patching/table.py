"""A sweep's table as it fills: every prompt's metric in every cell, means and statistics over the prompts, and the words beside it."""

import math
import time
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t

from model.noise import known_floor, noise_floor
from model.replacements import mean_in_words
from model.runs import first_tokens
from model.text_means import pinned
from model.variants import Base, Variant
from techniques.patching import feature_sweep
from techniques.patching.plan import POSITIONED, Plan
from techniques.patching.requests import ESTIMATES, SWEEP_OPS, SWEEPS, SweepResult
from vocabulary.nodes import FROM_TEXT, UserError, parse_node
from vocabulary.prompts import METRICS, TokenRow
from vocabulary.progress import time_left
from vocabulary.requests import Progress
from vocabulary.sets import left_out
from vocabulary.statistics import normalise, paired_effects, too_few


class SweepTable:
    """The table as it fills: every prompt's metric in every cell."""

    def __init__(self, plan: Plan, method: str = "truth", how: str = ""):
        self.plan, self.method, self.how, layout = plan, method, how, plan.layout
        self.shape = len(layout.rows), len(layout.cols)
        self.cells = [r * self.shape[1] + c for r, c in layout.cells]
        n = len(plan.runs)
        self.values = np.full((n, self.shape[0] * self.shape[1]), math.nan)
        self.sides = np.full((3, n), math.nan)  # base, clean, corrupted
        self.total, self.done, self.at_once, self.reason = n * len(self.cells), 0, 0, ""
        self.members, self.base = [], None
        self.started, self.before = time.monotonic(), 0  # of the variants; prompts that are done
        self.peak = 0

    def begin(self, members: list[int], base: Base, sides: tuple[np.ndarray, ...]) -> None:
        """Cells before the first token that differs, or after the metric's position, are the base run."""
        self.before += len(self.members)
        self.members, self.base, self.reason = members, base, base.reason
        self.sides[:, members] = sides
        self.waiting = []
        for cell, spots in zip(self.cells, self.plan.layouts[members[0]].cells.values()):
            variant = Variant(cell, tuple(s for s in spots if s.node.pos is None or base.shared <= s.node.pos < base.stop))
            if variant.spots and max(variant.first, base.shared) < base.stop:
                self.waiting.append(variant)
            else:
                self.values[members, cell] = sides[0]
                self.done += len(members)
        base.plan_work(self.waiting)

    def forget(self, members: list[int]) -> None:
        """Some prompts begin anew: none of their cells is filled."""
        some = np.ix_(members, self.cells)
        self.done -= int((~np.isnan(self.values[some])).sum())
        self.values[some] = math.nan
        self.sides[:, members] = math.nan
        if self.members == members:
            self.members = []

    def fill(self, variants: list[Variant], found: np.ndarray) -> None:
        check_finite(found)
        self.values[np.ix_(self.members, [v.cell for v in variants])] = found.T
        self.done += found.size
        self.at_once, self.peak = max(self.at_once, self.base.at_once), max(self.peak, self.base.peak)

    def progress(self, step: Progress) -> Progress:
        """Cells by the work that is done, and the time left in words; a notice as it is."""
        if step.notice:
            return replace(step, done=self.done, total=self.total)
        part = (self.before + self.base.progress * len(self.members)) / len(self.plan.runs)
        spent = time.monotonic() - self.started
        left = f", {time_left(spent * (1 - part) / part)}" if part > 0.02 and spent > 1 else ""
        return Progress(max(self.done, int(part * self.total)), self.total, f"{self.plan.ask.kind} {self.done}/{self.total}{left}")

    @property
    def names(self) -> tuple[str, str]:
        """What clean and corrupted are called."""
        return self.plan.runs[0].called("clean"), self.plan.runs[0].called("corrupt")

    @property
    def peak_mb(self) -> float:
        device = self.plan.model.device
        return (t.cuda.max_memory_allocated(device) if device.type == "cuda" else self.peak) / 2**20

    def finish(self) -> Generator[Progress, None, SweepResult]:
        """The whole table, with the noise floor: measured last, so that no cell waits for it."""
        if self.has_floor:
            yield from noise_floor(self.plan.whole)
        return self.result(True)

    @property
    def has_floor(self) -> bool:
        """Estimates are made at every prompt, and in float32, where the floor is tiny, it is not worth its 12 rows."""
        return self.method == "truth" or self.plan.model.dtype != t.float32

    def result(self, whole: bool) -> SweepResult:
        """Means over the prompts that are done; the rest with the whole table."""
        plan, ask, layout = self.plan, self.plan.ask, self.plan.layout
        known = ~np.isnan(self.sides[0])
        base, clean, corrupt = (float(s[known].mean()) for s in self.sides)
        some = ~np.isnan(self.values)
        count = some.sum(0)
        with np.errstate(invalid="ignore"):
            mean = np.where(some, self.values, 0.0).sum(0) / count
        normalised, warning = normalise(mean, base, self.sides[:, known], self.names)
        part, outside = ask.study.part is not None and ask.over_set, left_out(plan.left, len(plan.left) + len(plan.whole))
        warning = outside if part else "; ".join(filter(None, (warning, outside)))
        table = lambda x: np.asarray(x, np.float32).reshape(self.shape)  # noqa: E731
        empty, stats, every = np.zeros((0, 0), np.float32), {}, np.zeros((0, *self.shape), np.float32)
        if whole and ask.over_set:
            every = self.values.astype(np.float32).reshape(-1, *self.shape)
        if whole and ask.over_set and not part:
            stats = {k: table(v) for k, v in paired_effects(self.values, self.sides[0], ask.seed).items()}
            warning = "; ".join(w for w in (warning, too_few(len(self.values), len(self.cells))) if w)
        stats = {k: stats.get(k, empty) for k in ("std", "low", "high", "p", "holm")}
        floor = known_floor(plan.whole) if self.has_floor else math.nan
        return SweepResult(
            ask.kind, ask.op, ask.direction, ask.effect, self.method, layout.rows, layout.cols, layout.nodes, first_row(plan),
            table(mean), table(normalised), base, clean, None if math.isnan(corrupt) else corrupt, self.done, self.total, **stats, per_prompt=every,
            prompts=tuple(i for i, _ in plan.members) if ask.over_set else (), mechanism=mechanism(plan, self.reason, self.method), at_once=self.at_once,
            warning=warning, convention=convention(plan, self.method, self.how), peak_mb=round(self.peak_mb, 1),
            floor=floor, names=self.names, sides=self.sides.astype(np.float32) if part and whole else np.zeros((3, 0), np.float32),
        )  # fmt: skip


def check_finite(values: np.ndarray) -> None:
    if not np.isfinite(values).all():
        raise UserError("a changed run gave numbers that are not finite: load the model in float32")


def first_row(plan: Plan) -> TokenRow:
    """The tokens of the first prompt, without those of an answer behind it."""
    row = plan.whole[0].row(plan.side)
    n = len(row.ids) - row.tail
    return replace(row, ids=row.ids[:n], texts=row.texts[:n], tail=0)


# ------------------------------------------------------------------ words


def mechanism(plan: Plan, reason: str, method: str) -> str:
    if method != "truth":
        return "gradients"
    if plan.ask.effect == "direct":
        return "direct effect, no forward pass a cell"
    return f"whole forward passes under hooks: {reason}" if reason else "resumed at the changed layer"


def convention(plan: Plan, method: str, how: str = "") -> str:
    """What matters first: it is a pane's title. `how` says where an estimate's gradients are taken."""
    ask, model, called = plan.ask, plan.model, plan.runs[0].called
    metric = ask.study.metric
    assert metric.kind in METRICS
    if ask.op == "patch":
        what = f"{ask.direction}: {called(plan.other)} values into the {called(plan.side)} run"
        what += f", the {called(plan.other)} run without the interventions" * bool(plan.study.interventions)
    else:
        run = called(plan.side)
        amount = f" of {ask.noise:g} embedding standard deviations, seed {ask.seed}" if ask.op == "noise" else ""
        seed = f", seed {ask.seed}" if ask.op == "resample" else ""
        text = f", {pinned(ask.study.text)[1].words}" if ask.op in FROM_TEXT else ""
        what = f"{run} run, {ask.op}: {SWEEP_OPS[ask.op]}{amount}{seed}{text}"
    parts = [SWEEPS[ask.kind], what, plan.runs[0].study.metric.words, first_tokens(plan.whole)]
    parts.append(
        f"normalised: {called('corrupt')} = 0, {called('clean')} = 1"
        if plan.runs[0].rows["corrupt"] is not None
        else "normalised: share of the base run's metric"
    )
    if ask.effect == "direct":
        parts.append("direct effect: later attention, MLPs and norm scales as in the base run")
        parts += ["through the head's own z"] * (ask.kind in ("q", "k", "v", "pattern"))
    elif method != "truth":
        parts += [ESTIMATES[method], how]
    else:
        parts.append("total effect: everything after the node recomputed")
    if ask.over_set:
        parts.append(
            f"mean over {len(plan.whole)} prompts, ratio of means; spread, interval and p (sign flips; corrected by Holm for {len(plan.layout.cells)} cells) of the effect, paired by prompt"
        )
    if len({len(r.row(plan.side).ids) for r in plan.whole}) > 1:
        parts.append("prompts of unequal length, run in groups of equal length" + ", columns by label" * (ask.kind in POSITIONED))
    if ask.op == "mean":
        parts.append(mean_in_words(model, ask.study, [r.row(plan.side) for r in plan.whole]))
    if ask.kind == "q" or ask.kind == "k":
        parts += ["before the rotation"] * (model.info.positions == "rotary")
    if ask.kind in ("k", "v") and model.info.n_kv_heads < model.info.n_heads:
        parts.append("a column is a group of heads that share keys and values")
    if ask.kind == "features":
        d = feature_sweep.loaded(model, ask.study.saes, parse_node(ask.nodes[0]).layer)
        parts.append(f"SAE {d.source}, {d.view} activation")
    parts.append(f"raw weights, {model.info.dtype}")
    if ask.op == "patch" and not all(r.by_index for r in plan.whole):
        how = plan.whole[0].aligned if len(plan.whole) == 1 else "each prompt's own" + f", else by {ask.study.align}" * bool(ask.study.align)
        parts.append(f"patched across an alignment, {how}; positions without partner stay as they are")
    if plan.study.interventions:
        parts.append(f"base run under {', '.join(str(i) for i in plan.study.interventions)}")
    return " · ".join(p for p in parts if p)
