"""What the circuit pane measures, in words: for `=` and the list of views."""

from screen.explain import Explained

IOI = "Wang et al. 2022, arXiv 2211.00593"
REST = "what is not in the circuit, at the value that `b` chooses; attention patterns of what stays are computed anew"
FAITHFUL = "faithfulness = (F(C) - F(nothing)) / (F(M) - F(nothing)), F the metric, C the circuit alone, M the model"
ALONE = "effect of a part = F(M without it) - F(M)"
EXPLAINED = {
    "map": Explained("map", "what is kept, on layers × heads; each kept part with the effect of taking it alone away", f"{ALONE}; {FAITHFUL}", IOI, REST),
    "drawing": Explained("drawing by layer", "from the embeddings at the bottom to the logits: nodes by layer, edges by their score", f"edges: F(M without it) - F(M) once scored, else the discovery's score; nodes: {ALONE}; {FAITHFUL}", IOI, REST),
    "edges": Explained("edges in words", "every node with what it reads from", f"{ALONE}; {FAITHFUL}", IOI, REST),
    "list": Explained("list", "the circuit's nodes and edges as addresses, with the effect of each alone", f"{ALONE}; {FAITHFUL}", IOI, REST),
    "path": Explained("path patching", "what goes along one path: the receiver gets what it would get if only this sender had its corrupted value", "effect = m(receiver's input with the sender's change) - m(untouched)",
                      "Goldowsky-Dill et al. 2023, arXiv 2304.05969; " + IOI, "all other heads and MLPs, at the base run"),
    "path=direct": Explained("direct edge", "the receiver's input changes only by what the sender itself writes into the stream", "receiver's input + (sender's corrupted output - its clean output)", "Goldowsky-Dill et al. 2023, arXiv 2304.05969",
                             "all other heads and MLPs, at the base run"),
    "path=mlps": Explained("through MLPs", "the path may pass MLPs, as in the IOI paper", "MLPs between sender and receiver are computed again", IOI, "all other heads, at the base run"),
    "scores": Explained("scores", "faithfulness: does the circuit alone do the task; completeness: does the model fail without it; minimality: is each part needed",
                        f"{FAITHFUL}; incompleteness = max over K of |F(C without K) - F(M without K)|; minimality of v = max over K of |F(C without K) - F(C without K and v)| / F(M)", IOI, REST),
    "curve": Explained("curve of discovery", "faithfulness against the number of parts kept, the highest scores first, by true ablation", f"{FAITHFUL} for the n best parts", "Syed et al. 2023, arXiv 2310.10348; Hanna et al. 2024, arXiv 2403.17806; Conmy et al. 2023, arXiv 2304.14997", REST),
    "compare": Explained("comparison", "nodes and edges shared with another or a published circuit; ROC of the scores against it", "Jaccard = shared / all; area under true over false positives", "Conmy et al. 2023, arXiv 2304.14997"),
}  # fmt: skip
