"""
How the house stands: which file may import which, no circles, and nothing too large. Imports inside functions count too.

What is listed as an exception (UPWARD, CIRCLES, LARGE_*) was so when the test was written. The lists only get shorter.
"""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("vocabulary", "model", "screen", "techniques")

# Floors, the lowest first. A file imports from its own floor and from lower ones; engine and screen never from each other.
WORDS, ROOM_WORDS, BASE, ROOM, TOP = range(
    5
)  # vocabulary and utils; a room's requests; model/, widgets and screen/; a room's other files; tui.py and engine.py
TOP_LEVEL = {"tui": (TOP, "screen"), "engine": (TOP, "engine"), "utils": (WORDS, ""), "widgets": (BASE, "screen")}

UPWARD: set[tuple[str, str]] = set()
CIRCLES: tuple[set[str], ...] = ()
MODULE, CLASS, FUNCTION = 500, 300, 60  # lines at most
LARGE_MODULES: dict[str, int] = {}
LARGE_CLASSES: dict[str, int] = {}
LARGE_FUNCTIONS: dict[str, int] = {}


def modules() -> dict[str, Path]:
    files = [*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))]
    names = {p: ".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files}
    return {name.removesuffix(".__init__"): p for p, name in names.items()}


@cache
def imported(path: Path) -> frozenset[str]:
    """What a file imports, anywhere in it: modules, and `module.name` of each name from one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.Import():
                found |= {a.name for a in node.names}
            case ast.ImportFrom():
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    return frozenset(found)


def own(path: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a file imports; a package only where something of its own is meant."""
    found = imported(path) & set(known)
    return {m for m in found if not any(other.startswith(f"{m}.") for other in found)}


GRAPH = {name: own(path, modules()) - {name} for name, path in modules().items()}


def floor(name: str) -> tuple[int, str]:
    """The floor of a module, and its side: "engine", "screen", or "" for what both may import."""
    folder, *rest = name.split(".")
    if name in TOP_LEVEL:
        return TOP_LEVEL[name]
    match folder:
        case "vocabulary":
            return WORDS, ""
        case "model" | "screen":
            return BASE, "engine" if folder == "model" else "screen"
    if rest == ["shell"]:
        return BASE, "engine"
    if len(rest) < 2:  # techniques itself, and a room
        return WORDS, ""
    return (ROOM_WORDS, "") if rest[-1] == "requests" else (ROOM, side(name))


@cache
def side(name: str) -> str:
    """Of a room's file: what it imports says where it belongs; "" when it serves both."""
    found = {text.split(".")[0] for text in imported(modules()[name])}
    if name.endswith((".pane", ".actions")) or found & {"textual", "screen", "widgets"}:
        return "screen"
    return "engine" if name.endswith((".analysis", ".command")) or found & {"torch", "model"} else ""


def upward(a: str, b: str) -> bool:
    """Whether `a` must not import `b`. Of another room a file of the screen may import the requests only; an analysis may build on another's."""
    one, other = (tuple(x.split(".")[1:]) if x.startswith("techniques.") else () for x in (a, b))
    if len(one) == 2 and len(other) == 2 and one[0] != other[0] and side(a) == "screen":
        return other[1] != "requests"
    (here, my), (there, its) = floor(a), floor(b)
    return there > here or bool(its) and my != its


def circles() -> list[set[str]]:
    """Sets of modules that import each other in a circle: those that reach themselves, grouped."""
    reach = {m: set(some) for m, some in GRAPH.items()}
    while True:
        more = {m: some | {x for s in some for x in reach[s]} for m, some in reach.items()}
        if more == reach:
            break
        reach = more
    return [set(c) for c in {frozenset(x for x in reach[m] if m in reach[x]) for m in reach if m in reach[m]}]


def sizes() -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Lines of modules (by their own name), of classes and of functions (Class.function)."""
    files, classes, functions = {}, {}, {}

    def walk(node: ast.AST, outer: str) -> None:
        for child in ast.iter_child_nodes(node):
            inside = outer
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                table = classes if isinstance(child, ast.ClassDef) else functions
                table[outer + child.name] = max(child.end_lineno - child.lineno + 1, table.get(outer + child.name, 0))
                inside = f"{outer}{child.name}."
            walk(child, inside)

    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        files[name] = len(text.splitlines())
        walk(ast.parse(text), "")
    return files, classes, functions


def test_no_arrow_upward():
    found = {(a, b) for a, some in GRAPH.items() for b in some if upward(a, b)}
    assert not found - UPWARD, "these import what stands above them, or on the other side"


def test_no_circles():
    for circle in circles():
        assert any(circle <= allowed for allowed in CIRCLES), f"these import each other: {sorted(circle)}"


@pytest.mark.parametrize("what, limit, allowed", [(0, MODULE, LARGE_MODULES), (1, CLASS, LARGE_CLASSES), (2, FUNCTION, LARGE_FUNCTIONS)])
def test_nothing_is_too_large(what, limit, allowed):
    large = {name: lines for name, lines in sizes()[what].items() if lines > max(limit, allowed.get(name, 0))}
    assert not large, f"over {limit} lines"


def test_the_app_inherits_from_textuals_alone():
    (app,) = [n for n in ast.parse((ROOT / "tui.py").read_text(encoding="utf-8")).body if isinstance(n, ast.ClassDef) and n.name == "Loupe"]
    assert [ast.unparse(base) for base in app.bases] == ["App"]


@pytest.mark.parametrize("module, absent", [("tui", "torch"), ("engine", "textual"), ("engine", "torch")])
def test_what_an_import_does_not_load(module, absent):
    code = f"import sys, {module}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
