"""Parts of a prompt set that are computed apart: what a request needs so that its parts can be joined, and files of frames. Never imports torch."""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from vocabulary.files import CHECKPOINT, replacing
from vocabulary.requests import Load, ModelInfo
from vocabulary.wire import Frame, encode, read_frame


@dataclass(frozen=True)
class Scattered:
    """
    How the results of a request's parts become the whole set's. `check`: UserError for what can't be joined. `join(request, parts, info)`. Where that is not the end,
    `then(request, joined)` is a second request over the set, and `end(request, joined, second)` the result. `write(request, result, parts, folder)` are files beside the whole one, and the
    result that says so. `size(request)`: how much there is to cut into shards, of which `unit`; `cut(request, from, to)` the request of one. `load(engine, model, show)` comes before a task's
    first part, `run(engine, request, show, part)` is one; where it writes a safetensors file of its own beside its file `part`, `beside` is its suffix. `whole`: why it can't be cut, so that
    one task does all of it.
    """

    check: Callable[[object], None]
    join: Callable[[object, list, ModelInfo], object]
    then: Callable[[object, object], object | None] = lambda request, joined: None
    end: Callable[[object, object, object], object] = lambda request, joined, second: joined
    write: Callable[[object, object, Iterable, Path], object] = lambda request, result, parts, folder: result
    size: Callable[[object], int] = lambda request: len(request.study.prompt_set)
    cut: Callable[[object, int, int], object] = lambda request, start, stop: replace(request, study=replace(request.study, part=(start, stop)))
    unit: str = "prompts"
    load: Callable[[object, Load, Callable], ModelInfo] = lambda engine, model, show: engine.run(model, show)
    run: Callable[[object, object, Callable, Path], object] = lambda engine, request, show, part: engine.run(request, show)
    beside: str = ""
    whole: str = ""

    @property
    def two(self) -> bool:
        """Whether a second pass follows the first."""
        return self.then is not Scattered.then


def one_fit(name: str, why: str) -> Scattered:
    """A fit that can't be cut: one task runs it, into the folder `name` beside its part. A task that runs again goes on from the checkpoint that is there."""

    def run(engine, request: object, show: Callable, part: Path) -> object:
        out = part.parent / name
        return engine.run(replace(request, out=str(out), resume=(out / CHECKPOINT).is_file()), show)

    return Scattered(lambda ask: None, lambda ask, parts, info: parts[0], size=lambda ask: 1, cut=lambda ask, start, stop: ask, unit="fit", run=run, whole=why)


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
    """The frames of a file. OSError or WireError where it is missing, damaged, or no regular file (a pipe that nobody writes to blocks for ever)."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    return unpack(path.read_bytes())


def pooled(means: Sequence[np.ndarray], deviations: Sequence[np.ndarray], counts: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """Mean and (population) standard deviation over all of several groups, from each group's and how many it has (a number, or one a cell); NaN where none has any."""
    n = np.stack([np.broadcast_to(np.asarray(c, float), np.shape(m)) for c, m in zip(counts, means)])
    each, spread = (np.where(n > 0, np.nan_to_num(np.stack(x).astype(float)), 0.0) for x in (means, deviations))
    total = n.sum(0)
    safe = np.maximum(total, 1)
    mean = (n * each).sum(0) / safe
    variance = (n * (spread**2 + (each - mean) ** 2)).sum(0) / safe
    return tuple(np.where(total > 0, x, np.nan) for x in (mean, np.sqrt(variance)))


def counted(convention: str, parts: Sequence) -> str:
    """The words of one part with the number of prompts of all, where these say "over N prompts"; of what the parts say otherwise, how many do."""
    total = sum(len(r.prompts) for r in parts)
    every = [r.convention.replace(f"over {len(r.prompts)} prompts", f"over {total} prompts", 1) for r in parts]
    other = sum(words != every[0] for words in every)
    return every[0] + f"; {other} of {len(parts)} shards say otherwise, such as who is left out" * bool(other)
