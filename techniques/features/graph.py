"""
What makes a feature fire, by the features of an earlier SAE: linear, with attention patterns and norm scales frozen and MLPs as rows of their own.

A target's pre-activation is a direction in the stream. It is carried back, layer by layer: along the skip connection, and through each attention to
the values of its source tokens. Where the earlier SAE writes, its features share what arrives; the rest is rows, and all of it adds up to the target.
"""

from dataclasses import dataclass, field

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, Edit, Keep, Model
from model.runs import Runs
from model.sae import SparseAutoencoder
from model.steering import Change, changed, write
from model.writes import SCALE, frozen_norm, linear_norm, post_norm, pre_norm, pull_back, require_parts, require_values, to_heads
from techniques.attribution.logits import direction, true_logits
from techniques.features.effects import check_run, stream_reader
from techniques.features.requests import CheckEdge, CheckEdgeResult, FeatureGraph, FeatureGraphResult
from vocabulary.nodes import UserError

STAGES = {"pre": 0, "attn": 1, "z": 1, "mid": 2, "mlp": 3, "post": 4}
READS = {"pre": "hook_resid_pre", "attn": "hook_attn_out", "z": "attn.hook_z", "mid": "hook_resid_mid", "post": "hook_resid_post"}


@dataclass(frozen=True)
class Target:
    """A feature (or the metric, -1) at a position: where it is read from the stream, its direction there, the constant beside it, and its value."""

    index: int
    pos: int
    layer: int
    place: str
    w: Tensor
    constant: float
    value: float


def stage(d: SparseAutoencoder) -> tuple[int, int]:
    """Where an SAE writes, in the order of the forward pass."""
    site = d.site_out.removeprefix("resid_")
    if site not in STAGES:
        raise UserError(f"{d.source} writes {d.out}, which is not added to the stream: take an SAE of the stream, attention, an MLP, or a transcoder")
    return d.layer, STAGES[site]


@t.no_grad()
def find_target(runs: Runs, up: SparseAutoencoder, down: SparseAutoencoder, ask: FeatureGraph | CheckEdge) -> Target:
    check_run(runs, ask.which)
    model, which = runs.model, ask.which
    require_parts(model)
    require_values(model)
    pos = runs.place(which, ask.pos)
    if ask.target < 0:
        if not runs.answers:
            raise UserError("the metric's logit difference needs an answer: give one, or take a feature as the target")
        acts = runs.trace(which, [SCALE, FINAL])
        u, bias = direction(model, runs.answers, runs.foils)
        w, constant = pull_back(model, model.bridge.ln_final, acts[SCALE][0, pos][None], u[None])
        value = float(true_logits(model, acts[FINAL][:1, pos], [(runs.answers, runs.foils)])["logit"][0])
        target = Target(-1, pos, model.info.n_layers - 1, "post", w[0], constant.item() + bias, value)
    else:
        down.check_index(ask.target)
        x = runs.trace(which, [down.point])[down.point][0, pos]
        reader = down.reader(ask.target, x)
        if reader is None:
            raise UserError(f"{down.source}: a {down.kind} SAE's features have no linear pre-activation")
        spot = stream_reader(runs, down, which, reader[0], pos)
        if spot is None:
            raise UserError(f"{down.source} reads {down.point}, behind an MLP: no linear path leads there. Take an SAE of the stream or a transcoder")
        value = (down.flat(x).double() @ reader[0].double()).item() + reader[1]
        target = Target(ask.target, pos, down.layer, spot[0], spot[1], reader[1] + spot[2], value)
    if stage(up) >= (target.layer, STAGES[target.place] if target.index >= 0 else 5):
        raise UserError(f"{up.source} writes at or after what the target reads: the earlier SAE comes first (up), the later one second (down)")
    return target


@dataclass
class Shares:
    """Coefficients on what the earlier SAE writes [seq, d_out], and the rows beside it."""

    here: Tensor | None = None
    rows: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, value: float) -> None:
        self.rows[name] = self.rows.get(name, 0.0) + value


def dot(a: Tensor, b: Tensor) -> float:
    return (a.double() * b.to(a.device).double()).sum().item()


@t.no_grad()
def carry_back(runs: Runs, which: str, up: SparseAutoencoder, target: Target) -> Shares:
    """The target's direction from where it is read back to what the earlier SAE writes (and, when that is one part among others, to the embeddings)."""
    model, seq = runs.model, len(runs.row(which).ids)
    shares, whole = Shares(), up.site_out.startswith("resid_")
    runs.trace(which, frozen_names(model, range(up.layer if whole else 0, target.layer + 1)))  # in one pass
    shares.add("biases", target.constant)
    g = t.zeros(seq, model.info.d_model, device=target.w.device)
    heads = None
    if target.place == "z":
        heads = t.zeros(seq, target.w.numel(), device=target.w.device)
        heads[target.pos] = target.w
    else:
        g[target.pos] = target.w
    for layer in range(target.layer, -1, -1):
        block, last = f"blocks.{layer}", layer == target.layer
        if not last or target.place == "post":
            if (up.site_out, up.layer) == ("resid_post", layer):
                shares.here = g
                return shares
            if (up.site_out, up.layer) == ("mlp", layer):
                shares.here = g
            else:
                shares.add("MLPs", dot(g, runs.trace(which, [f"{block}.hook_mlp_out"])[f"{block}.hook_mlp_out"][0]))
        if not last or target.place in ("post", "mid"):
            if (up.site_out, up.layer) == ("resid_mid", layer):
                shares.here = g
                return shares
        if not last or target.place != "pre":
            through = through_attention(runs, which, up, layer, g, heads, shares)
            g = through if last and target.place in ("attn", "z") else g + through
            heads = None
        if (up.site_out, up.layer) == ("resid_pre", layer):
            shares.here = g
            return shares
    assert not whole and shares.here is not None
    shares.add("embeddings", dot(g, runs.trace(which, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"][0]))
    return shares


def through_attention(runs: Runs, which: str, up: SparseAutoencoder, layer: int, g: Tensor, heads: Tensor | None, shares: Shares) -> Tensor:
    """Coefficients [seq, d_model] on a layer's input, from those on its attention's output (or on its heads' z), patterns and scales frozen."""
    model, block = runs.model, runs.model.bridge.blocks[layer]
    name, attn, post = f"blocks.{layer}", block.attn, post_norm(runs.model, layer, "attn")
    if heads is None and (up.site_out, up.layer) == ("attn", layer):
        shares.here = g
        return t.zeros_like(g)
    before = pre_norm(model, layer, "attn")
    names = [f"{name}.attn.hook_pattern", *(x[1] for x in (before, post) if x)]
    acts = {n: x[0].float() for n, x in runs.trace(which, names).items()}
    if heads is None:
        z, constant = to_heads(model, layer, acts, g)
        shares.add("biases", constant.sum().item())
        if (up.site_out, up.layer) == ("z", layer):
            shares.here = z.flatten(1)
            return t.zeros_like(g)
    else:
        z = heads.view(len(heads), model.info.n_heads, -1)
    v = t.einsum("hds,dhe->she", acts[names[0]].to(z.device), z)
    w = attn.W_V.float()
    if len(w) != v.shape[1]:
        v = v.view(len(v), len(w), -1, v.shape[-1]).sum(2)
    b = attn.b_V
    if b is not None:
        b = b.float() if b.numel() == v[0].numel() else b.float().view(len(w), -1, v.shape[-1])[:, 0]
        shares.add("biases", dot(v, b.view(v.shape[1:]).expand_as(v)))
    back = t.einsum("she,hme->sm", v, w)
    if before is not None:
        back, constant = pull_back(model, before[0], acts[before[1]], back)
        shares.add("biases", constant.sum().item())
    return back.to(g.device)


@t.no_grad()
def contributions(runs: Runs, which: str, up: SparseAutoencoder, here: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every active feature of the earlier SAE: position, index, activation, and its share of the target."""
    x = runs.trace(which, [up.point])[up.point][0]
    where, index, value = up.active(x)
    scale = up.scale(x)
    gain = scale[where, 0] if isinstance(scale, Tensor) else scale
    here, parts = here.to(up.device), [t.zeros(0, device=up.device)]
    for i in range(0, len(index), 1024):
        piece = slice(i, i + 1024)
        parts.append((up.rows(index[piece]) * here[where[piece]]).sum(-1))
    return where, index, value, t.cat(parts) * value * gain


@t.no_grad()
def graph(runs: Runs, up: SparseAutoencoder, down: SparseAutoencoder, target: Target, ask: FeatureGraph) -> FeatureGraphResult:
    """The k largest edges into the target; everything else is rows, and the sum is the target's pre-activation (or logit difference)."""
    if ask.k < 1:
        raise UserError("k must be at least 1")
    which = ask.which
    shares = carry_back(runs, which, up, target)
    where, index, value, share = contributions(runs, which, up, shares.here)
    acts = runs.trace(which, [up.point, up.out])
    x, y = acts[up.point][0], up.flat(acts[up.out][0])
    here, offset = shares.here.to(up.device), up.offset(x)
    whole = up.reconstruct(x)
    shares.add(f"error of {up.source}", dot(here, y - whole))
    shares.add(f"bias of {up.source}", dot(here, offset))
    order = share.abs().argsort(descending=True, stable=True)
    top, rest = order[: ask.k], share[order[ask.k :]].double().sum().item()
    total = share.double().sum().item() + sum(shares.rows.values())
    if which == "now" and runs.study.interventions:
        shares.add("interventions", target.value - total)
        total = target.value
    pick = lambda a, kind: a[top].cpu().numpy().astype(kind)  # noqa: E731
    return FeatureGraphResult(
        up.info, down.info, runs.row(which), target.index, target.pos, target.value, pick(index, np.int32), pick(where, np.int32),
        pick(value, np.float32), pick(share, np.float32), rest, shares.rows, total, abs(total - target.value), words(runs, up, down, target, which),
    )  # fmt: skip


def words(runs: Runs, up: SparseAutoencoder, down: SparseAutoencoder, target: Target, which: str) -> str:
    what = (
        f"pre-activation of {down.source} feature {target.index}"
        if target.index >= 0
        else "logit difference" + " before the soft cap" * bool(runs.model.softcap)
    )
    parts = [
        f"{what} at position {target.pos}, {which}, by the features of {up.source}",
        "linear: attention patterns, norm scales and MLP outputs frozen"
        + ("" if up.site_out.startswith("resid_") else "; paths beside this SAE end at the embeddings"),
        f"views {up.view} and {down.view}" if target.index >= 0 else f"view {up.view}",
        runs.model.info.dtype,
        runs.convention,
    ]
    return ", ".join(p for p in parts if p)


# ------------------------------------------------------------------ one edge, by intervention


def frozen_names(model: Model, layers: range) -> list[str]:
    names = [f"blocks.{layer}.{n}" for layer in layers for n in ("attn.hook_pattern", "hook_mlp_out")]
    return names + [found[1] for layer in layers for near in (pre_norm, post_norm) if (found := near(model, layer, "attn"))]


def freeze(runs: Runs, which: str) -> list[Edit]:
    """Edits that hold attention patterns, MLP outputs and the norms' scales at a run's values."""
    model, names = runs.model, frozen_names(runs.model, range(runs.model.info.n_layers))
    acts = runs.trace(which, names)
    edits = [(n, lambda x, n=n: acts[n]) for n in names if not n.endswith("hook_scale")]
    for layer in range(model.info.n_layers):
        for norm, scale in filter(None, (near(model, layer, "attn") for near in (pre_norm, post_norm))):
            edits += frozen_at(model, norm, scale.removesuffix("hook_scale"), acts[scale])
    return edits


def frozen_at(model: Model, norm: t.nn.Module, name: str, scale: Tensor) -> list[Edit]:
    """A norm that puts out what it would at a fixed scale. Not by a write at its scale: the Bridge then makes its output from the weight as it is stored, which is not every class's gain."""
    came, bias = Keep(), linear_norm(model, norm).bias

    def out(x: Tensor) -> Tensor:
        linear = frozen_norm(model, norm, scale, came.x)
        return linear if bias is None else linear + bias.to(linear)

    return [(f"{name}hook_in", came), (f"{name}hook_out", out)]


@t.no_grad()
def edge(runs: Runs, up: SparseAutoencoder, down: SparseAutoencoder, target: Target, ask: CheckEdge) -> CheckEdgeResult:
    """The earlier feature set to zero at one position: what the target loses with everything else frozen (the graph's claim), and in truth."""
    model, which, row = runs.model, ask.which, runs.row(ask.which)
    up.check_index(ask.feature)
    if not 0 <= ask.at < len(row.ids):
        raise UserError(f"position {ask.at} is outside the prompt, which has {len(row.ids)} tokens")
    where, index, _, share = contributions(runs, which, up, carry_back(runs, which, up, target).here)
    mine = (where == ask.at) & (index == ask.feature)
    if not mine.any():
        raise UserError(f"feature {ask.feature} of {up.source} does not fire at position {ask.at}: choose one of the graph's edges")
    without = write(up, changed(up, [Change(ask.feature, ask.at, "zero")], [ask.at], True))
    edits = runs.edits if which == "now" else []
    ids, read = t.tensor([row.ids]), f"blocks.{target.layer}.{READS[target.place]}"
    flat = lambda x: x[0, target.pos].flatten().double()  # noqa: E731
    before = runs.trace(which, [read])[read]
    frozen = model.forward(ids, [read], [*edits, *freeze(runs, which), *without], keep=None)[1][read]
    lost = ((flat(before) - flat(frozen)) @ target.w.double().to(before.device)).item()
    if target.index < 0:
        last = model.forward(ids, [FINAL], [*edits, *without], keep=None)[1][FINAL][:1, target.pos]
        after = float(true_logits(model, last, [(runs.answers, runs.foils)])["logit"][0])
    else:
        x = model.forward(ids, [down.point], [*edits, *without], keep=None)[1][down.point][0, target.pos]
        w, bias = down.reader(target.index, x)
        after = (down.flat(x).double() @ w.double()).item() + bias
    note = "frozen: patterns, norm scales and MLP outputs held at the run's; total: everything recomputed, the target's own norm too"
    return CheckEdgeResult(
        share[mine].double().sum().item(),
        lost,
        target.value - after,
        target.value,
        after,
        f"{words(runs, up, down, target, which)}; f{ask.feature} at {ask.at} to zero; {note}",
    )
