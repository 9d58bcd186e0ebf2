"""
A second model beside the first (a fine-tune beside its base): its shape and tokens are the first one's, and equal tensors are held once.

The pair is kept on both models (`Model.pair`); which of them makes a run says `Runs.of` (runs.py).
"""

from collections.abc import Generator, Iterator
from dataclasses import replace

import torch as t
from torch import Tensor

from model import loading
from model.bridge import Model
from utils import show_bytes, two_names
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Progress

LAST = 65536  # numbers that are compared at once before the whole tensor is
SHAPE = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "d_vocab")


def load_beside(first: Model, ask: Load, cache_mb: int) -> Generator[Progress, None, Model]:
    """
    The model `ask.against`, in the first one's dtype and on its device, with equal tensors shared. UserError for another shape or tokenizer; OutOfMemory
    (by how much) where it does not fit beside the first.
    """
    name = str(first.dtype).removeprefix("torch.")
    second = yield from loading.load(
        replace(ask, model=ask.against, base=None, against="", scale=1.0 if first.adapter else ask.scale, dtype=name, device=str(first.device)), cache_mb
    )
    check_shape(first, second)
    shared, own = share(first, second)
    names = two_names(first.info.name, second.info.name)
    words = f"{names[1]} is beside it: {show_bytes(shared)} of its weights are shared, it takes {show_bytes(own)} more"
    first.info = replace(first.info, against=second.info.name, beside=words)
    first.pair = second.pair = (first, second)
    call(first)
    forget(first)
    return second


def call(model: Model) -> None:
    """Say on each of a pair what both are called, with an adapter's scale."""
    infos = [m.info for m in model.pair]
    names = tuple(name + info.scaled for name, info in zip(two_names(*(i.name for i in infos)), infos))
    for m in model.pair:
        m.info = replace(m.info, names=names, beside_scale=infos[1].scale)


def part(first: Model) -> None:
    """Go on with the first model alone."""
    if first.pair:
        first.info, first.pair = replace(first.info, against="", beside="", names=(), beside_scale=None), None
        forget(first)


def rescale(model: Model, scale: float) -> None:
    """Let so much of an adapter's change count, of the first model's if it is one, else of the second's. Nothing computed before is read again."""
    found = next((m for m in model.pair or (model,) if m.adapter), None)
    if found is None:
        raise UserError(f"{model.info.name} is no adapter, and has no scale: give a folder with adapter_config.json")
    if found.adapter.scale != scale:
        found.adapter.apply(scale)
        found.info = replace(found.info, scale=scale)
        if model.pair:
            call(model)
        for kept in (found.notes.measured, found.notes.trials, found.notes.calls, found.notes.slow):
            kept.clear()
        forget(model)


def copied(model: Model) -> bool:
    """Whether an adapter's model computes with copies of its matrices (fused ones, which TransformerLens splits), so that another scale has to be read anew."""
    found = next((m for m in model.pair or (model,) if m.adapter), None)
    if found is None:
        return False
    places = found.adapter.places.union(x.untyped_storage().data_ptr() for m in model.pair or () if m is not found for x in m.bridge.parameters())  # shared
    return any(x.untyped_storage().data_ptr() not in places for x in found.bridge.parameters())


def forget(model: Model) -> None:
    """Nothing computed before is read again, of either model."""
    for one in model.pair or (model,):
        one.cache.clear()
        one.notes.estimate = one.notes.members = None
        one.notes.noise.clear()


def check_shape(first: Model, second: Model) -> None:
    """UserError where the second model is not of the first one's architecture and shape, or its tokenizer reads texts as other tokens."""
    a, b = first.info, second.info
    if a.architecture != b.architecture:
        raise UserError(f"{b.name} is a {b.architecture} and {a.name} a {a.architecture}: two models are compared only where they are of one architecture")
    if unlike := [f"{f} {getattr(b, f)} (not {getattr(a, f)})" for f in SHAPE if getattr(a, f) != getattr(b, f)]:
        raise UserError(f"{b.name} has another shape than {a.name}: {', '.join(unlike)}")
    mine, theirs = ({n: tuple(p.shape) for n, p in m.bridge.original_model.named_parameters()} for m in (first, second))
    if unlike := [n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)]:
        raise UserError(f"{b.name} has other weights than {a.name} (first: {min(unlike)}): two models are compared only where they are of one shape")


# ------------------------------------------------------------------ equal tensors, held once


def tensors(model: Model) -> Iterator[Tensor]:
    """Every parameter and buffer of a model and of the Bridge's modules around it, also those that are views of another's storage."""
    for module in model.bridge.modules():
        yield from (p for p in (*module._parameters.values(), *module._buffers.values()) if p is not None)


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in storages of the same bytes, in the same way; what differs early is seen early."""
    where = lambda x: (x.dtype, x.device, x.shape, x.stride(), x.storage_offset(), x.untyped_storage().nbytes())  # noqa: E731
    if where(a) != where(b):
        return False
    a, b = (t.empty(0, dtype=t.uint8, device=x.device).set_(x.untyped_storage()) for x in (a, b))
    return t.equal(a[:LAST], b[:LAST]) and t.equal(a, b)


@t.no_grad()
def share(first: Model, second: Model) -> tuple[int, int]:
    """Let the second model read the first one's storages where the bytes are equal: bytes that are shared, and that are its own."""
    mine, shared, own = dict(first.bridge.original_model.named_parameters()), {}, {}
    changing = second.adapter.storages if second.adapter else set()
    fixed = first.adapter.storages if first.adapter else set()
    for name, p in second.bridge.original_model.named_parameters():
        storage = p.untyped_storage()
        if storage.data_ptr() in changing:
            own[storage.data_ptr()] = storage
            continue
        if storage.data_ptr() in shared or storage.data_ptr() in own:
            continue
        if mine[name].untyped_storage().data_ptr() not in fixed and alike(mine[name], p):
            shared[storage.data_ptr()] = mine[name].untyped_storage()
        else:
            own[storage.data_ptr()] = storage
    views = [x for x in tensors(second) if x.untyped_storage().data_ptr() in shared]
    for x in {id(x): x for x in views}.values():
        storage = shared.get(x.untyped_storage().data_ptr())
        if storage is not None:
            x.data = t.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.size(), x.stride())
    return sum(s.nbytes() for s in shared.values()), sum(s.nbytes() for s in own.values())
