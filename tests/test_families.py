"""Resumed sweeps on architectures beside those of the other tests: every cell equals that of a whole forward pass under hooks."""

import numpy as np
import pytest

from conftest import PROMPT, tokenizer
from techniques.patching.requests import Sweep
from vocabulary.prompts import Study

SMALL = {"vocab_size": 430, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = WIDE | {"num_key_value_heads": 2}
FAMILIES = {
    "gptj": ("GPTJConfig", SMALL | {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "mpt": ("MptConfig", SMALL | {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64}),  # keeps keys and values in no layer of Hugging Face's cache
    "bloom": ("BloomConfig", SMALL | {"hidden_size": 32, "n_layer": 3, "n_head": 4}),  # ALiBi
    "olmo2": ("Olmo2Config", SMALL | GROUPED),  # normalises q and k over all heads together
    "mistral": ("MistralConfig", SMALL | GROUPED | {"sliding_window": 8}),
    "gemma": ("GemmaConfig", SMALL | GROUPED | {"head_dim": 8}),  # a norm's weight is an offset from one
    "phi": ("PhiConfig", SMALL | WIDE),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    import torch as t
    import transformers as tr

    from engine import Engine

    name, fields = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    t.manual_seed(0)
    hf = tr.AutoModelForCausalLM.from_config(getattr(tr, name)(**fields))
    with t.no_grad():
        for p in hf.parameters():
            if p.ndim == 1:
                p += 0.3 * t.randn_like(p)
    hf.save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    return Engine(str(folder))


@pytest.mark.parametrize("kind", ["z", "q", "pattern", "resid_pre", "attn_mlp"])
def test_resumed_cells_equal_whole_passes(family, kind):
    fast, plain = (family.run(Sweep(Study(PROMPT), kind, plain=p)) for p in (False, True))
    np.testing.assert_allclose(fast.values, plain.values, atol=1e-4)
