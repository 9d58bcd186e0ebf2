"""Where one is looking (pane, zoom, cursor), kept in the session and found again when it is opened."""

from dataclasses import replace

from vocabulary.nodes import UserError
from vocabulary.wire import from_json, to_json
from screen.cursor import Cursor
from screen.pane import Host

POINTS = ("resid_pre", "resid_mid", "resid_post")


def place(app: Host) -> dict:
    return {"pane": app.pane, "zoomed": app.zoomed, "cursor": to_json(app.cursor), "at_end": app.at_end}


def keep(app: Host) -> None:
    """Write what waits of results, and the place, to the session file."""
    record = app.session.record
    if record.changed and app.info is not None:
        record.stand(place(app))
    record.flush()


def put_back(app: Host) -> None:
    """Pane, zoom and cursor as the session has them; what does not fit this program stays as it is."""
    there = app.session.record.place
    if isinstance(there.get("pane"), str) and there["pane"] in app.panes:
        app.show_pane(there["pane"])
    try:
        c = from_json(there["cursor"], Cursor)
        comp, point = c.comp if c.comp in ("head", "attn", "mlp") else "head", c.point if c.point in POINTS else Cursor.point
        app.cursor = replace(c, layer=max(c.layer, 0), head=max(c.head, 0), src=max(c.src, 0), comp=comp, point=point)
        app.at_end = there.get("at_end") is not False
    except (UserError, LookupError):
        return
    if app.zoomed != (there.get("zoomed") is True):
        app.zoomed = not app.zoomed
        app.arrange()
