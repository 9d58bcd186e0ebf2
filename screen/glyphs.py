"""What each sign on the screen stands for; `?` lists them. One sign, one meaning."""

from screen.maps import KEPT, SMALL
from utils import VISIBLE

SIGNS = {
    "·Mary": "a token that begins with a space",
    VISIBLE["\n"]: "a newline in a token",
    VISIBLE["\t"]: "a tab in a token",
    "⟨bos⟩": "the token that was put in front; in ⟨ ⟩ also a character that has no picture, by its code",
    "⋯5⋯": "so many tokens of the chat template, folded away (the key \\)",
    "∅": "a token without text",
    SMALL: "a number too small to print in its cell",
    "~": "a change below the noise floor: not to be told from rounding",
    KEPT: "a node of the circuit",
    "underlined": "intervened on; in sweeps: estimate and truth disagree, or the corrected p is below .05",
    "·John⁄·Alice": "the shown prompt's tokens, and what the other prompt has in their place",
    "…": "cut here, or still being computed",
    "‹ ›": "more of the prompt to the left, to the right",
    "│": "the part of the map that is in view, in a strip of largest cells",
    "1 to 5": "in a map of colours alone: its five largest cells, by rank",
    "⟳": "what is below is of before; the new is being computed",
    "✓ ✗ –": "an identity that holds, is broken, does not apply here",
    "≠": "in pane 8: the first new token that differs from the run without interventions",
    "▸": "the view that is shown",
    "⏎ ⌫": "the keys enter and backspace",
}
