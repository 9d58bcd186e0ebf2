"""The lines around the panes: model, metric, prompts, interventions at the top; the hint line at the bottom."""

import textwrap
from pathlib import Path

from techniques.output.requests import RunResult
from vocabulary.prompts import TokenRow
from vocabulary.requests import ModelInfo
from screen.keys import hints
from screen.overlays import Overlay
from screen.pane import Host, whole_parts
from screen.pictures import RUN_NAMES, signed, texts_of
from utils import model_name, show_bytes, show_count, show_token, visible, width_of
from widgets import BAD, BOLD, CHANGED, CURSOR, CURSOR_PLAIN, DIM, HEAD, PLAIN, WARN, Spans


def top_lines(app: Host) -> list[Spans]:
    """Model, metric, clean prompt, corrupted prompt, state."""
    s, run, requests = app.state, app.requests.result("run", RunResult), app.requests
    w, pos, colour = app.size.width, app.cursor.pos, s.views["mode"] != "shade"
    metric = metric_line(
        run, s.metric.words if s.metric.own else f"{s.metric.kind}@{s.metric.pos}", RUN_NAMES[s.base], requests.fresh("run", RunResult) is None, w
    )
    if s.prompt.answers and not app.study.prompt.answers:
        metric = [(f" {s.metric.kind} —  an answer or foil is not one token in this model: t edits them", WARN)]
    if error := requests.error("run"):
        metric = [(f" {visible(error)}", BAD)]
    ids = s.views["ids"] == "on"
    clean, corrupt = (run.clean.tokens, run.corrupt.tokens if run.corrupt else None) if run else (None, None)
    other = s.prompt.corrupt or "none: E types one, o opens a prompt set"
    return [
        model_line(app.info, s.model.model, app.busy, app.memory, w),
        metric,
        token_line("clean", clean, pos, w, None, ids, colour, s.prompt.clean),
        token_line("corrupted", corrupt, pos, w, clean, ids, colour, other),
        state_line(app, clean),
    ]


def state_line(app: Host, clean: TokenRow | None) -> Spans:
    """Interventions, the prompt set, answers and foils, the alignment, the position."""
    s, pos = app.state, app.cursor.pos
    label = [k for k, v in (clean.labels if clean else {}).items() if v == pos]
    line: Spans = [(" changes   ", DIM), ("off " if not s.enabled and s.interventions else "", WARN)]
    line += [(" ".join(str(i) for i in s.interventions) or "no interventions", (BOLD if s.enabled else DIM) if s.interventions else DIM)]
    if s.set_path:
        name, edited = Path(s.set_path).stem, s.prompt != s.prompt_set[s.index]
        place = f"  set {name} {s.index + 1}/{len(s.prompt_set)}{' (edited)' if edited else ''}"
        line.append((place if s.members else f"  typed: not of the set {name}", WARN if edited else DIM))
    answers, foils = (" ".join(show_token(a) for a in some[:3]) or "—" for some in (s.prompt.answers, s.prompt.foils))
    line.append((f"  answer {answers} foil {foils}", DIM))
    if app.info and clean and s.prompt.bos is None and not clean.bos:
        line.append((f"  {app.info.bos_habit.partition(':')[0]}", DIM))
    elif s.prompt.bos is not None and clean:
        line.append(("  BOS asked for" if s.prompt.bos else "  no BOS asked for", WARN))
    if s.align or s.prompt.alignment:
        line.append((f"  aligned {'by hand' if s.prompt.alignment else f'by {s.align}'}", WARN))
    return [*line, (f"  @{pos}{' ' + ' '.join(label) if label else ''}" if clean else "", DIM)]


def useful_keys(app: Host) -> list[tuple[str, str]]:
    """(key, what it does), the most useful first: how to leave what was drilled into or zoomed, what stops a job, then the pane's own keys."""
    some, s = list(app.panes[app.pane].doing(app)), app.state
    some += [("_", "all panes")] if app.zoomed else []
    some += [("ctrl+c", "stop"), ("J", "jobs")] if any(j.progress.total > 1 for j in app.client.jobs.values()) else []
    some += [("x", "interventions on")] if s.interventions and not s.enabled else []
    known, idle = {key for key, _ in some}, (*(() if s.interventions else ("enable",)), *(() if app.session.past else ("undo",)))
    return some + [h for h in hints(app.table, app.panes[app.pane], app.panes.values(), idle) if h[0] not in known]


def hint_line(app: Host) -> Spans:
    """The keys that matter now, as many as fit whole: those of the list that is open, else the node that actions act on and `useful_keys`."""
    lists = [o for o in app.query(Overlay) if not o.closing]
    line: Spans = [(" ", BOLD)] if lists else [(f" {app.node()!s:18}" if app.info else " ", BOLD), (" ?", BOLD), (" help ", DIM)]
    for key, title in lists[-1].hints() if lists else useful_keys(app):
        if sum(width_of(text) for text, _ in line) + width_of(key + title) + 3 > app.size.width:
            break
        line += [(f" {key}", BOLD), (f" {title} ", DIM)]
    return line


def draw_hint(app: Host) -> None:
    """The status line, wrapped over the width there is, and the hint line below it."""
    text, style = app.status[0] if app.status else ("", PLAIN)
    if trouble := app.session.trouble:
        text, style = f"{visible(trouble)} · {text.strip()}", BAD
    lines = textwrap.wrap(text.strip(), max(app.size.width - 2, 10))[: 3 if app.size.height >= 20 else 1] or [""]
    if len(lines) != app.said_lines:
        app.said_lines = len(lines)
        app.status_line.styles.height = len(lines)
        app.place()
    app.status_line.show([[(f" {line}", style)] for line in lines])
    app.hint_line.show([hint_line(app)])


def model_line(info: ModelInfo | None, name: str, busy: str, memory: tuple[int, int, int], width: int) -> Spans:
    if info is None:
        return [(" loupe     ", HEAD), (f"{model_name(name)} ", BOLD), (f" {busy}", WARN)]
    broken = [c.name for c in info.checks if c.ok is False]
    heads = f"{info.n_heads} heads" + (f" ({info.n_kv_heads} KV)" if info.n_kv_heads != info.n_heads else "")
    text = f"  {info.n_layers} layers × {heads} · d {info.d_model} · {show_count(info.n_params)} · {info.dtype} on {info.device} · {info.architecture}"
    process, device, cache = memory
    text += f" · {show_bytes(process)}" if process else ""
    text += f" · GPU {show_bytes(device)}" if device else ""
    text += f" · cache {show_bytes(cache)}" if cache else ""
    wrong = f"  ✗ self-check: {', '.join(broken)} (D)" if broken else ""
    line: Spans = [(" loupe     ", HEAD), (model_name(name), BOLD), *([(f" {info.warning} ·", WARN)] if info.warning else [])]
    room = width - sum(width_of(t) for t, _ in line) - width_of(wrong)
    return [*line, (whole_parts(text, room), DIM), (wrong, BAD)]


def metric_line(result: RunResult | None, metric: str, base: str, stale: bool, width: int) -> Spans:
    spans: Spans = [(" metric    ", DIM), (metric, BOLD)]
    if result is None:
        return [*spans, ("  clean —  corrupted —  now —", DIM), (f"  base {base}", DIM)]
    corrupt = result.corrupt.metric if result.corrupt else None
    spans += [("   clean ", DIM), (signed(result.clean.metric), PLAIN), ("   corrupted ", DIM), (signed(corrupt), PLAIN)]
    spans += [("   now ", DIM), ("…" if stale else signed(result.now.metric), BOLD)]
    if result.normalised is not None and not stale:
        spans += [("   normalised ", DIM), (f"{result.normalised:.3f}", BOLD), (" (corrupted 0, clean 1)" if width >= 132 else "", DIM)]
    if result.noise and not stale:
        spans.append((f"  ~ below the noise floor {result.floor:.2g}", WARN))
    spans += [(f"   base {base}", DIM)]
    return [*spans, (f"  {result.warning}", WARN)] if result.warning else spans


def token_line(name: str, row: TokenRow | None, pos: int, width: int, other: TokenRow | None, ids: bool, colour: bool, text: str = "") -> Spans:
    """A prompt as tokens: the cursor's marked, those that differ from the other prompt coloured; a page of them when they do not fit."""
    spans: Spans = [(f" {name:9} ", DIM)]
    if row is None:
        return [*spans, (visible(text[:width])[: width - 12], DIM)]
    shown = [f"{show_token(t)}{f':{i}' if ids else ''}" for t, i in zip(texts_of(row), row.ids)]
    room, page, used, pages = max(width - 16, 8), 0, 0, [0]
    for n, t in enumerate(shown):
        size = width_of(t)
        if used + size > room and n > pages[-1]:
            pages.append(n)
            used = 0
        used += size
    page = max(n for n, p in enumerate(pages) if p <= max(0, min(pos, len(shown) - 1)))
    first, last = pages[page], pages[page + 1] if page + 1 < len(pages) else len(shown)
    while last == len(shown) and first > 0 and sum(width_of(t) for t in shown[first - 1 :]) <= room:
        first -= 1  # the last page is filled from the right
    spans.append(("‹" if first else " ", DIM))
    for n in range(first, last):
        differs = other is not None and (n >= len(other.ids) or other.ids[n] != row.ids[n])
        style = (CURSOR if colour else CURSOR_PLAIN) if n == pos else CHANGED if differs else DIM if n == 0 and row.bos else PLAIN
        spans.append((shown[n], style))
    return [*spans, ("›" if last < len(shown) else "", DIM)]
