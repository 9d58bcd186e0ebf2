"""
Hugging Face's own model, asked before the Bridge is put around its modules: its logits, and what a block makes of another prompt's value in place of its own at
each of its modules. Plain torch hooks; nothing of Loupe's or TransformerLens's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch as t
from torch import Tensor, nn

PROBE = 7  # tokens of the two prompts that a model is probed with
LAYERS = 6  # at most so many are probed, spread over the kinds
Place = tuple[nn.Module, str]  # a module and its side, "in" or "out"


@dataclass
class Untouched:
    """
    On token ids [2, seq]: logits [2, seq, vocab] and `whose` these are, also by transformers' default attention (None: that is the eager one); by layer and
    place, the block's output [seq, d_model] for prompt 0 with prompt 1's value there.
    """

    ids: Tensor
    logits: Tensor
    whose: str = "Hugging Face's own"
    default: Tensor | None = None
    patched: dict[int, dict[Place, Tensor]] = field(default_factory=dict)


def blocks_of(hf: nn.Module) -> list[nn.Module]:
    """The model's blocks: its list of so many modules as the config has layers."""
    n = getattr(hf.config.get_text_config(), "num_hidden_layers", None)
    return next((list(m) for m in hf.modules() if isinstance(m, nn.ModuleList) and len(m) == n), [])


def kind(block: nn.Module) -> tuple:
    """What two blocks must have in common to be probed as one: their modules, those modules' settings (window, type of attention ...) and shapes."""
    plain = lambda m: sorted((k, v) for k, v in vars(m).items() if isinstance(v, int | float | str | bool | None) and k not in ("layer_idx", "layer_id"))  # noqa: E731
    return tuple((name, type(m).__name__, str(plain(m))) for name, m in block.named_modules()) + tuple(tuple(p.shape) for p in block.parameters())


def probed(blocks: list[nn.Module]) -> list[int]:
    """The first and the last layer of each kind, at most LAYERS."""
    ends: dict[tuple, list[int]] = {}
    for i, block in enumerate(blocks):
        ends.setdefault(kind(block), []).append(i)
    some = sorted({i for same in ends.values() for i in (same[0], same[-1])})
    return some if len(some) <= LAYERS else sorted({some[round(k * (len(some) - 1) / (LAYERS - 1))] for k in range(LAYERS)})


def places(block: nn.Module) -> Iterator[Place]:
    """Outputs of a block's modules, and inputs of those with a weight; what lies in a list (experts) is left out."""
    inside = {m for some in block.modules() if isinstance(some, nn.ModuleList) for m in some.modules()}
    for m in block.modules():
        if m not in inside:
            yield m, "out"
            if m is block or getattr(m, "weight", None) is not None:
                yield m, "in"


class Swap:
    """A torch hook on a module's input or output: prompt 0's value [2, seq, ...] becomes prompt 1's. `done` where there was such a value."""

    done = False

    def __call__(self, x: object) -> object:
        if isinstance(x, tuple) and x:
            return self(x[0]), *x[1:]
        if not isinstance(x, Tensor) or x.ndim < 3 or len(x) != 2:
            return x
        self.done = True
        return x[[1, 1]]

    def into(self, _: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return self(args), kwargs if args else kwargs | {k: self(x) for k, x in kwargs.items() if k == "hidden_states"}

    def out_of(self, _: nn.Module, args: tuple, out: object) -> object:
        return self(out)


@t.no_grad()
def ask(hf: nn.Module, ids: Tensor) -> Untouched:
    """Run the model and, one by one, its probed blocks with one value swapped."""
    blocks, calls, handles = blocks_of(hf), {}, []
    layers = probed(blocks)
    for i in layers:
        handles.append(blocks[i].register_forward_pre_hook(lambda m, args, kwargs, i=i: calls.__setitem__(i, (args, kwargs)), with_kwargs=True))
    try:
        found = Untouched(ids, hf(ids.to(hf.get_input_embeddings().weight.device), use_cache=False).logits)
    finally:
        for h in handles:
            h.remove()
    found.default = by_default(hf, ids)
    for i in layers:
        some = {place: block_with(blocks[i], *calls[i], place) for place in places(blocks[i])}
        found.patched[i] = {place: out for place, out in some.items() if out is not None}
    return found


def by_default(hf: nn.Module, ids: Tensor) -> Tensor | None:
    """Logits with the attention that transformers takes where none is asked for; Loupe reads a model under its eager one, which holds a pattern."""
    if not getattr(hf, "_supports_sdpa", False):
        return None
    config = hf.config.get_text_config()  # hf.set_attn_implementation leaves Falcon as it is
    try:
        config._attn_implementation = "sdpa"
        return hf(ids.to(hf.get_input_embeddings().weight.device), use_cache=False).logits
    finally:
        config._attn_implementation = "eager"


def block_with(block: nn.Module, args: tuple, kwargs: dict, place: Place) -> Tensor | None:
    """A block's output for prompt 0 with prompt 1's value at a place; None where no such value passes there."""
    swap, (module, side) = Swap(), place
    handle = module.register_forward_pre_hook(swap.into, with_kwargs=True) if side == "in" else module.register_forward_hook(swap.out_of)
    try:
        out = block(*args, **kwargs)
    finally:
        handle.remove()
    out = out[0] if isinstance(out, tuple) else out
    return out[0] if swap.done and isinstance(out, Tensor) and out.ndim == 3 else None
