"""The door of this room: the identities."""

from collections.abc import Generator

from techniques.identities import checks as honesty
from model.bridge import Model
from techniques.identities.requests import Identities, IdentitiesResult


def answer(model: Model, request: Identities) -> Generator:
    rows, convention = yield from honesty.identities(model, request.study)
    return IdentitiesResult(rows, convention)
