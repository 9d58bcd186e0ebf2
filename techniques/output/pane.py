"""Pane 0: the likeliest next tokens at the cursor's position, clean, corrupted and now."""

from textual.widget import Widget

from techniques.output.requests import RunResult
from vocabulary.nodes import UserError
from screen.cursor import clip
from screen.pane import Host, Pane
from screen.pictures import texts_of
from techniques.output import pictures
from techniques.output.explained import EXPLAINED
from utils import show_token
from widgets import DIM, Lines


class OutputPane(Pane):
    number, key, label, about, wide = "0", "output", "Output", "likeliest next tokens, clean, corrupted and now", False
    hints = ("edit", "next_prompt", "metric", "undo")
    explained = EXPLAINED

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = Lines(classes="table")
        self.sides = 2  # lists beside each other

    def body(self) -> Widget:
        return self.table

    def width_needed(self) -> int:
        return 6 + 20 * self.sides

    def step(self, app: Host, rows: int, cols: int) -> None:
        app.move(layer=clip(app.cursor.layer + rows, app.info.n_layers), pos=clip(app.cursor.pos + cols, app.length()))

    def variants(self, app: Host) -> tuple[str, ...]:
        return ("output",)

    def choices(self, app: Host) -> tuple[str, ...]:
        raise UserError("the output has one view")

    @staticmethod
    def partner(app: Host, run: RunResult, pos: int) -> int:
        """The position of the other prompt beside one of the base prompt, where their lengths differ: END with END, else aligned, else the same; -1: none."""
        flip = app.state.base == "corrupt"
        n, m = (len(side.tokens.ids) for side in ((run.corrupt, run.clean) if flip else (run.clean, run.corrupt)))
        if n == m or pos == n - 1:
            return m - 1 if pos == n - 1 else pos
        check = app.requests.check()
        pairs = check.alignment if check is not None else ()
        return {p[flip]: p[not flip] for p in pairs}.get(pos, -1) if pairs else pos if pos < m else -1

    def paint(self, app: Host) -> None:
        run, pos = app.requests.result("run", RunResult), app.cursor.pos
        if run is None:
            self.show_title(app, ("run",), "", "")
            self.table.show([app.requests.waiting("run")])
            self.info_line.show([])
            return
        token = texts_of(app.tokens.tokens)[pos] if app.tokens and pos < app.length() else ""
        there, name, side = (
            (pos, "", run.clean)
            if run.corrupt is None
            else (self.partner(app, run, pos), *(("clean", run.clean) if app.state.base == "corrupt" else ("corrupted", run.corrupt)))
        )
        other = "" if there == pos else f", {name} after " + (f"{there} {show_token(texts_of(side.tokens)[there])}" if there >= 0 else "none")
        self.show_title(app, ("run",), f"next token after {pos} {show_token(token)}{other}", "")
        self.sides = 3 if run.corrupt is not None and not pictures.same(run.now, run.clean) else 2
        prompt, k = app.state.prompt, max(1, min(8, self.size.height - 3))
        self.table.show(pictures.output_lines(run, pos, (name, there), k, self.size.width >= 25 * self.sides + 4, set(prompt.answers), set(prompt.foils)))
        self.info_line.show([[(f" {run.convention}", DIM)]])


PANE = OutputPane
