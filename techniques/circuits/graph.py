"""A circuit as a drawing by layer: rows of nodes, the embeddings at the bottom and the logits at the top, and its edges as lines between them. Pure functions."""

import math
from dataclasses import dataclass

from rich.style import Style

from vocabulary.circuit import Circuit, LOGITS, owner, parse_edge
from vocabulary.nodes import parse_node
from screen.colours import ABOVE, BELOW, THEME, heat_code, half_style, on
from utils import width_of
from widgets import BOLD, CURSOR, CURSOR_PLAIN, DIM, PLAIN, RULE, Spans

EMBED, MARGIN = "embed", 7
MOST_GAP, LEAST_GAP = 5, 1  # lines between two rows
STRONG = 0.5  # edges of at least this share of the largest score are drawn twice as thick
MANY = 16  # of more edges than these only the strong ones and those of the node under the cursor are coloured


@dataclass(frozen=True)
class Graph:
    """
    Rows of nodes from the top (logits) down (embed), where each stands across (0 to 1), and the edges: of every (sender, receiver) their addresses
    with their scores (NaN: not known), the strongest first.
    """

    rows: tuple[tuple[str, ...], ...]
    across: dict[str, float]
    edges: dict[tuple[str, str], tuple[tuple[str, float], ...]]

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(n for row in self.rows for n in row)

    @property
    def top(self) -> float:
        """The largest score."""
        return max((abs(s) for some in self.edges.values() for _, s in some if s == s), default=0.0)

    @property
    def signed(self) -> bool:
        return any(s < 0 for some in self.edges.values() for _, s in some)

    def row_of(self, node: str) -> int:
        return next(n for n, row in enumerate(self.rows) if node in row)

    def of(self, node: str) -> list[tuple[str, str, float]]:
        """Edges of a node as (address, the node at the other end, score): those into it, then those from it, the strongest first."""
        into = [(e, a, s) for (a, b), some in self.edges.items() if b == node for e, s in some]
        out = [(e, b, s) for (a, b), some in self.edges.items() if a == node for e, s in some]
        strongest = lambda x: -abs(x[2]) if x[2] == x[2] else 0.0  # noqa: E731
        return sorted(into, key=strongest) + sorted(out, key=strongest)


def graph_of(circuit: Circuit, scores: dict[str, float], n_heads: int, labels: dict[str, int], length: int) -> Graph:
    """A circuit with the scores of its edges; nodes stand across by head (the MLP last), those with positions by position (of `length`)."""
    edges: dict[tuple[str, str], list[tuple[str, float]]] = {}
    for e in map(parse_edge, circuit.edges):
        edges.setdefault((owner(e.sender), owner(e.receiver)), []).append((str(e), scores.get(str(e), math.nan)))
    strongest = {k: tuple(sorted(some, key=lambda x: -abs(x[1]) if x[1] == x[1] else 0.0)) for k, some in edges.items()}
    names = {*circuit.nodes, *(n for pair in edges for n in pair)} | ({EMBED, LOGITS} if edges else set())
    steps: dict[tuple[float, int], list[str]] = {}
    for name in names:
        steps.setdefault(step_of(name), []).append(name)
    placed = any(n not in (EMBED, LOGITS) and parse_node(n).pos is not None for n in names)
    across = {n: place_of(n, n_heads, labels, length if placed else 0) for n in names}
    rows = tuple(tuple(sorted(steps[k], key=lambda n: (across[n], n))) for k in sorted(steps, reverse=True))
    return joined(Graph(rows, across, strongest), lambda a, b: layer_of(a[0]) == layer_of(b[0]))


def step_of(name: str) -> tuple[float, int]:
    """Where in the model a node is: layer, and 1 for what comes after the heads."""
    if name in (EMBED, LOGITS):
        return (-1, 0) if name == EMBED else (math.inf, 0)
    node = parse_node(name)
    return node.layer, int(node.site != "head")


def layer_of(name: str) -> float:
    return step_of(name)[0]


def place_of(name: str, n_heads: int, labels: dict[str, int], length: int) -> float:
    if name in (EMBED, LOGITS):
        return 0.5
    node = parse_node(name)
    head = (node.head + 0.5 if node.site == "head" else n_heads + 0.5) / (n_heads + 1)
    if not length:
        return head
    pos = labels.get(node.pos, node.pos) if node.pos is not None else length - 1
    return ((pos % length if isinstance(pos, int) else length - 1) + head) / length


def joined(graph: Graph, may, most: int = 0, width: int = 10**6, effects: dict[str, float] | None = None) -> Graph:
    """The graph with neighbouring rows made one where `may(row, row)` and no edge is between them; narrow ones first, until there are `most` rows."""
    rows = list(graph.rows)
    while len(rows) > most:
        able = []
        for n, (a, b) in enumerate(zip(rows, rows[1:])):
            fixed = {EMBED, LOGITS} & {*a, *b}
            wide = sum(width_of(chip(x, effects or {})) + 2 for x in (*a, *b))
            if not fixed and may(a, b) and wide <= width and not any((x, y) in graph.edges for x in b for y in a):
                able.append((wide, n))
        if not able:
            break
        n = min(able)[1]
        rows[n : n + 2] = [tuple(sorted((*rows[n], *rows[n + 1]), key=lambda x: (graph.across[x], layer_of(x), x)))]
    return Graph(tuple(rows), graph.across, graph.edges)


def chip(name: str, effects: dict[str, float]) -> str:
    return f" {name} {effects[name]:+.2f} " if name in effects else f" {name} "


def fitted_to(graph: Graph, width: int, height: int, effects: dict[str, float]) -> tuple[Graph, dict[str, float]] | None:
    """The graph with as many rows as there is room for, and the effects if there is room for their numbers; None where it does not fit and words are better."""
    rows = (height + LEAST_GAP) // (1 + LEAST_GAP) if graph.edges else height
    for shown in (effects, {}):
        small = joined(graph, lambda a, b: True, rows, width - MARGIN, shown)
        if len(small.rows) <= rows and all(sum(width_of(chip(n, shown)) + 1 for n in row) <= width - MARGIN for row in small.rows):
            return small, shown
    return None


# ------------------------------------------------------------------ drawing


def columns(graph: Graph, row: tuple[str, ...], width: int, shown: dict[str, float]) -> dict[str, int]:
    """The first column of every chip of a row: near where the node stands across, without touching the next."""
    room, at, x = width - MARGIN, {}, 0
    for n in row:
        size = width_of(chip(n, shown))
        x = max(x, round(graph.across[n] * room - size / 2), 0)
        at[n] = x
        x += size + 1
    end = room
    for n in reversed(row):
        at[n] = min(at[n], end - width_of(chip(n, shown)))
        end = at[n] - 1
    return {n: MARGIN + x for n, x in at.items()}


def lines_of(graph: Graph, height: int) -> list[int]:
    """The line of every row, gaps shared evenly."""
    gaps = max(len(graph.rows) - 1, 1)
    free = min(height - len(graph.rows), gaps * MOST_GAP) if graph.edges else min(height - len(graph.rows), gaps)
    return [n + n * free // gaps for n in range(len(graph.rows))]


def draw(graph: Graph, shown: dict[str, float], width: int, height: int, at: str, edge: str, mode: str, effects: dict[str, float]) -> list[Spans]:
    """Lines of the drawing: the node under the cursor, the edge that it follows, chips coloured by `effects`, edges by their scores."""
    lines = lines_of(graph, height)
    cols = [columns(graph, row, width, shown) for row in graph.rows]
    middle = {n: (x + width_of(chip(n, shown)) / 2, line) for line, at_cols in zip(lines, cols) for n, x in at_cols.items()}
    dots: dict[tuple[int, int], int] = {}
    style: dict[tuple[int, int], Style] = {}
    order = sorted(graph.edges.items(), key=lambda e: (edge in [x for x, _ in e[1]], at in e[0], abs(e[1][0][1]) if e[1][0][1] == e[1][0][1] else 0.0))
    for (a, b), some in order:
        chosen, score = edge in [x for x, _ in some], some[0][1]
        share = abs(score) / graph.top if score == score and graph.top else math.nan
        thick = chosen or share >= STRONG
        colour = CURSOR_LINE if chosen else edge_style(score, graph, mode, at in (a, b))
        (x0, y0), (x1, y1) = middle[a], middle[b]
        for col, line, bit in along(2 * x0, 4 * y0 - 1, 2 * x1, 4 * y1 + 4, thick):
            if style.get((col, line)) is not colour and (chosen or at in (a, b)):
                dots[col, line] = 0  # what matters now is not mixed with what lies below it
            dots[col, line] = dots.get((col, line), 0) | bit
            style[col, line] = colour
    hi = max((abs(x) for x in effects.values()), default=0.0)
    out: list[Spans] = []
    for y in range(lines[-1] + 1 if lines else 0):
        row = lines.index(y) if y in lines else -1
        spans: Spans = [((row_name(graph.rows[row]) if row >= 0 else "").ljust(MARGIN), DIM)]
        starts = {x: n for n, x in cols[row].items()} if row >= 0 else {}
        x = MARGIN
        while x < width:
            if x in starts:
                name = starts[x]
                spans.append((chip(name, shown), chip_style(name, at, effects.get(name), hi, mode)))
                x += width_of(chip(name, shown))
                continue
            bits = dots.get((x, y), 0)
            spans.append((chr(0x2800 + bits), style[x, y]) if bits else (" ", PLAIN))
            x += 1
        out.append(spans)
    return out


CURSOR_LINE = Style(color=f"color({THEME.cursor})", bold=True)


def edge_codes(above: bool) -> list[int]:
    """The colours of edges by size: those of a signed map that stand out from the background as lines do."""
    ramp = ABOVE if above else BELOW
    return ramp[len(ramp) // 2 - (len(ramp) > 4) :] if len(ramp) > 3 else ramp[1:]


def edge_style(score: float, graph: Graph, mode: str, mine: bool) -> Style:
    """Of an edge by its score; `mine`: of the node under the cursor."""
    weight = BOLD if mine else PLAIN
    if mode == "shade" or score != score or not graph.top:
        return BOLD if mine else DIM
    if len(graph.edges) > MANY and not mine and abs(score) < STRONG * graph.top:
        return RULE
    codes = edge_codes(score >= 0)
    return half_style(codes[min(int(abs(score) / graph.top * len(codes)), len(codes) - 1)], None) + weight


def edge_legend(graph: Graph, mode: str) -> Spans:
    """The colours of edges with the numbers at their ends."""
    if mode == "shade":
        return [(f"thick from {STRONG * graph.top:.3g} to {graph.top:.3g}", DIM)]
    swatches = lambda above: [("━", half_style(code, None)) for code in edge_codes(above)]  # noqa: E731
    below: Spans = [(f"{-graph.top:.3g} ", DIM), *reversed(swatches(False))] if graph.signed else []
    return [*below, ("0", DIM), *swatches(True), (f" {graph.top:.3g}", DIM), (f" · thick from {STRONG * graph.top:.2g}", DIM)]


def chip_style(name: str, at: str, effect: float | None, hi: float, mode: str) -> Style:
    if name == at:
        return CURSOR_PLAIN if mode == "shade" else CURSOR
    if mode == "shade":
        return BOLD
    return on(heat_code(effect / hi, True), True) if effect is not None and hi > 0 else on(THEME.text["rule"], True) + BOLD


def along(x0: float, y0: float, x1: float, y1: float, thick: bool) -> list[tuple[int, int, int]]:
    """Braille dots of a line, as (column, line, bit); coordinates are in dots, two across and four down a character."""
    bits = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
    n = int(max(abs(x1 - x0), abs(y1 - y0), 1))
    out = []
    for i in range(n + 1):
        x, y = int(x0 + (x1 - x0) * i / n), int(y0 + (y1 - y0) * i / n)
        for dx in (0, 1) if thick else (0,):
            if y >= 0 and x + dx >= 0:
                out.append(((x + dx) // 2, y // 4, bits[y % 4][(x + dx) % 2]))
    return out


def row_name(row: tuple[str, ...]) -> str:
    """The layers of a row."""
    layers = sorted({layer_of(n) for n in row})
    if layers[0] in (-1, math.inf):
        return "tokens" if layers[0] < 0 else ""
    return f"L{layers[0]}" if len(layers) == 1 else f"L{layers[0]}–{layers[-1]}"


def edges_beside(graph: Graph, at: str, edge: str, width: int, room: int) -> list[Spans]:
    """The edges of the node under the cursor with their scores, the followed one marked."""
    lines: list[Spans] = []
    head = ""
    for address, other, score in graph.of(at):
        ends = parse_edge(address)
        into = owner(ends.receiver) == at
        if (title := f"into {at}" if into else f"from {at}") != head:
            head = title
            lines.append([(title, BOLD)])
        part = "" if ends.receiver == LOGITS or parse_node(ends.receiver).site != "head" else f".{parse_node(ends.receiver).part}"
        text = f"{other} → {part}" if into and part else f"{other} →" if into else f"→ {ends.receiver}"
        number = f"{score:+.3f}" if score == score else ""
        bar = "█" * round(abs(score) / graph.top * max(0, width - 32)) if score == score and graph.top else ""
        mark = "▸" if address == edge else " "
        lines.append([(f"{mark} {text:18}", BOLD if address == edge else PLAIN), (f"{number:>8} ", BOLD), (bar, DIM)])
    chosen = next((n for n, line in enumerate(lines) if line[0][0].startswith("▸")), 0)
    start = max(0, min(chosen - room // 2, len(lines) - room))
    return lines[start : start + room]
