"""
What a block need not compute, or can compute faster: modules whose forward is another one for a while. Used by resume.py.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch as t
from torch import Tensor
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge
from transformers.activations import NewGELUActivation


@contextmanager
def last_rows(mlp: t.nn.Module, rows: list[int]) -> Generator:
    """In the last block only the MLP of the positions that are read in the end is run; empty: of all."""
    if not rows:
        yield
        return
    whole = type(mlp).forward.__get__(mlp)

    def forward(x: Tensor, *args, **kwargs):
        out = whole(x[:, rows], *args, **kwargs)
        if not isinstance(out, Tensor):
            return whole(x, *args, **kwargs)
        full = out.new_zeros(*x.shape[:2], out.shape[-1])
        full[:, rows] = out
        return full

    mlp.__dict__["forward"] = forward
    try:
        yield
    finally:
        mlp.__dict__.pop("forward", None)


@contextmanager
def given(attention: t.nn.Module, out: Tensor) -> Generator:
    """Attention's output is given: the module is not run."""
    attention.__dict__["forward"] = lambda *args, **kwargs: (out, None)
    try:
        yield
    finally:
        attention.__dict__.pop("forward", None)


def slow_modules(block: t.nn.Module) -> list[t.nn.Module]:
    """What `fused` can stand in for: Hugging Face's GPT-2 writes its activation as eight operations, the Bridge LayerNorm as seven."""
    norms = [m for m in block.modules() if isinstance(m, NormalizationBridge) and type(m.original_component) is t.nn.LayerNorm]
    same = [m for m in norms if m.original_component.eps == getattr(m.config, "eps", None) and m.original_component.weight is not None]
    return [*(m for m in block.modules() if isinstance(m, NewGELUActivation)), *same]


@contextmanager
def fused(slow: list[t.nn.Module]) -> Generator:
    """The same in one operation for a while."""
    for m in slow:
        m.__dict__["forward"] = gelu if isinstance(m, NewGELUActivation) else layer_norm(m)
    try:
        yield
    finally:
        for m in slow:
            m.__dict__.pop("forward", None)


def layer_norm(m: NormalizationBridge) -> Callable:
    whole = type(m).forward.__get__(m)

    def forward(x: Tensor, **kwargs) -> Tensor:
        if kwargs or x.dtype != t.float32 or m.hook_scale.fwd_hooks or m.hook_normalized.fwd_hooks:
            return whole(x, **kwargs)
        return m.hook_out(m.original_component(m.hook_in(x)))

    return forward


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, x sigmoid(2u): torch's own on an accelerator; on a CPU, where that takes three times as long, piece by piece in the processor's cache."""
    if x.device.type != "cpu" or x.dtype != t.float32:
        return t.nn.functional.gelu(x, approximate="tanh")
    flat = x.reshape(-1)
    out, slope = t.empty_like(flat), 2 * (2 / math.pi) ** 0.5
    for a, o in zip(flat.split(65536), out.split(65536)):
        t.addcmul(flat.new_tensor(slope), a, a, value=0.044715 * slope, out=o).mul_(a).sigmoid_().mul_(a)
    return out.view(x.shape)
