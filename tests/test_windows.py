"""What a head can't look at is blank, not 0.0: later sources, and those outside a sliding window or chunk; in patterns, sweeps, means and exports."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
import transformers as tr

from conftest import CORRUPT, PROMPT
from model.places import visible
from techniques.attention.pictures import pattern_cell, pattern_grid, small_patterns
from techniques.attention.requests import Attention, AttentionSet
from techniques.circuits.requests import PathPatch
from techniques.patching.requests import Estimate, Sweep
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Study
from vocabulary.wire import to_json

WINDOW, SEQ = 4, 12
WIDE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32}
SMALL = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
CONFIGS = {
    "mistral": lambda: tr.MistralConfig(**SMALL, **WIDE, sliding_window=WINDOW),
    "mistral, whole": lambda: tr.MistralConfig(**SMALL, **WIDE, sliding_window=None),
    "qwen2": lambda: tr.Qwen2Config(**SMALL, **WIDE, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen2, whole": lambda: tr.Qwen2Config(**SMALL, **WIDE, use_sliding_window=False, sliding_window=WINDOW),
    "phi3": lambda: tr.Phi3Config(**SMALL, **WIDE, sliding_window=WINDOW),
    "gemma3": lambda: tr.Gemma3TextConfig(**SMALL, **WIDE, head_dim=8, sliding_window=WINDOW),
    "gpt-neo": lambda: tr.GPTNeoConfig(**SMALL, hidden_size=16, num_layers=4, num_heads=2, attention_types=[[["global", "local"], 2]], window_size=WINDOW),
    "llama": lambda: tr.LlamaConfig(**SMALL, **WIDE),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_mask_is_hugging_faces_own(name):
    hf = tr.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with t.no_grad():
        attentions = hf(t.arange(3, 3 + SEQ)[None], use_cache=False, output_attentions=True).attentions
    model = SimpleNamespace(bridge=SimpleNamespace(original_model=hf), causal=True)
    for layer, a in enumerate(attentions):
        assert ((a[0] > 0).all(0) == visible(model, layer, SEQ)).all() and ((a[0] == 0).all(0) == ~visible(model, layer, SEQ)).all(), layer
    assert name not in ("gpt-neo", "qwen2") or len({visible(model, layer, SEQ).sum().item() for layer in range(4)}) == 2


def test_outside_a_window_is_blank(engines):
    """Gemma-2's even layers see eight tokens, its odd ones all."""
    engine = engines["gemma2"]
    distance = np.arange(15)[:, None] - np.arange(15)
    for layer, size in ((0, 8), (1, 99), (2, 8)):
        blank = (distance < 0) | (distance >= size)
        for ask in (Attention(Study(PROMPT), layer), Attention(Study(PROMPT), layer, "clean-corrupt"), Attention(Study(PROMPT), layer, weighted=True)):
            got = engine.run(ask)
            assert (np.isnan(got.pattern) == blank).all()
            grid = pattern_grid(got, 1)
            assert (np.isnan(grid.values) == blank).all() and grid.level[14, 0] == (-1 if size == 8 else grid.level[14, 0])
            assert grid.tsv().splitlines()[-1].split("\t")[1] == ("" if size == 8 else f"{got.pattern[1, 14, 0]:.6g}")
            assert (json.loads(json.dumps(to_json(got), allow_nan=False))["pattern"][1][14][0] is None) == (size == 8)
            words = "".join(text for text, _ in pattern_cell(got, 1, 14, 0, True))
            assert ("outside its window" in words) == (size == 8) and "nan" not in words
            assert small_patterns(got, 0, 100, 20, "colour")
        swept = engine.run(Sweep(Study(PROMPT), "cells", node=f"L{layer}H1"))
        assert (np.isnan(swept.values) == blank).all()
        assert (np.isnan(engine.run(Estimate(Study(PROMPT), "cells", node=f"L{layer}H1")).values) == blank).all()
    with pytest.raises(UserError, match="no cell"):
        engine.run(Sweep(Study(PROMPT), "cells", node="L0H1", only=((14, 0),)))


def test_means_between_labels_outside_a_window_are_blank(engines):
    study = Study(PROMPT, prompt_set=(PROMPT, replace(PROMPT, clean=CORRUPT)))
    got = engines["gemma2"].run(AttentionSet(study, "clean", ("IO", "S2", "END")))
    assert np.isnan(got.mean[0, :, 2, 0]).all() and np.isnan(got.std[0, :, 2, 0]).all() and np.isfinite(got.mean[1, :, 2, 0]).all()
    assert np.isfinite(got.mean[0, :, 2, 1]).all()


# ------------------------------------------------------------------ what titles say


def test_a_patch_under_interventions_says_that_its_source_has_none(engines):
    do = Study(PROMPT, (parse_intervention("L1H1=zero"),))
    for ask in (Sweep(do, "z"), Estimate(do, "z"), PathPatch(do, direction="denoise")):
        assert "the clean run without the interventions" in engines["zoo"].run(ask).convention
    assert "the corrupted run without the interventions" in engines["zoo"].run(Sweep(do, "z", direction="noise")).convention
    for ask in (Sweep(Study(PROMPT), "z"), Sweep(do, "z", "zero"), PathPatch(Study(PROMPT))):
        assert "without the interventions" not in engines["zoo"].run(ask).convention


def test_paths_to_each_receiver_are_titled_so(engines):
    run = lambda **how: engines["zoo"].run(PathPatch(Study(PROMPT), ("L0H1",), **how)).convention  # noqa: E731
    assert run(each="receiver").startswith("path patching L0H1 → each receiver;") and run().startswith("path patching L0H1 → logits;")
    assert run(each="receiver", receivers=("L3H2.q@END",)).startswith("path patching L0H1 → each receiver at END;")
