"""What is known to be wrong, in words: {(family, analysis): words}. A line that is no longer needed fails its test."""

KNOWN: dict[tuple[str, str], str] = {("glm_moe_dsa", "direct"): "a head's q: a block's call is not what direct effects take it for (ValueError)"}
