"""Pane 9: why a head looks from the cursor's position to its source: query components × key components, with margins, checked by the real path."""

from dataclasses import replace

from textual.containers import Horizontal
from textual.widget import Widget

from screen.actions import no_members, own_circuit, turned, turns
from screen.cursor import clip
from screen.keys import Part
from screen.overlays import Item, Picker
from screen.pane import Host, Pane
from screen.pictures import run_name, texts_of
from techniques.qk import pictures
from techniques.qk.table import ALL, REST, check_words
from techniques.qk.explained import EXPLAINED
from techniques.qk.requests import BIAS, MEAN, NONE, OTHERS, WRITTEN, QK, QKCheck, QKCheckResult, QKFeaturesResult, QKResult, QKSet
from utils import show_token
from vocabulary.nodes import Node, UserError, parse_node
from widgets import BAD, DIM, GOOD, WARN, Grid, GridView, Lines, Same, Spans


class QKPane(Pane):
    number, key, label, about = "9", "qk", "QK", "why the head under the cursor looks from its position to its source"
    view, differences = "qk.rows", False
    views = {
        "qk.rows": ("components", "features", "pairs"),
        "qk.instead": ("mean", "source", "none"),
        "qk.order": ("largest", "model"),
        "qk.over": ("prompt", "set"),
    }
    explained = EXPLAINED
    hints = ("enter", "view", "detect", "keep", "points", "source", "which", "ablate", "mode")
    keys = (
        Part("enter", "QK", "choose the source that the score is taken against", lambda pane, app: pane.choose(app), "source"),
        Part("points", "QK", "rows by size, or as the model has them", turns("qk.order"), "order"),
        Part("source", "QK", "over the prompt or the set", turns("qk.over"), "prompt or set"),
        Part("detect", "QK", "check the entry: its path into the query and into the key changed for real", lambda pane, app: pane.check(app), "check"),
        Part("keep", "QK", "keep the edges of the entry, component → q and k, or its features", lambda pane, app: pane.keep(app), "keep"),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table, self.list = GridView(), Lines(classes="second hidden")
        self.at, self.row = (0, 0), 0  # of the table, of the list of pairs
        self.other: int | None = None  # the source that the score is taken against

    def body(self) -> Widget:
        return Horizontal(self.table, self.list)

    def grids(self) -> dict[str, Grid]:
        return {"qk": self.table.grid} if self.table.grid else {}

    # ---------------------------------------------------------------- asking

    def which(self, app: Host) -> str:
        return app.state.views["which"] if "-" not in app.state.views["which"] else "now"

    def instead(self, app: Host) -> int | str:
        how = app.state.views["qk.instead"]
        if how != "source":
            return how
        first = 1 if app.cursor.src == 0 else 0
        return self.other if self.other is not None and self.other != app.cursor.src else first

    def over_set(self, app: Host) -> bool:
        return app.state.views["qk.over"] == "set"

    def asked(self, app: Host, kind: type = QK, **more: object) -> object:
        """A request for the head, destination and source under the cursor; a source that can't be seen stands for where the head looks most."""
        c, study = app.cursor, app.state.with_saes(app.study) if self.by_features(app) else app.study
        dest, source, instead = c.pos, c.src if c.src <= c.pos else None, self.instead(app)
        if self.over_set(app):
            labels = {pos: name for name, pos in app.tokens.tokens.labels.items()} if app.tokens else {}
            study = replace(study, prompt_set=app.state.members)
            dest, source, instead = (labels.get(x, x) if isinstance(x, int) else x for x in (dest, source, instead))
            kind = QKSet if kind is QK else kind
        return kind(study, c.layer, c.head, dest, source, instead, self.which(app), self.by_features(app), **more)

    def by_features(self, app: Host) -> bool:
        return app.state.views[self.view] != "components"

    def lists(self, app: Host) -> QKFeaturesResult | None:
        """The pairs that are listed, where they are."""
        return app.requests.result("qk", QKFeaturesResult) if app.state.views[self.view] == "pairs" else None

    def wants(self, app: Host) -> dict[str, object]:
        if not app.counted() or self.over_set(app) and not app.state.members or self.by_features(app) and not app.state.saes:
            return {}
        return {"qk": self.asked(app)}

    def scatters(self, app: Host) -> QKSet | None:
        """By components alone: which features are listed is decided over the whole set."""
        return next((r for r in self.wants(app).values() if isinstance(r, QKSet) and not r.features), None)

    def turn_to(self, app: Host, request: object, result: object) -> bool:
        if not isinstance(request, QKSet):
            return False
        instead = request.instead if request.instead in ("mean", "none") else "source"
        turned(app, request.study.base, {self.view: "components", "qk.over": "set", "qk.instead": instead, "which": request.which})
        if (read := app.requests.check()) is None:
            raise UserError("its prompts are being read: ⏎, then show, once more puts the cursor on its places")
        places = {name: at for name, place in (("pos", request.dest), ("src", request.source)) if isinstance(at := read.clean.labels.get(place, place), int)}
        app.move(layer=request.layer, head=request.head, comp="head", **places)
        return True

    # ---------------------------------------------------------------- the cursor

    def step(self, app: Host, rows: int, cols: int) -> None:
        grid, listed = self.table.grid, self.lists(app)
        if listed is not None:
            self.row = clip(self.row + rows, len(listed.pair))
            app.draw()
        elif grid is not None:
            self.at = clip(self.at[0] + rows, len(grid.rows)), clip(self.at[1] + cols, len(grid.cols))
            app.draw()

    def shows(self, node: Node) -> bool:
        return node.site == "head"

    def sides(self, app: Host) -> tuple[str, str]:
        """The components or features of the entry under the cursor, of query and key; "" where it is a sum of several, or no component's."""
        grid, listed = self.table.grid, self.lists(app)
        if listed is not None and len(listed.pair):
            return listed.pair_names[clip(self.row, len(listed.pair))]
        if grid is None:
            raise UserError("there are no numbers yet")
        names = grid.rows[clip(self.at[0], len(grid.rows))], grid.cols[clip(self.at[1], len(grid.cols))]
        none = (ALL, REST, BIAS, WRITTEN, OTHERS)
        return tuple("" if name in none or name.endswith(".bias") else name for name in map(pictures.whole, names))

    def node(self, app: Host, pos: int | None) -> Node:
        """The query's component under the cursor, else the key's (at the source), else the head itself: what a, p, s act on."""
        c = app.cursor
        query, key = self.sides(app) if self.table.grid else ("", "")
        name = query or key
        if not name or name.endswith(".error"):
            return Node("head", c.layer, c.head, pos=pos)
        return replace(parse_node("embed" if name == "position" else name), pos=pos if query or pos is None else c.src)

    # ---------------------------------------------------------------- keys

    def choose(self, app: Host) -> None:
        """A list of the sources in sight; the chosen one is what the score is taken against."""
        app.ready()
        if app.tokens is None:
            raise UserError("the prompt is not there yet")
        texts, c = texts_of(app.tokens.tokens), app.cursor
        items = [Item(MEAN, "the mean over the sources in sight"), Item(NONE, "nothing: the score itself")]
        items += [Item(str(n), show_token(texts[n]), "", n) for n in range(c.pos + 1) if n != c.src]

        def take(item: Item | None, typed: str) -> None:
            if item is not None:
                self.other = self.other if item.value is None else item.value
                app.act("view", name="qk.instead", value="source" if item.value is not None else item.key)

        app.open(Picker(f"the score of source {c.src} {show_token(texts[c.src]) if c.src < len(texts) else ''} instead of", items, take))

    def check(self, app: Host) -> None:
        """The entry's components changed for real, in the query and in the keys: patched where there is another prompt, else (and features) taken away."""
        app.ready()
        if self.over_set(app):
            raise UserError("a check runs on the prompt at hand: R turns from the set to it")
        sides = {side: name for side, name in zip("qk", self.sides(app)) if name}
        if not sides:
            raise UserError("this is no single component or feature: hjkl to a row or column of one")
        op, said = "zero" if self.by_features(app) or app.state.prompt.corrupt is None else "patch", []

        def show(result: QKCheckResult) -> None:
            said.append(result)
            near = all(abs(r.true - r.predicted) <= 0.2 * max(abs(r.true), 0.1) for r in said)
            app.say(" │ ".join(map(check_words, said)), GOOD if near else WARN)

        for side, name in sides.items():
            app.requests.ask(f"qk_check_{side}", self.asked(app, QKCheck, component=name, side=side, op=op), show)

    def keep(self, app: Host) -> None:
        """The edges of the entry in the circuit, or out of it; of features the nodes, since a circuit has no edges of features."""
        app.ready()
        c, done = app.cursor, []
        own_circuit(app)
        for side, name in dict(zip("qk", self.sides(app))).items():
            if name and not name.endswith(".error"):
                feature = ".sae." in name
                part = name if feature else f"{'embed' if name == 'position' else name}->L{c.layer}H{c.head}.{side}"
                if part in [text for text, _ in done]:
                    continue
                app.act("keep", part=part)
                done.append((part, "kept" if part in (app.state.current.nodes if feature else app.state.current.edges) else "dropped"))
        if not done:
            raise UserError("this is no single component or feature, so there is nothing to keep: hjkl to a row or column of one")
        app.say(f"{', '.join(f'{part.replace("->", " → ")} {how}' for part, how in done)} (u undoes)", GOOD)

    # ---------------------------------------------------------------- drawing

    def height_needed(self) -> int:
        """How many components are shown depends on the room; so the room can't depend on what is shown."""
        return 22

    def variants(self, app: Host) -> tuple[str, ...]:
        return (app.state.views[self.view], app.state.views["qk.instead"], *(("set",) if self.over_set(app) else ()))

    def paint(self, app: Host) -> None:
        views, c = app.state.views, app.cursor
        result, wanted = app.requests.result("qk", QKResult), "qk" in self.wants(app)
        result = result if isinstance(result, QKFeaturesResult) == self.by_features(app) else None  # of the view before
        listed = self.lists(app) if wanted else None
        self.table.set_class(listed is not None, "hidden")
        self.list.set_class(listed is None, "hidden")
        if result is None or not wanted:
            self.show_title(app, ("qk",), f"L{c.layer}H{c.head} · {run_name(app.state, self.which(app))}", "")
            self.table.show(None, (0, 0), views["mode"], self.missing(app))
            self.info_line.show([])
            return
        if isinstance(result, QKFeaturesResult):
            app.known_saes.update({i.source: i for i in result.saes})
        order = views["qk.order"]
        wide = 9 if self.by_features(app) else 8
        most = max(4, self.size.height - 6), max(3, (self.size.width - 12) // wide - 2)  # that fit with their sums and the rest
        grid = self.picture("qk", (Same(result), order, most), lambda: pictures.qk_grid(result, order, most))
        self.at = clip(self.at[0], len(grid.rows)), clip(self.at[1], len(grid.cols))
        ask = self.asked(app)  # over a set places are labels, at other positions in every prompt
        places = (x if isinstance(x, str) else pictures.place(result, pos) for x, pos in ((ask.dest, result.dest), (ask.source, result.source)))
        title = f"L{result.layer}H{result.head} {' → '.join(places)}"
        against = " − mean over sources" if result.instead.startswith("the mean") else f" less {result.instead}" if result.instead else ""
        if result.instead.startswith("source ") and result.instead[7:].isdigit():
            against = f" instead of {pictures.place(result, int(result.instead[7:]))}"
        what = f"{views[self.view]} · " * self.by_features(app)
        over = f" · mean of {len(result.prompts)} prompts" if result.prompts.size else ""
        self.show_title(
            app, ("qk",), f"{what}{title}{against}{over} · {run_name(app.state, result.which)} · norms frozen", result.convention, None if listed else grid
        )
        self.table.show(grid, self.at, views["mode"])
        if listed is None:
            self.info_line.show([pictures.cell_line(result, grid, *self.at)])
            return
        self.row = clip(self.row, len(listed.pair))
        self.list.show(pictures.pair_lines(listed, self.row, self.size.width, max(4, self.size.height - 3)))
        self.info_line.show([pictures.pair_line(listed, self.row)] if len(listed.pair) else [])

    def missing(self, app: Host) -> Spans:
        """Why there are no numbers yet."""
        if self.over_set(app) and not app.state.members:
            return [(f"  {no_members(app)}", BAD)]
        if self.by_features(app) and not app.state.saes:
            return [("  no SAE is loaded: z in pane 6 loads one that reads what this head reads, such as the layer before's resid_post", DIM)]
        return app.requests.waiting("qk")


PANE = QKPane
