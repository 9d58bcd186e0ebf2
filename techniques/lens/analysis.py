"""The door of this room: lenses, and fitting one."""

from collections.abc import Generator

from techniques.lens import jacobian_parts
from techniques.lens import reading as lens
from techniques.lens import translators as tuned
from model.bridge import Model
from model.interventions import prepare
from techniques.lens.requests import FitJacobian, Lens, TuneLens

merge = jacobian_parts.merge_jacobian  # of parts that lie in files: it needs no model


def answer(model: Model, request: Lens | TuneLens | FitJacobian) -> Generator:
    match request:
        case TuneLens():
            return (yield from tuned.tune(model, request))
        case FitJacobian():
            return (yield from tuned.fit_jacobian(model, request))
    runs = yield from prepare(model, request.study)
    return (yield from lens.read_lens(runs, request))
