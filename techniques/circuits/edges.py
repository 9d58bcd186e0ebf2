"""
The edge machine: the model with some of its edges cut, every receiver reading its own sum of senders. What ACDC, edge circuits and EAP run on.

A sender adds to the residual stream: the embeddings, every head (its z through W_O), every MLP. A receiver reads it: every head's q, k and v, every MLP,
the logits. Where an edge is cut, the receiver gets the sender's other value (of the corrupted run, a mean, ...) in place of the one of this run.
"""

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, TOLERANCE, Edit, Model
from model.memory import Chunks, chunk_bytes, halved, out_of_memory, ran_out
from model.metrics import MetricReader, metric
from model.replacements import means
from model.runs import Runs
from model.writes import bias_write, head_writes, heads_write, over_scale, post_scales, require_parts
from techniques.circuits.edge_index import EdgeIndex, all_edges, edge_index, own_edge, receivers, senders
from techniques.circuits.inputs import PARTS, block_inputs, taps
from techniques.circuits.requests import REST
from techniques.patching.plan import Plan, in_part, others, read_member, read_set
from techniques.patching.requests import Sweep
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import ModelInfo, Progress

__all__ = ["PARTS", "EdgeRun", "all_edges", "edge_runs", "edge_values", "gather", "own_edge", "receivers", "senders"]
EMBED = "blocks.0.hook_resid_pre"
PIECE = 256 << 20  # bytes of float32 at once where scores of another dtype are added up


# ------------------------------------------------------------------ bytes


def block_bytes(info: ModelInfo, seq: int, size: int) -> int:
    """Bytes a token of one block with every receiver's input apart, `size` bytes a number: inputs and norms (these in float32), MLP, attention."""
    inputs = (info.n_heads + 2 * info.n_kv_heads) * info.d_model
    return inputs * size + info.n_heads * info.d_model * (2 * size + 8) + 3 * info.d_mlp * size + info.n_heads * seq * (2 * size + 4)


def cut_bytes(info: ModelInfo, seq: int, size: int) -> int:
    """Bytes a token of a run with cut edges, besides the senders held apart: a block, the stream, and what receivers read before and after the cut."""
    return block_bytes(info, seq, size) + info.d_model * size * (4 + 2 * (info.n_heads + 2 * info.n_kv_heads))


def prompt_bytes(info: ModelInfo, seq: int, size: int) -> int:
    """Bytes of scoring every edge by gradients on one prompt: both runs, what each sender changes, every block's input, one block forward and backward."""
    runs = 2 * info.n_layers * (info.n_heads * info.d_head + info.d_model)
    change = len(senders(info)) * info.d_model
    return seq * ((runs + change + info.n_layers * info.d_model) * size + 3 * block_bytes(info, seq, size))


# ------------------------------------------------------------------ a group of prompts


class EdgeRun:
    """A few prompts of equal length: `clean` what passed the hook points in their run, `acts` in the one that cut edges carry; `more` hook points to read beside."""

    by_edges = True

    def __init__(self, model: Model, group: list[Runs], indices: list[int], plan: Plan, rest: str, limit: int, more: tuple[str, ...] = ()):
        self.more = more
        self.model, self.group, self.info, self.limit = model, group, model.info, limit
        self.inputs = block_inputs(model) if self.by_edges else []
        self.ids = t.tensor([r.row("clean").ids for r in group])
        self.seq = self.ids.shape[1]
        self.index = edge_index(self.info)
        self.stride = self.info.n_heads + 1
        self.plan, self.rest, self.indices = plan, rest, indices
        self.zs = [f"blocks.{n}.attn.hook_z" for n in range(self.info.n_layers)]
        self.mlps = [f"blocks.{n}.hook_mlp_out" for n in range(self.info.n_layers)]
        self.scales = post_scales(model, "attn")  # of all layers, or none
        self.last = f"blocks.{self.info.n_layers - 1}.hook_resid_post"
        self.remake: Callable[[list[int]], Generator] | None = None  # a run like this one, of some of its prompts

    def prepare(self) -> Generator[Progress]:
        """The clean run, the corrupted one where there is one, and what cut edges carry."""
        model, last = self.model, self.last
        names = [EMBED, *self.zs, *(m for m in self.mlps if self.by_edges or m in model.points), *self.scales, *self.more, last, FINAL]
        _, self.clean = model.forward(self.ids, names)
        corrupt = None
        if all(r.rows["corrupt"] is not None for r in self.group) and len({len(r.rows["corrupt"].ids) for r in self.group} | {self.seq}) == 1:
            _, corrupt = self.group[0].of("corrupt").forward(t.tensor([r.row("corrupt").ids for r in self.group]), names)
        normed = None
        if self.group[0].study.metric.kind == "kl":
            normed = t.stack([x[r.metric_position("clean")] for r, x in zip(self.group, self.clean[FINAL])])
        self.score = MetricReader(self.group, normed, "clean")
        if self.score.kind in ("loss", "own"):
            raise UserError("circuits are scored at one position, and loss or a metric of your own has none: use another metric")
        self.score.base = self.value = self.score.of(self.clean[last], 0)[0]
        self.corrupted = None if corrupt is None else MetricReader(self.group, normed, "corrupt").of(corrupt[last], 0)[0]
        match self.rest:
            case "patch":
                if self.group[0].pair and self.by_edges and self.scales:
                    raise UserError(
                        f"{self.info.architecture}: what a head writes through the norm after attention is not defined with one model's z and another's"
                        " scale, so edges are not cut across two models; score nodes"
                    )
                acts = corrupt
            case "resample":
                _, acts = model.forward(t.tensor([others(self.plan, i) for i in self.indices]), names)
            case "zero":
                acts = {n: t.zeros_like(x) for n, x in self.clean.items()} | {s: self.clean[s] for s in self.scales}
            case _:
                some = [n for n in names if n not in (last, FINAL, *self.scales)]
                acts = yield from means(
                    model, self.plan.ask.study, some, self.rest, [r.row("clean") for r in self.group], [r.row("clean") for r in self.plan.whole]
                )
                acts = {n: x.expand_as(self.clean[n]) for n, x in acts.items()} | {s: self.clean[s] for s in self.scales}
        self.carry(acts)
        if not np.isfinite(self.value).all():
            raise UserError("the metric is not finite: does the model hold NaN? Try float32")

    def carry(self, acts: dict[str, Tensor]) -> None:
        """Cut edges carry what passed the hook points of this run."""
        self.acts = acts
        if self.by_edges:
            self.check()
            self.rests = self.streams(acts)

    # ---------------------------------------------------------------- what senders add

    def part(self, layer: int, acts: dict[str, Tensor]) -> Tensor:
        """Of a run, what the heads' writing is linear in [prompt, seq, head, d_head]: z, over the scale of the norm after attention where there is one."""
        return over_scale(acts[self.zs[layer]], self.scale(layer, acts))

    def scale(self, layer: int, acts: dict[str, Tensor]) -> Tensor | None:
        """That of the norm after attention in a run, where there is one."""
        return acts[self.scales[layer]] if self.scales else None

    def streams(self, acts: dict[str, Tensor]) -> dict[int, Tensor]:
        """The stream that senders and biases of a run add up to, by how many senders are in it [prompt, seq, d_model]: what receivers read whose edges are all cut."""
        x = acts[EMBED].float()
        out = {1: x}
        for n, mlp in enumerate(self.mlps):
            k, x = 1 + n * self.stride, x.to(acts[mlp].device)
            heads = heads_write(self.model, n, self.part(n, acts))
            out[k + self.info.n_heads] = x = x + heads.float() + bias_write(self.model, n, self.scale(n, acts))
            out[k + self.stride] = x = x + acts[mlp].float()
        return {k: x.to(self.model.dtype) for k, x in out.items()}

    def check(self) -> None:
        """UserError where embeddings, heads and MLPs do not add up to the stream: cut edges would mean nothing there."""
        got, want = self.streams(self.clean)[len(self.index.names)].float(), self.clean[self.last].float()
        error, size = (got - want.to(got.device)).norm(dim=-1), want.norm(dim=-1).to(got.device)
        error /= size.clamp(min=size.mean() / 100)  # by position; in half precision the usual one counts: a large stream that cancels late leaves its rounding
        if not (error.max() if self.model.dtype == t.float32 else error.median()) <= TOLERANCE[self.model.dtype]:
            raise UserError(
                f"{self.info.architecture}: embeddings, heads and MLPs do not add up to the residual stream here, so edges can't be scored; score nodes"
            )

    def change(self) -> Tensor:
        """What cut edges carry, less what senders add in the clean run [sender, prompt, seq, d_model]."""
        own, other = self.clean, self.acts
        out = own[EMBED].new_zeros(len(self.index.names), *own[EMBED].shape)
        out[0] = other[EMBED] - own[EMBED]
        for n, mlp in enumerate(self.mlps):
            first = 1 + n * self.stride
            out[first : first + self.info.n_heads] = head_writes(self.model, n, self.part(n, other) - self.part(n, own))
            out[first + self.info.n_heads] = other[mlp] - own[mlp]
        return out

    # ---------------------------------------------------------------- cut edges

    def mask(self, kept: Iterable[str] | None, gone: Iterable[str] = ()) -> np.ndarray:
        """True where an edge is cut [receiver, sender]: all but those `kept` (None: none), and those that are `gone`."""
        index = self.index
        cut = np.zeros_like(index.exists) if kept is None else index.exists & ~index.array(kept)
        return cut | index.array(gone)

    def set_bytes(self, masks: list) -> int:
        """Bytes that the run of some sets together takes."""
        apart = len(np.flatnonzero(np.logical_or.reduce([unlike(m, self.index)[1].any(0) for m in masks])))
        size = self.model.dtype.itemsize
        return len(masks) * self.ids.numel() * (cut_bytes(self.info, self.seq, size) + apart * self.info.d_model * size)

    @t.no_grad()
    def metrics(self, cuts: list[np.ndarray]) -> np.ndarray:
        """The metric [set, prompt] with the edges of each mask [receiver, sender] gone."""
        lost, n, index = Lost(self, cuts), len(cuts), self.index
        edits: list[Edit] = [(EMBED, lambda x: lost.add(0, self.less(x, EMBED)))]
        for layer in range(self.info.n_layers):
            edits += self.cut_in(layer, lost)
        got: dict[str, Tensor] = {}
        edits.append((self.last, lambda x: got.__setitem__("end", lost.take(x[:, :, None], np.array([len(index.readers) - 1]))[:, :, 0])))
        self.model.forward(self.ids.repeat(n, 1), edits=edits, keep=None)
        return self.score.of(got["end"], 0)

    def less(self, x: Tensor, name: str) -> Tensor:
        """What passes a hook point, less what cut edges carry of it, for some sets of the prompts."""
        return (x.unflatten(0, (-1, len(self.ids))) - self.acts[name].to(x)).flatten(0, 1)

    def cut_in(self, layer: int, lost: "Lost") -> list[Edit]:
        """The edits of one block: its receivers lose their cut edges, and what its senders add is noted."""
        inputs, held, start, column = self.inputs[layer], {}, layer * self.index.per_layer, 1 + layer * self.stride
        mlp, rows = self.mlps[layer], start + lost.touched(slice(start, start + self.index.per_layer))
        of_mlp, rows = rows[rows == start + self.index.per_layer - 1], rows[rows < start + self.index.per_layer - 1]

        def write(x: Tensor, part: str) -> Tensor | None:
            """Queries, keys or values of the heads that lose edges; the inputs of all three when the first is asked for."""
            if "read" not in held:
                held["read"] = inputs.normed(lost.take(held["stream"][:, :, None].expand(-1, -1, len(rows), -1), rows))
            ends = inputs.rows[part]
            mine = np.flatnonzero((rows >= start + ends.start) & (rows < start + ends.stop))
            x, heads = x.clone(), (rows[mine] - start - ends.start).tolist()
            x[:, :, heads] = inputs.project(part, heads, held["read"][:, :, mine.tolist()])
            return x

        def heads(x: Tensor) -> None:
            own = self.part(layer, held)
            lost.add_heads(layer, (own.unflatten(0, (-1, len(self.ids))) - self.part(layer, self.acts)).flatten(0, 1))
            for name in held.keys() - {"stream"}:
                del held[name]

        def read(x: Tensor) -> Tensor:
            """What the MLP gets: the stream where it stands, or the block's own input through the norm in front of both parts."""
            x = x if inputs.mlp_norm is None else held["stream"]
            return inputs.mlp_input(lost.take(x[:, :, None], of_mlp)[:, :, 0])

        edits = [(f"blocks.{layer}.hook_resid_pre", partial(held.__setitem__, "stream"))]
        edits += [
            (name, partial(write, part=part))
            for part, name in inputs.names.items()
            if ((rows >= start + inputs.rows[part].start) & (rows < start + inputs.rows[part].stop)).any()
        ]
        edits += [(name, partial(held.__setitem__, name)) for name in (self.zs[layer], *self.scales[layer : layer + 1])]
        edits.append((f"blocks.{layer}.hook_attn_out", heads))
        edits += [(inputs.entry, read)] * len(of_mlp)
        return [*edits, (mlp, lambda x: lost.add(column + self.info.n_heads, self.less(x, mlp)))]

    def run(self, cuts: list) -> Generator[Progress, None, np.ndarray]:
        """The metric [set, prompt] of many masks (or functions that make them), as many at once as the limit of bytes allows."""
        found: list[np.ndarray] = []
        waiting: list[np.ndarray] = []  # masks that are made and not run

        def fits(i: int) -> int:
            while len(waiting) < len(cuts) - i:
                mask = cuts[i + len(waiting)]
                mask = mask() if callable(mask) else mask
                if waiting and self.set_bytes([*waiting, mask]) > min(self.limit, self.plan.limit):
                    break
                waiting.append(mask)
            return len(waiting)

        def work(start: int, stop: int) -> Progress:
            found.append(self.metrics(waiting[: stop - start]))
            del waiting[: stop - start]
            return Progress(stop, len(cuts))

        def smaller(size: int) -> None:
            self.plan.limit = min(self.plan.limit, self.set_bytes(waiting[:size]))

        yield from Chunks("sets", fits, smaller).over(len(cuts), work)
        return np.concatenate(found)

    # ---------------------------------------------------------------- gradients

    def gradients(self, take: Callable[[slice, Tensor], None], embed: Tensor | None = None, mix: tuple[str, Tensor] | None = None) -> None:
        """
        Give `take` the metric's gradient at every receiver's input in the clean run, as it arrives, the last layer first: the receivers' rows and
        [prompt, seq, receiver, d_model]. With `embed` in place of the embeddings, or `mix` (a hook point and its value). Blocks run once more from their
        kept inputs, so that one block's activations are held at a time.
        """
        model = self.model
        swap = {} if embed is None else {EMBED: embed}
        swap |= {} if mix is None else {mix[0]: mix[1]}
        edits: list[Edit] = [(name, lambda x, new=new: new.to(x).requires_grad_(t.is_grad_enabled())) for name, new in swap.items()]
        stream: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        with model.hooks([*edits, *taps(self.inputs, stream, found)]):
            with called(model) as calls:
                end = model.forward(self.ids, [self.last], keep=None)[1][self.last].requires_grad_(True)
            with t.enable_grad():
                (g,) = t.autograd.grad(metric(self.score, end).sum(), end)
                take(slice(len(self.index.readers) - 1, None), g[:, :, None])
                for n in reversed(range(model.info.n_layers)):
                    x, args, kwargs = calls[n]
                    out = model.bridge.blocks[n](x.requires_grad_(True), *args, **kwargs)
                    t.autograd.backward(out[0] if isinstance(out, tuple) else out, g)  # also where nothing leads back to x
                    g = x.grad
                    self.give(n, stream.pop("now").detach(), found, take)

    def give(self, layer: int, stream: Tensor, found: dict[str, Tensor], take: Callable[[slice, Tensor], None]) -> None:
        """Give `take` the gradients at the inputs of one block's receivers, of those `found` at their hook points, which are forgotten."""
        inputs, start = self.inputs[layer], layer * self.index.per_layer
        end = start + self.index.per_layer - 1
        heads = {part: found.pop(name) for part, name in inputs.names.items() if name in found}
        if (g := inputs.back(stream, heads)) is not None:
            take(slice(start, end), g)
        if inputs.entry in found:
            take(slice(end, end + 1), inputs.mlp_back(stream, found.pop(inputs.entry)))

    def slopes(self, change: Tensor, columns: slice = slice(None), **of) -> np.ndarray:
        """The sum over prompts of change . gradient [receiver, sender], float64, of the senders in `columns`, which `change` [sender, ...] holds; `of` as in gradients."""
        a, b, _ = columns.indices(len(self.index.names))
        total = t.zeros(len(self.index.readers), len(self.index.names), device=self.model.device)

        def take(rows: slice, g: Tensor) -> None:
            if (k := min(b, int(self.index.seen[rows.start]))) > a:
                total[rows, a:k] += dot(g, change[: k - a].to(g.device)).to(total.device)

        self.gradients(take, **of)
        return total.double().cpu().numpy()


def dot(g: Tensor, change: Tensor) -> Tensor:
    """Of [prompt, seq, receiver, d_model] and [sender, prompt, seq, d_model] the products' sums [receiver, sender], float32 whatever the dtype."""
    g, change = g.flatten(0, 1), change.flatten(1, 2)
    size = len(g) if g.dtype == t.float32 else max(1, PIECE // (4 * g.shape[-1] * (g.shape[1] + len(change))))
    pairs = ((g[i : i + size].float().transpose(0, 1), change[:, i : i + size].float()) for i in range(0, len(g), size))
    return sum(x.flatten(1) @ y.flatten(1).T for x, y in pairs)


@contextmanager
def called(model: Model) -> Generator[list]:
    """What every block is called with, in order: the stream, other arguments, and named ones."""
    calls, blocks = [], list(model.bridge.blocks)

    def record(forward: Callable, x: Tensor, *args, **kwargs) -> object:
        calls.append((x.detach(), args, kwargs))
        return forward(x, *args, **kwargs)

    for block in blocks:
        block.__dict__["forward"] = partial(record, block.forward)
    try:
        yield calls
    finally:
        for block in blocks:
            del block.__dict__["forward"]


# ------------------------------------------------------------------ what cut edges take away


def unlike(cut: np.ndarray, index: EdgeIndex) -> tuple[np.ndarray, np.ndarray]:
    """Whether most of a receiver's edges are cut [receiver]; and the edges that are not as most of their receiver's [receiver, sender]."""
    most = 2 * cut.sum(1) > index.seen
    return most, (cut ^ most[:, None]) & index.exists


class Lost:
    """
    What cut edges take away from receivers in one batch of sets. A receiver most of whose edges are cut reads the stream of what cut edges carry, plus the
    difference of the senders it keeps; another one reads the run's own stream, less that of senders that are cut. So only senders that some receiver
    treats unlike the rest are held `apart` [sender, row, seq, d_model].
    """

    def __init__(self, run: EdgeRun, cuts: list[np.ndarray]):
        self.run, self.n = run, len(cuts)
        self.most, odd = (np.stack(x) for x in zip(*(unlike(c, run.index) for c in cuts)))
        self.columns = np.flatnonzero(odd.any((0, 1)))
        self.odd = odd[:, :, self.columns]
        self.slots = dict(zip(self.columns.tolist(), range(len(self.columns))))
        self.apart = t.empty(len(self.columns), len(cuts) * len(run.ids), run.seq, run.info.d_model, dtype=run.model.dtype, device=run.model.device)

    def add(self, column: int, x: Tensor) -> None:
        """What a sender adds, less what cut edges carry of it [row, seq, d_model]."""
        if column in self.slots:
            self.apart[self.slots[column]] = x

    def add_heads(self, layer: int, part: Tensor) -> None:
        """The heads of a layer, of which `part` is what they write from (EdgeRun.part), less that of cut edges."""
        first = 1 + layer * self.run.stride
        if some := [h for h in range(self.run.info.n_heads) if first + h in self.slots]:
            a = self.slots[first + some[0]]
            self.apart[a : a + len(some)] = head_writes(self.run.model, layer, part, some)

    def touched(self, rows: slice) -> np.ndarray:
        """Which of some receivers lose an edge in some set."""
        return np.flatnonzero((self.most[:, rows] | self.odd[:, rows].any(-1)).any(0))

    def take(self, x: Tensor, rows: np.ndarray) -> Tensor:
        """What some receivers of one place read [row, seq, receiver, d_model], without what their cut edges bring."""
        seen, b = int(self.run.index.seen[rows[0]]), len(self.run.ids)
        most, odd = self.most[:, rows], self.odd[:, rows, : np.searchsorted(self.columns, seen)]
        if most.any():
            rest = self.run.rests[seen].to(x)[:, :, None]
            here = t.tensor(most).to(x.device).repeat_interleave(b, 0)[:, None, :, None]
            x = t.where(here, rest.repeat(self.n, 1, 1, 1), x) if not most.all() else rest.repeat(self.n, 1, 1, 1).expand_as(x)
        if odd.any():
            some = np.flatnonzero(odd.any((0, 1)))
            weight = t.tensor(np.where(most[..., None], 1.0, -1.0) * odd[:, :, some], dtype=x.dtype).to(x.device)
            parts = self.apart[: odd.shape[2]] if len(some) == odd.shape[2] else self.apart[t.tensor(some, device=self.apart.device)]
            got = t.bmm(weight, parts.to(x.device).view(len(some), self.n, -1).transpose(0, 1))
            x = x + got.view(self.n, weight.shape[1], b, *x.shape[1::2]).permute(0, 2, 3, 1, 4).flatten(0, 1)
        return x


# ------------------------------------------------------------------ over prompts


def edge_runs(
    model: Model, study: Study, rest: str, seed: int = 0, make: Callable[..., EdgeRun] = EdgeRun, labels: tuple[str, ...] = ()
) -> Generator[Progress, None, list[EdgeRun]]:
    """
    One EdgeRun a length of prompt, over the prompts of the set that have these labels, or the one prompt. Interventions of the study are left out: an edge
    circuit is one of the model itself.
    """
    if rest not in REST:
        raise UserError(f"{rest!r} is not a value for what is left out: use one of {', '.join(REST)}")
    if make is EdgeRun:
        require_parts(model)
    study, left = replace(study, interventions=(), base="clean"), ()

    def read(prompt: Prompt) -> Runs:
        found = read_member(model, replace(study, prompt=prompt, part=None), rest)
        for label in labels:
            found.position("clean", label)
        if rest == "patch" and len(found.row("clean").ids) != len(found.row("corrupt").ids):
            raise UserError("what is left out carries the corrupted run, and it is not of equal length: use zero, mean, or another corrupted prompt")
        return found

    if study.prompt_set:
        members, every, left = read_set(model, study, read, rest, labels)
    else:
        members, every = [(0, study.prompt)], [read(study.prompt)]
    model, mine = every[0].model, in_part(members, study.part)
    members, runs = [members[i] for i in mine], [every[i] for i in mine]
    plan = Plan(model, Sweep(study, "nodes", rest, seed=seed), members, runs, "clean", "corrupt", [], chunk_bytes(model.device), left, tuple(every))
    out = []

    def prepared(part: list[int]) -> Generator[Progress, None, EdgeRun]:
        run = make(model, [runs[i] for i in part], part, plan, rest, plan.limit)
        run.remake = prepared
        yield from run.prepare()
        return run

    lengths = [tuple(len(r.rows[w].ids) if r.rows[w] else 0 for w in ("clean", "corrupt")) for r in runs]
    for pair in sorted(set(lengths)):
        length, same = pair[0], [i for i, both in enumerate(lengths) if both == pair]
        per = max(1, plan.limit // prompt_bytes(model.info, length, model.dtype.itemsize))
        for run in Chunks("prompts", per).over(len(same), lambda a, b, same=same: prepared(same[a:b])):
            if isinstance(run, Progress):
                yield run
                continue
            out.append(run)
            yield Progress(len(out), len(runs), "runs of the prompts")
    return out


def each(runs: list[EdgeRun], work: Callable[[EdgeRun], Generator]) -> Generator[Progress, None, list]:
    """What work(run) returns, of each run. A run whose prompts do not fit into memory together is two in the list from there on."""
    found = []
    while len(found) < len(runs):
        i = len(found)
        try:
            found.append((yield from work(runs[i])))
            continue
        except Exception as error:
            ran_out(error)
            if len(runs[i].indices) == 1:
                raise out_of_memory(error) from None
        old, runs[i : i + 1] = runs[i], []
        indices, remake, n = old.indices, old.remake, len(old.indices)
        parts = {"known": old.known} if hasattr(old, "known") else {}  # the features that are looked at
        del old
        yield halved(n, n // 2, "prompts")
        for k, some in enumerate((indices[: n // 2], indices[n // 2 :])):
            run = yield from remake(some)
            vars(run).update(parts)
            runs.insert(i + k, run)
    return found


def gather(runs: list[EdgeRun], found: list[np.ndarray]) -> np.ndarray:
    """Values [..., prompt] of each run's prompts, in the order of the set."""
    order = np.argsort([i for r in runs for i in r.indices], kind="stable")
    return np.concatenate(found, -1)[..., order]


def edge_values(model: Model, study: Study, kept: list[frozenset[str]], rest: str = "patch", seed: int = 0) -> Generator[Progress, None, np.ndarray]:
    """The metric [set, prompt] of the clean run when only the `kept` edges carry it, the others what `rest` says."""
    known = [[own_edge(model.info, e) for e in some] for some in kept]
    runs = yield from edge_runs(model, study, rest, seed)
    found = yield from each(runs, lambda run: run.run([partial(run.mask, some) for some in known]))
    return gather(runs, found)
