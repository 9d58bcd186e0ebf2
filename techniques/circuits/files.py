"""The key that lists circuits: new, open, groups, union, compare, save, export. Each takes the pane and the app."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from techniques.circuits import drawings
from screen.actions import free_name
from techniques.circuits.pictures import scored_over
from techniques.circuits.requests import Compare, Score
from vocabulary.circuit import Circuit, COMBINE
from vocabulary.names import same_model
from vocabulary.files import folder, short, write_text
from vocabulary.nodes import parse_node, UserError
from vocabulary.wire import to_json
from screen.actions import accepted
from screen.overlays import Editor, Item, Panel, Picker
from screen.pane import Host, Pane
from screen.replies import Reply
from screen.session import VIEWS
from utils import model_name
from widgets import GOOD, WARN

EXPORTS = {
    "dot": "Graphviz",
    "mermaid": "a Mermaid flowchart",
    "table": "tab-separated",
    "text": "the drawing",
    "python": "a script that uses TransformerLens alone and prints the faithfulness",
}
SCORED_BY = {
    "auto": "by edges when they lead from embed to logits, else by nodes",
    "nodes": "heads, MLPs, features",
    "edges": "only they carry the clean run",
}


def choose_circuit(pane: Pane, app: Host) -> None:
    items = [*other_circuits(pane, app), *(this_circuit(pane, app) if app.state.current else ()), *settings_of_scores(pane, app), *files(pane, app)]

    def chosen(item: Item | None, typed: str) -> None:
        app.guard(item.value if item else lambda: open_circuit(app, Path(typed.strip())))

    app.open(Picker("circuits (or type the path of a .json file)", items, chosen, free=True))


def other_circuits(pane: Pane, app: Host) -> list[Item]:
    state, here = app.state, {c.name for c in app.state.circuits}
    discover = lambda: app.action_do("discover")  # noqa: E731
    items = [Item("new", "an empty circuit", "", lambda: new_circuit(app)), Item("discover", "EAP, EAP-IG, ACDC, greedy: a job", "", discover)]
    for c in state.circuits:
        if c is not state.current:
            label = f"{len(c.nodes)} nodes, {len(c.edges)} edges, {of_model(c, app)}{last_score(app, c)}"
            items.append(Item(f"go to {c.name}", label, "", lambda c=c: app.act("select_circuit", name=c.name)))
    for name, reply in pane.found.items():
        done = reply.result
        if name not in here and done.circuit.nodes:
            label = f"by {done.method}, faithfulness {done.score:.3f}: put it among the circuits"
            items.append(Item(f"found {name}", label, "", lambda done=done: app.act("put_circuit", circuit=to_json(done.circuit))))
    return items


def this_circuit(pane: Pane, app: Host) -> list[Item]:
    now = app.state.current
    about = f"{len(now.nodes)} nodes, {len(now.edges)} edges, {of_model(now, app)}{last_score(app, now)}"
    rename = lambda to: app.act("rename_circuit", name=now.name, to=to)  # noqa: E731
    others = [c for c in app.state.circuits if c is not now and same_model(c.model, now.model)]
    combine = [Item(how, f"{COMBINE[how]}: {now.name} and another", "", lambda how=how: combine_with(app, how)) for how in COMBINE]
    return [
        Item("score", f"{now.name}: {about}", "", lambda: pane.run(app)),
        Item("rename", now.name, "", lambda: name_it(app, "rename", now.name, rename)),
        Item("group", "name some of its nodes", "", lambda: group_nodes(app)),
        Item("compare", "with a published circuit or another", "", lambda: compare_with(pane, app)),
        *(combine if others else ()),
        Item("save", "as JSON", "", lambda: save_circuit(app)),
        *(Item(f"export {kind}", what, "", lambda kind=kind: export_circuit(pane, app, kind)) for kind, what in EXPORTS.items()),
        Item("delete", f"{now.name} (u brings it back)", "", lambda: app.act("delete_circuit", name=now.name)),
    ]


def settings_of_scores(pane: Pane, app: Host) -> list[Item]:
    views, over_now = app.state.views, scored_over(app.state, pane.study(app))
    other = "count" if views["circuit.mlps"] == "stay" else "stay"
    turn = lambda name, value: lambda: app.act("view", name=f"circuit.{name}", value=value)  # noqa: E731
    items = [Item(f"rest {r}", "what is outside the circuit is set to", "", turn("rest", r)) for r in VIEWS["circuit.rest"]]
    items += [Item(f"score by {by}", what, "now" if by == views["circuit.by"] else "", turn("by", by)) for by, what in SCORED_BY.items()]
    what = "MLPs outside the circuit are replaced too" if other == "count" else "MLPs always stay"
    over = "prompt" if views["circuit.over"] == "set" else "set"
    return [*items, Item(f"mlps {other}", what, "", turn("mlps", other)), Item(f"over the {over}", f"scores are {over_now}", "", turn("over", over))]


def files(pane: Pane, app: Host) -> list[Item]:
    published = [(f"open {name}", "published", drawings.PUBLISHED / f"{name}.json") for name in drawings.published_names()]
    own = [(f"open {p.stem}", short(p.parent), p) for p in sorted((folder("exports") / "circuits").glob("*.json"))]
    return [Item(name, where, "", lambda path=path: open_circuit(app, path)) for name, where, path in (*published, *own)]


def heading(app: Host) -> str:
    """The current circuit, and whose it is where that is another model."""
    if (now := app.state.current) is None:
        return "no circuit yet"
    whose = "" if same_model(now.model, app.state.model.model) else f"{of_model(now, app)} · "
    return f"{whose}{now.name} ({len(now.nodes)} nodes, {len(now.edges)} edges)"


def of_model(circuit: Circuit, app: Host) -> str:
    """The model that a circuit is of, where that is not the one that is loaded in capitals."""
    name = circuit.model.rstrip("/").split("/")[-1]
    return name if same_model(circuit.model, app.state.model.model) else f"NOT OF THIS MODEL: of {name}"


def last_score(app: Host, circuit: Circuit) -> str:
    """The newest faithfulness of a circuit as it stands on this model, and over which prompts that is; "" where it was not scored."""
    for request, reply in reversed(app.requests.answers.items()):
        if isinstance(request, Score) and (request.circuit.nodes, request.circuit.edges) == (circuit.nodes, circuit.edges):
            return f", faithfulness {reply.result.faithfulness.mean:.3f} {scored_over(app.state, request.study)}, rest {request.rest}"
    return ""


# ------------------------------------------------------------------ changing them


def name_it(app: Host, title: str, start: str, then: Callable[[str], None]) -> None:
    app.open(Editor(title, [("name", start)], accepted(lambda values: then(values[0].strip())), 0, 1))


def new_circuit(app: Host) -> None:
    name_it(app, "new circuit", free_name(app, "circuit"), lambda name: app.act("new_circuit", name=name))


def group_nodes(app: Host) -> None:
    now = app.state.current
    inside = [n for n in now.nodes if not any(n in some for some in now.groups.values())]

    def put(values: list[str]) -> None:
        app.act("group", name=values[0].strip(), nodes=values[1].split())
        app.say(f"group {values[0].strip()} of {app.state.circuit}")

    hint = "no nodes: the group goes"
    app.open(Editor(f"a group of {now.name}", [("name", "S-inhibition"), ("nodes", " ".join(inside))], accepted(put), 0, 1, hint, True))


def combine_with(app: Host, how: str) -> None:
    now = app.state.current
    items = [Item(c.name, f"{len(c.nodes)} nodes", "", c.name) for c in app.state.circuits if c is not now and same_model(c.model, now.model)]
    put = lambda name: app.act("combine", how=how, one=now.name, other=name, name=free_name(app, how))  # noqa: E731
    app.open(Picker(f"{how} of {now.name} and", items, lambda item, typed: item and app.guard(lambda: put(item.key))))


# ------------------------------------------------------------------ files


def open_circuit(app: Host, path: Path) -> None:
    circuit, wrong = drawings.read_circuit(path)
    circuit = dataclasses.replace(circuit, name=free_name(app, circuit.name), model=circuit.model or app.state.model.model)
    app.act("put_circuit", circuit=circuit)
    if app.info and any((n := parse_node(a)).layer >= app.info.n_layers or (n.head or 0) >= app.info.n_heads for a in circuit.nodes):
        of = model_name(circuit.model) if circuit.model else "another model"
        wrong = (*wrong, f"{circuit.name} is of {of}: {model_name(app.info.name)} does not have all its nodes, so it can be compared but not scored")
    if len(wrong) > 1:
        app.open(Panel(f"{circuit.name}: {len(wrong)} entries left out", [[(f" {w}", WARN)] for w in wrong]))
    app.say(wrong[0] if wrong else f"{circuit.name}: {len(circuit.nodes)} nodes, {len(circuit.edges)} edges", WARN if wrong else GOOD)


def file_of(circuit: Circuit, suffix: str) -> Path:
    return folder("exports") / "circuits" / f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', circuit.name)[:100]}{suffix}"


def save_circuit(app: Host) -> None:
    now = app.state.current
    path = file_of(now, ".json")
    drawings.write_circuit(now, path)
    app.say(f"written {short(path)}", GOOD)


def export_circuit(pane: Pane, app: Host, kind: str) -> None:
    now, views, result = app.state.current, app.state.views, pane.scored(app)
    match kind:
        case "dot":
            suffix, text = ".dot", drawings.dot(now)
        case "mermaid":
            suffix, text = ".mmd", drawings.mermaid(now)
        case "table":
            suffix, text = ".tsv", drawings.table(now, result)
        case "text":
            effects = dict(zip(result.parts, result.effects.tolist())) if result else None
            suffix, text = ".txt", "\n".join(drawings.draw(now, effects)) + "\n"
        case "python":
            now = now if pane.by_edges(app) else dataclasses.replace(now, edges=())
            rest, count = views["circuit.rest"], views["circuit.mlps"] == "count"
            suffix, text = ".py", drawings.circuit_script(now, pane.study(app), app.info, app.state.model, rest, count, result)
    path = file_of(now, suffix)
    write_text(path, text)
    app.say(f"written {short(path)}", GOOD)
    app.copy_to_clipboard(text)


# ------------------------------------------------------------------ comparing


def compare_with(pane: Pane, app: Host) -> None:
    now, reply = app.state.current, pane.found.get(app.state.circuit)
    found = reply.result if reply is not None and reply.result.method != "greedy" else None
    scored = (found.edges, tuple(found.scores.tolist())) if found is not None else ((), ())
    known = [name for name in drawings.published_names() if same_model(drawings.published(name)[0].model, now.model)]
    items = [Item(name, "published", "", Compare(now, Circuit(), name, *scored)) for name in known]
    items += [
        Item(c.name, f"{len(c.nodes)} nodes", "", Compare(now, c, "", *scored)) for c in app.state.circuits if c is not now and same_model(c.model, now.model)
    ]
    if not items:
        raise UserError(f"no other circuit of {now.model} is here to compare with: Y opens one from a file")

    def chosen(item: Item | None, typed: str) -> None:
        request = item.value if item else Compare(now, Circuit(), typed.strip(), *scored)
        app.requests.ask("compare", request, lambda result: compared(request, result))

    def compared(request: Compare, result) -> None:
        app.requests.replies["compare"] = Reply(request, result, model=app.requests.model)
        app.act("view", name="circuit.view", value="compare")

    app.open(Picker(f"compare {now.name} with (or type the path of a .json file)", items, chosen, free=True))
