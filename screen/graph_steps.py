"""What the session's actions do to attribution graphs: which one is shown, and what is pinned and named in it."""

from dataclasses import replace

from techniques.graphs.requests import GraphMarks
from vocabulary.wire import from_json


def with_marks(state, new: GraphMarks):
    """The marks of one graph in the place of those it had."""
    others = tuple(m for m in state.marks if m.graph != new.graph)
    return replace(state, marks=(*others, new) if new.pins or new.names else others)


def mark_graph(state, marks: dict):
    """Pins and names of one graph."""
    return with_marks(state, from_json(marks, GraphMarks))


def open_graph(state, path: str, marks: dict | None = None):
    """Show the graph of a file, with the pins and names that it brings beside those that are there; "": the prompt's own again."""
    state = replace(state, graph=from_json(path, str))
    if marks is None:
        return state
    new = from_json(marks, GraphMarks)
    old = next((m for m in state.marks if m.graph == new.graph), new)
    return with_marks(state, replace(new, pins=tuple(dict.fromkeys((*old.pins, *new.pins))), names=tuple((dict(new.names) | dict(old.names)).items())))


def transcoders(state, sources: list):
    """The sources of the prompt's own graph; none: those that are loaded, else the zoo's."""
    return replace(state, transcoders=from_json(sources, tuple[str, ...]))


def words(name: str, before, after) -> str:
    """What one of these changed, or ""."""
    if name == "open_graph":
        return f"the graph of {after.graph}" if after.graph else "the prompt's own graph"
    if name == "transcoders":
        return f"graph by {' '.join(after.transcoders) or 'the loaded transcoders'}"
    for new in (m for m in (*after.marks, *before.marks) if m not in after.marks or m not in before.marks):
        old, now = (next((m for m in some.marks if m.graph == new.graph), replace(new, pins=(), names=())) for some in (before, after))
        parts = [f"{verb} {x}" for verb, a, b in (("pinned", now.pins, old.pins), ("unpinned", old.pins, now.pins)) for x in a if x not in b]
        parts += [f"{x} is “{text}”" for x, text in now.names if (x, text) not in old.names]
        parts += [f"{x} has no name" for x, _ in old.names if x not in dict(now.names)]
        return f"graph: {', '.join(parts[:3])}{' …' * (len(parts) > 3)}"
    return ""


ACTIONS = (mark_graph, open_graph, transcoders)
