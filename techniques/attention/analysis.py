"""The door of this room: attention of heads."""

from collections.abc import Generator

from techniques.attention import patterns as attribution
from model.bridge import Model
from model.interventions import prepare
from techniques.attention.requests import Attention, AttentionSet, Detect, HeadStats


def answer(model: Model, request: Attention | HeadStats | AttentionSet | Detect) -> Generator:
    if isinstance(request, AttentionSet):
        return (yield from attribution.attention_set(model, request.study, request.which, request.labels))
    runs = yield from prepare(model, request.study)
    match request:
        case Attention():
            return attribution.attention(runs, request.layer, request.which, request.weighted)
        case HeadStats():
            return (yield from attribution.head_stats(runs, request.which, request.source, request.pair))
    how = (request.exclude_bos, request.exclude_current_token, request.error_measure)
    return attribution.detect(runs, request.which, request.pattern, request.cells, *how)
