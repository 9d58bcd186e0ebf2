"""Where Loupe's own files lie, and how a file is written: whole or not at all, readable by its owner alone. Never imports torch."""

import contextlib
import errno
import os
import pwd
import re
import tempfile
from collections.abc import Generator
from pathlib import Path

from utils import ROOT, settings
from vocabulary.nodes import UserError
from vocabulary.typed import user_path

OWN = ("sessions", "exports", "logs", "saes", "directions", "means")  # folders under `home()`
CHECKPOINT = "checkpoint.safetensors"  # of a fit, in its folder
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700


def typed_path(text: str | Path) -> Path:
    """
    The path that was typed. From the checkout, a relative one into a folder of Loupe's own (`exports/lens`) that is not there lies under `home()`.
    UserError for an empty one, or one that no file can have.
    """
    if not (typed := str(text).strip()):
        raise UserError("the name of the file or folder is empty: type one")
    path = user_path(typed)
    there = path.exists()
    own = not path.is_absolute() and path.parts[:1] and path.parts[0] in OWN
    return home() / path if own and not there and Path.cwd() == ROOT else path


def home() -> Path:
    """
    The folder of sessions, exports, logs and caches: LOUPE_HOME of `.env`, where ~ and $USER are each user's own; else the checkout, when it can be written
    to; else ~/.local/share/loupe.
    """
    asked = settings().get("LOUPE_HOME", "").strip() or ("" if os.access(ROOT, os.W_OK | os.X_OK) else "~/.local/share/loupe")
    try:
        asked = re.sub(r"\$(USER\b|\{USER\})", lambda found: pwd.getpwuid(os.getuid()).pw_name, asked)
        if "$" in asked:
            raise RuntimeError("only ~ and $USER are known there")
        return ROOT / Path(asked).expanduser()
    except (RuntimeError, KeyError) as error:
        raise UserError(f"LOUPE_HOME of .env (or .env.local) is {asked!r}: {error}") from error


def folder(name: str) -> Path:
    """One of Loupe's own folders, which need not exist."""
    return home() / name


def short(path: Path) -> str:
    """A path for a message: from the checkout's root where it lies inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def reason(error: Exception) -> str:
    """Why something could not be written, in a few words."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200] or type(error).__name__


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing, for their owner alone. OSError when that fails."""
    for path in (*reversed(folder.parents), folder):
        if not path.is_dir():
            with contextlib.suppress(FileExistsError):
                path.mkdir(PRIVATE_FOLDER)


def move(path: Path, to: Path) -> None:
    """A file into another folder of the same disk. UserError where it can't go there."""
    try:
        make_folder(to)
        os.replace(path, to / path.name)
    except OSError as error:
        raise UserError(f"{path} can't be moved to {to}: {reason(error)}") from error


def open_log(path: Path, flags: int = 0) -> int:
    """A file to append to, as its descriptor; made with its folder where it is missing. OSError when that fails, or `flags` (as of os.open) forbid it."""
    make_folder(path.parent)
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | flags, PRIVATE_FILE)


@contextlib.contextmanager
def replacing(path: Path, *errors: type[Exception]) -> Generator[Path]:
    """
    A file beside `path` to write to. Once it is whole and on the disk it takes the place of `path`; after an OSError, or one of `errors`, `path` is as
    it was and a UserError says why.
    """
    part = None
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            yield path  # a device or a pipe has no beside
            return
        target = path.resolve()  # a link stays a link
        make_folder(target.parent)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=".part-", suffix=target.suffix)  # 0600
        os.close(handle)
        part = Path(name)
        yield part
        mode = target.stat().st_mode & 0o777 if target.exists() else PRIVATE_FILE
        with open(part, "r+b") as f:
            os.fsync(f.fileno())
            os.fchmod(f.fileno(), mode)
        os.replace(part, target)
        part = None
    except (OSError, UnicodeError, *errors) as error:
        raise UserError(f"{path} can't be written: {reason(error)}; nothing there was changed") from error
    finally:
        if part is not None:
            with contextlib.suppress(OSError):
                part.unlink()


def check_place(path: Path) -> None:
    """UserError where `path` could not be written, before work is done whose result goes there. Its folder is made."""
    with contextlib.suppress(KeyError), replacing(path):
        raise KeyError  # what is there stays


def write_text(path: Path, text: str) -> None:
    """Write a file whole. UserError when it can't be, and then what was there before stays."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
