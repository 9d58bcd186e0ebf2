"""Exported notebooks and scripts with cells run from the first cell to the last, print the screen's numbers and draw; plots from the screen and the shell."""

import contextlib
import io
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import nbformat
import numpy as np
import pytest
from ui import make_app, press

import engine as program
from screen import exports
from techniques.attention.requests import Attention
from techniques.circuits.requests import Discover, Score
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from tui import first_state
from vocabulary import plots
from vocabulary.notebook import as_notebook, as_script, screen_cells, session_cells
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Metric
from vocabulary.requests import Load
from vocabulary.results import Result, headline, numbers
from vocabulary.script import Shown


def executed(monkeypatch, codes: list[str]) -> tuple[dict, str, list]:
    """The names, the output and the figures after running the cells in their order."""
    import plotly.graph_objects as go
    import torch as t

    names, figures, out, grad = {"__name__": "__main__"}, [], io.StringIO(), t.is_grad_enabled()
    monkeypatch.setattr(go.Figure, "show", lambda figure: figures.append(figure))
    try:
        with contextlib.redirect_stdout(out):
            for n, code in enumerate(codes):
                exec(compile(code, f"cell {n}", "exec"), names)
    finally:
        t.set_grad_enabled(grad)
    return names, out.getvalue(), figures


def code_of(notebook: str) -> list[str]:
    book = nbformat.reads(notebook, as_version=4)
    nbformat.validate(book)
    return [c.source for c in book.cells if c.cell_type == "code"]


def shown_of(engine, load: Load, study, requests) -> tuple[str, float, list]:
    """The notebook of a screen that shows these requests, the metric, and the results."""
    info, run, results = engine.model.info, engine.run(Run(study)), [engine.run(r) for r in requests]
    cells = screen_cells(Shown(load, study), info, run, [(q, r, []) for q, r in zip(requests, results)])
    assert sum("by TransformerLens alone" in c.text for c in cells) == len(requests), "all of these are computed, not copied"
    return as_notebook(cells), run.now.metric, results


def check_notebook(monkeypatch, engine, load, study, requests) -> None:
    book, metric, _ = shown_of(engine, load, study, requests)
    _, out, figures = executed(monkeypatch, code_of(book))
    assert float(re.search(r"^-?[\d.]+$", out, re.M)[0]) == pytest.approx(metric, abs=1e-4)
    apart = [float(x) for x in re.findall(r"largest difference to the screen: (\S+)", out)]
    assert len(apart) == len(requests) == len(figures) and max(apart) < 1e-4, out


def test_the_screens_numbers(engines, monkeypatch):
    state = first_state({})
    study = replace(state.study, interventions=(parse_intervention("L3H3=zero"), parse_intervention("L0.mlp@S2=patch")))
    points = ("L0.resid_pre", "L1.resid_mid", "L3.resid_post")
    requests = [
        Lens(study, points=points), Lens(study, "corrupt", points, positions=(-1, 3)), Attention(study, 2), Attention(study, 0, "clean"),
        Sweep(study, "z", "patch", "noise"), Sweep(study, "nodes", "zero"),
    ]  # fmt: skip
    check_notebook(monkeypatch, engines["zoo"], Load(), study, requests)
    sweep = Sweep(study, "z", "patch", "denoise")  # the interventions are then on the other prompt
    cells = screen_cells(
        Shown(Load(), study),
        engines["zoo"].model.info,
        engines["zoo"].run(Run(study)),
        [(sweep, engines["zoo"].run(sweep), [plots.picture("z", np.eye(2), "ab", "cd")])],
    )
    assert "the numbers that Loupe computed" in cells[-2].text and not any("by TransformerLens alone" in c.text for c in cells if not c.code)


@pytest.mark.table
@pytest.mark.parametrize("kind, op, direction", [("resid_pre", "patch", "denoise"), ("resid_post", "zero", "noise"), ("v", "patch", "denoise")])
def test_sweeps_in_a_script(engines, monkeypatch, kind, op, direction):
    study = first_state({}).study
    check_notebook(monkeypatch, engines["zoo"], Load(), study, [Sweep(study, kind, op, direction)])


@pytest.mark.table
@pytest.mark.parametrize("arch", ["gpt2", "neox", "llama", "qwen3"])
@pytest.mark.parametrize("metric, base", [("logit_diff", "clean"), ("kl", "corrupt"), ("prob", "corrupt")])
def test_the_screens_numbers_on_architectures(engines, folders, monkeypatch, arch, metric, base):
    study = replace(first_state({}).study, interventions=(parse_intervention("L1H1=zero"),), metric=Metric(metric), base=base)
    way = "noise" if base == "clean" else "denoise"  # so that the interventions are on the run that the cells change
    kinds = [Sweep(study, kind, op, way) for kind, op in (("q", "patch"), ("k", "patch"), ("attn", "zero"), ("z_pos", "patch"), ("mlp", "patch"))]
    requests = [Lens(study, points=("L0.resid_pre", "L2.resid_post")), Attention(study, 1), *kinds]
    check_notebook(monkeypatch, engines[arch], Load(str(folders[arch])), study, requests)


def test_a_session_as_a_notebook(engines, monkeypatch):
    engine, state = engines["zoo"], first_state({})
    info = engine.model.info
    study, other = replace(state.study, prompt_set=state.prompt_set[:3]), replace(state.study, prompt=state.prompt_set[1])
    circuit = engine.run(Discover(study, "eap", edges=8)).circuit
    done = replace(other, interventions=(parse_intervention("L3H3=zero"),))
    items: list[tuple] = [("note", {"text": "an *idea* <b>&`x`", "node": "L3H3", "number": "logit_diff 8.8", "prompt": "When"})]
    metrics = []
    for request in (Run(study), Run(other), Run(done), Sweep(other, "z", "mean_all"), Score(study, circuit), Discover(study, "eap", edges=8)):
        result = engine.run(request) if "mean" not in str(request) or request.study.prompt_set else None
        if result is not None:
            metrics += [result.now.metric] if isinstance(request, Run) else []
            items.append(
                (
                    "result",
                    Result("2026-01-01T12:00:00", type(request).__name__, request, Load(), info.key, headline(request, result), numbers(result), True),
                    result,
                    info,
                )
            )
    items += [("result", replace(items[1][1], says="gone"), None, info), ("circuit", circuit)]
    book = as_notebook(session_cells("my hunt", "about it", items))
    words = "\n".join(c.source for c in nbformat.reads(book, as_version=4).cells if c.cell_type == "markdown")
    assert r"an \*idea\* \<b\>&\`x\`" in words and "## Prompt" in words and "Score of" in words and "not at hand here" in words and "**circuit" in words
    _, out, figures = executed(monkeypatch, code_of(book))
    assert [float(x) for x in re.findall(r"^-?\d+\.\d+$", out, re.M)] == pytest.approx(metrics, abs=1e-4) and figures


async def test_exports_of_the_screen(engines, tmp_path, monkeypatch):
    app = make_app(engines["zoo"], tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        for keys in ("", "4", "S"):
            await press(app, pilot, *keys)
        for pane in ("patching", "lens"):
            made = {i.key: i for i in exports.choices(app, app.panes[pane])}
            assert set(made) == {"python", "notebook", "plot", "paper", "session"}
            if pane == "patching":
                _, out, figures = executed(monkeypatch, [made["python"].value()])
                assert "largest difference" in out and len(figures) == 2 and made["python"].value().count("#%%") >= 5
                page = made["plot"].value()
                assert (
                    page.count("Plotly.newPlot") >= 1
                    and "cdn.plot.ly" not in page.split("</script>")[-1]
                    and "src=" not in re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.S)
                )
            code_of(made["session"].value())
            assert ET.fromstring(made["paper"].value()).tag.endswith("svg")


def test_script_with_cells_is_python(engines):
    state = first_state({})
    text = as_script(screen_cells(Shown(Load(), state.study), engines["zoo"].model.info, engines["zoo"].run(Run(state.study)), []))
    compile(text, "script.py", "exec")
    assert text.startswith("#%%\n") and all(
        line.split()[1].split(".")[0] in ("torch", "transformers", "transformer_lens", "numpy", "plotly")
        for line in text.splitlines()
        if re.match("(import|from) ", line)
    )


def test_what_can_not_be_a_script_says_why(engines):
    state = first_state({})
    study = replace(state.study, interventions=(parse_intervention("L3H3=noise"),))
    cells = screen_cells(Shown(Load(), study), engines["zoo"].model.info, engines["zoo"].run(Run(study)), [])
    assert "not built yet" in cells[0].text and not cells[0].code
    study = replace(state.study, prompt=replace(state.prompt, corrupt="When Mary", alignment=((0, 0),)), interventions=(parse_intervention("L3H3=patch"),))
    cells = screen_cells(Shown(Load(), study), engines["zoo"].model.info, engines["zoo"].run(Run(study)), [])
    assert "unequal length" in cells[0].text


def test_plots_from_the_shell(engines, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    for name in ("a.html", "a.svg"):
        assert program.main(["sweep", "--kind", "z", "--op", "zero", "--answer", " Mary", "--foil", " John", "--plot", str(tmp_path / name)]) == 0
    assert "Plotly.newPlot" in (tmp_path / "a.html").read_text() and "H3" in (tmp_path / "a.svg").read_text()
    for words, line in (
        (["run", "--plot", str(tmp_path / "a.png")], "ends in .html or .svg"),
        (["run", "--plot", "/proc/nowhere/a.html"], "can't be written"),
        (["saes", "--plot", str(tmp_path / "b.html")], "no table of numbers"),
        (["replay", str(tmp_path / "s.jsonl"), "--plot", str(tmp_path / "b.html")], "no session"),
    ):
        assert program.main(words) == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "b.html").exists()


def test_names_that_stand_twice_keep_their_places():
    p = plots.picture("x", np.array([[1.0, -2.0, np.nan]]), [" a"], [" the", " cat", " the"])
    assert len(set(p.cols)) == 3 and p.signed
    drawn = plots.figure(replace(p, values=np.ones((2, 3)), rows=("a", "b")))
    assert len(drawn.data[0].x) == 3
    with pytest.raises(UserError, match="no table"):
        plots.page("t", [])
    for one in (p, plots.picture("<m>&", np.array([[1.0, np.nan], [0.0, 2.0]]), ["a", "b"], ["c" * 20, "d"], text=[["<x>", "y"], ["z", "w"]])):
        ET.fromstring(plots.svg(one))
