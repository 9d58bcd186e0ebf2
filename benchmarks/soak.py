"""
The real screen in a pseudo-terminal, on the embedded model, under kills, resizes, pastes and model switches: `uv run benchmarks/soak.py --minutes 10`. Not in CI.

After each blow a key is pressed whose effect is a line in the session file: the screen survived when that line comes. A killed screen is opened again from the file;
what was in it before must be there. The last line is one JSON object: tried, survived, lost actions, processes left, growth of memory, and the seed.
"""

import argparse
import collections
import contextlib
import fcntl
import json
import os
import pty
import random
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from screen.session import Session, read_session
from tui import first_state
from utils import ROOT, cyan, endc, gray, red

MARK = "LOUPE_SOAK"
KEYS = "1234567890hjkl[],.gGvVfbaApscxuivn=@()i" + "1234567890hjkl" * 2


@dataclass
class SoakConfig:
    minutes: float = 10
    seed: int = 0
    patience: float = 60  # seconds in which a living screen answers a key, on a machine with other work


def status(pid: int, name: str) -> int:
    """Bytes of a line of /proc/PID/status; 0 for a process that is gone."""
    try:
        return next(int(line.split()[1]) << 10 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith(name))
    except (OSError, StopIteration):
        return 0


def marked(mark: str) -> list[int]:
    """The processes that were started with this mark in their environment and are not zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
    return found


class Terminal:
    """The screen's process in a pseudo-terminal, going on with a session file."""

    def __init__(self, session: Path, mark: str = "", *options: str):
        self.session, self.mark, self.options = session, mark or str(os.getpid()), options
        self.start()

    def start(self) -> None:
        self.master, slave = pty.openpty()
        self.seen = b""
        self.resize(120, 36)
        env = {**os.environ, "TERM": "xterm-256color", MARK: self.mark}
        command = [sys.executable, "tui.py", "--resume", str(self.session), *self.options]
        own = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # noqa: E731  (its controlling terminal, so that it hears when that goes)
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, cwd=ROOT, env=env, start_new_session=True, preexec_fn=own)
        os.close(slave)
        threading.Thread(target=self.drain, args=(self.master,), daemon=True).start()

    def drain(self, master: int) -> None:
        with contextlib.suppress(OSError):
            while data := os.read(master, 65536):
                self.seen = (self.seen + data)[-1_000_000:]

    def send(self, data: str | bytes) -> None:
        data = data.encode() if isinstance(data, str) else data
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self.master, data) :]

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait_for(self, what, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not (done := what()) and time.monotonic() < until:
            time.sleep(0.02)
        return done

    def lines(self) -> int:
        return self.session.read_bytes().count(b"\n")

    def answers(self, seconds: float) -> bool:
        """Whether a key has its effect: one more line in the session file. Whatever is open is closed first."""
        before = self.lines()
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            for pause in (0.2, 0.2, 0.4):  # far longer than ESCDELAY: on a busy machine esc and the next key would be one
                self.send("\x1b")
                time.sleep(pause)
            self.send("d")
            if self.wait_for(lambda: self.lines() > before, 3):
                return True
        return False

    def engine(self) -> int:
        """The engine's process, 0 when there is none."""
        return next((pid for pid in marked(self.mark) if b"engine.py" in Path(f"/proc/{pid}/cmdline").read_bytes()), 0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.master)

    def end(self, how: int) -> bool:
        """End the screen by a signal, or by its terminal going away (SIGHUP); whether all its processes are gone within ten seconds."""
        self.close() if how == signal.SIGHUP else self.process.send_signal(how)
        gone = self.wait_for(lambda: self.process.poll() is not None, 10)
        gone = self.wait_for(lambda: not marked(self.mark), 10) and gone
        if how != signal.SIGHUP:
            self.close()
        return gone


class Soak:
    """The blows, and what came of them."""

    def __init__(self, cfg: SoakConfig, folder: Path):
        self.cfg, self.random = cfg, random.Random(cfg.seed)
        session = Session(first_state({}), folder / "soak.jsonl")
        session.do("base", value="corrupt")
        session.close()
        self.ui = Terminal(session.path)
        self.tried, self.survived = collections.Counter(), collections.Counter()
        self.lost, self.left, self.faults = 0, 0, []
        self.memory: list[tuple[int, int]] = []

    def keys(self) -> None:
        self.ui.send("".join(self.random.choices(KEYS, k=self.random.randrange(1, 40))))

    def resize(self) -> None:
        for _ in range(self.random.randrange(1, 8)):
            self.ui.resize(self.random.randrange(1, 260), self.random.randrange(1, 80))
        self.ui.resize(self.random.randrange(80, 200), self.random.randrange(24, 60))

    def paste(self) -> None:
        text = "".join(self.random.choices(" abcÄé日🙂\t\n\r\"'\\{}|", k=self.random.choice((10, 1000, 20_000))))
        self.ui.send(self.random.choice("eEtomI/:"))
        self.ui.send(f"\x1b[200~{text}\x1b[201~")

    def model(self) -> None:
        self.ui.send("\x1b")
        time.sleep(0.3)
        self.ui.send("M")
        time.sleep(0.3)
        self.ui.send(self.random.choice(("zoo dtype=float32", "zoo dtype=bfloat16", "/no/such/model", "zoo dtype=nonsense")) + "\r")

    def engine_kill(self) -> None:
        if pid := self.ui.engine():
            os.kill(pid, self.random.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV)))
        time.sleep(self.random.random())
        self.ui.send("\x05")

    def again(self, how: int) -> None:
        """End the screen while keys are on their way, and open its session again."""
        before = self.ui.session.read_bytes()
        self.ui.send("".join(self.random.choices("ddhjklv", k=10)))
        time.sleep(self.random.random() / 10)
        if not self.ui.end(how):
            self.faults.append(f"{signal.Signals(how).name}: processes left: {marked(self.ui.mark)}")
            self.left += len(marked(self.ui.mark))
        if not self.ui.session.read_bytes().startswith(before):
            self.lost += 1
            self.faults.append(f"{signal.Signals(how).name}: the session file lost what it had")
        session, warning = read_session(self.ui.session)
        if warning:
            self.faults.append(warning)
        self.ui.session = session.path
        if warning:  # it goes on in a new file, as the screen would
            session.do("base", value=session.state.base)
        session.close()
        self.ui.start()

    def ui_kill(self) -> None:
        self.again(signal.SIGKILL)

    def ui_term(self) -> None:
        self.again(signal.SIGTERM)

    def terminal_gone(self) -> None:
        self.again(signal.SIGHUP)

    def run(self) -> dict:
        blows = [self.keys, self.resize, self.paste, self.model, self.engine_kill, self.ui_kill, self.ui_term, self.terminal_gone]
        begun, seconds = time.monotonic(), self.cfg.minutes * 60
        assert self.ui.answers(self.cfg.patience), f"the screen does not come up:\n{self.ui.seen[-3000:].decode(errors='replace')}"
        while time.monotonic() - begun < seconds:
            blow = self.random.choices(blows, (8, 6, 6, 3, 2, 1, 1, 1))[0]
            self.tried[blow.__name__] += 1
            blow()
            if self.ui.answers(self.cfg.patience):
                self.survived[blow.__name__] += 1
            else:
                self.faults.append(
                    f"{blow.__name__} at {time.monotonic() - begun:.0f} s: no answer, exit code {self.ui.process.poll()}: {self.ui.seen[-300:]!r}"
                )
                print(f"{red}{self.faults[-1]}{endc}", flush=True)
                self.again(signal.SIGKILL)
            self.memory.append((status(self.ui.process.pid, "VmRSS"), status(self.ui.engine(), "VmRSS")))
            print(
                f"{gray}{time.monotonic() - begun:5.0f} s  {sum(self.tried.values())} tried, {sum(self.survived.values())} survived, {blow.__name__}{endc}",
                flush=True,
            )
        session, warning = read_session(self.ui.session)
        clean = self.ui.end(signal.SIGTERM)
        left = marked(self.ui.mark)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return {
            "minutes": round((time.monotonic() - begun) / 60, 1),
            "seed": self.cfg.seed,
            "tried": dict(self.tried),
            "survived": dict(self.survived),
            "lost": self.lost,
            "actions_kept": session.actions,
            "session_warning": warning,
            "left_processes": self.left + len(left),
            "ended_cleanly": clean,
            "memory_growth_mb": self.growth(),
            "faults": self.faults,
        }

    def growth(self) -> dict:
        """Megabytes between the first tenth of the run and the last, of screen and engine, by medians of those that were there."""
        part, out = max(3, len(self.memory) // 10), {}
        for i, name in enumerate(("screen", "engine")):
            seen = [m[i] for m in self.memory if m[i]]
            middle = lambda some: sorted(some)[len(some) // 2] if some else 0  # noqa: E731
            out[name] = round((middle(seen[-part:]) - middle(seen[:part])) / 1e6, 1)
        return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=SoakConfig.minutes)
    parser.add_argument("--seed", type=int, default=SoakConfig.seed)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = Soak(SoakConfig(args.minutes, args.seed), Path(folder)).run()
    print(f"{cyan}{sum(result['survived'].values())} of {sum(result['tried'].values())} survived{endc}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
