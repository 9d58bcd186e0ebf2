"""What wrote into a head's queries and keys: the residual stream's terms, each through the frozen norm before attention and the head's matrix."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.bridge import Model
from model.runs import Runs
from model.writes import POSITION, bias_write, embedding, frozen_norm, head_writes, linear_norm, over_scale, post_norm, post_scales, pre_norm, require_parts
from techniques.attribution.logits import factor
from techniques.qk.dictionaries import InSum, Wrote
from techniques.qk.requests import BIAS
from techniques.qk.scores import Form
from vocabulary.nodes import UserError


def names(model: Model, layer: int, saes: InSum) -> list[str]:
    """The hook points that are read: what wrote before a layer, its queries and keys."""
    before, (first, _) = pre_norm(model, layer, "attn"), saes.begin
    out = [*saes.names, *([before[1]] if before else [])]
    out += [f"blocks.{layer}.attn.hook_{x}" for x in ("q", "k")]
    out += [embedding(model)[0], *[POSITION] * (POSITION in model.points)] if saes.stream is None else []
    for n in range(max(first, 0), layer):
        out += [f"blocks.{n}.attn.hook_z", f"blocks.{n}.hook_mlp_out"]
    below = {f"blocks.{n}." for n in range(max(first, 0), layer)}
    return list(dict.fromkeys([*out, *(s for s in post_scales(model, "attn") if s[: s.index(".", 7) + 1] in below)]))


def written(runs: Runs, which: str, layer: int, acts: dict[str, Tensor], saes: InSum) -> Iterator[tuple[list[str], Tensor]]:
    """Names and what they added to the stream before a layer [name, seq, d_model], a few at a time; without what SAEs stand for."""
    model = runs.model
    if saes.stream is None:
        name, times = embedding(model)
        yield ["embed"], acts[name] * times
        if POSITION in acts:
            yield ["position"], acts[POSITION].expand_as(acts[name])
    for n in range(max(saes.begin[0], 0), layer):
        post = post_norm(model, n, "attn")
        scale = None if post is None else acts[post[1]]
        if (n, 1) > saes.begin and not saes.stands_for(n, "attn"):
            keep = t.tensor([[factor(runs, which, "attn", n, p)] for p in range(len(runs.row(which).ids))], device=model.device)
            if not saes.stands_for(n, "z"):
                yield [f"L{n}H{h}" for h in range(model.info.n_heads)], head_writes(model, n, over_scale(acts[f"blocks.{n}.attn.hook_z"], scale))[:, 0] * keep
            bias = bias_write(model, n, scale)
            if isinstance(bias, Tensor) and bias.any():
                yield [f"L{n}.bias"], bias.expand(1, len(keep), -1) * keep
        if (n, 3) > saes.begin and not saes.stands_for(n, "mlp"):
            yield [f"L{n}.mlp"], acts[f"blocks.{n}.hook_mlp_out"]


class Reader:
    """How a head's queries ("q") or keys ("k") read the stream: the norm before attention, frozen, then the head's matrix."""

    def __init__(self, model: Model, layer: int, part: str, head: int, acts: dict[str, Tensor]):
        require_parts(model)
        self.model, self.norm, self.acts = model, pre_norm(model, layer, "attn"), acts
        try:
            attention = model.bridge.blocks[layer].attn
            w, b = (getattr(attention, f"{x}_{part.upper()}") for x in "Wb")
        except (AttributeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{model.info.architecture}: layer {layer} has no matrix for each head's {WORDS[part]}, so what wrote into them can't be told apart"
            ) from error
        self.weight, self.bias = w[head].float(), None if b is None else b[head].float()
        if self.weight.shape != (model.info.d_model, acts[f"blocks.{layer}.attn.hook_{part}"].shape[-1]):
            raise UserError(
                f"{model.info.architecture}: layer {layer} has no matrix for each head's {WORDS[part]}, so what wrote into them can't be told apart"
            )

    def __call__(self, x: Tensor, at: int | slice = slice(None)) -> Tensor:
        """What parts of the stream [..., seq, d_model], or of one position [..., d_model], add to the head's queries or keys [..., seq, d_head], float64."""
        x = x.float()
        if self.norm is not None:
            scale = self.acts[self.norm[1]][0, at].float()
            x = frozen_norm(self.model, self.norm[0], scale, x.to(scale.device))
        return (x.to(self.weight.device) @ self.weight).cpu().double()

    def real(self, x: Tensor) -> Tensor:
        """Those of a whole stream [..., seq, d_model], the norm computed again."""
        x = x if self.norm is None else self.norm[0](x)
        out = x.float().to(self.weight.device) @ self.weight
        return out if self.bias is None else out + self.bias

    def constant(self) -> Tensor:
        """What is there without any stream [d_head]: the norm's bias through the matrix, and its own."""
        norm = None if self.norm is None else linear_norm(self.model, self.norm[0]).bias
        out = t.zeros(self.weight.shape[1], device=self.weight.device)
        out = out if norm is None else out + norm.to(out.device) @ self.weight
        return (out if self.bias is None else out + self.bias).cpu().double()


WORDS = {"q": "queries", "k": "keys"}


# ------------------------------------------------------------------ all of them


@dataclass
class Sides:
    """
    A score as the sum of all products of a query row and a key row, float64: names, and vectors [name, d_head + 1]. A key's is what a query is multiplied
    by, its form and source's weight inside; the last number is for the row `bias`, which stands for what is there without any stream.
    """

    queries: list[str]
    keys: list[str]
    query: Tensor
    key: Tensor

    @property
    def values(self) -> Tensor:
        """[query, key]"""
        return self.query @ self.key.T

    @property
    def total(self) -> float:
        return float(self.query.sum(0) @ self.key.sum(0))


class Sums:
    """What each name adds to a query and, through the form, to the keys at all sources; and the sums of these, without the form."""

    def __init__(self, readers: dict[str, Reader], form: Form, dest: int):
        self.readers, self.form, self.dest = readers, form, dest
        self.whole = {"q": t.zeros_like(form.query), "k": t.zeros_like(form.key)}
        self.found: dict[str, dict[str, Tensor]] = {"q": {}, "k": {}}

    def put(self, side: str, names: list[str], rows: Tensor) -> None:
        """Rows [name, d_head + 1] of a side; of a name that is there already, more."""
        have = self.found[side]
        for name, row in zip(names, rows):
            have[name] = have[name] + row if name in have else row

    def add(self, names: list[str], q: Tensor, k: Tensor) -> None:
        """Queries at the destination [name, d_head] and keys [name, seq, d_head]."""
        self.whole["q"] += q.sum(0)
        self.whole["k"] += k.sum(0)
        self.put("q", names, t.cat([q, t.zeros(len(q), 1, dtype=q.dtype)], 1))
        self.put("k", names, self.form.turned(k))

    def add_writes(self, names: list[str], x: Tensor) -> None:
        """What names added to the stream [name, seq, d_model]."""
        self.add(names, self.readers["q"](x[:, self.dest], self.dest), self.readers["k"](x))

    def add_features(self, wrote: Wrote) -> None:
        """The features of an SAE that fire at the destination (query) and at any source that the score reads (keys)."""
        name = lambda index: [f"{wrote.address}f{i}" for i in index.tolist()]  # noqa: E731
        for pos, index, x in wrote.rows_at([self.dest]):
            q = self.readers["q"](x, pos)
            self.whole["q"] += q.sum(0)
            self.put("q", name(index), t.cat([q, t.zeros(len(q), 1, dtype=q.dtype)], 1))
        for pos, index, x in wrote.rows_at(self.form.read):
            k = self.readers["k"](x, pos)
            self.whole["k"][pos] += k.sum(0)
            self.put("k", name(index), self.form.turned_at(k, pos))

    def add_constants(self) -> None:
        """The row `bias`: what is there without any stream, and what is linear in queries or keys alone."""
        self.add([BIAS], self.readers["q"].constant()[None], self.readers["k"].constant().expand(1, *self.form.key.shape))
        self.found["q"][BIAS][-1] = 1
        self.found["k"][BIAS][:-1] += self.form.query
        self.found["k"][BIAS][-1] += self.form.rest

    def sides(self) -> Sides:
        return Sides(*(list(self.found[s]) for s in "qk"), *(t.stack(list(self.found[s].values())) for s in "qk"))


@t.no_grad()
def summed(runs: Runs, which: str, layer: int, readers: dict[str, Reader], acts: dict[str, Tensor], form: Form, dest: int, saes: InSum) -> Sums:
    """Sums of everything that wrote before a layer, and of what is there without a stream."""
    out = Sums(readers, form, dest)
    for d in saes.every:
        wrote = Wrote(runs, which, d, acts)
        out.add_features(wrote)
        out.add_writes(*wrote.fixed())
    for some, x in written(runs, which, layer, acts, saes):
        out.add_writes(some, x)
    out.add_constants()
    return out
