"""
SAEs in a head's sum: which of the loaded ones stand for what, and what their features, errors and decoder biases write into the stream that the head reads.

An SAE of the stream stands for all that was written before it; one of attention's output, heads' z or an MLP (or a transcoder) for that part alone.
"""

import re
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.bridge import Model
from model.runs import Runs
from model.sae import SparseAutoencoder
from model.sae_fit import check
from model.sae_loading import load
from model.writes import attention_out, heads_write, over_scale, post_norm
from techniques.attribution.logits import factor
from techniques.features.graph import stage
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

ROW = re.compile(r"L(\d+)\.sae\.(?:f(\d+)|(error|bias))")
CHANGED = {"mlp": ("mlp", "neuron"), "attn": ("attn", "head")}  # what an intervention is on that replaces what a transcoder writes
AT_ONCE = 1024  # decoder rows


def order(d: SparseAutoencoder) -> tuple[int, int]:
    """Where an SAE writes, in the order of the forward pass; a layer's output is the next one's input."""
    layer, place = stage(d)
    return (layer + 1, 0) if place == 4 else (layer, place)


@dataclass(frozen=True)
class InSum:
    """The SAEs of a head's sum: one of the stream (or none), those of single parts behind it, and why others are not in it."""

    stream: SparseAutoencoder | None = None
    parts: tuple[SparseAutoencoder, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def every(self) -> tuple[SparseAutoencoder, ...]:
        return self.parts if self.stream is None else (self.stream, *self.parts)

    @property
    def begin(self) -> tuple[int, int]:
        """What writes before this is in the stream that an SAE explains."""
        return (-1, 0) if self.stream is None else order(self.stream)

    def of_layer(self, layer: int) -> SparseAutoencoder:
        return next(d for d in self.every if d.layer == layer)

    def stands_for(self, layer: int, *sites: str) -> bool:
        """Whether one of them is in the place of a layer's part ("attn", "z", "mlp")."""
        return any(d.layer == layer and d.site_out in sites for d in self.parts)

    @property
    def names(self) -> list[str]:
        """The hook points that they read and write."""
        return [point for d in self.every for point in (d.point, d.out)]


NO_SAES = InSum()


def chosen(model: Model, sources: tuple[str, ...], layer: int) -> Generator[Progress, None, InSum]:
    """Which of a study's SAEs are in the sum of a head of a layer. UserError where none is, and where two have the same names."""
    if not sources:
        raise UserError("no SAE is loaded: z in pane 6 loads one (on the command line: --sae SOURCE)")
    fit, left_out, stream = [], [], None
    for source in sources:
        d = yield from load(model, source)
        try:
            late = order(d) > (layer, 0)
        except UserError as error:
            left_out.append(str(error))
            continue
        if late:
            left_out.append(f"{source} writes {d.out}, after what heads of layer {layer} read")
        else:
            fit.append(d)
    if whole := [d for d in fit if d.site_out.startswith("resid_")]:
        stream = max(whole, key=order)
        inside = [d for d in fit if d is not stream and order(d) <= order(stream)]
        left_out += [f"{d.source} is part of the stream that {stream.source} explains" for d in inside]
        fit = [d for d in fit if d is not stream and d not in inside]
    found = InSum(stream, tuple(fit), tuple(left_out))
    if not found.every:
        fits = f"blocks.{layer - 1}.hook_resid_post" if layer else "blocks.0.hook_resid_pre"
        raise UserError(f"no SAE that is loaded is in the sum of layer {layer}: {'; '.join(left_out)}. Load one that stands before, such as at {fits}")
    layers = {}
    for d in found.every:
        if (other := layers.setdefault(d.layer, d)) is not d:
            raise UserError(f"{other.source} and {d.source} are both of layer {d.layer}, and features are named by layer: keep one of them")
    return found


def checked(runs: Runs, saes: InSum, which: str, always: bool) -> None:
    """UserError where an SAE does not explain the prompt (`always`: also one that has explained another), or a run replaces what a transcoder wrote."""
    if saes.every:
        runs.require_first("an SAE", which)
    for d in saes.every:
        if always or not d.passed:
            check(runs, d)
        sites = ("sae", *CHANGED.get(d.site_out, (d.site_out,)))
        for i in runs.study.interventions if which == "now" and d.point != d.out else ():
            if i.node.layer == d.layer and i.node.site in sites:
                raise UserError(
                    f"{i} changes what {d.source} writes but not what it reads, so its features are no longer what was written: "
                    "look at the clean run, or take the intervention away"
                )


# ------------------------------------------------------------------ what they write


@dataclass
class Wrote:
    """What an SAE wrote in a run: `fixed` [2, seq, d_model] its bias and its error; features that fire, position by position, by `rows_at`."""

    runs: Runs
    which: str
    d: SparseAutoencoder
    acts: dict[str, Tensor]

    @property
    def address(self) -> str:
        return f"L{self.d.layer}.sae."

    @t.no_grad()
    def error(self) -> Tensor:
        """What it does not explain of what is written [seq, d_out]."""
        return self.d.flat(self.acts[self.d.out][0]) - self.d.reconstruct(self.acts[self.d.point][0])

    @t.no_grad()
    def fixed(self) -> tuple[list[str], Tensor]:
        """Names and writes [2, seq, d_model] of what is no feature's: the decoder's bias (with a skip connection, and means taken off), and the error."""
        both = t.stack([self.d.offset(self.acts[self.d.point][0]), self.error()])
        return [f"{self.address}bias", f"{self.address}error"], t.stack([self.to_stream(x) for x in both])

    @t.no_grad()
    def rows_at(self, positions: list[int]) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Of each of some positions the features that fire [n] and what they add to the stream there [n, d_model], some at a time."""
        d, x = self.d, self.acts[self.d.point][0]
        where, index, value = d.active(x)
        scale, ends = d.scale(x), [0, *where.bincount(minlength=len(x)).cumsum(0).tolist()]  # they come in order of position
        for pos in positions:
            gain = scale[pos] if isinstance(scale, Tensor) else scale
            for begin in range(ends[pos], ends[pos + 1], AT_ONCE):
                some = slice(begin, min(begin + AT_ONCE, ends[pos + 1]))
                yield pos, index[some].cpu(), self.to_stream(d.rows(index[some]) * value[some, None] * gain, [pos])

    @t.no_grad()
    def activation(self, index: int) -> Tensor:
        """One feature's activation [seq]."""
        x = self.acts[self.d.point][0]
        return t.cat([self.d.encode(x[piece])[:, index] for piece in self.d.pieces(len(x))])

    def written(self, index: int) -> Tensor:
        """What one feature writes at the SAE's point [seq, d_out], at this run's own scale."""
        return self.activation(index)[:, None] * self.d.rows([index]) * self.d.scale(self.acts[self.d.point][0])

    def kept(self, at: list[int]) -> Tensor:
        """The factor that interventions on attention left of heads' outputs at positions [n, 1]."""
        return t.tensor([[factor(self.runs, self.which, "attn", self.d.layer, p)] for p in at], device=self.runs.model.device)

    def to_stream(self, x: Tensor, at: list[int] | None = None) -> Tensor:
        """What is written at the SAE's point [n, d_out] as what reaches the stream [n, d_model], of all positions (in order) or rows of one; the norm after attention frozen."""
        model, layer = self.runs.model, self.d.layer
        if self.d.site_out != "z":
            return x
        at = list(range(len(x))) if at is None else at
        post = post_norm(model, layer, "attn")
        scale = None if post is None else self.acts[post[1]][:, at]
        z = over_scale(x.reshape(1, len(x), model.info.n_heads, -1), scale)
        return heads_write(model, layer, z)[0] * self.kept(at)

    @t.no_grad()
    def real(self, change: Tensor) -> Tensor:
        """What the stream gains [seq, d_model] by a change at the SAE's point [seq, d_out], a norm after attention computed again."""
        model, layer = self.runs.model, self.d.layer
        if self.d.site_out != "z" or post_norm(model, layer, "attn") is None:
            return self.to_stream(change)
        z = self.acts[f"blocks.{layer}.attn.hook_z"]
        moved = attention_out(model, layer, z + change.view(z.shape).to(z)) - attention_out(model, layer, z)
        return moved[0] * self.kept(list(range(len(change))))
