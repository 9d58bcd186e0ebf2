"""Pane `: an attribution graph, of the prompt or of a file, walked from the logit: a node's inputs and outputs, with pins, names and supernodes."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from textual.widget import Widget

from screen.cursor import clip
from screen.keys import Part
from screen.overlays import Item
from screen.pane import Host, Pane
from screen.pictures import run_name
from techniques.graphs import actions
from techniques.graphs.explained import EXPLAINED
from techniques.graphs.files import as_json, enlist, marks_of, node_id, read, version
from techniques.graphs.requests import KINDS, SUPERNODE, AttributionGraph, GraphMarks, GraphResult
from techniques.graphs.supernodes import features_of, folded, groups_of, has_supernodes, title
from techniques.graphs.walk import balance, place, steps
from utils import show_number, visible
from vocabulary.names import canonical
from vocabulary.nodes import Node, UserError
from widgets import BAD, BOLD, DIM, PLAIN, Grid, GridView, Same, Spans


class GraphPane(Pane):
    number, key, label, about = "`", "graph", "Graph", "attribution graph of the prompt, by transcoders: a node's inputs and outputs"
    view, differences = "graph.target", False
    views = {"graph.target": ("logits", "diff"), "graph.rows": ("nodes", "supernodes")}
    explained = EXPLAINED
    hints = ("enter", "view", "detect", "scale", "ranked", "points", "labels", "multiples", "ablate", "copy")
    keys = (
        Part("enter", "graph", "go to this node: its inputs and outputs", lambda pane, app: pane.go(app, pane.under(app)), "go to node"),
        Part("ranked", "graph", "all nodes by influence: filter and go", actions.rank, "list"),
        Part("detect", "graph", "ablate the feature, or all of a supernode: what the graph predicts beside what happens", actions.check, "check"),
        Part(
            "scale",
            "graph",
            "steer the feature or supernode by a factor, or to a value: logits and pinned features, predicted beside true",
            actions.steer,
            "steer",
        ),
        Part("points", "graph", "pin the node, or let it go", actions.pin, "pin"),
        Part("labels", "graph", "name the node: nodes of one name are a supernode", actions.name, "name"),
        Part("multiples", "graph", "each supernode as one row, or its nodes", actions.turn_rows, "supernodes"),
        Part("discover", "graph", "propose supernodes of features with like decoders", actions.propose, "propose"),
        Part("open", "graph", "open a graph file, or go back to the prompt's own graph", actions.open_file, "open file"),
        Part("saes", "graph", "the transcoders of the graph", actions.choose_transcoders, "transcoders"),
        Part("ablate", "graph", "all features of a supernode", actions.ablate, "ablate"),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = GridView()
        self.row, self.col = 0, 0
        self.here, self.trail = "", []  # ids: the node at hand, and those before it with their rows
        self.file: tuple = ()  # the stamp of the file that was read, with its graph and marks, or why it is none
        self.fold: tuple = ()  # of which graph and names, and that graph folded

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
        """A request about the prompt's own graph; about a file's, with its run, position, target and transcoders."""
        study, target, which, sources = app.state.with_saes(app.study), app.state.views[self.view], self.which(app), app.state.transcoders
        if app.state.graph:
            r = self.whole(app)
            target, which, sources = r.target, r.which, r.sources
            study = replace(study, metric=replace(study.metric, pos=actions.position(app, r)))
        return kind(study, sources, which=which, target=target, **more)

    def wants(self, app: Host) -> dict[str, object]:
        return {"graph": self.asked(app)} if app.counted() and not app.state.graph else {}

    # ---------------------------------------------------------------- what is shown

    def of_file(self, app: Host) -> tuple[GraphResult, GraphMarks]:
        """The file's graph, read anew only when the file changed. UserError where it can't be read, as long as it stays so."""
        path = Path(app.state.graph)
        stamp = path, version(path)
        if not self.file or self.file[0] != stamp:
            try:
                self.file = (stamp, *read(path))
            except UserError as error:
                self.file = (stamp, str(error))
        if len(self.file) == 2:
            raise UserError(self.file[1])
        return self.file[1:]

    def whole(self, app: Host) -> GraphResult:
        """The graph at hand, node by node."""
        r = self.of_file(app)[0] if app.state.graph else app.requests.result("graph", GraphResult)
        if r is None:
            app.ready()
            raise UserError("there is no graph yet")
        return r

    def marks(self, app: Host) -> GraphMarks:
        """Pins and names of the graph at hand."""
        model = self.of_file(app)[1].model if app.state.graph else canonical(app.state.model.model)
        none = marks_of(self.whole(app), model)
        return next((m for m in app.state.marks if m.graph == none.graph), none)

    def shown(self, app: Host) -> GraphResult:
        """The graph that is walked: supernodes as one node where they are asked for."""
        r, marks = self.whole(app), self.marks(app)
        if app.state.views["graph.rows"] == "nodes" or not marks.names:
            return r
        if not self.fold or self.fold[0] is not r or self.fold[1] != marks.names:
            self.fold = r, marks.names, folded(r, dict(marks.names))
        return self.fold[2]

    def parts(self, app: Host, i: int) -> list[int]:
        """The nodes of the whole graph that a node of the shown one stands for."""
        r, g = self.whole(app), self.shown(app)
        if KINDS[g.kind[i]] != SUPERNODE:
            return [place(r, node_id(g, i))]
        return next(some for label, some in groups_of(r, dict(self.marks(app).names)).items() if title(label, some) == g.texts[i])

    def members(self, app: Host, i: int) -> tuple[str, ...]:
        """The ids of the features among these."""
        return features_of(self.whole(app), self.parts(app, i))

    # ---------------------------------------------------------------- the cursor

    def step(self, app: Host, rows: int, cols: int) -> None:
        if self.table.grid is not None:
            self.row, self.col = clip(self.row + rows, len(self.table.grid.rows)), clip(self.col + cols, len(self.table.grid.cols))
            app.draw()

    def under(self, app: Host) -> int:
        """The node under the cursor, of the shown graph; the one at hand where it has no edges."""
        r = self.shown(app)
        at = place(r, self.here)
        some = steps(r, at)
        return some[clip(self.row, len(some))].node if some else at

    def node(self, app: Host, pos: int | None) -> Node:
        """
        What is under the cursor, at its own position: a feature (its transcoder loaded by z in pane 6; of a supernode the first), a token's embedding, the MLP
        of an error, the last stream of a logit.
        """
        try:
            r, i = self.whole(app), self.parts(app, self.under(app))[0]
        except UserError:
            return Node("mlp", app.cursor.layer, pos=pos)
        layer, at, index = (int(x[i]) for x in (r.layer, r.at, r.index))
        match KINDS[r.kind[i]]:
            case "feature":
                return Node("sae", layer, index=index, pos=at)
            case "token":
                return Node("embed", pos=at)
            case "logit":
                return Node("resid_post", r.n_layers - 1, pos=at)
        return Node("mlp", layer, pos=at)

    def back(self, app: Host) -> bool:
        """To the node before in the walk."""
        if not self.trail:
            return False
        self.here, self.row = self.trail.pop()
        app.draw()
        return True

    def go(self, app: Host, i: int) -> None:
        self.trail.append((self.here, self.row))
        self.here, self.row = node_id(self.shown(app), i), 0
        app.draw()

    # ---------------------------------------------------------------- copying

    def copies(self, app: Host) -> list[Item]:
        there = app.state.graph or app.requests.result("graph", GraphResult) is not None
        return [Item("graph", "circuit-tracer's JSON, which o and `graph --open` read too", ".json", lambda: self.as_file(app))] if there else []

    def as_file(self, app: Host) -> str:
        return json.dumps(as_json(self.whole(app), time.strftime("graph-%Y-%m-%d-%H%M%S"), self.marks(app))) + "\n"

    def copied(self, app: Host, item: Item, path: Path) -> None:
        if item.key == "graph":
            enlist(path, json.loads(path.read_text(encoding="utf-8"))["metadata"])

    # ---------------------------------------------------------------- drawing

    def called(self, g: GraphResult, i: int, marks: GraphMarks) -> str:
        name = node_id(g, i)
        label = dict(marks.names).get(name)
        return f"{g.texts[i]}{' *' if name in marks.pins else ''}{f' “{label}”' if label else ''}"

    def picture_of(self, g: GraphResult, at: int, marks: GraphMarks) -> Grid:
        some, columns = steps(g, at), ["adds", "of inputs" if has_supernodes(g) else "share", "value", "influence"]
        rows = [f"{'←' if s.into else '→'} {self.called(g, s.node, marks)}" for s in some] or ["no edges"]
        weight = g.weight[[s.edge for s in some]] if some else np.full(1, np.nan)
        facts = [[(g.weight[s.edge], 7), (g.share[s.edge], 7), (g.value[s.node], 7), (g.influence[s.node], 7)] for s in some]
        text = [[" " if np.isnan(x) else show_number(x, n).strip() for x, n in line] for line in facts] or [[""] * len(columns)]
        hi = max(float(np.nanmax(np.abs(weight), initial=0)), 1e-6)
        values = np.full((len(rows), len(columns)), np.nan)
        values[:, 0] = weight
        numbers = np.array([[x for x, _ in line] for line in facts] or [[np.nan] * len(columns)], float)
        return Grid(values, rows, columns, -hi, hi, text=text, numbers=numbers, signed=True, cell=(8, 11), corner="inputs ←, outputs →", listed=False)

    def name_of(self, app: Host) -> str:
        """Where the graph comes from: its file, or the prompt's run."""
        return Path(app.state.graph).name if app.state.graph else run_name(app.state, self.whole(app).which)

    def paint(self, app: Host) -> None:
        mode = app.state.views["mode"]
        try:
            r, g, marks = self.whole(app), self.shown(app), self.marks(app)
        except UserError as error:
            file = app.state.graph
            self.show_title(app, ("graph",), Path(file).name if file else run_name(app.state, self.which(app)), "")
            self.table.show(None, (0, 0), mode, [(f"  {visible(str(error))}", BAD)] if file else app.requests.waiting("graph"))
            self.info_line.show([])
            return
        at = place(g, self.here)
        grid = self.picture("graph", (Same(g), at, marks), lambda: self.picture_of(g, at, marks))
        self.row = clip(self.row, len(grid.rows))
        scores = f"replacement {r.replacement:.3f} · completeness {r.completeness:.3f}"
        self.show_title(app, ("graph",), f"{self.called(g, at, marks)} · {self.name_of(app)} · {scores}", r.convention, grid)
        self.table.show(grid, (self.row, self.col), mode)
        self.info_line.show([self.about_node(app, g, at)])

    def about_node(self, app: Host, g: GraphResult, at: int) -> Spans:
        made, some = balance(g, at), self.members(app, at) if KINDS[g.kind[at]] == "supernode" else ()
        name = node_id(g, at) if not some else g.texts[at]
        of = f"of {app.state.model.model}" if not app.state.graph else f"of {self.marks(app).model}: {''.join(g.tokens.texts)}"
        more = " ".join(some) if some else of if app.state.graph else ""
        parts = [x for x in (made, more, f"{len(g.kind)} nodes, {len(g.weight)} edges") if x]
        spans = [(f"{'  │  ' * bool(n)}{x}", PLAIN if x is made else DIM) for n, x in enumerate(parts)]
        return [(f" {name}  ", BOLD), *spans]


PANE = GraphPane
