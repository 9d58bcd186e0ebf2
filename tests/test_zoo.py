import sys
import json
import random
from pathlib import Path

import pytest
import torch as t
from transformers import AutoModelForCausalLM, AutoTokenizer

ZOO = Path(__file__).parent.parent / "zoo"
sys.path.insert(0, str(ZOO))

import corpus  # noqa: E402
import evaluate  # noqa: E402
import make_prompts  # noqa: E402

TASKS = list(make_prompts.BUILDERS)
SHIPPED = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    n = t.get_num_threads()
    t.set_num_threads(1)
    yield
    t.set_num_threads(n)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(ZOO, local_files_only=True)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(ZOO, dtype=t.float32, local_files_only=True, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def logits_fn(model):
    def run(ids):
        with t.no_grad():
            return model(ids, attention_mask=t.ones_like(ids)).logits

    return run


def load(task: str) -> list[make_prompts.Prompt]:
    return [make_prompts.Prompt(**json.loads(line)) for line in (ZOO / "prompts" / f"{task}.jsonl").read_text().splitlines()]


def test_folder_is_small_and_loads(model, tokenizer):
    assert sum((ZOO / name).stat().st_size for name in SHIPPED) <= 4_000_000
    assert model.config.model_type == "gpt2" and model.config.n_layer == 4 and model.config.n_head == 4
    assert model.config.vocab_size == len(tokenizer)
    assert tokenizer.bos_token_id == 0


def test_tokenizer_is_lossless(tokenizer):
    for text in ("When Mary and John went to the store,", "  naïve\n\tzoë 日本 1732 {x}", " supermarket"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    for word in (" Mary", " John", " store", " drink", "32", " 17", " A"):
        assert len(tokenizer.encode(word)) == 1


def test_centring_is_baked_in(model):
    writes = [model.transformer.wte.weight, model.transformer.wpe.weight]
    writes += [layer.weight for block in model.transformer.h for layer in (block.attn.c_proj, block.mlp.c_proj)]
    assert all(weight.mean(-1).abs().max() < 1e-3 for weight in writes)
    assert model.lm_head.weight.mean(0).abs().max() < 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_prompt_set(task, tokenizer):
    prompts = load(task)
    assert 24 <= len(prompts) <= 32
    make_prompts.check(tokenizer, prompts)
    for prompt in prompts:
        assert not prompt.clean.endswith(" ")
        for label, offset in prompt.labels.items():
            assert not prompt.clean[offset].isspace(), (prompt, label)
            token = make_prompts.token_at(tokenizer, prompt.clean, offset)
            assert token < len(tokenizer.encode(prompt.clean)) - 1, (prompt, label)
            if label in ("IO", "S1", "S2"):
                name = prompt.answer if label == "IO" else prompt.foil
                assert prompt.clean[offset:].startswith(name.strip())
                assert tokenizer.decode(tokenizer.encode(prompt.clean)[token]).strip() == name.strip()


@pytest.mark.parametrize("task", ["ioi_abba", "ioi_baba", "ioi_distractor"])
def test_ioi_corruption_is_a_third_name(task):
    for prompt in load(task):
        s2 = prompt.labels["S2"]
        other = prompt.corrupt[s2:].split(" ")[0]
        assert prompt.corrupt[:s2] == prompt.clean[:s2]
        assert other in corpus.NAMES and other not in (prompt.answer.strip(), prompt.foil.strip())


def test_famous_prompt_is_first():
    first = load("ioi_abba")[0]
    assert (first.clean, first.answer, first.foil) == (evaluate.FAMOUS, " Mary", " John")


def test_no_training_document_joins_a_held_out_pair():
    r = random.Random(corpus.TRAIN_SEED + 128)
    for _ in range(5000):
        names = corpus.names_in(corpus.document(r))
        assert not any(corpus.pair_held(a, b) for i, a in enumerate(names) for b in names[i + 1 :])
    for task in ("ioi_abba", "ioi_baba", "ioi_distractor"):
        assert all(corpus.pair_held(prompt.answer.strip(), prompt.foil.strip()) for prompt in load(task)[1:])


def test_corpus_sample():
    lines = (ZOO / "corpus.txt").read_text().splitlines()
    assert 60_000 <= (ZOO / "corpus.txt").stat().st_size <= 100_000
    assert all(lines) and not any(corpus.leaks(line) for line in lines)


@pytest.mark.parametrize("task", TASKS)
def test_prompt_set_is_solved(task, tokenizer, logits_fn):
    prompts = load(task)
    probs = evaluate.end_logits(logits_fn, tokenizer, [prompt.clean for prompt in prompts]).softmax(-1)
    right = 0
    for row, prompt in zip(probs, prompts):
        answer, foil = ([side] if isinstance(side, str) else side for side in (prompt.answer, prompt.foil))
        right += sum(row[tokenizer.encode(x)].item() for x in answer) > sum(row[tokenizer.encode(x)].item() for x in foil)
    assert right >= 0.95 * len(prompts)


@pytest.mark.slow
def test_behaviour_targets_on_a_small_sample(tokenizer, logits_fn):
    figures = evaluate.behaviour(logits_fn, tokenizer, n=60)
    figures["induction_drop"] = figures["induction_first"] - figures["induction_second"]
    slack = 0.04
    for key, (sense, target, _) in evaluate.TARGETS.items():
        if key in figures:
            assert figures[key] >= target - slack if sense == ">=" else figures[key] <= target, (key, figures[key])


@pytest.mark.slow
def test_no_head_does_it_alone(model, tokenizer):
    table = evaluate.ioi_heads(model, tokenizer, n=24)["table"]
    assert max(row["denoise"] for row in table.values()) <= 0.75


def test_induction_heads(model):
    scores = evaluate.pattern_scores(model)
    assert sum(score > 0.8 for score in scores["induction"].values()) >= 2
    assert max(scores["previous"].values()) > 0.8
