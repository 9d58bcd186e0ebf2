"""What comes from outside: paths, files, JSON and numbers, each read or refused with one line (UserError). Never imports torch."""

import json
import re
from pathlib import Path

from vocabulary.nodes import UserError

LARGEST = 1 << 30  # bytes of a text or JSON file that are read


def check_text(text: str, what: str) -> str:
    """The text itself; UserError for half a character (a lone surrogate), which neither a tokenizer nor a file takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a character ({text[error.start]!r}) at place {error.start}: write it in UTF-8") from error
    return text


def user_path(text: str | Path) -> Path:
    """A path as the user writes it, ~ too. UserError where it can't be one: no such user, too long, not to be looked at."""
    text = check_text(str(text), "a path")
    short = text if len(text) <= 100 else f"{text[:60]}…{text[-20:]}"
    try:
        path = Path(text).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError as error:
        raise UserError(f"{short}: there is no user of that name here") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{short} is not a path that can be opened: {getattr(error, 'strerror', None) or error}") from error
    return path


def read_text(path: Path) -> str:
    """A file's text, with \\n for every newline. UserError where it can't be read, is no file, or is not UTF-8 (which byte, on which line)."""
    try:
        if not path.is_file():
            raise UserError(f"{path} is not a file")
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} has {path.stat().st_size / 1e9:.1f} GB: that is more than a text file of Loupe's holds")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    try:
        return data.decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        at = error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(f"{path} line {line} is not UTF-8 (byte {data[error.start]:#04x} at column {at}): save the file as UTF-8") from error


def parse_json(text: str) -> object:
    """JSON as Python has it. UserError for what is none, is nested without end, or holds half a character; the line is the caller's to name."""
    try:
        obj = json.loads(text)
        if "\\u" in text:
            check_text(json.dumps(obj, ensure_ascii=False), "the JSON")
    except RecursionError as error:
        raise UserError("JSON that is nested too deep") from error
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"  # of one line the number is the caller's
        raise UserError(f"not JSON: {error.msg} at {where}") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"JSON with a number that can't be read: {str(error).split(';')[0]}") from error
    return obj


def whole_number(text: str) -> int | None:
    """A whole number of at most nine digits, as it is typed; None for anything else."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,9}", text.strip()) else None


def one_of(value: str, allowed: tuple[str, ...] | dict, what: str) -> str:
    """The value, if it is among those allowed; else a UserError that lists them."""
    if value not in allowed:
        raise UserError(f"{what} {value!r}: choose one of {', '.join(allowed)}")
    return value
