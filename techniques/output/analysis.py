"""The door of this room: the likeliest next tokens and the metric of clean, corrupted and now."""

import math
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, Model
from model.interventions import prepare
from model.memory import Chunks
from model.metrics import MetricReader, measure, rows_at_once
from model.noise import known_floor, noise_floor
from model.runs import Runs
from model.top_tokens import largest, texts
from techniques.output.requests import Run, RunResult, Side
from vocabulary.nodes import UserError
from vocabulary.prompts import Study
from vocabulary.requests import Progress


def answer(model: Model, request: Run) -> Generator:
    runs = yield from prepare(model, request.study, reads_answer(request.study))
    return (yield from run(runs, request.k))


def reads_answer(study: Study) -> bool:
    """Whether the metric is of the answer's tokens, and there is an answer."""
    return study.metric.kind == "logprob_sum" and bool(study.prompt.answers)


class SideReading:
    """
    One run's top tokens at ever more positions, and its metric: the metric's position and the last one first. Each row of logits is made once; a
    finished side is remembered, so that a key does not make clean and corrupted again. Not yet read: token -1, NaN.
    """

    def __init__(self, runs: Runs, which: str, k: int):
        model, row, metric = runs.of(which), runs.row(which), runs.study.metric
        n = len(row.ids) - row.tail  # what is shown is the prompt
        self.model, self.runs, self.which, self.loss = model, runs, which, metric.kind == "loss"
        self.row = replace(row, ids=row.ids[:n], texts=row.texts[:n], tail=0)
        self.pos = 0 if metric.kind in ("loss", "own") else runs.metric_position(which)
        self.clean_ids = runs.row("clean").ids if metric.kind == "kl" else None
        self.key = (row.ids, runs.done if which == "now" else (), k, metric, self.pos, tuple(runs.answers), tuple(runs.foils), self.clean_ids)
        self.done = model.cache.sides.get(self.key)
        if self.done is None:
            shape = (n, min(k, model.info.d_vocab))
            self.ids, self.probs, self.logits = np.full(shape, -1, np.int32), *(np.full(shape, np.nan, np.float32) for _ in range(2))
            self.nll, self.metric = np.full(shape[0], np.nan), None
            self.last = runs.trace(which, [FINAL])[FINAL][0]
            self.order = list(dict.fromkeys((self.pos, shape[0] - 1, *range(shape[0]))))
            self.chunks = Chunks("positions", rows_at_once(model))

    @property
    def side(self) -> Side:
        return replace(self.done, tokens=self.row) if self.done else Side(self.row, self.ids.copy(), self.probs.copy(), self.logits.copy(), self.metric)

    @t.no_grad()
    def read(self, places: list[int]) -> None:
        model, device = self.model, self.last.device
        logits = model.unembed(self.last[t.tensor(places, device=device)])
        (values, ids), lse = largest(logits, self.ids.shape[1]), logits.logsumexp(-1, keepdim=True)
        numbers = [(values - lse).exp(), values]
        if self.loss:
            target = t.tensor([*self.row.ids[1:], 0])[places].to(device)
            numbers.append(lse - logits.gather(-1, target[:, None]))
        host, k = t.cat([*(x.float().view(t.int32) for x in numbers), ids.int()], -1).cpu().numpy(), self.ids.shape[1]
        probs, values, nll = (np.ascontiguousarray(x).view(np.float32) for x in np.split(host[:, :-k], [k, 2 * k], 1))
        self.ids[places], self.probs[places], self.logits[places] = host[:, -k:], probs, values
        if not np.isfinite(values).all():
            raise UserError(f"the logits of the {self.which} run are not finite: load the model in float32")
        if self.loss:
            self.nll[places] = nll[:, 0]
        elif self.pos in places and not self.runs.own:
            self.measure(logits[places.index(self.pos)])

    def measure(self, row: Tensor) -> None:
        runs, clean = self.runs, row
        if runs.row(self.which).tail:
            last = f"blocks.{runs.model.info.n_layers - 1}.hook_resid_post"
            self.metric = float(MetricReader([runs], None, self.which).of(runs.trace(self.which, [last])[last], 0)[0, 0])
            return
        if runs.study.metric.kind == "kl":
            clean = runs.of("clean").unembed(runs.trace("clean", [FINAL])[FINAL][0][runs.metric_position("clean")][None])[0]
        self.metric = measure(runs.study.metric.kind, row, clean, self.nll[:-1], runs.answers, runs.foils)

    def steps(self, first: bool) -> Generator[Progress | None]:
        """Read what comes first (all of a short prompt), or what is left; None after each chunk."""
        if self.done:
            return
        size, few = rows_at_once(self.model), len({self.pos, len(self.row.ids) - 1})
        if not first or self.loss or len(self.order) <= size:
            few = len(self.order)
        todo, self.order = self.order[:few], self.order[few:]
        yield from self.chunks.over(len(todo), lambda start, stop: self.read(todo[start:stop]))
        if not self.order:
            if self.loss:
                self.measure(self.last[0])
            if self.runs.own:
                self.metric = self.runs.own(self.model.unembed(self.last), self.row.ids).item()
            sides = self.model.cache.sides
            if len(sides) >= 64:
                sides.pop(next(iter(sides)))
            self.done = sides[self.key] = self.side


def run(runs: Runs, k: int) -> Generator[Progress | RunResult, None, RunResult]:
    """
    Clean, corrupted and now, each with its likeliest next tokens and the metric; raw and normalised. Of a long prompt, partial results at first: the
    metric's position and the last one, then ever more.
    """
    if k < 1:
        raise UserError("k must be at least 1")
    sides = {w: SideReading(runs, w, k) for w in ("clean", "corrupt", "now") if runs.rows[w] is not None and (w != "now" or runs.edits)}
    for reading in sides.values():
        yield from (part for part in reading.steps(True) if part)
    if any(not reading.done for reading in sides.values()):
        yield run_result(runs, sides)
    for reading in sides.values():
        for part in reading.steps(False):
            yield part or run_result(runs, sides)
    found = run_result(runs, sides)
    if found.change is not None and "now" in sides and math.isnan(found.floor) and tells(runs):  # measured last: no key waits for it
        yield found
        yield from noise_floor([runs])
        found = run_result(runs, sides)
    return found


def tells(runs: Runs) -> bool:
    """Whether the noise floor is worth its 12 rows at each prompt: not in float32, where it is tiny."""
    return runs.model.dtype != t.float32


def run_result(runs: Runs, readings: dict[str, SideReading]) -> RunResult:
    """What is known of the runs."""
    metric, found = runs.study.metric, {w: r.side for w, r in readings.items()}
    clean, corrupt = found["clean"], found.get("corrupt")
    now = found.get("now", clean if runs.study.base == "clean" else corrupt)
    normalised, warning = None, ""
    if now.metric is None:
        warning = f"{metric.kind} needs " + ("a prompt of two tokens" if metric.kind == "loss" else "an answer" if not runs.answers else "a foil")
    elif corrupt is None:
        warning = "no corrupted prompt: nothing to normalise by"
    else:
        gap = clean.metric - corrupt.metric
        if abs(gap) < 1e-3 * max(abs(clean.metric), abs(corrupt.metric)) or gap == 0:
            warning = f"{runs.called('clean')} and {runs.called('corrupt')} differ by {gap:.2g} only: not normalised"
        else:
            normalised = (now.metric - corrupt.metric) / gap
            if abs(gap) < 0.05 * max(abs(clean.metric), abs(corrupt.metric)):
                warning = f"small denominator: {runs.called('clean')} and {runs.called('corrupt')} differ by {gap:+.3g} only"
    sides = [s for s in (clean, corrupt, now) if s is not None]
    words = texts(runs.model, np.concatenate([s.top_ids[s.top_ids >= 0] for s in sides]))
    parts = [metric.words, f"normalised: {runs.called('corrupt')} = 0, {runs.called('clean')} = 1", f"raw weights, {runs.model.info.dtype}", runs.convention]
    names = runs.called("clean"), runs.called("corrupt")
    floor = known_floor([runs]) if runs.edits and now.metric is not None and tells(runs) else math.nan
    return RunResult(
        clean, corrupt, now, normalised, warning, words, ", ".join(p for p in parts if p), tuple(runs.answers), tuple(runs.foils), floor, names, runs.study.base
    )
