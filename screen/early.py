"""The engine's process is started before Textual is imported, so that both load at the same time. No Textual, no numpy: it takes a moment."""

import argparse
import atexit
import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from utils import ROOT, settings
from vocabulary.files import folder, open_log, reason
from vocabulary.nodes import UserError

ENDING = (signal.SIGHUP, signal.SIGTERM)
SRUN = re.compile(r"(?<![^\s;&|(/])srun(?=\s)")
STARTED: list[subprocess.Popen] = []


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tui.py", description="Loupe: a terminal microscope for transformer circuits")
    parser.add_argument("--model", help="zoo, a Hugging Face folder, or a hub name (default: LOUPE_MODEL of .env)")
    parser.add_argument("--base", help="the architecture's model, when --model holds fine-tuned weights only")
    parser.add_argument("--dtype", help="auto, float32, bfloat16, float16")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--device-map", help="a Hugging Face device_map, such as auto")
    parser.add_argument("--against", help="a second model of the same shape, to compare this one's run of the prompt with")
    parser.add_argument("--resume", nargs="?", const="", metavar="FILE", help="open the newest session again, or this one")
    parser.add_argument("--via", default="", help='what carries the engine: "srun --gres=gpu:1", "ssh gpu01 cd loupe &&"')
    parser.add_argument("--mouse", action="store_true", help="mouse reporting on (takes the terminal's own selection away)")
    parser.add_argument("--keys", action="store_true", help="print docs/keys.md, the key table, and leave")
    return parser


def words_of(via: str) -> list[str]:
    """The words of the command that carries the engine. A srun among them, or in one that a shell reads, gets --unbuffered: else it keeps what has no end of line."""
    try:
        words = [SRUN.sub(r"\g<0> --unbuffered", word) if " " in word else word for word in shlex.split(via)]
        return [w for word in words for w in ([word, "--unbuffered"] if Path(word).name == "srun" else [word])]
    except ValueError as error:
        raise UserError(f"--via {via!r} is not a command: {error}") from error


def no_terminal() -> str:
    """Why there can be no screen here, or ""."""
    for stream, name in ((sys.__stdin__, "standard input"), (sys.__stderr__, "standard error")):  # Textual reads the one and writes the other
        try:
            if stream is None or not os.isatty(stream.fileno()):
                return f"{name} is not a terminal"
        except (OSError, ValueError):
            return f"{name} is closed"
    term = os.environ.get("TERM", "")
    return f"TERM is {term or 'not set'}" if term in ("", "dumb", "unknown") else ""


def kept(via: str) -> bool:
    """Whether the engine may be another's too, or far: a line that is watched."""
    return bool(via) or settings().get("LOUPE_KEEP_ENGINE_MINUTES", "").strip() not in ("", "0")


def command(via: str) -> list[str]:
    """What starts the engine, or reaches the one that stayed."""
    if via:
        return [*words_of(via), "uv", "run", "engine.py", "serve"]
    return [sys.executable, *(["-m", "model.relay"] if kept(via) else [str(ROOT / "engine.py"), "serve"])]


def spawn(words: list[str], log: Path) -> tuple[subprocess.Popen, str, int]:
    """The engine's process, what there is to say of its log, or "", and how long the log was before."""
    note, since = "", log.stat().st_size if log.is_file() else 0
    try:
        file = open_log(log)
    except OSError as error:
        note = f"{log} can't be written ({reason(error)}): what the engine says is lost"
        file = os.open(os.devnull, os.O_WRONLY)
    try:
        STARTED.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True, cwd=ROOT))
        return STARTED[-1], note, since
    finally:
        os.close(file)


@atexit.register
def end_all() -> None:
    """End what was started and still goes when the program ends, as when no screen opened: SIGTERM first, on which srun cancels its job."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        going = [p for p in STARTED if p.poll() is None]
        for process in going:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        for process in going:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)


def start(args: argparse.Namespace) -> tuple[subprocess.Popen, str, int] | None:
    """The engine for a screen that is about to open; None where it can't, which the screen's own start then says. From here on a signal ends both."""
    came, signals = [], (signal.SIGINT, *ENDING)
    for number in signals:
        signal.signal(number, lambda number, frame: came.append(number))  # not in the middle of a process's start
    try:
        engine = None if args.keys or no_terminal() else spawn(command(args.via), folder("logs") / "engine.log")
    except (UserError, OSError, ValueError):
        engine = None
    for number in signals:
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    if came:
        sys.exit(128 + came[0])
    return engine
