"""The command line of features: saes, preflight, features, feature, examples, feature-graph."""

from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console

from commands import CYAN, GRAY, GREEN, PURPLE, RED, YELLOW, Options, plain, table
from grammar import Study, UserError
from sparse import (
    CheckEdge,
    CheckEdgeResult,
    Examples,
    ExamplesResult,
    Feature,
    FeatureGraph,
    FeatureGraphResult,
    FeatureResult,
    Features,
    FeaturesResult,
    Preflight,
    PreflightResult,
    SaeInfo,
    Saes,
    SaesResult,
)
from utils import show_bytes, show_number, show_token

Source = Annotated[str, tyro.conf.Positional]


@dataclass
class SaesCommand(Options):
    """SAEs and transcoders that fit the model, without a network."""

    every: bool = False
    """those of other models too"""

    def request(self) -> Saes:
        return Saes(self.every)


@dataclass
class FeatureOptions(Options):
    """What the analyses of one SAE take."""

    source: Source = ""
    """a folder that SAE.save_model wrote, zoo/NAME, or RELEASE:ID of sae_lens's list"""
    which: str = "now"
    """now, clean or corrupt"""
    at: str = ""
    """a position: a number or a label; unset, the metric's"""

    @property
    def place(self) -> int | str | None:
        return int(self.at) if self.at.lstrip("-").isdigit() else self.at or None

    def study(self) -> Study:
        study = super().study()
        return study if study.saes else replace(study, saes=(self.source,))


@dataclass
class PreflightCommand(FeatureOptions):
    """Load an SAE and check it on the prompt."""

    view: str = "auto"
    """of the activation: auto, raw or centred"""

    def request(self) -> Preflight:
        return Preflight(self.study(), self.source, self.view)


@dataclass
class FeaturesCommand(FeatureOptions):
    """The largest features at a position."""

    order: str = Features.order
    """activation, attribution or direct"""
    k: int = Features.k

    def request(self) -> Features:
        return Features(self.study(), self.source, self.which, self.place, self.order, self.k)


@dataclass
class FeatureCommand(FeatureOptions):
    """One feature: where it fires, what it promotes, what makes it fire."""

    index: int = 0
    k: int = Feature.k

    def request(self) -> Feature:
        return Feature(self.study(), self.source, self.index, self.which, self.place, self.k)


@dataclass
class ExamplesCommand(Options):
    """Maximal activating examples over a text file; kept on disk under saes/.cache."""

    source: Source = ""
    text: str = ""
    """a text file; unset, the zoo's corpus"""
    indices: tuple[int, ...] = ()
    """features; unset, all of them"""
    k: int = Examples.k
    tokens: int = Examples.tokens
    length: int = Examples.length

    def request(self) -> Examples:
        return Examples(self.source, self.text, self.indices, self.k, self.tokens, self.length)


@dataclass
class FeatureGraphCommand(Options):
    """What makes a feature of one SAE fire, by the features of an earlier one; --check FEATURE --check-at POSITION runs the real intervention on one edge."""

    up: str = ""
    """the earlier SAE"""
    down: str = ""
    """the later SAE, or nothing for the metric"""
    target: int = FeatureGraph.target
    """a feature of the later SAE, or -1 for the metric"""
    which: str = "now"
    at: str = ""
    """the target's position; unset, the metric's"""
    k: int = FeatureGraph.k
    check: int = -1
    check_at: int = 0

    def request(self) -> FeatureGraph | CheckEdge:
        pos = int(self.at) if self.at.lstrip("-").isdigit() else self.at or None
        if not self.up:
            raise UserError("name the earlier SAE with --up, and the later one with --down (or --target -1 for the metric)")
        if self.check >= 0:
            return CheckEdge(self.study(), self.up, self.down, self.check, self.check_at, self.target, pos, self.which)
        return FeatureGraph(self.study(), self.up, self.down, self.target, pos, self.which, self.k)


COMMANDS = {
    "saes": SaesCommand,
    "preflight": PreflightCommand,
    "features": FeaturesCommand,
    "feature": FeatureCommand,
    "examples": ExamplesCommand,
    "feature-graph": FeatureGraphCommand,
}


# ------------------------------------------------------------------ tables


def known(x: float, form: str = "g") -> str:
    return "" if x != x else format(x, form)


def show_saes(out: Console, r: SaesResult) -> None:
    rows = table("SAEs and transcoders", "source", "model", "hook", "features", "L0", "explained", "where", "")
    for c in r.choices:
        rows.add_row(
            plain(c.source), plain(c.model), plain(c.hook), str(c.width or ""), known(c.l0), known(c.explained),
            plain(c.where, GREEN if c.where != "hub" else ""), plain(c.note, GRAY),
        )  # fmt: skip
    out.print(rows)
    if not r.choices:
        out.print(plain("none fits this model: train one with train-sae, or see --every", YELLOW))


def header(out: Console, i: SaeInfo) -> None:
    where = i.hook if i.hook == i.hook_out else f"{i.hook} to {i.hook_out}"
    norm = "" if i.normalisation == "none" else f", {i.normalisation}"
    out.print(plain(f"{i.source}: {i.architecture} at {where}, {i.d_sae} features of {i.d_in}, {i.view} activation{norm}, {show_bytes(i.bytes)}", CYAN))


def show_preflight(out: Console, r: PreflightResult) -> None:
    header(out, r.info)
    rows = table("", "", "here", "published")
    rows.add_row("cosine", f"{r.cosine:.4f}", "")
    rows.add_row("variance explained", f"{1 - r.unexplained:.4f}", known(r.info.explained))
    rows.add_row("features on (L0)", f"{r.l0:.1f}", known(r.info.l0))
    rows.add_row("loss of the model", f"{r.loss:.4f}", "")
    rows.add_row("with the SAE", f"{r.loss_spliced:.4f}", "")
    rows.add_row("with zeros", f"{r.loss_zero:.4f}", "")
    rows.add_row("loss recovered", f"{r.recovered:.1%}", "")
    for view, value in r.cosines.items():
        rows.add_row(f"cosine, {view}", f"{value:.4f}", "")
    out.print(rows)
    out.print(plain(r.verdict + (f": {r.cause}" if r.cause else ""), {"good": GREEN, "warn": YELLOW}.get(r.verdict, RED)))
    out.print(plain(r.convention, GRAY))


def show_features(out: Console, r: FeaturesResult) -> None:
    header(out, r.info)
    rows = table(f"features at {r.pos} ({show_token(r.tokens.texts[r.pos])}), {r.which}", "", "activation", "attribution", "direct", "")
    for i, a, b, c in zip(r.index.tolist(), r.activation.tolist(), r.attribution.tolist(), r.direct.tolist()):
        rows.add_row(f"L{r.info.layer}.sae.f{i}", *(show_number(v) for v in (a, b, c)), plain(r.labels.get(i, ""), GRAY))
    rows.add_row(f"{r.rest[0]:.0f} more", "", *(show_number(v) for v in r.rest[1:]))
    out.print(rows)
    parts = table("", "", "norm", "attribution", "direct")
    for name, values in (("bias", r.bias), ("reconstruction", r.reconstruction), ("error", r.error), ("activation", r.total)):
        parts.add_row(name, *(show_number(v) for v in values))
    out.print(parts)
    out.print(plain(f"{r.active} features on; features + bias + error - activation: {r.gap:.1e}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_feature(out: Console, r: FeatureResult) -> None:
    header(out, r.info)
    rows = table(f"L{r.info.layer}.sae.f{r.index}, sources at {r.pos}", "", "token", "activation", "from here")
    for i, (x, a, s) in enumerate(zip(r.tokens.texts, r.activation.tolist(), r.sources.tolist())):
        rows.add_row(str(i), plain(show_token(x), CYAN if i == r.pos else ""), show_number(a), show_number(s))
    out.print(rows)
    out.print(plain(f"pre-activation {r.total:.4f} = through heads {float(np.sum(r.sources)):.4f} + the rest {r.rest:.4f}", CYAN))
    for name, ids, values in (("promotes", r.top_ids, r.top_logits), ("suppresses", r.bottom_ids, r.bottom_logits)):
        out.print(plain(f"{name}  " + "  ".join(f"{show_token(r.texts[i])} {v:+.2f}" for i, v in zip(ids.tolist(), values.tolist()))))
    out.print(plain("nearest  " + "  ".join(f"f{i} {v:.2f}" for i, v in zip(r.nearest.tolist(), r.cosine.tolist()))))
    out.print(plain("fires with  " + "  ".join(f"f{i} {v:.2f}" for i, v in zip(r.together.tolist(), r.jaccard.tolist()))))
    if r.address:
        out.print(plain(r.address, CYAN))
    out.print(plain(r.convention, GRAY))


def show_examples(out: Console, r: ExamplesResult) -> None:
    header(out, r.info)
    for n, index in enumerate(r.indices):
        out.print(plain(f"f{index}: on at {r.density[n]:.3%} of tokens", PURPLE))
        rows = table("", "activation", "")
        for e in r.examples[n]:
            text = plain("")
            for j, x in enumerate(e.texts):
                text.append(x.replace("\n", "⏎"), CYAN if j == e.at else GREEN if e.activation[j] > 0 else GRAY)
            rows.add_row(show_number(e.activation[e.at]), text)
        out.print(rows)
    out.print(plain(f"{r.tokens} tokens, {r.seconds:.1f} s" + (", from the disk" if r.cached else ""), CYAN))
    out.print(plain(r.convention, GRAY))


def show_graph(out: Console, r: FeatureGraphResult) -> None:
    header(out, r.up)
    name = "the metric" if r.target < 0 else f"L{r.down.layer}.sae.f{r.target}"
    rows = table(f"into {name} at {r.pos} ({show_token(r.tokens.texts[r.pos])})", "feature", "at", "token", "activation", "contribution")
    for i, p, a, c in zip(r.index.tolist(), r.at.tolist(), r.activation.tolist(), r.contribution.tolist()):
        rows.add_row(f"L{r.up.layer}.sae.f{i}", str(p), plain(show_token(r.tokens.texts[p])), show_number(a), show_number(c))
    out.print(rows)
    parts = table("", "", "contribution")
    for key, value in {"other features": r.rest, **r.rows}.items():
        parts.add_row(plain(key), show_number(value, 8))
    out.print(parts)
    out.print(plain(f"sum {r.total:.4f}  pre-activation {r.value:.4f}  error {r.gap:.1e}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_edge(out: Console, r: CheckEdgeResult) -> None:
    out.print(plain(f"claimed {r.claimed:.4f}  frozen {r.frozen:.4f}  total {r.total:.4f}  ({r.before:.4f} to {r.after:.4f})", CYAN))
    out.print(plain(r.convention, GRAY))


SHOW = {
    SaesResult: show_saes,
    PreflightResult: show_preflight,
    FeaturesResult: show_features,
    FeatureResult: show_feature,
    ExamplesResult: show_examples,
    FeatureGraphResult: show_graph,
    CheckEdgeResult: show_edge,
}
