"""Pane 5's paths: the effect of each, from every sender or to every receiver."""

from techniques.circuits.pictures import path_grid
from screen.pane import Host, Pane
from screen.pictures import sweep_cell
from widgets import DIM, Same

PATHS = {"direct": "direct edge", "mlps": "through MLPs"}


def paint(pane: Pane, app: Host) -> None:
    """The effects of the paths that are asked for, or how to run them."""
    views, request, result = app.state.views, pane.path(app), pane.paths(app)
    ends = (
        f"{', '.join(request.senders)} → each receiver"
        if request.each == "receiver"
        else f"every node{' by position' * request.by_pos} → {', '.join(request.receivers)}"
    )
    way = "noising" if request.direction == "noise" else "denoising"
    title = f"path · {ends} · {PATHS[request.convention]} · {way}" + (" over the set" if request.over_set else "")
    pane.map.styles.width = "1fr"
    pane.side.styles.width = 0
    pane.side.show([])
    if result is None:
        pane.show_title(app, ("path",), title, "")
        hint = [("  S runs it · Q chooses receivers · Z direct or through MLPs · P by position, or to each receiver", DIM)]
        pane.map.show(None, (0, 0), views["mode"], app.requests.waiting("path") if "path" in app.requests.wanted else hint)
        pane.info_line.show([])
        return
    edges = set(app.state.current.edges) if app.state.current else set()
    grid = pane.picture("path", (Same(result), frozenset(edges)), lambda: path_grid(result, request, edges))
    done = app.requests.scattered.partial(result) if result.done == result.total else f"{result.done}/{result.total}{app.requests.left('path')} · "
    pane.show_title(app, ("path",), f"{done}{title}", result.convention, grid)
    row, col = pane.cell(app, result)
    pane.map.show(pane.by_position(app, "path", grid, result.tokens) if grid.positions else grid, (row, col), views["mode"])
    pane.info_line.show([sweep_cell(result, None, row, col, pane.map.about(), pane.size.width)])
