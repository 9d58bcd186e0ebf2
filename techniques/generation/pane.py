"""Pane 8: the prompt continued without and with the interventions, side by side, each token coloured by its probability."""

from dataclasses import replace
from functools import partial

from textual.widget import Widget

from screen.cursor import clip
from screen.keys import INTERVENE, Action, Part
from screen.pane import Host, Pane
from screen.pictures import run_name, run_names
from techniques.generation import actions, directions, pictures
from techniques.generation.explained import EXPLAINED
from techniques.generation.requests import HELD, Generate, GenerateResult
from vocabulary.nodes import UserError
from vocabulary.prompts import Metric
from widgets import WARN, Grid, GridView, Lines, Same


class GeneratePane(Pane):
    number, key, label, about = "8", "generate", "Generate", "the prompt continued, without and with the interventions"
    explained, differences = EXPLAINED, False
    hints = ("edit", "enter", "operation", "weighted", "directions", "less", "more", "chart", "sweep", "enable", "undo", "mode")
    keys = (
        Action(
            "directions",
            "$",
            "directions",
            "Directions to steer along: make, load, save, put away, add one with a coefficient",
            INTERVENE,
            directions.show_list,
            "scale",
        ),
        Action("less", "-", "steer −", "Steering: the coefficient one step down", INTERVENE, partial(directions.change, by=-1), "directions"),
        Action("more", "~", "steer +", "Steering: the coefficient one step up", INTERVENE, partial(directions.change, by=1), "less"),
        Part("chart", "generate", "the metric over the steering coefficient", directions.show_curve, "curve"),
        Part("enter", "generate", "the new tokens up to the cursor's join the prompt", actions.send_back, "to the prompt"),
        Part("operation", "generate", "how it is continued: tokens, temperature, top-p, seed, samples, a text to look for", actions.edit_sampling, "sampling"),
        Part("weighted", "generate", "interventions on every new token, or on the prompt's positions only", actions.turn_held, "held on"),
        Part("sweep", "generate", "draw anew, with the next seed", actions.draw_anew, "draw anew"),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = Lines(classes="table")
        self.place = (0, 0, 0)  # run, sample, token
        self.expected: tuple[int, ...] = ()  # tokens of the prompt that was sent back
        self.grid: Grid | None = None

    def body(self) -> Widget:
        return self.table

    def grids(self) -> dict[str, Grid]:
        return {"generated": self.grid} if self.grid else {}

    def height_needed(self) -> int:
        return 2 + max(8, len(self.table.lines))

    def height_least(self) -> int:
        return 8

    def wants(self, app: Host) -> dict[str, object]:
        how = app.state.generation
        if how.other and not app.state.compares:
            how = how.changed(other=False)
        return {"generate": Generate(replace(app.study, metric=Metric()), how)}  # another metric is no other text

    def variants(self, app: Host) -> tuple[str, ...]:
        return (app.state.generation.held,)

    def choices(self, app: Host) -> tuple[str, ...]:
        raise UserError("continuations have one view: b says how they are drawn, Z on what the interventions are held")

    # ---------------------------------------------------------------- the cursor

    def at(self, result: GenerateResult) -> tuple[int, int, int]:
        """Run, sample and token of the cursor, inside what there is."""
        run = clip(self.place[0], len(result.runs))
        sample = clip(self.place[1], len(result.runs[run].samples))
        return run, sample, clip(self.place[2], max(1, len(result.runs[run].samples[sample].ids)))

    def step(self, app: Host, rows: int, cols: int) -> None:
        """Through the tokens of a continuation, and from one to the next: samples first, then runs."""
        result = app.requests.result("generate", GenerateResult)
        if result is None:
            return
        run, sample, token = self.at(result)
        n = len(result.runs[0].samples)
        row = clip(run * n + sample + rows, len(result.runs) * n)
        if abs(rows) == 1 and len(result.runs) > 1 and n == 1:
            row = clip(run + rows, len(result.runs))
        self.place = self.at_row(result, row, n, token + cols)
        app.draw()

    def at_row(self, result: GenerateResult, row: int, n: int, token: int) -> tuple[int, int, int]:
        run, sample = divmod(row, n)
        return run, sample, clip(token, max(1, len(result.runs[run].samples[sample].ids)))

    # ---------------------------------------------------------------- drawing

    def paint(self, app: Host) -> None:
        result, how, names = app.requests.result("generate", GenerateResult), app.state.generation, run_names(app.state)
        active = app.state.interventions and app.state.enabled
        held = {"all": "held on every new token", "prompt": "held on the prompt only"}[how.held]
        title = f"{held if active else 'no interventions'} · {how.words.replace('temperature', 'T')} · {how.tokens} tokens"
        self.check_expected(app)
        if result is None or not result.runs:
            self.grid = None
            self.show_title(app, ("generate",), title, "")
            self.table.show([app.requests.waiting("generate")])
            self.info_line.show([])
            return
        self.grid = self.picture("generated", (Same(result), *names.values()), lambda: pictures.probabilities(result, names))
        more = f"{result.done} of {result.total} · " if result.done < result.total else ""
        said = (HELD[how.held], how.words)  # the title says them
        note = more + " · ".join(part for part in result.convention.split(" · ") if part not in said)
        self.show_title(app, ("generate",), title, note, self.grid)
        at = self.at(result)
        laid = pictures.lay_out(result, max(self.table.size.width, 20), app.state.views["mode"], at, run_name(app.state, "now"), how.contains, names)
        height = max(1, self.table.size.height)
        self.table.show(laid.lines, GridView.page(laid.at, self.table.top, height, max(len(laid.lines), 1)))
        self.info_line.show([pictures.about(result, at, names)])

    def check_expected(self, app: Host) -> None:
        """Whether the prompt that was sent back reads as the tokens it was grown from."""
        check = app.requests.check()
        if self.expected and check is not None:
            row = check.corrupt if app.state.base == "corrupt" and check.corrupt else check.clean
            if self.expected not in (row.ids, check.clean.ids, check.corrupt.ids if check.corrupt else ()):
                app.say("as a prompt this text has other tokens than those it was grown from: the numbers need not be the same", WARN)
            self.expected = ()


PANE = GeneratePane
