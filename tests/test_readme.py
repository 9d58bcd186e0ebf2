"""What the README tells a stranger is what they will see: the tour's numbers, the Python example, the commands."""

import contextlib
import io
import re

import numpy as np

import pytest

from techniques.attention.requests import HeadStats
from techniques.attribution.requests import Attribution
from techniques.circuits.requests import Discover, PathPatch, Score
from techniques.features.requests import Features
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from vocabulary.circuit import Circuit
from vocabulary.nodes import parse_intervention
from vocabulary.prompts import read_prompt_set, Study
from utils import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
SET = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")


@pytest.mark.parametrize(
    "done, shown",
    [
        ("", "now +8.836"),
        ("L1H0=zero", "*rises* to +10.444"),
        ("L3H3=zero", "`L3H3`: +2.944"),
        ("L3H3=zero L3H2=zero", "too: -1.655"),
        ("L3H3=patch", "`L3H3` gives +0.515"),
        ("L3H3=patch L3H2=patch", "-4.247, normalised -0.006"),
        ("L0H3@S2=patch", "gives +1.503"),
    ],
)
def test_the_tours_logit_differences(engines, done, shown):
    assert shown in README
    run = engines["zoo"].run(Run(Study(SET[0], tuple(parse_intervention(d) for d in done.split()))))
    numbers = [float(x) for x in re.findall(r"[+-]\d+\.\d+", shown)]
    assert numbers[0] == pytest.approx(run.now.metric, abs=6e-4)
    if len(numbers) == 2:
        assert numbers[1] == pytest.approx(run.normalised, abs=6e-4)


def test_the_tours_readings(engines):
    zoo, study = engines["zoo"], Study(SET[0])
    corrupt = zoo.run(Run(study)).corrupt.metric
    assert f"corrupted {corrupt:+.3f}" in README
    lens = zoo.run(Lens(study))
    tops = {p: [(lens.texts[int(i)], float(q)) for i, q in zip(lens.top_ids[r, -1], lens.top_probs[r, -1])] for r, p in enumerate(lens.points)}
    assert tops["L2.resid_mid"][0][0] == " John" and [t for t, _ in tops["L2.resid_post"][:2]] == [" Mary", " John"]
    assert f"({tops['L2.resid_post'][0][1]:.2f} to {tops['L2.resid_post'][1][1]:.2f})" in README
    assert tops["L3.resid_post"][0] == (" Mary", pytest.approx(0.998, abs=6e-4))
    pair = zoo.run(HeadStats(study, pair=(14, 2))).stats["pair"]
    for (layer, head), text in (((1, 0), ".97"), ((1, 3), ".93"), ((2, 3), ".52")):
        assert f"{pair[layer, head]:.2f}"[1:] == text and f"`L{layer}H{head}` {text}" in README
    direct = zoo.run(Attribution(study))
    assert f"`L3H2` {direct.cells.heads[3, 2]:+.3f} and `L3H3` {direct.cells.heads[3, 3]:+.3f}" in README and f"{direct.total:+.4f}" in README


def test_the_tours_sweep(engines):
    zoo, study = engines["zoo"], Study(SET[0])
    effect = zoo.run(Sweep(study, "z", "patch", "noise")).normalised - 1
    for layer, head in ((3, 3), (3, 2), (0, 1), (0, 3)):
        assert f"`L{layer}H{head}` {effect[layer, head]:+.3f}" in README
        effect[layer, head] = 0
    assert abs(effect).max() < 0.05


def test_the_tours_circuit(engines):
    zoo, study = engines["zoo"], Study(SET[0], prompt_set=SET)
    score = lambda *nodes: zoo.run(Score(study, Circuit("c", "zoo", nodes), ("faithfulness", "effects"), "patch"))  # noqa: E731
    assert f"faithfulness {score('L3H2', 'L3H3').faithfulness.mean:.3f}. The" in README
    four = score("L0H1", "L0H3", "L3H2", "L3H3")
    f = four.faithfulness
    assert f"{f.mean:.3f} (95 % {f.low:.3f} to {f.high:.3f})" in README and f"of {four.model.mean:.3f} logits" in README
    assert (four.effects < -6.5).all() and (four.effects > -7.1).all()
    change = lambda r: r.normalised - (r.base - r.corrupt) / (r.clean - r.corrupt)  # noqa: E731
    values = change(zoo.run(PathPatch(study, (), ("L3H2.v", "L3H3.v"), over_set=True)))
    assert f"`L0H1` {values[1, 1]:+.3f}, `L0H3` {values[1, 3]:+.3f} and" in README and f"`L2.mlp` {values[3, 4]:+.3f} matter" in README
    keys = change(zoo.run(PathPatch(study, (), ("L3H2.k", "L3H3.k"), over_set=True)))
    assert f"at most {np.nanmax(np.abs(keys)):.3f}" in README
    found = zoo.run(Discover(study, "eap-ig", edges=40))
    assert f"{len(found.circuit.edges)} edges among {len(found.circuit.nodes)} nodes, faithfulness {found.score:.3f}" in README


def test_the_tours_features(engines):
    found = engines["zoo"].run(Features(Study(SET[0]), "zoo/L2.resid_post", pos=14, order="attribution"))
    first, second = zip(found.index[:2].tolist(), found.attribution[:2].tolist())
    assert f"`f{first[0]}` {first[1]:+.3f} leads, then `f{second[0]}` {second[1]:+.3f}" in README
    carry = engines["zoo"].run(Discover(Study(SET[0], prompt_set=SET, saes=("zoo/L2.resid_post",)), "features", nodes=30))
    assert f"{len(carry.circuit.nodes)} of 768, faithfulness {carry.score:.3f}" in README


def test_the_python_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().strip() == "L3.resid_post  Paris" and "# L3.resid_post  Paris" in code


def test_every_file_it_names_exists():
    for name in re.findall(r"`(\w+\.(?:py|svg))`", README):
        assert (ROOT / name).exists(), name
    table = README[README.index("| file |") :]
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in table, f"{path.name} is not in the README's table of rooms"
