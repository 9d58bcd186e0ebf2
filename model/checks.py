"""Do the hook points mean on this model what Loupe takes them to mean? Checked at every load."""

import math
import traceback
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace

import torch as t
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import MLAAttentionBridge

from model.bridge import FINAL, HOOKS, Model, has_sink, write_mid
from model.memory import first_line, is_out_of_memory
from model.probes import WORDS, probe, rounded
from model.resumed import resumed
from model.untouched import PROBE, Untouched
from model.writes import attention_out, post_scales
from vocabulary.nodes import PARTS, UserError
from vocabulary.requests import Identity, Progress


# What is refused where an identity fails, and why. "model": every analysis
REFUSED = {
    "forward pass = Hugging Face's own": ("model", "TransformerLens's forward pass is not Hugging Face's own"),
    "eager attention = transformers' default": ("model", "transformers' eager attention, which holds the patterns that are read, is not its default attention"),
    "lens at the last point = logits": ("model", "the logits are not the final norm and the unembedding of what the last block puts out"),
    "unembedding of the final norm = logits": ("model", "the logits are not the unembedding of the final norm"),
    "residual stream = sum of its terms": ("parts", "what attention and MLP put out does not add up to the residual stream"),
    "resid_mid = resid_pre + attention": ("resid_mid", "resid_mid is not resid_pre and attention's output"),
    "write at resid_mid via attn_out": ("resid_mid", "writing resid_mid does not do what it says"),
    "heads + b_O = attention": ("heads", "the heads' outputs do not add up to attention's"),
}


@contextmanager
def readable(hf: t.nn.Module) -> Generator:
    """A UserError where Hugging Face's or TransformerLens's code does not get through a model; the whole story goes to the log."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        traceback.print_exception(error)
        raise UserError(f"{type(hf).__name__} can't be read through TransformerLens: {first_line(error)}") from error


def prove(model: Model, untouched: Untouched) -> Generator[Progress, None, tuple[Identity, ...]]:
    """At load: the forward pass against the untouched model's, the identities, and what writes do at every site. What fails is refused by name."""
    refused = model.notes.refused
    if "blocks.0.hook_resid_pre" not in model.points or FINAL not in model.points:
        raise UserError(f"{model.info.architecture}: TransformerLens gives it no residual stream to read (no hook_resid_pre, or no final norm)")
    names, passed = [f"blocks.{i}.{hook}" for i in range(model.info.n_layers) for hook in HOOKS.values()], Counter()
    acts: dict[str, Tensor] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def take(name: str, x: Tensor) -> None:
        passed.update([name])
        shapes[name] = tuple(x.shape)
        if model.place(name) in untouched.patched:
            acts[name] = x

    with readable(model.bridge.original_model):
        logits, _ = model.forward(untouched.ids, [n for n in (*names, FINAL) if model.has(n)], keep=0, take=take)
    refused |= absent(model, passed) | misshapen(model, shapes) | without_neurons(model, shapes)
    if passed[FINAL] != 1:
        refused["model"] = f"its final norm is run {passed[FINAL]} times in one forward pass, so that what it puts out can't be told apart"
        return ()
    whole = model.identity("forward pass = Hugging Face's own", logits, untouched.logits)
    rows = [rounded(model, whole)]
    if untouched.default is not None:
        rows.append(rounded(model, model.identity("eager attention = transformers' default", untouched.logits, untouched.default)))
    rows += self_check(model)
    for row in rows:
        if row.ok is False and row.name in REFUSED:
            name, why = REFUSED[row.name]
            refused.setdefault(name, f"{why} (off by {row.error:.2g})")
    yield Progress(4, 5, "checking: what writes do")
    if "model" not in refused:
        found, more = yield from probe(model, untouched, acts)
        rows += found.values()
        refused |= more | refused
        rows.append((yield from resumed(model, untouched)))
    return tuple(rows)


def absent(model: Model, passed: Counter) -> dict[str, str]:
    """By site that some layer lacks, which layers, in words. resid_mid of parallel blocks is none, and experts have no neurons."""
    n, by_layers = model.info.n_layers, {}
    for site in (s for s in HOOKS if s != "neuron" and not (s == "resid_mid" and model.parallel)):
        needed = (HOOKS[site], *(["hook_attn_out"] * (site == "resid_mid")))
        if lacking := tuple(str(i) for i in range(n) if not all(passed[f"blocks.{i}.{hook}"] == 1 for hook in needed)):
            by_layers.setdefault(lacking, []).append(site)
    out = {}
    for layers, sites in by_layers.items():
        who = "it has no" if len(layers) == n else f"layer {layers[0]} has no" if len(layers) == 1 else f"layers {', '.join(layers)} have no"
        out |= dict.fromkeys(sites, f"{who} {', '.join(WORDS[s] for s in sites)}")
    return out


def misshapen(model: Model, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """By part of heads whose values are not [batch, position, head, ...] in some layer, of patterns [batch, head, position, position], why it is refused."""
    i, out = model.info, {}
    for layer in range(i.n_layers):
        for part, heads in zip(PARTS, (i.n_heads, i.n_heads, i.n_kv_heads, i.n_kv_heads, i.n_heads), strict=True):
            if shape := shapes.get(f"blocks.{layer}.{HOOKS[part]}"):
                good = len(shape) == 4 and (shape[1] == heads if part == "pattern" else shape[1:3] == (PROBE, heads) and (part != "z" or shape[3] == i.d_head))
                if not good:
                    out.setdefault(part, f"{WORDS[part]} of layer {layer} are not cut into {heads} heads")
    if any(isinstance(getattr(b, "attn", None), MLAAttentionBridge) for b in model.bridge.blocks):
        out |= dict.fromkeys("kv", "latent attention makes all heads' keys and values from one vector, so they are not read apart")
    return out


def without_neurons(model: Model, shapes: dict[str, tuple[int, ...]]) -> dict[str, str]:
    """By layer, or for the whole model, why it has no neurons: its MLP has no one output matrix that reads them."""
    names = [f"blocks.{layer}.{HOOKS['neuron']}" for layer in range(model.info.n_layers)]
    lacking = [layer for layer, name in enumerate(names) if name in shapes and (not model.widths[layer] or shapes[name][-1] != model.widths[layer])]
    if len(lacking) == len(names):
        return {"neuron": "it has no neurons: its MLPs are experts"}
    words = f"layer{'s' * (len(lacking) > 1)} {', '.join(map(str, lacking))} {'have' if len(lacking) > 1 else 'has'} no neurons, but experts"
    return {names[layer]: words for layer in lacking}


def self_check(model: Model, ids: Tensor | None = None) -> tuple[Identity, ...]:
    """Do the hook points mean what Loupe takes them to mean, on this model? On random tokens, or on a prompt's."""
    ids = model.random_ids(min(10, model.info.n_ctx)) if ids is None else ids
    layers = range(model.info.n_layers)
    per_layer = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern", "attn.hook_z")
    per_layer += () if model.parallel else ("hook_resid_mid",)
    there = [s for s in per_layer if all(model.has(f"blocks.{i}.{s}") for i in layers)]
    logits, a = model.forward(ids, [*(f"blocks.{i}.{s}" for i in layers for s in there), FINAL], keep=0)
    at = lambda site: t.stack([a[f"blocks.{i}.{site}"].float().cpu() for i in layers])  # noqa: E731
    rows = []
    if lacks := [s for s in per_layer if s not in there]:
        rows.append(Identity("hook points", math.nan, 0.0, None, f"not in every layer: {', '.join(lacks)}"))
    if {"hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out"} <= set(there):
        rows.append(
            model.identity("residual stream = sum of its terms", at("hook_resid_pre") + at("hook_attn_out") + at("hook_mlp_out"), at("hook_resid_post"))
        )
        if "hook_resid_mid" in there:
            rows.append(model.identity("resid_mid = resid_pre + attention", at("hook_resid_pre") + at("hook_attn_out"), at("hook_resid_mid")))
    if "attn.hook_pattern" in there:
        rows.append(rows_check(model, at("attn.hook_pattern")))
    rows.append(model.identity("lens at the last point = logits", model.unembed(model.norm(a[f"blocks.{layers[-1]}.hook_resid_post"])), logits))
    rows.append(model.identity("unembedding of the final norm = logits", model.unembed(a[FINAL]), logits))
    if {"attn.hook_z", "hook_attn_out"} <= set(there):
        rows.append(heads_check(model, a))
    rows += write_checks(model, ids, a)
    return tuple(rows)


def rows_check(model: Model, pattern: Tensor) -> Identity:
    """Rows of patterns [layer, prompt, head, destination, source] sum to one; where a sink takes its share, to more than nothing and less than one."""
    name, sums = "attention rows sum to one", pattern.sum(-1)
    sink = [has_sink(model, layer) for layer in range(len(pattern))]
    want = t.ones_like(sums)
    want[sink] = sums[sink].clamp(0, 1)
    return model.identity(name, sums, want, "or less: an attention sink takes its share" if any(sink) else "")


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
    if not model.parallel and all(f"blocks.{layer}.hook_{s}" in a for s in ("resid_mid", "attn_out", "mlp_out")):
        want, where = noise(a[f"blocks.{layer}.hook_resid_mid"]), f"blocks.{layer}.hook_resid_mid"
        after, mlp = f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_mlp_out"
        _, got = model.forward(ids, [where, after, mlp], write_mid(layer, lambda x: want))
        sums = t.cat([got[where], got[after]])
        rows.append(model.identity("write at resid_mid via attn_out", sums, t.cat([want, want + got[mlp]])))
    return rows
