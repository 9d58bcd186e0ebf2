"""
Direct logit attribution: what every component adds to the metric's logit difference, on the raw weights, with every norm's scale frozen.

1. `direction` is the difference of unembedding rows; `pull_back` takes it in front of a norm (gain, centring of a LayerNorm, cached scale).
2. `split` dots it with what each component wrote at one position. W_O is projected onto the direction first, so no head's vector is ever stored.
3. Drill downs split a head by source position and an MLP by neuron in the same way; the set runs `split` in batches of equal length.
"""

from collections.abc import Callable, Generator
from dataclasses import fields, replace

import numpy as np
import torch as t
from torch import Tensor

from techniques.attention.patterns import check_layer, check_which, kv_head, over_set, pattern_name, read_set, subtract
from techniques.attribution.requests import AttributionCells, AttributionNeuronsResult, AttributionResult, AttributionSetResult, AttributionSourcesResult
from vocabulary.nodes import UserError
from vocabulary.prompts import Study
from vocabulary.requests import Progress
from vocabulary.sets import left_out
from model.bridge import FINAL, Edit, Model
from model.writes import POSITION, SCALE, dot, embedding, linear_norm, post_norm, post_scales, pull_back, require_parts, require_values, to_heads, to_neurons
from model.steering import sites
from model.runs import Runs, read_study

CELLS = tuple(f.name for f in fields(AttributionCells))


# ------------------------------------------------------------------ the direction


def check_answers(runs: Runs) -> None:
    if not runs.answers:
        raise UserError("attribution needs an answer: give one (and a foil, for a logit difference)")


def check_hooks(model: Model) -> None:
    """The hook points that attribution reads; a model without one of them is an error that says which part is missing."""
    needed = {SCALE: "final norm", FINAL: "final norm"}
    for layer in range(model.info.n_layers):
        needed |= {f"blocks.{layer}.attn.hook_z": f"attention heads in layer {layer}", f"blocks.{layer}.hook_mlp_out": f"MLP in layer {layer}"}
    for name, what in needed.items():
        if name not in model.points:
            raise UserError(f"{model.info.architecture} has no {what} that can be read ({name}), and attribution needs it")
    require_parts(model)


@t.no_grad()
def direction(model: Model, answers: list[int], foils: list[int]) -> tuple[Tensor, float]:
    """Mean unembedding of the answers minus that of the foils [d_model], and the same of the unembedding's bias."""
    w, b = model.bridge.W_U, model.bridge.b_U
    u, bias = w[:, answers].float().mean(1), b[answers].cpu().double().mean().item()
    if foils:
        u, bias = u - w[:, foils].float().mean(1), bias - b[foils].cpu().double().mean().item()
    return u * model.logit_scale, bias * model.logit_scale


# ------------------------------------------------------------------ the split


def edited(runs: Runs, which: str) -> set[tuple[str, int]]:
    """(site, layer) of what the run's interventions write straight into the residual stream, or over a whole attention's output."""
    if which != "now":
        return set()
    mine = {(i.node.site, i.node.layer) for i in runs.study.interventions} | sae_sites(runs)
    return {(s, layer) for s, layer in mine if s in ("attn", "resid_pre", "resid_mid", "resid_post")}


def sae_sites(runs: Runs) -> set[tuple[str, int]]:
    """(site, layer) of what interventions on features write."""
    layers = {i.node.layer for i in runs.study.interventions if i.node.site == "sae"}
    if not layers:
        return set()
    return sites(runs.model, runs.study.saes, layers)


def factor(runs: Runs, which: str, site: str, layer: int, pos: int) -> float:
    """What is left of a part's own output at a position after interventions on its site ("attn", "mlp"): 0 when it is zeroed or replaced."""
    left = 1.0
    for i in runs.study.interventions if which == "now" else ():
        here = runs.placed(i.node).pos in (None, pos)
        if i.node.site == site and i.node.layer == layer and here:
            left *= i.value if i.op == "scale" else 0.0
    return left


def names(model: Model, sites: set[tuple[str, int]]) -> list[str]:
    """The hook points that `split` reads."""
    out = [SCALE, FINAL, embedding(model)[0], *[POSITION] * (POSITION in model.points), *post_scales(model, "attn")]
    for layer in range(model.info.n_layers):
        out += [f"blocks.{layer}.attn.hook_z", f"blocks.{layer}.hook_mlp_out"]
    for site, layer in sites:
        block = f"blocks.{layer}"
        if site == "resid_pre":
            out += [f"{block}.hook_resid_pre"] + ([f"blocks.{layer - 1}.hook_resid_post"] if layer else [])
        elif site == "resid_post":
            out += [f"{block}.hook_resid_pre", f"{block}.hook_attn_out", f"{block}.hook_resid_post"]
        else:
            out.append(f"{block}.hook_attn_out")
    return list(dict.fromkeys(out))


def drill_names(model: Model, seq: int) -> list[str]:
    """What the drill downs will ask for next, read in the same pass when that is small against the cache."""
    i = model.info
    need = i.n_layers * seq * (i.n_kv_heads * i.d_head + i.d_mlp) * t.finfo(model.dtype).bits // 8
    some = [f"blocks.{layer}.{x}" for layer in range(i.n_layers) for x in ("attn.hook_v", "mlp.hook_post")]
    return [n for n in (*some, *post_scales(model, "mlp")) if model.has(n)] if need <= model.cache.limit // 16 else []


def at(x: Tensor, pos: Tensor) -> Tensor:
    """One position of each row of [batch, seq, ...]."""
    return x.expand(len(pos), *x.shape[1:])[t.arange(len(pos), device=x.device), pos.to(x.device)]


@t.no_grad()
def split(model: Model, acts: dict[str, Tensor], u: Tensor, bias: Tensor, sites: set, left: Callable[[str, int], float]) -> dict[str, np.ndarray]:
    """
    The cells of a batch, float64: activations [batch, ...] at one position each, directions [batch, d_model]. `sites` are what interventions
    wrote (see `edited`), `left` the factor that they left of a layer's attention.
    """
    d, norm_bias = pull_back(model, model.bridge.ln_final, acts[SCALE], u)
    n, written = len(d), t.zeros(len(d), dtype=t.float64)
    heads, mlps, biases = [], [], []
    for layer in range(model.info.n_layers):
        z = acts[f"blocks.{layer}.attn.hook_z"]
        if z.ndim != 3:
            raise UserError(f"{model.info.architecture} does not split attention's output into heads, and attribution needs it")
        projected, constant = to_heads(model, layer, acts, d)
        keep = left("attn", layer)
        heads.append(keep * dot(z, projected))
        biases.append(keep * constant)
        mlps.append(dot(acts[f"blocks.{layer}.hook_mlp_out"], d))
        if ("attn", layer) in sites or ("resid_mid", layer) in sites:
            written += dot(acts[f"blocks.{layer}.hook_attn_out"], d) - heads[-1].sum(-1) - biases[-1]
    embed = dot(acts[(found := embedding(model))[0]], d) * found[1]
    position = dot(acts[POSITION], d) if POSITION in acts else t.zeros(n, dtype=t.float64)
    for site, layer in sites:
        block = f"blocks.{layer}"
        if site == "resid_pre":
            before = dot(acts[f"blocks.{layer - 1}.hook_resid_post"], d) if layer else embed + position
            written += dot(acts[f"{block}.hook_resid_pre"], d) - before
        elif site == "resid_post":
            before = sum(dot(acts[f"{block}.hook_{x}"], d) for x in ("resid_pre", "attn_out", "mlp_out"))
            written += dot(acts[f"{block}.hook_resid_post"], d) - before
    out = {"embed": embed, "position": position, "heads": t.stack(heads, 1), "mlps": t.stack(mlps, 1), "attn_bias": t.stack(biases, 1)}
    out |= {"norm_bias": norm_bias, "unembed_bias": bias, "interventions": written}
    return {k: v.double().numpy() for k, v in out.items()}


def total(cells: dict[str, np.ndarray]) -> np.ndarray:
    """The sum of the cells of each row of a batch."""
    return sum(cells[k].reshape(len(cells[k]), -1).sum(1) for k in CELLS)


@t.no_grad()
def true_logits(model: Model, last: Tensor, who: list[tuple[list[int], list[int]]]) -> dict[str, np.ndarray]:
    """The model's own logit (difference) of each row [batch, d_model] behind the final norm: before the soft cap, and after it."""
    raw = model.bridge.unembed(last.to(model.final_device)).cpu().double() * model.logit_scale
    out = {"logit": raw} | ({"capped": model.softcap * t.tanh(raw / model.softcap)} if model.softcap else {})
    diff = lambda row, a, f: (row[a].mean() - (row[f].mean() if f else 0.0)).item()  # noqa: E731
    return {k: np.array([diff(row, *w) for row, w in zip(x, who)]) for k, x in out.items()}


def one(runs: Runs, which: str, pos: int) -> dict[str, np.ndarray]:
    """Cells and logits of one run of the study, a batch of one."""
    model, sites = runs.model, edited(runs, which)
    where = t.tensor([pos])
    wanted = names(model, sites)
    found = runs.trace(which, [*wanted, *drill_names(model, len(runs.row(which).ids))])
    acts = {n: at(found[n], where) for n in wanted}
    u, bias = direction(model, runs.answers, runs.foils)
    cells = split(model, acts, u[None], t.tensor([bias], dtype=t.float64), sites, lambda site, layer: factor(runs, which, site, layer, pos))
    return cells | true_logits(model, acts[FINAL], [(runs.answers, runs.foils)])


def finite(what: str, *values: object) -> None:
    if not all(np.isfinite(v).all() for v in values):
        raise UserError(f"{what} is not finite: load the model in float32")


def to_cells(model: Model, cells: dict[str, np.ndarray]) -> AttributionCells:
    """Of one row: scalars as floats, maps as fp32 arrays."""
    out = {k: v.astype(np.float32) if np.ndim(v) else float(v) for k, v in cells.items() if k in CELLS}
    return AttributionCells(**out | ({} if POSITION in model.points else {"position": None}))


def convention(runs: Runs, which: str, pos: int | str, *more: str) -> str:
    model = runs.model
    what = "mean logit of the answers minus mean logit of the foils" if runs.foils else "mean logit of the answers (no foil)"
    norm = "LayerNorm, centred on the fly" if linear_norm(model, model.bridge.ln_final).centred else "RMSNorm without centring"
    post = "; heads and neurons through the frozen norm after them" if post_norm(model, 0, "attn") else ""
    parts = [f"direct attribution to the {what}, at {pos}, {which}", f"final scale frozen at this run's: {norm}{post}"]
    parts += [f"before the soft cap {model.softcap:g}"] if model.softcap else []
    parts += ["raw weights (value biases b_V inside the heads)", *more, model.info.dtype, runs.convention]
    if "now" in which and any(i.node.site in ("attn", "mlp") for i in runs.study.interventions):
        parts.append("heads under a replaced attention add nothing, what was written there counts as interventions; a replaced MLP or embedding in its own row")
    return ", ".join(p for p in parts if p)


def setup(runs: Runs, which: str, pos: int | str | None) -> tuple[tuple[str, ...], list[int], int | str]:
    """The runs that are read (two for a difference), the position in each, and the position as it was named."""
    check_which(which)
    check_answers(runs)
    check_hooks(runs.model)
    named = runs.study.metric.pos if pos is None else pos
    sides = runs.sides(which)
    return sides, [runs.place(s, pos) for s in sides], named


def attribution(runs: Runs, which: str, pos: int | str | None = None) -> AttributionResult:
    """Every component's part of the logit (difference) at a position, of a run or a difference of two."""
    sides, places, named = setup(runs, which, pos)
    found = subtract([one(runs.at(s), s, p) for s, p in zip(sides, places)])
    finite("the attribution", *found.values())
    row, whole = {k: v[0] for k, v in found.items()}, float(total(found)[0])
    logit, capped = float(row["logit"]), float(row["capped"]) if "capped" in row else None
    answers, foils = tuple(runs.answers), tuple(runs.foils)
    words = convention(runs, which, named)
    return AttributionResult(runs.row(sides[0]), which, places[0], to_cells(runs.model, row), whole, logit, capped, abs(whole - logit), answers, foils, words)


# ------------------------------------------------------------------ drill downs


def frozen(runs: Runs, which: str, pos: int, layer: int, part: str, more: list[str]) -> tuple[dict[str, Tensor], Tensor, float]:
    """What a drill down reads: activations, the direction at heads' z [head, d_head] or at neurons [d_mlp], and what biases behind them add along it."""
    model = runs.model
    post = post_norm(model, layer, part)
    acts = runs.trace(which, [SCALE, *([post[1]] if post else []), *more])
    here = {n: at(acts[n], t.tensor([pos])) for n in (SCALE, *([post[1]] if post else []))}
    u, _ = direction(model, runs.answers, runs.foils)
    d, _ = pull_back(model, model.bridge.ln_final, here[SCALE], u[None])
    at_part, constant = (to_heads if part == "attn" else to_neurons)(model, layer, here, d)
    return acts, at_part[0], constant.item()


@t.no_grad()
def head_sources(runs: Runs, which: str, layer: int, head: int, pos: int) -> dict[str, np.ndarray]:
    model, block = runs.model, f"blocks.{layer}.attn"
    acts, d, _ = frozen(runs, which, pos, layer, "attn", [f"{block}.hook_z", f"{block}.hook_v", pattern_name(layer)])
    z, v = acts[f"{block}.hook_z"][0, pos, head].float(), acts[f"{block}.hook_v"][0, :, kv_head(model, head)].float()
    pattern = acts[pattern_name(layer)][0, head, pos].float()
    projected = d[head].to(z.device)
    keep = factor(runs, which, "attn", layer, pos)
    sources, whole = keep * (pattern * (v @ projected)).cpu().double(), keep * dot(z, projected)
    moved = which == "now" and any(
        i.node.site == "head" and i.node.part == "z" and (i.node.layer, i.node.head) == (layer, head) for i in runs.study.interventions
    )
    moved = moved or which == "now" and ("z", layer) in sae_sites(runs)
    written = whole - sources.sum() if moved else t.zeros((), dtype=t.float64)
    return {"sources": sources.numpy(), "pattern": pattern.cpu().numpy(), "total": whole.item(), "interventions": written.item()}


def sources(runs: Runs, which: str, layer: int, head: int, pos: int | str | None = None) -> AttributionSourcesResult:
    """A head's row by source position."""
    sides, places, named = setup(runs, which, pos)
    model = runs.model
    check_layer(model, layer)
    if not 0 <= head < model.info.n_heads:
        raise UserError(f"there is no head {head}: the model has heads 0 to {model.info.n_heads - 1}")
    model.point(f"blocks.{layer}.attn.hook_v")
    require_values(model)
    found = subtract([head_sources(runs.at(s), s, layer, head, p) for s, p in zip(sides, places)])
    finite("the attribution", *found.values())
    error = abs(found["total"] - found["sources"].sum() - found["interventions"])
    group = f"value of kv head {kv_head(model, head)}" if model.info.n_kv_heads < model.info.n_heads else ""
    words = convention(runs, which, named, f"L{layer}H{head} by source: pattern x value (with b_V) through W_O", group)
    return AttributionSourcesResult(
        runs.row(sides[0]), which, layer, head, kv_head(model, head), places[0],
        found["sources"].astype(np.float32), found["pattern"].astype(np.float32), found["interventions"], found["total"], float(error), words,
    )  # fmt: skip


@t.no_grad()
def neuron_parts(runs: Runs, which: str, layer: int, pos: int) -> dict[str, np.ndarray]:
    """Every neuron's activation and contribution [d_mlp]: W_out is projected onto the direction, no neuron's vector is stored."""
    model, block = runs.model, f"blocks.{layer}"
    acts, d, constant = frozen(runs, which, pos, layer, "mlp", [f"{block}.mlp.hook_post", f"{block}.hook_mlp_out"])
    post = acts[f"{block}.mlp.hook_post"][0, pos].float()
    keep = factor(runs, which, "mlp", layer, pos)
    contribution, bias = keep * (post * d.to(post.device)).cpu().double(), keep * constant
    u, _ = direction(model, runs.answers, runs.foils)
    behind, _ = pull_back(model, model.bridge.ln_final, acts[SCALE][0, pos][None], u[None])
    whole = dot(acts[f"{block}.hook_mlp_out"][0, pos][None], behind).item()
    moved = which == "now" and (any((i.node.site, i.node.layer) == ("mlp", layer) for i in runs.study.interventions) or ("mlp", layer) in sae_sites(runs))
    written = whole - contribution.sum().item() - bias if moved else 0.0
    return {"activation": post.cpu().numpy(), "contribution": contribution.numpy(), "bias": bias, "total": whole, "interventions": written}


def neurons(runs: Runs, which: str, layer: int, pos: int | str | None = None, k: int = 10) -> AttributionNeuronsResult:
    """An MLP's row by neuron: the top k and the bottom k."""
    sides, places, named = setup(runs, which, pos)
    model = runs.model
    check_layer(model, layer)
    if k < 1:
        raise UserError("k must be at least 1")
    model.point(f"blocks.{layer}.mlp.hook_post")
    found = subtract([neuron_parts(runs.at(s), s, layer, p) for s, p in zip(sides, places)])
    finite("the attribution", *found.values())
    c = found["contribution"]
    order = np.argsort(-c, kind="stable")
    order = order if len(order) <= 2 * k else np.concatenate([order[:k], order[-k:]])
    rest = float(c.sum() - c[order].sum())
    error = abs(found["total"] - c.sum() - found["bias"] - found["interventions"])
    words = convention(runs, which, named, f"L{layer}.mlp by neuron: activation x (W_out . direction), top and bottom {k} of {len(c)}")
    return AttributionNeuronsResult(
        runs.row(sides[0]), which, layer, places[0], order.astype(np.int32), found["activation"][order].astype(np.float32),
        c[order].astype(np.float32), rest, found["bias"], found["interventions"], found["total"], float(error), words,
    )  # fmt: skip


# ------------------------------------------------------------------ the prompt set


def attribution_set(model: Model, study: Study, which: str, pos: int | str | None = None) -> Generator[Progress, None, AttributionSetResult]:
    """Mean and spread of every cell over the prompts of the set that have answers, in batches of equal length."""
    check_which(which)
    check_hooks(model)
    named = study.metric.pos if pos is None else pos
    members = [(i, p) for i, p in read_set(study) if p.answers]
    if not members:
        raise UserError("no prompt of the set has an answer, and attribution needs one")

    def work(group: list[Runs], side: str, ids: Tensor, edits: list[Edit]) -> list[dict[str, np.ndarray]]:
        model, places = group[0].model, t.tensor([r.place(side, pos) for r in group])
        sites = edited(group[0], side)
        got: dict[str, Tensor] = {}
        grab = lambda name: (name, lambda x: got.__setitem__(name, at(x.detach(), places)))  # noqa: E731
        model.forward(ids, edits=[*edits, *(grab(n) for n in names(model, sites))])
        both = [direction(model, r.answers, r.foils) for r in group]
        left = lambda site, layer: factor(group[0], side, site, layer, int(places[0]))  # noqa: E731
        cells = split(model, got, t.stack([u for u, _ in both]), t.tensor([b for _, b in both], dtype=t.float64), sites, left)
        cells |= true_logits(model, got[FINAL], [(r.answers, r.foils) for r in group])
        return [{k: v[j] for k, v in cells.items()} for j in range(len(group))]

    check = lambda r, side: r.place(side, pos)  # noqa: E731
    members, found, left = yield from over_set(model, study, members, which, check, work, "attribution over the prompt set")
    stacked = {k: np.stack([row[k] for row in found]) for k in found[0]}
    finite("the attribution", *stacked.values())
    totals, logits, used = total(stacked), stacked["logit"], np.array([i for i, _ in members], np.int32)
    first = read_study(model, replace(study, prompt=members[0][1], interventions=()))
    n = len(used)
    words = convention(replace(first, study=replace(study, prompt=members[0][1])), which, named, f"mean and standard deviation over {n} prompts of the set")
    words = "; ".join(filter(None, (words, left_out(left, len(study.prompt_set)))))
    return AttributionSetResult(
        which, to_cells(model, {k: v.mean(0) for k, v in stacked.items()}), to_cells(model, {k: v.std(0) for k, v in stacked.items()}), used,
        totals, logits, stacked.get("capped", np.zeros(0)), int(used[logits.argmin()]), float(np.abs(totals - logits).max()), words,
    )  # fmt: skip
