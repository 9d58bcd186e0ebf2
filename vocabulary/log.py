"""
The session file: one JSON object a line, with its number and a checksum, written as things happen and locked while it is open.

1. `encoded` makes a line, `read_lines` reads a file's lines back; what can't be trusted is named with its number and the reason.
2. `Log.save` writes what is not on the disk yet. After a failure the file is cut to what was whole, and the rest is written with the next line.
3. A file that another screen holds, that changed since it was read, or that can't be written to, is left alone: the log goes on in a copy.
"""

import contextlib
import datetime
import fcntl
import json
import os
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from vocabulary.files import folder, make_folder, PRIVATE_FILE, reason
from vocabulary.nodes import UserError

FORMAT = 2  # 1: no numbers, no checksums, sets written out each time they were opened
SUM = re.compile(rb', "sum": "([0-9a-f]{8})"\}$')
STARTS = re.compile(rb'(?=\{"n": \d+, "(?:t|set|study)": "|\{"t": "\d{4}-)')  # of a line, also where the end of the one before was lost


def new_path() -> Path:
    return folder("sessions") / f"{datetime.datetime.now():%Y-%m-%d-%H%M%S-%f}.jsonl"


# ------------------------------------------------------------------ lines


def encoded(entry: dict) -> bytes:
    """A line of the file. UserError for what JSON or UTF-8 can't hold."""
    try:
        text = json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"this can't be kept in a session: {reason(error)}") from error
    return text[:-1] + f', "sum": "{zlib.crc32(text):08x}"}}\n'.encode()


@dataclass(frozen=True)
class Line:
    """A line as it was read: its place in the file (1 is the first), what it holds, or why it can't be used."""

    place: int
    entry: dict | None
    wrong: str = ""
    summed: bool = False  # it had a checksum, and that was right


def read_line(place: int, raw: bytes) -> Line:
    found = SUM.search(raw)
    text = raw[: found.start()] + b"}" if found else raw
    if found and zlib.crc32(text) != int(found[1], 16):
        return Line(place, None, "its checksum is wrong: a byte has changed")
    try:
        entry = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        why = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
        return Line(place, None, f"it is not JSON ({why})")
    return Line(place, entry, "", bool(found)) if isinstance(entry, dict) else Line(place, None, "it is not an object")


def read_lines(data: bytes) -> tuple[list[Line], bool]:
    """The lines of a file, and whether it ends with a whole one. The first is the header. Joined lines are taken apart; one that stands twice is used once."""
    rows = data.split(b"\n")
    ended = rows[-1] == b""
    lines = [read_line(n, part) for n, row in enumerate(rows[:-1] if ended else rows, 1) for part in STARTS.split(row.rstrip(b"\r")) if part]
    return (numbered(lines) if lines and lines[0].entry and lines[0].entry.get("loupe") == FORMAT or any(x.summed for x in lines) else lines), ended


def numbered(lines: list[Line]) -> list[Line]:
    """The lines with those marked wrong that have no checksum, stand twice, or come after a gap (a line of its own says so)."""
    out, last, bad = [], -1, 0
    plain = next((bool(x.entry and x.entry.get("loupe") == 1) for x in lines), False)  # a file of format 1 that was gone on with
    for line in lines:
        n = line.entry.get("n") if line.entry else None
        if line.entry is None:
            bad += 1
        elif not line.summed and not plain:
            line, bad = Line(line.place, None, "it has no checksum"), bad + 1
        elif type(n) is int:
            if n <= last:
                line = Line(line.place, None, "it stands there twice")
            elif n > last + 1 + bad and not (plain and last < 0):
                out.append(Line(line.place, None, f"{gap} lines before it are missing" if (gap := n - last - 1 - bad) > 1 else "a line before it is missing"))
            last, bad = max(n, last), 0
        out.append(line)
    return out


def said(path: Path, wrong: list[tuple[int, str]], steps: int) -> str:
    """One line on what was left out of a session."""
    if not wrong:
        return ""
    (place, why), *others = sorted(wrong)
    more = f" (and {len(others)} more: line {', '.join(str(n) for n, _ in others[:8])}{', …' if len(others) > 8 else ''})" if others else ""
    return f"{path.name} line {place}: {why}; left out{more}; the other {steps} steps are restored, and go on in a new file"


def newest_session() -> Path:
    files = sorted(folder("sessions").glob("*.jsonl"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise UserError(f"no session in {folder('sessions')}: start with `uv run tui.py`")
    return files[-1]


# ------------------------------------------------------------------ the file


class Busy(Exception):
    """Why a file is not written to."""


class Log:
    """Lines and the file they go to. `saved` of them are on the disk, in `length` bytes; `word` says what the user should know of the file."""

    def __init__(self, path: Path, lines: list[bytes] = (), length: int = 0):
        self.path, self.lines, self.length, self.saved = path, [*lines], length, len(lines)
        self.file, self.word, self.torn = -1, "", False

    @property
    def waiting(self) -> int:
        """Lines that are not on the disk."""
        return len(self.lines) - self.saved

    def save(self) -> str:
        """Write what is not on the disk yet. What there is to say of it: that it failed and why, that it went to a copy, or ""."""
        self.word = ""
        try:
            self.hold()
            self.append(b"".join(self.lines[self.saved :]))
        except OSError as error:
            self.cut()
            return f"NOT SAVED ({reason(error)}): what you do is kept in memory, and written with your next action"
        self.saved = len(self.lines)
        return self.word

    def append(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.write(self.file, data[done:])
        os.fsync(self.file)
        self.length += len(data)

    def cut(self) -> None:
        """After a failure: back to what was whole, and no file at all where nothing was."""
        if self.file < 0:
            return
        try:
            os.ftruncate(self.file, self.length)
            self.torn = False
        except OSError:
            self.torn = True
        if not self.length:
            with contextlib.suppress(OSError):
                self.path.unlink()
            self.close()

    def hold(self) -> None:
        """Have the file open, whole, and to oneself."""
        if self.file >= 0 and not self.mine():
            self.close()
            name, there = self.path.name, self.path.exists()
            self.go_on_in(new_path() if there else self.path)  # one that was deleted is written again
            self.word = f"{name} was changed by something else: this session goes on in a copy, {self.path}" if there else ""
        if self.file < 0 and self.saved:
            self.claim()
        if self.file < 0:
            self.create()
        if self.torn:
            os.ftruncate(self.file, self.length)
            self.torn = False

    def mine(self) -> bool:
        """Whether the open file still is the one at `path`, as it was left."""
        try:
            here = os.fstat(self.file)
            return os.path.samestat(here, os.stat(self.path)) and (self.torn or here.st_size == self.length)
        except FileNotFoundError:
            return False

    def create(self) -> None:
        make_folder(self.path.parent)
        how = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL
        try:
            self.file = os.open(self.path, how, PRIVATE_FILE)
        except FileExistsError:
            self.word = f"{self.path} is there already: this session goes to {(other := new_path())}"
            make_folder(other.parent)
            self.file, self.path = os.open(other, how, PRIVATE_FILE), other
        self.lock()

    def claim(self) -> str:
        """Open the file that was read, for oneself; else go on in a copy. What there is to say of that, or ""."""
        try:
            try:
                self.file = os.open(self.path, os.O_RDWR | os.O_APPEND)
            except OSError as error:
                raise Busy(f"can't be written to ({reason(error)})") from error
            if not self.lock():
                raise Busy("is open in another screen")
            if os.fstat(self.file).st_size != self.length:
                raise Busy("was changed since it was read")
        except Busy as busy:
            self.close()
            name = self.path.name
            self.go_on_in(new_path())
            self.word = f"{name} {busy}: this session goes on in a copy, {self.path}"
        return self.word

    def go_on_in(self, path: Path) -> None:
        self.path, self.saved, self.length, self.torn = path, 0, 0, False

    def lock(self) -> bool:
        """False when another screen has it. Where the file system has no locks, a word says so."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            self.word = f"{self.path.parent} has no locks ({reason(error)}): open this session in one screen only"
        return True

    def close(self) -> None:
        """Let the file go; another screen may have it."""
        if self.file >= 0:
            with contextlib.suppress(OSError):
                os.close(self.file)
        self.file = -1
