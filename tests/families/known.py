"""What is known to be wrong, in words, of the families that were run. A line that is no longer needed fails its test."""

WIDTH = "the width that is said of the MLP is not the one it has"
ALIBI = "transformers' eager attention, which the Bridge runs, adds ALiBi twice; its default attention once"
STATE = "it does not load: the trial of resumed sweeps meets a state that is no key or value"
LATENT = "heads of latent attention are cut at the width of the rotated part, so that a head is another's half"
EXPERTS = "a layer of experts answers as if it had neurons: numbers of the MLP's output"
MASK = "its attention wants a mask of the batch's size; and the width that is said of the MLP is not the one it has"
SHAPES = "a head's q: the blocks' shapes differ"
ROTATION = "float32 meets bfloat16 in its first block"


def known(family: str, words: str, *analyses: str) -> dict[tuple[str, str], str]:
    return {(family, analysis): words for analysis in analyses}


KNOWN: dict[tuple[str, str], str] = {
    **known("opt", WIDTH, "sweep", "estimate"),
    **known("mpt", SHAPES, "direct"),
    **known("falcon-alibi", ALIBI, "logits", "lens", "attention", "do", "sweep", "estimate", "attribution", "direct", "edges", "EAP"),
    **known("lfm2", WIDTH, "sweep", "estimate"),
    **known(
        "falcon_h1", STATE, "logits", "lens", "attention", "do", "sweep", "estimate", "attribution", "direct", "path", "edges", "EAP", "weights", "bfloat16"
    ),
    **known("laguna", EXPERTS, "do"),
    **known("deepseek_v2", LATENT, "do", "sweep", "estimate"),
    **known("gpt_oss", EXPERTS, "do", "sweep", "estimate"),
    **known("xglm", MASK, "sweep", "estimate", "bfloat16"),
    **known("codegen", ROTATION, "bfloat16"),
    **known("afmoe", EXPERTS, "do"),
    **known("mixtral", EXPERTS, "do", "sweep", "estimate"),
    **known("llama4", EXPERTS, "do"),
    **known("mamba", ROTATION, "bfloat16"),
    **known("jamba", EXPERTS, "do"),
    **known("flex_olmo", EXPERTS, "do", "sweep", "estimate"),
    **known("youtu", LATENT, "do", "sweep", "estimate"),
    **known("minimax_m2", EXPERTS, "do", "sweep", "estimate"),
    **known("granitemoe", EXPERTS, "do", "sweep", "estimate"),
}
