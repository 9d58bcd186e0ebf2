"""
What a block's receivers make of the stream: every head's queries, keys and values and the MLP, each from an input of its own; gradients back to those inputs.

Nothing here relies on the Bridge's own split inputs, which several families lack: a head's q is its rows of W_Q times the norm of its own input, written at
hook_q; the MLP's input is written in front of its norm, or behind the one that it shares with attention. All that is held against the model (`trial`).
"""

from functools import partial

import torch as t
from torch import Tensor

from model.bridge import Model
from model.memory import is_out_of_memory
from model.writes import pre_norm, same
from vocabulary.nodes import UserError

PARTS = ("q", "k", "v")


class BlockInputs:
    """The receivers of one block: where their values are read and written, and the norms and matrices in front of them."""

    def __init__(self, model: Model, layer: int):
        attn, mlp = (pre_norm(model, layer, part) for part in ("attn", "mlp"))
        block, own = model.bridge.blocks[layer].attn, mlp is not None and mlp != attn
        self.norm = None if attn is None else attn[0].original_component
        self.mlp_norm = None if mlp is None or own else mlp[0].original_component  # the one in front of the place where the MLP's input is written
        self.entry = f"{mlp[1].removesuffix('hook_scale')}hook_in" if own else f"blocks.{layer}.mlp.hook_in"
        self.names = {part: f"blocks.{layer}.attn.hook_{part}" for part in PARTS}
        self.weights = {part: getattr(block, f"W_{part.upper()}") for part in PARTS}
        self.biases = {part: getattr(block, f"b_{part.upper()}") for part in PARTS}
        ends, at = {}, 0
        for part, w in self.weights.items():
            ends[part] = slice(at, at := at + len(w))
        self.rows = ends  # of each part among the block's receivers

    def project(self, part: str, heads: list[int] | slice, x: Tensor) -> Tensor:
        """Queries, keys or values [row, seq, head, d_head] of some heads from their normed inputs [row, seq, head, d_model]."""
        out, bias = t.einsum("bshm,hmd->bshd", x, self.weights[part][heads]), self.biases[part]
        return out if bias is None else out + bias[heads]

    def normed(self, x: Tensor) -> Tensor:
        """Inputs [..., d_model] of heads through the norm in front of attention."""
        return x if self.norm is None else self.norm(x)

    def mlp_input(self, x: Tensor) -> Tensor:
        """A stream [..., d_model] as what the MLP gets where its input is written."""
        return x if self.mlp_norm is None else self.mlp_norm(x)

    def back(self, stream: Tensor, g: dict[str, Tensor]) -> Tensor | None:
        """From gradients at q, k and v [prompt, seq, head, d_head] to those at every head's input [prompt, seq, receiver, d_model]; None where there are none."""
        if not g:
            return None
        rows = [t.einsum("bshd,hmd->bshm", g[p].to(w.device), w) if p in g else w.new_zeros(*stream.shape[:2], *w.shape[:2]) for p, w in self.weights.items()]
        return through(self.norm, stream, t.cat(rows, 2))

    def mlp_back(self, stream: Tensor, g: Tensor) -> Tensor:
        """From the gradient where the MLP's input is written [prompt, seq, d_model] to that at its stream [prompt, seq, 1, d_model]."""
        return through(self.mlp_norm, stream, g[:, :, None].to(stream.device))


def through(norm: t.nn.Module | None, stream: Tensor, g: Tensor) -> Tensor:
    """Gradients [prompt, seq, receiver, d_model] behind a norm of the stream [prompt, seq, d_model] as those in front of it."""
    if norm is None:
        return g
    with t.enable_grad():
        x = stream.detach()[:, :, None].expand_as(g).requires_grad_()
        return t.autograd.grad(norm(x), x, g)[0]


# ------------------------------------------------------------------ proof


def block_inputs(model: Model) -> list[BlockInputs]:
    """The receivers of every block. UserError where the model's own do not get what these say."""
    known = model.notes.trials
    if "receivers" not in known:
        known["receivers"] = trial(model)
    if known["receivers"]:
        raise UserError(f"{model.info.architecture}: {known['receivers']}, so edges can't be scored; score nodes")
    return [BlockInputs(model, layer) for layer in range(model.info.n_layers)]


@t.no_grad()
def trial(model: Model) -> str:
    """On random tokens: receivers' values and inputs from the stream against the model's own; an MLP whose input is the same everywhere adds the same everywhere."""
    layers, ids = range(model.info.n_layers), model.random_ids(min(10, model.info.n_ctx))
    try:
        blocks = [BlockInputs(model, layer) for layer in layers]
    except (AttributeError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        return "its attention has no matrix for each head's queries, keys and values"
    outs = [f"blocks.{layer}.hook_mlp_out" for layer in layers]
    stream = [f"blocks.{layer}.hook_{x}" for layer in layers for x in ("resid_pre", "attn_out")]
    names = [*stream, *(n for b in blocks for n in (*b.names.values(), b.entry))]
    if absent := [n for n in (*names, *outs) if n not in model.points]:
        return f"it has no {absent[0]}"
    _, acts = model.forward(ids, names)
    for layer, block in enumerate(blocks):
        x = acts[f"blocks.{layer}.hook_resid_pre"]
        for part, name in block.names.items():
            heads = x[:, :, None].expand(-1, -1, len(block.weights[part]), -1)
            got = block.project(part, slice(None), block.normed(heads))
            if got.shape != acts[name].shape or not same(model, got.float(), acts[name].float()):
                return f"{part} of layer {layer} is not the head's matrix times the normed stream"
        x = x if model.parallel else x + acts[f"blocks.{layer}.hook_attn_out"].to(x)
        if not same(model, block.mlp_input(x).float(), acts[block.entry].float()):
            return f"the MLP of layer {layer} does not read the stream where Loupe takes it to"
    _, flat = model.forward(ids, outs, [(b.entry, lambda x: x[:, :1].expand_as(x).contiguous()) for b in blocks])
    for layer, name in enumerate(outs):
        if not same(model, flat[name].float(), flat[name][:, :1].float().expand_as(flat[name])):
            return f"what is written in front of the MLP of layer {layer} does not reach it"
    return ""


# ------------------------------------------------------------------ gradients


def taps(blocks: list[BlockInputs], stream: dict[str, Tensor], found: dict[str, Tensor]) -> list:
    """Edits that note every block's stream, and the gradients at its receivers as they arrive, by hook point."""

    def tap(name: str, x: Tensor) -> Tensor | None:
        if not x.requires_grad:
            return None
        y = x.view_as(x)  # apart from the skip connection
        y.register_hook(partial(found.__setitem__, name))
        return y

    edits = []
    for layer, block in enumerate(blocks):
        edits.append((f"blocks.{layer}.hook_resid_pre", partial(stream.__setitem__, "now")))
        edits += [(name, partial(tap, name)) for name in (*block.names.values(), block.entry)]
    return edits
