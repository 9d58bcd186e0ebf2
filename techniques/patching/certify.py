"""
Which cells are the largest, for certain, at the price of a part of the sweep.

1. Cells are ordered by an estimate; the first of them are patched for true.
2. Random subsets of all others are patched together, each other cell once a round. A subset does what the estimates of its cells say, and the rest is what
   they miss: the mean rest of the subsets that a cell is in, less that of those it is not in, is how far its own estimate is off (subset sampling:
   Kramár et al. 2024, arXiv 2403.00745, with the estimate as control variate).
3. A cell's bound is its estimate so mended, and as many standard errors as the confidence asks for, over all cells outside (Bonferroni). The cell with the largest bound
   is patched for true, and so on, until no bound outside reaches the last of the top, or the share of runs that may be made is spent.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from model.bridge import Model
from model.variants import Base, Variant
from techniques.patching.estimates import estimate
from techniques.patching.plan import Plan, over_bases, read_plan
from techniques.patching.requests import ESTIMATES, Certify, CertifyResult, Estimate, Sweep, SweepResult
from vocabulary.nodes import UserError
from vocabulary.progress import forward_progress
from vocabulary.requests import Progress

GROUPS = 8  # subsets of a round, an eighth of the cells outside in each: the fewer, the nearer to a cell alone
ROUNDS = 2  # at least: a spread needs some
SUBSETS = 0.6  # of the runs that may be made


@dataclass
class Subsets:
    """What random subsets say: which cells each holds [subset, cell], and what it did beyond what the estimates (of patched cells the truth) say."""

    inside: np.ndarray
    effects: np.ndarray

    def offsets(self, guess: np.ndarray, outside: np.ndarray, confidence: float) -> tuple[np.ndarray, float]:
        """How far each cell outside is off its guess [cell], and the bound of that offset's error at this confidence for all of them together."""
        rest = self.effects - self.inside @ guess
        m = self.inside.sum(0)
        n = len(rest)
        own = (self.inside.T @ rest) / np.maximum(m, 1)
        others = (rest.sum() - self.inside.T @ rest) / np.maximum(n - m, 1)
        error = rest.std(ddof=1) * math.sqrt(1 / m[outside].min() + 1 / (n - m[outside].max()))
        return own - others, error * student(1 - (1 - confidence) / (2 * outside.sum()), n - 2)


def student(p: float, df: int) -> float:
    """The quantile of Student's t (Hill 1970's expansion at the normal's; 3 digits from 4 degrees of freedom on)."""
    z = NormalDist().inv_cdf(p)
    terms = (z, (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return sum(x / df**i for i, x in enumerate(terms))


def certify(model: Model, ask: Certify) -> Generator[Progress, None, CertifyResult]:
    if not 0 < ask.confidence < 1 or not 0 < ask.share <= 1 or ask.top < 1:
        raise UserError("give top at least 1, a confidence between 0 and 1, and a share above 0 and at most 1")
    only = lambda part: part if isinstance(part, Progress) else None  # noqa: E731
    study = Estimate(ask.study, ask.kind, ask.method, ask.direction, node=ask.node, over_set=ask.over_set)
    found: SweepResult = yield from forward_progress(estimate(model, study), only)
    plan = read_plan(model, Sweep(ask.study, ask.kind, "patch", ask.direction, node=ask.node, over_set=ask.over_set))
    cells = list(plan.layout.cells)
    guess = np.array([found.values[rc] - found.base for rc in cells], float)
    n, budget = len(cells), int(ask.share * len(cells))
    least = ask.top + ROUNDS * GROUPS
    if budget < least:
        raise UserError(
            f"{ask.share:.0%} of {n} cells are {budget} runs, and {ask.top} cells with {ROUNDS * GROUPS} subsets are {least}: raise the share, or sweep them all"
        )
    order = np.argsort(-np.abs(guess), kind="stable")
    first, truth = ask.top, np.full(n, np.nan)
    left, rounds = order[first:], max(ROUNDS, min(int(SUBSETS * budget), budget - first) // GROUPS)
    rng = np.random.default_rng(ask.seed)
    inside = np.zeros((rounds * GROUPS, n))
    for r in range(rounds):
        for g, some in enumerate(np.array_split(rng.permutation(left), GROUPS)):
            inside[r * GROUPS + g, some] = 1
    sets = [[int(i)] for i in order[:first]] + [np.flatnonzero(row).tolist() for row in inside]
    values, base = yield from measure(plan, cells, sets)
    truth[order[:first]], subsets = values[:first], Subsets(inside, values[first:])
    while True:
        known = np.isfinite(truth)
        last = np.sort(np.abs(truth[known]))[-ask.top]
        upper, bound = bounds(subsets, truth, guess, ask.confidence)
        spent = int(known.sum()) + len(inside)
        if bound < last or spent >= budget or known.all():
            break
        nearest = np.argsort(-np.where(known, -np.inf, upper), kind="stable")[: min(max(1, n // 50), budget - spent, int((~known).sum()))]
        more, _ = yield from measure(plan, cells, [[int(i)] for i in nearest])
        truth[nearest] = more
    best = np.argsort(-np.where(known, np.abs(truth), -1.0), kind="stable")[: ask.top]
    names = tuple(name_of(plan, rc) for rc in cells)
    return CertifyResult(
        ask.kind, ask.method, tuple(names[i] for i in best), truth[best], guess[best], np.abs(truth[best]) > bound, bool(bound < last), float(bound), ask.confidence,
        spent, len(inside), n, float(base), convention(ask, plan),
    )  # fmt: skip


def bounds(subsets: Subsets, truth: np.ndarray, guess: np.ndarray, confidence: float) -> tuple[np.ndarray, float]:
    """Each cell's bound by the subsets, and the largest of those that were not patched for true; 0 where all were."""
    outside = ~np.isfinite(truth)
    if not outside.any():
        return np.zeros(len(truth)), 0.0
    best = np.where(outside, guess, truth)
    offset, wide = subsets.offsets(best, outside, confidence)
    upper = np.abs(best + offset) + wide
    return upper, float(upper[outside].max())


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
                found[np.ix_([v.cell for v in some], members)] = values

    def undo(members: list[int]) -> None:
        found[:, members] = np.nan

    yield from over_bases(plan, fill, undo=undo)
    assert np.isfinite(found).all()
    return (found - sides).mean(1), sides.mean()


def name_of(plan: Plan, rc: tuple[int, int]) -> str:
    layout = plan.layout
    return layout.nodes[rc[0] * len(layout.cols) + rc[1]] if layout.nodes else f"{layout.rows[rc[0]]} × {layout.cols[rc[1]]}"


def convention(ask: Certify, plan: Plan) -> str:
    runs = f"mean over {len(plan.runs)} prompts" if ask.over_set else "one prompt"
    return (
        f"{ask.kind}, {ask.direction}, effect on {ask.study.metric.name}, {runs}; in the order of {ask.method} ({ESTIMATES[ask.method]}); the bound holds at {ask.confidence:.0%} for all cells "
        "outside together if patching a cell does on average in a random eighth of them what it does alone, and the rests of subsets are near normal; it covers these prompts, no others"
    )
