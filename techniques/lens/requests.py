"""Lenses: what the model would say at each point of the residual stream; and fitting a tuned or a Jacobian one."""

from dataclasses import field
from typing import ClassVar, Literal

import numpy as np

from vocabulary.prompts import Study, TokenRow, Which
from vocabulary.wire import message, request

LensKind = Literal["logit", "tuned", "jacobian"]
LENSES: dict[LensKind, str] = {
    "logit": "the final norm and the unembedding on the stream as it is",
    "tuned": "an affine translator a layer, fitted to the final logits",
    "jacobian": "the average Jacobian from a layer to the last one",
}


@request
class Lens:
    """
    A lens at points (addresses without position): residual points, and L3.attn, L3.mlp, L2H3 for what a component writes (logit lens only). Empty:
    resid_pre of layer 0, then resid_mid and resid_post of every layer, as far as the kind reads them. `artefact` is the file or folder (or hub
    name) of a tuned or Jacobian lens. `positions` limits the columns (negative from the end; empty: all); `pair` False leaves kl_pair NaN.
    """

    study: Study
    which: Which = "now"
    """now, clean or corrupt, or a difference"""
    points: tuple[str, ...] = ()
    """unset, the residual points"""
    k: int = 10
    kind: LensKind = "logit"
    artefact: str = ""
    """folder or file of a tuned or Jacobian lens, or its hub name; unset, the one beside the model or under its name on the hub"""
    positions: tuple[int, ...] = ()
    """limit the columns"""
    pair: bool = True
    """KL(clean || corrupted) too"""


@request
class TuneLens:
    """Fit a tuned lens to the loaded model on a text file ("": zoo/corpus.txt) and write it into the folder `out`; `resume` goes on from its checkpoint."""

    text: str = ""
    """a text file; unset, the zoo's corpus"""
    out: str = "exports/tuned_lens"
    steps: int = 250
    batch: int = 8
    length: int = 64
    lr: float = 0.001
    seed: int = 0
    resume: bool = False


@request
class FitJacobian:
    """
    Fit a Jacobian lens on pieces of a text file ("": zoo/corpus.txt), `length` tokens each, and write it to the file `out`. `part`: the pieces from one up to another alone,
    whose mean goes to `out` (techniques/lens/scatter.py joins them).
    """

    text: str = ""
    """a text file; unset, the zoo's corpus"""
    out: str = "exports/jacobian_lens.pt"
    prompts: int = 16
    length: int = 64
    skip: int = 16
    """positions at the start of every prompt that are left out"""
    seed: int = 0
    part: tuple[int, int] | None = None


# ------------------------------------------------------------------ results


@message
class LensResult:
    """
    A lens. Rows are points, columns positions: top_ids and top_probs [point, seq, k]; prob (of the answers, summed), rank (of the best
    answer), entropy and kl (KL(final || this), nats) and logit_diff [point, seq]; NaN where there is no answer. A partial result has fewer points.
    kl_pair: KL(clean || corrupted) at the point, NaN without a corrupted prompt of equal length;
    rank_pair, with a second model: its rank of the best answer minus this model's. up and down [point, seq, 3]: the tokens whose log
    probability rose and fell most against the residual row before it in the table, and by how much (NaN in the first row); of a component, the
    tokens it writes most for and against, direct logits minus their mean over the vocabulary. `positions` are the columns: indices into `tokens`.
    `names`: what clean and corrupted are called (two models, of one prompt).
    """

    adds: ClassVar[bool] = True  # a partial result holds the rows since the one before, not all
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
    rank_pair: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    names: tuple[str, str] = ("clean", "corrupted")


@message
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


@message
class FitJacobianResult:
    """A fitted Jacobian lens: the file, the prompts averaged over, and the mean relative change of its matrices by the last prompt."""

    file: str
    layers: tuple[int, ...]
    prompts: int
    change: float
    seconds: float
    convention: str
