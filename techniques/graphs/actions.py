"""What the keys of the graph's pane do: pin, name, open a file, go to a node, and change features for real beside the prediction."""

import math
from dataclasses import replace

import numpy as np

from screen.actions import accepted, intervene, turn
from screen.overlays import Editor, Item, Picker
from screen.pane import Host
from techniques.graphs.files import LIST, node_id, read
from techniques.graphs.requests import (
    FEATURE,
    KINDS,
    SUPERNODE,
    GraphGroups,
    GraphGroupsResult,
    GraphMarks,
    GraphResult,
    GraphSteer,
    GraphSteerResult,
    difference,
)
from techniques.graphs.supernodes import groups_of
from utils import show_number
from vocabulary.files import folder, short
from vocabulary.names import canonical
from vocabulary.nodes import Intervention, UserError, parse_node
from vocabulary.typed import user_path
from vocabulary.wire import to_json
from widgets import GOOD, WARN

OWN = "prompt"  # in the list of graphs: the prompt's own


def rank(pane, app: Host) -> None:
    r, marks = pane.shown(app), pane.marks(app)
    order = np.argsort(-r.influence, kind="stable").tolist()
    items = [Item(node_id(r, i), f"{pane.called(r, i, marks)}, influence {r.influence[i]:.4f}", "", i) for i in order]
    app.open(Picker("nodes by influence", items, lambda item, typed: item and pane.go(app, item.value)))


# ------------------------------------------------------------------ pins, names, files


def put(app: Host, marks: GraphMarks, **changed: object) -> None:
    """Changed marks, of the graph that was at hand when the user began: another may have come meanwhile."""
    app.act("mark_graph", marks=to_json(replace(marks, **changed)))


def single(pane, app: Host) -> tuple[str, str]:
    """The id of the node under the cursor, and its words. UserError for a supernode."""
    r, i = pane.shown(app), pane.under(app)
    if KINDS[r.kind[i]] == SUPERNODE:
        raise UserError(f"{r.texts[i]} is a supernode: O shows its nodes, which can be pinned and named")
    return node_id(r, i), r.texts[i]


def pin(pane, app: Host) -> None:
    name, text = single(pane, app)
    marks = pane.marks(app)
    pins = marks.pins
    known = name in pins
    put(app, marks, pins=tuple(x for x in pins if x != name) if known else (*pins, name))
    app.say(f"{text} {'is no longer pinned' if known else 'pinned'}: {len(pane.marks(app).pins)} pinned", GOOD)


def name(pane, app: Host) -> None:
    name, text = single(pane, app)
    marks = pane.marks(app)
    names = dict(marks.names)

    def accept(values: list[str]) -> str:
        names.pop(name, None)
        put(app, marks, names=tuple((names | ({name: values[0].strip()} if values[0].strip() else {})).items()))
        return ""

    app.open(Editor(f"a name for {text}; nodes of one name are a supernode", [("name", names.get(name, ""))], accept))


def open_file(pane, app: Host) -> None:
    """A list of graph files; the chosen one is shown, with the pins and names that it holds."""
    files = sorted((p for p in folder("exports").glob("*.json") if p.name != LIST), key=lambda p: -p.stat().st_mtime)
    items = [Item(OWN, "the prompt's own graph")] * bool(app.state.graph) + [Item(short(p), "", "", p) for p in files]

    def take(item: Item | None, typed: str) -> None:
        if item is not None and item.key == OWN:
            app.act("open_graph", path="")
            return
        path = (item.value if item else user_path(typed.strip())).resolve()
        marks = read(path)[1]
        app.act("open_graph", path=str(path), marks=to_json(marks))
        app.say(f"{path.name}: {len(marks.pins)} pins, {len(marks.names)} names", GOOD)

    app.open(Picker("open a graph (of a file that y or graph --out wrote)", items, lambda item, typed: app.guard(lambda: take(item, typed)), free=True))


def choose_transcoders(pane, app: Host) -> None:
    """Sources of the graph's transcoders, typed."""

    def accept(values: list[str]) -> None:
        app.act("transcoders", sources=values[0].split())

    hint = "folders, or RELEASE:layer_{}/ID; {} is the layer; none: those loaded in pane 6, else the zoo's"
    app.open(Editor("transcoders of the graph", [("sources", " ".join(app.state.transcoders))], accepted(accept), 0, 1, hint))


# ------------------------------------------------------------------ supernodes


def turn_rows(pane, app: Host) -> None:
    named = groups_of(pane.whole(app), dict(pane.marks(app).names))
    turn(app, "graph.rows")
    if app.state.views["graph.rows"] == "supernodes" and not named:
        app.say("no node has a name, so all stand alone: B names one, U proposes supernodes", WARN)


def propose(pane, app: Host) -> None:
    """Groups of features with like decoders, of those that have no name: the user takes one, all or none."""
    own_prompt(pane, app)
    r, marks = pane.whole(app), pane.marks(app)
    names = dict(marks.names)
    free = [i for i in np.argsort(-r.influence, kind="stable") if KINDS[r.kind[i]] == FEATURE and node_id(r, i) not in names]

    def ask(values: list[str]) -> str:
        threshold, where = number(values[0]), values[1].strip()
        if where not in ("same", "any") or not -1 <= threshold <= 1:
            return "a cosine from -1 to 1; positions: same or any"
        request = pane.asked(app, GraphGroups, nodes=tuple(node_id(r, i) for i in free), threshold=threshold, same_position=where == "same")
        app.requests.ask("graph_groups", request, show, opens="like decoders")
        return ""

    def show(found: GraphGroupsResult) -> None:
        if not found.groups:
            app.say(f"no two features without a name have decoders with a cosine of {found.threshold:g}: U with less", WARN)
            return
        items = [Item(label, f"{' '.join(some)}", f"least cosine {c:.2f}", (label,)) for label, some, c in zip(found.labels, found.groups, found.cosine)]
        every = Item("all", f"the {len(items)} groups below", "", found.labels)
        app.open(
            Picker(
                f"supernodes of decoders with a cosine of at least {found.threshold:g}: take one or all",
                [every, *items],
                lambda i, typed: i and take(i.value, found),
            )
        )

    def take(labels: tuple[str, ...], found: GraphGroupsResult) -> None:
        new = {x: label for label, some in zip(found.labels, found.groups) if label in labels for x in some}
        put(app, marks, names=tuple((new | names).items()))
        app.say(f"{len(labels)} supernodes, {len(new)} features (u undoes); O shows each as one row", GOOD)

    fields = [("cosine", "0.7"), ("positions", "same")]
    app.open(Editor("group features of like decoders", fields, accepted(ask), 0, 1, "least cosine of any two of a group; positions: same or any"))


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{text!r} is no number")
    return value


# ------------------------------------------------------------------ features changed for real


def own_prompt(pane, app: Host) -> None:
    """
    UserError where the graph at hand (a file's, or one that is out of date) is of another model, prompt or pair of answers than what is loaded: what is
    changed in that would not be in this.
    """
    app.ready()
    r, check = pane.whole(app), app.requests.check()
    row = None if check is None else check.corrupt if r.which == "corrupt" else check.clean
    if row is None or row.ids != r.tokens.ids or app.state.graph and pane.marks(app).model != canonical(app.state.model.model):
        way = "o goes back to the prompt's own" if app.state.graph else "wait for the prompt's own"
        raise UserError(f"this graph is of another prompt or model than the one at hand, so nothing is changed in it: {way}")
    target = pane.marks(app).target.removeprefix("logit ")
    mine = difference(*(list({one.ids[0]: one.texts[0] for one in side}.values()) for side in (check.answers, check.foils)))
    if r.target == "diff" and target != mine:
        raise UserError(
            f"this graph is of {target}, and the prompt's answers and foils are {mine}: give the prompt those of the graph, or o goes back to its own"
        )


def position(app: Host, r: GraphResult) -> int:
    """A graph's position as a metric's is written: under an alignment, that of the clean prompt."""
    check = app.requests.check()
    if r.which != "corrupt" or check is None or not check.alignment:
        return r.pos
    partner = {b: a for a, b in check.alignment}
    if r.pos not in partner:
        raise UserError(f"this graph is of position {r.pos} of the corrupted prompt, which has no partner in the clean one: edit the alignment (%)")
    return partner[r.pos]


def changed_features(pane, app: Host) -> tuple[tuple[str, ...], str]:
    """The ids of the feature, or the supernode's features, under the cursor; and what they are, in words."""
    own_prompt(pane, app)
    i = pane.under(app)
    some, text = pane.members(app, i), pane.shown(app).texts[i]
    if not some:
        raise UserError(f"{text} is no feature: hjkl to one, or H for a list")
    return some, text if len(some) == len(pane.parts(app, i)) else f"the {len(some)} feature{'s' * (len(some) > 1)} of {text}"


def words(r: GraphSteerResult, n: int = 0) -> str:
    return f"change of {r.names[n]}: predicted {r.predicted[n]:+.3f}, attention frozen {r.frozen[n]:+.3f}, true {r.true[n]:+.3f}"


def near(r: GraphSteerResult) -> bool:
    return abs(r.predicted[0] - r.true[0]) <= 0.2 * max(abs(r.true[0]), 0.1)


def check(pane, app: Host) -> None:
    """The feature under the cursor, or all of a supernode, to zero."""
    some, what = changed_features(pane, app)
    show = lambda r: app.say(f"{what} to zero, {words(r)}", GOOD if near(r) else WARN)  # noqa: E731
    app.requests.ask("graph_check", pane.asked(app, GraphSteer, steer=some), show)


def steer(pane, app: Host) -> None:
    """The feature (or supernode) times a factor, or set to a value; a list of what that does to logits and pinned features."""
    some, what = changed_features(pane, app)
    pins = tuple(x for x in pane.marks(app).pins if x.count("_") == 2 and x not in some and node_kind(pane, app, x) == FEATURE)

    def accept(values: list[str]) -> str:
        text = values[0].strip()
        how = {"value": number(text[1:])} if text.startswith("=") else {"factor": number(text)}
        app.requests.ask("graph_steer", pane.asked(app, GraphSteer, steer=some, watch=pins, **how), lambda r: show(r, text), opens="steering")
        return ""

    def show(r: GraphSteerResult, text: str) -> None:
        line = lambda x: "".join(f"{label} {show_number(value, 8):<9}" for label, value in zip(("was", "predicted", "frozen", "true"), x))  # noqa: E731
        rows = [Item(name, line((b, *(b + x for x in changes))), "logit") for name, b, *changes in zip(r.names, r.before, r.predicted, r.frozen, r.true)]
        rows += [Item(name, line(x), "activation") for name, x in zip(r.watched, r.activation.T)]
        how = f"to {text[1:]}" if text.startswith("=") else f"× {text}"
        app.open(Picker(f"{what} {how}: predicted, attention frozen, true", rows, lambda item, typed: None))

    hint = "times a factor, or =VALUE; pinned features are watched, else those that should change most"
    app.open(Editor(f"steer {what}", [("factor", "2.0")], accepted(accept), 0, 1, hint, True))


def node_kind(pane, app: Host, name: str) -> str:
    r = pane.whole(app)
    return next((KINDS[r.kind[i]] for i in range(len(r.kind)) if node_id(r, i) == name), "")


def ablate(pane, app: Host) -> bool:
    """All features of a supernode, in all panes; False for other nodes, which the common key ablates."""
    r, i = pane.shown(app), pane.under(app)
    if KINDS[r.kind[i]] != SUPERNODE:
        return False
    for x in changed_features(pane, app)[0]:
        layer, index, at = x.split("_")
        intervene(app, Intervention(parse_node(f"L{layer}.sae.f{index}@{at}"), "zero"))
    return True
