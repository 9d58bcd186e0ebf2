"""What the attention pane measures, in words: for `=` and the list of views."""

from screen.explain import Explained

MEAN = "mean over destinations"
EXPLAINED = {
    "induction": Explained("induction", "attention to the token after an earlier copy of the present one: what an induction head does", f"{MEAN} i with an earlier copy j (token j = token i) of the sum of A[i, j+1]",
                           "Elhage et al. 2021; Olsson et al. 2022, arXiv 2209.11895", "the patterns are those of the run"),
    "previous": Explained("previous token", "attention to the token before: what a previous token head does", f"{MEAN} i > 0 of A[i, i-1]", "Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593"),
    "duplicate": Explained("duplicate token", "attention to earlier copies of the present token: what a duplicate token head does", f"{MEAN} i with an earlier copy of the sum of A[i, j], token j = token i, j < i",
                           "Wang et al. 2022, arXiv 2211.00593"),
    "first": Explained("first token", "attention to position 0, where heads rest that have nothing to read (attention sink)", f"{MEAN} i > 0 of A[i, 0]", "Xiao et al. 2023, arXiv 2309.17453"),
    "entropy": Explained("entropy", "how spread attention is, in nats: 0 on one token", f"{MEAN} i > 0 of -sum over j of A[i, j] log A[i, j]", "Shannon 1948"),
    "pair": Explained("cursor's pair", "attention between the two positions of the cursor, of every head at once", "A[destination, source]", "Vaswani et al. 2017, arXiv 1706.03762"),
    "pattern": Explained("pattern", "one head's attention: rows are destinations, columns the sources they read", "A[i, j] = softmax over j <= i of q_i . k_j / scale", "Vaswani et al. 2017, arXiv 1706.03762"),
    "weighted=on": Explained("value-weighted", "attention times how much the source's value writes, so that attention to an empty value is small", "A[i, j] ||v_j W_O||", "Kobayashi et al. 2020, arXiv 2004.10102",
                             "norms after attention are left out"),
    "source=random": Explained("random repeated tokens", "the statistics on text without meaning, so that only the mechanism counts", "BOS, then 50 random tokens twice, 4 rows, fixed seed", "Olsson et al. 2022, arXiv 2209.11895"),
    "difference": Explained("difference of runs", "the statistic in the first run minus that in the second", "S(first) - S(second)", "definition"),
}  # fmt: skip
