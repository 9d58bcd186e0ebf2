"""The door of this room: continuations of a prompt, token by token, each with its probability."""

import zlib
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from model.growth import Growth, why_not_cached
from model.interventions import edits_of_new, prepare
from model.runs import Runs
from model.top_tokens import largest, texts
from techniques.generation import steering
from techniques.generation.requests import Continuation, Continued, Curve, Directions, Generate, GenerateResult, HELD, MakeDirection, Sampling
from vocabulary.nodes import UserError
from vocabulary.prompts import Metric

TOP = 5


def answer(model: Model, request: Generate | MakeDirection | Directions | Curve) -> object:
    match request:
        case MakeDirection():
            return steering.make(model, request)
        case Directions():
            return steering.listed(model, request)
        case Curve():
            return steering.curve(model, request)
    return generate(model, request)


def generate(model: Model, request: Generate) -> Generator[object, None, GenerateResult]:
    """Every run one token further, then a part of the result, until all have ended."""
    how = request.how
    how.check()
    model.require("loss")
    if not model.causal:
        raise UserError(f"{model.info.architecture} sees later tokens too: it does not continue a text")
    runs = yield from prepare(model, replace(request.study, metric=Metric("kl")))  # no metric is read: none is in the way
    new = (yield from edits_of_new(runs)) if how.held == "all" else []
    sides = sides_of(runs, how)
    most = min(runs.of(which).info.n_ctx for which in sides)
    room = most - max(len(runs.row(which).ids) for which in sides)
    if room < 1:
        raise UserError(f"the prompt fills the model's context of {most} tokens: shorten it")
    total = min(how.tokens, room)
    reason = next(filter(None, (why_not_cached(runs.of(which)) for which in sides)), "")
    writers = [Writer(runs, which, how, new, not reason) for which in sides]
    note = convention(runs, how, total, reason)
    for step in range(total):
        for writer in writers:
            writer.write(step)
        if all(writer.ended.all() for writer in writers):
            break
        if step + 1 < total:
            yield result(model, writers, how, step + 1, total, note)
    return result(model, writers, how, total, total, note)


def sides_of(runs: Runs, how: Sampling) -> list[str]:
    """The base prompt's run, the same under the interventions, and the other prompt's where it is wanted."""
    base = runs.study.base
    other = "corrupt" if base == "clean" else "clean"
    if how.other and runs.rows[other] is None:
        raise UserError("there is no other prompt to continue: type a corrupted one first")
    return [base, *["now"] * bool(runs.edits), *[other] * how.other]


class Writer:
    """One run's samples as they grow."""

    def __init__(self, runs: Runs, which: str, how: Sampling, new: list, cached: bool):
        self.model, self.which, self.row, self.how = runs.of(which), which, runs.row(which), how
        now = which == "now"
        self.growth = Growth(self.model, self.row.ids, runs.edits if now else [], new if now else [], how.samples, cached)
        self.ids = np.zeros((how.samples, 0), int)
        self.probs = np.zeros((how.samples, 0), np.float32)
        self.top_ids, self.top_probs = (np.zeros((how.samples, 0, TOP), kind) for kind in (np.int32, np.float32))
        self.ended, self.stops = np.zeros(how.samples, bool), ends_of(self.model)
        self.lengths = np.zeros(how.samples, int)  # tokens of each sample, its end of text among them
        self.prompt = self.model.tokens.decode(self.row.ids)
        self.grown: list[list[str]] = [[] for _ in range(how.samples)]  # of each sample, prompt and new tokens as text, after each token

    def write(self, step: int) -> None:
        """One more token for every sample that has not ended."""
        if self.ended.all():
            return
        logits = self.growth.start() if step == 0 else self.growth.step(t.tensor(self.ids[:, -1]))
        if not logits.isfinite().all():
            raise UserError(f"the logits of the {self.which} run are not finite: load the model in float32")
        logp = logits[:, : self.model.n_embed].log_softmax(-1)
        chosen = choose(logp, self.how, step)
        top, ids = largest(logp, min(TOP, logp.shape[1]))
        pad = [(0, 0), (0, TOP - top.shape[1])]
        self.ids = np.concatenate([self.ids, chosen[:, None].numpy()], 1)
        self.probs = np.concatenate([self.probs, logp.cpu().gather(1, chosen[:, None]).exp().numpy()], 1)
        self.top_ids = np.concatenate([self.top_ids, np.pad(ids.cpu().numpy().astype(np.int32), pad)[:, None]], 1)
        self.top_probs = np.concatenate([self.top_probs, np.pad(top.exp().cpu().numpy(), pad)[:, None]], 1)
        self.lengths[~self.ended] += 1
        for n in np.flatnonzero(~self.ended):
            self.grown[n].append(self.model.tokens.decode((*self.row.ids, *self.ids[n].tolist())))
        self.ended |= np.isin(self.ids[:, -1], list(self.stops))

    def continuation(self, sample: int, beside: "Writer | None") -> Continuation:
        n, grown = self.lengths[sample], self.grown[sample]
        ids = tuple(self.ids[sample, :n].tolist())
        text = grown[-1].removeprefix(self.prompt) if n else ""
        parted = -1
        if beside is not None:
            theirs = beside.ids[sample, : beside.lengths[sample]].tolist()
            parted = next((k for k, i in enumerate(ids) if k < len(theirs) and theirs[k] != i), -1)
        return Continuation(
            ids,
            self.probs[sample, :n],
            self.top_ids[sample, :n],
            self.top_probs[sample, :n],
            text,
            tuple(min(len(g) - len(self.prompt), len(text)) for g in grown),
            bool(self.ended[sample]),
            parted,
        )


def ends_of(model: Model) -> frozenset[int]:
    """Tokens that end a text: the tokenizer's, and those of the model's generation config."""
    config = getattr(model.bridge.original_model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    some = found if isinstance(found, list | tuple) else [found]
    return frozenset(i for i in (*some, getattr(model.tokenizer, "eos_token_id", None)) if isinstance(i, int))


def choose(logp: Tensor, how: Sampling, step: int) -> Tensor:
    """
    The next token of each sample [sample] from log probabilities [sample, vocab]. Drawn by the Gumbel trick, with numbers that depend on seed, sample and
    step alone: equal distributions give equal tokens, also of another run or on another device.
    """
    if how.temperature == 0:
        return logp.argmax(-1).cpu()
    scaled = (logp.cpu().double() / how.temperature).log_softmax(-1)
    if how.top_p < 1:
        ordered, where = scaled.sort(-1, descending=True)
        before = ordered.exp().cumsum(-1) - ordered.exp()
        scaled = scaled.masked_fill(t.zeros_like(scaled, dtype=t.bool).scatter(1, where, before >= how.top_p), -t.inf)
    noise = (t.rand(scaled.shape[1], dtype=t.float64, generator=generator(how.seed, n, step)).clamp_min(1e-300) for n in range(len(scaled)))
    return t.stack([(row - (-u.log()).log()).argmax() for row, u in zip(scaled, noise)])


def generator(seed: int, sample: int, step: int) -> t.Generator:
    return t.Generator().manual_seed(zlib.crc32(repr((seed, sample, step)).encode()))


def result(model: Model, writers: list[Writer], how: Sampling, done: int, total: int, note: str) -> GenerateResult:
    runs = []
    for w in writers:
        samples = tuple(w.continuation(n, writers[0] if w.which == "now" else None) for n in range(how.samples))
        share = sum(how.contains in s.text for s in samples) / len(samples) if how.contains else None
        runs.append(Continued(w.which, w.row, samples, share))
    words = texts(model, np.concatenate([np.append(s.top_ids.ravel(), s.ids) for run in runs for s in run.samples]).astype(int))
    return GenerateResult(tuple(runs), done, total, words, note)


def convention(runs: Runs, how: Sampling, total: int, reason: str) -> str:
    """How it was continued, in words."""
    parts = [HELD[how.held]] if runs.edits else []
    parts += [how.words, f"probabilities at temperature 1, raw weights, {runs.model.info.dtype}"]
    parts += [f"each token a whole run without a cache: {reason}"] * bool(reason)
    parts += [f"the context ends after {total} tokens"] * (total < how.tokens)
    return " · ".join(p for p in (*parts, runs.convention) if p)
