"""What pane 6's own keys do: SAEs loaded and switched, the error term, steering, checking an edge. Each takes the pane and the app."""

import math

from techniques.features.requests import CheckEdge, FeatureGraphResult, Saes
from vocabulary.nodes import Intervention, UserError
from screen.actions import intervene
from screen.overlays import Editor, Item, Picker
from screen.pane import Host, Pane
from widgets import BAD, DIM, GOOD, WARN


def choose_saes(pane: Pane, app: Host) -> None:
    """Load an SAE, switch to a loaded one, or put one away."""
    if app.info is None:
        app.say(f"no model yet: {app.busy}", BAD)
        return
    app.requests.ask("saes", Saes(), lambda listed: list_saes(pane, app, listed), opens="looking for SAEs of this model")


def list_saes(pane: Pane, app: Host, listed) -> None:
    state = app.state
    away = lambda s: app.act("saes", sources=[x for x in state.saes if x != s])  # noqa: E731
    items = [Item(s, "shown now" if s == state.sae else "loaded: show it", "", lambda s=s: app.act("show_sae", source=s)) for s in state.saes]
    items += [Item(f"put away {s}", "its interventions go with it", "", lambda s=s: away(s)) for s in state.saes]
    for c in listed.choices:
        if c.source not in state.saes:
            numbers = "".join(f", {name} {x:.3g}" for name, x in (("L0", c.l0), ("explained", c.explained)) if not math.isnan(x))
            label = f"{c.hook} {c.width} features{numbers} {c.where} {c.note}".rstrip()
            items.append(Item(c.source, label, "", lambda s=c.source: load_sae(pane, app, s)))
    chosen = lambda item, typed: app.guard(item.value if item else lambda: load_sae(pane, app, typed.strip()))  # noqa: E731
    app.open(Picker("SAEs that fit this model (or type a folder, or release:id)", items, chosen, free=True))


def load_sae(pane: Pane, app: Host, source: str) -> None:
    """It joins the loaded ones once the engine could read it: one a layer, so a loaded one of the same layer gives way."""
    if not source:
        raise UserError("type a folder that SAE.save_model wrote, or release:id")
    app.say(f"loading {source}: sae_lens is imported first (about 14 s the first time)", DIM)

    def loaded(found) -> None:
        app.known_saes[source] = found.info
        layer_of = lambda s: app.known_saes[s].layer if s in app.known_saes else -1  # noqa: E731
        gone = [s for s in app.state.saes if s != source and layer_of(s) == found.info.layer]
        app.act("saes", sources=[*(s for s in app.state.saes if s != source and s not in gone), source])
        words = f"{source} is loaded" + (f" in place of {gone[0]}: one SAE a layer" if gone else "")
        good = found.verdict == "good"
        app.say(words if good else f"{words}; {found.verdict}: cosine {found.cosine:.3f}", GOOD if good else WARN)

    app.requests.ask("load_sae", pane.preflight(app, source), loaded)


def turn_error(pane: Pane, app: Host) -> None:
    app.act("sae_error", value=not app.state.sae_error)
    app.say(
        "the error term is kept: a changed feature moves the activation by its decoder row only"
        if app.state.sae_error
        else "the error term is dropped: where a feature is changed the reconstruction takes the activation's place"
    )


def steer(pane: Pane, app: Host) -> None:
    """Scale, set or add to the feature under the cursor."""
    app.ready()
    node = app.node()

    def accept(values: list[str]) -> str:
        op, _, number = values[0].strip().partition(" ")
        try:
            value = float(number)
            if not math.isfinite(value):
                return "write a finite number"
            intervene(app, Intervention(node, op, value))
        except ValueError:
            return "write scale 2, set 5 or add 8"
        except UserError as error:
            return f"write scale 2, set 5 or add 8 ({error})"
        return ""

    app.open(Editor(f"{node}", [("op", "add 8")], accept, 0, 1, "scale 2 · set 5 · add 8 (times its decoder row)", True))


def check_edge(pane: Pane, app: Host) -> None:
    got = app.requests.result("feature_graph", FeatureGraphResult)
    if got is None or not len(got.index):
        app.say("the graph has no edge to check yet: v turns to it", BAD)
        return
    row = min(pane.row, len(got.index) - 1)
    which = pane.graph(app).which
    request = CheckEdge(app.study, got.up.source, got.down.source, int(got.index[row]), int(got.at[row]), got.target, got.pos, which)

    def show(r) -> None:
        same = abs(r.claimed - r.frozen) <= 1e-3 * max(1.0, abs(r.claimed))
        edge = f"f{request.feature}@{request.at} → f{request.target}@{got.pos}"
        again = f"everything computed again {r.total:+.4f} (pre-activation {r.before:.4f} → {r.after:.4f})"
        app.say(f"{edge}: the graph says {r.claimed:+.4f}, frozen run {r.frozen:+.4f}, {again}", GOOD if same else WARN)

    app.requests.ask("check_edge", request, show)
