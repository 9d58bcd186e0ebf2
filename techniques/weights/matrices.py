"""The matrices of a head as its model uses them: norms as linear maps, token vectors, queries, keys, values; held against the model's own forward pass."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch as t
from torch import Tensor

from vocabulary.nodes import UserError
from model.bridge import Model
from model.memory import is_out_of_memory
from model.writes import embedding, linear_norm, multiplier, output_matrix, post_norm, pre_norm

CHUNK_BYTES = 64 << 20


# ------------------------------------------------------------------ norms


@dataclass
class Gain:
    """A norm as the linear map it is at a fixed scale: gain, bias, and whether it takes the mean away. Without a norm in that place: nothing."""

    weight: Tensor | float
    bias: Tensor | float
    centred: bool
    eps: float | None

    def scale(self, x: Tensor) -> Tensor:
        """[..., d_model] with the mean gone and the scale recomputed from x; no gain."""
        if self.eps is None:
            return x
        x = self.centre(x)
        return x * (x.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()

    def __call__(self, x: Tensor) -> Tensor:
        return self.scale(x) * self.weight + self.bias

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def fold(self, w: Tensor) -> Tensor:
        """A matrix [..., d_model, n] that reads through the norm, as one that reads the stream itself (at a fixed scale)."""
        w = w * (self.weight[:, None] if isinstance(self.weight, Tensor) else self.weight)
        return self.centre(w.mT).mT

    def fold_written(self, w: Tensor) -> Tensor:
        """A matrix [..., n, d_model] that writes into the norm, as it comes out (at a fixed scale)."""
        return self.centre(w) * self.weight


NOTHING = Gain(1.0, 0.0, False, None)


def read_gain(model: Model, found: tuple[t.nn.Module, str] | None) -> Gain:
    """The numbers of a norm (and its name), held against its own forward pass; NOTHING where there is none."""
    if found is None:
        return NOTHING
    module, device = found[0].original_component, model.final_device
    weight = getattr(module, "weight", None)
    refusal = UserError(f"{model.info.architecture}: {found[1]} is a {type(module).__name__}, a norm whose gain Loupe can't fold")
    if isinstance(module, t.nn.ModuleList) or any(module.children()) or weight is not None and weight.ndim != 1:
        raise refusal
    linear = linear_norm(model, found[0])
    gain, bias = (x if x is None else x.to(device) for x in (linear.gain, linear.bias))
    gain = Gain(1.0 if gain is None else gain, 0.0 if bias is None else bias, linear.centred, linear.eps)
    width = model.info.d_model if weight is None else len(weight)
    x = t.randn(4, width, generator=t.Generator().manual_seed(0)).to(device, model.dtype)
    with t.no_grad():
        want = module(x if weight is None else x.to(weight.device)).to(device)
    if not model.identity(found[1], gain(x.float()), want).ok:
        raise refusal
    return gain


def final_gain(model: Model) -> Gain:
    """The numbers of the final norm."""
    return read_gain(model, (model.bridge.ln_final, "ln_final"))


# ------------------------------------------------------------------ token vectors and heads


class Tokens:
    """The vectors of tokens as they enter block 0, without position; with `mlp0`, plus what MLP 0 makes of them. Tokens the tokenizer knows, no special ones."""

    def __init__(self, model: Model, mlp0: bool = False):
        model.require("one vocabulary")
        self.model, self.mlp0 = model, mlp0
        special = set(model.tokenizer.all_special_ids)
        self.ids = t.tensor([i for i in range(min(model.n_embed, model.info.d_vocab, len(model.tokenizer))) if i not in special])
        self.n = len(self.ids)
        self.block = model.bridge.blocks[0]
        if mlp0 and "mlp" not in self.block._modules:
            raise UserError(f"{model.info.architecture} has no MLP 0: turn mlp0 off")
        self.multiplier = embedding(model)[1]

    @t.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        x = self.model.bridge.embed(ids.to(self.model.device))
        return self.model.bridge.embed_ln(x) if "embed_ln" in self.model.bridge._modules else x

    @t.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """fp32 [..., d_model]."""
        x = self.embed(ids) * self.multiplier
        if self.mlp0:
            x = x + self.mlp(x if x.ndim == 3 else x[None]).view_as(x)
        return x.float().to(self.model.final_device)

    def mlp(self, x: Tensor) -> Tensor:
        b, before, after = self.block, *(near(self.model, 0, "mlp") for near in (pre_norm, post_norm))
        try:
            out = b.mlp(x if before is None else before[0](x))
        except (TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"MLP 0 of {self.model.info.architecture} does not run on its own: turn mlp0 off") from error
        out = out[0] if isinstance(out, tuple) else out
        return (out if after is None else after[0](out)) * multiplier(self.model, 0)

    def chunks(self) -> Iterator[tuple[int, int]]:
        size = max(1, CHUNK_BYTES // (4 * self.model.info.d_model * (1 + 4 * self.mlp0)))
        for start in range(0, self.n, size):
            yield start, min(start + size, self.n)

    def vectors(self, start: int, stop: int) -> Tensor:
        return self(self.ids[start:stop])

    def unembed(self, start: int, stop: int) -> Tensor:
        """fp32 [d_model, token]."""
        table = self.model.bridge.W_U
        return table[:, self.ids[start:stop].to(table.device)].to(self.model.final_device).float() * self.model.logit_scale


class Layer:
    """The matrices of one layer's heads, fp32: W_Q [head, d_model, d_head], W_K and W_V [kv head, ...], W_O [head, d_head, d_model]; its norms."""

    def __init__(self, model: Model, layer: int):
        if not 0 <= layer < model.info.n_layers:
            raise UserError(f"there is no layer {layer}: the model has layers 0 to {model.info.n_layers - 1}")
        self.model, self.index, self.block = model, layer, model.bridge.blocks[layer]
        attn = self.attn = self.block._modules.get("attn")
        phase = getattr(attn, "_qk_norm_phase", None)
        if attn is None or phase not in (None, "post_reshape"):
            why = "has no attention" if attn is None else "normalises queries over all heads at once, so that no head has a QK circuit of its own"
            raise UserError(f"layer {layer} of {model.info.architecture} {why}")
        try:
            self.q, self.k, self.v = (self.fp32(getattr(attn, n)) for n in ("W_Q", "W_K", "W_V"))
            self.o = self.fp32(output_matrix(model, layer, "attn"))
            self.b_q, self.b_k, self.b_v = (self.fp32(getattr(attn, n)) for n in ("b_Q", "b_K", "b_V"))
        except (AttributeError, RuntimeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"layer {layer} of {model.info.architecture}: its attention can't be read as one matrix a head ({error})") from error
        i = model.info
        if not (self.q.ndim == self.k.ndim == 3 and self.q.shape == (i.n_heads, i.d_model, i.d_head) and self.o.shape == (i.n_heads, i.d_head, i.d_model)):
            raise UserError(f"layer {layer} of {i.architecture}: W_Q of shape {tuple(self.q.shape)} is not one matrix a head")
        self.norm, self.post = (read_gain(model, near(model, layer, "attn")) for near in (pre_norm, post_norm))
        self.q_norm, self.k_norm = ((read_gain(model, (attn._modules[n], n)) if phase and n in attn._modules else NOTHING) for n in ("q_norm", "k_norm"))
        self.groups = t.arange(i.n_heads) // (i.n_heads // len(self.k))
        inner = attn.original_component
        self.scaling = float(getattr(inner, "scaling", None) or i.d_head**-0.5)
        self.cap = float(getattr(inner, "attn_logit_softcapping", None) or 0)
        self.window = getattr(inner, "sliding_window", None) or 0

    def fp32(self, w: Tensor | None) -> Tensor | None:
        return None if w is None else w.detach().to(self.model.final_device).float()

    @cached_property
    def folded(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q, K, V [head, d_model, d_head] and O [head, d_head, d_model] between streams: norm gains in them, centred where the norm centres."""
        q, k = self.norm.fold(self.q) * self.q_norm.weight, self.norm.fold(self.k) * self.k_norm.weight
        return q, k[self.groups], self.norm.fold(self.v)[self.groups], self.norm.centre(self.o * self.post.weight)

    def says(self) -> str:
        i, factor = self.model.info, multiplier(self.model, self.index)
        gain = f"{'LayerNorm' if self.norm.centred else 'RMSNorm'} gains folded on the fly{' and means taken away' if self.norm.centred else ''}"
        parts = ["raw Hugging Face weights in fp32", "no norm" if self.norm is NOTHING else gain]
        parts += ["gain of the norm after attention folded into what heads write"] * (self.post is not NOTHING)
        parts += [f"times the residual multiplier {factor:g}"] * (factor != 1)
        parts += ["gains of the query and key norms folded"] * (self.q_norm is not NOTHING)
        parts += [f"{i.n_heads // len(self.k)} heads share a key/value head: key/value head = head // {i.n_heads // len(self.k)}"] * (len(self.k) < i.n_heads)
        return ", ".join(parts)


class Head:
    """One head: queries, keys and values of token vectors, just as the model makes them."""

    def __init__(self, model: Model, layer: int, head: int):
        self.layer, self.model = Layer(model, layer), model
        if not 0 <= head < model.info.n_heads:
            raise UserError(f"there is no head {head}: layer {layer} has heads 0 to {model.info.n_heads - 1}")
        self.index, self.kv = head, int(self.layer.groups[head])
        self.rotation: list[tuple[Tensor, Tensor]] = []
        self.adjacent = False

    def project(self, w: Tensor, b: Tensor | None, i: int, x: Tensor) -> Tensor:
        return self.layer.norm(x) @ w[i] + (0 if b is None else b[i])

    def queries(self, x: Tensor) -> Tensor:
        """At the destination's position, the scale of scores included."""
        q = self.layer.q_norm(self.project(self.layer.q, self.layer.b_q, self.index, x))
        return self.rotate(q, -1) * self.layer.scaling

    def keys(self, x: Tensor) -> Tensor:
        return self.rotate(self.layer.k_norm(self.project(self.layer.k, self.layer.b_k, self.kv, x)), 0)

    def values(self, x: Tensor) -> Tensor:
        return self.project(self.layer.v, self.layer.b_v, self.kv, x)

    def rotate(self, x: Tensor, end: int) -> Tensor:
        """Rotary positions: the source stands at position 0, the destination `distance` further. What cos does not cover passes through."""
        if not self.rotation:
            return x
        cos, sin = self.rotation[end]
        turned, rest = x[..., : len(cos)], x[..., len(cos) :]
        if self.adjacent:
            cos, sin = (c[: len(c) // 2].repeat_interleave(2) for c in (cos, sin))
            other = t.stack([-turned[..., 1::2], turned[..., ::2]], -1).flatten(-2)
        else:
            one, two = turned.chunk(2, -1)
            other = t.cat([-two, one], -1)
        return t.cat([turned * cos + other * sin, rest], -1)

    def check(self, tokens: Tokens, distance: int) -> float:
        """
        The model's own code on the bare token vectors: scores of a pair `distance` apart and the value of a token must be what this class makes.
        The same run gives the rotation. Returns the largest difference; an architecture of another kind is refused.
        """
        model, layer = self.model, self.layer.index
        if not model.causal:
            raise UserError(
                f"{model.info.architecture} looks ahead, so that no token is read alone: what its heads' weights say can't be held against the model"
            )
        if not 0 <= distance < model.info.n_ctx:
            raise UserError(f"distance {distance}: give 0 to {model.info.n_ctx - 1}, destination minus source position")
        last = max(distance, 1)
        ids = model.random_ids(last + 1, 2, seed=1)
        x = tokens(ids)
        edits = [(f"blocks.{layer}.hook_resid_pre", lambda y: x.to(y.device, y.dtype))]
        if tokens.mlp0:
            bare = tokens.embed(ids) * tokens.multiplier
            edits += [("blocks.0.hook_resid_pre", lambda y: bare.to(y.device, y.dtype)), ("blocks.0.hook_attn_out", t.zeros_like)]
        at, mlp_name = f"blocks.{layer}.attn", "blocks.0.hook_resid_post"
        names = [f"{at}.{n}" for n in ("hook_attn_scores", "hook_pattern", "hook_z", "hook_cos", "hook_sin") if f"{at}.{n}" in model.points]
        _, got = model.forward(ids, names + [mlp_name] * tokens.mlp0, edits)
        got = {n.removeprefix(f"{at}."): v.float().to(model.final_device) for n, v in got.items()}
        error = self.compare(self.values(x[:, 0]), got["hook_z"][:, 0, self.index], "values")
        if tokens.mlp0:
            error = max(error, self.compare(x, got[mlp_name], "embedding plus MLP 0"))
        if "hook_cos" in got:
            self.rotation = [(got["hook_cos"].view(last + 1, -1)[i], got["hook_sin"].view(last + 1, -1)[i]) for i in (0, distance)]
        scores, pattern = (got[n][:, self.index, last] for n in ("hook_attn_scores", "hook_pattern"))
        want, source = scores[:, last - distance], last - distance
        if (want < -1e30).any():  # outside the sliding window
            return error
        plain = not t.equal(scores, pattern)  # else the hook of the scores holds the pattern, whose log is the scores but for a constant
        if not plain:
            want = pattern[:, 0].log() - pattern[:, last].log()
        first, scale = None, self.layer.scaling
        for self.layer.scaling, self.adjacent in ((scale, False), (scale, True), (1.0, False)):
            q = self.queries(x[:, last])
            score = (q * self.keys(x[:, source])).sum(-1) if plain else (q * (self.keys(x[:, 0]) - self.keys(x[:, last]))).sum(-1)
            capped = self.layer.cap * t.tanh(score / self.layer.cap) if self.layer.cap else score
            for mine in (score, capped):
                pair = (mine - mine[0], want - want[0]) if model.info.positions == "alibi" else (mine, want)
                first = pair if first is None else first
                if model.identity("scores", *pair).ok:
                    return max(error, self.compare(*pair, "attention scores"))
        return self.compare(*first, "attention scores")

    def compare(self, got: Tensor, want: Tensor, what: str) -> float:
        row = self.model.identity(what, got, want)
        if not row.ok:
            raise UserError(f"{self.model.info.architecture}: {what} made from the weights are {row.error:.2g} off the model's own, so they are not shown")
        return row.error

    @property
    def o(self) -> Tensor:
        """[d_head, d_model], what reaches the stream (at a fixed scale)."""
        return self.layer.o[self.index] * self.layer.post.weight

    def written(self) -> Tensor:
        """[d_head, d_model] with the final norm's gain, its mean taken away: times W_U it is logits, at a fixed final scale."""
        return final_gain(self.model).fold_written(self.o)
