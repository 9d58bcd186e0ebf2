"""The pane: what it asks for, how it draws the answer, what the arrow keys move, a view for `v` and a key of its own."""

import numpy as np
from textual.widget import Widget

from screen.actions import turns
from screen.cursor import clip
from screen.explain import Explained
from screen.keys import VIEW, Action
from screen.pane import Host, Pane
from screen.pictures import run_name, texts_of
from utils import show_token
from vocabulary.nodes import Node, parse_node
from widgets import PLAIN, Grid, GridView, Same

from .requests import Norms, NormsResult


class NormsPane(Pane):
    number, key, label, about = "#", "norms", "Norms", "norm of the residual stream"
    scope, differences = "here", False  # a stands for the cursor's position; f turns runs, not their differences
    view = "norms.stat"  # what v lists
    views = {"norms.stat": ("norm", "growth"), "norms.first": ("with", "without")}
    explained = {  # what v lists and = defines
        "norm": Explained("norm", "how long the residual stream is at a hook point and position", "||x||", "definition"),
        "growth": Explained("growth", "how much longer the stream is than at the row above", "||x|| / ||x of the row above||", "definition"),
    }
    hints = ("view", "which", "norms_first", "ablate")
    keys = (Action("norms_first", "&", "position 0", "Norms: with or without position 0, where the norm is often huge", VIEW, turns("norms.first")),)

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = GridView()

    def body(self) -> Widget:
        return self.table

    def grids(self) -> dict[str, Grid]:
        """For y: the numbers as TSV."""
        return {"norms": self.table.grid} if self.table.grid else {}

    # ---------------------------------------------------------------- asking

    def which(self, app: Host) -> str:
        return app.state.views["which"] if "-" not in app.state.views["which"] else "now"

    def wants(self, app: Host) -> dict[str, object]:
        """A slot and its request. The app asks when the answer is not at hand, and calls paint when it comes."""
        return {"norms": Norms(app.study, self.which(app))}

    # ---------------------------------------------------------------- the cursor

    def points(self, app: Host) -> tuple[str, ...]:
        result = app.requests.result("norms", NormsResult)
        return result.points if result else (f"L{app.cursor.layer}.resid_post",)

    def row(self, app: Host) -> int:
        points, c = self.points(app), app.cursor
        here = f"L{c.layer}.{c.point}"
        return points.index(here) if here in points else 0

    def step(self, app: Host, rows: int, cols: int) -> None:
        points = self.points(app)
        node = parse_node(points[clip(self.row(app) + rows, len(points))])
        app.move(layer=node.layer, point=node.site, pos=clip(app.cursor.pos + cols, app.length()))

    def node(self, app: Host, pos: int | None) -> Node:
        """What a, p, s and c act on."""
        node = parse_node(self.points(app)[self.row(app)])
        return Node(node.site, node.layer, pos=pos)

    # ---------------------------------------------------------------- drawing

    def paint(self, app: Host) -> None:
        views, result = app.state.views, app.requests.result("norms", NormsResult)
        name = run_name(app.state, self.which(app))
        if result is None:  # not yet there, or refused: waiting() says which
            self.show_title(app, ("norms",), name, "")
            self.table.show(None, (0, 0), views["mode"], app.requests.waiting("norms"))
            self.info_line.show([])
            return
        stat, first = views["norms.stat"], views["norms.first"]
        grid = self.picture("norms", (Same(result), stat, first), lambda: norms_grid(result, stat, first == "with"))
        row, pos = self.row(app), clip(app.cursor.pos, len(result.tokens.texts))
        self.show_title(app, ("norms",), f"{name} · {stat}", result.convention, grid)
        self.table.show(grid, (row, pos), views["mode"])
        self.info_line.show([[(f" {result.points[row]}@{pos} {show_token(result.tokens.texts[pos])}: norm {result.norms[row, pos]:.3f}", PLAIN)]])


def norms_grid(result: NormsResult, stat: str, first: bool) -> Grid:
    """Points × positions: the norm, or its ratio to the row above. NaN is blank."""
    values = result.norms.astype(float)
    if stat == "growth":
        before = np.vstack([np.full_like(values[:1], np.nan), values[:-1]])
        values = values / np.where(before == 0, np.nan, before)
    if not first:
        values[:, 0] = np.nan
    return Grid(values, list(result.points), texts_of(result.tokens), 0.0, max(float(np.nanmax(values, initial=0)), 1e-6), corner="hook point", positions=True)


PANE = NormsPane
