"""What pane 1's own keys do: the chart over depth, which lens, fitting a tuned one. Each takes the pane and the app."""

import re
from dataclasses import replace
from functools import partial

from techniques.lens.requests import TuneLens
from vocabulary.typed import whole_number
from screen.overlays import Editor, Item, Panel, Picker
from screen.pane import Host, Pane
from screen.pictures import run_names, chart as line_chart
from techniques.lens.explained import EXPLAINED
from techniques.lens.pictures import lens_values
from utils import ROOT
from vocabulary.files import folder, short, typed_path
from vocabulary.nodes import UserError
from widgets import BAD, GOOD

HERE, APART = WHERE = ("here", "apart")


def choose_lens(pane: Pane, app: Host) -> None:
    folders = [f.parent for root in (ROOT / "zoo", folder("exports")) for f in root.glob("*/config.json")]
    files = list(folder("exports").glob("*.pt"))
    items = [Item("logit", "the model's own norm and unembedding at every point", "", "")]
    items += [Item("tuned", short(f), "tuned lens", str(f)) for f in folders]
    items += [Item("jacobian", short(f), "Jacobian lens", str(f)) for f in files]

    def chosen(item: Item | None, typed: str) -> None:
        kind, _, artefact = typed.strip().partition(" ") if item is None else (item.key, "", item.value)
        app.act("lens", kind=kind, artefact=artefact.strip())

    app.open(Picker("lens (or type: tuned FOLDER, jacobian FILE; F fits a tuned lens)", items, chosen, free=True))


def fit(pane: Pane, app: Host) -> None:
    app.ready()
    if any(j.slot == "fit" for j in app.client.jobs.values()):
        raise UserError("a lens is being fitted: another one would end that; J lists it, x cancels it there")
    name = re.sub(r"\W+", "-", app.info.name).strip("-")

    def accept(values: list[str]) -> str:
        text, out, steps, where = values
        if (count := whole_number(steps) or 0) < 1:
            return "steps: a positive whole number"
        if where.strip() not in WHERE:
            return f"where: {' or '.join(WHERE)}"
        if where.strip() == APART:
            app.call_later(app.guard, lambda: app.requests.scattered.scatter(TuneLens(text, steps=count)))  # when this editor is closed
            return ""
        try:
            resume = (typed_path(out) / "checkpoint.safetensors").exists()
        except UserError as error:
            return f"folder: {error}"
        request = TuneLens(text, out, count, resume=resume)
        app.requests.ask("fit", request, fitted, 2, cancelled="the fit was cancelled; F again goes on from its checkpoint")
        return ""

    def fitted(done) -> None:
        app.act("lens", kind="tuned", artefact=done.folder)
        before, after = done.before[:-1].mean(), done.after[:-1].mean()
        app.say(f"tuned lens in {done.folder}: mean KL on held-out text {before:.3f} → {after:.3f} nats in {done.seconds:.0f} s", GOOD)

    fields = [("text file", ""), ("folder", str(folder("exports") / f"tuned-lens-{name}")), ("steps", "250"), ("where", HERE)]
    hint = f"where: {HERE} or {APART} (a job) · no text file: the zoo's corpus · ⏎ starts, J shows and cancels"
    app.open(Editor("fit a tuned lens", fields, accept, 0, 1, hint))


def chart(pane: Pane, app: Host) -> None:
    if app.info is None:
        app.say(f"no model yet: {app.busy}", BAD)
        return
    app.requests.held.until(app.run_worker(partial(draw_chart, pane, app), group="chart", exclusive=True, exit_on_error=True), "the chart over depth")


async def draw_chart(pane: Pane, app: Host) -> None:
    """The statistic over depth at the cursor's position, one line a run."""
    state, stat, pos, lines = app.state, app.state.views["lens.stat"], app.cursor.pos, {}
    wanted = pane.wants(app)["lens"]
    runs = [r for r in ("clean", "corrupt", "now") if (r != "corrupt" or state.compares) and (r != "now" or state.study.interventions)]
    for which in runs:
        result = await app.requests.asked("chart", replace(wanted, which=which, positions=(pos,)), 0)
        if result is None:
            return
        lines[run_names(state)[which]] = lens_values(result, stat)[:, 0].tolist()
    rows = line_chart(f"{EXPLAINED[stat].name} at {pos}", list(result.points), lines, app.size.width - 2, max(8, app.size.height * 3 // 5))
    app.open(Panel("over depth", rows, result.convention))
    app.requests.held.hand_over()
