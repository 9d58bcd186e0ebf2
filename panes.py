"""
The panes: what each asks of the engine, how it draws the answer, and what its keys move. A pane keeps no state of the hunt; the app gives it the state,
the cursor and the results. A new pane is a class in PANES: number, name, `wants`, `paint`, `step`, `node`, and the view that `v` turns.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.geometry import Region
from textual.widget import Widget

import pictures
import readings
from techniques.attention.requests import Attention, AttentionResult, HeadStats, HeadStatsResult
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
from techniques.lens.requests import Lens, LensResult
from techniques.output.requests import RunResult
from techniques.patching.requests import Estimate, Sweep, SweepResult
from techniques.weights.requests import Composition, CompositionResult, HeadWeights, HeadWeightsResult, Singular, SingularResult
from vocabulary.nodes import Intervention, Node, parse_node, UserError
from vocabulary.requests import Check, CheckResult
from pictures import HEAD_STATS, LENS_STATS
from session import VIEWS
from utils import show_token
from widgets import BOLD, DIM, FOCUS, HEAD, Grid, GridView, Item, Lines, Same

if TYPE_CHECKING:
    from tui import Loupe


class Pane(Vertical, can_focus=True):
    """A title line (number, name, convention, scale), a body, and one line about the cell under the cursor."""

    DEFAULT_CSS = """
    Pane { position: absolute; width: 100%; height: 100%; } Pane > Horizontal { height: 1fr; } Pane > Lines.table { height: 1fr; }
    Pane .side { width: 34; height: 1fr; padding-left: 1; } Pane .second { width: 1fr; height: 1fr; padding-left: 1; }
    """
    number, key, label, wide = "?", "", "", True
    view = ""  # the name in VIEWS that `v` turns
    scope = "all"  # whether actions act on all positions or the cursor's ("here")

    def __init__(self, **kw):
        super().__init__(**kw)
        self.title_line, self.info_line = Lines(), Lines()

    def body(self) -> Widget:
        raise NotImplementedError

    def compose(self) -> ComposeResult:
        yield self.title_line
        yield self.body()
        yield self.info_line

    def wants(self, app: "Loupe") -> dict[str, object]:
        """The requests whose results this pane draws, by slot."""
        return {}

    def paint(self, app: "Loupe") -> None:
        """Draw from app.results; cheap, called at every change."""

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        """Move the cursor."""

    def across(self, app: "Loupe", by: int) -> None:
        """What , and . do: the position."""
        app.move(pos=clip(app.cursor.pos + by, app.length()))

    def node(self, app: "Loupe", pos: int | None) -> Node:
        """The node under the cursor, that actions act on."""
        c = app.cursor
        return Node("head", c.layer, c.head, pos=pos) if c.comp == "head" else Node(c.comp, c.layer, pos=pos)

    def stats(self, app: "Loupe") -> tuple[str, ...]:
        """The values that `v` turns through."""
        return VIEWS[self.view]

    def enter(self, app: "Loupe") -> None:
        """Drill in, where there is something to drill into."""

    def find(self, app: "Loupe", needle: str) -> list[dict]:
        """Where a text occurs, each as arguments of app.move."""
        texts = app.tokens.tokens.texts if app.tokens else ()
        return [{"pos": n} for n, text in enumerate(texts) if needle.lower() in text.lower()]

    def with_circuit(self, app: "Loupe", name: str, key: tuple, make: Callable[[], Grid], cells: Callable[[Grid], Iterable]) -> Grid:
        """A picture in which the circuit's cells are marked; `cells` gives every cell's address."""
        nodes = app.state.current.nodes if app.state.current else ()
        labels = app.tokens.tokens.labels if app.tokens else {}

        def draw() -> Grid:
            grid = make()
            return replace(grid, kept=readings.kept_cells(nodes, cells(grid), labels)) if nodes else grid

        return app.picture(name, (*key, nodes, tuple(labels.items())), draw)

    def copies(self, app: "Loupe") -> list[Item]:
        """What else can be copied from this pane."""
        return []

    def grids(self) -> dict[str, Grid]:
        """The numbers behind the picture, for export."""
        return {}

    def height_needed(self) -> int:
        """Lines that the pane can use."""
        return 4 + max([len(g.rows) for g in self.grids().values()], default=8)

    def show_title(self, app: "Loupe", slots: tuple[str, ...], title: str, note: str) -> None:
        late = app.late(slots)
        focused = app.pane == self.key
        self.said = (f"{late}{title}", note)
        self.title_line.show([[(f" {self.number} {self.label} ", FOCUS if focused else HEAD), (f" {late}{title}", BOLD), (f"  {note}", DIM)]])

    def as_text(self) -> str:
        """The pane as it stands on the screen."""
        lines = []
        for child in self.walk_children(Widget):
            if isinstance(child, Lines):
                lines.append(child.text())
            elif isinstance(child, GridView) and child.size:
                lines += [s.text.rstrip() for s in child.render_lines(Region(0, 0, *child.size))]
        return "\n".join(line for line in lines if line.strip()) + "\n"


def clip(n: int, size: int) -> int:
    return max(0, min(n, size - 1))


def step_component(app: "Loupe", rows: int, cols: int) -> None:
    """Through layers and, across, the heads, the attention output and the MLP."""
    c = app.cursor
    columns = [("head", h) for h in range(app.info.n_heads)] + [("attn", c.head), ("mlp", c.head)]
    at = next((i for i, (k, h) in enumerate(columns) if k == c.comp and (k != "head" or h == c.head)), 0)
    comp, head = columns[clip(at + cols, len(columns))]
    app.move(layer=clip(c.layer + rows, app.info.n_layers), comp=comp, head=head)


class LensPane(Pane):
    number, key, label, view, scope = "1", "lens", "Lens", "lens.stat", "here"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table, self.side = GridView(), Lines(classes="side")

    def body(self) -> Widget:
        return Horizontal(self.table, self.side)

    def grids(self) -> dict[str, Grid]:
        return {"lens": self.table.grid} if self.table.grid else {}

    def points(self, app: "Loupe") -> tuple[str, ...]:
        kind, n, mid = app.state.views["lens.points"], app.info.n_layers, not app.info.parallel
        if kind == "all":
            return tuple(f"L{i}.{s}" for i in range(n) for s in ("resid_pre", "resid_mid", "resid_post") if mid or s != "resid_mid")
        if kind == "components":
            return tuple(f"L{i}.{s}" for i in range(n) for s in ("attn", "mlp"))
        if kind == "heads":
            return tuple(f"L{i}H{h}" for i in range(n) for h in range(app.info.n_heads))
        sites = ("resid_mid", "resid_post") if kind == "mid+post" and mid else ("resid_post",)
        return ("L0.resid_pre", *(f"L{i}.{s}" for i in range(n) for s in sites))

    def which(self, app: "Loupe") -> str:
        """The lens shows one run; where a difference is chosen, now."""
        return app.state.views["which"] if "-" not in app.state.views["which"] else "now"

    def wants(self, app: "Loupe") -> dict[str, object]:
        state, points = app.state, self.points(app)
        if state.lens != "logit":
            points = tuple(p for p in points if p.endswith("resid_post") or p == "L0.resid_pre")
        pair = state.views["lens.stat"] == "kl_pair"
        return {"lens": Lens(app.study, self.which(app), points, kind=state.lens, artefact=state.artefact, pair=pair)}

    def row(self, app: "Loupe", points: tuple[str, ...]) -> int:
        c = app.cursor
        for name in (f"L{c.layer}.{c.point}", f"L{c.layer}H{c.head}", f"L{c.layer}.{c.comp}"):
            if name in points:
                return points.index(name)
        return next((n for n, p in enumerate(points) if p.startswith(f"L{app.cursor.layer}.")), 0)

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        points = self.shown(app)
        node = parse_node(points[clip(self.row(app, points) + rows, len(points))])
        app.move(**self.place_of(node), pos=clip(app.cursor.pos + cols, app.length()))

    @staticmethod
    def place_of(node: Node) -> dict:
        """A row's node as arguments of app.move."""
        if node.site.startswith("resid"):
            return {"layer": node.layer, "point": node.site}
        return {"layer": node.layer, "comp": node.site} | ({"head": node.head} if node.site == "head" else {})

    def shown(self, app: "Loupe") -> tuple[str, ...]:
        result = app.result("lens", LensResult)
        return result.points if result else self.points(app)

    def node(self, app: "Loupe", pos: int | None) -> Node:
        points = self.shown(app)
        return replace(parse_node(points[self.row(app, points)]), pos=pos)

    def stats(self, app: "Loupe") -> tuple[str, ...]:
        stats = VIEWS[self.view] if app.state.prompt.answers else ("prob", "entropy", "kl", "kl_pair", "promoted", "suppressed")
        return stats if app.state.prompt.corrupt else tuple(s for s in stats if s != "kl_pair")

    def find(self, app: "Loupe", needle: str) -> list[dict]:
        lens = app.result("lens", LensResult)
        if lens is None:
            return []
        cells = [(parse_node(p), c, i) for p, row in zip(lens.points, lens.top_ids[..., 0].tolist()) for c, i in enumerate(row)]
        return [self.place_of(node) | {"pos": c} for node, c, i in cells if needle.lower() in lens.texts[i].lower()]

    def paint(self, app: "Loupe") -> None:
        views, result = app.state.views, app.result("lens", LensResult)
        stat, name = (
            views["lens.stat"],
            f"{app.run_name(self.which(app))} · {pictures.LENS_KINDS[app.state.lens]}{' ' + Path(app.state.artefact).name if app.state.artefact else ''}",
        )
        if result is None:
            self.show_title(app, ("lens",), name, "")
            self.table.show(None, (0, 0), views["mode"], app.waiting("lens"))
            self.side.show([])
            self.info_line.show([])
            return
        grid = app.picture("lens", (Same(result), stat), lambda: pictures.lens_grid(result, stat, app.info.d_vocab if app.info else 2))
        self.show_title(app, ("lens",), f"{name} · {LENS_STATS[stat]} {pictures.scale(grid)}", result.convention)
        row, pos = self.row(app, result.points), clip(app.cursor.pos, len(result.tokens.texts))
        self.table.show(grid, (row, pos), views["mode"])
        beside = self.size.width - 34 >= 14 + grid.cell[0] * len(grid.cols)
        self.side.set_class(not beside, "hidden")
        if beside:
            self.side.show(pictures.lens_side(result, row, pos, 3 if len(app.visible_panes()) == 3 else 10))
        self.info_line.show([pictures.lens_cell(result, row, pos, 0 if beside or len(app.visible_panes()) == 3 else 4)])


class AttentionPane(Pane):
    number, key, label, view = "2", "attention", "Attention", "attention.stat"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.pattern, self.many = GridView(), GridView(classes="second"), Lines(classes="second")

    def body(self) -> Widget:
        return Horizontal(self.map, self.pattern, self.many)

    def grids(self) -> dict[str, Grid]:
        return {n: v.grid for n, v in (("heads", self.map), ("pattern", self.pattern)) if v.grid}

    def wants(self, app: "Loupe") -> dict[str, object]:
        study, views, c = app.study, app.state.views, app.cursor
        pair = (c.pos, c.src) if views["attention.stat"] == "pair" and app.counted() else None
        source = "prompt" if pair or "-" in views["which"] else views["attention.source"]
        return {
            "attention": Attention(study, c.layer, views["which"], views["attention.weighted"] == "on"),
            "heads": HeadStats(study, views["which"], source, pair),
        }

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        c, n = app.cursor, app.length()
        if app.drilled:
            app.move(pos=clip(c.pos + rows, n), src=clip(c.src + cols, n))
            return
        step_component(app, rows, cols)

    def reading(self, app: "Loupe") -> np.ndarray | None:
        """The head's attention from the cursor's position, or to it, over the positions; None when that is off."""
        way, pattern, c = app.state.views["attention.read"], app.result("attention", AttentionResult), app.cursor
        if way == "off" or pattern is None or pattern.layer != c.layer or c.pos >= len(pattern.tokens.ids):
            return None
        values = pattern.pattern[c.head]
        return values[c.pos] if way == "from" else values[:, c.pos]

    def enter(self, app: "Loupe") -> None:
        """Into the pattern and out of it; the source is where the head looks most."""
        if self.pattern.grid is not None:
            app.drilled = not app.drilled
            app.move(src=self.pattern.at[1])
            app.draw()

    def paint(self, app: "Loupe") -> None:
        views, c, state = app.state.views, app.cursor, app.state
        heads, pattern = app.result("heads", HeadStatsResult), app.result("attention", AttentionResult)
        stat = views["attention.stat"]
        marks = frozenset((i.node.layer, i.node.head) for i in state.interventions if i.node.site == "head" and state.enabled)
        title, note = app.run_name(views["which"]), ""
        if heads is None or stat not in heads.stats:
            self.map.show(None, (0, 0), views["mode"], app.waiting("heads"))
        else:
            every = lambda g: readings.map_addresses(len(g.rows), len(g.cols) - 2, len(g.cols) - 1)  # noqa: E731
            grid = self.with_circuit(app, "heads", (Same(heads), stat, marks), lambda: pictures.heads_grid(heads, stat, marks), every)
            self.map.styles.width = min(5 + 5 * len(grid.cols), self.size.width // 2)
            column = c.head if c.comp == "head" else len(grid.cols) - (2 if c.comp == "attn" else 1)
            self.map.show(grid, (clip(c.layer, len(grid.rows)), column), views["mode"])
            name = HEAD_STATS[stat]
            if stat == "pair" and app.tokens and max(c.pos, c.src) < app.length():
                t = pictures.texts_of(app.tokens.tokens)
                name = f"attention {c.pos} {show_token(t[c.pos])} → {c.src} {show_token(t[c.src])}"
            title += f" · {name} {pictures.scale(grid)}"
            note = f"on {'random repeated tokens' if heads.source == 'random' else 'the prompt'}"
        many = views["attention.layer"] == "all heads"
        self.pattern.set_class(many, "hidden")
        self.many.set_class(not many, "hidden")
        weighted = "pattern × ‖value written‖ · " if views["attention.weighted"] == "on" else ""
        self.show_title(app, ("heads", "attention"), title, ("pattern: hjkl, esc · " if app.drilled else "") + weighted + note)
        if pattern is None or pattern.layer != c.layer:
            self.pattern.show(None, (0, 0), views["mode"], app.waiting("attention"))
            self.info_line.show([])
            return
        if views["attention.layer"] == "all heads":
            self.many.show(pictures.small_patterns(pattern, c.head, self.pattern.size.width or self.many.size.width, self.size.height - 3, views["mode"]))
            self.info_line.show([pictures.pattern_cell(pattern, c.head, clip(c.pos, len(pattern.tokens.ids)), 0, False)])
            return
        grid = app.picture("pattern", (Same(pattern), c.head), lambda: pictures.pattern_grid(pattern, c.head))
        pos = clip(c.pos, len(grid.rows))
        row = np.nan_to_num(np.abs(grid.values[pos]), nan=-1.0)
        src = c.src if app.drilled or stat == "pair" else int(row.argmax())
        self.pattern.show(grid, (pos, clip(src, len(grid.cols))), views["mode"])
        self.info_line.show([pictures.pattern_cell(pattern, c.head, pos, src, app.drilled)])


class OutputPane(Pane):
    number, key, label, wide = "0", "output", "Output", False

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = Lines(classes="table")

    def body(self) -> Widget:
        return self.table

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        app.move(layer=clip(app.cursor.layer + rows, app.info.n_layers), pos=clip(app.cursor.pos + cols, app.length()))

    def stats(self, app: "Loupe") -> tuple[str, ...]:
        raise UserError("the output has one view")

    @staticmethod
    def partner(app: "Loupe", run: RunResult, pos: int) -> int:
        """The position of the other prompt beside one of the base prompt, where their lengths differ: END with END, else aligned, else the same; -1: none."""
        flip = app.state.base == "corrupt"
        n, m = (len(side.tokens.ids) for side in ((run.corrupt, run.clean) if flip else (run.clean, run.corrupt)))
        if n == m or pos == n - 1:
            return m - 1 if pos == n - 1 else pos
        check = app.answers.get(Check(app.state.prompt, app.state.align))
        pairs = check.alignment if isinstance(check, CheckResult) else ()
        return {p[flip]: p[not flip] for p in pairs}.get(pos, -1) if pairs else pos if pos < m else -1

    def paint(self, app: "Loupe") -> None:
        run, pos = app.result("run", RunResult), app.cursor.pos
        if run is None:
            self.show_title(app, ("run",), "", "")
            self.table.show([app.waiting("run")])
            self.info_line.show([])
            return
        token = pictures.texts_of(app.tokens.tokens)[pos] if app.tokens and pos < app.length() else ""
        there, name, side = (
            (pos, "", run.clean)
            if run.corrupt is None
            else (self.partner(app, run, pos), *(("clean", run.clean) if app.state.base == "corrupt" else ("corrupted", run.corrupt)))
        )
        other = "" if there == pos else f", {name} after " + (f"{there} {show_token(pictures.texts_of(side.tokens)[there])}" if there >= 0 else "none")
        self.show_title(app, ("run",), f"next token after {pos} {show_token(token)}{other}", "")
        prompt, k = app.state.prompt, max(1, min(8, self.size.height - 3))
        self.table.show(pictures.output_lines(run, pos, (name, there), k, self.size.width >= 84, set(prompt.answers), set(prompt.foils)))
        self.info_line.show([[(f" {run.convention}", DIM)]])


class AttributionPane(Pane):
    number, key, label, view = "3", "attribution", "Attribution", "attribution.view"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.side = GridView(), Lines(classes="second")

    def body(self) -> Widget:
        return Horizontal(self.map, self.side)

    def grids(self) -> dict[str, Grid]:
        return {"attribution": self.map.grid} if self.map.grid else {}

    def wants(self, app: "Loupe") -> dict[str, object]:
        state, c, which = app.state, app.cursor, app.state.views["which"]
        view = state.views["attribution.view"]
        if view == "set":
            return {"attribution": AttributionSet(replace(app.study, prompt_set=state.prompt_set), which)}
        if not app.counted():
            return {}  # until the run says how long the prompt is
        wants = {"attribution": Attribution(app.study, which, c.pos)}
        if view == "drill":
            if c.comp == "mlp":
                wants["drill"] = AttributionNeurons(app.study, which, c.layer, c.pos)
            elif c.comp == "head":
                wants["drill"] = AttributionSources(app.study, which, c.layer, c.head, c.pos)
        return wants

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        step_component(app, rows, cols)

    def enter(self, app: "Loupe") -> None:
        app.act("view", name=self.view, value="ranked" if app.state.views[self.view] == "drill" else "drill")

    def paint(self, app: "Loupe") -> None:
        views, c = app.state.views, app.cursor
        result = app.result("attribution", (AttributionResult, AttributionSetResult))
        name = app.run_name(views["which"])
        if result is None:
            self.show_title(app, ("attribution",), name, "")
            self.map.show(None, (0, 0), views["mode"], app.waiting("attribution"))
            self.side.show([])
            self.info_line.show([])
            return
        whole = isinstance(result, AttributionSetResult)
        cells = result.mean if whole else result.cells
        every = lambda g: readings.map_addresses(len(g.rows), len(g.cols) - 2, len(g.cols) - 1)  # noqa: E731
        grid = self.with_circuit(app, "attribution", (Same(result),), lambda: readings.cells_grid(cells), every)
        self.map.styles.width = min(5 + 7 * len(grid.cols), self.size.width * 3 // 5)
        column = c.head if c.comp == "head" else len(grid.cols) - (2 if c.comp == "attn" else 1)
        self.map.show(grid, (clip(c.layer, len(grid.rows)), column), views["mode"])
        n = max(2, self.size.height - 4)
        drill = app.result("drill", (AttributionSourcesResult, AttributionNeuronsResult)) if views[self.view] == "drill" else None
        if isinstance(drill, AttributionSourcesResult) and c.comp == "head":
            self.side.show(readings.source_lines(drill, n - 3))
        elif isinstance(drill, AttributionNeuronsResult) and c.comp == "mlp":
            self.side.show(readings.neuron_lines(drill, n - 6))
        elif views[self.view] == "drill" and c.comp != "attn":
            self.side.show([app.waiting("drill")])
        else:
            self.side.show(readings.ranked_lines(cells, result.std if whole else None, n))
        if whole:
            self.show_title(app, ("attribution",), f"{name} · mean over the prompt set {pictures.scale(grid)}", "direct logit attribution, frozen final scale")
            self.info_line.show([readings.set_line(result)])
        else:
            place = f"{result.pos} {show_token(pictures.texts_of(result.tokens)[result.pos])}"
            self.show_title(app, ("attribution",), f"{name} · direct logits at {place} {pictures.scale(grid)}", result.convention)
            self.info_line.show([readings.sum_line(result.total, result.logit, result.capped, result.error, result.convention)])


class PatchingPane(Pane):
    number, key, label, view = "4", "patching", "Patching", "patching.kind"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = GridView()
        self.cell = (0, 0)  # for cells that are not one node

    def body(self) -> Widget:
        return self.table

    def grids(self) -> dict[str, Grid]:
        return {"patching": self.table.grid} if self.table.grid else {}

    def stats(self, app: "Loupe") -> tuple[str, ...]:
        """Features only where an SAE is loaded."""
        return tuple(k for k in VIEWS[self.view] if k != "features" or app.state.sae)

    def request(self, app: "Loupe") -> Sweep:
        """The sweep that S runs: interventions act on the base prompt, so the base says which way."""
        state, views, c = app.state, app.state.views, app.cursor
        kind, op = views["patching.kind"], views["patching.op"]
        over = views["patching.over"] == "set"
        needs_set = over or op in ("mean", "mean_all", "resample")
        study = replace(app.study, prompt_set=state.prompt_set if needs_set else ())
        if over and state.prompt_set:  # the same for every prompt of the set
            study = replace(study, prompt=state.prompt_set[0])
        study = state.with_saes(study) if kind == "features" else study
        node = f"L{c.layer}H{c.head}" if kind == "cells" else f"L{c.layer}.mlp" if kind == "neurons" else ""
        if kind == "features":
            known = app.known_saes.get(state.sae)
            node, op = f"L{known.layer if known else c.layer}.sae", op if op in ("patch", "zero") else "zero"
        direction = "noise" if state.base == "clean" else "denoise"
        first = "estimate" if op == "patch" and kind not in ("pairs", "cumulative", "features") and views["patching.effect"] == "total" else ""
        return Sweep(study, kind, op, direction, views["patching.effect"], node, over_set=over, first=first)

    def wants(self, app: "Loupe") -> dict[str, object]:
        request = self.request(app)
        wants: dict[str, object] = {"sweep": request} if request in app.started else {}
        if (
            request.op == "patch"
            and request.effect == "total"
            and request.kind not in ("pairs", "cumulative", "features")
            and app.state.prompt.corrupt is not None
        ):
            wants["estimate"] = Estimate(
                request.study, request.kind, app.state.views["patching.estimate"], request.direction, node=request.node, over_set=request.over_set
            )
        return wants

    def shown(self, app: "Loupe") -> tuple[SweepResult | None, SweepResult | None]:
        """Truth and estimate of what is asked for now; those of another direction or prompt are not shown under this one's title."""
        request, (asked, got) = self.request(app), app.have.get("sweep", (None, None))
        truth = got if asked in (request, ("partial", request)) and isinstance(got, SweepResult) else None
        return truth, app.fresh("estimate", SweepResult)

    def at(self, app: "Loupe", result: SweepResult) -> tuple[int, int]:
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

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        result = next((r for r in self.shown(app) if r), None)
        if result is None:
            return
        r, c = self.at(app, result)
        self.go(app, result, clip(r + rows, len(result.rows)), clip(c + cols, len(result.cols)))

    def go(self, app: "Loupe", result: SweepResult, row: int, col: int) -> None:
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
        app.move(**where, **LensPane.place_of(node)) if node.site not in ("neuron", "embed") else app.draw()

    def node(self, app: "Loupe", pos: int | None) -> Node:
        result = next((r for r in self.shown(app) if r), None)
        if result is not None and (address := result.address(*self.at(app, result))):
            return parse_node(address)
        return super().node(app, pos)

    def enter(self, app: "Loupe") -> None:
        """The cell's node becomes an intervention."""
        op = app.state.views["patching.op"]
        app.toggle(Intervention(self.node(app, None), op))

    def paint(self, app: "Loupe") -> None:
        views = app.state.views
        truth, estimate = self.shown(app)
        request = self.request(app)
        names = {"denoise": "denoising: clean into corrupted", "noise": "noising: corrupted into clean"}
        what = (
            names[request.direction]
            if request.op == "patch"
            else f"{request.op} ablation of the {'clean' if request.direction == 'noise' else 'corrupted'} run"
        )
        title = (
            f"{request.kind} · {what} · {views['patching.show']}"
            + (" over the set" if request.over_set else "")
            + (" · direct" if request.effect == "direct" else "")
        )
        result = truth or estimate
        if result is not None and not np.isfinite(result.normalised).any() and views["patching.show"] not in ("metric", "p"):
            title += " (raw metric)"
        if result is None:
            self.show_title(app, ("sweep", "estimate"), title, "")
            message = app.waiting("sweep") if "sweep" in app.wanted else app.waiting("estimate") if "estimate" in app.wanted else [("  S runs the sweep", DIM)]
            self.table.show(None, (0, 0), views["mode"], message)
            self.info_line.show([])
            return
        shown = views["patching.show"]
        every = lambda g: [((r, c), a) for r in range(len(g.rows)) for c in range(len(g.cols)) if (a := result.address(r, c))]  # noqa: E731
        grid = self.with_circuit(app, "sweep", (Same(truth), Same(estimate), shown), lambda: readings.sweep_grid(truth, estimate, shown), every)
        done = f"truth {truth.done}/{truth.total}" if truth else "estimate: S runs the truth"
        if truth and truth.done < truth.total:  # first in the title, where it is seen
            title, done = f"{done}{app.left('sweep') if 'sweep' in app.wanted else ', cancelled: S runs it again'} · {title}", "truth"
        self.show_title(
            app, ("sweep", "estimate"), f"{title} {pictures.scale(grid)}", f"{done} · {result.warning + ' · ' if result.warning else ''}{result.convention}"
        )
        row, col = self.at(app, result)
        self.table.show(grid, (row, col), views["mode"])
        self.info_line.show([readings.sweep_cell(truth, estimate, row, col)])


class WeightsPane(Pane):
    number, key, label, view = "7", "weights", "Weights", "weights.view"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.table = GridView(), Lines(classes="second")

    def body(self) -> Widget:
        return Horizontal(self.map, self.table)

    def grids(self) -> dict[str, Grid]:
        return {"composition": self.map.grid} if self.map.grid else {}

    def height_needed(self) -> int:
        return 24

    def wants(self, app: "Loupe") -> dict[str, object]:
        c, view = app.cursor, app.state.views[self.view]
        if view in ("ov", "qk"):
            return {"weights": HeadWeights(c.layer, c.head, 40, int(app.state.views["weights.distance"]))}
        if view.startswith("composition"):
            return {"weights": Composition(c.layer, c.head)}
        return {"weights": Singular(c.layer, None if view.startswith("mlp") else c.head, view.removesuffix(" directions"))}

    def across(self, app: "Loupe", by: int) -> None:
        """The distance at which a rotary model's queries and keys are compared."""
        distances, now = VIEWS["weights.distance"], app.state.views["weights.distance"]
        app.act("view", name="weights.distance", value=distances[clip(distances.index(now) + by, len(distances))])

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        c = app.cursor
        app.move(layer=clip(c.layer + rows, app.info.n_layers), head=clip(c.head + cols, app.info.n_heads), comp="head")

    def paint(self, app: "Loupe") -> None:
        views, c = app.state.views, app.cursor
        view, n, w = views[self.view], max(2, self.size.height - 3), self.size.width - 2
        kind = CompositionResult if view.startswith("composition") else HeadWeightsResult if view in ("ov", "qk") else SingularResult
        result = app.result("weights", kind)
        name = f"L{c.layer} {view}" if view.startswith("mlp") else f"L{c.layer}H{c.head} {view}"
        self.map.set_class(not view.startswith("composition"), "hidden")
        if result is None or (result.layer, result.head) != (c.layer, None if view.startswith("mlp") else c.head):
            self.show_title(app, ("weights",), name, "")
            self.table.show([app.waiting("weights")])
            self.map.show(None, (0, 0), views["mode"])
            self.info_line.show([])
            return
        convention = getattr(result, f"{view}_convention", result.convention)
        self.show_title(app, ("weights",), name, convention)
        self.info_line.show([[(f" {convention}", DIM)]])
        if isinstance(result, CompositionResult):
            part = view.removeprefix("composition ")
            every = lambda g: [((n, h), f"L{n}H{h}") for n in range(len(g.rows)) for h in range(len(g.cols))]  # noqa: E731
            grid = self.with_circuit(app, "weights", (Same(result), part), lambda: readings.composition_grid(result, part), every)
            self.map.show(grid, (c.layer, c.head), views["mode"])
            self.table.show([[(f"{part.upper()}-composition of L{c.layer}H{c.head}", BOLD)], [("earlier layers: it reads what they wrote", DIM)],
                             [("later layers: they read what it wrote", DIM)], [(f"random heads: {result.baseline:.3f} ± {result.spread:.3f}", BOLD)]])  # fmt: skip
        else:
            lines = {"ov": readings.ov_lines, "qk": readings.qk_lines}.get(view, readings.singular_lines)
            self.table.show(lines(result, n, w))


PANES: dict[str, type[Pane]] = {p.key: p for p in (LensPane, AttentionPane, AttributionPane, PatchingPane, WeightsPane, OutputPane)}
