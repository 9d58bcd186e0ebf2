"""From results about features to lines: ranked features, what one does, edges of the graph, the preflight, examples. Pure functions."""

import json
from functools import cache

import numpy as np
from rich.style import Style

from screen.pictures import texts_of
from techniques.features.requests import ExamplesResult, FeatureGraphResult, FeatureResult, FeaturesResult, PreflightResult
from utils import ROOT, show_token
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, SHADES, WARN, Spans

VERDICTS = {"good": GOOD, "warn": WARN, "refuse": BAD}
REVERSE = Style(reverse=True)


@cache
def shipped_labels() -> dict[tuple[str, int], str]:
    """What the card of the zoo says that its features fire on."""
    path = ROOT / "zoo" / "saes" / "features.json"
    return {(e["sae"], e["feature"]): e["fires_on"] for e in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def bar(share: float, width: int = 8) -> str:
    """A bar of at most `width` cells; its sign is in the number beside it."""
    return "█" * round(min(1.0, abs(share)) * width)


def graph_lines(r: FeatureGraphResult, row: int, n: int) -> list[Spans]:
    """The edges into a feature by what they add, and the rows that make up its pre-activation."""
    size, texts = max(np.abs(r.contribution).max(initial=0), 1e-9), texts_of(r.tokens)
    lines: list[Spans] = []
    for k, (i, at, a, c) in enumerate(zip(r.index.tolist(), r.at.tolist(), r.activation.tolist(), r.contribution.tolist())):
        mark = REVERSE if k == row else Style()
        lines.append([(f"f{i}@{at}".ljust(16) + show_token(texts[at], 11).ljust(12) + f"{a:11.3f}{c:+10.4f} ", PLAIN + mark), (bar(c / size), PLAIN)])
    rows = [("features not listed", r.rest), *r.rows.items(), ("sum", r.total)]
    fit = max(2, n - len(rows) - 1)
    top = max(0, min(row - fit // 2, len(lines) - fit)) if lines else 0
    count = f"from {top + 1}–{min(top + fit, len(lines))}/{len(lines)}" if lines else "from"
    head: Spans = [(f"{count:16}{'token':12}{'activation':>11}{'adds':>10}", BOLD)]
    return [head, *lines[top : top + fit]] + [[(f"{name:28.28}{value:+21.4f}", BOLD if name == "sum" else DIM)] for name, value in rows]


def feature_lines(r: FeaturesResult, index: int, n: int, width: float, here: float = np.nan) -> list[Spans]:
    """Ranked features, and the rows that make up the activation; first the one under the cursor where it is not among them, with its activation `here`."""
    values = getattr(r, r.order)
    size = max(float(np.abs(values).max(initial=0)), 1e-9)
    known = shipped_labels()
    lines: list[Spans] = []
    for i, a, g, d, v in zip(r.index.tolist(), r.activation.tolist(), r.attribution.tolist(), r.direct.tolist(), values.tolist()):
        style = PLAIN + REVERSE if i == index else PLAIN
        more = f"{bar(v / size)} {r.labels.get(i) or known.get((r.info.source, i), '')}" if width > 50 else ""
        lines.append([(f"f{i:<8}{a:10.3f}{g:+12.4f}{d:+9.4f} ", style), (more, DIM)])
    tail = [("other features", r.rest), ("bias", r.bias), ("reconstruction", r.reconstruction), ("error", r.error), ("activation", r.total)]
    at = next((k for k, i in enumerate(r.index.tolist()) if i == index), 0)
    alone = f"f{index:<8}{'' if np.isnan(here) else f'{here:.3f}':>10}  under the cursor, not in this list"
    pinned: list[Spans] = [] if index in r.index.tolist() else [[(alone, PLAIN + REVERSE)]]
    room = max(2, n - len(tail) - 2 - len(pinned))
    top = max(0, min(at - room // 2, len(lines) - room))
    count = f"{top + 1}–{min(top + room, len(lines))}/{r.active}" if lines else "none"
    shown = [[(f"{count:9}{'activation':>10}{'attribution':>12}{'direct':>9}", BOLD)], *pinned, *lines[top : top + room]]
    number = lambda x: " " * 12 if np.isnan(x) else f"{x:+12.4f}"  # noqa: E731
    shown += [
        [(f"{name:14}" + (f"{x:.0f} more" if name == "other features" else f"‖{x:.1f}‖").rjust(9)[:9] + number(g)[3:] + number(d)[3:], DIM)]
        for name, (x, g, d) in tail
    ]
    return [*shown, [(f"‖ ‖ norm; error of the sum {r.gap:.1e}", DIM)]]


def detail_lines(r: FeatureResult, width: int) -> list[Spans]:
    """What one feature does: over the tokens, to the logits, beside which others, from which tokens and heads."""
    texts, top = texts_of(r.tokens), max(float(r.activation.max(initial=0)), 1e-9)
    label = r.label or shipped_labels().get((r.info.source, r.index), "")
    lines: list[Spans] = [[(f"f{r.index}", BOLD), (f" {label} {r.neuronpedia}".rstrip(), PLAIN), ("  activation over the tokens", DIM)]]
    row: Spans = []
    used = 0
    for n, (text, a) in enumerate(zip(texts, r.activation.tolist())):
        token = show_token(text, 10, fill=False)
        piece = token + (SHADES[1 + min(3, int(4 * a / top))] if a > 0 else " ")
        if used + len(piece) > width:
            lines.append(row)
            row, used = [], 0
        row.append((piece, (BOLD if a > 0 else DIM) + (REVERSE if n == r.pos else Style())))
        used += len(piece)
    lines.append(row)
    name = lambda i: show_token(r.texts.get(i, str(i)), 10, fill=False)  # noqa: E731
    wide = lambda some: some[: max(2, width // 13)]  # noqa: E731
    lines.append([("logits + ", DIM), (" ".join(f"{name(i)} {v:.2f}" for i, v in wide(list(zip(r.top_ids.tolist(), r.top_logits.tolist())))), PLAIN)])
    lines.append([("logits − ", DIM), (" ".join(f"{name(i)} {v:.2f}" for i, v in wide(list(zip(r.bottom_ids.tolist(), r.bottom_logits.tolist())))), PLAIN)])
    lines.append([("nearest  ", DIM), (" ".join(f"f{i} {c:.2f}" for i, c in wide(list(zip(r.nearest.tolist(), r.cosine.tolist())))), PLAIN)])
    lines.append([("with     ", DIM), (" ".join(f"f{i} {c:.2f}" for i, c in wide(list(zip(r.together.tolist(), r.jaccard.tolist())))), PLAIN)])
    order = np.argsort(-np.abs(r.sources))[:5].tolist()
    lines.append([(f"pre-activation at {r.pos} {r.total:+.3f}, through heads by source token", BOLD)])
    lines += [[(f"  {show_token(texts[i], 12)} {i:3} {float(r.sources[i]):+9.4f}", PLAIN)] for i in order]
    if r.heads.size:
        best = np.argsort(-np.abs(r.heads), axis=None)[:4].tolist()
        cells = [divmod(b, r.heads.shape[1]) for b in best]
        lines.append([("  heads  ", DIM), (" ".join(f"L{x}H{h} {float(r.heads[x, h]):+.3f}" for x, h in cells), PLAIN)])
    lines.append([(f"  rest (embeddings, MLPs, biases) {r.rest:+.4f}", DIM)])
    return lines


def preflight_lines(r: PreflightResult) -> list[Spans]:
    published = lambda x: "" if np.isnan(x) else f"  published {x:.4g}"  # noqa: E731
    rows: list[Spans] = [
        [(f" {r.verdict}", VERDICTS[r.verdict]), (f"  {r.cause}", PLAIN)],
        [
            (
                f" {r.info.architecture}, {r.info.d_in} → {r.info.d_sae} features, reads {r.info.hook}"
                + (f", writes {r.info.hook_out}" if r.info.hook_out != r.info.hook else ""),
                PLAIN,
            )
        ],
        [(f" view {r.info.view} (" + ", ".join(f"{k} {v:.4f}" for k, v in r.cosines.items()) + f"), normalisation {r.info.normalisation}", PLAIN)],
        [(f" cosine of reconstruction and activation {r.cosine:.4f}", PLAIN)],
        [(f" variance unexplained {r.unexplained:.4f}" + (f"  published {1 - r.info.explained:.4f}" if np.isfinite(r.info.explained) else ""), PLAIN)],
        [(f" L0 {r.l0:.2f}{published(r.info.l0)}", PLAIN)],
        [(f" loss {r.loss:.4f}, with the SAE {r.loss_spliced:.4f}, with zeros {r.loss_zero:.4f}", PLAIN)],
        [(f" {r.recovered:.1%} of the loss recovered", PLAIN)],
    ]
    return rows


def example_lines(r: ExamplesResult, width: int) -> list[Spans]:
    lines: list[Spans] = [[(f"f{r.indices[0]} over {r.tokens} tokens, fires on {float(r.density[0]):.3%}" + (" (kept from before)" if r.cached else ""), BOLD)]]
    if r.counts.size and r.counts[0].max(initial=0) > 0:
        peak = float(np.log1p(r.counts[0]).max())
        edges, on = np.asarray(r.edges).reshape(-1, r.edges.shape[-1])[0], np.nonzero(r.counts[0])[0]
        first, last = int(on[0]), int(on[-1]) + 1
        blocks = "".join(" ▁▂▃▄▅▆▇█"[round(8 * float(np.log1p(c)) / peak)] for c in r.counts[0][first:last].tolist())
        lines.append([(f"{blocks} ", PLAIN), (f"{float(edges[first]):.3g} … {float(edges[last]):.3g}, log counts", DIM)])
    for e in r.examples[0]:
        spans: Spans = [(f"{e.activation[e.at]:8.2f} ", BOLD)]
        left, used = max(0, e.at - 8), 9
        for k in range(left, len(e.texts)):
            text = show_token(e.texts[k], 12, fill=False)
            if used + len(text) > width:
                break
            spans.append((text, PLAIN + REVERSE if k == e.at else BOLD if e.activation[k] > 0 else DIM))
            used += len(text)
        lines.append(spans)
    return lines
