"""What is known to be wrong, in words. A line that is no longer needed fails its test."""

WIDTH = "the width that is said of the MLP is not the one it has"
ALIBI = "transformers' eager attention, which the Bridge runs, adds ALiBi twice; its default attention once"
STATE = "loading fails: the trial of resumed sweeps meets a state that is no key or value"
INDEXER = "loading fails: its cache is made without the indexer's part"
LATENT = "heads of latent attention are cut at the width of the rotated part, so that a head is another's half"
EXPERTS = "a layer of experts answers as if it had neurons: numbers of the MLP's output"
LATENT_EXPERTS = f"{LATENT}; {EXPERTS}"
MASK = "its attention wants a mask of the batch's size"
SHAPES = "a head's q: the blocks' shapes differ"
ROTATION = "loading fails: float32 meets bfloat16 in its first block"
EVERY = ("logits", "lens", "attention", "do", "sweep", "estimate", "attribution", "direct", "path", "edges", "EAP", "weights", "bfloat16")


def known(words: str, families: tuple[str, ...], *analyses: str) -> dict[tuple[str, str], str]:
    return {(family, analysis): words for family in families for analysis in analyses}


KNOWN: dict[tuple[str, str], str] = {
    **known(WIDTH, ("opt", "lfm2"), "sweep", "estimate"),
    **known(WIDTH, ("xglm",), "estimate"),
    **known(MASK, ("xglm",), "sweep", "bfloat16"),
    **known(SHAPES, ("mpt",), "direct"),
    **known(ALIBI, ("falcon-alibi",), "logits", "lens", "attention", "do", "sweep", "estimate", "attribution", "direct", "edges", "EAP"),
    **known(STATE, ("falcon_h1",), *EVERY),
    **known(INDEXER, ("glm_moe_dsa",), *EVERY),
    **known(ROTATION, ("codegen", "mamba", "mamba2", "falcon_mamba"), "bfloat16"),
    **known(LATENT, ("youtu",), "do", "sweep", "estimate"),
    **known(LATENT_EXPERTS, ("deepseek_v2", "deepseek_v3", "glm4_moe_lite"), "do", "sweep", "estimate"),
    **known(EXPERTS, ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "granitemoe", "gpt_oss", "minimax_m2"), "do", "sweep", "estimate"),
    **known(EXPERTS, ("ernie4_5_moe", "glm4_moe", "llama4", "afmoe", "laguna", "jamba", "lfm2_moe"), "do"),
}
