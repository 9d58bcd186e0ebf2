"""What pane 5 asks over a set that can run in shards, turning it to what a scattered job asked, and a discovery that is drawn while its tasks run."""

from dataclasses import replace

from techniques.circuits.requests import Discover, DiscoverResult, PathPatch, Score
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError
from vocabulary.wire import to_json
from screen.actions import free_name, turned
from screen.pane import Host, Pane

SCORED = ("faithfulness", "effects")


def scatters(pane: Pane, app: Host) -> PathPatch | Score | None:
    """The paths, or the circuit's scores (those whose parts can be joined), over the set."""
    request = pane.path(app) if app.state.views[pane.view] == "path" else pane.score(app, SCORED)
    return request if request is not None and app.state.views["circuit.over"] == "set" and app.state.members else None


def turn_to(pane: Pane, app: Host, request: object, result: object) -> bool:
    views = {"circuit.over": "set"}
    match request:
        case PathPatch():
            each = "receiver" if request.each == "receiver" else "position" if request.by_pos else "sender"
            views |= {pane.view: "path", "circuit.path": request.convention, "circuit.each": each}
            if request.receivers:
                app.act("receivers", addresses=list(request.receivers))
            if request.senders:
                app.act("senders", addresses=list(request.senders))
            turned(app, "clean" if request.direction == "noise" else "corrupt", views)
        case Score():
            take(app, request.circuit)
            by = "edges" if request.edges and request.circuit.edges else "nodes"
            views |= {"circuit.rest": request.rest, "circuit.mlps": "count" if request.mlps else "stay", "circuit.by": by}
            turned(app, app.state.base, views | ({pane.view: "drawing"} if app.state.views[pane.view] == "path" else {}))
        case Discover():
            tables = app.requests.scattered.tables
            if not next(t for t in tables.values() if t.result is result).whole:
                turned(app, app.state.base, {pane.view: "drawing"})
                pane.coming = (next(f for f, t in tables.items() if t.result is result), app.state.current)
                return True
            if not result.circuit.nodes:
                raise UserError(result.warning or f"{request.method} found no circuit")
            take(app, result.circuit)
            turned(app, app.state.base, {pane.view: "drawing", "circuit.rest": request.rest})
            app.say(f"{app.state.circuit}: {len(result.circuit.nodes)} nodes, {len(result.circuit.edges)} edges, faithfulness {result.score:.3f}")
        case _:
            return False
    return True


def coming(pane: Pane, app: Host) -> DiscoverResult | None:
    """The discovery that is drawn as far as its parts are there: what J turned to, until it is whole: as long as view, circuit and model stay and it is in J's list."""
    scattered, (folder, circuit) = app.requests.scattered, pane.coming
    table = scattered.tables.get(folder)
    here = table is not None and not table.whole and folder in app.session.folders and scattered.ours(table)
    return table.result if here and app.state.views[pane.view] == "drawing" and app.state.current == circuit else None


def drawn(pane: Pane, app: Host) -> Circuit | None:
    """The circuit that is drawn: the current one, or that which a discovery has found so far."""
    found = coming(pane, app)
    return app.state.current if found is None else found.circuit


def take(app: Host, circuit: Circuit) -> None:
    """A circuit among the session's, or the one of them that is the same."""
    same = next((c for c in app.state.circuits if (c.nodes, c.edges) == (circuit.nodes, circuit.edges)), None)
    if same is not None:
        app.act("select_circuit", name=same.name)
    else:
        named = replace(circuit, name=free_name(app, circuit.name or "scattered"), model=circuit.model or app.state.model.model)
        app.act("put_circuit", circuit=to_json(named))
