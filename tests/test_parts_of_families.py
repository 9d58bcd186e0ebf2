"""Rows by source and neuron, attention weighted by values, and the trials that refuse: on families that put norms and multipliers elsewhere. All else: test_architectures.py."""

import numpy as np
import pytest
import torch as t

from families.analyses import STUDY, Case
from model.writes import linear_norm, trial, trial_values
from techniques.attention.requests import Attention
from techniques.attribution.requests import AttributionNeurons, AttributionSources
from vocabulary.nodes import UserError

MINE = ("granite", "olmo", "nemotron", "olmo2", "gptj", "phi", "bloom", "falcon-7b", "opt", "bitnet")
PICKED = [pytest.param(name, marks=[] if name == "granite" else pytest.mark.slow) for name in MINE]


@pytest.fixture(scope="module", params=PICKED)
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("families"))


def test_rows_and_weighted_patterns(case):
    """Rows by source and by neuron add up; a pattern weighted by values is that of the sizes of what each source's value adds."""
    engine, ref = case.engine, case.reference
    assert engine.run(AttributionNeurons(STUDY, layer=1, which="clean")).error < 1e-4
    sources = AttributionSources(STUDY, layer=1, head=1, which="clean")
    if case.family == "bitnet":  # a norm between values and W_O
        for ask in (sources, Attention(STUDY, 1, "clean", True)):
            with pytest.raises(UserError, match="more than its pattern times its values"):
                engine.run(ask)
        return
    assert engine.run(sources).error < 1e-4
    weighted, bare = (engine.run(Attention(STUDY, 1, "clean", w)).pattern[1] for w in (True, False))
    a = ref.trace(case.ids[0])
    alone = t.zeros_like(a["z", 1])
    alone[..., ref.columns("z", 1)] = a["v", 1][..., ref.columns("v", 1)]
    np.testing.assert_allclose(weighted, bare * ref.head_writes(1, alone)[1].norm(dim=-1)[0].numpy(), atol=1e-4, rtol=1e-4)


def test_a_missing_part_is_refused(case, monkeypatch):
    """A multiplier or a norm that is not what it is taken for: a sentence, not a number."""
    model = case.engine.model
    assert not trial(model) and (not trial_values(model)) == (case.family != "bitnet")
    monkeypatch.setattr("model.writes.multiplier", lambda model, layer: 0.7)
    assert "do not add up" in trial(model)
    monkeypatch.undo()
    norm, linear = model.bridge.ln_final, linear_norm(model, model.bridge.ln_final)
    monkeypatch.setitem(model.notes.measured, norm, type(linear)(t.full((model.info.d_model,), 2.0), linear.bias, linear.centred, linear.eps))
    assert "no linear map" in trial(model)
