"""The process that owns the model: load, queue, cancel, memory, `serve`, and the command line. Heavy imports happen inside functions."""

import atexit
import gc
import heapq
import itertools
import os
import queue
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path

import techniques
from utils import setting_of_megabytes, tec
from vocabulary.nodes import UserError
from vocabulary.requests import Check, Failure, Load, Models, Progress, Status, StatusResult
from vocabulary.wire import Frame, WireError, door, encode, needs_model, read_frame


def import_model() -> None:
    """The heavy imports, without the garbage collector in the way."""
    gc.disable()
    techniques.parts("analysis")
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)


class Engine:
    """A model and what can be asked of it. `run` returns a request's result; `jobs` is the generator behind it, which yields progress and partial results."""

    def __init__(self, model: str | Load | None = None):
        techniques.parts("requests")  # what may go over the wire
        self.model, self.loaded, self.seconds = None, None, 0.0
        self.swap: Callable[[], None] = lambda: None
        if model is not None:
            self.run(Load(model) if isinstance(model, str) else model)

    def run(self, request: object, show: Callable[[object], None] = lambda part: None) -> object:
        jobs = self.jobs(request)
        while True:
            try:
                show(next(jobs))
            except StopIteration as stop:
                self.check_hooks()
                return stop.value

    def check_hooks(self) -> None:
        models = (self.model.pair or (self.model,)) if self.model else ()
        left = sum(m.leaks() for m in models)
        for model in models if left else ():
            model.remove_hooks()
        assert left == 0, f"{left} hooks were left on the model"

    def jobs(self, request: object) -> Generator:
        """What a request does, step by step. Out of memory: what was kept of earlier requests gives way and it is tried once more; else an error in words."""
        for last in (False, True):
            try:
                return (yield from self.answer(request))
            except Exception as error:
                if "torch" not in sys.modules:
                    raise
                from model import memory

                freed = memory.ran_out(error)
                if last or not freed or isinstance(error, memory.OutOfMemory):
                    raise memory.out_of_memory(error) from None
            yield Progress(0, 0, "out of memory: the activations that were kept are gone, trying again")

    def answer(self, request: object) -> Generator:
        """What the engine knows by itself; everything else is answered by the room that the request comes from."""
        if needs_model(request) and self.model is None:
            raise UserError("no model is loaded: load one first")
        match request:
            case Load():
                return (yield from self.load(request))
            case Status():
                return self.status()
            case Models():
                from model.catalogue import find_models

                return (yield from find_models(request, self.held))
            case Check():
                return self.model.check(request.prompt, request.align)
            case Failure():  # a request that could not be read
                raise UserError(request.message)
        result = door(type(request)).answer(self.model, request)
        return (yield from result) if isinstance(result, Generator) else result

    def load(self, request: Load) -> Generator:
        if "model.bridge" not in sys.modules:
            yield Progress(0, 5, "importing torch")
            gc.disable()
            import torch  # noqa: F401

            yield Progress(1, 5, "importing TransformerLens")
            import_model()
        from model import beside, loading

        megabytes, request = setting_of_megabytes("LOUPE_CACHE_MB", 512), loading.resolved(request)

        def forget() -> None:
            self.swap()
            had, self.model = self.model is not None, None
            if had:
                gc.collect()
            tec()

        bare, alone = (lambda ask: replace(ask, against="", scale=1.0)), replace(request, against="")
        if not 0 <= request.scale <= 1:
            raise UserError(f"{request.scale:g} is not a scale of an adapter: give a number from 0 to 1")
        if self.model is None or bare(request) != bare(self.loaded):
            self.model = yield from loading.load(alone, megabytes, forget, self.held)
            self.loaded = alone
        if self.loaded.against != request.against:
            self.swap()
            beside.part(self.model)
            self.loaded = replace(self.loaded, against="")
            if request.against:
                yield from beside.load_beside(self.model, request, megabytes)
                self.loaded = replace(self.loaded, against=request.against)
        if request.scale != self.loaded.scale or request.scale != 1:
            self.swap()
            beside.rescale(self.model, request.scale)
            self.loaded = request
        return self.model.info

    def held(self, device: object) -> int:
        """Bytes that the loaded model and what is kept of its runs hold on a torch device."""
        return sum(m.weight_bytes + m.cache.size for m in self.model.pair or (self.model,)) if self.model and self.model.device.type == device.type else 0

    def status(self) -> StatusResult:
        device = (0, 0)
        if self.model and (on := self.model.device).type == "cuda":
            cuda = sys.modules["torch"].cuda
            device = (cuda.memory_reserved(on), cuda.mem_get_info(on)[1])
        cache = self.model.cache if self.model else None
        return StatusResult(rss(), *device, cache.size if cache else 0, cache.limit if cache else 0, cache.entries() if cache else ())


def rss() -> int:
    """Bytes of memory that this process holds."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmRSS:"))


# ------------------------------------------------------------------ scheduling


def internal(error: Exception) -> Failure:
    """The whole story to the log, one line to the screen."""
    traceback.print_exception(error)
    return Failure(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


@dataclass(order=True)
class Job:
    priority: int
    number: int
    ask: Frame = field(compare=False)
    steps: Generator | None = field(default=None, compare=False)


class Scheduler:
    """
    Interleaves generators: each `step` advances the waiting job of lowest priority, oldest first, to its next yield. A newer request in a
    slot drops the older one. While a Load waits or runs, jobs that need a model wait for it.
    """

    def __init__(
        self, start: Callable[[object], Generator], send: Callable[[Frame], None], after: Callable[[], None] = lambda: None, model: Callable[[], str] = str
    ):
        self.start, self.send, self.after, self.model = start, send, after, model
        self.jobs: list[Job] = []
        self.numbers = itertools.count()

    def reply(self, job: Job, kind: str, body: object = None) -> None:
        self.send(Frame(kind, job.ask.id, job.ask.slot, job.ask.priority, body, self.model()))

    def put(self, frame: Frame) -> None:
        if frame.kind == "cancel":
            self.drop(lambda job: job.ask.id == frame.id)
        elif frame.kind == "ask":
            if frame.slot:
                self.drop(lambda job: job.ask.slot == frame.slot)
            heapq.heappush(self.jobs, Job(frame.priority, next(self.numbers), frame))

    def drop(self, which: Callable[[Job], bool]) -> None:
        gone = sorted(job for job in self.jobs if which(job))
        self.jobs = [job for job in self.jobs if not which(job)]
        heapq.heapify(self.jobs)
        for job in gone:
            if job.steps is not None:
                job.steps.close()
            self.reply(job, "cancelled")

    def drop_started(self) -> None:
        """The model they ran on is going away."""
        self.drop(lambda job: job.steps is not None and needs_model(job.ask.body))

    def next_job(self) -> Job | None:
        loads = [job for job in self.jobs if isinstance(job.ask.body, Load)]
        ready = [job for job in self.jobs if not loads or not needs_model(job.ask.body) and (job is min(loads) or job not in loads)]
        return min(ready, default=None)

    def step(self) -> bool:
        """Advance one job by one yield; False when there is nothing to do."""
        job = self.next_job()
        if job is None:
            return False
        try:
            if job.steps is None:
                job.steps = self.start(job.ask.body)
            part = next(job.steps)
        except StopIteration as stop:
            self.finish(job, "result", stop.value)
        except UserError as error:
            self.finish(job, "error", Failure(str(error), "user"))
        except Exception as error:
            self.finish(job, "error", internal(error))
        else:
            self.reply(job, "progress" if isinstance(part, Progress) else "partial", part)
        return True

    def finish(self, job: Job, kind: str, body: object) -> None:
        self.jobs.remove(job)
        heapq.heapify(self.jobs)
        try:
            self.after()
        except AssertionError as error:
            kind, body = "error", internal(error)
        self.reply(job, kind, body)


# ------------------------------------------------------------------ the server


def serve() -> None:
    """Speak the protocol on a copy of fd 1, with fd 1 pointed at stderr so that no library's print gets into it."""
    if None in (sys.stdin, sys.stdout, sys.stderr):
        sys.exit("engine: serve answers on standard input and output, and writes its log to standard error: one of them is closed")
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    inbox: queue.SimpleQueue[Frame] = queue.SimpleQueue()

    def send(frame: Frame) -> None:
        out.write(encode(frame))
        out.flush()

    def read_all() -> None:
        """Owns stdin. At its end the process goes, whatever it is doing."""
        while True:
            try:
                frame = read_frame(sys.stdin.buffer.read)
            except WireError as error:
                if error.frame is None:
                    print(f"stdin: {error}", file=sys.stderr, flush=True)
                    os._exit(1)
                frame = replace(error.frame, body=Failure(str(error), "user"))
            if frame is None:
                os._exit(0)
            inbox.put(frame)

    engine = Engine()
    send(Frame("hello"))
    threading.Thread(target=read_all, daemon=True).start()
    scheduler = Scheduler(engine.jobs, send, engine.check_hooks, lambda: engine.model.info.key if engine.model else "")
    engine.swap = scheduler.drop_started
    while True:
        while not scheduler.jobs or not inbox.empty():
            scheduler.put(inbox.get())
        scheduler.step()


def main(args: list[str] | None = None) -> int:
    """The command line."""
    from techniques import shell

    return shell.main(args, lambda: Engine(), serve)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        sys.exit(main())
