"""The door of this room: the identities."""

from collections.abc import Generator

import honesty
from model import Model
from techniques.identities.requests import Identities, IdentitiesResult


def answer(model: Model, request: Identities) -> Generator:
    rows, convention = yield from honesty.identities(model, request.study)
    return IdentitiesResult(rows, convention)
