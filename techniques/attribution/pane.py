"""Pane 3: what every component writes straight into the logits; by source position or neuron; over the set."""

from dataclasses import replace

from textual.containers import Horizontal
from textual.widget import Widget

from techniques.attribution.requests import (
    Attribution,
    AttributionNeurons,
    AttributionNeuronsResult,
    AttributionResult,
    AttributionSet,
    AttributionSetResult,
    AttributionSources,
    AttributionSourcesResult,
)
from vocabulary.nodes import Node, UserError
from screen.actions import no_members, turned
from screen.cursor import clip
from screen.keys import FIND, Action, Part
from screen.maps import columns_of
from screen.pane import Host, Pane, step_component
from screen.pictures import head_map_addresses, run_name, texts_of
from techniques.attribution import pictures
from screen.textview import text_grid
from techniques.attribution.explained import EXPLAINED
from utils import show_token
from widgets import BAD, DIM, Grid, GridView, Lines, Same


class AttributionPane(Pane):
    number, key, label, about = "3", "attribution", "Attribution", "direct logit attribution of every component"
    view, text_view = "attribution.view", "attribution.text"
    explained = EXPLAINED
    views = {"attribution.view": ("ranked", "drill", "set"), "attribution.text": ("off", "on")}
    hints = ("enter", "edit", "ablate", "patch", "scope", "keep", "enable", "undo", "view", "mode", "which")
    keys = (
        Part("enter", "attribution", "by source or neuron", lambda pane, app: pane.enter(app), "sources, neurons"),
        Action("worst", "W", "worst prompt", "Attribution over the set: go to the prompt with the lowest logit difference", FIND, lambda pane, app: pane.worst(app), "points"),
    )  # fmt: skip

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.side = GridView(), Lines(classes="second")
        self.walking = False  # whether the keys move in the text

    def body(self) -> Widget:
        return Horizontal(self.map, self.side, self.text)

    def grids(self) -> dict[str, Grid]:
        return {n: v.grid for n, v in (("attribution", self.map), ("text", self.text)) if v.grid}

    def wants(self, app: Host) -> dict[str, object]:
        state, c, which = app.state, app.cursor, app.state.views["which"]
        view = state.views["attribution.view"]
        if view == "set" and not state.members:
            return {}
        if view == "set":
            return {"attribution": AttributionSet(replace(app.study, prompt_set=state.members), which)}
        if not app.counted():
            return {}  # until the run says how long the prompt is
        wants = {"attribution": Attribution(app.study, which, c.pos)}
        if c.comp == "head" and (view == "drill" or self.reads(app)):
            wants["drill"] = AttributionSources(app.study, which, c.layer, c.head, c.pos)
        elif c.comp == "mlp" and view == "drill":
            wants["drill"] = AttributionNeurons(app.study, which, c.layer, c.pos)
        return wants

    def scatters(self, app: Host) -> AttributionSet | None:
        return next((r for r in self.wants(app).values() if isinstance(r, AttributionSet)), None)

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        if isinstance(request, AttributionSet):
            turned(app, request.study.base, {self.view: "set", "which": request.which})
        return isinstance(request, AttributionSet)

    def step(self, app: Host, rows: int, cols: int) -> None:
        if self.reads(app) and self.walking:
            app.move(pos=self.text.walk(app.cursor.pos, rows, cols))
        else:
            step_component(app, rows, cols)

    def back(self, app: Host) -> bool:
        was, self.walking = self.walking, False
        if was:
            app.draw()
        elif was := app.state.views[self.view] == "drill" and not self.reads(app):
            self.enter(app)
        return was

    def leave(self) -> None:
        self.walking = False

    def doing(self, app: Host) -> list[tuple[str, str]]:
        view = app.state.views[self.view]
        return [("⏎", "all components")] if view == "drill" else [("W", "lowest prompt")] if view == "set" else []

    def shows(self, node: Node) -> bool:
        return node.site != "sae" and not node.site.startswith("resid")

    def worst(self, app: Host) -> None:
        result = app.requests.result("attribution", AttributionSetResult)
        if result is None:
            raise UserError("the worst prompt is known after v has turned the attribution pane to the prompt set")
        app.act("go", index=result.worst)

    def enter(self, app: Host) -> None:
        """By source or neuron; in the text view: into the text."""
        app.ready()
        if self.reads(app):
            self.walking = not self.walking
            app.draw()
            return
        app.act("view", name=self.view, value="ranked" if app.state.views[self.view] == "drill" else "drill")

    def paint(self, app: Host) -> None:
        views, c = app.state.views, app.cursor
        result = app.requests.result("attribution", (AttributionResult, AttributionSetResult))
        name = run_name(app.state, views["which"])
        reads = self.swap(app, self.side)
        if result is None:
            self.show_title(app, ("attribution",), name, "")
            alone = views[self.view] == "set" and not app.state.members and not app.requests.error("run")
            self.map.show(None, (0, 0), views["mode"], [(f"  {no_members(app)}", BAD)] if alone else app.requests.waiting("attribution"))
            self.side.show([])
            self.info_line.show([])
            return
        whole = isinstance(result, AttributionSetResult)
        cells = result.mean if whole else result.cells
        grid = self.with_circuit(app, "attribution", (Same(result),), lambda: pictures.cells_grid(cells), head_map_addresses)
        self.map.styles.width = (
            columns_of(grid, self.size.width - 44 if self.size.width >= 100 else self.size.width * 3 // 5, self.size.height - 2, views["mode"]) + 1
        )
        column = c.head if c.comp == "head" else len(grid.cols) - (2 if c.comp == "attn" else 1)
        self.map.show(grid, (clip(c.layer, len(grid.rows)), column), views["mode"])
        if reads:
            self.paint_text(app, result)
            return
        self.paint_side(app, result)
        if whole:
            self.show_title(app, ("attribution",), f"direct effect, mean over the set · {name}", "direct logit attribution, frozen final scale", grid)
            self.info_line.show([pictures.set_line(result)])
        else:
            place = f"{result.pos} {show_token(texts_of(result.tokens)[result.pos])}"
            self.show_title(app, ("attribution",), f"direct effect at {place} · {name}", result.convention, grid)
            self.info_line.show([self.map.about() + pictures.sum_line(result.total, result.logit, result.capped, result.error)])

    def paint_text(self, app: Host, result: AttributionResult | AttributionSetResult) -> None:
        """The prompt by what the head under the cursor writes into the logits from each source position."""
        c, got, text = app.cursor, app.requests.fresh("drill", AttributionSourcesResult), None
        message = [("  the sources of a head: hjkl to one (an MLP reads its own position alone)", DIM)]
        if isinstance(result, AttributionSetResult):
            message = [("  the set has no one text: v turns back to the prompt", DIM)]
        elif c.comp == "head":
            message = app.requests.waiting("drill")
        if got is not None and c.comp == "head":
            text = text_grid(f"L{got.layer}H{got.head} at {got.pos} from", texts_of(got.tokens), got.sources, *pictures.outward(got.sources), True)
        place = f"{c.pos} {show_token(texts_of(result.tokens)[c.pos])}" if isinstance(result, AttributionResult) else "the set"
        walks = "hjkl walk the text, esc leaves it" if self.walking else "⏎ walks in the text"
        said = f"{run_name(app.state, app.state.views['which'])} · direct logits of {self.node(app, None)} at {place} by source"
        self.show_title(app, ("attribution", "drill"), said, walks + (f" · {got.convention}" if got else ""), text)
        self.show_text(app, text, message)

    def paint_side(self, app: Host, result: AttributionResult | AttributionSetResult) -> None:
        """Beside the map: the cell's sources or neurons, or all cells ranked."""
        views, c, whole = app.state.views, app.cursor, isinstance(result, AttributionSetResult)
        cells = result.mean if whole else result.cells
        n = max(2, self.size.height - 4)
        drill = app.requests.result("drill", (AttributionSourcesResult, AttributionNeuronsResult)) if views[self.view] == "drill" else None
        if isinstance(drill, AttributionSourcesResult) and c.comp == "head":
            self.side.show(pictures.source_lines(drill, n - 3))
        elif isinstance(drill, AttributionNeuronsResult) and c.comp == "mlp":
            self.side.show(pictures.neuron_lines(drill, n - 6))
        elif views[self.view] == "drill" and c.comp != "attn":
            self.side.show([app.requests.waiting("drill")])
        else:
            self.side.show(pictures.ranked_lines(cells, result.std if whole else None, n, self.side.size.width))


PANE = AttributionPane
