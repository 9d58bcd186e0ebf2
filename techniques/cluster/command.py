"""The command line of this room: scatter, work, gather."""

import os
import shutil
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.console import Console

from techniques.cluster.folder import Folder, Job, check_code, choose_code, scattered
from techniques.cluster.tasks import run_here
from techniques.shell import GRAY, GREEN, YELLOW, ModelOptions, interruptible, plain, print_result, read_command
from vocabulary.files import typed_path
from vocabulary.nodes import UserError
from vocabulary.requests import ModelInfo, Progress


@dataclass
class ScatterCommand:
    """
    Run a command over its prompt set in shards, as a job array of Slurm's or as processes here: scatter sweep --kind z --set FILE.jsonl --tasks 8 --out runs/a.
    After the command's own options (sweep, path, score, discover, examples, fit-jacobian, replay SESSION, …) or between them come those below. The same words again run only what is missing.
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
        if not isinstance(command, ModelOptions) or hasattr(command, "alone") and not hasattr(command, "scattered"):
            raise UserError(f"{self.words[0]} can't be scattered: it asks no one question over a set or a text")
        load, request = command.scattered() if hasattr(command, "scattered") else (command.load(), command.request())
        request = replace(request, over_set=True) if hasattr(request, "over_set") else request
        scattered(request)
        if getattr(command, "wandb", False):
            raise UserError("--wandb records a fit that runs here: leave it out; the task's log has its losses")
        if command.plot:
            raise UserError("the results go into --out of scatter; plot the gathered ones: gather FOLDER --plot FILE")
        folder, job = Folder(typed_path(self.out)), Job(self.local or self.tasks, self.most, self.sbatch, os.getcwd(), self.local)
        folder.lay_out(load, choose_code(request, job), self.shard, job)
        job = folder.job
        errors.print(plain(f"{folder.total} {folder.unit} in {len(folder.shards)} shards, {job.tasks} tasks; {folder.state()}", GRAY), soft_wrap=True)
        if self.local:
            run_here(folder, self.local, show)
            return printed(*folder.gather(), command.json, None, errors)
        ways = f"sbatch {folder.path / 'job.sbatch'}" if shutil.which("sbatch") else "no sbatch here: run job.sbatch where Slurm is, or add --local 1"
        for line in (ways, f"then engine.py gather {self.out}"):
            errors.print(plain(line, GREEN), soft_wrap=True)
        return 0


@dataclass
class WorkCommand:
    """One task of a scattered request, as job.sbatch calls it; with --local all of them, as processes here, and the whole."""

    folder: Annotated[Path, tyro.conf.Positional]
    task: int = 0
    of: int = 1
    local: int = 0
    asks: ClassVar[tuple[type, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        if self.of < 1 or not 0 <= self.task < self.of:
            raise UserError("--task counts from 0 to --of - 1")
        if self.local:
            folder = Folder(self.folder)
            check_code(folder.request)
            errors.print("tasks begin")
            run_here(folder, self.local, lambda part: None)
            folder.gather()
            return 0
        folder = Folder(self.folder)

        def named(part: object) -> None:  # as what a task says, not as what went wrong
            show(replace(part, text=f"task {self.task}: {part.text}") if isinstance(part, Progress) and part.text else part)

        with interruptible(counted(named), signal.SIGTERM) if scattered(folder.request).whole else nullcontext(named) as told:
            return folder.work(self.task, self.of, engine, told, lambda line: errors.print(plain(line), soft_wrap=True))


def counted(show: Callable[[object], None]) -> Callable[[object], None]:
    """Progress with its steps in its words, for the log of a task that is one fit."""
    return lambda p: show(replace(p, text=f"{p.done} of {p.total} · {p.text}") if isinstance(p, Progress) and p.total > 1 and not p.notice else p)


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
        info, result = folder.gather(self.partial)
        if info.warning:
            errors.print(plain(info.warning, YELLOW), soft_wrap=True)
        return printed(info, result, self.json, self.plot, errors)


def printed(info: ModelInfo, result: object, as_json: bool, plot: Path | None, errors: Console) -> int:
    """A gathered result, as its own command prints it; the exit code that it would have."""
    return print_result(info, result, as_json, plot, errors) or getattr(result, "code", 0)


COMMANDS = {"scatter": ScatterCommand, "work": WorkCommand, "gather": GatherCommand}
SHOW: dict = {}
