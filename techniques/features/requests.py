"""SAEs and transcoders: choosing, checking and training one, its features, examples, graphs."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vocabulary.prompts import OneRun, Study, TokenRow
from vocabulary.wire import message, request

VIEWS_OF_ACTIVATIONS = {"raw": "the activation as it is", "centred": "the activation minus its mean over the model's width (TransformerLens's centred weights)"}


@request
class Saes:
    """SAEs that fit the loaded model: shipped ones, folders under saes/, and sae_lens's list; no network. `every` lists those of other models too."""

    every: bool = False
    """those of other models too"""


@request
class Preflight:
    """Load an SAE and check it on the prompt (clean run) before anything is shown: view, cosine, variance, L0, loss. `view`: auto, raw or centred."""

    study: Study
    source: str = ""
    """a folder that SAE.save_model wrote, zoo/NAME, or RELEASE:ID of sae_lens's list"""
    view: Literal["auto", "raw", "centred"] = "auto"
    """of the activation"""


@request
class Features:
    """
    The k features with the largest `order` (activation, attribution: activation x gradient of the metric; direct: through the decoder and the final
    norm to the answer direction) at `pos` (None: the metric's position) of a run.
    """

    study: Study
    source: str = ""
    """a folder that SAE.save_model wrote, zoo/NAME, or RELEASE:ID of sae_lens's list"""
    which: OneRun = "now"
    pos: int | str | None = None
    """a position: a number or a label; unset, the metric's"""
    order: Literal["activation", "attribution", "direct"] = "activation"
    k: int = 20


@request
class Feature:
    """
    One feature: its activation over the tokens, decoder to logits, nearest features, the features that fire with it, source tokens, its address.
    `pos` is where its source tokens are read (None: where it fires most, but not at position 0).
    """

    study: Study
    source: str = ""
    """a folder that SAE.save_model wrote, zoo/NAME, or RELEASE:ID of sae_lens's list"""
    index: int = 0
    which: OneRun = "now"
    pos: int | str | None = None
    """a position: a number or a label; unset, where it fires most"""
    k: int = 10


@request
class Examples:
    """Maximal activating examples and histograms of features over a text file ("": zoo/corpus.txt), cached on disk. `indices` empty: all features."""

    source: str = ""
    """a folder that SAE.save_model wrote, zoo/NAME, or RELEASE:ID of sae_lens's list"""
    text: str = ""
    """a text file; unset, the zoo's corpus"""
    indices: tuple[int, ...] = ()
    """features; unset, all of them"""
    k: int = 20
    tokens: int = 200_000
    length: int = 64
    part: tuple[int, int] | None = None
    """only the pieces of the text from (counted from 0) up to, not including, to. Answer: ExamplesPart"""


@request
class FeatureGraph:
    """
    What makes a feature of `down` fire at `pos`, by the features of `up` at every position, the embeddings and `up`'s error: linear, with attention
    patterns and norm scales frozen (MLPs frozen too: only the paths through attention and the residual stream). `target` -1: the metric instead of a feature.
    """

    study: Study
    up: str = ""
    """the earlier SAE"""
    down: str = ""
    """the later SAE, or nothing for the metric"""
    target: int = 0
    """a feature of the later SAE, or -1 for the metric"""
    pos: int | str | None = None
    """the target's position; unset, the metric's"""
    which: OneRun = "now"
    k: int = 20


@request
class CheckEdge:
    """One edge of FeatureGraph by the real intervention: the up feature to zero at its position, the target feature before and after (frozen, and total)."""

    study: Study
    up: str = ""
    down: str = ""
    feature: int = 0
    at: int = 0
    target: int = 0
    pos: int | str | None = None
    which: OneRun = "now"


@request
class TrainSae:
    """Train a small SAE on a hook point of the loaded model and a text file ("": zoo/corpus.txt); written to `out` by sae_lens. `resume` goes on."""

    hook: str = "L2.resid_post"
    """L2.resid_pre, L2.resid_mid, L2.resid_post, L2.attn or L2.mlp"""
    text: str = ""
    """a text file; unset, the zoo's corpus"""
    out: str = "saes/mine"
    """a new folder, for cfg.json and sae_weights.safetensors"""
    architecture: Literal["topk", "batchtopk", "standard", "jumprelu"] = "topk"
    """standard: with l1"""
    features: int = 512
    k: int = 8
    """features active at once: exactly (topk), on average (batchtopk), or wanted (jumprelu)"""
    l1: float = 1.0
    """the sparsity coefficient of standard"""
    tokens: int = 500_000
    """tokens to train on; a shorter text is repeated"""
    batch: int = 1024
    length: int = 64
    """tokens of a row of text"""
    lr: float = 0.001
    seed: int = 0
    resume: bool = False


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class SaeChoice:
    """An SAE that can be loaded: NaN where nothing is published. `where` is zoo, folder, cache or hub."""

    source: str
    model: str
    hook: str
    width: int
    l0: float
    explained: float
    neuronpedia: str
    where: str
    note: str = ""


@message
class SaesResult:
    choices: tuple[SaeChoice, ...]


@dataclass(frozen=True)
class SaeInfo:
    """A loaded SAE or transcoder: where it reads and writes, its size and kind, the view it wants, and what is published about it (NaN: nothing)."""

    source: str
    architecture: str
    hook: str
    hook_out: str
    layer: int
    d_in: int
    d_sae: int
    view: str
    normalisation: str
    l0: float
    explained: float
    neuronpedia: str
    bytes: int


@message
class PreflightResult:
    """
    On the prompt without position 0: cosine of reconstruction and target, fraction of variance unexplained, L0, loss of the model, with the SAE
    spliced in, and with zeros; recovered = (zero - spliced) / (zero - model). `verdict` good, warn (cosine < 0.9) or refuse (< 0.8), with the `cause`.
    `cosines` by view.
    """

    info: SaeInfo
    cosine: float
    unexplained: float
    l0: float
    loss: float
    loss_spliced: float
    loss_zero: float
    recovered: float
    cosines: dict[str, float]
    verdict: Literal["good", "warn", "refuse"]
    cause: str
    convention: str


@message
class FeaturesResult:
    """
    index, activation, attribution and direct [k], largest first by `order`; `rest` of the active features (activation norm aside) as (count, attribution,
    direct). Rows of their own: reconstruction, bias and error, each with norm, attribution and direct; feature rows + rest + bias = reconstruction, and reconstruction +
    error = the activation (`gap` the largest difference). `labels` where known.
    """

    info: SaeInfo
    tokens: TokenRow
    which: OneRun
    pos: int
    order: Literal["activation", "attribution", "direct"]
    active: int
    index: np.ndarray
    activation: np.ndarray
    attribution: np.ndarray
    direct: np.ndarray
    rest: tuple[float, float, float]
    bias: tuple[float, float, float]
    reconstruction: tuple[float, float, float]
    error: tuple[float, float, float]
    total: tuple[float, float, float]
    gap: float
    labels: dict[int, str]
    convention: str


@message
class FeatureResult:
    """
    activation [seq]; top and bottom tokens of the decoder through the final norm's gain and the unembedding; nearest features by decoder cosine; features that
    fire with it on this prompt (Jaccard over tokens); `sources` [seq]: what each source token adds to its pre-activation at `pos` through the heads of
    its layer and before (linear, frozen), `heads` [layer, head] the same by head, with `bias` the rest. Neuronpedia id and address, "" without one.
    """

    info: SaeInfo
    tokens: TokenRow
    which: OneRun
    index: int
    pos: int
    activation: np.ndarray
    top_ids: np.ndarray
    top_logits: np.ndarray
    bottom_ids: np.ndarray
    bottom_logits: np.ndarray
    nearest: np.ndarray
    cosine: np.ndarray
    together: np.ndarray
    jaccard: np.ndarray
    sources: np.ndarray
    heads: np.ndarray
    rest: float
    total: float
    neuronpedia: str
    address: str
    label: str
    texts: dict[int, str]
    convention: str


@dataclass(frozen=True)
class Example:
    """A piece of text around a feature's maximum: token texts, activations, and which one is the maximum."""

    texts: tuple[str, ...]
    activation: tuple[float, ...]
    at: int


@message
class ExamplesResult:
    """Of each feature asked for: its examples, best first, the histogram of its positive activations (counts, edges), and how often it fires."""

    info: SaeInfo
    indices: tuple[int, ...]
    examples: tuple[tuple[Example, ...], ...]
    counts: np.ndarray
    edges: np.ndarray
    density: np.ndarray
    together: np.ndarray
    jaccard: np.ndarray
    tokens: int
    seconds: float
    cached: bool
    convention: str


@message
class ExamplesPart:
    """
    Examples of one part of a text, with what the whole's are made of: how often each feature fires [d_sae], and of the features whose pairs are counted
    (`asked`) on how many tokens they fire with each [asked, d_sae].
    """

    result: ExamplesResult
    fires: np.ndarray
    asked: np.ndarray
    both: np.ndarray


@message
class FeatureGraphResult:
    """
    Edges into the target at `pos`: feature index, its position, activation and contribution [k], largest size first; `rest` of the other features;
    rows by what they are (embeddings, error, biases, MLPs between); all of them sum to `total`, the target's pre-activation (or metric), within `gap`.
    """

    up: SaeInfo
    down: SaeInfo
    tokens: TokenRow
    target: int
    pos: int
    value: float
    index: np.ndarray
    at: np.ndarray
    activation: np.ndarray
    contribution: np.ndarray
    rest: float
    rows: dict[str, float]
    total: float
    gap: float
    convention: str


@message
class CheckEdgeResult:
    """The contribution the graph claims, and the target's pre-activation lost when the up feature is set to zero: frozen (must agree) and total."""

    claimed: float
    frozen: float
    total: float
    before: float
    after: float
    convention: str


@message
class TrainSaeResult:
    """A trained SAE, measured on held-out text without position 0: explained variance, L0, dead fraction, loss recovered, and the training losses."""

    folder: str
    hook: str
    architecture: str
    features: int
    explained: float
    l0: float
    dead: float
    recovered: float
    losses: np.ndarray
    tokens: int
    seconds: float
    convention: str
