"""Prompt sets made for a model from templates, and what of a set that is there fits it."""

from typing import Literal

from vocabulary.prompts import Prompt
from vocabulary.sets import LeftOut
from vocabulary.wire import message, request

Make = Literal["ioi", "greater-than", "capitals", "agreement", "induction", "pronouns", "docstring"]
MAKES: dict[Make, str] = {
    "ioi": "indirect object identification, ABBA and BABA in turn: Wang et al. 2022, arXiv 2211.00593",
    "greater-than": "a year above another one, corrupted to 01: Hanna et al. 2023, arXiv 2305.00586 (by the tens digit where digits are single tokens)",
    "capitals": "the capital of a country, corrupted to another country: recall of facts as in Meng et al. 2022, arXiv 2202.05262",
    "agreement": "is or are after a subject and an attractor of the other number: Linzen et al. 2016, arXiv 1611.01368",
    "induction": "random words, then the first of them again: Olsson et al. 2022, arXiv 2209.11895",
    "pronouns": "he or she after a name: Mathwin et al. 2023, Identifying a preliminary circuit for predicting gendered pronouns in GPT-2 small",
    "docstring": "the next argument in a docstring: Heimersheim and Janiak 2023, A circuit for Python docstrings in a 4-layer attention-only transformer",
}
Corruption = Literal["abc", "swap", "other"]
CORRUPTIONS: dict[Corruption, str] = {
    "abc": "three other names in place of IO, S1 and S2 (Wang et al. 2022)",
    "swap": "IO in place of S2, so that the answers change places (Zhang and Nanda 2023, arXiv 2309.16042)",
    "other": "another name in place of S2",
}


@request
class MakeSet:
    """
    A prompt set from templates, in words that are one token each in this model: every prompt with a corrupted partner of its length, and labels. `prompts`, where
    there are some, are looked at in place of new ones: which of them fit this model.
    """

    make: str = "ioi"
    """ioi, greater-than, capitals, agreement, induction, pronouns, docstring; or a .jsonl set, of which what does not fit this model is listed"""
    n: int = 32
    """prompts"""
    seed: int = 0
    corruption: Corruption = "abc"
    """of ioi: abc (three other names), swap (IO in place of S2) or other (another name in place of S2)"""
    templates: int = 1
    """of ioi: so many of the paper's 15 templates (more than one: prompts of unequal length)"""
    correct: bool = False
    """only prompts that the model gets right: an answer's logit is above all foils'"""
    prompts: tuple[Prompt, ...] = ()


@message
class SetResult:
    """
    The prompts; `right` how many of `tried` the model gets right, `clean` and `corrupt` the mean logit difference over `prompts` (NaN where answers or foils are
    missing), `lengths` in tokens, and `left`: which prompts of a given set do not fit, each with its reason.
    """

    make: str
    prompts: tuple[Prompt, ...]
    lengths: tuple[int, ...]
    tried: int
    right: int
    clean: float
    corrupt: float
    left: LeftOut
    convention: str

    @property
    def summary(self) -> str:
        """One line for the screen and the command line."""
        n = len(self.prompts)
        span = str(self.lengths[0]) if len(set(self.lengths)) == 1 else f"{min(self.lengths)} to {max(self.lengths)}"
        known = f"; the model gets {self.right} of {self.tried} right, mean logit difference {self.clean:.3f} clean, {self.corrupt:.3f} corrupted"
        return f"{n} prompts of {span} tokens" + known * (self.clean == self.clean)
