"""Features changed together, with the prediction; and groups of features with like decoders."""

from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from techniques.graphs.building import Built
from techniques.graphs.effects import WORDS, Changed, check_finite, correlation, first, found, place_of
from techniques.graphs.replacement import AnyTranscoder, each, toward
from techniques.graphs.requests import GraphGroups, GraphGroupsResult, GraphSteer, GraphSteerResult
from techniques.graphs.supernodes import alike
from vocabulary.nodes import UserError
from vocabulary.requests import Progress


def response(built: Built, held: list[int], by: Tensor) -> Tensor:
    """The change of every feature's activation [feature] as the held ones change by so much: all paths, each activation moving with its pre-activation."""
    f = len(built.some)
    between = built.matrix[:f, :f] / built.local.value[built.some].double()
    between[held] = 0
    gain = t.zeros(f, dtype=t.float64)
    gain[held] = by
    return t.linalg.solve(t.eye(f, dtype=t.float64) - between, gain)


@t.no_grad()
def steer(built: Built, ask: GraphSteer, names: tuple[str, ...]) -> Generator[Progress, None, GraphSteerResult]:
    local, f = built.local, len(built.some)
    if not ask.steer or ask.most < 0:
        raise UserError("name at least one feature to steer, LAYER_FEATURE_POSITION as the graph writes it, and most from 0 on")
    check_finite(ask.factor if ask.value is None else ask.value)
    held = list(dict.fromkeys(found(built, text) for text in ask.steer))
    old = local.value[built.some[held]].double()
    new = old * ask.factor if ask.value is None else t.full_like(old, ask.value)
    gain, value = response(built, held, new - old), local.value[built.some].double()
    rest = gain.abs()
    rest[held] = 0
    watched = list(dict.fromkeys(found(built, text) for text in ask.watch)) or [
        i for i in rest.argsort(descending=True, stable=True)[: ask.most].tolist() if rest[i] > 0
    ]
    at = built.some[watched]
    points = tuple(dict.fromkeys(local.coders[layer].point for layer in local.layer[at].tolist()))
    model, outcomes = Changed(built, ask), []
    for done, frozen in enumerate((True, False)):
        logits, acts = model.run(held, new, frozen, points)
        outcomes.append((logits.numpy(), [activation(local.coders, acts, *(int(x[a]) for x in (local.layer, local.where, local.index))) for a in at]))
        yield Progress(done + 1, 2, "features changed in the model")
    for n, i in enumerate(watched):
        for _, some in outcomes if i in held else ():
            some[n] = float(new[held.index(i)])
    was, guess = value[watched].numpy(), (value + gain)[watched].numpy()
    seen = np.array([was, guess, *(some for _, some in outcomes)])
    name = lambda i: "_".join(str(int(x[built.some[i]])) for x in (local.layer, local.index, local.where))  # noqa: E731
    free = [n for n, i in enumerate(watched) if i not in held]  # a held feature is what it was set to, whatever the graph says
    how = f"multiplied by {ask.factor:g}" if ask.value is None else f"set to {ask.value:g}"
    change = (built.matrix[first(built) :, :f] / value) @ gain
    return GraphSteerResult(
        local.runs.row(ask.which), names, model.own.numpy(), change.numpy(), outcomes[0][0], outcomes[1][0], tuple(map(name, held)), new.numpy(),
        tuple(map(name, watched)), seen, tuple(correlation((guess - was)[free], (x - was)[free]) for x in seen[2:]), f"{len(held)} feature{'s' * (len(held) > 1)} {how} and held there; {WORDS}",
    )  # fmt: skip


def activation(coders: dict[int, AnyTranscoder], acts: dict[str, Tensor], layer: int, pos: int, index: int) -> float:
    d = coders[layer]
    return float(each(d, acts[d.point][0, [pos]], t.tensor([index])))


@t.no_grad()
def groups(coders: dict[int, AnyTranscoder], ask: GraphGroups) -> GraphGroupsResult:
    """Cosines of what features write; of cross-layer ones at the layers that both write to, side by side."""
    if not -1 <= ask.threshold <= 1:
        raise UserError("a cosine is from -1 to 1")
    places = [place_of(text) for text in ask.nodes]
    for text, (layer, index, _) in zip(ask.nodes, places):
        if layer not in coders or not 0 <= index < coders[layer].d_sae:
            raise UserError(f"there is no feature {text}: the transcoders are of layers {', '.join(map(str, coders))}")
    layers, index, pos = (np.array([p[i] for p in places], int) for i in range(3))
    cosine = np.zeros((len(places), len(places)))
    unit = lambda layer, of, start: t.nn.functional.normalize(toward(coders[layer], t.tensor(index[of]), start).double().cpu(), dim=1)  # noqa: E731
    for a in np.unique(layers):
        for b in np.unique(layers):
            x, y = (np.flatnonzero(layers == layer) for layer in (a, b))
            cosine[np.ix_(x, y)] = unit(a, x, max(a, b)) @ unit(b, y, max(a, b)).T
    apart = pos[:, None] != pos[None] if ask.same_position else np.zeros_like(cosine, bool)
    some = alike(cosine, ask.threshold, apart)
    least = np.array([cosine[np.ix_(x, x)].min() for x in some])
    where = "one position" if ask.same_position else "any positions"
    words = f"groups of features of {where}: any two decoders of a group have a cosine of at least {ask.threshold:g}"
    ids = tuple(tuple(ask.nodes[i] for i in x) for x in some)
    return GraphGroupsResult(tuple(f"≈ {x[0]}" for x in ids), ids, least, ask.threshold, words)
