"""
Features as nodes of a circuit (Marks et al. 2403.19647): what the SAEs write when only some of their features are left; finding those that matter.
See circuits.py.
"""

import time
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from techniques.circuits.scores import Bench, NodeRun
from techniques.circuits.search import COUNTS
from techniques.features.reading import slope_at
from techniques.circuits.requests import Discover, DiscoverResult, METHODS, REST
from vocabulary.circuit import Circuit, rank
from vocabulary.nodes import parse_node, UserError
from vocabulary.requests import Progress
from model.bridge import Edit, Model
from model.runs import find_position
from model.sae import SparseAutoencoder, for_layer, load
from model.sae_fit import check
from model.steering import write


def dictionaries(model: Model, sources: tuple[str, ...], nodes: tuple[str, ...]) -> Generator[Progress, None, dict[SparseAutoencoder, list[int]]]:
    """The SAEs of a circuit's features, each with the indices of its features."""
    out: dict[SparseAutoencoder, list[int]] = {}
    for node in map(parse_node, nodes):
        d = yield from for_layer(model, sources, node.layer)
        d.check_index(node.index)
        out.setdefault(d, [])
        if node.index not in out[d]:
            out[d].append(node.index)
    return out


class FeatureRun(NodeRun):
    """
    Nodes may be features. Outside the circuit are the other features of the same SAEs, at every position but the first (unless it is named); heads only
    where the circuit has one. The SAEs' error terms stay, or go in runs of the circuit alone.
    """

    known: dict[SparseAutoencoder, list[int]] = {}
    heads_count, error = True, True

    def prepare(self) -> Generator[Progress]:
        yield from super().prepare()
        for d in self.known:
            if not d.passed:
                check(self.group[0], d)
        self.others = {}
        for d in self.known:
            self.others[d] = yield from self.rest_of(d)

    @t.no_grad()
    def rest_of(self, d: SparseAutoencoder) -> Generator[Progress, None, Tensor]:
        """What a feature outside the circuit is set to, [prompt, seq, feature] or with 1 where it is the same for all."""
        if self.rest in ("patch", "resample"):
            return self.encode(d, self.acts[d.point])
        if self.rest == "zero":
            return t.zeros(1, 1, 1, device=d.device)
        rows = [self.model.row(p.corrupt, p.bos).ids for p in self.plan.ask.study.prompt_set if p.corrupt is not None]
        total, count = 0.0, 0
        for done, ids in enumerate(rows):
            f = self.encode(d, self.model.trace(ids, [d.point])[d.point])
            total, count = (total + f, count + 1) if self.rest == "mean" else (total + f[:, 1:].sum((0, 1), keepdim=True), count + len(ids) - 1)
            yield Progress(done + 1, len(rows), "mean activations of the features")
        if not count:
            raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
        return total / count

    def encode(self, d: SparseAutoencoder, x: Tensor) -> Tensor:
        return t.stack([t.cat([d.encode(one[p]) for p in d.pieces(len(one))]) for one in x])

    def set_bytes(self, masks: list) -> int:
        return max(super().set_bytes(masks), len(masks) * 12 * self.ids.numel() * max(d.d_sae for d in self.known))

    # ---------------------------------------------------------------- sets

    def places(self, nodes: frozenset[str], d: SparseAutoencoder) -> np.ndarray:
        """1 where a feature of the circuit is named [prompt, seq, feature]; the first position only by name."""
        out = np.zeros((len(self.rows), self.seq, len(self.known[d])), np.float32)
        for node in map(parse_node, nodes):
            if node.site == "sae" and node.layer == d.layer:
                for i, row in enumerate(self.rows):
                    here = node.pos is not None and self.positions
                    at = find_position(node.pos, row, f"prompt {self.indices[i] + 1}") if here else slice(1, None)
                    out[i, at, self.known[d].index(node.index)] = 1
        return out

    def mask(self, kept: frozenset[str] | None, gone: frozenset[str] = frozenset()) -> tuple[Tensor, bool, dict[SparseAutoencoder, Tensor]]:
        """The heads' mask; whether all other features are replaced; and where those of the circuit are [prompt, seq, feature]."""
        heads = lambda nodes: frozenset(n for n in nodes if parse_node(n).site != "sae")  # noqa: E731
        whole = super().mask(heads(kept) if kept is not None else None, heads(gone))
        if not self.heads_count:
            whole[:, :, : 4 * self.info.n_heads] = 0
        listed = {}
        for d in self.known:
            away = self.places(gone, d)
            listed[d] = away
            if kept is not None:
                listed[d] = 1 - self.places(kept, d) * (1 - away)
                listed[d][:, 0] = away[:, 0]
        return whole, kept is not None, {d: t.tensor(x, device=d.device) for d, x in listed.items()}

    def edits(self, cuts: list) -> list[Edit]:
        found = super().edits([heads for heads, _, _ in cuts])
        for d in self.known:
            found += write(d, lambda x, y, d=d: self.written_by(d, x, y, cuts))
        return found

    def written_by(self, d: SparseAutoencoder, x: Tensor, y: Tensor, cuts: list) -> Tensor:
        """What the SAE reads and what is written there [set x prompt, seq, ...]: the same with features replaced, y + decode(f') - decode(f), or decode(f')."""
        x, b = d.flat(x), len(self.ids)
        out = y.clone()
        for i, (_, others, listed) in enumerate(cuts):
            if not others and not listed[d].any():
                continue
            rows = slice(i * b, (i + 1) * b)
            f, rest = self.encode(d, x[rows]), self.others[d].expand(b, self.seq, d.d_sae)
            new = f.clone()
            if others:
                new[:, 1:] = rest[:, 1:]
            index = self.known[d]
            new[..., index] = t.where(listed[d] > 0, rest[..., index], f[..., index])
            if others and not self.error:
                out[rows, 1:] = d.decode(new, x[rows])[:, 1:].to(y).view(y[rows, 1:].shape)
                new[:, 1:] = f[:, 1:]  # what is left to write is the first position's
            out[rows] += (d.weigh(new - f) @ d.sae.W_dec * d.scale(x[rows])).to(y).view(y[rows].shape)
        return out


# ------------------------------------------------------------------ discovery


def discover(model: Model, ask: Discover) -> Generator[Progress, None, DiscoverResult]:
    """The `nodes` features of the study's SAEs whose replacement moves the metric most, by gradients integrated along it; checked by true ablation."""
    begun = time.monotonic()
    if not ask.study.saes:
        raise UserError("features are scored in the SAEs of the study, and none is loaded: load one first")
    if ask.study.metric.kind in ("rank", "loss"):
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
    passes = ask.steps * len(loaded) * len(bench.runs)
    slope(bench.runs[0], loaded[0], None)
    expected = one * (len(counts) + 2) + passes * (time.monotonic() - t0 - one)
    names, scores, words = (), np.zeros(0), f"the {k} of the largest |score|, gradients at {ask.steps} points on the way"
    if not ask.dry:
        found = yield from attributions(bench.runs, loaded, ask.steps, len(bench.whole), begun)
        order = sorted((a for a in found if found[a]), key=lambda a: -abs(found[a]))
        names, scores = tuple(order), np.array([found[a] for a in order])
    nodes, curve, warning, used = names[:k], np.zeros(0), "", loaded
    if nodes:  # as the circuit is scored: of an SAE without a feature in it nothing is replaced
        used = [d for d in loaded if any(parse_node(n).layer == d.layer for n in nodes)]
        counts = [*(c for c in counts if c < len(nodes)), len(nodes)]
        some = bench.runs[0].known  # one dict of all runs
        some.clear()
        bench.known.clear()
        some |= {d: [parse_node(n).index for n in nodes if parse_node(n).layer == d.layer] for d in used}
        empty, *alone = yield from bench.values([(none, none), *((frozenset(nodes[:c]), none) for c in counts)], "features: curve")
        alone, gap = np.array(alone), float((bench.whole - empty).mean())
        curve = (alone.mean(1) - empty.mean()) / gap if abs(gap) > 1e-9 else np.full(len(counts), np.nan)
        warning = "" if np.isfinite(curve[-1]) else "model and empty circuit have the same metric: no faithfulness"
    elif not ask.dry:
        warning = "every score is 0: the metric does not see these features"
    n = len(ask.study.prompt_set) or 1
    parts = [METHODS["features"], words, f"a feature that is left out is set to {REST[ask.rest]}", f"looked at in {', '.join(d.source for d in loaded)}" + f", replaced in {', '.join(d.source for d in used)}" * (len(used) < len(loaded)),
             "error term kept" if ask.study.sae_error else "error term dropped where the circuit is alone", "position 0 as it is, heads and MLPs stay",
             f"{ask.study.metric.kind}@{ask.study.metric.pos}, mean of {n} prompt{'s' * (n != 1)}", "interventions left out" * bool(ask.study.interventions), model.info.dtype]  # fmt: skip
    convention = "; ".join(p for p in parts if p)
    circuit = Circuit(ask.name or "features", model.info.name, tuple(sorted(nodes, key=rank)), found=convention)
    return DiscoverResult(
        circuit, "features", names, scores.astype(np.float32), np.array(counts if nodes else [], np.int32), curve.astype(np.float32),
        float(curve[-1]) if nodes else np.nan, expected, time.monotonic() - begun, warning, convention,
    )  # fmt: skip


def attributions(runs: list[FeatureRun], some: list[SparseAutoencoder], steps: int, prompts: int, begun: float) -> Generator[Progress, None, dict[str, float]]:
    """Of every feature (replaced - own activation) . gradient, integrated along the replacement of its whole SAE, summed over positions but the first."""
    out, done, passes = {}, 0, steps * len(some) * len(runs)
    for d in some:
        total = t.zeros(d.d_sae, dtype=t.float64)
        for run in runs:
            x = d.flat(run.clean[d.point])
            change = run.others[d] - run.encode(d, x)
            change[:, 0] = 0
            change = d.weigh(change)
            delta = (change @ d.sae.W_dec) * d.scale(x)
            for k in range(steps):
                g = slope(run, d, delta * ((k + 0.5) / steps)) * d.scale(x)
                for c, row in zip(change, g):
                    total += (c * (row @ d.sae.W_dec.T)).sum(0).double().cpu() / steps
                done += 1
                spent = time.monotonic() - begun
                yield Progress(done, passes, f"features: {spent / done * (passes - done):.0f} s left")
        out |= {f"L{d.layer}.sae.f{i}": total[i].item() / prompts for i in total.nonzero()[:, 0].tolist()}
    return out


def slope(run: FeatureRun, d: SparseAutoencoder, delta: Tensor | None) -> Tensor:
    """The metric's gradient at what the SAE writes [prompt, seq, d_out], of the clean run with `delta` added there."""
    return d.flat(slope_at(run.model, run.score, run.ids, d, delta=delta))
