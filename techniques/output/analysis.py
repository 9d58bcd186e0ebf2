"""The door of this room: the likeliest next tokens and the metric."""

from collections.abc import Generator

from techniques.lens import reading as lens
from model.bridge import Model
from model.interventions import prepare
from techniques.output.requests import Run


def answer(model: Model, request: Run) -> Generator:
    runs = yield from prepare(model, request.study)
    return (yield from lens.run(runs, request.k))
