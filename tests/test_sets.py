"""Sets as they come: prompts of unequal length run in groups give each prompt's own numbers, what does not fit is left out with its reason; whole answers against Hugging Face."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import PROMPT
from transformers import AutoTokenizer
from reference import log_softmax

from techniques.attention.requests import AttentionSet
from techniques.attribution.requests import AttributionSet
from techniques.circuits.requests import Discover, PathPatch, Score
from techniques.output.requests import Run
from techniques.patching.requests import Certify, Estimate, Sweep
from techniques.sets.requests import MAKES, MakeSet
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError, parse_intervention, parse_node
from vocabulary.prompts import Metric, Prompt, Study, line_of, read_prompt
from vocabulary.typed import parse_json
from utils import ROOT

TOL = 1e-4
TABLE = pytest.mark.table


def ioi(text: str, io: str, s: str, other: str) -> Prompt:
    """An IOI prompt with its labels; the corrupted one has another second subject."""
    clean = text.format(a=io, b=s, s=s)
    labels = {"IO": clean.index(io), "S1": clean.index(s), "S2": clean.rindex(s)}
    return Prompt(clean, text.format(a=io, b=s, s=other), (f" {io}",), (f" {s}",), tuple(labels.items()))


FORMS = (
    "When {a} and {b} went to the store, {s} gave a drink to",
    "Then, when {a} and {b} went to the store, {s} gave a drink to",
    "When {a} and {b} went to school, {s} gave it to",
)
MIXED = tuple(ioi(FORMS[i % 3], io, s, other) for i, (io, s, other) in enumerate([("Mary", "John", "Alice"), ("Tom", "Anna", "Mary"), ("Alice", "John", "Tom"), ("John", "Mary", "Anna")]))  # fmt: skip
SET = Study(MIXED[0], prompt_set=MIXED)
ALONE = tuple(Study(p) for p in MIXED)


@pytest.fixture(scope="module")
def engine(engines):
    yield engines["gemma2"]
    engines["gemma2"].check_hooks()


def test_the_prompts_differ_in_length(engine):
    assert len({len(engine.model.check(p).clean.ids) for p in MIXED}) == 3


# ------------------------------------------------------------------ groups of equal length against one prompt at a time


@pytest.mark.parametrize("op", ["patch", "resample", *(pytest.param(op, marks=TABLE) for op in ("zero", "mean_all"))])
def test_a_sweep_of_heads_has_each_prompts_own_numbers(engine, op):
    given = SET if op != "resample" else replace(SET, prompt_set=(*MIXED, *(ioi(f, "Mary", "Tom", "John") for f in FORMS)))
    whole = engine.run(Sweep(given, "z", op, over_set=True))
    single = [engine.run(Sweep(replace(given, prompt=p), "z", op)) for p in given.prompt_set]
    assert np.abs(whole.per_prompt - np.stack([r.values for r in single])).max() < TOL
    assert whole.base == pytest.approx(np.mean([r.base for r in single]), abs=TOL) and whole.prompts == tuple(range(len(given.prompt_set)))
    assert "groups of equal length" in whole.convention and np.isfinite(whole.p).all()


def test_certified_cells_stand_where_each_prompt_has_its_labels(engine):
    found = engine.run(Certify(SET, "z_pos", top=2, share=1.0, over_set=True))
    sweep = engine.run(Sweep(SET, "z_pos", over_set=True))
    effects = {sweep.address(r, c): float(sweep.values[r, c] - sweep.base) for r in range(len(sweep.rows)) for c in range(len(sweep.cols))}
    assert found.nodes and np.allclose(found.effects, [effects[n] for n in found.nodes], atol=TOL)


def test_a_mean_is_of_one_kind_over_the_whole_set(engine):
    """Also where some of its prompts are as long as all corrupted ones."""
    prompts = tuple(replace(p, corrupt=MIXED[0].corrupt, corrupt_labels=MIXED[0].labels) for p in (*MIXED[:2], MIXED[0]))
    some = replace(SET, prompt=prompts[0], prompt_set=prompts, align="diff")
    whole = engine.run(Sweep(some, "z", "mean", over_set=True))
    alike = engine.run(Sweep(replace(some, prompt_set=(*prompts, prompts[1])), "z", "mean", over_set=True))
    assert "by label" in whole.convention and np.abs(whole.per_prompt[0] - alike.per_prompt[0]).max() < TOL
    single = engine.run(Sweep(some, "z", "mean"))  # one prompt, as long as every corrupted one: position by position
    assert np.abs(whole.per_prompt[0] - single.values).max() > 10 * TOL


@pytest.mark.parametrize("kind", ["attn", "cells", pytest.param("z_pos", marks=TABLE)])
def test_a_table_by_position_goes_by_label(engine, kind):
    ask = Sweep(SET, kind, node="L1H2" if kind == "cells" else "", over_set=True)
    whole = engine.run(ask)
    assert whole.cols == ("IO", "S1", "S2", "END") and "columns by label" in whole.convention
    for i, study in enumerate(ALONE):
        single = engine.run(replace(ask, study=study, over_set=False))
        places = engine.model.check(study.prompt).clean.labels
        at = [places[name] for name in whole.cols]
        own = single.values[np.ix_(at, at)] if kind == "cells" else single.values[:, at]
        known = np.isfinite(whole.per_prompt[i])
        assert known.any() and np.abs(whole.per_prompt[i] - own)[known].max() < TOL
    if kind == "attn":
        assert whole.address(1, 2) == "L1.attn@S2"


def test_nodes_at_labels_stand_where_each_prompt_has_them(engine):
    """Also in prompts of equal length whose labels lie elsewhere."""
    swapped = ioi("When {b} and {a} went to the store, {s} gave a drink to", "Tom", "Anna", "Alice")
    for prompts in (MIXED, (MIXED[0], swapped)):
        ask = Sweep(Study(prompts[0], prompt_set=prompts), "pairs", nodes=("L1.attn@S1", "L0H1@END"), over_set=True)
        whole = engine.run(ask)
        for i, p in enumerate(prompts):
            assert np.abs(whole.per_prompt[i] - engine.run(replace(ask, study=Study(p), over_set=False)).values).max() < TOL


@pytest.mark.parametrize("method", ["atp", pytest.param("ig", marks=TABLE)])
def test_estimates(engine, method):
    whole = engine.run(Estimate(SET, "z", method, over_set=True))
    assert np.abs(whole.per_prompt - np.stack([engine.run(Estimate(s, "z", method)).values for s in ALONE])).max() < TOL


@pytest.mark.parametrize("by_pos", [False, pytest.param(True, marks=TABLE)])
def test_paths(engine, by_pos):
    ask = PathPatch(SET, ("L0H1", "L0.mlp"), ("L2H3.q@END",) if not by_pos else ("L2H3.k",), over_set=True, by_pos=by_pos)
    whole = engine.run(ask)
    for i, study in enumerate(ALONE):
        single = engine.run(replace(ask, study=study, over_set=False))
        at = [engine.model.check(study.prompt).clean.labels[c] for c in whole.cols] if by_pos else slice(None)
        own, got = single.values[:, at], whole.per_prompt[i]
        assert np.isfinite(got).any() and (np.isfinite(got) <= np.isfinite(own)).all() and np.nanmax(np.abs(got - own)) < TOL


CIRCUIT = Circuit("some", "any", ("L0H1", "L1H2@S2", "L2H3@END"))


@pytest.mark.parametrize("rest", ["patch", pytest.param("zero", marks=TABLE)])
def test_a_circuits_score(engine, rest):
    ask = Score(SET, CIRCUIT, ("faithfulness",), rest=rest)
    whole = engine.run(ask)
    single = [engine.run(replace(ask, study=s)) for s in ALONE]
    for name in ("model", "alone", "empty"):
        assert np.abs(getattr(whole, name).values - np.array([getattr(r, name).values[0] for r in single])).max() < TOL
    assert whole.prompts == (0, 1, 2, 3)


def test_eap_ig_is_the_mean_of_the_prompts(engine):
    whole = engine.run(Discover(SET, "eap-ig", edges=40))
    single = [engine.run(Discover(s, "eap-ig", edges=40)) for s in ALONE]
    assert np.abs(whole.scores - np.mean([r.scores for r in single], 0)).max() < TOL


def test_attention_and_attribution(engines):
    engine = engines["gpt2"]
    whole = engine.run(AttentionSet(SET, "clean"))
    single = [engine.run(AttentionSet(replace(s, prompt_set=(s.prompt,)), "clean", whole.labels)) for s in ALONE]
    assert whole.labels == ("IO", "S1", "S2", "END")
    assert np.nanmax(np.abs(whole.mean - np.nanmean([r.mean for r in single], 0))) < TOL
    totals = engine.run(AttributionSet(SET, "clean"))
    parts = [engine.run(AttributionSet(replace(s, prompt_set=(s.prompt,)), "clean")) for s in ALONE]
    assert np.abs(totals.totals - np.concatenate([r.totals for r in parts])).max() < TOL
    assert np.abs(totals.mean.heads - np.mean([r.mean.heads for r in parts], 0)).max() < TOL


# ------------------------------------------------------------------ means by label


def test_means_by_label(engines, references):
    """One head at its means by label, against hooks on Hugging Face's modules; a sweep and a circuit of all other heads use the same."""
    engine, ref = engines["gpt2"], references["gpt2"]
    model, spot, columns = engine.model, ("z", 1), references["gpt2"].columns("z", 2)
    checks = [model.check(p) for p in MIXED]
    kind = lambda row: {**{0: "first"}, **{i: name for name, i in row.labels.items()}}  # noqa: E731
    values: dict[str, list] = {}
    for c in checks:
        z, names = ref.read(c.corrupt.ids, spot)[0][:, columns], kind(c.corrupt)
        for i in range(len(c.corrupt.ids)):
            values.setdefault(names.get(i, "other"), []).append(z[i])
    mean = {name: t.stack(x).mean(0) for name, x in values.items()}
    swept = engine.run(Sweep(SET, "z", "mean", over_set=True))
    assert "by label (IO S1 S2 END)" in swept.convention
    for j, c in enumerate(checks):
        names = kind(c.clean)

        def put(x, names=names):
            for i in range(x.shape[1]):
                x[0, i, columns] = mean[names.get(i, "other")]

        logits = ref.run([c.clean.ids], [(spot, put)])[0][0, -1]
        want = logits[c.answers[0].ids[0]] - logits[c.foils[0].ids[0]]
        assert swept.per_prompt[j, 1, 2] == pytest.approx(want, abs=TOL)
        done = engine.run(Run(replace(SET, prompt=MIXED[j], interventions=(parse_intervention("L1H2=mean"),))))
        assert done.now.metric == pytest.approx(want, abs=TOL)
    alone = Circuit("all but one", "any", tuple(f"L{n}H{h}" for n in range(3) for h in range(4) if (n, h) != (1, 2)))
    scored = engine.run(Score(SET, alone, ("faithfulness",), rest="mean"))
    assert np.abs(scored.alone.values - swept.per_prompt[:, 1, 2]).max() < TOL and "by label" in scored.convention
    with pytest.raises(UserError, match="a pattern's mean"):
        engine.run(Sweep(SET, "pattern", "mean", over_set=True))


# ------------------------------------------------------------------ what does not fit


def test_prompts_that_do_not_fit_are_left_out_with_the_reason(engine):
    bad = (replace(MIXED[1], answers=("Mary",)), replace(MIXED[2], clean="", labels=()), replace(MIXED[0], corrupt=None))
    mixed = (MIXED[0], bad[0], MIXED[1], bad[1], bad[2])
    study, good = Study(MIXED[0], prompt_set=mixed), Study(MIXED[0], prompt_set=(MIXED[0], MIXED[1]))
    for ask in (Sweep(study, "z", over_set=True), Score(study, CIRCUIT, ("faithfulness",), rest="patch"), Discover(study, "eap", edges=10)):
        got, want = engine.run(ask), engine.run(replace(ask, study=good))
        assert "3 of 5 prompts of the set left out: prompt 2: answer 'Mary' is" in got.warning and "prompt 4: the clean prompt is empty" in got.warning
        if isinstance(ask, Sweep):
            assert got.prompts == (0, 2) and np.abs(got.values - want.values).max() < TOL
        elif isinstance(ask, Score):
            assert got.prompts == (0, 2) and got.faithfulness.mean == pytest.approx(want.faithfulness.mean, abs=TOL)
    got = engine.run(AttentionSet(study, "clean"))
    assert tuple(got.prompts) == (0, 2, 4) and "2 of 5 prompts of the set left out" in got.convention
    with pytest.raises(UserError, match="prompt 1 of the set: answer 'Mary' .* none of the other 1 fits"):
        engine.run(Sweep(Study(MIXED[0], prompt_set=bad[:2]), "z", over_set=True))


# ------------------------------------------------------------------ answers of several tokens


WHOLE = replace(PROMPT, answers=(" Mary and John",), foils=())


def test_the_whole_answers_log_probability(engines, references):
    """Clean, corrupted, a sweep of heads and its gradient, against Hugging Face on prompt and answer."""
    engine, ref = engines["gpt2"], references["gpt2"]
    check, study = engine.model.check(WHOLE), Study(WHOLE, metric=Metric("logprob_sum"))
    answer = check.answers[0].ids
    assert len(answer) == 3 and any("3 tokens" in h and "stands for it" in h for h in check.hints) and not check.problems

    def total(ids, edits=()) -> float:
        logits = ref.run([(*ids, *answer)], edits)[0][0]
        return sum(log_softmax(logits[len(ids) - 1 + i].astype(np.float64))[a] for i, a in enumerate(answer))

    clean, corrupt = check.clean.ids, check.corrupt.ids
    run = engine.run(Run(study))
    assert run.clean.metric == pytest.approx(total(clean), abs=TOL) and run.corrupt.metric == pytest.approx(total(corrupt), abs=TOL)
    assert run.clean.tokens.ids == clean and len(run.clean.top_ids) == len(clean)
    swept = engine.run(Sweep(study, "z"))
    plain = engine.run(Sweep(study, "z", plain=True))
    there = ref.run([(*clean, *answer)], read=[("z", 1)])[1]["z", 1]

    def put(x):
        x[:, :, ref.columns("z", 2)] = there[:, :, ref.columns("z", 2)]

    assert swept.values[1, 2] == pytest.approx(total(corrupt, [(("z", 1), put)]), abs=TOL)
    assert np.abs(swept.values - plain.values).max() < TOL
    by_pos = engine.run(Sweep(study, "attn"))
    assert by_pos.cols == tuple(map(str, range(len(clean)))) and by_pos.tokens.ids == corrupt
    everything = Circuit("all", "any", tuple(f"L{n}H{h}" for n in range(3) for h in range(4) if (n, h) != (1, 2)))
    scored = engine.run(Score(study, everything, ("faithfulness",), rest="patch"))
    other = ref.run([(*corrupt, *answer)], read=[("z", 1)])[1]["z", 1]

    def lose(x):
        x[:, :, ref.columns("z", 2)] = other[:, :, ref.columns("z", 2)]

    assert scored.alone.mean == pytest.approx(total(clean, [(("z", 1), lose)]), abs=TOL)
    step = engine.run(Sweep(replace(study, interventions=(parse_intervention("L1H2=scale:1.001"),), base="clean"), "nodes", "zero"))
    slope = engine.run(Estimate(study, "z", direction="noise"))
    assert np.isfinite(slope.values).all() and step.base != run.clean.metric


def test_the_slope_of_a_whole_answer(engines, references):
    """Attribution patching of logprob_sum is (other - own) . gradient by Hugging Face's own autograd."""
    engine, ref = engines["gpt2"], references["gpt2"]
    check = engine.model.check(WHOLE)
    answer, clean, corrupt = check.answers[0].ids, check.clean.ids, check.corrupt.ids
    other = ref.run([(*corrupt, *answer)], read=[("z", 1)])[1]["z", 1]
    kept = {}

    def leaf(_, args):
        kept["x"] = args[0].detach().requires_grad_(True)
        return (kept["x"], *args[1:])

    handle = ref.place("z", 1)[0].register_forward_pre_hook(leaf)
    logp = ref.hf(t.tensor([(*clean, *answer)]), use_cache=False).logits[0].log_softmax(-1)
    handle.remove()
    sum(logp[len(clean) - 1 + i, a] for i, a in enumerate(answer)).backward()
    want = ((other - kept["x"].detach()) * kept["x"].grad)[0, :, ref.columns("z", 2)].sum().item()
    got = engine.run(Estimate(Study(WHOLE, metric=Metric("logprob_sum")), "z", direction="noise"))
    assert got.values[1, 2] - got.base == pytest.approx(want, abs=TOL)
    ref.hf.zero_grad()


def test_a_whole_answer_over_a_set(engine):
    """Answers of two and of three tokens, prompts of three lengths: each prompt's own number."""
    prompts = tuple(replace(p, answers=(p.answers[0] + more,), foils=()) for p, more in zip(MIXED, (" and John", " it", "", " and it to")))
    ask = Sweep(Study(prompts[0], metric=Metric("logprob_sum"), prompt_set=prompts), "z", over_set=True)
    whole = engine.run(ask)
    for i, p in enumerate(prompts):
        assert np.abs(whole.per_prompt[i] - engine.run(replace(ask, study=replace(ask.study, prompt=p), over_set=False)).values).max() < TOL


def test_an_answer_by_its_first_token_says_so(engine):
    whole = replace(PROMPT, answers=(" Mary and John",))
    got, first = engine.run(Run(Study(whole))), engine.run(Run(Study(PROMPT)))
    assert got.clean.metric == first.clean.metric and "by its first token alone: ' Mary' (first of 3 tokens)" in got.convention
    assert "first of 3 tokens" in engine.run(Sweep(Study(whole), "z")).convention
    with pytest.raises(UserError, match="begin with the same token"):
        engine.run(Run(Study(replace(whole, foils=(" Mary",)))))
    for study, words in (
        (Study(replace(PROMPT, answers=(" Mary", " it")), metric=Metric("logprob_sum")), "of one answer"),
        (Study(PROMPT, metric=Metric("logprob_sum", 3)), "its position is END"),
        (Study(replace(PROMPT, answers=(" Mary" * 70,)), metric=Metric("logprob_sum")), "context holds"),
    ):
        with pytest.raises(UserError, match=words):
            engine.run(Sweep(study, "z"))
    assert parse_node("L1H1@END").pos == "END"


# ------------------------------------------------------------------ sets made from templates


@pytest.mark.parametrize("make", MAKES)
def test_a_made_set_is_in_the_models_own_words(engines, make):
    """By the tokenizer alone: answers of one token, a corrupted partner of equal length, and labels that point at what they name."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "zoo")
    count = lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])  # noqa: E731
    got = engines["zoo"].run(MakeSet(make, n=5, seed=3))
    assert len({p.clean for p in got.prompts}) == len(got.prompts) == 5 and got.lengths[0] == count(got.prompts[0].clean) + 1  # BOS
    for p in got.prompts:
        assert count(p.clean) == count(p.corrupt) and p.clean != p.corrupt and not set(p.answers) & set(p.foils)
        assert all(count(p.clean + a) == count(p.clean) + 1 for a in (*p.answers, *p.foils))
        assert read_prompt(parse_json(line_of(p))) == p
    assert engines["zoo"].run(MakeSet(make, n=5, seed=3)).prompts == got.prompts
    assert MAKES[make] in got.convention and engines["zoo"].run(MakeSet(make, n=5, seed=4)).prompts != got.prompts


@pytest.mark.parametrize("corruption", ["abc", "swap", "other"])
def test_ioi(engines, corruption):
    """IO and S stand where the labels say in both orders; what the corruption leaves; with all templates, prompts of several lengths."""
    got = engines["zoo"].run(MakeSet("ioi", n=8, corruption=corruption))
    orders = set()
    for p in got.prompts:
        io, s, labels = p.answers[0], p.foils[0], dict(p.labels)
        assert [p.clean[labels[k] :].startswith(w) for k, w in (("IO", io), ("S1", s), ("S2", s))] == [True] * 3 and p.clean.count(s) == 2
        orders.add(labels["IO"] < labels["S1"])
        assert {"abc": io not in p.corrupt and s not in p.corrupt, "swap": p.corrupt.count(io) == 2, "other": p.corrupt.count(s) == p.corrupt.count(io) == 1}[
            corruption
        ]
    assert orders == {True, False}
    assert len(set(engines["zoo"].run(MakeSet("ioi", n=12, templates=15)).lengths)) > 1


def test_only_what_the_model_gets_right(engines, references):
    engine, ref = engines["zoo"], references["zoo"]
    every, right = (engine.run(MakeSet("capitals", n=12, correct=c)) for c in (False, True))
    good = []
    for p in every.prompts:
        c = engine.model.check(p)
        logits = ref.run([c.clean.ids])[0][0, -1]
        good.append(logits[c.answers[0].ids[0]] > logits[c.foils[0].ids[0]])
    assert every.right == sum(good) and every.tried == 12
    assert set(right.prompts) >= {p for p, g in zip(every.prompts, good) if g} and right.clean > 0
    bad = (*every.prompts[:2], replace(every.prompts[2], clean=""), replace(every.prompts[3], answers=("Paris",)))
    seen = engine.run(MakeSet("mine.jsonl", prompts=bad))
    assert seen.prompts == every.prompts[:2] and [i for i, _ in seen.left] == [2, 3] and "leading space" in seen.left[1][1]
    for ask, words in (
        (MakeSet("novel"), "can't be made"),
        (MakeSet(n=0), "n is at least 1"),
        (MakeSet(templates=99), "1 to 15"),
        (MakeSet(corruption="x"), "not a corruption"),
    ):
        with pytest.raises(UserError, match=words):
            engine.run(ask)
