"""
The vocabulary: nodes and their addresses, interventions, prompts, metrics, every request and result as a frozen dataclass, and the wire.
The same dataclasses are the Python interface, the command line, the session file and the frames between screen and engine. Never imports torch.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from grammar import (  # noqa: F401  (the whole vocabulary is imported from here)
    ABLATIONS,
    LABEL,
    METRICS,
    OPS,
    PARTS,
    RESIDS,
    SITES,
    AddressError,
    Intervention,
    Metric,
    Node,
    Prompt,
    UserError,
    format_node,
    parse_intervention,
    parse_node,
    read_prompt,
    read_prompt_set,
)


class WireError(Exception):
    """A frame that is garbage, truncated or not of this vocabulary."""


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class TokenRow:
    """A tokenised text: ids, the text of each token, the index of each labelled position, and whether index 0 is a BOS token put there."""

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    bos: bool = False


@dataclass(frozen=True)
class Identity:
    """One self-check: the largest absolute error, the tolerance it was held against, and what was compared. `ok` None means not applicable."""

    name: str
    error: float
    tolerance: float
    ok: bool | None
    note: str = ""


@dataclass(frozen=True)
class ModelInfo:
    """What is loaded. `bos` is the text of the BOS token ("" when there is none) and `default_bos` whether prompts get it unasked."""

    name: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_params: int
    dtype: str
    device: str
    positions: str
    norm: str
    parallel: bool
    softcap: float
    bos: str
    default_bos: bool
    seconds: float
    checks: tuple[Identity, ...] = ()


@dataclass(frozen=True)
class CheckResult:
    """A prompt as the model reads it. `problems` stop an analysis; `hints` are advice such as a missing leading space."""

    clean: TokenRow
    corrupt: TokenRow | None
    answers: tuple[TokenRow, ...]
    foils: tuple[TokenRow, ...]
    problems: tuple[str, ...]
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Side:
    """One run: its tokens, the k likeliest next tokens at each position with their probabilities and logits [seq, k], and its metric."""

    tokens: TokenRow
    top_ids: np.ndarray
    top_probs: np.ndarray
    top_logits: np.ndarray
    metric: float | None


@dataclass(frozen=True)
class RunResult:
    """Clean, corrupted and now (the base prompt under the interventions). `normalised` is (now - corrupted) / (clean - corrupted); ids of the answers."""

    clean: Side
    corrupt: Side | None
    now: Side
    normalised: float | None
    warning: str
    texts: dict[int, str]
    convention: str
    answers: tuple[int, ...] = ()
    foils: tuple[int, ...] = ()


@dataclass(frozen=True)
class LensResult:
    """
    A lens. Rows are points, columns positions: top_ids and top_probs [point, seq, k]; prob (of the answers, summed), rank (of the best
    answer), entropy and kl (KL(final || this), nats) and logit_diff [point, seq]; NaN where there is no answer. A partial result has fewer points.
    kl_pair: KL(clean || corrupted) at the point, NaN without a corrupted prompt of equal length. up and down [point, seq, 3]: the tokens whose log
    probability rose and fell most against the residual row before it in the table, and by how much (NaN in the first row); of a component, the
    tokens it writes most for and against, direct logits minus their mean over the vocabulary. `positions` are the columns: indices into `tokens`.
    """

    tokens: TokenRow
    points: tuple[str, ...]
    top_ids: np.ndarray
    top_probs: np.ndarray
    prob: np.ndarray
    rank: np.ndarray
    entropy: np.ndarray
    kl: np.ndarray
    logit_diff: np.ndarray
    texts: dict[int, str]
    convention: str
    kl_pair: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    up_ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.int32))
    up_values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.float32))
    down_ids: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.int32))
    down_values: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 3), np.float32))
    positions: tuple[int, ...] = ()
    kind: str = "logit"


@dataclass(frozen=True)
class TuneLensResult:
    """A fitted tuned lens: KL(final || lens) of the logit lens (before) and of the tuned lens (after) on held-out text, nats, one a row of `points`."""

    folder: str
    points: tuple[str, ...]
    before: np.ndarray
    after: np.ndarray
    losses: np.ndarray
    steps: int
    held_out: int
    seconds: float
    convention: str


@dataclass(frozen=True)
class FitJacobianResult:
    """A fitted Jacobian lens: the file, the prompts averaged over, and the mean relative change of its matrices by the last prompt."""

    file: str
    layers: tuple[int, ...]
    prompts: int
    change: float
    seconds: float
    convention: str


@dataclass(frozen=True)
class AttentionResult:
    """
    Patterns of every head of one layer, [head, destination, source]; for a difference the two runs' patterns are subtracted. Weighted: each cell
    times the norm of what the source's value writes, || v W_O ||, so that rows do not sum to one.
    """

    tokens: TokenRow
    layer: int
    pattern: np.ndarray
    which: str
    convention: str
    weighted: bool = False


@dataclass(frozen=True)
class HeadStatsResult:
    """Per-head statistics, each [layer, head]; NaN where the tokens hold no instance (no repeated token, say)."""

    stats: dict[str, np.ndarray]
    which: str
    source: str
    convention: str


@dataclass(frozen=True)
class IdentitiesResult:
    rows: tuple[Identity, ...]
    convention: str


@dataclass(frozen=True)
class StatusResult:
    """Bytes: the process, the accelerator (0 without one), the activation cache and its limit; `entries` says what the cache holds."""

    memory: int
    device_memory: int
    device_total: int
    cache: int
    cache_limit: int
    entries: tuple[str, ...]


@dataclass(frozen=True)
class ModelChoice:
    name: str
    where: str
    note: str = ""


@dataclass(frozen=True)
class ModelsResult:
    choices: tuple[ModelChoice, ...]


@dataclass(frozen=True)
class Progress:
    done: int
    total: int
    text: str = ""


@dataclass(frozen=True)
class Failure:
    """An error as a result: one line for the screen; the full story is in the engine's log. `kind` is "user" or "internal"."""

    message: str
    kind: str = "internal"


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


# ------------------------------------------------------------------ requests

STATS = {
    "previous": "attention to the previous token, mean over destinations after the first",
    "duplicate": "attention to earlier copies of the destination's token, mean over destinations that have one",
    "induction": "attention to the token after an earlier copy of the destination's token, mean over destinations that have one",
    "first": "attention to the first token, mean over destinations after the first",
    "entropy": "entropy of a destination's attention in nats, mean over destinations after the first",
}
RUNS = ("now", "clean", "corrupt")
LENSES = {
    "logit": "the final norm and the unembedding on the stream as it is",
    "tuned": "an affine translator a layer, fitted to the final logits",
    "jacobian": "the average Jacobian from a layer to the last one",
}
WHICH = (*RUNS, "clean-corrupt", "now-clean", "now-corrupt")


@dataclass(frozen=True)
class Load:
    """Load a model: `zoo`, a Hugging Face folder or a hub name; `base` names the architecture when `model` holds only fine-tuned weights."""

    model: str = "zoo"
    base: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None


@dataclass(frozen=True)
class Check:
    """Tokenise a prompt, its answers and foils, and say what stops an analysis."""

    prompt: Prompt


@dataclass(frozen=True)
class Study:
    """What every analysis runs on: the prompt, the interventions, which prompt they act on (`base`), the metric, and the prompt set (for means)."""

    prompt: Prompt
    interventions: tuple[Intervention, ...] = ()
    base: str = "clean"
    metric: Metric = Metric()
    prompt_set: tuple[Prompt, ...] = ()


@dataclass(frozen=True)
class Run:
    """The k likeliest next tokens at each position, and the metric for clean, corrupted and now."""

    study: Study
    k: int = 10


@dataclass(frozen=True)
class Lens:
    """
    A lens at points (addresses without position): residual points, and L3.attn, L3.mlp, L2H3 for what a component writes (logit lens only). Empty:
    resid_pre of layer 0, then resid_mid and resid_post of every layer, as far as the kind reads them. `artefact` is the file or folder (or hub
    name) of a tuned or Jacobian lens. `positions` limits the columns (negative from the end; empty: all); `pair` False leaves kl_pair NaN.
    """

    study: Study
    which: str = "now"
    points: tuple[str, ...] = ()
    k: int = 10
    kind: str = "logit"
    artefact: str = ""
    positions: tuple[int, ...] = ()
    pair: bool = True


@dataclass(frozen=True)
class TuneLens:
    """Fit a tuned lens to the loaded model on a text file ("": zoo/corpus.txt) and write it into the folder `out`; `resume` goes on from its checkpoint."""

    text: str = ""
    out: str = "exports/tuned_lens"
    steps: int = 250
    batch: int = 8
    length: int = 64
    lr: float = 0.001
    seed: int = 0
    resume: bool = False


@dataclass(frozen=True)
class FitJacobian:
    """Fit a Jacobian lens on pieces of a text file ("": zoo/corpus.txt), `length` tokens each, and write it to the file `out`."""

    text: str = ""
    out: str = "exports/jacobian_lens.pt"
    prompts: int = 16
    length: int = 64
    skip: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Attention:
    """Attention patterns of one layer's heads, of one run or a difference of two (WHICH); `weighted`: times the norm of the value's output."""

    study: Study
    layer: int = 0
    which: str = "now"
    weighted: bool = False


@dataclass(frozen=True)
class HeadStats:
    """
    The statistics of STATS for every head, on the prompt or on `random` repeated tokens (BOS, then 50 random tokens twice, 4 rows, fixed seed).
    `pair` (destination, source) adds the statistic "pair": attention from one position of the prompt to another.
    """

    study: Study
    which: str = "now"
    source: str = "prompt"
    pair: tuple[int, int] | None = None


@dataclass(frozen=True)
class Identities:
    """The identities of the honesty panel on this model and prompt."""

    study: Study


@dataclass(frozen=True)
class Status:
    """Memory and what the activation cache holds."""


@dataclass(frozen=True)
class Models:
    """The models that can be named: the zoo, folders beside the program, what the hub cache holds, well-known names."""


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
    and the MLP of "neurons" (there with @ for one position); `nodes` those of "pairs" and "cumulative" (empty: the k largest of "nodes"). Over
    `study.prompt_set` with `over_set`. `noise` counts standard deviations of the embedding. `only` limits the cells (row, column). `chunk_mb`
    bounds the activations at once (0: LOUPE_SWEEP_MB of .env). `plain`: whole forward passes under hooks.
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
    flips of value - base) [row, column], and per_prompt [prompt, row, column]; empty otherwise and in a partial result. `prompts` are indices into
    the set. `base` is the metric of the run that the cells change. `method` is "truth" or one of ESTIMATES. `mechanism` says how it was run, and why
    when that is not the fast way; `at_once` the most variants in one batch.
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

    def address(self, row: int, col: int) -> str:
        """The node of a cell as an address, for an intervention; "" where the cell is not one node."""
        group = len(self.nodes) // max(1, len(self.rows))
        return self.nodes[row * group + col] if group else ""


REQUESTS = {c.__name__: c for c in (Load, Check, Run, Lens, Attention, HeadStats, Identities, Status, Models)}
RESULTS = {
    c.__name__: c
    for c in (
        ModelInfo, CheckResult, RunResult, LensResult, AttentionResult, HeadStatsResult, IdentitiesResult, StatusResult, ModelsResult, Progress, Failure,
    )
}  # fmt: skip
REQUESTS |= {c.__name__: c for c in ATTRIBUTION_REQUESTS}
RESULTS |= {c.__name__: c for c in ATTRIBUTION_RESULTS}
REQUESTS |= {c.__name__: c for c in (TuneLens, FitJacobian)}
RESULTS |= {c.__name__: c for c in (TuneLensResult, FitJacobianResult)}
REQUESTS |= {c.__name__: c for c in (HeadWeights, Composition, Singular)}
RESULTS |= {c.__name__: c for c in (HeadWeightsResult, CompositionResult, SingularResult)}
REQUESTS |= {c.__name__: c for c in (Sweep, Estimate)}
RESULTS |= {SweepResult.__name__: SweepResult}
TYPES: dict[str, type] = REQUESTS | RESULTS


# ------------------------------------------------------------------ the wire: 4-byte length, msgpack header, raw array bytes

KINDS = ("ask", "cancel", "hello", "progress", "partial", "result", "error", "cancelled")
MAX_HEADER = 64 << 20
MAX_ARRAY = 4 << 30
DTYPES = ("<f4", "<f8", "<f2", "<i4", "<i8", "<i2", "|u1", "|i1", "|b1")


@dataclass(frozen=True)
class Frame:
    """One message. `slot` is the pane that asks: a newer request replaces an older one in the same slot. Lower `priority` runs first."""

    kind: str
    id: int = 0
    slot: str = ""
    priority: int = 1
    body: object = None


def encode(frame: Frame) -> bytes:
    """A frame as bytes."""
    arrays: list[np.ndarray] = []

    def hook(obj: object) -> int:
        if not isinstance(obj, np.ndarray):
            raise NotImplementedError(f"{type(obj).__name__} does not go on the wire")
        arrays.append(np.asarray(obj, order="C"))
        return len(arrays) - 1

    name = "" if frame.body is None else type(frame.body).__name__
    assert name == "" or TYPES.get(name) is type(frame.body), f"{name} is not in the vocabulary"
    body = msgspec.to_builtins(frame.body, enc_hook=hook)
    head = msgspec.msgpack.encode([frame.kind, frame.id, frame.slot, frame.priority, name, body, [[a.dtype.str, a.shape] for a in arrays]])
    return len(head).to_bytes(4, "big") + head + b"".join(a.tobytes() for a in arrays)


def head_size(prefix: bytes) -> int:
    size = int.from_bytes(prefix, "big")
    if len(prefix) != 4 or not 0 < size <= MAX_HEADER:
        raise WireError(f"a header of {size} bytes: this is not Loupe's wire (does the other side print to stdout?)")
    return size


def array_sizes(head: bytes) -> tuple[list, list[int]]:
    """The decoded header and the byte count of each array that follows it."""
    try:
        fields = msgspec.msgpack.decode(head)
        kind, ident, slot, priority, name, _, specs = fields
        sizes = []
        for dtype, shape in specs:
            if dtype not in DTYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
                raise WireError(f"an array of type {dtype!r} and shape {shape!r}")
            sizes.append(np.dtype(dtype).itemsize * math.prod(shape))
    except (msgspec.DecodeError, ValueError, TypeError) as error:
        raise WireError(f"a header that can't be read: {error}") from error
    if kind not in KINDS or not isinstance(ident, int) or not isinstance(slot, str) or not isinstance(priority, int) or not isinstance(name, str):
        raise WireError(f"a header with kind {kind!r}, id {ident!r}")
    if sum(sizes) > MAX_ARRAY:
        raise WireError(f"{sum(sizes)} bytes of arrays in one frame")
    return fields, sizes


def build(fields: list, buffers: list[bytes]) -> Frame:
    kind, ident, slot, priority, name, body, specs = fields
    if name == "":
        return Frame(kind, ident, slot, priority)
    if name not in TYPES:
        raise WireError(f"an unknown message {name!r}: do screen and engine have the same version?")
    arrays = [np.frombuffer(b, dtype).reshape(shape) for b, (dtype, shape) in zip(buffers, specs)]

    def hook(kind: type, obj: object) -> object:
        if kind is not np.ndarray or not isinstance(obj, int) or not 0 <= obj < len(arrays):
            raise ValueError(f"no array {obj!r}")
        return arrays[obj]

    try:
        return Frame(kind, ident, slot, priority, msgspec.convert(body, TYPES[name], dec_hook=hook))
    except (msgspec.ValidationError, ValueError) as error:
        raise WireError(f"a {name} that can't be read: {error}") from error


def read_frame(read: Callable[[int], bytes]) -> Frame | None:
    """Read one frame through `read(n)`, which returns fewer than n bytes only at the end. None at a clean end of the stream."""

    def exactly(n: int) -> bytes:
        data = read(n)
        if len(data) < n:
            raise WireError("the stream ended in the middle of a frame")
        return data

    prefix = read(4)
    if not prefix:
        return None
    if len(prefix) < 4:
        raise WireError("the stream ended in the middle of a frame")
    fields, sizes = array_sizes(exactly(head_size(prefix)))
    return build(fields, [exactly(n) for n in sizes])


async def read_frame_async(reader) -> Frame:
    """The same from an asyncio StreamReader; raises asyncio.IncompleteReadError at the end of the stream."""
    fields, sizes = array_sizes(await reader.readexactly(head_size(await reader.readexactly(4))))
    return build(fields, [await reader.readexactly(n) for n in sizes])


# ------------------------------------------------------------------ JSON, for the command line, sessions and exports


def to_json(obj: object) -> object:
    """Builtins that json.dumps takes: arrays as lists, NaN as None, nodes and interventions as their addresses."""
    match obj:
        case Node() | Intervention():
            return str(obj)
        case np.ndarray():
            return to_json(obj.tolist())
        case float():
            return obj if math.isfinite(obj) else None
        case dict():
            return {str(k): to_json(v) for k, v in obj.items()}
        case list() | tuple():
            return [to_json(v) for v in obj]
        case _ if dataclasses.is_dataclass(obj):
            return {f.name: to_json(getattr(obj, f.name)) for f in dataclasses.fields(obj)}
    return obj


def from_json(obj: object, kind: type) -> object:
    """The inverse of `to_json` for the dataclasses of a session (prompts, interventions, metrics)."""

    def hook(kind: type, obj: object) -> object:
        raise ValueError(f"no {kind.__name__} in JSON")

    def revive(obj: object, kind: object) -> object:
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if kind is Node or kind is Intervention:
            if not isinstance(obj, str):
                raise UserError(f"expected an address, got {obj!r}")
            return parse_node(obj) if kind is Node else parse_intervention(obj)
        if origin in (typing.Union, types.UnionType):
            some = [a for a in args if a is not type(None)]
            if obj is None and len(some) < len(args) or len(some) > 1:
                return msgspec.convert(obj, kind)
            return revive(obj, some[0])
        if origin is tuple and args and isinstance(obj, list):
            return tuple(
                revive(v, args[0] if len(args) == 2 and args[1] is ... else a)
                for v, a in zip(obj, args if args[-1] is not ... else args[:1] * len(obj), strict=True)
            )
        if dataclasses.is_dataclass(kind) and isinstance(obj, dict):
            hints = typing.get_type_hints(kind)
            unknown = set(obj) - set(hints)
            if unknown:
                raise UserError(f"{kind.__name__} has no field {min(unknown)!r}")
            return kind(**{k: revive(v, hints[k]) for k, v in obj.items()})
        return msgspec.convert(obj, kind, dec_hook=hook)

    try:
        return revive(obj, kind)
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        raise UserError(f"not a {getattr(kind, '__name__', kind)}: {error}") from error
