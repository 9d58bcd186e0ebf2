"""What the output pane shows, in words: for `=`."""

from screen.explain import Explained

EXPLAINED = {
    "output": Explained("next token", "the likeliest next tokens after the cursor's position, in the clean run, the corrupted run and the run now, with all interventions",
                        "p = softmax(logits), after the soft cap where the model has one", "the model's own forward pass, equal to Hugging Face's to 1e-4 in float32 (D checks it)"),
}  # fmt: skip
