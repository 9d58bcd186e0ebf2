"""The command line of this room: saes, preflight, features, feature, examples, feature-graph, train-sae."""

from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console

from techniques.features.requests import (
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
    TrainSae,
    TrainSaeResult,
)
from techniques.shell import ANSWERS, CYAN, DO, GRAY, GREEN, METRIC, PURPLE, RED, YELLOW, options, plain, table
from techniques.training import Recorded
from utils import show_bytes, show_number, show_token
from vocabulary.nodes import UserError
from vocabulary.prompts import Study


@dataclass
class SaesCommand(options(Saes)):
    """SAEs and transcoders that fit the model, without a network."""


class OfOneSae:
    """The SAE that the command is about is also the one that nodes speak of, and the other way round when there is but one."""

    def study(self) -> Study:
        study = super().study()
        return study if study.saes or not self.source else replace(study, saes=(self.source,))

    def ask(self, kind: type, **given: object) -> object:
        return super().ask(kind, source=self.source or (self.sae[0] if len(self.sae) == 1 else ""), **given)


@dataclass
class PreflightCommand(OfOneSae, options(Preflight, first=("source",), unused=("corrupt", "align", "sae_error", *ANSWERS, *DO, *METRIC))):
    """Load an SAE and check it on the prompt."""


@dataclass
class FeaturesCommand(OfOneSae, options(Features, first=("source",))):
    """The largest features at a position."""


@dataclass
class FeatureCommand(OfOneSae, options(Feature, first=("source",))):
    """One feature: where it fires, what it promotes, what makes it fire."""


@dataclass
class ExamplesCommand(options(Examples, first=("source",), hide=("part",))):
    """Maximal activating examples over a text file; kept on disk under saes/.cache."""


@dataclass
class FeatureGraphCommand(options(FeatureGraph)):
    """What makes a feature of one SAE fire, by the features of an earlier one; --check FEATURE --check-at POSITION runs the real intervention on one edge."""

    check: int = -1
    """a feature of the earlier SAE"""
    check_at: int = 0

    def request(self) -> FeatureGraph | CheckEdge:
        if not self.up:
            raise UserError("name the earlier SAE with --up, and the later one with --down (or --target -1 for the metric)")
        return self.ask(FeatureGraph) if self.check < 0 else self.ask(CheckEdge, feature=self.check, at=self.check_at)


@dataclass
class TrainSaeCommand(Recorded, options(TrainSae)):
    """Train a small SAE through sae_lens. Interrupted, it leaves a checkpoint: go on with --resume."""

    interruptible = True


COMMANDS = {
    "saes": SaesCommand,
    "preflight": PreflightCommand,
    "features": FeaturesCommand,
    "feature": FeatureCommand,
    "examples": ExamplesCommand,
    "feature-graph": FeatureGraphCommand,
    "train-sae": TrainSaeCommand,
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
                text.append(x.replace("\n", "↵"), CYAN if j == e.at else GREEN if e.activation[j] > 0 else GRAY)
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


def show_trained(out: Console, r: TrainSaeResult) -> None:
    out.print(plain(f"SAE in {r.folder}: {r.architecture}, {r.features} features at {r.hook}, {r.tokens} tokens, {r.seconds:.0f} s", PURPLE))
    figures = {"explained variance": r.explained, "L0": r.l0, "dead": r.dead, "loss recovered": r.recovered, "loss": float(r.losses[-1])}
    out.print(plain("  ".join(f"{name} {value:.4f}" for name, value in figures.items()), CYAN))
    out.print(plain(r.convention, GRAY))


SHOW = {
    SaesResult: show_saes,
    PreflightResult: show_preflight,
    FeaturesResult: show_features,
    FeatureResult: show_feature,
    ExamplesResult: show_examples,
    FeatureGraphResult: show_graph,
    CheckEdgeResult: show_edge,
    TrainSaeResult: show_trained,
}
