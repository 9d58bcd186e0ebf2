"""The command line of this room: attention, heads, detect."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console

from techniques.attention.requests import Attention, AttentionResult, AttentionSet, AttentionSetResult, Detect, DetectResult, HeadStats, HeadStatsResult
from techniques.shell import ANSWERS, CYAN, GRAY, METRIC, options, plain, table
from utils import show_number, show_token


@dataclass
class AttentionCommand(options(Attention, AttentionSet, unused=ANSWERS + METRIC)):
    """Attention patterns of one layer: where each head looks from the last position, or everything with --json."""

    mean: bool = False
    """instead: the mean over --set between labelled positions, every layer"""

    def request(self) -> Attention | AttentionSet:
        return self.ask(AttentionSet if self.mean else Attention)


@dataclass
class HeadsCommand(options(HeadStats, unused=ANSWERS + METRIC)):
    """Statistics of every head, on the prompt or on random repeated tokens (--source random)."""


@dataclass
class DetectCommand(options(Detect, unused=ANSWERS + METRIC)):
    """Score every head against an attention pattern, as transformer_lens.head_detector does."""


COMMANDS = {"attention": AttentionCommand, "heads": HeadsCommand, "detect": DetectCommand}


# ------------------------------------------------------------------ tables


def show_attention(out: Console, r: AttentionResult) -> None:
    rows = table(f"layer {r.layer}: where each head looks from the last position ({r.which})", "head", *(show_token(x) for x in r.tokens.texts))
    for h, p in enumerate(r.pattern[:, -1]):
        best = int(np.nanargmax(np.abs(p)))
        rows.add_row(f"L{r.layer}H{h}", *(plain("" if v != v else f"{v:.2f}", CYAN if j == best else "") for j, v in enumerate(p.tolist())))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_heads(out: Console, r: HeadStatsResult) -> None:
    layers, heads = next(iter(r.stats.values())).shape
    for name, values in r.stats.items():
        rows = table(name, "layer", *(f"H{h}" for h in range(heads)))
        for layer in range(layers):
            rows.add_row(f"L{layer}", *(show_number(float(v), 5) for v in values[layer]))
        out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_attention_set(out: Console, r: AttentionSetResult) -> None:
    spots = [(i, j) for i in range(len(r.labels)) for j in range(len(r.labels)) if r.counts[i, j]]
    rows = table("mean attention", "head", *(f"{r.labels[i]} to {r.labels[j]}" for i, j in spots))
    for layer, heads in enumerate(r.mean):
        for h, cells in enumerate(heads):
            rows.add_row(f"L{layer}H{h}", *(f"{cells[i, j]:.3f}" for i, j in spots))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_detect(out: Console, r: DetectResult) -> None:
    rows = table("scores", "layer", *(f"H{h}" for h in range(r.scores.shape[1])))
    for layer, values in enumerate(r.scores):
        rows.add_row(f"L{layer}", *(show_number(float(v)) for v in values))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


SHOW = {AttentionResult: show_attention, AttentionSetResult: show_attention_set, HeadStatsResult: show_heads, DetectResult: show_detect}
