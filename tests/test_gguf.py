"""GGUF files: one written by the gguf package from a random Llama has the folder's numbers; what is no GGUF file is refused in words."""

import json

import numpy as np
import gguf
import pytest
import torch as t
from transformers import AutoModelForCausalLM

from engine import Engine
from vocabulary.nodes import UserError

PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def write(folder, file, quantised: bool):
    """The folder's Llama as llama.cpp's converter lays it out: rows of W_Q and W_K interleaved for its rotation."""
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=t.float32)
    c, out = hf.config, gguf.GGUFWriter(file, "llama")
    out.add_block_count(c.num_hidden_layers)
    out.add_context_length(c.max_position_embeddings)
    out.add_embedding_length(c.hidden_size)
    out.add_feed_forward_length(c.intermediate_size)
    out.add_head_count(c.num_attention_heads)
    out.add_head_count_kv(c.num_key_value_heads)
    out.add_layer_norm_rms_eps(c.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(c.vocab_size)
    made = json.loads((folder / "tokenizer.json").read_text())["model"]
    words = sorted(made["vocab"], key=made["vocab"].get)
    out.add_tokenizer_model("gpt2")
    out.add_token_list(words + [f"unused{i}" for i in range(c.vocab_size - len(words))])
    out.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in made["merges"]])
    out.add_bos_token_id(0)
    out.add_eos_token_id(1)
    for name, x in hf.state_dict().items():
        x = x.numpy()
        if name.startswith("model.layers."):
            _, _, layer, *part, _ = name.split(".")
            part = ".".join(part)
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = c.num_attention_heads if "q_proj" in part else c.num_key_value_heads
                x = x.reshape(heads, 2, -1, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
            name = f"blk.{layer}.{PARTS[part]}.weight"
        else:
            name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}[name]
        x = np.ascontiguousarray(x)
        if quantised and x.ndim == 2 and x.shape[1] % 32 == 0:
            out.add_tensor(name, gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            out.add_tensor(name, x)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.slow
def test_the_numbers_are_the_folders(folders, tmp_path):
    write(folders["llama"], tmp_path / "plain.gguf", False)
    engine = Engine(str(tmp_path / "plain.gguf"))
    hf = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=t.float32)
    ids = t.tensor([[5, 9, 30, 41, 7]])
    assert t.allclose(engine.model.forward(ids, keep=0)[0], hf(ids).logits, atol=1e-4) and "dequantised" not in engine.model.info.warning
    assert engine.model.info.n_params == sum(p.numel() for p in hf.parameters())
    write(folders["llama"], tmp_path / "q8.gguf", True)
    quantised = Engine(str(tmp_path / "q8.gguf")).model
    assert quantised.info.warning.startswith("weights dequantised from Q8_0") and quantised.info.dtype == "float32"
    off = (quantised.forward(ids, keep=0)[0] - hf(ids).logits).abs().max().item()
    assert 1e-4 < off < 1, off


def test_what_is_refused(folders, tmp_path):
    write(folders["llama"], tmp_path / "m.gguf", False)
    whole = (tmp_path / "m.gguf").read_bytes()
    for name, data in (("cut", whole[: len(whole) // 2]), ("text", b"no gguf"), ("empty", b"")):
        (tmp_path / f"{name}.gguf").write_bytes(data)
        with pytest.raises(UserError, match=f"{name}.gguf is truncated or not a GGUF file"):
            Engine(str(tmp_path / f"{name}.gguf"))
    with pytest.raises(UserError, match="not a model|holds GGUF files"):
        Engine(str(tmp_path))
