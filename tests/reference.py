"""`families.reference` of the test architectures in numpy, with edits in place and a memory: Hugging Face's own modules under plain hooks. Imports nothing of Loupe."""

import numpy as np
import torch as t
from families import reference as families
from transformers import AutoConfig

Spot = families.Spot


class Reference(families.Reference):
    """`unembed` [vocab, d_model] and `b_u` in double; `arch`: the config's model type; `blocks`, `embed`, `norm`: modules."""

    def __init__(self, folder):
        self.arch = AutoConfig.from_pretrained(folder).model_type
        super().__init__(self.arch, folder)
        self.hf.requires_grad_(True)
        self.embed, self.known, self.softcap = families.module(self.body, self.paths.embed), {}, self.cap
        out = self.hf.get_output_embeddings()
        self.unembed = out.weight.detach().double().numpy()
        self.b_u = 0.0 if getattr(out, "bias", None) is None else out.bias.detach().double().numpy()

    def attn(self, i: int) -> t.nn.Module:
        return self.at(i, self.paths.attn)

    def place(self, site: str, i: int | None) -> tuple[t.nn.Module, str]:
        if site == "embed":
            return self.embed, "out"
        return (self.at(i, self.paths.ln2), "in") if site == "resid_mid" else super().place(site, i)

    def columns(self, part: str, head: int) -> slice:
        """Where a head's numbers lie in the last axis of its place."""
        columns = super().columns(part, head)
        return slice(int(columns[0]), int(columns[-1]) + 1)

    def run(self, ids, edits=(), read: list[Spot] = ()) -> tuple[np.ndarray, dict[Spot, t.Tensor]]:
        """Logits [batch, seq, vocab] and what the read places held. Edits get a tensor [batch, seq, ...] that they change in place."""

        logits, got = super().run(ids, [(spot, lambda x, fn=fn: (fn(x), x)[1]) for spot, fn in edits], read)
        return logits.numpy(), got

    def read(self, ids, spot: Spot) -> t.Tensor:
        """What one place held in a plain run; remembered."""
        if (ids, spot) not in self.known:
            self.known[ids, spot] = self.run([ids], read=[spot])[1][spot]
        return self.known[ids, spot]

    def logits(self, resid: t.Tensor) -> np.ndarray:
        """Final norm, unembedding and soft cap of a residual [..., d_model], in double."""
        with t.no_grad():
            out = self.norm(resid).double().numpy() @ self.unembed.T + self.b_u
        return self.softcap * np.tanh(out / self.softcap) if self.softcap else out

    def patterns(self, ids) -> list[np.ndarray]:
        with t.no_grad():
            return [a.numpy() for a in self.hf(t.tensor(ids), use_cache=False, output_attentions=True).attentions]


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))
