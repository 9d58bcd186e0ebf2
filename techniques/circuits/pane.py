"""Pane 5: the circuit kept so far, paths to and from nodes, scores, discovery's curve, comparison."""

import math
from dataclasses import replace

from textual.containers import Horizontal
from textual.widget import Widget

from techniques.circuits import drawings
from techniques.circuits.requests import PathPatch, Score, ScoreResult
from techniques.patching.requests import SweepResult
from vocabulary.circuit import connected, LOGITS
from vocabulary.nodes import Node, parse_node, UserError
from vocabulary.prompts import Study
from screen.actions import own_circuit, turns
from screen.cursor import clip
from screen.keys import CIRCUIT, Action, Part
from screen.maps import columns_of
from screen.pane import Host, Pane
from screen.replies import Reply
from techniques.circuits import actions, discovery, files, path_view, shards, walk
from techniques.circuits.explained import EXPLAINED
from techniques.circuits.graph import Graph
from techniques.circuits.pictures import NO_CIRCUIT, about_node, all_scores, compared, curve, listing, map_grid, members, scored_over, summary, wrap
from widgets import BAD, DIM, PLAIN, Grid, GridView, Lines, Same, Spans

FULL = ("faithfulness", "effects", "completeness", "minimality")


VIEWS_OF = {
    "circuit.view": ("drawing", "map", "edges", "list", "path", "scores", "curve", "compare"),
    "circuit.rest": ("patch", "mean", "resample", "zero", "mean_all", "mean_text", "mean_text_pos"),
    "circuit.mlps": ("stay", "count"),
    "circuit.by": ("auto", "nodes", "edges"),
    "circuit.path": ("direct", "mlps"),
    "circuit.each": ("sender", "position", "receiver"),
    "circuit.over": ("set", "prompt"),
}


class CircuitPane(Pane):
    number, key, label, about = "5", "circuit", "Circuit", "what was kept, paths, scores, discovery"
    view = "circuit.view"
    explained = EXPLAINED
    views = VIEWS_OF
    hints = ("enter", "keep", "circuits", "receivers", "discover", "view", "source", "points", "sweep", "operation", "weighted")
    keys = (
        Part("enter", "paths", "keep the edge", lambda pane, app: pane.enter(app), "keep edge"),
        Action("keep", "c", "keep", "Keep the node under the cursor in the circuit; again to drop it", CIRCUIT, actions.keep, "scope"),
        Action("circuits", "Y", "circuits", "Circuits: new, open, groups, union, compare, save, export, what the rest is set to", CIRCUIT, files.choose_circuit, "keep"),
        Action("receivers", "Q", "receivers", "Where paths end: q, k, v of heads, MLPs, logits; or where those to each receiver begin: a node, some together, a group",
               CIRCUIT, actions.choose_receivers, "circuits"),
        Action("discover", "U", "discover", "Find a circuit: EAP, EAP-IG, ACDC or greedy, as a job", CIRCUIT, discovery.choose_method, "receivers"),
        Part("source", "circuit", "over the prompt or the set", turns("circuit.over")),
        Part("points", "paths", "from every sender, by position, or to each receiver", turns("circuit.each")),
        Part("sweep", "circuit", "score it, or run the paths", lambda pane, app: pane.run(app), "score"),
        Part("operation", "circuit", "what the rest is set to", turns("circuit.rest"), "rest"),
        Part("weighted", "paths", "direct edge or through MLPs", turns("circuit.path")),
        Part("ranked", "", "", actions.rank_paths),
    )  # fmt: skip

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.side = GridView(), Lines(classes="second")
        self.left: tuple | None = None  # where the cursor was left when it went to the embeddings' row of the paths, or to a node of the drawing; and that
        self.edge = ""  # of the node under the cursor: the one that , and . chose
        self.laid: Graph | None = None  # the rows of the drawing as they are on the screen
        self.top = 0  # the first line shown beside the map
        self.last: Reply | None = None  # the last scores; their request without groups
        self.found: dict[str, Reply] = {}  # of circuits that were discovered here, by name
        self.coming: tuple[str, object] = ("", None)  # the folder of a discovery that is drawn while its tasks run, and the circuit that was current then

    def body(self) -> Widget:
        return Horizontal(self.map, self.side)

    def grids(self) -> dict[str, Grid]:
        return {"circuit": self.map.grid} if self.map.grid else {}

    def height_needed(self) -> int:
        return max(22, 3 + 2 * len(self.laid.rows)) if self.laid is not None else 22

    # ---------------------------------------------------------------- what is asked

    def study(self, app: Host) -> Study:
        over = app.state.views["circuit.over"] == "set" and app.state.members
        needs = app.state.views["circuit.rest"] in ("mean", "mean_all", "resample")
        study = replace(app.study, interventions=(), base="clean", prompt_set=app.state.members if over or needs else (), saes=(), sae_error=True)
        study = replace(study, prompt=app.state.prompt_set[0]) if over else study  # the same for every prompt of the set
        current = app.state.current
        return app.state.with_saes(study) if current is not None and any(parse_node(n).site == "sae" for n in current.nodes) else study

    def score(self, app: Host, what: tuple[str, ...] = ("faithfulness", "effects")) -> Score | None:
        views, circuit = app.state.views, app.state.current
        if circuit is None or not circuit.nodes:
            return None
        plain = replace(circuit, name="the circuit", found="", groups=circuit.groups if "completeness" in what else {})  # names do not change a score
        return Score(self.study(app), plain, what, views["circuit.rest"], self.by_edges(app), mlps=views["circuit.mlps"] == "count")

    @staticmethod
    def by_edges(app: Host) -> bool:
        """Whether the circuit is scored by its edges: when they lead from embed to the logits, unless Y says otherwise."""
        by, circuit = app.state.views["circuit.by"], app.state.current
        return by == "edges" or by == "auto" and circuit is not None and bool(circuit.edges) and connected(circuit, app.info)

    def path(self, app: Host) -> PathPatch:
        state, views = app.state, app.state.views
        over = views["circuit.over"] == "set" and bool(state.members)
        study = replace(app.study, prompt_set=state.prompt_set if over else ())
        study = replace(study, prompt=state.prompt_set[0]) if over else study
        direction = "noise" if state.base == "clean" else "denoise"
        if views["circuit.each"] == "receiver":
            node = super().node(app, None)
            sender = str(Node("mlp", node.layer)) if node.site == "mlp" else str(Node("head", node.layer or 0, app.cursor.head))
            return PathPatch(study, state.senders or (sender,), (), "receiver", views["circuit.path"], direction, over_set=over)
        return PathPatch(study, (), state.receivers, "sender", views["circuit.path"], direction, views["circuit.each"] == "position", over)

    def request(self, app: Host) -> object | None:
        """What S runs in this view."""
        view = app.state.views[self.view]
        if view == "path":
            return self.path(app)
        return self.score(app, FULL if view == "scores" else ("faithfulness", "effects"))

    def wants(self, app: Host) -> dict[str, object]:
        request = self.request(app)
        slot = "path" if isinstance(request, PathPatch) else "score"
        return {slot: request} if request is not None and request in app.requests.started else {}

    def scored(self, app: Host) -> ScoreResult | None:
        """The scores of the circuit as it stands, the fullest there are; subsets of groups that were named later are not among them."""
        nameless = lambda r: replace(r, what=(), circuit=replace(r.circuit, groups={}))  # noqa: E731
        request = None
        for what in (FULL, ("faithfulness", "effects")):
            request = self.score(app, what)
            got = app.requests.answer_to(request, ScoreResult) if request is not None else None
            if got is not None:
                self.last = Reply(nameless(request), got, model=app.requests.model)
                return got
        last = self.last if self.last is not None and self.last.model is app.requests.model else None
        return last.of(nameless(request), ScoreResult) if last is not None and request is not None else None

    def discovered(self, app: Host) -> Reply | None:
        """How the current circuit was found, if that was here and on this model."""
        reply = self.found.get(app.state.circuit)
        return reply if reply is not None and reply.model == app.requests.model else None

    def scatters(self, app: Host) -> object | None:
        return shards.scatters(self, app)

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        return shards.turn_to(self, app, request, result)

    def paths(self, app: Host) -> SweepResult | None:
        """The effects of the paths that are asked for now, whole or as far as they are."""
        return app.requests.answer_to(self.path(app), SweepResult, "path")

    def run(self, app: Host) -> None:
        """S: what the view shows."""
        app.ready()
        request = self.request(app)
        if request is None:
            raise UserError("there is no circuit yet: c keeps the node under the cursor, Y opens one, U finds one")
        if isinstance(request, PathPatch) and not app.state.compares and not request.over_set:
            raise UserError("path patching takes values from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        app.requests.start(request)

    # ---------------------------------------------------------------- the cursor

    def cell(self, app: Host, result: SweepResult | None) -> tuple[int, int]:
        c = app.cursor
        if result is not None and result.rows[-1] == LOGITS:
            return clip(c.layer, len(result.rows)), clip(3 * c.head if c.comp == "head" else len(result.cols) - 1, len(result.cols))
        if result is not None and self.by_pos(result):
            node = str(self.node(app, None))
            return result.rows.index(node) if node in result.rows else 0, clip(c.pos, len(result.cols))
        if result is not None and self.embed(app):
            return 0, 0
        return c.layer + (result is not None), c.head if c.comp == "head" else app.info.n_heads

    def step(self, app: Host, rows: int, cols: int) -> None:
        c, n, view = app.cursor, app.info.n_heads, app.state.views
        if (graph := walk.drawn(self, app)) is not None and graph.edges:
            walk.step(self, app, graph, rows, cols)
            return
        result = self.paths(app) if view[self.view] == "path" and view["circuit.each"] != "receiver" else None
        if result is not None and self.by_pos(result):
            row, col = self.cell(app, result)
            node = parse_node(result.rows[clip(row + rows, len(result.rows))])
            where = {} if node.site == "embed" else {"layer": node.layer, "comp": node.site} | ({"head": node.head} if node.site == "head" else {})
            app.move(pos=clip(col + cols, len(result.cols)), **where)
            self.left = (self.here(app), "embed") if node.site == "embed" else None
            app.draw()
            return
        if result is not None and (self.embed(app) or rows < 0 and c.layer == 0):  # the row of the embeddings, above layer 0
            self.left = (self.here(app), "embed") if rows <= 0 else None
            app.draw()
            return
        self.left = None
        col = clip((c.head if c.comp == "head" else n) + cols, n + 1)
        where = {"comp": "head", "head": col} if col < n else {"comp": "mlp"}
        app.move(layer=clip(c.layer + rows, app.info.n_layers), **where)

    def variants(self, app: Host) -> tuple[str, ...]:
        view = app.state.views[self.view]
        return (view, f"path={app.state.views['circuit.path']}") if view == "path" else (view,)

    def doing(self, app: Host) -> list[tuple[str, str]]:
        if app.state.views[self.view] == "path":
            return [("S", "run the paths"), ("Q", "receivers")]
        walks = [("hjkl", "walk its edges"), (", .", "choose an edge")] if (graph := walk.drawn(self, app)) is not None and graph.edges else []
        return walks + ([("S", "score it")] if app.state.circuits else [])

    def shows(self, node: Node) -> bool:
        return node.site != "sae" and not node.site.startswith("resid")

    def node(self, app: Host, pos: int | None) -> Node:
        c, graph = app.cursor, walk.drawn(self, app)
        if graph is not None and graph.edges and (node := walk.node(self, app, graph, pos)) is not None:
            return node
        if self.embed(app):
            return Node("embed", pos=pos)
        return Node("head", c.layer, c.head, pos=pos) if c.comp == "head" else Node("mlp", c.layer, pos=pos)

    @staticmethod
    def here(app: Host) -> tuple:
        return app.cursor.layer, app.cursor.comp, app.cursor.head

    def embed(self, app: Host) -> bool:
        """Whether the cursor stands on the embeddings: until it goes anywhere else."""
        return self.left == (self.here(app), "embed") and app.state.views[self.view] == "path" and app.state.views["circuit.each"] != "receiver"

    @staticmethod
    def by_pos(result: SweepResult) -> bool:
        """Rows of senders, columns of positions."""
        return result.cols[-1].isdigit()

    def across(self, app: Host, by: int) -> None:
        """The lines beside the map; in the drawing the edge that is followed."""
        if (graph := walk.drawn(self, app)) is not None and graph.edges:
            walk.turn(self, app, graph, by)
            return
        self.top = max(0, self.top + by * max(1, self.size.height // 2))
        app.draw()

    def enter(self, app: Host) -> None:
        """In the paths: the edges from the node under the cursor to the receivers, kept or dropped."""
        app.ready()
        if app.state.views[self.view] != "path" or app.state.views["circuit.each"] == "receiver":
            raise UserError("⏎ keeps the path under the cursor, where rows are senders: P turns to them (in the path view); c keeps a node anywhere")
        sender = str(self.node(app, None))
        own_circuit(app)
        for receiver in app.state.receivers:
            app.act("keep", part=f"{sender}->{receiver}")
        did = "kept" if f"{sender}->{app.state.receivers[-1]}" in app.state.current.edges else "dropped"
        by_nodes = app.state.views["circuit.by"] == "auto" and not connected(app.state.current, app.info)
        more = "; scored by nodes until its edges lead from embed to logits" if by_nodes else ""
        app.say(f"{sender} → {', '.join(app.state.receivers)}: {did}{more}")

    # ---------------------------------------------------------------- drawing

    def paint(self, app: Host) -> None:
        state, views = app.state, app.state.views
        view, circuit, coming = views[self.view], shards.drawn(self, app), shards.coming(self, app)
        name = files.heading(app) if coming is None else f"{coming.method}'s mean scores so far"
        if app.info is None:
            self.show_title(app, ("path", "score"), name, "")
            self.map.show(None, (0, 0), views["mode"], [(f"  {app.busy}", DIM)])
            self.side.show([])
            self.info_line.show([])
            return
        if view == "path":
            self.map.set_class(False, "hidden")
            path_view.paint(self, app)
            return
        result = self.scored(app) if coming is None else None
        parts = members(circuit) if circuit else {}
        effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else {}
        grid = self.picture("circuit", (circuit, Same(result)), lambda: map_grid(app.info, parts, effects, result.floor if result is not None else math.nan))
        self.side.styles.width = "1fr"
        graph = walk.drawn(self, app)
        walks = graph is not None and bool(graph.edges)
        self.map.set_class(walks, "hidden")
        mapped = self.map.styles.width = columns_of(grid, max(self.size.width // 2, self.size.width - 60), self.size.height - 2, views["mode"]) + 1
        self.map.show(grid, self.cell(app, None), views["mode"])
        if walks:
            self.side.show(walk.picture(self, app, graph, result, effects))
        else:
            self.laid = None
            self.paint_side(app, result, max(20, self.size.width - mapped - 3))
        score = (some := app.requests.scattered.partial(coming or result)) and f" · {some[:-3]}"
        score += f" · faithfulness {result.faithfulness.mean:.3f} {scored_over(state, self.study(app))}" if result is not None else ""
        busy = app.requests.left("score") if "score" in app.requests.wanted and app.requests.stale("score") else ""
        self.show_title(app, ("score",), f"{view}{score}{busy} · {name}", self.note(app, coming or result))
        about = about_node(str(self.node(app, None)).split("@")[0], circuit, effects)
        self.info_line.show([about[:1] + walk.about_edge(self, app, graph) + about[1:] if walks else about])

    def note(self, app: Host, result: ScoreResult | None) -> str:
        """How the circuit is scored, beside the title."""
        views, circuit = app.state.views, app.state.current
        if views[self.view] == "curve":
            return "how it was found is in its title"
        by = "by edges" if circuit is not None and circuit.edges and self.by_edges(app) else f"by nodes, MLPs {views['circuit.mlps']}"
        note = result.convention if result is not None else f"{by}, rest {views['circuit.rest']}, {scored_over(app.state, self.study(app))}"
        left_out = app.state.interventions and app.state.enabled and views[self.view] != "compare"
        return f"interventions left out · a circuit is one of the model itself · {note}" if left_out else note

    def paint_side(self, app: Host, result: ScoreResult | None, width: int) -> None:
        """Beside the map: what the view names, scrolled."""
        n = max(3, self.size.height - 3)
        lines = self.lines(app, result, width, n)
        self.top = clip(self.top, len(lines))
        more = len(lines) - self.top > n
        self.side.show(lines[self.top : self.top + n - more] + [[(f"… {len(lines) - self.top - n + 1} more lines: . and , scroll", DIM)]] * more)

    def lines(self, app: Host, result: ScoreResult | None, width: int, n: int) -> list[Spans]:
        circuit, requests = app.state.current, app.requests
        match app.state.views[self.view]:
            case "scores":
                if result is not None:
                    return all_scores(result, width)
                if error := requests.error("score"):
                    return [[(line, BAD)] for line in wrap(error, width)]
                hint = [("  S scores the circuit: faithfulness, completeness, minimality", DIM)]
                return [requests.waiting("score") if "score" in requests.wanted else hint]
            case "curve":
                found = self.discovered(app) if circuit else None
                return curve(found, width, n, scored_over(app.state, found.request.study) if found else "")
            case "compare":
                return compared(requests.reply("compare"), circuit, width)
            case _ if circuit is None:
                return [[(line, PLAIN)] for text in NO_CIRCUIT for line in wrap(text, width)]
            case "drawing":
                return walk.without_edges(self, app, result, width, n)
            case "edges":
                effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else None
                return [[(line, PLAIN)] for line in drawings.draw(circuit, effects, width)]
            case "list":
                return listing(circuit, result)
        return summary(circuit, result, width)


PANE = CircuitPane
