"""The door of this room: sets made from templates in a model's own words, and sets as they come."""

import random
from collections.abc import Generator, Iterable
from functools import partial

import numpy as np
import torch as t

from model.bridge import FINAL, Model
from model.memory import Chunks
from model.replacements import prompts_at_once
from model.runs import Runs, read_study
from techniques.sets import templates
from techniques.sets.requests import CORRUPTIONS, MAKES, MakeSet, SetResult
from vocabulary.nodes import UserError
from vocabulary.prompts import Metric, Prompt, Study
from vocabulary.requests import Progress
from vocabulary.sets import LeftOut, fitting

TRIES = 40  # prompts that are tried for each that is asked for


def answer(model: Model, ask: MakeSet) -> Generator[Progress, None, SetResult]:
    """A set made, or one that is there with what does not fit it left out."""
    if ask.prompts:
        return (yield from look_through(model, ask))
    if ask.make not in MAKES:
        raise UserError(f"{ask.make!r} can't be made: there are {', '.join(MAKES)}, or the path of a .jsonl set")
    if ask.n < 1 or not 1 <= ask.templates <= len(templates.IOI):
        raise UserError(f"n is at least 1, and templates are 1 to {len(templates.IOI)}")
    if ask.corruption not in CORRUPTIONS:
        raise UserError(f"{ask.corruption!r} is not a corruption: use one of {', '.join(CORRUPTIONS)}")
    made, good, right, tried, values = maker(model, ask), [], 0, 0, []
    while len(good) < ask.n and tried < TRIES * ask.n:
        some = fresh(model, made, good, min(ask.n - len(good), 32), TRIES * ask.n - tried)
        if not some:
            break
        found = yield from differences(model, [study_of(model, p) for p in some], len(good))
        wins = found[0] > 0
        tried, right = tried + len(some), right + int(wins.sum())
        keep = [i for i in range(len(some)) if wins[i] or not ask.correct]
        good += [some[i] for i in keep]
        values += [found[1:, i] for i in keep]
    if not good:
        raise UserError(f"no prompt of {ask.make} could be made in this model's words" + " that it gets right" * ask.correct)
    words = [MAKES[ask.make]]
    if ask.make == "ioi":
        words += [f"{ask.templates} of the paper's templates", f"corrupted: {CORRUPTIONS[ask.corruption]}"]
    words += [f"seed {ask.seed}", "only what the model gets right" * ask.correct, f"only {len(good)} of {ask.n} could be made" * (len(good) < ask.n)]
    return result(model, ask, tuple(good), tried, right, np.array(values).T, (), words)


def look_through(model: Model, ask: MakeSet) -> Generator[Progress, None, SetResult]:
    """Which prompts of a set fit, and with `correct` those of them that the model gets right."""
    members, runs, left = fitting(enumerate(ask.prompts), lambda p: study_of(model, p))
    found, wins = np.full((3, len(runs)), np.nan), np.zeros(len(runs), bool)
    known = [i for i, r in enumerate(runs) if r.answers and r.foils]
    if known:
        found[:, known] = yield from differences(model, [runs[i] for i in known], 0)
        wins = found[0] > 0
    keep = [i for i in range(len(runs)) if wins[i] or not ask.correct]
    if ask.correct:
        left = tuple(sorted((*left, *((members[i][0], "the model does not get it right") for i in range(len(runs)) if not wins[i]))))
    if not keep:
        raise UserError("the model gets no prompt of the set right")
    prompts = tuple(members[i][1] for i in keep)
    return result(
        model, ask, prompts, len(known), int(wins.sum()), found[1:][:, keep], left, [f"{len(keep)} of {len(ask.prompts)} prompts fit {model.info.name}"]
    )


def study_of(model: Model, prompt: Prompt) -> Runs:
    return read_study(model, Study(prompt, metric=Metric("logprob")))


def maker(model: Model, ask: MakeSet) -> Generator[Prompt]:
    """The prompts of a task, one after the other without end."""
    r = random.Random(ask.seed)
    one = lambda words: [w for w in words if len(model.tokens.encode(f"a {w}")[0]) == len(model.tokens.encode("a")[0]) + 1]  # noqa: E731
    match ask.make:
        case "ioi":
            return templates.ioi(r, one, ask.corruption, ask.templates)
        case "greater-than":
            return templates.greater_than(r, one, len(model.answer("The war lasted from the year 1732 to the year 17", "45").ids) == 1)
    return getattr(templates, ask.make)(r, one)


def fresh(model: Model, made: Iterable[Prompt], known: list[Prompt], n: int, tries: int) -> list[Prompt]:
    """The next n prompts that are new, of which everything is one token that should be, and whose corrupted partner is as long and has the labels at the same places."""
    some, seen = [], {p.clean for p in known}
    for prompt, _ in zip(made, range(tries)):
        if prompt.clean not in seen and fits(model, prompt):
            some.append(prompt)
            seen.add(prompt.clean)
        if len(some) == n:
            break
    return some


def fits(model: Model, prompt: Prompt) -> bool:
    check = model.check(prompt)
    sides = (*check.answers, *check.foils)
    apart = not {r.ids for r in check.answers} & {r.ids for r in check.foils}
    return not check.problems and apart and len(check.clean.ids) == len(check.corrupt.ids) and all(len(r.ids) == 1 for r in sides)


def differences(model: Model, runs: list[Runs], before: int) -> Generator[Progress, None, np.ndarray]:
    """[3, prompt]: the best answer's logit over the best foil's on the clean prompt, and the mean answer's over the mean foil's on clean and corrupted (NaN: none)."""
    out = np.full((3, len(runs)), np.nan)
    for which in ("clean", "corrupt"):
        lengths = [len(r.rows[which].ids) if r.rows[which] else 0 for r in runs]
        for length in sorted(set(lengths) - {0}):
            same = [i for i, n in enumerate(lengths) if n == length]
            for part in Chunks("prompts", lambda _, n=length: prompts_at_once(model, n)).over(len(same), partial(last_logits, model, runs, same, which)):
                if isinstance(part, Progress):
                    yield part
                    continue
                for i, row in part:
                    a, f = row[runs[i].answers], row[runs[i].foils]
                    out[1 if which == "clean" else 2, i] = (a.mean() - f.mean()).item()
                    if which == "clean":
                        out[0, i] = (a.max() - f.max()).item()
                yield Progress(before + len(part), before + len(runs), "what the model says to the prompts")
    return out


def last_logits(model: Model, runs: list[Runs], same: list[int], which: str, start: int, stop: int) -> list[tuple[int, t.Tensor]]:
    some = same[start:stop]
    _, got = model.forward(t.tensor([runs[i].row(which).ids for i in some]), [FINAL], keep=None)
    return list(zip(some, model.unembed(got[FINAL][:, -1]).double().cpu()))


def result(model: Model, ask: MakeSet, prompts: tuple[Prompt, ...], tried: int, right: int, values: np.ndarray, left: LeftOut, words: list[str]) -> SetResult:
    lengths = tuple(len(model.check(p).clean.ids) for p in prompts)
    clean, corrupt = (float(np.mean(v)) if len(v) else float("nan") for v in values)
    return SetResult(ask.make, prompts, lengths, tried, right, clean, corrupt, left, "; ".join(w for w in words if w))
