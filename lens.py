"""Logit lens, and the run itself: what the model predicts at every position, at hook points and at the end, with its metric."""

import math
from collections.abc import Generator

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


@t.no_grad()
def statistics(logits: Tensor, final: Tensor | None, answers: list[int], foils: list[int], k: int) -> dict[str, Tensor]:
    """Of fp32 logits [..., vocab]; `final` the log probabilities that KL(final || this) is taken against."""
    logp = t.log_softmax(logits, -1)
    p = logp.exp()
    top = p.topk(min(k, p.shape[-1]), -1)
    out = {"top_ids": top.indices, "top_probs": top.values, "top_logits": logits.gather(-1, top.indices)}
    nan = t.full(logits.shape[:-1], math.nan, device=logits.device)
    out |= dict.fromkeys(("prob", "rank", "logit_diff", "kl"), nan)
    out["entropy"] = t.special.entr(p).sum(-1)
    if answers:
        out["prob"] = p[..., answers].sum(-1)
        out["rank"] = (logits > logits[..., answers].amax(-1, keepdim=True)).sum(-1).float()
    if answers and foils:
        out["logit_diff"] = logits[..., answers].mean(-1) - logits[..., foils].mean(-1)
    if final is not None:
        out["kl"] = (final.exp() * (final - logp)).sum(-1)
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
        logits = model.unembed(model.norm(flat[start:stop]))
        places = t.arange(start, stop, device=logits.device) % seq
        final = whole[places] if whole is not None else model.log_probs(last[places])
        return {n: v.cpu().numpy() for n, v in statistics(logits, final, runs.answers, runs.foils, k).items()}

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


@t.no_grad()
def measure(runs: Runs, which: str) -> float | None:
    """The metric of a run; None when it needs answers (or foils) that the prompt does not have."""
    model, kind = runs.model, runs.study.metric.kind
    row, last = runs.row(which), runs.trace(which, [FINAL])[FINAL][0]
    if kind == "loss":
        return loss(model, last, row.ids)
    pos = runs.position(which, runs.study.metric.pos)
    logits = model.unembed(last[pos : pos + 1])[0].double()
    logp = logits.log_softmax(-1)
    answers, foils = runs.answers, runs.foils
    if kind == "kl":
        clean = runs.trace("clean", [FINAL])[FINAL][0][runs.position("clean", runs.study.metric.pos)][None]
        final = model.unembed(clean)[0].double().log_softmax(-1)
        return (final.exp() * (final - logp)).sum().item()
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


def loss(model: Model, last: Tensor, ids: tuple[int, ...]) -> float | None:
    """Mean cross-entropy of tokens 1... given those before; None for a prompt of one token."""
    if len(ids) < 2:
        return None
    target, size, total = t.tensor(ids[1:], device=last.device), rows_at_once(model), 0.0
    for i in range(0, len(target), size):
        logp = model.log_probs(last[i : min(i + size, len(target))])
        total -= logp.gather(-1, target[i : i + size, None]).double().sum().item()
    return total / len(target)


def side(runs: Runs, which: str, k: int) -> Generator[Progress, None, Side]:
    model, row = runs.model, runs.row(which)
    last = runs.trace(which, [FINAL])[FINAL][0]

    @t.no_grad()
    def work(start: int, stop: int) -> list[np.ndarray]:
        logits = model.unembed(last[start:stop])
        top = logits.topk(min(k, logits.shape[-1]), -1)
        probs = (top.values - logits.logsumexp(-1, keepdim=True)).exp()
        return [top.indices.int().cpu().numpy(), probs.cpu().numpy(), top.values.cpu().numpy()]

    parts = []
    for part in in_chunks(len(row.ids), rows_at_once(model), work):
        if isinstance(part, Progress):
            yield part
        else:
            parts.append(part)
    ids, probs, logits = (np.concatenate(p) for p in zip(*parts))
    if not np.isfinite(logits).all():
        raise UserError(f"the logits of the {which} run are not finite: load the model in float32")
    return Side(row, ids, probs, logits, measure(runs, which))


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
