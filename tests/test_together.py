"""
Continuations, steering, metrics of one's own and means over a text with what else may hold at once: a second model, prompts of unequal length, answers of several
tokens, chats. Against Hugging Face's own models, or one prompt at a time.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from reference import Reference
from safetensors.torch import load_file
from test_against import ALONE, Two, tuned
from test_chat import PREFIX, TALK
from test_chat import made as chats  # noqa: F401
from test_own_metric import TEXT, value
from test_sets import MIXED, SET, TOL
from test_text_means import WORDS

from techniques.circuits.requests import Score
from techniques.generation import analysis
from techniques.generation.requests import Curve, Generate, MakeDirection, Sampling
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from vocabulary.chat import Turn, grown
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.notebook import metric_cells
from vocabulary.prompts import Metric, Prompt, ReferenceText, Study
from vocabulary.requests import Load
from vocabulary.script import Shown


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "mine.py").write_text(TEXT)
    (folder / "text.txt").write_text(WORDS)
    return folder


@pytest.fixture(scope="module")
def two(folders, tmp_path_factory) -> Two:
    return Two(folders["gpt2"], tuned(folders["gpt2"], tmp_path_factory.mktemp("tuned") / "gpt2"))


@pytest.fixture
def margin(files) -> Metric:
    return Metric("own", own=f"{files / 'mine.py'}:margin")


@pytest.fixture
def text(files) -> ReferenceText:
    return ReferenceText(str(files / "text.txt"), 120)


# ------------------------------------------------------------------ a second model


def test_a_metric_of_ones_own_in_two_models(two, files, margin):
    study = replace(two.study, metric=margin)
    want = [value(files / "mine.py", m, two.ids) for m in (two.first, two.second)]
    found = two.engine.run(Run(study))
    np.testing.assert_allclose([found.clean.metric, found.corrupt.metric], want, atol=1e-4)
    theirs = two.second.read(two.ids, ("resid_post", 1))[0, 4]
    patched = value(files / "mine.py", two.first, two.ids, edits=[(("resid_post", 1), lambda x: x[:, 4].copy_(theirs.expand(len(x), -1)))])
    sweep = two.engine.run(Sweep(study, "resid_post", direction="noise"))
    assert sweep.values[1, 4] == pytest.approx(patched, abs=1e-4) and abs(patched - want[0]) > 1e-3
    assert (sweep.clean, sweep.corrupt) == pytest.approx(want, abs=1e-4)
    assert np.isfinite(two.engine.run(Estimate(study, "mlp", direction="denoise")).values).all()


def greedy(reference: Reference, ids: tuple[int, ...], n: int) -> tuple[int, ...]:
    for _ in range(n):
        ids = (*ids, int(reference.run([ids])[0][0, -1].argmax()))
    return ids[-n:]


@pytest.mark.parametrize("base", ["clean", "corrupt"])
def test_two_models_go_on_with_one_prompt(two, monkeypatch, base):
    monkeypatch.setattr(analysis, "ends_of", lambda model: frozenset())
    done = (parse_intervention("L2.mlp=zero"),)
    found = two.engine.run(Generate(replace(two.study, base=base, interventions=done), Sampling(tokens=5, other=True)))
    own = {"clean": two.first, "corrupt": two.second}
    assert [run.run for run in found.runs] == [base, "now", "corrupt" if base == "clean" else "clean"]
    for run in (found.runs[0], found.runs[2]):
        assert run.samples[0].ids == greedy(own[run.run], two.ids, 5)
    assert "one prompt in two models" in found.convention


def test_the_difference_of_two_models_is_a_direction(two):
    made = two.engine.run(MakeDirection(two.study, at="L1.resid_post@END"))
    want = (two.first.read(two.ids, ("resid_post", 1)) - two.second.read(two.ids, ("resid_post", 1)))[0, -1]
    np.testing.assert_allclose(load_file(made.path)["direction"].numpy(), want.numpy(), atol=1e-4)
    assert "on one prompt" in made.words and "corrupted" not in made.words
    steered = replace(two.study, base="corrupt", interventions=(parse_intervention(f"L1.resid_post@END=steer:{made.name}:1"),))
    at_the_end = two.diff(two.patched(("resid_post", 1), -1, slice(None), True))
    assert two.engine.run(Run(steered)).now.metric == pytest.approx(at_the_end, abs=1e-4), "the second model's stream is then the first one's"


def test_means_over_a_text_are_the_models_that_makes_the_run(two, text):
    for base, reference in (("clean", two.first), ("corrupt", two.second)):
        study = replace(two.study, base=base, text=text, interventions=(parse_intervention("L1.mlp=mean_text"),))
        ids = two.engine.model.encode(WORDS)[0][:120]
        bos = [two.engine.model.bos] * two.engine.model.info.default_bos
        window = min(128, two.engine.model.info.n_ctx) - len(bos)
        rows = [(*bos, *ids[i : i + window]) for i in range(0, len(ids), window)]
        mean = t.cat([reference.read(r, ("mlp", 1))[0, 1:] for r in rows if len(r) > 1]).mean(0)
        want = two.diff(reference.run([two.ids], edits=[(("mlp", 1), lambda x, mean=mean: x.copy_(mean.expand_as(x)))])[0])
        assert two.engine.run(Run(study)).now.metric == pytest.approx(want, abs=1e-4)


# ------------------------------------------------------------------ prompts of unequal length


@pytest.mark.parametrize("op", [pytest.param("mean_text", marks=pytest.mark.table), "mean_text_pos", "patch"])
def test_a_sweep_over_a_set_has_each_prompts_own_numbers(engines, margin, text, op):
    study = replace(SET, metric=margin, text=text)
    whole = engines["gemma2"].run(Sweep(study, "z", op, over_set=True))
    single = [engines["gemma2"].run(Sweep(replace(study, prompt=p), "z", op)) for p in MIXED]
    assert np.abs(whole.per_prompt - np.stack([r.values for r in single])).max() < TOL
    assert ("its first 120 tokens" in whole.convention) is (op != "patch") and "margin (mine.py " in whole.convention


def test_a_circuit_beside_means_over_a_text(engines, text):
    circuit, study = Circuit("two", "gemma2", ("L0H1", "L1H2")), replace(SET, text=text)
    whole = engines["gemma2"].run(Score(study, circuit, rest="mean_text_pos"))
    single = [engines["gemma2"].run(Score(replace(study, prompt=p, prompt_set=()), circuit, rest="mean_text_pos")).alone.mean for p in MIXED]
    assert whole.alone.mean == pytest.approx(np.mean(single), abs=TOL)


def test_the_mean_of_a_set_at_a_label(engines, references):
    """At S2 of every prompt, also of corrupted ones that have no labels of their own."""
    engine, reference = engines["gemma2"], references["gemma2"]
    made = engine.run(MakeDirection(SET, "set", "L1.resid_post@S2"))
    rows = [engine.model.check(p) for p in MIXED]
    at = lambda row: reference.read(row.ids, ("resid_post", 1))[0, row.labels["S2"]]  # noqa: E731
    want = sum(at(r.clean) - at(r.corrupt) for r in rows) / len(rows)
    np.testing.assert_allclose(load_file(made.path)["direction"].numpy(), want.numpy(), atol=1e-4)
    with pytest.raises(UserError, match="prompt 2 of the set: the clean prompt is empty"):
        engine.run(MakeDirection(Study(MIXED[0], prompt_set=(MIXED[0], Prompt(""))), "set", "L1.resid_post@END"))


# ------------------------------------------------------------------ answers of several tokens, chats


def test_a_whole_answer_is_steered_and_averaged(engines, text):
    engine = engines["gemma2"]
    prompt = Prompt(MIXED[0].clean, MIXED[0].corrupt, (" Mary and Tom",))
    study = Study(prompt, metric=Metric("logprob_sum"), text=text)
    made = engine.run(MakeDirection(study, at="L1.resid_post@END"))
    steer = f"L1.resid_post=steer:{made.name}:"
    curve = engine.run(Curve(replace(study, interventions=(parse_intervention(f"{steer}1"),)), coefficients=(-1.0, 0.0, 2.0)))
    runs = [engine.run(Run(replace(study, interventions=(parse_intervention(f"{steer}{c}"),)))).now.metric for c in (-1.0, 0.0, 2.0)]
    np.testing.assert_allclose(curve.values, runs, atol=1e-5)
    assert curve.values[1] == pytest.approx(engine.run(Run(study)).now.metric, abs=1e-5) and len({*runs}) == 3
    for op in ("mean_text", "mean_text_pos"):
        sweep = engine.run(Sweep(study, "nodes", op))
        row, col = next((r, c) for r in range(len(sweep.rows)) for c in range(len(sweep.cols)) if sweep.address(r, c) == "L1H2")
        alone = engine.run(Run(replace(study, interventions=(parse_intervention(f"L1H2={op}"),)))).now.metric
        assert sweep.values[row, col] == pytest.approx(alone, abs=1e-4)
    said = engine.run(Generate(study, Sampling(tokens=2)))
    twins = replace(study, metric=Metric(), prompt=replace(prompt, foils=(" Mary red",)))
    assert engine.run(Generate(twins, Sampling(tokens=2))).runs[0].samples[0].ids == said.runs[0].samples[0].ids, "no metric is in the way"


@pytest.mark.parametrize("chat", [TALK, PREFIX])
def test_a_chat_grows_by_what_the_assistant_said(chats, monkeypatch, chat):  # noqa: F811
    engine = chats["chatml"]
    monkeypatch.setattr(analysis, "ends_of", lambda model: frozenset())
    (run,) = engine.run(Generate(Study(Prompt(chat)), Sampling(tokens=3))).runs
    longer = grown(chat, run.samples[0].text)
    assert longer[-1].role == "assistant" and longer[:-1] == (chat if chat is TALK else chat[:-1])
    assert engine.model.row(longer, None).texts[: len(run.tokens.ids)] == run.tokens.texts
    assert grown("red", " green") == "red green" and grown((Turn("user", "a"),), "b") == (Turn("user", "a"), Turn("assistant", "b"))


def test_what_a_notebook_can_not_compute(engines, margin, text):
    """A cell of a notebook says why; a direction is read from its file."""
    engine = engines["zoo"]
    made = engine.run(MakeDirection(Study(replace(ALONE, corrupt="When Mary and John went to the store, Alice gave a drink to")), at="L1.resid_post@END"))
    study = Study(ALONE, (parse_intervention(f"L1.resid_post=steer:{made.name}:2"),))
    shown = lambda s: metric_cells(Shown(Load("zoo"), s), engine.model.info, engine.run(Run(s)))  # noqa: E731
    assert any(made.name in c.text and "direction(" in c.text for c in shown(study))
    for other, why in (
        (replace(study, metric=margin), "a metric of your own"),
        (Study(ALONE, (parse_intervention("L1.mlp=mean_text"),), text=text), "mean_text"),
    ):
        with pytest.raises(UserError, match=why):
            shown(other)
