"""Nodes and interventions: their addresses, parsed and formatted in one place. Never imports torch."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args


class UserError(Exception):
    """Input that can't be used; the message is one line that says what to do. Shown as it is, never a traceback."""


class AddressError(UserError): ...


# ------------------------------------------------------------------ nodes

Site = Literal["embed", "resid_pre", "resid_mid", "resid_post", "attn", "mlp", "head", "neuron", "sae"]
Part = Literal["z", "q", "k", "v", "pattern"]
RESIDS = ("resid_pre", "resid_mid", "resid_post")
PARTS = get_args(Part)
SITES = get_args(Site)
LABEL = r"[A-Za-z][A-Za-z0-9_]*"
NODE_RE = re.compile(
    rf"^(?:(?P<embed>embed)|(?P<sl>[0-9]{{1,9}})\.(?P<sh>[0-9]{{1,9}})(?:\.(?P<sp>z|q|k|v|pattern))?|[Ll](?P<l>[0-9]{{1,9}})(?:[Hh](?P<h>[0-9]{{1,9}})(?:\.(?P<p>z|q|k|v|pattern))?"
    rf"|\.(?P<site>resid_pre|resid_mid|resid_post|attn|mlp(?:\.n(?P<n>[0-9]{{1,9}}))?|sae\.f(?P<f>[0-9]{{1,9}}))))(?:@(?P<pos>\*|-?[0-9]{{1,9}}|{LABEL}))?\Z"
)


@dataclass(frozen=True)
class Node:
    """A place in the model. `pos` None means every position; a str is a label of the prompt set; a negative int counts from the end."""

    site: Site
    layer: int | None = None
    head: int | None = None
    part: Part = "z"
    index: int | None = None
    pos: int | str | None = None

    def __str__(self) -> str:
        return format_node(self)


def parse_node(text: str) -> Node:
    """Read an address such as `L9H9`, `L9H9.q@S2`, `9.9`, `L3.mlp@-1`, `L5.resid_pre@10`, `L3.mlp.n412`, `L8.sae.f1234`, `embed`."""
    m = NODE_RE.match(text.strip())
    if m is None:
        raise AddressError(
            f"{text.strip()!r} is not a node: write L9H9, L9H9.q, 9.9, L3.mlp, L3.attn, L5.resid_pre, L3.mlp.n412 or embed, with @10, @-1, @S2 or @* for the position"
        )
    g = m.groupdict()
    pos = None if g["pos"] in (None, "*") else int(g["pos"]) if re.fullmatch(r"-?[0-9]+", g["pos"]) else g["pos"]
    if g["embed"]:
        return Node("embed", pos=pos)
    if g["sl"] is not None:
        return Node("head", int(g["sl"]), int(g["sh"]), g["sp"] or "z", pos=pos)
    layer = int(g["l"])
    if g["h"] is not None:
        return Node("head", layer, int(g["h"]), g["p"] or "z", pos=pos)
    if g["n"] is not None:
        return Node("neuron", layer, index=int(g["n"]), pos=pos)
    if g["f"] is not None:
        return Node("sae", layer, index=int(g["f"]), pos=pos)
    return Node(g["site"], layer, pos=pos)


def format_node(node: Node) -> str:
    """The address that `parse_node` reads back."""
    match node.site:
        case "embed":
            text = "embed"
        case "head":
            text = f"L{node.layer}H{node.head}" + ("" if node.part == "z" else f".{node.part}")
        case "neuron":
            text = f"L{node.layer}.mlp.n{node.index}"
        case "sae":
            text = f"L{node.layer}.sae.f{node.index}"
        case _:
            text = f"L{node.layer}.{node.site}"
    return text if node.pos is None else f"{text}@{node.pos}"


# ------------------------------------------------------------------ interventions

Op = Literal["zero", "mean", "mean_all", "mean_text", "mean_text_pos", "patch", "resample", "noise", "freeze", "scale", "set", "add", "steer"]
OPS: dict[Op, str] = {
    "zero": "set to zero",
    "mean": "mean over the prompt set's corrupted prompts, position by position",
    "mean_all": "mean over the prompt set's corrupted prompts and all their positions but the first",
    "mean_text": "mean over a text file and all its positions but the first of each window",
    "mean_text_pos": "mean over a text file, position by position, in windows as long as the prompt",
    "patch": "the value this node has in the other prompt's run",
    "resample": "the value in the run of another corrupted prompt of the set, drawn with the seed",
    "noise": "its own value plus Gaussian noise, a number (3) of the embedding's standard deviations, drawn with the seed",
    "freeze": "the value in the prompt's own run without interventions",
    "scale": "multiply by a number",
    "set": "set a feature's or a neuron's activation to a number",
    "add": "add a number of unit vectors along the answers' minus the foils' unembedding; of a feature: to its activation, so that its decoder row is added",
    "steer": "add a number of times a saved direction",
}
ABLATIONS = ("zero", "mean", "mean_all", "resample", "noise", "mean_text", "mean_text_pos")
FROM_TEXT = ("mean_text", "mean_text_pos")  # these need a text file
FROM_SET = ("mean", "mean_all", "resample")  # these need the prompt set
NOISE = 3.0


@dataclass(frozen=True)
class Intervention:
    """
    A node and what is done to it. `value` is the number of scale, set, add, steer and noise (there None means 3); `source` the direction of steer, a name or a file.
    Written `L9H9@10=zero`, `L3.mlp=scale:0.5`, `L3.resid_post=steer:NAME:2`.
    """

    node: Node
    op: Op
    value: float | None = None
    source: str = ""

    def __str__(self) -> str:
        return f"{self.node}={self.op}" + (f":{self.source}" if self.source else "") + ("" if self.value is None else f":{self.value!r}")


def parse_intervention(text: str) -> Intervention:
    """Read `L9H9@10=zero`, `L9H9=scale:0.5` or `L3.mlp=noise:3`."""
    address, _, op = text.partition("=")
    op, colon, number = op.strip().partition(":")
    source = ""
    if op == "steer":
        source, colon, number = number.rpartition(":")
        if not source or not number:
            raise AddressError(f"{text!r}: steer needs a direction and a number, {address}=steer:NAME:2")
    if op not in OPS:
        raise AddressError(f"{text!r} is not an intervention: write NODE=OP with OP one of {', '.join(OPS)} (scale:0.5)")
    if op in ("scale", "set", "add") and not colon or colon and op not in ("scale", "set", "add", "steer", "noise"):
        raise AddressError(f"{text!r}: scale needs a factor (L9H9=scale:0.5), set and add a number; noise may have one; the other operations take none")
    try:
        value = float(number) if colon else None
    except ValueError as error:
        raise AddressError(f"{text!r}: {number!r} is not a number") from error
    if value is not None and not math.isfinite(value):
        raise AddressError(f"{text!r}: the factor must be finite")
    if op == "noise" and value is not None and value <= 0:
        raise AddressError(f"{text!r}: noise is a positive number of standard deviations")
    return Intervention(parse_node(address), op, value, source)
