"""Where the gradients of an integral are taken. Implementations differ, and their numbers with them."""

from typing import Literal, get_args

from vocabulary.nodes import UserError

StepsAt = Literal["left", "right", "mid"]


def fractions(steps: int, at: StepsAt) -> list[float]:
    """Points on the way from 0 to 1: 0 to n - 1 of n (left), 1 to n of n (right), or the middles of n parts."""
    if at not in get_args(StepsAt):
        raise UserError(f"{at!r} does not say where steps are taken: use {', '.join(get_args(StepsAt))}")
    return [(k + {"left": 0.0, "right": 1.0, "mid": 0.5}[at]) / steps for k in range(steps)]


def steps_in_words(steps: int, at: StepsAt, way: str) -> str:
    """The points in words; `way` says from what to what."""
    first, last = fractions(steps, at)[0], fractions(steps, at)[-1]
    which = {"left": f"0 to {steps - 1} of {steps}", "right": f"1 to {steps} of {steps}", "mid": "the middles"}[at]
    return f"{steps} step{'s' * (steps != 1)} at {which} ({at}: {first:g} to {last:g} of the way from {way})"
