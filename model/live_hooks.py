"""
Hook points where the Bridge's own would read or turn something else than what the model computes with. Where attention is Hugging Face's own code (GPT-J, OPT,
GPT-Neo, Llama 4 ...) the Bridge's `hook_pattern` gets a copy of the pattern after the fact: another point stands in for it, at the softmax itself. Models
that turn neighbouring dimensions with angles written side by side (Cohere) are told so; heads of latent attention (DeepSeek) are cut at their own width.
"""

import re
from functools import partial
from collections.abc import Callable

import torch as t
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformer_lens.conversion_utils.conversion_steps.base_tensor_conversion import BaseTensorConversion
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge.generalized_components import AttentionBridge, MLAAttentionBridge, PositionEmbeddingsAttentionBridge

SOFTMAX = (t.nn.functional.softmax, t.softmax, Tensor.softmax)


class AtSoftmax(TorchFunctionMode):
    """Meanwhile what a softmax over [batch, head, destination, source], or over heads folded into the batch, puts out passes a hook point."""

    def __init__(self, point: HookPoint, n_heads: int, dtype: t.dtype):
        super().__init__()
        self.point, self.n_heads, self.dtype = point, n_heads, dtype

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        if func in SOFTMAX and self.point.fwd_hooks and out.ndim >= 3:
            heads = out if out.ndim == 4 else out.unflatten(0, (-1, self.n_heads))
            out = self.point(heads.to(self.dtype)).reshape(out.shape)
        return out


def live_points(bridge: t.nn.Module, dtype: t.dtype) -> dict[str, HookPoint]:
    """The Bridge's hook points by name, with live ones for the patterns of attention that is Hugging Face's own code."""
    points = dict(bridge.hook_dict)
    for name in points:
        found = re.fullmatch(r"blocks\.(\d+)\.attn\.hook_pattern", name)
        attention = getattr(bridge.blocks[int(found[1])], "attn", None) if found else None
        if isinstance(attention, AttentionBridge) and type(attention).forward is AttentionBridge.forward:
            points[name] = at_softmax(attention, name, dtype)
    return points


def at_softmax(attention: AttentionBridge, name: str, dtype: t.dtype) -> HookPoint:
    """A hook point inside Hugging Face's module, whose value is what z is made from."""
    inner, point = attention.original_component, HookPoint()
    point.name, whole = name, inner.forward

    def forward(*args, **kwargs) -> object:
        with AtSoftmax(point, attention.config.n_heads, dtype):
            return whole(*args, **kwargs)

    inner.__dict__["forward"] = forward
    return point


def put_right(bridge: t.nn.Module, dtype: t.dtype) -> tuple[str, ...]:
    """Puts right what the Bridge turns, cuts or rounds otherwise than the model; in words, what of it changes numbers."""
    config = bridge.original_model.config
    falcon = getattr(config, "model_type", "") == "falcon"
    done = {
        "rotation of neighbouring dimensions": turn_neighbours(bridge),
        "heads of latent attention": cut_heads(bridge),
        "grouped queries, keys and values": falcon and config.new_decoder_architecture,  # model/adapters.py
        "ALiBi, which is added twice": falcon and config.alibi,  # alibi_once
    }
    round_rotated(bridge, dtype)
    return tuple(words for words, was in done.items() if was)


def turn_neighbours(bridge: t.nn.Module) -> bool:
    """
    Rotary angles of a model that holds each of them twice side by side (Cohere) turn dimensions 0 and 1, 2 and 3, ... The Bridge does that where it is told
    to, from angles that are written one after the other, twice. Whether that was so.
    """
    rotary = getattr(getattr(bridge, "rotary_emb", None), "original_component", None)
    attention = [b.attn for b in getattr(bridge, "blocks", []) if isinstance(getattr(b, "attn", None), PositionEmbeddingsAttentionBridge)]
    if rotary is None or not attention or getattr(attention[0].config, "rotary_adjacent_pairs", False):
        return False
    where = bridge.W_U.device
    try:
        cos = rotary(t.zeros(1, 4, 1, device=where), t.arange(4, device=where)[None])[0]
    except (TypeError, KeyError, ValueError, AttributeError):  # angles of another kind, one for each type of layer
        return False
    if not isinstance(cos, Tensor) or cos.shape[-1] % 2 or not t.equal(cos[..., ::2], cos[..., 1::2]) or t.equal(*cos.chunk(2, -1)):
        return False
    once = lambda x: t.cat([x[..., ::2]] * 2, -1)  # noqa: E731
    for a in attention:
        a.config.rotary_adjacent_pairs, inner = True, a._apply_position_embedding_hooks
        a._apply_position_embedding_hooks = lambda both, inner=inner: inner(tuple(map(once, both)) if isinstance(both, tuple) else both)
    return True


def cut_heads(bridge: t.nn.Module) -> bool:
    """
    Heads' z of latent attention (DeepSeek, Youtu, GLM 4 MoE Lite) at the width that W_O reads a head with: the Bridge cuts it at the width of the rotated part.
    Its queries come as [batch, head, position, d]: they pass their point as [batch, position, head, d], as everywhere. Whether the model has such attention.
    """
    latent = [b.attn for b in getattr(bridge, "blocks", []) if isinstance(getattr(b, "attn", None), MLAAttentionBridge)]
    for attention in latent:
        cut, n_heads = attention.o.hook_in.hook_conversion, bridge.cfg.n_heads
        bridge.cfg.d_head = attention.o.original_component.in_features // n_heads
        cut.n_heads, cut.d_head = n_heads, bridge.cfg.d_head
        attention.hook_q.hook_conversion = attention.hook_k.hook_conversion = attention.hook_v.hook_conversion = PositionsFirst()
    return bool(latent)


class PositionsFirst(BaseTensorConversion):
    """[batch, head, position, d] as [batch, position, head, d], and back."""

    def handle_conversion(self, x: Tensor, *_: object) -> Tensor:
        return x.transpose(1, 2)

    def revert(self, x: Tensor, *_: object) -> Tensor:
        return x.transpose(1, 2)


def round_rotated(bridge: t.nn.Module, dtype: t.dtype) -> None:
    """Queries and keys that were turned by float32 angles (OLMo 2, CodeGen) go on in the model's dtype; the Bridge leaves them in float32."""
    for module in bridge.modules():
        if isinstance(module, AttentionBridge):
            module._update_kv_cache = partial(lambda join, keys, values, **more: join(keys.to(values.dtype), values, **more), module._update_kv_cache)
        for name in ("hook_rot_q", "hook_rot_k"):
            if isinstance(point := module._modules.get(name), HookPoint):
                point.register_forward_hook(lambda _, args, x: x.to(dtype))


def alibi_once(hf: t.nn.Module) -> None:
    """
    Falcon with ALiBi (RW-1B): transformers' eager attention adds ALiBi to the scores although the mask holds it already; its default attention, and the model as
    trained, once. The attention gets zeros beside the mask.
    """
    if hf.config.model_type == "falcon" and hf.config.alibi:
        for block in hf.transformer.h:
            block.register_forward_pre_hook(lambda _, args, kwargs: (args, kwargs | {"alibi": t.zeros_like(kwargs["alibi"])}), with_kwargs=True)
