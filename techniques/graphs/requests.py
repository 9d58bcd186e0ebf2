"""Attribution graphs: a prompt's features, errors, tokens and logits, and the direct effects between them in the local replacement model."""

from typing import Literal

import numpy as np

from vocabulary.prompts import Study, TokenRow
from vocabulary.wire import message, request

FEATURE, ERROR, TOKEN, LOGIT = KINDS = ("feature", "error", "token", "logit")


@request
class AttributionGraph:
    """
    The graph of a prompt with a transcoder at every MLP: attention patterns and norm scales frozen, MLPs replaced by transcoder and error. An edge is
    what its source adds to its target's pre-activation (or logit); pruned as in circuit-tracer.
    """

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
    node_threshold: float = 0.8
    """keep the nodes that make up this share of all influence; 1 keeps all"""
    edge_threshold: float = 0.98
    """of these, the edges that make up this share"""
    batch: int = 32
    """targets in one backward pass"""


@request
class GraphEffects:
    """
    The features of most influence changed one by one: what the graph predicts for the target (all paths, each feature linear), what it does with patterns
    and norm scales before attention frozen, and what it does in the model itself.
    """

    study: Study
    transcoders: tuple[str, ...] = ()
    which: Literal["clean", "corrupt"] = "clean"
    target: Literal["logits", "diff"] = "logits"
    logits: int = 10
    mass: float = 0.95
    features: int = 4096
    batch: int = 32
    only: str = ""
    """one feature, LAYER_FEATURE_POSITION as in the graph; unset, the `k` of most influence"""
    k: int = 20
    factor: float = 0.0
    """what the activation is multiplied by: 0 ablates"""


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
