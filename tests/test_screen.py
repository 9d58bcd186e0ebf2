"""The screen's side: a pane of one's own needs no change here. Its arrows and sizes are in test_house.py."""

import subprocess
import sys

from utils import ROOT

OWN_PANE = """
from textual.widget import Widget

from screen.actions import turns
from screen.keys import VIEW, Action, Part
from screen.pane import Host, Pane
from widgets import PLAIN, Lines


class Counting(Pane):
    number, key, label, about = "8", "counting", "Counting", "how long the prompt is"
    view = "counting.in"
    views = {"counting.in": ("letters", "words")}
    hints = ("view", "sweep", "louder")
    keys = (
        Part("sweep", "counting", "count", lambda pane, app: app.say("counted")),
        Action("louder", "ctrl+p", "louder", "Say it louder", VIEW, lambda pane, app: app.say("LOUDER")),
        Part("points", "counting", "another unit", turns("counting.in")),
    )

    def __init__(self, **kw):
        super().__init__(**kw)
        self.table = Lines(classes="table")

    def body(self) -> Widget:
        return self.table

    def paint(self, app: Host) -> None:
        text, unit = app.state.prompt.clean, app.state.views[self.view]
        self.show_title(app, (), f"in {unit}", "")
        self.table.show([[(f"{len(text) if unit == 'letters' else len(text.split())} {unit}", PLAIN)]])


PANE = Counting
"""

OWN_RUN = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = ["tests", "."]
import techniques
techniques.settings = lambda: {"LOUPE_TECHNIQUES": sys.argv[1]}
from ui import make_app, shown
from tui import TABLE


class Silent:
    jobs, alive, log = {}, False, "the log"
    async def start(self): ...
    async def stop(self): ...
    async def ask(self, *args): raise AssertionError("no engine")


async def main():
    app = make_app(Silent(), Path(sys.argv[1]))
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.press("8")
        await pilot.pause()
        assert "8 Counting  in letters" in shown(app) and "58 letters" in shown(app), shown(app)
        assert "louder" in shown(app) and "v view" in " ".join(shown(app).split())
        for key, words in (("v", "13 words"), ("P", "letters"), ("S", "counted"), ("ctrl+p", "LOUDER")):
            await pilot.press(key)
            await pilot.pause()
            assert words in shown(app), (key, shown(app))
        await pilot.press("question_mark", *"louder")
        await pilot.pause()
        assert "Say it louder" in shown(app)
    assert {a.id: a.help for a in TABLE}["sweep"].endswith("; features: examples in a text; counting: count")
    assert "torch" not in sys.modules


asyncio.run(main())
"""


def test_a_pane_of_ones_own_needs_no_change_here(tmp_path):
    """A folder that LOUPE_TECHNIQUES names brings a pane with its number, view, keys, hints and help."""
    room = tmp_path / "counting"
    room.mkdir()
    (room / "requests.py").write_text("")
    (room / "pane.py").write_text(OWN_PANE)
    run = subprocess.run([sys.executable, "-c", OWN_RUN, str(room)], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
