"""The lines around the panes: model, metric, prompts, interventions at the top; the hint line at the bottom."""

import textwrap
from pathlib import Path

from techniques.output.requests import RunResult
from vocabulary.chat import as_typed
from vocabulary.prompts import TokenRow
from vocabulary.requests import ModelInfo
from screen.keys import hints
from screen.overlays import Overlay
from screen.pane import Host, whole_parts
from screen.pictures import run_names, signed, texts_of
from screen.template import end_of, faded, folded
from screen.textview import fold_texts
from utils import model_name, show_bytes, show_count, show_token, visible, width_of
from widgets import BAD, BOLD, CHANGED, CURSOR, CURSOR_PLAIN, DIM, HEAD, PLAIN, WARN, Spans


def top_lines(app: Host) -> list[Spans]:
    """Model, metric, clean prompt, corrupted prompt, state."""
    s, run, requests = app.state, app.requests.result("run", RunResult), app.requests
    w, pos, colour = app.size.width, app.cursor.pos, s.views["mode"] != "shade"
    names = run_names(s)
    metric = metric_line(run, s.metric.kind, str(s.metric.pos), names[s.base], requests.fresh("run", RunResult) is None, w, (names["clean"], names["corrupt"]))
    if s.prompt.answers and not app.study.prompt.answers:
        metric = [(f" {s.metric.kind} —  an answer or foil is not one token in this model: t edits them", WARN)]
    if error := requests.error("run"):
        metric = [(f" {visible(error)}", BAD)]
    ids = s.views["ids"] == "on"
    clean, corrupt = (run.clean.tokens, run.corrupt.tokens if run.corrupt else None) if run else (None, None)
    other = as_typed(s.prompt.corrupt or "none: E types one, o opens a prompt set")
    fold = lambda row: {"faded": faded(s, row), "folded": folded(s, row)} if row else {}  # noqa: E731
    if isinstance(s.prompt.clean, tuple) and s.metric.pos == "END" and w >= 140 and len(metric) > 2:
        metric.insert(2, (f" ({end_of(s.prompt)})", DIM))
    return [
        model_line(app.info, s.model.model, app.busy, app.memory, w),
        metric,
        token_line("prompt" if s.model.against else "clean", clean, pos, w, None, ids, colour, as_typed(s.prompt.clean), **fold(clean)),
        beside_line(app, w) if s.model.against else token_line("corrupted", corrupt, pos, w, clean, ids, colour, other, **fold(corrupt)),
        state_line(app, clean),
    ]


def beside_line(app: Host, width: int) -> Spans:
    """The second model, in the place of the corrupted prompt."""
    said = app.info.beside if app.info is not None else f"{app.state.model.against}, not loaded"
    return [(" against   ", DIM), (" " + visible(whole_parts(said.replace(": ", " · "), width - 12)), PLAIN)]


def state_line(app: Host, clean: TokenRow | None) -> Spans:
    """Interventions, the prompt set, answers and foils, the alignment, the position."""
    s, pos = app.state, app.cursor.pos
    label = [k for k, v in (clean.labels if clean else {}).items() if v == pos]
    line: Spans = [(" changes   ", DIM), ("off " if not s.enabled and s.interventions else "", WARN)]
    line += [(" ".join(str(i) for i in s.interventions) or "no interventions", (BOLD if s.enabled else DIM) if s.interventions else DIM)]
    if isinstance(s.prompt.clean, tuple):
        gone = len(folded(s, clean)) if clean else 0
        line += [("  chat", DIM), (f", {gone} folded (\\)" if gone else "", WARN)]
    if s.set_path:
        name, edited = Path(s.set_path).stem, s.prompt != s.prompt_set[s.index]
        place = f"  set {name} {s.index + 1}/{len(s.prompt_set)}{' (edited)' if edited else ''}"
        line.append((place if s.members else f"  typed: not of the set {name}", WARN if edited else DIM))
    answers, foils = answer_words(app)
    line.append((f"  answer {answers} foil {foils}", DIM))
    if not isinstance(s.prompt.clean, tuple) and app.info and clean and s.prompt.bos is None and not clean.bos:
        line.append((f"  {app.info.bos_habit.partition(':')[0]}", DIM))
    elif s.prompt.bos is not None and clean:
        line.append(("  BOS asked for" if s.prompt.bos else "  no BOS asked for", WARN))
    if s.align or s.prompt.alignment:
        line.append((f"  aligned {'by hand' if s.prompt.alignment else f'by {s.align}'}", WARN))
    return [*line, (f"  @{pos}{' ' + ' '.join(label) if label else ''}" if clean else "", DIM)]


def answer_words(app: Host) -> tuple[str, str]:
    """Answers and foils, the first three of each; of one of several tokens its first, as such."""
    prompt, check = app.state.prompt, app.requests.check()
    rows = {} if check is None else dict(zip((*prompt.answers, *prompt.foils), (*check.answers, *check.foils)))

    def word(text: str) -> str:
        row = rows.get(text)
        if row is None or len(row.ids) < 2 or app.state.metric.kind == "logprob_sum":
            return show_token(text)
        return f"{show_token(row.texts[0])}… (1 of {len(row.ids)})"

    return tuple(" ".join(map(word, some[:3])) or "—" for some in (prompt.answers, prompt.foils))


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
    line: Spans = [(" loupe     ", HEAD), (model_name(name), BOLD), (info.scaled, BOLD), *([(f" {info.warning} ·", WARN)] if info.warning else [])]
    room = width - sum(width_of(t) for t, _ in line) - width_of(wrong)
    return [*line, (whole_parts(text, room), DIM), (wrong, BAD)]


def metric_line(result: RunResult | None, kind: str, pos: str, base: str, stale: bool, width: int, names: tuple[str, str] = ("clean", "corrupted")) -> Spans:
    a, b = names
    spans: Spans = [(" metric    ", DIM), (f"{kind}@{pos}", BOLD)]
    if result is None:
        return [*spans, (f"  {a} —  {b} —  now —", DIM), (f"  base {base}", DIM)]
    corrupt = result.corrupt.metric if result.corrupt else None
    spans += [(f"   {a} ", DIM), (signed(result.clean.metric), PLAIN), (f"   {b} ", DIM), (signed(corrupt), PLAIN)]
    spans += [("   now ", DIM), ("…" if stale else signed(result.now.metric), BOLD)]
    if result.normalised is not None and not stale:
        spans += [("   normalised ", DIM), (f"{result.normalised:.3f}", BOLD), (f" ({b} 0, {a} 1)" if width >= 132 else "", DIM)]
    if result.noise and not stale:
        spans.append((f"  ~ below the noise floor {result.floor:.2g}", WARN))
    spans += [(f"   base {base}", DIM)]
    return [*spans, (f"  {result.warning}", WARN)] if result.warning else spans


def token_line(name: str, row: TokenRow | None, pos: int, width: int, other: TokenRow | None, ids: bool, colour: bool, text: str = "",
    faded: frozenset[int] = frozenset(), folded: frozenset[int] = frozenset(),
) -> Spans:  # fmt: skip
    """
    A prompt as tokens: the cursor's marked, those that differ from the other prompt coloured, the `faded` dim, of the `folded` their number; a page of them when
    they do not fit.
    """
    spans: Spans = [(f" {name:9} ", DIM)]
    if row is None:
        return [*spans, (visible(text[:width])[: width - 12], DIM)]
    shown = fold_texts([f"{show_token(t)}{f':{i}' if ids else ''}" for t, i in zip(texts_of(row), row.ids)], folded)
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
        style = (
            (CURSOR if colour else CURSOR_PLAIN) if n == pos else CHANGED if differs and n not in folded else DIM if n == 0 and row.bos or n in faded else PLAIN
        )
        spans.append((shown[n], style))
    return [*spans, ("›" if last < len(shown) else "", DIM)]
