"""What pane 5's own keys do to nodes and paths: keep and drop, receivers and senders, ranking. Each takes the pane and the app."""

from dataclasses import replace

import numpy as np

from vocabulary.circuit import check_receivers, LOGITS
from vocabulary.nodes import Node, parse_node, UserError
from screen.actions import find, own_circuit
from screen.overlays import Item, Picker
from screen.pane import Host, Pane
from widgets import GOOD


def keep(pane: Pane, app: Host) -> None:
    """Keep the node under the cursor, or drop it."""
    app.ready()
    node = app.node()
    if node.site == "head" and node.part == "pattern":
        node = replace(node, part="z")
    if isinstance(node.pos, int) and app.tokens and (label := next((k for k, v in app.tokens.tokens.labels.items() if v == node.pos), None)):
        node = replace(node, pos=label)
    own_circuit(app)
    app.act("keep", part=str(node))
    kept = app.state.current
    verb = "kept in" if str(node) in kept.nodes else "dropped from"
    app.say(f"{node} {verb} {kept.name}: {len(kept.nodes)} nodes, {len(kept.edges)} edges (u undoes)", GOOD)


def rank_paths(pane: Pane, app: Host) -> bool:
    """Paths by the size of what is shown; choosing one puts the cursor on its sender. False where no paths are shown."""
    if app.state.views[pane.view] != "path":
        return False
    grid, result = pane.map.grid, pane.paths(app)
    if result is None or grid is None:
        raise UserError("no path has been patched yet: S runs them")
    cells = sorted(((int(r), int(c)) for r, c in np.argwhere(np.isfinite(grid.values))), key=lambda rc: -abs(float(grid.values[rc])))
    items = [Item(result.address(r, c) or f"{result.rows[r]} {result.cols[c]}", f"{float(grid.values[r, c]):+.4f}", "", (r, c)) for r, c in cells[:2000]]
    app.open(Picker("paths by effect", items, lambda item, typed: item and item.key != "embed" and app.guard(lambda: find(app, item.key))))
    return True


# ------------------------------------------------------------------ where paths begin and end


def choose_receivers(pane: Pane, app: Host) -> None:
    """Choose where paths end, or where those to each receiver begin."""
    app.ready()
    c, now = app.cursor, app.state.receivers
    groups = app.state.current.groups if app.state.current else {}
    here = [str(Node("head", c.layer, c.head, p)) for p in "qkv"] if c.comp == "head" else []
    items = [Item(r, "take it away" if r in now else "add it", "", r) for r in dict.fromkeys((*now, *here, str(Node("mlp", c.layer)), LOGITS))]
    items += [Item("from the node under the cursor", "to each receiver", "", ("from",))]
    items += [Item(f"from {name}", f"a group together, to each receiver: {' '.join(some)}", "", ("from", *some)) for name, some in groups.items()]
    items += [Item(name, f"the q, k or v of a group: {' '.join(some)}", "", some) for name, some in groups.items()]

    def chosen(item: Item | None, typed: str) -> None:
        words = list(item.value) if item and isinstance(item.value, tuple) else typed.replace(",", " ").split() if item is None else []
        if words[:1] == ["from"]:
            app.guard(lambda: begin(app, words[1:]))
        elif item is None:
            app.guard(lambda: end(app, words))
        elif isinstance(item.value, tuple):
            app.guard(lambda: end(app, [f"{n}.v" for n in item.value if parse_node(n).site == "head"]))
        else:
            some = [r for r in now if r != item.value] if item.value in now else [*(r for r in now if r != LOGITS), item.value]
            app.guard(lambda: end(app, some))

    app.open(Picker(f"receivers: {', '.join(now)} (or type: L3H2.q L3H3.q, or: from L0H1 L0H3)", items, chosen, free=True))


def end(app: Host, some: list[str]) -> None:
    """Paths end at these receivers."""
    check_receivers(some, app.info)
    for place in [p for r in some if r != LOGITS and (p := parse_node(r).pos) is not None]:
        row = app.tokens.tokens if app.tokens else None
        if row and place not in row.labels and place not in range(-len(row.ids), len(row.ids)):
            raise UserError(f"@{place}: the prompt has {len(row.ids)} tokens and the labels {', '.join(row.labels)}")
    app.act("receivers", addresses=some)
    app.say(f"paths end at {', '.join(app.state.receivers)}: S runs them")


def begin(app: Host, some: list[str]) -> None:
    """Paths to each receiver begin at these senders together."""
    app.act("senders", addresses=some)
    if app.state.views["circuit.each"] != "receiver":
        app.act("view", name="circuit.each", value="receiver")
    app.say(f"paths begin at {', '.join(some) or 'the node under the cursor'} and go to each receiver: S runs them")
