"""What `y` makes of the screen beside its text: a script with #%% cells, notebooks, plots. Each takes the app."""

from techniques.output.requests import RunResult
from vocabulary.notebook import as_notebook, as_script, screen_cells, session_cells
from vocabulary.nodes import UserError
from vocabulary.plots import Picture, page, picture, svg
from vocabulary.results import worth
from vocabulary.script import Shown
from screen.overlays import Item
from screen.pane import Host, Pane
from widgets import Grid


def drawn(name: str, grid: Grid, title: str) -> Picture:
    """A pane's map as a picture for paper."""
    return picture(f"{name}: {title}", grid.shown, grid.rows, grid.cols, grid.signed or None, grid.text or ())


def pictures(pane: Pane) -> list[Picture]:
    title = pane.said[0].removeprefix("NOT CURRENT (no engine) · ").strip()
    return [drawn(f"{pane.label} {n}" if len(pane.grids()) > 1 else pane.label, grid, title) for n, grid in pane.grids().items()]


def cells(app: Host, pane: Pane) -> list:
    """The metric and the pane that is in focus."""
    requests = app.requests
    run = requests.result("run", RunResult)
    if run is None:
        raise UserError("the run is not there: wait for it, or e edits the prompt")
    shown = [(r, requests.reply(slot).result) for slot, r in requests.wanted.items() if requests.askers.get(slot) is pane and requests.reply(slot) is not None]
    panes = [(request, result, pictures(pane) if n == 0 else []) for n, (request, result) in enumerate(shown) if result is not None]
    return screen_cells(Shown(app.state.model, app.state.study), app.info, run, panes)


def session_notebook(app: Host) -> str:
    """The whole session: prompts, notes, results with their pictures (of those that are at hand), the circuits."""
    record, answers = app.session.record, app.requests.answers
    rows = [
        (r.time, "result", r, getattr(answers.get(r.request) if r.on == app.info.key and r.key[1] is r.request else None, "result", None), app.info)
        for r in worth(record.results.values())
    ]
    rows += [(s.time, "note", s.args) for s in record.steps if s.name == "note"]
    items = [row[1:] for row in sorted(rows, key=lambda row: row[0])] + [("circuit", c) for c in app.state.circuits]
    name = app.session.name or app.session.path.stem
    return as_notebook(session_cells(name, f"A session of Loupe on {app.info.key}.", items))


def choices(app: Host, pane: Pane) -> list[Item]:
    """What can be exported of a pane and of the session."""
    maps = pictures(pane)
    title = f"{pane.number} {pane.label}"
    plots = [
        Item("plot", "this pane's maps drawn by plotly: one HTML file that needs no network", ".html", lambda: page(title, maps, pane.said[1])),
        Item("paper", "this pane's map as SVG for a paper: cells, numbers, names", ".svg", lambda: svg(maps[0])),
    ]
    return [
        Item("python", "a script with #%% cells, TransformerLens alone: the metric and this pane, drawn by plotly", ".py", lambda: as_script(cells(app, pane))),
        Item("notebook", "the same cells as a Jupyter notebook", ".ipynb", lambda: as_notebook(cells(app, pane))),
        *(plots if maps else []),
        Item("session", "the whole session as a notebook: prompts, notes, results with pictures, circuits", ".ipynb", lambda: session_notebook(app)),
    ]
