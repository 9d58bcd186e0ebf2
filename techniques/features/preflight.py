"""Before an SAE is used: whether it explains the prompt, what the model loses with it spliced in, and two identities that must hold."""

import math
from collections.abc import Generator
from dataclasses import replace

import torch as t
from torch import Tensor

from model.bridge import FINAL, Edit, Model
from model.metrics import rows_at_once
from model.runs import Runs, read_study
from model.sae import SparseAutoencoder
from model.sae_fit import REFUSE, WARN, cause, choose, fits
from model.sae_loading import load
from model.steering import write
from techniques.features.requests import Preflight, PreflightResult
from vocabulary.requests import Identity, Progress


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
    for i, edits in enumerate(([], write(d, spliced), write(d, zeroed))):
        yield Progress(1 + i, 4, "loss with the SAE spliced in")
        losses.append(loss(model, ids, edits))
    gap = losses[2] - losses[0]
    recovered = (losses[2] - losses[1]) / gap if abs(gap) > 1e-6 else math.nan
    verdict = "good" if mine.cosine >= WARN else "warn" if mine.cosine >= REFUSE else "refuse"
    words = "; ".join(w for w in ("" if verdict == "good" else cause(runs, d, found), other_bos(runs, d)) if w)
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


def other_bos(runs: Runs, d: SparseAutoencoder) -> str:
    """Where the SAE's metadata says that it was trained with BOS in front, or without, and the prompt is the other way."""
    theirs = d.sae.cfg.metadata.get("prepend_bos")
    if theirs is None or bool(theirs) == runs.row("clean").bos or not runs.model.info.bos:
        return ""
    words = "with BOS in front, and this prompt has none" if theirs else "without BOS, and this prompt has it"
    return f"it was trained {words}: the key < or --{'' if theirs else 'no-'}bos changes that"


@t.no_grad()
def sae_identities(runs: Runs, source: str) -> Generator[Progress, None, list[Identity]]:
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

    logits = [model.forward(ids, edits=edits, keep=0)[0] for edits in (write(d, spliced), [])]
    return [
        model.identity(f"{source}: features + bias + error = activation", parts, y),
        model.identity(f"{source}: spliced in with its error = the model", *logits),
    ]
