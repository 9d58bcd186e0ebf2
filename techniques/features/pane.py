"""Pane 6: an SAE's features at the cursor's position, what each one does, examples, and the graph between two SAEs."""

import re
from dataclasses import replace

import numpy as np
from textual.containers import Horizontal
from textual.widget import Widget

from techniques.features.requests import (
    Examples,
    ExamplesResult,
    Feature,
    FeatureGraph,
    FeatureGraphResult,
    FeatureResult,
    Features,
    FeaturesResult,
    Preflight,
    PreflightResult,
)
from vocabulary.nodes import Node, UserError
from screen.actions import turned, turns
from screen.cursor import clip
from screen.keys import FEATURES, Action, Part
from screen.overlays import Item
from screen.pane import Host, Pane
from screen.pictures import run_name, texts_of
from techniques.features import actions
from techniques.features.explained import EXPLAINED
from techniques.features.pictures import detail_lines, example_lines, feature_lines, graph_lines, preflight_lines
from screen.textview import text_grid
from utils import show_token
from widgets import BOLD, DIM, PLAIN, Grid, Lines, Spans


def layer_of(source: str, app: Host) -> int:
    got = app.known_saes.get(source)
    return got.layer if got is not None else -1


class FeaturePane(Pane):
    number, key, label, about = "6", "features", "Features", "an SAE's features at the cursor's position, examples, graph"
    view, text_view = "features.view", "features.text"
    explained = EXPLAINED
    views = {
        "features.view": ("features", "examples", "graph", "preflight"),
        "features.order": ("activation", "attribution", "direct"),
        "features.text": ("off", "on"),
    }
    leads_on = (PreflightResult, FeaturesResult)
    hints = ("enter", "ablate", "scale", "saes", "view", "points", "sweep", "weighted")
    keys = (
        Part("enter", "features", "walk the graph", lambda pane, app: pane.enter(app), "walk graph"),
        Part("scale", "a feature", "scale, set or steer", actions.steer),
        Action("saes", "z", "SAEs", "SAEs and transcoders: load, switch, put away", FEATURES, actions.choose_saes, "discover"),
        Part("points", "features", "by activation, attribution, direct", turns("features.order"), "order"),
        Part("sweep", "features", "examples in a text", lambda pane, app: pane.run_examples(app), "examples"),
        Part("weighted", "features", "error term kept or dropped", actions.turn_error, "error"),
        Part("detect", "features", "check the edge by the real intervention", actions.check_edge, "check edge"),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.list, self.side = Lines(classes="second"), Lines(classes="second")
        self.index = 0  # the feature under the cursor
        self.row, self.source, self.order = 0, "", ""
        self.trail: list[tuple[str, int, int]] = []  # walked from, in the graph: SAE, feature, position

    def body(self) -> Widget:
        return Horizontal(self.list, self.side, self.text)

    def reads(self, app: Host) -> bool:
        return super().reads(app) and bool(app.state.sae) and app.state.views[self.view] in ("features", "examples")

    def grids(self) -> dict[str, Grid]:
        return {"text": self.text.grid} if self.text.grid else {}

    def height_needed(self) -> int:
        return 24

    # ---------------------------------------------------------------- what is asked

    def which(self, app: Host) -> str:
        which = app.state.views["which"]
        return which if "-" not in which else "now"

    def examples(self, app: Host) -> Examples:
        return Examples(app.state.sae, indices=(self.index,))

    def scatters(self, app: Host) -> Examples | None:
        return self.examples(app) if app.state.sae and app.state.views[self.view] == "examples" else None

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        if not isinstance(request, Examples):
            return False
        if len(request.indices) != 1 or request.source not in app.state.saes:
            return False
        if app.state.sae != request.source:
            app.act("show_sae", source=request.source)
        turned(app, app.state.base, {self.view: "examples"})
        self.index, self.source = request.indices[0], request.source
        return True

    def graph(self, app: Host) -> FeatureGraph | None:
        """From the loaded SAE of the nearest layer below into the feature under the cursor."""
        here = layer_of(app.state.sae, app)
        below = [s for s in app.state.saes if 0 <= layer_of(s, app) < here]
        if not below:
            return None
        up = max(below, key=lambda s: layer_of(s, app))
        return FeatureGraph(app.study, up, app.state.sae, self.index, app.cursor.pos, self.which(app))

    def preflight(self, app: Host, source: str) -> Preflight:
        return Preflight(replace(app.study, interventions=(), saes=()), source)

    def variants(self, app: Host) -> tuple[str, ...]:
        views = app.state.views
        return (views[self.view], *([f"order={views['features.order']}"] if views[self.view] == "features" else []))

    def doing(self, app: Host) -> list[tuple[str, str]]:
        return [("esc", "walk back")] if self.trail else []

    def shows(self, node: Node) -> bool:
        return node.site == "sae"

    def go_to(self, app: Host, node: Node) -> str:
        """Put the cursor on a feature of a loaded SAE; what stops that, or ""."""
        source = next((s for s in app.state.saes if layer_of(s, app) == node.layer), None)
        if source is None:
            return f"{node}: no SAE of layer {node.layer} is loaded, z loads one"
        if node.index >= app.known_saes[source].d_sae:
            return f"{node}: {source} has features 0 to {app.known_saes[source].d_sae - 1}"
        if source != app.state.sae:
            app.act("show_sae", source=source)
        self.index, self.source = node.index, source
        app.refresh_wants()
        return ""

    def find(self, app: Host, needle: str) -> list[dict]:
        """f690, or a token."""
        if re.fullmatch(r"f[0-9]{1,9}", needle) and layer_of(app.state.sae, app) >= 0:
            if wrong := self.go_to(app, Node("sae", layer_of(app.state.sae, app), index=int(needle[1:]))):
                raise UserError(wrong)
            return [{"pos": app.cursor.pos}]
        return super().find(app, needle)

    def wants(self, app: Host) -> dict[str, object]:
        state, source = app.state, app.state.sae
        if not source:
            return {}
        wants: dict[str, object] = {"preflight": self.preflight(app, source)}
        got = app.requests.answer_to(wants["preflight"], PreflightResult, "preflight")
        if got is None or got.verdict == "refuse" or not app.counted():
            return wants
        wants["features"] = Features(app.study, source, self.which(app), app.cursor.pos, state.views["features.order"], 60)
        view = state.views[self.view]
        listed = app.requests.result("features", FeaturesResult)
        if listed is not None and listed.info.source == source:
            if (self.source != source or self.order not in ("", listed.order)) and listed.index.size:  # a newly loaded SAE, or another order: its first feature
                self.source, self.row, self.index = source, 0, int(listed.index[0])
            self.order = listed.order
            wants["feature"] = Feature(app.study, source, self.index, self.which(app), app.cursor.pos)
        if view == "graph" and (graph := self.graph(app)) is not None:
            wants["feature_graph"] = graph
        if view == "examples" and (self.examples(app) in app.requests.started or app.requests.at_hand(self.examples(app)) is not None):
            wants["examples"] = self.examples(app)
        return wants

    # ---------------------------------------------------------------- the cursor

    def rows(self, app: Host) -> int:
        if app.state.views[self.view] == "graph":
            got = app.requests.result("feature_graph", FeatureGraphResult)
            return len(got.index) if got is not None else 0
        got = app.requests.result("features", FeaturesResult)
        return len(got.index) if got is not None else 0

    def step(self, app: Host, rows: int, cols: int) -> None:
        if cols:
            app.move(pos=self.text.walk(app.cursor.pos, 0, cols) if self.reads(app) else clip(app.cursor.pos + cols, app.length()))
        if rows and (n := self.rows(app)):
            listed = app.requests.result("features", FeaturesResult)
            if app.state.views[self.view] != "graph" and listed is not None:  # from one that is not listed, to the first
                self.row = listed.index.tolist().index(self.index) if self.index in listed.index.tolist() else -1
            self.row = clip(self.row + rows, n)
            if app.state.views[self.view] != "graph" and listed is not None:
                self.index = int(listed.index[self.row])
            app.refresh_wants()

    def node(self, app: Host, pos: int | None) -> Node:
        if layer_of(app.state.sae, app) < 0:
            return super().node(app, pos)
        return Node("sae", layer_of(app.state.sae, app), index=self.index, pos=pos)

    def enter(self, app: Host) -> None:
        """In the graph: go to the feature that the edge comes from."""
        app.ready()
        if app.state.views[self.view] != "graph":
            raise UserError("⏎ walks the graph between two SAEs: v turns to it")
        got = app.requests.result("feature_graph", FeatureGraphResult)
        if got is None or not len(got.index):
            raise UserError("there is no edge to walk yet")
        row = clip(self.row, len(got.index))
        self.trail.append((app.state.sae, self.index, app.cursor.pos))
        self.index, self.row, self.source = int(got.index[row]), 0, got.up.source
        app.act("show_sae", source=got.up.source)
        app.move(pos=int(got.at[row]))
        app.say(f"L{got.up.layer}.sae.f{self.index}@{int(got.at[row])}: esc goes back")

    def run_examples(self, app: Host) -> None:
        """S: examples of the feature under the cursor."""
        app.ready()
        if not app.state.sae:
            raise UserError("no SAE is loaded: z lists those that fit the model")
        app.requests.started.add(self.examples(app))
        if app.state.views[self.view] != "examples":
            app.act("view", name=self.view, value="examples")
        app.refresh_wants()

    def back(self, app: Host) -> bool:
        if not self.trail:
            return False
        source, self.index, pos = self.trail.pop()
        self.source = source
        if source in app.state.saes:
            app.act("show_sae", source=source)
        app.move(pos=clip(pos, app.length()))
        return True

    def copies(self, app: Host) -> list[Item]:
        got = app.requests.result("feature", FeatureResult)
        if got is None or not got.neuronpedia:
            return []
        return [Item("neuronpedia", got.neuronpedia, ".txt", lambda: f"{got.neuronpedia}\n"), Item("page", got.address, ".txt", lambda: f"{got.address}\n")]

    # ---------------------------------------------------------------- drawing

    def paint(self, app: Host) -> None:
        state, view, source = app.state, app.state.views[self.view], app.state.sae
        narrow, n = self.size.width < 76, max(3, self.size.height - 3)
        self.list.styles.width = "1fr" if narrow else min(58, max(44, self.size.width * 11 // 20))
        self.side.set_class(narrow and view == "features" and self.size.height < 30, "hidden")
        self.list.set_class(self.reads(app) and narrow, "hidden")
        flight = app.requests.result("preflight", PreflightResult) if source else None
        reads = flight is not None and flight.info.source == source and flight.verdict != "refuse" and self.swap(app, self.side)
        if not reads:
            self.text.set_class(True, "hidden")
            self.text.grid = None
        self.list.set_class(reads and narrow, "hidden")
        if flight is None or flight.info.source != source:
            self.paint_without(app)
            return
        app.known_saes[source] = flight.info
        bad = "" if flight.verdict == "good" else f" · {flight.verdict.upper()}: cosine {flight.cosine:.3f}"
        hook = flight.info.hook.replace("blocks.", "L").replace(".hook_", ".")
        title = f"{view} · {source}{'' if source.endswith(hook) else f' at {hook}'}{bad}"
        ways = f"{flight.info.view} activation · error term {'kept' if state.sae_error else 'dropped'}"
        if view == "preflight" or flight.verdict == "refuse":
            self.show_title(app, ("preflight",), f"{title} · {ways}", flight.convention)
            self.alone(preflight_lines(flight)[:n])
            return
        got = app.requests.result("features", FeaturesResult)
        if view == "graph":
            self.paint_graph(app, f"{title} · {ways}", n)
        elif got is None or got.info.source != source:
            self.show_title(app, ("features",), f"{title} · {ways}", "")
            self.list.show([app.requests.waiting("features")])
        else:
            place = f"{got.pos} {show_token(texts_of(got.tokens)[got.pos])}"
            said = f"{title} · {place} by {got.order} · {run_name(state, got.which)} · {ways}"
            self.show_title(app, ("features", "feature"), said, got.convention)
            detail = app.requests.result("feature", FeatureResult)
            mine = detail is not None and (detail.index, detail.info.source, detail.tokens) == (self.index, source, got.tokens)
            here = float(detail.activation[got.pos]) if mine else np.nan
            self.list.show(feature_lines(got, self.index, n, self.size.width if narrow else self.list.styles.width.value, here))
        if reads:
            self.paint_text(app)
            return
        self.paint_side(app, max(24, self.size.width - int(self.size.width // 2 if narrow else self.list.styles.width.value) - 3), n)
        active = [i for i in state.interventions if i.node.site == "sae"]
        loaded = f"{len(state.saes)} SAEs loaded: {' '.join(state.saes)}  "
        self.info_line.show([[(f" {self.node(app, None)} ", BOLD), (loaded, DIM), (" ".join(map(str, active)), PLAIN)]])

    def paint_text(self, app: Host) -> None:
        """The prompt by the activation of the feature under the cursor."""
        detail, grid = app.requests.result("feature", FeatureResult), None
        if detail is not None and detail.index == self.index and detail.info.source == app.state.sae:
            top = max(float(detail.activation.max(initial=0)), 1e-6)
            grid = text_grid(f"f{detail.index} {detail.label}".strip(), texts_of(detail.tokens), detail.activation, 0.0, top)
        self.show_text(app, grid, app.requests.waiting("feature") if "feature" in app.requests.wanted else [])

    def alone(self, lines: list[Spans]) -> None:
        """Lines over the pane's whole width, and nothing beside or below them."""
        self.list.styles.width = "1fr"
        self.side.set_class(True, "hidden")
        self.list.show(lines)
        self.info_line.show([])

    def paint_without(self, app: Host) -> None:
        """No SAE, or one that is not there yet."""
        source = app.state.sae
        if not source:
            self.show_title(app, (), "no SAE loaded", "")
            hint = "  (sae_lens is imported then: about 14 s the first time)"
            self.alone([[("  z lists the SAEs and transcoders that fit this model", PLAIN)], [(hint, DIM)]])
            return
        wrong = app.requests.error("preflight")
        self.show_title(app, ("preflight",), f"{source} · {'not loaded' if wrong else 'loading'}", "")
        hint = "  z puts it away, or loads another one" if wrong else "  sae_lens is imported first (about 14 s), then the preflight runs"
        self.alone([app.requests.waiting("preflight"), [(hint, DIM)]])

    def paint_side(self, app: Host, width: int, n: int) -> None:
        """Beside the list: examples, or what the feature under the cursor does."""
        requests, source = app.requests, app.state.sae
        if app.state.views[self.view] == "examples":
            found = requests.result("examples", ExamplesResult)
            if found is not None and found.indices == (self.index,) and found.info.source == source:
                self.side.show(example_lines(found, width)[:n])
            else:
                waits = "examples" in requests.wanted
                self.side.show([requests.waiting("examples") if waits else [("  S looks for examples in the text (a job)", DIM)]])
            return
        detail = requests.result("feature", FeatureResult)
        if detail is not None and detail.index == self.index and detail.info.source == source:
            self.side.show(detail_lines(detail, width)[:n])
        else:
            self.side.show([requests.waiting("feature")] if "feature" in requests.wanted else [])

    def paint_graph(self, app: Host, title: str, n: int) -> None:
        got, request = app.requests.result("feature_graph", FeatureGraphResult), self.graph(app)
        if request is None:
            self.show_title(app, (), title, "")
            self.list.show([[("  the graph needs an SAE of a layer below: z loads another one", DIM)]])
            return
        if got is None:
            self.show_title(app, ("feature_graph",), title, "")
            self.list.show([app.requests.waiting("feature_graph")])
            return
        self.show_title(app, ("feature_graph",), f"{title} · into f{got.target}@{got.pos} from {got.up.source}", got.convention)
        self.list.show(graph_lines(got, clip(self.row, len(got.index)), n))


PANE = FeaturePane
