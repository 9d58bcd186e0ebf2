"""Continuations under interventions against Hugging Face's own model run anew on every grown prompt, without a cache; draws; refusals; the shell."""

import json

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, CLEAN, CORRUPT, PROMPT
from reference import log_softmax

import engine as program
import model.growth as growth
from techniques.generation import analysis
from techniques.generation.requests import Generate, Sampling
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.results import numbers
from vocabulary.prompts import Prompt, Study

DEFAULT = ("gemma2", "zoo")  # the others are of the table
families = pytest.mark.parametrize("arch", [pytest.param(a, marks=[] if a in DEFAULT else pytest.mark.table) for a in ARCHS])
DONE = ("L1H2=zero", "L0.mlp=scale:0.5", "L2.resid_pre=add:2", "L1.attn@3=patch", "L1H1.v=scale:1.5")


def study_of(*done: str, prompt: Prompt = PROMPT, **kw) -> Study:
    return Study(prompt, tuple(map(parse_intervention, done)), **kw)


def edits_like(reference, runs, held: str, length: int) -> list:
    """DONE on Hugging Face's modules: on all positions, or on the first `length`."""
    stop = None if held == "all" else length
    u = reference.unembed[runs.answers[0]] - reference.unembed[runs.foils[0]]
    u = t.tensor(2 * u / np.linalg.norm(u), dtype=t.float32)
    theirs = reference.read(runs.row("corrupt").ids, ("attn", 1))[:, 3]

    def silence(x):
        x[:, :stop, reference.columns("z", 2)] = 0

    def times(factor, columns=slice(None)):
        return lambda x: x[:, :stop, columns].mul_(factor)

    return [
        (("z", 1), silence),
        (("mlp", 0), times(0.5)),
        (("resid_pre", 2), lambda x: x[:, :stop].add_(u)),
        (("attn", 1), lambda x: x[:, 3].copy_(theirs)),
        (("v", 1), times(1.5, reference.columns("v", 1))),
    ]


def recorded(monkeypatch) -> list:
    """The logits [sample, vocab] of every step of every run, in order."""
    seen = []
    for name in ("start", "step"):
        inner = getattr(growth.Growth, name)

        def kept(self, *args, inner=inner):
            seen.append((len(self.edits), inner(self, *args)))
            return seen[-1][1]

        monkeypatch.setattr(growth.Growth, name, kept)
    return seen


@families
@pytest.mark.parametrize("held", ["all", "prompt"])
def test_logits_are_those_of_the_grown_prompt_run_anew(engine, reference, monkeypatch, held):
    seen = recorded(monkeypatch)
    monkeypatch.setattr(analysis, "ends_of", lambda model: frozenset())
    study = study_of(*DONE)
    found = engine.run(Generate(study, Sampling(tokens=6, held=held, other=True)))
    assert growth.why_not_cached(engine.model) == "", "with a cache"
    assert [run.run for run in found.runs] == ["clean", "now", "corrupt"]
    runs = analysis.prepare(engine.model, study)
    with pytest.raises(StopIteration) as stop:
        while True:
            next(runs)
    runs = stop.value.value
    for n, run in enumerate(found.runs):
        (s,), length = run.samples, len(run.tokens.ids)
        edits = edits_like(reference, runs, held, length) if run.run == "now" else []
        want = reference.run([(*run.tokens.ids, *s.ids[:-1])], edits)[0][0, length - 1 :]
        got = np.stack([logits[0].numpy() for _, logits in seen[n::3]])
        np.testing.assert_allclose(got, want, atol=1e-4, rtol=1e-4)
        np.testing.assert_array_equal(s.ids, want.argmax(-1))
        np.testing.assert_allclose(s.probs, np.exp(log_softmax(want.astype(float))).max(-1), atol=1e-4)
    assert not np.allclose(seen[-3][1], seen[-2][1], atol=1e-2), "the interventions do something"


@pytest.mark.parametrize("done", ["L1H2.pattern=zero", "L1.resid_mid=scale:0.5", "L2.sae.f12=add:3", "L1.mlp.n7=set:2", "L0H1@2=zero"])
@pytest.mark.parametrize("held", ["all", "prompt"])
def test_without_a_cache_it_is_the_same(engines, monkeypatch, done, held):
    """Every kind of write: whole runs of the grown prompt, with the writes of its two parts, against the kept keys and values."""
    engine = engines["zoo"]
    study = study_of(done, saes=("zoo/L2.resid_post",))
    ask = Generate(study, Sampling(tokens=5, held=held, samples=2, temperature=1.0, seed=3))
    fast = engine.run(ask)
    monkeypatch.setattr(analysis, "why_not_cached", lambda model: "asked for")
    slow = engine.run(ask)
    assert "without a cache: asked for" in slow.convention
    for a, b in zip(fast.runs, slow.runs, strict=True):
        for s, r in zip(a.samples, b.samples, strict=True):
            assert s.ids == r.ids
            np.testing.assert_allclose(s.probs, r.probs, atol=1e-5)


def test_draws(engines):
    """Frequencies of the first token against the distribution cut at top-p and sharpened; equal seeds draw equally, and a share is counted."""
    engine = engines["zoo"]
    study = study_of(prompt=Prompt("The captain of the"))
    ask = lambda **kw: engine.run(Generate(study, Sampling(tokens=1, **kw))).runs[0]  # noqa: E731
    found = ask(samples=256, temperature=1.5, top_p=0.7, contains="s")
    logits = engine.model.forward(t.tensor([found.tokens.ids]))[0][0, -1].double().numpy()
    p = np.exp(log_softmax(logits / 1.5))
    order = np.argsort(-p)
    inside = order[: 1 + int(np.searchsorted(np.cumsum(p[order]), 0.7))]
    ids = np.array([s.ids[0] for s in found.samples])
    assert set(ids) <= set(inside)
    want = p[inside] / p[inside].sum()
    got = np.array([(ids == i).mean() for i in inside])
    assert np.abs(got - want).max() < 4 * np.sqrt(0.25 / 256)
    assert found.share == np.mean(["s" in s.text for s in found.samples])
    assert [s.ids for s in ask(samples=256, temperature=1.5, top_p=0.7).samples] == [s.ids for s in found.samples]
    assert [s.ids for s in ask(samples=256, temperature=1.5, top_p=0.7, seed=1).samples] != [s.ids for s in found.samples]
    assert {s.ids[0] for s in ask(samples=3, temperature=1.0, top_p=1e-9).samples} == {int(logits.argmax())}


def test_parts_stream_and_text(engines):
    engine, parts = engines["zoo"], []
    found = engine.run(Generate(study_of("L2.mlp=zero", "L1.mlp=zero"), Sampling(tokens=8)), parts.append)
    clean, now = (run.samples[0] for run in found.runs)
    assert now.parted == next(n for n, (a, b) in enumerate(zip(clean.ids, now.ids)) if a != b) and clean.parted == -1
    lengths = [len(p.runs[1].samples[0].ids) for p in parts if hasattr(p, "runs")]
    assert lengths == sorted(lengths) and lengths[0] == 1
    for run in found.runs:
        (s,) = run.samples
        assert s.ends[-1] == len(s.text) and len(s.ends) == len(s.ids)
        for n, end in enumerate(s.ends[:-1]):
            assert engine.model.row(CLEAN + s.text[:end], None).ids == (*run.tokens.ids, *s.ids[: n + 1]), "a token can be sent back as the prompt"


@pytest.mark.parametrize(
    "how, done, words",
    [
        ({"tokens": 0}, (), "tokens 0: from 1"),
        ({"samples": 10**6}, (), "samples 1000000: from 1"),
        ({"temperature": -1.0}, (), "temperature -1: from 0"),
        ({"temperature": float("nan")}, (), "temperature nan"),
        ({"top_p": 0.0}, (), "top_p 0: above 0"),
        ({"seed": -1}, (), "seed -1"),
        ({"held": "some"}, (), "choose one of all, prompt"),
        ({}, ("L1H2=patch",), "patch has values for the prompt's positions and none for a new token"),
        ({}, ("L1H2=noise",), "noise has values for the prompt's positions"),
        ({"other": True}, None, "type a corrupted one first"),
    ],
)
def test_refusals(engines, how, done, words):
    study = study_of(prompt=Prompt(CLEAN)) if done is None else study_of(*done)
    with pytest.raises(UserError, match=words):
        engines["zoo"].run(Generate(study, Sampling(**how)))


def test_from_the_shell(engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    words = [
        "generate",
        "--clean",
        CLEAN,
        "--corrupt",
        CORRUPT,
        "--do",
        "L2H1=zero",
        "--tokens",
        "3",
        "--samples",
        "2",
        "--temperature",
        "1",
        "--contains",
        ".",
    ]
    assert program.main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    want = engines["zoo"].run(Generate(study_of("L2H1=zero", prompt=Prompt(CLEAN, CORRUPT)), Sampling(3, 1.0, samples=2, contains=".")))
    assert [[s["text"] for s in run["samples"]] for run in found["runs"]] == [[s.text for s in run.samples] for run in want.runs]
    assert [run["share"] for run in found["runs"]] == [run.share for run in want.runs]
    assert program.main(words) == 0
    assert "interventions on every new token too · temperature 1, seed 0" in capsys.readouterr().out
    assert program.main(["generate", "--top-p", "2"]) == 2


def test_a_session_holds_the_numbers_of_a_continuation(engines):
    study = Study(PROMPT, (parse_intervention("L1H1=zero"),))
    held = numbers(engines["zoo"].run(Generate(study, Sampling(3))))
    assert {"runs.0.samples.0.probs", "runs.1.samples.0.probs"} <= set(held) and held["runs.0.samples.0.probs"][0] == 3
