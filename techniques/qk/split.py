"""A head's score at one destination and source of a run, split: what is read, against what, and the check that its parts add up to it."""

import math

import torch as t
from torch import Tensor

from model.runs import Runs
from model.writes import pre_norm
from techniques.attention.patterns import kv_head, pattern_name
from techniques.qk import parts, scores
from techniques.qk.dictionaries import NO_SAES, InSum
from techniques.qk.requests import MEAN, NONE, WRITTEN, HeadScore
from vocabulary.nodes import UserError

MASKED = -1e9  # a score below this is no score: the source is out of sight


class Split:
    """A head's score at one destination and source of a run, split into `sides`, whose products add up to `total`, and what it is read from."""

    @t.no_grad()
    def __init__(self, runs: Runs, ask: HeadScore, saes: InSum = NO_SAES):
        self.runs, self.ask, self.saes, self.model, which = runs, ask, saes, runs.model, ask.which
        model, layer, at = self.model, ask.layer, f"blocks.{ask.layer}.attn"
        scores.attention_of(model, layer)
        self.row, self.kv = runs.row(which), kv_head(model, ask.head)
        self.acts = runs.trace(which, [*parts.names(model, layer, saes), pattern_name(layer)])
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
        sums = parts.summed(runs, which, layer, self.readers, self.acts, self.form, self.dest, saes)
        if which == "now" and runs.study.interventions:  # what these wrote into stream, queries or keys
            own = {"q": self.q[0, self.dest, ask.head], "k": self.k[0, :, self.kv]}
            sums.add([WRITTEN], *((own[p].cpu().double() - sums.whole[p])[None] for p in "qk"))
        self.sides = sums.sides()
        self.total = self.sides.total
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

    def check(self) -> None:
        """UserError where the sum is not the model's own score: then something else is in it."""
        model = self.model
        row = model.identity("scores", t.tensor([self.total]), t.tensor([self.score]))
        size = float(self.form.own[self.sight].abs().max())
        if not math.isfinite(row.error) or row.error > row.tolerance * max(1.0, size / 8):
            half = "" if model.info.dtype == "float32" else f" in {model.info.dtype}: load it in float32"
            raise UserError(
                f"{model.info.architecture}: a score of layer {self.ask.layer} is not the sum of what heads, MLPs and biases write into its query and key (off by {row.error:.2g}{half})"
            )


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
    return ", ".join(w for w in [*words, *of_features(split), model.info.dtype, split.runs.convention] if w)


def of_features(split: Split) -> list[str]:
    """Of which SAEs the rows are, what of them is no feature, and what is not in the sum."""
    saes, out = split.saes, []
    if not saes.every:
        return out
    for d in saes.every:
        stands = "all that was written before it" if d is saes.stream else f"what layer {d.layer} writes there"
        out.append(f"features of {d.source} ({d.out}, {d.view} activation) in the place of {stands}")
    out.append("each SAE's error and decoder bias in rows of their own")
    out += ["a feature of the keys wherever it fires, at the source and at what that is taken against"] * bool(split.instead)
    out += ["features as the SAE reads them under the interventions"] * (split.ask.which == "now" and bool(split.runs.study.interventions))
    out += ["position 0, on which SAEs are not trained, is in it"] * (bool(split.weights[0]) or split.dest == 0)
    return [*out, *(f"not in this sum: {why}" for why in saes.left_out)]
