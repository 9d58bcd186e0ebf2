"""The key that finds a circuit: the method, how much of it, the time it will take, then the job. Each takes the pane and the app."""

import dataclasses
import itertools
import math
from typing import get_args

from techniques.circuits.requests import Discover, DiscoverResult, METHODS
from vocabulary.integral import StepsAt
from vocabulary.wire import to_json
from screen import history
from screen.client import in_words
from screen.overlays import Editor, Item, Panel, Picker
from screen.pane import Host, Pane
from screen.replies import Reply
from screen.actions import free_name
from techniques.circuits.pictures import scored_over
from widgets import BOLD, DIM, GOOD, PLAIN, WARN

AT = "steps at"
FIELDS = {"acdc": [("threshold", "0.1")], "greedy": [("target", "0.85"), ("heads", "0")], "features": [("features", "30"), ("steps", "5"), (AT, "mid")]}
EDGES = [("edges", "40"), ("steps", "5")]
INTEGRATED = [*EDGES, (AT, "right")]


def choose_method(pane: Pane, app: Host) -> None:
    app.ready()
    items = [Item(m, what, "", m) for m, what in METHODS.items()]
    app.open(Picker("discover a circuit by", items, lambda item, typed: item and how_much(pane, app, item.key)))


def how_much(pane: Pane, app: Host, method: str) -> None:
    fields, rest = FIELDS.get(method, INTEGRATED if method.startswith("eap-ig") else EDGES), app.state.views["circuit.rest"]

    def accept(values: list[str]) -> str:
        try:
            numbers = [v if name == AT else float(v) if name in ("threshold", "target") else int(v) for v, (name, _) in zip(values, fields)]
        except ValueError:
            return "write numbers, whole ones for " + " and ".join(n for n, _ in fields if n not in ("threshold", "target", AT))
        if not all(math.isfinite(n) for n in numbers if not isinstance(n, str)):
            return "write finite numbers"
        if wrong := [n for n in numbers if isinstance(n, str) and n not in get_args(StepsAt)]:
            return f"steps at {wrong[0]!r}: write {', '.join(get_args(StepsAt))}"
        study = pane.study(app)
        study = app.state.with_saes(study) if method == "features" else study
        named = {{"heads": "nodes", "features": "nodes", AT: "steps_at"}.get(name, name): number for (name, _), number in zip(fields, numbers)}
        estimate(pane, app, Discover(study, method, rest=rest, name=free_name(app, method), **named))
        return ""

    app.open(Editor(f"{method} · rest {rest}", fields, accept, 0, 1, "⏎ estimates the time first"))


def estimate(pane: Pane, app: Host, request: Discover) -> None:
    """The estimate of the time first; then, when it is wanted, the job."""

    def show(dry: DiscoverResult) -> None:
        app.say("")
        n = len(request.study.prompt_set) or 1
        rows = [
            [(f" about {in_words(dry.expected)}", BOLD), (f" over {n} prompt{'s' * (n != 1)}", PLAIN)],
            [(f" {METHODS[request.method]}", DIM)],
        ]
        go = lambda at: (panel.action_close(), run(pane, app, request))  # noqa: E731
        apart = lambda at: (panel.action_close(), app.guard(lambda: app.requests.scattered.scatter(request)))  # noqa: E731
        keys = {"enter": go} | ({"J": apart} if n > 1 else {})
        panel = Panel(f"{request.method}", rows, f"⏎ starts it (J lists it, x cancels it there){' · J scatters it over tasks' * (n > 1)}", False, keys)
        app.open(panel)

    app.requests.ask("expected", dataclasses.replace(request, dry=True), show, opens=f"{request.method}: estimating the time")


def run(pane: Pane, app: Host, request: Discover) -> None:
    """The job, beside others of its kind; the circuit it finds joins the others, unless something was undone that should stay redoable."""

    def found(done: DiscoverResult) -> None:
        circuit = dataclasses.replace(done.circuit, name=free_name(app, done.circuit.name))
        pane.found[circuit.name] = Reply(request, dataclasses.replace(done, circuit=circuit), model=app.requests.model)
        if not circuit.nodes:
            app.say(done.warning or f"{request.method} found no circuit", WARN)
        elif history.count(app.session.future):
            app.say(f"{circuit.name} is found, faithfulness {done.score:.3f}: Y, then 'found {circuit.name}', puts it among the circuits (and ends redo)", GOOD)
        else:
            app.act("put_circuit", circuit=to_json(circuit))
            if app.state.views[pane.view] in ("path", "compare"):  # which are of what was there before
                app.act("view", name=pane.view, value="drawing")
            size = f"{len(circuit.nodes)} nodes, {len(circuit.edges)} edges"
            line = f"{circuit.name}: {size}, faithfulness {done.score:.3f} {scored_over(app.state, request.study)}, {done.seconds:.1f} s"
            app.say(done.warning or line, WARN if done.warning else GOOD)

    running = {j.slot for j in app.client.jobs.values()}
    slot = next(s for n in itertools.count(1) if (s := f"discover {n}" if n > 1 else "discover") not in running)
    app.requests.ask(slot, request, found, 2, cancelled=f"{request.method} was cancelled")
