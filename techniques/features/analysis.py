"""The door of this room: SAEs and transcoders, and training one."""

from collections.abc import Generator

from model.bridge import Model
from model.interventions import prepare
from model.runs import Runs
from model.sae_catalogue import catalogue
from model.sae_fit import check
from model.sae_loading import load
from techniques.features.examples import examples
from techniques.features.graph import edge, find_target, graph
from techniques.features.preflight import preflight
from techniques.features.reading import feature, features
from techniques.features.requests import CheckEdge, Examples, Feature, FeatureGraph, Features, Preflight, Saes, TrainSae
from techniques.features.training import train
from vocabulary.requests import Progress

Request = Saes | Preflight | Examples | TrainSae | FeatureGraph | CheckEdge | Features | Feature


def answer(model: Model, ask: Request) -> Generator:
    match ask:
        case Saes():
            yield Progress(0, 1, "reading sae_lens's list")
            return catalogue(model, ask.every)
        case Preflight():
            return (yield from preflight(model, ask))
        case Examples():
            return (yield from examples(model, ask))
        case TrainSae():
            return (yield from train(model, ask))
        case FeatureGraph() | CheckEdge():
            return (yield from between(model, ask))
    d = yield from load(model, ask.source)
    runs = own_run((yield from prepare(model, ask.study)), ask.which)
    check(runs, d)
    yield Progress(1, 2, "encoding")
    return features(runs, d, ask) if isinstance(ask, Features) else feature(runs, d, ask)


def own_run(runs: Runs, which: str) -> Runs:
    """The runs, of which one is read through this model's SAE."""
    runs.require_first("an SAE", which)
    return runs


def between(model: Model, ask: FeatureGraph | CheckEdge) -> Generator:
    """Edges from an earlier SAE's features to a feature of a later one, or to the metric (target -1)."""
    up = yield from load(model, ask.up)
    down = (yield from load(model, ask.down)) if ask.target >= 0 else up
    runs = own_run((yield from prepare(model, ask.study)), ask.which)
    check(runs, up)
    if down is not up:
        check(runs, down)
    yield Progress(1, 2, "attributing")
    target = find_target(runs, up, down, ask)
    return graph(runs, up, down, target, ask) if isinstance(ask, FeatureGraph) else edge(runs, up, down, target, ask)
