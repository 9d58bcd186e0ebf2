"""The exported script uses TransformerLens alone and prints the number on the screen."""

import contextlib
import io

import pytest

from vocabulary.script import python_script
from techniques.output.requests import Run
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Metric, read_prompt_set
from vocabulary.requests import Load
from screen.session import State
from utils import ROOT

SET = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "base, metric, done",
    [
        ("clean", "logit_diff", "L3H3=patch L2.mlp@-1=scale:0.5"),
        ("corrupt", "prob", "L1.resid_mid@S2=patch L3H2=mean_all L2.resid_pre@2=patch"),
        ("clean", "kl", "L0H3.q@10=zero L0.mlp.n5=zero L2H1.pattern@-1=zero"),
        ("clean", "loss", "L3H3=mean L1.attn@S2=mean"),
        ("clean", "rank", "embed@3=zero"),
        ("clean", "prob_diff", "L1H0.v=zero"),
        ("corrupt", "logprob", ""),
    ],
)
def test_the_script_prints_the_number_on_the_screen(engines, base, metric, done):
    import torch as t

    engine = engines["zoo"]
    doings = tuple(parse_intervention(d) for d in done.split())
    state = State(prompt=SET[0], prompt_set=SET, metric=Metric(metric), base=base, interventions=doings)
    run = engine.run(Run(state.study))
    code = python_script(state, engine.model.info, run)
    imports = [line for line in code.splitlines() if line.startswith(("import", "from"))]
    assert all(line.split()[1].split(".")[0] in ("torch", "transformers", "transformer_lens") for line in imports)
    out, grad = io.StringIO(), t.is_grad_enabled()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, "exported.py", "exec"), {})
    finally:
        t.set_grad_enabled(grad)
    assert float(out.getvalue()) == pytest.approx(run.now.metric, abs=1e-4)


def test_grouped_heads(engines, folders):
    import torch as t

    engine, folder = engines["llama"], str(folders["llama"])
    state = State(Load(folder), prompt=SET[0], interventions=(parse_intervention("L1H3.k@4=zero"), parse_intervention("L2H2.v=patch")))
    run = engine.run(Run(state.study))
    out, grad = io.StringIO(), t.is_grad_enabled()
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(python_script(state, engine.model.info, run), "exported.py", "exec"), {})
    finally:
        t.set_grad_enabled(grad)
    assert float(out.getvalue()) == pytest.approx(run.now.metric, abs=1e-4)


def test_without_a_metric_there_is_nothing_to_reproduce(engines):
    engine = engines["zoo"]
    from dataclasses import replace

    state = State(prompt=replace(SET[0], answers=(), foils=()))
    with pytest.raises(UserError, match="answer"):
        python_script(state, engine.model.info, engine.run(Run(state.study)))
