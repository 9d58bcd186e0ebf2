"""What is known to be wrong, in words: {(family, analysis): words}. A line that is no longer needed fails its test."""

INDEXER = "loading fails: its cache is made without the indexer's part"
EVERY = ("logits", "lens", "attention", "do", "sweep", "estimate", "attribution", "direct", "path", "edges", "EAP", "weights", "bfloat16")
KNOWN: dict[tuple[str, str], str] = {("glm_moe_dsa", analysis): INDEXER for analysis in EVERY}
