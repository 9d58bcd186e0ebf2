"""Pane 7: OV and QK of the head under the cursor, composition with other heads, singular directions."""

from dataclasses import replace

import numpy as np
from textual.containers import Horizontal
from textual.widget import Widget

from techniques.weights.requests import (
    Composition,
    CompositionResult,
    HeadWeights,
    HeadWeightsResult,
    Singular,
    SingularResult,
    WeightDifference,
    WeightDifferenceResult,
)
from vocabulary.nodes import Node, UserError
from screen.client import in_words
from screen.cursor import clip
from screen.keys import Part
from screen.maps import columns_of
from screen.pane import Host, Pane
from screen.session import VIEWS
from techniques.weights import pictures
from techniques.weights.explained import EXPLAINED
from widgets import BOLD, DIM, WARN, Grid, GridView, Lines, Same

DIFFERENCES = tuple(f"difference {part}" for part in ("parts", "Q", "K", "V", "O", "OV", "QK"))  # of two models
ON_SIGHT = 5 * 10**8  # pairs of tokens that are looked through without a key


class WeightsPane(Pane):
    number, key, label = "7", "weights", "Weights"
    about = "OV and QK of the head under the cursor, composition, singular directions"
    view = "weights.view"
    explained = EXPLAINED
    views = {
        "weights.view": ("ov", "qk", "composition q", "composition k", "composition v", "OV directions", "QK directions", "mlp_out", "mlp_in", *DIFFERENCES),
        "weights.distance": ("0", "1", "2", "4", "8", "16"),
    }
    hints = ("sweep", "edit", "undo", "view", "mode")
    keys = (Part("sweep", "weights", "look through all pairs of tokens of a large vocabulary", lambda pane, app: pane.run(app), "all pairs"),)

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.table = GridView(), Lines(classes="second")

    def body(self) -> Widget:
        return Horizontal(self.map, self.table)

    def grids(self) -> dict[str, Grid]:
        return {"composition": self.map.grid} if self.map.grid else {}

    def height_needed(self) -> int:
        return 24

    def wants(self, app: Host) -> dict[str, object]:
        c, view = app.cursor, app.state.views[self.view]
        if view in ("ov", "qk"):
            asked, pairs = self.pairs(app), app.info.d_vocab**2
            return {"weights": asked if pairs <= ON_SIGHT or asked in app.requests.started else replace(asked, pairs=False)}
        if view.startswith("composition"):
            return {"weights": Composition(c.layer, c.head)}
        if view in DIFFERENCES:
            return {"weights": WeightDifference()} if app.state.model.against else {}
        return {"weights": Singular(c.layer, None if view.startswith("mlp") else c.head, view.removesuffix(" directions"))}

    @staticmethod
    def pairs(app: Host) -> HeadWeights:
        return HeadWeights(app.cursor.layer, app.cursor.head, 40, int(app.state.views["weights.distance"]))

    def run(self, app: Host) -> None:
        """S: all pairs of tokens, where they are too many to be looked through on sight."""
        app.ready()
        if app.state.views[self.view] not in ("ov", "qk"):
            raise UserError("S looks through all pairs of tokens: v turns to ov or qk")
        app.requests.start(self.pairs(app))

    def across(self, app: Host, by: int) -> None:
        """The distance at which a rotary model's queries and keys are compared."""
        distances, now = VIEWS["weights.distance"], app.state.views["weights.distance"]
        app.act("view", name="weights.distance", value=distances[clip(distances.index(now) + by, len(distances))])

    def choices(self, app: Host) -> tuple[str, ...]:
        return VIEWS[self.view] if app.state.model.against else tuple(v for v in VIEWS[self.view] if v not in DIFFERENCES)

    def shows(self, node: Node) -> bool:
        return node.site != "sae" and not node.site.startswith("resid")

    def step(self, app: Host, rows: int, cols: int) -> None:
        c = app.cursor
        app.move(layer=clip(c.layer + rows, app.info.n_layers), head=clip(c.head + cols, app.info.n_heads), comp="head")

    def paint(self, app: Host) -> None:
        views, c = app.state.views, app.cursor
        view, n, w = views[self.view], max(2, self.size.height - 3), self.size.width - 2
        if view in DIFFERENCES:
            self.paint_difference(app, view.removeprefix("difference "))
            return
        kind = CompositionResult if view.startswith("composition") else HeadWeightsResult if view in ("ov", "qk") else SingularResult
        result = app.requests.result("weights", kind)
        name = f"L{c.layer}{'' if view.startswith('mlp') else f'H{c.head}'} {EXPLAINED[view].name}"
        self.map.set_class(not view.startswith("composition"), "hidden")
        if result is None or (result.layer, result.head) != (c.layer, None if view.startswith("mlp") else c.head):
            self.show_title(app, ("weights",), name, "")
            self.table.show([app.requests.waiting("weights")])
            self.map.show(None, (0, 0), views["mode"])
            self.info_line.show([])
            return
        convention = getattr(result, f"{view}_convention", result.convention)
        self.show_title(app, ("weights",), name, convention)
        self.info_line.show([[(f" {convention}", DIM)]])
        if isinstance(result, CompositionResult):
            part = view.removeprefix("composition ")
            every = lambda g: [((n, h), f"L{n}H{h}") for n in range(len(g.rows)) for h in range(len(g.cols))]  # noqa: E731
            grid = self.with_circuit(app, "weights", (Same(result), part), lambda: pictures.composition_grid(result, part), every)
            self.map.styles.width = (
                columns_of(grid, self.size.width - 44 if self.size.width >= 100 else self.size.width * 2 // 3, self.size.height - 2, views["mode"]) + 1
            )
            self.map.show(grid, (c.layer, c.head), views["mode"])
            self.show_title(app, ("weights",), name, convention, grid)
            self.info_line.show([self.map.about() + [(f" {convention}", DIM)]])
            self.table.show([[(f"{part.upper()}-composition of L{c.layer}H{c.head}", BOLD)], [("earlier layers: it reads what they wrote", DIM)],
                             [("later layers: they read what it wrote", DIM)], [(f"random heads: {result.baseline:.3f} ± {result.spread:.3f}", BOLD)]])  # fmt: skip
        else:
            lines = {"ov": pictures.ov_lines, "qk": pictures.qk_lines}.get(view, pictures.singular_lines)
            shown = lines(result, n, w)
            if isinstance(result, HeadWeightsResult) and np.isfinite(result.expected):
                count = f"2 × {result.vocabulary**2 / 1e9:.1f} billion pairs of tokens"
                shown = [[(f"S looks through all {count}: at most about {in_words(result.expected)}", WARN)], *shown]
            self.table.show(shown)

    def paint_difference(self, app: Host, part: str) -> None:
        """Two models' weights: a map over layers."""
        views, c, result = app.state.views, app.cursor, app.requests.result("weights", WeightDifferenceResult)
        name = EXPLAINED[f"difference {part}"].name
        self.map.set_class(False, "hidden")
        self.table.show([])
        if result is None:
            alone = "one model is loaded: M compares it with a second one"
            self.show_title(app, ("weights",), name, "")
            self.map.show(None, (0, 0), views["mode"], app.requests.waiting("weights") if app.state.model.against else [(alone, WARN)])
            self.info_line.show([])
            return
        every = lambda g: map_addresses(result, part, g)  # noqa: E731
        grid = self.with_circuit(app, "weights", (Same(result), part), lambda: pictures.difference_grid(result, part), every)
        self.map.styles.width = "1fr"
        self.map.show(grid, (c.layer, c.head if part != "parts" else 0), views["mode"])
        self.show_title(app, ("weights",), f"{name} · {result.names[1]} against {result.names[0]}", result.convention, grid)
        self.info_line.show([self.map.about() + [(f" {result.convention}", DIM)]])


def map_addresses(result: WeightDifferenceResult, part: str, grid: Grid) -> list:
    """The heads of a map of heads; a map of matrices has no nodes."""
    return [] if part == "parts" else [((n, h), f"L{n}H{h}") for n in range(len(grid.rows)) for h in range(len(grid.cols))]


PANE = WeightsPane
