"""From continuations to lines: runs side by side, each token coloured by its probability. Pure functions."""

from dataclasses import dataclass

import numpy as np
from rich.style import Style

from screen.textview import as_written, wrap
from techniques.generation.requests import Continuation, Continued, GenerateResult
from utils import fit, show_token, width_of
from widgets import BOLD, CURSOR, CURSOR_PLAIN, DIM, HEAD, PLAIN, SHADES, WARN, Grid, Spans, on

PARTED = "≠"
LEAST = 34  # columns of a run beside others


@dataclass(frozen=True)
class Laid:
    """Lines to draw, and the line on which the cursor's token stands."""

    lines: list[Spans]
    at: int


def probabilities(result: GenerateResult, names: dict[str, str]) -> Grid:
    """Runs and samples × new tokens: the probability of each. `names`: of the runs."""
    rows = [(run.run, n, s) for run in result.runs for n, s in enumerate(run.samples)]
    values = np.full((len(rows), max(1, max(len(s.ids) for *_, s in rows))), np.nan)
    for row, (_, _, s) in zip(values, rows):
        row[: len(s.probs)] = s.probs
    labels = [names[run] + (f" {n}" if len(result.runs[0].samples) > 1 else "") for run, n, _ in rows]
    return Grid(values, labels, [f"+{n}" for n in range(values.shape[1])], 0.0, 1.0, corner="new token", listed=False)


def head(run: Continued, changed: str, contains: str, names: dict[str, str]) -> str:
    """The line above a run."""
    share = f"  {run.share:.0%} of {len(run.samples)} contain {show_token(contains, 16, fill=False)}" if run.share is not None else ""
    return f"{changed if run.run == 'now' else names[run.run]}{share}"


def token_spans(s: Continuation, first: int, last: int, texts: dict[int, str], ramp: list[int], mode: str, at: int) -> Spans:
    """Tokens of a line in their colours; the first that parts from the other run has a sign before it."""
    spans: Spans = []
    for n in range(first, last):
        level = min(int(float(s.probs[n]) * len(ramp)), len(ramp) - 1)
        shade = SHADES[min(int(level / (len(ramp) - 1) * len(SHADES)), len(SHADES) - 1)]
        style = PLAIN if mode == "shade" or level == 0 else on(ramp[level], True)
        style = (CURSOR_PLAIN if mode == "shade" else CURSOR) if n == at else style
        spans += [(PARTED, WARN)] if n == s.parted else []
        spans.append((written(texts[s.ids[n]], shade if mode == "shade" else ""), style + Style(underline=True) if n == s.parted else style))
        spans += [(number(float(s.probs[n])), BOLD if n == at else DIM)] if mode == "number" else []
    return spans


def written(token: str, shade: str = "") -> str:
    """A token as text; without colour a shade stands before it."""
    return shade + as_written(token)


def number(p: float) -> str:
    return f"{p:.2f} ".removeprefix("0")


def cell(s: Continuation, texts: dict[int, str], width: int, ramp: list[int], mode: str, at: int) -> tuple[list[Spans], int]:
    """A continuation wrapped to a width, and the line of the cursor's token (-1: it is not in this one)."""
    extra = {"number": 4, "shade": 1}.get(mode, 0)
    tokens = [texts[i] for i in s.ids]
    lines = wrap(tokens, [width_of(written(x)) + extra + (n == s.parted) for n, x in enumerate(tokens)], max(4, width - 1))
    where = next((k for k, (a, b) in enumerate(lines) if a <= at < b), -1)
    return [token_spans(s, a, b, texts, ramp, mode, at) for a, b in lines] or [[("…", DIM)]], where


def lay_out(result: GenerateResult, width: int, mode: str, at: tuple[int, int, int], changed: str, contains: str, names: dict[str, str]) -> Laid:
    """Runs beside each other where there is room, else below each other; samples below each other. `at`: run, sample and token of the cursor."""
    runs, ramp = result.runs, probabilities(result, names).ramp
    beside = len(runs) if width >= LEAST * len(runs) else 1
    w, lines, here = width // beside, [], 0
    many = len(runs[0].samples) > 1
    for first in range(0, len(runs), beside):
        group = runs[first : first + beside]
        lines.append([x for run in group for x in padded([(f" {head(run, changed, contains, names)}", HEAD)], w)])
        for n in range(len(runs[0].samples)):
            cells = []
            for k, run in enumerate(group, first):
                mine, where = cell(run.samples[n], result.texts, w - (5 if many else 2), ramp, mode, at[2] if at[:2] == (k, n) else -1)
                here = len(lines) + where if where >= 0 else here
                cells.append([[(f"{n if y == 0 else '':>3} " if many else " ", DIM), *row] for y, row in enumerate(mine)])
            for y in range(max(map(len, cells))):
                lines.append([x for c in cells for x in padded(c[y] if y < len(c) else [], w)])
    return Laid(lines, here)


def padded(spans: Spans, width: int) -> Spans:
    """A line filled up with spaces, or cut."""
    used = sum(width_of(text) for text, _ in spans)
    return [*spans, (" " * (width - used), PLAIN)] if used <= width else [(fit("".join(text for text, _ in spans), width), spans[0][1])]


def about(result: GenerateResult, at: tuple[int, int, int], names: dict[str, str]) -> Spans:
    """The token under the cursor: its probability, the likeliest there, and what the other run has in its place."""
    run = result.runs[at[0]]
    s = run.samples[at[1]]
    if not at[2] < len(s.ids):
        return []
    n = at[2]
    show = lambda i: show_token(result.texts[int(i)], 14, fill=False)  # noqa: E731
    best = "  ".join(f"{show(i)} {float(p):.3f}" for i, p in zip(s.top_ids[n], s.top_probs[n]))
    spans: Spans = [(f" {names[run.run]} +{n} {show(s.ids[n])} {float(s.probs[n]):.4f}", BOLD)]
    if n == s.parted:
        spans.append((f"  parts here: {show(result.runs[0].samples[at[1]].ids[n])} without interventions", WARN))
    return [*spans, (f"  likeliest {best}", PLAIN)]
