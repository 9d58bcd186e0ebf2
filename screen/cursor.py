"""The one cursor that all panes share."""

from dataclasses import dataclass, replace

from vocabulary.nodes import Node
from vocabulary.requests import ModelInfo


@dataclass(frozen=True)
class Cursor:
    """A layer, a head or component, a hook point of the residual stream, a position and a source position."""

    layer: int = 0
    head: int = 0
    comp: str = "head"
    point: str = "resid_post"
    pos: int = -1
    src: int = 0


def clip(n: int, size: int) -> int:
    return max(0, min(n, size - 1))


def clamped(c: Cursor, info: ModelInfo, length: int, at_end: bool) -> Cursor:
    """The cursor inside the model and a prompt of `length` tokens; at the end it stays at the end."""
    pos = length - 1 if at_end or c.pos < 0 else min(c.pos, length - 1)
    point = "resid_post" if info.parallel and c.point == "resid_mid" else c.point
    return replace(c, layer=min(c.layer, info.n_layers - 1), head=min(c.head, info.n_heads - 1), point=point, pos=max(pos, 0), src=min(c.src, max(pos, 0)))


def place_of(node: Node) -> dict:
    """A node as arguments of app.move."""
    if node.site.startswith("resid"):
        return {"layer": node.layer, "point": node.site}
    return {"layer": node.layer, "comp": node.site} | ({"head": node.head} if node.site == "head" else {})
