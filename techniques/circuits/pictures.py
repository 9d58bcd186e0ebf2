"""From circuits and their scores to pictures: the map, lists, scores, a discovery's curve, comparison, paths. Pure functions."""

import math
import textwrap
from pathlib import Path

import numpy as np

from techniques.circuits.requests import CompareResult, Interval, PathPatch, ScoreResult
from techniques.patching.requests import SweepResult
from vocabulary.circuit import Circuit, owner, parse_edge
from vocabulary.nodes import parse_node
from vocabulary.prompts import Study
from vocabulary.requests import ModelInfo
from screen.pictures import cells_of, change, chart, texts_of
from screen.replies import Reply
from screen.session import State
from widgets import BOLD, DIM, GOOD, PLAIN, WARN, Grid, Spans

NO_CIRCUIT = (
    "c keeps the node under the cursor, in any pane",
    "U discovers a circuit",
    "Y opens one from a file, or a published one",
    "v lists the views: drawing, paths, scores, curve",
    "S runs what the view shows",
)


def scored_over(state: State, study: Study) -> str:
    """Which prompts a study is over, in words that hold on the screen as it is now."""
    if not study.prompt_set:
        return "on this prompt" if study.prompt == state.prompt else "on another prompt"
    n = len(study.prompt_set)
    of = (
        Path(state.set_path).stem
        if study.prompt_set == state.prompt_set and state.set_path
        else "this set"
        if study.prompt_set == state.prompt_set
        else "ANOTHER SET"
    )
    return f"over {n} prompt{'s' * (n != 1)} of {of}"


def members(circuit: Circuit) -> dict[tuple[int, int], str]:
    """Cells [layer, head or -1 for the MLP] of the circuit's nodes and what is kept there."""
    out: dict[tuple[int, int], str] = {}
    for address in circuit.nodes:
        node = parse_node(address)
        if node.site in ("head", "mlp"):
            at = node.layer, node.head if node.site == "head" else -1
            part = (node.part if node.site == "head" and node.part != "z" else "") + ("" if node.pos is None else f"@{node.pos}")
            out[at] = f"{out[at]} {part}".strip() if at in out else part
    return out


def about_node(node: str, circuit: Circuit | None, effects: dict[str, float]) -> Spans:
    """One line: whether the node under the cursor is in the circuit, as what, and its effect."""
    mine = [n for n in circuit.nodes if owner(n).split("@")[0] == node] if circuit else []
    groups = [g for g, some in circuit.groups.items() if set(mine) & set(some)] if circuit else []
    words = f"in {circuit.name}" + (f" as {', '.join(mine)}" if mine != [node] else "") if mine else "not in the circuit: c keeps it"
    effect = "".join(f"  {n} alone away {effects[n]:+.4f}" for n in mine if n in effects)
    return [(f" {node} ", BOLD), (words, GOOD if mine else DIM), (f"  {', '.join(groups)}", PLAIN), (effect, PLAIN)]


def summary(circuit: Circuit, result: ScoreResult | None, width: int) -> list[Spans]:
    lines = score_lines(result) if result is not None else [[(line, DIM)] for line in wrap("S scores it: faithfulness, and what each part does alone", width)]
    if features := [n for n in circuit.nodes if parse_node(n).site == "sae"]:
        lines += [[(line, PLAIN)] for line in wrap(f"features: {' '.join(features)}", width)]
    if circuit.found:
        lines += [[(line, DIM)] for line in wrap(f"found: {circuit.found}", width)]
    return lines


def listing(circuit: Circuit, result: ScoreResult | None) -> list[Spans]:
    """Every part with its effect, minimality and group."""
    group_of = {x: g for g, some in circuit.groups.items() for x in some}
    effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else {}
    minimal = dict(zip(result.parts, result.minimal.tolist())) if result is not None else {}
    parts = sorted(effects, key=lambda p: -abs(effects[p])) or list(circuit.nodes)
    rest = [p for p in (*circuit.nodes, *circuit.edges) if p not in parts]
    lines: list[Spans] = [[(f"{'part':18}{'alone away':>11}{'minimality':>11}  group", BOLD)]]
    for p in [*parts, *rest]:
        numbers = (f"{noisy(effects[p], result.floor)}{effects[p]:+.4f}".rjust(11) if p in effects else " " * 11) + (
            f"{minimal[p]:11.3f}" if p in minimal else " " * 11
        )
        lines.append([(f"{p:18}{numbers}  ", PLAIN), (group_of.get(p, ""), DIM)])
    return lines


def all_scores(result: ScoreResult, width: int) -> list[Spans]:
    """Faithfulness, the worst subset, minimality of every part, and each prompt's own number."""
    lines = score_lines(result)
    if result.subsets:
        worst = int(np.abs(result.without_circuit - result.without_model).argmax())
        lines += [
            [(f"incompleteness {result.incompleteness:.4f}", BOLD), (f" (difference {said(result.worst)}) worst of {len(result.subsets)} subsets K", DIM)],
            [(f"  K = {' '.join(result.subsets[worst]) or 'nothing'}", PLAIN)],
            [(f"  F(C∖K) {result.without_circuit[worst]:+.4f}  F(M∖K) {result.without_model[worst]:+.4f}", PLAIN)],
        ]
    if result.minimal.size:
        order = np.argsort(result.minimal)
        lines += [[("minimality, least first: |F(C∖K) − F(C∖K∖v)| / F(M)", BOLD)]]
        lines += [[(f"  {result.parts[i]:16}{float(result.minimal[i]):7.3f} ({float(result.minimal_low[i]):.3f}…{float(result.minimal_high[i]):.3f})  ", WARN if result.minimal[i] < 0.01 else PLAIN),
                   (f"K = {' '.join(result.minimal_with[i]) or 'nothing'}", DIM)] for i in order.tolist()]  # fmt: skip
    if result.faithfulness.values.size > 1:
        each = " ".join(f"{v:.2f}" for v in result.faithfulness.values.tolist())
        lines += [[("each prompt's own faithfulness", BOLD)], *[[(f"  {line}", PLAIN)] for line in wrap(each, width - 2)]]
    return lines


def curve(reply: Reply | None, width: int, n: int, over: str = "") -> list[Spans]:
    """A discovery's faithfulness against the circuit's size, in n lines; above it how it was found, and `over` which prompts."""
    found = reply.result if reply is not None else None
    if found is None or not found.counts.size:
        return [[("  a discovery draws this curve: U", DIM)]]
    what = {"greedy": "heads", "features": "features"}.get(found.method, "edges")
    best = dict(zip(found.counts.tolist(), found.faithfulness.tolist()))  # sizes that pruning made the same: the last
    counts, asked = sorted(best), reply.request
    head = wrap(f"faithfulness against {what} ({found.method}, rest {asked.rest}, {over})", width)
    lines = chart("", [str(c) for c in counts], {"": [best[c] for c in counts]}, min(width, 100), max(6, n - len(head) - 1), [float(c) for c in counts])
    return [*([(line, BOLD)] for line in head), *lines]


def compared(reply: Reply | None, circuit: Circuit | None, width: int) -> list[Spans]:
    """The comparison, if it is of the circuit as it stands."""
    if reply is None or circuit is None or reply.request.circuit != circuit:
        return [[("  Y, then compare: with a published circuit or another", DIM)]]
    got: CompareResult = reply.result
    lines: list[Spans] = [[(f"{got.here} and {got.there}", BOLD)], [(f"overlap of nodes {share(got.nodes)}, of edges {share(got.edges)}", PLAIN)]]
    if got.false_positive.size:
        lines.append([(f"area under the ROC curve {got.area:.3f} ({len(got.false_positive)} steps)", PLAIN)])
    for title, some in (("in both", got.both), (f"only in {got.here}", got.only_here), (f"only in {got.there}", got.only_there)):
        lines += [[(f"{title} ({len(some)})", BOLD)], *[[(f"  {line}", PLAIN)] for line in wrap(" ".join(some), width - 2)]]
    return [*lines, *[[(line, DIM)] for line in wrap(got.convention, width)]]


def wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, max(12, width)) or [""]


def map_grid(info: ModelInfo, parts: dict[tuple[int, int], str], effects: dict[str, float], floor: float = math.nan) -> Grid:
    """Layers by heads and MLP: what is kept, and the effect of taking it alone away where that is known; ~ where it is below the noise floor."""
    n = info.n_heads
    values, noise = np.full((info.n_layers, n + 1), np.nan), set()
    for layer, head in parts:
        if not layer < info.n_layers or not head < n:
            continue
        col = n if head < 0 else head
        mine = [
            e for p, e in effects.items() if "->" not in p and (node := parse_node(p)).layer == layer and (node.head if node.site == "head" else -1) == head
        ]
        values[layer, col] = mine[0] if mine else np.nan
        if mine and 0 < abs(mine[0]) < floor:
            noise.add((layer, col))
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    kept = frozenset((layer, n if head < 0 else head) for layer, head in parts)
    more = {"noise": frozenset(noise), "floor": floor}
    return Grid(values, [f"L{i}" for i in range(info.n_layers)], [*(f"H{h}" for h in range(n)), "MLP"], -hi, hi, signed=True, cell=(5, 7), kept=kept, **more)


def noisy(effect: float, floor: float) -> str:
    """~ before an effect below the noise floor."""
    return "~" if 0 < abs(effect) < floor else ""


def path_grid(result: SweepResult, request: PathPatch, edges: set[str]) -> Grid:
    """The effect of each path; kept edges are marked."""
    values = change(result).astype(float)
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    mine = {e.sender for e in map(parse_edge, edges) if request.each == "sender" and e.receiver in request.receivers}
    kept = {(int(r), int(c)) for r, c in zip(*np.nonzero(np.isfinite(values))) if mine and result.address(int(r), int(c)).split("@")[0] in mine}
    cols = texts_of(result.tokens) if request.by_pos else list(result.cols)
    more = {"noise": cells_of(result.noise), "floor": result.floor, "positions": request.by_pos}
    return Grid(values, list(result.rows), cols, -hi, hi, signed=True, cell=(5, 8), marks=frozenset(kept), **more)


def share(x: float) -> str:
    return "none (neither has any)" if x != x else f"{x:.3f}"


def said(x: Interval) -> str:
    return f"{x.mean:+.4f}" + (f" ({x.low:+.3f}…{x.high:+.3f})" if np.isfinite(x.low) else "")


def score_lines(r: ScoreResult) -> list[Spans]:
    return [
        [(f"faithfulness {said(r.faithfulness)}", BOLD)],
        [(f"  F model {said(r.model)}", PLAIN)],
        [(f"  F circuit {said(r.alone)}", PLAIN)],
        [(f"  F nothing {said(r.empty)}", PLAIN)],
        *([[(f"~ effects below the noise floor {r.floor:.2g}", DIM)]] if any(r.noise(i) for i in range(len(r.effects))) else []),
        *([[(r.warning, WARN)]] if r.warning else []),
    ]
