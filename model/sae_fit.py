"""Whether an SAE is the right one for a model and a prompt: how well it explains what it reads, under which view of the activation, and why not."""

import math
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.bridge import Model
from model.runs import Runs
from model.sae import SparseAutoencoder
from vocabulary.nodes import UserError

REFUSE, WARN = 0.8, 0.9


@dataclass(frozen=True)
class Fit:
    """How well an SAE explains what it writes, over positions: cosine of reconstruction and target, variance unexplained, features on, norms' ratio."""

    cosine: float
    unexplained: float
    l0: float
    ratio: float


@t.no_grad()
def fit(d: SparseAutoencoder, x: Tensor, y: Tensor, view: str) -> Fit:
    """Of inputs x and targets y [position, ...] under a view of the activation; both without position 0."""
    before, d.view = d.view, view
    try:
        parts, count = [], 0
        for piece in d.pieces(len(x)):
            f = d.encode(x[piece])
            parts.append(d.decode(f, x[piece]))
            count += int((f != 0).sum())
        found = t.cat(parts)
    finally:
        d.view = before
    y = d.flat(y)
    if view == "centred":
        y, found = y - y.mean(-1, keepdim=True), found - found.mean(-1, keepdim=True)
    cosine = t.cosine_similarity(found.double(), y.double(), dim=-1).mean().item()
    variance = (y - y.mean(0)).double().pow(2).sum().item()
    unexplained = (y - found).double().pow(2).sum().item() / variance if variance > 0 else math.nan
    return Fit(cosine, unexplained, count / len(x), (found.norm() / y.norm()).item())


def views(model: Model) -> tuple[str, ...]:
    """The views of an activation that make a difference under this model's norms."""
    return ("raw",) if model.cfg.uses_rms_norm else ("raw", "centred")


@t.no_grad()
def fits(runs: Runs, d: SparseAutoencoder, which: str = "clean") -> dict[str, Fit]:
    """By view, on a run without position 0; remembered."""
    row = runs.row(which)
    if len(row.ids) < 2:
        raise UserError("an SAE is checked without position 0, and the prompt has one token: make it longer")
    key = (which == "now" and runs.done, row.ids)
    if key not in d.verdicts:
        acts = runs.trace(which, [d.point, d.out])
        d.verdicts[key] = {v: fit(d, acts[d.point][0, 1:], acts[d.out][0, 1:], v) for v in views(runs.model)}
    return d.verdicts[key]


def choose(d: SparseAutoencoder, found: dict[str, Fit], view: str) -> str:
    """The view asked for; else the metadata's, unless it does not explain this prompt and the other one does."""
    if view in found:
        return view
    if view != "auto":
        words = "this model's norm has no mean to take off: use auto or raw" if view == "centred" else "use auto, raw or centred"
        raise UserError(f"{view!r} is not a view of the activation here: {words}")
    best = max(found, key=lambda v: found[v].cosine)
    return best if found[d.view].cosine < REFUSE <= found[best].cosine else d.view


def check(runs: Runs, d: SparseAutoencoder) -> None:
    """Sets the view at first use, and refuses an SAE that does not explain the clean prompt."""
    found = fits(runs, d)
    d.view = choose(d, found, d.view if d.asked or d.passed else "auto")
    if found[d.view].cosine < REFUSE or not math.isfinite(found[d.view].cosine):
        raise UserError(f"{d.source} does not explain this prompt (cosine {found[d.view].cosine:.2f}, at least {REFUSE} is needed): {cause(runs, d, found)}")
    d.passed = True


def cause(runs: Runs, d: SparseAutoencoder, found: dict[str, Fit]) -> str:
    """The likeliest reason for a low cosine."""
    mine = found[d.view]
    other = max(found.values(), key=lambda f: f.cosine)
    if not math.isfinite(mine.cosine):
        return "the reconstruction is not finite; load the model in float32"
    if other.cosine - mine.cosine > 0.05 and other.cosine >= REFUSE:
        return f"the other view of the activation fits (cosine {other.cosine:.2f}); use view auto"
    if d.normalisation == "expected_average_only_in":
        return "its inputs are to be multiplied by a constant (expected_average_only_in) that is not in the file; save it with the constant folded in"
    if mine.l0 > 10 * d.l0 or mine.l0 > d.d_sae / 4:
        return (
            f"{mine.l0:.0f} features fire at a position"
            + ("" if math.isnan(d.l0) else f" and {d.l0:g} are published")
            + ": wrong activation function, or model"
        )
    if (where := elsewhere(runs, d)) is not None:
        return f"it fits {where[0]} better (cosine {where[1]:.2f}): its hook point is named wrongly"
    if not 0.5 < mine.ratio < 2:
        return f"the reconstruction is {mine.ratio:.2g} times as long as the activation: a normalisation is missing, or it is of another model"
    return "it is of another model or hook point, or not trained"


def elsewhere(runs: Runs, d: SparseAutoencoder) -> tuple[str, float] | None:
    """Another residual point of the model that the SAE explains."""
    if d.transcoder or not d.site.startswith("resid"):
        return None
    names = [n for n in runs.model.lens_points() if n != d.point]
    acts = runs.trace("clean", names)
    best = max(((n, fit(d, acts[n][0, 1:], acts[n][0, 1:], d.view).cosine) for n in names), key=lambda found: found[1])
    return best if best[1] >= REFUSE else None
