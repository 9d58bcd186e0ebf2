"""What the feature pane shows, in words: for `=` and the list of views."""

from screen.explain import Explained

SAE = "Bricken et al. 2023, Towards Monosemanticity; Cunningham et al. 2023, arXiv 2309.08600"
LINEAR = "attention patterns, norm scales and MLPs, at the run's"
EXPLAINED = {
    "features": Explained("features", "the SAE's features at the cursor's position, with bias, reconstruction and error as rows of their own: they add up to the activation", "x = sum of a_f W_dec[f] + b_dec + error, a = act(W_enc x + b_enc)", SAE),
    "examples": Explained("examples", "the places of a text where the feature fires most", "the largest a_f over the tokens of the text, position 0 left out", SAE),
    "graph": Explained("feature graph", "what in the layer below makes this feature fire, linearly", "contribution of u at j = a_u(j) W_dec[u] . (the linear map from j to here) . W_enc[f]", "Marks et al. 2024, arXiv 2403.19647; Ameisen et al. 2025, Circuit Tracing", LINEAR),
    "preflight": Explained("preflight", "whether the SAE fits this model and this prompt, before anything of it is believed", "cosine and unexplained variance of the reconstruction; recovered = (loss_zero - loss_spliced) / (loss_zero - loss)", "Gao et al. 2024, arXiv 2406.04093; Karvonen et al. 2025, arXiv 2503.09532"),
    "order=activation": Explained("by activation", "the features that fire most", "a_f", SAE),
    "order=attribution": Explained("by attribution", "what a feature adds to the metric, by one gradient", "a_f W_dec[f] . dF/dx", "Marks et al. 2024, arXiv 2403.19647", "the gradient, at this run"),
    "order=direct": Explained("by direct effect", "what a feature adds straight to the logit difference", "a_f W_dec[f] . g d / s, d the answers' minus the foils' unembedding", "direct logit attribution: Elhage et al. 2021", "the final norm's scale"),
}  # fmt: skip
