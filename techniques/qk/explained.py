"""What QK attribution measures, in words: for `=` and the list of views."""

from screen.explain import Explained

WHAT = "why a head looks where it looks: its score before the softmax, by what wrote into the query (rows) and into the key (columns)"
FORMULA = "sum over components a, b of q_a R(d) R(s)ᵀ k_bᵀ / √d_head, q_a = N(a) W_Q, k_b = N(b) W_K"
SOURCE = "Elhage et al. 2021 (QK circuit); Kamath et al. 2025, Tracing Attention Computation Through Feature Interactions"
FROZEN = "the scales of the norm before attention and of the query and key norms; rotations are those of the two positions; before a soft cap"
FEATURES = "sum over features i at d, j at s of f_i(d) f_j(s) d_i N(d) W_Q R(d) R(s)ᵀ (d_j N(s) W_K)ᵀ / √d_head, + each SAE's error and decoder bias"
EXPLAINED = {
    "components": Explained("components", f"{WHAT}: embedding, heads, MLPs, biases", FORMULA, SOURCE, FROZEN),
    "features": Explained("features", "the score by the features of loaded SAEs that fire at destination and source; error, decoder bias and the features not listed apart",
                          FEATURES, SOURCE, FROZEN),
    "pairs": Explained("pairs of features", "head loadings: the pairs of features by which the head attends, largest first; over a set their means, 0 where a prompt lacks one",
                       FEATURES, SOURCE, FROZEN),
    "mean": Explained("against the mean", f"{WHAT}, less the mean over the sources in sight, since the softmax sees differences only",
                      f"{FORMULA}, less its mean over s' ≤ d", SOURCE, FROZEN),
    "source": Explained("against another source", f"{WHAT}, less that of another source: why here and not there", f"{FORMULA}, less that at s'", SOURCE, FROZEN),
    "none": Explained("the score itself", f"{WHAT}. A part that is the same for all sources moves no attention", FORMULA, SOURCE, FROZEN),
    "set": Explained("mean over the set", "each entry's mean over the prompts of the set, with its 95 % interval", "mean ± t s / √n", "Student 1908", FROZEN),
}  # fmt: skip
