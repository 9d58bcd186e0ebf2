"""The lines around the panes: model, metric, prompts, interventions at the top; the hint line at the bottom."""

import textwrap
from pathlib import Path

from techniques.output.requests import RunResult
from vocabulary.chat import as_typed
from vocabulary.chosen import is_chosen, refusal
from vocabulary.prompts import TokenRow
from vocabulary.requests import ModelInfo
from screen.keys import hints
from screen.overlays import opened
from screen.pane import Host, whole_parts
from screen.pictures import Ranked, fitted, run_names, signed, texts_of
from screen.template import end_of, faded, folded
from screen.textview import fold_texts
from utils import fit, model_name, show_bytes, show_count, show_token, visible, width_of
from widgets import BAD, BOLD, CHANGED, CURSOR, CURSOR_PLAIN, DIM, HEAD, PLAIN, WARN, Spans

NO_CORRUPT = "no corrupted prompt"


def top_lines(app: Host) -> list[Spans]:
    """What is measured, the prompt with what differs in the other one, and what is done to it. In little room the first two."""
    run = app.requests.result("run", RunResult)
    return [metric_line(app, run), prompt_line(app, run), state_line(app, run)]


def metric_line(app: Host, run: RunResult | None) -> Spans:
    """The model, the metric now and of either prompt, and what is wrong with any of them."""
    s, info, stale, names = app.state, app.info, app.requests.fresh("run", RunResult) is None, run_names(app.state)
    parts: list[Ranked] = [(0, [(f" {model_name(s.model.model)}{info.scaled if info else ''} ", HEAD)])]
    if info is None:
        return fitted([(0, [(" loupe ", HEAD)]), *parts, (0, [(f" {visible(app.busy)}", WARN)]), (1, line_state(app))], app.size.width)
    if error := app.requests.error("run"):
        return [*parts[0][1], *failed(info), (f"  {visible(error)}", BAD)]
    parts += [(0, failed(info)), (1, line_state(app))]
    if s.prompt.answers and not app.study.prompt.answers:
        return [*parts[0][1], *failed(info), (f"  {s.metric.kind}: an answer or foil is not one token in this model: t edits them", WARN)]
    if not is_chosen(s.metric):
        return [*parts[0][1], *failed(info), (f"  {visible(refusal(s.metric))}", WARN)]
    gap = "   " if app.size.width >= 100 else "  "
    parts.append((0, [(f"{gap[1:]}{s.metric.short}", BOLD)]))
    if isinstance(s.prompt.clean, tuple) and s.metric.pos == "END" and not s.metric.own:
        parts.append((9, [(f" ({end_of(s.prompt)})", DIM)]))
    clean, corrupt, now = (None, None, None) if run is None else (run.clean.metric, run.corrupt.metric if run.corrupt else None, run.now.metric)
    parts += [(n, [(f"{gap}{name} ", DIM), (signed(x), PLAIN)]) for n, name, x in ((1, names["clean"], clean), (2, names["corrupt"], corrupt))]
    parts.append((0, [(f"{gap}now ", DIM), ("…" if stale else signed(now), BOLD)]))
    if run is not None and not stale:
        if run.normalised is not None:
            name = "normalised" if app.size.width >= 100 else "norm"
            parts += [(4, [(f"{gap}{name} ", DIM), (f"{run.normalised:.3f}", BOLD)]), (8, [(f" ({names['corrupt']} 0, {names['clean']} 1)", DIM)])]
        parts.append((2, [(f"   ~ below the noise floor {run.floor:.2g}", WARN)] if run.noise else []))
    parts.append((2 if s.base == "corrupt" else 7, [(f"{gap}base {names[s.base]}", WARN if s.base == "corrupt" else DIM)]))
    return fitted(parts, app.size.width)


def prompt_line(app: Host, run: RunResult | None) -> Spans:
    """The tokens of the shown run; where the other prompt's differ, those too while all fit, else only coloured."""
    s, shown, colour = app.state, app.tokens, app.state.views["mode"] != "shade"
    if run is None or shown is None:
        return [(f" {visible(as_typed(s.prompt.clean)[: app.size.width])[: app.size.width - 2]}", DIM)]
    rows = [run.clean.tokens, *([run.corrupt.tokens] if run.corrupt else [])]
    other = next((r for r in reversed(rows) if r.ids != shown.tokens.ids), None)
    kept, beside = runs_alike(app, shown.tokens, other)
    ids, width, differ = s.views["ids"] == "on", app.size.width, frozenset(range(len(shown.tokens.ids))) - kept
    fold = {"faded": faded(s, shown.tokens), "folded": folded(s, shown.tokens)}
    line = token_line("", shown.tokens, app.cursor.pos, width, differ, ids, colour, beside, **fold)
    if beside and sum(width_of(text) for text, _ in line) > width:
        line = token_line("", shown.tokens, app.cursor.pos, width, differ, ids, colour, **fold)
    left = width - sum(width_of(text) for text, _ in line)
    none = next((text for text in (f"   {NO_CORRUPT}: E types one, o opens a set", "   no corrupted: E", "") if width_of(text) <= left), "")
    return fitted([(0, line), (1, [] if run.corrupt else [(none, DIM)])], width)


def runs_alike(app: Host, shown: TokenRow, other: TokenRow | None) -> tuple[frozenset[int], dict[int, str]]:
    """Positions whose token is the other prompt's too; and after which position what stands there instead: ⁄·Alice."""
    if other is None:
        return frozenset(range(len(shown.ids))), {}
    check = app.requests.check()
    pairs = check.alignment if check is not None and check.alignment else tuple((n, n) for n in range(min(len(shown.ids), len(other.ids))))
    if check is not None and check.alignment and check.clean.ids != shown.ids:
        pairs = tuple((b, a) for a, b in pairs)
    pairs = sorted((a, b) for a, b in pairs if a < len(shown.ids) and b < len(other.ids) and shown.ids[a] == other.ids[b])
    beside, texts, last = {}, texts_of(other), (-1, -1)
    for a, b in (*pairs, (len(shown.ids), len(other.ids))):
        if b > last[1] + 1 or a > last[0] + 1:
            beside[a - 1] = "".join(show_token(x) for x in texts[last[1] + 1 : b]) or "∅"
        last = (a, b)
    return frozenset(a for a, _ in pairs), beside


def state_line(app: Host, run: RunResult | None) -> Spans:
    """Interventions, answers and foils, the prompt set, the position; then what the model is."""
    s, pos, on = app.state, app.cursor.pos, app.state.enabled
    done = " ".join(str(i) for i in s.interventions)
    off = [("off ", WARN)] if done and not on else []
    warnings = [text for text in (app.info.warning if app.info else "", run.warning if run is not None else "") if text]
    warnings = [text for text in warnings if not text.startswith(NO_CORRUPT)]  # the line above says it
    parts: list[Ranked] = [(0 if done else 1, [(" ", PLAIN), *off, (done or "no interventions", (BOLD if on else DIM) if done else DIM)])]
    if done and width_of(done) > app.size.width // 2:
        parts[0] = (0, [(" ", PLAIN), *off, (f"{s.interventions[0]} and {len(s.interventions) - 1} more", BOLD if on else DIM)])
    if run is not None:
        shown = app.tokens.tokens if app.tokens else run.clean.tokens
        label = "".join(f" {k}" for k, v in run.clean.tokens.labels.items() if v == pos)
        here = show_token(texts_of(shown)[pos], 10) if pos < len(shown.ids) else ""
        parts.append((0, [("   ", PLAIN), (fit(f"@{pos}{label} {here}", 18), PLAIN)]))  # what follows keeps its place as the cursor moves
    parts.append((0, [(f"   {visible(' · '.join(warnings))}", WARN)] if warnings else []))
    answers, foils = answer_words(app)
    if s.model.against:
        parts.append((2, [(f"   {visible(app.info.beside.replace(': ', ' · '))}" if app.info else "", PLAIN)]))
    if isinstance(s.prompt.clean, tuple):
        gone = len(folded(s, run.clean.tokens)) if run else 0
        parts.append((3, [("   chat", DIM), (f", {gone} folded (\\)" if gone else "", WARN)]))
    parts.append((3, [("   answer ", DIM), (answers, PLAIN), (" foil ", DIM), (foils, PLAIN)]))
    if s.set_path:
        name, edited = Path(s.set_path).stem, s.prompt != s.prompt_set[s.index]
        place = f"   set {name} {s.index + 1}/{len(s.prompt_set)}{' (edited)' if edited else ''}"
        parts.append((2 if edited else 4, [(place if s.members else f"   typed: not of the set {name}", WARN if edited else DIM)]))
    if not isinstance(s.prompt.clean, tuple) and app.info and run is not None and s.prompt.bos is None and not run.clean.tokens.bos:
        parts.append((5, [(f"   {app.info.bos_habit.partition(':')[0]}", DIM)]))
    elif s.prompt.bos is not None and run is not None:
        parts.append((2, [("   BOS asked for" if s.prompt.bos else "   no BOS asked for", WARN)]))
    if s.align or s.prompt.alignment:
        parts.append((2, [(f"   aligned {'by hand' if s.prompt.alignment else f'by {s.align}'}", WARN)]))
    line = fitted(parts, app.size.width)
    return [*line, (about_model(app.info, app.memory, app.size.width - sum(width_of(text) for text, _ in line)), DIM)]


def about_model(info: ModelInfo | None, memory: tuple[int, int, int], room: int) -> str:
    """What the model is, and the memory that the engine takes: as many parts as fit whole."""
    if info is None:
        return ""
    heads = f"{info.n_heads} heads" + (f" ({info.n_kv_heads} KV)" if info.n_kv_heads != info.n_heads else "")
    facts = [f"{info.n_layers} layers × {heads}", f"{show_count(info.n_params)}", f"{info.dtype} on {info.device}", info.architecture, f"d {info.d_model}"]
    facts += [f"{name} {show_bytes(n)}" for name, n in zip(("engine", "GPU", "cache"), memory) if n]
    text = whole_parts(" · ".join(facts), room - 3)
    return f"   {text}" if width_of(text) + 3 <= room else ""


def line_state(app: Host) -> Spans:
    """What is to be said of the line to the engine, when it is slow or silent."""
    return [(f"  {app.client.line.said}", WARN)] if app.client.line.said else []


def failed(info: ModelInfo) -> Spans:
    """Which of the model's own checks failed."""
    broken = [c.name for c in info.checks if c.ok is False]
    more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
    return [(f"  ✗ self-check: {broken[0]}{more} (D)", BAD)] if broken else []


def answer_words(app: Host) -> tuple[str, str]:
    """Answers and foils, the first three of each; of one of several tokens its first, as such."""
    prompt, check = app.state.prompt, app.requests.check()
    rows = {} if check is None else dict(zip((*prompt.answers, *prompt.foils), (*check.answers, *check.foils)))

    def word(text: str) -> str:
        row = rows.get(text)
        if row is None or len(row.ids) < 2 or app.state.metric.kind == "logprob_sum":
            return show_token(text)
        return f"{show_token(row.texts[0])}… (1 of {len(row.ids)})"

    return tuple(" ".join(map(word, some[:3])) + " …" * (len(some) > 3) or "—" for some in (prompt.answers, prompt.foils))


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
    lists = opened(app)
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
    width, room = max(app.size.width - 2, 10), 4 if app.size.height >= 24 else 3 if app.size.height >= 20 else 1
    lines = textwrap.wrap(text.strip(), width, max_lines=room, placeholder=" …") or [""]
    if len(lines) != app.said_lines:
        app.said_lines = len(lines)
        app.status_line.styles.height = len(lines)
        app.place()
    app.status_line.show([[(f" {line}", style)] for line in lines])
    app.hint_line.show([hint_line(app)])


def token_line(name: str, row: TokenRow, pos: int, width: int, differ: frozenset[int], ids: bool, colour: bool, beside: dict[int, str] | None = None,
    faded: frozenset[int] = frozenset(), folded: frozenset[int] = frozenset(),
) -> Spans:  # fmt: skip
    """
    A prompt as tokens: the cursor's marked, those at `differ` coloured, behind them what `beside` says; without it a page of them when they do not fit. The
    `faded` are dim, of the `folded` their number is left.
    """
    spans: Spans = [(f" {name:9} " if name else "", DIM)]
    shown = fold_texts([f"{show_token(t)}{f':{i}' if ids else ''}" for t, i in zip(texts_of(row), row.ids)], folded)
    room, page, used, pages = max(width - (16 if name else 3), 8), 0, 0, [0]
    for n, t in enumerate(shown if beside is None else ()):
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
        dim = n == 0 and row.bos or n in faded
        style = (CURSOR if colour else CURSOR_PLAIN) if n == pos else CHANGED if n in differ and n not in folded else DIM if dim else PLAIN
        spans.append((shown[n], style))
        if beside and n in beside:
            spans.append((f"⁄{beside[n]}", DIM))
    return [*spans, ("›" if last < len(shown) else "", DIM)]
