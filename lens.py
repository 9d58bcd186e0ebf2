"""Logit lens, and the run itself: what the model predicts at every position, at hook points and at the end, with its metric."""

import math
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from messages import LensResult, Progress, RunResult, Side, UserError, parse_node
from model import FINAL, Model, in_chunks
from patching import Runs, hook_name

VOCAB_BYTES = 64 << 20
STATS = ("prob", "rank", "entropy", "kl", "logit_diff")


def default_points(model: Model) -> list[str]:
    """resid_pre of layer 0, then resid_mid (where there is one) and resid_post of every layer."""
    sites = ("resid_post",) if model.parallel else ("resid_mid", "resid_post")
    return ["L0.resid_pre", *(f"L{layer}.{s}" for layer in range(model.info.n_layers) for s in sites)]


def lens_points(model: Model, points: tuple[str, ...]) -> dict[str, str]:
    """Hook names of the points, by their addresses."""
    nodes = [parse_node(p) for p in points or default_points(model)]
    for node in nodes:
        if not node.site.startswith("resid_") or node.pos is not None:
            raise UserError(f"{node}: the lens reads resid_pre, resid_mid and resid_post, at every position (write no @)")
    return {str(n): hook_name(model, n) for n in nodes}


def rows_at_once(model: Model) -> int:
    return max(1, VOCAB_BYTES // (4 * model.info.d_vocab))


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row, without a temporary of the rows' size."""
    return t.bmm(a[:, None], b[:, :, None])[:, 0, 0]


@t.no_grad()
def statistics(logits: Tensor, final: Tensor, answers: list[int], foils: list[int], k: int) -> dict[str, Tensor]:
    """Of fp32 logits [rows, vocab]; `final` are the log probabilities [positions, vocab] that KL(final || this) is taken against, again and again."""
    top, nan = logits.topk(min(k, logits.shape[-1]), -1), t.full(logits.shape[:-1], math.nan, device=logits.device)
    logp = logits.log_softmax(-1)
    out = {"top_ids": top.indices, "top_probs": logp.gather(-1, top.indices).exp()}
    out |= dict.fromkeys(("prob", "rank", "logit_diff"), nan)
    if answers:
        out["prob"] = logp[:, answers].exp().sum(-1)
        out["rank"] = (logits > logits[:, answers].amax(-1, keepdim=True)).sum(-1, dtype=t.int32).float()
    if answers and foils:
        out["logit_diff"] = logits[:, answers].mean(-1) - logits[:, foils].mean(-1)
    del logits
    out["entropy"] = -dot(logp.exp(), logp)
    p = final.exp()
    out["kl"] = (dot(p, final).repeat(len(logp) // len(final)) - t.cat([dot(p, part) for part in logp.split(len(final))])).clamp(min=0)
    return out


def texts(model: Model, ids: np.ndarray) -> dict[int, str]:
    return {i: model.token_text(i) for i in np.unique(ids).tolist()}


def lens_convention(runs: Runs) -> str:
    model = runs.model
    cap = f"soft cap {model.softcap:g}" if model.softcap else "no soft cap"
    last = "KL(this run's final distribution || point's)"
    mid = "no resid_mid (parallel block)" if model.parallel else ""
    parts = [
        "logit lens: final norm recomputed at each point, raw weights, no tuned lens",
        cap,
        last,
        model.info.dtype,
        mid,
        runs.convention,
    ]
    return ", ".join(p for p in parts if p)


def logit_lens(runs: Runs, which: str, points: tuple[str, ...], k: int) -> Generator[Progress | LensResult, None, LensResult]:
    """The lens at points × positions, a chunk of rows at a time: vocabulary-sized tensors stay under VOCAB_BYTES each."""
    model, row = runs.model, runs.row(which)
    if k < 1:
        raise UserError("k must be at least 1")
    names = lens_points(model, points)
    acts = runs.trace(which, [*dict.fromkeys(names.values()), FINAL])
    seq, addresses = len(row.ids), list(names)
    stack = t.stack([acts[n][0].to(model.final_device) for n in names.values()])
    flat, last = stack.flatten(0, 1), acts[FINAL][0]
    whole = model.log_probs(last) if seq <= rows_at_once(model) else None

    def work(start: int, stop: int) -> dict[str, np.ndarray]:
        places = t.arange(start, stop, device=last.device) % seq
        aligned = whole is not None and start % seq == 0 and stop % seq == 0
        final = whole if aligned else model.log_probs(last[places])
        return {n: v.cpu().numpy() for n, v in statistics(model.unembed(model.norm(flat[start:stop])), final, runs.answers, runs.foils, k).items()}

    parts, shown, convention = [], 0, lens_convention(runs)
    size = rows_at_once(model)
    size = size if size < seq else size // seq * seq

    def result(first: int, stop: int, merged: dict[str, np.ndarray]) -> LensResult:
        cut = {n: v[first * seq : stop * seq].reshape(stop - first, seq, *v.shape[1:]) for n, v in merged.items()}
        ids = cut["top_ids"].astype(np.int32)
        return LensResult(
            row,
            tuple(addresses[first:stop]),
            ids,
            cut["top_probs"],
            *(cut[s].astype(np.float32) for s in STATS),
            texts(model, ids),
            convention,
        )

    for part in in_chunks(len(flat), size, work):
        if isinstance(part, Progress):
            yield part
            continue
        parts.append(part)
        ready = sum(len(p["entropy"]) for p in parts) // seq
        if shown < ready < len(addresses):
            merged = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
            yield result(shown, ready, merged)
            shown = ready
        elif ready < len(addresses):
            yield Progress(sum(len(p["entropy"]) for p in parts), len(flat), "logit lens")
    merged = {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}
    out = result(0, len(addresses), merged)
    if not np.isfinite(out.entropy).all() or not np.isfinite(out.kl).all():
        raise UserError("the lens gave numbers that are not finite: load the model in float32")
    return out


# ------------------------------------------------------------------ the run and its metric


def measure(kind: str, row: Tensor, clean: Tensor, nll: np.ndarray, answers: list[int], foils: list[int]) -> float | None:
    """The metric from a run's logits at the metric's position; None when it needs answers (or foils) that the prompt does not have."""
    if kind == "loss":
        return float(nll.mean()) if len(nll) else None
    logits = row.double()
    logp = logits.log_softmax(-1)
    if kind == "kl":
        final = clean.double().log_softmax(-1)
        return max(0.0, (final.exp() * (final - logp)).sum().item())
    if not answers or (kind in ("logit_diff", "prob_diff") and not foils):
        return None
    match kind:
        case "logit_diff":
            return (logits[answers].mean() - logits[foils].mean()).item()
        case "prob":
            return logp[answers].exp().sum().item()
        case "prob_diff":
            return (logp[answers].exp().sum() - logp[foils].exp().sum()).item()
        case "logprob":
            return logp[answers].logsumexp(0).item()
        case "rank":
            return float((logits > logits[answers].max()).sum().item())
    raise AssertionError(kind)


def side(runs: Runs, which: str, k: int) -> Generator[Progress, None, Side]:
    """One run's top tokens and metric, each row of logits made once; remembered, so that a key does not make clean and corrupted again."""
    model, row, metric = runs.model, runs.row(which), runs.study.metric
    pos = 0 if metric.kind == "loss" else runs.position(which, metric.pos)
    done = runs.done if which == "now" else ()
    key = (row.ids, done, k, metric.kind, pos, tuple(runs.answers), tuple(runs.foils), runs.row("clean").ids if metric.kind == "kl" else None)
    if key in model.cache.sides:
        return replace(model.cache.sides[key], tokens=row)
    last = runs.trace(which, [FINAL])[FINAL][0]
    target = t.tensor([*row.ids[1:], 0], device=last.device)
    clean = last[:1]
    if metric.kind == "kl":
        clean = runs.trace("clean", [FINAL])[FINAL][0][runs.position("clean", metric.pos)][None]

    @t.no_grad()
    def work(start: int, stop: int) -> tuple[list[np.ndarray], Tensor | None]:
        logits = model.unembed(last[start:stop])
        top, lse = logits.topk(min(k, logits.shape[-1]), -1), logits.logsumexp(-1, keepdim=True)
        nll = lse - logits.gather(-1, target[start:stop, None])
        arrays = [x.cpu().numpy() for x in (top.indices.int(), (top.values - lse).exp(), top.values, nll[:, 0].double())]
        return arrays, logits[pos - start].clone() if start <= pos < stop else None

    parts = []
    for part in in_chunks(len(row.ids), rows_at_once(model), work):
        if isinstance(part, Progress):
            yield part
        else:
            parts.append(part)
    ids, probs, logits, nll = (np.concatenate(p) for p in zip(*(arrays for arrays, _ in parts)))
    if not np.isfinite(logits).all():
        raise UserError(f"the logits of the {which} run are not finite: load the model in float32")
    at = next(x for _, x in parts if x is not None)
    value = measure(metric.kind, at, model.unembed(clean)[0] if metric.kind == "kl" else at, nll[:-1], runs.answers, runs.foils)
    if len(model.cache.sides) >= 64:
        model.cache.sides.pop(next(iter(model.cache.sides)))
    model.cache.sides[key] = Side(row, ids, probs, logits, value)
    return model.cache.sides[key]


def run(runs: Runs, k: int) -> Generator[Progress, None, RunResult]:
    """Clean, corrupted and now, each with its likeliest next tokens and the metric; raw and normalised."""
    if k < 1:
        raise UserError("k must be at least 1")
    metric = runs.study.metric
    clean = yield from side(runs, "clean", k)
    corrupt = (yield from side(runs, "corrupt", k)) if runs.rows["corrupt"] is not None else None
    now = (clean if runs.study.base == "clean" else corrupt) if not runs.edits else (yield from side(runs, "now", k))
    normalised, warning = None, ""
    if now.metric is None:
        warning = f"{metric.kind} needs " + ("a prompt of two tokens" if metric.kind == "loss" else "an answer" if not runs.answers else "a foil")
    elif corrupt is None:
        warning = "no corrupted prompt: nothing to normalise by"
    else:
        gap = clean.metric - corrupt.metric
        if abs(gap) < 1e-3 * max(abs(clean.metric), abs(corrupt.metric)) or gap == 0:
            warning = f"clean and corrupted differ by {gap:.2g} only: not normalised"
        else:
            normalised = (now.metric - corrupt.metric) / gap
    sides = [s for s in (clean, corrupt, now) if s is not None]
    words = texts(runs.model, np.concatenate([s.top_ids.ravel() for s in sides]))
    place = "" if metric.kind == "loss" else f" at {metric.pos}"
    parts = [f"{metric.kind}{place}", "normalised: corrupted = 0, clean = 1", f"raw weights, {runs.model.info.dtype}", runs.convention]
    return RunResult(clean, corrupt, now, normalised, warning, words, ", ".join(p for p in parts if p), tuple(runs.answers), tuple(runs.foils))
