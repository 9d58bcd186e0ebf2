"""The door of this room: a score by what wrote into its query and its key, over a prompt or a set; and one path changed for real."""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t

from model.bridge import Model
from model.interventions import prepare
from model.sae import labels
from techniques.attention.patterns import check_layer, read_set
from techniques.qk import loadings, scores
from techniques.qk.checks import checked
from techniques.qk.dictionaries import NO_SAES, InSum, chosen, checked as check_saes
from techniques.qk.parts import Sides
from techniques.qk.requests import MEAN, NONE, QK, HeadScore, QKCheck, QKFeaturesResult, QKResult, QKSet
from techniques.qk.split import Split, convention
from vocabulary.nodes import UserError
from vocabulary.prompts import RUNS
from vocabulary.requests import Progress
from vocabulary.sets import in_part


def answer(model: Model, request: QK | QKSet | QKCheck) -> Generator:
    check_layer(model, request.layer)
    if not 0 <= request.head < model.info.n_heads:
        raise UserError(f"there is no head {request.head}: layer {request.layer} has heads 0 to {model.info.n_heads - 1}")
    if request.which not in RUNS:
        raise UserError(f"{request.which!r} is not a run: use one of {', '.join(RUNS)}")
    model.require("parts", "heads", "q", "k")
    saes = (yield from chosen(model, request.study.saes, request.layer)) if request.features else NO_SAES
    if isinstance(request, QKSet):
        return (yield from over_set(model, request, saes))
    split = yield from split_of(model, request, saes)
    return checked(split, request) if isinstance(request, QKCheck) else result(request, saes, [split.sides], facts(split))


def split_of(model: Model, ask: HeadScore, saes: InSum, first: bool = True) -> Generator[Progress, None, Split]:
    """The score of one prompt, split; an SAE has to explain the `first` of a set, and a prompt by itself."""
    runs = (yield from prepare(model, ask.study)).at(ask.which)
    check_saes(runs, saes, ask.which, first)
    return Split(runs, ask, saes)


def facts(split: Split) -> dict[str, object]:
    """What a result says of a prompt beside its table."""
    cap, own, seen = scores.soft_cap(scores.attention_of(split.model, split.ask.layer)), split.form.own, split.sight
    capped = cap * t.tanh(own / cap) if cap else own
    return {
        "tokens": split.row, "which": split.ask.which, "layer": split.ask.layer, "head": split.ask.head, "kv_head": split.kv, "dest": split.dest, "source": split.source,
        "instead": split.instead, "total": split.total, "score": split.score, "error": abs(split.total - split.score), "cap": cap,
        "capped": float((capped[seen] * split.weights[seen]).sum()), "attention": float(split.pattern[split.dest, split.source]), "convention": convention(split),
    }  # fmt: skip


def result(ask: HeadScore, saes: InSum, found: list[Sides], facts: dict[str, object], prompts: list[int] | None = None, totals: list[float] = ()) -> QKResult:
    """The table of one prompt's sides, or the means of several."""
    common = facts | {"prompts": np.array(prompts or [], np.int32), "totals": np.array(totals, np.float64 if prompts else np.float32)}
    if ask.features:
        known = [name for sides in found for name in (*sides.queries, *sides.keys)]
        names = {f"L{d.layer}.sae.f{i}": text for d in saes.every for i, text in labels(d.source).items()}
        common |= {"saes": tuple(d.info for d in saes.every), "labels": {n: names[n] for n in dict.fromkeys(known) if n in names}}
        return QKFeaturesResult(**common, **loadings.fields(found, ask.most, bool(prompts)))
    values, low, high = loadings.means([sides.query for sides in found], [sides.key for sides in found], bool(prompts))
    return QKResult(**common, queries=tuple(found[0].queries), keys=tuple(found[0].keys), values=values, low=low, high=high)


def over_set(model: Model, ask: QKSet, saes: InSum) -> Generator[Progress, None, QKResult]:
    """The sum on each prompt of the set, at its own positions of the labels; means with intervals."""
    members, sides, each = read_set(ask.study), [], []
    members = [members[k] for k in in_part(members, ask.study.part)]
    if ask.source is None:
        raise UserError("over a set the source has to be one: give a label that all its prompts have, such as S2")
    for done, (i, prompt) in enumerate(members):
        try:
            split = yield from split_of(model, replace(ask, study=replace(ask.study, prompt=prompt)), saes, not done)
        except UserError as error:
            raise UserError(f"prompt {i + 1} of the set: {error}") from error
        sides.append(split.sides)
        each.append(facts(split))
        loadings.check_size(sides, len(members))
        yield Progress(done + 1, len(members), "QK attribution over the set")
    first = each[0]
    mean = {name: float(np.mean([r[name] for r in each])) for name in ("total", "score", "capped", "attention")}
    instead = {NONE: "", MEAN: (mean_of := "the mean over the sources in sight"), None: mean_of}.get(ask.instead, f"source {ask.instead}")
    how = first["convention"].replace(first["instead"], instead) if first["instead"] else first["convention"]  # positions and counts are each prompt's own
    words = f"mean over {len(each)} prompts of the set with 95 % intervals, {"the metric's position" if ask.dest is None else ask.dest} to {ask.source}, {how}"
    words += ", what a prompt lacks counts as 0" * ask.features
    common = first | mean | {"instead": instead, "error": max(r["error"] for r in each), "convention": words}
    return result(ask, saes, sides, common, [i for i, _ in members], [r["total"] for r in each])
