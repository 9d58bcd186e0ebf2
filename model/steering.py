"""Features as nodes: interventions on `L8.sae.f12` become one edit for each SAE, which encodes once and changes all features that are asked for."""

import re
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import torch as t
from torch import Tensor

from techniques.features.reading import check, gradient, no_metric
from techniques.patching.requests import Sweep
from vocabulary.nodes import Intervention, Node, parse_node, UserError
from vocabulary.requests import Progress
from model.bridge import Edit, Model
from model.runs import NAMES, Runs, find_position, read_study, resampled
from model.base_run import Spot
from model.variants import Base
from model.sae import LOADED, Dictionary, for_layer


@dataclass(frozen=True)
class Change:
    """One intervention: the feature, where (None: everywhere), what, and new values [seq] where they come from another run (NaN: none, left alone)."""

    index: int
    pos: int | None
    op: str
    value: float | None = None
    values: Tensor | None = None

    def __call__(self, f: Tensor, places: Tensor) -> Tensor:
        """New activations of the feature [rows] at positions [rows]."""
        match self.op:
            case "zero":
                new = t.zeros_like(f)
            case "scale":
                new = f * self.value
            case "add":
                new = f + self.value
            case "set":
                new = t.full_like(f, self.value)
            case _:
                found = self.values.to(f)[places]
                new = t.where(found.isnan(), f, found)
        return new if self.pos is None else t.where(places == self.pos, new, f)


def edits(runs: Runs, group: list[Intervention]) -> Generator[Progress, None, tuple[list[Edit], tuple]]:
    """Edits for all interventions on one layer's SAE, and what names them in the cache."""
    d = yield from for_layer(runs.model, runs.study.saes, group[0].node.layer)
    if not d.passed:  # once: a set may hold a prompt that it explains less well
        check(runs, d)
    changes, marks = [], []
    for i in group:
        d.check_index(i.node.index)
        change, mark = yield from read_change(runs, d, i)
        changes.append(change)
        marks.append(mark)
    kept = runs.study.sae_error
    row = runs.row("now")
    places = list(range(len(row.ids))) if any(c.pos is None for c in changes) else sorted({c.pos for c in changes})
    if not kept and 0 in places and not any(c.pos == 0 for c in changes):
        places.remove(0)
    mark = (" ".join(str(i) for i in group), d.key, kept, tuple(places), tuple(marks))
    return write(d, changed(d, changes, places, kept)), mark


def read_change(runs: Runs, d: Dictionary, i: Intervention) -> Generator[Progress, None, tuple[Change, tuple]]:
    """An intervention on a feature; and the tokens that its value comes from."""
    node, base = i.node, runs.study.base
    row = runs.row("now")
    pos = None if node.pos is None else find_position(node.pos, row, NAMES[base])
    make = lambda values=None: Change(node.index, pos, i.op, i.value, values)  # noqa: E731
    match i.op:
        case "zero" | "scale" | "set" | "add":
            if i.op != "zero" and i.value is None:
                raise UserError(f"{i}: {i.op} needs a number, {node}={i.op}:0.5")
            return make(), ()
        case "patch":
            other = "corrupt" if base == "clean" else "clean"
            if runs.rows[other] is None:
                raise UserError(f"{i}: patching needs a corrupted prompt: type one first")
            there, theirs = runs.partners(base), runs.rows[other].ids
            values = one(d, runs.trace(other, [d.point])[d.point][0], node.index)
            if there is not None:
                values = t.tensor([values[j] if j >= 0 else float("nan") for j in there])
                if pos is not None and values[pos].isnan():
                    raise UserError(f"{i}: this position has no partner in the other prompt: choose another, or edit the alignment")
            return make(values), theirs
        case "freeze":
            return make(one(d, runs.trace(base, [d.point])[d.point][0], node.index)), row.ids
        case "resample":
            ids = resampled(runs.model, runs.study, len(row.ids), row.ids, runs.study.seed)
            return make(one(d, runs.model.trace(ids, [d.point])[d.point][0], node.index)), ids
        case "mean" | "mean_all":
            return (yield from mean(runs, d, i, make))
    raise UserError(f"{i}: a feature takes zero, scale:0.5, set:3, add:3, patch, mean, mean_all, resample or freeze")


@t.no_grad()
def one(d: Dictionary, x: Tensor, index: int) -> Tensor:
    """A feature's activation [seq] on an input [seq, ...]."""
    return t.cat([d.encode(x[p])[:, index] for p in d.pieces(len(x))]).cpu()


def mean(runs: Runs, d: Dictionary, i: Intervention, make: Callable) -> Generator[Progress, None, tuple[Change, tuple]]:
    """The feature's mean activation over the set's corrupted prompts, position by position or over all positions but the first."""
    model, seq = runs.model, len(runs.row("now").ids)
    rows = [model.row(p.corrupt, p.bos).ids for p in runs.study.prompt_set if p.corrupt is not None]
    if not rows:
        raise UserError("mean ablation needs a prompt set with corrupted prompts: open one first, or ablate to zero")
    if i.op == "mean" and any(len(r) != seq for r in rows):
        raise UserError(f"{i}: a mean position by position needs corrupted prompts of {seq} tokens: use mean_all or a set of one template")
    total, count = 0.0, 0
    for done, ids in enumerate(rows):
        f = one(d, model.trace(ids, [d.point])[d.point][0], i.node.index)
        total, count = total + (f if i.op == "mean" else f[1:].sum()), count + (1 if i.op == "mean" else len(f) - 1)
        yield Progress(done + 1, len(rows), "means over the prompt set")
    if not count:
        raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
    return make((total / count) * t.ones(seq)), tuple(rows)


def changed(d: Dictionary, changes: list[Change], places: list[int], kept: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """From the SAE's input x and what is written there, y [batch, seq, ...], what is written under the changes: y + decode(f') - decode(f), or decode(f')."""
    index = sorted({c.index for c in changes})

    def rows(f: Tensor, x: Tensor, where: Tensor) -> Tensor:
        old = f[:, index]
        columns = list(old.unbind(1))
        for c in changes:
            j = index.index(c.index)
            columns[j] = c(columns[j], where)
        new = t.stack(columns, 1)
        if kept:
            return (new - old) @ d.rows(index) * d.scale(x)
        whole = f.clone()
        whole[:, index] = new
        return d.decode(whole, x)

    def work(x: Tensor, y: Tensor) -> Tensor:
        where = t.tensor(places, device=d.device)
        x, out = d.flat(x), y.clone()
        for b in range(len(y)):
            if d.kind == "temporal":  # one position's features depend on those before it
                everywhere = t.arange(x.shape[1], device=d.device)
                parts = [rows(d.encode(x[b]), x[b], everywhere)[where]]
            else:
                mine = x[b, where]
                parts = [rows(d.encode(mine[p]), mine[p], where[p]) for p in d.pieces(len(where))]
            new = t.cat(parts).to(y).view(len(places), *y.shape[2:])
            out[b, places] = y[b, places] + new if kept else new
        return out

    return work


def write(d: Dictionary, work: Callable[[Tensor, Tensor], Tensor]) -> list[Edit]:
    """Edits that let work(x, y) say what is written; resid_mid goes through the attention's output, and gradients pass."""
    kept: dict[str, Tensor] = {}
    keep = lambda x: kept.__setitem__("x", x)  # noqa: E731
    if d.out.endswith("hook_resid_mid"):
        block = f"blocks.{d.layer}"

        def through(a: Tensor) -> Tensor:
            mid = kept["x"] + a
            return work(mid, mid) - kept["x"]

        return [(f"{block}.hook_resid_pre", keep), (f"{block}.hook_attn_out", through)]
    if d.point == d.out:
        return [(d.out, lambda y: work(y, y))]
    return [(d.point, keep), (d.out, lambda y: work(kept["x"], y))]


def sites(model: Model, sources: tuple[str, ...], layers: set[int]) -> set[tuple[str, int]]:
    """(site, layer) of what the loaded SAEs of these layers write."""
    return {(d.site_out, d.layer) for source in sources if (d := LOADED.get(model, {}).get(source)) is not None and d.layer in layers}


# ------------------------------------------------------------------ the sweep over features


@dataclass(frozen=True)
class FeatureSpot(Spot):
    """One feature at one position: a new value of what the SAE writes there. `point` is what the SAE reads."""

    feature: int = 0
    point: str = ""

    @property
    def key(self) -> tuple:
        return *super().key, self.feature

    @property
    def also(self) -> tuple[str, ...]:
        return (self.point,)


def loaded(model: Model, sources: tuple[str, ...], layer: int) -> Dictionary:
    return next(d for source in sources if (d := LOADED[model].get(source)) is not None and d.layer == layer)


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
def largest(runs: Runs, d: Dictionary, side: str, other: str, ask: Sweep) -> list[int]:
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


def lay_out(model: Model, ask: Sweep, seq: int) -> tuple[tuple[str, ...], tuple[str, ...], dict, tuple[str, ...]]:
    """A row for each feature, a column for each position."""
    nodes = [parse_node(a) for a in ask.nodes]
    d = loaded(model, ask.study.saes, nodes[0].layer)
    name = f"blocks.{d.layer}.hook_attn_out" if d.site_out == "resid_mid" else d.out
    make = lambda n, c: FeatureSpot(Node(d.site_out, d.layer, pos=c), name, None, n.index, d.point)  # noqa: E731
    cells = {(r, c): (make(n, c),) for r, n in enumerate(nodes) for c in range(seq)}
    return tuple(ask.nodes), tuple(str(c) for c in range(seq)), cells, tuple(f"{nodes[r]}@{c}" for r, c in cells)


@t.no_grad()
def new_values(spots: list[FeatureSpot], base: Base, other: dict[str, Tensor], group: list[Runs], op: str, side: str) -> dict[tuple, Tensor]:
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
