"""What several panes draw with: names of runs, tokens, charts, the circuit's cells, the effect of a cell. Pure functions; no app, no torch."""

import math
from collections.abc import Iterable

import numpy as np
from rich.console import Console
from rich.text import Text

from techniques.patching.requests import SweepResult
from vocabulary.nodes import parse_node
from vocabulary.prompts import TokenRow
from screen.session import State
from screen.maps import ends_of
from utils import two_names, width_of
from widgets import BOLD, DIM, PLAIN, WARN, Grid, Spans

Ranked = tuple[int, Spans]  # a part of a line and its importance, 0 the most


def run_names(state: State, now: str = "now") -> dict[str, str]:
    """Every run and difference in words: clean and corrupted, or the two models that are compared."""
    a, b = two_names(state.model.model, state.model.against) if state.model.against else ("clean", "corrupted")
    pairs = {"clean-corrupt": (a, b), "now-clean": (now, a), "now-corrupt": (now, b)}
    return {"now": now, "clean": a, "corrupt": b} | {which: f"{x} − {y}" for which, (x, y) in pairs.items()}


def run_name(state: State, which: str) -> str:
    """A run or a difference in words, with what is done to it."""
    base = run_names(state)[state.base]
    return run_names(state, f"now ({len(state.interventions)} on {base})" if state.interventions and state.enabled else f"now = {base}")[which]


def texts_of(row: TokenRow) -> list[str]:
    """The tokens' texts; a BOS token that was put in front reads ⟨bos⟩, one of a chat's template as it is written."""
    return ["⟨bos⟩", *row.texts[1:]] if row.bos and 0 not in row.template else list(row.texts)


def fitted(parts: list[Ranked], width: int) -> Spans:
    """Of the parts of a line, in their order, those that fit whole: the less important go first, those of importance 0 stay."""
    room, kept = width, set()
    for n in sorted(range(len(parts)), key=lambda n: parts[n][0]):
        size = sum(width_of(text) for text, _ in parts[n][1])
        if parts[n][0] == 0 or size <= room:
            kept.add(n)
            room -= size
    return [span for n, (_, spans) in enumerate(parts) if n in kept for span in spans]


def signed(x: float | None, digits: int = 3) -> str:
    return "—" if x is None or math.isnan(x) else f"{x:+.{digits}f}"


def scale(grid: Grid) -> str:
    """The numbers at the ends of the colours."""
    return " … ".join(ends_of(grid))


def cells_of(mask: np.ndarray) -> frozenset[tuple[int, int]]:
    """The cells [row, column] where a mask is true."""
    return frozenset(map(tuple, np.argwhere(mask).tolist()))


def chart(title: str, points: list[str], lines: dict[str, list[float]], width: int, height: int, at: list[float] | None = None) -> list[Spans]:
    """A line chart over depth by plotext, one line a run; gaps where there is no number. `at` are the points' places on the axis (else one after the other)."""
    import plotext

    plot = plotext.figure
    plot.clear()
    plot.theme("simple")
    plot.plot_size(width, height)
    plot.title(title)
    for (name, ys), marker in zip(lines.items(), ("braille", "+", "x")):
        xs = [n for n, y in enumerate(ys) if not math.isnan(y)]
        signal = plot.signal([at[n] for n in xs] if at else xs, [ys[n] for n in xs], marker=marker)
        signal.lines()
        if len(lines) > 1 or at is None:
            signal.label(name)
        plot.draw(signal)
    if at is None:
        step = max(1, -(-len(points) * 15 // width))
        plot.ruler("x").ticks(list(range(0, len(points), step)), points[::step])
    else:
        shown: list[int] = []  # ticks that do not touch
        for n in range(len(at)):
            if not shown or (at[n] - at[shown[-1]]) * width > 8 * (at[-1] - at[0]):
                shown.append(n)
        plot.ruler("x").ticks([at[n] for n in shown], [points[n] for n in shown])
    ansi = plot.build().string()
    return [[(s.text, s.style or PLAIN) for s in Text.from_ansi(line).render(Console())] for line in ansi.split("\n")]


def kept_cells(nodes: tuple[str, ...], cells: Iterable[tuple[tuple[int, int], str]], labels: dict[str, int]) -> frozenset[tuple[int, int]]:
    """The cells (with their addresses) of a circuit's nodes. A whole head stands for its q, k, v too; a node without position for all positions."""
    inside: dict[tuple, list[tuple]] = {}
    for n in map(parse_node, nodes):
        inside.setdefault((n.layer, n.site, n.head, n.index), []).append((n.part, labels.get(n.pos, n.pos)))
    out = set()
    for rc, address in cells if inside else ():
        n = parse_node(address)
        mine = inside.get((n.layer, n.site, n.head, n.index), ())
        if any(part in ("z", n.part) and (None in (pos, n.pos) or pos == n.pos) for part, pos in mine):
            out.add(rc)
    return frozenset(out)


def map_addresses(n_layers: int, n_heads: int, mlp: int) -> list[tuple[tuple[int, int], str]]:
    """Of a map of layers × heads, with the MLPs in one column."""
    return [((n, h), f"L{n}H{h}") for n in range(n_layers) for h in range(n_heads)] + [((n, mlp), f"L{n}.mlp") for n in range(n_layers)]


def head_map_addresses(grid: Grid) -> list[tuple[tuple[int, int], str]]:
    """Of a map of layers × heads whose last two columns are the attention output (or its bias) and the MLP."""
    return map_addresses(len(grid.rows), len(grid.cols) - 2, len(grid.cols) - 1)


def change(result: SweepResult) -> np.ndarray:
    """What each cell does to the metric: in units of clean minus corrupted where there is such a gap, else raw."""
    if np.isfinite(result.normalised).any():
        gap = result.clean - (result.corrupt if result.corrupt is not None else 0.0)
        untouched = (result.base - (result.corrupt if result.corrupt is not None else 0.0)) / gap if gap else 0.0
        return result.normalised.astype(float) - untouched
    return result.values.astype(float) - result.base


def show_p(p: float) -> str:
    return "below .001" if p < 0.001 else f"{p:.3f}"


def sweep_cell(truth: SweepResult | None, estimate: SweepResult | None, row: int, col: int, about: Spans = (), width: int = 1000) -> Spans:
    """One line about a cell: its node, effect, rank (of `about`, what is said of it in the map that is shown), the metric under it, spread, estimate."""
    result = truth or estimate
    if row >= len(result.rows) or col >= len(result.cols):
        return []
    name = result.address(row, col) or f"{result.rows[row]} × {result.cols[col]}"
    parts: list[Ranked] = [(0, [(f" {name:6} ", BOLD)])]  # the rest keeps its place as the cursor moves
    if truth is not None and np.isfinite(truth.values[row, col]):
        parts.append((0, [(f"effect {change(truth)[row, col]:+.3f}", BOLD)]))
        parts.append((1, [(f"  ~ below the noise floor {truth.floor:.2g}", WARN)] if truth.noise[row, col] else []))
        parts.append((3, [(f"  metric {float(truth.values[row, col]):+.4f}", PLAIN), (f" (untouched {truth.base:+.4f})", DIM)]))
        if truth.std.size:  # over a set it is said first how sure the effect is
            low, high, p, holm = (float(x[row, col]) for x in (truth.low, truth.high, truth.p, truth.holm))
            moved = float(truth.values[row, col]) - truth.base
            parts.append((2, [(f"  moved {moved:+.3f} ± {float(truth.std[row, col]):.3f}", PLAIN)]))
            parts.append((2, [(f" (95 % {low:+.3f} … {high:+.3f}, p {show_p(p)}, corrected {show_p(holm)})", PLAIN)]))
    if estimate is not None:
        parts.append((3, [(f"  estimate {change(estimate)[row, col]:+.3f}", DIM)]))
    parts += [(2 if n == 0 else 5, [(" ", PLAIN), span]) for n, span in enumerate(about[2:])]
    return fitted([*parts, (6, [(f"  {result.mechanism}", DIM)])], width)
