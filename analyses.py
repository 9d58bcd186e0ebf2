"""Requests and results of attribution, attention over a set, weights and sweeps: the part of the vocabulary that messages.py gathers. Never imports torch."""

from dataclasses import dataclass

import numpy as np

from grammar import Study, TokenRow

# ------------------------------------------------------------------ results: attribution of logits, attention over a set


@dataclass(frozen=True)
class AttributionCells:
    """
    What every component adds to the logit (difference), in logits: token embedding, position embedding (None: the model has none), heads
    [layer, head], mlps [layer], attention output biases [layer], the final norm's bias, the unembedding's bias, and what interventions wrote
    into the residual stream itself. Their sum is the logit.
    """

    embed: float
    position: float | None
    heads: np.ndarray
    mlps: np.ndarray
    attn_bias: np.ndarray
    norm_bias: float
    unembed_bias: float
    interventions: float = 0.0

    @property
    def total(self) -> float:
        arrays = (self.heads, self.mlps, self.attn_bias)
        return (
            self.embed + (self.position or 0.0) + sum(float(a.sum(dtype=np.float64)) for a in arrays) + self.norm_bias + self.unembed_bias + self.interventions
        )

    def rows(self) -> list[tuple[str, float]]:
        """Every cell by its name: addresses where the cell is a node, else what it is."""
        out = [("embed", self.embed)] + ([] if self.position is None else [("position", self.position)])
        for layer, heads in enumerate(self.heads.tolist()):
            out += [(f"L{layer}H{h}", v) for h, v in enumerate(heads)]
            out += [(f"L{layer}.b_O", float(self.attn_bias[layer])), (f"L{layer}.mlp", float(self.mlps[layer]))]
        return [*out, ("final norm's bias", self.norm_bias), ("b_U", self.unembed_bias), ("interventions", self.interventions)]


@dataclass(frozen=True)
class AttributionResult:
    """
    Direct logit attribution at position `pos` (an index). `total` is the sum of the cells, `logit` the model's own logit (difference) before a
    soft cap, `capped` after it (None: no cap), `error` |total - logit|. For a difference of runs everything is subtracted.
    """

    tokens: TokenRow
    which: str
    pos: int
    cells: AttributionCells
    total: float
    logit: float
    capped: float | None
    error: float
    answers: tuple[int, ...]
    foils: tuple[int, ...]
    convention: str


@dataclass(frozen=True)
class AttributionSourcesResult:
    """
    A head's row by source position: `sources` [seq] are pattern x value through W_O into the direction, `pattern` [seq] the head's attention from
    `pos`. `total` is the head's row of AttributionResult; `interventions` what a write to z itself changed (total = sources + interventions).
    """

    tokens: TokenRow
    which: str
    layer: int
    head: int
    kv_head: int
    pos: int
    sources: np.ndarray
    pattern: np.ndarray
    interventions: float
    total: float
    error: float
    convention: str


@dataclass(frozen=True)
class AttributionNeuronsResult:
    """
    An MLP's row by neuron: `index`, `activation` and `contribution` [n], the top k by contribution and then the bottom k, in descending order.
    `rest` sums the neurons that are not shown, `bias` is b_out's row; total (the MLP's row) = contribution + rest + bias + interventions.
    """

    tokens: TokenRow
    which: str
    layer: int
    pos: int
    index: np.ndarray
    activation: np.ndarray
    contribution: np.ndarray
    rest: float
    bias: float
    interventions: float
    total: float
    error: float
    convention: str


@dataclass(frozen=True)
class AttributionSetResult:
    """
    Attribution over the prompt set: mean and (population) standard deviation of every cell. `prompts` [n] are the indices into the set of the
    prompts used (those with answers), `totals` and `logits` [n] each one's own sum and logit (difference), `capped` [n] after a soft cap (empty:
    none). `worst` is the index into the set of the prompt with the lowest logit; `error` the largest |total - logit|.
    """

    which: str
    mean: AttributionCells
    std: AttributionCells
    prompts: np.ndarray
    totals: np.ndarray
    logits: np.ndarray
    capped: np.ndarray
    worst: int
    error: float
    convention: str


@dataclass(frozen=True)
class AttentionSetResult:
    """
    Mean attention over the prompt set between labelled positions, [layer, head, destination label, source label], and its (population) standard
    deviation; a cell counts the prompts [destination, source] in which the source is not after the destination, NaN where there is none.
    """

    which: str
    labels: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    counts: np.ndarray
    prompts: np.ndarray
    convention: str


@dataclass(frozen=True)
class DetectResult:
    """How well each head's pattern matches the wanted one, [layer, head]: scores of transformer_lens.head_detector. `cells` (destination, source)."""

    tokens: TokenRow
    which: str
    scores: np.ndarray
    cells: tuple[tuple[int, int], ...]
    convention: str


# ------------------------------------------------------------------ requests: attribution of logits, attention over a set

DETECTORS = {
    "previous_token_head": "attention to the previous token",
    "duplicate_token_head": "attention to earlier copies of the destination's token",
    "induction_head": "attention to the token after an earlier copy of the destination's token",
}


@dataclass(frozen=True)
class Attribution:
    """Direct logit attribution of the metric's direction (answers minus foils, or the answers alone) at `pos` (None: the metric's position)."""

    study: Study
    which: str = "now"
    pos: int | str | None = None


@dataclass(frozen=True)
class AttributionSources:
    """A head's row of Attribution by source position."""

    study: Study
    which: str = "now"
    layer: int = 0
    head: int = 0
    pos: int | str | None = None


@dataclass(frozen=True)
class AttributionNeurons:
    """An MLP's row of Attribution by neuron: the top k and the bottom k."""

    study: Study
    which: str = "now"
    layer: int = 0
    pos: int | str | None = None
    k: int = 10


@dataclass(frozen=True)
class AttributionSet:
    """Attribution over the prompts of `study.prompt_set` that have answers; each under the study's interventions for "now"."""

    study: Study
    which: str = "now"
    pos: int | str | None = None


@dataclass(frozen=True)
class AttentionSet:
    """Mean attention between labelled positions over `study.prompt_set`; `labels` empty: every label that all its prompts have."""

    study: Study
    which: str = "now"
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Detect:
    """
    Score heads against a pattern: one of DETECTORS, or `cells` (destination, source), as transformer_lens.head_detector does. "mul": the part of
    the attention that lies in the cells; "abs": 1 - mean absolute difference to the pattern of ones in the cells.
    """

    study: Study
    which: str = "now"
    pattern: str = "previous_token_head"
    cells: tuple[tuple[int, int], ...] = ()
    exclude_bos: bool = False
    exclude_current_token: bool = False
    error_measure: str = "mul"


ATTRIBUTION_REQUESTS = (Attribution, AttributionSources, AttributionNeurons, AttributionSet, AttentionSet, Detect)
ATTRIBUTION_RESULTS = (AttributionResult, AttributionSourcesResult, AttributionNeuronsResult, AttributionSetResult, AttentionSetResult, DetectResult)

# ------------------------------------------------------------------ weights: what a head's or an MLP's matrices say, without a prompt

SINGULAR = {
    "OV": "what a head copies: residual stream read by its values, written by its output",
    "QK": "what a head looks for: destination's residual stream read by its queries, source's by its keys",
    "mlp_in": "what an MLP's input matrix reads (of a gated MLP, the matrix beside the gate)",
    "mlp_gate": "what a gated MLP's gate matrix reads",
    "mlp_out": "what an MLP's output matrix writes",
}


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


@dataclass(frozen=True)
class HeadWeightsResult:
    """
    OV and QK of one head over `vocabulary` tokens. `copying` (`anti_copying`) is the fraction of `sampled` tokens whose own logit is among the
    5 highest (lowest) of what the head writes for them; eigenvalues of OV [d_head, 2] real and imaginary part, largest first; `positivity` their
    sum over the sum of their sizes. OV pairs are (source token, written token), QK pairs (destination token, source token). `position` [offset]
    is the mean QK score of learned positions that far apart and `position_pairs` the best (destination, source) positions; empty otherwise.
    A partial result has empty pairs. `error` is the largest difference to the model's own attention scores and values, a self-check.
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


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class SingularResult:
    """The r largest singular values [r] of a matrix, each one's share of the squared norm [r], and the directions' sides read out."""

    layer: int
    head: int | None
    which: str
    values: np.ndarray
    share: np.ndarray
    sides: tuple[Readout, ...]
    texts: dict[int, str]
    convention: str


@dataclass(frozen=True)
class HeadWeights:
    """
    OV and QK of a head in tokens: k pairs of each kind. `distance` is destination minus source position (for rotary models); `mlp0` takes the
    embedding plus what MLP 0 makes of it for a token's vector.
    """

    layer: int = 0
    head: int = 0
    k: int = 20
    distance: int = 0
    mlp0: bool = False


@dataclass(frozen=True)
class Composition:
    """Q, K and V composition of a head with all heads of earlier and later layers."""

    layer: int = 0
    head: int = 0


@dataclass(frozen=True)
class Singular:
    """The r largest singular directions of a head's OV or QK, or (head None) of an MLP's matrix (SINGULAR), each with its k highest and lowest tokens."""

    layer: int = 0
    head: int | None = 0
    which: str = "OV"
    r: int = 8
    k: int = 10


# ------------------------------------------------------------------ sweeps: patching and ablation, one cell after the other

SWEEPS = {
    "resid_pre": "residual stream before each layer, by position",
    "resid_mid": "residual stream between attention and MLP, by position",
    "resid_post": "residual stream after each layer, by position",
    "attn": "attention output of each layer, by position",
    "mlp": "MLP output of each layer, by position",
    "attn_mlp": "attention and MLP output of each layer, by position",
    "z": "every head's output z, at all positions",
    "q": "every head's queries, at all positions",
    "k": "every head's keys (with grouped heads: every group's), at all positions",
    "v": "every head's values (with grouped heads: every group's), at all positions",
    "pattern": "every head's attention pattern, all destinations",
    "nodes": "every head's z and every MLP's output, at all positions",
    "z_pos": "every head's output z, by position",
    "cells": "one head's pattern, by destination (row) and source (column)",
    "neurons": "every neuron of one MLP",
    "features": "features of one SAE, by position, its error term kept",
    "pairs": "two nodes at a time; the diagonal is one node alone",
    "cumulative": "nodes together, one more in each column, the largest effect first",
}
SWEEP_OPS = {
    "patch": "the value in the other prompt's run",
    "zero": "zero",
    "mean": "mean over the prompt set's corrupted prompts, position by position",
    "mean_all": "mean over the prompt set's corrupted prompts and all their positions but the first",
    "resample": "the value in the run of another corrupted prompt of the set, drawn with the seed",
    "noise": "its own value plus Gaussian noise",
}
ESTIMATES = {
    "atp": "attribution patching: (source - base) . gradient of the metric in the base run",
    "ig": "integrated gradients: the same with the gradient's mean over token embeddings between base and source",
}


@dataclass(frozen=True)
class Sweep:
    """
    The metric under one change a cell. `op` patch, "denoise": the corrupted run gets the clean run's values, "noise" the reverse; other ops act on
    `study.base`. Effect "direct": what comes after the node stays as in the base run (attention, MLPs, norm scales). `node` is the head of "cells"
    and the MLP of "neurons" (there with @ for one position), and of "features" the SAE ("L8.sae", one of the study's); `nodes` those of "pairs" and
    "cumulative" (empty: the k largest of "nodes") and of "features" (L8.sae.f12; empty: the k of the largest attribution). Over
    `study.prompt_set` with `over_set`. `noise` counts standard deviations of the embedding. `only` limits the cells (row, column). `chunk_mb`
    bounds the activations at once (0: LOUPE_SWEEP_MB of .env). `plain`: whole forward passes under hooks. `first`: "estimate" runs the cells with the
    largest estimated effects first, with the early layers and MLP 0, where estimates are least to be trusted; "": the cheapest order.
    """

    study: Study
    kind: str = "resid_pre"
    op: str = "patch"
    direction: str = "denoise"
    effect: str = "total"
    node: str = ""
    nodes: tuple[str, ...] = ()
    k: int = 8
    over_set: bool = False
    noise: float = 3.0
    seed: int = 0
    only: tuple[tuple[int, int], ...] = ()
    chunk_mb: int = 0
    plain: bool = False
    first: str = ""


@dataclass(frozen=True)
class Estimate:
    """A sweep's cells (patching only) by gradients, all at once: one of ESTIMATES; `steps` of the integral."""

    study: Study
    kind: str = "resid_pre"
    method: str = "atp"
    direction: str = "denoise"
    steps: int = 5
    node: str = ""
    over_set: bool = False


@dataclass(frozen=True)
class SweepResult:
    """
    values and normalised (corrupted = 0, clean = 1; without a corrupted prompt 0 = nothing left, 1 = untouched) [row, column], means over the
    prompts; NaN: no such cell, or not yet run (`done` of `total` are). Over a set also std, low and high (95 % confidence, Student's t) and p (sign
    flips) of the effect, value - base paired by prompt [row, column], and per_prompt [prompt, row, column]; empty otherwise and in a partial result.
    `prompts` are indices into the set. `base` is the metric of the run that the cells change. `method` is "truth" or one of ESTIMATES. `mechanism` says how it was run, and why
    when that is not the fast way; `at_once` the most variants in one batch. `peak_mb`: on a GPU the most memory allocated meanwhile, the model
    included; elsewhere the activations of the largest batch, as the bound counts them.
    """

    kind: str
    op: str
    direction: str
    effect: str
    method: str
    rows: tuple[str, ...]
    cols: tuple[str, ...]
    nodes: tuple[str, ...]
    tokens: TokenRow
    values: np.ndarray
    normalised: np.ndarray
    base: float
    clean: float
    corrupt: float | None
    done: int
    total: int
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    per_prompt: np.ndarray
    prompts: tuple[int, ...]
    mechanism: str
    at_once: int
    warning: str
    convention: str
    peak_mb: float = 0.0

    def address(self, row: int, col: int) -> str:
        """The node of a cell as an address, for an intervention; "" where the cell is not one node."""
        group = len(self.nodes) // max(1, len(self.rows))
        return self.nodes[row * group + col] if group else ""
