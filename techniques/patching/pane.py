"""Pane 4: sweeps of interventions over every node, the estimate beside the truth."""

from dataclasses import replace

import numpy as np
from textual.containers import Horizontal
from textual.widget import Widget

from techniques.patching.requests import Estimate, Sweep, SweepResult
from vocabulary.nodes import Intervention, Node, parse_node, UserError
from screen.actions import no_members, toggle, turned, turns
from screen.cursor import clip, place_of
from screen.keys import VIEW, Action, Part
from screen.overlays import Item, Picker
from screen.pane import Host, Pane
from screen.pictures import run_names, sweep_cell, texts_of
from screen.session import VIEWS
from screen.textview import row_of
from techniques.patching.actions import certify
from techniques.patching.explained import EXPLAINED, METHODS
from techniques.patching.pictures import sweep_grid
from widgets import DIM, Grid, GridView, Same

NOT_ESTIMATED = ("pairs", "cumulative", "features")
DIRECTIONS = {"denoise": "denoising", "noise": "noising"}


class PatchingPane(Pane):
    number, key, label, about = "4", "patching", "Patching", "sweeps over every node, estimate and truth"
    view, text_view = "patching.kind", "patching.text"
    explained = EXPLAINED
    views = {
        "patching.kind": (
            "z",
            "resid_pre",
            "resid_mid",
            "resid_post",
            "attn",
            "mlp",
            "attn_mlp",
            "q",
            "k",
            "v",
            "pattern",
            "nodes",
            "z_pos",
            "cells",
            "neurons",
            "pairs",
            "cumulative",
            "features",
        ),
        "patching.op": ("patch", "zero", "mean", "mean_all", "resample", "noise", "mean_text", "mean_text_pos"),
        "patching.show": ("effect", "metric", "estimate", "disagreement", "spread", "p", "corrected p"),
        "patching.effect": ("total", "direct"),
        "patching.over": ("prompt", "set"),
        "patching.estimate": ("atp", "ig", "atp_qk", "graddrop", "atp_star"),
        "patching.text": ("off", "on"),
    }
    hints = ("enter", "keep", "base", "undo", "view", "mode", "source", "points", "sweep", "operation", "weighted", "ranked")
    keys = (
        Part("enter", "patching", "the cell as an intervention", lambda pane, app: pane.enter(app), "intervene"),
        Part("source", "patching", "over the prompt or the set", turns("patching.over")),
        Part("points", "patching", "effect, metric, estimate, disagreement, spread, p, p corrected for all cells", turns("patching.show")),
        Action(
            "sweep", "S", "run sweep", "run this pane's sweep: patch or ablate every cell", VIEW, lambda pane, app: pane.run(app), "worst", reach=(),
            elsewhere="sweeps live in pane 4: 4 goes there, v chooses what is swept, S runs it",
        ),
        Action("operation", "b", "operation", "What the sweep does: patch, zero, mean, resample, noise", VIEW, turns("patching.op"), "sweep"),
        Part("weighted", "patching", "total or direct effect", turns("patching.effect")),
        Action("estimate", "*", "estimate", "The estimate: AtP, integrated gradients, AtP with the query and key fix, GradDrop, AtP*", VIEW, turns("patching.estimate"), "operation", reach=(),
               elsewhere="estimates live in pane 4: 4 goes there, * turns to the next"),
        Action("certify", "^", "certify", "The ten largest cells for certain, by true patches in the order of the estimate and random subsets", VIEW, lambda pane, app: certify(pane, app),
               "estimate", reach=(), elsewhere="cells are certified in pane 4: 4 goes there"),
        Part("ranked", "", "", lambda pane, app: pane.rank(app)),
    )  # fmt: skip

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = GridView()
        self.cell = (0, 0)  # for cells that are not one node

    def body(self) -> Widget:
        return Horizontal(self.table, self.text)

    def grids(self) -> dict[str, Grid]:
        shown = ("text", self.text) if self.text.grid else ("patching", self.table)
        return {shown[0]: shown[1].grid} if shown[1].grid else {}

    def choices(self, app: Host) -> tuple[str, ...]:
        """Features only where an SAE is loaded."""
        return tuple(k for k in VIEWS[self.view] if k != "features" or app.state.sae)

    def variants(self, app: Host) -> tuple[str, ...]:
        views = app.state.views
        way = views["patching.estimate"]
        more = (
            (views["patching.effect"] == "direct", "effect=direct"),
            (views["patching.show"] != "effect", f"show={views['patching.show']}"),
            (way != "atp", f"by={way}"),
        )
        return (views[self.view], f"op={views['patching.op']}", *(name for there, name in more if there))

    def request(self, app: Host) -> Sweep:
        """The sweep that S runs: interventions act on the base prompt, so the base says which way."""
        state, views, c = app.state, app.state.views, app.cursor
        kind, op = views["patching.kind"], views["patching.op"]
        over = views["patching.over"] == "set" and bool(state.members)
        needs_set = over or op in ("mean", "mean_all", "resample")
        study = replace(app.study, prompt_set=state.prompt_set if needs_set else ())
        if over:  # the same for every prompt of the set
            study = replace(study, prompt=state.prompt_set[0])
        study = state.with_saes(study) if kind == "features" else study
        node = f"L{c.layer}H{c.head}" if kind == "cells" else f"L{c.layer}.mlp" if kind == "neurons" else ""
        if kind == "features":
            known = app.known_saes.get(state.sae)
            node, op = f"L{known.layer if known else c.layer}.sae", op if op in ("patch", "zero") else "zero"
        direction = "noise" if state.base == "clean" else "denoise"
        first = "estimate" if op == "patch" and kind not in NOT_ESTIMATED and views["patching.effect"] == "total" else ""
        return Sweep(study, kind, op, direction, views["patching.effect"], node, over_set=over, first=first)

    def wants(self, app: Host) -> dict[str, object]:
        request = self.request(app)
        wants: dict[str, object] = {"sweep": request} if request in app.requests.started else {}
        estimated = request.op == "patch" and request.effect == "total" and request.kind not in NOT_ESTIMATED
        if estimated and app.state.compares:
            way = "atp" if app.state.model.against else app.state.views["patching.estimate"]
            wants["estimate"] = Estimate(request.study, request.kind, way, request.direction, node=request.node, over_set=request.over_set)
        return wants

    def shown(self, app: Host) -> tuple[SweepResult | None, SweepResult | None]:
        """Truth and estimate of what is asked for now; those of another direction or prompt are not shown under this one's title."""
        truth = app.requests.answer_to(self.request(app), SweepResult, "sweep")
        return truth, app.requests.fresh("estimate", SweepResult)

    def at(self, app: Host, result: SweepResult) -> tuple[int, int]:
        """The cell of the shared cursor."""
        c, group = app.cursor, len(result.nodes) // max(1, len(result.rows))
        if result.kind == "features":
            return clip(self.cell[0], len(result.rows)), clip(c.pos, len(result.cols))
        for n, address in enumerate(result.nodes):
            node = parse_node(address)
            head = node.head is None or node.head == c.head
            site = node.site in (c.point, c.comp) if not node.site.startswith("resid") else True
            if node.layer == c.layer and head and site and (node.pos is None or node.pos == c.pos):
                return divmod(n, group)
        return clip(self.cell[0], len(result.rows)), clip(self.cell[1], len(result.cols))

    def step(self, app: Host, rows: int, cols: int) -> None:
        result = next((r for r in self.shown(app) if r), None)
        if result is None:
            return
        r, c = self.at(app, result)
        if self.reads(app):
            app.move(pos=self.text.walk(app.cursor.pos, rows, cols))
            return
        self.go(app, result, clip(r + rows, len(result.rows)), clip(c + cols, len(result.cols)))

    def go(self, app: Host, result: SweepResult, row: int, col: int) -> None:
        self.cell = (row, col)
        address = result.address(row, col)
        if not address:
            app.draw()
            return
        node = parse_node(address)
        where = {"pos": node.pos} if isinstance(node.pos, int) else {}
        if node.site == "sae":
            app.move(**where)
            return
        app.move(**where, **place_of(node)) if node.site not in ("neuron", "embed") else app.draw()

    def node(self, app: Host, pos: int | None) -> Node:
        result = next((r for r in self.shown(app) if r), None)
        if result is not None and (address := result.address(*self.at(app, result))):
            return parse_node(address)
        return super().node(app, pos)

    def enter(self, app: Host) -> None:
        """The cell's node becomes an intervention."""
        app.ready()
        toggle(app, Intervention(self.node(app, None), app.state.views["patching.op"]))

    def run(self, app: Host) -> None:
        """S: every cell."""
        app.ready()
        request = self.request(app)
        if request.op == "patch" and not app.state.compares:
            raise UserError("patching takes values from the other prompt, and there is no corrupted prompt: E types one, o opens a set")
        if app.state.views["patching.over"] == "set" and not request.over_set:
            raise UserError(no_members(app))
        app.requests.start(request)

    def scatters(self, app: Host) -> Sweep | None:
        request = self.request(app)
        return request if request.over_set else None

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        if not isinstance(request, Sweep):
            return False
        way = request.study.base if request.op != "patch" else "clean" if request.direction == "noise" else "corrupt"
        turned(app, way, {"patching.kind": request.kind, "patching.op": request.op, "patching.effect": request.effect, "patching.over": "set"})
        return True

    def rank(self, app: Host) -> None:
        """Cells by what is shown; choosing one puts the cursor there."""
        grid, result = self.table.grid, next((r for r in self.shown(app) if r), None)
        if result is None or grid is None:
            raise UserError("nothing has been swept yet: S runs the sweep")
        cells, show = [(int(r), int(c)) for r, c in np.argwhere(np.isfinite(grid.values))], app.state.views["patching.show"]
        low = {"metric": result.base}.get(show)  # p: the smallest first; the metric: what moves it most
        cells.sort(key=lambda rc: float(grid.shown[rc]) if show in ("p", "corrected p") else -abs(float(grid.values[rc]) - (low or 0.0)))
        items = [Item(result.address(r, c) or f"{result.rows[r]} × {result.cols[c]}", f"{float(grid.shown[r, c]):+.4f}", "", (r, c)) for r, c in cells[:2000]]
        app.open(Picker(f"cells by {show}", items, lambda item, typed: item and self.go(app, result, *item.value)))

    def title(self, app: Host, request: Sweep) -> str:
        names = run_names(app.state)
        a, b = (names[w] for w in (("clean", "corrupt") if request.direction == "noise" else ("corrupt", "clean")))
        ablated = f"{request.op} ablation of {a}"
        patched = f"{b} into {a}" if app.state.model.against else DIRECTIONS[request.direction]
        what = patched if request.op == "patch" else ablated
        over = " over the set" if request.over_set else " · this prompt only: it is not of the set" if app.state.views["patching.over"] == "set" else ""
        more = over + (" · direct" if request.effect == "direct" else "")
        way, show, truth = app.state.views["patching.estimate"], app.state.views["patching.show"], self.shown(app)[0]
        guessed = show in ("estimate", "disagreement") or truth is None or truth.done < truth.total
        by = f" · by {METHODS[way]}" if guessed and way != "atp" and request.op == "patch" and request.effect == "total" else ""
        return f"{EXPLAINED[request.kind].name} · {what}{more} · {show}{by}"

    def paint(self, app: Host) -> None:
        views, wanted = app.state.views, app.requests.wanted
        (truth, estimate), slots, shown = self.shown(app), ("sweep", "estimate"), views["patching.show"]
        title, result = self.title(app, self.request(app)), truth or estimate
        reads = self.swap(app, self.table)
        if result is None:
            self.show_title(app, slots, title, "")
            waits = next((s for s in slots if s in wanted), None)
            message = app.requests.waiting(waits) if waits else [("  S runs the sweep", DIM)]
            (self.show_text(app, None, message) if reads else self.table.show(None, (0, 0), views["mode"], message))
            self.info_line.show([])
            return
        if not np.isfinite(result.normalised).any() and shown not in ("metric", "p", "corrected p"):
            title += " (raw metric)"
        every = lambda g: [((r, c), a) for r in range(len(g.rows)) for c in range(len(g.cols)) if (a := result.address(r, c))]  # noqa: E731
        grid = self.with_circuit(app, "sweep", (Same(truth), Same(estimate), shown), lambda: sweep_grid(truth, estimate, shown), every)
        done = f"truth {truth.done}/{truth.total}" if truth else "estimate · S runs the truth"
        if truth and truth.done < truth.total:  # first in the title, where it is seen
            title, done = f"{done}{app.requests.left('sweep') if 'sweep' in wanted else ', cancelled: S runs it again'} · {title}", "truth"
        title = app.requests.scattered.partial(truth) + title
        tested = " · underlined: corrected p < .05" if shown in ("spread", "p", "corrected p") and grid.marks else ""
        warning = f"{result.warning} · " if result.warning else ""
        row, col = self.at(app, result)
        self.show_title(app, slots, title + tested, f"{done} · {warning}{result.convention}", grid)
        if reads:
            self.paint_text(app, result, grid, row, (truth, estimate))
            return
        shown_grid = self.by_position(app, "sweep", grid, result.tokens) if grid.positions else grid
        self.table.show(shown_grid, (row, col), views["mode"])
        self.info_line.show([sweep_cell(truth, estimate, row, col, self.table.about(), self.size.width)])

    def paint_text(self, app: Host, result: SweepResult, grid: Grid, row: int, results: tuple[SweepResult | None, SweepResult | None]) -> None:
        """The prompt by the row under the cursor: the effect at each position."""
        if not grid.positions:
            self.show_text(app, None, [(f"  a sweep of {result.kind} has no positions: v turns to one by position (resid_pre, attn, mlp, z_pos …)", DIM)])
            return
        self.show_text(app, row_of(grid, row, grid.rows[row].strip(), texts_of(result.tokens)))
        self.info_line.show([sweep_cell(*results, row, clip(app.cursor.pos, len(result.cols)), self.text.about(), self.size.width)])


PANE = PatchingPane
