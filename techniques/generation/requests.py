"""What is asked and what is answered: continuations of the prompt, with and without its interventions."""

from dataclasses import dataclass, field
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
