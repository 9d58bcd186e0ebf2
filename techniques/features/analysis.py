"""The door of this room: SAEs and transcoders, and training one."""

from collections.abc import Generator

from techniques.features import reading as features
from model.bridge import Model
from techniques.features.requests import TrainSae


def answer(model: Model, request: object) -> Generator:
    if isinstance(request, TrainSae):
        from techniques.features import training  # sae_lens takes seconds

        return training.train(model, request)
    return features.answer(model, request)
