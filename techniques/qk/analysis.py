"""The door of this room: a score by what wrote into its query and its key, over a prompt or a set; and one path changed for real."""

import math
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, Model
from model.interventions import prepare
from model.metrics import MetricReader
from model.runs import Runs
from model.writes import change_of_head, pre_norm
from techniques.attention.patterns import check_layer, kv_head, pattern_name, read_set
from techniques.qk import parts, scores
from techniques.qk.requests import BIAS, MEAN, NONE, QK, WRITTEN, QKCheck, QKCheckResult, QKResult, QKSet
from vocabulary.nodes import UserError, parse_node
from vocabulary.prompts import RUNS
from vocabulary.requests import Progress
from vocabulary.sets import in_part
from vocabulary.statistics import interval

MASKED = -1e9  # a score below this is no score: the source is out of sight


def answer(model: Model, request: QK | QKSet | QKCheck) -> Generator:
    check_layer(model, request.layer)
    if not 0 <= request.head < model.info.n_heads:
        raise UserError(f"there is no head {request.head}: layer {request.layer} has heads 0 to {model.info.n_heads - 1}")
    if request.which not in RUNS:
        raise UserError(f"{request.which!r} is not a run: use one of {', '.join(RUNS)}")
    model.require("parts", "heads", "q", "k")
    if isinstance(request, QKSet):
        return (yield from over_set(model, request))
    split = Split((yield from prepare(model, request.study)).at(request.which), request)
    return checked(split, request) if isinstance(request, QKCheck) else result(split)


# ------------------------------------------------------------------ one prompt


class Split:
    """A head's score at one destination and source of a run, split: `values` [query component, key component], float64, and what it is read from."""

    @t.no_grad()
    def __init__(self, runs: Runs, ask: QK | QKSet | QKCheck):
        self.runs, self.ask, self.model, which = runs, ask, runs.model, ask.which
        model, layer, at = self.model, ask.layer, f"blocks.{ask.layer}.attn"
        scores.attention_of(model, layer)
        self.row, self.kv = runs.row(which), kv_head(model, ask.head)
        self.acts = runs.trace(which, [*parts.names(model, layer), pattern_name(layer)])
        self.ids = t.tensor([self.row.ids])
        self.q, self.k = self.acts[f"{at}.hook_q"], self.acts[f"{at}.hook_k"]
        self.pattern = self.acts[pattern_name(layer)][0, ask.head].float().cpu()
        self.dest = runs.place(which, ask.dest)
        own = scores.before_softmax(model, layer, self.ids, self.q, self.k)[0, ask.head, self.dest].cpu().double()
        self.sight = [s for s in range(len(own)) if own[s] > MASKED]
        self.source = max(self.sight, key=lambda s: self.pattern[self.dest, s]) if ask.source is None else self.seen(ask.source, "the source")
        self.weights, self.instead = self.against()
        self.form = scores.bilinear(model, layer, ask.head, self.kv, self.dest, self.weights, self.ids, self.q, self.k)
        self.score = float((own[self.sight] * self.weights[self.sight]).sum())
        self.readers = {p: parts.Reader(model, layer, p, h, self.acts) for p, h in (("q", ask.head), ("k", self.kv))}
        self.names, found = parts.read(runs, which, layer, self.readers, self.acts)
        self.parts = {"q": found["q"][:, self.dest], "k": found["k"]}
        self.add_rest()
        keys = t.einsum("isj,nsj->ni", self.form.form, self.parts["k"])  # of each key component, what a query is multiplied by
        self.values = self.parts["q"] @ keys.T
        bias = self.names.index(BIAS)
        self.values[:, bias] += self.parts["q"] @ self.form.query
        self.values[bias] += t.einsum("sj,nsj->n", self.form.key, self.parts["k"])
        self.values[bias, bias] += self.form.rest
        self.check()

    def seen(self, place: int | str, what: str) -> int:
        pos = self.runs.position(self.ask.which, place)
        if pos not in self.sight:
            why = "comes after it" if pos > self.dest else "is outside the head's window"
            raise UserError(f"{what} {pos} can't be seen from destination {self.dest}: it {why}")
        return pos

    def against(self) -> tuple[Tensor, str]:
        """Every source's weight in the sum, and in words what the score is taken against."""
        weights, instead = t.zeros(len(self.row.ids), dtype=t.float64), self.ask.instead
        weights[self.source] = 1
        if instead in (MEAN, None):
            weights[self.sight] -= 1 / len(self.sight)
            return weights, f"the mean over the {len(self.sight)} sources in sight"
        if instead == NONE:
            return weights, ""
        other = self.seen(instead, "the other source")
        if other == self.source:
            raise UserError(f"source {other} against itself is nothing: give another source, mean or none")
        weights[other] -= 1
        return weights, f"source {other}"

    def add_rest(self) -> None:
        """What interventions wrote into stream, queries or keys: what is left of these."""
        rest = {"q": self.q[0, self.dest, self.ask.head], "k": self.k[0, :, self.kv]}
        rest = {p: x.cpu().double() - self.parts[p].sum(0) for p, x in rest.items()}
        if self.ask.which == "now" and self.runs.study.interventions:
            self.names.append(WRITTEN)
            self.parts = {p: t.cat([x, rest[p][None]]) for p, x in self.parts.items()}

    def check(self) -> None:
        """UserError where the sum is not the model's own score: then something else is in it."""
        model = self.model
        row = model.identity("scores", self.values.sum()[None], t.tensor([self.score]))
        size = float(self.form.own[self.sight].abs().max())
        if not math.isfinite(row.error) or row.error > row.tolerance * max(1.0, size / 8):
            half = "" if model.info.dtype == "float32" else f" in {model.info.dtype}: load it in float32"
            raise UserError(
                f"{model.info.architecture}: a score of layer {self.ask.layer} is not the sum of what heads, MLPs and biases write into its query and key (off by {row.error:.2g}{half})"
            )


def result(split: Split) -> QKResult:
    ask, cap = split.ask, scores.soft_cap(scores.attention_of(split.model, split.ask.layer))
    total, own = float(split.values.sum()), split.form.own
    capped = cap * t.tanh(own / cap) if cap else own
    seen = split.sight
    return QKResult(
        split.row, ask.which, ask.layer, ask.head, split.kv, split.dest, split.source, split.instead, tuple(split.names), tuple(split.names),
        split.values.numpy().astype(np.float32), total, split.score, abs(total - split.score), cap, float((capped[seen] * split.weights[seen]).sum()),
        float(split.pattern[split.dest, split.source]), convention(split), *(np.zeros(0, np.float32) for _ in range(4)),
    )  # fmt: skip


def convention(split: Split) -> str:
    """What the numbers are, in words: scale, norms, rotation, soft cap."""
    model, layer, ask = split.model, split.ask.layer, split.ask
    attention = scores.attention_of(model, layer)
    normed = [x for x in ("q_norm", "k_norm") if x in attention._modules]
    size = float(t.linalg.matrix_norm(split.form.form[:, split.source] / split.weights[split.source], 2)) if split.weights[split.source] else 0.0
    usual = split.q.shape[-1] ** -0.5
    scale = "scale and gains of the frozen query and key norms included" if normed else f"scale {size:.4g}"
    if not normed and size:
        scale += f" (1/sqrt({split.q.shape[-1]}))" if abs(size / usual - 1) < 1e-3 else " (the family's own)"
    words = [f"score before the softmax{f' less that of {split.instead}' if split.instead else ''}, {ask.which}", scale]
    words += ["norm before attention frozen" if pre_norm(model, layer, "attn") else "no norm before attention"]
    words += ["rotary positions exact"] * (model.info.positions == "rotary")
    words += ["ALiBi's term in bias × bias"] * (model.info.positions == "alibi")
    words += [f"before the soft cap {cap:g}"] if (cap := scores.soft_cap(attention)) else []
    words += [f"key of kv head {split.kv}"] * (model.info.n_kv_heads < model.info.n_heads)
    return ", ".join(w for w in [*words, model.info.dtype, split.runs.convention] if w)


# ------------------------------------------------------------------ a set


def over_set(model: Model, ask: QKSet) -> Generator[Progress, None, QKResult]:
    """The sum on each prompt of the set, at its own positions of the labels; means with intervals."""
    members, found = read_set(ask.study), []
    members = [members[k] for k in in_part(members, ask.study.part)]
    if ask.source is None:
        raise UserError("over a set the source has to be one: give a label that all its prompts have, such as S2")
    for done, (i, prompt) in enumerate(members):
        try:
            runs = yield from prepare(model, replace(ask.study, prompt=prompt))
            found.append(result(Split(runs.at(ask.which), ask)))
        except UserError as error:
            raise UserError(f"prompt {i + 1} of the set: {error}") from error
        yield Progress(done + 1, len(members), "QK attribution over the set")
    first = found[0]
    values = np.stack([r.values for r in found]).astype(np.float64)
    mean = lambda name: float(np.mean([getattr(r, name) for r in found]))  # noqa: E731
    spread = interval(values)
    instead = {NONE: "", MEAN: (mean_of := "the mean over the sources in sight"), None: mean_of}.get(ask.instead, f"source {ask.instead}")
    words = f"mean over {len(found)} prompts of the set with 95 % intervals, {"the metric's position" if ask.dest is None else ask.dest} to {ask.source}, {first.convention}"
    return replace(
        first, instead=instead, values=values.mean(0).astype(np.float32), total=mean("total"), score=mean("score"),
        error=max(r.error for r in found), capped=mean("capped"), attention=mean("attention"), convention=words,
        low=spread["low"].astype(np.float32), high=spread["high"].astype(np.float32), prompts=np.array([i for i, _ in members], np.int32),
        totals=np.array([r.total for r in found]),
    )  # fmt: skip


# ------------------------------------------------------------------ one path, for real


@t.no_grad()
def checked(split: Split, ask: QKCheck) -> QKCheckResult:
    """The query (or the keys) from a stream in which one component has another value, every norm computed again."""
    model, which, layer, part = split.model, ask.which, ask.layer, ask.side
    if part not in ("q", "k"):
        raise UserError(f"{part!r} is not a side: use q (into the query) or k (into the keys)")
    if ask.component not in split.names or ask.component in (BIAS, WRITTEN):
        raise UserError(
            f"{ask.component} is no component that writes into L{layer}H{ask.head}: use one of {', '.join(n for n in split.names if n not in (BIAS, WRITTEN))}"
        )
    other = other_run(split) if ask.op == "patch" else None
    said = -component(split, which, split.acts, ask.component)  # with the scale of a norm after attention frozen
    said = said if other is None else said + component(split, *other, ask.component)
    change = for_real(split, ask.component, said, other)
    stream = f"blocks.{layer}.hook_resid_pre"
    x = split.runs.trace(which, [stream])[stream][0]
    reader, head = split.readers[part], ask.head if part == "q" else split.kv
    new = split.q if part == "q" else split.k
    rows = [split.dest] if part == "q" else list(range(len(x)))
    moved = reader.real(x + change.to(x)) - reader.real(x)  # an intervention on the query itself stays
    new = new.clone()
    new[0, rows, head] += moved[rows].to(new)
    both = (new, split.k) if part == "q" else (split.q, new)
    after = scores.before_softmax(model, layer, split.ids, *both)[0, ask.head, split.dest].cpu().double()
    true = float(((after - split.form.own)[split.sight] * split.weights[split.sight]).sum())
    turned = reader(said[None].float())[0]
    if part == "q":
        keys = t.einsum("isj,sj->i", split.form.form, split.parts["k"].sum(0)) + split.form.query
        predicted = float(turned[split.dest] @ keys)
    else:
        predicted = float(t.einsum("i,isj,sj->", split.parts["q"].sum(0), split.form.form, turned) + (split.form.key * turned).sum())
    attention, metric = effects(split, ask, f"blocks.{layer}.attn.hook_{part}", new)
    receiver = f"L{layer}H{ask.head}.{part}" + (f"@{split.dest}" if part == "q" else "")
    words = f"{ask.component} {'with its value in the other prompt' if ask.op == 'patch' else 'taken away'} in {receiver} alone, norms computed again, {which}"
    shared = f", keys of kv head {split.kv} at all positions" if part == "k" else ""
    return QKCheckResult(f"{ask.component}->{receiver}", ask.op, predicted, true, attention, metric, words + shared)


def component(split: Split, which: str, acts: dict[str, Tensor], name: str) -> Tensor:
    """What one component added to the stream of a run [seq, d_model]."""
    for some, x in parts.written(split.runs, which, split.ask.layer, acts):
        if name in some:
            return x[some.index(name)]
    raise AssertionError(name)


def other_run(split: Split) -> tuple[str, dict[str, Tensor]]:
    """The other prompt's run that a patch takes values from."""
    runs, base = split.runs, split.runs.study.base if split.ask.which == "now" else split.ask.which
    other = "corrupt" if base == "clean" else "clean"
    if runs.rows[other] is None:
        raise UserError("patch takes the value in the other prompt's run, and there is no corrupted prompt: use zero, or type one")
    if len(runs.row(other).ids) != len(split.row.ids) or not runs.by_index:
        raise UserError("a component is patched position by position here, so clean and corrupted have to be of one length: use zero")
    return other, runs.trace(other, parts.names(split.model, split.ask.layer))


def for_real(split: Split, name: str, said: Tensor, other: tuple[str, dict[str, Tensor]] | None) -> Tensor:
    """What the stream gains [seq, d_model] by the change, a norm after attention computed again: that is in the way of heads only."""
    node = None if name == "position" or name.endswith(".bias") else parse_node(name)
    if node is None or node.site != "head" or not said.any():
        return said
    z = f"blocks.{node.layer}.attn.hook_z"
    new = t.zeros_like(split.acts[z]) if other is None else other[1][z]
    return change_of_head(split.model, node.layer, node.head, split.acts[z], new)[0]


def effects(split: Split, ask: QKCheck, name: str, new: Tensor) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The head's attention from destination to source, and the metric, before and after the query or the keys are these."""
    runs, model, which = split.runs, split.model, ask.which
    last, pattern = f"blocks.{model.info.n_layers - 1}.hook_resid_post", pattern_name(ask.layer)
    edits = runs.edits if which == "now" else []
    _, got = model.forward(split.ids, [pattern, last], [*edits, (name, lambda x: new.to(x))], keep=None)
    attention = tuple(float(x[ask.head, split.dest, split.source]) for x in (split.acts[pattern][0], got[pattern][0]))
    if ask.study.metric.whole:
        return attention, None
    if ask.study.metric.needs_answer and (not runs.answers or ask.study.metric.kind in ("logit_diff", "prob_diff") and not runs.foils):
        return attention, None
    clean = runs.trace("clean", [FINAL])[FINAL][0, runs.metric_position("clean")][None] if ask.study.metric.kind == "kl" else None
    score = MetricReader([runs], clean, which)
    before = runs.trace(which, [last])[last]
    return attention, tuple(float(score.of(x, 0)[0, 0]) for x in (before, got[last]))
