"""Attribution between SAEs: it adds up, and each edge is what the intervention with everything else frozen does."""

from dataclasses import replace

import pytest
import torch as t
from conftest import PROMPT
from dictionaries import build, save
from engine import Engine
from test_features import firing, ids_of, loaded, sources  # noqa: F401

from techniques.attribution.requests import Attribution
from techniques.features.requests import CheckEdge, FeatureGraph
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Metric, Study

STUDY = Study(PROMPT)


def target_of(engine, source, pos=6):
    d = loaded(engine, source)
    return firing(d, engine.model.trace(ids_of(engine), [d.point])[d.point][0], pos)[0][0]


def both(engine, up, down, target, pos, study=STUDY, which="now"):
    """The graph, and a check of its two largest edges."""
    found = engine.run(FeatureGraph(study, up, down, target, pos, which, 5))
    size = max(1.0, abs(found.value), 0.05 * sum(abs(v) for v in found.rows.values()))  # random post-norms of Gemma: rows of up to 1e6 that cancel
    assert found.gap < 1e-4 * size, found.rows
    assert found.contribution.sum() + found.rest + sum(found.rows.values()) == pytest.approx(found.value, abs=1e-4 * size)
    for i in range(2):
        edge = engine.run(CheckEdge(study, up, down, int(found.index[i]), int(found.at[i]), target, pos, which))
        assert edge.claimed == pytest.approx(float(found.contribution[i]), abs=1e-5)
        assert edge.frozen == pytest.approx(edge.claimed, abs=1e-4 * max(1.0, abs(edge.claimed)))
        assert edge.before == found.value and edge.total == pytest.approx(edge.before - edge.after)
    return found


@pytest.mark.parametrize("up", ["early", "mlp", "attn", "z", "skip_transcoder", "normed", "mid"])
def test_into_a_feature_of_the_last_stream(engines, sources, arch, up):  # noqa: F811
    engine = engines[arch]
    if up == "mid" and engine.model.parallel:
        return
    down = sources[arch, "last"]
    found = both(engine, sources[arch, up], down, target_of(engine, down), 6)
    assert ("embeddings" in found.rows) == (up not in ("early", "mid")) and "MLPs" in found.rows


@pytest.mark.parametrize("down", ["post", "attn", "z", "transcoder", "normed", "mlp_in", "mid"])
def test_into_every_kind_of_feature(engines, sources, arch, down):  # noqa: F811
    engine = engines[arch]
    if down == "mid" and engine.model.parallel:
        return
    target = target_of(engine, sources[arch, down])
    found = both(engine, sources[arch, "early"], sources[arch, down], target, 6)
    assert (found.at <= 6).all() and ("MLPs" in found.rows) == (down == "post")


def test_into_the_metric(engines, sources, arch):  # noqa: F811
    engine = engines[arch]
    for up in ("early", "transcoder", "last"):
        found = both(engine, sources[arch, up], "", -1, None)
        assert found.value == pytest.approx(engine.run(Attribution(STUDY)).logit, abs=1e-5) and found.target == -1
        if up == "last":
            assert (found.at == found.pos).all()


def test_normalised_and_centred_saes_and_an_intervened_run(engines, sources, tmp_path):  # noqa: F811
    engine = engines["gpt2"]
    up = save(build("standard", "blocks.0.hook_resid_post", 32, normalize_activations="layer_norm"), tmp_path / "up")
    more = {"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}, "normalize_activations": "constant_norm_rescale"}
    down = save(build("gated", "blocks.2.hook_resid_post", 32, seed=2, **more), tmp_path / "down")
    both(engine, up, down, target_of(engine, down), 6)
    study = replace(STUDY, interventions=(parse_intervention("L1H2=scale:2"),))
    found = engine.run(FeatureGraph(study, up, down, target_of(engine, down), 6))
    assert found.rows["interventions"] != 0
    clean = engine.run(FeatureGraph(study, up, down, target_of(engine, down), 6, "clean"))
    assert "interventions" not in clean.rows and clean.value != found.value


def test_what_is_refused(engines, sources):  # noqa: F811
    engine = engines["gpt2"]
    early, last, mlp = (sources["gpt2", x] for x in ("early", "last", "mlp"))
    d = loaded(engine, early)
    off = int((d.encode(engine.model.trace(ids_of(engine), [d.point])[d.point][0])[3] == 0).nonzero()[0])
    for ask, words in [
        (FeatureGraph(STUDY, last, early), "comes first"),
        (FeatureGraph(STUDY, early, early), "comes first"),
        (FeatureGraph(STUDY, early, mlp), "behind an MLP"),
        (FeatureGraph(STUDY, early, last, 999), "features 0 to"),
        (FeatureGraph(STUDY, early, last, k=0), "at least 1"),
        (FeatureGraph(STUDY, early, last, pos=99), "position 99"),
        (FeatureGraph(Study(replace(PROMPT, answers=(), foils=()), metric=Metric("loss")), early, "", -1, pos=3), "needs an answer"),
        (CheckEdge(STUDY, early, last, off, 3, 0, 6), "does not fire"),
        (CheckEdge(STUDY, early, last, 0, 77, 0, 6), "position 77"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.run(ask)
    assert t.is_grad_enabled()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["nemotron", "olmo", "granite", "olmo2", "gemma3"])
def test_norms_of_every_kind_are_held(family, tmp_path):
    """Gains that are stored as w - 1, not at all, behind attention, with a multiplier: the frozen run is what the graph claims."""
    from families.configs import build as make

    make(family, tmp_path / "model")
    engine = Engine(str(tmp_path / "model"))
    d, last = engine.model.info.d_model, engine.model.info.n_layers - 1
    up = save(build("standard", "blocks.0.hook_resid_post", d), tmp_path / "up")
    down = save(build("standard", f"blocks.{last}.hook_resid_post", d, seed=2), tmp_path / "down")
    both(engine, up, down, target_of(engine, down), 6)
