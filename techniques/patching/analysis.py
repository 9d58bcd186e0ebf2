"""The door of this room: sweeps, and their estimates."""

from collections.abc import Generator

from techniques.patching import estimates
from techniques.patching import sweeps
from model.bridge import Model
from techniques.patching.requests import Estimate, Sweep


def answer(model: Model, request: Sweep | Estimate) -> Generator:
    return (sweeps.sweep if isinstance(request, Sweep) else estimates.estimate)(model, request)
