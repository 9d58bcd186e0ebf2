"""From results to pictures: grids for the heat maps and tables, lines for everything else. Pure functions of a result and a view; no app, no torch."""

import dataclasses
import math
from functools import lru_cache

import numpy as np
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from techniques.attention.requests import AttentionResult, HeadStatsResult
from techniques.lens.requests import LensResult
from techniques.output.requests import RunResult, Side
from vocabulary.prompts import TokenRow
from vocabulary.requests import Identity, ModelInfo
from utils import show_bytes, show_count, show_token, visible
from widgets import ABOVE, BAD, BELOW, BOLD, CHANGED, CURSOR, CURSOR_PLAIN, DIM, GOOD, HEAD, PLAIN, RAMP, SHADES, WARN, Grid, Spans, on

LENS_STATS = {
    "prob": "probability of the top token",
    "answer": "probability of the answer",
    "rank": "rank of the answer (0 = top; colour: log scale)",
    "entropy": "entropy, nats",
    "kl": "KL(final ‖ this), nats",
    "logit_diff": "logit difference, answer − foil",
    "kl_pair": "KL(clean ‖ corrupted), nats",
    "promoted": "token promoted most against the row before, log probability",
    "suppressed": "token suppressed most against the row before, log probability",
}
LENS_KINDS = {"logit": "logit lens", "tuned": "tuned lens", "jacobian": "Jacobian lens"}
HEAD_STATS = {
    "induction": "attention to the token after an earlier copy",
    "previous": "attention to the previous token",
    "duplicate": "attention to earlier copies of the token",
    "first": "attention to the first token",
    "entropy": "entropy of attention, nats",
    "pair": "attention between the cursor's two positions",
}
UNDERLINE = Style(underline=True)
RUN_NAMES = {
    "now": "now",
    "clean": "clean",
    "corrupt": "corrupted",
    "clean-corrupt": "clean − corrupted",
    "now-clean": "now − clean",
    "now-corrupt": "now − corrupted",
}


def texts_of(row: TokenRow) -> list[str]:
    """The tokens' texts; a BOS token that was put in front reads ⟨bos⟩."""
    return ["⟨bos⟩", *row.texts[1:]] if row.bos else list(row.texts)


def signed(x: float | None, digits: int = 3) -> str:
    return "—" if x is None or math.isnan(x) else f"{x:+.{digits}f}"


def scale(grid: Grid) -> str:
    if grid.numbers is not None and np.isfinite(grid.numbers).any():  # what is coloured is not what is shown
        return f"{np.nanmin(grid.numbers):.0f} … {np.nanmax(grid.numbers):.0f}"
    return f"{grid.lo:.3g} … {grid.hi:.3g}"


# ------------------------------------------------------------------ lens


def lens_values(result: LensResult, stat: str) -> np.ndarray:
    """[point, position] of a statistic of LENS_STATS."""
    match stat:
        case "prob":
            values = result.top_probs[..., 0]
        case "answer":
            values = result.prob
        case "promoted" | "suppressed":
            values = (result.up_values if stat == "promoted" else result.down_values)[..., 0]
        case _:
            values = getattr(result, stat)
    return values.astype(float)


def lens_grid(result: LensResult, stat: str, d_vocab: int) -> Grid:
    """Hook points × positions; each cell the top token, coloured by the statistic."""
    values = lens_values(result, stat)
    numbers, lo, hi, sign = None, 0.0, 1.0, False
    if stat == "rank":
        numbers, values = values, 1 - np.log1p(values) / math.log1p(d_vocab)
    elif stat == "entropy":
        hi = math.log(d_vocab)
    elif stat in ("kl", "kl_pair"):
        hi = max(float(np.nanmax(values, initial=0)), 1e-6)
    elif stat in ("logit_diff", "promoted", "suppressed"):
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = -hi, True
    ids = {"promoted": result.up_ids, "suppressed": result.down_ids}.get(stat, result.top_ids)[..., 0]
    text = [
        ["" if math.isnan(v) and stat in ("promoted", "suppressed") else result.texts[i] for i, v in zip(*row)] for row in zip(ids.tolist(), values.tolist())
    ]
    return Grid(values, list(result.points), texts_of(result.tokens), lo, hi, text, numbers, sign, (6, 10), corner="hook point")


def lens_cell(result: LensResult, row: int, pos: int, k: int = 5) -> Spans:
    """One line about a cell: its top tokens and statistics."""
    if not (row < len(result.points) and pos < len(result.tokens.texts)):
        return []
    tops = [(show_token(result.texts[i]), p) for i, p in zip(result.top_ids[row, pos, :k].tolist(), result.top_probs[row, pos, :k].tolist())]
    spans: Spans = [(f" {result.points[row]}@{pos}", BOLD), (f" {lens_numbers(result, row, pos)} ", PLAIN)]
    if tops:
        spans.append((show_token(texts_of(result.tokens)[pos]) + " → ", PLAIN))
    return [*spans, ("  ".join(f"{token} {p:.3f}" for token, p in tops), PLAIN)]


def lens_numbers(result: LensResult, row: int, pos: int) -> str:
    rank, prob, diff = (float(a[row, pos]) for a in (result.rank, result.prob, result.logit_diff))
    answer = "" if math.isnan(prob) else f"answer p {prob:.4f} rank {rank:.0f} "
    diff_text = "" if math.isnan(diff) else f"LD {diff:+.3f} "
    return f"{answer}{diff_text}H {float(result.entropy[row, pos]):.3f} KL {float(result.kl[row, pos]):.4f}"


def chart(title: str, points: list[str], lines: dict[str, list[float]], width: int, height: int, at: list[float] | None = None) -> list[Spans]:
    """A line chart over depth by plotext, one line a run; gaps where there is no number. `at` are the points' places on the axis (else one after the other)."""
    import plotext

    plot = plotext.figure
    plot.clear()
    plot.theme("simple")
    plot.plot_size(width, height)
    plot.title(title)
    for (name, ys), marker in zip(lines.items(), ("braille", "•", "x")):
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


def lens_side(result: LensResult, row: int, pos: int, k: int) -> list[Spans]:
    """The top-k beside the table."""
    if not (row < len(result.points) and pos < len(result.tokens.texts)):
        return []
    lines: list[Spans] = [[(f"{result.points[row]}@{pos}", BOLD), (" after " + show_token(texts_of(result.tokens)[pos], 12, fill=False), DIM)]]
    lines += [
        [(f"{n:2} ", DIM), (show_token(result.texts[i], 12) + f" {p:.4f}", PLAIN)]
        for n, (i, p) in enumerate(zip(result.top_ids[row, pos, :k].tolist(), result.top_probs[row, pos, :k].tolist()))
    ]
    rank, prob, diff = (float(a[row, pos]) for a in (result.rank, result.prob, result.logit_diff))
    named = [("answer's probability", prob, 4), ("answer's rank", rank, 0), ("logit difference", diff, 3)]
    lines.append([])
    lines += [[(f"{name:22}", DIM), (f"{x:.{d}f}", PLAIN)] for name, x, d in named if not math.isnan(x)]
    lines.append([("entropy, nats         ", DIM), (f"{float(result.entropy[row, pos]):.3f}", PLAIN)])
    lines.append([("KL(final ‖ this), nats", DIM), (f"{float(result.kl[row, pos]):.4f}", PLAIN)])
    return lines


# ------------------------------------------------------------------ attention


def heads_grid(result: HeadStatsResult, stat: str, marks: frozenset[tuple[int, int]]) -> Grid:
    """Layers × heads of a statistic, with two blank columns for the whole attention and MLP output, so that the cursor can stand there."""
    values = result.stats[stat].astype(float)
    n_layers, n_heads = values.shape
    values = np.concatenate([values, np.full((n_layers, 2), np.nan)], axis=1)
    lo, hi, sign = 0.0, 1.0, False
    if "-" in result.which:
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = -hi, True
    elif stat == "entropy":
        hi = max(float(np.nanmax(values, initial=0)), 1e-6)
    rows, cols = [f"L{n}" for n in range(n_layers)], [*(f"H{n}" for n in range(n_heads)), "attn", "mlp"]
    return Grid(values, rows, cols, lo, hi, signed=sign, cell=(5, 6), marks=marks, blanks=("attn", "mlp"))


def pattern_grid(result: AttentionResult, head: int) -> Grid:
    """Destinations × sources of one head; sources after the destination are blank, not zero."""
    values = result.pattern[head].astype(float)
    values[np.triu_indices(len(values), 1)] = np.nan
    lo, hi, sign = 0.0, 1.0, False
    if "-" in result.which:
        hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
        lo, sign = -hi, True
    tokens = texts_of(result.tokens)
    rows = [f"{n:>2} {show_token(tok, 9, fill=False)}" for n, tok in enumerate(tokens)]
    return Grid(values, rows, list(tokens), lo, hi, signed=sign, cell=(4, 4) if len(tokens) <= 40 else (2, 4), faint=(hi - lo) * 0.15, corner="to \\ from")


def small_patterns(result: AttentionResult, head: int, width: int, height: int, mode: str) -> list[Spans]:
    """Every head's pattern of a layer, two destinations a line by half blocks (shades without colour), wrapped to the width; pooled when long."""
    n_heads, seq, _ = result.pattern.shape
    top = max(float(np.abs(result.pattern).max(initial=0)), 1e-6)
    signed_ = "-" in result.which
    across = max(1, width // (min(seq, 24) + 2))
    down = -(-n_heads // across)
    lines_each = max(2, height // down - 1)
    pool = max(1, -(-seq // min(width // across - 2, 2 * lines_each)))
    size = -(-seq // pool)
    blocks: list[list[Spans]] = []
    for h in range(n_heads):
        values = np.zeros((size * pool, size * pool), np.float32)
        values[:seq, :seq] = result.pattern[h]
        cells = values.reshape(size, pool, size, pool)
        cells = np.take_along_axis(
            cells.transpose(0, 2, 1, 3).reshape(size, size, -1), np.abs(cells.transpose(0, 2, 1, 3).reshape(size, size, -1)).argmax(-1)[..., None], -1
        )[..., 0]
        block: list[Spans] = [[(f"H{h}".ljust(size + 2), CURSOR_PLAIN if h == head else BOLD)]]
        for y in range(0, size, 2):
            spans: Spans = []
            for x in range(size):
                pair = [float(cells[r, x]) / top if r < size and x <= r else math.nan for r in (y, y + 1)]
                spans.append(half_block(pair, signed_, mode))
            block.append([*spans, ("  ", PLAIN)])
        blocks.append(block)
    out: list[Spans] = []
    for start in range(0, n_heads, across):
        group = blocks[start : start + across]
        out += [[span for block in group for span in block[y]] for y in range(len(group[0]))]
    return out


def half_block(pair: list[float], signed_: bool, mode: str) -> tuple[str, Style]:
    """Two cells above each other in one character."""
    if mode == "shade":
        value = max((abs(v) for v in pair if not math.isnan(v)), default=math.nan)
        return (" " if math.isnan(value) else SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)]), PLAIN
    codes = [None if math.isnan(v) else heat_code(v, signed_) for v in pair]
    if codes[0] is None and codes[1] is None:
        return " ", PLAIN
    return "▀" if codes[0] is not None else "▄", half_style(*codes)


def heat_code(value: float, signed_: bool) -> int:
    if not signed_:
        return RAMP[min(int(value * len(RAMP)), len(RAMP) - 1)]
    ramp = ABOVE if value >= 0 else BELOW
    return ramp[min(int(abs(value) * len(ramp)), len(ramp) - 1)]


@lru_cache(1024)
def half_style(above: int | None, below: int | None) -> Style:
    front, back = (above, below) if above is not None else (below, None)
    return Style(color=f"color({front})", bgcolor=None if back is None else f"color({back})")


def pattern_cell(result: AttentionResult, head: int, pos: int, src: int, drilled: bool) -> Spans:
    """One line: what the head reads at the cursor's destination."""
    if not (head < len(result.pattern) and pos < len(result.tokens.texts)):
        return []
    row, tokens = result.pattern[head][pos][: pos + 1], texts_of(result.tokens)
    order = np.argsort(-np.abs(row), kind="stable")[:3].tolist()
    read = "  ".join(f"{s} {show_token(tokens[s])} {float(row[s]):.3f}" for s in order)
    spans: Spans = [(f" L{result.layer}H{head} ", BOLD), (f"{pos} {show_token(tokens[pos])} attends to {read}", PLAIN)]
    if drilled and src <= pos:
        spans += [("  │ cursor ", DIM), (f"{src} {show_token(tokens[src])}", PLAIN), (f" {float(row[src]):.4f}", BOLD)]
    return spans


# ------------------------------------------------------------------ output


def output_lines(result: RunResult, pos: int, other: tuple[str, int], k: int, wide: bool, answers: set[str], foils: set[str]) -> list[Spans]:
    """Top-k next tokens at a position for clean, corrupted and now, side by side; `other` is the prompt that is read elsewhere (-1: nowhere)."""
    sides: list[tuple[str, Side]] = [("clean", result.clean)]
    if result.corrupt is not None:
        sides.append(("corrupted", result.corrupt))
    if result.now is not result.clean and not same(result.now, result.clean):
        sides.append(("now", result.now))
    w = 17 if wide else 12
    lines: list[Spans] = [[("   ", DIM), *((set_width(name, w + 8), HEAD) for name, _ in sides)]]
    for n in range(k):
        spans: Spans = [(f"{n:2} ", DIM)]
        for name, side in sides:
            at = other[1] if name == other[0] else pos
            if not 0 <= at < len(side.tokens.ids) or n >= side.top_ids.shape[1]:
                spans.append((" " * (w + 8), PLAIN))
                continue
            if side.top_ids[at, n] < 0:  # not yet read
                spans.append((set_width("…", w + 8), DIM))
                continue
            text = result.texts[int(side.top_ids[at, n])]
            style = GOOD if text in answers else BAD if text in foils else PLAIN
            spans += [(show_token(text, w), style), (f" {float(side.top_probs[at, n]):.4f} ", PLAIN)]
        lines.append(spans)
    return lines


def same(a: Side, b: Side) -> bool:
    return a.tokens == b.tokens and np.array_equal(a.top_ids, b.top_ids) and np.array_equal(a.top_probs, b.top_probs)


def set_width(text: str, width: int) -> str:
    return text[:width].ljust(width)


# ------------------------------------------------------------------ the top of the screen


def model_line(info: ModelInfo | None, name: str, busy: str, memory: tuple[int, int, int]) -> Spans:
    if info is None:
        return [(" loupe ", HEAD), (f" {visible(name)} ", BOLD), (f" {busy}", WARN)]
    broken = [c.name for c in info.checks if c.ok is False]
    heads = f"{info.n_heads}H" + (f"/{info.n_kv_heads}KV" if info.n_kv_heads != info.n_heads else "")
    text = f" {info.architecture} {info.n_layers}L×{heads} d{info.d_model} {show_count(info.n_params)} · {info.dtype} on {info.device}"
    process, device, cache = memory
    text += f" · {show_bytes(process)}" if process else ""
    text += f" · GPU {show_bytes(device)}" if device else ""
    text += f" · cache {show_bytes(cache)}" if cache else ""
    return [
        (" loupe ", HEAD),
        (f" {visible(name)}", BOLD),
        *([(f" {info.warning} ·", WARN)] if info.warning else []),
        (text, DIM),
        *([(f"  ✗ self-check: {', '.join(broken)} (D)", BAD)] if broken else []),
    ]


def metric_line(result: RunResult | None, kind: str, pos: str, base: str, stale: bool, width: int) -> Spans:
    spans: Spans = [(f" {kind}@{pos}", BOLD)]
    if result is None:
        return [*spans, ("  clean —  corrupted —  now —", DIM), (f"  base {base}", DIM)]
    corrupt = result.corrupt.metric if result.corrupt else None
    spans += [("  clean ", DIM), (signed(result.clean.metric), PLAIN), ("  corrupted ", DIM), (signed(corrupt), PLAIN)]
    spans += [("  now ", DIM), ("…" if stale else signed(result.now.metric), BOLD)]
    if result.normalised is not None and not stale:
        spans += [("  normalised ", DIM), (f"{result.normalised:.3f}", BOLD), (" (corrupted 0, clean 1)" if width >= 110 else "", DIM)]
    spans += [(f"  base {base}", DIM)]
    return [*spans, (f"  {result.warning}", WARN)] if result.warning else spans


def token_line(
    name: str, row: TokenRow | None, pos: int, width: int, other: TokenRow | None, ids: bool, colour: bool, text: str = "", heat: np.ndarray | None = None
) -> Spans:
    """
    A prompt as tokens: the cursor's marked, those that differ from the other prompt coloured, or all coloured by `heat` (underlined where there is no
    colour); a page of them when they do not fit.
    """
    spans: Spans = [(f" {name:9} ", DIM)]
    if row is None:
        return [*spans, (visible(text)[: width - 12], DIM)]
    shown = [f"{show_token(t)}{f':{i}' if ids else ''}" for t, i in zip(texts_of(row), row.ids)]
    room, page, used, pages = max(width - 16, 8), 0, 0, [0]
    for n, t in enumerate(shown):
        size = cell_len(t)
        if used + size > room and n > pages[-1]:
            pages.append(n)
            used = 0
        used += size
    page = max(n for n, p in enumerate(pages) if p <= max(0, min(pos, len(shown) - 1)))
    first, last = pages[page], pages[page + 1] if page + 1 < len(pages) else len(shown)
    while last == len(shown) and first > 0 and sum(cell_len(t) for t in shown[first - 1 :]) <= room:
        first -= 1  # the last page is filled from the right
    spans.append(("‹" if first else " ", DIM))
    for n in range(first, last):
        differs = other is not None and (n >= len(other.ids) or other.ids[n] != row.ids[n])
        style = (CURSOR if colour else CURSOR_PLAIN) if n == pos else CHANGED if differs else DIM if n == 0 and row.bos else PLAIN
        if heat is not None and n != pos and n < len(heat) and abs(float(heat[n])) >= 0.05:
            style = on(heat_code(min(abs(float(heat[n])), 1.0), bool((heat < 0).any()))) if colour else UNDERLINE
        spans.append((shown[n], style))
    return [*spans, ("›" if last < len(shown) else "", DIM)]


def identity_rows(rows: tuple[Identity, ...]) -> list[Spans]:
    """The honesty panel: each identity with its error against its tolerance; red when broken."""
    lines: list[Spans] = []
    for r in rows:
        mark, style = ("✓", GOOD) if r.ok else ("·", DIM) if r.ok is None else ("✗", BAD)
        error = "not applicable" if r.ok is None else f"{r.error:.1e} ≤ {r.tolerance:.0e}" if r.ok else f"{r.error:.1e} > {r.tolerance:.0e}"
        lines.append(
            [
                (f" {mark} ", style),
                (f"{r.name:50}", style if r.ok is False else PLAIN),
                (f"{error:20}", style),
                (f" {visible(r.note)}", DIM),
            ]
        )
    return lines


def joined(parts: list[LensResult]) -> LensResult:
    """The rows that have come so far as one table."""
    arrays = {
        f.name: np.concatenate([getattr(p, f.name) for p in parts]) for f in dataclasses.fields(LensResult) if isinstance(getattr(parts[0], f.name), np.ndarray)
    }
    texts = {k: v for p in parts for k, v in p.texts.items()}
    return dataclasses.replace(parts[0], points=tuple(x for p in parts for x in p.points), texts=texts, **arrays)
