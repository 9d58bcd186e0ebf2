"""
What transformers and TransformerLens import by name and the first lens never uses: it is loaded when something first uses a name of it. No torch here.

No object can be an instance of a class whose module was never loaded, so `isinstance` needs no loading. What is imported after the block is the real thing.
"""

import contextlib
import importlib
import sys
import typing
from collections.abc import Generator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

LATER = ("datasets", "pandas", "scipy", "torch._dynamo", "torch.nn.attention.flex_attention", "transformers.integrations.flex_attention")
waiting: set[str] = set()  # those of LATER that are stood in for now
kernels: list[object] = []  # torch forgets them with their library


def root_of(module: str) -> str | None:
    return next((root for root in waiting if f"{module}.".startswith(f"{root}.")), None)


class Name:
    """A class or function as `from module import name` gave it: whoever calls it, reads an attribute or inherits from it gets the real one."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def _real(self) -> object:
        if root := root_of(self._module):
            drop(root)
        return getattr(importlib.import_module(self._module), self._name)

    def _loaded(self) -> bool:
        return not isinstance(sys.modules.get(self._module), Later | None)

    def __call__(self, *args: object, **kw: object) -> object:
        if root_of(self._module) == "torch._dynamo":  # a mark on a function for the compiler, which Loupe does not use
            return args[0] if callable(args[0]) else lambda marked: marked
        return self._real()(*args, **kw)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._real(), name)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value) if name in ("_module", "_name") else setattr(self._real(), name, value)

    def __instancecheck__(self, x: object) -> bool:
        return self._loaded() and isinstance(x, self._real())

    def __subclasscheck__(self, x: type) -> bool:
        return self._loaded() and issubclass(x, self._real())

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (self._real(),)

    def __or__(self, other: object) -> object:  # in an annotation
        return typing.Union[self, other]  # noqa: UP007

    def __ror__(self, other: object) -> object:
        return typing.Union[other, self]  # noqa: UP007


class Later(ModuleType):
    """A module that is not loaded. Who keeps it (`import pandas as pd`) takes names from it."""

    def __getattr__(self, name: str) -> Name:
        if name.startswith("__"):
            raise AttributeError(name)
        return Name(self.__name__, name)


class Finder:
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if root_of(name) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Later(spec.name)

    def exec_module(self, module: ModuleType) -> None: ...


def drop(root: str) -> None:
    """From now on `root` and what is in it are found where they lie."""
    waiting.discard(root)
    for name in [n for n, m in sys.modules.items() if isinstance(m, Later) and f"{n}.".startswith(f"{root}.")]:
        parent, _, last = name.rpartition(".")
        if vars(sys.modules.get(parent, sys)).get(last) is sys.modules[name]:
            delattr(sys.modules[parent], last)
        del sys.modules[name]


@contextlib.contextmanager
def later() -> Generator[None]:
    """What is imported in here gets stand-ins for those of LATER that are not loaded yet."""
    waiting.update(name for name in LATER if name not in sys.modules)
    sys.meta_path.insert(0, finder := Finder())
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for root in list(waiting):
            drop(root)


def import_transformers() -> None:
    """
    Transformers as one process needs it: no tensors spread over processes; no random numbers for tensors that have no values (torch loads sympy for them); and the
    list of its models, which it makes from the source of every one, made once instead of twice.
    """
    import torch
    import transformers
    from transformers.utils import import_utils

    kernels.append(meta := torch.library.Library("aten", "IMPL", "Meta"))
    for name in ("normal_", "uniform_"):
        meta.impl(name, lambda tensor, *args, **kw: tensor, allow_override=True)
    alone = import_utils.is_torch_distributed_available
    alone.cache_clear()
    there, torch.distributed.is_available = torch.distributed.is_available, lambda: False
    alone()  # which keeps the answer
    torch.distributed.is_available = there
    scan, models = import_utils.create_import_structure_from_path, Path(transformers.__file__).parent / "models"
    import_utils.create_import_structure_from_path = lambda path: scan(models if path == str(models / "__init__.py") else path)
