"""From results about weights to pictures: pairs of tokens, eigenvalues, composition, singular directions. Pure functions."""

import numpy as np

from techniques.weights.requests import CompositionResult, HeadWeightsResult, Pairs, SingularResult, WeightDifferenceResult
from utils import show_token, width_of
from widgets import BOLD, DIM, HEAD, PLAIN, Grid, Spans


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
    lead = [f"{a:+.4g}" + (f"{b:+.4g}i" if abs(b) > 1e-6 else "") for a, b in r.eigenvalues[:5].tolist()]
    while len(lead) > 1 and 50 + width_of(" ".join(lead)) > width:
        lead.pop()
    group = f" · kv head {r.kv_head}" if r.kv_head != r.head else ""
    facts: Spans = [(f"copying {r.copying:.2f}", BOLD), (f" (own token in the top 5; in the bottom 5 {r.anti_copying:.2f}; {r.sampled} tokens){group}", DIM)]
    eigen: Spans = [("eigenvalue positivity ", DIM), (f"{r.positivity:+.3f}", BOLD), (f"  first eigenvalues {' '.join(lead)}", DIM)]
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
    return Grid(values, [f"L{n}" for n in range(len(values))], [f"H{n}" for n in range(values.shape[1])], 0.0, hi, cell=(5, 7), listed=False)


def difference_grid(r: WeightDifferenceResult, part: str) -> Grid:
    """Two models' weights by layer: one matrix of every head, a cosine of every head, or every parameter of a block."""
    rows = [f"L{n}" for n in range(len(r.values))]
    if part == "parts":
        values = r.values.astype(float)
        return Grid(values, rows, [p.removesuffix(".weight") for p in r.parts], 0.0, largest(values), cell=(7, 16), listed=False)
    values = r.heads[part].astype(float)
    lo, hi = (min(float(np.nanmin(values, initial=1.0)), 0.999), 1.0) if len(part) == 2 else (0.0, largest(values))
    return Grid(values, rows, [f"H{n}" for n in range(values.shape[1])], lo, hi, cell=(5, 7), listed=False)


def largest(values: np.ndarray) -> float:
    return max(float(np.nanmax(values, initial=0)), 1e-6)


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
