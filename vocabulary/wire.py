"""
The wire between screen and engine: `@request` and `@message` register what may go over it; a frame is a 4-byte length, a msgpack header, raw array bytes.
The same dataclasses are the Python interface, the command line and (as JSON) the session file. Never imports torch.
"""

import asyncio
import dataclasses
import functools
import importlib
import io
import math
import re
import types
import typing
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import msgspec
import numpy as np

from vocabulary.nodes import Intervention, Node, UserError, parse_intervention, parse_node


class WireError(Exception):
    """A frame that is garbage, truncated or not of this vocabulary. `frame` is the frame without its body, when only that can't be read."""

    def __init__(self, words: str, frame: "Frame | None" = None):
        super().__init__(words)
        self.frame = frame


# ------------------------------------------------------------------ registration

TYPES: dict[str, type] = {}
REQUESTS: dict[str, type] = {}


@typing.dataclass_transform(frozen_default=True)
def message(cls: type) -> type:
    """A frozen dataclass that may go over the wire, by its name: a result or a part of one that comes by itself."""
    cls = dataclass(frozen=True)(cls)
    known = TYPES.setdefault(cls.__name__, cls)
    assert (known.__module__, known.__qualname__) == (cls.__module__, cls.__qualname__), f"two messages are called {cls.__name__}: {known} and {cls}"
    TYPES[cls.__name__] = cls
    return cls


@typing.dataclass_transform(frozen_default=True)
def request(cls: type | None = None, *, needs_model: bool = True) -> type:
    """A message that asks. It is answered by `answer(model, request)` of the module `analysis` beside the one that declares it."""
    if cls is None:
        return lambda cls: request(cls, needs_model=needs_model)
    cls = message(cls)
    cls.needs_model = needs_model
    REQUESTS[cls.__name__] = cls
    return cls


def needs_model(body: object) -> bool:
    return getattr(type(body), "needs_model", False)


def door(kind: type) -> ModuleType:
    """The module whose `answer` answers requests of this kind. UserError for what is no request."""
    if REQUESTS.get(kind.__name__) is not kind:
        raise UserError(f"{kind.__name__} is not a request")
    return importlib.import_module(f"{kind.__module__.rpartition('.')[0]}.analysis")


# ------------------------------------------------------------------ frames

KINDS = ("ask", "cancel", "stop", "ping", "hello", "news", "left", "progress", "partial", "result", "error", "cancelled", "piece", "heard")
MAX_HEADER = 64 << 20
MAX_ARRAY = (4 << 30) - 2 * MAX_HEADER  # all arrays of a frame: its length has 32 bits
DTYPES = ("<f4", "<f8", "<f2", "<i4", "<i8", "<i2", "|u1", "|i1", "|b1")


@dataclass(frozen=True)
class Frame:
    """
    One message. `slot` is the pane that asks: a newer request replaces an older one in the same slot. Lower `priority` runs first. `model` of a reply:
    the `ModelInfo.key` of what was loaded then ("": nothing). A `ping` comes back as it is; `news` and `left` (a request whose screen went) come unasked; `piece` and `heard`: vocabulary/flow.py.
    """

    kind: str
    id: int = 0
    slot: str = ""
    priority: int = 1
    body: object = None
    model: str = ""


def encode(frame: Frame) -> bytes:
    """A frame as bytes. WireError where it is too large to be read."""
    arrays: list[np.ndarray] = []

    def hook(obj: object) -> int:
        if not isinstance(obj, np.ndarray):
            raise NotImplementedError(f"{type(obj).__name__} does not go on the wire")
        arrays.append(obj)
        return len(arrays) - 1

    name = "" if frame.body is None else type(frame.body).__name__
    assert name == "" or TYPES.get(name) is type(frame.body), f"{name} is not in the vocabulary"
    body = msgspec.to_builtins(frame.body, enc_hook=hook)
    head = msgspec.msgpack.encode([frame.kind, frame.id, frame.slot, frame.priority, frame.model, name, body, [[a.dtype.str, a.shape] for a in arrays]])
    if (size := sum(a.nbytes for a in arrays)) > MAX_ARRAY or len(head) > MAX_HEADER:
        raise WireError(f"{name}: {size / 1e9:.1f} GB of arrays and {len(head) / 1e6:.1f} MB of other fields are too large for one message: ask for less")
    return len(head).to_bytes(4, "big") + head + b"".join(a.tobytes() for a in arrays)


def head_size(prefix: bytes) -> int:
    size = int.from_bytes(prefix, "big")
    if len(prefix) != 4 or not 0 < size <= MAX_HEADER:
        raise WireError(f"a header of {size} bytes: this is not Loupe's wire (does the other side print to stdout?)")
    return size


def array_sizes(head: bytes) -> tuple[list, list[int]]:
    """The decoded header and the byte count of each array that follows it."""
    try:
        fields = msgspec.msgpack.decode(head)
        kind, ident, slot, priority, model, name, _, specs = fields
        sizes = []
        for dtype, shape in specs:
            if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise WireError(f"an array of type {dtype!r} and shape {shape!r}")
            sizes.append(np.dtype(dtype).itemsize * math.prod(shape))
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise WireError(f"a header that can't be read: {error}") from error
    if kind not in KINDS or [*map(type, (ident, slot, priority, model, name))] != [int, str, int, str, str]:
        raise WireError(f"a header with kind {kind!r}, id {ident!r}")
    if sum(sizes) > MAX_ARRAY:
        raise WireError(f"{sum(sizes)} bytes of arrays in one frame")
    return fields, sizes


def build(fields: list, buffers: list[bytes]) -> Frame:
    kind, ident, slot, priority, model, name, body, specs = fields
    bare = Frame(kind, ident, slot, priority, None, model)
    if name == "":
        return bare
    if name not in TYPES:
        raise WireError(f"an unknown message {name!r}: do screen and engine have the same version?", bare)
    arrays = [np.frombuffer(b, dtype).reshape(shape) for b, (dtype, shape) in zip(buffers, specs)]

    def hook(kind: type, obj: object) -> object:
        if kind is not np.ndarray or not isinstance(obj, int) or not 0 <= obj < len(arrays):
            raise ValueError(f"no array {obj!r}")
        return arrays[obj]

    try:
        return dataclasses.replace(bare, body=msgspec.convert(body, TYPES[name], dec_hook=hook))
    except (msgspec.ValidationError, ValueError) as error:
        raise WireError(f"a {name} that can't be read: {error}", bare) from error


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """Read one frame through `read(n)`, which returns fewer than n bytes only at the end. None at a clean end of the stream."""

    def exactly(n: int) -> bytes:
        data = read(n)
        if len(data) < n:
            raise WireError("the stream ended in the middle of a frame")
        return data

    prefix = read(4)
    if not prefix:
        return None
    if len(prefix) < 4:
        raise WireError("the stream ended in the middle of a frame")
    fields, sizes = array_sizes(exactly(head_size(prefix)))
    return build(fields, [exactly(n) for n in sizes])


# ------------------------------------------------------------------ frames on a line, between which others may print

MARK = b"\xfeLq\xff"  # in no text
HEAD = 12  # bytes after it
NOISE = 1 << 20  # bytes between two frames that are passed over
NO_ENGINE = "not an engine: it says"
DAMAGED = "what came over the line is damaged: something on its way (a shell's background job, a module system) printed to stdout in the middle of a frame"


def sealed(data: bytes) -> bytes:
    """A frame's bytes for a line: before them a mark, their number, their checksum, and the checksum of these two."""
    head = len(data).to_bytes(4, "big") + zlib.crc32(data).to_bytes(4, "big")
    return MARK + head + zlib.crc32(head).to_bytes(4, "big") + data


def is_head(some: bytes) -> bool:
    return len(some) == HEAD and zlib.crc32(some[:8]) == int.from_bytes(some[8:], "big")


def holds_head(said: bytes) -> bool:
    """Whether something printed into a mark: what follows one is there, without it."""
    return any(is_head(said[found.end() : found.end() + HEAD]) for found in re.finditer(MARK[-1:], said))


def sealed_size(head: bytes) -> int:
    """How many bytes follow the head. WireError where something printed into it: else what comes would be waited for in vain."""
    if not is_head(head):
        raise WireError(DAMAGED)
    return int.from_bytes(head[:4], "big")


def unsealed(head: bytes, data: bytes) -> Frame:
    if zlib.crc32(data) != int.from_bytes(head[4:8], "big"):
        raise WireError(DAMAGED)
    return read_frame(io.BytesIO(data).read)


def read_sealed(read: Callable[[int], bytes]) -> Frame | None:
    """As `read_frame`, from a line on which nobody else prints."""
    mark = read(len(MARK))
    if not mark:
        return None
    if mark != MARK[: len(mark)]:
        raise WireError(f"this is not Loupe's wire: it begins {mark!r}")
    head = read(HEAD)
    size = sealed_size(head) if len(head) == HEAD else 0
    data = read(size)
    if len(head) < HEAD or len(data) < size:
        raise WireError("the stream ended in the middle of a frame")
    return unsealed(head, data)


async def read_sealed_async(stream: asyncio.StreamReader) -> Frame:
    """
    The next frame of a line. What others print between two frames (a banner, a module system) is passed over. EOFError at the end, with what was printed
    last; WireError for what goes on and on without a frame, or is damaged.
    """
    said = b""
    while not said.endswith(MARK):
        try:
            said += await stream.readuntil(MARK)
        except asyncio.LimitOverrunError as error:
            said += await stream.readexactly(error.consumed)
            if len(said) > NOISE:
                raise WireError(f"{NO_ENGINE} {in_words(said[:200])[:80]!r} …") from error
        except asyncio.IncompleteReadError as error:
            raise EOFError(in_words(said + error.partial)[-80:]) from error
    if holds_head(said):
        raise WireError(DAMAGED)
    try:
        head = await stream.readexactly(HEAD)
        return unsealed(head, await stream.readexactly(sealed_size(head)))
    except asyncio.IncompleteReadError as error:
        raise EOFError("") from error


def in_words(said: bytes) -> str:
    """What was printed, as one line; what is no text is left out."""
    return " ".join("".join(c if c.isprintable() else " " for c in said.decode(errors="ignore")).split())


# ------------------------------------------------------------------ JSON, for the command line, sessions and exports


def to_json(obj: object) -> object:
    """Builtins that json.dumps takes: arrays as lists, NaN as None, nodes and interventions as their addresses."""
    match obj:
        case Node() | Intervention():
            return str(obj)
        case np.ndarray():
            return to_json(obj.tolist())
        case float():
            return obj if math.isfinite(obj) else None
        case dict():
            return {str(k): to_json(v) for k, v in obj.items()}
        case list() | tuple():
            return [to_json(v) for v in obj]
        case _ if dataclasses.is_dataclass(obj):
            return {f.name: to_json(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    return obj


type_hints = functools.cache(typing.get_type_hints)


def from_json(obj: object, kind: type) -> object:
    """The inverse of `to_json` for the dataclasses of a session (prompts, interventions, metrics)."""

    def hook(kind: type, obj: object) -> object:
        raise ValueError(f"no {kind.__name__} in JSON")

    def revive(obj: object, kind: object) -> object:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is Node or kind is Intervention:
            if not isinstance(obj, str):
                raise UserError(f"expected an address, got {obj!r}")
            return parse_node(obj) if kind is Node else parse_intervention(obj)
        if origin in (typing.Union, types.UnionType):
            some = [a for a in args if a is not type(None)]
            if obj is None and len(some) < len(args) or len(some) > 1:
                return msgspec.convert(obj, kind)
            return revive(obj, some[0])
        if origin is tuple and args and isinstance(obj, list):
            return tuple(
                revive(v, args[0] if len(args) == 2 and args[1] is ... else a)
                for v, a in zip(obj, args if args[-1] is not ... else args[:1] * len(obj), strict=True)
            )
        if dataclasses.is_dataclass(kind) and isinstance(obj, dict):
            hints = type_hints(kind)
            unknown = set(obj) - set(hints)
            if unknown:
                raise UserError(f"{kind.__name__} has no field {min(unknown)!r}")
            return kind(**{k: revive(v, hints[k]) for k, v in obj.items()})
        return msgspec.convert(obj, kind, dec_hook=hook)

    try:
        msgspec.msgpack.encode(obj)  # what can't go over the wire (a number over 64 bits, half a character) is refused here
        return revive(obj, kind)
    except (msgspec.ValidationError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"not a {getattr(kind, '__name__', kind)}: {error}") from error


def fits(value: object, kind: object, what: str) -> None:
    """UserError where a value is not of its type or can't go over the wire."""
    try:
        msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=kind)
    except (msgspec.MsgspecError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise UserError(f"{what}: {' '.join(str(error).split())[:200]}: nothing was changed") from error


def changed_fits(new: object, old: object, but: tuple[str, ...] = ()) -> None:
    """UserError where a field that changed is not of its type or can't go over the wire (more than 64 bits, half a surrogate pair)."""
    for name, kind in type_hints(type(new)).items():
        if (value := getattr(new, name)) is not getattr(old, name) and name not in but:
            fits(value, kind, name.replace("_", " "))
