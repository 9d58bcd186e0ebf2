"""The door of this room: sweeps, and their estimates."""

from collections.abc import Generator

import estimates
import sweeps
from model import Model
from techniques.patching.requests import Estimate, Sweep


def answer(model: Model, request: Sweep | Estimate) -> Generator:
    return (sweeps.sweep if isinstance(request, Sweep) else estimates.estimate)(model, request)
