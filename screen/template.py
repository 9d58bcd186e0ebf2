"""A chat template's tokens on the screen: dim, or folded away. Pure functions of the state and a prompt's tokens."""

from dataclasses import replace

from vocabulary.prompts import Prompt, TokenRow
from screen.cursor import Cursor
from screen.maps import Grid, without
from screen.session import State

NONE: frozenset[int] = frozenset()


def faded(state: State, row: TokenRow) -> frozenset[int]:
    """Positions of the template's tokens, where they are dim."""
    return frozenset(row.template) if state.views["template"] != "shown" else NONE


def folded(state: State, row: TokenRow) -> frozenset[int]:
    """Positions that are folded away: the template's, but for labels, END and where the metric is read."""
    if state.views["template"] != "fold" or not row.template:
        return NONE
    pos = state.metric.pos
    return frozenset(row.template) - {*row.labels.values(), pos % len(row.ids) if isinstance(pos, int) else -1}


def by_template(state: State, grid: Grid, row: TokenRow, rows: bool = False) -> Grid:
    """A map whose columns (and `rows`) are a prompt's positions, with the template's tokens dim or folded away."""
    dim, gone = faded(state, row), folded(state, row)
    if not dim:
        return grid
    return without(replace(grid, faded=(dim if rows else NONE, dim)), gone if rows else NONE, gone)


def end_of(prompt: Prompt) -> str:
    """What follows END in a chat."""
    return "the assistant's next token after its prefix" if [turn.role for turn in prompt.clean[-1:]] == ["assistant"] else "the first token of the answer"


def skipped(state: State, row: TokenRow | None, old: Cursor, new: Cursor) -> Cursor:
    """The cursor beyond tokens that are folded away, in the direction in which it moves; at an end, or where it stood on one, the nearest that is shown."""
    gone = folded(state, row) if row is not None else NONE

    def shown(was: int, to: int) -> int:
        if to not in gone:
            return to
        places = [n for n in range(len(row.ids)) if n not in gone]
        return min([n for n in places if (n - to) * (to - was) > 0] or places, key=lambda n: abs(n - to))

    return replace(new, pos=shown(old.pos, new.pos), src=shown(old.src, new.src)) if gone else new
