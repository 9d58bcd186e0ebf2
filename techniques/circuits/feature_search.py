"""Finding the features that matter (Marks et al. 2403.19647): by gradients integrated along the replacement of each SAE, checked by true ablation."""

import time
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from model.sae import SparseAutoencoder
from model.sae_loading import load
from techniques.circuits.bench import Bench
from techniques.circuits.edges import each
from techniques.circuits.edge_search import COUNTS
from techniques.circuits.feature_nodes import FeatureRun
from techniques.circuits.requests import METHODS, REST, Discover, DiscoverResult
from techniques.features.effects import slope_at
from vocabulary.circuit import Circuit, rank
from vocabulary.integral import fractions, steps_in_words
from vocabulary.nodes import UserError, parse_node
from vocabulary.progress import time_left
from vocabulary.requests import Progress


def features(model: Model, ask: Discover) -> Generator[Progress, None, DiscoverResult]:
    """The `nodes` features of the study's SAEs whose replacement moves the metric most, by gradients integrated along it; checked by true ablation."""
    begun = time.monotonic()
    if not ask.study.saes:
        raise UserError("features are scored in the SAEs of the study, and none is loaded: load one first")
    if ask.study.metric.kind in ("rank", "loss", "own"):
        raise UserError(f"{ask.study.metric.kind} gives no score: use logit_diff, prob, logprob or kl")
    if ask.steps < 1 or ask.nodes < 0:
        raise UserError("steps are at least 1, and nodes are not negative (0: 30)")
    loaded = []
    for source in ask.study.saes:
        loaded.append((yield from load(model, source)))
    if len({d.layer for d in loaded}) < len(loaded):
        raise UserError("two SAEs of one layer are loaded, and a node L2.sae.f7 names one: close one of them")
    bench = Bench(model, ask.study, ask.rest, 0, False, False, True, tuple(f"L{d.layer}.sae.f0" for d in loaded))
    yield from bench.prepare()
    none = frozenset()
    t0 = time.monotonic()
    yield from bench.values([(none, none)], "features")
    one = time.monotonic() - t0
    k = ask.nodes or 30
    counts = [c for c in COUNTS if c < k] + [k]
    (seconds, *_) = yield from each(bench.runs[:1], lambda run: timed(run, loaded[0]))
    expected = one * (len(counts) + 2) + ask.steps * len(loaded) * len(bench.runs) * seconds
    names, scores, words = (), np.zeros(0), f"the {k} of the largest |score|, {steps_in_words(ask.steps, ask.steps_at or 'mid', 'clean to replaced')}"
    if not ask.dry:
        found = yield from attributions(bench.runs, loaded, fractions(ask.steps, ask.steps_at or "mid"), len(bench.whole), begun)
        order = sorted((a for a in found if found[a]), key=lambda a: -abs(found[a]))
        names, scores = tuple(order), np.array([found[a] for a in order])
    nodes, curve, warning, used = names[:k], np.zeros(0), "", loaded
    if nodes:  # as the circuit is scored: of an SAE without a feature in it nothing is replaced
        used = [d for d in loaded if any(parse_node(n).layer == d.layer for n in nodes)]
        counts = [*(c for c in counts if c < len(nodes)), len(nodes)]
        bench.look_at({d: [parse_node(n).index for n in nodes if parse_node(n).layer == d.layer] for d in used})
        empty, *alone = yield from bench.values([(none, none), *((frozenset(nodes[:c]), none) for c in counts)], "features: curve")
        alone, gap = np.array(alone), float((bench.whole - empty).mean())
        curve = (alone.mean(1) - empty.mean()) / gap if abs(gap) > 1e-9 else np.full(len(counts), np.nan)
        warning = "" if np.isfinite(curve[-1]) else "model and empty circuit have the same metric: no faithfulness"
    elif not ask.dry:
        warning = "every score is 0: the metric does not see these features"
    n, warning = len(bench.whole), "; ".join(filter(None, (warning, bench.left_out)))
    parts = [METHODS["features"], words, f"a feature that is left out is set to {REST[ask.rest]}", f"looked at in {', '.join(d.source for d in loaded)}" + f", replaced in {', '.join(d.source for d in used)}" * (len(used) < len(loaded)),
             "error term kept" if ask.study.sae_error else "error term dropped where the circuit is alone", "position 0 as it is, heads and MLPs stay",
             f"{ask.study.metric.kind}@{ask.study.metric.pos}, mean of {n} prompt{'s' * (n != 1)}", "interventions left out" * bool(ask.study.interventions), model.info.dtype]  # fmt: skip
    convention = "; ".join(p for p in parts if p)
    circuit = Circuit(ask.name or "features", model.info.name, tuple(sorted(nodes, key=rank)), found=convention)
    return DiscoverResult(
        circuit, "features", names, scores.astype(np.float32), np.array(counts if nodes else [], np.int32), curve.astype(np.float32),
        float(curve[-1]) if nodes else np.nan, expected, time.monotonic() - begun, warning, convention,
    )  # fmt: skip


def attributions(
    runs: list[FeatureRun], some: list[SparseAutoencoder], shares: list[float], prompts: int, begun: float
) -> Generator[Progress, None, dict[str, float]]:
    """Of every feature (replaced - own activation) . gradient, integrated along the replacement of its whole SAE, summed over positions but the first."""
    out = {}

    def attributed(run: FeatureRun, d: SparseAutoencoder) -> Generator[Progress, None, Tensor]:
        total, x = t.zeros(d.d_sae, dtype=t.float64), d.flat(run.clean[d.point])
        change = run.others[d] - run.encode(d, x)
        change[:, 0] = 0
        change = d.weigh(change)
        delta = (change @ d.sae.W_dec) * d.scale(x)
        for k, share in enumerate(shares):
            g = slope(run, d, delta * share) * d.scale(x)
            for c, row in zip(change, g):
                total += (c * (row @ d.sae.W_dec.T)).sum(0).double().cpu() / len(shares)
            done, passes = (some.index(d) * len(runs) + runs.index(run)) * len(shares) + k + 1, len(shares) * len(some) * len(runs)
            yield Progress(done, passes, f"features: {time_left((time.monotonic() - begun) / done * (passes - done))} in this step")
        return total

    for d in some:
        total = sum((yield from each(runs, lambda run, d=d: attributed(run, d))))
        out |= {f"L{d.layer}.sae.f{i}": total[i].item() / prompts for i in total.nonzero()[:, 0].tolist()}
    return out


def timed(run: FeatureRun, d: SparseAutoencoder) -> Generator[Progress, None, float]:
    """Seconds of one gradient."""
    begun = time.monotonic()
    slope(run, d, None)
    return time.monotonic() - begun
    yield


def slope(run: FeatureRun, d: SparseAutoencoder, delta: Tensor | None) -> Tensor:
    """The metric's gradient at what the SAE writes [prompt, seq, d_out], of the clean run with `delta` added there."""
    return d.flat(slope_at(run.model, run.score, run.ids, d, delta=delta))
