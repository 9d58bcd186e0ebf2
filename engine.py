"""The process that owns the model: load, memory, `serve`, and the command line. Heavy imports happen inside functions."""

import atexit
import gc
import os
import resource
import sys
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import techniques
from model import relay
from model.host import Host, Screen
from techniques.cluster.folder import check_part
from utils import setting_of_megabytes, tec
from vocabulary.nodes import UserError
from vocabulary.requests import Check, Failure, Load, Models, Progress, Status, StatusResult
from vocabulary.wire import door, needs_model


def import_torch() -> None:
    gc.disable()  # until everything is imported
    import torch  # noqa: F401


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
        self.importing: tuple[Future, ...] = ()
        self.swap: Callable[[], None] = lambda: None  # before the model goes
        self.ask_first: Callable[[Load], None] = lambda request: None  # UserError where it must not go
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
        check_part(request)
        if needs_model(request) and self.model is None:
            raise UserError("no model is loaded: load one first")
        match request:
            case Load():
                return (yield from self.load(request))
            case Status():
                return self.status()
            case Models():
                for step in self.importing:
                    step.result()
                from model.catalogue import find_models

                return (yield from find_models(request, self.held))
            case Check():
                return self.model.check(request.prompt, request.align)
            case Failure():  # a request that could not be read
                raise UserError(request.message)
        result = door(type(request)).answer(self.model, request)
        return (yield from result) if isinstance(result, Generator) else result

    def imports(self) -> tuple[Future, ...]:
        """The heavy imports, in a thread of their own: they go on while the screen is still starting."""
        if not self.importing:
            pool = ThreadPoolExecutor(1)
            self.importing = pool.submit(import_torch), pool.submit(import_model)
        return self.importing

    def load(self, request: Load) -> Generator:
        if not all(step.done() for step in self.imports()):
            for n, name in enumerate(("torch", "TransformerLens")):
                yield Progress(n, 5, f"importing {name}")
                self.importing[n].result()
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
        if self.model is not None and self.loaded != request:
            self.ask_first(request)
        anew = self.model is not None and request.scale != self.loaded.scale and beside.copied(self.model)  # another scale of an adapter
        if self.model is None or bare(request) != bare(self.loaded) or anew and self.model.adapter:
            self.model = yield from loading.load(alone, megabytes, forget, self.held)
            self.loaded = alone
        if self.loaded.against != request.against or anew:
            self.swap()
            beside.part(self.model)
            self.loaded = replace(self.loaded, against="", scale=self.loaded.scale if self.model.adapter else 1.0)
            if request.against:
                yield from beside.load_beside(self.model, request, megabytes)
                self.loaded = replace(self.loaded, against=request.against, scale=self.loaded.scale if self.model.adapter else request.scale)
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


# ------------------------------------------------------------------ the server


def early() -> Engine:
    """An engine that imports before it is asked for a model: a screen will."""
    engine = Engine()
    engine.imports()
    return engine


def serve() -> None:
    """
    Speak the protocol on a copy of fd 1, with fd 1 pointed at stderr so that no library's print gets into it. With LOUPE_KEEP_ENGINE_MINUTES the
    streams lead to the engine that outlives its screens.
    """
    if None in (sys.stdin, sys.stdout, sys.stderr):
        sys.exit("engine: serve answers on standard input and output, and writes its log to standard error: one of them is closed")
    relay.attach()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    host = Host(early())
    host.join(Screen(sys.stdin.buffer.read, out, lambda: os._exit(0)))
    host.run()


def main(args: list[str] | None = None) -> int:
    """The command line."""
    from techniques import shell

    return shell.main(args, lambda: Engine(), serve)


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    elif sys.argv[1:2] == ["keep"]:  # as model/relay.py starts it
        Host(early(), *sys.argv[2:]).keep()
    else:
        sys.exit(main())
