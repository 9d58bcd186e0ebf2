"""Do the hook points mean on this model what Loupe takes them to mean? Checked at every load."""

import math
from dataclasses import replace

import torch as t
from torch import Tensor

from model.bridge import FINAL, Model, write_mid
from model.writes import attention_out, post_scales
from vocabulary.requests import Identity


def self_check(model: Model, ids: Tensor | None = None) -> tuple[Identity, ...]:
    """Do the hook points mean what Loupe takes them to mean, on this model? On random tokens, or on a prompt's."""
    ids = model.random_ids(min(10, model.info.n_ctx)) if ids is None else ids
    layers = range(model.info.n_layers)
    per_layer = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern", "attn.hook_z")
    per_layer += () if model.parallel else ("hook_resid_mid",)
    absent = [n for n in (f"blocks.{i}.{s}" for i in layers for s in per_layer) if n not in model.points]
    if absent:
        return (Identity("hook points", math.inf, 0.0, False, f"the model has no {absent[0]}: views that need it do not work"),)
    embeds = [n for n in ("hook_embed", "hook_pos_embed") if n in model.points]
    logits, a = model.forward(ids, [*(f"blocks.{i}.{s}" for i in layers for s in per_layer), FINAL, *embeds], keep=0)
    at = lambda site: t.stack([a[f"blocks.{i}.{site}"].float().cpu() for i in layers])  # noqa: E731
    pre, post, attn, mlp, pattern = (at(s) for s in per_layer[:5])
    rows = [model.identity("residual stream = sum of its terms", pre + attn + mlp, post)]
    if not model.parallel:
        rows.append(model.identity("resid_mid = resid_pre + attention", pre + attn, at("hook_resid_mid")))
    rows.append(model.identity("attention rows sum to one", pattern.sum(-1), t.ones(pattern.shape[:-1])))
    rows.append(model.identity("lens at the last point = logits", model.unembed(model.norm(a[f"blocks.{layers[-1]}.hook_resid_post"])), logits))
    rows.append(model.identity("unembedding of the final norm = logits", model.unembed(a[FINAL]), logits))
    rows.append(heads_check(model, a))
    rows += write_checks(model, ids, a)
    return tuple(rows)


@t.no_grad()
def heads_check(model: Model, a: dict[str, Tensor]) -> Identity:
    """Heads plus b_O against attn_out, through the norm that some models put after attention."""
    name, worst = "heads + b_O = attention", None
    for layer in range(model.info.n_layers):
        z = a[f"blocks.{layer}.attn.hook_z"]
        if z.ndim != 4:
            return Identity(name, math.nan, 0.0, None, "z is not split into heads here")
        row = model.identity(name, attention_out(model, layer, z), a[f"blocks.{layer}.hook_attn_out"])
        worst = row if worst is None or not row.error <= worst.error else worst
    return replace(worst, note="through the norm after attention" if post_scales(model, "attn") else "")


def write_checks(model: Model, ids: Tensor, a: dict[str, Tensor]) -> list[Identity]:
    """Writing a residual point changes what comes after it, and only that."""
    layer = model.info.n_layers // 2
    noise = lambda x: x + 0.5 * x.float().std().to(x.dtype) * t.sin(t.arange(x.numel(), device=x.device)).view(x.shape).to(x.dtype)  # noqa: E731
    rows = []
    if layer > 0:
        new = noise(a[f"blocks.{layer}.hook_resid_pre"])
        one = model.forward(ids, edits=[(f"blocks.{layer}.hook_resid_pre", lambda x: new)], keep=0)[0]
        two = model.forward(ids, edits=[(f"blocks.{layer - 1}.hook_resid_post", lambda x: new)], keep=0)[0]
        rows.append(model.identity("writing resid_post = writing the next resid_pre", two, one))
    if not model.parallel:
        want, where = noise(a[f"blocks.{layer}.hook_resid_mid"]), f"blocks.{layer}.hook_resid_mid"
        after, mlp = f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_mlp_out"
        _, got = model.forward(ids, [where, after, mlp], write_mid(layer, lambda x: want))
        sums = t.cat([got[where], got[after]])
        rows.append(model.identity("write at resid_mid via attn_out", sums, t.cat([want, want + got[mlp]])))
    return rows
