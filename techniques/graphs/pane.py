"""Pane ~: an attribution graph, walked from the logit: a node's inputs and outputs, pins and labels, a feature ablated for real beside the prediction."""

import json

import numpy as np
from textual.widget import Widget

from screen.cursor import clip
from screen.keys import Part
from screen.overlays import Editor, Item, Picker
from screen.pane import Host, Pane
from screen.pictures import run_name
from techniques.graphs.explained import EXPLAINED
from techniques.graphs.files import as_json, node_id
from techniques.graphs.requests import KINDS, AttributionGraph, GraphEffects, GraphEffectsResult, GraphResult
from techniques.graphs.walk import balance, place, steps
from utils import show_number
from vocabulary.names import canonical
from vocabulary.nodes import Node, UserError
from widgets import BOLD, DIM, GOOD, PLAIN, WARN, Grid, GridView, Same, Spans

COLUMNS = ["adds", "share", "value", "influence"]


class GraphPane(Pane):
    number, key, label, about = "`", "graph", "Graph", "attribution graph of the prompt, by transcoders: a node's inputs and outputs"
    view, differences = "graph.target", False
    views = {"graph.target": ("logits", "diff")}
    explained = EXPLAINED
    hints = ("enter", "view", "detect", "ranked", "points", "labels", "ablate", "copy")
    keys = (
        Part("enter", "graph", "go to this node: its inputs and outputs", lambda pane, app: pane.enter(app)),
        Part("ranked", "graph", "all nodes by influence: filter and go", lambda pane, app: pane.rank(app)),
        Part("detect", "graph", "ablate the feature: what the graph predicts beside what happens", lambda pane, app: pane.check(app)),
        Part("points", "graph", "pin the node, or let it go", lambda pane, app: pane.pin(app)),
        Part("labels", "graph", "name the node: nodes of one name are a supernode", lambda pane, app: pane.name_it(app)),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = GridView()
        self.row, self.col = 0, 0
        self.here, self.trail = "", []  # ids: the node at hand, and those before it with their rows
        self.pins: list[str] = []
        self.names: dict[str, str] = {}

    def body(self) -> Widget:
        return self.table

    def grids(self) -> dict[str, Grid]:
        return {"graph": self.table.grid} if self.table.grid else {}

    # ---------------------------------------------------------------- asking

    def which(self, app: Host) -> str:
        """The run of the prompt at hand; graphs are made of runs without interventions."""
        asked = app.state.views["which"]
        return asked if asked in ("clean", "corrupt") else app.state.study.base

    def asked(self, app: Host, kind: type = AttributionGraph, **more: object) -> object:
        return kind(app.state.with_saes(app.study), which=self.which(app), target=app.state.views[self.view], **more)

    def wants(self, app: Host) -> dict[str, object]:
        return {"graph": self.asked(app)} if app.counted() else {}

    def result(self, app: Host) -> GraphResult:
        if (r := app.requests.result("graph", GraphResult)) is None:
            raise UserError("there is no graph yet")
        return r

    # ---------------------------------------------------------------- the cursor

    def step(self, app: Host, rows: int, cols: int) -> None:
        if self.table.grid is not None:
            self.row, self.col = clip(self.row + rows, len(self.table.grid.rows)), clip(self.col + cols, len(COLUMNS))
            app.draw()

    def under(self, app: Host) -> int:
        """The node under the cursor; the one at hand where it has no edges."""
        r = self.result(app)
        at = place(r, self.here)
        some = steps(r, at)
        return some[clip(self.row, len(some))].node if some else at

    def node(self, app: Host, pos: int | None) -> Node:
        """What is under the cursor, at its own position: a feature (its transcoder loaded by z), a token's embedding, the MLP of an error, the last stream of a logit."""
        r = app.requests.result("graph", GraphResult)
        if r is None:
            return Node("mlp", app.cursor.layer, pos=pos)
        layer, at, index = (int(x[self.under(app)]) for x in (r.layer, r.at, r.index))
        match KINDS[r.kind[self.under(app)]]:
            case "feature":
                return Node("sae", layer, index=index, pos=at)
            case "error":
                return Node("mlp", layer, pos=at)
            case "token":
                return Node("embed", pos=at)
        return Node("resid_post", r.n_layers - 1, pos=at)

    def back(self, app: Host) -> bool:
        """To the node before in the walk."""
        if not self.trail:
            return False
        self.here, self.row = self.trail.pop()
        app.draw()
        return True

    def go(self, app: Host, i: int) -> None:
        self.trail.append((self.here, self.row))
        self.here, self.row = node_id(self.result(app), i), 0
        app.draw()

    # ---------------------------------------------------------------- keys

    def enter(self, app: Host) -> None:
        self.go(app, self.under(app))

    def rank(self, app: Host) -> None:
        r = self.result(app)
        order = np.argsort(-r.influence, kind="stable").tolist()
        items = [Item(node_id(r, i), f"{self.called(r, i)}, influence {r.influence[i]:.4f}", "", i) for i in order]
        app.open(Picker("nodes by influence", items, lambda item, typed: item and self.go(app, item.value)))

    def pin(self, app: Host) -> None:
        name = node_id(r := self.result(app), i := self.under(app))
        known = name in self.pins
        self.pins.remove(name) if known else self.pins.append(name)
        app.say(f"{r.texts[i]} {'is no longer pinned' if known else 'pinned'}: {len(self.pins)} pinned", GOOD)
        app.draw()

    def name_it(self, app: Host) -> None:
        r, i = self.result(app), self.under(app)
        name = node_id(r, i)

        def accept(values: list[str]) -> str:
            self.names.pop(name, None)
            if text := values[0].strip():
                self.names[name] = text
            app.draw()
            return ""

        app.open(Editor(f"a name for {r.texts[i]}; nodes of one name are a supernode", [("name", self.names.get(name, ""))], accept))

    def check(self, app: Host) -> None:
        """The feature under the cursor to zero, for real."""
        node = self.node(app, None)
        if node.site != "sae":
            raise UserError(f"{self.result(app).texts[self.under(app)]} is no feature: hjkl to one, or H for a list")

        def show(r: GraphEffectsResult) -> None:
            guess, frozen, true = (float(x[0]) for x in (r.predicted, r.frozen, r.true))
            near = abs(guess - true) <= 0.2 * max(abs(true), 0.1)
            app.say(f"{node} to zero, change of {r.target}: predicted {guess:+.3f}, attention frozen {frozen:+.3f}, true {true:+.3f}", GOOD if near else WARN)

        app.requests.ask("graph_check", self.asked(app, GraphEffects, only=f"{node.layer}_{node.index}_{node.pos}"), show)

    # ---------------------------------------------------------------- copying

    def copies(self, app: Host) -> list[Item]:
        r = app.requests.result("graph", GraphResult)
        return [] if r is None else [Item("graph", "circuit-tracer's JSON, which `graph --open` reads too", ".json", lambda: self.as_file(app, r))]

    def as_file(self, app: Host, r: GraphResult) -> str:
        ids = {node_id(r, i): i for i in range(len(r.kind))}
        groups: dict[str, list[int]] = {}
        for name, text in self.names.items():
            if name in ids:
                groups.setdefault(text, []).append(ids[name])
        return json.dumps(as_json(r, "graph", canonical(app.state.model.model), groups, [ids[p] for p in self.pins if p in ids])) + "\n"

    # ---------------------------------------------------------------- drawing

    def called(self, r: GraphResult, i: int) -> str:
        name = node_id(r, i)
        return f"{r.texts[i]}{' *' if name in self.pins else ''}{f' “{self.names[name]}”' if name in self.names else ''}"

    def picture_of(self, r: GraphResult, at: int) -> Grid:
        some = steps(r, at)
        rows = [f"{'←' if s.into else '→'} {self.called(r, s.node)}" for s in some] or ["no edges"]
        weight = r.weight[[s.edge for s in some]] if some else np.full(1, np.nan)
        facts = [[(r.weight[s.edge], 7), (r.share[s.edge], 7), (r.value[s.node], 7), (r.influence[s.node], 7)] for s in some]
        text = [[show_number(x, n).strip() for x, n in line] for line in facts] or [[""] * len(COLUMNS)]
        hi = max(float(np.nanmax(np.abs(weight), initial=0)), 1e-6)
        values = np.full((len(rows), len(COLUMNS)), np.nan)
        values[:, 0] = weight
        numbers = np.array([[x for x, _ in line] for line in facts] or [[np.nan] * len(COLUMNS)], float)
        return Grid(values, rows, list(COLUMNS), -hi, hi, text=text, numbers=numbers, signed=True, cell=(8, 11), corner="inputs ←, outputs →", listed=False)

    def paint(self, app: Host) -> None:
        mode, r = app.state.views["mode"], app.requests.result("graph", GraphResult)
        if r is None:
            self.show_title(app, ("graph",), run_name(app.state, self.which(app)), "")
            self.table.show(None, (0, 0), mode, app.requests.waiting("graph"))
            self.info_line.show([])
            return
        at = place(r, self.here)
        grid = self.picture("graph", (Same(r), at, tuple(self.pins), tuple(self.names.items())), lambda: self.picture_of(r, at))
        self.row = clip(self.row, len(grid.rows))
        scores = f"replacement {r.replacement:.3f} · completeness {r.completeness:.3f}"
        self.show_title(app, ("graph",), f"{self.called(r, at)} · {run_name(app.state, r.which)} · {scores}", r.convention, grid)
        self.table.show(grid, (self.row, self.col), mode)
        self.info_line.show([self.about_node(r, at)])

    def about_node(self, r: GraphResult, at: int) -> Spans:
        made = balance(r, at)
        return [(f" {node_id(r, at)} ", BOLD), (made, PLAIN), (f"{'  │  ' * bool(made)}{len(r.kind)} nodes, {len(r.weight)} edges", DIM)]


PANE = GraphPane
