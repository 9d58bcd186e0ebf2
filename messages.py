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

from analyses import (  # noqa: F401
    ATTRIBUTION_REQUESTS,
    ATTRIBUTION_RESULTS,
    AttentionSet,
    AttentionSetResult,
    Attribution,
    AttributionCells,
    AttributionNeurons,
    AttributionNeuronsResult,
    AttributionResult,
    AttributionSet,
    AttributionSetResult,
    AttributionSources,
    AttributionSourcesResult,
    Composition,
    CompositionResult,
    DETECTORS,
    Detect,
    DetectResult,
    ESTIMATES,
    Estimate,
    HeadWeights,
    HeadWeightsResult,
    Pairs,
    Readout,
    SINGULAR,
    SWEEPS,
    SWEEP_OPS,
    Singular,
    SingularResult,
    Sweep,
    SweepResult,
)
from grammar import (  # noqa: F401  (the whole vocabulary is imported from here)
    ABLATIONS,
    ALIGNMENTS,
    FROM_SET,
    LABEL,
    METRICS,
    NOISE,
    OPS,
    PARTS,
    RESIDS,
    SITES,
    AddressError,
    Intervention,
    Metric,
    Node,
    Prompt,
    Study,
    TokenRow,
    UserError,
    format_node,
    parse_intervention,
    parse_node,
    read_prompt,
    read_prompt_set,
)
from sparse import FEATURE_REQUESTS, FEATURE_RESULTS
from wiring import CIRCUIT_REQUESTS, CIRCUIT_RESULTS


class WireError(Exception):
    """A frame that is garbage, truncated or not of this vocabulary."""


# ------------------------------------------------------------------ results


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
    """
    What is loaded. `bos` is the text of the BOS token ("" when there is none) and `default_bos` whether prompts get it unasked. `warning`: a GPU that is
    here and not used, or filled by others.
    """

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
    warning: str = ""


@dataclass(frozen=True)
class CheckResult:
    """
    A prompt as the model reads it. `problems` stop an analysis; `hints` are advice such as a missing leading space. `alignment` holds the pairs
    (clean index, corrupted index) that patching goes across; empty when there is no corrupted prompt, or nothing says how to align unequal lengths.
    """

    clean: TokenRow
    corrupt: TokenRow | None
    answers: tuple[TokenRow, ...]
    foils: tuple[TokenRow, ...]
    problems: tuple[str, ...]
    hints: tuple[str, ...]
    alignment: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Side:
    """
    One run: its tokens, the k likeliest next tokens at each position with their probabilities and logits [seq, k], and its metric. In a partial
    result, where not yet read: token -1, NaN.
    """

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
    """Tokenise a prompt, its answers and foils, align its positions (ALIGNMENTS), and say what stops an analysis."""

    prompt: Prompt
    align: str = ""


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


REQUESTS = {
    c.__name__: c
    for c in (
        Load, Check, Run, Lens, TuneLens, FitJacobian, Attention, HeadStats, Identities, Status, Models,
        *ATTRIBUTION_REQUESTS, HeadWeights, Composition, Singular, Sweep, Estimate,
        *CIRCUIT_REQUESTS, *FEATURE_REQUESTS,
    )
}  # fmt: skip
RESULTS = {
    c.__name__: c
    for c in (
        ModelInfo, CheckResult, RunResult, LensResult, TuneLensResult, FitJacobianResult, AttentionResult, HeadStatsResult, IdentitiesResult,
        StatusResult, ModelsResult, Progress, Failure, *ATTRIBUTION_RESULTS, HeadWeightsResult, CompositionResult, SingularResult, SweepResult,
        *CIRCUIT_RESULTS, *FEATURE_RESULTS,
    )
}  # fmt: skip
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
