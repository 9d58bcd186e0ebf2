"""The door of this room: path patching, and circuits scored, found and compared."""

from collections.abc import Generator

from model.bridge import Model
from techniques.circuits.compare import compare
from techniques.circuits.edge_search import edges
from techniques.circuits.feature_search import features
from techniques.circuits.greedy import greedy
from techniques.circuits.paths import path_patch
from techniques.circuits.requests import METHODS, Compare, Discover, PathPatch, Score
from techniques.circuits.scores import score
from vocabulary.nodes import UserError


def answer(model: Model, request: PathPatch | Score | Discover | Compare) -> Generator:
    match request:
        case PathPatch():
            model.require("parts", "heads")
            return (yield from path_patch(model, request))
        case Score():
            return (yield from score(model, request))
        case Compare():
            return compare(request)
    if request.method not in METHODS:
        raise UserError(f"{request.method!r} is not a way to find a circuit: use one of {', '.join(METHODS)}")
    if request.method not in ("greedy", "features"):
        model.require("parts", "heads")
    return (yield from {"greedy": greedy, "features": features}.get(request.method, edges)(model, request))
