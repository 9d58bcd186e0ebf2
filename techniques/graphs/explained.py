"""What an attribution graph measures, in words: for `=` and the list of views."""

from screen.explain import Explained

FORMULA = "A[t, s] = (what s writes) · ∂(pre-activation or logit of t)/∂(stream), in the local replacement model; influence = p (N + N² + …), N = |A| by row"
SOURCE = "Ameisen et al. 2025, Circuit Tracing; circuit-tracer"
FROZEN = "attention patterns, norm scales, and how strongly each feature fires; MLPs are transcoders and errors"
EXPLAINED = {
    "logits": Explained("the likeliest logits", "direct effects between features, errors, tokens and the most probable logits, each less the mean logit", FORMULA, SOURCE, FROZEN),
    "diff": Explained("the logit difference", "direct effects between features, errors and tokens, up to the answer's logit less the foil's", FORMULA, SOURCE, FROZEN),
}  # fmt: skip
