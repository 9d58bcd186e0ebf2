"""The command line of this room: sweep."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console

from techniques.patching.requests import Certify, CertifyResult, Estimate, Method, Sweep, SweepResult
from techniques.shell import CYAN, GRAY, YELLOW, options, plain, table
from utils import show_number, show_token
from vocabulary.nodes import UserError


@dataclass
class SweepCommand(options(Sweep, Estimate, hide=("method",))):
    """Patch or ablate one cell after the other; or estimate it by gradients."""

    estimate: Literal[""] | Method = ""
    """instead of patching: attribution patching (atp), its corrections (atp_star; atp_qk and graddrop alone), or integrated gradients (ig)"""

    def request(self) -> Sweep | Estimate:
        if not self.estimate:
            return self.ask(Sweep)
        if self.op != "patch" or self.effect != "total":
            raise UserError("--estimate is of patching and its total effect")
        return self.ask(Estimate, method=self.estimate)


@dataclass
class CertifyCommand(options(Certify)):
    """The cells of the largest effect, for certain, without running all of them."""


COMMANDS = {"sweep": SweepCommand, "certify": CertifyCommand}


# ------------------------------------------------------------------ tables


def show_sweep(out: Console, r: SweepResult) -> None:
    """Normalised values, the metric where there are none; the largest effects in words."""
    raw = bool(np.isnan(r.normalised).all())
    shown = r.values if raw else r.normalised
    if len(r.cols) <= 128:
        by_position = len(r.cols) == len(r.tokens.texts) and r.cols[0] == "0"
        heads = (f"{c} {show_token(x, 6, fill=False)}" for c, x in zip(r.cols, r.tokens.texts)) if by_position else r.cols
        rows = table("metric" if raw else "normalised metric", "", *heads)
        for name, values, noise in zip(r.rows, shown.tolist(), r.noise.tolist()):
            rows.add_row(name, *("~" * small + show_number(v) for v, small in zip(values, noise)))
        out.print(rows)
    effect = np.abs(r.values - r.base)
    order = [i for i in np.argsort(-np.where(np.isnan(effect), -1.0, effect), axis=None, kind="stable")[:10].tolist() if not np.isnan(effect.flat[i])]
    names = [r.address(*divmod(i, len(r.cols))) or f"{r.rows[i // len(r.cols)]}, {r.cols[i % len(r.cols)]}" for i in order]
    stats = [("std", r.std), ("low", r.low), ("high", r.high), ("p", r.p), ("corrected p", r.holm)] if r.p.size else []
    rows = table("largest effects", "node", "metric", "normalised", "change", *(name for name, _ in stats))
    for name, i in zip(names, order):
        cells = [r.values.flat[i], r.normalised.flat[i], r.values.flat[i] - r.base, *(x.flat[i] for _, x in stats)]
        rows.add_row(plain("~" * bool(r.noise.flat[i]) + name), *(show_number(float(v), 8) for v in cells))
    out.print(rows)
    corrupt = "" if r.corrupt is None else f"  {r.names[1]} {r.corrupt:.4f}"
    out.print(plain(f"base run {r.base:.4f}  {r.names[0]} {r.clean:.4f}{corrupt}  {r.mechanism}", CYAN))
    if r.at_once:
        out.print(
            plain(f"{r.at_once} cells in the largest batch, peak {r.peak_mb:.1f} MB (on a GPU all that was allocated, else the batch's activations)", GRAY)
        )
    if r.floor == r.floor:
        out.print(plain(f"noise floor {r.floor:.2g} of the metric: ~ marks changes below it", GRAY))
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


def show_certify(out: Console, r: CertifyResult) -> None:
    rows = table(f"largest of {r.cells} cells", "node", "effect", r.method, "")
    for name, effect, guess, sure in zip(r.nodes, r.effects.tolist(), r.estimates.tolist(), r.certain.tolist()):
        rows.add_row(plain(name), show_number(effect, 8), show_number(guess, 8), "certain" if sure else "")
    out.print(rows)
    out.print(plain(r.words + r.advice, CYAN if r.certified else YELLOW))
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


SHOW = {SweepResult: show_sweep, CertifyResult: show_certify}
