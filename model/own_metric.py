"""Metrics of the user's own: functions `name(logits, tokens) -> value` of a Python file that the user named. Its code runs in this process; errors become one line with theirs."""

import hashlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch as t
from torch import Tensor

from model.memory import first_line, is_out_of_memory
from utils import settings
from vocabulary.nodes import UserError
from vocabulary.prompts import Metric
from vocabulary.typed import read_text, user_path


@dataclass(frozen=True)
class OwnMetric:
    """One function of a file, whose first eight digits of sha256 are `digest`."""

    file: Path
    name: str
    digest: str
    fn: Callable

    def __call__(self, logits: Tensor, ids: tuple[int, ...]) -> Tensor:
        """The metric, a scalar, of a run's logits [position, vocab] (float32); gradients pass where the function lets them."""
        try:
            value = self.fn(logits[None], t.tensor([ids], device=logits.device))
        except (Exception, SystemExit) as error:
            if is_out_of_memory(error):
                raise
            raise UserError(where(self.file, error)) from error
        value = value if isinstance(value, Tensor) else t.as_tensor(value, dtype=t.float64) if isinstance(value, int | float) else None
        if value is None or value.numel() != 1:
            shape = "no number" if value is None else f"a tensor of shape {list(value.shape)}"
            raise UserError(f"{self.file.name}: {self.name} returns {shape}; a metric is one number, such as logits[0, -1, 3] - logits[0, -1, 5]")
        return value.reshape(())

    def gradient(self, logits: Tensor, ids: tuple[int, ...]) -> Tensor:
        """The metric's value where a gradient is needed. UserError where none passes."""
        value = self(logits, ids)
        if not value.requires_grad:
            raise UserError(f"{self.name} of {self.file.name} has no gradient (it leaves torch, or picks by rank): estimates need one; run the sweep itself")
        return value


def where(file: Path, error: BaseException) -> str:
    """An error of the file in one line, with the line it comes from."""
    if isinstance(error, SyntaxError):
        return f"{file.name} line {error.lineno}: {error.msg}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
    return f"{file.name} line {lines[-1] if lines else '?'}: {type(error).__name__}: {first_line(error)}"


def read(metric: Metric) -> OwnMetric:
    """The function that a metric names as FILE.py:NAME (or NAME alone, of LOUPE_METRICS). UserError for what can't be run, or for a file that has changed."""
    file, _, name = metric.own.rpartition(":")
    file = file or settings().get("LOUPE_METRICS", "").strip()
    if not file or not name:
        raise UserError("name a metric of your own as FILE.py:NAME, or NAME of the file that LOUPE_METRICS in .env names")
    path = user_path(file).resolve()
    if not path.is_file():
        raise UserError(f"there is no file {path}: a metric of your own is named as FILE.py:NAME")
    text = read_text(path)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    if metric.digest and metric.digest != digest:
        raise UserError(f"{path.name} has changed since this metric was chosen ({metric.digest}, now {digest}): choose it again with m")
    found = functions(path, text)
    if name not in found:
        raise UserError(f"{path.name} has no function {name!r}: it has {', '.join(found) or 'none'}")
    return OwnMetric(path, name, digest, found[name])


@lru_cache(8)
def functions(path: Path, text: str) -> dict[str, Callable]:
    """The public functions that a file defines. It is run once as long as its text is the same."""
    space: dict[str, object] = {"__name__": "loupe_metrics", "__file__": str(path)}
    try:
        exec(compile(text, str(path), "exec"), space)
    except (Exception, SystemExit) as error:
        raise UserError(where(path, error)) from error
    return {n: f for n, f in space.items() if callable(f) and not n.startswith("_") and getattr(f, "__module__", "") == "loupe_metrics"}
