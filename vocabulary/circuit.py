"""A circuit: its nodes, edges and groups, and what can be done with it. Never imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from vocabulary.names import same_model
from vocabulary.nodes import AddressError, Node, UserError, parse_node

LOGITS = "logits"
ARROW = "->"


@dataclass(frozen=True)
class Edge:
    """
    From a sender (embed, a head's z `L2H3`, an MLP's output `L3.mlp`) to a receiver (a head's `.q` `.k` `.v`, an MLP's input `L3.mlp`, `logits`).
    Written `L0H1->L2H3.k`, `embed->L0.mlp`, `L3.mlp->logits`.
    """

    sender: str
    receiver: str

    def __str__(self) -> str:
        return f"{self.sender}{ARROW}{self.receiver}"


def parse_edge(text: str) -> Edge:
    """Read `L0H1->L2H3.k`; both ends in their one spelling. Errors: not an edge, an end that can't send or receive, a receiver before its sender."""
    left, arrow, right = text.partition(ARROW)
    if not arrow:
        raise AddressError(f"{text!r} is not an edge: write L0H1->L2H3.k, embed->L0.mlp or L3.mlp->logits")
    sender, receiver = parse_node(left), None if right.strip() == LOGITS else parse_node(right)
    if sender.site not in ("embed", "mlp") and not (sender.site == "head" and sender.part == "z"):
        raise AddressError(f"{text!r}: {left.strip()} does not send; a sender is embed, a head such as L0H1, or L3.mlp")
    if receiver is not None and receiver.site != "mlp" and not (receiver.site == "head" and receiver.part in ("q", "k", "v")):
        raise AddressError(f"{text!r}: {right.strip()} does not receive; a receiver is L2H3.q, .k or .v, L3.mlp, or logits")
    return Edge(str(sender), LOGITS if receiver is None else str(receiver))


def owner(address: str) -> str:
    """The node an end of an edge belongs to: `L2H3` of `L2H3.q`; embed, MLPs and logits themselves."""
    if address == LOGITS:
        return LOGITS
    node = parse_node(address)
    return str(Node("head", node.layer, node.head, pos=node.pos)) if node.site == "head" else address


def owners(address: str, group: int = 1) -> set[str]:
    """The nodes an end of an edge belongs to: keys and values are read by all the heads of their group, `group` of them."""
    if address == LOGITS or group == 1 or (node := parse_node(address)).site != "head" or node.part not in ("k", "v"):
        return {owner(address)}
    first = node.head // group * group
    return {str(Node("head", node.layer, head, pos=node.pos)) for head in range(first, first + group)}


@dataclass(frozen=True)
class Circuit:
    """
    Nodes (heads, a head's q/k/v, MLPs, features; `@S2` when positions matter) and edges between them, with named groups of nodes. A circuit with
    edges is one of edges: only they carry the clean signal. `model` is what it was found on; `found` says how, in words.
    """

    name: str = "circuit"
    model: str = ""
    nodes: tuple[str, ...] = ()
    edges: tuple[str, ...] = ()
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    found: str = ""

    def __hash__(self) -> int:
        return hash((self.name, self.model, self.nodes, self.edges))


# ------------------------------------------------------------------ what can be done with circuits

COMBINE = {"union": "parts of either", "intersection": "parts of both", "difference": "parts of the first that are not in the second"}


def rank(address: str) -> tuple:
    """The order of nodes: by layer, heads before the MLP."""
    node = parse_node(address)
    return -1 if node.layer is None else node.layer, node.site != "head", node.head or 0, node.index or 0, str(node)


def own_node(text: str) -> str:
    """A part of a circuit in its one spelling. Errors: not a node, or one that circuits do not hold."""
    node = parse_node(text)
    if node.site not in ("mlp", "sae") and not (node.site == "head" and node.part != "pattern"):
        raise AddressError(f"{text}: a circuit holds heads (L2H3, L2H3.q), MLPs (L3.mlp) and features (L2.sae.f7)")
    return str(node)


def toggled(circuit: Circuit, part: str) -> Circuit:
    """The circuit with a node or an edge more, or without it. An edge brings its nodes; a node takes its edges and its places in groups with it."""
    if ARROW in part:
        edge = parse_edge(part)
        if str(edge) in circuit.edges:
            return replace(circuit, edges=tuple(e for e in circuit.edges if e != str(edge)))
        ends = {owner(edge.sender), owner(edge.receiver)} - {"embed", LOGITS}
        return replace(circuit, edges=(*circuit.edges, str(edge)), nodes=tuple(sorted({*circuit.nodes, *ends}, key=rank)))
    node = own_node(part)
    if node not in circuit.nodes:
        return replace(circuit, nodes=tuple(sorted((*circuit.nodes, node), key=rank)))
    edges = tuple(str(e) for e in map(parse_edge, circuit.edges) if node not in (owner(e.sender), owner(e.receiver)))
    groups = {name: left for name, some in circuit.groups.items() if (left := tuple(x for x in some if x != node))}
    return replace(circuit, nodes=tuple(n for n in circuit.nodes if n != node), edges=edges, groups=groups)


def prune(edges: Iterable[str], group: int = 1) -> tuple[str, ...]:
    """Those edges that lie on a path from embed to the logits, where `group` heads share keys and values."""
    some = [(e, owners(e.receiver, group)) for e in map(parse_edge, edges)]
    reached, wanted = {"embed"}, {LOGITS}
    while True:
        forward = {x for e, mine in some if e.sender in reached for x in mine} | reached
        backward = {e.sender for e, mine in some if mine & wanted} | wanted
        if (forward, backward) == (reached, wanted):
            return tuple(str(e) for e, mine in some if e.sender in reached and mine & wanted)
        reached, wanted = forward, backward


def connected(circuit: Circuit, info=None) -> bool:
    """Whether some of its edges lead from embed to the logits, on the model of a ModelInfo (None: one whose heads share no keys and values)."""
    return bool(prune(circuit.edges, info.n_heads // info.n_kv_heads if info else 1))


def check_receivers(addresses: tuple[str, ...], info=None) -> None:
    """UserError for what is not a receiver of paths, or (with ModelInfo) not in the model."""
    for text in addresses:
        if text == LOGITS:
            continue
        node = parse_node(text)
        if node.site != "mlp" and not (node.site == "head" and node.part in ("q", "k", "v")):
            raise UserError(f"{text} does not receive: a receiver is L2H3.q, .k or .v, L3.mlp, or logits")
        if info is not None and (node.layer >= info.n_layers or (node.head or 0) >= info.n_heads):
            raise UserError(f"{text} is not in this model: {info.n_layers} layers of {info.n_heads} heads")


def grouped(circuit: Circuit, name: str, nodes: tuple[str, ...]) -> Circuit:
    """The circuit with a named group of its nodes; without nodes the group goes."""
    nodes = tuple(own_node(n) for n in nodes)
    if missing := [n for n in nodes if n not in circuit.nodes]:
        raise UserError(f"{missing[0]} is not in {circuit.name}: keep it first")
    rest = {k: v for k, v in circuit.groups.items() if k != name}
    return replace(circuit, groups=rest | {name: nodes} if nodes else rest)


def combined(one: Circuit, other: Circuit, how: str, name: str) -> Circuit:
    """Union, intersection or difference of two circuits, parts and edges."""
    if not same_model(one.model, other.model):
        raise UserError(f"{one.name} is a circuit of {one.model} and {other.name} one of {other.model}")
    join = {"union": set.union, "intersection": set.intersection, "difference": set.difference}[how]
    nodes, edges = join(set(one.nodes), set(other.nodes)), join(set(one.edges), set(other.edges))
    if how == "difference":
        nodes |= {owner(x) for e in map(parse_edge, edges) for x in (e.sender, e.receiver)} - {"embed", LOGITS}
    groups = {k: some for k, v in {**other.groups, **one.groups}.items() if (some := tuple(n for n in v if n in nodes))}
    return Circuit(name, one.model, tuple(sorted(nodes, key=rank)), tuple(sorted(edges)), groups, f"{how} of {one.name} and {other.name}")


def check_circuit(circuit: Circuit, info) -> None:
    """UserError for nodes that circuits do not hold or a loaded model (its ModelInfo) does not have, and for an empty circuit."""
    if not circuit.nodes and not circuit.edges:
        raise UserError(f"the circuit {circuit.name} is empty: c keeps the node under the cursor")
    for address in circuit.nodes:
        node = parse_node(own_node(address))
        if not 0 <= node.layer < info.n_layers or node.site == "head" and not 0 <= node.head < info.n_heads:
            raise UserError(
                f"{address} is not a node of {info.name}, which has {info.n_layers} layers of {info.n_heads} heads: is {circuit.name} of another model?"
            )
