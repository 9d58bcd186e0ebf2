"""The sweep over features: which ones, its table, and what the SAE would write with each at zero or as active as in the other run."""

import re
from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace

import torch as t
from torch import Tensor

from model.base_run import PatchSite
from model.bridge import Model
from model.runs import Runs, read_study
from model.sae import SparseAutoencoder
from model.sae_fit import check
from model.sae_loading import for_layer
from model.variants import Base
from techniques.features.effects import gradient, no_metric
from techniques.patching.requests import Sweep
from vocabulary.nodes import Node, UserError, parse_node
from vocabulary.requests import Progress


@dataclass(frozen=True)
class FeatureSite(PatchSite):
    """One feature at one position: a new value of what the SAE writes there. `point` is what the SAE reads."""

    feature: int = 0
    point: str = ""

    @property
    def key(self) -> tuple:
        return *super().key, self.feature

    @property
    def also(self) -> tuple[str, ...]:
        return (self.point,)


def loaded(model: Model, sources: tuple[str, ...], layer: int) -> SparseAutoencoder:
    return next(d for source in sources if (d := model.notes.saes.get(source)) is not None and d.layer == layer)


def find_nodes(model: Model, ask: Sweep) -> Generator[Progress, None, tuple[str, ...]]:
    """The features that are swept: those named, or the k of the largest attribution (of the change that the sweep makes) on the first prompt."""
    named = [parse_node(a) for a in ask.nodes]
    m = re.fullmatch(r"[Ll](\d+)\.sae", ask.node.strip())
    if not m and not named or any(n.site != "sae" or n.layer != named[0].layer or n.pos is not None for n in named):
        raise UserError("the sweep 'features' needs one SAE of the study, such as L8.sae, or some of its features without position, such as L8.sae.f12")
    if ask.op not in ("zero", "patch"):
        raise UserError(f"{ask.op}: features are swept with zero or patch")
    layer = named[0].layer if named else int(m[1])
    side = ask.study.base if ask.op != "patch" else {"denoise": "corrupt", "noise": "clean"}[ask.direction]
    prompt = ask.study.prompt_set[0] if ask.over_set and ask.study.prompt_set else ask.study.prompt
    runs = read_study(model, replace(ask.study, prompt=prompt, interventions=(), base=side))
    runs.require_first("an SAE")
    d = yield from for_layer(model, ask.study.saes, layer)
    check(runs, d)
    if not (d.site_out.startswith("resid_") or d.site_out in ("attn", "mlp")):
        raise UserError(f"{d.source} writes {d.out}: features are swept where they write the stream, attention's or the MLP's output")
    if named:
        for n in named:
            d.check_index(n.index)
        return tuple(dict.fromkeys(str(n) for n in named))
    found = largest(runs, d, side, "corrupt" if side == "clean" else "clean", ask)
    if not found:
        raise UserError(f"no feature of {d.source} fires on this prompt")
    return tuple(f"L{layer}.sae.f{i}" for i in found)


@t.no_grad()
def largest(runs: Runs, d: SparseAutoencoder, side: str, other: str, ask: Sweep) -> list[int]:
    """Features by |change of activation x decoder row x gradient|, summed over positions but the first; by |change| for a metric without gradient."""
    x = runs.trace(side, [d.point])[d.point][0]
    there = runs.partners(side) if ask.op == "patch" else None
    g = None if no_metric(runs, side) else gradient(runs, d, side).to(d.device)
    sizes = t.zeros(d.d_sae, device=d.device)
    terms = [(x, 1.0, list(range(len(x))))]
    if ask.op == "patch":
        theirs = runs.trace(other, [d.point])[d.point][0]
        where = list(range(len(x))) if there is None else there
        terms.append((theirs, -1.0, where))
    change: dict[tuple[int, int], float] = {}
    for source, sign, where in terms:
        at, index, value = d.active(source)
        back = {j: i for i, j in enumerate(where) if j >= 0}
        for p, i, v in zip(at.tolist(), index.tolist(), value.tolist()):
            if (q := back.get(p, 0)) > 0:
                change[q, i] = change.get((q, i), 0.0) + sign * v
    scale = d.scale(x)
    keys = list(change)
    for a in range(0, len(keys), 1024):
        places, index = (t.tensor(k, device=d.device) for k in zip(*keys[a : a + 1024]))
        amount = t.tensor([change[k] for k in keys[a : a + 1024]], device=d.device)
        if g is not None:
            amount = amount * (d.rows(index) * g[places]).sum(-1) * (scale[places, 0] if isinstance(scale, Tensor) else scale)
        sizes.index_add_(0, index, amount.abs())
    top = sizes.topk(min(ask.k, d.d_sae))
    return [i for i, v in zip(top.indices.tolist(), top.values.tolist()) if v > 0]


def lay_out(runs: Runs, ask: Sweep, where: Sequence[int | str]) -> tuple[tuple[str, ...], tuple[str, ...], dict, tuple[str, ...]]:
    """A row for each feature, a column for each position, or label."""
    model, at = runs.model, [runs.position("now", p) for p in where]
    nodes = [parse_node(a) for a in ask.nodes]
    d = loaded(model, ask.study.saes, nodes[0].layer)
    name = f"blocks.{d.layer}.hook_attn_out" if d.site_out == "resid_mid" else d.out
    make = lambda n, c: FeatureSite(Node(d.site_out, d.layer, pos=at[c]), name, None, n.index, d.point)  # noqa: E731
    cells = {(r, c): (make(n, c),) for r, n in enumerate(nodes) for c in range(len(at))}
    return tuple(ask.nodes), tuple(map(str, where)), cells, tuple(f"{nodes[r]}@{where[c]}" for r, c in cells)


@t.no_grad()
def new_values(spots: list[FeatureSite], base: Base, other: dict[str, Tensor], group: list[Runs], op: str, side: str) -> dict[tuple, Tensor]:
    """By feature, what the SAE would write [prompt, seq, d_out] with it at zero, or as active as in the other run; the error term kept."""
    d = loaded(base.model, group[0].study.saes, spots[0].node.layer)
    index = sorted({s.feature for s in spots})
    column = lambda x: t.cat([d.encode(x[p])[:, index] for p in d.pieces(len(x))])  # noqa: E731
    x, there = base.acts[d.point], group[0].partners(side) if op == "patch" else None
    change = []
    for b in range(len(x)):
        old = column(x[b])
        new = t.zeros_like(old)
        if op == "patch":
            theirs = column(other[d.point][b])
            new = theirs if there is None else t.stack([theirs[j] if j >= 0 else old[i] for i, j in enumerate(there)])
        change.append((new - old) * d.scale(x[b]))
    change, rows = t.stack(change), d.rows(index)
    y = base.acts[d.out]
    keys = {s.feature: s.key for s in spots}
    return {keys[i]: y + (change[:, :, n : n + 1] * rows[n]).to(y) for n, i in enumerate(index)}
