"""
The way from a screen's standard streams to an engine that outlives it: `LOUPE_KEEP_ENGINE_MINUTES` in .env. No numpy, no torch: it starts in a moment.

1. The engine of a checkout, of its GPUs and Slurm job listens on a Unix socket in /tmp/loupe-UID, which only its owner may enter.
2. On connecting it says in one line of JSON which version of the code it runs, its process and who looks; a word from here says what is wanted; then the wire.
3. One starter at a time holds the lock beside the socket. An engine that ends takes its socket away under that lock.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Generator
from pathlib import Path

from utils import ROOT, settings
from vocabulary.files import folder, make_folder, open_log, reason
from vocabulary.nodes import UserError
from vocabulary.typed import whole_number

BASE = Path("/tmp")  # not in a home: that may lie on a network file system, and a socket's path has 107 bytes at most
CODE = ("engine.py", "utils.py", "vocabulary", "model", "techniques")
PROGRAM = (sys.executable, str(ROOT / "engine.py"))
STARTS_IN = 30.0  # seconds in which an engine must listen, or say what it is
LOST = 75  # exit code: the engine is gone


def minutes() -> int:
    """How long an engine stays when its last screen went; 0: it ends with its screen."""
    text = settings().get("LOUPE_KEEP_ENGINE_MINUTES", "").strip() or "0"
    number = whole_number(text)
    if number is None or number < 0:
        raise UserError(
            f"LOUPE_KEEP_ENGINE_MINUTES in .env (or .env.local) is {text!r}: write a whole number of minutes, 0 for an engine that ends with its screen"
        )
    return number


# ------------------------------------------------------------------ where it is


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:10]


def own_folder() -> Path:
    """/tmp/loupe-UID, this user's alone. UserError where it is not."""
    place = BASE / f"loupe-{os.getuid()}"
    make_folder(place)
    found = place.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise UserError(f"{place} is not a folder of yours that nobody else may enter (0700): remove it, or set LOUPE_KEEP_ENGINE_MINUTES=0")
    return place


def checkout() -> str:
    return digest(str(ROOT))


def place() -> Path:
    """The socket of this checkout's engine on the GPUs, and in the Slurm job, that this process has. Where Slurm shows each step its GPUs as 0, 1, …, it names them apart."""
    given, job, step, whole = (os.environ.get(name, "") for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"))
    return own_folder() / f"{checkout()}-{digest(given, job, step or whole)}.sock"


def version() -> str:
    """A digest of the code that an engine runs."""
    files = sorted(p for name in CODE for p in ([ROOT / name] if name.endswith(".py") else (ROOT / name).rglob("*.py")))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]


# ------------------------------------------------------------------ connecting


def call(path: Path, word: str) -> tuple[socket.socket, dict] | None:
    """A connection for `word` (look, apart, stop) and what the engine says of itself; None where none answers."""
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.settimeout(STARTS_IN)
    try:
        line.connect(str(path))
        said = b""
        while not said.endswith(b"\n"):
            if not (byte := line.recv(1)):
                raise ConnectionResetError
            said += byte
        line.sendall(f"{word}\n".encode())
    except (ConnectionError, FileNotFoundError):
        line.close()
        return None
    except TimeoutError as error:
        raise UserError(f"the engine at {path} says nothing (it is stopped?): `uv run engine.py stop` ends it") from error
    line.settimeout(None)
    return line, json.loads(said)


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Generator[bool]:
    """The right to start or end the engine at `path`; False where another has it and `wait` is False."""
    with open(os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "wb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def start(path: Path) -> None:
    """Start the engine that will listen at `path`; the lock is held. UserError when it does not come."""
    path.unlink(missing_ok=True)  # of one that was killed
    try:
        log = open_log(folder("logs") / "engine.log")
    except OSError:
        log = os.open(os.devnull, os.O_WRONLY)
    ready, told = os.pipe()
    command = [*PROGRAM, "keep", str(path), str(told)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=ROOT, pass_fds=[told])
    os.close(told)
    os.close(log)
    if not select.select([ready], [], [], STARTS_IN)[0] or not os.read(ready, 1):
        process.kill()
        raise UserError(f"the engine did not start: {folder('logs') / 'engine.log'} says why")
    os.close(ready)


def connect(word: str = "look") -> socket.socket:
    """A connection for `word` (look, apart) to this checkout's engine, which is started where there is none, or one of other code that nobody needs."""
    path = place()
    for _ in range(5):
        if (found := call(path, word)) is None:
            with locked(path):
                if (found := call(path, word)) is None:
                    start(path)
                    found = call(path, word)
        if found is None:
            continue
        line, facts = found
        if facts["version"] == version():
            return line
        line.close()
        if facts["busy"]:
            raise UserError(
                f"the engine (process {facts['pid']}) runs other code than is here now, and {facts['busy']}: `uv run engine.py stop` ends it, then ctrl+e starts a new one"
            )
        end(path, facts["pid"])
    raise UserError(f"no engine stays at {path}: {folder('logs') / 'engine.log'} says why")


def attach() -> None:
    """Carry standard input and output to the engine that stays, until either ends; returns where .env wants none that stays."""
    try:
        if not minutes():
            return
        line = connect()
    except (UserError, OSError) as error:
        from vocabulary.requests import News
        from vocabulary.wire import Frame, encode, sealed

        words = str(error) if isinstance(error, UserError) else f"the engine can't be reached: {reason(error)}"
        os.write(1, b"".join(sealed(encode(f)) for f in (Frame("hello"), Frame("news", body=News(words, stopped=True)))))
        print(f"engine: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    threading.Thread(target=pump, args=(line.fileno(), 1, LOST), daemon=True).start()
    pump(0, line.fileno(), 0)


def pump(source: int, target: int, code: int) -> None:
    """Bytes from one end to the other; at the end of either the process goes."""
    with contextlib.suppress(OSError):
        while data := os.read(source, 1 << 16):
            while data:
                data = data[os.write(target, data) :]
    os._exit(code)


# ------------------------------------------------------------------ ending


def end(path: Path, pid: int) -> None:
    """End the engine at `path`: a word, then SIGKILL."""
    with contextlib.suppress(OSError, UserError):
        if found := call(path, "stop"):
            found[0].settimeout(5)
            found[0].recv(1)  # until it is gone
            found[0].close()
            return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    path.unlink(missing_ok=True)


def killed(path: Path) -> int:
    """End the process that listens at `path` by SIGKILL (Linux); which it was."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        pid = struct.unpack("3i", line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    os.kill(pid, signal.SIGKILL)
    path.unlink(missing_ok=True)
    return pid


def stop() -> list[str]:
    """End every engine of this checkout that stays; a line about each."""
    lines = []
    for path in sorted(own_folder().glob(f"{checkout()}-*.sock")):
        try:
            found = call(path, "look")
        except UserError:  # it hangs, so it can't say which process it is; the system can
            lines.append(f"killed the engine, process {killed(path)}, which said nothing")
            continue
        if found is None:
            path.unlink(missing_ok=True)
            continue
        found[0].close()
        facts = found[1]
        end(path, facts["pid"])
        lines.append(
            f"stopped the engine, process {facts['pid']}" + (f": {facts['model']}" if facts["model"] else "") + (f" ({facts['busy']})" if facts["busy"] else "")
        )
    return lines


if __name__ == "__main__":
    attach()
    os.execv(sys.executable, [sys.executable, str(ROOT / "engine.py"), "serve"])
