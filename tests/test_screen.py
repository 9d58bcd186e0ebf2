"""The screen's side of the house: which folder may import which, no circles, no giants."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from utils import ROOT

FLOORS = ("widgets", "screen", "techniques", "tui")  # each may import those before it
SCREEN_SIDE = [ROOT / "widgets.py", *(ROOT / "screen").glob("*.py"), *(p for p in (ROOT / "techniques").glob("*/*.py")), ROOT / "techniques" / "__init__.py", ROOT / "tui.py"]  # fmt: skip
PANE_FILES = [p for p in SCREEN_SIDE if p.parent.parent.name != "techniques" or p.stem not in ("analysis", "command", "requests")]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(p): p for p in SCREEN_SIDE}


def imports(path: Path) -> set[str]:
    """The modules of the screen's side that a file imports anywhere, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in NAMES else node.module for a in node.names}
    return found & set(NAMES)


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
    for path in PANE_FILES:
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 500, path.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= (300 if isinstance(node, ast.ClassDef) else 60), f"{path.name}: {node.name} has {lines} lines"
            if isinstance(node, ast.ClassDef) and node.name == "Loupe":
                assert [ast.unparse(b) for b in node.bases] == ["App"]
