"""Features as nodes: interventions on `L8.sae.f12` become one edit for each SAE, which encodes once and changes all features that are asked for."""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.text_means import windows
from vocabulary.nodes import FROM_TEXT, Intervention, UserError
from vocabulary.requests import Progress
from model.bridge import Edit, Model, write_mid
from model.places import find_position
from model.replacements import corrupted_rows, resampled
from model.runs import NAMES, Runs
from model.sae_fit import check
from model.sae import SparseAutoencoder
from model.sae_loading import for_layer


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
                found = self.values.to(f)
                found = found if len(found) == 1 else found[places]  # one for all: of tokens behind the prompt
                new = t.where(found.isnan(), f, found)
        return new if self.pos is None else t.where(places == self.pos, new, f)


def edits(runs: Runs, group: list[Intervention]) -> Generator[Progress, None, tuple[list[Edit], tuple]]:
    """Edits for all interventions on one layer's SAE, and what names them in the cache."""
    d = yield from for_layer(runs.model, runs.study.saes, group[0].node.layer)
    if not d.passed:  # once: a set may hold a prompt that it explains less well
        check(runs, d)
    if runs.behind and d.kind == "temporal":
        raise UserError(f"{group[0]}: features of a temporal SAE depend on the tokens before: hold the interventions on the prompt (held prompt)")
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
    return write(d, changed(d, changes, None if runs.behind else places, kept)), mark


def read_change(runs: Runs, d: SparseAutoencoder, i: Intervention) -> Generator[Progress, None, tuple[Change, tuple]]:
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
                raise UserError(f"{i}: patching needs a corrupted prompt: E types one (in a shell --corrupt)")
            there, theirs = runs.partners(base), runs.rows[other].ids
            values = one(d, runs.trace(other, [d.point])[d.point][0], node.index)
            if there is not None:
                values = t.tensor([values[j] if j >= 0 else float("nan") for j in there])
                if pos is not None and values[pos].isnan():
                    raise UserError(f"{i}: this position has no partner in the other prompt: choose another, or edit the alignment")
            return make(values), (theirs, runs.study.against, there)
        case "freeze":
            return make(one(d, runs.trace(base, [d.point])[d.point][0], node.index)), row.ids
        case "resample":
            n = len(row.ids) - row.tail
            ids = resampled(runs.model, runs.study, n, row.ids[:n], runs.study.seed) + row.ids[n:]
            return make(one(d, runs.model.trace(ids, [d.point])[d.point][0], node.index)), ids
        case "mean" | "mean_all" | "mean_text" | "mean_text_pos":
            return (yield from mean(runs, d, i, make))
    raise UserError(f"{i}: a feature takes zero, scale:0.5, set:3, add:3, patch, mean, mean_all, resample or freeze")


@t.no_grad()
def one(d: SparseAutoencoder, x: Tensor, index: int) -> Tensor:
    """A feature's activation [seq] on an input [seq, ...]."""
    return t.cat([d.encode(x[p])[:, index] for p in d.pieces(len(x))]).cpu()


def mean(runs: Runs, d: SparseAutoencoder, i: Intervention, make: Callable) -> Generator[Progress, None, tuple[Change, tuple]]:
    """The feature's mean activation over the set's corrupted prompts, or a text, position by position or over all positions but the first."""
    model, seq = runs.model, len(runs.row("now").ids)
    by_position, text = i.op in ("mean", "mean_text_pos"), i.op in FROM_TEXT
    if text:
        rows = windows(model, runs.study.text, seq if by_position else None)
    else:
        rows = [r.ids for r in corrupted_rows(model, runs.study.prompt_set)]
    if by_position and runs.row("now").tail:
        raise UserError("a mean by position says nothing of the answer's own tokens, which logprob_sum reads: use mean_all, patch or zero")
    if not rows:
        raise UserError("mean ablation needs a prompt set with corrupted prompts: open one first, or ablate to zero")
    if by_position and any(len(r) != seq for r in rows):
        raise UserError(f"{i}: a mean position by position needs corrupted prompts of {seq} tokens: use mean_all or a set of one template")
    total, count = 0.0, 0
    for done, ids in enumerate(rows):
        f = one(d, model.trace(ids, [d.point])[d.point][0], i.node.index)
        total, count = total + (f if by_position else f[1:].sum()), count + (1 if by_position else len(f) - 1)
        yield Progress(done + 1, len(rows), "means over the text" if text else "means over the prompt set")
    if not count:
        raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
    return make((total / count) * t.ones(seq)), tuple(rows)


def changed(d: SparseAutoencoder, changes: list[Change], places: list[int] | None, kept: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """From the SAE's input x and what is written there, y [batch, seq, ...], what is written under the changes: y + decode(f') - decode(f), or decode(f'). At `places` (None: all)."""
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
        x, out = d.flat(x), y.clone()
        where = t.arange(y.shape[1], device=d.device) if places is None else t.tensor(places, device=d.device)
        for b in range(len(y)):
            if d.kind == "temporal":  # one position's features depend on those before it
                everywhere = t.arange(x.shape[1], device=d.device)
                parts = [rows(d.encode(x[b]), x[b], everywhere)[where]]
            else:
                mine = x[b, where]
                parts = [rows(d.encode(mine[p]), mine[p], where[p]) for p in d.pieces(len(where))]
            new = t.cat(parts).to(y).view(len(where), *y.shape[2:])
            out[b, where] = y[b, where] + new if kept else new
        return out

    return work


def write(d: SparseAutoencoder, work: Callable[[Tensor, Tensor], Tensor]) -> list[Edit]:
    """Edits that let work(x, y) say what is written; resid_mid goes through the attention's output, and gradients pass."""
    if d.out.endswith("hook_resid_mid"):
        return write_mid(d.layer, lambda mid: work(mid, mid))
    if d.point == d.out:
        return [(d.out, lambda y: work(y, y))]
    kept: dict[str, Tensor] = {}
    return [(d.point, lambda x: kept.__setitem__("x", x)), (d.out, lambda y: work(kept["x"], y))]


def sites(model: Model, sources: tuple[str, ...], layers: set[int]) -> set[tuple[str, int]]:
    """(site, layer) of what the loaded SAEs of these layers write."""
    return {(d.site_out, d.layer) for source in sources if (d := model.notes.saes.get(source)) is not None and d.layer in layers}
