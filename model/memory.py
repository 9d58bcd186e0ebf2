"""Work in pieces that fit into memory."""

from collections.abc import Callable, Generator

import torch as t

from utils import tec
from vocabulary.nodes import UserError
from vocabulary.requests import Progress


def in_chunks(n: int, size: int | Callable[[int], int], work: Callable[[int, int], object], smaller: Callable[[int], None] = lambda size: None) -> Generator:
    """
    Yield work(start, stop) over range(n), `size` at a time (or size(start): what fits from there on). Where work is a generator, what it yields is passed
    on and what it returns is yielded. Out of memory: free, halve the chunk, tell `smaller`, say so, go on; when one item does not fit, fail with what it
    needed and what was free.
    """
    i, most = 0, n
    while i < n:
        stop = min(i + max(1, min(most, size(i) if callable(size) else size)), n)
        try:
            out = work(i, stop)
            out = (yield from out) if isinstance(out, Generator) else out
        except t.OutOfMemoryError as error:
            tec()
            if stop - i == 1:
                raise out_of_memory(error) from error
            most = (stop - i) // 2
            smaller(most)
            yield Progress(i, n, f"out of memory: {most} at a time now")
            continue
        yield out
        i = stop


def out_of_memory(error: t.OutOfMemoryError) -> UserError:
    """Torch's error in words that say what to do."""
    return UserError(f"out of memory: {first_line(error)} Shorten the prompt, use a smaller dtype or another device")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
