"""
What heads and MLPs write into the residual stream, and norms with their scale frozen. Here alone is known what a family puts between a part's output matrix
(W_O, W_out) and the stream: a norm after it in some (Gemma 2 and 3, OLMo 2), `ln1_post` after attention and `ln2_post` after the MLP. What else a family
puts there (Granite's residual multiplier) goes into `through_post`, `change_of_head` and `inner_direction`.
"""

import torch as t
from torch import Tensor

from model.bridge import Model

SCALE = "ln_final.hook_scale"
POST = {"attn": "ln1_post", "mlp": "ln2_post"}


# ------------------------------------------------------------------ a frozen norm


def gain(model: Model, norm: t.nn.Module, dtype: t.dtype | None = None) -> Tensor | None:
    """What a norm multiplies by [d_model], as `dtype`; None where it has no weight. Gemma's weights are offsets from one."""
    weight = getattr(norm.original_component, "weight", None)
    if weight is None:
        return None
    weight = weight if dtype is None else weight.to(dtype)
    return weight + 1 if getattr(model.cfg, "rmsnorm_uses_offset", False) else weight


def frozen_norm(model: Model, norm: t.nn.Module, scale: Tensor | float, x: Tensor) -> Tensor:
    """A norm of x [..., d_model] as the linear map it is with its scale frozen, without its bias. LayerNorm takes the mean off first."""
    weight = gain(model, norm, x.dtype)
    x = x if norm.uses_rms_norm else x - x.mean(-1, keepdim=True)
    return (x / scale if weight is None else x / scale * weight).to(x.dtype)


def pull_back(model: Model, norm: t.nn.Module, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction [batch, d_model] behind a norm as one in front of it, at a frozen scale [batch, 1]; and what the norm's bias adds [batch]."""
    u, weight, bias = u.to(scale.device), gain(model, norm, t.float32), getattr(norm.original_component, "bias", None)
    constant = t.zeros(len(u), dtype=t.float64) if bias is None else dot(u, bias.float())
    u = u if weight is None else u * weight
    u = u if norm.uses_rms_norm else u - u.mean(-1, keepdim=True)
    return u / scale.float(), constant


def dot(x: Tensor, d: Tensor) -> Tensor:
    """Row by row, products in fp32 and their sum in float64."""
    return (x.float() * d.to(x.device)).cpu().double().sum(-1)


# ------------------------------------------------------------------ from an output matrix into the stream


def post_norm(model: Model, layer: int, part: str) -> tuple[t.nn.Module, str] | None:
    """The norm between a part of the block ("attn" or "mlp") and the residual stream, and its scale's hook; None where there is none (most models)."""
    block, name = model.bridge.blocks[layer], POST[part]
    return (getattr(block, name), f"blocks.{layer}.{name}.hook_scale") if hasattr(block, name) else None


def post_scales(model: Model, *parts: str) -> list[str]:
    """The hooks of the scales of all norms behind some parts, by layer."""
    return [post[1] for layer in range(model.info.n_layers) for part in parts if (post := post_norm(model, layer, part))]


def through_post(model: Model, layer: int, part: str, x: Tensor, scale: Tensor | float | None) -> Tensor:
    """What of a part's output [..., d_model] reaches the stream, biases left out: the norm after it frozen at its scale."""
    post = post_norm(model, layer, part)
    return x if post is None else frozen_norm(model, post[0], scale, x)


def adds(model: Model, layer: int, part: str, x: Tensor, scale: Tensor | None) -> Tensor:
    """What heads' z side by side, or neurons, [n, ..., width] add to the stream [n, ..., d_model], without biases; the scale of a norm after them frozen."""
    block = model.bridge.blocks[layer]
    out = block.attn.o if part == "attn" else block.mlp.out
    return through_post(model, layer, part, out(x) - out(t.zeros_like(x[:1])), scale)


def attention_out(model: Model, layer: int, z: Tensor) -> Tensor:
    """Attention's output [..., d_model] of heads' z [..., head, d_head], with b_O and whatever norm is after it."""
    post, out = post_norm(model, layer, "attn"), model.bridge.blocks[layer].attn.o(z.flatten(-2))
    return out if post is None else post[0](out)


def change_of_head(model: Model, layer: int, head: int, own: Tensor, new: Tensor) -> Tensor:
    """What the stream gains [prompt, seq, d_model] when one head has a new z [prompt, seq, head, d_head]; a norm after attention is computed again."""
    if post_norm(model, layer, "attn") is None:
        alone = t.zeros_like(own)
        alone[:, :, head] = new[:, :, head] - own[:, :, head]
        o = model.bridge.blocks[layer].attn.o
        return o(alone.flatten(2)) - o(t.zeros_like(alone[:1, :1]).flatten(2))
    alone = own.clone()
    alone[:, :, head] = new[:, :, head]
    return attention_out(model, layer, alone) - attention_out(model, layer, own)


# ------------------------------------------------------------------ many heads apart, in fp32


def over_scale(z: Tensor, scale: Tensor | None) -> Tensor:
    """z [..., head, d_head] over the scale [..., 1] of the norm after attention: what heads write is linear in it."""
    return z.float() if scale is None else z.float() / scale.float()[..., None]


def head_writes(model: Model, layer: int, z: Tensor, some: list[int] | slice = slice(None)) -> Tensor:
    """What each of some heads adds [head, prompt, seq, d_model], of `over_scale` z [prompt, seq, head, d_head]."""
    w = model.bridge.blocks[layer].attn.W_O[some].to(z.device)
    return through_post(model, layer, "attn", t.einsum("bshe,hed->hbsd", z[:, :, some].to(w), w), 1.0)


def heads_write(model: Model, layer: int, z: Tensor) -> Tensor:
    """What all heads add together [prompt, seq, d_model], of `over_scale` z."""
    w = model.bridge.blocks[layer].attn.W_O
    return through_post(model, layer, "attn", t.einsum("bshe,hed->bsd", z.to(w), w), 1.0)


def bias_write(model: Model, layer: int, scale: Tensor | None) -> Tensor | float:
    """What attention adds that is no head's: its output bias through the frozen norm after it, and that norm's bias."""
    out, post = getattr(model.bridge.blocks[layer].attn, "b_O", None), post_norm(model, layer, "attn")
    x = 0.0 if out is None else through_post(model, layer, "attn", out.float(), None if scale is None else scale.float())
    after = None if post is None else getattr(post[0], "bias", None)
    return x if after is None else x + after.float()


# ------------------------------------------------------------------ from the stream back to heads


def inner_direction(model: Model, layer: int, part: str, acts: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of the stream [batch, d_model] at the output of W_O or W_out, in front of a norm that follows it; and that norm's constant."""
    post = post_norm(model, layer, part)
    return (u, t.zeros(len(u), dtype=t.float64)) if post is None else pull_back(model, post[0], acts[post[1]], u)


def to_heads(model: Model, layer: int, acts: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of the stream [batch, d_model] at every head's z [batch, head, d_head]; and what attention's biases add along it [batch]."""
    attn = model.bridge.blocks[layer].attn
    inner, constant = inner_direction(model, layer, "attn", acts, u)
    inner = inner.to(attn.W_O.device)
    if attn.b_O is not None:
        constant = constant + dot(inner, attn.b_O.float().expand_as(inner))
    return t.einsum("hem,bm->bhe", attn.W_O.float(), inner), constant
