"""The door of this room: lenses, and fitting one."""

from collections.abc import Generator

import lens
import tuned
from model import Model
from patching import prepare
from techniques.lens.requests import FitJacobian, Lens, TuneLens


def answer(model: Model, request: Lens | TuneLens | FitJacobian) -> Generator:
    match request:
        case TuneLens():
            return (yield from tuned.tune(model, request))
        case FitJacobian():
            return (yield from tuned.fit_jacobian(model, request))
    runs = yield from prepare(model, request.study)
    return (yield from lens.read_lens(runs, request))
