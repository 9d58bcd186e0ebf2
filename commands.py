"""The command line of engine.py: every analysis from a shell, as a table or as JSON."""

import json
import re
import signal
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

import published
from engine import Engine, serve
from messages import (
    Attention,
    AttentionResult,
    FitJacobian,
    FitJacobianResult,
    AttentionSet,
    AttentionSetResult,
    Attribution,
    AttributionCells,
    AttributionNeurons,
    AttributionNeuronsResult,
    AttributionResult,
    AttributionSet,
    AttributionSetResult,
    AttributionSources,
    AttributionSourcesResult,
    Detect,
    DetectResult,
    Estimate,
    HeadStats,
    HeadStatsResult,
    Identities,
    IdentitiesResult,
    Lens,
    LensResult,
    Load,
    Metric,
    Progress,
    Prompt,
    Run,
    RunResult,
    Study,
    Sweep,
    SweepResult,
    TuneLens,
    TuneLensResult,
    UserError,
    parse_intervention,
    parse_node,
    read_prompt_set,
    to_json,
    Composition,
    CompositionResult,
    HeadWeights,
    HeadWeightsResult,
    SINGULAR,
    Singular,
    SingularResult,
)
from sparse import FEATURE_REQUESTS, TrainSae, TrainSaeResult
from wiring import CIRCUIT_REQUESTS
from utils import settings, show_number, show_token

GRAY, GREEN, CYAN, YELLOW, RED, PURPLE = (
    "rgb(127,127,127)",
    "rgb(0,255,0)",
    "rgb(0,255,255)",
    "rgb(255,255,0)",
    "rgb(255,0,0)",
    "rgb(255,0,255)",
)


@dataclass
class Options:
    """What every analysis takes. Defaults for model, dtype and device come from .env."""

    model: str | None = None
    """zoo, a Hugging Face folder, or a hub name"""
    base_model: str | None = None
    """the architecture (and tokenizer), when the model is a folder of fine-tuned weights"""
    clean: str = "When Mary and John went to the store, John gave a drink to"
    """the prompt"""
    corrupt: str | None = None
    """the corrupted prompt"""
    answer: tuple[str, ...] = ()
    """answer tokens, with their leading space"""
    foil: tuple[str, ...] = ()
    """foil tokens"""
    bos: bool | None = None
    """BOS in front; unset, what the model was trained with"""
    set: Path | None = None
    """a .jsonl prompt set, for means; its first prompt is used when neither --answer nor --corrupt is given and --clean is left alone"""
    do: tuple[str, ...] = ()
    """interventions such as L9H9=zero "L3.mlp@-1=scale:0.5" L5.resid_pre@S2=patch"""
    base: str = "clean"
    """which prompt the interventions act on: clean or corrupt"""
    do_seed: int = 0
    """the seed of the interventions resample and noise"""
    align: str = ""
    """how to patch across prompts of unequal length: diff or labels"""
    metric: str = "logit_diff"
    pos: str = "END"
    """the metric's position: a number or a label"""
    dtype: str | None = None
    """auto, float32, bfloat16, float16"""
    device: str | None = None
    """auto, cpu, cuda, cuda:1, mps"""
    device_map: str | None = None
    sae: tuple[str, ...] = ()
    """SAEs that nodes such as L2.sae.f12 speak of: folders, zoo/NAME, RELEASE:ID"""
    sae_error: bool = True
    """keep what the SAE does not explain when one of its features is changed"""
    json: bool = False
    """print the result as JSON, and nothing else"""

    def load(self) -> Load:
        env = settings()
        ask = {"dtype": self.dtype or env.get("LOUPE_DTYPE"), "device": self.device or env.get("LOUPE_DEVICE")}
        name = self.model or env.get("LOUPE_MODEL") or "zoo"
        return Load(name, self.base_model, **{k: v for k, v in ask.items() if v}, device_map=self.device_map or env.get("LOUPE_DEVICE_MAP") or None)

    def study(self) -> Study:
        prompts = read_prompt_set(self.set) if self.set else ()
        prompt = Prompt(self.clean, self.corrupt, self.answer, self.foil, bos=self.bos)
        if prompts and prompt == Prompt(Options.clean, bos=self.bos):
            prompt = prompts[0]
        pos = int(self.pos) if self.pos.lstrip("-").isdigit() else self.pos
        return Study(
            prompt,
            tuple(parse_intervention(d) for d in self.do),
            self.base,
            Metric(self.metric, pos),
            prompts,
            self.sae,
            self.sae_error,
            self.align,
            self.do_seed,
        )


@dataclass
class RunCommand(Options):
    """The likeliest next tokens and the metric for clean, corrupted and now."""

    k: int = 10

    def request(self) -> Run:
        return Run(self.study(), self.k)


@dataclass
class LensCommand(Options):
    """Logit, tuned or Jacobian lens at points x positions; L3.attn, L3.mlp and L2H3 are points too."""

    which: str = "now"
    points: tuple[str, ...] = ()
    k: int = 5
    kind: str = "logit"
    """logit, tuned or jacobian"""
    artefact: str = ""
    """folder or file of a tuned or Jacobian lens, or its hub name; unset, the one beside the model or under its name on the hub"""
    positions: tuple[int, ...] = ()
    """limit the columns"""

    def request(self) -> Lens:
        return Lens(self.study(), self.which, self.points, self.k, self.kind, self.artefact, self.positions)


@dataclass
class TuneLensCommand(Options):
    """Fit a tuned lens: an affine map a layer, from the identity, to KL(final || lens). Interrupted, it resumes from its last checkpoint (every 50 steps)."""

    text: str = ""
    """a text file; unset, the zoo's corpus"""
    out: str = TuneLens.out
    steps: int = TuneLens.steps
    batch: int = TuneLens.batch
    length: int = TuneLens.length
    lr: float = TuneLens.lr
    seed: int = TuneLens.seed
    resume: bool = False

    def request(self) -> TuneLens:
        return TuneLens(self.text, self.out, self.steps, self.batch, self.length, self.lr, self.seed, self.resume)


@dataclass
class FitJacobianCommand(Options):
    """Fit a Jacobian lens with TransformerLens's own tool."""

    text: str = ""
    """a text file; unset, the zoo's corpus"""
    out: str = FitJacobian.out
    prompts: int = FitJacobian.prompts
    length: int = FitJacobian.length
    skip: int = FitJacobian.skip
    """positions at the start of every prompt that are left out"""
    seed: int = FitJacobian.seed

    def request(self) -> FitJacobian:
        return FitJacobian(self.text, self.out, self.prompts, self.length, self.skip, self.seed)


@dataclass
class TrainSaeCommand(Options):
    """Train a small SAE through sae_lens. Interrupted, it leaves a checkpoint: go on with --resume."""

    hook: str = TrainSae.hook
    """L2.resid_pre, L2.resid_mid, L2.resid_post, L2.attn or L2.mlp"""
    text: str = ""
    """a text file; unset, the zoo's corpus"""
    out: str = TrainSae.out
    """a new folder, for cfg.json and sae_weights.safetensors"""
    architecture: str = TrainSae.architecture
    """topk, batchtopk, standard (l1) or jumprelu"""
    features: int = TrainSae.features
    k: int = TrainSae.k
    """features active at once: exactly (topk), on average (batchtopk), or wanted (jumprelu)"""
    l1: float = TrainSae.l1
    """the sparsity coefficient of standard"""
    tokens: int = TrainSae.tokens
    """tokens to train on; a shorter text is repeated"""
    batch: int = TrainSae.batch
    length: int = TrainSae.length
    """tokens of a row of text"""
    lr: float = TrainSae.lr
    seed: int = TrainSae.seed
    resume: bool = False

    def request(self) -> TrainSae:
        how = (self.architecture, self.features, self.k, self.l1, self.tokens, self.batch, self.length, self.lr, self.seed, self.resume)
        return TrainSae(self.hook, self.text, self.out, *how)


@dataclass
class AttentionCommand(Options):
    """Attention patterns of one layer: where each head looks from the last position, or everything with --json."""

    layer: int = 0
    which: str = "now"
    weighted: bool = False
    """times the norm of what the source's value writes"""
    mean: bool = False
    """instead: the mean over --set between labelled positions, every layer"""

    def request(self) -> Attention | AttentionSet:
        return AttentionSet(self.study(), self.which) if self.mean else Attention(self.study(), self.layer, self.which, self.weighted)


@dataclass
class AttributionCommand(Options):
    """Direct logit attribution at the metric's position: every component, or one of them taken apart (--by)."""

    which: str = "now"
    by: str | None = None
    """a head (L9H9: by source position) or an MLP (L3.mlp: by neuron)"""
    mean: bool = False
    """mean and standard deviation over --set"""
    k: int = 10
    """neurons shown at each end"""

    def request(self) -> Attribution | AttributionSources | AttributionNeurons | AttributionSet:
        study = self.study()
        if self.by is None:
            return AttributionSet(study, self.which) if self.mean else Attribution(study, self.which)
        node = parse_node(self.by)
        if self.mean or node.site not in ("head", "mlp") or node.part != "z":
            raise UserError("--by takes a head (L9H9) or an MLP (L3.mlp) apart, of one prompt")
        if node.site == "head":
            return AttributionSources(study, self.which, node.layer, node.head, node.pos)
        return AttributionNeurons(study, self.which, node.layer, node.pos, self.k)


@dataclass
class DetectCommand(Options):
    """Score every head against an attention pattern, as transformer_lens.head_detector does."""

    which: str = "now"
    pattern: str = "previous_token_head"
    """previous_token_head, duplicate_token_head or induction_head"""
    cells: tuple[str, ...] = ()
    """instead of a pattern: destination,source pairs such as 14,2"""
    exclude_bos: bool = False
    exclude_current_token: bool = False
    error_measure: str = "mul"
    """mul or abs"""

    def request(self) -> Detect:
        pairs = [re.fullmatch(r"(\d+),(\d+)", c) for c in self.cells]
        if not all(pairs):
            raise UserError("--cells takes destination,source pairs of positions such as 14,2")
        cells = tuple((int(p[1]), int(p[2])) for p in pairs)
        return Detect(self.study(), self.which, self.pattern, cells, self.exclude_bos, self.exclude_current_token, self.error_measure)


@dataclass
class HeadsCommand(Options):
    """Statistics of every head, on the prompt or on random repeated tokens (--source random)."""

    which: str = "now"
    source: str = "prompt"

    def request(self) -> HeadStats:
        return HeadStats(self.study(), self.which, self.source)


@dataclass
class CheckCommand(Options):
    """The identities on a model, and of gpt2 the published figures; exits with 1 when one is off."""

    name: Annotated[str, tyro.conf.Positional] = ""
    corrupt: str | None = "When Mary and John went to the store, Alice gave a drink to"

    def load(self) -> Load:
        return replace(super().load(), model=self.name) if self.name else super().load()

    def request(self) -> Identities:
        return Identities(self.study())


@dataclass
class WeightsCommand(Options):
    """What a head's or an MLP's weights say, without a prompt."""

    head: str = "L0H0"
    """a head such as L2H3; for the views of an MLP, L2.mlp"""
    view: str = "tokens"
    """tokens (OV and QK pairs, copying score), composition, or singular directions of OV, QK, mlp_in, mlp_gate, mlp_out"""
    k: int = 10
    r: int = 5
    """number of singular directions"""
    distance: int = 0
    """destination minus source position, for rotary models"""
    mlp0: bool = False
    """take embedding plus MLP 0 of it for a token's vector"""

    def request(self) -> HeadWeights | Composition | Singular:
        node = parse_node(self.head)
        wanted = "mlp" if self.view.startswith("mlp") else "head"
        if node.site != wanted or self.view not in ("tokens", "composition", *SINGULAR):
            raise UserError(
                f"{self.head}, view {self.view}: write --head L2H3 with view tokens, composition, OV or QK, --head L2.mlp with {', '.join(n for n in SINGULAR if 'mlp' in n)}"
            )
        match self.view:
            case "tokens":
                return HeadWeights(node.layer, node.head, self.k, self.distance, self.mlp0)
            case "composition":
                return Composition(node.layer, node.head)
        return Singular(node.layer, node.head, self.view, self.r, self.k)


@dataclass
class SweepCommand(Options):
    """Patch or ablate one cell after the other; or estimate it by gradients."""

    kind: str = Sweep.kind
    """resid_pre, resid_mid, resid_post, attn, mlp, attn_mlp (by position); z, q, k, v, pattern, nodes; z_pos, cells, neurons, features, pairs, cumulative"""
    op: str = Sweep.op
    """patch, zero, mean, mean_all, resample, noise"""
    direction: str = Sweep.direction
    """denoise (clean values into the corrupted run) or noise (the reverse)"""
    effect: str = Sweep.effect
    """total or direct"""
    estimate: str = ""
    """instead of patching: atp or ig"""
    node: str = ""
    """the head of cells (L2H3), the MLP of neurons (L3.mlp), the SAE of features (L2.sae, with --sae SOURCE)"""
    nodes: tuple[str, ...] = ()
    """those of pairs, cumulative and features; unset, the k largest"""
    k: int = Sweep.k
    mean: bool = False
    """over --set, with statistics"""
    noise: float = Sweep.noise
    """standard deviations of the embedding"""
    seed: int = 0
    chunk_mb: int = 0
    """bound of the activations at once; unset, LOUPE_SWEEP_MB of .env"""
    plain: bool = False
    """whole forward passes under hooks"""
    first: str = ""
    """estimate: the largest estimated effects and the early layers first"""

    def request(self) -> Sweep | Estimate:
        study = self.study()
        if self.estimate:
            if self.op != "patch" or self.effect != "total":
                raise UserError("--estimate is of patching and its total effect")
            return Estimate(study, self.kind, self.estimate, self.direction, node=self.node, over_set=self.mean)
        return Sweep(
            study, self.kind, self.op, self.direction, self.effect, self.node, self.nodes, self.k, self.mean, self.noise, self.seed,
            chunk_mb=self.chunk_mb, plain=self.plain, first=self.first,
        )  # fmt: skip


@dataclass
class ServeCommand:
    """Answer requests on stdin and stdout, for tui.py."""


COMMANDS = {
    "run": RunCommand,
    "lens": LensCommand,
    "tune-lens": TuneLensCommand,
    "fit-jacobian": FitJacobianCommand,
    "train-sae": TrainSaeCommand,
    "attention": AttentionCommand,
    "heads": HeadsCommand,
    "attribution": AttributionCommand,
    "detect": DetectCommand,
    "check": CheckCommand,
    "weights": WeightsCommand,
    "sweep": SweepCommand,
    "serve": ServeCommand,
}


# ------------------------------------------------------------------ tables


def plain(text: str, style: str = "") -> Text:
    """Text that is never read as markup."""
    return Text(text, style)


def table(title: str, *columns: str) -> Table:
    out = Table(title=plain(title, PURPLE) if title else None, title_justify="left", box=None, pad_edge=False)
    for c in columns:
        out.add_column(plain(c, GRAY), no_wrap=True, overflow="fold")
    return out


def show_run(out: Console, r: RunResult) -> None:
    sides = {"clean": r.clean, "corrupted": r.corrupt, "now": r.now}
    for name, s in sides.items():
        if s is None or name == "now" and s is r.clean:
            continue
        out.print(plain(f"{name}: {' '.join(show_token(x) for x in s.tokens.texts)}", PURPLE))
        rows = table("", "next token", "probability", "logit")
        for i, p, z in zip(s.top_ids[-1].tolist(), s.top_probs[-1].tolist(), s.top_logits[-1].tolist()):
            rows.add_row(plain(show_token(r.texts[i])), f"{p:.4f}", f"{z:.3f}")
        out.print(rows)
    values = [f"{n} {s.metric:.4f}" for n, s in sides.items() if s is not None and s.metric is not None]
    out.print(plain("  ".join(values) + ("" if r.normalised is None else f"  normalised {r.normalised:.4f}"), CYAN))
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


def show_lens(out: Console, r: LensResult) -> None:
    answers, pair = not np.isnan(r.prob).all(), not np.isnan(r.kl_pair).all()
    place = f"position {r.positions[-1]} ({show_token(r.tokens.texts[r.positions[-1]])})"
    extra = ["KL clean || corrupted"] * pair
    rows = table(place, "point", "top token", "probability", "answer", "rank", "entropy", "KL", "logit diff", *extra, "promoted", "suppressed")
    for i, point in enumerate(r.points):
        values = [r.prob[i, -1], r.rank[i, -1]] if answers else [None, None]
        cells = [show_number(None if v is None else float(v)) for v in (*values, r.entropy[i, -1], r.kl[i, -1], r.logit_diff[i, -1])]
        cells += [show_number(float(r.kl_pair[i, -1]))] * pair
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


def show_trained(out: Console, r: TrainSaeResult) -> None:
    out.print(plain(f"SAE in {r.folder}: {r.architecture}, {r.features} features at {r.hook}, {r.tokens} tokens, {r.seconds:.0f} s", PURPLE))
    figures = {"explained variance": r.explained, "L0": r.l0, "dead": r.dead, "loss recovered": r.recovered, "loss": float(r.losses[-1])}
    out.print(plain("  ".join(f"{name} {value:.4f}" for name, value in figures.items()), CYAN))
    out.print(plain(r.convention, GRAY))


def show_jacobian(out: Console, r: FitJacobianResult) -> None:
    layers = f"layers {r.layers[0]} to {r.layers[-1]}"
    out.print(plain(f"Jacobian lens in {r.file}: {layers}, {r.prompts} prompts, changed by {r.change:.4f} with the last, {r.seconds:.0f} s", CYAN))
    out.print(plain(r.convention, GRAY))


def show_attention(out: Console, r: AttentionResult) -> None:
    rows = table(f"layer {r.layer}: where each head looks from the last position ({r.which})", "head", *(show_token(x) for x in r.tokens.texts))
    for h, p in enumerate(r.pattern[:, -1]):
        best = int(np.abs(p).argmax())
        rows.add_row(f"L{r.layer}H{h}", *(plain(f"{v:.2f}", CYAN if j == best else "") for j, v in enumerate(p.tolist())))
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


def show_cells(out: Console, cells: AttributionCells, spread: AttributionCells | None = None) -> None:
    """Heads as layers x heads, then the other cells as rows; with the spread behind a +-."""
    word = lambda a, b: show_number(float(a), 6) + ("" if spread is None else f" +-{float(b):.3f}")  # noqa: E731
    other = spread or cells
    heads = table("heads", "layer", *(f"H{h}" for h in range(cells.heads.shape[1])), "b_O", "MLP")
    for layer, row in enumerate(cells.heads):
        ends = (word(cells.attn_bias[layer], other.attn_bias[layer]), word(cells.mlps[layer], other.mlps[layer]))
        heads.add_row(f"L{layer}", *(word(a, b) for a, b in zip(row, other.heads[layer])), *ends)
    out.print(heads)
    rest = table("the rest", "part", "logit")
    for (name, value), (_, s) in zip(cells.rows(), other.rows()):
        if not re.match(r"L\d", name):
            rest.add_row(plain(name), word(value, s))
    out.print(rest)


def show_attribution(out: Console, r: AttributionResult) -> None:
    out.print(plain(f"{' '.join(show_token(x) for x in r.tokens.texts)}  at {r.pos}", PURPLE))
    show_cells(out, r.cells)
    capped = "" if r.capped is None else f"  after the cap {r.capped:.4f}"
    out.print(plain(f"sum {r.total:.4f}  logit {r.logit:.4f}  error {r.error:.1e}{capped}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_sources(out: Console, r: AttributionSourcesResult) -> None:
    rows = table(f"L{r.layer}H{r.head} at {r.pos}, by source", "", "token", "attention", "logit")
    for j, (x, p, v) in enumerate(zip(r.tokens.texts, r.pattern.tolist(), r.sources.tolist())):
        rows.add_row(str(j), plain(show_token(x)), f"{p:.3f}", show_number(v))
    out.print(rows)
    out.print(plain(f"sum {r.total:.4f}  error {r.error:.1e}  interventions {r.interventions:.4f}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_neurons(out: Console, r: AttributionNeuronsResult) -> None:
    rows = table(f"L{r.layer}.mlp at {r.pos}, by neuron", "neuron", "activation", "logit")
    for i, a, v in zip(r.index.tolist(), r.activation.tolist(), r.contribution.tolist()):
        rows.add_row(f"L{r.layer}.mlp.n{i}", show_number(a), show_number(v))
    out.print(rows)
    out.print(plain(f"the other neurons {r.rest:.4f}  b_out {r.bias:.4f}  interventions {r.interventions:.4f}  sum {r.total:.4f}  error {r.error:.1e}", CYAN))
    out.print(plain(r.convention, GRAY))


def show_attribution_set(out: Console, r: AttributionSetResult) -> None:
    show_cells(out, r.mean, r.std)
    rows = table("prompts", "prompt", "sum", "logit")
    for i, a, b in zip(r.prompts.tolist(), r.totals.tolist(), r.logits.tolist()):
        rows.add_row(plain(str(i + 1), YELLOW if i == r.worst else ""), f"{a:.4f}", f"{b:.4f}")
    out.print(rows)
    out.print(plain(f"mean {r.logits.mean():.4f}  worst prompt {r.worst + 1}  error {r.error:.1e}", CYAN))
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


def show_identities(out: Console, r: IdentitiesResult) -> None:
    rows = table("identities", "", "identity", "error", "tolerance", "")
    for i in r.rows:
        mark, style = {True: ("ok", GREEN), False: ("BROKEN", RED), None: ("n/a", GRAY)}[i.ok]
        rows.add_row(plain(mark, style), plain(i.name), show_number(i.error, 7), show_number(i.tolerance, 7), plain(i.note, GRAY))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


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


def show_sweep(out: Console, r: SweepResult) -> None:
    """Normalised values, the metric where there are none; the largest effects in words."""
    raw = bool(np.isnan(r.normalised).all())
    shown = r.values if raw else r.normalised
    if len(r.cols) <= 128:
        by_position = len(r.cols) == len(r.tokens.texts) and r.cols[0] == "0"
        heads = (f"{c} {show_token(x, 6, fill=False)}" for c, x in zip(r.cols, r.tokens.texts)) if by_position else r.cols
        rows = table("metric" if raw else "normalised metric", "", *heads)
        for name, values in zip(r.rows, shown.tolist()):
            rows.add_row(name, *(show_number(v) for v in values))
        out.print(rows)
    effect = np.abs(r.values - r.base)
    order = [i for i in np.argsort(-np.where(np.isnan(effect), -1.0, effect), axis=None, kind="stable")[:10].tolist() if not np.isnan(effect.flat[i])]
    names = [r.address(*divmod(i, len(r.cols))) or f"{r.rows[i // len(r.cols)]}, {r.cols[i % len(r.cols)]}" for i in order]
    stats = [("std", r.std), ("low", r.low), ("high", r.high), ("p", r.p)] if r.p.size else []
    rows = table("largest effects", "node", "metric", "normalised", "change", *(name for name, _ in stats))
    for name, i in zip(names, order):
        cells = [r.values.flat[i], r.normalised.flat[i], r.values.flat[i] - r.base, *(x.flat[i] for _, x in stats)]
        rows.add_row(plain(name), *(show_number(float(v), 8) for v in cells))
    out.print(rows)
    corrupt = "" if r.corrupt is None else f"  corrupted {r.corrupt:.4f}"
    out.print(plain(f"base run {r.base:.4f}  clean {r.clean:.4f}{corrupt}  {r.mechanism}", CYAN))
    if r.at_once:
        out.print(
            plain(f"{r.at_once} cells in the largest batch, peak {r.peak_mb:.1f} MB (on a GPU all that was allocated, else the batch's activations)", GRAY)
        )
    if r.warning:
        out.print(plain(r.warning, YELLOW))
    out.print(plain(r.convention, GRAY))


SHOW: dict[type, Callable] = {
    RunResult: show_run,
    LensResult: show_lens,
    TuneLensResult: show_tuned,
    TrainSaeResult: show_trained,
    FitJacobianResult: show_jacobian,
    AttentionResult: show_attention,
    AttentionSetResult: show_attention_set,
    AttributionResult: show_attribution,
    AttributionSourcesResult: show_sources,
    AttributionNeuronsResult: show_neurons,
    AttributionSetResult: show_attribution_set,
    DetectResult: show_detect,
    HeadStatsResult: show_heads,
    IdentitiesResult: show_identities,
    HeadWeightsResult: show_weights,
    CompositionResult: show_composition,
    SingularResult: show_singular,
    SweepResult: show_sweep,
}


def shower(errors: Console) -> Callable[[object], None]:
    """Prints progress: all of it on a terminal, elsewhere (a log of a batch job) a line every ten seconds."""
    last = time.monotonic()

    def show(part: object) -> None:
        nonlocal last
        if isinstance(part, Progress) and part.text and (errors.is_terminal or time.monotonic() - last >= 10):
            errors.print(plain(part.text, GRAY), soft_wrap=True)
            last = time.monotonic()

    return show


@contextmanager
def interruptible(show: Callable[[object], None]) -> Generator[Callable[[object], None]]:
    """Ctrl-C ends a fit after the step it is at, so that its checkpoint is whole; a second one ends it at once."""
    asked = []

    def note(*_) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    def between_steps(part: object) -> None:
        show(part)
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield between_steps
    finally:
        signal.signal(signal.SIGINT, before)


def main(args: list[str] | None = None) -> int:
    """0, or 1 when an identity is broken, or 2 for input that can't be used."""
    import circuit_commands
    import feature_commands

    every = COMMANDS | feature_commands.COMMANDS | circuit_commands.COMMANDS
    command = tyro.extras.subcommand_cli_from_dict(every, prog="engine.py", description="Loupe without a screen.", args=args)
    if isinstance(command, ServeCommand):
        serve()
    errors = Console(stderr=True, highlight=False)
    show = shower(errors)
    try:
        request = command.request()
        engine = Engine()
        info = engine.run(command.load(), show)
        if info.warning:
            errors.print(plain(info.warning, YELLOW), soft_wrap=True)
        if isinstance(command, circuit_commands.CircuitCommand):
            sys.stdout.write(command.text(info))
            return 0
        if isinstance(request, TuneLens | FitJacobian | TrainSae):
            with interruptible(show) as show_or_stop:
                result = engine.run(request, show_or_stop)
        else:
            result = engine.run(request, show if isinstance(request, FEATURE_REQUESTS + CIRCUIT_REQUESTS) else lambda part: None)
        if isinstance(command, circuit_commands.DiscoverCommand):
            command.finish(result)
        if isinstance(result, IdentitiesResult):
            result = replace(result, rows=result.rows + published.rows(engine, info, show))
    except UserError as error:
        errors.print(plain(str(error), RED), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print(plain("interrupted", YELLOW))
        return 130
    if command.json:
        sys.stdout.write(json.dumps(to_json(result), ensure_ascii=False, allow_nan=False) + "\n")
    else:
        out = Console(highlight=False)
        out.width = out.width if out.is_terminal else 10_000
        device = f"{info.dtype} on {info.device}"
        out.print(plain(f"{info.name}: {info.architecture}, {info.n_layers} layers x {info.n_heads} heads, d_model {info.d_model}, {device}", GRAY))
        (SHOW | feature_commands.SHOW | circuit_commands.SHOW)[type(result)](out, result)
    broken = [i for i in (*info.checks, *(result.rows if isinstance(result, IdentitiesResult) else ())) if i.ok is False]
    for i in broken:
        errors.print(plain(f"identity broken: {i.name}, error {i.error:.2g} against {i.tolerance:.2g}. {i.note}", RED), soft_wrap=True)
    return 1 if broken and isinstance(result, IdentitiesResult) else 0
