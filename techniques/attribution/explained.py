"""What the attribution pane measures, in words: for `=` and the list of views."""

from screen.explain import Explained

SCALE = "the final norm's scale, at that of the run; the sum of all cells is the logit difference itself, before a soft cap"
DIRECT = (
    "c = d . g (w / s): w what the component writes at the position, s the final norm's scale, g its gain, d = mean W_U of the answers - mean W_U of the foils"
)
PAPER = "direct logit attribution: Elhage et al. 2021; Wang et al. 2022, arXiv 2211.00593"
EXPLAINED = {
    "ranked": Explained("direct effect", "what every head, MLP, bias and the embedding adds straight to the logit difference, the largest first", DIRECT, PAPER, SCALE),
    "drill": Explained("by source or neuron", "the head under the cursor by the positions it reads from; an MLP by its neurons", f"of a head: A[i, j] v_j W_O in the place of w; of a neuron: its activation times its row of W_out. {DIRECT}",
                       PAPER, f"attention patterns; {SCALE}"),
    "set": Explained("over the set", "mean and standard deviation of the direct effect over the prompt set", f"mean over prompts; {DIRECT}", PAPER, SCALE),
}  # fmt: skip
