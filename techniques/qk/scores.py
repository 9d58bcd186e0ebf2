"""
A head's scores as the bilinear form that they are in its queries and keys. Nothing here knows a family: the model's own attention runs on queries and keys that
are given to it, up to its softmax, with the norms of queries and keys frozen and the soft cap off; its derivatives are the form, rotation, scale and position bias included.
"""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property

import torch as t
from torch import Tensor
from torch.overrides import TorchFunctionMode

from model.bridge import Edit, Model, Passed, entered
from model.live_hooks import SOFTMAX
from model.writes import LOUD
from vocabulary.nodes import UserError

CAP = "attn_logit_softcapping"


class BeforeSoftmax(TorchFunctionMode):
    """Ends a forward pass at the first softmax after the keys of an attention have passed, and keeps what it was given [prompt, head, destination, source]."""

    def __init__(self, seq: int):
        super().__init__()
        self.seq, self.passed, self.scores = seq, 0, None

    def note(self, x: Tensor) -> None:
        self.passed += 1

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in SOFTMAX and self.passed >= 2:
            x = args[0] if args else kwargs["input"]
            self.scores = x.reshape(-1 if x.ndim == 4 else 1, x.shape[-3], *x.shape[-2:])[..., : self.seq]  # behind the sources, a sink
            raise Passed
        return func(*args, **(kwargs or {}))


@contextmanager
def uncapped(attention: t.nn.Module) -> Generator:
    """Scores without their soft cap meanwhile."""
    inner, cap = attention.original_component, soft_cap(attention)
    try:
        if cap:
            setattr(inner, CAP, None)
        yield
    finally:
        if cap:
            setattr(inner, CAP, cap)


def soft_cap(attention: t.nn.Module) -> float:
    """The bound of an attention's scores; 0 where there is none."""
    return float(getattr(attention.original_component, CAP, None) or 0)


def attention_of(model: Model, layer: int) -> t.nn.Module:
    attention = model.bridge.blocks[layer]._modules.get("attn")
    if attention is None or not all(model.has(f"blocks.{layer}.attn.hook_{x}") for x in "qk"):
        model.require("q", "k")
        raise UserError(f"layer {layer} of {model.info.architecture} has no queries and keys that can be read apart")
    return attention


def before_softmax(model: Model, layer: int, ids: Tensor, q: Tensor, k: Tensor, edits: list[Edit] = (), grad: bool = False) -> Tensor:
    """Scores [prompt, head, destination, source] of a layer on ids [prompt, seq] for these queries and keys, soft cap off; masked ones are very low."""
    attention, at = attention_of(model, layer), f"blocks.{layer}.attn"
    caught = BeforeSoftmax(ids.shape[1])
    write = [(f"{at}.hook_q", lambda _: q), (f"{at}.hook_k", lambda _: k), (f"{at}.hook_q", caught.note), (f"{at}.hook_k", caught.note)]
    stream = t.zeros(*ids.shape, model.info.d_model, dtype=model.dtype, device=model.device)  # what comes in does not matter: queries and keys are given
    begin = entered(list(model.bridge.blocks), layer, stream) if layer and model.resumes else nullcontext()
    with t.set_grad_enabled(grad), uncapped(attention), model.hooks([*write, *edits]), begin, caught:
        with suppress(Passed):
            model.bridge(ids.to(model.device), use_cache=False, logits_to_keep=1)
    if caught.scores is None:
        raise UserError(f"{model.info.architecture}: layer {layer} has no softmax of scores that can be read")
    return caught.scores.float()


# ------------------------------------------------------------------ norms of queries and keys


@t.no_grad()
def frozen(norm: t.nn.Module, x: Tensor, y: Tensor):
    """The function that a norm of queries or keys is with its scale frozen where it makes y of x; its gain is read from what it does."""
    run, z = norm.original_component, t.ones_like(x)
    z[..., ::2] = -1
    z[..., 1] -= z.shape[-1] % 2
    up, down, moved = run(LOUD * z), run(-LOUD * z), run(LOUD * (z + 1))
    bias, gain = (up + down) / 2, (up - down) / 2 / z
    centred = bool((moved - up).abs().max() <= 1e-3 * up.abs().max())
    centre = lambda v: v - v.mean(-1, keepdim=True) if centred else v  # noqa: E731
    shape = gain * centre(x)
    slope = ((y - bias) * shape).sum(-1, keepdim=True) / shape.square().sum(-1, keepdim=True).clamp_min(1e-30)
    return lambda v: bias + gain * slope * centre(v)


def frozen_norms(model: Model, layer: int, ids: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, list[Edit]]:
    """The layer's own scores, and the edits that freeze its norms of queries and keys at the scale they have there."""
    at, held = f"blocks.{layer}.attn", {}
    norms = {n: m for n in ("q_norm", "k_norm") if (m := attention_of(model, layer)._modules.get(n)) is not None and model.has(f"{at}.{n}.hook_out")}
    keep = [(f"{at}.{n}.hook_{end}", lambda x, key=(n, end): held.__setitem__(key, x.detach())) for n in norms for end in ("in", "out")]
    with t.no_grad():
        scores = before_softmax(model, layer, ids, q, k, keep)
    edits: list[Edit] = []
    for name, norm in norms.items():
        if (name, "in") not in held:
            continue
        now, fn = {}, frozen(norm, held[name, "in"], held[name, "out"])
        edits.append((f"{at}.{name}.hook_in", lambda x, now=now: now.__setitem__("x", x)))
        edits.append((f"{at}.{name}.hook_out", lambda y, now=now, fn=fn: fn(now["x"])))
    return scores, edits


# ------------------------------------------------------------------ the form


@dataclass
class Form:
    """
    A weighted sum over sources of one head's scores from one destination, float64: query . form[source] . key, with what is linear in either alone, and the rest.
    form [d_head, source, d_head], query [d_head], key [source, d_head]; `own` the model's scores from the destination [source]; `read` the sources that have a weight.
    """

    form: Tensor
    query: Tensor
    key: Tensor
    rest: float
    own: Tensor
    read: list[int]

    @cached_property
    def rows(self) -> Tensor:
        """What each number of a key adds to that [source, d_head, d_head + 1]."""
        return t.cat([self.form.permute(1, 2, 0), self.key[..., None]], 2).contiguous()

    def turned(self, k: Tensor) -> Tensor:
        """Keys [n, source, d_head] as what a query and a one behind it are multiplied by [n, d_head + 1]."""
        return k.flatten(1) @ self.rows.flatten(0, 1)

    def turned_at(self, k: Tensor, pos: int) -> Tensor:
        """Keys of one source [n, d_head] as `turned`."""
        return k @ self.rows[pos]


def bilinear(model: Model, layer: int, head: int, kv: int, dest: int, weights: Tensor, ids: Tensor, q: Tensor, k: Tensor) -> Form:
    """The form of `weights` [source] over the scores from `dest`, by d_head backward passes through the layer's attention; q and k [1, seq, head, d_head]."""
    scores, edits = frozen_norms(model, layer, ids, q, k)
    some = weights.nonzero()[:, 0].to(scores.device)
    with t.enable_grad():
        a, b = t.zeros_like(q).requires_grad_(True), t.zeros_like(k).requires_grad_(True)
        row = before_softmax(model, layer, ids, a, b, edits, grad=True)[0, head, dest, some]
        whole = (row.double() * weights.to(row.device)[some.to(row.device)]).sum()
        (slope,) = t.autograd.grad(whole, a, create_graph=True)
        (keys,) = t.autograd.grad(whole, b, retain_graph=True)
        rows = [t.autograd.grad(x, b, retain_graph=True)[0][0, :, kv] for x in slope[0, dest, head]]
    cpu = lambda x: x.detach().cpu().double()  # noqa: E731
    return Form(t.stack([cpu(x) for x in rows]), cpu(slope[0, dest, head]), cpu(keys[0, :, kv]), whole.item(), cpu(scores[0, head, dest]), some.tolist())
