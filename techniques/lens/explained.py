"""What the lens measures, each statistic and each kind of lens, in words: for `=` and the list of views."""

from screen.explain import Explained

LENS = "logit lens: nostalgebraist 2020, Interpreting GPT"
READ = "p = softmax(W_U norm(x)), x the residual stream at a hook point; norm is the final norm, its scale computed from x"
SAME = "nothing: the final norm is recomputed at each point"

EXPLAINED = {
    "prob": Explained("top token", "probability of the likeliest next token, if the model ended at this hook point", f"max over tokens of p; {READ}", LENS, SAME),
    "answer": Explained("answer's probability", "what the point gives the answers", f"sum of p over the answer tokens; {READ}", LENS, SAME),
    "rank": Explained("answer's rank", "how many tokens are likelier than the answer; 0: it is first. Colours on a log scale", f"number of tokens with p > p(answer); {READ}", LENS, SAME),
    "entropy": Explained("entropy", "how undecided the prediction of the point is, in nats", f"-sum of p log p; {READ}", "Shannon 1948; " + LENS, SAME),
    "kl": Explained("KL to the final", "how far the prediction of the point is from the model's own, in nats", f"KL(final || point) = sum of f log(f / p), f the final prediction; {READ}",
                    "Belrose et al. 2023, arXiv 2303.08112", SAME),
    "logit_diff": Explained("logit difference", "what the point gives the answers over the foils", "mean logit of the answers - mean logit of the foils, logits = W_U norm(x)", "Wang et al. 2022, arXiv 2211.00593; " + LENS, SAME),
    "kl_pair": Explained("clean to corrupted", "how far the two prompts' predictions are apart at the point, in nats", "KL(clean || corrupted) of the two lens predictions at one point and position",
                         "KL divergence; " + LENS, SAME),
    "rank_pair": Explained("rank difference", "how many places lower the second model puts the answer than the first, at the point; below 0: higher", "rank of the answer in the second model - rank in the first, each read by its own norm and W_U",
                           "Prakash et al. 2024, arXiv 2402.14811, compare a fine-tune and its base; " + LENS, SAME),
    "promoted": Explained("promoted token", "the token whose log probability grew most from the row above to this one", "max over tokens of log p(row) - log p(row before)", "difference of two logit lenses", SAME),
    "suppressed": Explained("suppressed token", "the token whose log probability fell most from the row above to this one", "min over tokens of log p(row) - log p(row before)", "difference of two logit lenses", SAME),
    "lens=logit": Explained("logit lens", "a hook point read through the model's own final norm and unembedding", "logits = W_U norm(x)", LENS, SAME),
    "lens=tuned": Explained("tuned lens", "a hook point read after an affine map, trained so that its prediction is nearest to the final one", "logits = W_U norm(x + A x + b), A and b of the layer minimise KL(final || lens)",
                            "Belrose et al. 2023, arXiv 2303.08112", "A and b, fitted before (F)"),
    "lens=jacobian": Explained("Jacobian lens", "a hook point read after the mean linear map from it to the last layer", "logits = W_U norm(J x), J the mean over prompts and positions of d(last stream) / d(this one)",
                               "Jacobian lens, as TransformerLens's jacobian_lens fits it", "J, fitted before (F)"),
    "components": Explained("component lens", "what one head, attention or MLP output writes straight into the logits, as if these were all the logits", "logits = W_U g (w / s), w what it writes, g the final gain, s the final norm's scale",
                            "direct logit attribution: Elhage et al. 2021, A Mathematical Framework for Transformer Circuits", "the final norm's scale, at that of the run"),
}  # fmt: skip
