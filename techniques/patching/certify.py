"""
Which cells are the largest, for certain, at the price of a part of the sweep.

1. Cells are ordered by an estimate; the first of them are patched for true.
2. Random subsets of all others are patched together, each other cell once a round. A subset does what the estimates of its cells say, and the rest is what
   they miss: the mean rest of the subsets that a cell is in, less that of those it is not in, says how far its own estimate is off (subset sampling:
   Kramár et al. 2024, arXiv 2403.00745, with the estimate as control variate).
3. How far a cell's estimate is off is taken, before the subsets, as Cauchy: most estimates are nearly right, a few miss all. Bayes' rule gives each cell outside the chance
   that it is larger than a size. The bound is the size that some cell outside exceeds with a chance of 1 - confidence at most (the sum of the cells' chances).
   The cell with the largest chance to belong to the top is patched for true, and so on, until the bound is below the last of the top, or the share of runs is spent.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import torch as t

from model.bridge import Model
from model.noise import noise_floor
from model.variants import Base, Variant
from techniques.patching.estimates import estimate
from techniques.patching.plan import Plan, over_bases, read_plan
from techniques.patching.requests import ESTIMATES, Certify, CertifyResult, Estimate, Sweep, SweepResult, percent
from techniques.patching.table import check_finite
from vocabulary.nodes import UserError
from vocabulary.progress import forward_progress
from vocabulary.requests import Progress
from vocabulary.sets import left_out

ON_ONE_PATH = ("resid_pre", "resid_mid", "resid_post")
GROUPS = 8  # subsets of a round, an eighth of the cells outside in each: the fewer, the nearer to a cell alone
ROUNDS = 2  # at least: a spread needs some
SUBSETS = 0.4  # of the runs that may be made
SCALE, FLOOR = (
    0.1,
    0.01,
)  # of the Cauchy error: so much of the cell's estimate, and so much of the last of the top (docs/estimates.md says how they were chosen)
NEAR = 1e-3  # of the largest effect, or of the metric: what is closer may be rounding in float32 too, whose floor is measured then (it takes twelve runs)
COMPANY = 0.3  # so much of its estimate a cell does more or less beside others than alone


@dataclass
class Subsets:
    """What random subsets say: which cells each holds [subset, cell], and what it did beyond what the estimates (of patched cells the truth) say."""

    inside: np.ndarray
    effects: np.ndarray

    def offsets(self, guess: np.ndarray, outside: np.ndarray) -> tuple[np.ndarray, float]:
        """How far each cell outside is off its guess [cell outside], and the standard error of that."""
        rest, members = self.effects - self.inside @ guess, self.inside[:, outside]
        n, m = len(rest), members[:, 0].sum()  # each is in one subset of a round
        own = members.T @ rest
        return own / m - (rest.sum() - own) / (n - m), rest.std(ddof=1) * math.sqrt(1 / m + 1 / (n - m))


@dataclass
class Chances:
    """How large each cell outside may be [cell, point], and how likely each of these sizes is (a row's sum is 1)."""

    sizes: np.ndarray
    mass: np.ndarray

    @classmethod
    def of(cls, subsets: Subsets, guess: np.ndarray, outside: np.ndarray, last: float) -> "Chances":
        """`guess` [cell], of patched cells the truth; `last`: the size of the last of the top."""
        (offset, error), g = subsets.offsets(guess, outside), guess[outside, None]
        tiny, df = 1e-9 * np.abs(guess).max() + 1e-30, len(subsets.effects) - 2
        scale, error = SCALE * np.abs(g) + FLOOR * last + tiny, np.hypot(error, COMPANY * g) + tiny
        steps = np.geomspace(0.02, 10 / FLOOR, 200)
        steps = np.concatenate([-steps[::-1], [0.0], steps])
        off = np.sort(np.concatenate([scale * steps, offset[:, None] + error * np.linspace(-6, 6, 61)], 1), 1)
        likely = -np.log1p((off / scale) ** 2) - (df + 1) / 2 * np.log1p(((offset[:, None] - off) / error) ** 2 / df)
        mass = np.exp(likely - likely.max(1, keepdims=True)) * np.gradient(off, axis=1)
        return cls(np.abs(g + off), mass / mass.sum(1, keepdims=True))

    def beyond(self, size: float) -> np.ndarray:
        """The chance that a cell is larger than this [cell]."""
        return (self.mass * (self.sizes > size)).sum(1)

    def bound(self, confidence: float) -> float:
        """The size beyond which the cells' chances sum to 1 - confidence at most."""
        order = np.argsort(-self.sizes, axis=None)
        return float(self.sizes.flat[order[np.searchsorted(self.mass.ravel()[order].cumsum(), 1 - confidence)]])


@dataclass
class Settled:
    """What was run: the true effects [cell] (NaN: not run), what no other cell exceeds, and the metric of the base run."""

    truth: np.ndarray
    bound: float
    subsets: int
    base: float


def certify(model: Model, ask: Certify) -> Generator[Progress, None, CertifyResult]:
    if not 0 < ask.confidence < 1 or not 0 < ask.share <= 1 or ask.top < 1:
        raise UserError("give top at least 1, a confidence between 0 and 1, and a share above 0 and at most 1")
    if ask.kind in ON_ONE_PATH:
        raise UserError(
            f"{ask.kind}: a patch of the residual stream hides those at earlier layers, so cells patched together say nothing of one alone: sweep them all"
        )
    only = lambda part: part if isinstance(part, Progress) else None  # noqa: E731
    study = Estimate(ask.study, ask.kind, ask.method, ask.direction, node=ask.node, over_set=ask.over_set)
    found: SweepResult = yield from forward_progress(estimate(model, study), only)
    plan = read_plan(model, Sweep(ask.study, ask.kind, "patch", ask.direction, node=ask.node, over_set=ask.over_set))
    cells = list(plan.layout.cells)
    guess = np.array([found.values[rc] - found.base for rc in cells], float)
    n, budget, least = len(cells), int(ask.share * len(cells)), ask.top + ROUNDS * GROUPS
    if budget < least:
        more = "raise the share, or " * (least <= n)
        raise UserError(
            f"{percent(ask.share)} of {n} cells are {budget} runs, and {ask.top} cells with {ROUNDS * GROUPS} subsets are {least}: {more}sweep them all"
        )
    coarse = model.dtype != t.float32
    floor = (yield from rounding(plan)) if coarse else 0.0
    done = yield from settle(guess, ask, budget, floor, lambda sets: measure(plan, cells, sets))
    sizes = np.nan_to_num(np.abs(done.truth), nan=-1.0)
    run = np.argsort(-sizes, kind="stable")[: int((sizes >= 0).sum())]
    best, following = run[: ask.top], float(sizes[run[ask.top :][:1]].max(initial=0.0))
    bound = max(done.bound, following)
    if not coarse and min(np.abs(sizes[best] - bound).min(), sizes[best[-1]]) <= NEAR * max(1.0, sizes.max()):
        floor = yield from rounding(plan)
    sure = sizes[best] > bound + floor
    names = tuple(name_of(plan, rc) for rc in cells)
    return CertifyResult(
        ask.kind, ask.method, tuple(names[i] for i in best), done.truth[best], guess[best], sure, bool(sure.all()), bound, ask.confidence, len(run) + done.subsets, done.subsets, n,
        done.base, convention(ask, plan), following, floor, left_out(plan.left, len(plan.left) + len(plan.runs)),
    )  # fmt: skip


def rounding(plan: Plan) -> Generator[Progress, None, float]:
    """The noise floor of the metric; 0 where it can't be measured."""
    return float(np.nan_to_num((yield from noise_floor(plan.runs))))


def settle(
    guess: np.ndarray, ask: Certify, budget: int, floor: float, run: Callable[[list[list[int]]], Generator[Progress, None, tuple[np.ndarray, float]]]
) -> Generator[Progress, None, Settled]:
    """Run (`run` gives the effects of sets of cells, and the base run's metric) the first cells of `guess` [cell] and random subsets of the others, then those that may belong to the top."""
    n, order = len(guess), np.argsort(-np.abs(guess), kind="stable")
    first, truth, rng = ask.top, np.full(len(guess), np.nan), np.random.default_rng(ask.seed)
    rounds = max(ROUNDS, min(int(SUBSETS * budget), budget - first) // GROUPS)
    inside = np.zeros((rounds * GROUPS, n))
    for r in range(rounds):
        for g, some in enumerate(np.array_split(rng.permutation(order[first:]), GROUPS)):
            inside[r * GROUPS + g, some] = 1
    sets = [[int(i)] for i in order[:first]] + [np.flatnonzero(row).tolist() for row in inside]
    values, base = yield from run(sets)
    truth[order[:first]], subsets = values[:first], Subsets(inside, values[first:])
    while True:
        known = np.isfinite(truth)
        last, left = np.sort(np.abs(truth[known]))[-ask.top], np.flatnonzero(~known)
        chances = Chances.of(subsets, np.where(known, truth, guess), ~known, last)
        bound, spent = chances.bound(ask.confidence), int(known.sum()) + len(inside)
        if bound + floor < last or spent >= budget:
            return Settled(truth, bound, len(inside), float(base))
        nearest = left[np.argsort(-chances.beyond(last), kind="stable")[: min(max(1, n // 50), budget - spent)]]
        truth[nearest], _ = yield from run([[int(i)] for i in nearest])


def measure(plan: Plan, cells: list[tuple[int, int]], sets: list[list[int]]) -> Generator[Progress, None, tuple[np.ndarray, float]]:
    """What patching each set of cells together does to the metric, the mean over the prompts [set]; and the metric of the base run."""
    found, sides = np.full((len(sets), len(plan.runs)), np.nan), np.full(len(plan.runs), np.nan)

    def fill(members: list[int], base: Base, ends: tuple[np.ndarray, ...]) -> Generator[Progress]:
        sides[members] = ends[0]
        variants, places = [], plan.layouts[members[0]].cells  # one layout in a batch: labels stand elsewhere in other prompts
        for k, some in enumerate(tuple(s for i in each for s in places.get(cells[i], ())) for each in sets):
            v = Variant(k, tuple(s for s in some if s.node.pos is None or base.shared <= s.node.pos < base.stop))
            if v.spots and max(v.first, base.shared) < base.stop:
                variants.append(v)
            else:
                found[k, members] = ends[0]
        base.plan_work(variants)
        for step in base.all(variants, False):
            if isinstance(step, Progress):
                yield step
            else:
                some, values = step
                check_finite(values)
                found[np.ix_([v.cell for v in some], members)] = values

    def undo(members: list[int]) -> None:
        found[:, members] = np.nan

    yield from over_bases(plan, fill, undo=undo)
    return (found - sides).mean(1), sides.mean()


def name_of(plan: Plan, rc: tuple[int, int]) -> str:
    layout = plan.layout
    return layout.nodes[rc[0] * len(layout.cols) + rc[1]] if layout.nodes else f"{layout.rows[rc[0]]} × {layout.cols[rc[1]]}"


def convention(ask: Certify, plan: Plan) -> str:
    runs = f"mean over {len(plan.runs)} prompts" if ask.over_set else "one prompt"
    return (
        f"{ask.kind}, {ask.direction}, effect on {ask.study.metric.name}, {runs}; in the order of {ask.method} ({ESTIMATES[ask.method]}); the bound: some cell outside is larger with a chance of "
        f"{percent(1 - ask.confidence)} at most, if a cell does in a random eighth of the others about what it does alone and its estimate's error is Cauchy (no proof; docs/estimates.md says how often it "
        "held); these prompts, no others"
    )
