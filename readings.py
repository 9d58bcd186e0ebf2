"""Pictures of attribution and of weights: from their results to grids and lines. Pure functions; no app, no torch."""

from collections.abc import Iterable

import numpy as np

from techniques.attribution.requests import AttributionCells, AttributionNeuronsResult, AttributionResult, AttributionSetResult, AttributionSourcesResult
from techniques.patching.requests import SweepResult
from techniques.weights.requests import CompositionResult, HeadWeightsResult, Pairs, SingularResult
from vocabulary.nodes import parse_node
from pictures import signed, texts_of
from utils import show_token
from widgets import BAD, BOLD, DIM, GOOD, HEAD, NEGATIVE, PLAIN, POSITIVE, FAINT, Grid, Spans

# ------------------------------------------------------------------ attribution


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


def cells_grid(cells: AttributionCells) -> Grid:
    """Layers × heads, with each layer's attention bias and MLP in columns of their own; signed, in logits."""
    values = np.concatenate([cells.heads, cells.attn_bias[:, None], cells.mlps[:, None]], axis=1).astype(float)
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    rows, cols = [f"L{n}" for n in range(len(values))], [*(f"H{n}" for n in range(cells.heads.shape[1])), "b_O", "mlp"]
    return Grid(values, rows, cols, -hi, hi, signed=True, cell=(6, 7))


def ranked_lines(cells: AttributionCells, std: AttributionCells | None, n: int) -> list[Spans]:
    """The n largest cells, with their spread over a prompt set."""
    spread = dict(std.rows()) if std else {}
    rows = sorted(cells.rows(), key=lambda r: -abs(r[1]))[:n]
    head: Spans = [(f"{'component':18}{'logits':>9}" + ("      ±" if std else ""), DIM)]
    return [head] + [
        [(f"{name:18}", PLAIN), (f"{value:+9.3f}", POSITIVE if value > 0 else NEGATIVE), (f" {spread[name]:6.3f}" if std else "", DIM)] for name, value in rows
    ]


def sum_line(total: float, logit: float, capped: float | None, error: float, convention: str) -> Spans:
    """The sum of all cells and the model's own number, side by side."""
    ok = error <= 1e-4 * max(1.0, abs(logit))
    spans: Spans = [(f" sum {total:+.4f}  model {logit:+.4f}  error {error:.1e} ", GOOD if ok else BAD)]
    if capped is not None:
        spans.append((f" after the soft cap {capped:+.4f} ", BOLD))
    return [*spans, (f" {convention}", DIM)]


def attribution_side(result: AttributionResult, n: int) -> list[Spans]:
    return ranked_lines(result.cells, None, n)


def bar(value: float, top: float, width: int) -> str:
    return ("█" * round(abs(value) / top * width)).ljust(width) if top > 0 else " " * width


def source_lines(result: AttributionSourcesResult, n: int) -> list[Spans]:
    """A head's contribution by the position it reads from."""
    texts, order = texts_of(result.tokens), np.argsort(-np.abs(result.sources), kind="stable")[:n]
    top = float(np.abs(result.sources).max(initial=0))
    group = f" (kv head {result.kv_head})" if result.kv_head != result.head else ""
    lines: list[Spans] = [[(f"L{result.layer}H{result.head}{group} at {result.pos} by source", BOLD)], [(f"{'from':14}{'logits':>8}  attn", DIM)]]
    for s in order.tolist():
        value = float(result.sources[s])
        lines.append(
            [
                (f"{s:2} {show_token(texts[s], 10)} ", PLAIN),
                (f"{value:+8.3f}", POSITIVE if value > 0 else NEGATIVE),
                (f"  {float(result.pattern[s]):.3f} {bar(value, top, 8)}", DIM),
            ]
        )
    if result.interventions:
        lines.append([(f"{'interventions':14}{result.interventions:+8.3f}", PLAIN)])
    return [*lines, [(f"{'sum':14}{result.total:+8.3f}", BOLD), (f"  error {result.error:.0e}", DIM)]]


def neuron_lines(result: AttributionNeuronsResult, n: int) -> list[Spans]:
    """An MLP's largest neurons for and against."""
    lines: list[Spans] = [[(f"L{result.layer}.mlp at {result.pos} by neuron", BOLD)], [(f"{'neuron':14}{'logits':>8}  activation", DIM)]]
    rows = list(zip(result.index.tolist(), result.contribution.tolist(), result.activation.tolist()))
    half = max(1, n // 2)
    for index, value, activation in rows[:half] + rows[-half:]:
        lines.append([(f"n{index:<13}", PLAIN), (f"{value:+8.3f}", POSITIVE if value > 0 else NEGATIVE), (f"  {activation:+.3f}", DIM)])
    for name, value in (("the others", result.rest), ("b_out", result.bias), ("interventions", result.interventions)):
        if value:
            lines.append([(f"{name:14}{value:+8.3f}", DIM)])
    return [*lines, [(f"{'sum':14}{result.total:+8.3f}", BOLD), (f"  error {result.error:.0e}", DIM)]]


def set_line(result: AttributionSetResult) -> Spans:
    mean = float(result.logits.mean())
    worst = float(result.logits.min())
    return [
        (
            f" mean over {len(result.prompts)} prompts {mean:+.3f}, worst {signed(worst)} is prompt {result.worst + 1} (W goes there), error {result.error:.0e} ",
            BOLD,
        ),
        (result.convention, DIM),
    ]


# ------------------------------------------------------------------ patching


def change(result: SweepResult) -> np.ndarray:
    """What each cell does to the metric: in units of clean minus corrupted where there is such a gap, else raw."""
    if np.isfinite(result.normalised).any():
        gap = result.clean - (result.corrupt if result.corrupt is not None else 0.0)
        untouched = (result.base - (result.corrupt if result.corrupt is not None else 0.0)) / gap if gap else 0.0
        return result.normalised.astype(float) - untouched
    return result.values.astype(float) - result.base


def sweep_grid(truth: SweepResult | None, estimate: SweepResult | None, show: str) -> Grid:
    """Rows and columns of a sweep: the truth where it is known, the estimate elsewhere; marked where the two disagree."""
    result = truth or estimate
    true, guess = (change(r) if r is not None else np.full(result.values.shape, np.nan) for r in (truth, estimate))
    blank = np.full(true.shape, np.nan)
    spread, p = (getattr(truth, n).astype(float) if truth is not None and getattr(truth, n).size else blank for n in ("std", "p"))
    both = {"effect": np.where(np.isfinite(true), true, guess), "estimate": guess, "disagreement": guess - true, "spread": spread, "p": p}
    values = (np.where(np.isfinite(true), truth.values, np.nan) if truth else estimate.values).astype(float) if show == "metric" else both[show]
    numbers = None
    if show == "p":  # the smaller, the stronger the colour: 1 at .001 and below
        lo, hi, sign, numbers = 0.0, 1.0, False, values
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.clip(-np.log10(values) / 3, 0.0, 1.0)
    else:
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = (0.0, False) if show == "spread" else (-hi, True)
    far = np.argwhere(np.abs(guess - true) > np.maximum(0.1, 0.3 * np.abs(true))).tolist() if show in ("effect", "estimate", "disagreement") else []
    cell = (5, 7) if len(result.cols) > 24 else (6, 8)
    texts, places = texts_of(result.tokens), tuple(map(str, range(len(result.tokens.ids))))
    rows, cols = (texts if names == places else list(names) for names in (result.rows, result.cols))
    return Grid(values, rows, cols, lo, hi, None, numbers, sign, cell, 0.0 if show == "p" else FAINT, marks=frozenset(map(tuple, far)))


def show_p(p: float) -> str:
    return "below .001" if p < 0.001 else f"{p:.3f}"


def sweep_cell(truth: SweepResult | None, estimate: SweepResult | None, row: int, col: int) -> Spans:
    """One line about a cell: its node, the metric under it, effect, estimate, spread."""
    result = truth or estimate
    if row >= len(result.rows) or col >= len(result.cols):
        return []
    name = result.address(row, col) or f"{result.rows[row]} × {result.cols[col]}"
    spans: Spans = [(f" {name} ", BOLD)]
    if truth is not None and np.isfinite(truth.values[row, col]):
        spans.append((f"metric {float(truth.values[row, col]):+.4f}", PLAIN))
        if truth.std.size:
            low, high, p = (float(x[row, col]) for x in (truth.low, truth.high, truth.p))
            moved = float(truth.values[row, col]) - truth.base
            spans.append((f" moved {moved:+.3f} ± {float(truth.std[row, col]):.3f} (95 % {low:+.3f} … {high:+.3f}, p {show_p(p)})", PLAIN))
        spans.append((f" (untouched {truth.base:+.4f})  effect {change(truth)[row, col]:+.3f}", PLAIN))
    if estimate is not None:
        spans.append((f"  estimate {change(estimate)[row, col]:+.3f}", DIM))
    return [*spans, (f"  {result.mechanism}", DIM)]


# ------------------------------------------------------------------ weights


def pair_columns(left: Pairs, right: Pairs, titles: tuple[str, str], texts: dict[int, str], n: int, width: int) -> list[Spans]:
    """Two lists of token pairs side by side."""
    w = max(6, min(16, (width // 2 - 12) // 2))
    lines: list[Spans] = [[(title.ljust(2 * w + 12), HEAD) for title in titles]]
    for i in range(min(n, max(len(left.scores), len(right.scores)))):
        spans: Spans = []
        for pairs in (left, right):
            if i < len(pairs.scores):
                a, b = (show_token(texts[int(k)], w) for k in pairs.ids[i])
                spans += [(f"{a} → {b} ", PLAIN), (f"{float(pairs.scores[i]):+7.2f} ", DIM)]
            else:
                spans.append((" " * (2 * w + 12), PLAIN))
        lines.append(spans)
    return lines


def ov_lines(r: HeadWeightsResult, n: int, width: int) -> list[Spans]:
    lead = " ".join(f"{a:+.2f}" + (f"{b:+.2f}i" if abs(b) > 1e-6 else "") for a, b in r.eigenvalues[:5].tolist())
    group = f" · kv head {r.kv_head}" if r.kv_head != r.head else ""
    facts: Spans = [(f"copying {r.copying:.2f}", BOLD), (f" (own token in the top 5; in the bottom 5 {r.anti_copying:.2f}; {r.sampled} tokens){group}", DIM)]
    eigen: Spans = [("eigenvalue positivity ", DIM), (f"{r.positivity:+.3f}", BOLD), (f"  first eigenvalues {lead}", DIM)]
    return [facts, eigen, [], *pair_columns(r.ov_top, r.ov_bottom, ("reads → writes", "reads → writes against"), r.texts, n - 4, width)]


def qk_lines(r: HeadWeightsResult, n: int, width: int) -> list[Spans]:
    lines: list[Spans] = []
    if len(r.position):
        best = np.argsort(-r.position)[:4].tolist()
        lines.append(
            [
                ("position term: ", DIM),
                (", ".join(f"{o} back {float(r.position[o]):+.2f}" for o in best), BOLD),
                ("  (mean score of learned positions that far apart)", DIM),
            ]
        )
    if r.distance:
        lines.append([(f"at distance {r.distance}", BOLD)])
    titles = ("destination → source it looks for", "and what it avoids")
    return [*lines, [], *pair_columns(r.qk_top, r.qk_bottom, titles, r.texts, n - len(lines) - 2, width)]


def composition_grid(r: CompositionResult, part: str) -> Grid:
    """Composition with every head of the other layers."""
    values = getattr(r, part).astype(float)
    hi = max(float(np.nanmax(values, initial=0)), 1e-6) if np.isfinite(values).any() else 1.0
    return Grid(values, [f"L{n}" for n in range(len(values))], [f"H{n}" for n in range(values.shape[1])], 0.0, hi, cell=(5, 7))


def singular_lines(r: SingularResult, n: int, width: int) -> list[Spans]:
    """Singular directions, each side's highest tokens (neuron numbers for neurons)."""
    name = f"L{r.layer}H{r.head} {r.which}" if r.head is not None else f"L{r.layer} {r.which}"
    lines: list[Spans] = [[(f"{name}: singular value, share of the squared norm, and its sides' tokens", DIM)]]
    for i, (value, share) in enumerate(zip(r.values.tolist(), r.share.tolist())):
        for side in r.sides:
            for sign, ids in (("+", side.top_ids), ("−", side.bottom_ids)):
                head = f"{value:8.3f} {share:5.1%} " if side is r.sides[0] and sign == "+" else " " * 15
                words, room = [], width - 32
                for k in ids[i].tolist():
                    word = f"n{k}" if side.name == "neurons" else show_token(r.texts[k], 12, fill=False)
                    if room - len(word) - 1 < 0:
                        break
                    words.append(word)
                    room -= len(word) + 1
                lines.append([(head, BOLD), (f"{side.name:12}{sign} ", DIM), (" ".join(words), PLAIN)])
        if len(lines) >= n:
            break
    return lines[:n]
