"""What a feature reads, writes and does: its place in the residual stream, and the metric's gradient there."""

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, Edit, Model
from model.metrics import MetricReader, metric
from model.runs import Runs
from model.sae import SparseAutoencoder
from model.writes import SCALE, frozen_norm, linear_norm, output_matrix, post_norm, pre_norm, pull_back, require_values, to_heads
from vocabulary.nodes import UserError
from vocabulary.prompts import RUNS

STREAM = ("resid_pre", "resid_mid", "resid_post", "attn", "mlp")


# ------------------------------------------------------------------ what it writes


def to_stream(model: Model, d: SparseAutoencoder, acts: dict[str, Tensor], pos: int, u: Tensor) -> Tensor | None:
    """A direction [d_model] in the residual stream as one at what the SAE writes [d_out]; None for what is not added to the stream."""
    if d.site_out in STREAM:
        return u.to(d.device)
    if d.site_out != "z":
        return None
    post = post_norm(model, d.layer, "attn")
    here = {post[1]: acts[post[1]][0, pos][None]} if post else {}
    return to_heads(model, d.layer, here, u[None])[0].flatten().to(d.device)


def extra_names(model: Model, d: SparseAutoencoder) -> list[str]:
    post = post_norm(model, d.layer, "attn") if d.site_out == "z" else None
    return [SCALE, *([post[1]] if post else [])]


def pull_forward(model: Model, row: Tensor) -> Tensor:
    """A row of the stream [d_model] through the final norm's gain (and centring), without its scale."""
    return frozen_norm(model, model.bridge.ln_final, 1.0, row.to(model.final_device))


@t.no_grad()
def written(model: Model, d: SparseAutoencoder, index: int) -> Tensor | None:
    """What a feature adds to the stream [d_model], a unit of it; without the norm that some models put after attention's output."""
    row = d.rows([index])[0]
    if d.site_out in STREAM:
        return row
    if d.site_out != "z":
        return None
    w = output_matrix(model, d.layer, "attn")
    return t.einsum("he,hem->m", row.view(w.shape[0], w.shape[1]).to(w.device), w)


# ------------------------------------------------------------------ what it does to the metric


def gradient(runs: Runs, d: SparseAutoencoder, which: str) -> Tensor:
    """The metric's gradient at what the SAE writes [seq, d_out] of a run."""
    model, asked = runs.model, runs.study.metric
    name = f"blocks.{d.layer}.hook_attn_out" if d.out.endswith("resid_mid") else d.out
    clean = None
    place = "" if asked.whole else runs.metric_position(which)
    mark = f"gradient of {asked.kind} {asked.own} {asked.digest} at {place} for {runs.answers} {runs.foils} at {name}"
    mark += f" against {runs.row('clean').ids}" * (asked.kind == "kl")
    key = (runs.row(which).ids, runs.done if which == "now" else (), mark)
    if (known := model.cache.get(key)) is not None:
        return d.flat(known)
    if asked.kind == "kl":
        clean = runs.trace("clean", [FINAL])[FINAL][0, [runs.metric_position("clean")]]
    ids, edits = t.tensor([runs.row(which).ids]), runs.edits if which == "now" else []
    out = slope_at(model, MetricReader([runs], clean, which), ids, d, edits)[0]
    model.cache.put(key, out)
    return d.flat(out)


def slope_at(model: Model, score: MetricReader, ids: Tensor, d: SparseAutoencoder, edits: list[Edit] | tuple = (), delta: Tensor | None = None) -> Tensor:
    """The metric's gradient at the hook point where an SAE writes [prompt, seq, ...], under edits and with `delta` added there."""
    kept: dict[str, Tensor] = {}
    name = f"blocks.{d.layer}.hook_attn_out" if d.out.endswith("resid_mid") else d.out

    def leaf(x: Tensor) -> Tensor:
        kept["leaf"] = t.zeros_like(x).requires_grad_(True)
        return x + kept["leaf"] + (0 if delta is None else delta.to(x).view(x.shape))

    last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    with t.enable_grad(), model.hooks([*edits, (name, leaf), (last, lambda x: kept.__setitem__("end", x))]):
        model.bridge(ids.to(model.device), use_cache=False, logits_to_keep=1)
        found = t.autograd.grad(metric(score, kept["end"]).sum(), kept["leaf"], allow_unused=True)[0]
    return (t.zeros_like(kept["leaf"]) if found is None else found).detach()


def no_metric(runs: Runs, which: str) -> str:
    """Why there is no gradient of the metric, or ""."""
    kind = runs.study.metric.kind
    if kind == "logprob_sum":
        return "logprob_sum reads the answer's tokens behind the prompt, which features here do not see: use logprob"
    if kind == "rank":
        return "a rank has no gradient: use logit_diff, prob, logprob, kl or loss"
    if runs.study.metric.needs_answer and not runs.answers:
        return f"there is no answer, and {kind} needs one"
    if kind in ("logit_diff", "prob_diff") and not runs.foils:
        return f"there is no foil, and {kind} needs one"
    if which == "now" and any(i.node.site == "resid_mid" for i in runs.study.interventions):
        return "gradients do not pass an intervention at resid_mid"
    return ""


def check_run(runs: Runs, which: str) -> None:
    if which not in RUNS:
        raise UserError(f"{which!r} is not a run: use one of {', '.join(RUNS)}")
    runs.row(which)


# ------------------------------------------------------------------ what it reads


def stream_reader(runs: Runs, d: SparseAutoencoder, which: str, w: Tensor, pos: int) -> tuple[str, Tensor, float] | None:
    """
    A direction at what the SAE reads as one at the stream in front of it, norms frozen: where ("pre", "mid", "post", "attn": attention's output, "z"),
    the direction, and what a norm's bias adds. None behind an MLP.
    """
    match d.site:
        case "resid_pre" | "resid_mid" | "resid_post":
            return d.site[6:], w, 0.0
        case "mlp_stream":
            return "pre" if runs.model.parallel else "mid", w, 0.0
        case "attn" | "z":
            return d.site, w, 0.0
        case "normed" | "mlp_in":
            model, before = runs.model, "pre" if runs.model.parallel else "mid"
            if (found := pre_norm(model, d.layer, "mlp")) is None:
                return (before, w, 0.0) if d.site == "mlp_in" else None
            norm, name = found
            scale = runs.trace(which, [name])[name][0, pos][None].float()
            if d.site == "mlp_in":
                back, constant = pull_back(model, norm, scale, w[None])
                return before, back[0], constant.item()
            back = w - w.mean() if linear_norm(model, norm).centred else w
            return before, back / scale[0].to(w), 0.0
    return None


@t.no_grad()
def sources_of(runs: Runs, d: SparseAutoencoder, which: str, place: str, w: Tensor, pos: int) -> np.ndarray:
    """What each source token adds through each head [layer, head, seq] to direction . stream at pos: pattern x value through W_O, later norms frozen."""
    model = runs.model
    require_values(model)
    i, seq = model.info, len(runs.row(which).ids)
    out = np.zeros((i.n_layers, i.n_heads, seq))
    through = {"pre": range(d.layer), "attn": [d.layer], "z": [d.layer]}.get(place, range(d.layer + 1))
    posts = [post[1] for layer in through if place != "z" and (post := post_norm(model, layer, "attn"))]
    acts = runs.trace(which, [f"blocks.{layer}.attn.{n}" for layer in through for n in ("hook_v", "hook_pattern")] + posts)
    for layer in through:
        v, pattern = acts[f"blocks.{layer}.attn.hook_v"][0].float(), acts[f"blocks.{layer}.attn.hook_pattern"][0, :, pos].float()
        if place == "z":
            into = w.view(i.n_heads, -1).to(v.device)
        else:
            scales = {post: acts[post][0, pos][None] for post in posts}
            into = to_heads(model, layer, scales, w[None])[0][0].to(v.device)
        v = v.repeat_interleave(i.n_heads // i.n_kv_heads, 1)
        out[layer] = (pattern * t.einsum("shd,hd->hs", v, into)).double().cpu().numpy()
    return out
