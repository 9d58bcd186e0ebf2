"""Parts of a prompt set that are computed apart: what a request needs so that its parts can be joined, and files of frames. Never imports torch."""

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from vocabulary.files import replacing
from vocabulary.requests import ModelInfo
from vocabulary.wire import Frame, encode, read_frame


@dataclass(frozen=True)
class Scattered:
    """
    How the results of a request's parts become the whole set's. `check`: UserError for what can't be joined. `join(request, parts, info)`. Where that is not the end,
    `then(request, joined)` is a second request over the set, and `end(request, joined, second)` the result. `write(result, folder)` are files beside it.
    """

    check: Callable[[object], None]
    join: Callable[[object, list, ModelInfo], object]
    then: Callable[[object, object], object | None] = lambda request, joined: None
    end: Callable[[object, object, object], object] = lambda request, joined, second: joined
    write: Callable[[object, Path], None] = lambda result, folder: None

    @property
    def two(self) -> bool:
        """Whether a second pass follows the first."""
        return self.then is not Scattered.then


def pack(bodies: Iterable[tuple[int, object]]) -> bytes:
    """Messages, each with a number, as bytes."""
    return b"".join(encode(Frame("result", number, body=body)) for number, body in bodies)


def unpack(data: bytes) -> list[Frame]:
    """What `pack` made. WireError where it is damaged."""
    stream, out = io.BytesIO(data), []
    while (frame := read_frame(stream.read)) is not None:
        out.append(frame)
    return out


def write_frames(path: Path, bodies: Iterable[tuple[int, object]]) -> None:
    """Messages as one file: whole or not at all."""
    with replacing(path) as part:
        part.write_bytes(pack(bodies))


def read_frames(path: Path) -> list[Frame]:
    """The frames of a file. OSError or WireError where it is missing or damaged."""
    return unpack(path.read_bytes())
