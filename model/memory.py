"""Memory: what counts as running out of it, what gives way then, work in chunks that fit, and how much there is."""

import ctypes
import errno
import gc
import math
import os
import re
import resource
import sys
from collections.abc import Callable, Generator
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from weakref import WeakSet

import torch as t
from safetensors import SafetensorError

from utils import setting_of_megabytes, show_bytes, tec
from vocabulary.nodes import UserError
from vocabulary.requests import ModelInfo, Progress
from vocabulary.sizes import Room

CHUNK_MB = 128
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
SAID = re.compile(  # by torch's allocators, CUDA's libraries, the system, C++
    r"out of memory|not enough memory|can(no|')t allocate memory|bad_alloc|CU[A-Z]+_(STATUS_)?ALLOC_FAILED|CUDNN_STATUS_NOT_SUPPORTED.*alloc", re.I | re.S
)
NEEDED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) ([KMGT]iB|bytes)", re.I)
FREE = re.compile(r"([\d.]+) ([KMGT]iB|bytes)(?: is)? free", re.I)


class OutOfMemory(UserError):
    """What is asked for does not fit, in words that say what it needs, what is free and what to do."""


class Kept(Protocol):
    """What can be computed again and gives way when memory runs out; its size in bytes."""

    size: int

    def clear(self) -> None: ...


KEPT: WeakSet[Kept] = WeakSet()


# ------------------------------------------------------------------ running out


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on a GPU, in torch's allocator for the CPU, in a library of CUDA's, in Python, numpy or the system."""
    if isinstance(error, OutOfMemory | MemoryError | t.OutOfMemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if isinstance(error, RuntimeError | OSError | SafetensorError) and SAID.search(str(error)):
        return True
    return error.__cause__ is not None and not isinstance(error, UserError) and is_out_of_memory(error.__cause__)


def ran_out(error: BaseException) -> int:
    """Raise an error again that says anything else. Else let go of what the failed work holds and give way; the bytes of kept activations that went."""
    if not is_out_of_memory(error):
        raise error
    some: BaseException | None = error
    while some is not None:  # the frames hold tensors
        some.__traceback__, some = None, some.__cause__ or some.__context__
    return give_way()


def give_way() -> int:
    """Drop activations that are kept for later, garbage, and what the allocators keep for themselves; the bytes of activations that were kept."""
    freed = sum(kept.size for kept in KEPT)
    for kept in KEPT:
        kept.clear()
    gc.collect()
    tec()
    if sys.platform == "linux":
        with suppress(AttributeError, OSError):  # another C library than glibc
            ctypes.CDLL(None).malloc_trim(0)
    return freed


def out_of_memory(error: BaseException) -> OutOfMemory:
    """The error in words: what was needed, what is free, and what to do."""
    if isinstance(error, OutOfMemory):
        return error
    text, device = str(error), where(error)
    free = size_in(FREE, text) or free_bytes(device)
    needed = size_in(NEEDED, text)
    words = f"{show_bytes(needed)} more are needed" if needed else first_line(error)
    words += "" if free is None else f" and {show_bytes(free)} are free" if needed else f" ({show_bytes(free)} are free)"
    return OutOfMemory(
        f"out of memory on {device}: {words}. Shorten the prompt, take fewer prompts or a smaller batch, load the model in bfloat16, or use another device"
    )


def where(error: BaseException) -> t.device:
    """The device whose memory ran out."""
    text = str(error)
    if gpu := re.search(r"GPU (\d+)", text):
        return t.device("cuda", int(gpu[1]))
    on_gpu = isinstance(error, t.OutOfMemoryError) or re.search(r"\bCU(DA|BLAS|DNN|[A-Z]+_)", text)
    return t.device("mps" if text.startswith("MPS") else "cuda" if on_gpu else "cpu")


def size_in(pattern: re.Pattern, text: str) -> int | None:
    """The bytes that an allocator's words name."""
    found = pattern.search(text)
    return int(float(found[1]) * next(v for k, v in UNITS.items() if k.lower() == found[2].lower())) if found else None


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


# ------------------------------------------------------------------ work in chunks


class Chunks:
    """
    How many items of an analysis run at a time: `size` of them (or size(i), what fits from item i on), and fewer for the rest of the analysis once memory
    ran out. `what` names the items in words; `smaller` is told every new number.
    """

    def __init__(self, what: str, size: int | Callable[[int], int], smaller: Callable[[int], None] = lambda size: None):
        self.what, self.size, self.smaller, self.most = what, size, smaller, math.inf

    def over(self, n: int, work: Callable[[int, int], object]) -> Generator:
        """
        Yield work(start, stop) over range(n). Where work is a generator, what it yields is passed on and what it returns is yielded. Out of memory: kept
        activations go first, then the chunk is halved, which is said, and work begins the chunk anew; OutOfMemory when one item does not fit.
        """
        i, gave_way = 0, False
        while i < n:
            size = self.size(i) if callable(self.size) else self.size
            stop = min(i + int(max(1, min(self.most, size))), n)
            try:
                out = work(i, stop)
                out = (yield from out) if isinstance(out, Generator) else out
            except Exception as error:
                out = None
                freed = ran_out(error)
                if freed and not gave_way:
                    gave_way = True
                    continue
                if stop - i == 1:
                    raise out_of_memory(error) from None
            else:
                yield out
                i, gave_way, out = stop, False, None
                continue
            self.most = (stop - i) // 2
            self.smaller(self.most)
            yield halved(stop - i, self.most, self.what, i, n)


def in_chunks(n: int, size: int | Callable[[int], int], work: Callable[[int, int], object], what: str) -> Generator:
    """Chunks.over for an analysis that goes over its items once."""
    return Chunks(what, size).over(n, work)


def halved(before: int, now: int, what: str, done: int = 0, total: int = 0) -> Progress:
    """The line that says that memory ran out and that work goes on with fewer items at a time."""
    return Progress(done, total, f"out of memory at {before} {what} at a time: going on with {now}", notice=True)


# ------------------------------------------------------------------ how much there is


def free_bytes(device: t.device) -> int | None:
    """Bytes that this process can still get on a device; None where the system does not say."""
    if device.type == "cuda":
        if not t.cuda.is_available():
            return None
        return t.cuda.mem_get_info(device)[0] + t.cuda.memory_reserved(device) - t.cuda.memory_allocated(device)
    if device.type == "mps":
        return max(0, t.mps.recommended_max_memory() - t.mps.driver_allocated_memory()) if t.backends.mps.is_available() else None
    known = [x for x in (system_free(), group_free(), limit_free()) if x is not None]
    return max(0, min(known)) if known else None


def room(device: t.device, held: Callable[[t.device], int] = lambda device: 0) -> Room:
    """Room for a model on a device, in place of the one that is loaded, which holds so many bytes there."""
    gpus = sum(free_bytes(t.device("cuda", i)) or 0 for i in range(t.cuda.device_count() if device.type == "cuda" else 0))
    free = lambda where: (free_bytes(where) or 0) + held(where)  # noqa: E731
    return Room(str(device), free(device), gpus + held(device) if gpus else 0, free(t.device("cpu")))


def system_free(file: Path = Path("/proc/meminfo")) -> int | None:
    """What the machine has, memory and swap."""
    if not file.is_file():
        return None
    sizes = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in file.read_text().splitlines())}
    return sizes["MemAvailable"] + sizes.get("SwapFree", 0) if "MemAvailable" in sizes else None


def group_free(root: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> int | None:
    """What is left of this process's control group (a container, a job of Slurm's), the tightest of its parents'; None without one."""
    lines = mine.read_text().splitlines() if mine.is_file() else []
    place = next((root / line.split("::", 1)[1].lstrip("/") for line in lines if line.startswith("0::")), None)
    left = []
    for folder in (place, *place.parents) if place else ():
        with suppress(OSError, ValueError):
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in ("max", "current"))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left.append(limit - used + int(stat.get("inactive_file", 0)))
        if folder == root:
            break
    return min(left, default=None)


def limit_free() -> int | None:
    """What is left below `ulimit -v`."""
    limit, file = resource.getrlimit(resource.RLIMIT_AS)[0], Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not file.is_file():
        return None
    return limit - int(file.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def chunk_bytes(device: t.device, megabytes: int = 0) -> int:
    """Bytes of activations at once: asked for, or LOUPE_SWEEP_MB of .env, or a third of what an accelerator has free."""
    if megabytes := megabytes or setting_of_megabytes("LOUPE_SWEEP_MB", 0):
        return megabytes << 20
    return t.cuda.mem_get_info(device)[0] // 3 if device.type == "cuda" else CHUNK_MB << 20


def block_bytes(info: ModelInfo, seq: int, size: int) -> int:
    """Bytes of one position of a prompt of `seq` in the widest block, `size` bytes a number: some twelve rows of the stream, three of the MLP, three patterns."""
    return size * (12 * info.d_model + 3 * info.d_mlp + 3 * info.n_heads * seq)
