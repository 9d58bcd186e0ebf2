"""
Circuit discovery over edges: attribution (EAP and its integrated forms) and ACDC; the result is a circuit, checked by cutting every other edge.

EAP: Syed et al. 2310.10348. EAP-IG (inputs, activations, clean-corrupted): Hanna et al. 2403.17806. ACDC: Conmy et al. 2304.14997.
"""

import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial

import numpy as np
import torch as t

from techniques.circuits.edge_index import EdgeIndex, edge_index, senders_of, strongest_in_words
from techniques.circuits.edges import EMBED, EdgeRun, each, edge_runs, gather
from techniques.circuits.requests import Discover, DiscoverResult, METHODS, REST
from vocabulary.circuit import Circuit
from vocabulary.integral import fractions, steps_in_words
from vocabulary.nodes import UserError
from vocabulary.prompts import METRICS
from vocabulary.progress import forward_progress, time_left
from vocabulary.requests import Progress
from vocabulary.sets import left_out
from model.bridge import Model
from model.runs import first_tokens
from model.writes import post_scales

FIRST, MOST = 8, 64  # edges that ACDC tries as one chain
COUNTS = (1, 2, 3, 5, 8, 12, 16, 20, 30, 40, 60, 80, 100, 150, 200, 300, 400, 600, 800, 1000, 2000, 4000, 8000, 16000)


def edges(model: Model, ask: Discover) -> Generator[Progress, None, DiscoverResult]:
    """A circuit of edges by the method asked for; progress says how long is left."""
    if ask.study.metric.kind == "rank":
        raise UserError("a rank has no gradient and no scale: use logit_diff, prob, logprob or kl")
    if ask.edges < 1 or ask.steps < 1 or not 0 < ask.threshold < np.inf:
        raise UserError("edges and steps are at least 1, and the threshold is a number above 0")
    fractions(ask.steps, ask.steps_at or "right")  # or an error
    if ask.study.against and ask.rest == "patch" and ask.method in ("eap-ig", "clean-corrupted"):
        raise UserError(
            f"{ask.method} goes from one prompt to another in one model, and {ask.study.against} is a second one: use eap, eap-ig-activations or acdc"
        )
    begun = time.monotonic()
    runs = yield from edge_runs(model, ask.study, ask.rest)
    return (yield from (acdc if ask.method == "acdc" else attribute)(model, ask, runs, begun))


def some_kept(index: EdgeIndex, edges: int) -> list[np.ndarray]:
    """A few masks that keep so many edges, drawn at random."""
    rng, places = np.random.default_rng(0), np.argwhere(index.exists)
    return [without(index.exists, *places[rng.choice(len(places), min(edges, len(places)), replace=False)].T, False) for _ in range(4)]


def half_way(index: EdgeIndex) -> list[np.ndarray]:
    """Masks as ACDC's are on the way: of late receivers one edge in ten is left, of early ones all."""
    rng, late = np.random.default_rng(0), np.arange(len(index.readers))[:, None] / len(index.readers)
    return [index.exists & (late > share) & (rng.random(index.exists.shape) < 0.9) for share in (0.2, 0.4, 0.6, 0.8)]


def pace(runs: list[EdgeRun], masks: list[np.ndarray]) -> Generator[Progress, None, tuple[float, float]]:
    """Seconds of one set of cut edges, for all prompts, in a batch; and of one pass for gradients. What is slow the first time is not counted."""
    prompts = sum(len(r.ids) for r in runs)

    def one(run: EdgeRun) -> Generator[Progress, None, tuple[float, float]]:
        first, seconds = run is runs[0], [0.0]
        if first:
            run.metrics(masks[:1])
        some = masks[: max(1, int(run.limit // run.set_bytes(masks[:1])))]
        t0 = time.monotonic()
        yield from run.run(some)
        cut = (time.monotonic() - t0) / len(some)
        if first:
            change, seconds = run.change(), []
            while not seconds or len(seconds) < 2 and seconds[0] < 2:
                t0 = time.monotonic()
                run.slopes(change)
                seconds.append(time.monotonic() - t0)
        return cut, seconds[-1] * prompts / len(run.ids)

    cuts, gradients = zip(*(yield from each(runs, one)))
    return sum(cuts), gradients[0]


# ------------------------------------------------------------------ attribution


def attribute(model: Model, ask: Discover, runs: list[EdgeRun], begun: float) -> Generator[Progress, None, DiscoverResult]:
    index, part = edge_index(model.info), ask.study.part is not None
    cut, gradient = (0.0, 0.0) if part else (yield from pace(runs, some_kept(index, ask.edges)))
    passes = {"eap": 1, "clean-corrupted": 2, "eap-ig": ask.steps, "eap-ig-activations": ask.steps * (2 * model.info.n_layers + 1)}[ask.method]
    counts = [c for c in COUNTS if c < ask.edges] + [ask.edges]
    expected = time.monotonic() - begun + passes * gradient + cut * (len(counts) + 1)
    if ask.dry:
        return result(runs, ask, (), np.zeros(0), (), np.zeros(0), np.zeros(0), expected, begun, "")
    yield Progress(0, passes, ask.method if part else f"{ask.method}: about {time_left(expected)}")

    def scored(run: EdgeRun) -> Generator[Progress, None, np.ndarray]:
        total, before = 0.0, passes * runs.index(run)
        for done, some in enumerate(attributions(run, ask)):
            total = total + some
            yield Progress(before + done + 1, passes * len(runs), f"{ask.method}: {time_left(max(0.0, expected - time.monotonic() + begun))}")
        return total

    total = yield from each(runs, scored)
    scores = sum(total)[index.exists] / sum(len(r.ids) for r in runs)
    if not np.isfinite(scores).all():
        raise UserError("an edge's score is not finite: does the model hold NaN? Try float32")
    if part:
        return result(runs, ask, index.edges, scores, (), np.zeros(0), np.zeros(0), expected, begun, strongest_in_words(ask.edges, ask.edges))
    sets = [index.strongest(scores, count) for count in counts]
    curve = yield from faithful(runs, sets, f"{ask.method}: curve")
    found = index.named(scores, sets[-1])
    words = strongest_in_words(ask.edges, len(found))
    return result(runs, ask, index.edges, scores, found, np.array([s.sum() for s in sets]), curve, expected, begun, words)


def attributions(run: EdgeRun, ask: Discover) -> Generator[np.ndarray]:
    """Parts [receiver, sender] whose sum is every edge's score, summed over the run's prompts: (other - clean) . gradient."""
    if ask.method in ("eap-ig", "clean-corrupted") and ask.rest == "patch":
        corrupt = t.tensor([r.row("corrupt").ids for r in run.group])
    elif ask.method == "clean-corrupted":
        raise UserError("clean-corrupted needs the corrupted run: use rest patch")
    change = run.change()
    match ask.method:
        case "eap":
            yield run.slopes(change)
        case "clean-corrupted":
            yield run.slopes(change) / 2
            clean, run.ids = run.ids, corrupt
            try:
                yield run.slopes(change) / 2
            finally:
                run.ids = clean
        case "eap-ig":
            own, other = run.clean[EMBED], run.acts[EMBED]
            for share in fractions(ask.steps, ask.steps_at or "right"):
                yield run.slopes(change, embed=other + share * (own - other)) / ask.steps
        case _:
            heads, places = run.info.n_heads, [(EMBED, slice(0, 1))]
            for n in range(run.info.n_layers):
                first = 1 + n * run.stride
                places += [(f"blocks.{n}.hook_attn_out", slice(first, first + heads))]
                places += [(run.mlps[n], slice(first + heads, first + heads + 1))]
            for name, some in places:
                step = change[some].float().sum(0)
                own = run.clean[name] if name in run.clean else run.model.forward(run.ids, [name])[1][name]
                for share in fractions(ask.steps, ask.steps_at or "right"):
                    yield run.slopes(change[some], some, mix=(name, own + (1 - share) * step.to(own.device))) / ask.steps


def faithful(runs: list[EdgeRun], sets: list[np.ndarray], what: str) -> Generator[Progress, None, np.ndarray]:
    """Faithfulness [set] of kept edges by true ablation: (F(set) - F(nothing)) / (F(model) - F(nothing)), ratio of means over the prompts."""

    def work(run: EdgeRun) -> Generator[Progress, None, np.ndarray]:
        masks = [run.index.exists & ~s for s in (*sets, np.zeros_like(run.index.exists))]
        return forward_progress(run.run(masks), under(f"{what}, prompts {runs.index(run) + 1} of {len(runs)}"))

    found = yield from each(runs, work)
    mean, model = gather(runs, found).mean(1), float(np.concatenate([r.value for r in runs]).mean())
    gap = model - mean[-1]
    return (mean[:-1] - mean[-1]) / gap if abs(gap) > 1e-9 else np.full(len(sets), np.nan)


def under(text: str) -> Callable[[Progress], Progress]:
    """Progress under another text."""
    return lambda part: replace(part, text=text)


# ------------------------------------------------------------------ ACDC


def acdc(model: Model, ask: Discover, runs: list[EdgeRun], begun: float) -> Generator[Progress, None, DiscoverResult]:
    """
    From the logits back: an edge goes when the metric moves by less than the threshold without it. Removals are tried as chains, each with all before
    it, so that a batch decides as many edges as go in a row, with the same outcome as one after the other.
    """
    index = edge_index(model.info)
    rows, columns = (x[::-1] for x in np.nonzero(index.exists))
    total = len(rows)
    cut, _ = yield from pace(runs, half_way(index))
    expected = time.monotonic() - begun + cut * total
    if ask.dry:
        return result(runs, ask, (), np.zeros(0), (), np.zeros(0), np.zeros(0), expected, begun, "")
    base = float(gather(runs, [r.value for r in runs]).mean())
    now, kept, at, scores = base, index.exists.copy(), 0, np.zeros(total)
    size, last = FIRST, Progress(0, total, "acdc")
    curve = [(total, base)]
    while at < total:
        alive = index.to_logits(kept)[rows[at:], columns[at:]]
        first = int(alive.argmax()) if alive.any() else len(alive)
        if first:  # they carry nothing to the logits any more
            kept[rows[at : at + first], columns[at : at + first]] = False
            at += first
            continue
        chain = int((~alive[:size]).argmax()) if not alive[:size].all() else len(alive[:size])
        masks = [partial(without, index.exists & ~kept, rows[at : at + k + 1], columns[at : at + k + 1]) for k in range(chain)]
        found = yield from each(runs, lambda run, masks=masks, last=last: forward_progress(run.run(masks), lambda _: last))
        means = gather(runs, found).mean(1)
        for k, value in enumerate(means.tolist()):
            scores[at + k] = value - now
            if (value - now if ask.study.metric.kind == "kl" else abs(value - now)) >= ask.threshold:
                size = max(min(2, MOST), size // 2) if k + 1 < chain else size
                break
            kept[rows[at + k], columns[at + k]] = False
            now = value
        else:
            size = min(MOST, size * 2)
        at += k + 1
        curve.append((int(kept.sum()), now))
        spent = time.monotonic() - begun
        yield (last := Progress(at, total, f"acdc: {at} of {total} edges, {kept.sum()} kept, {time_left(spent / at * (total - at))}"))
    final = index.on_paths(kept)
    value = yield from faithful(runs, [final], "acdc: check")
    empty = yield from each(runs, lambda run: forward_progress(run.run([run.mask(())]), under("")))
    floor = float(gather(runs, empty).mean())
    curve = sorted({n: v for n, v in [*curve, (0, floor)]}.items())
    counts = np.array([n for n, _ in curve])
    values = np.array([(v - floor) / (base - floor) if abs(base - floor) > 1e-9 else np.nan for _, v in curve])
    names = tuple(index.name(r, c) for r, c in np.argwhere(final).tolist())
    counts, values = np.append(counts, len(names)), np.append(values, value[0])
    keep = np.argsort(counts, kind="stable")
    words = f"threshold {ask.threshold:g} on the mean {METRICS[ask.study.metric.kind]}, edges from the logits back, latest receiver and latest sender first"
    return result(runs, ask, index.edges, scores[::-1], names, counts[keep], values[keep], expected, begun, words, float(value[0]))


def without(cut: np.ndarray, rows: np.ndarray, columns: np.ndarray, gone: bool = True) -> np.ndarray:
    """A mask with some more edges cut, or kept."""
    out = cut.copy()
    out[rows, columns] = gone
    return out


# ------------------------------------------------------------------ the result


def result(
    runs: list[EdgeRun], ask: Discover, edges: tuple, scores: np.ndarray, kept: tuple, counts: np.ndarray, curve: np.ndarray,
    expected: float, begun: float, words: str, score: float | None = None,
) -> DiscoverResult:  # fmt: skip
    """A circuit of edges, the nodes at their ends, and how it was found."""
    model, plan = runs[0].model, runs[0].plan
    n = len(plan.whole)
    where = f"{ask.study.metric.kind}@{ask.study.metric.pos}, mean of {n} prompt{'s' * (n != 1)}"
    where = ", ".join(filter(None, (where, first_tokens(plan.whole))))
    parts = [METHODS[ask.method], words, f"checked by cutting all other edges: a cut edge carries {REST[ask.rest]}", "no positions", where, model.info.dtype]
    if ask.method.startswith("eap-ig"):
        parts.insert(1, steps_in_words(ask.steps, ask.steps_at or "right", "corrupted to clean"))
    if post_scales(model, "attn"):
        parts.append("a head's part behind the norm after attention has that run's own scale")
    if ask.study.interventions:
        parts.append("interventions left out")
    convention = "; ".join(p for p in parts if p)
    circuit = Circuit(ask.name or ask.method, model.info.name, senders_of(kept), tuple(kept), found=convention)
    score = (float(curve[-1]) if len(curve) else np.nan) if score is None else score
    warning = "" if not len(kept) or np.isfinite(score) else "model and empty circuit have the same metric: no faithfulness"
    if len(scores) and not kept and ask.study.part is None:
        warning = "no edge is left on a path from embed to logits: take more edges or a lower threshold"
    warning = "; ".join(filter(None, (warning, left_out(plan.left, len(ask.study.prompt_set)))))
    return DiscoverResult(
        circuit, ask.method, edges if len(scores) else (), scores.astype(np.float32), counts.astype(np.int32), curve.astype(np.float32), score, expected,
        time.monotonic() - begun, warning, convention, tuple(i for i, _ in plan.members) if ask.study.part else (),
    )  # fmt: skip
