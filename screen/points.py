"""
The log in words (`:history`): every point of the session with what was done, computed and noted there; going to one, comparing two. And the notes.
Each function takes the app; points are the steps of screen/record.py.
"""

import textwrap
from dataclasses import fields, is_dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np

from techniques.output.requests import Run
from vocabulary.chat import as_typed
from vocabulary.nodes import UserError
from vocabulary.results import Result
from screen import history
from screen.actions import accepted
from screen.jobs import ends_jobs
from screen.overlays import Editor, Panel
from screen.pane import Host, Pane
from screen.record import Step
from screen.session import State
from utils import fit, printable
from widgets import BAD, BOLD, DIM, GOOD, HEAD, PLAIN, WARN, Spans

DONE = {
    "zero": "ablated",
    "mean": "mean-ablated",
    "mean_all": "mean-ablated",
    "resample": "resampled",
    "noise": "noised",
    "patch": "patched",
    "scale": "scaled",
}
DONE |= {"freeze": "froze", "set": "set", "add": "added to", "steer": "steered", "mean_text": "mean-ablated", "mean_text_pos": "mean-ablated"}
LONGEST = 500  # characters of a note
ALWAYS = ("model", "prompt", "corrupted", "answer", "metric", "base", "interventions")  # what two points are shown with also where it is alike

# ------------------------------------------------------------------ points in words


def points(app: Host) -> list[Step]:
    """The start, then every step but those that only changed a view."""
    start = app.session.start
    views = lambda s: s.name == history.VIEW or s.args.get("of") == history.VIEW  # noqa: E731
    return [Step("", "start", {}, start, start), *(s for s in app.session.record.steps if not views(s))]


def ran_on(app: Host, state: State) -> str:
    """The name under which results of a state's model are kept."""
    if app.info is not None and app.requests.model == state.model:
        return app.info.key
    return next((r.on for r in reversed([*app.session.record.results.values()]) if r.load == state.model), "")


def metric(app: Host, state: State) -> float | None:
    """The metric that was seen in a state; None where nothing was computed there."""
    return app.session.record.metric(ran_on(app, state), Run(state.study))


def words(app: Host, step: Step) -> str:
    """What was done in a step, and what it did to the metric."""
    if step.name == "note":
        number = step.args.get("number") or ("" if (m := metric(app, step.after)) is None else f"{step.after.metric.name} {m:.4f}")
        about = " · ".join(str(x) for x in (step.args.get("node"), number) if x)
        return f"! {step.args.get('text', '')}" + (f"  ({about})" if about else "")
    if step.name == "result":
        return f"computed {step.args['says']}"
    text = deed(step)
    before, after, kind = metric(app, step.before), metric(app, step.after), step.after.metric.name
    if step.name == "start" or after is None or before == after:
        return text + (f" → {kind} {after:.3f}" if step.name == "start" and after is not None else "")
    return f"{text} → {kind} {after:.3f}" if before is None or step.before.metric != step.after.metric else f"{text} → {kind} {before:.3f} → {after:.3f}"


def deed(step: Step) -> str:
    new = [i for i in step.after.interventions if i not in step.before.interventions]
    match step.name:
        case "start":
            return f"began with {Path(step.after.model.model).name}"
        case "scattered":
            return (
                f"{'scattered into' if step.args.get('how') else 'watches'} {step.args.get('folder', '')}"
                if step.args.get("how") is not None
                else "forgot a scattered job"
            )
        case "name":
            return f"called it {step.args.get('text', '')}"
        case "undo" | "redo":
            changed = [f"{name} {a or 'none'} → {b or 'none'}" for name, a, b in different(step.before, step.after)]
            return f"{'undid' if step.name == 'undo' else 'did again'}: {'; '.join(changed) or 'a view'}"
        case "intervene" if new:
            return " ".join(f"{DONE.get(i.op, i.op)} {i.node}" + ("" if i.value is None else f" ({i.value:g}{' × ' * bool(i.source)}{i.source})") for i in new)
        case "jump":
            return "went to another point"
    return history.words(step.name, step.before, step.after)


def described(state: State) -> dict[str, str]:
    """What a state says, by the words that it is compared in."""
    p, current = state.prompt, state.current
    return {
        "model": Path(state.model.model).name,
        "prompt": as_typed(p.clean),
        "corrupted": as_typed(p.corrupt or ""),
        "answer": " / ".join(" ".join(x.replace(" ", "·") for x in some) for some in (p.answers, p.foils) if some),
        "BOS": "" if p.bos is None else "on" if p.bos else "off",
        "set": Path(state.set_path).stem if state.prompt_set else "",
        "metric": state.metric.short,
        "base": state.base,
        "interventions": (" ".join(map(str, state.interventions)) + ("" if state.enabled else " (off)")) if state.interventions else "",
        "alignment": state.align,
        "text of means": state.text.words if state.text.path else "",
        "continuation": f"{state.generation.tokens} tokens, {state.generation.words}, held {state.generation.held}",
        "SAEs": " ".join(state.saes),
        "lens": f"{state.lens} {state.artefact}".strip(),
        "receivers": " ".join(state.receivers),
        "senders": " ".join(state.senders),
        "circuit": f"{current.name}: {' '.join((*current.nodes, *current.edges))}" if current else "",
    }


def different(a: State, b: State) -> list[tuple[str, str, str]]:
    one, other = described(a), described(b)
    return [(name, one[name], other[name]) for name in one if one[name] != other[name]]


# ------------------------------------------------------------------ the list


def show(app: Host) -> None:
    """The list of points: enter goes to one, m marks one, c compares it with the marked one (else with where one stands)."""
    all_points, marked = points(app), [None]

    def rows() -> list[Spans]:
        styles = {"note": GOOD, "result": DIM}
        line = lambda n, s: [(f" {'▸' if marked[0] == n else ' '}{s.time[11:16]:6}", DIM), (printable(words(app, s)), styles.get(s.name, PLAIN))]  # noqa: E731
        return [line(n, s) for n, s in enumerate(all_points)]

    def mark(at: int) -> None:
        marked[0] = None if marked[0] == at else at
        panel.replace(rows())

    def compare(at: int) -> None:
        here = Step("", "now", {}, app.state, app.state)
        one, other = (all_points[marked[0]], all_points[at]) if marked[0] not in (None, at) else (all_points[at], here)
        app.guard(lambda: app.open(Panel("two points", comparison(app, one, other), "what differs is bright")))

    def go(at: int) -> None:
        panel.action_close()
        app.guard(lambda: jump(app, all_points[at]))

    keys = {"enter": go, "m": mark, "c": compare}
    panel = Panel(
        f"history, {len(all_points)} point{'s' * (len(all_points) > 1)}",
        rows(),
        "⏎ goes there · m marks one · c compares with the marked one, or with now",
        True,
        keys,
    )
    panel.at = len(all_points) - 1
    app.open(panel)


def jump(app: Host, point: Step) -> None:
    """Go to a point: an action like others, which u takes back. The views stay."""
    state, before = point.after, app.state
    if replace(state, views={}) == replace(before, views={}):
        raise UserError("this is where you stand: choose another point")

    def go() -> None:
        app.act("jump", to=replace(state, prompt_set=()), prompts=list(state.prompt_set))
        app.say(f"at {point.time[11:19] or 'the start'}: {'; '.join(f'{n} {b or "none"}' for n, _, b in different(before, state)) or 'as it was'}; u goes back")

    ends_jobs(app, "a point with another model", go) if state.model != before.model else go()


# ------------------------------------------------------------------ two points


def comparison(app: Host, a: Step, b: Step) -> list[Spans]:
    """Two points side by side: what they say, their metrics, and what differs in the visible panes."""
    one, other = described(a.after), described(b.after)
    shown = lambda state: "not computed there" if (m := metric(app, state)) is None else f"{state.metric.name} {m:.4f}"  # noqa: E731
    table = [("", clock(a), clock(b)), *((n, one[n], other[n]) for n in one if one[n] != other[n] or n in ALWAYS and one[n])]
    table.append(("value", shown(a.after), shown(b.after)))
    wide = max(12, (app.size.width - 18) // 2)
    out: list[Spans] = []
    for name, left, right in table:
        style = HEAD if not name else DIM if left == right else BOLD
        pairs = zip_longest(textwrap.wrap(printable(left), wide) or ["none"], textwrap.wrap(printable(right), wide) or ["none"], fillvalue="")
        out += [[(f" {name if n == 0 else '':14} ", DIM), (fit(x, wide + 1), style), (y, style)] for n, (x, y) in enumerate(pairs)]
    out.append([])
    for key in app.visible_panes():
        out += in_pane(app, app.panes[key], a.after, b.after)
    return out


def clock(point: Step) -> str:
    return "now" if point.name == "now" else point.time[11:19] or "the start"


def wanted(app: Host, pane: Pane, state: State) -> dict[str, object]:
    """What a pane would ask for in a state."""
    session, now = app.session, app.state
    session.state = state
    try:
        return pane.wants(app)
    except UserError:
        return {}
    finally:
        session.state = now


def in_pane(app: Host, pane: Pane, a: State, b: State) -> list[Spans]:
    """What a visible pane shows in two states, in a line each of what it asks for."""
    mine, theirs = wanted(app, pane, a), wanted(app, pane, b)
    out: list[Spans] = []
    for slot in dict.fromkeys([*mine, *theirs]):
        requests = mine.get(slot), theirs.get(slot)
        found = [app.session.record.result(ran_on(app, s), r) if r is not None else None for s, r in zip((a, b), requests)]
        label = f" {pane.number} {pane.label}, {slot}: "
        if requests[0] == requests[1] and ran_on(app, a) == ran_on(app, b):
            text, style = "the same request", DIM
        elif None in found:
            text, style = f"not computed at {'both' if found == [None, None] else 'the first' if found[0] is None else 'the second'}: go there to see it", WARN
        else:
            text, style = changed(app, requests, found), PLAIN
        out.append([(label, HEAD), (text, style)])
    return out


def changed(app: Host, requests: tuple, found: list[Result]) -> str:
    """The largest difference of two results: from all their cells while these are at hand, else from what the session keeps."""
    whole = [app.requests.answers.get(r) if app.info is not None and f.on == app.info.key else None for r, f in zip(requests, found)]
    if None not in whole:
        arrays = [dict(arrays_of(reply.result)) for reply in whole]
        best = None
        for name in (n for n in arrays[0] if n in arrays[1] and arrays[0][n].shape == arrays[1][n].shape):
            apart = np.nan_to_num(np.abs(arrays[0][name].astype(float) - arrays[1][name]), nan=0.0)
            if apart.size and (best is None or apart.max() > best[0]):
                best = (float(apart.max()), name, tuple(map(int, np.unravel_index(apart.argmax(), apart.shape))))
        if best is not None:
            at = best[2]
            values = " → ".join(f"{float(x[best[1]][at]):.4g}" for x in arrays)
            return "nothing differs" if best[0] == 0 else f"largest change {best[1]}[{', '.join(map(str, at))}] {values}"
    return f"{found[0].says}  |  {found[1].says}"


def arrays_of(result: object, name: str = ""):
    """The arrays of floats in a result, with their names."""
    if isinstance(result, np.ndarray):
        if result.dtype.kind == "f":
            yield name, result
    elif isinstance(result, dict):
        for key, inner in result.items():
            yield from arrays_of(inner, f"{name}.{key}".lstrip("."))
    elif is_dataclass(result):
        for f in fields(result):
            yield from arrays_of(getattr(result, f.name), f"{name}.{f.name}".lstrip("."))


# ------------------------------------------------------------------ notes


def note(app: Host) -> None:
    """A field for a line of text, which is kept with the node under the cursor, the prompt and the metric."""
    node = str(app.node()) if app.info is not None else ""
    number = "" if (m := metric(app, app.state)) is None else f"{app.state.metric.kind} {m:.4f}"

    def put(values: list[str]) -> str:
        text = " ".join(values[0].split())
        if not text:
            return "type a line, or esc"
        if len(text) > LONGEST:
            return f"a note has at most {LONGEST} characters, this one {len(text)}: shorten it, or write two"
        app.act("note", text=text, node=node, prompt=app.state.prompt.clean[:200], number=number)
        app.say(f"noted on {node or 'this point'}: :history lists the notes, and the session's notebook has them", GOOD if not app.session.trouble else BAD)
        return ""

    hint = " · ".join(filter(None, (node, number)))
    app.open(Editor("note", [("note", "")], accepted(put), 0, 0, hint))
