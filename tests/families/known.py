"""What is known to be wrong, in words. A line that is no longer needed fails its test."""

WIDTH = "the width that is said of the MLP is not the one it has"
ALIBI = "transformers' eager attention, which the Bridge runs, adds ALiBi twice; its default attention once"
STATE = "it does not load: the trial of resumed sweeps meets a state that is no key or value"
LATENT = "heads of latent attention are cut at the width of the rotated part, so that a head is another's half"
EXPERTS = "a layer of experts answers as if it had neurons"
EVERY = ("logits", "lens", "attention", "do", "sweep", "estimate", "attribution", "direct", "edges", "EAP")
KNOWN: dict[tuple[str, str], str] = {
    **{(family, analysis): WIDTH for family in ("opt", "lfm2") for analysis in ("sweep", "estimate")},
    **{("deepseek_v2", analysis): LATENT for analysis in ("do", "sweep", "estimate")},
    **{(family, "do"): EXPERTS for family in ("laguna", "jamba")},
    ("mpt", "direct"): "a head's q: the blocks' shapes differ",
    **{("falcon-alibi", analysis): ALIBI for analysis in EVERY},
    **{("falcon_h1", analysis): STATE for analysis in (*EVERY, "path", "weights", "bfloat16")},
}
