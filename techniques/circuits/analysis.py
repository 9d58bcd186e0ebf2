"""The door of this room: path patching, and circuits scored, found and compared."""

from collections.abc import Generator

from techniques.circuits import scores as circuits
from techniques.circuits import search as discovery
from techniques.circuits import paths
from model.bridge import Model
from techniques.circuits.requests import Compare, Discover, PathPatch, Score


def answer(model: Model, request: PathPatch | Score | Discover | Compare) -> Generator:
    match request:
        case PathPatch():
            return paths.path_patch(model, request)
        case Discover():
            return discovery.discover(model, request)
    return circuits.answer(model, request)
