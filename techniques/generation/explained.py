"""What the generation pane shows, in words: for `=`."""

from screen.explain import Explained

EXPLAINED = {
    "all": Explained("continuation", "the prompt continued token by token, without and with the interventions; those at all positions act on every new token too. Colour: the probability of each token in its own run; ≠ the first token that differs from the run without interventions",
                     "p = softmax(logits) at temperature 1; drawn from softmax(logits / T), cut at top-p, by the Gumbel trick with the same random numbers in every run",
                     "the model's own forward pass with its cache of keys and values, equal to runs of the grown prompt without a cache (the tests hold it to 1e-4)"),
    "prompt": Explained("on the prompt only", "as before, but the interventions act on the prompt's positions alone: new tokens see what they left in keys and values",
                        "p = softmax(logits) at temperature 1", "the model's own forward pass with its cache of keys and values"),
}  # fmt: skip
