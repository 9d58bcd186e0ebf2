"""
What an engine knows of scattered jobs. It needs no model, and nothing here waits: one thread of its own looks at folders, asks Slurm, joins parts and starts tasks;
what is asked is answered with what that thread found last.
"""

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from subprocess import Popen

from model.scheduler import internal
from techniques.cluster import tasks
from techniques.cluster.folder import Folder, Job, choose_code, scattered
from techniques.cluster.requests import CancelShards, GoOnShards, Joined, Shards, StartShards, TakeShards, Watched, WatchShards, named
import numpy as np

from vocabulary.files import typed_path
from vocabulary.nodes import UserError
from vocabulary.parts import pack, unpack
from vocabulary.requests import Load

OFTEN = 1.0  # seconds between two looks
PATIENCE = 30.0  # seconds in which it is not asked again why tasks ended
REASONS = {"BeginTime": "BeginTime: it waits before it starts, or starts again after its node failed"}
ASKED = 10.0  # seconds that a folder is looked at after a screen asked for it


class Desk:
    """The folders that are watched. All that its thread writes is replaced whole, so that who asks reads it as it is."""

    def __init__(self):
        self.thread = ThreadPoolExecutor(1)
        self.states: dict[str, Shards] = {}
        self.results: dict[str, tuple[Joined, tuple]] = {}  # each with its model, result, and what was asked
        self.folders: dict[str, tuple[int, Folder]] = {}
        self.leads: dict[str, Popen] = {}
        self.trouble: dict[str, str] = {}  # what went wrong in starting or cancelling
        self.joins: dict[
            str, tuple[int, tuple, float, float]
        ] = {}  # the last join by its time (no two are alike, in any engine), of which parts, when it was, seconds it took
        self.ends: dict[str, tuple[float, str]] = {}  # why tasks ended, and when that was found
        self.asked: dict[str, float] = {}  # when a screen asked for a folder last
        self.looked, self.last = 0.0, self.thread.submit(int)  # when it looked, and what the thread was told last

    # ---------------------------------------------------------------- asked by screens

    def state(self, name: str) -> Shards:
        return self.states.get(name) or Shards(name, tasks="looking")

    def watch(self, folders: tuple[str, ...]) -> Watched:
        names = tuple(str(typed_path(f).resolve()) for f in folders)
        now = time.monotonic()
        self.asked |= dict.fromkeys(names, now)
        if self.last.done() and now - self.looked > OFTEN:
            self.last = self.thread.submit(self.look, tuple(n for n, at in self.asked.items() if now - at < ASKED))
        return Watched(tuple(self.state(n) for n in names))

    def start(self, ask: StartShards) -> Shards:
        """Lay the request out, which is refused at once where it can't be; its tasks start in the thread."""
        load, request = (frame.body for frame in unpack(ask.frames))
        assert isinstance(load, Load)
        scattered(request)
        job = Job(ask.here or ask.tasks, 0, ask.sbatch, os.getcwd(), ask.here)
        job.check()
        folder = Folder(typed_path(ask.folder))
        if (folder.path / "request.bin").exists() and (tasks.running_here(folder) or self.led(str(folder.path))):
            raise UserError(f"{folder.path} has tasks that run: give another folder, or cancel them")
        folder.lay_out(load, choose_code(request, job), ask.shard, job)
        return self.act(str(folder.path), "starting", self.begin)

    def act(self, folder: str, words: str, work: Callable[[str], None]) -> Shards:
        """Let the thread do something with a folder; what goes wrong is in the state that is seen next."""
        name = str(typed_path(folder).resolve())
        self.trouble.pop(name, None)
        self.ends.pop(name, None)
        self.states[name] = replace(self.state(name), tasks=words, live=True, error="")
        self.last = self.thread.submit(self.tried, name, work)
        return self.states[name]

    def take(self, ask: TakeShards) -> Joined:
        name = str(typed_path(ask.folder).resolve())
        if name not in self.results:
            raise UserError(f"{name}: nothing is joined yet")
        joined, bodies = self.results[name]
        bodies = bodies[:2] if ask.known == joined.stamp else bodies
        return replace(joined, frames=np.frombuffer(pack((0, body) for body in bodies), np.uint8))

    # ---------------------------------------------------------------- in the thread

    def folder(self, name: str) -> Folder:
        """A folder whose request is read once, as long as it is the same file."""
        request = Path(name) / "request.bin"
        stamp = request.stat().st_mtime_ns if request.is_file() else 0
        if name not in self.folders or self.folders[name][0] != stamp:
            self.folders[name] = (stamp, Folder(Path(name)))
            self.results.pop(name, None)  # of another request
            self.joins.pop(name, None)
        return self.folders[name][1]

    def tried(self, name: str, work: Callable[[str], None]) -> None:
        try:
            work(name)
        except (UserError, OSError) as error:
            self.trouble[name] = str(error)
        except Exception as error:
            self.trouble[name] = internal(error).message
        self.look((name,))

    def led(self, name: str) -> bool:
        """Whether a leading process that this engine started lives."""
        return (lead := self.leads.get(name)) is not None and lead.poll() is None

    def begin(self, name: str) -> None:
        if self.led(name):
            raise UserError(f"{Path(name).name}: its tasks start")
        if (lead := tasks.start(self.folder(name), self.queue((name,)))) is not None:
            self.leads[name] = lead

    def cancel(self, name: str) -> None:
        tasks.cancel(self.folder(name), self.queue((name,)), self.leads.get(name))

    def queue(self, names: tuple[str, ...]) -> list[tasks.Row]:
        """What Slurm has; nothing where all of these folders run as processes."""
        return tasks.queue() if any(map(self.on_slurm, names)) else []

    def on_slurm(self, name: str) -> bool:
        """Whether a folder's tasks may be Slurm's: also where its job can't be read, so that one damaged folder hides nobody's tasks."""
        if not (Path(name) / "job.json").exists():
            return False
        try:
            folder = self.folder(name)
            folder.check()
            return not folder.job.here
        except (UserError, OSError):
            return True

    def look(self, names: tuple[str, ...]) -> None:
        rows, wrong = [], ""
        try:
            rows = self.queue(names)
        except UserError as error:
            wrong = str(error)
        for name in names:
            state = Shards(name)
            try:
                state = self.seen(self.folder(name), rows)
                state = replace(state, error=self.trouble.get(name, "") or state.error or ("" if self.folder(name).job.here else wrong))
                self.join(state)
            except (UserError, OSError) as error:
                state = state if state.live else replace(state, error=str(error))
            except Exception as error:  # parts of another version, or made up: the other folders go on
                state = replace(state, error=f"its parts can't be joined: {type(error).__name__}: {error}"[:300])
            number, damaged = self.joins.get(name, (0,))[0], state.whole and name in self.results and not self.results[name][0].whole
            self.states[name] = replace(state, joined=number, whole=state.whole and not damaged, more=state.more or damaged)
        self.looked = time.monotonic()

    def seen(self, folder: Folder, rows: list[tasks.Row]) -> Shards:
        """How far a folder is, without reading its parts."""
        load, request, _ = folder.asked
        folder.check()
        second = folder.second if (folder.second.path / "request.bin").exists() else None
        stage = folder if second is None else second
        mine, here = tasks.of_folder(rows, folder), tasks.running_here(folder)
        starts = self.led(str(folder.path)) and not here
        running = here + sum(r.state in ("RUNNING", "COMPLETING") for r in mine)
        pending = [r for r in mine if r.state not in ("RUNNING", "COMPLETING")]
        live = bool(running or pending or starts)
        done, total = sum(1 for _ in stage.path.glob("part-*.bin")), len(stage.shards)
        words = (
            [f"{running} running"] * bool(running)
            + [f"{len(pending)} pending ({REASONS.get(r.reason, r.reason)})" for r in pending[:1]]
            + ["starting"] * starts
        )
        said = tasks.last_line(stage.path / "log-0.txt").removeprefix("task 0: ") if scattered(request).whole else stage.state().partition(", ")[2]
        left = said if live else ""
        whole = done == total and (second is not None or not scattered(request).two)
        asks = named(request) + ", second pass" * (second is not None)
        return Shards(
            str(folder.path), asks, load.model, folder.total * hasattr(request, "study"), done, total, "tasks " + " ".join(words) if words else "no tasks", live, left,
            0, whole, not whole and not live, self.why_not(folder, stage, live or done == total),
        )  # fmt: skip

    def why_not(self, folder: Folder, stage: Folder, well: bool) -> str:
        """Why tasks ended before all of a pass was done, as far as it is known; "" where they did not. Slurm is not asked at every look."""
        name, now = str(folder.path), time.monotonic()
        if well:
            self.ends.pop(name, None)
            return ""
        if (folder.path / "cancel").exists():
            return tasks.CANCELLED
        if name not in self.ends or now - self.ends[name][0] > PATIENCE:
            self.ends[name] = now, why_not(folder, stage)
        return self.ends[name][1]

    def join(self, state: Shards) -> None:
        """Join what is there where more is there than before, so seldom that it takes a tenth of the time at most."""
        folder, (_, parts, at, took) = self.folder(state.folder), self.joins.get(state.folder, (0, (), 0.0, 0.0))
        times = [p.stat().st_mtime_ns for stage in (folder, folder.second) for p in stage.path.glob("part-*.bin")]
        there = (len(times), max(times, default=0))
        if scattered(folder.request).beside and state.live:
            return  # nothing of it is drawn in part
        if not times or there == parts or not state.whole and time.monotonic() - at < 10 * took:
            return
        began = time.monotonic()
        request, (info, result, lost) = folder.request, folder.joined()
        if state.whole and (folder.second.path / "request.bin").exists():
            result = scattered(request).end(request, result, folder.second.joined()[1])
        if state.whole and not lost and scattered(request).beside:
            result = folder.gathered()
        used = len(getattr(result, "prompts", ())) if hasattr(request, "study") else 0
        prompts = f", {used} of {state.prompts} prompts" if used else ""
        said = f"{len(folder.shards) - len(lost)} of {len(folder.shards)} shards{prompts}"
        stamp = self.folders[state.folder][0]
        self.results[state.folder] = Joined(state.folder, np.zeros(0, np.uint8), stamp, said, state.whole and not lost), (info, result, *folder.asked[:2])
        self.joins[state.folder] = (time.time_ns(), there, time.monotonic(), time.monotonic() - began)


def why_not(folder: Folder, stage: Folder) -> str:
    """Why tasks ended before all of a pass was done: as Slurm says, and as the logs do."""
    ended = "" if folder.job.here else tasks.endings(folder)
    logs = [folder.path / "log.txt", *(stage.path / f"log-{k}.txt" for k in range(folder.job.tasks))]
    said = [line for log in logs if (line := tasks.trouble(log))]
    return ": ".join(filter(None, (ended, next((line for line in said if line != tasks.SILENTLY), "" if ended or not said else tasks.SILENTLY))))


DESK = Desk()


def answer(model: object, ask: object) -> object:
    match ask:
        case StartShards():
            return DESK.start(ask)
        case WatchShards():
            return DESK.watch(ask.folders)
        case CancelShards():
            return DESK.act(ask.folder, "cancelling", DESK.cancel)
        case GoOnShards():
            return DESK.act(ask.folder, "starting", DESK.begin)
        case TakeShards():
            return DESK.take(ask)
