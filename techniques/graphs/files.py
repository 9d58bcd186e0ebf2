"""
A graph as a file: circuit-tracer's JSON (its viewer and Neuronpedia open it) with the whole result under "loupe", from which it opens again. Layers are
numbers from 0, tokens E, logits n_layers + 1, as there; an error has the feature -1. The viewer shows the graphs that LIST names, in the same folder.
"""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np

from techniques.graphs.requests import ERROR, FEATURE, KINDS, LOGIT, SUPERNODE, TOKEN, GraphMarks, GraphResult
from utils import show_bytes
from vocabulary.files import write_text
from vocabulary.nodes import UserError
from vocabulary.wire import from_json, to_json

TYPES = {FEATURE: "cross layer transcoder", ERROR: "mlp reconstruction error", TOKEN: "embedding", LOGIT: "logit"}  # the viewer's words

LIST = "graph-metadata.json"

LARGEST = 256 << 20  # bytes of a file that is read

WHOLE = ("kind", "layer", "at", "index", "source", "to")  # arrays of whole numbers


def pair(x: int, y: int) -> int:
    """Cantor's number of a pair, by which the viewer finds a feature's layer and index."""
    return (x + y) * (x + y + 1) // 2 + y


def node_id(r: GraphResult, i: int) -> str:
    """The viewer's name of a node; a feature's is LAYER_FEATURE_POSITION."""
    layer, at, index = int(r.layer[i]), int(r.at[i]), int(r.index[i])
    match KINDS[r.kind[i]]:
        case "token":
            return f"E_{index}_{at}"
        case "logit":
            return f"{r.n_layers + 1}_{index}_{at}"
        case "supernode":
            return r.texts[i]
    return f"{layer}_{index}_{at}"


def output(r: GraphResult, i: int) -> str:
    """A logit as the viewer reads it: what stands in double quotes is drawn, what follows "(p=" is a number."""
    words = r.texts[i].removeprefix("logit ")
    words = words[1:-1] if r.index[i] >= 0 else words  # a token's text is quoted
    return f"""Output "{words.replace('"', "”")}" (p={weight_of(r, i):.3f})"""


def weight_of(r: GraphResult, i: int) -> float:
    """What a logit's influence counts: its probability; the difference, the only target, 1."""
    return float(r.probability[i]) if r.index[i] >= 0 or KINDS[r.kind[i]] != LOGIT else 1.0


def node(r: GraphResult, i: int, label: str = "") -> dict:
    kind, layer, at, index = KINDS[r.kind[i]], int(r.layer[i]), int(r.at[i]), int(r.index[i])
    one = {"node_id": node_id(r, i), "layer": "E" if kind == TOKEN else str(r.n_layers + 1 if kind == LOGIT else layer), "ctx_idx": at}
    one |= {"feature_type": TYPES[kind], "token_prob": weight_of(r, i), "is_target_logit": False, "run_idx": 0, "reverse_ctx_idx": 0}
    one["influence"] = None if kind == LOGIT else min(float(r.cumulative[i]), 1.0)
    one["activation"] = float(r.value[i]) if kind == FEATURE else None
    match kind:
        case "feature":
            called = f"{label} ({r.texts[i]})" if label else r.texts[i]  # without words of its own the viewer's lists name no feature
            return one | {"feature": pair(layer, index), "jsNodeId": f"{layer}_{index}-0", "clerp": called}
        case "error":
            return one | {"feature": -1, "jsNodeId": f"{layer}_-1-{at}", "clerp": ""}
        case "token":
            return one | {"feature": at, "jsNodeId": f"E_{index}-{at}", "clerp": ""}
    first = not any(KINDS[k] == LOGIT for k in r.kind[:i])
    return one | {"feature": index, "jsNodeId": f"L_{index}-{at}", "clerp": output(r, i), "is_target_logit": first}


def marks_of(r: GraphResult, model: str) -> GraphMarks:
    """No marks yet, of this graph of a model (by its canonical name)."""
    logit = next(i for i, k in enumerate(r.kind) if KINDS[k] == LOGIT)
    return GraphMarks(model, r.tokens.ids, r.target if r.target == "logits" else r.texts[logit], r.sources)


def as_json(r: GraphResult, slug: str, marks: GraphMarks) -> dict:
    """circuit-tracer's model of a graph. Named nodes are pinned in it too: its viewer draws a supernode of pinned nodes only."""
    ids = [node_id(r, i) for i in range(len(r.kind))]
    links = [{"source": ids[s], "target": ids[d], "weight": float(w)} for s, d, w in zip(r.source, r.to, r.weight)]
    used = {x for link in links for x in (link["source"], link["target"])}
    labels = dict(marks.names)
    nodes = [node(r, i, labels.get(ids[i], "")) for i in range(len(ids)) if ids[i] in used or KINDS[r.kind[i]] in (TOKEN, LOGIT)]
    meta = {"slug": slug, "scan": marks.model, "transcoder_list": list(r.sources), "prompt_tokens": list(r.tokens.texts), "prompt": "".join(r.tokens.texts)}
    drawn = {n["node_id"] for n in nodes}
    groups: dict[str, list[str]] = {}
    for name, label in marks.names:
        if name in drawn:
            groups.setdefault(label, []).append(name)
    pinned = [x for x in dict.fromkeys((*marks.pins, *(name for name, _ in marks.names))) if x in drawn]
    view = {"pinnedIds": pinned, "supernodes": [[label, *some] for label, some in groups.items()], "linkType": "both", "clickedId": "", "sg_pos": ""}
    last = max((n["influence"] for n in nodes if n["feature_type"] in (TYPES[FEATURE], TYPES[ERROR])), default=0.0)
    meta |= {"node_threshold": max(r.node_threshold, math.ceil(last * 100) / 100), "schema_version": 1}  # up to which the viewer's slider goes, by 0.01
    about = {"metadata": meta, "qParams": view, "nodes": nodes, "links": links}
    return about | {"loupe": to_json(r) | {"marks": to_json(marks)}}


def save(path: Path, r: GraphResult, marks: GraphMarks, examples: str = "") -> None:
    """The graph's file, and its line in the viewer's list of the folder's graphs. `examples`: where the viewer finds the features' own files."""
    whole = as_json(r, path.stem, marks)
    meta = whole["metadata"]
    write_text(path, json.dumps(whole | {"metadata": meta | ({"scan": examples} if examples else {})}) + "\n")
    if path.suffix == ".json":
        enlist(path, meta)


def check_name(path: Path) -> None:
    """UserError for a file whose name the viewer's server can't find (it takes addresses as they are written)."""
    if path.name == LIST or path.suffix == ".json" and not re.fullmatch(r"[A-Za-z0-9._-]+", path.stem):
        raise UserError(f"circuit-tracer's viewer can't open {path.name!r}: name the file with letters, digits, - and _, and not {LIST}")


def enlist(path: Path, meta: dict) -> None:
    """Name a graph's file in the list from which the viewer opens graphs. UserError where what stands there is no such list."""
    file = path.with_name(LIST)
    try:
        graphs = json.loads(file.read_text(encoding="utf-8"))["graphs"] if file.exists() else []
        others = [g for g in graphs if g["slug"] != path.stem]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is written, but {file} is no list of graphs, so circuit-tracer's viewer won't show it: move it away and write again"
        ) from error
    write_text(file, json.dumps({"graphs": [*others, meta | {"slug": path.stem}]}, indent=2) + "\n")


def version(path: Path) -> tuple:
    """What tells a file's contents, or that they can't be read, from those of another time; () where there is no file."""
    try:
        now = path.stat()
    except (OSError, ValueError):
        return ()
    return now.st_mode, now.st_mtime_ns, now.st_ctime_ns, now.st_size


def read(path: Path) -> tuple[GraphResult, GraphMarks]:
    """The graph of a file that `save` wrote, and its marks. UserError where it is none, or larger than LARGEST."""
    if not path.is_file():
        raise UserError(f"{path} can't be read: there is no such file, or it is a folder or a pipe")
    try:
        if (size := path.stat().st_size) > LARGEST:
            raise UserError(f"{path} has {show_bytes(size)}, and a graph's file at most {show_bytes(LARGEST)}: write it again with a lower --edge-threshold")
        whole = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: give a file that `graph --out` wrote") from error
    if not isinstance(whole, dict) or "loupe" not in whole:
        raise UserError(f"{path} was not written by Loupe: it has no numbers beside the drawing's. Give a file that `graph --out` wrote")
    r = revive(path, whole["loupe"])
    return r, revive_marks(path, r, whole)


def revive_marks(path: Path, r: GraphResult, whole: dict) -> GraphMarks:
    """The marks of a file, with what its viewer saved since; of one from before they stood beside the numbers, those that its drawing has."""
    try:
        if "marks" not in whole["loupe"]:
            return seen(r, marks_of(r, str(whole["metadata"]["scan"])), whole["qParams"])
        marks, drawn = from_json(whole["loupe"]["marks"], GraphMarks), whole.get("qParams") or {}
        saved = any(isinstance(drawn.get(x), str) for x in ("pinnedIds", "supernodes"))
        return seen(r, marks, drawn) if saved else marks
    except (UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: its pins and names can't be read ({type(error).__name__}: {error}): write it again") from error


def seen(r: GraphResult, marks: GraphMarks, drawn: dict) -> GraphMarks:
    """
    Marks with the pins and supernodes of a drawing, where what was named is pinned too. Once the viewer saved it, pins are a text with commas and supernodes
    JSON in a text, null where it changed none (it draws none of the file's own).
    """
    pins, groups = drawn.get("pinnedIds"), drawn.get("supernodes")
    groups = json.loads(groups) if isinstance(groups, str) else groups or []
    names = dict(marks.names) | {str(x): re.sub(r" \(L\d+ f\d+ @\d+\)$", "", str(label)) for label, *some in groups for x in some}  # as `node` writes it
    there = {node_id(r, i) for i in range(len(r.kind))}
    if pins is not None:
        pins = pins.split(",") if isinstance(pins, str) else map(str, pins)
        marks = replace(marks, pins=tuple(x for x in pins if x in there and (x in marks.pins or x not in dict(marks.names))))
    return replace(marks, names=tuple((x, label) for x, label in names.items() if x in there))


def revive(path: Path, found: object) -> GraphResult:
    """The result of its JSON; floats that are no numbers (NaN) were written as null."""
    hints, made = get_type_hints(GraphResult), {}
    try:
        for name, kind in hints.items():
            if kind is np.ndarray:
                made[name] = np.array(found[name], np.int32 if name in WHOLE else np.float64)
            else:
                made[name] = from_json(found[name], kind)
        r = GraphResult(**made)
        n, links = len(r.kind), len(r.source)
        assert all(
            len(getattr(r, x)) == n for x in ("layer", "at", "index", "value", "influence", "cumulative", "probability", "bias", "left_out", "whole", "texts")
        )
        assert all(len(getattr(r, x)) == links for x in ("to", "weight", "share"))
        assert not links or 0 <= min(r.source.min(), r.to.min()) and max(r.source.max(), r.to.max()) < n
        assert not n or 0 <= r.kind.min() and r.kind.max() < KINDS.index(SUPERNODE)
    except (UserError, KeyError, TypeError, ValueError, OverflowError, AssertionError) as error:
        raise UserError(f"{path} holds no whole graph ({type(error).__name__}: {error}): write it again") from error
    return r
