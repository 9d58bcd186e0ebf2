"""Pane 5: the circuit kept so far, paths to and from nodes, scores, discovery's curve, comparison."""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from textual.containers import Horizontal
from textual.widget import Widget

import drawings
import pictures
import readings
from techniques.circuits.requests import CompareResult, DiscoverResult, Interval, PathPatch, Score, ScoreResult
from techniques.patching.requests import SweepResult
from vocabulary.circuit import connected, LOGITS, owner, parse_edge
from vocabulary.nodes import Node, parse_node, UserError
from vocabulary.prompts import Study
from panes import Pane, clip
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Grid, GridView, Lines, Same, Spans

if TYPE_CHECKING:
    from tui import Loupe

PATHS = {"direct": "direct edge", "mlps": "through MLPs"}


class CircuitPane(Pane):
    number, key, label, view = "5", "circuit", "Circuit", "circuit.view"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.map, self.side = GridView(), Lines(classes="second")
        self.left: tuple | None = None  # where the cursor was left when it went to the embeddings' row of the paths
        self.top = 0  # the first line shown beside the map
        self.scores_of: tuple[Score | None, ScoreResult | None] = (None, None)  # the last scores, their request without groups

    def body(self) -> Widget:
        return Horizontal(self.map, self.side)

    def grids(self) -> dict[str, Grid]:
        return {"circuit": self.map.grid} if self.map.grid else {}

    def height_needed(self) -> int:
        return 22

    # ---------------------------------------------------------------- what is asked

    def study(self, app: "Loupe") -> Study:
        over = app.state.views["circuit.over"] == "set" and app.state.prompt_set
        needs = app.state.views["circuit.rest"] in ("mean", "mean_all", "resample")
        study = replace(app.study, interventions=(), base="clean", prompt_set=app.state.prompt_set if over or needs else (), saes=(), sae_error=True)
        study = replace(study, prompt=app.state.prompt_set[0]) if over else study  # the same for every prompt of the set
        current = app.state.current
        return app.state.with_saes(study) if current is not None and any(parse_node(n).site == "sae" for n in current.nodes) else study

    def score(self, app: "Loupe", what: tuple[str, ...] = ("faithfulness", "effects")) -> Score | None:
        views, circuit = app.state.views, app.state.current
        if circuit is None or not circuit.nodes:
            return None
        plain = replace(circuit, name="the circuit", found="", groups=circuit.groups if "completeness" in what else {})  # names do not change a score
        return Score(self.study(app), plain, what, views["circuit.rest"], self.by_edges(app), mlps=views["circuit.mlps"] == "count")

    @staticmethod
    def by_edges(app: "Loupe") -> bool:
        """Whether the circuit is scored by its edges: when they lead from embed to the logits, unless Y says otherwise."""
        by, circuit = app.state.views["circuit.by"], app.state.current
        return by == "edges" or by == "auto" and circuit is not None and bool(circuit.edges) and connected(circuit)

    def path(self, app: "Loupe") -> PathPatch:
        state, views = app.state, app.state.views
        over = views["circuit.over"] == "set" and bool(state.prompt_set)
        study = replace(app.study, prompt_set=state.prompt_set if over else ())
        study = replace(study, prompt=state.prompt_set[0]) if over else study
        direction = "noise" if state.base == "clean" else "denoise"
        if views["circuit.each"] == "receiver":
            node = super().node(app, None)
            sender = str(Node("mlp", node.layer)) if node.site == "mlp" else str(Node("head", node.layer or 0, app.cursor.head))
            return PathPatch(study, state.senders or (sender,), (), "receiver", views["circuit.path"], direction, over_set=over)
        return PathPatch(study, (), state.receivers, "sender", views["circuit.path"], direction, views["circuit.each"] == "position", over)

    def request(self, app: "Loupe") -> object | None:
        """What S runs in this view."""
        view = app.state.views[self.view]
        if view == "path":
            return self.path(app)
        return self.score(app, ("faithfulness", "effects", "completeness", "minimality") if view == "scores" else ("faithfulness", "effects"))

    def wants(self, app: "Loupe") -> dict[str, object]:
        request = self.request(app)
        slot = "path" if isinstance(request, PathPatch) else "score"
        return {slot: request} if request is not None and request in app.started else {}

    def scored(self, app: "Loupe") -> ScoreResult | None:
        """The scores of the circuit as it stands, the fullest there are; subsets of groups that were named later are not among them."""
        for what in (("faithfulness", "effects", "completeness", "minimality"), ("faithfulness", "effects")):
            request = self.score(app, what)
            if request is not None and isinstance(got := app.answers.get(request), ScoreResult):
                self.scores_of = replace(request, circuit=replace(request.circuit, groups={})), got
                return got
        asked, got = self.scores_of
        same = request is not None and asked is not None and replace(asked, what=()) == replace(request, what=(), circuit=replace(request.circuit, groups={}))
        return got if same else None

    def paths(self, app: "Loupe") -> SweepResult | None:
        request, (asked, got) = self.path(app), app.have.get("path", (None, None))
        if isinstance(app.answers.get(request), SweepResult):
            return app.answers[request]
        return got if asked == ("partial", request) and isinstance(got, SweepResult) else None

    # ---------------------------------------------------------------- the cursor

    def cell(self, app: "Loupe", result: SweepResult | None) -> tuple[int, int]:
        c = app.cursor
        if result is not None and result.rows[-1] == LOGITS:
            return clip(c.layer, len(result.rows)), clip(3 * c.head if c.comp == "head" else len(result.cols) - 1, len(result.cols))
        if result is not None and self.by_pos(result):
            node = str(self.node(app, None))
            return result.rows.index(node) if node in result.rows else 0, clip(c.pos, len(result.cols))
        if result is not None and self.embed(app):
            return 0, 0
        return c.layer + (result is not None), c.head if c.comp == "head" else app.info.n_heads

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        c, n, view = app.cursor, app.info.n_heads, app.state.views
        result = self.paths(app) if view[self.view] == "path" and view["circuit.each"] != "receiver" else None
        if result is not None and self.by_pos(result):
            row, col = self.cell(app, result)
            node = parse_node(result.rows[clip(row + rows, len(result.rows))])
            where = {} if node.site == "embed" else {"layer": node.layer, "comp": node.site} | ({"head": node.head} if node.site == "head" else {})
            app.move(pos=clip(col + cols, len(result.cols)), **where)
            self.left = self.here(app) if node.site == "embed" else None
            app.draw()
            return
        if result is not None and (self.embed(app) or rows < 0 and c.layer == 0):  # the row of the embeddings, above layer 0
            self.left = self.here(app) if rows <= 0 else None
            app.draw()
            return
        self.left = None
        col = clip((c.head if c.comp == "head" else n) + cols, n + 1)
        where = {"comp": "head", "head": col} if col < n else {"comp": "mlp"}
        app.move(layer=clip(c.layer + rows, app.info.n_layers), **where)

    def node(self, app: "Loupe", pos: int | None) -> Node:
        c = app.cursor
        if self.embed(app):
            return Node("embed", pos=pos)
        return Node("head", c.layer, c.head, pos=pos) if c.comp == "head" else Node("mlp", c.layer, pos=pos)

    @staticmethod
    def here(app: "Loupe") -> tuple:
        return app.cursor.layer, app.cursor.comp, app.cursor.head

    def embed(self, app: "Loupe") -> bool:
        """Whether the cursor stands on the embeddings: until it goes anywhere else."""
        return self.left == self.here(app) and app.state.views[self.view] == "path" and app.state.views["circuit.each"] != "receiver"

    @staticmethod
    def by_pos(result: SweepResult) -> bool:
        """Rows of senders, columns of positions."""
        return result.cols[-1].isdigit()

    def across(self, app: "Loupe", by: int) -> None:
        """The lines beside the map."""
        self.top = max(0, self.top + by * max(1, self.size.height // 2))
        app.draw()

    def enter(self, app: "Loupe") -> None:
        """In the paths: the edges from the node under the cursor to the receivers, kept or dropped."""
        if app.state.views[self.view] != "path" or app.state.views["circuit.each"] == "receiver":
            raise UserError("⏎ keeps the path under the cursor, where rows are senders: P turns to them (in the path view); c keeps a node anywhere")
        sender = str(self.node(app, None))
        for receiver in app.state.receivers:
            app.act("keep", part=f"{sender}->{receiver}")
        if app.state.views["circuit.by"] == "auto" and not connected(app.state.current):
            app.say(f"{sender} → {', '.join(app.state.receivers)}: {'kept' if f'{sender}->{app.state.receivers[-1]}' in app.state.current.edges else 'dropped'};"
                    " scored by nodes until its edges lead from embed to logits")  # fmt: skip
            return
        app.say(f"{sender} → {', '.join(app.state.receivers)}: {'kept' if f'{sender}->{app.state.receivers[-1]}' in app.state.current.edges else 'dropped'}")

    # ---------------------------------------------------------------- drawing

    def paint(self, app: "Loupe") -> None:
        state, views = app.state, app.state.views
        view, circuit, result = views[self.view], state.current, self.scored(app)
        name = f"{circuit.name} ({len(circuit.nodes)} nodes, {len(circuit.edges)} edges)" if circuit else "no circuit yet"
        if app.info is None:
            self.show_title(app, ("path", "score"), name, "")
            self.map.show(None, (0, 0), views["mode"], [(f"  {app.busy}", DIM)])
            self.side.show([])
            self.info_line.show([])
            return
        if view == "path":
            self.paint_path(app)
            return
        self.side.styles.width = "1fr"
        parts = self.members(circuit) if circuit else {}
        effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else {}
        grid = app.picture("circuit", (circuit, Same(result)), lambda: map_grid(app.info, parts, effects))
        mapped = self.map.styles.width = min(6 + 8 * len(grid.cols), self.size.width // 2)
        self.map.show(grid, self.cell(app, None), views["mode"])
        n = max(3, self.size.height - 3)
        lines = {
            "map": self.summary, "drawing": self.drawing, "list": self.listing, "scores": self.scores, "curve": self.curve, "compare": self.compared,
        }[view](app, circuit, result, max(20, self.size.width - mapped - 3), n)  # fmt: skip
        self.top = clip(self.top, len(lines))
        more = len(lines) - self.top > n
        self.side.show(lines[self.top : self.top + n - more] + [[(f"… {len(lines) - self.top - n + 1} more lines: . and , scroll", DIM)]] * more)
        by = "by edges" if circuit is not None and circuit.edges and self.by_edges(app) else f"by nodes, MLPs {views['circuit.mlps']}"
        note = result.convention if result is not None else f"{by}, rest {views['circuit.rest']}, over the {'set' if self.study(app).prompt_set else 'prompt'}"
        if app.state.interventions and app.state.enabled and view not in ("curve", "compare"):
            note = f"interventions left out: a circuit is one of the model itself; {note}"
        if view == "curve":
            note = "how it was found is in its title"
        score = f" · faithfulness {result.faithfulness.mean:.3f}" if result is not None else ""
        busy = app.left("score") if "score" in app.wanted and app.stale("score") else ""
        self.show_title(app, ("score",), f"{view} · {name}{score}{busy}", note)
        self.info_line.show([self.about(app, circuit, effects)])

    @staticmethod
    def members(circuit) -> dict[tuple[int, int], str]:
        """Cells [layer, head or -1 for the MLP] of the circuit's nodes and what is kept there."""
        out: dict[tuple[int, int], str] = {}
        for address in circuit.nodes:
            node = parse_node(address)
            if node.site in ("head", "mlp"):
                at = node.layer, node.head if node.site == "head" else -1
                part = (node.part if node.site == "head" and node.part != "z" else "") + ("" if node.pos is None else f"@{node.pos}")
                out[at] = f"{out[at]} {part}".strip() if at in out else part
        return out

    def about(self, app: "Loupe", circuit, effects: dict[str, float]) -> Spans:
        node = str(self.node(app, None))
        mine = [n for n in circuit.nodes if owner(n).split("@")[0] == node] if circuit else []
        groups = [g for g, some in circuit.groups.items() if set(mine) & set(some)] if circuit else []
        words = f"in {circuit.name}" + (f" as {', '.join(mine)}" if mine != [node] else "") if mine else "not in the circuit: c keeps it"
        effect = "".join(f"  {n} alone away {effects[n]:+.4f}" for n in mine if n in effects)
        return [(f" {node} ", BOLD), (words, GOOD if mine else DIM), (f"  {', '.join(groups)}", PLAIN), (effect, PLAIN)]

    def summary(self, app, circuit, result, width: int, n: int) -> list[Spans]:
        if circuit is None:
            return [
                [("c keeps the node under the cursor, in any pane", PLAIN)],
                [("Y circuits: open, published, export · U discovers one", PLAIN)],
                [("v paths, drawing, scores, curve", PLAIN)],
                [("S runs what the view shows", PLAIN)],
            ]
        lines = score_lines(result) if result is not None else [[("S scores it: faithfulness and single effects", DIM)]]
        if features := [n for n in circuit.nodes if parse_node(n).site == "sae"]:
            lines += [[(line, PLAIN)] for line in wrap(f"features: {' '.join(features)}", width)]
        if circuit.found:
            lines += [[(line, DIM)] for line in wrap(f"found: {circuit.found}", width)]
        return lines

    def drawing(self, app, circuit, result, width: int, n: int) -> list[Spans]:
        if circuit is None:
            return self.summary(app, circuit, result, width, n)
        effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else None
        return [[(line, PLAIN)] for line in drawings.draw(circuit, effects, width)]

    def listing(self, app, circuit, result, width: int, n: int) -> list[Spans]:
        if circuit is None:
            return self.summary(app, circuit, result, width, n)
        group_of = {x: g for g, some in circuit.groups.items() for x in some}
        effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else {}
        minimal = dict(zip(result.parts, result.minimal.tolist())) if result is not None else {}
        parts = sorted(effects, key=lambda p: -abs(effects[p])) or list(circuit.nodes)
        rest = [p for p in (*circuit.nodes, *circuit.edges) if p not in parts]
        lines: list[Spans] = [[(f"{'part':18}{'alone away':>11}{'minimality':>11}  group", BOLD)]]
        for p in [*parts, *rest]:
            numbers = (f"{effects[p]:+11.4f}" if p in effects else " " * 11) + (f"{minimal[p]:11.3f}" if p in minimal else " " * 11)
            lines.append([(f"{p:18}{numbers}  ", PLAIN), (group_of.get(p, ""), DIM)])
        return lines

    def scores(self, app, circuit, result, width: int, n: int) -> list[Spans]:
        if result is None:
            error = app.error("score")
            return [[(line, BAD)] for line in wrap(error, width)] if error else [app.waiting("score") if "score" in app.wanted else [("  S scores the circuit: faithfulness, completeness, minimality", DIM)]]  # fmt: skip
        lines = score_lines(result)
        if result.subsets:
            worst = int(np.abs(result.without_circuit - result.without_model).argmax())
            lines += [
                [(f"incompleteness {result.incompleteness:.4f}", BOLD), (f" (difference {said(result.worst)}) worst of {len(result.subsets)} subsets K", DIM)],
                [(f"  K = {' '.join(result.subsets[worst]) or 'nothing'}", PLAIN)],
                [(f"  F(C∖K) {result.without_circuit[worst]:+.4f}  F(M∖K) {result.without_model[worst]:+.4f}", PLAIN)],
            ]
        if result.minimal.size:
            order = np.argsort(result.minimal)
            lines += [[("minimality, least first: |F(C∖K) − F(C∖K∖v)| / F(M)", BOLD)]]
            lines += [[(f"  {result.parts[i]:16}{float(result.minimal[i]):7.3f} ({float(result.minimal_low[i]):.3f}…{float(result.minimal_high[i]):.3f})  ", WARN if result.minimal[i] < 0.01 else PLAIN),
                       (f"K = {' '.join(result.minimal_with[i]) or 'nothing'}", DIM)] for i in order.tolist()]  # fmt: skip
        if result.faithfulness.values.size > 1:
            each = " ".join(f"{v:.2f}" for v in result.faithfulness.values.tolist())
            lines += [[("each prompt's own faithfulness", BOLD)], *[[(f"  {line}", PLAIN)] for line in wrap(each, width - 2)]]
        return lines

    def curve(self, app, circuit, result, width: int, n: int) -> list[Spans]:
        found = app.found.get(circuit.name) if circuit else None
        if not isinstance(found, DiscoverResult) or not found.counts.size:
            return [[("  a discovery draws this curve: U", DIM)]]
        what = {"greedy": "heads", "features": "features"}.get(found.method, "edges")
        best = dict(zip(found.counts.tolist(), found.faithfulness.tolist()))  # sizes that pruning made the same: the last
        counts = sorted(best)
        places = [float(c) for c in counts]
        asked = app.found_by.get(circuit.name)
        n = len(asked.study.prompt_set) or 1 if asked is not None else 0
        title = f"faithfulness against {what} ({found.method}" + (f", rest {asked.rest}, {n} prompt{'s' * (n != 1)})" if asked is not None else ")")
        return pictures.chart(title, [str(c) for c in counts], {title: [best[c] for c in counts]}, min(width, 100), max(8, n - 1), places)

    def compared(self, app, circuit, result, width: int, n: int) -> list[Spans]:
        got = app.result("compare", CompareResult)
        if got is None or circuit is None or got.here != circuit.name:
            return [[("  Y, then compare: with a published circuit or another", DIM)]]
        lines: list[Spans] = [[(f"{got.here} and {got.there}", BOLD)], [(f"overlap of nodes {share(got.nodes)}, of edges {share(got.edges)}", PLAIN)]]
        if got.false_positive.size:
            lines.append([(f"area under the ROC curve {got.area:.3f} ({len(got.false_positive)} steps)", PLAIN)])
        for title, some in (("in both", got.both), (f"only in {got.here}", got.only_here), (f"only in {got.there}", got.only_there)):
            lines += [[(f"{title} ({len(some)})", BOLD)], *[[(f"  {line}", PLAIN)] for line in wrap(" ".join(some), width - 2)]]
        return [*lines, *[[(line, DIM)] for line in wrap(got.convention, width)]]

    def paint_path(self, app: "Loupe") -> None:
        views, request, result = app.state.views, self.path(app), self.paths(app)
        ends = (
            f"{', '.join(request.senders)} → each receiver"
            if request.each == "receiver"
            else f"every node{' by position' * request.by_pos} → {', '.join(request.receivers)}"
        )
        way = "noising" if request.direction == "noise" else "denoising"
        title = f"path · {ends} · {PATHS[request.convention]} · {way}" + (" over the set" if request.over_set else "")
        self.map.styles.width = "1fr"
        self.side.styles.width = 0
        self.side.show([])
        if result is None:
            self.show_title(app, ("path",), title, "")
            self.map.show(None, (0, 0), views["mode"], app.waiting("path") if "path" in app.wanted else [("  S runs it · Q chooses receivers · Z direct or through MLPs · P by position, or to each receiver", DIM)])  # fmt: skip
            self.info_line.show([])
            return
        edges = set(app.state.current.edges) if app.state.current else set()
        grid = app.picture("path", (Same(result), frozenset(edges)), lambda: path_grid(result, request, edges))
        done = "" if result.done == result.total else f"{result.done}/{result.total}{app.left('path')} · "
        self.show_title(app, ("path",), f"{done}{title} {pictures.scale(grid)}", result.convention)
        row, col = self.cell(app, result)
        self.map.show(grid, (row, col), views["mode"])
        self.info_line.show([readings.sweep_cell(result, None, row, col)])


# ------------------------------------------------------------------ pictures


def wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, max(12, width)) or [""]


def map_grid(info, parts: dict[tuple[int, int], str], effects: dict[str, float]) -> Grid:
    """Layers by heads and MLP: what is kept, and the effect of taking it alone away where that is known."""
    n = info.n_heads
    values, text = np.full((info.n_layers, n + 1), np.nan), [["·"] * (n + 1) for _ in range(info.n_layers)]
    for (layer, head), part in parts.items():
        if not layer < info.n_layers or not head < n:
            continue
        col = n if head < 0 else head
        mine = [
            e for p, e in effects.items() if "->" not in p and (node := parse_node(p)).layer == layer and (node.head if node.site == "head" else -1) == head
        ]
        values[layer, col] = mine[0] if mine else 0.0
        text[layer][col] = f"{mine[0]:+.2f}" if mine else f"● {part}".strip()
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    marks = frozenset((layer, n if head < 0 else head) for layer, head in parts)
    return Grid(values, [f"L{i}" for i in range(info.n_layers)], [*(f"H{h}" for h in range(n)), "MLP"], -hi, hi, text, signed=True, cell=(5, 7), marks=marks)


def path_grid(result: SweepResult, request: PathPatch, edges: set[str]) -> Grid:
    """The effect of each path; kept edges are marked."""
    values = readings.change(result).astype(float)
    hi = max(float(np.nanmax(np.abs(values), initial=0)), 1e-6)
    mine = {e.sender for e in map(parse_edge, edges) if request.each == "sender" and e.receiver in request.receivers}
    kept = {(int(r), int(c)) for r, c in zip(*np.nonzero(np.isfinite(values))) if mine and result.address(int(r), int(c)).split("@")[0] in mine}
    cols = pictures.texts_of(result.tokens) if request.by_pos else list(result.cols)
    return Grid(values, list(result.rows), cols, -hi, hi, signed=True, cell=(5, 8), marks=frozenset(kept))


def share(x: float) -> str:
    return "none (neither has any)" if x != x else f"{x:.3f}"


def said(x: Interval) -> str:
    return f"{x.mean:+.4f}" + (f" ({x.low:+.3f}…{x.high:+.3f})" if np.isfinite(x.low) else "")


def score_lines(r: ScoreResult) -> list[Spans]:
    return [
        [(f"faithfulness {said(r.faithfulness)}", BOLD)],
        [(f"  F model {said(r.model)}", PLAIN)],
        [(f"  F circuit {said(r.alone)}", PLAIN)],
        [(f"  F nothing {said(r.empty)}", PLAIN)],
        *([[(r.warning, WARN)]] if r.warning else []),
    ]
