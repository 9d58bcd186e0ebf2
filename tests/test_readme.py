"""What README and docs tell a stranger is what they will see: the tour's numbers, the examples, the commands, the files."""

import contextlib
import io
import re
import shlex
import textwrap

import numpy as np
import pytest
from conftest import PROMPT
from reference import log_softmax

import engine as program
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
from techniques import shell
from screen.early import parser
from tui import PANES
from utils import ROOT

PAGES = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
README, TOUR = PAGES["README.md"], PAGES["docs/tour.md"]
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
    assert shown in TOUR
    run = engines["zoo"].run(Run(Study(SET[0], tuple(parse_intervention(d) for d in done.split()))))
    numbers = [float(x) for x in re.findall(r"[+-]\d+\.\d+", shown)]
    assert numbers[0] == pytest.approx(run.now.metric, abs=6e-4)
    if len(numbers) == 2:
        assert numbers[1] == pytest.approx(run.normalised, abs=6e-4)


def test_the_tours_readings(engines):
    zoo, study = engines["zoo"], Study(SET[0])
    corrupt = zoo.run(Run(study)).corrupt.metric
    assert f"corrupted {corrupt:+.3f}" in TOUR
    lens = zoo.run(Lens(study))
    tops = {p: [(lens.texts[int(i)], float(q)) for i, q in zip(lens.top_ids[r, -1], lens.top_probs[r, -1])] for r, p in enumerate(lens.points)}
    assert tops["L2.resid_mid"][0][0] == " John" and [t for t, _ in tops["L2.resid_post"][:2]] == [" Mary", " John"]
    assert f"({tops['L2.resid_post'][0][1]:.2f} to {tops['L2.resid_post'][1][1]:.2f})" in TOUR
    assert tops["L3.resid_post"][0] == (" Mary", pytest.approx(0.998, abs=6e-4))
    pair = zoo.run(HeadStats(study, pair=(14, 2))).stats["pair"]
    for (layer, head), text in (((1, 0), ".97"), ((1, 3), ".93"), ((2, 3), ".52")):
        assert f"{pair[layer, head]:.2f}"[1:] == text and f"`L{layer}H{head}` {text}" in TOUR
    direct = zoo.run(Attribution(study))
    assert f"`L3H2` {direct.cells.heads[3, 2]:+.3f} and `L3H3` {direct.cells.heads[3, 3]:+.3f}" in TOUR and f"{direct.total:+.4f}" in TOUR


def test_the_tours_sweep(engines):
    zoo, study = engines["zoo"], Study(SET[0])
    effect = zoo.run(Sweep(study, "z", "patch", "noise")).normalised - 1
    for layer, head in ((3, 3), (3, 2), (0, 1), (0, 3)):
        assert f"`L{layer}H{head}` {effect[layer, head]:+.3f}" in TOUR
        effect[layer, head] = 0
    assert abs(effect).max() < 0.05


@pytest.mark.slow
def test_the_tours_circuit(engines):
    zoo, study = engines["zoo"], Study(SET[0], prompt_set=SET)
    score = lambda *nodes: zoo.run(Score(study, Circuit("c", "zoo", nodes), ("faithfulness", "effects"), "patch"))  # noqa: E731
    assert f"faithfulness {score('L3H2', 'L3H3').faithfulness.mean:.3f}. The" in TOUR
    four = score("L0H1", "L0H3", "L3H2", "L3H3")
    f = four.faithfulness
    assert f"{f.mean:.3f} (95 % {f.low:.3f} to {f.high:.3f})" in TOUR and f"of {four.model.mean:.3f} logits" in TOUR
    assert (four.effects < -6.5).all() and (four.effects > -7.1).all()
    change = lambda r: r.normalised - (r.base - r.corrupt) / (r.clean - r.corrupt)  # noqa: E731
    values = change(zoo.run(PathPatch(study, (), ("L3H2.v", "L3H3.v"), over_set=True)))
    assert f"`L0H1` {values[1, 1]:+.3f}, `L0H3` {values[1, 3]:+.3f} and" in TOUR and f"`L2.mlp` {values[3, 4]:+.3f} matter" in TOUR
    keys = change(zoo.run(PathPatch(study, (), ("L3H2.k", "L3H3.k"), over_set=True)))
    assert f"at most {np.nanmax(np.abs(keys)):.3f}" in TOUR
    found = zoo.run(Discover(study, "eap-ig", edges=40))
    assert f"{len(found.circuit.edges)} edges among {len(found.circuit.nodes)} nodes, faithfulness {found.score:.3f}" in TOUR


@pytest.mark.slow
def test_the_tours_features(engines):
    found = engines["zoo"].run(Features(Study(SET[0]), "zoo/L2.resid_post", pos=14, order="attribution"))
    first, second = zip(found.index[:2].tolist(), found.attribution[:2].tolist())
    assert f"`f{first[0]}` {first[1]:+.3f} leads, then `f{second[0]}` {second[1]:+.3f}" in TOUR
    carry = engines["zoo"].run(Discover(Study(SET[0], prompt_set=SET, saes=("zoo/L2.resid_post",)), "features", nodes=30))
    assert f"{len(carry.circuit.nodes)} of 768, faithfulness {carry.score:.3f}" in TOUR


def calls(name: str) -> list[tuple[str, list[str]]]:
    """Every `uv run NAME …` of the pages, as (page, words)."""
    found = [(page, m[1]) for page, text in PAGES.items() for m in re.finditer(rf"uv run (?:--no-sync )?{re.escape(name)}((?: [^\n`#|>]*)?)", text)]
    return [(page, shlex.split(words)) for page, words in found]


def test_every_figure_of_the_readmes_tour_is_one_of_the_long_tour():
    """Which the tests above hold."""
    short = README[README.index("## A tour in five steps") : README.index("## Your own models")]
    figures = re.findall(r"[+-]?\d*\.\d+", short)
    assert len(figures) > 15
    for figure in set(figures) - {"1.1"}:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?!\d)", TOUR), figure


def test_the_readme_is_short_and_names_every_pane():
    assert len(README.encode()) <= 9_600
    for pane in PANES.values():
        assert not pane.number.isdigit() or f"| `{pane.number}` | {pane.label} |" in README


def test_the_pictures_are_a_hunt_a_sweep_and_a_circuit():
    """The hunt is the third step of the tour."""
    hunt, sweep, circuit = ((ROOT / "docs" / "pictures" / f"{name}.svg").read_text(encoding="utf-8") for name in ("hunt", "sweep", "circuit"))
    assert "+10.444" in hunt and "L1H0=zero" in hunt and "head&#160;outputs" in sweep and "eap-ig" in circuit
    assert all(f"docs/pictures/{name}.svg" in README for name in ("hunt", "sweep", "circuit"))


def test_every_command_is_one():
    """Each is read as the program reads it; and the programs exist."""
    assert len(calls("engine.py")) > 8 and len(calls("tui.py")) > 10
    for _, words in calls("engine.py"):
        if "--help" not in words and words[0] != "norms":  # the example technique's, held by its own test
            assert shell.read_command(words)
    for _, words in calls("tui.py"):
        parser().parse_args(words)
    for page, text in PAGES.items():
        for path in re.findall(r"uv run (?:--no-sync )?(\S+\.py)", text) + re.findall(r"uv run pytest (?:-n 0 )?(\S+\.py)", text):
            assert (ROOT / path).exists() or "yours" in path, f"{page}: {path}"


@pytest.mark.slow
def test_commands_on_the_embedded_model_run(engines, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    out = str(tmp_path / "found.json")
    for page, words in calls("engine.py"):
        if page in ("README.md", "docs/circuits.md") and not {"check", "compare", "--help"} & {*words}:  # those two are of gpt2
            with contextlib.redirect_stdout(io.StringIO()) as text:
                assert program.main([out if w == "exports/found.json" else w for w in words]) == 0, words
            assert text.getvalue().strip()


def test_the_python_example(monkeypatch):
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", README, re.S)[1]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().strip() == "L3.resid_post  Paris" and "# L3.resid_post  Paris" in code


def test_the_example_of_a_test(engines, references):
    code = re.search(r"```python\n(.*?)```", PAGES["docs/contributing.md"], re.S)[1]
    names = {"Lens": Lens, "Study": Study, "PROMPT": PROMPT, "np": np, "log_softmax": log_softmax}
    exec(compile(textwrap.dedent(code), "contributing.md", "exec"), names)
    names["test_the_lens_at_the_last_layer_is_the_model"](engines["gemma2"], references["gemma2"])


def test_every_file_they_name_exists():
    own = {p.name for folder in ("vocabulary", "model", "screen", "techniques", "tests", "docs", "zoo") for p in (ROOT / folder).rglob("*.*")}
    for page, text in PAGES.items():
        for link in re.findall(r"\]\(([^)#:]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
        for name in re.findall(r"`([\w./-]+(?:\.(?:py|svg|md|jsonl)|/))`", text):
            made = name.split("/")[0] in ("exports", "logs", "saes", "sessions", "directions", "means", "away") or name.startswith(("/", "~"))
            assert made or (ROOT / name).exists() or (ROOT / "techniques" / name).exists() or name in own, f"{page}: {name}"


def test_where_what_lives_names_every_file_of_the_layers():
    """model/ and the rooms are described by what they do."""
    table = PAGES["docs/how_it_is_built.md"]
    for path in (*ROOT.glob("*.py"), *(ROOT / "vocabulary").glob("[a-z]*.py"), *(ROOT / "screen").glob("[a-z]*.py")):
        assert f"`{path.name}`" in table, path.name
    for room in (ROOT / "techniques").glob("[a-z]*/"):
        assert f"`{room.name}/`" in table, room.name
