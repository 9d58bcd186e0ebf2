"""
What heads and MLPs write into the residual stream, and norms with their scale frozen. Here alone is known what a family puts between a part's output matrix
(W_O, W_out) and the stream: a norm after it (Gemma 2 and 3, OLMo 2, ...), and a multiplier (Granite). Whatever else there is makes `unproven` say so.
"""

import copy
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.bridge import FINAL, TOLERANCE, Model
from vocabulary.nodes import UserError

SCALE = "ln_final.hook_scale"
POSITION = "pos_embed.hook_out"  # hook_pos_embed is there without position embeddings too, and silent
LOUD, QUIET = 64.0, 2.0**-9  # sizes of the inputs that a norm is read with: its epsilon is nothing beside the first, and as large as the second


# ------------------------------------------------------------------ a frozen norm


@dataclass(frozen=True)
class LinearNorm:
    """A norm as the linear map it is at a fixed scale, float32: its gain and bias [d_model] (None: one, nothing), whether it takes the mean off first; its epsilon (None: no scale)."""

    gain: Tensor | None
    bias: Tensor | None
    centred: bool
    eps: float | None


@t.no_grad()
def linear_norm(model: Model, norm: t.nn.Module) -> LinearNorm:
    """A norm's numbers, read by running a float32 copy of it: classes store the gain as w, as w - 1, or not at all. Read once for each norm."""
    known = model.notes.measured
    if isinstance(norm.original_component, t.nn.Identity):  # no norm: the scale that stands in for its own is one
        return LinearNorm(None, None, False, None)
    if norm not in known:
        run = copy.deepcopy(norm.original_component).float()
        weight = getattr(run, "weight", None)
        x = t.ones(model.info.d_model if weight is None else weight.shape[-1], device=model.final_device if weight is None else weight.device)
        x[::2] = -1
        x[1] -= len(x) % 2  # the mean of x is zero, and no element
        up, down, moved, quiet, still = run(t.stack([LOUD * x, -LOUD * x, LOUD * (x + 1), QUIET * x, 0 * x]))
        size, loud = x.square().mean(), (up - down).abs().max()
        gain, bias = (up - down) / 2 / x * size.sqrt(), (up + down) / 2
        shrunk = (quiet - still).norm() / (up - still).norm()
        known[norm] = LinearNorm(
            None if (gain - 1).abs().max() < 1e-6 else gain,
            None if getattr(run, "bias", None) is None and bias.abs().max() <= 1e-6 * loud else bias,
            bool((moved - up).abs().max() <= 1e-3 * loud),
            max(0.0, (size * QUIET**2 * (shrunk**-2 - 1)).item()),
        )
    return known[norm]


def frozen_norm(model: Model, norm: t.nn.Module, scale: Tensor | float, x: Tensor) -> Tensor:
    """A norm of x [..., d_model] as the linear map it is with its scale frozen, without its bias. LayerNorm takes the mean off first."""
    linear = linear_norm(model, norm)
    out = (x - x.mean(-1, keepdim=True) if linear.centred else x) / scale
    return (out if linear.gain is None else out * linear.gain.to(x.device, x.dtype)).to(x.dtype)


def pull_back(model: Model, norm: t.nn.Module, scale: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction [batch, d_model] behind a norm as one in front of it, at a frozen scale [batch, 1]; and what the norm's bias adds [batch]."""
    linear, u = linear_norm(model, norm), u.to(scale.device)
    constant = t.zeros(len(u), dtype=t.float64) if linear.bias is None else dot(u, linear.bias)
    u = u if linear.gain is None else u * linear.gain.to(u.device)
    u = u - u.mean(-1, keepdim=True) if linear.centred else u
    return u / scale.float(), constant


def dot(x: Tensor, d: Tensor) -> Tensor:
    """Row by row, products in fp32 and their sum in float64."""
    return (x.float() * d.to(x.device)).cpu().double().sum(-1)


# ------------------------------------------------------------------ into the stream


def post_norm(model: Model, layer: int, part: str) -> tuple[t.nn.Module, str] | None:
    """The norm between a part of the block ("attn" or "mlp") and the residual stream, and its scale's hook; None where there is none (most models)."""
    block, out = model.bridge.blocks[layer], model.points.get(f"blocks.{layer}.hook_{part}_out")
    for name in ("ln1_post", "ln2_post", "ln1", "ln2"):  # OLMo 2 has its only norms there, as ln1 and ln2
        norm = block._modules.get(name)
        if norm is not None and out is getattr(norm, "hook_out", norm):
            return norm, f"blocks.{layer}.{name}.hook_scale"
    return None


def pre_norm(model: Model, layer: int, part: str) -> tuple[t.nn.Module, str] | None:
    """The norm between the stream and what a part of the block ("attn" or "mlp") reads, and its scale's hook; None where there is none (OLMo 2)."""
    block, after = model.bridge.blocks[layer], [post[0] for p in ("attn", "mlp") if (post := post_norm(model, layer, p))]
    for name in ("ln1",) if part == "attn" else ("ln2", "ln1") if model.parallel else ("ln2",):
        if (norm := block._modules.get(name)) is not None and norm not in after:
            return norm, f"blocks.{layer}.{name}.hook_scale"
    return None


def multiplier(model: Model, layer: int) -> float:
    """What a block multiplies both parts' outputs by on their way into the stream (Granite); 1 in most models."""
    return getattr(model.bridge.blocks[layer], "residual_contribution_scale", 1.0)


def post_scales(model: Model, *parts: str) -> list[str]:
    """The hooks of the scales of all norms behind some parts, by layer."""
    return [post[1] for layer in range(model.info.n_layers) for part in parts if (post := post_norm(model, layer, part))]


@t.no_grad()
def embedding(model: Model) -> tuple[str, float]:
    """The hook of the token embeddings, and what they are multiplied by behind it on their way into the stream (Granite); measured on a run, once."""
    known = model.notes.measured
    if "embedding" not in known:
        name, first = "embed_ln.hook_out" if "embed_ln.hook_out" in model.points else "hook_embed", "blocks.0.hook_resid_pre"
        _, got = model.forward(model.random_ids(2), [name, first, *[POSITION] * (POSITION in model.points)])
        x, want = got[name].float(), got[first].float() - (got[POSITION].float() if POSITION in got else 0)
        factor = ((x * want.to(x.device)).sum() / x.square().sum()).item()
        if not model.identity("embedding", x * factor, want).ok:
            raise UserError(
                f"{model.info.architecture}: tokens enter the first block as more than their embedding and position, so that neither can be read apart"
            )
        known["embedding"] = name, 1.0 if abs(factor - 1) < 1e-3 else factor
    return known["embedding"]


def output_matrix(model: Model, layer: int, part: str) -> Tensor:
    """float32 W_O [head, d_head, d_model] or W_out [d_mlp, d_model] with the block's multiplier: what reaches the stream, or the norm in front of it."""
    block = model.bridge.blocks[layer]
    return (block.attn.W_O if part == "attn" else block.mlp.W_out).float() * multiplier(model, layer)


def through_post(model: Model, layer: int, part: str, x: Tensor, scale: Tensor | float | None) -> Tensor:
    """What of a part's output [..., d_model] reaches the stream, biases left out: the norm after it frozen at its scale, then the multiplier."""
    post, factor = post_norm(model, layer, part), multiplier(model, layer)
    x = x if post is None else frozen_norm(model, post[0], scale, x)
    return x if factor == 1 else x * factor


def adds(model: Model, layer: int, part: str, x: Tensor, scale: Tensor | None) -> Tensor:
    """What heads' z side by side, or neurons, [n, ..., width] add to the stream [n, ..., d_model], without biases; the scale of a norm after them frozen."""
    out = output_module(model, layer, part)
    return through_post(model, layer, part, out(x) - out(t.zeros_like(x[:1])), scale)


def output_module(model: Model, layer: int, part: str) -> t.nn.Module:
    """The Bridge's module of W_O or W_out."""
    block = model.bridge.blocks[layer]
    return block.attn.o if part == "attn" else block.mlp._modules.get("out") or block.mlp.dense_out  # in models that have experts in other layers


def part_out(model: Model, layer: int, part: str, x: Tensor) -> Tensor:
    """What attention or MLP adds to the stream [..., d_model] of heads' z side by side, or neurons, [..., width]: with bias, and norm and multiplier after it."""
    post, out = post_norm(model, layer, part), output_module(model, layer, part)(x)
    return (out if post is None else post[0](out)) * multiplier(model, layer)


def attention_out(model: Model, layer: int, z: Tensor) -> Tensor:
    """What attention adds to the stream [..., d_model] of heads' z [..., head, d_head]."""
    return part_out(model, layer, "attn", z.flatten(-2))


def change_of_head(model: Model, layer: int, head: int, own: Tensor, new: Tensor) -> Tensor:
    """What the stream gains [prompt, seq, d_model] when one head has a new z [prompt, seq, head, d_head]; a norm after attention is computed again."""
    if post_norm(model, layer, "attn") is None:
        alone = t.zeros_like(own)
        alone[:, :, head] = new[:, :, head] - own[:, :, head]
        return adds(model, layer, "attn", alone.flatten(2), None)
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
    after = None if post is None else linear_norm(model, post[0]).bias
    return x if after is None else x + after * multiplier(model, layer)


# ------------------------------------------------------------------ from the stream back to heads


def inner_direction(model: Model, layer: int, part: str, acts: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of the stream [batch, d_model] at the output of W_O or W_out, in front of multiplier and norm; and that norm's constant."""
    post, factor = post_norm(model, layer, part), multiplier(model, layer)
    u = u if factor == 1 else u * factor
    return (u, t.zeros(len(u), dtype=t.float64)) if post is None else pull_back(model, post[0], acts[post[1]], u)


def to_heads(model: Model, layer: int, acts: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of the stream [batch, d_model] at every head's z [batch, head, d_head]; and what attention's biases add along it [batch]."""
    attn = model.bridge.blocks[layer].attn
    inner, constant = inner_direction(model, layer, "attn", acts, u)
    inner = inner.to(attn.W_O.device)
    if attn.b_O is not None:
        constant = constant + dot(inner, attn.b_O.float().expand_as(inner))
    return t.einsum("hem,bm->bhe", attn.W_O.float(), inner), constant


def to_neurons(model: Model, layer: int, acts: dict[str, Tensor], u: Tensor) -> tuple[Tensor, Tensor]:
    """A direction of the stream [batch, d_model] at every neuron [batch, d_mlp]; and what the MLP's output bias and the norm's add along it [batch]."""
    mlp = model.bridge.blocks[layer].mlp
    inner, constant = inner_direction(model, layer, "mlp", acts, u)
    inner, bias = inner.to(mlp.W_out.device), getattr(output_module(model, layer, "mlp"), "bias", None)
    if bias is not None:
        constant = constant + dot(inner, bias.float().expand_as(inner))
    return t.einsum("nm,bm->bn", mlp.W_out.float(), inner), constant


# ------------------------------------------------------------------ proof


def require_parts(model: Model) -> None:
    """UserError where heads, MLPs and norms of this model are not what this file takes them for."""
    model.require("parts")
    if why := unproven(model):
        raise UserError(f"{model.info.architecture}: {why}")


def unproven(model: Model) -> str:
    """Why what parts write can't be read on this model, "" where it can: tried once on random tokens, by position."""
    known = model.notes.trials
    if "parts" not in known:
        known["parts"] = trial(model)
    return known["parts"]


def require_values(model: Model) -> None:
    """UserError where a head's z is not its pattern times its values: a norm or a gate between them (BitNet, Afmoe)."""
    model.require("values")
    known = model.notes.trials
    if "values" not in known:
        known["values"] = trial_values(model)
    if known["values"]:
        raise UserError(f"{model.info.architecture}: {known['values']}")


@t.no_grad()
def trial_values(model: Model) -> str:
    """Why heads' outputs can't be read by source token on this model, "" where they can."""
    ends = [[f"blocks.{layer}.attn.hook_{x}" for x in ("pattern", "v", "z")] for layer in range(model.info.n_layers)]
    if absent := [x for some in ends for x in some if x not in model.points]:
        return f"it has no {absent[0]}, so a head's output can't be read by source token"
    _, acts = model.forward(model.random_ids(min(10, model.info.n_ctx)), [x for some in ends for x in some])
    for layer, some in enumerate(ends):
        pattern, v, z = (acts[x].float() for x in some)
        groups = t.arange(z.shape[2], device=v.device) // max(1, z.shape[2] // v.shape[2])
        if v.ndim != 4 or v.shape[-1] != z.shape[-1] or not same(model, t.einsum("bhds,bshe->bdhe", pattern, v[:, :, groups].to(pattern)), z):
            return f"a head's output in layer {layer} is more than its pattern times its values, so it can't be read by source token"
    return ""


@t.no_grad()
def trial(model: Model) -> str:
    """Heads and biases against attention's output, parts against the stream, frozen norms against the norms themselves."""
    n, points, ends = model.info.n_layers, model.points, []
    stream = [f"blocks.{layer}.hook_{x}" for layer in range(n) for x in ("resid_pre", "attn_out", "mlp_out", "resid_post")]
    zs = [f"blocks.{layer}.attn.hook_z" for layer in range(n)]
    if absent := [x for x in (*stream, *zs, SCALE) if x not in points]:
        return f"it has no {absent[0]}, so what its parts add to the residual stream can't be read"
    norms = {"ln_final": model.bridge.ln_final}
    for layer in range(n):
        some = [near(model, layer, part) for part in ("attn", "mlp") for near in (post_norm, pre_norm)]
        norms |= {name.removesuffix(".hook_scale"): norm for norm, name in filter(None, some)}
    names = [f"{name}.hook_{x}" for name in norms for x in ("in", "scale", "out")]
    if absent := [x for x in names if x not in points]:
        return f"it has no {absent[0]}, so nothing can be read through that norm"
    _, acts = model.forward(model.random_ids(min(10, model.info.n_ctx)), [*stream, *zs, *names], [(FINAL, ends.append)])
    if len(ends) > 1:
        return "its final norm runs more than once, so what passes it is not one thing"
    for name, norm in norms.items():
        x, scale, out = (acts[f"{name}.hook_{end}"].float() for end in ("in", "scale", "out"))
        bias = linear_norm(model, norm).bias
        if not same(model, frozen_norm(model, norm, scale, x) + (0 if bias is None else bias.to(x.device)), out):
            return f"{name} ({type(norm.original_component).__name__}) is no linear map at a fixed scale, so nothing can be read through it"
    for layer in range(n):
        pre, attn, mlp, post = (acts[f"blocks.{layer}.hook_{x}"].float() for x in ("resid_pre", "attn_out", "mlp_out", "resid_post"))
        z = acts[zs[layer]]
        if z.ndim != 4 or z.shape[2:] != (model.info.n_heads, model.info.d_head):
            return f"attention of layer {layer} is not split into heads of {model.info.d_head} numbers"
        behind = post_norm(model, layer, "attn")
        scale = None if behind is None else acts[behind[1]]
        heads = heads_write(model, layer, over_scale(z, scale)).float() + bias_write(model, layer, scale)
        if not same(model, heads, attn):
            return f"heads do not add up to what attention of layer {layer} adds to the stream, so their parts can't be read"
        if not same(model, pre + attn.to(pre) + mlp.to(pre), post):
            return f"attention and MLP of layer {layer} do not add up to the residual stream, so their parts can't be read"
    return ""


def same(model: Model, got: Tensor, want: Tensor) -> bool:
    """Whether vectors [..., d_model] agree position by position, in the precision of the model's dtype."""
    want = want.to(got.device)
    size = want.norm(dim=-1)
    error = (got - want).norm(dim=-1) / size.clamp(min=size.mean() / 100 + 1e-30)
    return bool((error.max() if model.dtype == t.float32 else error.median()) <= TOLERANCE[model.dtype])
