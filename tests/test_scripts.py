"""Exported scripts run TransformerLens alone: on which architectures they print the screen's number, and where they are refused instead."""

import contextlib
import io
from dataclasses import replace

import pytest
import torch as t
from conftest import PROMPT

from engine import Engine
from families.configs import build
from vocabulary.script import python_script
from screen.session import State
from techniques.circuits import drawings
from techniques.circuits.requests import Discover, Score
from techniques.output.requests import Run
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Study
from vocabulary.requests import Load

FAMILIES = ("falcon-7b", "gpt_neox", "llama", "mistral", "mixtral", "nemotron", "olmo", "phi", "qwen2", "qwen3", "gpt2")
OTHERS = ("bloom", "olmo2", "granite", "gptj", "opt", "gemma2")  # other norms, multipliers or inputs: an edge's script would print another number, or fail


@pytest.fixture
def made(request, tmp_path):
    build(request.param, tmp_path)
    return Engine(str(tmp_path)), Load(str(tmp_path))


def printed(code: str) -> float:
    """The last number that a script prints."""
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(code, "script.py", "exec"), {})
    finally:
        t.set_grad_enabled(True)
    return float(out.getvalue().split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("made", FAMILIES, indirect=True)
def test_an_edge_circuits_script_prints_its_faithfulness(made):
    engine, load = made
    circuit = engine.run(Discover(Study(PROMPT), "eap", edges=40)).circuit
    want = engine.run(Score(Study(PROMPT), circuit, rest="patch")).faithfulness.mean
    assert engine.model.info.architecture in drawings.EDGE_SCRIPTS and abs(want - 1) > 1e-3
    assert printed(drawings.circuit_script(circuit, Study(PROMPT), engine.model.info, load, "patch")) == pytest.approx(want, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("made", OTHERS, indirect=True)
def test_an_edge_circuits_script_is_refused_elsewhere(made):
    engine, load = made
    circuit = engine.run(Discover(Study(PROMPT), "eap", edges=40)).circuit
    assert circuit.edges
    with pytest.raises(UserError, match="a script for edges is right on"):
        drawings.circuit_script(circuit, Study(PROMPT), engine.model.info, load, "patch")


def test_every_architecture_with_edge_scripts_is_tried():
    assert len(FAMILIES) == len(drawings.EDGE_SCRIPTS)


@pytest.mark.slow
@pytest.mark.parametrize("made", ["cohere", "deepseek_v2", "falcon-40b", "falcon-alibi"], indirect=True)
def test_no_script_where_transformer_lens_alone_is_wrong(made):
    engine, load = made
    state = replace(State(prompt=PROMPT), model=load)
    with pytest.raises(UserError, match="would print another number"):
        python_script(state, engine.model.info, engine.run(Run(state.study)))


@pytest.mark.slow
@pytest.mark.parametrize("made", ["gptj", "opt"], indirect=True)
def test_patterns_in_a_script(made):
    """Where TransformerLens only copies a pattern, a script that writes one is refused; what writes z prints the screen's number."""
    engine, load = made
    state = replace(State(prompt=PROMPT), model=load)
    for text, refused in (("L1H1=zero", False), ("L1H1.pattern=zero", True)):
        now = replace(state, interventions=(parse_intervention(text),))
        run = engine.run(Run(now.study))
        if refused:
            with pytest.raises(UserError, match="attention patterns"):
                python_script(now, engine.model.info, run)
        else:
            assert printed(python_script(now, engine.model.info, run)) == pytest.approx(run.now.metric, abs=1e-3)
