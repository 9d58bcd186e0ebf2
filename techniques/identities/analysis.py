"""The door of this room: the identities."""

from collections.abc import Generator
from dataclasses import replace

from techniques.identities import checks as honesty
from model.bridge import Model
from techniques.identities.requests import Identities, IdentitiesResult


def answer(model: Model, request: Identities) -> Generator:
    rows, convention = yield from honesty.identities(model, replace(request.study, against=""))  # of this model alone
    return IdentitiesResult(rows, convention)
