"""What a head's or an MLP's matrices say, without a prompt."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vocabulary.wire import message, request

Matrix = Literal["OV", "QK", "mlp_in", "mlp_gate", "mlp_out"]
SINGULAR: dict[Matrix, str] = {
    "OV": "what a head copies: residual stream read by its values, written by its output",
    "QK": "what a head looks for: destination's residual stream read by its queries, source's by its keys",
    "mlp_in": "what an MLP's input matrix reads (of a gated MLP, the matrix beside the gate)",
    "mlp_gate": "what a gated MLP's gate matrix reads",
    "mlp_out": "what an MLP's output matrix writes",
}


@request
class HeadWeights:
    """
    OV and QK of a head in tokens: k pairs of each kind (without `pairs` only what needs no pair of all tokens: copying, eigenvalues, positions). `distance` is destination minus source position (for rotary models); `mlp0` takes the
    embedding plus what MLP 0 makes of it for a token's vector.
    """

    layer: int = 0
    head: int = 0
    k: int = 20
    distance: int = 0
    """destination minus source position, for rotary models"""
    mlp0: bool = False
    """take embedding plus MLP 0 of it for a token's vector"""
    pairs: bool = True
    """look through all pairs of tokens, the vocabulary squared"""


@request
class Composition:
    """Q, K and V composition of a head with all heads of earlier and later layers."""

    layer: int = 0
    head: int = 0


@request
class Singular:
    """The r largest singular directions of a head's OV or QK, or (head None) of an MLP's matrix (SINGULAR), each with its k highest and lowest tokens."""

    layer: int = 0
    head: int | None = 0
    which: Matrix = "OV"
    r: int = 8
    """number of singular directions"""
    k: int = 10


@request
class WeightDifference:
    """What differs between the weights of the loaded model and of the second one beside it (`Load.against`), by matrix, layer and head."""


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Pairs:
    """Pairs of tokens (or of positions), best first: ids [n, 2] and scores [n]. n is k, or fewer where there are fewer; 0 while not yet known."""

    ids: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Readout:
    """
    One side of r singular directions: `name` says what the direction does (reads, writes, destination, source, neurons); the k highest and the
    k lowest entries of each, ids and scores [r, k]. Ids are tokens, and for `neurons` neuron numbers.
    """

    name: str
    top_ids: np.ndarray
    top_scores: np.ndarray
    bottom_ids: np.ndarray
    bottom_scores: np.ndarray


@message
class HeadWeightsResult:
    """
    OV and QK of one head over `vocabulary` tokens. `copying` (`anti_copying`) is the fraction of `sampled` tokens whose own logit is among the
    5 highest (lowest) of what the head writes for them; eigenvalues of OV [d_head, 2] real and imaginary part, largest first; `positivity` their
    sum over the sum of their sizes. OV pairs are (source token, written token), QK pairs (destination token, source token). `position` [offset]
    is the mean QK score of learned positions that far apart and `position_pairs` the best (destination, source) positions; empty otherwise.
    A partial result has empty pairs; so has one that was asked for none, and `expected` is how long they would take at most, in seconds (else NaN). `error` is the largest difference to the model's own attention scores and values, a self-check.
    """

    layer: int
    head: int
    kv_head: int
    distance: int
    mlp0: bool
    vocabulary: int
    copying: float
    anti_copying: float
    sampled: int
    eigenvalues: np.ndarray
    positivity: float
    ov_top: Pairs
    ov_bottom: Pairs
    qk_top: Pairs
    qk_bottom: Pairs
    position: np.ndarray
    position_pairs: Pairs
    error: float
    texts: dict[int, str]
    convention: str
    ov_convention: str
    qk_convention: str
    expected: float = float("nan")


@message
class CompositionResult:
    """
    Composition of one head with every head of another layer, each [layer, head], NaN in its own layer: in earlier layers it reads what they wrote
    (through its query, key or value), in later layers they read what it wrote. `baseline` and `spread`: mean and standard deviation between
    random Gaussian heads of the same shapes, the same for q, k and v.
    """

    layer: int
    head: int
    kv_head: int
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    baseline: float
    spread: float
    convention: str


@message
class WeightDifferenceResult:
    """
    Of two models, called `names`. `heads`: [layer, head] of Q, K, V, O, relative Frobenius norms ||other - this|| / ||this||, and of OV and QK, the
    cosine of the two models' W_V W_O and W_Q W_K^T. `values` [layer, part]: relative norms of every parameter of a block, by Hugging Face's names; NaN where
    a layer has none such. `rest`: the same of what lies outside the blocks.
    """

    names: tuple[str, ...]
    heads: dict[str, np.ndarray]
    parts: tuple[str, ...]
    values: np.ndarray
    rest: dict[str, float]
    convention: str


@message
class SingularResult:
    """The r largest singular values [r] of a matrix, each one's share of the squared norm [r], and the directions' sides read out."""

    layer: int
    head: int | None
    which: Matrix
    values: np.ndarray
    share: np.ndarray
    sides: tuple[Readout, ...]
    texts: dict[int, str]
    convention: str
