"""What an analysis measures, in words: its name in the field, its formula, its source, what it holds fixed. `=` shows it, the list of views names it."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass

from widgets import BOLD, DIM, HEAD, PLAIN, Spans


@dataclass(frozen=True)
class Explained:
    """A quantity: its name in the field, what it is, its formula in plain text, the paper (or the definition) it comes from, and what is held fixed."""

    name: str
    what: str
    formula: str
    source: str
    frozen: str = "nothing"


def paragraphs(some: Iterable[Explained], width: int) -> list[Spans]:
    """The entries as lines, wrapped to a width."""
    lines: list[Spans] = []
    for e in some:
        lines += [[(f" {e.name}", HEAD)]] + wrapped("", e.what, width)
        lines += wrapped("formula", e.formula, width) + wrapped("source", e.source, width) + wrapped("frozen", e.frozen, width) + [[]]
    return lines


def wrapped(head: str, text: str, width: int) -> list[Spans]:
    """Text under a short head that stands beside its first line."""
    rows = textwrap.wrap(text, max(width - 10, 20)) or [""]
    return [[(f" {head if n == 0 else '':8} ", DIM), (row, BOLD if head == "formula" else PLAIN)] for n, row in enumerate(rows)]
