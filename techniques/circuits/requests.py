"""Circuits: path patching, scores, discovery, comparison."""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from vocabulary.circuit import Circuit, LOGITS
from vocabulary.nodes import OPS
from vocabulary.prompts import Study
from vocabulary.wire import message, request

PathKind = Literal["direct", "mlps"]
Rest = Literal["patch", "mean", "mean_all", "resample", "zero", "mean_text", "mean_text_pos"]
Method = Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted", "acdc", "greedy", "features"]
ScorePart = Literal["faithfulness", "completeness", "minimality", "effects"]
CONVENTIONS: dict[PathKind, str] = {
    "direct": "the direct edge only: every other head and MLP stays as in the base run",
    "mlps": "through MLPs: other heads stay as in the base run, MLPs are computed again (as in the IOI paper)",
}
REST: dict[Rest, str] = {
    "patch": "its value in the prompt's own corrupted run",
    "mean": OPS["mean"],
    "mean_all": OPS["mean_all"],
    "resample": OPS["resample"],
    "zero": "zero",
    "mean_text": OPS["mean_text"],
    "mean_text_pos": OPS["mean_text_pos"],
}
METHODS: dict[Method, str] = {
    "eap": "edge attribution patching: (corrupted - clean sender) . gradient at the receiver in the clean run",
    "eap-ig": "EAP with integrated gradients over the inputs: token embeddings between corrupted and clean",
    "eap-ig-activations": "EAP with integrated gradients over each sender's activation between corrupted and clean",
    "clean-corrupted": "EAP with the mean of the gradients of the clean and the corrupted run",
    "acdc": "ACDC: from the logits back, an edge goes when removing it moves the metric less than the threshold",
    "greedy": "exact and greedy over nodes: the node whose removal costs least goes, again and again",
    "features": "features of the loaded SAEs: (replaced - own activation) . gradient, integrated along the replacement",
}


@request
class PathPatch:
    """
    Path patching: senders (empty: every head and MLP, and embed) to receivers (L2H3.q, L3.mlp, logits; together). A cell is one sender, and with
    `each` "receiver" one receiver (then `receivers` empty: all that come after). `direction` "noise": the clean run, where the path carries the
    corrupted value; "denoise" the reverse. `by_pos`: senders one position at a time. `node` @ positions are honoured. `dry`: the first paths only, with an
    estimate of the time as the warning. Answer: SweepResult, kind "path".
    """

    study: Study
    senders: tuple[str, ...] = ()
    """L0H1, L3.mlp, embed; with @S2 for a position"""
    receivers: tuple[str, ...] = (LOGITS,)
    """L2H3.q, .k, .v, L3.mlp, logits"""
    each: Literal["sender", "receiver"] = "sender"
    """sender: a cell is one sender, to all receivers; receiver: a cell is one receiver, from all senders, and --receiver is not used"""
    convention: PathKind = "direct"
    """direct (all else frozen) or mlps (through MLPs, other heads frozen)"""
    direction: Literal["noise", "denoise"] = "noise"
    """noise (corrupted value into the clean run) or denoise"""
    by_pos: bool = False
    over_set: bool = False
    """over --set, with statistics"""
    chunk_mb: int = 0
    dry: bool = False
    """only the first paths, and the estimate of the time"""


@request
class Score:
    """
    How good a circuit is, over `study.prompt_set` (or the one prompt): `what` of faithfulness, completeness, minimality, effects (each part alone).
    What is not in the circuit is set to `rest` (REST). `edges`: score it by its edges when it has any. `embeds`: the token embeddings always stay.
    `subsets` random and `greedy` greedy subsets for completeness. `samples` (0: no bound): minimality of so many parts and as many tries in a greedy step,
    drawn with the seed. `dry`: faithfulness and an estimate of the time only.
    """

    study: Study
    circuit: Circuit = Circuit()
    what: tuple[ScorePart, ...] = ("faithfulness",)
    rest: Rest = "mean"
    """what is not in it is set to"""
    edges: bool = True
    """score it by its edges when it has any"""
    positions: bool = True
    mlps: bool = False
    """replace MLPs that are not in it too"""
    subsets: int = 20
    greedy: int = 5
    seed: int = 0
    samples: int = 0
    """minimality of so many parts, and as many tries in a greedy step, drawn with the seed; 0: all"""
    dry: bool = False
    """only faithfulness, and the estimate of the time"""


@request
class Discover:
    """
    Find a circuit by one of METHODS: the `edges` edges (EAP family) or the `nodes` nodes (greedy, features) that matter most, or (acdc) every edge above
    `threshold` (in units of the metric, or of KL). `steps` of the integral, taken at `steps_at` on the way from corrupted to clean (of features: from clean
    to what replaces them). `target`: greedy stops before faithfulness falls below it. `dry`: only the
    estimate of the time. The result is checked by true ablation (`rest`).
    """

    study: Study
    method: Method = "eap-ig"
    """features: of --sae"""
    edges: int = 40
    nodes: int = 0
    """greedy: stop at so many heads (0: at --target); features: so many (0: 30)"""
    threshold: float = 0.1
    """acdc, in units of the metric"""
    steps: int = 5
    steps_at: Literal["", "left", "right", "mid"] = ""
    """left (0 to n-1 of n, as the EAP-IG package takes them today), right (1 to n), mid; unset: right, of features mid"""
    target: float = 0.85
    """greedy: the faithfulness to stay at"""
    rest: Rest = "patch"
    name: str = ""
    dry: bool = False
    """only the estimate of the time"""


@request
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


@message
class ScoreResult:
    """
    `faithfulness` is (F(circuit) - F(empty)) / (F(model) - F(empty)), ratio of means, F the metric; `model`, `alone` (circuit), `empty` as
    intervals. Completeness: one row a subset K, its nodes, F(C without K), F(M without K) and the incompleteness |difference|; the worst is the score.
    Minimality: for each node v its largest |F(C without K) - F(C without K and v)| over the K tried, as a fraction of F(model). `effects` [part]:
    removing this part alone from the whole model, F - F(model), in the metric's unit. Empty where not asked for. `worst` is F(C without K) - F(M without K)
    of the worst K over the prompts; `minimal_low` and `minimal_high` [part] the 95 % interval of each minimality (Student's t; NaN for a single prompt).
    Where only a sample of the parts was tried the others are NaN, and `minimal_mean` is the mean over all parts as the sample tells it. `sets` of nodes or
    edges were (`dry`: would be) cut, which was expected to take `expected` seconds. `floor`: effects below it are noise of the dtype (model/noise.py).
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
    floor: float = float("nan")

    def noise(self, part: int) -> bool:
        """Whether removing this part alone moves the metric by less than the noise floor."""
        return bool(self.effects.size) and 0 < abs(float(self.effects[part])) < self.floor


@message
class DiscoverResult:
    """
    A found circuit with the score of every edge (`edges`, `scores`) or node the method looked at, and the curve: `counts` parts kept and their
    `faithfulness`, by true ablation. `expected` is the estimate of the time made at the start, `seconds` the time it took. Over a part of a set there are the scores
    alone, means over its `prompts` (indices into the set; else empty).
    """

    circuit: Circuit
    method: Method
    edges: tuple[str, ...]
    scores: np.ndarray
    counts: np.ndarray
    faithfulness: np.ndarray
    score: float
    expected: float
    seconds: float
    warning: str
    convention: str
    prompts: tuple[int, ...] = ()


@message
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
