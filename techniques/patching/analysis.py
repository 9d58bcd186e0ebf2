"""The door of this room: sweeps, their estimates, and which cells are the largest for certain."""

from collections.abc import Generator

from model.bridge import Model
from techniques.patching.certify import certify
from techniques.patching.estimates import estimate
from techniques.patching.requests import Certify, Estimate, Sweep
from techniques.patching.sweeps import sweep


def answer(model: Model, request: Sweep | Estimate | Certify) -> Generator:
    work = sweep if isinstance(request, Sweep) else estimate if isinstance(request, Estimate) else certify
    return work(model, request)
