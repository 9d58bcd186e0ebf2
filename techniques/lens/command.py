"""The command line of this room: lens, tune-lens, fit-jacobian."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from techniques.lens.requests import FitJacobian, FitJacobianResult, Lens, LensResult, TuneLens, TuneLensResult
from techniques.shell import CYAN, GRAY, GREEN, METRIC, RED, options, plain, table
from techniques.training import Recorded
from utils import show_number, show_token


@dataclass
class LensCommand(options(Lens, unused=METRIC, k=5)):
    """Logit, tuned or Jacobian lens at points x positions; L3.attn, L3.mlp and L2H3 are points too."""


@dataclass
class TuneLensCommand(Recorded, options(TuneLens)):
    """Fit a tuned lens: an affine map a layer, from the identity, to KL(final || lens). Interrupted, it resumes from its last checkpoint (every 50 steps)."""

    interruptible = True


@dataclass
class FitJacobianCommand(options(FitJacobian, hide=("part",))):
    """Fit a Jacobian lens with TransformerLens's own tool."""

    interruptible = True


COMMANDS = {"lens": LensCommand, "tune-lens": TuneLensCommand, "fit-jacobian": FitJacobianCommand}


# ------------------------------------------------------------------ tables


def show_lens(out: Console, r: LensResult) -> None:
    answers, pair, ranked = not np.isnan(r.prob).all(), not np.isnan(r.kl_pair).all(), np.isfinite(r.rank_pair).any()
    place = f"position {r.positions[-1]} ({show_token(r.tokens.texts[r.positions[-1]])})"
    extra = [f"KL {r.names[0]} || {r.names[1]}"] * pair + (["rank difference"] if ranked else [])
    rows = table(place, "point", "top token", "probability", "answer", "rank", "entropy", "KL", "logit diff", *extra, "promoted", "suppressed")
    for i, point in enumerate(r.points):
        values = [r.prob[i, -1], r.rank[i, -1]] if answers else [None, None]
        cells = [show_number(None if v is None else float(v)) for v in (*values, r.entropy[i, -1], r.kl[i, -1], r.logit_diff[i, -1])]
        cells += [show_number(float(r.kl_pair[i, -1]))] * pair + ([show_number(float(r.rank_pair[i, -1]))] if ranked else [])
        moved = [moved_tokens(r, ids[i, -1], values[i, -1]) for ids, values in ((r.up_ids, r.up_values), (r.down_ids, r.down_values))]
        rows.add_row(point, plain(show_token(r.texts[int(r.top_ids[i, -1, 0])])), f"{r.top_probs[i, -1, 0]:.4f}", *cells, *moved)
    out.print(rows)
    tops = table("top token at every position", "point", *(show_token(r.tokens.texts[p], 8, fill=False) for p in r.positions))
    for i, point in enumerate(r.points):
        tops.add_row(point, *(plain(show_token(r.texts[int(j)], 8, fill=False)) for j in r.top_ids[i, :, 0]))
    out.print(tops)
    out.print(plain(r.convention, GRAY))


def moved_tokens(r: LensResult, ids: np.ndarray, values: np.ndarray) -> Text:
    return plain("  ".join(f"{show_token(r.texts[i], 8, fill=False)} {v:+.2f}" for i, v in zip(ids.tolist(), values.tolist()) if np.isfinite(v)), GRAY)


def show_tuned(out: Console, r: TuneLensResult) -> None:
    rows = table(f"tuned lens in {r.folder}, {r.steps} steps, {r.seconds:.0f} s", "point", "KL logit lens", "KL tuned lens")
    for point, before, after in zip(r.points, r.before.tolist(), r.after.tolist()):
        rows.add_row(point, f"{before:.4f}", plain(f"{after:.4f}", GREEN if after < before else RED))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_jacobian(out: Console, r: FitJacobianResult) -> None:
    layers = f"layers {r.layers[0]} to {r.layers[-1]}"
    where, change = (
        (f"Jacobian lens in {r.file}", f", changed by {r.change:.4f} with the last") if r.file else ("parts of a Jacobian lens, which is not written yet", "")
    )
    out.print(plain(f"{where}: {layers}, {r.prompts} prompts{change}, {r.seconds:.0f} s", CYAN))
    out.print(plain(r.convention, GRAY))


SHOW = {LensResult: show_lens, TuneLensResult: show_tuned, FitJacobianResult: show_jacobian}
