"""What the patching pane measures, in words: what is swept, what is put in, which effect, how it is shown. For `=` and the list of views."""

from screen.explain import Explained

EFFECT = "effect = m(with the change) - m(untouched), m = (F - F_corrupted) / (F_clean - F_corrupted), F the metric"
PATCHING = "activation patching: Vig et al. 2020, arXiv 2004.12265; Heimersheim & Nanda 2024, arXiv 2404.15255"
METHODS = {"atp": "AtP", "ig": "IG", "atp_qk": "QK fix", "graddrop": "GradDrop", "atp_star": "AtP*"}
STAR = "Kramár et al. 2024, AtP*, arXiv 2403.00745"
KINDS = {
    "z": ("head outputs", "each head's output z at all positions"),
    "resid_pre": ("stream before layers", "the residual stream before each layer, position by position"),
    "resid_mid": ("stream mid-layer", "the residual stream between attention and MLP, position by position"),
    "resid_post": ("stream after layers", "the residual stream after each layer, position by position"),
    "attn": ("attention outputs", "each layer's attention output, position by position"),
    "mlp": ("MLP outputs", "each layer's MLP output, position by position"),
    "attn_mlp": ("attention and MLP", "each layer's attention and MLP output, position by position"),
    "q": ("queries", "each head's queries at all positions"),
    "k": ("keys", "each head's keys at all positions; heads that share them go together"),
    "v": ("values", "each head's values at all positions; heads that share them go together"),
    "pattern": ("patterns", "each head's attention pattern at all destinations"),
    "nodes": ("heads and MLPs", "each head's output z and each MLP's output, at all positions"),
    "z_pos": ("heads by position", "each head's output z, one position at a time"),
    "cells": ("one head's pattern", "the pattern of the head under the cursor, one cell (destination, source) at a time"),
    "neurons": ("neurons", "each neuron of the MLP under the cursor"),
    "pairs": ("pairs of nodes", "two nodes at a time: more or less than the sum says that they work together or for each other"),
    "cumulative": ("together", "nodes one after the other, the largest effect first, all those before with it"),
    "features": ("SAE features", "each feature of the loaded SAE, one position at a time, its error term kept"),
}
EXPLAINED = {kind: Explained(name, what, EFFECT, PATCHING, "nothing: what comes after is computed anew") for kind, (name, what) in KINDS.items()} | {
    "op=patch": Explained("patch", "the node gets its value of the other prompt's run: corrupted into clean (noising) or clean into corrupted (denoising, d)", "x := x(other prompt)", "Zhang & Nanda 2023, arXiv 2309.16042", "the value put in"),
    "op=zero": Explained("zero ablation", "the node writes nothing", "x := 0", "Olsson et al. 2022, arXiv 2209.11895", "the value put in"),
    "op=mean": Explained("mean ablation", "the node gets its mean over the set's corrupted prompts, position by position", "x := mean over prompts of x(corrupted) at the position", "Wang et al. 2022, arXiv 2211.00593", "the value put in"),
    "op=mean_all": Explained("mean over positions", "the node gets its mean over the set's corrupted prompts and all positions but the first", "x := mean over prompts and positions of x(corrupted)", "mean ablation, Wang et al. 2022, arXiv 2211.00593", "the value put in"),
    "op=mean_text": Explained("mean over a text", "the node gets its mean over a text file of yours (A names it), all positions but the first of each window", "x := mean over the text's positions of x", "mean ablation, Wang et al. 2022, arXiv 2211.00593", "the value put in"),
    "op=mean_text_pos": Explained("text, by position", "the node gets its mean over windows of a text file of yours, as long as the prompt, position by position", "x := mean over windows of x at the position", "mean ablation, Wang et al. 2022, arXiv 2211.00593", "the value put in"),
    "op=resample": Explained("resample ablation", "the node gets its value in another prompt of the set, drawn with the seed", "x := x(another corrupted prompt)", "causal scrubbing: Chan et al. 2022", "the value put in"),
    "op=noise": Explained("Gaussian noise", "the node gets its own value plus noise of 3 standard deviations of the embedding", "x := x + 3 sd(E) e, e normal", "causal tracing: Meng et al. 2022, arXiv 2202.05262", "the noise, by its seed"),
    "effect=direct": Explained("direct effect", "only the way from the node straight into the logits counts", f"{EFFECT}; what comes after the node stays as in the base run", "Vig et al. 2020, arXiv 2004.12265; Wang et al. 2022",
                               "later attention, MLPs and norm scales, at the base run"),
    "show=metric": Explained("metric", "the metric itself under the change, not normalised", "F(with the change)", "definition"),
    "show=estimate": Explained("estimate", "attribution patching: the effect by one gradient, for all cells at once; not the truth", "(x_source - x_base) . dF/dx in the base run", "Nanda 2023, Attribution Patching; Kramar et al. 2024, arXiv 2403.00745",
                               "the gradient, at the base run"),
    "by=ig": Explained("integrated gradients", "attribution patching with the gradient's mean on the way from base to source", "(x_source - x_base) . mean of dF/dx", "Sundararajan et al. 2017; Hanna et al. 2024, arXiv 2403.17806", "the way of the token embeddings"),
    "by=atp_qk": Explained("AtP, query and key fix", "of queries and keys, whose softmax may be flat: the pattern computed again; of other cells attribution patching", "(A(x_source) - A(x_base)) . dF/dA", STAR, "the gradient, at the base run"),
    "by=graddrop": Explained("GradDrop", "sizes that do not cancel: each layer left out of the gradient in turn; the sign is attribution patching's", "sum over layers l of |(x_source - x_base) . dF/dx without what l adds| / (L - 1)", STAR, "the gradients, at the base run"),
    "by=atp_star": Explained("AtP*", "GradDrop, and of queries and keys the pattern computed again", "sum over layers l of |change . gradient without what l adds| / (L - 1)", STAR, "the gradients, at the base run"),
    "show=disagreement": Explained("disagreement", "how far the estimate is from the truth", "estimate - effect", "definition"),
    "show=spread": Explained("spread", "how much the effect varies over the prompts of the set", "standard deviation over prompts of F(with the change) - F(untouched)", "definition"),
    "show=p": Explained("p", "how likely an effect of this size is if its sign were chance, prompt by prompt", "share of sign flips of the prompts' effects whose mean is as large", "randomisation test: Fisher 1935"),
    "show=corrected p": Explained("corrected p", "p, corrected for the number of cells", "Holm's step-down correction of p over all cells", "Holm 1979"),
}  # fmt: skip
