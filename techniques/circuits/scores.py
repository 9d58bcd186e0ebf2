"""
What a circuit is worth: faithfulness, completeness and minimality by true ablation (Wang et al. 2211.00593), and single effects.

A circuit of nodes keeps its heads (and MLPs where they count); everything else has the value that `rest` says. A circuit of edges: see edges.py.
"""

import time
from collections.abc import Generator

import numpy as np

from model.bridge import Model
from model.noise import noise_floor
from model.replacements import mean_in_words
from model.runs import first_tokens
from model.text_means import pinned
from techniques.circuits.bench import NONE, Bench, Parts
from techniques.circuits.edges import own_edge
from techniques.circuits.intervals import interval, ratio, warnings
from techniques.circuits.node_runs import by_parts, features_of
from techniques.circuits.requests import REST, Interval, Score, ScoreResult
from vocabulary.circuit import Circuit, check_circuit, connected
from vocabulary.nodes import FROM_TEXT, UserError, parse_node
from vocabulary.requests import Progress

WHAT = ("faithfulness", "completeness", "minimality", "effects")
TRIED = 8  # sets that say how long one takes


def score(model: Model, ask: Score) -> Generator[Progress, None, ScoreResult]:
    """The scores of a circuit over the prompt set, or on the one prompt."""
    if ask.samples < 0 or ask.subsets < 0 or ask.greedy < 0:
        raise UserError("samples, subsets and greedy steps are not negative")
    if unknown := [w for w in ask.what if w not in WHAT]:
        raise UserError(f"{unknown[0]!r} is not a score: use some of {', '.join(WHAT)}")
    begun, circuit = time.monotonic(), ask.circuit
    check_circuit(circuit, model.info)
    edges = bool(circuit.edges) and ask.edges
    if edges:
        model.require("parts", "heads")
    if edges and (some := features_of(circuit.nodes)):
        raise UserError(
            f"{some[0]}: a circuit with edges is scored by them, and features have none; score it by its nodes (Y on the screen, --no-edges), or drop the feature"
        )
    nodes = circuit.nodes if ask.mlps else tuple(n for n in circuit.nodes if parse_node(n).site != "mlp")
    parts = tuple(own_edge(model.info, e) for e in circuit.edges) if edges else nodes
    if not parts:
        raise UserError(f"{circuit.name} holds only MLPs, and they stay in any case: count them (mlps), or keep a head")
    bench = Bench(model, ask.study, ask.rest, ask.seed, edges, ask.mlps, ask.positions, nodes)
    yield from bench.prepare()
    mine, work = frozenset(parts), Work(parts, circuit, ask)
    bench.total = 2 + TRIED if ask.dry else work.count()
    alone, empty = yield from bench.values([(mine, NONE), (NONE, NONE)], "faithfulness")
    faithfulness = ratio(alone, empty, bench.whole)
    expected = yield from work.pace(bench, begun)
    effects, tried, by_circuit, by_model, minimal, with_ = np.zeros(0), (), np.zeros(0), np.zeros(0), np.zeros(0), ()
    worst, low, high, mean = None, np.zeros(0), np.zeros(0), None
    if "effects" in ask.what and not ask.dry:
        single = yield from bench.values(work.effects(), "single effects")
        effects = (single - bench.whole).mean(1)
    if "completeness" in ask.what and not ask.dry:
        tried, by_circuit, by_model, worst = yield from completeness(bench, work)
    if "minimality" in ask.what and not ask.dry:
        minimal, with_, low, high, mean = yield from minimality(bench, work)
    floor = yield from noise_floor(bench.by_length)
    said = "" if ask.study.part else warnings(bench.whole, empty, floor, not edges or connected(circuit, model.info))
    warning = "; ".join(filter(None, (said, bench.left_out)))
    members = tuple(i for i, _ in bench.plan.members)
    return ScoreResult(
        circuit, interval(bench.whole), interval(alone), interval(empty), faithfulness, parts, effects.astype(np.float32), tried,
        by_circuit.astype(np.float32), by_model.astype(np.float32), float(np.abs(by_circuit - by_model).max()) if len(by_model) else np.nan,
        minimal.astype(np.float32), with_, members, time.monotonic() - begun, warning, convention(bench, ask, nodes, work, mean),
        worst, low.astype(np.float32), high.astype(np.float32), mean, work.count() if ask.dry else bench.done, expected, ask.dry, floor,
    )  # fmt: skip


# ------------------------------------------------------------------ the sets that are cut


class Work:
    """The sets that the scores of a circuit need. `tried` are the parts whose minimality is measured: all, or a sample."""

    def __init__(self, parts: tuple[str, ...], circuit: Circuit, ask: Score):
        self.parts, self.ask, self.mine = parts, ask, frozenset(parts)
        self.groups = [frozenset(g) & self.mine for g in circuit.groups.values()]
        self.bounded = 0 < ask.samples < len(parts)
        self.rng = np.random.default_rng((ask.seed, 1))
        self.tried = self.draw(parts)

    def draw(self, parts: tuple[str, ...]) -> tuple[str, ...]:
        """All of some parts, or as many of them as samples are asked for."""
        some = self.rng.choice(len(parts), self.ask.samples, replace=False) if 0 < self.ask.samples < len(parts) else range(len(parts))
        return tuple(parts[i] for i in sorted(some))

    def effects(self) -> list[Parts]:
        return [(None, frozenset([p])) for p in self.parts]

    def subsets(self) -> list[frozenset[str]]:
        """Of completeness: nothing, the circuit's groups, random halves."""
        rng = np.random.default_rng(self.ask.seed)
        return list(dict.fromkeys([NONE, *self.groups, *(self.random(rng, 0.5) for _ in range(self.ask.subsets))]))

    def pairs(self) -> list[tuple[str, frozenset[str]]]:
        """Of minimality: a part, and what is taken away with it: nothing, its groups, random subsets."""
        rng = np.random.default_rng(self.ask.seed)
        random = [self.random(rng, 0.3) for _ in range(max(1, self.ask.subsets // 4))]
        return [(p, k - {p}) for p in self.tried for k in dict.fromkeys([NONE, *(g for g in self.groups if p in g), *random])]

    def random(self, rng: np.random.Generator, share: float) -> frozenset[str]:
        return frozenset(p for p, take in zip(self.parts, rng.random(len(self.parts)) < share) if take)

    def both(self, some: list[frozenset[str]]) -> list[Parts]:
        """Circuit and model without each subset."""
        return [*((self.mine, k) for k in some), *((None, k) for k in some)]

    def removals(self) -> list[Parts]:
        return [s for p, k in self.pairs() for s in ((self.mine, k), (self.mine, k | {p}))]

    def sets(self) -> list[Parts]:
        """Every set that is known before any is cut."""
        what, first = self.ask.what, [(self.mine, NONE), (NONE, NONE)]
        first += self.effects() if "effects" in what else []
        first += self.both(self.subsets()) if "completeness" in what else []
        first += self.both([frozenset([p]) for p in self.parts]) if "completeness" in what and self.ask.greedy and not self.bounded else []
        first += self.removals() if "minimality" in what else []
        return list(dict.fromkeys(first))

    def count(self) -> int:
        """Sets in all, those of greedy steps that depend on earlier ones among them."""
        steps = range(0 if self.bounded else 1, min(self.ask.greedy, len(self.parts))) if "completeness" in self.ask.what else ()
        return len(self.sets()) + sum(2 * min(self.ask.samples or len(self.parts), len(self.parts) - k) for k in steps)

    def pace(self, bench: Bench, begun: float) -> Generator[Progress, None, float]:
        """How long it all takes, in seconds from the start, by a few of the sets."""
        todo = [s for s in self.sets() if s not in bench.known]
        some, total = todo[:: max(1, len(todo) // TRIED)][:TRIED], self.count() - 2
        prepared, bench.done, bench.spent, bench.total = time.monotonic() - begun, 0, 0.0, len(some) if self.ask.dry else total
        if some:
            yield from bench.values(some, "how long it takes")
        return prepared + bench.spent / max(1, bench.done) * total


# ------------------------------------------------------------------ completeness and minimality


def completeness(bench: Bench, work: Work) -> Generator[Progress, None, tuple]:
    """Subsets K, the metric of the circuit without K and of the model without K: groups, random subsets, and a greedy chain of the worst."""
    sets, parts, chain = work.subsets(), work.parts, NONE

    def both(some: list[frozenset[str]]) -> Generator[Progress, None, tuple[np.ndarray, np.ndarray]]:
        found = yield from bench.values(work.both(some), "completeness")
        return found[: len(some)], found[len(some) :]

    x, y = yield from both(sets)
    a, b = [*x], [*y]  # of each set the values over prompts
    for _ in range(min(work.ask.greedy, len(parts))):
        more = [chain | {p} for p in work.draw(tuple(p for p in parts if p not in chain))]
        x, y = yield from both(more)
        at = int(np.argmax(np.abs((x - y).mean(1))))
        chain = more[at]
        if chain not in sets:
            sets, a, b = [*sets, chain], [*a, x[at]], [*b, y[at]]
    gap = np.array(a) - np.array(b)
    worst = interval(gap[np.abs(gap.mean(1)).argmax()])
    return tuple(tuple(p for p in parts if p in k) for k in sets), np.array(a).mean(1), np.array(b).mean(1), worst


def minimality(bench: Bench, work: Work) -> Generator[Progress, None, tuple]:
    """
    Of each part the largest |F(C without K) - F(C without K and it)| over the K tried (nothing, its groups, random subsets), in units of F(model); NaN where
    it was not tried. The K, both ends of the interval over prompts, and of a sample of parts the mean over all parts.
    """
    pairs, parts = work.pairs(), work.parts
    found = yield from bench.values(work.removals(), "minimality")
    size = abs(float(bench.whole.mean()))
    change = (found[::2] - found[1::2]) / (size if size > 1e-9 else np.nan)
    moved = np.abs(change.mean(1))
    best: dict[str, int] = {}
    for i, (p, _) in enumerate(pairs):
        best[p] = i if p not in best or moved[i] > moved[best[p]] else best[p]
    sides = {p: interval(change[i] * np.sign(change[i].mean())) for p, i in best.items()}
    sets = tuple(tuple(x for x in parts if x in pairs[best[p]][1]) if p in best else () for p in parts)
    mean = interval(np.array([moved[i] for i in best.values()])) if work.bounded else None
    of = lambda value: np.array([value(p) if p in best else np.nan for p in parts])  # noqa: E731
    return of(lambda p: moved[best[p]]), sets, of(lambda p: sides[p].low), of(lambda p: sides[p].high), mean


# ------------------------------------------------------------------ words


def convention(bench: Bench, ask: Score, nodes: tuple[str, ...], work: Work, mean: Interval | None) -> str:
    model, edges, runs = bench.model, bench.edges, bench.plan.whole
    parts, features, stay = by_parts(nodes), "", "MLPs and embeddings"
    n, rest = len(runs), REST[ask.rest] + (f", {pinned(ask.study.text)[1].words}" if ask.rest in FROM_TEXT else "")
    if features_of(nodes):
        error = "its error term kept" if ask.study.sae_error else "the error term dropped where the circuit is alone"
        features = (
            f"of an SAE (layers {', '.join(sorted({str(parse_node(x).layer) for x in features_of(nodes)}))}) the other features, {error}, position 0 as it is"
        )
        stay = stay if any(parse_node(x).site == "head" for x in nodes) else "heads, MLPs and embeddings"
    words = [
        f"{'edges' if edges else 'nodes'}: what is not in the circuit is set to {rest}" if not edges else f"edges: a cut edge carries {rest}",
        "" if edges else "MLPs outside it too" if ask.mlps else f"{stay} always stay",
        features,
        "" if edges else "at the positions named" if ask.positions and any("@" in x for x in ask.circuit.nodes) else "at all positions",
        "of a head with some of q, k, v in it the others are set so" if parts else "",
        f"{ask.study.metric.kind}@{ask.study.metric.pos} over {n} prompt{'s' * (n != 1)}",
        first_tokens(runs),
        mean_in_words(model, ask.study, [r.row("clean") for r in runs]) if ask.rest == "mean" else "",
        "faithfulness (F(C) - F(nothing)) / (F(M) - F(nothing)), ratio of means, interval by drawing prompts again" if n > 1 else
        "faithfulness (F(C) - F(nothing)) / (F(M) - F(nothing))",
        f"{ask.subsets} random subsets, greedy to {ask.greedy}, seed {ask.seed}" if {"completeness", "minimality"} & set(ask.what) else "",
        f"{ask.samples} of {len(work.parts)} parts drawn in each greedy step (its best is with 95 % among the best {1 - 0.05 ** (1 / ask.samples):.0%} of all) and for minimality"
        if work.bounded and {"completeness", "minimality"} & set(ask.what) else "",
        f"mean minimality over all parts {mean.mean:.4f}, 95 % {mean.low:.4f} to {mean.high:.4f}" if mean else "",
        f"seed {ask.seed}" if ask.rest == "resample" else "",
        "interventions left out" if ask.study.interventions else "",
        "k and v of a group of heads go when no head of it that is left needs them" if parts and model.info.n_kv_heads < model.info.n_heads else "",
        model.info.dtype,
    ]  # fmt: skip
    return "; ".join(w for w in words if w)
