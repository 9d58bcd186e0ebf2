"""What is asked and what is answered: continuations of the prompt, with and without its interventions."""

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from vocabulary.nodes import UserError
from vocabulary.prompts import OneRun, Study, TokenRow
from vocabulary.wire import message, request

Held = Literal["all", "prompt"]
HELD: dict[Held, str] = {"all": "interventions on every new token too", "prompt": "interventions on the prompt's positions only"}
MOST_SAMPLES, MOST_TOKENS = 256, 4096


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. `temperature` 0 is greedy: the likeliest token each time."""

    tokens: int = 16
    """how many new tokens, at most"""
    temperature: float = 0.0
    """0: greedy, the likeliest token; 1: as the model says"""
    top_p: float = 1.0
    """draw from the likeliest tokens that together have this probability"""
    seed: int = 0
    """of the draws; runs are drawn with the same random numbers"""
    samples: int = 1
    """continuations of each run"""
    held: Held = "all"
    """interventions at all positions act on every new token too (all), or on the prompt's positions only (prompt)"""
    contains: str = ""
    """the share of samples that contain this text is told"""
    other: bool = False
    """continue the other prompt too, without interventions"""

    def changed(self, **how: object) -> "Sampling":
        """With other values. UserError for what can't be drawn."""
        new = replace(self, **how)
        new.check()
        return new

    @property
    def words(self) -> str:
        """How tokens are chosen, in short."""
        cut = f", top-p {self.top_p:g}" if self.top_p < 1 else ""
        return "greedy" if self.temperature == 0 else f"temperature {self.temperature:g}{cut}, seed {self.seed}"

    def check(self) -> None:
        """UserError for what can't be drawn."""
        for name, most in (("tokens", MOST_TOKENS), ("samples", MOST_SAMPLES)):
            if not 1 <= getattr(self, name) <= most:
                raise UserError(f"{name} {getattr(self, name)}: from 1 to {most}")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature {self.temperature:g}: from 0 (greedy) to 100")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p:g}: above 0, at most 1")
        if self.held not in HELD:
            raise UserError(f"held {self.held!r}: choose one of {', '.join(HELD)}")
        if not 0 <= self.seed < 1 << 31:
            raise UserError(f"seed {self.seed}: from 0 to {(1 << 31) - 1}")


@request
class Generate:
    """Continue the prompt without and with the interventions, and optionally the other prompt, token by token."""

    study: Study
    how: Sampling = Sampling()


@dataclass(frozen=True)
class Continuation:
    """
    New tokens of one sample. `probs` [token]: each one's probability in its run's whole distribution, at temperature 1; `top_ids` and `top_probs`
    [token, k] the likeliest there. `text` is all of them, `ends` [token] where each ends in it. `ended`: by the end-of-text token. `parted`: the first
    token that differs from the same sample without interventions (-1: none).
    """

    ids: tuple[int, ...]
    probs: np.ndarray
    top_ids: np.ndarray
    top_probs: np.ndarray
    text: str
    ends: tuple[int, ...]
    ended: bool = False
    parted: int = -1


@dataclass(frozen=True)
class Continued:
    """The samples of one run. `share` of them contain the text that was asked for (None: none was)."""

    run: OneRun
    tokens: TokenRow
    samples: tuple[Continuation, ...]
    share: float | None = None


@message
class GenerateResult:
    """Runs with their continuations, the one without interventions first; `done` of `total` new tokens. `texts` of the tokens, by id."""

    runs: tuple[Continued, ...]
    done: int
    total: int
    texts: dict[int, str] = field(default_factory=dict)
    convention: str = ""


# ------------------------------------------------------------------ steering

Kind = Literal["prompts", "set", "feature", "head", "file"]
KINDS: dict[Kind, str] = {
    "prompts": "clean minus corrupted prompt, at a hook point and a position (without one: the mean over all positions but the first)",
    "set": "mean over the set's clean prompts minus that over its corrupted ones, or over the clean prompts of another set",
    "feature": "the decoder row of an SAE's feature: what one unit of it writes",
    "head": "what a head writes: the first output direction of its OV circuit (unit length), or its OV of a token",
    "file": "one vector of a .safetensors or .npy file",
}


@request
class MakeDirection:
    """Make a direction and keep it under directions/, with its hook point."""

    study: Study
    kind: Kind = "prompts"
    at: str = "L0.resid_post"
    """a hook point such as L8.resid_post@END; of a feature L8.sae.f12, of a head L9H9"""
    token: str = ""
    """of a head: the token whose OV is taken; unset, the first output direction"""
    minus: str = ""
    """of a set: the .jsonl set whose clean prompts are taken away, instead of the set's own corrupted ones"""
    file: str = ""
    """a .safetensors or .npy file"""
    name: str = ""
    """what it is called; a digest is put behind it"""
    out: str = ""
    """a file to write it to as well"""


@request
class Directions:
    """The directions under directions/ that are as long as the model's residual stream. `away`: put this one away first."""

    away: str = ""
    """a name to put away: it moves to directions/away, where sessions that name it still find it"""


@message
class Direction:
    """A kept direction: name, hook point as an address (L8.resid_post), what it is in words, of which model, its length, and its file."""

    name: str
    at: str
    words: str
    model: str
    norm: float
    path: str


@message
class DirectionsResult:
    """Kept directions, the newest first; `wrong` says what could not be read."""

    some: tuple[Direction, ...]
    wrong: tuple[str, ...] = ()


@request
class Curve:
    """The metric at each coefficient of one steering intervention of the study, all others as they are."""

    study: Study
    steer: str = ""
    """the intervention, such as L8.resid_post=steer:NAME:2; unset, the study's last"""
    coefficients: tuple[float, ...] = (-4.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)


@message
class CurveResult:
    """The metric [coefficient] (NaN: undefined), and that of the clean and the corrupted prompt."""

    steer: str
    coefficients: np.ndarray
    values: np.ndarray
    clean: float | None
    corrupt: float | None
    convention: str
