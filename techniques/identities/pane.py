"""The honesty panel: the identities, checked on the loaded model and prompt."""

import math

from techniques.identities.requests import Identities
from vocabulary.requests import Identity
from screen.keys import LOUPE, Action
from screen.overlays import Panel
from screen.pane import Host
from utils import visible
from widgets import BAD, DIM, GOOD, PLAIN, Spans


def honesty(app: Host) -> None:
    if app.info is None:
        app.say(f"no model yet: {app.busy}", BAD)
        return
    panel = Panel("honesty", [[(" checking the identities on this model and prompt…", DIM)]], "esc closes")
    app.open(panel)
    at_load = app.info.checks

    def show(found) -> None:
        bad = [r for r in (*found.rows, *at_load) if r.ok is False]
        head: Spans = [(f" {len(bad)} broken" if bad else " all hold", BAD if bad else GOOD), (f"  {found.convention}", DIM)]
        rows = identity_rows(found.rows)
        rows.append([(f" at load, on random tokens: {sum(r.ok is True for r in at_load)} of {sum(r.ok is not None for r in at_load)} identities held", DIM)])
        panel.replace([head, *rows, *identity_rows(at_load)])

    failed = lambda error: panel.replace([[(f" {visible(str(error))}", BAD)]])  # noqa: E731
    app.requests.ask("identities", Identities(app.state.with_saes(app.state.study)), show, failed=failed)


def identity_rows(rows: tuple[Identity, ...]) -> list[Spans]:
    """The honesty panel: each identity with its error against its tolerance; red when broken."""
    lines: list[Spans] = []
    for r in rows:
        mark, style = ("✓", GOOD) if r.ok else ("–", DIM) if r.ok is None else ("✗", BAD)
        error = (
            ("not applicable" if math.isnan(r.error) else f"{r.error:.1e}")
            if r.ok is None
            else f"{r.error:.1e} ≤ {r.tolerance:.0e}"
            if r.ok
            else f"{r.error:.1e} > {r.tolerance:.0e}"
        )
        lines.append(
            [
                (f" {mark} ", style),
                (f"{r.name:50}", style if r.ok is False else PLAIN),
                (f"{error:20}", style),
                (f" {visible(r.note)}", DIM),
            ]
        )
    return lines


ACTIONS = (Action("honesty", "D", "honesty", "The identities, checked on this model and prompt", LOUPE, honesty, "convention"),)
