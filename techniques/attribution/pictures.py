"""From attribution results to pictures: the map of components, ranked, by source, by neuron, over a set. Pure functions."""

import numpy as np

from techniques.attribution.requests import AttributionCells, AttributionNeuronsResult, AttributionSetResult, AttributionSourcesResult
from screen.pictures import signed, texts_of
from utils import show_token
from widgets import BAD, BOLD, DIM, GOOD, NEGATIVE, PLAIN, POSITIVE, Grid, Spans


def cells_grid(cells: AttributionCells) -> Grid:
    """Layers × heads, with each layer's attention bias and MLP in columns of their own; signed, in logits."""
    values = np.concatenate([cells.heads, cells.attn_bias[:, None], cells.mlps[:, None]], axis=1).astype(float)
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    rows, cols = [f"L{n}" for n in range(len(values))], [*(f"H{n}" for n in range(cells.heads.shape[1])), "b_O", "mlp"]
    return Grid(values, rows, cols, -hi, hi, signed=True, cell=(6, 7), listed=False)


def ranked_lines(cells: AttributionCells, std: AttributionCells | None, n: int, width: int) -> list[Spans]:
    """The n largest cells, with their spread over a prompt set, and bars in the room that is left."""
    spread = dict(std.rows()) if std else {}
    rows = sorted(cells.rows(), key=lambda r: -abs(r[1]))[:n]
    head: Spans = [(f"{'component':18}{'logits':>9}" + ("      ±" if std else ""), DIM)]
    top, room = max((abs(v) for _, v in rows), default=0.0), max(0, min(24, width - (36 if std else 29)))
    lines = [head]
    for name, value in rows:
        colour = POSITIVE if value > 0 else NEGATIVE
        lines.append([(f"{name:18}", PLAIN), (f"{value:+9.3f}", colour), (f" {spread[name]:6.3f}" if std else "", DIM), (f" {bar(value, top, room)}", colour)])
    return lines


def sum_line(total: float, logit: float, capped: float | None, error: float) -> Spans:
    """The sum of all cells and the model's own number, side by side."""
    ok = error <= 1e-4 * max(1.0, abs(logit))
    good = GOOD if ok else BAD
    spans: Spans = [(f" sum {total:+.4f}  model {logit:+.4f} ", good), (f" error {error:.1e} ", good)]
    if capped is not None:
        spans.append((f" after the soft cap {capped:+.4f} ", BOLD))
    return spans


def outward(values: np.ndarray) -> tuple[float, float]:
    """A scale outward from zero that holds the values."""
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    return -hi, hi


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
