"""Fits in parts: a Jacobian lens is a mean over prompts; a tuned lens runs as one task."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from techniques.lens.requests import FitJacobian, FitJacobianResult, TuneLens
from vocabulary.parts import Scattered, one_fit
from vocabulary.requests import ModelInfo
from vocabulary.wire import door

BESIDE = ".safetensors"


def run(engine, ask: FitJacobian, show: Callable[[object], None], part: Path) -> FitJacobianResult:
    return engine.run(replace(ask, out=str(part.with_suffix(BESIDE))), show)


def join(ask: FitJacobian, parts: Sequence[FitJacobianResult], info: ModelInfo) -> FitJacobianResult:
    """Without its matrices, which `write` joins."""
    first, n = parts[0], sum(r.prompts for r in parts)
    words = first.convention.replace(f"mean over {first.prompts} prompts", f"mean over {n} prompts", 1)
    return replace(first, file="", prompts=n, change=float("nan"), seconds=sum(r.seconds for r in parts), convention=words)


def write(ask: FitJacobian, result: FitJacobianResult, parts: Iterable[FitJacobianResult], folder: Path) -> FitJacobianResult:
    """The lens, in the folder."""
    out = folder / "jacobian_lens.pt"
    n, change = door(FitJacobian).merge((folder / Path(r.file).name for r in parts), out)
    assert n == result.prompts, f"the parts' files are of {n} prompts, their results of {result.prompts}"
    return replace(result, file=str(out), change=change)


SCATTERED = {
    FitJacobian: Scattered(
        lambda ask: None,
        join,
        write=write,
        size=lambda ask: ask.prompts,
        cut=lambda ask, start, stop: replace(ask, part=(start, stop)),
        run=run,
        beside=BESIDE,
    ),
    TuneLens: one_fit("tuned_lens", "each step of a fit depends on the one before"),
}
