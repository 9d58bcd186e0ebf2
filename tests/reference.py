"""An independent computation: Hugging Face's own classes, forward hooks on their modules, and numpy. Imports nothing of Loupe."""

from collections.abc import Callable
from contextlib import ExitStack

import numpy as np
import torch as t
from transformers import AutoModelForCausalLM

Spot = tuple[str, int | None]


class Reference:
    def __init__(self, folder):
        self.hf = AutoModelForCausalLM.from_pretrained(folder, dtype=t.float32, attn_implementation="eager").eval()
        self.config, self.known = self.hf.config, {}
        self.arch = self.config.model_type
        match self.arch:
            case "gpt2":
                body = self.hf.transformer
                self.blocks, self.embed, self.norm = body.h, body.wte, body.ln_f
            case "gpt_neox":
                body = self.hf.gpt_neox
                self.blocks, self.embed, self.norm = body.layers, body.embed_in, body.final_layer_norm
            case _:
                body = self.hf.model
                self.blocks, self.embed, self.norm = body.layers, body.embed_tokens, body.norm
        self.heads = self.config.num_attention_heads
        self.kv_heads = getattr(self.config, "num_key_value_heads", None) or self.heads
        self.d_head = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.heads
        self.softcap = getattr(self.config, "final_logit_softcapping", None)
        self.unembed = self.hf.get_output_embeddings().weight.detach().double().numpy()
        bias = getattr(self.hf.get_output_embeddings(), "bias", None)
        self.b_u = 0.0 if bias is None else bias.detach().double().numpy()

    # where things live: (module, "in" or "out")

    def attn(self, i: int):
        b = self.blocks[i]
        return b.attn if self.arch == "gpt2" else b.attention if self.arch == "gpt_neox" else b.self_attn

    def place(self, site: str, i: int | None) -> tuple:
        g, neox = self.arch == "gpt2", self.arch == "gpt_neox"
        if site == "embed":
            return self.embed, "out"
        b, a = self.blocks[i], self.attn(i)
        match site:
            case "resid_pre":
                return b, "in"
            case "resid_post":
                return b, "out"
            case "resid_mid":
                return (b.ln_2 if g else b.pre_feedforward_layernorm if self.arch == "gemma2" else b.post_attention_layernorm), "in"
            case "attn":
                return (b.post_attention_layernorm if self.arch == "gemma2" else a), "out"
            case "mlp":
                return (b.post_feedforward_layernorm if self.arch == "gemma2" else b.mlp), "out"
            case "z":
                return (a.c_proj if g else a.dense if neox else a.o_proj), "in"
            case "neuron":
                return (b.mlp.c_proj if g else b.mlp.dense_4h_to_h if neox else b.mlp.down_proj), "in"
            case "q" | "k" | "v":
                return (a.c_attn if g else a.query_key_value if neox else getattr(a, f"{site}_proj")), "out"
        raise AssertionError(site)

    def columns(self, part: str, head: int) -> slice:
        """Where a head's numbers lie in the last axis of its place."""
        d, h = self.d_head, head
        if part in ("k", "v"):
            h = head // (self.heads // self.kv_heads)
        if self.arch == "gpt2" and part != "z":
            return slice("qkv".index(part) * self.heads * d + h * d, "qkv".index(part) * self.heads * d + (h + 1) * d)
        if self.arch == "gpt_neox" and part != "z":
            start = h * 3 * d + "qkv".index(part) * d
            return slice(start, start + d)
        return slice(h * d, (h + 1) * d)

    def run(self, ids, edits: list[tuple[Spot, Callable]] = (), read: list[Spot] = ()) -> tuple[np.ndarray, dict]:
        """Logits [batch, seq, vocab] and what the read places held. Edits get a tensor [batch, seq, ...] that they change in place."""
        got = {}
        with ExitStack() as stack, t.no_grad():

            def hook(module, kind: str, fn: Callable) -> None:
                def before(_, args, kwargs):
                    fn(args[0] if args else kwargs["hidden_states"])

                def after(_, args, out):
                    fn(out[0] if isinstance(out, tuple) else out)

                handle = module.register_forward_pre_hook(before, with_kwargs=True) if kind == "in" else module.register_forward_hook(after)
                stack.callback(handle.remove)

            for spot, fn in edits:
                hook(*self.place(*spot), fn)
            for spot in read:
                hook(*self.place(*spot), lambda x, spot=spot: got.__setitem__(spot, x.clone()))
            logits = self.hf(t.tensor(ids), use_cache=False).logits
        return logits.numpy(), got

    def read(self, ids, spot: Spot) -> t.Tensor:
        """What one place held in a plain run; remembered."""
        if (ids, spot) not in self.known:
            self.known[ids, spot] = self.run([ids], read=[spot])[1][spot]
        return self.known[ids, spot]

    def logits(self, resid: t.Tensor) -> np.ndarray:
        """Final norm, unembedding and soft cap of a residual [..., d_model], in double."""
        with t.no_grad():
            x = self.norm(resid).double().numpy()
        out = x @ self.unembed.T + self.b_u
        return self.softcap * np.tanh(out / self.softcap) if self.softcap else out

    def patterns(self, ids) -> list[np.ndarray]:
        with t.no_grad():
            return [a.numpy() for a in self.hf(t.tensor(ids), use_cache=False, output_attentions=True).attentions]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
