"""p by sign flips against scipy's permutation test and numpy's brute force, Holm's correction, and how small a p a table can hold."""

import itertools

import numpy as np
import pytest
from scipy import stats

from conftest import PROMPT
from screen.pictures import sweep_cell
from techniques.patching.command import show_sweep
from techniques.patching.pictures import sweep_grid
from techniques.patching.requests import Sweep
from utils import ROOT
from vocabulary import statistics
from vocabulary.prompts import Study, read_prompt_set
from vocabulary.statistics import holm, paired_effects, sign_flips, smallest_p


def effects(n: int, cells: int, shift: float = 0.4) -> np.ndarray:
    """[prompt, cell] of growing size, the first without any."""
    return np.random.default_rng(n).normal(size=(n, cells)) + shift * np.arange(cells) / 2


@pytest.mark.parametrize("n", (2, 5, 8, 13))
def test_few_prompts_are_exact(n):
    x = effects(n, 6)
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    brute = (np.abs(signs @ x) >= np.abs(x.sum(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(sign_flips(x, 0), brute, atol=1e-12)
    if n < 13:
        by_scipy = [stats.permutation_test((c,), np.mean, permutation_type="samples", alternative="two-sided", n_resamples=np.inf).pvalue for c in x.T]
        np.testing.assert_allclose(sign_flips(x, 0), by_scipy, atol=1e-12)
    assert smallest_p(n, 6) == 2.0 ** (1 - n) and sign_flips(np.ones((n, 1)), 0)[0] == smallest_p(n, 1)


def test_many_prompts_are_drawn_with_the_seed():
    x = effects(40, 8, 0.15)
    p = sign_flips(x, 3)
    np.testing.assert_array_equal(p, sign_flips(x, 3))
    by_scipy = np.array(
        [stats.permutation_test((c,), np.mean, permutation_type="samples", n_resamples=20_000, rng=np.random.default_rng(1)).pvalue for c in x.T]
    )
    assert np.all(np.abs(p - by_scipy) < 0.02 + 0.3 * by_scipy)
    assert sign_flips(np.zeros((40, 1)), 0)[0] == 1 and np.isnan(sign_flips(np.full((40, 1), np.nan), 0)[0])


@pytest.mark.parametrize("n, cells", ((32, 270), (16, 270), (20, 3000)))
def test_a_head_can_be_significant_in_any_table_of_many_prompts(n, cells):
    """The fault: 1/4097 was the smallest p, 270 times that is above .05. One real effect among pure noise is found, and its p is the table's smallest."""
    x = np.random.default_rng(0).normal(size=(n, cells))
    x[:, 5] = 3 + 0.1 * np.arange(n)
    out = paired_effects(x, np.zeros(n), 0)
    assert smallest_p(n, cells) * cells < 0.05 and out["p"][5] == pytest.approx(smallest_p(n, cells)) and out["holm"][5] < 0.05
    assert (out["holm"] < 0.05).sum() == 1 and (out["p"] < 0.05).sum() > 1


def test_cells_whose_p_is_known_take_no_more_flips(monkeypatch):
    x = effects(30, 200, 0.02)
    want = sign_flips(x, 0)
    monkeypatch.setattr(statistics, "ENOUGH", np.inf)
    every = sign_flips(x, 0)
    assert np.all(np.abs(want - every) < 0.01 + 0.5 * every)


def test_the_rounding_of_float32_is_no_effect():
    rng = np.random.default_rng(0)
    base = 8 + rng.normal(size=12)
    rounded = base * (1 + 1e-7 * np.abs(rng.normal(size=12)))  # one device's sums, all a little larger than the other's
    small = base + 1e-3 * np.abs(rng.normal(size=12))
    assert paired_effects(np.stack([rounded, small], 1), base, 0)["p"].tolist() == [1.0, 2.0**-11]
    unlikely = 1e-6 * np.abs(rng.normal(size=12))  # probabilities: their own size counts, not one
    assert paired_effects(1.5 * unlikely[:, None], unlikely, 0)["p"].tolist() == [2.0**-11]


def test_holm_by_hand_and_by_brute_force():
    np.testing.assert_allclose(holm(np.array([0.01, 0.04, np.nan, 0.03, 0.005])), [0.03, 0.06, np.nan, 0.06, 0.02])
    p = np.random.default_rng(0).random(50) ** 3
    order = np.argsort(p)
    adjusted = [min(1, max((50 - j) * p[order[j]] for j in range(i + 1))) for i in range(50)]
    np.testing.assert_allclose(holm(p)[order], adjusted)


def test_the_corrected_p_is_in_results_lines_marks_and_tables(engines, capsys):
    from rich.console import Console

    prompts = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")
    got = engines["zoo"].run(Sweep(Study(prompts[0], prompt_set=prompts), "z", over_set=True))
    np.testing.assert_allclose(got.holm.ravel(), holm(got.p.ravel().astype(float)), atol=1e-6)
    assert got.holm[3, 3] < 0.05 and "no p below" not in got.warning and "corrected by Holm for 16 cells" in got.convention
    assert sweep_grid(got, None, "p").marks == {(int(r), int(c)) for r, c in np.argwhere(got.holm < 0.05)}
    np.testing.assert_array_equal(sweep_grid(got, None, "corrected p").numbers, got.holm.astype(float))
    assert ", corrected " in "".join(text for text, _ in sweep_cell(got, None, 3, 3))
    show_sweep(Console(width=300), got)
    assert "corrected p" in capsys.readouterr().out
    few = engines["zoo"].run(Sweep(Study(prompts[0], prompt_set=prompts[:5]), "z", over_set=True))
    assert "5 prompts give no p below 0.062, so that none of 16 cells can have a corrected p below .05" in few.warning
    assert not engines["zoo"].run(Sweep(Study(PROMPT), "z")).holm.size
