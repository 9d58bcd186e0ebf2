"""Sweeps: patching and ablation, one cell after the other, and their estimates by gradients."""

import math
from dataclasses import field
from typing import Literal

import numpy as np

from vocabulary.integral import StepsAt
from vocabulary.nodes import OPS
from vocabulary.prompts import Study, TokenRow
from vocabulary.wire import message, request

SweepKind = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn",
    "mlp",
    "attn_mlp",
    "z",
    "q",
    "k",
    "v",
    "pattern",
    "nodes",
    "z_pos",
    "cells",
    "neurons",
    "features",
    "pairs",
    "cumulative",
]
SweepOp = Literal["patch", "zero", "mean", "mean_all", "resample", "noise", "mean_text", "mean_text_pos"]
Direction = Literal["denoise", "noise"]
SWEEPS: dict[SweepKind, str] = {
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
SWEEP_OPS: dict[SweepOp, str] = {
    "patch": "the value in the other prompt's run",
    "zero": "zero",
    "mean": OPS["mean"],
    "mean_all": OPS["mean_all"],
    "resample": OPS["resample"],
    "noise": "its own value plus Gaussian noise",
    "mean_text": OPS["mean_text"],
    "mean_text_pos": OPS["mean_text_pos"],
}
Method = Literal["atp", "ig", "atp_qk", "graddrop", "atp_star"]
ESTIMATES: dict[Method, str] = {
    "atp": "attribution patching: (source - base) . gradient of the metric in the base run",
    "ig": "integrated gradients: (source - base) . the gradient's mean over token embeddings between base and source",
    "atp_qk": "attribution patching, of queries and keys by the pattern computed again: (pattern with the source's - base) . gradient at the pattern",
    "graddrop": "GradDrop: the mean size over layers of attribution patching with that layer's attention and MLP left out of the gradient; sign of attribution patching",
    "atp_star": "AtP*: GradDrop, and of queries and keys the pattern computed again",
}


@request
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
    kind: SweepKind = "resid_pre"
    """resid_pre to attn_mlp and z_pos by position; z to nodes at all positions"""
    op: SweepOp = "patch"
    direction: Direction = "denoise"
    """denoise (clean values into the corrupted run) or noise (the reverse)"""
    effect: Literal["total", "direct"] = "total"
    node: str = ""
    """the head of cells (L2H3), the MLP of neurons (L3.mlp), the SAE of features (L2.sae, with --sae SOURCE)"""
    nodes: tuple[str, ...] = ()
    """those of pairs, cumulative and features; unset, the k largest"""
    k: int = 8
    over_set: bool = False
    """over --set, with statistics"""
    noise: float = 3.0
    """standard deviations of the embedding"""
    seed: int = 0
    only: tuple[tuple[int, int], ...] = ()
    """these cells: row,column pairs such as 3,14"""
    chunk_mb: int = 0
    """bound of the activations at once; unset, LOUPE_SWEEP_MB of .env"""
    plain: bool = False
    """whole forward passes under hooks"""
    first: Literal["", "estimate"] = ""
    """estimate: the largest estimated effects and the early layers first"""


@request
class Estimate:
    """A sweep's cells (patching only) by gradients, all at once: one of ESTIMATES; `steps` of the integral, at `steps_at` on the way from base to source."""

    study: Study
    kind: SweepKind = "resid_pre"
    method: Method = "atp"
    direction: Direction = "denoise"
    steps: int = 5
    """of the integral of ig"""
    steps_at: StepsAt = "mid"
    """of ig: the middles of n parts, left (0 to n-1 of n) or right (1 to n)"""
    node: str = ""
    over_set: bool = False


@request
class Certify:
    """
    The `top` cells of the largest effect, for certain: true patches in the order of an estimate, until random subsets of the other cells, patched together,
    bound what any of these can do below the last of the top, with `confidence`; at most `share` of the cells are run.
    """

    study: Study
    kind: SweepKind = "z"
    top: int = 10
    """how many cells"""
    method: Method = "atp_qk"
    """the estimate: atp, ig, atp_qk, graddrop or atp_star"""
    direction: Direction = "denoise"
    confidence: float = 0.95
    """that no cell outside is larger than the bound"""
    share: float = 0.25
    """at most this share of the cells is run, subsets counted"""
    seed: int = 0
    node: str = ""
    over_set: bool = False


# ------------------------------------------------------------------ results


def percent(share: float) -> str:
    """A share in words; nothing is rounded up to 100 %."""
    return f"{100 * share:.10g}%"


def at_most(bound: float) -> str:
    """A bound, rounded up: three decimals, of small ones two digits."""
    digits = 3 if bound >= 0.01 or bound <= 0 else 1 - math.floor(math.log10(bound))
    return f"{math.ceil(bound * 10**digits) / 10**digits:.{digits}f}"


@message
class CertifyResult:
    """
    `nodes` of the largest true effects (of those run), their `effects` and `estimates`, and which are certain: beyond `bound` by more than the noise `floor`, with `confidence`.
    `bound`: what no cell outside `nodes` exceeds, run or not; `following`: the largest of those run. `certified`: all of `nodes` are certain. `ran`
    runs were made where a sweep makes `cells`, `subsets` of them of random subsets. `convention` says what the bound assumes.
    """

    kind: SweepKind
    method: Method
    nodes: tuple[str, ...]
    effects: np.ndarray
    estimates: np.ndarray
    certain: np.ndarray
    certified: bool
    bound: float
    confidence: float
    ran: int
    subsets: int
    cells: int
    base: float
    convention: str
    following: float = 0.0
    floor: float = 0.0
    warning: str = ""

    @property
    def words(self) -> str:
        """What is certain, and what it took; 80 columns at most."""
        runs, bound, sure = f"{self.ran} runs for {self.cells} cells", at_most(max(self.bound, self.floor)), percent(self.confidence)
        if self.certified:
            return f"certified at {sure}: no other cell exceeds {bound}; {runs}"
        return f"{int(self.certain.sum())} of {len(self.nodes)} certain at {sure}, another may reach {bound}; {runs}"

    @property
    def advice(self) -> str:
        """What to do about what is not certain."""
        last = float(abs(self.effects[-1]))
        if self.certified:
            return ""
        if not last > self.floor:
            return f": the last do no more than rounding ({at_most(self.floor)}); ask for fewer"
        if last > self.bound or not last > self.following + self.floor:
            return ": the last does no more than the next, within rounding; ask for more or fewer"
        return ": a larger share may settle the rest, or sweep them all"


@message
class SweepResult:
    """
    values and normalised (corrupted = 0, clean = 1; without a corrupted prompt 0 = nothing left, 1 = untouched) [row, column], means over the
    prompts; NaN: no such cell, or not yet run (`done` of `total` are). Over a set also std, low and high (95 % confidence, Student's t), p (sign
    flips) and holm (p corrected for all cells) of the effect, value - base paired by prompt [row, column], and per_prompt [prompt, row, column]; empty otherwise and in a partial result.
    `prompts` are indices into the set. `base` is the metric of the run that the cells change. `method` is "truth" or one of ESTIMATES. `mechanism` says how it was run, and why
    when that is not the fast way; `at_once` the most variants in one batch. `peak_mb`: on a GPU the most memory allocated meanwhile, the model
    included; elsewhere the activations of the largest batch, as the bound counts them. `floor`: changes of the metric below it are noise of the dtype
    (model/noise.py); NaN while it is not measured. `names`: what clean and corrupted are called (two models, of one prompt). Over a part of a set there are no
    statistics, and `sides` holds each prompt's metric of the base, clean and corrupted run [3, prompt]; else it is empty.
    """

    kind: SweepKind | Literal["path"]
    op: SweepOp
    direction: Direction
    effect: Literal["total", "direct", "mlps"]
    method: Literal["truth"] | Method
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
    floor: float = float("nan")
    holm: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    names: tuple[str, str] = ("clean", "corrupted")
    sides: np.ndarray = field(default_factory=lambda: np.zeros((3, 0), np.float32))

    def address(self, row: int, col: int) -> str:
        """The node of a cell as an address, for an intervention; "" where the cell is not one node."""
        group = len(self.nodes) // max(1, len(self.rows))
        return self.nodes[row * group + col] if group else ""

    @property
    def noise(self) -> np.ndarray:
        """Where [row, column] the metric changes, but by less than the noise floor."""
        change = np.abs(self.values - np.float32(self.base))
        with np.errstate(invalid="ignore"):
            return (change < self.floor) & (change > 0)
