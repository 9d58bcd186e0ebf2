"""Pane 2: layers × heads by a statistic, and the pattern of the head under the cursor."""

import numpy as np
from textual.containers import Horizontal
from textual.widget import Widget

from techniques.attention.requests import Attention, AttentionResult, AttentionSet, HeadStats, HeadStatsResult
from vocabulary.nodes import Node
from screen.actions import turned, turns
from screen.cursor import clip
from screen.keys import FIND, VIEW, Action, Part
from screen.maps import label_width, columns_of
from screen.pane import Host, Pane, step_component
from screen.pictures import head_map_addresses, run_name, texts_of
from screen.template import folded
from screen.textview import row_of
from techniques.attention import actions, pictures
from techniques.attention.explained import EXPLAINED
from utils import show_token
from widgets import WARN, Grid, GridView, Lines, Same, Spans


class AttentionPane(Pane):
    number, key, label, about = "2", "attention", "Attention", "heads map and pattern"
    view, text_view = "attention.stat", "attention.read"
    explained = EXPLAINED
    views = {
        "attention.stat": ("induction", "previous", "duplicate", "first", "entropy", "pair"),
        "attention.source": ("prompt", "random"),
        "attention.weighted": ("off", "on"),
        "attention.layer": ("one head", "all heads"),
        "attention.read": ("off", "from", "to"),
    }
    urgent = ("attention",)
    hints = ("enter", "edit", "ablate", "patch", "scope", "keep", "enable", "undo", "view", "mode", "which", "source", "weighted", "multiples", "ranked")
    keys = (
        Part("enter", "attention", "into the head's pattern (hjkl move destination and source); there: why it looks from this destination to this source", lambda pane, app: pane.enter(app), "into pattern"),
        Action("source", "R", "random / set", "statistics on the prompt or on random repeated tokens", VIEW, turns("attention.source"), "which", "attention"),
        Action("weighted", "Z", "weighted / direct", "weighted by the size of what each value writes", VIEW, turns("attention.weighted"), "fit", "attention"),
        Action("multiples", "O", "all heads", "The patterns of all heads of the layer, small, or one head's", VIEW, turns("attention.layer"), "weighted"),
        Action(
            "ranked", "H", "rank", "Heads or cells ranked by what is shown: filter and go", FIND, actions.rank_heads, "multiples", reach=("lens", "output"),
            elsewhere="H ranks the cells of pane 4, the paths of pane 5 and the heads of pane 2: here is nothing to rank",
        ),
        Part("reading", "attention", "from the cursor, then to it", turns("attention.read")),
        Action("labels", "B", "labels", "Mean attention between labelled positions over the prompt set, ranked: filter and go", FIND, actions.rank_labels, "ranked"),
        Action("detect", "C", "detector", "Score heads against a pattern: a known one, or cells such as 14>2 10>4", FIND, actions.choose_detector, "labels"),
    )  # fmt: skip

    def __init__(self, **kw):
        super().__init__(**kw)
        self.drilled = False  # whether the keys move in the pattern
        self.chosen: tuple | None = None  # layer, head and prompt whose source was chosen in the pattern
        self.map, self.pattern, self.many = GridView(), GridView(classes="second"), Lines(classes="second")

    def body(self) -> Widget:
        return Horizontal(self.map, self.pattern, self.many, self.text)

    def grids(self) -> dict[str, Grid]:
        return {n: v.grid for n, v in (("heads", self.map), ("text", self.text) if self.text.grid else ("pattern", self.pattern)) if v.grid}

    def wants(self, app: Host) -> dict[str, object]:
        study, views, c = app.study, app.state.views, app.cursor
        pair = (c.pos, c.src) if views["attention.stat"] == "pair" and app.counted() else None
        source = "prompt" if pair or "-" in views["which"] else views["attention.source"]
        return {
            "attention": Attention(study, c.layer, views["which"], views["attention.weighted"] == "on"),
            "heads": HeadStats(study, views["which"], source, pair),
        }

    def scatters(self, app: Host) -> AttentionSet | None:
        """What B lists."""
        return actions.between_labels(app) if app.state.members else None

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        if isinstance(request, AttentionSet):
            turned(app, request.study.base, {"which": request.which})
            app.say("B lists the mean attention between labels, as far as its parts are there")
        return isinstance(request, AttentionSet)

    def step(self, app: Host, rows: int, cols: int) -> None:
        c, n = app.cursor, app.length()
        if self.drilled and self.reads(app):
            app.move(pos=self.text.walk(c.pos, rows, cols))
            return
        if self.drilled:
            self.chosen = self.here(app)
            app.move(pos=clip(c.pos + rows, n), src=clip(c.src + cols, n))
            return
        step_component(app, rows, cols)

    def back(self, app: Host) -> bool:
        was, self.drilled = self.drilled, False
        if was:
            app.draw()
        return was

    def leave(self) -> None:
        self.drilled = False

    def variants(self, app: Host) -> tuple[str, ...]:
        views = app.state.views
        more = (
            (views["attention.weighted"] == "on", "weighted=on"),
            (views["attention.source"] == "random", "source=random"),
            ("-" in views["which"], "difference"),
        )
        return (*(() if self.drilled else (views[self.view],)), "pattern", *(name for there, name in more if there))

    def doing(self, app: Host) -> list[tuple[str, str]]:
        return [("hjkl", "cell"), ("⏎", "why it looks"), ("esc", "leave the pattern"), ("T", "colour the prompt")] if self.drilled else []

    def shows(self, node: Node) -> bool:
        return node.site != "sae" and not node.site.startswith("resid")

    def enter(self, app: Host) -> None:
        """Into the pattern, where the source is where the head looks most, until another one was chosen; there, why it looks so. In the text view: into the text."""
        app.ready()
        if self.reads(app):
            self.drilled = not self.drilled
            app.draw()
            return
        if self.drilled:
            app.show_pane("qk")
        elif self.pattern.grid is not None:
            self.drilled = True
            if self.chosen != self.here(app):
                app.move(src=self.pattern.grid.place(self.pattern.at[1]))
            app.draw()

    @staticmethod
    def here(app: Host) -> tuple:
        return app.cursor.layer, app.cursor.head, app.state.prompt

    def paint(self, app: Host) -> None:
        pattern = app.requests.result("attention", AttentionResult)
        self.paint_heads(app)
        many = app.state.views["attention.layer"] == "all heads" and not self.reads(app)
        self.many.set_class(not many, "hidden")
        if many:
            self.pattern.set_class(True, "hidden")
        if self.reads(app):
            self.paint_text(app, pattern if pattern is not None and pattern.layer == app.cursor.layer else None)
        elif pattern is None or pattern.layer != app.cursor.layer:
            self.pattern.show(None, (0, 0), app.state.views["mode"], app.requests.waiting("attention"))
            self.info_line.show([])
        elif many:
            self.paint_layer(app, pattern)
        else:
            self.paint_pattern(app, pattern)

    def paint_heads(self, app: Host) -> None:
        """The title and the map of heads."""
        state, views, c = app.state, app.state.views, app.cursor
        heads, stat = app.requests.result("heads", HeadStatsResult), views["attention.stat"]
        marks = frozenset((i.node.layer, i.node.head) for i in state.interventions if i.node.site == "head" and state.enabled)
        title, note = run_name(state, views["which"]), ""
        if heads is None or stat not in heads.stats:
            self.map.show(None, (0, 0), views["mode"], app.requests.waiting("heads"))
        else:
            grid = self.with_circuit(app, "heads", (Same(heads), stat, marks), lambda: pictures.heads_grid(heads, stat, marks), head_map_addresses)
            column = c.head if c.comp == "head" else len(grid.cols) - (2 if c.comp == "attn" else 1)
            self.share(app, grid)
            self.map.show(grid, (clip(c.layer, len(grid.rows)), column), views["mode"])
            name = EXPLAINED[stat].name
            if stat == "pair" and app.tokens and max(c.pos, c.src) < app.length():
                t = texts_of(app.tokens.tokens)
                name = f"attention {c.pos} {show_token(t[c.pos])} → {c.src} {show_token(t[c.src])}"
            title = f"{name} · {title}"
            note = f"on {'random repeated tokens' if heads.source == 'random' else 'the prompt'}"
        weighted = "pattern × ‖value written‖ · " if views["attention.weighted"] == "on" else ""
        self.show_title(app, ("heads", "attention"), title, self.keys_said(app) + weighted + note, self.map.grid)

    def keys_said(self, app: Host) -> str:
        """What the keys do beside the map, first in the convention."""
        if not self.reads(app):
            return "pattern: hjkl, esc · " if self.drilled else ""
        way = "from" if app.state.views["attention.read"] == "from" else "to"
        return f"text: attention {way} the cursor, {'hjkl, esc' if self.drilled else '⏎ walks'} · "

    def share(self, app: Host, grid: Grid) -> None:
        """The map of heads is as wide as it needs to be whole. Where that leaves the pattern no room, one of the two is shown: the pattern when it is drilled into."""
        width, height, mode = self.size.width, self.size.height - 2, app.state.views["mode"]
        beside = width - min(14 + 2 * app.length(), width // 2)
        least = label_width(grid, width) + len(grid.cols) + 2  # all heads side by side, a character each
        alone = beside < least <= width
        self.map.set_class(alone and self.drilled, "hidden")
        shown, other = (self.text, self.pattern) if self.reads(app) else (self.pattern, self.text)
        shown.set_class(alone and not self.drilled, "hidden")
        other.set_class(True, "hidden")
        if not self.reads(app):
            self.text.grid = None
        self.map.styles.width = "1fr" if alone else columns_of(grid, beside, height, mode) + 1

    def paint_text(self, app: Host, pattern: AttentionResult | None) -> None:
        """The prompt by the head's attention from the cursor's position, or to it."""
        c, way, grid = app.cursor, app.state.views["attention.read"], None
        if pattern is not None and c.pos < len(pattern.tokens.ids):
            name = f"{'from' if way == 'from' else 'into'} {c.pos} {show_token(texts_of(pattern.tokens)[c.pos])}"
            whole = self.picture("pattern", (Same(pattern), c.head), lambda: pictures.pattern_grid(pattern, c.head))
            grid = row_of(whole, c.pos, f"L{c.layer}H{c.head} {name}", texts_of(pattern.tokens), way == "to")
        self.show_text(app, grid, app.requests.waiting("attention"))

    def paint_layer(self, app: Host, pattern: AttentionResult) -> None:
        """The patterns of all heads of the layer."""
        c, width = app.cursor, self.pattern.size.width or self.many.size.width
        self.many.show(pictures.small_patterns(pattern, c.head, width, self.size.height - 3, app.state.views["mode"]))
        self.info_line.show([pictures.pattern_cell(pattern, c.head, clip(c.pos, len(pattern.tokens.ids)), 0, False)])

    def paint_pattern(self, app: Host, pattern: AttentionResult) -> None:
        """The pattern of the head under the cursor."""
        c, views = app.cursor, app.state.views
        grid = self.picture("pattern", (Same(pattern), c.head), lambda: pictures.pattern_grid(pattern, c.head))
        pos, gone = clip(c.pos, len(grid.rows)), sorted(folded(app.state, pattern.tokens))
        row = np.nan_to_num(np.abs(grid.values[pos]), nan=-1.0)
        row[gone] = -1.0
        src = c.src if self.drilled or self.chosen == self.here(app) or views["attention.stat"] == "pair" else int(row.argmax())
        self.pattern.show(self.by_position(app, "pattern", grid, pattern.tokens, True), (pos, clip(src, len(grid.cols))), views["mode"])
        head = [] if self.drilled else self.map.about()
        away: Spans = [(f" folded {float(np.nansum(grid.values[pos, gone])):.3f} ", WARN)] if gone else []
        cell = pictures.pattern_cell(pattern, c.head, pos, src, self.drilled)
        self.info_line.show([(head or cell[:1]) + away + cell[1:]])


PANE = AttentionPane
