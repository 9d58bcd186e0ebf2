"""Where a node lives in a model: its hook point, its position in a prompt, its index into the hook point's tensor."""

import torch as t
from torch import Tensor

from model.bridge import Model
from vocabulary.nodes import Node, SITES, UserError
from vocabulary.prompts import TokenRow


def hook_name(model: Model, node: Node) -> str:
    """The hook point a node lives at; nodes outside the model are errors."""
    i = model.info
    if node.site not in SITES:
        raise UserError(f"{node.site!r} is not a site: use one of {', '.join(SITES)}")
    if node.site == "sae":
        raise UserError(f"{node} is a feature of an SAE: it can be acted on as an intervention and in the sweep `features`, and not here")
    if node.site == "embed":
        return "hook_embed"
    if node.layer is None or not 0 <= node.layer < i.n_layers:
        raise UserError(f"{node}: the model has layers 0 to {i.n_layers - 1}")
    if node.site == "head" and (node.head is None or not 0 <= node.head < i.n_heads):
        raise UserError(f"{node}: the model has heads 0 to {i.n_heads - 1}")
    if node.site == "resid_mid" and model.parallel:
        raise UserError(f"{node}: {i.architecture} adds attention and MLP in parallel, so there is no resid_mid; use resid_pre or resid_post")
    match node.site:
        case "head":
            name = f"blocks.{node.layer}.attn.hook_{node.part}"
        case "neuron":
            name = f"blocks.{node.layer}.mlp.hook_post"
            model.require("neuron", name)
            if node.index is None or not 0 <= node.index < model.widths[node.layer]:
                raise UserError(f"{node}: the layer has neurons 0 to {model.widths[node.layer] - 1}")
        case "attn" | "mlp":
            name = f"blocks.{node.layer}.hook_{node.site}_out"
        case _:
            name = f"blocks.{node.layer}.hook_{node.site}"
    model.point(name)
    return name


def find_position(pos: int | str, row: TokenRow, what: str) -> int:
    """A position as an index: a label, an int, a negative int from the end."""
    if isinstance(pos, str):
        if pos not in row.labels:
            raise UserError(f"{what} has no position labelled {pos!r}: it has {', '.join(row.labels)}")
        return row.labels[pos]
    n = len(row.ids) - row.tail
    if not -n <= pos < len(row.ids):
        raise UserError(f"position {pos} is outside {what}, which has {n} tokens (0 to {n - 1}, or -{n} to -1)")
    return pos % n if pos < 0 else pos


def node_index(node: Node, pos: int | slice, per_kv: int, source: int | slice = slice(None)) -> tuple:
    """
    A node's index into its hook point's tensor behind the batch, [position, ...]; a pattern's is [head, destination, source]. `per_kv` heads share a key
    and a value.
    """
    match node.site:
        case "head" if node.part == "pattern":
            return node.head, pos, source
        case "head":
            return pos, node.head // per_kv if node.part in ("k", "v") else node.head
        case "neuron":
            return pos, node.index
    return (pos,)


def where(model: Model, node: Node, row: TokenRow, what: str) -> tuple:
    """The node's index into its hook point's tensor [batch, seq, ...], positions as slices; for patterns [batch, head, destination, source]."""
    pos = slice(None)
    if node.pos is not None:
        p = find_position(node.pos, row, what)
        pos = slice(p, p + 1)
    return slice(None), *node_index(node, pos, model.info.n_heads // model.info.n_kv_heads)


def visible(model: Model, layer: int, seq: int) -> Tensor:
    """Which sources a destination of this layer can attend to [destination, source]: not later ones, nor those outside its sliding window or chunk."""
    config, i = model.bridge.original_model.config.get_text_config(), t.arange(seq)
    distance = i[:, None] - i
    kind, size = (getattr(config, "layer_types", None) or {layer: ""})[layer], getattr(config, "sliding_window", None)
    if getattr(config, "attention_layers", None):  # GPT-Neo
        kind, size = {"local": "sliding_attention"}.get(config.attention_layers[layer], "full_attention"), config.window_size
    seen = distance >= 0 if model.causal else t.ones_like(distance, dtype=t.bool)
    if kind == "chunked_attention":
        return seen & (i[:, None] // config.attention_chunk_size == i // config.attention_chunk_size)
    if size and (kind == "sliding_attention" or not kind and getattr(config, "use_sliding_window", True)):
        return seen & (distance < size)
    return seen
