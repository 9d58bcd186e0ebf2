"""Direct logit attribution: what each component adds to the metric's logits."""

from dataclasses import dataclass

import numpy as np

from vocabulary.prompts import Study, TokenRow, Which
from vocabulary.wire import message, request


@request
class Attribution:
    """Direct logit attribution of the metric's direction (answers minus foils, or the answers alone) at `pos` (None: the metric's position)."""

    study: Study
    which: Which = "now"
    """now, clean or corrupt, or a difference such as clean-corrupt"""
    pos: int | str | None = None
    """a position: a number or a label; unset, the metric's"""


@request
class AttributionSources:
    """A head's row of Attribution by source position."""

    study: Study
    which: Which = "now"
    layer: int = 0
    head: int = 0
    pos: int | str | None = None


@request
class AttributionNeurons:
    """An MLP's row of Attribution by neuron: the top k and the bottom k."""

    study: Study
    which: Which = "now"
    layer: int = 0
    pos: int | str | None = None
    k: int = 10
    """neurons shown at each end"""


@request
class AttributionSet:
    """Attribution over the prompts of `study.prompt_set` that have answers; each under the study's interventions for "now"."""

    study: Study
    which: Which = "now"
    pos: int | str | None = None


# ------------------------------------------------------------------ results


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


@message
class AttributionResult:
    """
    Direct logit attribution at position `pos` (an index). `total` is the sum of the cells, `logit` the model's own logit (difference) before a
    soft cap, `capped` after it (None: no cap), `error` |total - logit|. For a difference of runs everything is subtracted.
    """

    tokens: TokenRow
    which: Which
    pos: int
    cells: AttributionCells
    total: float
    logit: float
    capped: float | None
    error: float
    answers: tuple[int, ...]
    foils: tuple[int, ...]
    convention: str


@message
class AttributionSourcesResult:
    """
    A head's row by source position: `sources` [seq] are pattern x value through W_O into the direction, `pattern` [seq] the head's attention from
    `pos`. `total` is the head's row of AttributionResult; `interventions` what a write to z itself changed (total = sources + interventions).
    """

    tokens: TokenRow
    which: Which
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


@message
class AttributionNeuronsResult:
    """
    An MLP's row by neuron: `index`, `activation` and `contribution` [n], the top k by contribution and then the bottom k, in descending order.
    `rest` sums the neurons that are not shown, `bias` is b_out's row; total (the MLP's row) = contribution + rest + bias + interventions.
    """

    tokens: TokenRow
    which: Which
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


@message
class AttributionSetResult:
    """
    Attribution over the prompt set: mean and (population) standard deviation of every cell. `prompts` [n] are the indices into the set of the
    prompts used (those with answers), `totals` and `logits` [n] each one's own sum and logit (difference), `capped` [n] after a soft cap (empty:
    none). `worst` is the index into the set of the prompt with the lowest logit; `error` the largest |total - logit|.
    """

    which: Which
    mean: AttributionCells
    std: AttributionCells
    prompts: np.ndarray
    totals: np.ndarray
    logits: np.ndarray
    capped: np.ndarray
    worst: int
    error: float
    convention: str
