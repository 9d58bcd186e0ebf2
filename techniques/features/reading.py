"""
Features of an SAE or transcoder on the prompt: the preflight, what fires at a position and what it does to the metric, one feature in full.

Position 0 is left out of all statistics: its activation is unlike any other, and SAEs are not trained on it.
"""

import json
import math
import urllib.request
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from techniques.lens.reading import largest
from techniques.attribution.logits import SCALE, direction, inner_direction, post_norm, pull_back
from techniques.features.requests import CheckEdge, Examples, Feature, FeatureGraph, FeatureResult, Features, FeaturesResult, Preflight, PreflightResult, Saes
from vocabulary.nodes import UserError
from vocabulary.prompts import RUNS
from vocabulary.requests import Identity, Progress
from model.bridge import FINAL, Edit, Model, write_mid
from model.interventions import prepare
from model.metrics import MetricReader, metric, rows_at_once
from model.runs import Runs, read_study
from model.sae import SparseAutoencoder, catalogue, labels, load
from model.sae_fit import REFUSE, WARN, cause, check, choose, fits
from utils import settings

CHUNK = 1 << 22  # numbers of decoder rows looked at at once
ORDERS = ("activation", "attribution", "direct")
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn", "mlp")


def answer(model: Model, ask: object) -> Generator:
    match ask:
        case Saes():
            yield Progress(0, 1, "reading sae_lens's list")
            return catalogue(model, ask.every)
        case Preflight():
            return (yield from preflight(model, ask))
        case Examples():
            from techniques.features import examples

            return (yield from examples.examples(model, ask))
        case FeatureGraph() | CheckEdge():
            from techniques.features import graph as feature_graph

            return (yield from feature_graph.answer(model, ask))
    d = yield from load(model, ask.source)
    runs = yield from prepare(model, ask.study)
    check(runs, d)
    yield Progress(1, 2, "encoding")
    return features(runs, d, ask) if isinstance(ask, Features) else feature(runs, d, ask)


# ------------------------------------------------------------------ is it the right SAE?


def splice(d: SparseAutoencoder, model: Model, work) -> list[Edit]:
    """Edits that let work(x, y) say what is written at the SAE's output, from its input x and what was there, y [batch, seq, ...]."""
    if d.out.endswith("hook_resid_mid"):
        return write_mid(d.layer, lambda y: work(y, y))
    if d.point == d.out:
        return [(d.out, lambda y: work(y, y))]
    kept: dict[str, Tensor] = {}
    return [(d.point, lambda x: kept.__setitem__("x", x)), (d.out, lambda y: work(kept["x"], y))]


def like(new: Tensor, y: Tensor) -> Tensor:
    return new.view(y.shape).to(y)


@t.no_grad()
def loss(model: Model, ids: tuple[int, ...], edits: list[Edit]) -> float:
    """Mean next-token cross-entropy, nats, of the predictions made after position 0."""
    normed = model.forward(t.tensor([ids]), [FINAL], edits, keep=None)[1][FINAL][0, 1:-1]
    target, total = t.tensor(ids[2:], device=normed.device), 0.0
    for i in range(0, len(normed), size := rows_at_once(model)):
        logp = model.log_probs(normed[i : i + size])
        total -= logp.gather(-1, target[i : i + size, None].to(logp.device)).double().sum().item()
    return total / len(target) if len(target) else math.nan


def preflight(model: Model, ask: Preflight) -> Generator[Progress, None, PreflightResult]:
    """Before anything is shown: the view, the fit, and what the model loses with the SAE spliced in, on the clean prompt."""
    d = yield from load(model, ask.source)
    runs = read_study(model, replace(ask.study, base="clean", interventions=()))
    yield Progress(0, 4, "encoding the prompt")
    found = fits(runs, d)
    d.view = choose(d, found, ask.view)
    d.asked, d.passed = ask.view != "auto", found[d.view].cosine >= REFUSE
    mine, ids = found[d.view], runs.row("clean").ids

    def spliced(x: Tensor, y: Tensor) -> Tensor:
        new = y.clone()
        new[0, 1:] = like(d.reconstruct(x[0, 1:]), y[0, 1:])
        return new

    def zeroed(x: Tensor, y: Tensor) -> Tensor:
        return t.cat([y[:, :1], t.zeros_like(y[:, 1:])], 1)

    losses = []
    for i, edits in enumerate(([], splice(d, model, spliced), splice(d, model, zeroed))):
        yield Progress(1 + i, 4, "loss with the SAE spliced in")
        losses.append(loss(model, ids, edits))
    gap = losses[2] - losses[0]
    recovered = (losses[2] - losses[1]) / gap if abs(gap) > 1e-6 else math.nan
    verdict = "good" if mine.cosine >= WARN else "warn" if mine.cosine >= REFUSE else "refuse"
    words = "" if verdict == "good" else cause(runs, d, found)
    parts = [
        f"{d.source} on the clean prompt without position 0, {len(ids) - 1} positions",
        f"{d.view} activation" + (f" ({d.point} to {d.out})" if d.transcoder else f" at {d.point}"),
        "cosine: mean over positions; unexplained: squared error / variance around the prompt's mean",
        "losses: no error term, position 0 as it is",
        "SAE in float32",
        model.info.dtype,
    ]
    return PreflightResult(
        d.info, mine.cosine, mine.unexplained, mine.l0, *losses, recovered, {v: f.cosine for v, f in found.items()}, verdict, words, ", ".join(parts)
    )


@t.no_grad()
def identities(runs: Runs, source: str) -> Generator[Progress, None, list[Identity]]:
    """Of one SAE on the clean prompt: its parts are the activation, and the model with SAE and error term spliced in is the model."""
    d, model = (yield from load(runs.model, source)), runs.model
    acts = runs.trace("clean", [d.point, d.out])
    x, y = acts[d.point][0], d.flat(acts[d.out][0])
    error = y - d.reconstruct(x)
    scale, parts = d.scale(x), d.offset(x) + error
    where, index, value = d.active(x)
    for i in range(0, len(index), 1024):
        at = where[i : i + 1024]
        rows = d.rows(index[i : i + 1024]) * value[i : i + 1024, None]
        parts.index_add_(0, at, rows * scale[at] if isinstance(scale, Tensor) else rows * scale)
    ids = t.tensor([runs.row("clean").ids])

    def spliced(x: Tensor, y: Tensor) -> Tensor:
        return like(d.reconstruct(x[0]) + error, y)

    logits = [model.forward(ids, edits=edits, keep=0)[0] for edits in (splice(d, model, spliced), [])]
    return [
        model.identity(f"{source}: features + bias + error = activation", parts, y),
        model.identity(f"{source}: spliced in with its error = the model", *logits),
    ]


# ------------------------------------------------------------------ what a feature writes, and what it does


def to_stream(model: Model, d: SparseAutoencoder, acts: dict[str, Tensor], pos: int, u: Tensor) -> Tensor | None:
    """A direction [d_model] in the residual stream as one at what the SAE writes [d_out]; None for what is not added to the stream."""
    if d.site_out in STREAM:
        return u.to(d.device)
    if d.site_out != "z":
        return None
    post = post_norm(model, d.layer, "attn")
    here = {post[1]: acts[post[1]][0, pos][None]} if post else {}
    inner, _ = inner_direction(model, d.layer, "attn", here, u[None])
    w = model.bridge.blocks[d.layer].attn.W_O.float()
    return (w @ inner[0].to(w.device)).flatten().to(d.device)


def extra_names(model: Model, d: SparseAutoencoder) -> list[str]:
    post = post_norm(model, d.layer, "attn") if d.site_out == "z" else None
    return [SCALE, *([post[1]] if post else [])]


def gradient(runs: Runs, d: SparseAutoencoder, which: str) -> Tensor:
    """The metric's gradient at what the SAE writes [seq, d_out] of a run."""
    model, asked = runs.model, runs.study.metric
    name = f"blocks.{d.layer}.hook_attn_out" if d.out.endswith("resid_mid") else d.out
    clean = None
    place = "" if asked.kind == "loss" else runs.metric_position(which)
    mark = f"gradient of {asked.kind} at {place} for {runs.answers} {runs.foils} at {name}"
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
    if kind == "rank":
        return "a rank has no gradient: use logit_diff, prob, logprob, kl or loss"
    if kind not in ("kl", "loss") and not runs.answers:
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


@t.no_grad()
def features(runs: Runs, d: SparseAutoencoder, ask: Features) -> FeaturesResult:
    """The k largest features at a position by activation, attribution or direct effect; with rows of their own for what is no feature."""
    model, which = runs.model, ask.which
    check_run(runs, which)
    if ask.order not in ORDERS:
        raise UserError(f"{ask.order!r} is not an order: use one of {', '.join(ORDERS)}")
    if ask.k < 1:
        raise UserError("k must be at least 1")
    named = runs.study.metric.pos if ask.pos is None else ask.pos
    pos, row = runs.metric_position(which) if ask.pos is None else runs.position(which, named), runs.row(which)
    acts = runs.trace(which, [d.point, d.out, *extra_names(model, d)])
    y = d.flat(acts[d.out][0, pos : pos + 1])[0]
    index, value, whole, offset, gain = d.at(acts[d.point][0], pos)
    no = no_metric(runs, which)
    if no and ask.order == "attribution":
        raise UserError(f"{no}; or order the features by activation")
    g = None if no else gradient(runs, d, which)[pos].to(d.device)
    u = None
    if runs.answers:
        behind, _ = pull_back(model, model.bridge.ln_final, acts[SCALE][0, pos][None], direction(model, runs.answers, runs.foils)[0][None])
        u = to_stream(model, d, acts, pos, behind[0])
    if u is None and ask.order == "direct":
        raise UserError(
            f"there is no direct effect to order by: {'what is written at ' + d.out + ' is not added to the stream' if runs.answers else 'give an answer'}"
        )
    dot = lambda v, w: math.nan if w is None else (v.double() @ w.double()).item()  # noqa: E731
    at = lambda v: (v.norm().item(), dot(v, g), dot(v, u))  # noqa: E731
    attribution, direct, sums = [t.zeros(0)], [t.zeros(0)], t.zeros(d.d_out, device=d.device)
    for i in range(0, len(index), 1024):
        rows = d.rows(index[i : i + 1024]) * value[i : i + 1024, None] * gain
        sums += rows.sum(0)
        attribution.append(rows @ g if g is not None else t.full((len(rows),), math.nan))
        direct.append(rows @ u if u is not None else t.full((len(rows),), math.nan))
    columns = {"activation": value.cpu(), "attribution": t.cat([a.cpu() for a in attribution]), "direct": t.cat([a.cpu() for a in direct])}
    order = columns[ask.order].abs().argsort(descending=True, stable=True)
    top, left = order[: ask.k], order[ask.k :]
    error = y - whole
    if not (t.isfinite(y).all() and t.isfinite(whole).all()):
        raise UserError("the activation or its reconstruction is not finite: load the model in float32")
    rest = (float(len(left)), *(columns[c][left].double().sum().item() if len(left) else 0.0 for c in ("attribution", "direct")))
    picked = lambda c: columns[c][top].numpy().astype(np.float32)  # noqa: E731
    return FeaturesResult(
        d.info, row, which, pos, ask.order, len(index), index.cpu()[top].numpy().astype(np.int32), picked("activation"), picked("attribution"),
        picked("direct"), rest, at(offset), at(whole), at(error), at(y), (sums + offset + error - y).abs().max().item(), {i: n for i, n in labels(d.source).items() if i in index[top.to(d.device)]}, words(runs, d, which, named, no),
    )  # fmt: skip


def words(runs: Runs, d: SparseAutoencoder, which: str, named: int | str, no: str = "") -> str:
    model, metric = runs.model, runs.study.metric
    place = "" if metric.kind == "loss" else f" at {metric.pos}"
    parts = [
        f"{d.source} at {named}, {which}, {d.view} activation",
        f"attribution: activation x decoder row x gradient of {metric.kind}{place}" if not no else no,
        f"direct: decoder row through the final norm (scale frozen) to the answers' logit difference at {named}",
        f"before the soft cap {model.softcap:g}" if model.softcap else "",
        "bias: the decoder's, with skip connection and means taken off",
        "position 0 is out of distribution" if runs.position(which, named) == 0 else "",
        model.info.dtype,
        runs.convention,
    ]
    return ", ".join(p for p in parts if p)


# ------------------------------------------------------------------ one feature


def gained(model: Model, rows: Tensor) -> Tensor:
    """Rows of the stream [n, d_model] through the final norm's gain (and centring), without its scale."""
    return t.stack([pull_forward(model, r) for r in rows])


def pull_forward(model: Model, row: Tensor) -> Tensor:
    norm = model.bridge.ln_final
    weight = getattr(norm.original_component, "weight", None)
    row = row.to(model.final_device)
    row = row if norm.uses_rms_norm else row - row.mean()
    return row if weight is None else row * (weight.float() + (1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0))


@t.no_grad()
def written(model: Model, d: SparseAutoencoder, index: int) -> Tensor | None:
    """What a feature adds to the stream [d_model], a unit of it; without the norm that some models put after attention's output."""
    row = d.rows([index])[0]
    if d.site_out in STREAM:
        return row
    if d.site_out != "z":
        return None
    w = model.bridge.blocks[d.layer].attn.W_O.float()
    return t.einsum("he,hem->m", row.view(w.shape[0], w.shape[1]).to(w.device), w)


@t.no_grad()
def nearest(d: SparseAutoencoder, index: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k features whose decoder rows have the largest cosine with this one's."""
    row = d.rows([index])[0]
    row, size, parts = row / row.norm().clamp(min=1e-12), max(1, CHUNK // d.d_out), []
    for i in range(0, d.d_sae, size):
        some = d.sae.W_dec[i : i + size]
        parts.append((some @ row) / some.norm(dim=-1).clamp(min=1e-12))
    cosine = t.cat(parts)
    cosine[index] = -math.inf
    top = cosine.topk(min(k, d.d_sae - 1))
    return top.indices.cpu().numpy().astype(np.int32), top.values.cpu().numpy()


def together(where: Tensor, index: Tensor, feature: int, k: int, d_sae: int) -> tuple[np.ndarray, np.ndarray]:
    """Features that fire at the positions at which this one does, by Jaccard (positions of both / positions of either)."""
    mine = where[index == feature]
    if not len(mine):
        return np.zeros(0, np.int32), np.zeros(0, np.float32)
    both = t.bincount(index[t.isin(where, mine)], minlength=d_sae)
    jaccard = both / (t.bincount(index, minlength=d_sae) + len(mine) - both)
    jaccard[feature] = 0
    top = jaccard.topk(min(k, int((jaccard > 0).sum())))
    return top.indices.cpu().numpy().astype(np.int32), top.values.cpu().numpy()


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
            model, name = runs.model, f"blocks.{d.layer}.ln2"
            if f"{name}.hook_scale" not in model.points:
                name = f"blocks.{d.layer}.ln1"
            scale = runs.trace(which, [f"{name}.hook_scale"])[f"{name}.hook_scale"][0, pos][None].float()
            norm = getattr(model.bridge.blocks[d.layer], name.rsplit(".")[-1])
            if d.site == "mlp_in":
                back, constant = pull_back(model, norm, scale, w[None])
                return "pre" if model.parallel else "mid", back[0], constant.item()
            back = w if norm.uses_rms_norm else w - w.mean()
            return "pre" if model.parallel else "mid", back / scale[0].to(w), 0.0
    return None


@t.no_grad()
def sources_of(runs: Runs, d: SparseAutoencoder, which: str, place: str, w: Tensor, pos: int) -> np.ndarray:
    """What each source token adds through each head [layer, head, seq] to direction . stream at pos: pattern x value through W_O, later norms frozen."""
    model = runs.model
    i, seq = model.info, len(runs.row(which).ids)
    out = np.zeros((i.n_layers, i.n_heads, seq))
    through = {"pre": range(d.layer), "attn": [d.layer], "z": [d.layer]}.get(place, range(d.layer + 1))
    posts = {layer: post[1] for layer in through if place != "z" and (post := post_norm(model, layer, "attn"))}
    acts = runs.trace(which, [f"blocks.{layer}.attn.{n}" for layer in through for n in ("hook_v", "hook_pattern")] + list(posts.values()))
    for layer in through:
        v, pattern = acts[f"blocks.{layer}.attn.hook_v"][0].float(), acts[f"blocks.{layer}.attn.hook_pattern"][0, :, pos].float()
        if place == "z":
            into = w.view(i.n_heads, -1).to(v.device)
        else:
            inner = w[None]
            if post := posts.get(layer):
                inner, _ = inner_direction(model, layer, "attn", {post: acts[post][0, pos][None]}, inner)
            into = model.bridge.blocks[layer].attn.W_O.float() @ inner[0].to(v.device)
        v = v.repeat_interleave(i.n_heads // i.n_kv_heads, 1)
        out[layer] = (pattern * t.einsum("shd,hd->hs", v, into)).double().cpu().numpy()
    return out


def neuronpedia(ident: str, index: int) -> str:
    """The label that Neuronpedia has for a feature; asked only with LOUPE_NEURONPEDIA=1 in .env, and "" when it does not answer within 3 s."""
    if not ident or settings().get("LOUPE_NEURONPEDIA") != "1":
        return ""
    try:
        with urllib.request.urlopen(f"https://www.neuronpedia.org/api/feature/{ident}/{index}", timeout=3) as reply:
            found = json.loads(reply.read(1 << 20)).get("explanations") or []
        return str(found[0]["description"])[:200] if found else ""
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


@t.no_grad()
def feature(runs: Runs, d: SparseAutoencoder, ask: Feature) -> FeatureResult:
    """One feature: where it fires, what it promotes, its neighbours, and which source tokens make it fire at a position."""
    model, which, k = runs.model, ask.which, ask.k
    check_run(runs, which)
    d.check_index(ask.index)
    if k < 1:
        raise UserError("k must be at least 1")
    row = runs.row(which)
    x = runs.trace(which, [d.point])[d.point][0]
    where, index, value = d.active(x)
    activation = t.zeros(len(row.ids), device=d.device)
    activation[where[index == ask.index]] = value[index == ask.index]
    named = ask.pos if ask.pos is not None else int(activation[1:].argmax()) + 1 if len(row.ids) > 1 and activation[1:].any() else runs.study.metric.pos
    pos = runs.position(which, named)
    k_vocab = min(k, model.info.d_vocab)
    none = np.zeros(0, np.int32), np.zeros(0, np.float32)
    tops, direct = [none, none], written(model, d, ask.index)
    if direct is not None:
        logits = model.scores(pull_forward(model, direct).to(model.dtype)[None]) - model.scores(
            t.zeros(1, model.info.d_model, dtype=model.dtype, device=model.final_device)
        )
        tops = [tuple(a[0].cpu().numpy() for a in reversed(largest(logits, k_vocab, most))) for most in (True, False)]
    near, cosine = nearest(d, ask.index, k)
    joint, jaccard = together(where[where > 0], index[where > 0], ask.index, k, d.d_sae)
    total, rest = math.nan, math.nan
    heads = np.full((model.info.n_layers, model.info.n_heads, len(row.ids)), math.nan)
    note = ""
    reader = d.reader(ask.index, x[pos])
    if reader is not None:
        w, bias = reader
        total = (d.flat(x[pos]).double() @ w.double()).item() + bias
        spot = stream_reader(runs, d, which, w, pos)
        if spot is None:
            note, rest, heads = "behind an MLP: no linear path from the heads", total, np.zeros_like(heads)
        else:
            heads = sources_of(runs, d, which, spot[0], spot[1], pos)
            rest = total - heads.sum()
    else:
        note = f"{d.kind}: no linear pre-activation"
    texts = {int(i): model.token_text(int(i)) for ids, _ in tops for i in ids}
    address = f"https://www.neuronpedia.org/{d.neuronpedia}/{ask.index}" if d.neuronpedia else ""
    label = labels(d.source).get(ask.index) or neuronpedia(d.neuronpedia, ask.index)
    parts = [
        f"{d.source} feature {ask.index}, {which}, {d.view} activation",
        "logits: decoder row x the final norm's gain x unembedding, no scale" if direct is not None else f"{d.out} is not added to the stream: no logits",
        "fires with: Jaccard over this prompt's positions but 0",
        note
        or f"sources: pre-activation at {named} by source token through the heads, patterns and norm scales frozen (value biases inside); the rest: embeddings, MLPs, biases",
        model.info.dtype,
        runs.convention,
    ]
    return FeatureResult(
        d.info, row, which, ask.index, pos, activation.cpu().numpy(), tops[0][0].astype(np.int32), tops[0][1].astype(np.float32),
        tops[1][0].astype(np.int32), tops[1][1].astype(np.float32), near, cosine, joint, jaccard, heads.sum((0, 1)).astype(np.float32),
        heads.sum(2).astype(np.float32), float(rest), float(total), f"{d.neuronpedia}/{ask.index}" if d.neuronpedia else "", address, label, texts,
        ", ".join(p for p in parts if p),
    )  # fmt: skip
