"""
A request over a large prompt set, cut into shards that run apart: request.bin, a part a shard, job.sbatch for Slurm, and the whole once all parts are there.

Task k of n takes shards k, k + n, ...; a part is written whole or not at all, so that a task that runs again does only what is missing.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import techniques
from utils import ROOT
from vocabulary.chosen import choose, is_chosen, pinned, sbatch_key
from vocabulary.files import make_folder, open_log, write_text
from vocabulary.nodes import UserError
from vocabulary.parts import Scattered, read_frames, write_frames
from vocabulary.prompts import Metric
from vocabulary.requests import Failure, Load, ModelInfo, Progress
from vocabulary.sets import EmptyPart
from vocabulary.progress import time_left
from vocabulary.wire import WireError, encode, Frame

MOST = 256  # prompts in a shard, where nothing is said
EMPTY = "empty"  # a part of which no prompt fits
JOB = """#!/bin/bash
#SBATCH --job-name=loupe
#SBATCH --array={array}
#SBATCH --output="{log}"
#SBATCH --open-mode=append
#SBATCH --requeue
{more}cd {cwd} || exit 1
exec {python} {engine} work {folder} --task "$SLURM_ARRAY_TASK_ID" --of {tasks}
"""


def scattered(request: object) -> Scattered:
    """How a request's parts are joined. UserError where they can't be."""
    known = {kind: how for part in techniques.parts("scatter") for kind, how in part.SCATTERED.items()}
    refused = {kind: why for part in techniques.parts("scatter") for kind, why in getattr(part, "REFUSED", {}).items()}
    if type(request) in refused:
        raise UserError(f"{type(request).__name__} is not scattered: {refused[type(request)]}")
    if type(request) not in known:
        raise UserError(f"{type(request).__name__} can't run over a part of a prompt set: {', '.join(sorted(k.__name__ for k in known))} can")
    how = known[type(request)]
    how.check(request)
    return how


def choose_code(request: object, job: "Job") -> object:
    """What the user scatters is chosen by that, its metric's code and the options of sbatch; the request with its metric pinned."""
    if hasattr(request, "study"):
        request = replace(request, study=replace(request.study, metric=pinned(request.study.metric)))
    for chosen in (job.code, *([request.study.metric] if hasattr(request, "study") else ())):
        if not is_chosen(chosen):
            choose(chosen)
    return request


def check_code(request: object) -> None:
    """UserError where a request that came in a folder would run code that nobody chose here."""
    metric = request.study.metric if hasattr(request, "study") else Metric()
    if not is_chosen(metric):
        raise UserError(f"the metric {metric.words} is code that this folder names: scatter the same words with --own {metric.own} to choose it and let it run")


def check_part(request: object) -> None:
    """UserError where a request names a part of its set that it can't run over, or that is not there."""
    study = getattr(request, "study", None)
    if getattr(study, "part", None) is None:
        if (part := getattr(request, "part", None)) is not None:
            scattered(request)
            if not 0 <= part[0] < part[1]:
                raise UserError(f"part {part[0]} to {part[1]}: a part of a text is from 0 or a later piece up to a piece after that")
        return
    scattered(request)
    (start, stop), n = study.part, len(study.prompt_set)
    if not getattr(request, "over_set", True) or not 0 <= start < stop <= n:
        raise UserError(f"part {start} to {stop} of {n} prompts: a part is of an analysis over a set, from 0 up to its length")


@dataclass(frozen=True)
class Job:
    """How the tasks are started: how many (Slurm: at a time, 0 all), sbatch's options, the folder to be in; `here`: as so many processes of this machine."""

    tasks: int
    most: int = 0
    sbatch: str = ""
    cwd: str = ""
    here: int = 0

    @property
    def code(self) -> str:
        """What its script can be made to run by, as it is chosen or not (vocabulary/chosen.py)."""
        return sbatch_key(self.sbatch)

    def check(self) -> None:
        wrong = not isinstance(self.sbatch, str) or not isinstance(self.cwd, str) or not self.sbatch.isprintable()
        if wrong or any(type(n) is not int or n < 0 for n in (self.tasks, self.most, self.here)) or self.tasks < 1:
            raise UserError("tasks are 1 or more, tasks at a time and processes here not negative, and the options of sbatch one line")


class Folder:
    """The folder of a scattered request."""

    def __init__(self, path: Path):
        self.path = path.resolve()

    def check(self) -> None:
        """UserError where it, or a folder in it, holds a link, through which a file elsewhere would be written, or a pipe, which is read for ever: no scattered job makes these."""
        odd = next((e.name for e in entries(self.path) if not e.is_file(follow_symlinks=False) and not e.is_dir(follow_symlinks=False)), None)
        if odd is not None:
            raise UserError(f"{self.path} holds a link, or what is no regular file ({odd}), which no scattered job makes: remove it")

    def check_name(self) -> None:
        """UserError for a path that would break the line of job.sbatch that it stands in, and so add options."""
        if not str(self.path).isprintable() or '"' in str(self.path):
            raise UserError(f"{str(self.path)!r}: the path of a scattered job has no line breaks, control characters or double quotes: give another folder")

    def write(self, name: str, text: str) -> None:
        """A file of the folder, through no link."""
        self.check()
        write_text(self.path / name, text)

    def log(self, name: str) -> int:
        """A file of the folder to append to, as its descriptor, through no link."""
        self.check()
        return open_log(self.path / name, os.O_NOFOLLOW)

    @cached_property
    def asked(self) -> tuple[Load, object, int]:
        """The model, the request over the whole set, and the prompts of a shard. UserError where it can't be read."""
        try:
            self.check()
            load, request = read_frames(self.path / "request.bin")
            if not isinstance(load.body, Load) or request.id < 1:
                raise ValueError("it is no scattered request")
        except FileNotFoundError as error:
            raise UserError(f"{self.path} holds no request: `engine.py scatter … --out {self.path}` makes one") from error
        except (OSError, WireError, ValueError) as error:
            raise UserError(f"{self.path / 'request.bin'} can't be read: {error}") from error
        scattered(request.body)
        return load.body, request.body, request.id

    @property
    def request(self) -> object:
        return self.asked[1]

    @cached_property
    def total(self) -> int:
        """What there is to cut into shards: prompts, or pieces of a text."""
        return scattered(self.request).size(self.request)

    @property
    def unit(self) -> str:
        return scattered(self.request).unit

    @cached_property
    def shards(self) -> list[tuple[int, int]]:
        n, size = self.total, self.asked[2]
        return [(a, min(a + size, n)) for a in range(0, n, size)]

    @property
    def job(self) -> Job:
        try:
            self.check()
            job = Job(**json.loads((self.path / "job.json").read_text()))
            job.check()
            return job
        except (OSError, ValueError, TypeError, UserError) as error:
            raise UserError(f"{self.path / 'job.json'} can't be read ({error}): the same words of scatter write it again") from error

    @property
    def second(self) -> "Folder":
        """Of a request in two passes the second, which follows from all parts of the first."""
        return Folder(self.path / "second")

    def lay_out(self, load: Load, request: object, size: int, job: Job) -> None:
        """Write the request and the job. A folder that holds this request goes on; UserError where it holds another."""
        self.check_name()
        how = scattered(request)
        if how.whole and job.tasks > 1:
            raise UserError(f"{type(request).__name__} is not scattered: {how.whole}; --tasks 1 runs it as one task, which goes on from its checkpoint")
        make_folder(self.path)
        self.check()
        request = replace(request, out="") if hasattr(request, "out") else request  # it writes into this folder alone
        n = how.size(request)
        if n < 1:
            raise UserError(f"there are no {how.unit} to cut into shards" + ": give --set FILE.jsonl" * hasattr(request, "study"))
        if (self.path / "request.bin").exists():
            had = self.asked
            size = size or had[2]
            if [*map(said, had[:2])] != [said(load), said(request)] or size != had[2]:
                raise UserError(f"{self.path} holds another request (or other shards): give another --out, or remove it")
        else:
            size = size or max(1, min(MOST, -(-n // (4 * job.tasks))))
            write_frames(self.path / "request.bin", [(0, load), (size, request)])
        self.write_job(replace(job, tasks=min(job.tasks, len(self.shards))))

    def write_job(self, job: Job) -> None:
        """job.sbatch, whose array names only tasks with something left to do. UserError for options of sbatch that came with the folder."""
        if not is_chosen(job.code):
            raise UserError(
                f"its job script is not written: options of sbatch run code, and {job.sbatch!r} came with the folder; scatter the same words yourself"
            )
        self.check_name()
        self.check()
        text, path = json.dumps(asdict(job)) + "\n", self.path / "job.json"
        if not path.exists() or path.read_text() != text:
            self.write(path.name, text)
        left = sorted({i % job.tasks for i in self.missing()})
        array = f"0-{job.tasks - 1}" if len(left) in (0, job.tasks) else ",".join(map(str, left))
        quoted = {k: shlex.quote(str(v)) for k, v in (("cwd", job.cwd), ("python", sys.executable), ("engine", ROOT / "engine.py"), ("folder", self.path))}
        log = str(self.path).replace("%", "%%") + "/log-%a.txt"
        more = f"#SBATCH {job.sbatch}\n" if job.sbatch.strip() else ""
        self.write("job.sbatch", JOB.format(array=array + f"%{job.most}" * bool(job.most), log=log, more=more, tasks=job.tasks, **quoted))

    # -------------------------------------------------------------- parts

    def part(self, shard: int) -> Path:
        return self.path / f"part-{shard:05}.bin"

    def read(self, shard: int) -> tuple[ModelInfo, object] | None:
        """A shard's model and result; None where it, or its file beside it, is missing or damaged."""
        try:
            info, result = read_frames(self.part(shard))
        except (OSError, WireError, ValueError):
            return None
        beside = scattered(self.request).beside
        if beside and not isinstance(result.body, Failure) and not is_whole(self.part(shard).with_suffix(beside)):
            return None
        return info.body, result.body

    def missing(self) -> list[int]:
        return [i for i in range(len(self.shards)) if self.read(i) is None]

    def state(self, lost: list[int] | None = None) -> str:
        """How many shards are done (of those that are there, without reading them, where nobody says which are lost), and how long the rest takes at this pace."""
        times, total = sorted(p.stat().st_mtime for p in self.path.glob("part-*.bin")), len(self.shards)
        done = len(times) if lost is None else total - len(lost)
        since = (self.path / "job.json").stat().st_mtime if (self.path / "job.json").exists() else 0.0
        times = [at for at in times if at >= since]  # since it was started last
        left = f", {time_left((times[-1] - times[0]) / (len(times) - 1) * (total - done))}" if 1 < done < total and len(times) > 1 else ""
        return f"{done} of {total} shards done{left}"

    def todo(self) -> str:
        """Which shards are missing and what runs them, in words; job.sbatch then names only their tasks."""
        lost = self.missing()
        some = ", ".join(map(str, lost[:10])) + ", …" * (len(lost) > 10)
        try:
            self.write_job(self.job)
        except UserError as error:
            return f"{self.state(lost)}; missing: {some}. {error}"
        return f"{self.state(lost)}; missing: {some}. `sbatch {self.path / 'job.sbatch'}` runs only these (without Slurm: the words of scatter again, with --local 1)"

    def work(self, task: int, of: int, engine, show: Callable[[object], None], say: Callable[[str], None]) -> int:
        """Run what is missing of one task's shards; the model is loaded once, and not where nothing is. 1 when a shard was refused."""
        load, request, _ = self.asked
        check_code(request)
        mine = [i for i in range(task, len(self.shards), of) if self.read(i) is None]
        if not mine:
            say(f"task {task}: nothing left to do")
            return 0
        gpu = f", CUDA_VISIBLE_DEVICES={given}" if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None else ""
        say(f"task {task}: shards {', '.join(map(str, mine))} on {os.uname().nodename}{gpu}")
        how, refused = scattered(request), 0
        info = how.load(engine, load, show)
        if info.warning:
            say(f"task {task}: {info.warning}")
        if info.name:
            say(f"task {task}: {info.key}, {info.seconds:.1f} s")
        for i in mine:
            (start, stop), began = self.shards[i], time.monotonic()
            try:
                result = how.run(engine, how.cut(request, start, stop), show, self.part(i))
            except EmptyPart as error:
                result = Failure(str(error), EMPTY)
            except UserError as error:
                say(f"shard {i}, {start + 1} to {stop}: {error}")
                refused = 1
                continue
            self.check()
            write_frames(self.part(i), [(0, info), (0, result)])
            say(f"shard {i}: {stop - start} of {self.total} in {time.monotonic() - began:.2f} s")
        return refused

    def joined(self) -> tuple[ModelInfo, object, list[int]]:
        """The model, the result of the parts that are there, and the shards that are missing; nothing is written. UserError where no part is there."""
        found = {i: some for i in range(len(self.shards)) if (some := self.read(i)) is not None}
        lost = [i for i in range(len(self.shards)) if i not in found]
        good = {i: some for i, some in found.items() if not isinstance(some[1], Failure)}
        if not good:
            raise UserError(f"{self.path}: no part is there yet" if lost else f"{self.path}: none of the prompts fits: {next(iter(found.values()))[1].message}")
        infos = {info.identity: (i, info) for i, (info, _) in good.items()}
        if len(infos) > 1:
            words = "; ".join(f"shard {i} by {info.key}" for i, info in infos.values())
            raise UserError(f"{self.path}: parts are of different models: {words}. Name --dtype and --device, and scatter into another --out")
        some = [info for info, _ in good.values()]
        info = next((i for i in some if i.warning), some[0])  # a task that had no GPU says so for all
        result = scattered(self.request).join(self.request, [r for _, (_, r) in sorted(good.items())], info)
        if lost:
            words, said = f"partial: {len(found)} of {len(self.shards)} shards", "warning" if hasattr(result, "warning") else "convention"
            result = replace(result, **{said: "; ".join(filter(None, (words, getattr(result, said))))})
        return info, result, lost

    def results(self) -> Iterator:
        """The results of the parts that are there, in their order."""
        return (some[1] for i in range(len(self.shards)) if (some := self.read(i)) is not None and not isinstance(some[1], Failure))

    def gather(self, partial: bool = False) -> tuple[ModelInfo, object]:
        """The result over the whole set, also as whole.bin. UserError where parts are missing, unless those that are there are wanted."""
        if not partial and self.missing():
            raise UserError(f"{self.path}: {self.todo()}")
        info, result, lost = self.joined()
        if lost:
            return info, result
        if (after := self.lay_out_second(result)) is not None:
            if after.missing():
                raise UserError(f"the first pass is whole, and a second checks what it found: {after.todo()}; then gather again")
            result = scattered(self.request).end(self.request, result, after.gather()[1])
        self.check()
        result = scattered(self.request).write(self.request, result, self.results(), self.path)
        write_frames(self.path / "whole.bin", [(0, info), (0, result)])
        for stale in self.path.glob(".part-*"):  # of tasks that were killed
            with suppress(OSError):
                stale.unlink()
        return info, result

    def gathered(self) -> object:
        """The whole result with its artefact: as `gather` wrote it after the last part, else gathered now."""
        whole = self.path / "whole.bin"
        if whole.is_file() and whole.stat().st_mtime_ns >= max(p.stat().st_mtime_ns for p in self.path.glob("part-*.bin")):
            return read_frames(whole)[1].body
        return self.gather()[1]

    def lay_out_second(self, result: object) -> "Folder | None":
        """The second pass that a joined first one leads to, laid out; None where it is the end."""
        if (after := scattered(self.request).then(self.request, result)) is None:
            return None
        self.second.lay_out(self.asked[0], after, self.asked[2], self.job)
        return self.second


def entries(path: Path | str) -> Iterator[os.DirEntry]:
    """What a folder and those in it hold; no link is followed."""
    with os.scandir(path) as some:
        for entry in some:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from entries(entry.path)


def is_whole(file: Path) -> bool:
    """Whether a safetensors file is as long as its head says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"):
            return file.is_file()
    except (SafetensorError, OSError):
        return False


def said(body: object) -> bytes:
    return encode(Frame("ask", body=body))


def progress(folder: Folder) -> Progress:
    done = sum(1 for _ in folder.path.glob("part-*.bin"))
    return Progress(done, len(folder.shards), folder.state())
