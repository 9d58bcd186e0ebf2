"""Work in pieces that fit into memory."""

from collections.abc import Callable, Generator

import torch as t

from utils import tec
from vocabulary.nodes import UserError
from vocabulary.requests import Progress


def in_chunks(n: int, size: int, work: Callable[[int, int], object]) -> Generator:
    """
    Yield work(start, stop) over range(n), `size` at a time. Out of memory: free, halve the chunk, say so, go on;
    when one item does not fit, fail with what it needed and what was free.
    """
    i, size = 0, max(1, min(size, n))
    while i < n:
        try:
            out = work(i, min(i + size, n))
        except t.OutOfMemoryError as error:
            tec()
            if size == 1:
                raise out_of_memory(error) from error
            size //= 2
            yield Progress(i, n, f"out of memory: {size} at a time now")
            continue
        yield out
        i += size


def out_of_memory(error: t.OutOfMemoryError) -> UserError:
    return UserError(f"out of memory: {first_line(error)} Shorten the prompt, use a smaller dtype or another device")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
