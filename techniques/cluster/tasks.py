"""
The tasks of a scattered request: as processes of this machine under one that leads them, or as a job array of Slurm's. Starting, seeing, cancelling them.

1. The leading process writes `local.json` every second while it lives, and ends its tasks when a file `cancel` is there: both work for any machine that sees the folder.
2. What Slurm has is found by the script that it runs, so that a job of the shell's is seen too, and no folder names another's job.
"""

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from techniques.cluster.folder import Folder, progress
from utils import ROOT
from vocabulary.nodes import UserError

SILENT = 15.0  # seconds after which a leading process that said nothing is gone
ENDS = 5.0  # seconds in which a task ends by itself
SLURM = 10.0  # seconds that squeue, scancel and sacct have
CANCELLED = "cancelled"
BAD = {
    "FAILED": "failed",
    "TIMEOUT": "ran out of time (TIMEOUT)",
    "OUT_OF_MEMORY": "ran out of memory (OUT_OF_MEMORY)",
    "NODE_FAIL": "lost their node (NODE_FAIL)",
    "BOOT_FAIL": "had no node that starts (BOOT_FAIL)",
    "DEADLINE": "passed their deadline (DEADLINE)",
    "PREEMPTED": "gave way to other jobs (PREEMPTED)",
    "CANCELLED": "cancelled in Slurm",
}
BEGIN = re.compile(r"tasks begin|task \d+: (shards|nothing left) ")  # how a run begins its part of a log
USUAL = re.compile(r"tasks begin|task \d+: |shard \d+: ")  # how lines begin that tell of no error
SILENTLY = "its tasks ended without a word: killed, or gone with their node"


# ------------------------------------------------------------------ processes of this machine


def run_here(folder: Folder, workers: int, show: Callable[[object], None]) -> None:
    """All tasks as processes of this machine, those of a second pass after the first. UserError with the last line of one that failed."""
    (folder.path / "cancel").unlink(missing_ok=True)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that what follows ends its tasks
    try:
        if folder.missing():
            run_tasks(folder, folder, workers, show)
        second = folder.lay_out_second(folder.joined()[1])
        if second is not None and second.missing():
            run_tasks(second, folder, workers, show)
    finally:
        (folder.path / "local.json").unlink(missing_ok=True)


def run_tasks(folder: Folder, lead: Folder, workers: int, show: Callable[[object], None]) -> None:
    """So many processes, one a GPU where there are some (several where there are more, for a model that is spread over them), until each has ended. What `lead` holds says that they live, and when they should not."""
    gpus, cores = visible_gpus(), max(1, (os.cpu_count() or 1) // workers)
    running, said = [], -1.0
    try:
        for k in range(workers):
            env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
            env |= {"CUDA_VISIBLE_DEVICES": ",".join(gpus[k % len(gpus) :: workers])} if gpus else {}
            words = [sys.executable, ROOT / "engine.py", "work", folder.path, "--task", str(k), "--of", str(workers)]
            log = folder.log(f"log-{k}.txt")
            running.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env, preexec_fn=end_with_leader))
            os.close(log)
        while alive := sum(p.poll() is None for p in running):
            if time.monotonic() - said >= 1:
                said = time.monotonic()
                lead.write("local.json", json.dumps({"running": alive}))
            if (lead.path / "cancel").exists():
                raise UserError(CANCELLED)
            show(progress(folder))
            time.sleep(0.3)
    finally:
        for p in (left := [p for p in running if p.poll() is None]):
            p.terminate()
        for p in left:
            try:
                p.wait(ENDS)
            except subprocess.TimeoutExpired:  # stopped, or in a call to a GPU that hangs
                p.kill()
                p.wait()
    if failed := [k for k, p in enumerate(running) if p.returncode]:
        log = folder.path / f"log-{failed[0]}.txt"
        raise UserError(
            f"task {failed[0]} ended with {running[failed[0]].returncode}: {last_line(log)} ({log}); the same words again go on with what is missing"
        )


def end_with_leader() -> None:
    """In a task, before it begins: Linux ends it where its leading process is killed (PR_SET_PDEATHSIG). Other systems have no such call."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def visible_gpus() -> list[str]:
    """The GPUs that a process may be given, by number or name; of one that is cut into MIG slices, each of these."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        names = [name.strip() for name in visible.split(",") if name.strip()]
        return names[: names.index("-1")] if "-1" in names else names  # CUDA reads no further
    if not shutil.which("nvidia-smi"):
        return []
    listed, gpus = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout, []
    for line in listed.splitlines():
        if line.startswith("GPU "):
            gpus.append([])
        elif gpus and (slice_ := re.search(r"UUID: (MIG-[^)]+)", line)):
            gpus[-1].append(slice_[1])
    return [name for i, slices in enumerate(gpus) for name in slices or [str(i)]]


def tail(log: Path) -> list[str]:
    """The last lines of a log; none where it can't be read."""
    if not log.is_file():
        return []
    try:
        with open(log, "rb") as f:
            f.seek(max(0, os.path.getsize(log) - 4000))
            return f.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def last_line(log: Path) -> str:
    """The last line of a log that says something, in 300 characters; "" without one."""
    return next((line.strip()[:300] for line in reversed(tail(log)) if line.strip()), "")


def trouble(log: Path) -> str:
    """What a log's last run says that went wrong, in 300 characters; SILENTLY where it says nothing, "" where there was none."""
    lines = [line.strip()[:300] for line in tail(log) if line.strip()]
    begun = max((n for n, line in enumerate(lines) if BEGIN.match(line)), default=0)
    return next((line for line in reversed(lines[begun:]) if not USUAL.match(line)), SILENTLY if lines else "")


def start_here(folder: Folder, workers: int) -> subprocess.Popen:
    """The leading process, which outlives who starts it."""
    log = folder.log("log.txt")
    try:
        words = [sys.executable, ROOT / "engine.py", "work", folder.path, "--local", str(workers)]
        return subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=folder.job.cwd or None)
    finally:
        os.close(log)


def running_here(folder: Folder) -> int:
    """Tasks that a leading process has; 0 where none lives."""
    try:
        folder.check()
        path = folder.path / "local.json"
        return json.loads(path.read_text())["running"] if abs(time.time() - path.stat().st_mtime) < SILENT else 0
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return 0


# ------------------------------------------------------------------ Slurm


@dataclass(frozen=True)
class Row:
    """One task of an array that Slurm has: its job, its state and, of one that waits, why."""

    job: str
    state: str
    reason: str
    script: str


def ask_slurm(*words: str, seconds: float = SLURM) -> str:
    """What a command of Slurm's prints. UserError with its words."""
    if not shutil.which(words[0]):
        raise UserError(f"there is no {words[0]} on this machine: Slurm is not here; start the tasks as processes instead")
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=seconds, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"{words[0]} did not answer within {seconds:.0f} s") from error
    if done.returncode:
        raise UserError(([line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()] or [f"{words[0]} failed"])[-1][:300])
    return done.stdout


def submit(folder: Folder) -> str:
    """The number of the job that runs what is missing. UserError with sbatch's words."""
    folder.write_job(folder.job)
    number = ask_slurm("sbatch", "--parsable", str(folder.path / "job.sbatch"), seconds=60).strip().partition(";")[0]
    with os.fdopen(folder.log("submitted.txt"), "w") as f:
        f.write(f"{number}\n")
    return number


def queue(*more: str) -> list[Row]:
    """The user's tasks in Slurm's queue: one call for all folders, none where there is no Slurm."""
    if not shutil.which("squeue"):
        return []
    lines = ask_slurm("squeue", "-h", "-r", "--me", *more, "-o", "%F|%T|%r|%o").splitlines()
    return [Row(*line.split("|", 3)) for line in lines if line.count("|") >= 3]


def of_folder(rows: Iterable[Row], folder: Folder) -> list[Row]:
    """Those that run a folder's script, or that of its second pass."""
    scripts = {str(f.path / "job.sbatch") for f in (folder, folder.second)}
    return [r for r in rows if r.script in scripts or os.path.realpath(r.script) in scripts]


def endings(folder: Folder) -> str:
    """How the tasks of the last submission ended that did not end well, by Slurm's accounts, else by what its controller remembers for some minutes; "" for neither."""
    found = []
    with suppress(UserError):
        ended = of_folder(queue("-t", "all"), folder)
        numbers = [r.job for r in ended] + [last_line(stage.path / "submitted.txt") for stage in (folder, folder.second)]
        number = max((int(n) for n in numbers if n.isdecimal()), default=0)
        found = [r.state for r in ended if r.job == str(number)]
        if number:
            found = [line.split(" ")[0] for line in ask_slurm("sacct", "-n", "-X", "-P", "-j", str(number), "-o", "State").splitlines()] or found
    return "; ".join(f"{found.count(s)} of its tasks {words}" for s, words in BAD.items() if s in found)


# ------------------------------------------------------------------ either


def stage_of(folder: Folder) -> Folder | None:
    """The pass in which something is missing; None where all is there."""
    if folder.missing():
        return folder
    second = folder.lay_out_second(folder.joined()[1])
    return second if second is not None and second.missing() else None


def start(folder: Folder, rows: list[Row]) -> subprocess.Popen | None:
    """Start what is missing, in the way that the job says; the leading process, where it is one. UserError where tasks of it run."""
    folder.check()
    job = folder.job
    if running_here(folder) or of_folder(rows, folder):
        raise UserError(f"{folder.path.name}: its tasks run; J, then x, cancels them")
    if (stage := stage_of(folder)) is None:
        raise UserError(f"{folder.path.name}: nothing is missing")
    (folder.path / "cancel").unlink(missing_ok=True)
    for some in {folder, stage}:
        os.utime(some.path / "job.json")
    if job.here:
        return start_here(folder, job.here)
    submit(stage)
    return None


def cancel(folder: Folder, rows: list[Row], lead: subprocess.Popen | None) -> None:
    """End a folder's tasks. What is lost of a shard is not kept, its parts are."""
    folder.write("cancel", "")
    if lead is not None and lead.poll() is None and not running_here(folder):
        lead.terminate()  # it has no tasks yet
    if mine := sorted({r.job for r in of_folder(rows, folder)}):
        ask_slurm("scancel", *mine)
