"""
Circuit discovery over edges: attribution (EAP and its integrated forms) and ACDC; the result is a circuit, checked by cutting every other edge.

EAP: Syed et al. 2310.10348. EAP-IG (inputs, activations, clean-corrupted): Hanna et al. 2403.17806. ACDC: Conmy et al. 2304.14997.
"""

import time
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from edges import EMBED, EdgeRun, all_edges, edge_runs, gather
from messages import METRICS, Progress, UserError, parse_node
from model import Model
from wiring import LOGITS, METHODS, REST, Circuit, Discover, DiscoverResult, owner, parse_edge, prune

FIRST, MOST = 8, 64  # edges that ACDC tries as one chain
COUNTS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000, 2000, 4000, 8000, 16000)


def discover(model: Model, ask: Discover) -> Generator[Progress, None, DiscoverResult]:
    """Find a circuit; progress says how long is left."""
    if ask.method not in METHODS:
        raise UserError(f"{ask.method!r} is not a way to find a circuit: use one of {', '.join(METHODS)}")
    if ask.method == "greedy":
        import circuits

        return (yield from circuits.greedy(model, ask))
    if ask.method == "features":
        import feature_circuits

        return (yield from feature_circuits.discover(model, ask))
    if ask.study.metric.kind == "rank":
        raise UserError("a rank has no gradient and no scale: use logit_diff, prob, logprob or kl")
    if ask.edges < 1 or ask.steps < 1 or not 0 < ask.threshold < np.inf:
        raise UserError("edges and steps are at least 1, and the threshold is a number above 0")
    begun = time.monotonic()
    runs = yield from edge_runs(model, ask.study, ask.rest)
    return (yield from (acdc if ask.method == "acdc" else attribute)(model, ask, runs, begun))


def pace(model: Model, runs: list[EdgeRun]) -> tuple[float, float]:
    """Seconds of one batch of cut edges, for one set of all prompts; and of one pass for gradients."""
    t0 = time.monotonic()
    for run in runs:
        n = min(4, run.room())
        run.metrics([run.mask(())] * n)
    cut = (time.monotonic() - t0) / n
    t0 = time.monotonic()
    runs[0].gradients()
    return cut, (time.monotonic() - t0) * len(runs)


def left(seconds: float) -> str:
    return f"{seconds:.0f} s left" if seconds < 100 else f"{seconds / 60:.0f} min left"


# ------------------------------------------------------------------ attribution


def attribute(model: Model, ask: Discover, runs: list[EdgeRun], begun: float) -> Generator[Progress, None, DiscoverResult]:
    cut, gradient = pace(model, runs)
    passes = {"eap": 1, "clean-corrupted": 2, "eap-ig": ask.steps, "eap-ig-activations": ask.steps * (2 * model.info.n_layers + 1)}[ask.method]
    counts = [c for c in COUNTS if c < ask.edges] + [ask.edges]
    expected = passes * gradient + cut * (2 * len(counts) + 2)
    edges = all_edges(model.info)
    if ask.dry:
        return result(model, ask, edges, np.zeros(0), (), np.zeros(0), np.zeros(0), expected, begun, "")
    yield Progress(0, passes, f"{ask.method}: about {left(expected)}")
    scores = np.zeros(len(edges))
    done, prompts = 0, sum(len(r.ids) for r in runs)
    for run in runs:
        total = t.zeros(len(run.readers), len(run.names), dtype=t.float64)
        for part in attributions(run, ask):
            total += part
            done += 1
            spent = time.monotonic() - begun
            yield Progress(done, passes * len(runs), f"{ask.method}: {left(max(0.0, expected - spent))}")
        scores += np.array([total[run.where[e]].item() for e in edges]) / prompts
    if not np.isfinite(scores).all():
        raise UserError("an edge's score is not finite: does the model hold NaN? Try float32")
    order = np.argsort(-np.abs(scores), kind="stable")
    sets = [prune([edges[i] for i in order[:c]]) for c in counts]
    curve = yield from faithful(runs, sets, f"{ask.method}: curve")
    words = f"the {ask.edges} edges of the largest |score|"
    if len(sets[-1]) < ask.edges:
        words += f", {ask.edges - len(sets[-1])} of them dropped that are on no path from embed to logits"
    return result(model, ask, edges, scores, sets[-1], np.array([len(s) for s in sets]), curve, expected, begun, words)


def attributions(run: EdgeRun, ask: Discover) -> Generator[Tensor]:
    """Parts [receiver, sender] whose sum is every edge's score, summed over the run's prompts: (other - clean) . gradient."""
    change = run.other - run.written(run.clean)
    dot = lambda g, d=change: t.einsum("bsrd,bsmd->rm", g.double(), d.double())  # noqa: E731
    corrupt = None
    if ask.method in ("eap-ig", "clean-corrupted"):
        if ask.rest == "patch":
            corrupt = t.tensor([r.row("corrupt").ids for r in run.group])
        elif ask.method == "clean-corrupted":
            raise UserError("clean-corrupted needs the corrupted run: use rest patch")
    match ask.method:
        case "eap":
            yield dot(run.gradients())
        case "clean-corrupted":
            yield dot(run.gradients()) / 2
            clean, run.ids = run.ids, corrupt
            try:
                yield dot(run.gradients()) / 2
            finally:
                run.ids = clean
        case "eap-ig":
            own, other = run.clean[EMBED], run.other[:, :, 0]
            for k in range(ask.steps):
                yield dot(run.gradients(embed=other + (k + 1) / ask.steps * (own - other))) / ask.steps
        case _:
            base = run.written(run.clean)
            places = [(EMBED, 0, 1)]
            for n in range(run.info.n_layers):
                first = 1 + n * run.stride
                places += [(f"blocks.{n}.hook_attn_out", first, first + run.info.n_heads)]
                places += [(run.mlps[n], first + run.info.n_heads, first + run.info.n_heads + 1)] * (run.mlps[n] in run.model.points)
            for name, a, b in places:
                step = change[:, :, a:b].sum(2)
                part = t.zeros_like(change)
                part[:, :, a:b] = change[:, :, a:b]
                own = base[:, :, a:b].sum(2)
                if "attn" in name:  # with the attention's output bias
                    own = run.model.forward(run.ids, [name])[1][name]
                for k in range(ask.steps):
                    yield dot(run.gradients(mix=(name, own + (1 - (k + 1) / ask.steps) * step)), part) / ask.steps


def faithful(runs: list[EdgeRun], sets: list[tuple[str, ...]], what: str) -> Generator[Progress, None, np.ndarray]:
    """Faithfulness [set] by true ablation: (F(set) - F(nothing)) / (F(model) - F(nothing)), ratio of means over the prompts."""
    found = []
    for k, run in enumerate(runs):
        found.append((yield from told(run.run([run.mask(s) for s in (*sets, ())]), f"{what}, prompts {k + 1} of {len(runs)}")))
    mean, model = gather(runs, found).mean(1), float(np.concatenate([r.value for r in runs]).mean())
    gap = model - mean[-1]
    return (mean[:-1] - mean[-1]) / gap if abs(gap) > 1e-9 else np.full(len(sets), np.nan)


def told(steps: Generator, text: str, now: Progress | None = None) -> Generator[Progress, None, np.ndarray]:
    """A run's result; its progress under another text, or as where an outer loop stands."""
    while True:
        try:
            part = next(steps)
        except StopIteration as stop:
            return stop.value
        yield now or replace(part, text=text)


# ------------------------------------------------------------------ ACDC


def acdc(model: Model, ask: Discover, runs: list[EdgeRun], begun: float) -> Generator[Progress, None, DiscoverResult]:
    """
    From the logits back: an edge goes when the metric moves by less than the threshold without it. Removals are tried as chains, each with all before
    it, so that a batch decides as many edges as go in a row, with the same outcome as one after the other.
    """
    edges = all_edges(model.info)
    order = list(reversed(edges))
    cut, _ = pace(model, runs)
    expected = cut * len(edges) * 1.5
    if ask.dry:
        return result(model, ask, edges, np.zeros(0), (), np.zeros(0), np.zeros(0), expected, begun, "")
    base = float(gather(runs, [r.value for r in runs]).mean())
    now, kept, at, scores = base, set(edges), 0, np.zeros(len(edges))
    size, place = FIRST, {e: i for i, e in enumerate(edges)}
    last = Progress(0, len(order), "acdc")
    curve = [(len(edges), base)]
    while at < len(order):
        alive = connected(kept)
        chain = []
        while at + len(chain) < len(order) and len(chain) < size:
            chain.append(order[at + len(chain)])
        dead = [e for e in chain if e not in alive]
        if dead and dead[0] == chain[0]:  # it carries nothing to the logits any more
            kept.discard(chain[0])
            at += 1
            continue
        chain = chain[: chain.index(dead[0])] if dead else chain
        found = []
        for run in runs:
            sets = [run.mask(kept - set(chain[: k + 1])) for k in range(len(chain))]
            found.append((yield from told(run.run(sets), "", last)))
        means = gather(runs, found).mean(1)
        decided = 0
        for edge, value in zip(chain, means.tolist()):
            moved = value - now if ask.study.metric.kind == "kl" else abs(value - now)
            scores[place[edge]] = value - now
            decided += 1
            if moved >= ask.threshold:
                break
            kept.discard(edge)
            now = value
        else:
            size = min(MOST, size * 2)
        if decided < len(chain):
            size = max(min(2, MOST), size // 2)
        at += decided
        curve.append((len(kept), now))
        spent = time.monotonic() - begun
        yield (last := Progress(at, len(order), f"acdc: {at} of {len(order)} edges, {len(kept)} kept, {left(spent / at * (len(order) - at))}"))
    found = prune([e for e in edges if e in kept])
    curve_sets = [found]
    value = yield from faithful(runs, curve_sets, "acdc: check")
    empty = []
    for run in runs:
        empty.append((yield from told(run.run([run.mask(())]), "")))
    floor = float(gather(runs, empty).mean())
    curve = sorted({n: v for n, v in [*curve, (0, floor)]}.items())
    counts = np.array([n for n, _ in curve])
    values = np.array([(v - floor) / (base - floor) if abs(base - floor) > 1e-9 else np.nan for _, v in curve])
    counts, values = np.append(counts, len(found)), np.append(values, value[0])
    keep = np.argsort(counts, kind="stable")
    words = f"threshold {ask.threshold:g} on the mean {METRICS[ask.study.metric.kind]}, edges from the logits back, latest receiver and latest sender first"
    return result(model, ask, edges, scores, found, counts[keep], values[keep], expected, begun, words, float(value[0]))


def connected(kept: set[str]) -> set[str]:
    """Edges that lie on a path to the logits."""
    into: dict[str, list] = {}
    for e in map(parse_edge, kept):
        into.setdefault(owner(e.receiver), []).append(e)
    seen, todo, out = {LOGITS}, [LOGITS], set()
    while todo:
        for e in into.get(todo.pop(), ()):
            out.add(str(e))
            if e.sender not in seen:
                seen.add(e.sender)
                todo.append(e.sender)
    return out


# ------------------------------------------------------------------ the result


def result(
    model: Model, ask: Discover, edges: tuple, scores: np.ndarray, kept: tuple, counts: np.ndarray, curve: np.ndarray,
    expected: float, begun: float, words: str, score: float | None = None,
) -> DiscoverResult:  # fmt: skip
    """A circuit of edges, the nodes at their ends, and how it was found."""
    nodes = {owner(x) for e in map(parse_edge, kept) for x in (e.sender, e.receiver)} - {"embed", LOGITS}
    order = sorted(nodes, key=lambda a: (parse_node(a).layer, parse_node(a).site == "mlp", parse_node(a).head or 0))
    n = len(ask.study.prompt_set) or 1
    where = f"{ask.study.metric.kind}@{ask.study.metric.pos}, mean of {n} prompt{'s' * (n != 1)}"
    parts = [METHODS[ask.method], words, f"checked by cutting all other edges: a cut edge carries {REST[ask.rest]}", "no positions", where, model.info.dtype]
    if ask.method.startswith("eap-ig"):
        parts.insert(1, f"{ask.steps} steps")
    if any(hasattr(b, "ln1_post") for b in model.bridge.blocks):
        parts.append("a head's part behind the norm after attention has that run's own scale")
    if ask.study.interventions:
        parts.append("interventions left out")
    convention = "; ".join(p for p in parts if p)
    circuit = Circuit(ask.name or ask.method, model.info.name, tuple(order), tuple(kept), found=convention)
    score = (float(curve[-1]) if len(curve) else np.nan) if score is None else score
    warning = "" if not len(kept) or np.isfinite(score) else "model and empty circuit have the same metric: no faithfulness"
    if len(scores) and not kept:
        warning = "no edge is left on a path from embed to logits: take more edges or a lower threshold"
    return DiscoverResult(
        circuit, ask.method, edges if len(scores) else (), scores.astype(np.float32), counts.astype(np.int32), curve.astype(np.float32), score, expected,
        time.monotonic() - begun, warning, convention,
    )  # fmt: skip
