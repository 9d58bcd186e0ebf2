"""The noise floor against the true error: the same sweep in float32, from another engine; and how cells below the floor are drawn."""

import math
from dataclasses import replace

import numpy as np
import pytest

from conftest import PROMPT
from engine import Engine
from techniques.circuits.requests import Score
from techniques.identities.requests import Identities
from techniques.output.requests import Run
from techniques.patching.pictures import sweep_grid
from techniques.patching.requests import Estimate, Sweep
from screen.maps import Density, legend
from screen.pictures import sweep_cell
from vocabulary.circuit import Circuit
from vocabulary.nodes import parse_intervention
from vocabulary.prompts import Metric, Study, read_prompt_set
from vocabulary.requests import Load
from utils import ROOT
from widgets import GridView

SWEEPS = (("z", "patch", "denoise"), ("resid_pre", "patch", "noise"), ("nodes", "zero", "noise"))
DO = parse_intervention("L1H1=zero")
DTYPES = ("bfloat16", "float16")


@pytest.fixture(scope="module")
def halves(folders):
    """Engines in half precision, by (architecture, dtype)."""

    class Halves(dict):
        def __missing__(self, key: tuple[str, str]) -> Engine:
            self[key] = Engine(Load("zoo" if key[0] == "zoo" else str(folders[key[0]]), dtype=key[1]))
            return self[key]

    return Halves()


def errors(exact: Engine, half: Engine, ask: Sweep) -> tuple:
    """The sweep in half precision, its effects and their distance to float32 [cell], cells that nothing reaches left out."""
    one, two = exact.run(ask), half.run(ask)
    effect = (two.values - np.float32(two.base)).ravel()
    error = np.abs(effect - (one.values - np.float32(one.base)).ravel())
    some = np.isfinite(effect) & (effect != 0)
    return two, effect[some], error[some]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_floor_is_of_the_size_of_the_true_error(engine, arch, halves, dtype):
    """Of 95 % of a sweep's cells the distance to float32 is within a factor of 4 of the floor, and what is not called noise really is above its error."""
    above, wrong, far = 0, 0, []
    for kind, op, direction in SWEEPS:
        found, effect, error = errors(engine, halves[arch, dtype], Sweep(Study(PROMPT), kind, op, direction))
        far.append(np.quantile(error, 0.95))
        assert (found.noise.sum() == (np.abs(effect) < found.floor).sum()) and found.floor > 0
        above += (np.abs(effect) >= found.floor).sum()
        wrong += ((np.abs(effect) >= found.floor) & (error > np.abs(effect))).sum()
    assert found.floor / 4 < max(far) < 4 * found.floor
    assert above >= 10 and wrong <= 0.05 * above


def test_in_float32_the_floor_is_tiny_and_remembered(engine):
    study = Study(PROMPT)
    found = engine.run(Sweep(study, "z"))
    assert 1e-8 < found.floor < 2e-4 and not found.noise[np.abs(found.values - np.float32(found.base)) > 1e-3].any()
    known = dict(engine.model.notes.noise)
    assert engine.run(Sweep(study, "resid_pre")).floor == found.floor and engine.model.notes.noise == known
    assert math.isnan(engine.run(Estimate(study, "z")).floor) and math.isnan(engine.run(Run(replace(study, interventions=(DO,)))).floor)


@pytest.mark.parametrize("metric", ("prob", "logprob", "kl", "loss", "rank", "prob_diff"))
def test_every_metric_has_a_floor(halves, metric):
    found = halves["gemma2", "bfloat16"].run(Sweep(Study(PROMPT, metric=Metric(metric)), "z"))
    assert math.isfinite(found.floor) and (found.floor > 0 or metric == "rank")


def test_over_a_set_the_floor_is_that_of_the_mean(engines, halves):
    prompts = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:16]
    found, effect, error = errors(engines["zoo"], halves["zoo", "bfloat16"], Sweep(Study(prompts[0], prompt_set=prompts), "z", over_set=True))
    assert found.floor / 4 < np.quantile(error, 0.95) < 4 * found.floor
    one = halves["zoo", "bfloat16"].run(Sweep(Study(prompts[0]), "z"))
    assert found.floor < one.floor


def test_run_score_and_check_say_it(halves):
    half = halves["zoo", "bfloat16"]
    assert math.isnan(half.run(Run(Study(PROMPT))).floor)
    small, large = (half.run(Run(Study(PROMPT, (parse_intervention(i),)))) for i in ("L2H1=scale:1.01", "L3H3=patch"))
    assert small.floor == large.floor > 0.02 and abs(large.change) > 1 and not large.noise
    assert small.noise == (0 < abs(small.change) < small.floor)
    score = half.run(Score(Study(PROMPT), Circuit("c", "zoo", ("L3H3", "L2H1")), ("faithfulness", "effects"), "patch"))
    assert half.run(Estimate(Study(PROMPT), "z")).floor == small.floor
    assert score.floor == small.floor and not score.noise(0) and score.noise(1) == (0 < abs(score.effects[1]) < score.floor)
    row = next(r for r in half.run(Identities(Study(PROMPT))).rows if r.name == "noise floor of the metric")
    assert row.error == score.floor and row.ok is None


def test_cells_below_the_floor_are_drawn_as_noise(halves):
    found = halves["zoo", "bfloat16"].run(Sweep(Study(PROMPT), "z"))
    grid = sweep_grid(found, None, "effect")
    assert grid.noise and grid.noise == {(int(r), int(c)) for r, c in np.argwhere(found.noise)}
    assert legend(grid, "colour")[-1][0] == f" ~ noise < {found.floor:.2g}"
    assert grid.tsv().startswith(f"noise floor {found.floor:.2g}\t")
    row, col = min(grid.noise)
    assert "~ below the noise floor" in "".join(text for text, _ in sweep_cell(found, None, row, col))
    view = GridView()
    view.grid, view.density = grid, Density("number", 7)
    for mode, mark in (("colour", " ~"), ("number", "~")):
        view.mode = mode
        assert view.cell_text(row, col, 3, float(grid.values[row, col]), 7).startswith(mark)
    assert not sweep_grid(found, None, "p").noise
