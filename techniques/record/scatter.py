"""A replay in parts: some results of a session each. They are independent, each on its own model; a task makes the directions that its own ones need first."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from techniques.record.replay import name_of, notebook, one, read_results, write_step, write_summary
from techniques.record.requests import Replay, ReplayResult
from vocabulary.files import write_text
from vocabulary.nodes import UserError
from vocabulary.parts import Scattered
from vocabulary.requests import Load, ModelInfo
from vocabulary.results import Result

SEVERAL = ModelInfo("", "", 0, 0, 0, 0, 0, 0, 0, 0, 0, "", "", "", "", False, 0.0, "", False, 0.0)  # each step names its own model


@lru_cache(2)
def results_of(session: bytes, name: str) -> tuple[list[Result], list[dict], list[str]]:
    return read_results(session, Path(name))


def check(ask: Replay) -> None:
    results_of(ask.session, ask.name)
    if wrong := set(ask.change) - set(vars(Load())):
        raise UserError(f"{min(wrong)} is nothing that a model is loaded with")


def run(engine, ask: Replay, show: Callable[[object], None], part: Path) -> ReplayResult:
    """The steps of one part. Where one steers, the directions that earlier steps make are made first: their names say what they hold, so that none takes another's place."""
    results, _, wrong = results_of(ask.session, ask.name)
    start, stop = ask.part
    if ask.train and any(i.op == "steer" for r in results[start:stop] for i in getattr(getattr(r.request, "study", None), "interventions", ())):
        for number, result in enumerate(results[:start], 1):
            if result.kind == "MakeDirection" and not isinstance(result.request, dict):
                one(engine, number, replace(result, request=replace(result.request, out="")), part.parent, ask.change, True, show)
    steps = tuple(one(engine, n + 1, results[n], part.parent, ask.change, ask.train, show) for n in range(start, stop))
    return ReplayResult(ask.name, steps, len(results), tuple(wrong), ask.strict)


def join(ask: Replay, parts: Sequence[ReplayResult], info: ModelInfo) -> ReplayResult:
    return replace(parts[0], steps=tuple(replace(s, frames=s.frames[:0]) for r in parts for s in r.steps))


def write(ask: Replay, result: ReplayResult, parts: Iterable[ReplayResult], folder: Path) -> ReplayResult:
    """What a replay on one machine writes, in this folder."""
    results, notes, _ = results_of(ask.session, ask.name)
    steps = [s for r in parts for s in r.steps]
    for step in steps:
        write_step(step, results[step.number - 1], folder)
    write_summary(steps, folder)
    write_text(folder / "session.ipynb", notebook(name_of(ask.session) or Path(ask.name).stem, results, steps, notes))
    return replace(result, out=str(folder))


SCATTERED = {
    Replay: Scattered(
        check,
        join,
        write=write,
        size=lambda ask: len(results_of(ask.session, ask.name)[0]),
        cut=lambda ask, start, stop: replace(ask, part=(start, stop)),
        unit="steps",
        load=lambda engine, model, show: SEVERAL,
        run=run,
    )
}
