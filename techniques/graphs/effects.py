"""Features changed one by one: what the graph predicts, what happens with attention frozen, and what happens in the model."""

import math
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, Edit
from techniques.graphs.building import Built
from techniques.graphs.influence import flow, shares
from techniques.graphs.replacement import each, freeze, reach, writes
from techniques.graphs.requests import GraphEffects, GraphEffectsResult, GraphSteer
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

WORDS = "predicted: all paths of the graph, each feature linear; frozen: patterns and norm scales of attention and the final norm held, MLPs computed; true: everything computed; the transcoder's error kept"


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


def place_of(text: str) -> tuple[int, int, int]:
    """Layer, feature and position of a feature's id."""
    try:
        layer, index, pos = (int(x) for x in text.split("_"))
        if max(abs(layer), abs(index), abs(pos)) < 1 << 63:
            return layer, index, pos
    except ValueError:
        pass
    raise UserError(f"{text!r} is no feature of a graph: write LAYER_FEATURE_POSITION, such as 1_205_8")


def check_finite(x: float) -> None:
    if not math.isfinite(x):
        raise UserError("a feature is multiplied by a finite number, or set to one")


def found(built: Built, text: str) -> int:
    """A feature (among the graph's) of its id."""
    (layer, index, pos), local = place_of(text), built.local
    mine = (local.layer[built.some] == layer) & (local.index[built.some] == index) & (local.where[built.some] == pos)
    if not mine.any():
        raise UserError(f"feature {index} of layer {layer} is not in the graph at position {pos}: it does not fire there, or is beyond --features")
    return int(mine.nonzero()[0, 0])


def chosen(built: Built, ask: GraphEffects) -> list[int]:
    """The features (among the graph's) that are changed."""
    if ask.only:
        return [found(built, ask.only)]
    if ask.k < 1:
        raise UserError("k must be at least 1")
    return flow(shares(built.matrix), built.weights)[: len(built.some)].argsort(descending=True, stable=True)[: ask.k].tolist()


class Changed:
    """The model with some features (among the graph's) held at values, with attention frozen (patterns, and the scales of the norms around it) or not."""

    def __init__(self, built: Built, ask: GraphEffects | GraphSteer):
        local = built.local
        self.built, self.local, self.ids, self.freeze = built, local, t.tensor([local.ids]), freeze(local.runs, ask.which)
        self.before = local.runs.trace(ask.which, [built.end.streams[0]])[built.end.streams[0]][0, built.pos].double().cpu()
        self.own = values_of(built, local.runs.trace(ask.which, [FINAL])[FINAL])

    def edits(self, features: list[int], values: Tensor) -> list[Edit]:
        """What the changed features write is added to all that their transcoder writes; its error stays."""
        local, some, more = self.local, self.built.some[features], {}
        edits: list[Edit] = []
        for layer in local.layer[some].unique().tolist():
            d, mine = local.coders[layer], local.layer[some] == layer
            pos, index, new = local.where[some][mine], local.index[some][mine], values[mine]

            def read(x: Tensor, d=d, pos=pos, index=index, new=new) -> None:
                gain = new.to(d.device, t.float32) - each(d, x[0, pos.to(x.device)], index)
                for out, rows in writes(d, index):
                    more.setdefault(out, []).append((pos, rows * gain[:, None]))

            edits.append((d.point, read))

        def add(y: Tensor, out: int) -> Tensor:
            y = y.clone()
            for pos, rows in more.pop(out, ()):
                y[0].index_add_(0, pos.to(y.device), rows.to(y))
            return y

        last = max(reach(local.coders[layer])[-1] for layer in local.layer[some].tolist())
        return edits + [(local.outs[out], lambda y, out=out: add(y, out)) for out in range(int(local.layer[some].min()), last + 1)]

    def run(self, features: list[int], values: Tensor, frozen: bool, points: tuple[str, ...] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """The change of each logit node, and activations at points; frozen: the final norm's scale too."""
        name, edits = (self.built.end.streams[0], self.freeze) if frozen else (FINAL, [])
        acts = self.local.model.forward(self.ids, [name, *points], [*edits, *self.edits(features, values)], keep=None)[1]
        if not frozen:
            return values_of(self.built, acts[name]) - self.own, acts
        return self.built.end.directions.double().cpu() @ (acts[name][0, self.built.pos].double().cpu() - self.before), acts


@t.no_grad()
def effects(built: Built, ask: GraphEffects, name: str) -> Generator[Progress, None, GraphEffectsResult]:
    check_finite(ask.factor)
    local, some, whole, model = built.local, chosen(built, ask), predicted(built), Changed(built, ask)
    frozen, true = [], []
    for done, i in enumerate(some):
        new = local.value[built.some[[i]]] * ask.factor
        for out, held in ((frozen, True), (true, False)):
            out.append(float(model.run([i], new, held)[0][0]))
        yield Progress(done + 1, len(some), "features changed in the model")
    at, by = built.some[some], ask.factor - 1
    guess = (whole[some] * by).numpy()
    pairs = [(guess, np.array(x)) for x in (frozen, true)]
    numbers = lambda x, kind: x.numpy().astype(kind)  # noqa: E731
    return GraphEffectsResult(
        local.runs.row(ask.which), name, numbers(local.layer[at], np.int32), numbers(local.where[at], np.int32), numbers(local.index[at], np.int32),
        numbers(local.value[at], np.float32), numbers(built.matrix[first(built), some] * by, np.float64), guess, *(p[1] for p in pairs),
        tuple(correlation(*p) for p in pairs), tuple(correlation(*map(ranks, p)) for p in pairs),
        f"change of {name} as a feature is multiplied by {ask.factor:g}; {WORDS}",
    )  # fmt: skip


def values_of(built: Built, final: Tensor) -> Tensor:
    """The logit nodes' values in a run [logit], of what leaves the final norm [1, seq, d_model]."""
    runs, scores = built.local.runs, built.local.model.scores(final[:1, built.pos])[0].double().cpu()
    if built.logits == [-1]:
        return (scores[runs.answers].mean() - scores[runs.foils].mean())[None]
    return scores[built.logits] - scores.mean()


def ranks(x: np.ndarray) -> np.ndarray:
    return x.argsort(kind="stable").argsort(kind="stable").astype(float)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's r; NaN for fewer than three values, or ones that do not differ."""
    return float(np.corrcoef(x, y)[0, 1]) if len(x) > 2 and x.std() > 0 and y.std() > 0 else float("nan")
