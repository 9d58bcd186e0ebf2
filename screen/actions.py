"""What the screen's own keys do to the state and the cursor: moving, intervening, undoing, turning views, finding. Each takes the app."""

import contextlib
import hashlib
import re
from pathlib import Path

from techniques.output.requests import RunResult
from vocabulary.names import same_model
from vocabulary.nodes import ABLATIONS, FROM_TEXT, Intervention, Node, OPS, parse_intervention, parse_node, UserError
from vocabulary.prompts import WHICH
from vocabulary.typed import read_text, user_path, whole_number
from screen import history
from screen.jobs import ends_jobs
from screen.overlays import Editor, Item, Picker
from screen.pictures import run_names
from screen.pane import Host
from screen.session import VIEWS
from utils import ROOT
from widgets import GOOD, WARN

POSITION = re.compile(r"@?(-?[0-9]{1,9})")

# ------------------------------------------------------------------ panes and the cursor


def next_pane(app: Host, by: int = 1) -> None:
    keys = list(app.panes)
    app.show_pane(keys[(keys.index(app.pane) + by) % len(keys)])


def zoom(app: Host, on: bool = True) -> None:
    app.zoomed = on
    app.arrange()


def back(app: Host) -> None:
    if not app.panes[app.pane].back(app) and app.zoomed:
        zoom(app, False)


def step(app: Host, rows: int, cols: int) -> None:
    if app.info is not None:
        app.panes[app.pane].step(app, rows, cols)


def step_layer(app: Host, by: int) -> None:
    if app.info:
        app.move(layer=max(0, min(app.cursor.layer + by, app.info.n_layers - 1)))


def across(app: Host, by: int) -> None:
    app.panes[app.pane].across(app, by)


# ------------------------------------------------------------------ interventions


def toggle(app: Host, new: Intervention) -> None:
    if new in app.state.interventions:
        app.act("drop", intervention=new)
        app.say(f"restored {new.node}", GOOD)
    else:
        intervene(app, new)


def intervene(app: Host, new: Intervention) -> None:
    """Add an intervention that this model and prompt can take; else a UserError, and nothing changes."""
    check_node(app, new.node)
    check_source(app, new)
    app.act("intervene", intervention=new)
    if new.op in ("mean", "mean_all") and app.state.prompt not in app.state.prompt_set:
        app.say(f"{new}: the mean is over {Path(app.state.set_path).stem}, a set that this prompt is not from", WARN)
    else:
        names = run_names(app.state)
        other = f"the value this node has in {names['corrupt' if app.state.base == 'clean' else 'clean']}"
        app.say(f"{new}: {other if new.op == 'patch' and app.state.model.against else OPS[new.op]}", GOOD)


def check_node(app: Host, node: Node) -> None:
    """UserError where the model, its SAEs or the prompt have no such node; also when the engine died while the node was typed."""
    app.ready()
    i = app.info
    if node.site == "sae" and node.layer not in {s.layer for name, s in app.known_saes.items() if name in app.state.saes}:
        raise UserError(f"{node}: no SAE of layer {node.layer} is loaded: z in pane 6 lists those that fit")
    if node.layer is not None and node.layer >= i.n_layers or (node.head or 0) >= i.n_heads or (node.site == "neuron" and node.index >= i.d_mlp):
        raise UserError(f"{node} is not in this model: it has {i.n_layers} layers, {i.n_heads} heads, {i.d_mlp} neurons")
    if node.site == "resid_mid" and i.parallel:
        raise UserError(f"{node}: attention and MLP are parallel in this model, so there is no resid_mid")
    run = app.requests.result("run", RunResult)
    if run is None:
        return
    row, n = run.now.tokens, len(run.now.tokens.ids)
    if isinstance(node.pos, int) and not -n <= node.pos < n:
        raise UserError(f"{node}: the prompt has {n} tokens, 0 to {n - 1}")
    if isinstance(node.pos, str) and node.pos not in row.labels:
        raise UserError(f"{node}: the prompt's labels are {', '.join(row.labels)}")


def check_source(app: Host, new: Intervention) -> None:
    """UserError where what an intervention takes its value from is missing."""
    run, aligned = app.requests.result("run", RunResult), app.state.align or app.state.prompt.alignment
    if new.op == "patch" and run is not None and run.corrupt is not None and not aligned and len(run.corrupt.tokens.ids) != len(run.clean.tokens.ids):
        a, b = len(run.clean.tokens.ids), len(run.corrupt.tokens.ids)
        raise UserError(f"patching is position by position, and clean has {a} tokens, corrupted {b}: make them equal with e or E, or align them with %")
    if new.op == "patch" and not app.state.compares:
        raise UserError("patching takes the value from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
    if new.op in FROM_TEXT and not app.state.text.path:
        raise UserError("a mean over a text needs one: A, then text, names it")
    if new.op in ("mean", "mean_all") and not app.state.prompt_set:
        raise UserError("mean ablation averages over the corrupted prompts of a prompt set: o opens one, A chooses another kind")


def no_members(app: Host) -> str:
    """Why nothing is over the set: none is open, or the prompt was typed and has left it."""
    if not app.state.prompt_set:
        return "no prompt set is open: o opens one, R goes back to the prompt"
    return f"this prompt is not of the set {Path(app.state.set_path).stem}: ( and ) go back to the set, R to the prompt alone"


def ablate(app: Host) -> None:
    app.ready()
    toggle(app, Intervention(app.node(), app.state.ablation))


def patch(app: Host) -> None:
    app.ready()
    toggle(app, Intervention(app.node(), "patch"))


def choose_ablation(app: Host) -> None:
    items = [Item(k, OPS[k]) for k in ABLATIONS]
    items.append(Item("text", f"the text that means are over: {app.state.text.words if app.state.text.path else 'none yet'}", "", lambda: edit_text(app)))
    choose = lambda item, typed: item and app.guard(item.value or (lambda: take_ablation(app, item.key)))  # noqa: E731
    app.open(Picker(f"kind of ablation (now {app.state.ablation})", items, choose))


def take_ablation(app: Host, kind: str) -> None:
    """This kind from now on; one that needs a text asks for it."""
    app.act("ablation", kind=kind)
    if kind in FROM_TEXT and not app.state.text.path:
        edit_text(app)


def edit_text(app: Host) -> None:
    """The text file that means are taken over, and how many of its first tokens."""

    def put(values: list[str]) -> str:
        count, path = whole_number(values[1].strip()), user_path(values[0].strip()).resolve()
        if (count or 0) < 1:
            return "tokens: a positive whole number"
        if not path.is_file() and not getattr(app.client, "via", ""):
            return f"there is no text file {path}"
        digest = hashlib.sha256(read_text(path).encode()).hexdigest()[:8] if path.is_file() else ""
        app.act("text", path=str(path) if digest else values[0].strip(), tokens=count, digest=digest)
        app.say(f"means are over {app.state.text.words}", GOOD)
        return ""

    fields = [("text file", app.state.text.path or str(ROOT / "zoo" / "corpus.txt")), ("tokens", str(app.state.text.tokens))]
    app.open(Editor("the text that means are taken over", fields, accepted(put), 0, 1, "tokens: of its beginning"))


def scale(app: Host) -> None:
    app.ready()
    node = app.node()
    accept = accepted(lambda values: intervene(app, parse_intervention(f"{node}=scale:{values[0]}")))
    app.open(Editor(f"scale {node}", [("factor", "2.0")], accept, 0, 1, "", True))


def type_node(app: Host) -> None:
    app.ready()

    def put(values: list[str]) -> None:
        for new in [parse_intervention(text) for text in values[0].split()]:
            intervene(app, new)

    fields, hint = [("node=op", f"{app.node()}={app.state.ablation}")], "L2H3@S2=zero 1.2.q=patch L3.mlp=scale:0.5"
    app.open(Editor("interventions", fields, accepted(put), 0, 1, hint, True))


def accepted(put):
    """What an editor calls with its values: the error line of `put`, or ""."""

    def accept(values: list[str]) -> str:
        try:
            return put(values) or ""
        except UserError as error:
            return str(error)

    return accept


def scope(app: Host) -> None:
    app.ready()
    here = app.scopes[app.pane] != "here"
    app.scopes[app.pane] = "here" if here else "all"
    app.say(f"a, p and s act on {app.node()}: " + ("this position only" if here else "all positions"))


def base(app: Host) -> None:
    new = "corrupt" if app.state.base == "clean" else "clean"
    app.act("base", value=new)
    app.say(
        f"interventions act on {run_names(app.state)[new]}, p patches from {run_names(app.state)['clean' if new == 'corrupt' else 'corrupt']}"
        if app.state.model.against
        else "denoising: interventions act on the corrupted prompt, p patches from the clean one"
        if new == "corrupt"
        else "noising: interventions act on the clean prompt, p patches from the corrupted one"
    )


def enable(app: Host) -> None:
    if not app.state.interventions:
        raise UserError("no interventions: a ablates the node under the cursor, p patches it")
    app.act("enable", value=not app.state.enabled)
    app.say("interventions are on" if app.state.enabled else "interventions are off: x turns them on again")


def clear(app: Host) -> None:
    if app.state.interventions:
        app.act("clear")
        app.say("interventions cleared; u brings them back")


def undo(app: Host, way: str = "undo") -> None:
    """Take back, or do again, what changes what is computed; views have a history of their own (`view_back`)."""
    session, before = app.session, app.state
    at, name, _ = history.taken_back(before, session.past if way == "undo" else session.future, "work", way)

    def go() -> None:
        app.act(way, of="work")
        what = history.words(name, *((at, before) if way == "undo" else (before, at)))
        left = f"{history.count(session.past)} back, {history.count(session.future)} forward"
        app.say(f"{'undid' if way == 'undo' else 'did again'}: {what} ({left})")

    ends_jobs(app, f"{way} of the model", go) if at.model != before.model else go()


def view_back(app: Host) -> None:
    """Back to the view before; what is computed stays."""
    before = app.state.views
    app.act("undo", of=history.VIEW)
    changed = [f"{name} {value}" for name, value in app.state.views.items() if value != before[name]]
    app.say(f"back to {', '.join(changed) or 'the view before'}")


# ------------------------------------------------------------------ views


def turn(app: Host, name: str, allowed: tuple[str, ...] | None = None) -> None:
    """The next value of a view, of all or of those allowed."""
    values, now = allowed or VIEWS[name], app.state.views[name]
    app.act("view", name=name, value=values[(values.index(now) + 1) % len(values) if now in values else 0])


def turns(name: str):
    """The handler of a pane's key that turns one of its views."""
    return lambda pane, app: turn(app, name)


def turned(app: Host, base: str, views: dict[str, str]) -> None:
    """This base and these views, each an action where it is another now."""
    if app.state.base != base:
        app.act("base", value=base)
    for name, value in views.items():
        if app.state.views[name] != value:
            app.act("view", name=name, value=value)


def turn_which(app: Host) -> None:
    kinds = WHICH if app.state.compares else ("now", "clean", "now-clean")
    turn(app, "which", tuple(k for k in kinds if "-" not in k or app.panes[app.pane].differences))


# ------------------------------------------------------------------ the circuit of this model


def own_circuit(app: Host) -> None:
    """What is kept on one model does not join the circuit of another: a circuit of the loaded one begins."""
    now = app.state.current
    if now is not None and not same_model(now.model, app.state.model.model):
        app.act("new_circuit", name=free_name(app, "circuit"))


def free_name(app: Host, start: str) -> str:
    names, n = {c.name for c in app.state.circuits}, 2
    name = start
    while name in names:
        name, n = f"{start}-{n}", n + 1
    return name


# ------------------------------------------------------------------ finding


def search(app: Host) -> None:
    hint = "a token, a node such as L2H3 or L1.resid_mid@S2, a position such as @12 or @S2"
    app.open(Editor("find", [("find", app.needle)], accepted(lambda values: find(app, values[0])), 0, 1, hint, True))


def find(app: Host, needle: str) -> str:
    """Go to a node, or to the first place of a token; the line that says why not, or ""."""
    app.ready()
    if not needle:
        return "type a token, a node or a position"
    if needle.startswith("@") and (pos := position_of(app, needle)) is not None:
        to_position(app, pos)
        return ""
    with contextlib.suppress(UserError):
        return find_node(app, needle, parse_node(needle))
    app.needle, app.matches = needle, app.panes[app.pane].find(app, needle)
    if not app.matches:
        return f"{needle!r} is not on this pane"
    find_next(app, 0)
    return ""


def position_of(app: Host, text: str) -> int | None:
    """What `123`, `@123`, `@-1` (from the end) or a label (`@S2`) means in the shown prompt; None: it is no position. UserError beyond the prompt."""
    n, labels = app.length(), app.tokens.tokens.labels if app.tokens else {}
    if text.removeprefix("@") in labels:
        return labels[text.removeprefix("@")]
    if (match := POSITION.fullmatch(text)) is None:
        return None
    pos = int(match[1])
    if not -n <= pos < n:
        raise UserError(f"{text}: the prompt has {n} tokens, 0 to {n - 1}")
    return pos % n


def to_position(app: Host, pos: int) -> None:
    app.move(pos=pos)
    if app.cursor.pos != pos:
        app.say(f"{pos} is a token of the chat template that is folded away: \\ unfolds it", WARN)


def find_node(app: Host, needle: str, node: Node) -> str:
    if node.layer is None or node.layer >= app.info.n_layers or (node.head or 0) >= app.info.n_heads:
        return f"{needle} is not in this model: {app.info.n_layers} layers, {app.info.n_heads} heads"
    row, n = (app.tokens.tokens, app.length()) if app.tokens else (None, 0)
    if isinstance(node.pos, str) and (row is None or node.pos not in row.labels):
        return f"the prompt's labels are {', '.join(row.labels) if row else 'not known yet'}"
    if isinstance(node.pos, int) and not -n <= node.pos < n:
        return f"the prompt has {n} tokens, 0 to {n - 1}"
    pane = app.panes[app.pane]
    if not pane.shows(node):
        pane = next(p for p in app.panes.values() if p.shows(node))
    if wrong := pane.go_to(app, node):
        return wrong
    if pane.key != app.pane:
        app.show_pane(pane.key)
    if node.pos is not None:
        app.scopes[pane.key] = "here"
        app.move(pos=row.labels[node.pos] if isinstance(node.pos, str) else node.pos % n)
    app.say(f"a, p and s act on {app.node()}")
    return ""


def find_next(app: Host, by: int = 1) -> None:
    if not app.matches:
        raise UserError("nothing to find: / searches")
    here = next((n for n, m in enumerate(app.matches) if all(getattr(app.cursor, k) == v for k, v in m.items())), -by if by > 0 else 0)
    at = (here + by) % len(app.matches)
    app.move(**app.matches[at])
    app.say(f"{app.needle!r}: match {at + 1} of {len(app.matches)}")
