"""What wrote into a head's queries and keys: the residual stream's terms, each through the frozen norm before attention and the head's matrix."""

from collections.abc import Iterator

import torch as t
from torch import Tensor

from model.bridge import Model
from model.runs import Runs
from model.writes import POSITION, bias_write, embedding, frozen_norm, head_writes, linear_norm, over_scale, post_norm, post_scales, pre_norm, require_parts
from techniques.attribution.logits import factor
from techniques.qk.requests import BIAS
from vocabulary.nodes import UserError


def names(model: Model, layer: int) -> list[str]:
    """The hook points that are read: what wrote before a layer, its queries and keys."""
    before = pre_norm(model, layer, "attn")
    out = [embedding(model)[0], *[POSITION] * (POSITION in model.points), *([before[1]] if before else [])]
    out += [f"blocks.{layer}.attn.hook_{x}" for x in ("q", "k")]
    for n in range(layer):
        out += [f"blocks.{n}.attn.hook_z", f"blocks.{n}.hook_mlp_out"]
    below = {f"blocks.{n}." for n in range(layer)}
    return list(dict.fromkeys([*out, *(s for s in post_scales(model, "attn") if s[: s.index(".", 7) + 1] in below)]))


def written(runs: Runs, which: str, layer: int, acts: dict[str, Tensor]) -> Iterator[tuple[list[str], Tensor]]:
    """Names and what they added to the stream before a layer [component, seq, d_model], a few at a time."""
    model = runs.model
    left = t.tensor([[factor(runs, which, "attn", n, p) for p in range(len(runs.row(which).ids))] for n in range(layer)])
    name, times = embedding(model)
    yield ["embed"], acts[name] * times
    if POSITION in acts:
        yield ["position"], acts[POSITION].expand_as(acts[name])
    for n in range(layer):
        post = post_norm(model, n, "attn")
        scale = None if post is None else acts[post[1]]
        keep = left[n][:, None].to(model.device)
        yield [f"L{n}H{h}" for h in range(model.info.n_heads)], head_writes(model, n, over_scale(acts[f"blocks.{n}.attn.hook_z"], scale))[:, 0] * keep
        bias = bias_write(model, n, scale)
        if isinstance(bias, Tensor) and bias.any():
            yield [f"L{n}.bias"], bias.expand(1, len(keep), -1) * keep
        yield [f"L{n}.mlp"], acts[f"blocks.{n}.hook_mlp_out"]


class Reader:
    """How a head's queries ("q") or keys ("k") read the stream: the norm before attention, frozen, then the head's matrix."""

    def __init__(self, model: Model, layer: int, part: str, head: int, acts: dict[str, Tensor]):
        require_parts(model)
        self.model, self.norm, self.acts = model, pre_norm(model, layer, "attn"), acts
        try:
            attention = model.bridge.blocks[layer].attn
            w, b = (getattr(attention, f"{x}_{part.upper()}") for x in "Wb")
        except (AttributeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{model.info.architecture}: layer {layer} has no matrix for each head's {WORDS[part]}, so what wrote into them can't be told apart"
            ) from error
        self.weight, self.bias = w[head].float(), None if b is None else b[head].float()
        if self.weight.shape != (model.info.d_model, acts[f"blocks.{layer}.attn.hook_{part}"].shape[-1]):
            raise UserError(
                f"{model.info.architecture}: layer {layer} has no matrix for each head's {WORDS[part]}, so what wrote into them can't be told apart"
            )

    def __call__(self, x: Tensor) -> Tensor:
        """What parts of the stream [..., seq, d_model] add to the head's queries or keys [..., seq, d_head], float64."""
        x = x.float()
        if self.norm is not None:
            x = frozen_norm(self.model, self.norm[0], self.acts[self.norm[1]].float(), x)
        return (x.to(self.weight.device) @ self.weight).cpu().double()

    def real(self, x: Tensor) -> Tensor:
        """Those of a whole stream [..., seq, d_model], the norm computed again."""
        x = x if self.norm is None else self.norm[0](x)
        out = x.float().to(self.weight.device) @ self.weight
        return out if self.bias is None else out + self.bias

    def constant(self) -> Tensor:
        """What is there without any stream [d_head]: the norm's bias through the matrix, and its own."""
        norm = None if self.norm is None else linear_norm(self.model, self.norm[0]).bias
        out = t.zeros(self.weight.shape[1], device=self.weight.device)
        out = out if norm is None else out + norm.to(out.device) @ self.weight
        return (out if self.bias is None else out + self.bias).cpu().double()


WORDS = {"q": "queries", "k": "keys"}


@t.no_grad()
def read(runs: Runs, which: str, layer: int, readers: dict[str, Reader], acts: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
    """Names of components, and what each adds to the queries and keys that `readers` read [component, seq, d_head], float64."""
    found, out = [], {part: [] for part in readers}
    for some, x in written(runs, which, layer, acts):
        found += some
        for part, reader in readers.items():
            out[part].append(reader(x))
    for part, reader in readers.items():
        out[part].append(reader.constant().expand(1, *out[part][0].shape[1:]))
    return [*found, BIAS], {part: t.cat(rows) for part, rows in out.items()}
