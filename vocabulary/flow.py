"""
One end of a line that may be slow: what waits to be sent, in which order it goes, and how much of it may be on its way. No threads, no clock of its own.

1. Large frames go in pieces, so that an answer overtakes a table. A newer partial result takes the place of an older one that has not begun to go.
2. The other end says how many frames it heard. What it has not is on its way; that much is allowed which keeps the line busy and waits about QUEUE seconds
   in the buffers of pipes, ssh and TCP, as their delay shows (after LEDBAT, RFC 6817).
3. A line inside a machine is not paced: everything goes at once, whole.
"""

import io
import math
import time
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from vocabulary.requests import Failure, Progress
from vocabulary.wire import Frame, WireError, encode, message, read_frame, sealed

PIECE, LARGEST = 1 << 10, 64 << 10  # bytes of a piece
FIRST, MOST = 4 << 10, 4 << 20  # bytes on their way: at first, and the least; at most
AHEAD = 8 << 10  # what an answer may go beyond that
WORTH, BLOCK = 1 << 10, 256 << 10  # bytes from which on a frame is compressed, so many at a time
QUEUE = 0.1  # seconds
FORGOTTEN = 60.0  # seconds after which the quickest way there and back is measured anew
AT_ONCE = ("hello", "ping", "news", "cancelled", "cancel", "stop", "piece")
UNNUMBERED = ("hello", "ping", "news", "left", "stop", "piece")  # their `id` is no job's
ENDS = ("result", "error", "cancelled")


@message
class Piece:
    """A part of a frame of `of` bytes, whose number is the frame's `id`; 0: what was sent of it is of no use. `packed`: the parts are a zlib stream of them."""

    data: np.ndarray
    of: int
    packed: bool = False


def adds(part: object) -> bool:
    """Whether a partial result holds only what is new since the one before; else the newest holds all."""
    return getattr(part, "adds", False)


@dataclass(eq=False)
class Waiting:
    frame: Frame  # without its body
    data: bytes
    number: int
    passing: bool  # a newer one, or the end of its job, takes its place
    adds: bool  # only the end does: it is not contained in the next
    size: int  # bytes that go over the line, or of `data` where that is more than a block
    sent: bool = False  # whether some of it was
    done: int = 0  # bytes of `data` that were sent or packed
    packer: object = None  # zlib's, where that gains
    packed: bytes = b""  # what it made of the last block, without what was sent

    @property
    def left(self) -> int:
        return len(self.data) - self.done + len(self.packed)

    def pack(self) -> None:
        """Compress the next block, a moment's work whatever the frame's size; the first shows whether it gains."""
        packer, block = self.packer or zlib.compressobj(1), self.data[self.done : self.done + BLOCK]
        last = self.done + len(block) == len(self.data)
        small = packer.compress(block) + packer.flush(zlib.Z_FINISH if last else zlib.Z_SYNC_FLUSH)
        if self.packer or len(small) < 0.9 * len(block):
            self.packer, self.packed, self.done = packer, small, self.done + len(block)

    def part(self, most: int) -> bytes:
        """The next bytes to be sent."""
        self.sent = True
        if self.packer is None:
            part = self.data[self.done : self.done + most]
            self.done += len(part)
            return part
        if not self.packed:
            self.pack()
        part, self.packed = self.packed[:most], self.packed[most:]
        return part

    @property
    def job(self) -> int:
        """Whose frames go in order; 0: nobody's."""
        return 0 if self.frame.kind in UNNUMBERED else self.frame.id


class Flow:
    """`put` what is to be sent, write what `take` gives until it is None, and hand every frame that comes to `arrived`; after both, `take` again."""

    def __init__(self, paced: bool = False, now: Callable[[], float] = time.monotonic):
        self.paced, self.now = paced, now
        self.waiting: list[Waiting] = []
        self.numbers, self.turns = 0, {}  # job -> when a partial result of it last went
        self.window, self.early = float(FIRST), True
        self.away: deque[tuple[int, int, float, bool]] = deque()  # the frames on their way: number, bytes, when, whether the window was used
        self.sent = self.flying = 0
        self.least, self.before, self.since = math.inf, math.inf, now()
        self.heard, self.owes = 0, paced  # frames that came; whether to say so
        self.begun: dict[int, tuple[bytearray, object]] = {}  # what came of frames, and what unpacks it

    # ---------------------------------------------------------------- what waits

    @property
    def size(self) -> int:
        """Bytes that wait."""
        return sum(w.left for w in self.waiting)

    def put(self, frame: Frame) -> None:
        """What is too large to be sent becomes an error of its job; WireError where it is a question."""
        try:
            data = encode(frame)
        except WireError as error:
            if frame.kind not in (*ENDS, "partial"):
                raise
            frame = replace(frame, kind="error", body=Failure(str(error), "user"))
            data = encode(frame)
        notice, self.numbers = isinstance(frame.body, Progress) and frame.body.notice, self.numbers + 1
        new = Waiting(replace(frame, body=None), data, self.numbers, frame.kind in ("progress", "partial") and not notice, adds(frame.body), len(data))
        if frame.kind in ENDS:
            self.remove(lambda w: w.job == new.job and w.passing)
            self.turns.pop(new.job, None)
        elif new.passing:
            newer = ("progress", frame.kind)
            self.remove(lambda w: w.job == new.job and w.passing and not w.sent and not w.adds and w.frame.kind in newer)
        self.waiting.append(new)

    def remove(self, which: Callable[[Waiting], bool]) -> bool:
        """What is of no use any more; whether there was any. The other end forgets what it has of it."""
        gone = [w for w in self.waiting if which(w)]
        self.waiting = [w for w in self.waiting if w not in gone]
        for w in gone:
            if w.sent:
                self.put(Frame("piece", w.number, body=Piece(np.empty(0, np.uint8), 0)))
        return bool(gone)

    def forget(self, ident: int, slot: str = "") -> bool:
        """What waits for a job, or for those before it in its slot, is not sent."""
        return self.remove(lambda w: w.job == ident or bool(slot) and w.job and w.frame.slot == slot)

    # ---------------------------------------------------------------- what goes

    def rank(self, w: Waiting) -> tuple:
        """What is least goes first: control; questions as they come, large ones last; answers, the shortest first; partial results in turn."""
        kind, priority = w.frame.kind, w.frame.priority
        if kind in AT_ONCE:
            return 0, w.number
        if kind == "left":  # before the model, whose coming asks for what is left
            return 1, False, -1, w.number
        if kind == "ask":
            return 1, w.size > AHEAD, w.number
        passing = w.passing and priority > 0
        return 1, passing, priority, self.turns.get(w.job, -1) if passing else w.left, w.number

    def next(self) -> Waiting | None:
        heads: dict[int, Waiting] = {}
        for w in self.waiting:
            heads.setdefault(w.job or -w.number, w)
        return min(heads.values(), key=self.rank, default=None)

    def take(self) -> bytes | None:
        """The next bytes to write; None while there is nothing that may go."""
        if self.owes and self.paced:
            self.owes = False
            return sealed(encode(Frame("heard", self.heard)))
        w = self.next()
        if w is None or not self.may(w):
            return None
        most = min(max(PIECE, int(self.window) // 8), LARGEST)
        if self.paced and not w.sent and len(w.data) > WORTH:
            w.pack()
            w.size = w.left if w.done == len(w.data) else w.size
        if self.paced and (w.packer or w.sent or w.left > most):
            data = encode(Frame("piece", w.number, body=Piece(np.frombuffer(w.part(most), np.uint8), len(w.data), bool(w.packer))))
        else:
            data = w.part(len(w.data))
        if w.passing:
            self.turns[w.job] = self.sent
        if not w.left:
            self.waiting.remove(w)
        data, self.sent = sealed(data), self.sent + 1
        if self.paced:
            self.flying += len(data)
            self.away.append((self.sent, len(data), self.now(), self.flying > self.window / 2))
        return data

    def may(self, w: Waiting) -> bool:
        answers = w.frame.kind in ("ask", "result", "error") and w.size <= AHEAD
        return not self.paced or not self.flying or w.frame.kind in AT_ONCE or self.flying < self.window + AHEAD * answers

    # ---------------------------------------------------------------- what comes

    def arrived(self, frame: Frame) -> Frame | None:
        """The frame that is whole now; None where none is. WireError where its pieces are none."""
        if frame.kind == "heard":
            self.paced = True
            while self.away and self.away[0][0] <= frame.id:
                self.adjust(*self.away.popleft()[1:])
            return None
        self.heard, self.owes = self.heard + 1, True
        if frame.kind != "piece":
            return frame
        if not isinstance(frame.body, Piece):
            raise WireError("a piece without a part of a frame")
        piece, (some, unpacker) = frame.body, self.begun.setdefault(frame.id, (bytearray(), zlib.decompressobj()))
        try:
            some += unpacker.decompress(piece.data.tobytes()) if piece.packed else piece.data.tobytes()
        except zlib.error as error:
            raise WireError(f"a frame that can't be unpacked: {error}") from error
        if piece.of and not (unpacker.eof if piece.packed else len(some) >= piece.of):
            return None  # all may be unpacked while the last bytes of the stream are still to come
        del self.begun[frame.id]
        return read_frame(io.BytesIO(some).read) if piece.of else None

    def adjust(self, size: int, when: float, used: bool) -> None:
        """The window, by how long a frame of this size took there and its acknowledgement back."""
        now = self.now()
        took, self.flying = now - when, self.flying - size
        if now - self.since > FORGOTTEN:
            self.since, self.before, self.least = now, self.least, took
        self.least = min(self.least, took)
        room = 1 - (took - min(self.least, self.before)) / QUEUE  # 1: the line's buffers are empty; 0: as full as they may be
        self.early = self.early and room > 0.5
        if used or room < 0:
            grows = 1.0 if self.early else max(room, -1.0) * min(1.0, QUEUE / (2 * max(took, 1e-6)))
            self.window = min(max(self.window + grows * size, FIRST), MOST)
