"""Pane 5's drawing: what is drawn of the circuit, and how the cursor walks in it, along edges. Each takes the pane and the app."""

import math

from techniques.circuits import drawings, shards
from techniques.circuits.graph import EMBED, Graph, draw, edge_legend, edges_beside, fitted_to, graph_of
from techniques.circuits.pictures import score_lines, summary, wrap
from techniques.circuits.requests import ScoreResult
from vocabulary.circuit import LOGITS, owner, parse_edge
from vocabulary.nodes import Node, parse_node
from screen.cursor import clip
from screen.pane import Host, Pane
from widgets import BOLD, CURSOR, CURSOR_PLAIN, DIM, PLAIN, Same, Spans


def drawn(pane: Pane, app: Host) -> Graph | None:
    """The circuit as a graph to walk in, where the view is the drawing and it has edges; None where this model does not have all its nodes."""
    circuit = shards.drawn(pane, app)
    if app.state.views[pane.view] != "drawing" or circuit is None or not circuit.edges or app.info is None:
        return None
    if any(n.layer >= app.info.n_layers or (n.head or 0) >= app.info.n_heads for n in map(parse_node, circuit.nodes)):
        return None
    result, found = (pane.scored(app), pane.discovered(app)) if (coming := shards.coming(pane, app)) is None else (None, coming)
    labels = app.tokens.tokens.labels if app.tokens else {}
    key = (circuit, Same(result), Same(found), tuple(labels.items()), app.length())
    scores, _ = edge_scores(pane, app, result)
    return pane.picture("graph", key, lambda: graph_of(circuit, scores, app.info.n_heads, labels, app.length()))


def edge_scores(pane: Pane, app: Host, result: ScoreResult | None) -> tuple[dict[str, float], str]:
    """Of every edge: what cutting it alone does to the metric, else its score in the discovery; and which of them that is."""
    if (coming := shards.coming(pane, app)) is not None:
        return dict(zip(coming.edges, coming.scores.tolist())), f"{coming.method}'s mean score so far"
    if result is not None and any("->" in p for p in result.parts):
        return dict(zip(result.parts, result.effects.tolist())), "effect of cutting it alone"
    found = pane.discovered(app)
    if found is not None and any("->" in e for e in found.result.edges):
        return dict(zip(found.result.edges, found.result.scores.tolist())), f"{found.result.method}'s score"
    return {}, ""


def at(pane: Pane, app: Host, graph: Graph) -> str:
    """The node of the drawing that the cursor is on; "" where it is on one that the circuit does not hold."""
    if pane.left is not None and pane.left[0] == pane.here(app) and pane.left[1] in graph.nodes:
        return pane.left[1]
    name = node_of_cursor(app)
    return next((n for n in graph.nodes if n not in (EMBED, LOGITS) and owner(n).split("@")[0] == name), "")


def followed(pane: Pane, app: Host, graph: Graph) -> str:
    """The edge that , and . have chosen: the strongest until then."""
    mine = [e for e, _, _ in graph.of(at(pane, app, graph))]
    return pane.edge if pane.edge in mine else mine[0] if mine else ""


def nearest(app: Host, graph: Graph) -> str:
    """Of the circuit's nodes the one nearest to the cursor."""
    c = app.cursor
    some = [n for n in graph.nodes if n not in (EMBED, LOGITS)]
    far = lambda n: (abs(parse_node(n).layer - c.layer), abs((parse_node(n).head or 0) - c.head))  # noqa: E731
    return min(some, key=far, default=EMBED)


def stand(pane: Pane, app: Host, name: str) -> None:
    """Put the cursor on a node of the drawing."""
    if name not in (EMBED, LOGITS):
        node = parse_node(name)
        labels = app.tokens.tokens.labels if app.tokens else {}
        pos = labels.get(node.pos, node.pos)
        where = {"pos": clip(pos, app.length())} if isinstance(pos, int) and pos >= 0 else {}
        head = {"comp": "head", "head": node.head} if node.site == "head" else {"comp": "mlp"}
        app.move(layer=node.layer, **head, **where)
    pane.left = (pane.here(app), name)
    app.draw()


def step(pane: Pane, app: Host, graph: Graph, rows: int, cols: int) -> None:
    """h and l: the next node of the row. k and j: along an edge to the node it leads to or comes from; where there is none, to the next row."""
    here = at(pane, app, graph)
    if not here:
        stand(pane, app, nearest(app, graph))
        return
    graph = pane.laid if pane.laid is not None and here in pane.laid.nodes else graph  # the rows as they are on the screen
    row = graph.rows[graph.row_of(here)]
    if cols:
        stand(pane, app, row[clip(row.index(here) + cols, len(row))])
        return
    if abs(rows) > len(graph.rows):
        ends = [r for r in graph.rows if r != (LOGITS,)]
        stand(pane, app, ends[0 if rows < 0 else -1][0])
        return
    for _ in range(abs(rows)):
        along = [(e, other) for e, other, _ in graph.of(here) if (owner(parse_edge(e).receiver) == here) == (rows > 0)]
        follow = next((other for e, other in along if e == followed(pane, app, graph)), along[0][1] if along else "")
        if follow == LOGITS:
            inner = [other for _, other in along if other != LOGITS]
            if pane.edge in [e for e, _ in along] or not inner:
                app.say(f"{here} → logits: the end of the circuit; , and . choose another edge")
                return
            follow = inner[0]
        if not follow:
            return
        here = follow
        stand(pane, app, here)


def turn(pane: Pane, app: Host, graph: Graph, by: int) -> None:
    """, and . choose which edge of the node is followed."""
    mine = [e for e, _, _ in graph.of(at(pane, app, graph))]
    if mine:
        pane.edge = mine[(mine.index(followed(pane, app, graph)) + by) % len(mine)]
    app.draw()


def node(pane: Pane, app: Host, graph: Graph, pos: int | None) -> Node | None:
    """The node under the cursor as the circuit holds it."""
    name = at(pane, app, graph)
    if not name or name == LOGITS:
        return None
    if name == EMBED:
        return Node("embed", pos=pos)
    mine = parse_node(name)
    return Node(mine.site, mine.layer, mine.head, mine.part, mine.index, pos) if mine.pos is None and pos is not None else mine


def lines(pane: Pane, app: Host, graph: Graph, effects: dict[str, float], width: int, height: int) -> list[Spans]:
    """The drawing, or, where it does not fit, the circuit in words with the cursor's node marked and in view."""
    here, edge, mode = at(pane, app, graph), followed(pane, app, graph), app.state.views["mode"]
    mine = {n: effects[n] for n in graph.nodes if n in effects}
    if (fits := fitted_to(graph, width, height, mine)) is not None:
        pane.laid = fits[0]
        return draw(fits[0], fits[1], width, height, here, edge, mode, mine)
    pane.laid = graph
    words = drawings.draw(shards.drawn(pane, app), mine, width)
    line = next((n for n, text in enumerate(words) if text.strip().split(" ")[0] == here), 0)
    start = clip(line - height // 4, max(1, len(words) - height + 1))
    marked = CURSOR_PLAIN if mode == "shade" else CURSOR
    return [[(text, marked if start + n == line and here else PLAIN)] for n, text in enumerate(words[start : start + height])]


def key_to_edges(pane: Pane, app: Host, graph: Graph, result: ScoreResult | None) -> Spans:
    """The colours of edges with their numbers, and what those are."""
    _, what = edge_scores(pane, app, result)
    if not graph.top:
        return [("edges without scores: S scores the circuit", DIM)]
    return [("edges: ", DIM), *edge_legend(graph, app.state.views["mode"]), (f" · {what}", DIM)]


def about_edge(pane: Pane, app: Host, graph: Graph) -> Spans:
    """The edge that is followed, and how many there are."""
    edge, mine = followed(pane, app, graph), graph.of(at(pane, app, graph))
    if not edge:
        return []
    n = next(i for i, (e, _, _) in enumerate(mine) if e == edge)
    score = mine[n][2]
    return [(f"  {edge}{'' if math.isnan(score) else f' {score:+.4f}'}", BOLD), (f"  edge {n + 1} of {len(mine)}  ", DIM)]


def picture(pane: Pane, app: Host, graph: Graph, result: ScoreResult | None, effects: dict[str, float]) -> list[Spans]:
    """The whole view: the colours of edges, the drawing, and beside it, where there is room, the edges of the node under the cursor."""
    width, height = pane.size.width - 1, max(pane.size.height - 3, 4)
    list_width = 40 if width >= 100 else 0
    main = lines(pane, app, graph, effects, width - list_width, height)
    here, edge = at(pane, app, graph), followed(pane, app, graph)
    aside = edges_beside(graph, here, edge, list_width - 2, height) if list_width and here else []
    if list_width and not here:
        aside = [[(line, DIM)] for line in wrap(f"{node_of_cursor(app)} is not in the circuit: h j k l go to its nearest node", list_width - 2)]
    if result is not None and len(aside) + 6 <= height:
        aside += [[], *score_lines(result)]
    blank: Spans = [(" " * (width - list_width), PLAIN)]
    rows = [(main[n] if n < len(main) else blank) + ([("  ", PLAIN), *aside[n]] if n < len(aside) else []) for n in range(max(len(main), len(aside)))]
    return [key_to_edges(pane, app, graph, result), *rows]


def node_of_cursor(app: Host) -> str:
    return f"L{app.cursor.layer}H{app.cursor.head}" if app.cursor.comp == "head" else f"L{app.cursor.layer}.mlp"


def without_edges(pane: Pane, app: Host, result: ScoreResult | None, width: int, height: int) -> list[Spans]:
    """Beside the map: the nodes by layer, those of the circuit that have no edges to walk along, then its scores."""
    circuit = shards.drawn(pane, app)
    effects = dict(zip(result.parts, result.effects.tolist())) if result is not None else {}
    below = summary(circuit, result, width)
    graph = graph_of(circuit, {}, app.info.n_heads, app.tokens.tokens.labels if app.tokens else {}, app.length())
    fits = fitted_to(graph, width, height - len(below) - 1, effects)
    if fits is None:
        return [*([(line, PLAIN)] for line in drawings.draw(circuit, effects, width)), [], *below]
    hi, mode = {n: effects[n] for n in graph.nodes if n in effects}, app.state.views["mode"]
    return [*draw(fits[0], fits[1], width, height - len(below) - 1, at(pane, app, graph), "", mode, hi), [], *below]
