"""What one edge carries, in Hugging Face's own classes with plain torch hooks, for many families. Imports nothing of Loupe."""

from collections.abc import Callable

import torch as t
from torch import Tensor
from transformers import AutoModelForCausalLM

BLOCKS = ("model.layers", "transformer.h", "gpt_neox.layers", "model.decoder.layers", "transformer.blocks")
NORMS = ("model.norm", "transformer.ln_f", "gpt_neox.final_layer_norm", "model.decoder.final_layer_norm", "model.final_layernorm", "transformer.norm_f", "model.layer_norm")
ATTENTION = ("self_attn", "attn.attention", "attn", "attention", "self_attention")
OUT = ("o_proj", "out_proj", "c_proj", "dense")
MLP = ("mlp.dense_4h_to_h", "ffn.down_proj", "mlp.c_proj", "mlp.fc_out", "mlp.down_proj", "mlp.fc2", "fc2", "mlp", "block_sparse_moe", "feed_forward")
PARALLEL = ("gptj", "phi", "cohere", "cohere2", "codegen")
AFTER = {  # the norms between attention, the MLP and the stream
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "flex_olmo": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "exaone4": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "glm4": ("post_self_attn_layernorm", "post_mlp_layernorm"),
    "afmoe": ("post_attention_layernorm", "post_mlp_layernorm"),
}


def inside(module: t.nn.Module, *names: str) -> t.nn.Module | None:
    """The first of some submodules that there is."""
    known = dict(module.named_modules())
    return next((known[n] for n in names if n in known), None)


class Plain:
    """A model and two prompts of one length: senders' writes in both runs, and the logits of the first when one receiver gets another sender's write."""

    def __init__(self, folder, ids: list[int], other: list[int]):
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=t.float32, attn_implementation="eager").eval()
        self.config, self.ids, self.other = self.hf.config, ids, other
        c, kind = self.config, self.config.model_type
        self.blocks, self.norm = inside(self.hf, *BLOCKS), inside(self.hf, *NORMS)
        self.heads = c.num_attention_heads if hasattr(c, "num_attention_heads") else c.n_heads
        self.kv = 1 if getattr(c, "multi_query", False) else getattr(c, "num_key_value_heads", None) or getattr(c, "num_kv_heads", None) or self.heads
        self.factor = getattr(c, "residual_multiplier", 1.0)
        self.parallel = kind in PARALLEL or bool(getattr(c, "use_parallel_residual", False)) or kind == "falcon" and (c.parallel_attn or c.new_decoder_architecture)
        self.attn = [inside(b, *ATTENTION) for b in self.blocks]
        self.o = [inside(a, *OUT) for a in self.attn]
        after = AFTER.get(kind)
        self.writes = {"attn": [inside(b, after[0]) for b in self.blocks] if after else self.o}
        whole = "moe" in kind or kind in ("mixtral", "gpt_oss", "llama4_text")  # experts: the module as a whole
        self.writes["mlp"] = [inside(b, after[1]) if after else inside(b, *MLP[7 if whole else 0 :]) for b in self.blocks]
        self.own, self.theirs = self.senders(ids), self.senders(other)

    @t.no_grad()
    def run(self, ids: list[int], edits: list[tuple[t.nn.Module, str, Callable]]) -> Tensor:
        """Logits [vocab] at the last position. An edit's function gets a module's first input or output [1, seq, ...]; None leaves it."""
        handles = []

        def shaped(fn: Callable, x: Tensor) -> Tensor | None:
            new = fn(x if x.ndim == 3 else x[None])
            return None if new is None else new.view(x.shape)

        def before(fn: Callable, args: tuple, kwargs: dict) -> tuple | None:
            x = args[0] if args else kwargs["hidden_states"]
            if (new := shaped(fn, x)) is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        def behind(fn: Callable, out: object) -> object:
            if (new := shaped(fn, out[0] if isinstance(out, tuple) else out)) is None:
                return None
            return (new, *out[1:]) if isinstance(out, tuple) else new

        for module, end, fn in edits:
            if end == "in":
                handles.append(module.register_forward_pre_hook(lambda m, args, kwargs, fn=fn: before(fn, args, kwargs), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(lambda m, args, out, fn=fn: behind(fn, out)))
        try:
            return self.hf(t.tensor([ids]), use_cache=False).logits[0, -1].double()
        finally:
            for handle in handles:
                handle.remove()

    def read(self, ids: list[int], places: list[tuple[t.nn.Module, str]], edits: list = ()) -> list[Tensor]:
        got: list = [None] * len(places)
        self.run(ids, [*edits, *((m, end, lambda x, i=i: got.__setitem__(i, x.clone())) for i, (m, end) in enumerate(places))])
        return got

    def senders(self, ids: list[int]) -> dict[str, Tensor]:
        """What block 0 gets, heads' z side by side, MLPs' writes."""
        n = range(len(self.blocks))
        found = self.read(ids, [(self.blocks[0], "in"), *((m, "in") for m in self.o), *((m, "out") for m in self.writes["mlp"])])
        return dict(zip(["embed", *(f"z{i}" for i in n), *(f"L{i}.mlp" for i in n)], found))

    def change(self, sender: str, again: bool) -> Tensor:
        """What the stream gains when a sender has its value of the other run; of a head, a norm after attention is computed `again` or each run's own scale stays."""
        if sender == "embed":
            return self.theirs[sender] - self.own[sender]
        if sender.endswith("mlp"):
            return (self.theirs[sender] - self.own[sender]) * self.factor
        layer, head = map(int, sender[1:].split("H"))
        d = self.own[f"z{layer}"].shape[-1] // self.heads
        where, place = slice(head * d, (head + 1) * d), (self.writes["attn"][layer], "out")

        def put(z: Tensor, x: Tensor) -> Tensor:
            x = x.clone()
            x[..., where] = z[..., where]
            return x

        mine, theirs = self.own[f"z{layer}"], self.theirs[f"z{layer}"]
        if again:
            (before,), (after,) = (self.read(self.ids, [place], [(self.o[layer], "in", lambda x, z=z: put(z, x))]) for z in (mine, theirs))
            return (after - before) * self.factor
        return self.head(layer, head, theirs, self.other) - self.head(layer, head, mine, self.ids)

    def head(self, layer: int, head: int, z: Tensor, ids: list[int]) -> Tensor:
        """What a head with some z adds to the stream, the norm after attention a factor for each number, which it has in the run of `ids` (all such norms are RMSNorms)."""
        d, o, places = z.shape[-1] // self.heads, self.o[layer], [(self.o[layer], "out"), (self.writes["attn"][layer], "out")]
        alone = t.zeros_like(z)
        alone[..., head * d : (head + 1) * d] = z[..., head * d : (head + 1) * d]
        (out, written), (only, _), (none, _) = (self.read(ids, places, edits) for edits in ((), [(o, "in", lambda x: alone)], [(o, "in", lambda x: 0 * x)]))
        return (only - none) * (written / out if places[0] != places[1] else 1) * self.factor

    def logits(self, stream: Tensor, more: Tensor | float = 0) -> Tensor:
        """The model's logits [vocab] of a row of the final stream [d_model], and of what is added to it behind the final norm, whose scale stays."""
        norm, kind, c = self.norm, self.config.model_type, self.config
        gain, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        gain = t.ones(()) if gain is None else gain + 1 if "gemma" in kind or kind == "nemotron" else gain
        centred = "RMS" not in type(norm).__name__
        x, more = ((y - y.mean() if centred and isinstance(y, Tensor) else y) for y in (stream, more))
        scale = (x.square().mean() + next((getattr(norm, n) for n in ("eps", "variance_epsilon") if hasattr(norm, n)), 1e-5)).sqrt()
        normed = (x + more) / scale * gain + (0 if bias is None else bias)
        logits = self.hf.get_output_embeddings()(normed).double() * (getattr(c, "logit_scale", None) or 1) / (getattr(c, "logits_scaling", None) or 1)
        cap = getattr(c, "final_logit_softcapping", None)
        return cap * t.tanh(logits / cap) if cap else logits

    def projection(self, layer: int, part: str, head: int) -> tuple[t.nn.Module, slice]:
        """The module that makes a head's queries, keys or values, and their columns."""
        attn, kind, d = self.attn[layer], self.config.model_type, self.own[f"z{layer}"].shape[-1] // self.heads
        kv, i = head * self.kv // self.heads, "qkv".index(part)
        if (fused := inside(attn, "query_key_value", "qkv_proj", "Wqkv", "c_attn")) is None:
            h = head if part == "q" else kv
            return inside(attn, f"{part}_proj"), slice(h * d, (h + 1) * d)
        if kind == "codegen":  # four groups of heads, each with its queries, values and keys
            per = self.heads // 4
            start = ((head // per * 3 + "qvk".index(part)) * per + head % per) * d
        elif kind in ("gpt_neox", "bloom") or kind == "falcon" and not self.config.multi_query and not self.config.new_decoder_architecture:
            start = (head * 3 + i) * d  # a head's three side by side
        else:
            start = head * d if part == "q" else (self.heads + (i - 1) * self.kv + kv) * d
        return fused, slice(start, start + d)

    def edge(self, sender: str, receiver: str, again: bool, share: float = 1.0) -> Tensor:
        """Logits [vocab] of the first prompt when one receiver reads the other run's write of one sender (see `change`), or goes a share of the way to it."""
        d = self.change(sender, again) * share
        if receiver == "logits":
            return self.run(self.ids, [(self.norm, "in", lambda x: x + d)])
        layer = int(receiver[1 : receiver.index(".")] if receiver.endswith("mlp") else receiver[1 : receiver.index("H")])
        early = [(self.blocks[layer], "in", lambda x: x + d)]
        if receiver.endswith("mlp"):
            place, where = self.writes["mlp"][layer], slice(None)
            early = early if self.parallel else [(self.writes["attn"][layer], "out", lambda x: x + d / self.factor)]
        else:
            place, where = self.projection(layer, receiver[-1], int(receiver[receiver.index("H") + 1 : -2]))
        (new,) = self.read(self.ids, [(place, "out")], early)

        def put(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., where] = new[..., where]
            return x

        return self.run(self.ids, [(place, "out", put)])
