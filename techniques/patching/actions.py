"""What pane 4's own keys do beside sweeps: the largest cells for certain."""

from functools import partial

from screen.overlays import Editor, Item, Picker
from screen.pane import Host, Pane
from techniques.patching.requests import Certify, CertifyResult
from utils import show_number
from vocabulary.nodes import UserError
from vocabulary.typed import whole_number
from widgets import GOOD, WARN


ASSUMES = "no proof: if cells do together what they do alone; docs/estimates.md"


def certify(pane: Pane, app: Host) -> None:
    """Ask how many cells, at which confidence and share of the sweep; then the list of them, each with what is known."""
    app.ready()
    sweep = pane.request(app)
    if sweep.op != "patch" or sweep.effect != "total":
        raise UserError("certified is the total effect of patching: b and Z turn to it")
    if not app.state.compares:
        raise UserError("patching takes values from the other prompt, and there is no corrupted prompt: E types one, o opens a set")

    def show(ask: Certify, r: CertifyResult) -> None:
        app.say(r.words + r.advice, GOOD if r.certified else WARN)
        items = [
            Item(n, f"{ask.study.metric.name} {show_number(e, 8).strip()}  estimate {show_number(g, 8).strip()}  {'certain' if sure else 'not certain'}")
            for n, e, g, sure in zip(r.nodes, r.effects, r.estimates, r.certain)
        ]
        items += [Item("bound", ASSUMES), *[Item("set", r.warning)] * bool(r.warning)]
        app.open(Picker(r.words, items, lambda item, typed: None))

    def accept(values: list[str]) -> str:
        top = whole_number(values[0])
        try:
            confidence, share = float(values[1]), float(values[2])
        except ValueError:
            return "confidence and share are numbers such as 0.95 and 0.25"
        if top is None:
            return "top is a whole number such as 10"
        ask = Certify(
            sweep.study, sweep.kind, top, app.state.views["patching.estimate"], sweep.direction, confidence, share, node=sweep.node, over_set=sweep.over_set
        )
        app.requests.ask("certify", ask, partial(show, ask), opens="certifying the largest cells")
        return ""

    fields = [("top", "10"), ("confidence", "0.95"), ("share", "0.25")]
    app.open(Editor("certify the largest cells", fields, accept, 0, 1, "at most this share of the sweep's runs"))
