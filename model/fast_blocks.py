"""
What a block need not compute, or can compute faster: modules whose forward is another one for a while. Used by base_run.py.
"""

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch as t
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformer_lens.model_bridge.generalized_components.normalization import NormalizationBridge
from transformers.activations import NewGELUActivation

KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # not cuDNN's, which plans anew for every shape: seconds in a sweep


@contextmanager
def last_rows(mlp: t.nn.Module, rows: list[int]) -> Generator:
    """In the last block only the MLP of the positions that are read in the end is run; empty: of all."""
    if not rows:
        yield
        return
    whole = type(mlp).forward.__get__(mlp)

    def forward(x: Tensor, *args, **kwargs):
        out = whole(x[:, rows], *(a[:, rows] if isinstance(a, Tensor) and a.shape[:2] == x.shape[:2] else a for a in args), **kwargs)  # Bloom's adds the stream
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


def slow_modules(block: t.nn.Module) -> dict[t.nn.Module, Callable]:
    """
    Modules of a block that one operation can stand in for, with that operation: Hugging Face's GPT-2 writes its activation as eight operations, the
    Bridge LayerNorm as seven and RMSNorm as fifteen. A norm is replaced only where both give the same numbers on a random input.
    """
    quick: dict[t.nn.Module, Callable] = {m: gelu for m in block.modules() if isinstance(m, NewGELUActivation)}
    for m in block.modules():
        if isinstance(m, NormalizationBridge) and (forward := quick_norm(m)) is not None:
            quick[m] = forward
    return quick


@contextmanager
def fused(quick: dict[t.nn.Module, Callable]) -> Generator:
    """One operation in place of each module's several, for a while."""
    for m, forward in quick.items():
        m.__dict__["forward"] = forward
    try:
        yield
    finally:
        for m in quick:
            m.__dict__.pop("forward", None)


def quick_norm(m: NormalizationBridge) -> Callable | None:
    """A norm's forward as torch's own operation, the hooks inside left to the Bridge; None where no form of it gives this norm's numbers."""
    inner, whole = m.original_component, type(m).forward.__get__(m)
    weight = getattr(inner, "weight", None)
    if weight is None or weight.ndim != 1 or weight.device.type == "meta":
        return None
    eps = getattr(inner, "eps", None) or getattr(inner, "variance_epsilon", None) or getattr(m.config, "eps", 1e-5)
    root = lambda x: t.nn.functional.rms_norm(x, weight.shape, eps=eps)  # noqa: E731
    forms: list[Callable] = [inner] if type(inner) is t.nn.LayerNorm else [
        lambda x: root(x) * weight,  # Llama rounds before the weight,
        lambda x: (root(x.float()) * (1 + weight.float())).to(x.dtype),  # Gemma's weight is an offset from one, in float32
    ]  # fmt: skip
    x = (t.randn(4, len(weight), generator=t.Generator().manual_seed(0)) * t.tensor([[1], [0.1], [0.01], [0.001]])).to(weight)[None]  # small rows show epsilon
    with t.no_grad():
        want = whole(x)
        same = [f for f in forms if f(x).dtype == want.dtype and t.allclose(f(x), want, rtol=2 * t.finfo(x.dtype).eps, atol=t.finfo(x.dtype).eps)]
    if not same:
        return None

    def forward(x: Tensor, **kwargs) -> Tensor:
        if kwargs or m.hook_scale.fwd_hooks or m.hook_normalized.fwd_hooks:
            return whole(x, **kwargs)
        return m.hook_out(same[0](m.hook_in(x)))

    return forward


@contextmanager
def quick_attention(attention: t.nn.Module) -> Generator:
    """Hugging Face's own attention through torch's scaled dot product, which holds no pattern. Hook points inside do not fire."""
    inner = attention.original_component
    before = inner.config._attn_implementation
    attention.__dict__["forward"], inner.config._attn_implementation = inner, "sdpa"
    try:
        with sdpa_kernel(KERNELS):
            yield
    finally:
        attention.__dict__.pop("forward", None)
        inner.config._attn_implementation = before


def gelu(x: Tensor) -> Tensor:
    """GELU by tanh, x sigmoid(2u): torch's own on an accelerator; on a CPU, where that takes three times as long, piece by piece in the processor's cache."""
    if x.device.type != "cpu" or x.dtype != t.float32:
        return t.nn.functional.gelu(x, approximate="tanh")
    flat = x.reshape(-1)
    out, slope = t.empty_like(flat), 2 * (2 / math.pi) ** 0.5
    for a, o in zip(flat.split(65536), out.split(65536)):
        t.addcmul(flat.new_tensor(slope), a, a, value=0.044715 * slope, out=o).mul_(a).sigmoid_().mul_(a)
    return out.view(x.shape)
