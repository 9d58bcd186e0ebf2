"""
`:tour`: docs/tour.md as a guided hunt on the embedded model. One card at a time above the status line says what to press and what to look at; it waits until
the screen is there, whichever keys led to it, and compares the numbers. It takes no keys; `:tour` leaves it and comes back to the same card.
"""

import contextlib
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

from techniques.attention.requests import HeadStatsResult
from techniques.attribution.requests import AttributionResult
from techniques.circuits.requests import ScoreResult
from techniques.features.requests import FeaturesResult
from techniques.lens.requests import LensResult
from techniques.output.requests import RunResult
from techniques.patching.requests import SweepResult
from vocabulary.files import write_text
from vocabulary.nodes import UserError
from screen.pane import Host
from screen.pictures import change
from utils import width_of
from widgets import BAD, BOLD, DIM, FOCUS, GOOD, HEAD, PLAIN, Lines, Spans

Numbers = list[float]
SET = "ioi_abba"


@dataclass(frozen=True)
class Card:
    """
    What to press (one key, or a text to type, each) and what for; `found` gives the numbers as soon as the screen is where the card leads (None: not yet). Then
    `seen` says what to see, each {} one of `numbers`, which the screen's are compared with. `again`: the keys are pressed until it is found.
    """

    title: str
    keys: tuple[str, ...]
    text: str
    found: Callable[[Host], Numbers | None]
    seen: str = ""
    numbers: tuple[str, ...] = ()
    again: bool = False


# ------------------------------------------------------------------ what is on the screen


def at_home(app: Host) -> Numbers | None:
    s = app.state
    home = s.model.model == "zoo" and s.set_path.endswith(f"{SET}.jsonl") and s.prompt_set and s.prompt == s.prompt_set[0]
    return [] if home and s.base == "clean" and not s.interventions and app.requests.fresh("run", RunResult) else None


def run(app: Host, *changes: str) -> RunResult | None:
    """The run under exactly these interventions."""
    active = {str(i) for i in app.state.interventions} if app.state.enabled else set()
    return app.requests.fresh("run", RunResult) if active == set(changes) else None


def now(*changes: str, normalised: bool = False) -> Callable[[Host], Numbers | None]:
    def found(app: Host) -> Numbers | None:
        got = run(app, *changes)
        return None if got is None else [got.now.metric, got.normalised] if normalised else [got.now.metric]

    return found


def lens_mid(app: Host) -> Numbers | None:
    got, result = run(app), app.requests.fresh("lens", LensResult)
    there = app.pane == "lens" and (app.cursor.layer, app.cursor.point) == (2, "resid_mid") and got is not None and result is not None
    return [got.clean.metric, got.corrupt.metric] if there and got.corrupt is not None else None


def lens_post(app: Host) -> Numbers | None:
    result = app.requests.fresh("lens", LensResult)
    if app.pane != "lens" or result is None or (app.cursor.layer, app.cursor.point) != (2, "resid_post") or "L2.resid_post" not in result.points:
        return None
    return result.top_probs[result.points.index("L2.resid_post"), -1, :2].tolist()


def in_pattern(app: Host) -> Numbers | None:
    return [] if app.pane == "attention" and app.panes["attention"].drilled else None


def source_mary(app: Host) -> Numbers | None:
    return [] if in_pattern(app) is not None and app.cursor.src == 2 else None


def who_looks(app: Host) -> Numbers | None:
    heads = app.requests.fresh("heads", HeadStatsResult)
    if app.pane != "attention" or app.state.views["attention.stat"] != "pair" or heads is None or "pair" not in heads.stats or app.cursor.src != 2:
        return None
    return [float(heads.stats["pair"][at]) for at in ((1, 0), (1, 3), (2, 3))]


def direct(app: Host) -> Numbers | None:
    got = app.requests.fresh("attribution", AttributionResult)
    return [float(got.cells.heads[3, 2]), float(got.cells.heads[3, 3]), got.total] if app.pane == "attribution" and got is not None and run(app) else None


def swept(app: Host) -> Numbers | None:
    got = app.requests.fresh("sweep", SweepResult)
    if app.pane != "patching" or got is None or got.kind != "z" or got.done < got.total or not run(app):
        return None
    effect = change(got)
    return [float(effect[at]) for at in ((3, 3), (3, 2), (0, 1), (0, 3))]


def kept(*nodes: str) -> Callable[[Host], Numbers | None]:
    return lambda app: [] if app.pane == "circuit" and app.state.current is not None and set(app.state.current.nodes) == set(nodes) else None


def score(app: Host, *nodes: str) -> ScoreResult | None:
    return app.requests.fresh("score", ScoreResult) if kept(*nodes)(app) is not None else None


def two_alone(app: Host) -> Numbers | None:
    got = score(app, "L3H2", "L3H3")
    return None if got is None else [got.faithfulness.mean]


def proven(app: Host) -> Numbers | None:
    got = score(app, "L0H1", "L0H3", "L3H2", "L3H3")
    if got is None or not got.effects.size:
        return None
    return [got.faithfulness.mean, got.faithfulness.low, got.faithfulness.high, -float(got.effects.max()), -float(got.effects.min()), got.model.mean]


def traced(app: Host) -> Numbers | None:
    got = app.panes["circuit"].paths(app) if app.pane == "circuit" and app.state.views["circuit.view"] == "path" else None
    if got is None or got.done < got.total or app.state.receivers != ("L3H2.v", "L3H3.v"):
        return None
    return [float(change(got)[at]) for at in ((1, 1), (1, 3), (3, 4))]


def discovered(app: Host) -> Numbers | None:
    found = app.panes["circuit"].discovered(app) if app.pane == "circuit" else None
    return [found.result.score] if found is not None and found.result.method == "eap-ig" else None


def by_attribution(app: Host) -> Numbers | None:
    got = app.requests.fresh("features", FeaturesResult)
    if app.pane != "features" or got is None or got.order != "attribution" or app.state.sae != "zoo/L2.resid_post" or got.pos != app.length() - 1:
        return None
    return got.attribution[:2].tolist()


CARDS = (
    Card("the embedded model", ("M", "zoo", "⏎", "X", "o", SET, "⏎"), "The tour is on the zoo's model and its IOI prompts, without interventions: load the one, clear, open the others.", at_home),
    Card("the question", ("1", "/", "L2.resid_mid", "⏎"), "The top lines: who gets the drink? Answer Mary, foil John; the metric is their logit difference. Pane 1 reads the residual stream at every "
         "point: each cell is the token it would say. Go to L2.resid_mid.", lens_mid,
         "clean {}, corrupted {}: the model says Mary in the one prompt, John in the other. Yet here, in layer 2, the last column still says ·John.", ("+8.836", "-4.168")),
    Card("where it turns", ("j",), "One row down, after the MLP of layer 2.", lens_post, "·Mary leads ·John, {} to {}; two rows on she has won. The last attention layer decides.", ("0.42", "0.38")),
    Card("who looks at Mary?", ("2", "⏎"), "Pane 2 maps all heads; ⏎ goes into the pattern of the one under the cursor: rows read, columns are read.", in_pattern, "the cursor stands on what END reads most."),
    Card("a pair of positions", ("h",), "h and l walk the source. Walk to 2 ·Mary.", source_mary, "destination 14 ·to, source 2 ·Mary.", again=True),
    Card("all heads at once", ("esc", "v", "a"), "Leave the pattern; v lists the views, a is attention between the cursor's two positions: 14 ·to and 2 ·Mary (⏎ goes back in, h and l walk the source).", who_looks,
         "L1H0 looks at Mary with {}, L1H3 with {}, L2H3 with {}. Do they matter?", ("0.97", "0.93", "0.52")),
    Card("attention is not importance", ("/", "L1H0", "⏎", "a"), "Go to L1H0 and ablate it: its output is zero from now on. Watch now, in the top line.", now("L1H0=zero"),
         "without the head that looks at Mary most the difference rises, to {}.", ("+10.444",)),
    Card("undo", ("u",), "Every action can be undone.", now(), "{} again.", ("+8.836",)),
    Card("what is written to the answer", ("3",), "Pane 3: what every component adds straight to the logit difference.", direct, "L3H2 {} and L3H3 {} stand out; all cells together are {}, the model's own number.",
         ("+5.770", "+5.452", "+8.836")),
    Card("ablate one", ("/", "L3H3", "⏎", "a"), "Take L3H3 away.", now("L3H3=zero"), "{}: still Mary.", ("+2.944",)),
    Card("ablate both", ("/", "L3H2", "⏎", "a"), "And L3H2.", now("L3H3=zero", "L3H2=zero"), "{}: John wins. Either alone looks half as important as it is.", ("-1.655",)),
    Card("patch them", ("X", "p", "/", "L3H3", "⏎", "p"), "X clears. p gives a head what it had in the corrupted prompt: L3H2, then L3H3.", now("L3H2=patch", "L3H3=patch", normalised=True),
         "{}, normalised {} (0 is the corrupted run): these two carry the whole difference between the prompts.", ("-4.247", "-0.006")),
    Card("sweep every head", ("X", "4", "S"), "X, then pane 4: the estimate is there at once, S patches every head for the truth.", swept,
         "L3H3 {}, L3H2 {}, L0H1 {}, L0H3 {} of the gap; the rest is near 0. Four heads.", ("-0.640", "-0.434", "-0.538", "-0.564")),
    Card("keep two", ("5", "/", "L3H2", "⏎", "c", "/", "L3H3", "⏎", "c"), "Pane 5 holds the circuit; c keeps the node under the cursor. First the two that write the answer.", kept("L3H2", "L3H3"), "kept cells end in •."),
    Card("are they enough?", ("S",), "S scores the circuit over 32 prompts: all other heads get their corrupted value.", two_alone, "faithfulness {}: the two that carry everything are worth nothing alone.", ("0.004",)),
    Card("the proof", ("/", "L0H1", "⏎", "c", "/", "L0H3", "⏎", "c", "S"), "Keep the two early heads of the sweep too, and score again.", proven,
         "faithfulness {} (95 % {} to {}) with four heads. Each alone away costs {} to {} of {} logits: this is a circuit.", ("0.966", "0.940", "0.984", "6.5", "7.1", "11.781")),
    Card("what they read", ("v", "p", "Q", "L3H2.v L3H3.v", "⏎", "S"), "Paths: from every node into the values of the two heads that write the answer.", traced,
         "L0H1 {}, L0H3 {}, and the MLP of layer 2 {}: the early heads reach them, also by way of an MLP.", ("-0.169", "-0.181", "-0.413")),
    Card("let it be found", ("U", "eap-ig", "⏎", "⏎", "⏎"), "A discovery: the method, its numbers, the time it will take, then the job.", discovered,
         "faithfulness {} when every other edge is cut. The drawing: h j k l walk along its edges, a and p act on the node there.", ("0.969",)),
    Card("look inside", ("6", "z", "zoo/L2.resid_post", "⏎", "P"), "Pane 6: the features of a sparse autoencoder after layer 2, sorted by what each adds to the metric.", by_attribution,
         "the first adds {}, the next {}: a ablates the one under the cursor, v shows where it fires.", ("-2.699", "+2.294")),
)  # fmt: skip
END = "A proven circuit: L0H1 and L0H3 find that John is named twice, L3H2 and L3H3 write “not John”. Y saves it, y copies its script. docs/tour.md goes on."


# ------------------------------------------------------------------ the card


def compared(card: Card, values: Numbers) -> tuple[str, bool]:
    """What was seen, with the screen's numbers; and whether they are the tour's."""
    shown, good = [], True
    for value, text in zip(values, card.numbers, strict=True):
        digits = len(text.partition(".")[2])
        same = abs(value - float(text)) <= 0.6 * 10**-digits
        good = good and same
        here = f"{value:{'+' if text[0] in '+-' else ''}.{digits}f}"
        shown.append(here if same else f"{here} (the tour has {text})")
    return card.seen.format(*shown), good


class Tour:
    """The card that is shown and where it stands; the app calls `look` at every drawing."""

    def __init__(self, app: Host):
        self.app, self.at, self.lines = app, 0, Lines(id="tour")
        self.open, self.said, self.rows = False, ("", True), []

    @property
    def height(self) -> int:
        return len(self.rows) if self.open else 0

    def toggle(self) -> None:
        """Leave it, or come back to the card where it was left; also in a session that is opened again."""
        app = self.app
        if self.open:
            self.open = False
            self.lines.remove()
            app.say(f"the tour is left at card {min(self.at + 1, len(CARDS))} of {len(CARDS)}: :tour goes on from there")
        else:
            with contextlib.suppress(OSError, ValueError):
                self.at = max(0, min(int(self.file.read_text()), len(CARDS)))
            self.open, self.said, self.rows, self.lines = True, ("", True), [], Lines(id="tour")
            app.mount(self.lines, before=app.status_line)
        app.draw()

    @property
    def file(self):
        return self.app.session.path.with_suffix(".tour")

    def look(self) -> None:
        """Go to the next card as soon as the screen is where this one leads."""
        if not self.open:
            return
        before = self.at
        while self.at < len(CARDS) and (values := CARDS[self.at].found(self.app)) is not None:
            self.said = compared(CARDS[self.at], values) if CARDS[self.at].seen else ("", True)
            self.at += 1
        if self.at != before:
            with contextlib.suppress(OSError, UserError):  # then it begins again the next time
                write_text(self.file, f"{self.at}\n")
        rows = self.card(self.app.size.width)
        if rows != self.rows:
            self.rows = rows
            self.lines.styles.height = len(rows)
            self.lines.show(rows)

    def card(self, width: int) -> list[Spans]:
        """The rule, what was seen, what to do, and the keys."""
        over = self.at == len(CARDS)
        title = f" tour {min(self.at + 1, len(CARDS))}/{len(CARDS)} · {'the end' if over else CARDS[self.at].title} "
        leave = " :tour leaves it "
        rows: list[Spans] = [[("━━", HEAD), (title, FOCUS), ("━" * max(2, width - 2 - width_of(title + leave)), HEAD), (leave, DIM)]]
        text, good = self.said
        if text:
            rows += [
                [(line, GOOD if good else BAD)]
                for line in textwrap.wrap(f"{'✓' if good else '✗'} {text}", width - 2, initial_indent=" ", subsequent_indent="   ")
            ]
        if over:
            return rows + [[(line, PLAIN)] for line in textwrap.wrap(END, width - 2, initial_indent=" ", subsequent_indent=" ")]
        card = CARDS[self.at]
        rows += [[(line, PLAIN)] for line in textwrap.wrap(card.text, width - 2, initial_indent=" ", subsequent_indent=" ")]
        return [*rows, [(" press  ", DIM), ("  ".join(card.keys), BOLD), (" until it is there" if card.again else "", DIM)]]
