"""The screen's side of the house: which folder may import which, no circles, no giants."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

from utils import ROOT

FLOORS = ("widgets", "screen", "techniques", "tui")  # each may import those before it
FILES = [ROOT / "tui.py", ROOT / "widgets.py", *(ROOT / "screen").glob("*.py"), *(ROOT / "techniques").rglob("*.py")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


ALL = {name_of(p): p for p in FILES if p.stem != "requests"}  # a room's requests are words, which everybody may use


def imports(path: Path) -> set[str]:
    """The modules among these that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in ALL else node.module for a in node.names}
    return found & set(ALL)


def of_the_screen() -> dict[str, Path]:
    """The app, what is in screen/, the panes, and whatever they import."""
    found, left = {}, [name for name in ALL if name in ("tui", "widgets") or name.startswith("screen") or name.endswith(".pane")]
    while left:
        name = left.pop()
        if name not in found:
            found[name] = ALL[name]
            left += imports(ALL[name])
    return found


NAMES = of_the_screen()


def test_no_circle_and_no_arrow_upward():
    graph = {name: imports(path) for name, path in NAMES.items()}
    list(TopologicalSorter(graph).static_order())  # a CycleError names the circle
    for name, others in graph.items():
        floor = FLOORS.index(name.split(".")[0])
        assert not [o for o in others if FLOORS.index(o.split(".")[0]) > floor], name
        if name.startswith("techniques."):
            assert not [o for o in others if o.startswith("techniques.") and o.split(".")[1] != name.split(".")[1]], f"{name} reaches into another room"


def test_no_giants():
    """Modules of at most 500 lines, classes of 300, functions of 60; the app inherits from Textual's App alone."""
    for path in NAMES.values():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= (300 if isinstance(node, ast.ClassDef) else 60), f"{path.name}: {node.name} has {lines} lines"
            if isinstance(node, ast.ClassDef) and node.name == "Loupe":
                assert [ast.unparse(b) for b in node.bases] == ["App"]


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
