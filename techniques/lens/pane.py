"""Pane 1: hook points × positions, each cell the top token under a lens."""

from dataclasses import replace
from pathlib import Path

from textual.containers import Horizontal
from textual.widget import Widget

from techniques.lens.requests import FitJacobianResult, Lens, LensResult, TuneLensResult
from vocabulary.nodes import Node, parse_node
from screen.actions import turns
from screen.cursor import clip, place_of
from screen.keys import VIEW, Action
from screen.pane import Host, Pane
from screen.pictures import run_name, run_names, texts_of
from screen.session import VIEWS
from screen.textview import row_of
from techniques.lens import actions, pictures
from techniques.lens.explained import EXPLAINED
from widgets import Grid, GridView, Lines, Same


class LensPane(Pane):
    number, key, label, about, scope, differences = "1", "lens", "Lens", "hook points × positions", "here", False
    view, text_view, urgent = "lens.stat", "lens.text", ("lens_row",)
    explained = EXPLAINED
    views = {
        "lens.stat": ("prob", "answer", "rank", "entropy", "kl", "logit_diff", "kl_pair", "rank_pair", "promoted", "suppressed"),
        "lens.points": ("mid+post", "post", "all", "components", "heads"),
        "lens.text": ("off", "on"),
    }
    hints = ("edit", "ablate", "patch", "scope", "keep", "enable", "undo", "view", "mode", "which", "chart", "lens_kind")
    keys = (
        Action("points", "P", "rows", "which hook points or components are the rows", VIEW, turns("lens.points"), "source", "lens"),
        Action("chart", "L", "chart", "Line chart of the statistic over depth at the cursor's position, clean and corrupted", VIEW, actions.chart, "operation"),
        Action("lens_kind", "K", "lens kind", "Logit, tuned or Jacobian lens", VIEW, actions.choose_lens, "chart"),
        Action("fit", "F", "fit lens", "Fit a tuned lens to this model", VIEW, actions.fit, "lens_kind"),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table, self.side = GridView(), Lines(classes="side")

    def body(self) -> Widget:
        return Horizontal(self.table, self.text, self.side)

    def grids(self) -> dict[str, Grid]:
        shown = ("text", self.text) if self.text.grid else ("lens", self.table)
        return {shown[0]: shown[1].grid} if shown[1].grid else {}

    def points(self, app: Host) -> tuple[str, ...]:
        kind, n, mid = app.state.views["lens.points"], app.info.n_layers, not app.info.parallel
        if kind == "all":
            return tuple(f"L{i}.{s}" for i in range(n) for s in ("resid_pre", "resid_mid", "resid_post") if mid or s != "resid_mid")
        if kind == "components":
            return tuple(f"L{i}.{s}" for i in range(n) for s in ("attn", "mlp"))
        if kind == "heads":
            return tuple(f"L{i}H{h}" for i in range(n) for h in range(app.info.n_heads))
        sites = ("resid_mid", "resid_post") if kind == "mid+post" and mid else ("resid_post",)
        return ("L0.resid_pre", *(f"L{i}.{s}" for i in range(n) for s in sites))

    def which(self, app: Host) -> str:
        """The lens shows one run; where a difference is chosen, now."""
        return app.state.views["which"] if "-" not in app.state.views["which"] else "now"

    def wants(self, app: Host) -> dict[str, object]:
        state, points = app.state, self.points(app)
        if state.lens != "logit":
            points = tuple(p for p in points if p.endswith("resid_post") or p == "L0.resid_pre")
        pair = state.views["lens.stat"] in ("kl_pair", "rank_pair")
        whole = Lens(app.study, self.which(app), points, kind=state.lens, artefact=state.artefact, pair=pair)
        if not self.reads(app):
            return {"lens": whole}
        return {"lens_row": replace(whole, points=(points[self.row(app, points)],)), "lens": whole}  # the row in view first

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        """A lens that was fitted apart is read."""
        match result:
            case TuneLensResult():
                app.act("lens", kind="tuned", artefact=result.folder)
            case FitJacobianResult(file=file) if file:
                app.act("lens", kind="jacobian", artefact=file)
            case _:
                return False
        return True

    def in_view(self, app: Host) -> LensResult | None:
        """The whole lens, or its row at the cursor while that has not come so far."""
        whole = app.requests.result("lens", LensResult)
        row = app.requests.fresh("lens_row", LensResult) if self.reads(app) else None
        return row if row is not None and (whole is None or row.points[0] not in whole.points or app.requests.stale("lens")) else whole

    def merge(self, before: object | None, part: object) -> object:
        """The rows that have come so far."""
        return pictures.joined([before, part]) if isinstance(before, LensResult) else part

    def row(self, app: Host, points: tuple[str, ...]) -> int:
        c = app.cursor
        for name in (f"L{c.layer}.{c.point}", f"L{c.layer}H{c.head}", f"L{c.layer}.{c.comp}"):
            if name in points:
                return points.index(name)
        return next((n for n, p in enumerate(points) if p.startswith(f"L{app.cursor.layer}.")), 0)

    def step(self, app: Host, rows: int, cols: int) -> None:
        points = self.shown(app)
        if self.reads(app):
            app.move(pos=self.text.walk(app.cursor.pos, rows, cols))
            return
        row, drawn = self.row(app, points), self.table.rows if self.table.thinned else list(range(len(points)))
        at = drawn.index(row) if row in drawn else 0
        node = parse_node(points[drawn[clip(at + rows, len(drawn))]])
        app.move(**place_of(node), pos=clip(app.cursor.pos + cols, app.length()))

    def shown(self, app: Host) -> tuple[str, ...]:
        result = app.requests.result("lens", LensResult)
        return result.points if result else self.points(app)

    def node(self, app: Host, pos: int | None) -> Node:
        points = self.shown(app)
        return replace(parse_node(points[self.row(app, points)]), pos=pos)

    def choices(self, app: Host) -> tuple[str, ...]:
        stats = VIEWS[self.view] if app.state.prompt.answers else ("prob", "entropy", "kl", "kl_pair", "promoted", "suppressed")
        hidden = ("rank_pair",) * (not app.state.model.against) + ("kl_pair",) * (not app.state.compares)
        return tuple(s for s in stats if s not in hidden)

    def variants(self, app: Host) -> tuple[str, ...]:
        parts = app.state.views["lens.points"] in ("components", "heads") and app.state.lens == "logit"
        return app.state.views[self.view], "components" if parts else f"lens={app.state.lens}"

    def shows(self, node: Node) -> bool:
        return node.site.startswith("resid")

    def find(self, app: Host, needle: str) -> list[dict]:
        lens = app.requests.result("lens", LensResult)
        if lens is None:
            return []
        cells = [(parse_node(p), c, i) for p, row in zip(lens.points, lens.top_ids[..., 0].tolist()) for c, i in enumerate(row)]
        return [place_of(node) | {"pos": c} for node, c, i in cells if needle.lower() in lens.texts[i].lower()]

    def called(self, app: Host, stat: str) -> str:
        """A statistic in words; those of two runs by the models, where two are compared."""
        if stat in ("kl_pair", "rank_pair") and app.state.model.against:
            names = run_names(app.state)
            return f"KL({names['clean']} ‖ {names['corrupt']})" if stat == "kl_pair" else f"answer's rank in {names['corrupt']} less in {names['clean']}"
        return EXPLAINED[stat].name

    def paint(self, app: Host) -> None:
        views, result = app.state.views, self.in_view(app)
        reads = self.swap(app, self.table)
        stat, artefact = views["lens.stat"], f" {Path(app.state.artefact).name}" if app.state.artefact else ""
        kind, run = f"{pictures.LENS_KINDS[app.state.lens]}{artefact}", run_name(app.state, self.which(app))
        if result is None:
            self.show_title(app, ("lens",), f"{self.called(app, stat)} · {kind} · {run}", "")
            (
                self.show_text(app, None, app.requests.waiting("lens_row"))
                if reads
                else self.table.show(None, (0, 0), views["mode"], app.requests.waiting("lens"))
            )
            self.side.show([])
            self.info_line.show([])
            return
        grid = self.picture("lens", (Same(result), stat), lambda: pictures.lens_grid(result, stat, app.info.d_vocab if app.info else 2))
        row, pos = self.row(app, result.points), clip(app.cursor.pos, len(result.tokens.texts))
        if reads:
            self.paint_text(app, result, grid, row)
            return
        grid = self.by_position(app, "lens", grid, result.tokens)
        self.table.show(grid, (row, pos), views["mode"])
        thinned = f" · {self.table.thinned}" if self.table.thinned else ""
        self.show_title(app, ("lens",), f"{self.called(app, stat)}{thinned} · {kind} · {run}", result.convention, grid)
        beside = self.size.width - 34 >= 14 + grid.cell[0] * len(grid.cols)
        self.side.set_class(not beside, "hidden")
        if beside:
            self.side.show(pictures.lens_side(result, row, pos, 3 if len(app.visible_panes()) == 3 else 10))
        self.info_line.show([pictures.lens_cell(result, row, pos, 0 if beside or len(app.visible_panes()) == 3 else 4)])

    def paint_text(self, app: Host, result: LensResult, grid: Grid, row: int) -> None:
        """The prompt by the row under the cursor."""
        text = row_of(grid, row, result.points[row], texts_of(result.tokens))
        name = f"{run_name(app.state, self.which(app))} · {pictures.LENS_KINDS[app.state.lens]} at {result.points[row]}"
        self.show_title(app, ("lens_row", "lens"), f"{name} · {self.called(app, app.state.views['lens.stat'])}", result.convention, text)
        self.side.set_class(True, "hidden")
        self.show_text(app, text)
        self.info_line.show([pictures.lens_cell(result, row, clip(app.cursor.pos, len(result.tokens.texts)), 4)])


PANE = LensPane
