"""What the weights pane shows, in words: for `=` and the list of views."""

from screen.explain import Explained

FRAMEWORK = "Elhage et al. 2021, A Mathematical Framework for Transformer Circuits"
SVD = "Millidge & Black 2022, The Singular Value Decompositions of Transformer Weight Matrices are Highly Interpretable"
PRAKASH = "a fine-tune beside its base: Prakash et al. 2024, arXiv 2402.14811"
RAW = "no norm is folded, nothing is run"
LINEAR = "norms are linear maps: their gains count, their scales do not"
EXPLAINED = {
    "ov": Explained("OV circuit", "which token a head writes for each token it reads; copying: its own token is among the 5 highest", "W_U g W_O W_V g1 E over pairs of tokens; positivity: sum of the eigenvalues of W_V W_O over the sum of their sizes",
                    FRAMEWORK, LINEAR),
    "qk": Explained("QK circuit", "which source token a destination token looks for, at the distance that , and . set", "(W_Q g1 E_dst) . (W_K g1 E_src) / scale over pairs of tokens", FRAMEWORK, LINEAR),
    **{f"composition {c}": Explained(f"{c.upper()}-composition", f"how much a later head's {what} reads what an earlier head writes, against random heads", f"||OV X|| / (||OV|| ||X||), Frobenius norms, OV = W_V W_O of the earlier head, X = {m} of the later", FRAMEWORK, LINEAR)
       for c, what, m in (("q", "query", "W_Q W_K^T"), ("k", "key", "W_K W_Q^T"), ("v", "value", "W_V W_O"))},
    "OV directions": Explained("OV directions", "what a head copies, direction by direction: what is read, and what is written for it", "W_V W_O = U S V^T; each side times the (un)embedding", SVD, LINEAR),
    "QK directions": Explained("QK directions", "what a head matches, direction by direction: destination side and source side", "W_Q W_K^T = U S V^T; each side times the embedding", SVD, LINEAR),
    "mlp_out": Explained("MLP writes", "the main directions of the MLP's output matrix, in tokens and in neurons", "W_out = U S V^T; V times the unembedding", SVD, LINEAR),
    **{f"difference {c}": Explained(f"difference of W_{c}", f"how far the second model's W_{c} of each head is from the first one's", f"||W_{c}' - W_{c}|| / ||W_{c}||, Frobenius norms", PRAKASH, RAW) for c in "QKVO"},
    **{f"difference {c}": Explained(f"cosine of {c}", f"whether each head's {c} circuit points where the other model's does; 1: the same up to a factor", f"<A, A'> / (||A|| ||A'||), A = {m}", PRAKASH, RAW) for c, m in (("OV", "W_V W_O"), ("QK", "W_Q W_K^T"))},
    "difference parts": Explained("differences of matrices", "how far every parameter of a block is from the first model's, by layer", "||W' - W|| / ||W||, Frobenius norms", PRAKASH, RAW),
    "mlp_in": Explained("MLP reads", "the main directions of the MLP's input matrix, in tokens and in neurons", "W_in = U S V^T; U times the embedding", SVD, LINEAR),
}  # fmt: skip
