"""The door of this room: sweeps, and their estimates."""

from collections.abc import Generator

from model.bridge import Model
from techniques.patching.estimates import estimate
from techniques.patching.requests import Estimate, Sweep
from techniques.patching.sweeps import sweep


def answer(model: Model, request: Sweep | Estimate) -> Generator:
    return (sweep if isinstance(request, Sweep) else estimate)(model, request)
