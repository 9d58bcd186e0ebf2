"""The command line of this room: weights."""

from dataclasses import dataclass

import numpy as np
from rich.console import Console

from techniques.shell import CYAN, GRAY, PURPLE, options, plain, table
from techniques.weights.requests import (
    Composition,
    CompositionResult,
    HeadWeights,
    HeadWeightsResult,
    SINGULAR,
    Singular,
    SingularResult,
    WeightDifference,
    WeightDifferenceResult,
)
from utils import show_number, show_token
from vocabulary.nodes import UserError, parse_node


@dataclass
class WeightsCommand(options(HeadWeights, Singular, hide=("layer", "head", "which"), k=10, r=5)):
    """What a head's or an MLP's weights say, without a prompt."""

    head: str = "L0H0"
    """a head such as L2H3; for the views of an MLP, L2.mlp"""
    view: str = "tokens"
    """tokens (OV and QK pairs, copying score), composition, or singular directions of OV, QK, mlp_in, mlp_gate, mlp_out"""

    def request(self) -> HeadWeights | Composition | Singular:
        node = parse_node(self.head)
        wanted = "mlp" if self.view.startswith("mlp") else "head"
        if node.site != wanted or self.view not in ("tokens", "composition", *SINGULAR):
            of_mlp = ", ".join(n for n in SINGULAR if "mlp" in n)
            raise UserError(f"{self.head}, view {self.view}: write --head L2H3 with view tokens, composition, OV or QK, --head L2.mlp with {of_mlp}")
        there = {"layer": node.layer, "head": node.head}
        match self.view:
            case "tokens":
                return self.ask(HeadWeights, **there)
            case "composition":
                return self.ask(Composition, **there)
        return self.ask(Singular, **there, which=self.view)


@dataclass
class WeightDifferenceCommand(options(WeightDifference)):
    """What differs between the weights of --model and of --against: relative norms by matrix, layer and head, cosines of OV and QK."""


COMMANDS = {"weights": WeightsCommand, "weight-difference": WeightDifferenceCommand}


# ------------------------------------------------------------------ tables


def show_weights(out: Console, r: HeadWeightsResult) -> None:
    kv = "" if r.kv_head == r.head else f", key/value head {r.kv_head}"
    out.print(plain(f"L{r.layer}H{r.head}{kv}: copying {r.copying:.3f}  negative copying {r.anti_copying:.3f}  (of {r.sampled} tokens)", CYAN))
    out.print(plain(f"positivity of OV's eigenvalues {r.positivity:.3f}", CYAN))
    for title, columns, pairs in (
        ("OV, most written", ("attended to", "written"), r.ov_top),
        ("OV, most suppressed", ("attended to", "suppressed"), r.ov_bottom),
        (f"QK at distance {r.distance}, highest", ("destination", "source"), r.qk_top),
        (f"QK at distance {r.distance}, lowest", ("destination", "source"), r.qk_bottom),
    ):
        rows = table(title, *columns, "score")
        for (a, b), score in zip(pairs.ids.tolist(), pairs.scores.tolist()):
            rows.add_row(plain(show_token(r.texts[a])), plain(show_token(r.texts[b])), show_number(score))
        out.print(rows)
    if len(r.position):
        rows = table("QK of positions", "source is back by", "highest mean score")
        for i in np.argsort(-r.position)[:5].tolist():
            rows.add_row(str(i), show_number(float(r.position[i])))
        out.print(rows)
    for text in (r.convention, r.ov_convention, r.qk_convention, f"off the model's own scores and values by at most {r.error:.1e}"):
        out.print(plain(text, GRAY))


def show_composition(out: Console, r: CompositionResult) -> None:
    out.print(plain(f"L{r.layer}H{r.head}: reads from heads of earlier layers, is read by heads of later ones", CYAN))
    for name, scores in (("Q", r.q), ("K", r.k), ("V", r.v)):
        rows = table(f"{name} composition", "layer", *(f"H{h}" for h in range(scores.shape[1])))
        for layer, row in enumerate(scores.tolist()):
            rows.add_row(f"L{layer}", *(plain(show_number(v), CYAN if v > r.baseline + 3 * r.spread else "") for v in row))
        out.print(rows)
    out.print(plain(f"random heads {r.baseline:.4f} ± {r.spread:.4f}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_singular(out: Console, r: SingularResult) -> None:
    for i, (value, share) in enumerate(zip(r.values.tolist(), r.share.tolist())):
        out.print(plain(f"{r.which} {i}: singular value {value:.3f}, {share:.1%} of the squared norm", PURPLE))
        rows = table("", "", "")
        for side in r.sides:
            name = lambda j, side=side: f"n{j}" if side.name == "neurons" else show_token(r.texts[j])  # noqa: E731
            for mark, ids in (("+", side.top_ids[i]), ("−", side.bottom_ids[i])):
                rows.add_row(plain(f"{side.name} {mark}"), plain("  ".join(name(j) for j in ids.tolist())))
        out.print(rows)
    out.print(plain(r.convention, GRAY))


def show_difference(out: Console, r: WeightDifferenceResult) -> None:
    for name, values in r.heads.items():
        rows = table(f"cosine of {name}" if len(name) == 2 else f"W_{name}, relative difference", "layer", *(f"H{h}" for h in range(values.shape[1])))
        for layer, row in enumerate(values.tolist()):
            rows.add_row(f"L{layer}", *(show_number(v) for v in row))
        out.print(rows)
    rows = table("every matrix of a block, relative difference", "layer", *(short(p) for p in r.parts))
    for layer, row in enumerate(r.values.tolist()):
        rows.add_row(f"L{layer}", *(show_number(v) for v in row))
    out.print(rows)
    rows = table("outside the blocks", "", "relative difference")
    for name, value in r.rest.items():
        rows.add_row(plain(name), show_number(value))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


def short(name: str) -> str:
    """A parameter's name for a column: `weight` goes without saying."""
    return name.removesuffix(".weight")


SHOW = {WeightDifferenceResult: show_difference, HeadWeightsResult: show_weights, CompositionResult: show_composition, SingularResult: show_singular}
