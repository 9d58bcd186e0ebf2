"""Tiny random folders of the decoder-only text architectures that TransformerLens's Bridge lists and transformers can build from a config, with effects of real size."""

import zlib
from pathlib import Path

import torch as t
import transformers as tr

from conftest import tokenizer

N_VOCAB = 426  # the tokenizer's, and a few rows that no token has
BASE = {"vocab_size": N_VOCAB, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
OLD = BASE | {"n_embd": 32, "n_layer": 2, "n_head": 4}  # GPT-2's names
WIDE = BASE | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = WIDE | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4}
STATES = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 16}
FULL = ["full_attention"] * 2
SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}

FAMILIES: dict[str, tuple[str, dict]] = {
    # learned positions, LayerNorm
    "gpt2": ("GPT2", OLD | {"n_positions": 64}),
    "openai-gpt": ("OpenAIGPT", OLD | {"n_positions": 64}),  # norms after the sums
    "gpt_bigcode": ("GPTBigCode", OLD | {"n_positions": 64, "multi_query": True}),
    "gpt_bigcode-multi_head": ("GPTBigCode", OLD | {"n_positions": 64, "multi_query": False}),
    "gpt_neo": (
        "GPTNeo",
        BASE
        | {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 64,
            "window_size": 8,
            "attention_types": [[["global", "local"], 1]],
            "intermediate_size": 48,
        },
    ),
    "opt": (
        "OPT",
        BASE | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "opt-350m": (
        "OPT",
        BASE
        | {
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "xglm": ("XGLM", BASE | {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64}),
    # ALiBi
    "bloom": ("Bloom", BASE | {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("Mpt", BASE | {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}),
    "falcon-alibi": ("Falcon", WIDE | {"ffn_hidden_size": 48, "multi_query": False, "alibi": True, "parallel_attn": False, "bias": True}),
    # rotary, parallel or not
    "falcon-7b": ("Falcon", WIDE | {"ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "falcon-40b": ("Falcon", WIDE | {"ffn_hidden_size": 48, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "gpt_neox": ("GPTNeoX", WIDE | {"use_parallel_residual": True, "rotary_pct": 0.5}),
    "gpt_neox-sequential": ("GPTNeoX", WIDE | {"use_parallel_residual": False, "rotary_pct": 0.5}),
    "gptj": ("GPTJ", OLD | {"n_positions": 64, "rotary_dim": 4}),
    "codegen": ("CodeGen", OLD | {"n_positions": 64, "rotary_dim": 4}),
    "phi": ("Phi", WIDE | {"partial_rotary_factor": 0.5}),
    "phi-qk_norm": ("Phi", WIDE | {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "stablelm": ("StableLm", GROUPED | {"partial_rotary_factor": 0.5, "use_qkv_bias": True}),
    "stablelm-parallel": ("StableLm", GROUPED | {"partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True}),
    "cohere": ("Cohere", GROUPED | {"logit_scale": 0.5}),
    "cohere-qk_norm": ("Cohere", GROUPED | {"logit_scale": 0.5, "use_qk_norm": True}),
    "cohere2": ("Cohere2", GROUPED | {"logit_scale": 0.5} | SLIDING),
    # Llama and what is close to it
    "llama": ("Llama", GROUPED),
    "llama-bias": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "mistral": ("Mistral", GROUPED | {"sliding_window": 8}),
    "ministral3": ("Ministral3", GROUPED | {"head_dim": 8, "sliding_window": None}),
    "qwen2": ("Qwen2", GROUPED),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 12}),
    "phi3": ("Phi3", GROUPED | {"partial_rotary_factor": 0.5}),
    "starcoder2": ("Starcoder2", GROUPED | {"use_bias": True}),
    "arcee": ("Arcee", GROUPED),
    "apertus": ("Apertus", GROUPED),
    "seed_oss": ("SeedOss", GROUPED | {"head_dim": 12}),
    "smollm3": ("SmolLM3", GROUPED | {"no_rope_layers": [1, 0]}),
    "ernie4_5": ("Ernie4_5", GROUPED | {"use_bias": True}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", GROUPED | {"head_dim": 8}),
    "nanochat": ("NanoChat", GROUPED | {"final_logit_softcapping": 5.0}),
    "jais2": ("Jais2", GROUPED),
    "bitnet": ("BitNet", GROUPED),
    "hrm_text": ("HrmText", GROUPED),
    "youtu": ("Youtu", WIDE | LATENT),
    "granite": ("Granite", GROUPED | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0}),
    "nemotron": ("Nemotron", GROUPED | {"partial_rotary_factor": 0.5, "head_dim": 8}),
    "modernbert-decoder": ("ModernBertDecoder", WIDE | {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 0, "sep_token_id": 1}),
    # norms elsewhere
    "olmo": ("Olmo", GROUPED),
    "olmo-clip": ("Olmo", GROUPED | {"clip_qkv": 1.0}),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED | SLIDING),
    "exaone4": ("Exaone4", GROUPED | {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
    "glm": ("Glm", GROUPED | {"head_dim": 8}),
    "glm4": ("Glm4", GROUPED | {"head_dim": 8}),
    "gemma": ("Gemma", GROUPED | {"head_dim": 12}),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 12, "query_pre_attn_scalar": 12, "final_logit_softcapping": 5.0} | SLIDING),
    "gemma3": ("Gemma3Text", GROUPED | {"head_dim": 12, "query_pre_attn_scalar": 12} | SLIDING),
    "gemma4": (
        "Gemma4Text",
        GROUPED
        | {"head_dim": 8, "global_head_dim": 8, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": N_VOCAB}
        | SLIDING,
    ),
    "vaultgemma": ("VaultGemma", GROUPED | {"head_dim": 12, "query_pre_attn_scalar": 12} | SLIDING),
    # mixtures of experts
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", EXPERTS | {"shared_expert_intermediate_size": 24}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS | {"head_dim": 12}),
    "olmoe": ("Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": ("FlexOlmo", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": (
        "GraniteMoe",
        GROUPED
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "jetmoe": (
        "JetMoe",
        BASE
        | {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "intermediate_size": 24,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
        },
    ),
    "gpt_oss": ("GptOss", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | SLIDING),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        GROUPED
        | {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 1,
            "moe_capacity": [4, 4, 4],
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        WIDE
        | LATENT
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        WIDE
        | LATENT
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "glm4_moe": (
        "Glm4Moe",
        GROUPED
        | {
            "head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        WIDE
        | LATENT
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "glm_moe_dsa": (
        "GlmMoeDsa",
        WIDE
        | LATENT
        | {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "mlp_layer_types": ["dense", "sparse"],
            "n_group": 1,
            "topk_group": 1,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 64,
        },
    ),
    "llama4": (
        "Llama4Text",
        GROUPED
        | {
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
            "no_rope_layers": [1, 0],
        },
    ),
    "minimax_m2": ("MiniMaxM2", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 4}),
    "afmoe": (
        "Afmoe",
        GROUPED
        | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "num_shared_experts": 1, "num_dense_layers": 1}
        | SLIDING,
    ),
    "laguna": ("Laguna", EXPERTS | {"head_dim": 8, "shared_expert_intermediate_size": 24} | SLIDING),
    # states beside or instead of attention
    "mamba": ("Mamba", BASE | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}),
    "mamba2": ("Mamba2", BASE | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 16}),
    "falcon_mamba": ("FalconMamba", BASE | {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4}),
    "rwkv": ("Rwkv", BASE | {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "context_length": 64}),
    "jamba": (
        "Jamba",
        GROUPED
        | {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
        },
    ),
    "bamba": ("Bamba", GROUPED | STATES | {"attn_layer_indices": [1]}),
    "falcon_h1": ("FalconH1", GROUPED | STATES | {"mamba_d_ssm": 64, "head_dim": 8}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        GROUPED
        | STATES
        | {
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "shared_intermediate_size": 24,
            "layers_block_type": ["mamba", "attention"],
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
    ),
    "nemotron_h": (
        "NemotronH",
        GROUPED
        | {
            "head_dim": 8,
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
            "layers_block_type": ["mamba", "attention"],
        },
    ),
    "zamba2": (
        "Zamba2",
        GROUPED
        | {
            "num_hidden_layers": 3,
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "mamba_ngroups": 1,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "use_mem_rope": True,
            "adapter_rank": 4,
        },
    ),
    "recurrent_gemma": (
        "RecurrentGemma",
        GROUPED | {"head_dim": 8, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "logits_soft_cap": 5.0},
    ),
    "lfm2": ("Lfm2", GROUPED | {"block_dim": 32, "block_ff_dim": 48, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 8}),
    "lfm2_moe": ("Lfm2Moe", EXPERTS | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "num_dense_layers": 1}),
    "olmo_hybrid": ("OlmoHybrid", GROUPED | LINEAR | {"linear_num_key_heads": 4}),
    "qwen3_next": ("Qwen3Next", EXPERTS | LINEAR | {"head_dim": 8, "shared_expert_intermediate_size": 24}),
    "qwen3_5": ("Qwen3_5Text", GROUPED | LINEAR | {"head_dim": 8}),
    "qwen3_5_moe": ("Qwen3_5MoeText", EXPERTS | LINEAR | {"head_dim": 8, "shared_expert_intermediate_size": 24}),
}
ORDERED = (
    "A_log",
    "dt_bias",
    "conv1d",
    "D",
    "dt_proj",
    "time_",
    "rg_lru",
    "recurrent_param",
    "x_proj",
)  # what a state's decay hangs on: as transformers made it


def config(family: str) -> tr.PretrainedConfig:
    name, fields = FAMILIES[family]
    return getattr(tr, f"{name}Config")(**fields)


@t.no_grad()
def make(family: str) -> tr.PreTrainedModel:
    """A model of random weights: matrices of standard deviation 0.25, gains and biases off their trivial values by 0.3, one seed a family."""
    t.manual_seed(zlib.crc32(family.encode()))
    hf = tr.AutoModelForCausalLM.from_config(config(family), dtype=t.float32)
    for name, p in hf.named_parameters():
        if any(part.startswith(ORDERED) for part in name.split(".")):
            continue
        if p.ndim == 1:
            p += 0.3 * t.randn_like(p)
        else:
            p.normal_(0, 0.25)
    return hf.eval()


def build(family: str, folder: Path) -> Path:
    """Save such a model, and the tests' tokenizer, to a folder."""
    make(family).save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    return folder
