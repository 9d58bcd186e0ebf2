"""Interventions: from nodes and operations to edits on hook points, and the runs (clean, corrupted, now) that every analysis reads."""

import hashlib
import zlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch as t
from torch import Tensor

from vocabulary import alignment as align
from vocabulary.nodes import Node, OPS, SITES, UserError
from vocabulary.prompts import METRICS, Prompt, RUNS, Study, TokenRow
from vocabulary.requests import Progress
from model.bridge import Edit, Model
from model.memory import in_chunks

BATCH = 32
NAMES = {"clean": "the clean prompt", "corrupt": "the corrupted prompt", "now": "the prompt"}


def hook_name(model: Model, node: Node) -> str:
    """The hook point a node lives at; nodes outside the model are errors."""
    i = model.info
    if node.site not in SITES:
        raise UserError(f"{node.site!r} is not a site: use one of {', '.join(SITES)}")
    if node.site == "sae":
        raise UserError(f"{node} is a feature of an SAE: it can be acted on as an intervention and in the sweep `features`, and not here")
    if node.site == "embed":
        return "hook_embed"
    if node.layer is None or not 0 <= node.layer < i.n_layers:
        raise UserError(f"{node}: the model has layers 0 to {i.n_layers - 1}")
    if node.site == "head" and (node.head is None or not 0 <= node.head < i.n_heads):
        raise UserError(f"{node}: the model has heads 0 to {i.n_heads - 1}")
    if node.site == "neuron" and (node.index is None or not 0 <= node.index < i.d_mlp):
        raise UserError(f"{node}: the model has neurons 0 to {i.d_mlp - 1}")
    if node.site == "resid_mid" and model.parallel:
        raise UserError(f"{node}: {i.architecture} adds attention and MLP in parallel, so there is no resid_mid; use resid_pre or resid_post")
    match node.site:
        case "head":
            name = f"blocks.{node.layer}.attn.hook_{node.part}"
        case "neuron":
            name = f"blocks.{node.layer}.mlp.hook_post"
        case "attn" | "mlp":
            name = f"blocks.{node.layer}.hook_{node.site}_out"
        case _:
            name = f"blocks.{node.layer}.hook_{node.site}"
    model.point(name)
    return name


def find_position(pos: int | str, row: TokenRow, what: str) -> int:
    """A position as an index: a label, an int, a negative int from the end."""
    if isinstance(pos, str):
        if pos not in row.labels:
            raise UserError(f"{what} has no position labelled {pos!r}: it has {', '.join(row.labels)}")
        return row.labels[pos]
    n = len(row.ids)
    if not -n <= pos < n:
        raise UserError(f"position {pos} is outside {what}, which has {n} tokens (0 to {n - 1}, or -{n} to -1)")
    return pos % n


def where(model: Model, node: Node, row: TokenRow, what: str) -> tuple:
    """The node's index into its hook point's tensor [batch, seq, ...]; for patterns [batch, head, destination, source]."""
    pos = slice(None)
    if node.pos is not None:
        p = find_position(node.pos, row, what)
        pos = slice(p, p + 1)
    match node.site:
        case "head" if node.part == "pattern":
            return slice(None), node.head, pos
        case "head":
            grouped = node.part in ("k", "v")
            return slice(None), pos, node.head // (model.info.n_heads // model.info.n_kv_heads) if grouped else node.head
        case "neuron":
            return slice(None), pos, node.index
    return slice(None), pos


def means(model: Model, prompts: tuple[Prompt, ...], names: Iterable[str], op: str, seq: int) -> Generator[Progress, None, dict[str, Tensor]]:
    """
    Means of hook points over the corrupted prompts of a set: position by position (equal lengths needed), or over all positions but the first.
    Kept in the cache; the set runs in batches of prompts of equal length.
    """
    texts = [p.corrupt for p in prompts if p.corrupt is not None]
    if not texts:
        raise UserError("mean ablation needs a prompt set with corrupted prompts: open one first, or ablate to zero")
    rows = [model.row(p.corrupt, p.bos).ids for p in prompts if p.corrupt is not None]
    if too_long := [len(r) for r in rows if not 0 < len(r) <= model.info.n_ctx]:
        raise UserError(f"a corrupted prompt of the set has {too_long[0]} tokens and the context holds {model.info.n_ctx}")
    if op == "mean" and (other := sorted({len(r) for r in rows} - {seq})):
        raise UserError(
            f"a mean position by position needs corrupted prompts as long as the prompt: it has {seq} tokens and the set has some with {other[0]};"
            " use mean_all or a set of one template"
        )
    if op == "mean_all" and max(len(r) for r in rows) < 2:
        raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
    key = set_key(rows)
    out = {n: v for n in names if (v := model.cache.get((key, (op,), n))) is not None}
    wanted = [n for n in dict.fromkeys(names) if n not in out]
    if not wanted:
        return out
    sums, count, done = dict.fromkeys(wanted, 0.0), 0, 0
    for length in sorted({len(r) for r in rows}):
        same = [r for r in rows if len(r) == length]
        if op == "mean_all" and length < 2:
            continue

        def work(start: int, stop: int, same: list = same) -> tuple[int, dict[str, Tensor]]:
            return stop - start, model.forward(t.tensor(same[start:stop]), wanted)[1]

        for part in in_chunks(len(same), BATCH, work):
            if isinstance(part, Progress):
                yield part
                continue
            n, got = part
            for name in wanted:
                x = got[name].float()
                sums[name] = sums[name] + (x.sum(0, keepdim=True) if op == "mean" else x[:, 1:].sum((0, 1)))
            count += n * (1 if op == "mean" else length - 1)
            done += n
            yield Progress(done, len(rows), "means over the prompt set")
    for name in wanted:
        out[name] = (sums[name] / count).to(model.dtype)
        out[name] = out[name] if op == "mean" else out[name][None, None]
        model.cache.put((key, (op,), name), out[name])
    return out


def resampled(model: Model, study: Study, length: int, own: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Token ids of another corrupted prompt of the set, as long as the prompt and not its own, drawn with the seed (and the prompt's place in the set)."""
    rows = [model.row(p.corrupt, p.bos).ids for p in study.prompt_set if p.corrupt is not None and p != study.prompt]
    rows = [r for r in rows if len(r) == length and r != own]
    if not rows:
        raise UserError(f"resample ablation needs a prompt set with another corrupted prompt of {length} tokens: open one, or ablate to zero")
    return rows[np.random.default_rng((seed, place_in_set(study))).integers(len(rows))]


def place_in_set(study: Study) -> int:
    """Where the study's prompt stands in its set; 0 where it does not."""
    return study.prompt_set.index(study.prompt) if study.prompt in study.prompt_set else 0


def gaussian(shape: tuple[int, ...], key: tuple) -> Tensor:
    """Standard Gaussian noise, the same for the same key on every machine."""
    return t.randn(shape, generator=t.Generator().manual_seed(zlib.crc32(repr(key).encode())))


@t.no_grad()
def noise_scale(model: Model) -> float:
    """The standard deviation of token embeddings, over (at most) 4096 random tokens."""
    return model.bridge.embed(model.random_ids(4096).to(model.device)).float().std().item()


def edit(spot: tuple, op: str, factor: float | None, value: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that returns the tensor with one spot replaced; its input stays as it was."""

    def apply(x: Tensor) -> Tensor:
        new = x.clone()
        match op:
            case "zero":
                new[spot] = 0
            case "scale":
                new[spot] = x[spot] * factor
            case "set":
                new[spot] = factor
            case "noise" | "add":
                new[spot] = x[spot] + value[spot].to(x)
            case "mean_all":
                new[spot] = value[(slice(None), slice(None), *spot[2:])].to(x)
            case _:
                new[spot] = value[spot].to(x)
        return new

    return apply


@dataclass
class Runs:
    """The runs of a study: clean, corrupted, and now (the base prompt under the interventions)."""

    model: Model
    study: Study
    rows: dict[str, TokenRow | None]
    answers: list[int]
    foils: list[int]
    edits: list[Edit]
    done: tuple
    alignment: align.Pairs = ()

    def row(self, which: str) -> TokenRow:
        row = self.rows.get(which)
        if row is None:
            if which in RUNS:
                raise UserError("there is no corrupted prompt: type one first")
            raise UserError(f"{which!r} is not a run: use one of {', '.join(RUNS)}")
        return row

    def trace(self, which: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Activations of a run, from the cache when it ran before."""
        edits, done = (self.edits, self.done) if which == "now" else ((), ())
        return self.model.trace(self.row(which).ids, names, edits, done)

    def visit(self, which: str, names: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        """take(name, activations [1, ...]) of one point of a run after the other: a long prompt's as they pass, and none is held."""
        ids = self.row(which).ids
        if self.model.likely(len(ids)):
            for name, x in self.trace(which, names).items():
                take(name, x)
        else:
            self.model.forward(t.tensor([ids]), names, self.edits if which == "now" else (), keep=None, take=take)

    def position(self, which: str, pos: int | str) -> int:
        return find_position(pos, self.row(which), NAMES[which])

    def placed(self, node: Node, which: str = "now") -> Node:
        """The node with its position as an index into a run."""
        return node if node.pos is None else replace(node, pos=self.position(which, node.pos))

    @property
    def by_index(self) -> bool:
        """Whether a position stands for the same index in clean and corrupted."""
        rows = self.rows["clean"], self.rows["corrupt"]
        return None in rows or not self.alignment or align.is_by_index(self.alignment, *(len(r.ids) for r in rows))

    def partners(self, base: str) -> tuple[int, ...] | None:
        """For every position of a prompt its partner in the other one (-1: none); None: the same index. Unequal lengths need an alignment."""
        clean, corrupt = (len(self.row(w).ids) for w in ("clean", "corrupt"))
        if not self.alignment and clean != corrupt:
            raise UserError(
                f"clean has {clean} tokens and corrupted {corrupt}: align them (% on the screen, --align diff or labels), or patch prompts of equal length"
            )
        return None if self.by_index else align.partners(self.alignment, base, len(self.row(base).ids))

    def metric_position(self, which: str) -> int:
        """The metric's position in a run. Under an alignment a number means the clean prompt's, and in the corrupted one its partner."""
        pos = self.study.metric.pos
        if isinstance(pos, str) or self.by_index or (self.study.base if which == "now" else which) == "clean":
            return self.position(which, pos)
        partner = dict(self.alignment)
        if (i := self.position("clean", pos)) not in partner:
            raise UserError(f"the metric's position {pos} has no partner in the corrupted prompt: use END or a label of both, or edit the alignment")
        return partner[i]

    def pair(self, which: str) -> tuple[str, str]:
        """The two runs of a difference, of equal length."""
        a, _, b = which.partition("-")
        na, nb = len(self.row(a).ids), len(self.row(b).ids)
        if na != nb:
            raise UserError(f"a difference needs runs of equal length: {a} has {na} tokens and {b} has {nb}")
        if not self.by_index:
            raise UserError("a difference of runs goes position by position, and the prompt's alignment does not: look at one run at a time")
        return a, b

    def edits_anywhere(self) -> tuple[list[Edit], list[str]]:
        """Those interventions that make sense on any tokens (zero and scale at all positions), and what is left out."""
        fits = [i for i in self.study.interventions if i.op in ("zero", "scale") and i.node.pos is None and i.node.site not in ("resid_mid", "sae")]
        edits = [(hook_name(self.model, i.node), edit(where(self.model, i.node, self.row("now"), NAMES[self.study.base]), i.op, i.value, None)) for i in fits]
        return edits, [str(i) for i in self.study.interventions if i not in fits]

    @property
    def aligned(self) -> str:
        """Where the alignment comes from, and what it leaves out."""
        source = "the prompt's own" if self.study.prompt.alignment else f"by {self.study.align}"
        return f"{source}: {align.words(self.alignment, *(len(self.row(w).ids) for w in ('clean', 'corrupt')))}"

    @property
    def convention(self) -> str:
        """What was done to the model, for the titles."""
        some = self.study.interventions
        if not some:
            return ""
        notes = [f"now = {self.study.base} under {', '.join(str(i) for i in some)}"]
        parts = {i.node.part for i in some if i.node.site == "head"}
        if parts & {"k", "v"} and self.model.info.n_kv_heads < self.model.info.n_heads:
            notes.append("k and v are shared by a group of heads")
        if parts & {"q", "k"} and self.model.info.positions == "rotary":
            notes.append("q and k before the rotation")
        ops = dict.fromkeys(i.op for i in some)
        notes += [f"{op} = {OPS[op]}" for op in ops if op not in ("zero", "scale")]
        notes += [f"seed {self.study.seed}"] * ("resample" in ops or "noise" in ops)
        if "patch" in ops and not self.by_index:
            notes.append(f"patched across an alignment, {self.aligned}")
        if "pattern" in parts:
            notes.append("a pattern's position is the destination")
        if any(i.node.site == "sae" for i in some):
            kept = "kept" if self.study.sae_error else "dropped (but at position 0, unless it is named)"
            notes.append(f"features of {', '.join(self.study.saes)}, their error term {kept}")
        return "; ".join(notes)


def read_study(model: Model, study: Study) -> Runs:
    """The study's prompts as tokens, without its interventions; what stops an analysis is an error."""
    if study.base not in ("clean", "corrupt"):
        raise UserError(f"{study.base!r} is not a prompt to act on: use clean or corrupt")
    if study.metric.kind not in METRICS:
        raise UserError(f"{study.metric.kind!r} is not a metric: use one of {', '.join(METRICS)}")
    check = model.check(study.prompt, study.align)
    if check.problems:
        raise UserError("; ".join(check.problems))
    rows = {"clean": check.clean, "corrupt": check.corrupt}
    rows["now"] = rows[study.base]
    if rows["now"] is None:
        raise UserError("the interventions act on the corrupted prompt, and there is none: type one first")
    answers, foils = (list(dict.fromkeys(r.ids[0] for r in side)) for side in (check.answers, check.foils))
    return Runs(model, study, rows, answers, foils, [], (), check.alignment)


def set_key(rows: list[tuple[int, ...]]) -> tuple:
    """What names a set of token rows in the cache; their order does not matter."""
    return (hashlib.sha256(repr(sorted(rows)).encode()).hexdigest(),)
