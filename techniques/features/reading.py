"""
Features of an SAE or transcoder on the prompt: what fires at a position and what it does to the metric, and one feature in full.

Position 0 is left out of all statistics: its activation is unlike any other, and SAEs are not trained on it.
"""

import json
import math
import urllib.request

import numpy as np
import torch as t
from torch import Tensor

from model.runs import Runs
from model.sae import SparseAutoencoder, labels
from techniques.attribution.logits import direction
from techniques.features.effects import check_run, extra_names, gradient, no_metric, pull_forward, sources_of, stream_reader, to_stream, written
from techniques.features.requests import Feature, FeatureResult, Features, FeaturesResult
from model.top_tokens import largest
from model.writes import SCALE, pull_back
from utils import settings
from vocabulary.nodes import UserError

CHUNK = 1 << 22  # numbers of decoder rows looked at at once
ORDERS = ("activation", "attribution", "direct")


# ------------------------------------------------------------------ features at a position


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
    pos, row = runs.place(which, ask.pos), runs.row(which)
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
    parts = [
        f"{d.source} at {named}, {which}, {d.view} activation",
        f"attribution: activation x decoder row x gradient of {metric.words}" if not no else no,
        f"direct: decoder row through the final norm (scale frozen) to the answers' logit difference at {named}",
        f"before the soft cap {model.softcap:g}" if model.softcap else "",
        "bias: the decoder's, with skip connection and means taken off",
        "position 0 is out of distribution" if runs.position(which, named) == 0 else "",
        model.info.dtype,
        runs.convention,
    ]
    return ", ".join(p for p in parts if p)


# ------------------------------------------------------------------ one feature


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
    texts = {int(i): model.tokens.output_text(int(i)) for ids, _ in tops for i in ids}
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
