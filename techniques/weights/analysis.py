"""The door of this room: what weights say."""

from collections.abc import Generator

from model.bridge import Model
from techniques.weights.differences import differences
from techniques.weights.heads import composition, head_weights, singular
from techniques.weights.requests import Composition, HeadWeights, Singular, WeightDifference


def answer(model: Model, request: HeadWeights | Composition | Singular | WeightDifference) -> Generator:
    match request:
        case WeightDifference():
            return (yield from differences(model, request))
        case HeadWeights():
            return (yield from head_weights(model, request))
        case Composition():
            return (yield from composition(model, request))
        case Singular():
            return (yield from singular(model, request))
