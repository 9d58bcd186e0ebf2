"""What the keys do with SAEs: load and switch, the error term, examples, checking an edge. The app inherits it beside Deeds, Quests and Circuits."""

import math

from textual import work

from link import EngineError, Superseded
from techniques.features.requests import CheckEdge, FeatureGraphResult, Saes
from vocabulary.nodes import Intervention, UserError
from widgets import BAD, DIM, GOOD, WARN, Editor, Item, Picker


class Dictionaries:
    """Methods of the app: do_<id> for actions of the table in actions.py."""

    def do_pane_features(self) -> None:
        self.show_pane("features")

    @work(group="saes", exclusive=True)
    async def do_saes(self) -> None:
        """Load an SAE, switch to a loaded one, or put one away."""
        if self.info is None:
            self.say(f"no model yet: {self.busy}", BAD)
            return
        try:
            listed = await self.link.ask("saes", Saes(), 1)
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        state = self.state
        items = [Item(s, "shown now" if s == state.sae else "loaded: show it", "", lambda s=s: self.act("show_sae", source=s)) for s in state.saes]
        items += [
            Item(f"put away {s}", "its interventions go with it", "", lambda s=s: self.act("saes", sources=[x for x in state.saes if x != s]))
            for s in state.saes
        ]
        for c in listed.choices:
            if c.source not in state.saes:
                numbers = "".join(f", {name} {x:.3g}" for name, x in (("L0", c.l0), ("explained", c.explained)) if not math.isnan(x))
                items.append(Item(c.source, f"{c.hook} {c.width} features{numbers} {c.where} {c.note}".rstrip(), "", lambda s=c.source: self.load_sae(s)))
        chosen = lambda item, typed: self.guard(item.value if item else lambda: self.load_sae(typed.strip()))  # noqa: E731
        self.open(Picker("SAEs that fit this model (or type a folder, or release:id)", items, chosen, free=True))

    def load_sae(self, source: str) -> None:
        """One a layer: a loaded one of the same layer gives way when its place is known."""
        if not source:
            raise UserError("type a folder that SAE.save_model wrote, or release:id")
        self.say(f"loading {source}: sae_lens is imported first (about 14 s the first time)", DIM)
        self.check_sae(source)

    @work(group="load_sae", exclusive=True)
    async def check_sae(self, source: str) -> None:
        """It joins the loaded ones once the engine could read it."""
        try:
            found = await self.link.ask("load_sae", self.panes["features"].preflight(self, source), 1)
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        self.known_saes[source] = found.info
        layer_of = lambda s: self.known_saes[s].layer if s in self.known_saes else -1  # noqa: E731
        gone = [s for s in self.state.saes if s != source and layer_of(s) == found.info.layer]
        self.act("saes", sources=[*(s for s in self.state.saes if s != source and s not in gone), source])
        words = f"{source} is loaded" + (f" in place of {gone[0]}: one SAE a layer" if gone else "")
        self.say(words if found.verdict == "good" else f"{words}; {found.verdict}: cosine {found.cosine:.3f}", GOOD if found.verdict == "good" else WARN)

    def do_sae_error(self) -> None:
        self.act("sae_error", value=not self.state.sae_error)
        self.say(
            "the error term is kept: a changed feature moves the activation by its decoder row only"
            if self.state.sae_error
            else "the error term is dropped: where a feature is changed the reconstruction takes the activation's place"
        )

    def run_features(self) -> None:
        """S in pane 6: examples of the feature under the cursor."""
        pane = self.panes["features"]
        if not self.state.sae:
            raise UserError("no SAE is loaded: z lists those that fit the model")
        self.started.add(pane.examples(self))
        if self.state.views["features.view"] != "examples":
            self.act("view", name="features.view", value="examples")
        self.refresh_wants()

    def do_steer(self) -> None:
        """Scale, set or add to the feature under the cursor."""
        node = self.node()

        def accept(values: list[str]) -> str:
            op, _, number = values[0].strip().partition(" ")
            try:
                value = float(number)
                if not math.isfinite(value):
                    return "write a finite number"
                self.intervene(Intervention(node, op, value))
            except ValueError:
                return "write scale 2, set 5 or add 8"
            except UserError as error:
                return f"write scale 2, set 5 or add 8 ({error})"
            return ""

        self.open(Editor(f"{node}", [("op", "add 8")], accept, 0, 1, "scale 2 · set 5 · add 8 (times its decoder row) · enter · esc", True))

    @work(group="check_edge", exclusive=True)
    async def check_edge(self) -> None:
        pane, got = self.panes["features"], self.result("graph", FeatureGraphResult)
        if got is None or not len(got.index):
            self.say("the graph has no edge to check yet: v turns to it", BAD)
            return
        row = min(pane.row, len(got.index) - 1)
        graph = pane.graph(self)
        request = CheckEdge(self.study, got.up.source, got.down.source, int(got.index[row]), int(got.at[row]), got.target, got.pos, graph.which)
        try:
            r = await self.link.ask("check_edge", request, 1)
        except Superseded:
            return
        except EngineError as error:
            self.say(str(error), BAD)
            return
        same = abs(r.claimed - r.frozen) <= 1e-3 * max(1.0, abs(r.claimed))
        self.say(f"f{request.feature}@{request.at} → f{request.target}@{got.pos}: the graph says {r.claimed:+.4f}, frozen run {r.frozen:+.4f}, "
                 f"everything computed again {r.total:+.4f} (pre-activation {r.before:.4f} → {r.after:.4f})", GOOD if same else WARN)  # fmt: skip
