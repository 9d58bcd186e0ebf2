"""
What a circuit is worth: faithfulness, completeness and minimality by true ablation (Wang et al. 2211.00593), single effects, an exact greedy search, comparison.

A circuit of nodes keeps its heads (and MLPs where they count); everything else has the value that `rest` says. A circuit of edges: see edges.py.
"""

import time
from collections.abc import Generator
from functools import cached_property, partial

import numpy as np
import torch as t
from torch import Tensor

from techniques.circuits.edges import PARTS, EdgeRun, edge_runs, gather, own_edge, time_left
from techniques.circuits.requests import Compare, CompareResult, Discover, DiscoverResult, Interval, REST, Score, ScoreResult
from vocabulary.circuit import check_circuit, Circuit, connected, LOGITS, owner, parse_edge
from vocabulary.nodes import Node, parse_node, UserError
from vocabulary.prompts import Study, TokenRow
from vocabulary.requests import Progress
from model.bridge import Edit, Model
from model.runs import find_position
from vocabulary.statistics import paired_effects, ratio_of_means
from techniques.circuits.drawings import published

WHAT = ("faithfulness", "completeness", "minimality", "effects")
TRIED = 8  # sets that say how long one takes
Parts = tuple[frozenset[str] | None, frozenset[str]]  # kept (None: everything), and taken away
NONE: frozenset[str] = frozenset()


def answer(model: Model, request: Score | Compare) -> Generator[Progress, None, object]:
    if isinstance(request, Compare):
        return compare(request)
    return (yield from score(model, request))


# ------------------------------------------------------------------ nodes


class NodeRun(EdgeRun):
    """A few prompts of equal length, on which nodes are set to the rest's values. A set is (kept or None for everything, taken away)."""

    mlps_count, positions, parts, by_edges = False, True, False, False

    @cached_property
    def rows(self) -> list[TokenRow]:
        return [r.row("clean") for r in self.group]

    def spread(self, nodes: set[str]) -> np.ndarray:
        """1 where some of the nodes are [prompt, layer, column, seq]; columns are heads' z, q, k, v, then the MLP."""
        h = self.info.n_heads
        out = np.zeros((len(self.rows), self.info.n_layers, 4 * h + 1, self.seq), np.float32)
        for address in nodes:
            node = parse_node(address)
            column = 4 * h if node.site == "mlp" else h * ("z", *PARTS).index(node.part) + node.head
            for i, row in enumerate(self.rows):
                at = slice(None) if node.pos is None or not self.positions else find_position(node.pos, row, f"prompt {self.indices[i] + 1}")
                out[i, node.layer, column, at] = 1
        return out

    def mask(self, kept: frozenset[str] | None, gone: frozenset[str] = frozenset()) -> Tensor:
        """1 where a value is replaced [prompt, layer, column, seq]."""
        h, away = self.info.n_heads, self.spread(gone)
        if kept is None:
            return t.tensor(away)
        here = self.spread(kept) * (1 - away)
        z, parts = here[:, :, :h], here[:, :, h : 4 * h].reshape(*here.shape[:2], 3, h, self.seq)
        out = np.zeros_like(here)
        out[:, :, :h] = 1 - np.maximum(z, parts.max(2))  # a head with a part in the circuit is alive
        lacking = (1 - np.maximum(z[:, :, None], parts)) * np.maximum(z, parts.max(2))[:, :, None]
        whole = away[:, :, h : 4 * h].reshape(lacking.shape)
        out[:, :, h : 4 * h] = np.maximum(lacking, whole).reshape(*here.shape[:2], 3 * h, self.seq)
        if self.mlps_count:
            out[:, :, 4 * h] = 1 - here[:, :, 4 * h]
        return t.tensor(out)

    def set_bytes(self, masks: list) -> int:
        i = self.info
        return len(masks) * 4 * (14 * i.d_model + 4 * i.d_mlp + 3 * i.n_heads * self.seq) * self.ids.numel()

    @t.no_grad()
    def metrics(self, cuts: list) -> np.ndarray:
        """The metric [set, prompt]."""
        _, got = self.model.forward(self.ids.repeat(len(cuts), 1), [self.last], self.edits(cuts), keep=None)
        return self.score.of(got[self.last], 0)

    def edits(self, cuts: list[Tensor]) -> list[Edit]:
        model, h, kv = self.model, self.info.n_heads, self.info.n_kv_heads
        cut = t.cat(cuts).to(model.device)  # [row, layer, column, seq]
        n, edits = len(cuts), []

        def put(name: str, mask: Tensor) -> None:
            other = self.acts[name].repeat(n, *[1] * (self.acts[name].ndim - 1))
            edits.append((name, lambda x: t.where(mask > 0, other.to(x), x)))

        for layer in range(self.info.n_layers):
            here = cut[:, layer]
            for k, part in enumerate(PARTS):
                some = here[:, h * (k + 1) : h * (k + 2)]
                if some.any():
                    if part != "q" and kv < h:  # a group's keys or values go when no living head of it keeps them
                        alive = 1 - here[:, :h]
                        wanted = (alive * (1 - some)).view(len(some), kv, h // kv, -1).amax(2)
                        some = some.view(len(some), kv, h // kv, -1).amax(2) * (1 - wanted)
                    put(f"blocks.{layer}.attn.hook_{part}", some.transpose(1, 2)[..., None])
            if here[:, :h].any():
                put(self.zs[layer], here[:, :h].transpose(1, 2)[..., None])
            if here[:, 4 * h].any() and self.mlps[layer] in model.points:
                put(self.mlps[layer], here[:, 4 * h][..., None])
        return edits


def features_of(nodes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(n for n in nodes if parse_node(n).site == "sae")


def by_parts(nodes: tuple[str, ...]) -> bool:
    """Whether some node is a head's q, k or v."""
    return any(n.site == "head" and n.part != "z" for n in map(parse_node, nodes))


class Bench:
    """A circuit on its prompts: the metric of any set of parts alone, or of the model without some."""

    def __init__(self, model: Model, study: Study, rest: str, seed: int, edges: bool, mlps: bool, positions: bool, nodes: tuple[str, ...] = ()):
        self.model, self.study, self.rest, self.seed, self.edges = model, study, rest, seed, edges
        self.mlps, self.positions, self.nodes = mlps, positions, nodes
        self.known: dict[Parts, np.ndarray] = {}
        self.done, self.total, self.spent = 0, 0, 0.0  # sets cut, of how many, and the seconds that took

    def prepare(self) -> Generator[Progress]:
        kind = EdgeRun
        if not self.edges:
            more = tuple(f"blocks.{n}.attn.hook_{p}" for n in range(self.model.info.n_layers) for p in PARTS) if by_parts(self.nodes) else ()
            kind = type("NodeRun", (NodeRun,), {"more": more, "mlps_count": self.mlps, "positions": self.positions})
            if some := features_of(self.nodes):
                from techniques.circuits.feature_nodes import FeatureRun, dictionaries

                known = yield from dictionaries(self.model, self.study.saes, some)
                heads = any(parse_node(n).site == "head" for n in self.nodes)
                more = {"known": known, "heads_count": heads, "error": self.study.sae_error, "more": (*more, *(d.point for d in known))}
                kind = type("FeatureRun", (FeatureRun,), {"mlps_count": self.mlps, "positions": self.positions} | more)
        self.runs = yield from edge_runs(self.model, self.study, self.rest, self.seed, kind)
        self.whole = gather(self.runs, [r.value for r in self.runs])

    def values(self, sets: list[Parts], text: str) -> Generator[Progress, None, np.ndarray]:
        """The metric [set, prompt] of (kept or None for everything, taken away). A set that was cut before is not cut again."""
        todo = [s for s in dict.fromkeys(sets) if s not in self.known]
        found, begun, before = [], time.monotonic(), self.done
        total = self.total or before + len(todo)
        for k, run in enumerate(self.runs if todo else ()):
            steps = run.run([partial(run.mask, *some) for some in todo])
            while True:
                try:
                    part = next(steps)
                except StopIteration as stop:
                    found.append(stop.value)
                    break
                done = (k + part.done / part.total) / len(self.runs) * len(todo)
                seconds = (self.spent + time.monotonic() - begun) * max(0, total - before - done) / (before + done)
                yield Progress(round(before + done), total, f"{text}: {before + done:,.0f} of {total:,} sets, {time_left(seconds)}")
        self.spent += time.monotonic() - begun
        self.done += len(todo)
        if todo:
            self.known |= dict(zip(todo, gather(self.runs, found)))
        return np.stack([self.known[s] for s in sets])


def interval(values: np.ndarray) -> Interval:
    """Mean over prompts with Student's t."""
    some = paired_effects(values[:, None], values * 0, 0)
    return Interval(float(values.mean()), float(some["low"][0]), float(some["high"][0]), values.astype(np.float32))


def ratio(alone: np.ndarray, empty: np.ndarray, whole: np.ndarray) -> Interval:
    """(alone - empty) / (whole - empty) as a ratio of means over prompts; values are each prompt's own ratio."""
    a, b = alone - empty, whole - empty
    with np.errstate(divide="ignore", invalid="ignore"):
        return Interval(*ratio_of_means(a, b), (a / b).astype(np.float32))


# ------------------------------------------------------------------ scores


def score(model: Model, ask: Score) -> Generator[Progress, None, ScoreResult]:
    """The scores of a circuit over the prompt set, or on the one prompt."""
    if ask.samples < 0 or ask.subsets < 0 or ask.greedy < 0:
        raise UserError("samples, subsets and greedy steps are not negative")
    if unknown := [w for w in ask.what if w not in WHAT]:
        raise UserError(f"{unknown[0]!r} is not a score: use some of {', '.join(WHAT)}")
    begun, circuit = time.monotonic(), ask.circuit
    check_circuit(circuit, model.info)
    edges = bool(circuit.edges) and ask.edges
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
    mine = frozenset(parts)
    alone, empty = yield from bench.values([(mine, NONE), (NONE, NONE)], "faithfulness")
    faithfulness = ratio(alone, empty, bench.whole)
    work = Work(parts, circuit, ask)
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
    gap = float((bench.whole - empty).mean())
    warning = "" if not edges or connected(circuit) else "no path of its edges leads from embed to the logits: it is worth nothing; score it by its nodes"
    if abs(gap) < 0.05 * max(abs(float(bench.whole.mean())), abs(float(empty.mean()))):
        warning = f"model and empty circuit differ by {gap:.2g} only: fractions are large and noisy"
    members = tuple(range(len(ask.study.prompt_set) or 1))
    return ScoreResult(
        circuit, interval(bench.whole), interval(alone), interval(empty), faithfulness, parts, effects.astype(np.float32), tried,
        by_circuit.astype(np.float32), by_model.astype(np.float32), float(np.abs(by_circuit - by_model).max()) if len(by_model) else np.nan,
        minimal.astype(np.float32), with_, members, time.monotonic() - begun, warning, convention(model, ask, edges, nodes, work, mean),
        worst, low.astype(np.float32), high.astype(np.float32), mean, work.count() if ask.dry else bench.done, expected, ask.dry,
    )  # fmt: skip


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
        prepared, bench.done, bench.spent, bench.total = time.monotonic() - begun, 0, 0.0, 0
        some = todo[:: max(1, len(todo) // TRIED)][:TRIED]
        if some:
            yield from bench.values(some, "how long it takes")
        bench.total = self.count() - 2
        return prepared + bench.spent / max(1, bench.done) * bench.total


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


def convention(model: Model, ask: Score, edges: bool, nodes: tuple[str, ...], work: Work, mean: Interval | None) -> str:
    parts, features, stay = by_parts(nodes), "", "MLPs and embeddings"
    n, rest = len(ask.study.prompt_set) or 1, REST[ask.rest]
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


# ------------------------------------------------------------------ greedy


def greedy(model: Model, ask: Discover) -> Generator[Progress, None, DiscoverResult]:
    """Take away the head whose loss costs the least faithfulness, again and again, until `nodes` are left or the next one would go below `target`."""
    begun, info = time.monotonic(), model.info
    if not 0 < ask.target <= 1.5 or ask.nodes < 0:
        raise UserError("the target is a faithfulness above 0, and nodes are not negative (0: as few as the target allows)")
    bench = Bench(model, ask.study, ask.rest, 0, False, False, True)
    yield from bench.prepare()
    left = [str(Node("head", n, h)) for n in range(info.n_layers) for h in range(info.n_heads)]
    (empty,) = yield from bench.values([(NONE, NONE)], "pace")
    t0, tries = time.monotonic(), [(frozenset(left) - {x}, NONE) for x in left[:4]]
    yield from bench.values(tries, "pace")
    expected = t0 - begun + (time.monotonic() - t0) / len(tries) * len(left) * (len(left) + 1) / 2
    gap = float((bench.whole - empty).mean())
    if abs(gap) < 1e-9:
        raise UserError("without any head the metric is the same: there is nothing to find; another metric or rest?")
    curve, scores, done, total = [(len(left), 1.0)], {}, 0, len(left) * (len(left) + 1) // 2
    faithful = 1.0
    while left and not ask.dry and len(left) > max(ask.nodes, 1 if ask.nodes == 0 else 0):
        tries = [frozenset(left) - {x} for x in left]
        steps = bench.values([(k, frozenset()) for k in tries], "greedy")
        while True:
            try:
                part = next(steps)
            except StopIteration as stop:
                found = (stop.value - empty).mean(1) / gap
                break
            spent = time.monotonic() - begun
            now = done + part.done
            yield Progress(now, total, f"greedy: {len(left)} heads left, faithfulness {faithful:.3f}, at most {time_left(spent / max(now, 1) * (total - now))}")
        done += len(left)
        best = int(np.argmax(found))
        if not ask.nodes and found[best] < ask.target:
            break
        scores[left[best]] = faithful - float(found[best])
        faithful = float(found[best])
        left.pop(best)
        curve.append((len(left), faithful))
    curve.append((0, 0.0))
    words = [f"greedy over heads, MLPs and embeddings stay; a head that is left out is set to {REST[ask.rest]}", f"{ask.study.metric.kind}@{ask.study.metric.pos}",
             f"until {ask.nodes} heads" if ask.nodes else f"while faithfulness stays at {ask.target:g} or above", f"{len(ask.study.prompt_set) or 1} prompts", info.dtype]  # fmt: skip
    found = Circuit(ask.name or "greedy", info.name, () if ask.dry else tuple(left), found="; ".join(words))
    order = list(scores)
    counts, values = (np.array(x) for x in zip(*sorted(curve)))
    if ask.dry:
        counts, values = np.zeros(0), np.zeros(0)
    return DiscoverResult(
        found, "greedy", tuple(order), np.array([scores[x] for x in order], np.float32), counts.astype(np.int32), values.astype(np.float32),
        faithful, expected, time.monotonic() - begun, "", "; ".join(words),
    )  # fmt: skip


# ------------------------------------------------------------------ comparison


def compare(ask: Compare) -> CompareResult:
    """Overlap with another circuit, and of scored edges (or nodes) the ROC curve against it."""
    there = ask.other
    if ask.published:
        there, _ = published(ask.published)
    if not there.nodes and not there.edges:
        raise UserError("compare with what? Name a published circuit, a file or another circuit")
    heads = lambda c: {owner(n) for n in c.nodes}  # noqa: E731
    mine, theirs = heads(ask.circuit), heads(there)
    a, b = set(ask.circuit.edges), set(there.edges)
    if ask.circuit.model and there.model and ask.circuit.model.split("/")[-1] != there.model.split("/")[-1]:
        raise UserError(f"{ask.circuit.name} is a circuit of {ask.circuit.model} and {there.name} one of {there.model}")
    overlap = lambda x, y: len(x & y) / len(x | y) if x | y else np.nan  # noqa: E731
    wrong = right = np.zeros(0)
    area = np.nan
    if ask.edges and ask.scores:
        names, values = list(ask.edges), np.abs(np.array(ask.scores))
        truth = b
        if not b or "->" not in names[0]:  # the circuit has no edges: every node by its best edge
            best: dict[str, float] = {}
            for e, v in zip(names, values.tolist()):
                for end in {owner(parse_edge(e).sender), owner(parse_edge(e).receiver)} - {"embed", LOGITS} if "->" in e else {owner(e)}:
                    best[end] = max(v, best.get(end, 0.0))
            names, values, truth = list(best), np.array(list(best.values())), theirs
        hit = np.array([e in truth for e in names])
        if hit.any() and not hit.all():
            order = np.argsort(-values, kind="stable")
            last = np.append(np.diff(values[order]) != 0, True)  # ties are one step
            right = np.append(0.0, (np.cumsum(hit[order]) / hit.sum())[last])
            wrong = np.append(0.0, (np.cumsum(~hit[order]) / (~hit).sum())[last])
            area = float(np.trapezoid(right, wrong))
    words = ["nodes compared as whole heads and MLPs, positions left out", "overlap: in both / in either (Jaccard)"]
    words += ["ROC by |score|, ties in one step"] * (len(wrong) > 0)
    key = lambda x: (x.count("->"), parse_node(x.split("->")[0]).layer or 0, x)  # noqa: E731
    return CompareResult(
        ask.circuit.name, there.name, tuple(sorted((mine & theirs) | (a & b), key=key)), tuple(sorted((mine - theirs) | (a - b), key=key)),
        tuple(sorted((theirs - mine) | (b - a), key=key)), float(overlap(mine, theirs)), float(overlap(a, b)), wrong.astype(np.float32),
        right.astype(np.float32), area, there.found, "; ".join(words),
    )  # fmt: skip
