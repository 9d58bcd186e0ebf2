"""The command line of this room: scatter, work, gather."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.console import Console

from techniques.cluster.folder import Folder, Job, progress, scattered
from techniques.shell import GRAY, GREEN, ModelOptions, plain, print_result, read_command
from utils import ROOT
from vocabulary.files import open_log, typed_path
from vocabulary.nodes import UserError


@dataclass
class ScatterCommand:
    """
    Run a command over its prompt set in shards, as a job array of Slurm's or as processes here: scatter sweep --kind z --set FILE.jsonl --tasks 8 --out runs/a.
    After the command's own options (sweep, path, score, discover) or between them come those below. The same words again run only what is missing.
    """

    out: Path | None = None
    """the folder for the request, the job, the parts and the whole"""
    tasks: int = 8
    """tasks of the array; each loads the model once"""
    shard: int = 0
    """prompts a shard; unset, four shards a task, of 256 prompts at most"""
    most: int = 0
    """tasks at a time; unset, all"""
    sbatch: str = ""
    """options for sbatch, such as "--gres=gpu:1 -p a100 -t 60" """
    local: int = 0
    """run it now, in so many processes on this machine, one a GPU where there are GPUs; then gather"""
    words: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    asks: ClassVar[tuple[type, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def of_words(cls, words: list[str]) -> "ScatterCommand":
        """The options of scatter from among another command's. Its name comes first."""
        own = {f"--{f.name}" for f in fields(cls)} - {"--words"}
        mine, rest, waiting = [], [], [*words]
        while waiting:
            word = waiting.pop(0)
            name, given, value = word.partition("=")
            if name not in own:
                rest.append(word)
            elif given or waiting:
                mine.append(f"{name}={value if given else waiting.pop(0)}")
            else:
                raise UserError(f"{word} needs a value")
        if not rest or rest[0].startswith("-"):
            rest, mine = [], ["--help"] if not rest or {"-h", "--help"} & {*rest} else mine
        if {"-h", "--help"} & {*rest}:
            read_command(rest)  # prints the command's own help
        return replace(tyro.cli(cls, args=mine, prog="engine.py scatter"), words=tuple(rest))

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        """Writes the request and the job; with --local runs it."""
        if not self.words:
            raise UserError("scatter takes a command: scatter sweep --kind z --set FILE.jsonl --tasks 8 --out runs/a")
        if self.out is None:
            raise UserError("give --out FOLDER: the request, the parts and the whole go there")
        if self.tasks < 1 or self.shard < 0 or self.most < 0 or self.local < 0 or "\n" in self.sbatch:
            raise UserError("--tasks is 1 or more, --shard, --most and --local are not negative, and --sbatch is one line")
        command = read_command([*self.words])
        if not isinstance(command, ModelOptions) or hasattr(command, "alone"):
            raise UserError(f"{self.words[0]} can't be scattered: sweep, path, score and discover can")
        if getattr(command, "out", None) or command.plot:
            raise UserError("the results go into --out of scatter; plot the gathered ones: gather FOLDER --plot FILE")
        request = command.request()
        request = replace(request, over_set=True) if hasattr(request, "over_set") else request
        scattered(request)
        folder = Folder(typed_path(self.out))
        folder.lay_out(command.load(), request, self.shard, Job(self.local or self.tasks, self.most, self.sbatch, os.getcwd()))
        job = folder.job
        errors.print(
            plain(f"{len(request.study.prompt_set)} prompts in {len(folder.shards)} shards, {job.tasks} tasks; {folder.state()}", GRAY), soft_wrap=True
        )
        if self.local:
            return run_here(folder, self.local, show, errors, command.json)
        ways = f"sbatch {folder.path / 'job.sbatch'}" if shutil.which("sbatch") else "no sbatch here: run job.sbatch where Slurm is, or add --local 1"
        for line in (ways, f"then engine.py gather {self.out}"):
            errors.print(plain(line, GREEN), soft_wrap=True)
        return 0


@dataclass
class WorkCommand:
    """One task of a scattered request, as job.sbatch calls it."""

    folder: Annotated[Path, tyro.conf.Positional]
    task: int = 0
    of: int = 1
    asks: ClassVar[tuple[type, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        if self.of < 1 or not 0 <= self.task < self.of:
            raise UserError("--task counts from 0 to --of - 1")
        return Folder(self.folder).work(self.task, self.of, engine, show, lambda line: errors.print(plain(line), soft_wrap=True))


@dataclass
class GatherCommand:
    """Join the parts of a scattered request: the whole set's result, with its statistics from the prompts' own values."""

    folder: Annotated[Path, tyro.conf.Positional]
    partial: bool = False
    """join the parts that are there"""
    json: bool = False
    """print the result as JSON, and nothing else"""
    plot: Path | None = None
    """draw the result's tables into this file too: .html, or .svg (the first table)"""
    asks: ClassVar[tuple[type, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        folder = Folder(typed_path(self.folder))
        return print_result(*folder.gather(self.partial), self.json, self.plot, errors)


# ------------------------------------------------------------------ as processes on this machine


def run_here(folder: Folder, workers: int, show: Callable[[object], None], errors: Console, as_json: bool) -> int:
    """All tasks as processes of this machine, a second pass after the first; then the whole."""
    for stage in (folder, folder.second):
        if stage.missing():
            run_tasks(stage, workers, show)
        if stage.missing() or not wants_second(folder):
            break
    return print_result(*folder.gather(), as_json, None, errors)


def wants_second(folder: Folder) -> bool:
    """Whether the parts of the first pass lead to a second, which is laid out here."""
    try:
        folder.gather()
    except UserError:
        return (folder.second.path / "request.bin").exists()
    return False


def run_tasks(folder: Folder, workers: int, show: Callable[[object], None]) -> None:
    """So many processes, one a GPU where there are some, until each has ended. UserError with the last line of one that failed."""
    gpus, cores = visible_gpus(), max(1, (os.cpu_count() or 1) // workers)
    running = []
    try:
        for k in range(workers):
            env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(cores))}
            env |= {"CUDA_VISIBLE_DEVICES": gpus[k % len(gpus)]} if gpus else {}
            words = [sys.executable, ROOT / "engine.py", "work", folder.path, "--task", str(k), "--of", str(workers)]
            log = open_log(folder.path / f"log-{k}.txt")
            running.append(subprocess.Popen(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=env))
            os.close(log)
        while any(p.poll() is None for p in running):
            show(progress(folder))
            time.sleep(0.3)
    finally:
        for p in running:
            if p.poll() is None:
                p.terminate()
                p.wait()
    if failed := [k for k, p in enumerate(running) if p.returncode]:
        log = folder.path / f"log-{failed[0]}.txt"
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        raise UserError(
            f"task {failed[0]} ended with {running[failed[0]].returncode}: {''.join(last)[:300]} ({log}); the same words again go on with what is missing"
        )


def visible_gpus() -> list[str]:
    """The GPUs that a process may be given, by number or name."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in visible.split(",") if name.strip()]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(i) for i, line in enumerate(line for line in listed.splitlines() if line.startswith("GPU "))]


COMMANDS = {"scatter": ScatterCommand, "work": WorkCommand, "gather": GatherCommand}
SHOW: dict = {}
