"""The door of this room: SAEs and transcoders, and training one."""

from collections.abc import Generator

import features
from model import Model
from techniques.features.requests import TrainSae


def answer(model: Model, request: object) -> Generator:
    if isinstance(request, TrainSae):
        import training  # sae_lens takes seconds

        return training.train(model, request)
    return features.answer(model, request)
