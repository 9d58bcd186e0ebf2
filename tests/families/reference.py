"""
What every architecture computes, by its definition: Hugging Face's modules of the untouched model under plain torch hooks. Imports nothing of Loupe or TransformerLens.

Of a family it knows where things live (module paths in a block, the layout of a fused q k v) and what stands between a part's output and the stream: `between` of
attention and MLP is a norm after it, `times` a multiplier. Patterns are read and written where the model calls softmax inside its attention.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch as t
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

Spot = tuple[str, int | None]  # a site and its layer
Edit = tuple[Spot, Callable[[Tensor], Tensor]]
SITES = ("resid_pre", "resid_post", "attn", "before_norm", "z", "q", "k", "v", "mlp", "mlp_in", "neuron")
SOFTMAX = (t.softmax, t.nn.functional.softmax, t.Tensor.softmax)


@dataclass(frozen=True)
class Paths:
    """Module paths: of the body in the model, of the rest in the body or in a block; "" where there is none. `ln1`, `ln2`: norms before attention and MLP."""

    body: str = "model"
    blocks: str = "layers"
    embed: str = "embed_tokens"
    position: str = ""
    norm: str = "norm"
    head: str = "lm_head"
    attn: str = "self_attn"
    qkv: tuple[str, str, str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    layout: str = "apart"
    out: str = "self_attn.o_proj"
    attn_adds: str = ""  # whose output is added to the stream: "" the same
    mlp: str = "mlp"
    neurons: str = "mlp.down_proj"
    mlp_adds: str = ""
    ln1: str = "input_layernorm"
    ln2: str = "post_attention_layernorm"
    parallel: bool = False
    gated: bool = False  # z is not pattern times the values' projection: a gate, a norm or a clip comes in between
    beside: str = ""  # what adds to the stream beside attention and MLP
    joint: str = ""  # of q, k, v what passes a norm over all heads together


LLAMA = Paths()
GPT2 = Paths(
    "transformer", "h", "wte", "wpe", "ln_f", "lm_head", "attn", ("attn.c_attn",) * 3, "blocks", "attn.c_proj", "", "mlp", "mlp.c_proj", "", "ln_1", "ln_2"
)
NEOX = Paths("gpt_neox", "layers", "embed_in", "", "final_layer_norm", "lm_head", "attention", ("attention.query_key_value",) * 3, "by head", "attention.dense",
             neurons="mlp.dense_4h_to_h")  # fmt: skip
FALCON = Paths("transformer", "h", "word_embeddings", "", "ln_f", "lm_head", "self_attention", ("self_attention.query_key_value",) * 3, "by head", "self_attention.dense",
               mlp_adds="mlp.dense_4h_to_h", neurons="mlp.dense_4h_to_h")  # fmt: skip
OPT = replace(LLAMA, body="model.decoder", position="embed_positions", norm="final_layer_norm", out="self_attn.out_proj", mlp="fc1", neurons="fc2", mlp_adds="fc2",
              ln1="self_attn_layer_norm", ln2="final_layer_norm")  # fmt: skip
POST = replace(LLAMA, ln1="", ln2="", attn_adds="post_attention_layernorm", mlp_adds="post_feedforward_layernorm")
SANDWICH = replace(POST, ln1="input_layernorm", ln2="pre_feedforward_layernorm")
GPTJ = replace(
    GPT2, position="", qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), layout="apart", out="attn.out_proj", ln2="ln_1", neurons="mlp.fc_out", parallel=True
)
LATENT = replace(LLAMA, qkv=("self_attn.q_b_proj", "", ""))
STATE = Paths(body="backbone", embed="embeddings", norm="norm_f", attn="", qkv=("", "", ""), out="", mlp="", neurons="", ln1="norm", ln2="")
HYBRID = replace(
    LLAMA,
    norm="final_layernorm",
    attn="",
    qkv=("", "", ""),
    out="",
    attn_adds="self_attn|mamba|conv",
    mlp="feed_forward",
    neurons="feed_forward.down_proj|feed_forward.w2",
    ln2="pre_ff_layernorm",
)
MIXED = replace(HYBRID, norm="norm", attn_adds="self_attn|linear_attn|mamba", mlp="mlp", neurons="mlp.down_proj", ln2="post_attention_layernorm")
PATHS: dict[str, Paths] = {
    "gpt2": GPT2,
    "gpt_bigcode": replace(GPT2, layout="q k v"),
    "gpt_bigcode-multi_head": replace(GPT2, layout="by head"),
    "gpt_neo": replace(GPT2, attn="attn.attention", qkv=tuple(f"attn.attention.{p}_proj" for p in "qkv"), layout="apart", out="attn.attention.out_proj"),
    "opt": OPT,
    "xglm": replace(OPT, body="model", position="", norm="layer_norm"),
    "bloom": replace(FALCON, embed="word_embeddings_layernorm"),
    "mpt": Paths("transformer", "blocks", "wte", "", "norm_f", "lm_head", "attn", ("attn.Wqkv",) * 3, "blocks", "attn.out_proj", "", "ffn", "ffn.down_proj", "ffn.down_proj", "norm_1", "norm_2"),
    "falcon-alibi": FALCON,
    "falcon-7b": replace(FALCON, layout="q k v", ln2="input_layernorm", parallel=True),
    "falcon-40b": replace(FALCON, layout="by group", ln1="ln_attn", ln2="ln_mlp", parallel=True),
    "gpt_neox": replace(NEOX, parallel=True),
    "gpt_neox-sequential": NEOX,
    "gptj": GPTJ,
    "codegen": replace(GPTJ, qkv=("attn.qkv_proj",) * 3, layout="codegen"),
    "phi": replace(LLAMA, norm="final_layernorm", out="self_attn.dense", neurons="mlp.fc2", ln2="input_layernorm", parallel=True),
    "stablelm-parallel": replace(LLAMA, ln2="input_layernorm", parallel=True),
    "cohere": replace(LLAMA, ln2="input_layernorm", parallel=True),
    "phi3": replace(LLAMA, qkv=("self_attn.qkv_proj",) * 3, layout="q k v"),
    "starcoder2": replace(LLAMA, neurons="mlp.c_proj"),
    "apertus": replace(LLAMA, ln1="attention_layernorm", ln2="feedforward_layernorm"),
    "nanochat": replace(LLAMA, neurons="mlp.fc2"),
    "youtu": replace(LATENT, neurons="mlp.down_proj"),
    "modernbert-decoder": replace(LLAMA, embed="embeddings", norm="final_norm", head="lm_head decoder", attn="attn", qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"), out="attn.Wo", neurons="mlp.Wo", ln1="attn_norm", ln2="mlp_norm"),
    "olmo-clip": replace(LLAMA, gated=True),
    "olmo2": replace(POST, joint="qk"),
    "olmo3": replace(POST, joint="qk"),
    "exaone4": POST,
    "glm4": replace(SANDWICH, attn_adds="post_self_attn_layernorm", mlp_adds="post_mlp_layernorm", ln2="post_attention_layernorm"),
    "gemma2": SANDWICH,
    "gemma3": SANDWICH,
    "gemma4": replace(SANDWICH, gated=True),
    "vaultgemma": replace(LLAMA, ln2="pre_feedforward_layernorm"),
    "olmoe": replace(LLAMA, joint="qk"),
    "flex_olmo": replace(POST, joint="qk"),
    "granitemoe": replace(LLAMA, mlp="block_sparse_moe"),
    "llama4": replace(LLAMA, mlp="feed_forward", neurons="feed_forward.down_proj"),
    "minimax_m2": replace(LLAMA, joint="qk"),
    "afmoe": replace(SANDWICH, mlp_adds="post_mlp_layernorm", ln2="pre_mlp_layernorm", gated=True),
    "laguna": replace(LLAMA, gated=True),
    "bitnet": replace(LLAMA, gated=True, joint="v"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "glm_moe_dsa"), LATENT),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "ernie4_5_moe", "glm4_moe"), LLAMA),
    **dict.fromkeys(("phi-qk_norm",), replace(LLAMA, norm="final_layernorm", out="self_attn.dense", neurons="mlp.fc2", ln2="input_layernorm", parallel=True)),
    **dict.fromkeys(("cohere-qk_norm", "cohere2"), replace(LLAMA, ln2="input_layernorm", parallel=True)),
    # no attention in every layer, or none that has one place: only the stream and what is said of it can be read
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), STATE),
    "nemotron_h": replace(STATE, body="model"),
    "rwkv": replace(STATE, body="rwkv", blocks="blocks", norm="ln_out", head="head"),
    **dict.fromkeys(("jamba", "bamba"), HYBRID),
    "falcon_h1": replace(LLAMA, norm="final_layernorm", mlp="feed_forward", neurons="feed_forward.down_proj", ln2="pre_ff_layernorm", beside="mamba"),
    "zamba2": replace(HYBRID, attn_adds="", mlp=""),
    "granitemoehybrid": replace(MIXED, mlp=""),
    "recurrent_gemma": replace(HYBRID, norm="final_norm", attn_adds="temporal_block", mlp="mlp_block", neurons="mlp_block.down_proj"),
    "lfm2": replace(HYBRID, norm="embedding_norm"),
    "lfm2_moe": replace(HYBRID, norm="embedding_norm"),
    **dict.fromkeys(("qwen3_next", "qwen3_5", "qwen3_5_moe"), MIXED),
    "olmo_hybrid": replace(MIXED, attn_adds="linear_attn|post_attention_layernorm", mlp_adds="post_feedforward_layernorm|mlp"),
    "jetmoe": replace(MIXED, attn="self_attention", attn_adds="self_attention", neurons=""),  # its heads are experts: no one place of z or q
    "opt-350m": replace(STATE, body="model.decoder", embed="embed_tokens", norm=""),
    "openai-gpt": replace(STATE, body="transformer", blocks="h", embed="tokens_embed", norm=""),
    "hrm_text": replace(STATE, body="model", blocks="H_module.layers", embed="embed_tokens", norm=""),
}  # fmt: skip


def module(root: t.nn.Module, path: str) -> t.nn.Module:
    """The first of some paths ("self_attn|mamba") that there is; AttributeError where there is none."""
    *others, last = path.split("|")
    if not path:
        raise AttributeError("no path")
    for some in others:
        try:
            return root.get_submodule(some)
        except AttributeError:
            continue
    return root.get_submodule(last)


def first(x: object) -> Tensor:
    return x[0] if isinstance(x, tuple) else x


class Softmax(TorchFunctionMode):
    """Hands every softmax inside an attention to `seen`, as [batch, head, destination, source]: what is returned takes its place."""

    def __init__(self, where: Callable[[], int | None], seen: Callable[[int, Tensor], Tensor]):
        super().__init__()
        self.where, self.seen = where, seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        layer = self.where()
        if func not in SOFTMAX or layer is None or out.ndim < 3:
            return out
        return self.seen(layer, out).view(out.shape)


class Reference:
    """The untouched model, and how its parts are read, written and differentiated. `times`: the multiplier between attention's and the MLP's output and the stream."""

    def __init__(self, family: str, folder, dtype: t.dtype = t.float32):
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval().requires_grad_(False)
        self.family, self.config, self.paths = family, self.hf.config, PATHS.get(family, LLAMA)
        p = self.paths
        self.body = module(self.hf, p.body)
        self.blocks = list(module(self.body, p.blocks))
        self.norm = module(self.body, p.norm) if p.norm else None
        self.head = t.nn.Sequential(*(module(self.hf, path) for path in p.head.split()))
        c = self.config
        self.n, self.heads = len(self.blocks), getattr(c, "num_attention_heads", None) or getattr(c, "n_heads", 0)
        self.times = getattr(c, "residual_multiplier", 1.0)
        if p.out:
            out = self.at(0, p.out).weight
            self.d_head = out.shape[0 if type(self.at(0, p.out)).__name__ == "Conv1D" else 1] // self.heads
        self.kv_heads = self.count_kv()
        if (
            family == "falcon-alibi"
        ):  # transformers' eager attention adds ALiBi to the scores and once more with the mask; its default attention, with the mask alone
            for block in self.blocks:
                block.self_attention.register_forward_pre_hook(lambda _, args, kw: (args, kw | {"alibi": t.zeros_like(kw["alibi"])}), with_kwargs=True)
        self.cap = getattr(c, "final_logit_softcapping", None) or getattr(c, "logits_soft_cap", None)
        self.scale = getattr(c, "logit_scale", None) or 1 / (getattr(c, "logits_scaling", None) or 1)

    def at(self, layer: int, path: str) -> t.nn.Module:
        return module(self.blocks[layer], path)

    def count_kv(self) -> int:
        c, family = self.config, self.family
        if self.config.model_type == "falcon":
            return c.num_kv_heads if c.new_decoder_architecture else 1 if c.multi_query else c.num_attention_heads
        if family.startswith("gpt_bigcode"):
            return 1 if c.multi_query else self.heads
        return self.heads if self.paths.qkv[1] == "" else getattr(c, "num_key_value_heads", None) or self.heads

    # ---------------------------------------------------------------- where things live

    def place(self, site: str, layer: int | None) -> tuple[t.nn.Module, str]:
        """The module, and whether its input or its output is meant."""
        p = self.paths
        match site:
            case "embed":
                return self.blocks[0], "in"
            case "resid_pre":
                return self.blocks[layer], "in"
            case "resid_post":
                return self.blocks[layer], "out"
            case "attn":
                return self.at(layer, p.attn_adds or p.out), "out"
            case "mlp":
                return self.at(layer, p.mlp_adds or p.mlp), "out"
            case "before_norm":
                return self.at(layer, p.out), "out"
            case "z":
                return self.at(layer, p.out), "in"
            case "neuron":
                return self.at(layer, p.neurons), "in"
            case "mlp_in":
                return self.at(layer, p.mlp), "in"
            case "q" | "k" | "v":
                return self.at(layer, p.qkv["qkv".index(site)]), "out"
        raise AssertionError(site)

    def columns(self, part: str, head: int) -> Tensor:
        """Where a head's numbers lie in the last axis of its place; of k and v those of the head that its group shares."""
        d, n, kv = self.d_head, self.heads, self.kv_heads
        j, i = "qkv".find(part), head if part in "zq" else head // (n // kv)
        if part == "z":
            start = head * d
        elif self.paths.qkv[1] == "":  # latent: queries of their own width
            d = self.at(0, self.paths.qkv[0]).weight.shape[0] // n
            start = head * d
        else:
            match self.paths.layout:
                case "apart":
                    start = i * d
                case "blocks":
                    start = (j * n + i) * d
                case "q k v":
                    start = (i + (0, n, n + kv)[j]) * d
                case "by head":
                    start = (3 * i + j) * d
                case "by group":
                    per = n // kv
                    start = (head // per * (per + 2) + (head % per if j == 0 else per + j - 1)) * d
                case "codegen":  # in four pieces of queries, values, keys
                    per = n // 4
                    start = ((i // per * 3 + (0, 2, 1)[j]) * per + i % per) * d
        return t.arange(start, start + d)

    # ---------------------------------------------------------------- running

    def run(self, ids, edits: list[Edit] = (), read: list[Spot] = (), grad: bool = False) -> tuple[Tensor, dict[Spot, Tensor]]:
        """Logits [batch, seq, vocab] under edits, in order, and what the read places held after them. Edits take and give [batch, seq, ...]; patterns [batch, head, d, s]."""
        ids, got, inside = t.as_tensor(ids), {}, []
        shape = ids.shape
        patterns = {layer: [fn for (site, at), fn in edits if site == "pattern" and at == layer] for layer in range(self.n)}

        def seen(layer: int, x: Tensor) -> Tensor:
            x = x.view(len(ids), -1, *x.shape[-2:])
            sink = x.shape[-1] - shape[1]
            for fn in patterns[layer]:
                x = t.cat([fn(x[..., : shape[1]]), x[..., shape[1] :]], -1) if sink else fn(x)
            got["pattern", layer] = x[..., : shape[1]]
            return x

        with ExitStack() as stack, t.set_grad_enabled(grad):

            def hook(spot: Spot, fn: Callable[[Tensor], Tensor]) -> None:
                mod, kind = self.place(*spot)

                def whole(x: Tensor) -> Tensor:
                    return fn(x.view(*shape, -1)).view(x.shape)

                def before(_, args, kwargs):
                    if args:
                        return (whole(args[0]), *args[1:]), kwargs
                    return args, kwargs | {"hidden_states": whole(kwargs["hidden_states"])}

                def after(_, args, out):
                    return type(out)((whole(out[0]), *out[1:])) if isinstance(out, (tuple, list)) else whole(out)

                handle = mod.register_forward_pre_hook(before, with_kwargs=True) if kind == "in" else mod.register_forward_hook(after)
                stack.callback(handle.remove)

            for layer, block in enumerate(self.blocks):
                if not self.paths.attn:
                    continue
                attention = module(block, self.paths.attn)
                for handle in (
                    attention.register_forward_pre_hook(lambda *_, layer=layer: inside.append(layer)),
                    attention.register_forward_hook(lambda *_: inside.clear()),
                ):
                    stack.callback(handle.remove)
            for spot, fn in edits:
                if spot[0] != "pattern":
                    hook(spot, fn)
            for spot in read:
                if spot[0] != "pattern":
                    hook(spot, lambda x, spot=spot: got.__setitem__(spot, x.clone()) or x)
            with Softmax(lambda: inside[-1] if inside else None, seen):
                logits = self.hf(input_ids=ids, use_cache=False).logits
        return logits, got

    def has(self, site: str, layer: int) -> bool:
        """Whether a layer has a site: kinds of layers differ in some architectures."""
        if site == "pattern":
            return bool(self.paths.attn)
        if site == "resid_mid":
            return not self.paths.parallel and not self.paths.beside and self.has("attn", layer)
        try:
            self.place(site, layer)
        except AttributeError:
            return False
        return True

    @cached_property
    def spots(self) -> list[Spot]:
        """Every place that can be read."""
        return [(s, i) for i in range(self.n) for s in SITES if self.has(s, i)]

    def trace(self, ids: tuple[int, ...]) -> dict[Spot, Tensor]:
        """Everything that one plain run held; resid_mid is the stream plus what attention added. Remembered."""
        known = self.__dict__.setdefault("known", {})
        if ids not in known:
            logits, got = self.run([ids], read=self.spots)
            for i in [i for i in range(self.n) if self.has("attn", i)]:
                got["resid_mid", i] = got["resid_pre", i] + self.times * got["attn", i]
            known[ids] = got | {("logits", None): logits}
        return known[ids]

    def edit(self, site: str, layer: int, fn: Callable[[Tensor], Tensor]) -> list[Edit]:
        """An edit of a site. resid_mid has no place that reaches both the MLP and the skip: it is written through what attention adds."""
        if site != "resid_mid":
            return [((site, layer), fn)]
        held = {}
        return [
            (("resid_pre", layer), lambda x: held.__setitem__("x", x) or x),
            (("attn", layer), lambda a: (fn(held["x"] + self.times * a) - held["x"]) / self.times),
        ]

    # ---------------------------------------------------------------- norms and the unembedding

    @staticmethod
    def frozen(norm: t.nn.Module | None, x: Tensor, parts: Tensor) -> Tensor:
        """Parts [n, ..., d] of x [..., d] through a norm whose scale stays what it is at x; the norm's bias is left out. What the norm is, is read from what it does."""
        if norm is None:
            return parts
        with t.no_grad():
            bias = norm(t.zeros_like(x))
            centres = t.allclose(norm(x + 1.0), norm(x), atol=1e-4)
        mean = (lambda y: y - y.mean(-1, keepdim=True)) if centres else (lambda y: y)
        with t.no_grad():
            gain = (norm(x) - bias) / mean(x)
        return mean(parts) * gain

    def bias_of(self, norm: t.nn.Module | None, x: Tensor) -> Tensor:
        with t.no_grad():
            return t.zeros_like(x) if norm is None else norm(t.zeros_like(x))

    def post(self, part: str, layer: int) -> t.nn.Module | None:
        """The norm between a part and the stream."""
        path = self.paths.attn_adds if part == "attn" else self.paths.mlp_adds
        return self.at(layer, path) if path and "norm" in path else None

    def unembed(self, normed: Tensor) -> Tensor:
        """Logits of rows behind the final norm: unembedding, scale, soft cap."""
        logits = self.head(normed) * self.scale
        return self.cap * t.tanh(logits / self.cap) if self.cap else logits

    def logits(self, resid: Tensor) -> Tensor:
        return self.unembed(self.norm(resid))

    # ---------------------------------------------------------------- what heads write

    def head_writes(self, layer: int, z: Tensor, x: Tensor | None = None) -> Tensor:
        """What each head's z [..., heads d_head] adds to the stream [head, ..., d_model], through the norm after attention with its scale frozen at its input x."""
        out, zero = self.at(layer, self.paths.out), t.zeros_like(z)
        parts = []
        with t.no_grad():
            for h in range(self.heads):
                mine, cols = zero.clone(), self.columns("z", h)
                mine[..., cols] = z[..., cols]
                parts.append(out(mine) - out(zero))
        parts = t.stack(parts)
        return self.times * (parts if x is None else self.frozen(self.post("attn", layer), x, parts))

    # ---------------------------------------------------------------- against itself

    def proof(self, ids: tuple[int, ...]) -> dict[str, float]:
        """The largest error of each identity that must hold if the paths above are right."""
        a, p, out = self.trace(ids), self.paths, {}
        plain = AutoModelForCausalLM.from_pretrained(self.hf.config._name_or_path, dtype=t.float32).eval()
        size = lambda x, y: float((x - y).abs().max())  # noqa: E731
        with t.no_grad():
            out["hooked = plain"] = size(a["logits", None], plain(t.tensor([ids]), use_cache=False).logits)
        if self.norm is not None:
            out["head = logits"] = size(self.logits(a["resid_post", self.n - 1]).detach(), a["logits", None])
        out["blocks"] = max(size(a["resid_post", i], a["resid_pre", i + 1]) for i in range(self.n - 1))
        if ("resid_mid", 0) in a and ("mlp", 0) in a and not p.beside:
            out["stream"] = max(size(a["resid_mid", i] + self.times * a["mlp", i], a["resid_post", i]) for i in range(self.n))
        if not p.out or p.beside:
            return out
        heads = [self.head_writes(i, a["z", i], a["before_norm", i]).sum(0) for i in range(self.n)]
        bias = [self.bias_of_attention(i, a["before_norm", i]) for i in range(self.n)]
        out["heads"] = max(size(heads[i] + bias[i], self.times * a["attn", i]) for i in range(self.n))
        whole = sum(heads) + sum(bias) + self.times * sum(a["mlp", i] for i in range(self.n)) + a["resid_pre", 0]
        x = a["resid_post", self.n - 1]
        out["parts"] = size(self.frozen(self.norm, x, whole) + self.bias_of(self.norm, x), self.norm(x).detach())
        if ("v", 0) in a and not p.gated:
            for i in range(self.n):
                v = t.stack([a["v", i][..., self.columns("v", h)] for h in range(self.heads)], 1)
                z = t.stack([a["z", i][..., self.columns("z", h)] for h in range(self.heads)], 1)
                out["pattern v = z"] = max(out.get("pattern v = z", 0), size(a["pattern", i] @ v, z))
        sites = [s for s in ("resid_pre", "resid_post", "attn", "z", "q", "k", "v", "pattern", "resid_mid", "mlp", "neuron") if self.has(s, self.n - 1)]
        own = [edit for s in sites for edit in self.edit(s, self.n - 1, lambda x, s=s: a[s, self.n - 1].clone())]
        out["own value"] = size(self.run([ids], own)[0], a["logits", None])
        return out | self.proof_of_columns(ids)

    def bias_of_attention(self, layer: int, x: Tensor) -> Tensor:
        """What attention adds to the stream when every z is zero, with the norm after it frozen."""
        out, post = self.at(layer, self.paths.out), self.post("attn", layer)
        with t.no_grad():
            b = out(t.zeros(*x.shape[:-1], self.heads * self.d_head, dtype=x.dtype)).view(x.shape)
        return self.times * (b if post is None else self.frozen(post, x, b) + self.bias_of(post, x))

    def proof_of_columns(self, ids: tuple[int, ...]) -> dict[str, float]:
        """A head's q moves its own pattern and no other's, its k those of its group, its v the z of its group; each moves it."""
        a, per, worst, least = self.trace(ids), self.heads // self.kv_heads, 0.0, float("inf")
        for part in "qkv":
            if (part, 0) not in a or part in self.paths.joint:
                continue

            def tripled(x: Tensor, part: str = part) -> Tensor:
                x = x.clone()
                for h in range(self.heads):
                    cols = self.columns(part, h)
                    x[h][:, cols] = x[h][:, cols] * 3 + t.sin(t.arange(len(cols), dtype=x.dtype))
                return x

            got = self.run([ids] * self.heads, [((part, 0), tripled)], [("z", 0)])[1]
            for h in range(self.heads):
                if part == "v":
                    change = t.stack([(got["z", 0][h] - a["z", 0][0])[..., self.columns("z", g)].abs().amax() for g in range(self.heads)])
                else:
                    change = (got["pattern", 0][h] - a["pattern", 0][0]).abs().amax((1, 2))
                mine = t.tensor([g == h or part != "q" and g // per == h // per for g in range(self.heads)])
                worst, least = max(worst, float(change[~mine].max()) if (~mine).any() else 0.0), min(least, float(change[mine].min()))
        return {"heads apart": worst, "every q, k, v moves its head": float(least < 1e-3)}
