"""Pane 6: an SAE's features at the cursor's position, what each one does, examples, and the graph between two SAEs."""

import json
import re
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from rich.style import Style
from textual.containers import Horizontal
from textual.widget import Widget

import pictures
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
from panes import Pane, clip
from utils import ROOT, show_token
from widgets import BAD, BOLD, DIM, GOOD, PLAIN, WARN, Grid, Item, Lines, Spans

if TYPE_CHECKING:
    from tui import Loupe

SHADES = " ░▒▓█"
VERDICTS = {"good": GOOD, "warn": WARN, "refuse": BAD}
REVERSE = Style(reverse=True)


def layer_of(source: str, app: "Loupe") -> int:
    got = app.known_saes.get(source)
    return got.layer if got is not None else -1


class FeaturePane(Pane):
    number, key, label, view = "6", "features", "Features", "features.view"

    def __init__(self, **kw):
        super().__init__(**kw)
        self.list, self.side = Lines(classes="second"), Lines(classes="second")
        self.index = 0  # the feature under the cursor
        self.row, self.source, self.order = 0, "", ""
        self.trail: list[tuple[str, int, int]] = []  # walked from, in the graph: SAE, feature, position

    def body(self) -> Widget:
        return Horizontal(self.list, self.side)

    def height_needed(self) -> int:
        return 24

    # ---------------------------------------------------------------- what is asked

    def run(self, app: "Loupe") -> str:
        which = app.state.views["which"]
        return which if "-" not in which else "now"

    def examples(self, app: "Loupe") -> Examples:
        return Examples(app.state.sae, indices=(self.index,))

    def graph(self, app: "Loupe") -> FeatureGraph | None:
        """From the loaded SAE of the nearest layer below into the feature under the cursor."""
        here = layer_of(app.state.sae, app)
        below = [s for s in app.state.saes if 0 <= layer_of(s, app) < here]
        if not below:
            return None
        up = max(below, key=lambda s: layer_of(s, app))
        return FeatureGraph(app.study, up, app.state.sae, self.index, app.cursor.pos, self.run(app))

    def preflight(self, app: "Loupe", source: str) -> Preflight:
        return Preflight(replace(app.study, interventions=(), saes=()), source)

    def show_feature(self, app: "Loupe", node: Node) -> str:
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

    def find(self, app: "Loupe", needle: str) -> list[dict]:
        """f690, or a token."""
        if re.fullmatch(r"f\d+", needle) and layer_of(app.state.sae, app) >= 0:
            if wrong := self.show_feature(app, Node("sae", layer_of(app.state.sae, app), index=int(needle[1:]))):
                raise UserError(wrong)
            return [{"pos": app.cursor.pos}]
        return super().find(app, needle)

    def wants(self, app: "Loupe") -> dict[str, object]:
        state, source = app.state, app.state.sae
        if not source:
            return {}
        wants: dict[str, object] = {"preflight": self.preflight(app, source)}
        got = app.fresh_or_known("preflight", wants["preflight"])
        if not isinstance(got, PreflightResult) or got.verdict == "refuse" or not app.counted():
            return wants
        wants["features"] = Features(app.study, source, self.run(app), app.cursor.pos, state.views["features.order"], 60)
        view = state.views[self.view]
        listed = app.result("features", FeaturesResult)
        if listed is not None and listed.info.source == source:
            if (self.source != source or self.order not in ("", listed.order)) and listed.index.size:  # a newly loaded SAE, or another order: its first feature
                self.source, self.row, self.index = source, 0, int(listed.index[0])
            self.order = listed.order
            wants["feature"] = Feature(app.study, source, self.index, self.run(app), app.cursor.pos)
        if view == "graph" and (graph := self.graph(app)) is not None:
            wants["graph"] = graph
        if view == "examples" and self.examples(app) in app.started:
            wants["examples"] = self.examples(app)
        return wants

    # ---------------------------------------------------------------- the cursor

    def rows(self, app: "Loupe") -> int:
        if app.state.views[self.view] == "graph":
            got = app.result("graph", FeatureGraphResult)
            return len(got.index) if got is not None else 0
        got = app.result("features", FeaturesResult)
        return len(got.index) if got is not None else 0

    def step(self, app: "Loupe", rows: int, cols: int) -> None:
        if cols:
            app.move(pos=clip(app.cursor.pos + cols, app.length()))
        if rows and (n := self.rows(app)):
            listed = app.result("features", FeaturesResult)
            if app.state.views[self.view] != "graph" and listed is not None and self.index in listed.index.tolist():
                self.row = listed.index.tolist().index(self.index)
            self.row = clip(self.row + rows, n)
            if app.state.views[self.view] != "graph" and listed is not None:
                self.index = int(listed.index[self.row])
            app.refresh_wants()

    def node(self, app: "Loupe", pos: int | None) -> Node:
        if layer_of(app.state.sae, app) < 0:
            return super().node(app, pos)
        return Node("sae", layer_of(app.state.sae, app), index=self.index, pos=pos)

    def enter(self, app: "Loupe") -> None:
        """In the graph: go to the feature that the edge comes from."""
        if app.state.views[self.view] != "graph":
            raise UserError("⏎ walks the graph between two SAEs: v turns to it")
        got = app.result("graph", FeatureGraphResult)
        if got is None or not len(got.index):
            raise UserError("there is no edge to walk yet")
        row = clip(self.row, len(got.index))
        self.trail.append((app.state.sae, self.index, app.cursor.pos))
        self.index, self.row, self.source = int(got.index[row]), 0, got.up.source
        app.act("show_sae", source=got.up.source)
        app.move(pos=int(got.at[row]))
        app.say(f"L{got.up.layer}.sae.f{self.index}@{int(got.at[row])}: esc goes back")

    def back(self, app: "Loupe") -> bool:
        if not self.trail:
            return False
        source, self.index, pos = self.trail.pop()
        self.source = source
        if source in app.state.saes:
            app.act("show_sae", source=source)
        app.move(pos=clip(pos, app.length()))
        return True

    def copies(self, app: "Loupe") -> list[Item]:
        got = app.result("feature", FeatureResult)
        if got is None or not got.neuronpedia:
            return []
        return [Item("neuronpedia", got.neuronpedia, ".txt", lambda: f"{got.neuronpedia}\n"), Item("page", got.address, ".txt", lambda: f"{got.address}\n")]

    def grids(self) -> dict[str, Grid]:
        return {}

    # ---------------------------------------------------------------- drawing

    def paint(self, app: "Loupe") -> None:
        state, view, source = app.state, app.state.views[self.view], app.state.sae
        narrow = self.size.width < 76
        self.list.styles.width = "1fr" if narrow else min(58, max(44, self.size.width * 11 // 20))
        self.side.set_class(narrow and view == "features" and self.size.height < 30, "hidden")
        n, error = max(3, self.size.height - 3), "kept" if state.sae_error else "dropped"
        flight = app.result("preflight", PreflightResult) if source else None
        if flight is None or flight.info.source != source:
            self.list.styles.width = "1fr"
            self.side.set_class(True, "hidden")
        if not source:
            self.show_title(app, (), "no SAE loaded", "")
            self.list.show(
                [[("  z lists the SAEs and transcoders that fit this model", PLAIN)], [("  (sae_lens is imported then: about 14 s the first time)", DIM)]]
            )
            self.info_line.show([])
            return
        if flight is None or flight.info.source != source:
            wrong = app.error("preflight")
            self.show_title(app, ("preflight",), f"{source} · {'not loaded' if wrong else 'loading'}", "")
            hint = "  z puts it away, or loads another one" if wrong else "  sae_lens is imported first (about 14 s), then the preflight runs"
            self.list.show([app.waiting("preflight"), [(hint, DIM)]])
            self.info_line.show([])
            return
        app.known_saes[source] = flight.info
        bad = "" if flight.verdict == "good" else f" · {flight.verdict.upper()}: cosine {flight.cosine:.3f}"
        hook = flight.info.hook.replace("blocks.", "L").replace(".hook_", ".")
        title = f"{view} · {source}{'' if source.endswith(hook) else f' at {hook}'}{bad}"
        ways = f"{flight.info.view} activation · error term {error}"
        if view == "preflight" or flight.verdict == "refuse":
            self.show_title(app, ("preflight",), f"{title} · {ways}", flight.convention)
            self.list.styles.width = "1fr"
            self.side.set_class(True, "hidden")
            self.list.show(preflight_lines(flight)[:n])
            self.info_line.show([])
            return
        got = app.result("features", FeaturesResult)
        detail = app.result("feature", FeatureResult)
        if detail is not None and (detail.index != self.index or detail.info.source != source):
            detail = None
        if view == "graph":
            self.paint_graph(app, f"{title} · {ways}", n)
        elif got is None or got.info.source != source:
            self.show_title(app, ("features",), f"{title} · {ways}", "")
            self.list.show([app.waiting("features")])
        else:
            name = app.run_name(got.which)
            place = f"{got.pos} {show_token(pictures.texts_of(got.tokens)[got.pos])}"
            self.show_title(app, ("features", "feature"), f"{title} · {place} by {got.order} · {name} · {ways}", got.convention)
            self.list.show(feature_lines(got, self.index, n, self.list.styles.width.value if not narrow else self.size.width))
        width = max(24, self.size.width - int(self.list.styles.width.value if not narrow else self.size.width // 2) - 3)
        if view == "examples":
            found = app.result("examples", ExamplesResult)
            fits = found is not None and found.indices == (self.index,) and found.info.source == source
            self.side.show(
                example_lines(found, width)[:n]
                if fits
                else [app.waiting("examples") if "examples" in app.wanted else [("  S looks for examples in the text (a job)", DIM)]]
            )
        else:
            self.side.show(detail_lines(detail, width, app)[:n] if detail is not None else [app.waiting("feature")] if "feature" in app.wanted else [])
        active = [i for i in state.interventions if i.node.site == "sae"]
        self.info_line.show(
            [[(f" {self.node(app, None)} ", BOLD), (f"{len(state.saes)} SAEs loaded: {' '.join(state.saes)}  ", DIM), (" ".join(map(str, active)), PLAIN)]]
        )

    def paint_graph(self, app: "Loupe", title: str, n: int) -> None:
        got, request = app.result("graph", FeatureGraphResult), self.graph(app)
        if request is None:
            self.show_title(app, (), title, "")
            self.list.show([[("  the graph needs an SAE of a layer below: z loads another one", DIM)]])
            return
        if got is None:
            self.show_title(app, ("graph",), title, "")
            self.list.show([app.waiting("graph")])
            return
        self.show_title(app, ("graph",), f"{title} · into f{got.target}@{got.pos} from {got.up.source}", got.convention)
        size = max(np.abs(got.contribution).max(initial=0), 1e-9)
        texts = pictures.texts_of(got.tokens)
        lines: list[Spans] = []
        for k, (i, at, a, c) in enumerate(zip(got.index.tolist(), got.at.tolist(), got.activation.tolist(), got.contribution.tolist())):
            mark = REVERSE if k == clip(self.row, len(got.index)) else Style()
            lines.append([(f"f{i}@{at}".ljust(16) + show_token(texts[at], 11).ljust(12) + f"{a:11.3f}{c:+10.4f} ", PLAIN + mark), (bar(c / size), PLAIN)])
        rows = [("features not listed", got.rest), *got.rows.items(), ("sum", got.total)]
        fit = max(2, n - len(rows) - 1)
        top = max(0, min(clip(self.row, len(got.index)) - fit // 2, len(lines) - fit)) if lines else 0
        count = f"from {top + 1}–{min(top + fit, len(lines))}/{len(lines)}" if lines else "from"
        lines = [[(f"{count:16}{'token':12}{'activation':>11}{'adds':>10}", BOLD)], *lines[top : top + fit]] + [
            [(f"{name:28.28}{value:+21.4f}", BOLD if name == "sum" else DIM)] for name, value in rows
        ]
        self.list.show(lines)


# ------------------------------------------------------------------ pictures


@cache
def shipped_labels() -> dict[tuple[str, int], str]:
    """What the card of the zoo says that its features fire on."""
    path = ROOT / "zoo" / "saes" / "features.json"
    return {(e["sae"], e["feature"]): e["fires_on"] for e in json.loads(path.read_text(encoding="utf-8"))} if path.is_file() else {}


def bar(share: float, width: int = 8) -> str:
    """A bar of at most `width` cells; its sign is in the number beside it."""
    return "█" * round(min(1.0, abs(share)) * width)


def feature_lines(r: FeaturesResult, index: int, n: int, width: float) -> list[Spans]:
    """Ranked features, and the rows that make up the activation."""
    values = getattr(r, r.order)
    size = max(float(np.abs(values).max(initial=0)), 1e-9)
    known = shipped_labels()
    lines: list[Spans] = []
    for i, a, g, d, v in zip(r.index.tolist(), r.activation.tolist(), r.attribution.tolist(), r.direct.tolist(), values.tolist()):
        style = PLAIN + REVERSE if i == index else PLAIN
        more = f"{bar(v / size)} {r.labels.get(i) or known.get((r.info.source, i), '')}" if width > 50 else ""
        lines.append([(f"f{i:<8}{a:10.3f}{g:+12.4f}{d:+9.4f} ", style), (more, DIM)])
    tail = [("other features", r.rest), ("bias", r.bias), ("reconstruction", r.reconstruction), ("error", r.error), ("activation", r.total)]
    at = next((k for k, i in enumerate(r.index.tolist()) if i == index), 0)
    room = max(2, n - len(tail) - 2)
    top = max(0, min(at - room // 2, len(lines) - room))
    count = f"{top + 1}–{min(top + room, len(lines))}/{r.active}" if lines else "none"
    shown = [[(f"{count:9}{'activation':>10}{'attribution':>12}{'direct':>9}", BOLD)], *lines[top : top + room]]
    number = lambda x: " " * 12 if np.isnan(x) else f"{x:+12.4f}"  # noqa: E731
    shown += [
        [(f"{name:14}" + (f"{x:.0f} more" if name == "other features" else f"‖{x:.1f}‖").rjust(9)[:9] + number(g)[3:] + number(d)[3:], DIM)]
        for name, (x, g, d) in tail
    ]
    return [*shown, [(f"‖ ‖ norm; error of the sum {r.gap:.1e}", DIM)]]


def detail_lines(r: FeatureResult, width: int, app: "Loupe") -> list[Spans]:
    """What one feature does: over the tokens, to the logits, beside which others, from which tokens and heads."""
    texts, top = pictures.texts_of(r.tokens), max(float(r.activation.max(initial=0)), 1e-9)
    label = r.label or shipped_labels().get((r.info.source, r.index), "")
    lines: list[Spans] = [[(f"f{r.index}", BOLD), (f" {label} {r.neuronpedia}".rstrip(), PLAIN), ("  activation over the tokens", DIM)]]
    row: Spans = []
    used = 0
    for n, (text, a) in enumerate(zip(texts, r.activation.tolist())):
        token = show_token(text, 10, fill=False)
        piece = token + (SHADES[1 + min(3, int(4 * a / top))] if a > 0 else " ")
        if used + len(piece) > width:
            lines.append(row)
            row, used = [], 0
        row.append((piece, (BOLD if a > 0 else DIM) + (REVERSE if n == r.pos else Style())))
        used += len(piece)
    lines.append(row)
    name = lambda i: show_token(r.texts.get(i, str(i)), 10, fill=False)  # noqa: E731
    wide = lambda some: some[: max(2, width // 13)]  # noqa: E731
    lines.append([("logits + ", DIM), (" ".join(f"{name(i)} {v:.2f}" for i, v in wide(list(zip(r.top_ids.tolist(), r.top_logits.tolist())))), PLAIN)])
    lines.append([("logits − ", DIM), (" ".join(f"{name(i)} {v:.2f}" for i, v in wide(list(zip(r.bottom_ids.tolist(), r.bottom_logits.tolist())))), PLAIN)])
    lines.append([("nearest  ", DIM), (" ".join(f"f{i} {c:.2f}" for i, c in wide(list(zip(r.nearest.tolist(), r.cosine.tolist())))), PLAIN)])
    lines.append([("with     ", DIM), (" ".join(f"f{i} {c:.2f}" for i, c in wide(list(zip(r.together.tolist(), r.jaccard.tolist())))), PLAIN)])
    order = np.argsort(-np.abs(r.sources))[:5].tolist()
    lines.append([(f"pre-activation at {r.pos} {r.total:+.3f}, through heads by source token", BOLD)])
    lines += [[(f"  {show_token(texts[i], 12)} {i:3} {float(r.sources[i]):+9.4f}", PLAIN)] for i in order]
    if r.heads.size:
        best = np.argsort(-np.abs(r.heads), axis=None)[:4].tolist()
        cells = [divmod(b, r.heads.shape[1]) for b in best]
        lines.append([("  heads  ", DIM), (" ".join(f"L{x}H{h} {float(r.heads[x, h]):+.3f}" for x, h in cells), PLAIN)])
    lines.append([(f"  rest (embeddings, MLPs, biases) {r.rest:+.4f}", DIM)])
    return lines


def preflight_lines(r: PreflightResult) -> list[Spans]:
    published = lambda x: "" if np.isnan(x) else f"  published {x:.4g}"  # noqa: E731
    rows: list[Spans] = [
        [(f" {r.verdict}", VERDICTS[r.verdict]), (f"  {r.cause}", PLAIN)],
        [
            (
                f" {r.info.architecture}, {r.info.d_in} → {r.info.d_sae} features, reads {r.info.hook}"
                + (f", writes {r.info.hook_out}" if r.info.hook_out != r.info.hook else ""),
                PLAIN,
            )
        ],
        [(f" view {r.info.view} (" + ", ".join(f"{k} {v:.4f}" for k, v in r.cosines.items()) + f"), normalisation {r.info.normalisation}", PLAIN)],
        [(f" cosine of reconstruction and activation {r.cosine:.4f}", PLAIN)],
        [(f" variance unexplained {r.unexplained:.4f}" + (f"  published {1 - r.info.explained:.4f}" if np.isfinite(r.info.explained) else ""), PLAIN)],
        [(f" L0 {r.l0:.2f}{published(r.info.l0)}", PLAIN)],
        [(f" loss {r.loss:.4f}, with the SAE {r.loss_spliced:.4f}, with zeros {r.loss_zero:.4f}", PLAIN)],
        [(f" {r.recovered:.1%} of the loss recovered", PLAIN)],
    ]
    return rows


def example_lines(r: ExamplesResult, width: int) -> list[Spans]:
    lines: list[Spans] = [[(f"f{r.indices[0]} over {r.tokens} tokens, fires on {float(r.density[0]):.3%}" + (" (kept from before)" if r.cached else ""), BOLD)]]
    if r.counts.size and r.counts[0].max(initial=0) > 0:
        peak = float(np.log1p(r.counts[0]).max())
        edges, on = np.asarray(r.edges).reshape(-1, r.edges.shape[-1])[0], np.nonzero(r.counts[0])[0]
        first, last = int(on[0]), int(on[-1]) + 1
        blocks = "".join(" ▁▂▃▄▅▆▇█"[round(8 * float(np.log1p(c)) / peak)] for c in r.counts[0][first:last].tolist())
        lines.append([(f"{blocks} ", PLAIN), (f"{float(edges[first]):.3g} … {float(edges[last]):.3g}, log counts", DIM)])
    for e in r.examples[0]:
        spans: Spans = [(f"{e.activation[e.at]:8.2f} ", BOLD)]
        left, used = max(0, e.at - 8), 9
        for k in range(left, len(e.texts)):
            text = show_token(e.texts[k], 12, fill=False)
            if used + len(text) > width:
                break
            spans.append((text, PLAIN + REVERSE if k == e.at else BOLD if e.activation[k] > 0 else DIM))
            used += len(text)
        lines.append(spans)
    return lines
