"""Activations of runs, kept as long as they fit."""

from collections import OrderedDict

from torch import Tensor

from model import memory
from utils import show_bytes


class Cache:
    """Activations by (token ids, what was done to them, hook name), bounded in bytes, least recently used out first."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.items: OrderedDict[tuple, Tensor] = OrderedDict()
        self.sides: dict[tuple, object] = {}  # a few finished sides of runs, small
        memory.KEPT.add(self)

    def get(self, key: tuple) -> Tensor | None:
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: tuple, value: Tensor) -> None:
        if value.untyped_storage().nbytes() > value.nbytes:
            try:
                value = value.clone()
            except Exception as error:  # what is kept for later does not stop what is asked for now
                memory.ran_out(error)
                return
        if key in self.items:
            self.size -= self.items.pop(key).nbytes
        if value.nbytes <= self.limit:
            self.items[key] = value
            self.size += value.nbytes
        while self.size > self.limit:
            self.size -= self.items.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self.items.clear()
        self.sides.clear()
        self.size = 0

    def entries(self) -> tuple[str, ...]:
        groups: dict[tuple, list[int]] = {}
        for (ids, done, _), value in self.items.items():
            groups.setdefault((ids, done), []).append(value.nbytes)
        words = [" ".join(d[0] if isinstance(d, tuple) else d for d in done) for _, done in groups]
        return tuple(f"{tokens(ids)}, {word or 'nothing done'}: {len(n)} tensors, {show_bytes(sum(n))}" for ((ids, _), n), word in zip(groups.items(), words))


def tokens(ids: tuple) -> str:
    """How many tokens, in words; the token ids of one prompt or of several."""
    return f"{len(ids)} × {len(ids[0])} tokens" if ids and isinstance(ids[0], tuple) else f"{len(ids)} tokens"
