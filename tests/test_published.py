"""Published figures of GPT-2 small: the comparison on the recorded values, and the measurement on a random model against Hugging Face with plain hooks."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch as t

from techniques.identities import published
from engine import Engine, main
from techniques.output.requests import Run
from vocabulary.nodes import parse_intervention
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Progress
from techniques.identities.published import GROUPS, IDS, PROMPTS, SHAPE, compare, measure

RECORDED = {f"{g.title}: {name}": value for g in GROUPS for name, value in g.values.items()}


def gpt2(tokenizer, folder, **shape):
    """A random GPT-2 whose norms and biases are not the trivial ones."""
    from transformers import GPT2Config, GPT2LMHeadModel

    t.manual_seed(0)
    small = {"vocab_size": len(tokenizer) + 3, "n_layer": 12, "n_head": 12, "n_embd": 48, "n_positions": 128}
    hf = GPT2LMHeadModel(GPT2Config(**small | shape, initializer_range=0.25, bos_token_id=0, eos_token_id=1))
    with t.no_grad():
        for p in hf.parameters():
            if p.ndim == 1:
                p += 0.3 * t.randn_like(p)
    hf.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE in which every word of the prompts is one token, with its leading space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|bos|>", "<|eos|>"])
    tok.train_from_iterator([p.clean for p in PROMPTS] * 50, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<|bos|>", eos_token="<|eos|>")


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    return gpt2(tokenizer, tmp_path_factory.mktemp("published") / "gpt2")


@pytest.fixture(scope="module")
def engine(folder):
    engine = Engine(str(folder))
    yield engine
    engine.check_hooks()


@pytest.fixture(scope="module")
def measured(engine) -> tuple[dict[str, float], list]:
    steps, parts = measure(engine), []
    while True:
        try:
            parts.append(next(steps))
        except StopIteration as stop:
            return stop.value, parts


@pytest.fixture(scope="module")
def reference(folder):
    from reference import Reference

    return Reference(folder)


# ------------------------------------------------------------------ the comparison


def test_the_recorded_values_pass():
    rows = compare(RECORDED)
    assert len(rows) == len(RECORDED) > 40 and all(r.ok and r.error == 0 for r in rows)
    assert len({r.name for r in rows}) == len(rows)


@pytest.mark.parametrize("key", RECORDED)
def test_one_perturbed_value_is_one_broken_row(key):
    tolerance = next(g.tolerance for g in GROUPS if key.startswith(g.title + ":"))
    assert all(r.ok for r in compare(RECORDED | {key: RECORDED[key] + 0.9 * tolerance}))
    for wrong in (RECORDED[key] + 1.1 * tolerance + 1e-6, RECORDED[key] - 1.1 * tolerance - 1e-6, math.nan):
        (broken,) = [r for r in compare(RECORDED | {key: wrong}) if r.ok is not True]
        assert broken.ok is False and broken.name == f"published {key}" and f"{RECORDED[key]:g} in " in broken.note


def test_a_figure_that_was_not_measured_is_an_error():
    with pytest.raises(KeyError, match="L8H6.v"):
        compare({k: v for k, v in RECORDED.items() if not k.endswith("L8H6.v")})


# ------------------------------------------------------------------ the prompts


def test_the_prompts_are_four_pairs_that_differ_in_s2_alone(engine):
    assert len(PROMPTS) == len(IDS) == 8
    for p, partner, ids, other in zip(PROMPTS[::2], PROMPTS[1::2], IDS[::2], IDS[1::2]):
        assert (p.clean, p.corrupt, p.answers, p.foils) == (partner.corrupt, partner.clean, partner.foils, partner.answers) and ids == other[::-1]
    for p in PROMPTS:
        check = engine.model.check(p)
        assert not check.problems and (len(check.clean.ids), check.clean.labels) == (15, {"S2": 10, "END": 14}) and check.clean.bos
        assert [i for i, (a, b) in enumerate(zip(check.clean.ids, check.corrupt.ids)) if a != b] == [10]
        assert (check.clean.texts[10],) == p.foils and (check.corrupt.texts[10],) == p.answers


# ------------------------------------------------------------------ the measurement


def test_it_measures_every_figure(measured):
    values, parts = measured
    assert values.keys() == RECORDED.keys() and all(math.isfinite(v) for v in values.values())
    assert parts and all(isinstance(p, Progress) and 0 <= p.done <= p.total for p in parts)
    by_name = {r.name: r for r in compare(values)}
    assert by_name["published IOI denoising: L0.resid_pre@S2"].ok, "all of the difference goes through S2's embedding"
    assert not by_name["published IOI denoising: L8H6"].ok and not by_name["published IOI prompts: answers with the published ids"].ok


def difference(engine, reference, edits_of) -> float:
    """The mean logit difference of the corrupted prompts, edits_of(clean ids, corrupted ids), by Hugging Face."""
    total = 0.0
    for p in PROMPTS:
        check = engine.model.check(p)
        logits = reference.run([check.corrupt.ids], edits_of(check.clean.ids))[0][0, -1]
        total += float(logits[check.answers[0].ids[0]] - logits[check.foils[0].ids[0]])
    return total / len(PROMPTS)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["L8.resid_pre@S2", "L8.resid_pre@END", "L5.attn@S2", "L0.mlp@S2", "L10H7", "L9H9.q", "L10H7.k", "L8H6.v"])
def test_denoising_equals_hugging_face_with_plain_hooks(engine, reference, measured, name):
    node = parse_intervention(f"{name}=patch").node
    spot = (node.part if node.site == "head" else node.site, node.layer)
    columns = reference.columns(node.part, node.head) if node.site == "head" else slice(None)
    where = slice(None) if node.pos is None else {"S2": 10, "END": 14}[node.pos]

    def patch(ids):
        value = reference.read(ids, spot)

        def write(x):
            x[:, where, columns] = value[:, where, columns]

        return [(spot, write)]

    corrupt = difference(engine, reference, lambda ids: [])
    clean = -corrupt  # the partner of every prompt is in the set
    values = measured[0]
    assert values["IOI logit difference: clean"] == pytest.approx(clean, abs=1e-4)
    assert values["IOI logit difference: corrupted"] == pytest.approx(corrupt, abs=1e-4)
    want = (difference(engine, reference, patch) - corrupt) / (clean - corrupt)
    assert values[f"IOI denoising: {name}"] == pytest.approx(want, abs=1e-3)


@pytest.mark.parametrize("name", ["L8.resid_pre@S2", "L10H7.pattern"])
def test_denoising_equals_patched_runs(engine, measured, name):
    studies = [Study(p, (parse_intervention(f"{name}=patch"),), base="corrupt") for p in PROMPTS]
    runs = [engine.run(Run(s, 1)) for s in studies]
    now, clean, corrupt = (np.mean([getattr(r, w).metric for r in runs]) for w in ("now", "clean", "corrupt"))
    assert measured[0][f"IOI denoising: {name}"] == pytest.approx((now - corrupt) / (clean - corrupt), abs=1e-3)


@pytest.mark.parametrize("layer, head", [(9, 9), (10, 7), (11, 1)])
def test_direct_attribution_leaves_out_the_folded_value_bias(engine, reference, measured, layer, head):
    """What the head writes without its b_V and its norm's bias, through the final norm at the run's own scale, onto the difference of unembedding rows."""
    check = engine.model.check(PROMPTS[0])
    ids, hf, columns = check.clean.ids, reference.hf, reference.columns("z", head)
    attn = hf.transformer.h[layer].attn
    with t.no_grad():
        value = slice(2 * 48 + 4 * head, 2 * 48 + 4 * (head + 1))
        bias = attn.c_attn.bias[value] + hf.transformer.h[layer].ln_1.bias @ attn.c_attn.weight[:, value]
        written = ((reference.read(ids, ("z", layer))[0, -1, columns] - bias) @ attn.c_proj.weight[columns]).double().numpy()
        gain = hf.transformer.ln_f.weight.double().numpy()
    last = reference.read(ids, ("resid_post", 11))[0, -1].double().numpy()
    scale = np.sqrt(last.var() + hf.config.layer_norm_epsilon)
    direction = reference.unembed[check.answers[0].ids[0]] - reference.unembed[check.foils[0].ids[0]]
    want = ((written - written.mean()) / scale * gain) @ direction
    assert measured[0][f"direct attribution to Mary - John: L{layer}H{head}"] == pytest.approx(want, abs=1e-4)


def test_head_scores_on_random_repeated_tokens(engine, reference, measured):
    from techniques.attention.patterns import random_repeats

    rows = random_repeats(engine.model).tolist()
    patterns = reference.patterns(rows)
    ones = {(5, 5): [], (7, 10): []}
    previous = np.zeros((12, 12))
    for r, ids in enumerate(rows):
        for i in range(1, len(ids)):
            previous += [layer[r, :, i, i - 1] for layer in patterns]
            after = [j + 1 for j in range(i) if ids[j] == ids[i]]
            for layer, head in ones if after else ():
                ones[layer, head].append(patterns[layer][r, head, i, after].sum())
    for (layer, head), found in ones.items():
        assert measured[0][f"induction score: L{layer}H{head}"] == pytest.approx(np.mean(found), abs=1e-4)
    assert measured[0]["previous-token head: rank of L4H11"] == (previous > previous[4, 11]).sum()


# ------------------------------------------------------------------ what check does with it


def test_only_a_model_of_gpt2s_shape_in_float32_is_compared(engine, monkeypatch):
    info = replace(engine.model.info, **SHAPE)
    assert published.applies(info) and not any(published.applies(replace(info, **{k: v * 2})) for k, v in SHAPE.items())
    assert published.rows(engine, engine.model.info) == ()
    (row,) = published.rows(engine, replace(info, dtype="bfloat16"))
    assert row.ok is None and "bfloat16" in row.note
    monkeypatch.setattr(published, "PROMPTS", (Prompt("When John gave it to", "When Mary gave it to", (" Mary",), (" John",), (("S2", 5),)),))
    (row,) = published.rows(engine, info)
    assert row.ok is None and "15 tokens with S2 at 10" in row.note


def test_a_model_of_gpt2s_shape_is_known_by_its_config(tokenizer, tmp_path):
    """One layer's width and the vocabulary are enough to see that Loupe reads the names from the config as SHAPE has them."""
    info = Engine(str(gpt2(tokenizer, tmp_path / "shape", n_layer=1, n_embd=24, vocab_size=50257))).model.info
    assert (info.architecture, info.d_vocab, info.n_heads, info.dtype) == ("GPT2LMHeadModel", SHAPE["d_vocab"], SHAPE["n_heads"], "float32")


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [None, "IOI denoising: L8H6.v"])
def test_check_shows_the_figures_and_fails_on_one_that_is_off(folder, measured, monkeypatch, capsys, wrong):
    """The command on the small model, taken for gpt2, with the recorded values as what was measured."""

    def recorded(_):
        yield Progress(0, 1)
        return RECORDED | ({wrong: RECORDED[wrong] + 0.1} if wrong else {})

    args = ["check", str(folder), "--clean", PROMPTS[0].clean, "--corrupt", PROMPTS[0].corrupt]
    monkeypatch.setattr(published, "SHAPE", {"n_layers": 12})
    monkeypatch.setattr(published, "measure", recorded)
    assert main(args) == (1 if wrong else 0)
    out, err = capsys.readouterr()
    shown = [line for line in out.splitlines() if "  published " in line]
    assert len(shown) == len(RECORDED) and all(f"published {k} " in line for k, line in zip(RECORDED, shown))
    assert [line for line in shown if "BROKEN" in line] == [line for line in shown if wrong and f"published {wrong} " in line]
    assert (f"published {wrong}" in err) == bool(wrong) and err.count("broken") == bool(wrong)


@pytest.mark.slow
def test_check_says_nothing_of_them_on_another_model(folder, capsys):
    args = ["check", str(folder), "--clean", PROMPTS[0].clean, "--corrupt", PROMPTS[0].corrupt, "--json"]
    assert main(args) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows and not [r for r in rows if "published" in r["name"]]
