"""Circuits: the object, its nodes, edges and groups, and the requests and results that trace, score and find one. Never imports torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np

from grammar import AddressError, Node, Study, UserError, parse_node

LOGITS = "logits"
ARROW = "->"

# ------------------------------------------------------------------ the object


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


def prune(edges: Iterable[str]) -> tuple[str, ...]:
    """Those edges that lie on a path from embed to the logits."""
    some = [parse_edge(e) for e in edges]
    reached, wanted = {"embed"}, {LOGITS}
    while True:
        forward = {owner(e.receiver) for e in some if e.sender in reached} | reached
        backward = {e.sender for e in some if owner(e.receiver) in wanted} | wanted
        if (forward, backward) == (reached, wanted):
            return tuple(str(e) for e in some if e.sender in reached and owner(e.receiver) in wanted)
        reached, wanted = forward, backward


def connected(circuit: Circuit) -> bool:
    """Whether some of its edges lead from embed to the logits."""
    return bool(prune(circuit.edges))


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
    if one.model != other.model:
        raise UserError(f"{one.name} is a circuit of {one.model} and {other.name} one of {other.model}")
    join = {"union": set.union, "intersection": set.intersection, "difference": set.difference}[how]
    nodes, edges = join(set(one.nodes), set(other.nodes)), join(set(one.edges), set(other.edges))
    if how == "difference":
        nodes |= {owner(x) for e in map(parse_edge, edges) for x in (e.sender, e.receiver)} - {"embed", LOGITS}
    groups = {k: some for k, v in {**other.groups, **one.groups}.items() if (some := tuple(n for n in v if n in nodes))}
    return Circuit(name, one.model, tuple(sorted(nodes, key=rank)), tuple(sorted(edges)), groups, f"{how} of {one.name} and {other.name}")


def check_circuit(circuit: Circuit, info) -> None:
    """UserError for parts that a loaded model (its ModelInfo) does not have, or an empty circuit."""
    if not circuit.nodes and not circuit.edges:
        raise UserError(f"the circuit {circuit.name} is empty: c keeps the node under the cursor")
    for address in circuit.nodes:
        node = parse_node(address)
        if not 0 <= node.layer < info.n_layers or node.site == "head" and not 0 <= node.head < info.n_heads:
            raise UserError(
                f"{address} is not a node of {info.name}, which has {info.n_layers} layers of {info.n_heads} heads: is {circuit.name} of another model?"
            )


# ------------------------------------------------------------------ requests

CONVENTIONS = {
    "direct": "the direct edge only: every other head and MLP stays as in the base run",
    "mlps": "through MLPs: other heads stay as in the base run, MLPs are computed again (as in the IOI paper)",
}
REST = {
    "patch": "its value in the prompt's own corrupted run",
    "mean": "mean over the prompt set's corrupted prompts, position by position",
    "mean_all": "mean over the prompt set's corrupted prompts and all their positions but the first",
    "resample": "the value in the run of another corrupted prompt of the set, drawn with the seed",
    "zero": "zero",
}
METHODS = {
    "eap": "edge attribution patching: (corrupted - clean sender) . gradient at the receiver in the clean run",
    "eap-ig": "EAP with integrated gradients over the inputs: token embeddings between corrupted and clean",
    "eap-ig-activations": "EAP with integrated gradients over each sender's activation between corrupted and clean",
    "clean-corrupted": "EAP with the mean of the gradients of the clean and the corrupted run",
    "acdc": "ACDC: from the logits back, an edge goes when removing it moves the metric less than the threshold",
    "greedy": "exact and greedy over nodes: the node whose removal costs least goes, again and again",
    "features": "features of the loaded SAEs: (replaced - own activation) . gradient, integrated along the replacement",
}


@dataclass(frozen=True)
class PathPatch:
    """
    Path patching: senders (empty: every head and MLP, and embed) to receivers (L2H3.q, L3.mlp, logits; together). A cell is one sender, and with
    `each` "receiver" one receiver (then `receivers` empty: all that come after). `direction` "noise": the clean run, where the path carries the
    corrupted value; "denoise" the reverse. `by_pos`: senders one position at a time. `node` @ positions are honoured. `dry`: the first paths only, with an
    estimate of the time as the warning. Answer: SweepResult, kind "path".
    """

    study: Study
    senders: tuple[str, ...] = ()
    receivers: tuple[str, ...] = (LOGITS,)
    each: str = "sender"
    convention: str = "direct"
    direction: str = "noise"
    by_pos: bool = False
    over_set: bool = False
    chunk_mb: int = 0
    dry: bool = False


@dataclass(frozen=True)
class Score:
    """
    How good a circuit is, over `study.prompt_set` (or the one prompt): `what` of faithfulness, completeness, minimality, effects (each part alone).
    What is not in the circuit is set to `rest` (REST). `edges`: score it by its edges when it has any. `embeds`: the token embeddings always stay.
    `subsets` random and `greedy` greedy subsets for completeness. `samples` (0: no bound): minimality of so many parts and as many tries in a greedy step,
    drawn with the seed. `dry`: faithfulness and an estimate of the time only.
    """

    study: Study
    circuit: Circuit = Circuit()
    what: tuple[str, ...] = ("faithfulness",)
    rest: str = "mean"
    edges: bool = True
    positions: bool = True
    mlps: bool = False
    subsets: int = 20
    greedy: int = 5
    seed: int = 0
    samples: int = 0
    dry: bool = False


@dataclass(frozen=True)
class Discover:
    """
    Find a circuit by one of METHODS: the `edges` edges (EAP family) or the `nodes` nodes (greedy, features) that matter most, or (acdc) every edge above
    `threshold` (in units of the metric, or of KL). `steps` of the integral. `target`: greedy stops before faithfulness falls below it. `dry`: only the
    estimate of the time. The result is checked by true ablation (`rest`).
    """

    study: Study
    method: str = "eap-ig"
    edges: int = 40
    nodes: int = 0
    threshold: float = 0.1
    steps: int = 5
    target: float = 0.85
    rest: str = "patch"
    name: str = ""
    dry: bool = False


@dataclass(frozen=True)
class Compare:
    """Two circuits, or one with a published one (a name of `published_circuits()` or a file): overlap of nodes and edges; ROC when `scores` are given."""

    circuit: Circuit
    other: Circuit = Circuit()
    published: str = ""
    edges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its 95 % interval (Student's t; NaN for a single prompt) and every prompt's own value [prompt]."""

    mean: float
    low: float
    high: float
    values: np.ndarray


@dataclass(frozen=True)
class ScoreResult:
    """
    `faithfulness` is (F(circuit) - F(empty)) / (F(model) - F(empty)), ratio of means, F the metric; `model`, `alone` (circuit), `empty` as
    intervals. Completeness: one row a subset K, its nodes, F(C without K), F(M without K) and the incompleteness |difference|; the worst is the score.
    Minimality: for each node v its largest |F(C without K) - F(C without K and v)| over the K tried, as a fraction of F(model). `effects` [part]:
    removing this part alone from the whole model, F - F(model), in the metric's unit. Empty where not asked for. `worst` is F(C without K) - F(M without K)
    of the worst K over the prompts; `minimal_low` and `minimal_high` [part] the 95 % interval of each minimality (Student's t; NaN for a single prompt).
    Where only a sample of the parts was tried the others are NaN, and `minimal_mean` is the mean over all parts as the sample tells it. `sets` of nodes or
    edges were (`dry`: would be) cut, which was expected to take `expected` seconds.
    """

    circuit: Circuit
    model: Interval
    alone: Interval
    empty: Interval
    faithfulness: Interval
    parts: tuple[str, ...]
    effects: np.ndarray
    subsets: tuple[tuple[str, ...], ...]
    without_circuit: np.ndarray
    without_model: np.ndarray
    incompleteness: float
    minimal: np.ndarray
    minimal_with: tuple[tuple[str, ...], ...]
    prompts: tuple[int, ...]
    seconds: float
    warning: str
    convention: str
    worst: Interval | None = None
    minimal_low: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    minimal_high: np.ndarray = field(default_factory=lambda: np.zeros(0, np.float32))
    minimal_mean: Interval | None = None
    sets: int = 0
    expected: float = float("nan")
    dry: bool = False


@dataclass(frozen=True)
class DiscoverResult:
    """
    A found circuit with the score of every edge (`edges`, `scores`) or node the method looked at, and the curve: `counts` parts kept and their
    `faithfulness`, by true ablation. `expected` is the estimate of the time made at the start, `seconds` the time it took.
    """

    circuit: Circuit
    method: str
    edges: tuple[str, ...]
    scores: np.ndarray
    counts: np.ndarray
    faithfulness: np.ndarray
    score: float
    expected: float
    seconds: float
    warning: str
    convention: str


@dataclass(frozen=True)
class CompareResult:
    """Nodes and edges in both, only here, only there; Jaccard overlaps; of scored edges against the other circuit the ROC curve [n] and its area (NaN: none)."""

    here: str
    there: str
    both: tuple[str, ...]
    only_here: tuple[str, ...]
    only_there: tuple[str, ...]
    nodes: float
    edges: float
    false_positive: np.ndarray
    true_positive: np.ndarray
    area: float
    source: str
    convention: str


CIRCUIT_REQUESTS = (PathPatch, Score, Discover, Compare)
CIRCUIT_RESULTS = (ScoreResult, DiscoverResult, CompareResult)
