"""
A CPU that acts as one CUDA device, to find what breaks on a GPU without having one: `.device` of marked tensors says cuda:0, and an operation on
tensors of both kinds is the error that it would be there. Not modelled: kernels, streams, dtypes that a device lacks, memory. Main thread only.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from types import GetSetDescriptorType, SimpleNamespace

import pytest
import torch as t
import transformers
from sae_lens import SAE
from torch import Tensor
from torch.nn import parameter
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily

CUDA = t.device("cuda", 0)
WAITS = {"item", "tolist", "cpu", "__float__", "__int__", "__bool__", "__index__", "__format__", "nonzero", "masked_select", "unique", "equal", "allclose"}
SIZES_ONLY = {
    "expand_as",
    "view_as",
    "reshape_as",
    "type_as",
    "is_same_size",
    "result_type",
    "can_cast",
    "is_set_to",
    "set_",
    "_has_compatible_shallow_copy_type",
}
STRICT = {"cat", "stack", "concat", "embedding", "gather", "index_select", "scatter_", "index_add_", "matmul", "mm", "bmm", "linear"}  # no scalars of the host


def on(x: Tensor) -> bool:
    return x.__dict__.get("_pretended", False)


def tensors(x: object) -> Iterator[Tensor]:
    match x:
        case Tensor():
            yield x
        case tuple() | list():
            for y in x:
                yield from tensors(y)
        case dict():
            yield from tensors(list(x.values()))
        case slice():
            yield from tensors((x.start, x.stop, x.step))


def mark(x: object) -> object:
    for y in tensors(x):
        y._pretended = True
    return x


def is_cuda(device: object) -> bool:
    return device == 0 if isinstance(device, int) else t.device(device).type == "cuda"


def is_device(x: object) -> bool:
    return isinstance(x, t.device | str) or isinstance(x, int) and not isinstance(x, bool)


def two_devices(name: str) -> RuntimeError:
    return RuntimeError(f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! (pretended, in {name})")


def check_index(name: str, args: tuple) -> None:
    """x[index] and x[index] = value: an index may come from the host, a value only as a scalar; a tensor of the host takes neither from the device."""
    own, value = args[0], args[2] if name == "__setitem__" else None
    lists = [i for i in tensors(args[1]) if i.dim()]
    if not on(own) and any(on(i) for i in lists):
        raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu) (pretended)")
    if lists and isinstance(value, Tensor) and value.dim() and on(value) != on(own) and (on(value) or value.numel() > 1):
        raise two_devices(name)


def check_devices(name: str, args: tuple, host: list[Tensor]) -> None:
    """RuntimeError where a real device gives one, for tensors of both kinds."""
    if name in SIZES_ONLY or name == "copy_":
        return
    if name in ("__getitem__", "__setitem__"):
        check_index(name, args)
        return
    own = args[0] if args and isinstance(args[0], Tensor) else None
    in_place = name.endswith("_") and not name.endswith("__") or name.startswith("__i")
    if name in STRICT or any(x.dim() for x in host) or own is not None and not on(own) and in_place:
        raise two_devices(name)


def move(x: Tensor, name: str, args: tuple, kwargs: dict) -> Tensor:
    """x.cpu(), x.cuda(), x.to(...): the mark is the place."""
    other = next(tensors((args, kwargs)), None)
    wanted = [a for a in (*args, kwargs.get("device")) if is_device(a)]
    if any(str(a) == "meta" for a in wanted):
        return x.to(*args, **kwargs)
    if name != "to":
        to, args, kwargs = name == "cuda", (), {}
    elif other is not None:
        to, args, kwargs = on(other), (other.dtype,), {}
    else:
        to = is_cuda(wanted[0]) if wanted else on(x)
        args = tuple(a for a in args if isinstance(a, t.dtype))
        kwargs = {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")}
    out = x.to(*args, **kwargs) if args or kwargs else x
    if to == on(x):
        return mark(out) if to else out
    out = out.clone() if out.data_ptr() == x.data_ptr() else out
    out._pretended = to
    return out


class PretendedCuda(TorchFunctionMode):
    """`waits` counts what makes a GPU's host wait, by the name of the operation."""

    def __init__(self):
        super().__init__()
        self.waits: Counter = Counter()

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if isinstance(descriptor := getattr(func, "__self__", None), GetSetDescriptorType):
            return self.attribute(func, descriptor.__name__, args)
        if name == "_parse_to":
            return func(*args, **kwargs)
        if name == "get_device":
            return 0 if on(args[0]) else -1
        some = list(tensors((args, kwargs)))
        device, host = kwargs.get("device"), [x for x in some if not on(x)]
        anywhere = len(host) < len(some)
        if anywhere and (name in WAITS or name == "to" and any(is_device(a) and not is_cuda(a) for a in (*args[1:], device))):
            self.waits[name] += 1
        if name in ("to", "cuda", "cpu") and args and isinstance(args[0], Tensor):
            return move(args[0], name, args[1:], kwargs)
        if name in ("numpy", "__array__") and anywhere:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first. (pretended)")
        there = anywhere if device is None else is_cuda(device)
        if device is not None and there:
            kwargs["device"] = t.device("cpu")
        generators = [a for a in (*args, kwargs.get("generator")) if isinstance(a, t.Generator)]
        if there and generators:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu' (pretended)")
        if anywhere and host and device is None:
            check_devices(name, args, host)
        out = func(*args, **kwargs)
        return mark(out) if there and name != "tolist" else out

    def attribute(self, func: Callable, name: str, args: tuple) -> object:
        """x.device, x.T, x.grad; x.data = y."""
        if func.__name__ == "__get__" and name in ("device", "is_cuda", "is_cpu"):
            here = on(args[0])
            return {"device": CUDA if here else t.device("cpu"), "is_cuda": here, "is_cpu": not here}[name]
        out = func(*args)
        if func.__name__ == "__set__" and name == "data":
            args[0]._pretended = on(args[1])
        return mark(out) if func.__name__ == "__get__" and on(args[0]) else out


def marked_like_data(make: Callable) -> staticmethod:
    """A parameter or buffer is where its data is."""

    def new(kind: type, data: Tensor | None = None, *args, **kwargs) -> Tensor:
        out = make(kind, data, *args, **kwargs)
        if isinstance(data, Tensor) and on(data):
            out._pretended = True
        return out

    return staticmethod(new)


def plainly(method: Callable) -> classmethod:
    """A class method without the pretence: what it makes is on the host, and goes to `device` afterwards."""

    def run(kind: type, *args, device: str | None = None, **kwargs) -> object:
        with _pop_mode_temporarily():
            out = method.__func__(kind, *args, **kwargs)
        return out if device is None else out.to(device)

    return classmethod(run)


@contextlib.contextmanager
def pretended_cuda() -> Generator[PretendedCuda]:
    """One CUDA device of 80 GiB, 75 of them free, until the end of the block."""
    about = SimpleNamespace(name="pretended", total_memory=80 << 30, multi_processor_count=1, major=9, minor=0)
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_properties": about, "mem_get_info": (75 << 30, 80 << 30)}
    answers |= {"get_device_capability": (9, 0), "get_device_name": "pretended", "is_bf16_supported": True}
    answers |= dict.fromkeys(("memory_reserved", "memory_allocated", "max_memory_allocated", "max_memory_reserved"), 0)
    answers |= dict.fromkeys(("empty_cache", "synchronize", "reset_peak_memory_stats", "set_per_process_memory_fraction", "_lazy_init", "init", "set_device"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in answers.items():
            patch.setattr(t.cuda, name, lambda *args, value=value, **kwargs: value)
        for cls in (parameter.Parameter, parameter.Buffer):
            patch.setattr(cls, "__new__", marked_like_data(cls.__new__))
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # torch 2.15 and before
            patch.setattr(t.optim.Optimizer, name, lambda self: None, raising=False)
        patch.setattr(t.random, "fork_rng", contextlib.nullcontext)
        for cls, name in ((transformers.PreTrainedModel, "from_pretrained"), (SAE, "load_from_disk")):
            patch.setattr(cls, name, plainly(getattr(cls, name)))
        with PretendedCuda() as mode:
            yield mode
