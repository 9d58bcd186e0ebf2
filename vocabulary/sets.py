"""A prompt set as it comes: which of its prompts can be asked of this model, and why not the others. Never imports torch."""

from collections.abc import Callable, Iterable

from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt

Members = list[tuple[int, Prompt]]
LeftOut = tuple[tuple[int, str], ...]  # indices into the set, each with its reason


class EmptyPart(UserError):
    """None of a part's prompts fits; others of the set do."""


def fitting[T](members: Iterable[tuple[int, Prompt]], read: Callable[[Prompt], T]) -> tuple[Members, list[T], LeftOut]:
    """The members that `read` takes, what it makes of each, and those that it refuses by a UserError. UserError where it refuses all of them."""
    good, found, left = [], [], []
    for i, prompt in members:
        try:
            found.append(read(prompt))
            good.append((i, prompt))
        except UserError as error:
            left.append((i, str(error)))
    if left and not good:
        raise UserError(f"prompt {left[0][0] + 1} of the set: {left[0][1]}" + (f" (and none of the other {len(left) - 1} fits)" if len(left) > 1 else ""))
    return good, found, tuple(left)


def left_out(left: LeftOut, of: int, most: int = 3) -> str:
    """How many prompts of a set of `of` are left out and why, the first few in words; "" where none is."""
    if not left:
        return ""
    words = "; ".join(f"prompt {i + 1}: {reason}" for i, reason in left[:most])
    return f"{len(left)} of {of} prompts of the set left out: {words}" + (f"; and {len(left) - most} more" if len(left) > most else "")


def in_part(members: Members, part: tuple[int, int] | None) -> list[int]:
    """Which of the members are in a part of the set: all without one. EmptyPart where none is."""
    mine = [k for k, (i, _) in enumerate(members) if part is None or part[0] <= i < part[1]]
    if not mine:
        raise EmptyPart(f"none of the prompts {part[0] + 1} to {part[1]} of the set fits")
    return mine
