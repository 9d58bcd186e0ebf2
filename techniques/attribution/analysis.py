"""The door of this room: direct logit attribution."""

from collections.abc import Generator

from techniques.attribution import logits
from model.bridge import Model
from model.interventions import prepare
from techniques.attribution.requests import Attribution, AttributionNeurons, AttributionSet, AttributionSources


def answer(model: Model, request: Attribution | AttributionSources | AttributionNeurons | AttributionSet) -> Generator:
    model.require("parts", "heads")
    if isinstance(request, AttributionSet):
        return (yield from logits.attribution_set(model, request.study, request.which, request.pos))
    runs = yield from prepare(model, request.study)
    match request:
        case Attribution():
            return logits.attribution(runs, request.which, request.pos)
        case AttributionSources():
            return logits.sources(runs, request.which, request.layer, request.head, request.pos)
    return logits.neurons(runs, request.which, request.layer, request.pos, request.k)
