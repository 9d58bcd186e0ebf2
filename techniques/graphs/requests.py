"""Attribution graphs: a prompt's features, errors, tokens and logits, and the direct effects between them in the local replacement model."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vocabulary.prompts import Study, TokenRow
from vocabulary.wire import message, request

FEATURE, ERROR, TOKEN, LOGIT, SUPERNODE = KINDS = ("feature", "error", "token", "logit", "supernode")  # the last only where nodes of one name are drawn as one


def difference(answers: list[str], foils: list[str]) -> str:
    """The target of answers less foils in words, of their tokens' texts."""
    tokens = lambda some: " ".join(map(repr, some[:2])) + (f" and {len(some) - 2} more" if len(some) > 2 else "")  # noqa: E731
    return f"{tokens(answers)} less {tokens(foils)}"


@dataclass(frozen=True)
class OfGraph:
    """What every request about a graph says: of which prompt, transcoders and target it is, and how large."""

    study: Study
    transcoders: tuple[str, ...] = ()
    """a source for each layer, or one for all with {} for the layer; unset, the study's, else the zoo's"""
    which: Literal["clean", "corrupt"] = "clean"
    target: Literal["logits", "diff"] = "logits"
    """logits: the most probable tokens; diff: answers less foils, as one node"""
    logits: int = 10
    """logit nodes at most"""
    mass: float = 0.95
    """fewer, once their probabilities add up to this"""
    features: int = 4096
    """feature nodes at most: those of most influence"""
    batch: int = 32
    """targets in one backward pass"""


@request
class AttributionGraph(OfGraph):
    """
    The graph of a prompt with a transcoder at every MLP: attention patterns and norm scales frozen, MLPs replaced by transcoder and error. An edge is
    what its source adds to its target's pre-activation (or logit); pruned as in circuit-tracer.
    """

    node_threshold: float = 0.8
    """keep the nodes that make up this share of all influence; 1 keeps all"""
    edge_threshold: float = 0.98
    """of these, the edges that make up this share"""


@request
class GraphEffects(OfGraph):
    """
    The features of most influence changed one by one: what the graph predicts for the target (all paths, each feature linear), what it does with patterns
    and norm scales before attention frozen, and what it does in the model itself.
    """

    only: str = ""
    """one feature, LAYER_FEATURE_POSITION as in the graph; unset, the `k` of most influence"""
    k: int = 20
    factor: float = 0.0
    """what the activation is multiplied by: 0 ablates"""


@request
class GraphSteer(OfGraph):
    """
    Features changed together: each logit node and later features' activations as the graph predicts them (all paths, each feature linear, the changed ones
    held), with patterns and norm scales around attention frozen, and in the model itself.
    """

    steer: tuple[str, ...] = ()
    """features, LAYER_FEATURE_POSITION as in the graph, all at once"""
    factor: float = 0.0
    """what their activations are multiplied by: 0 ablates"""
    value: float | None = None
    """what they are set to, instead"""
    watch: tuple[str, ...] = ()
    """features whose activations are told; unset, the `most` that should change most"""
    most: int = 8
    """how many of them"""


@request
class GraphGroups(OfGraph):
    """Features with like decoders, as groups in which any two have at least this cosine (complete linkage)."""

    nodes: tuple[str, ...] = ()
    """the features, LAYER_FEATURE_POSITION; of those first in the list a group is named"""
    threshold: float = 0.7
    """the least cosine of decoders in a group"""
    same_position: bool = True
    """only features of one position"""


@dataclass(frozen=True)
class GraphMarks:
    """What a user made of one graph: pinned nodes, and names of nodes (those of one name are a supernode), by the nodes' ids. The graph is told by model, tokens, target and transcoders."""

    model: str
    ids: tuple[int, ...]
    target: str
    sources: tuple[str, ...]
    pins: tuple[str, ...] = ()
    names: tuple[tuple[str, str], ...] = ()

    @property
    def graph(self) -> tuple:
        return self.model, self.ids, self.target, self.sources


# ------------------------------------------------------------------ results


@message
class GraphResult:
    """
    Nodes: kind, layer (tokens: -1; logits: n_layers), position, index (feature or token), value (activation, logit less the mean logit, or the norm of
    what it writes), influence, and the share of influence of all nodes down to it. Edges run from `source` to `to` (indices of nodes) with weight and share.
    `bias`, `left_out` (features beyond the bound), `whole` (pre-activation or logit) of each node; incoming edges before pruning + left_out + bias = whole.
    """

    tokens: TokenRow
    which: str
    pos: int
    target: str
    n_layers: int
    sources: tuple[str, ...]
    kind: np.ndarray
    layer: np.ndarray
    at: np.ndarray
    index: np.ndarray
    value: np.ndarray
    influence: np.ndarray
    cumulative: np.ndarray
    probability: np.ndarray
    bias: np.ndarray
    left_out: np.ndarray
    whole: np.ndarray
    texts: tuple[str, ...]
    source: np.ndarray
    to: np.ndarray
    weight: np.ndarray
    share: np.ndarray
    active: int
    selected: int
    edges: int
    replacement: float
    completeness: float
    node_threshold: float
    edge_threshold: float
    error: float
    convention: str


@message
class GraphEffectsResult:
    """Of each feature: layer, position, index, activation; the target's change as predicted, with attention frozen, and in the model. Correlations of the first with the others."""

    tokens: TokenRow
    target: str
    layer: np.ndarray
    at: np.ndarray
    index: np.ndarray
    value: np.ndarray
    direct: np.ndarray
    predicted: np.ndarray
    frozen: np.ndarray
    true: np.ndarray
    pearson: tuple[float, float]
    spearman: tuple[float, float]
    convention: str


@message
class GraphSteerResult:
    """
    Of each logit node: its name, its value, and its change as predicted, with attention frozen, and in the model. `steered` features are held at `held`;
    `activation` [as it was, predicted, frozen, true] of each of `watched`. Pearson's r of the predicted changes
    with frozen and true, of the watched features that are not steered (NaN for fewer than three).
    """

    tokens: TokenRow
    names: tuple[str, ...]
    before: np.ndarray
    predicted: np.ndarray
    frozen: np.ndarray
    true: np.ndarray
    steered: tuple[str, ...]
    held: np.ndarray
    watched: tuple[str, ...]
    activation: np.ndarray
    pearson: tuple[float, float]
    convention: str


@message
class GraphGroupsResult:
    """Groups of features: a name for each, its features, and the least cosine in it."""

    labels: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    cosine: np.ndarray
    threshold: float
    convention: str
