"""Features changed one by one: what the graph predicts, what happens with attention frozen, and what happens in the model."""

from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL
from model.steering import Change, changed, write
from techniques.graphs.building import Built
from techniques.graphs.influence import flow, shares
from techniques.graphs.replacement import freeze
from techniques.graphs.requests import GraphEffects, GraphEffectsResult
from vocabulary.nodes import UserError
from vocabulary.requests import Progress


def predicted(built: Built) -> Tensor:
    """
    What the first logit node gains [feature] when a feature's activation doubles: over all paths of the graph, a later feature's activation moving with
    its pre-activation. A change by a factor c is (c - 1) times that.
    """
    f = len(built.some)
    value = built.local.value[built.some].double()
    between = built.matrix[:f, :f] / value[:, None]
    return t.linalg.solve((t.eye(f, dtype=t.float64) - between).T, built.matrix[first(built), :f])


def first(built: Built) -> int:
    return len(built.matrix) - len(built.logits)


def chosen(built: Built, ask: GraphEffects) -> list[int]:
    """The features (among the graph's) that are changed."""
    local, f = built.local, len(built.some)
    if ask.only:
        try:
            layer, index, pos = (int(x) for x in ask.only.split("_"))
        except ValueError:
            raise UserError(f"{ask.only!r} is no feature of a graph: write LAYER_FEATURE_POSITION, such as 1_205_8") from None
        mine = (local.layer[built.some] == layer) & (local.index[built.some] == index) & (local.where[built.some] == pos)
        if not mine.any():
            raise UserError(f"feature {index} of layer {layer} is not in the graph at position {pos}: it does not fire there, or is beyond --features")
        return mine.nonzero()[:, 0].tolist()
    if ask.k < 1:
        raise UserError("k must be at least 1")
    return flow(shares(built.matrix), built.weights)[:f].argsort(descending=True, stable=True)[: ask.k].tolist()


@t.no_grad()
def effects(built: Built, ask: GraphEffects, name: str) -> Generator[Progress, None, GraphEffectsResult]:
    local, runs, model = built.local, built.local.runs, built.local.model
    some, last = chosen(built, ask), built.end.stream
    whole, frozen_edits, ids = predicted(built), freeze(runs, ask.which), t.tensor([local.ids])
    u, before = built.end.directions[0].double().cpu(), local.runs.trace(ask.which, [last])[last][0, built.pos].double().cpu()
    score = lambda x: value_of(built, x)  # noqa: E731
    own, frozen, true = score(runs.trace(ask.which, [FINAL])[FINAL]), [], []
    for done, i in enumerate(some):
        a = built.some[i]
        layer, pos, index = int(local.layer[a]), int(local.where[a]), int(local.index[a])
        d = local.coders[layer]
        edits = write(d, changed(d, [Change(index, pos, "scale", ask.factor)], [pos], True))
        after = model.forward(ids, [last], [*frozen_edits, *edits], keep=None)[1][last][0, built.pos]
        frozen.append(float((after.double().cpu() - before) @ u))
        true.append(score(model.forward(ids, [FINAL], edits, keep=None)[1][FINAL]) - own)
        yield Progress(done + 1, len(some), "features changed in the model")
    at, by = built.some[some], ask.factor - 1
    guess = (whole[some] * by).numpy()
    pairs = [(guess, np.array(x)) for x in (frozen, true)]
    numbers = lambda x, kind: x.numpy().astype(kind)  # noqa: E731
    words = f"change of {name} as a feature is multiplied by {ask.factor:g}; predicted: all paths of the graph, each feature linear; frozen: patterns and norm scales of "
    words += "attention and the final norm held, MLPs computed; true: everything computed; the SAE's error kept"
    return GraphEffectsResult(
        runs.row(ask.which), name, numbers(local.layer[at], np.int32), numbers(local.where[at], np.int32), numbers(local.index[at], np.int32),
        numbers(local.value[at], np.float32), numbers(built.matrix[first(built), some] * by, np.float64), guess, *(p[1] for p in pairs),
        tuple(correlation(*p) for p in pairs), tuple(correlation(*map(ranks, p)) for p in pairs), words,
    )  # fmt: skip


def value_of(built: Built, final: Tensor) -> float:
    """The first logit node's value in a run, of what leaves the final norm [1, seq, d_model]."""
    runs, scores = built.local.runs, built.local.model.scores(final[:1, built.pos])[0].double()
    if built.logits == [-1]:
        return float(scores[runs.answers].mean() - scores[runs.foils].mean())
    return float(scores[built.logits[0]] - scores.mean())


def ranks(x: np.ndarray) -> np.ndarray:
    return x.argsort(kind="stable").argsort(kind="stable").astype(float)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN for fewer than three values, or ones that do not differ."""
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 0 and y.std() > 0 else float("nan")
