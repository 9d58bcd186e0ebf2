"""
Path patching: a sender's value from the other run, carried along chosen paths only; and the edge machine, which runs the model with some edges cut.

1. `changes`: what the residual stream gains when a sender has its value in the other run.
2. `deliver`: the base run in which each receiver reads the stream plus what its senders changed, everything else computed again; the metric.
3. `through_mlps`: the other convention: first what receivers get when all other heads stay as they are and MLPs are computed again.
Sender sets are the batch; the base run and its keys and values are kept (base_run.py).
"""

import time
from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import PatchSite, Recorded, patch_site
from model.bridge import Edit, Model
from model.changed_blocks import PIECE
from model.memory import Chunks
from model.runs import Runs
from model.variants import Base
from model.writes import change_of_head, post_scales, require_parts
from techniques.circuits.requests import CONVENTIONS, PathPatch
from techniques.patching.plan import Layout, Plan, aligned, columns, each_layout, over_bases, read_plan
from techniques.patching.requests import Sweep, SweepResult
from techniques.patching.table import SweepTable
from vocabulary.circuit import LOGITS
from vocabulary.nodes import Node, UserError, parse_node
from vocabulary.progress import forward_progress
from vocabulary.requests import Progress

PARTS = ("q", "k", "v")
EMBED = "blocks.0.hook_resid_pre"


@dataclass(frozen=True)
class Path:
    """A cell: senders together, to receivers together (None: the logits)."""

    cell: int
    senders: tuple[Node, ...]
    receivers: tuple[Node | None, ...]


# ------------------------------------------------------------------ senders and receivers


def read_sender(runs: Runs, address: str) -> Node:
    node = parse_node(address)
    if node.site not in ("embed", "mlp") and not (node.site == "head" and node.part == "z"):
        raise UserError(f"{address} does not send: a sender is a head such as L0H1, an MLP such as L3.mlp, or embed")
    return placed(runs, node)


def read_receiver(runs: Runs, address: str) -> Node | None:
    if address.strip() == LOGITS:
        return None
    node = parse_node(address)
    if node.site != "mlp" and not (node.site == "head" and node.part in PARTS):
        raise UserError(f"{address} does not receive: a receiver is L2H3.q, .k or .v, L3.mlp or logits")
    return placed(runs, node)


def placed(runs: Runs, node: Node) -> Node:
    """The node, which has to be in the model, with its position as an index."""
    if node.site != "embed":
        patch_site(runs.model, node)
    return runs.placed(node)


def reaches(model: Model, sender: Node, receiver: Node | None) -> bool:
    """Whether there is an edge: the receiver reads the stream after the sender wrote to it, at a position it can see."""
    if receiver is None or sender.site == "embed":
        return True
    if receiver.site == "mlp" and sender.site == "head" and not model.parallel:
        after = sender.layer <= receiver.layer
    else:
        after = sender.layer < receiver.layer
    return after and (sender.pos is None or receiver.pos is None or sender.pos == receiver.pos)


def every_sender(model: Model) -> list[list[Node]]:
    """Rows of a table: embed, then every layer's heads and its MLP."""
    i = model.info
    mlps = [hasattr(b, "mlp") and f"blocks.{n}.hook_mlp_out" in model.points for n, b in enumerate(model.bridge.blocks)]
    return [[Node("embed")], *([Node("head", n, h) for h in range(i.n_heads)] + [Node("mlp", n)] * mlps[n] for n in range(i.n_layers))]


def lay_out(runs: Runs, ask: PathPatch, labels: tuple[str, ...] = ()) -> tuple[Layout, dict[tuple[int, int], Path]]:
    """The table's labels and addresses, and the path of every cell that has one; a table by position goes by `labels` where there are some."""
    model, i, where = runs.model, runs.model.info, labels or range(len(runs.row("now").ids))
    senders = [read_sender(runs, a) for a in ask.senders]
    receivers = tuple(read_receiver(runs, a) for a in ask.receivers)
    heads = [f"H{h}" for h in range(i.n_heads)]
    if ask.each == "sender":
        if not receivers:
            raise UserError("path patching needs a receiver: L2H3.q, L3.mlp or logits")
        table = every_sender(model)
        if ask.by_pos:
            flat = senders or [n for line in table for n in line]
            rows, cols = [str(n) for n in flat], [str(p) for p in where]
            grid = [[replace(n, pos=p) for p in where] for n in flat]
        else:
            rows, cols, grid = ["embed", *(f"L{n}" for n in range(i.n_layers))], [*heads, "MLP"], table
        wanted = {(n.site, n.layer, n.head): n for n in senders}
        cells = {}
        for r, line in enumerate(grid):
            for c, node in enumerate(map(runs.placed, line)):
                here = wanted.get((node.site, node.layer, node.head), None if wanted else node)
                if here is not None and any(reaches(model, here if not ask.by_pos else node, x) for x in receivers):
                    cells[r, c] = ((node if ask.by_pos else here,), receivers)
        addresses = [str(line[min(c, len(line) - 1)]) for line in grid for c in range(len(cols))]
    else:
        if not senders:
            raise UserError("paths to each receiver need a sender: L0H1, L3.mlp or embed")
        cols = [f"{h}.{p}" for h in heads for p in PARTS] + ["MLP"]
        rows = [*(f"L{n}" for n in range(i.n_layers)), LOGITS]
        pos = receivers[0].pos if receivers and receivers[0] is not None else None
        line = lambda n: [Node("head", n, h, p, pos=pos) for h in range(i.n_heads) for p in PARTS] + [Node("mlp", n, pos=pos)]  # noqa: E731
        grid = [*(line(n) for n in range(i.n_layers)), [None]]
        cells = {(r, c): (tuple(senders), (x,)) for r, some in enumerate(grid) for c, x in enumerate(some) if any(reaches(model, s, x) for s in senders)}
        addresses = [str(some[min(c, len(some) - 1)] or Node("resid_post", i.n_layers - 1)) for some in grid for c in range(len(cols))]
    if not cells:
        raise UserError("there is no such path: a receiver has to come after its sender")
    paths = {rc: Path(rc[0] * len(cols) + rc[1], *ends) for rc, ends in cells.items()}
    return Layout(
        tuple(rows),
        tuple(cols),
        {rc: tuple(PatchSite(n if n.site != "embed" else Node("resid_pre", 0, pos=n.pos), "") for n in p.senders) for rc, p in paths.items()},
        tuple(addresses),
    ), paths


# ------------------------------------------------------------------ what senders change, and where it goes


@t.no_grad()
def changes(base: Base, nodes: list[Node]) -> dict[Node, Tensor]:
    """What the stream gains [prompt, seq, d_model] when each node has its value in the other run; a norm after attention is computed again."""
    out, start = {}, base.shared
    for node in nodes:
        if node.site == "embed":
            x = base.source["embed"] - base.resid[0]
        elif node.site == "mlp":
            x = base.source[node.layer, "mlp", "z"] - base.acts[f"blocks.{node.layer}.hook_mlp_out"]
        else:
            own = base.acts[f"blocks.{node.layer}.attn.hook_z"]
            x = change_of_head(base.model, node.layer, node.head, own, base.source[node.layer, "head", "z"])
        if node.pos is not None:
            here = t.zeros_like(x)
            here[:, node.pos] = x[:, node.pos]
            x = here
        out[node] = x[:, start:]
    return out


def stage(model: Model, node: Node) -> float:
    """When a node writes: embed before block 0, a head in the middle of its block (at its end where attention and MLP are parallel), an MLP at its end."""
    return 0.0 if node.site == "embed" else node.layer + (0.5 if node.site == "head" and not model.parallel else 1.0)


def gain(model: Model, change: dict[Node, Tensor], senders: tuple[Node, ...], after: float, before: float) -> Tensor:
    """What a set of senders has added to the stream between two stages."""
    zero = t.zeros_like(next(iter(change.values())))
    return sum((change[x] for x in senders if after <= stage(model, x) < before), zero)


def hook_of(receiver: Node) -> str:
    """Where a receiver's value is read and written: the head's queries, keys or values; of an MLP its output, which is a function of its input."""
    return f"blocks.{receiver.layer}.attn.hook_{receiver.part}" if receiver.site == "head" else f"blocks.{receiver.layer}.hook_mlp_out"


def read(base: Base, layer: int, x: Tensor, names: set[str], edits: list[Edit], whole: bool) -> tuple[dict[str, Tensor], Tensor | None]:
    """A block on rows of the stream [set x prompt, seq, d_model]: what passes the named hook points [set, prompt, ...]; only as far as attention's output unless `whole`."""
    got: dict[str, Tensor] = {}

    def stop(y: Tensor) -> None:
        raise Recorded

    catch = [(name, partial(got.__setitem__, name)) for name in names]
    out = None
    with suppress(Recorded):
        out = base.step(layer, x, base.shared, [*edits, *catch, *([] if whole else [(f"blocks.{layer}.hook_attn_out", stop)])])
    return {name: y.detach().view(-1, len(base.ids), *y.shape[1:]) for name, y in got.items()}, out


@t.no_grad()
def through_mlps(base: Base, sets: list[tuple[Node, ...]], change: dict[Node, Tensor], wanted: set[Node | None]) -> Generator[None, None, dict]:
    """
    Receivers' values by (sender set, receiver) when every other head stays as in the base run and MLPs are computed again: q, k, v
    [prompt, seq from shared, heads, d_head], an MLP's output [prompt, seq, d_model], and of the logits the final stream's change.
    """
    model, start = base.model, base.shared
    last = base.n if None in wanted else max(r.layer for r in wanted if r is not None) + 1
    first = int(min(stage(model, x) for s in sets for x in s))
    moved = t.stack(
        [gain(model, change, s, -1, min(stage(model, x) for x in s) // 1 + 0.25) for s in sets]
    )  # the stream's change before a block [set, prompt, seq, d_model]
    found: dict = {}
    begins = [int(min(stage(model, x) for x in s)) for s in sets]
    for layer in range(first, last):
        rows = [i for i, n in enumerate(begins) if n <= layer]  # a set joins where its first sender writes
        some, here = [sets[i] for i in rows], [r for r in wanted if r is not None and r.layer == layer]
        half = t.stack([gain(model, change, s, layer + 0.25, layer + 0.75) for s in some])
        end = t.stack([gain(model, change, s, layer + 0.75, layer + 1.25) for s in some])
        out, mlp = f"blocks.{layer}.hook_attn_out", f"blocks.{layer}.hook_mlp_out"
        own, frozen = base.resid[layer][:, start : base.stop], base.acts[out][:, start : base.stop]
        hold = (out, lambda x, y=frozen + half: y.reshape(x.shape))
        got, _ = read(base, layer, (own + moved[rows]).flatten(0, 1), {hook_of(r) for r in here} | ({mlp} & set(base.acts)), [hold], True)
        yield
        found |= {(s, r): got[hook_of(r)][i] for r in here for i, s in enumerate(some)}
        moved[rows] += half + end + (got[mlp] - base.acts[mlp][:, start : base.stop] if mlp in got else 0)
    if None in wanted:
        found |= {(s, None): moved[i] for i, s in enumerate(sets)}
    return found


@t.no_grad()
def deliver(base: Base, paths: list[Path], change: dict[Node, Tensor], found: dict | None) -> Generator[None, None, np.ndarray]:
    """
    The metric [path, prompt] of the base run in which each receiver reads the stream plus what its senders changed (`found` None), or has the value
    that was found for it; everything else is computed again.
    """
    model, b, start = base.model, len(base.ids), base.shared
    usable = [[r for r in p.receivers if any(reaches(model, s, r) for s in p.senders)] for p in paths]
    layers = [min((r.layer for r in some if r is not None), default=base.n) for some in usable]
    order = sorted(range(len(paths)), key=lambda i: layers[i])
    rows: list[int] = []
    x = None
    for layer in range(layers[order[0]], base.n):
        new = [i for i in order[len(rows) :] if layers[i] == layer]
        if new:
            own = base.resid[layer][:, start : base.stop]
            joined = own.expand(len(new), *own.shape).clone().flatten(0, 1)
            x, rows = joined if x is None else t.cat([x, joined]), rows + new
        if x is None:
            continue
        ends = [(k, r, paths[i].senders) for k, i in enumerate(rows) for r in usable[i] if r is not None and r.layer == layer]
        ends = [(k, r, s) for k, r, s in ends if r.pos is None or start <= r.pos < base.stop]
        writes: dict[str, list] = {}
        if found is not None:
            for k, r, s in ends:
                writes.setdefault(hook_of(r), []).append((k, r, found[s, r]))
        else:
            some = [(k, r, s) for k, r, s in ends if r.site == "head" or model.parallel]
            inputs = list(dict.fromkeys((k, s) for k, _, s in some))
            if inputs:
                view = x.view(-1, *x.shape[1:]).view(len(rows), b, *x.shape[1:])
                shifted = t.stack([view[k] + gain(model, change, s, -1, layer + 0.25) for k, s in inputs]).flatten(0, 1)
                got, _ = read(base, layer, shifted, {hook_of(r) for _, r, _ in some}, [], any(r.site == "mlp" for _, r, _ in some))
                for k, r, s in some:
                    writes.setdefault(hook_of(r), []).append((k, r, got[hook_of(r)][inputs.index((k, s))]))
                yield
        edits = [(name, partial(write, mine, b, base)) for name, mine in writes.items()]
        extra = None
        if found is None and not model.parallel and any(r.site == "mlp" for _, r, _ in ends):  # the MLP reads more than the stream keeps
            extra = t.zeros(len(rows), *next(iter(change.values())).shape).to(x)
            for k, r, s in ends:
                if r.site == "mlp":
                    pos = slice(None) if r.pos is None else slice(r.pos - start, r.pos - start + 1)
                    extra[k, :, pos] = gain(model, change, s, -1, layer + 0.75)[:, pos]
            extra = extra.flatten(0, 1)
            edits.append((f"blocks.{layer}.hook_attn_out", lambda y, extra=extra: y + extra.to(y)))
        x = base.step(layer, x, start, edits, all_rows=extra is not None)
        x = x if extra is None else x - extra
        yield
    out, plain = np.empty((len(paths), b)), [i for i in order if i not in set(rows)]
    own = base.resid[base.n][:, start : base.stop]
    ends = own.expand(len(plain), *own.shape).clone()
    x = ends if x is None else t.cat([x.view(len(rows), b, *x.shape[1:]), ends])
    for k, i in enumerate([*rows, *plain]):
        if None in usable[i]:
            x[k] += gain(model, change, paths[i].senders, -1, base.n + 1) if found is None else found[paths[i].senders, None]
    out[[*rows, *plain]] = base.score.of(x.flatten(0, 1), start)
    return out


def write(mine: list[tuple[int, Node, Tensor]], b: int, base: Base, x: Tensor) -> Tensor:
    """A hook point's tensor with the rows of some receivers replaced."""
    x = x.clone(memory_format=t.contiguous_format)
    y = x.view(-1, b, *x.shape[1:])
    for k, r, value in mine:
        pos = slice(None) if r.pos is None else slice(r.pos - base.shared, r.pos - base.shared + 1)
        head = () if r.site == "mlp" else (r.head // base.per_kv if r.part in ("k", "v") else r.head,)
        y[(k, slice(None), pos, *head)] = value[(slice(None), pos, *head)].to(y)
    return x


# ------------------------------------------------------------------ path patching


def path_patch(model: Model, ask: PathPatch) -> Generator[Progress | SweepResult, None, SweepResult]:
    """The metric under each path of the table, as a SweepResult of kind "path". Wang et al. 2211.00593; Goldowsky-Dill et al. 2304.05969."""
    if ask.convention not in CONVENTIONS:
        raise UserError(f"{ask.convention!r} is not a convention of path patching: use direct or mlps")
    if ask.each not in ("sender", "receiver"):
        raise UserError("one cell is one sender or one receiver: each is sender or receiver")
    if ask.study.metric.whole:
        raise UserError(f"path patching reads one position, and {ask.study.metric.kind} has none or several: use another metric")
    require_parts(model)
    plan = read_plan(model, Sweep(ask.study, "nodes", "patch", ask.direction, over_set=ask.over_set, chunk_mb=ask.chunk_mb))
    labels = columns(plan.whole, plan.side, replace(plan.ask, kind="z_pos")) if ask.by_pos and ask.each == "sender" else ()
    ends = [parse_node(a).pos for a in (*ask.senders, *ask.receivers) if a.strip() != LOGITS]
    tables = each_layout(plan.whole, (*labels, *(p for p in ends if isinstance(p, str))), lambda r: lay_out(r, ask, labels))
    mine = {id(runs) for runs in plan.runs}
    tables = [x for x, runs in zip(same_cells(tables), plan.whole) if id(runs) in mine]
    # the nodes whose values in the other run are needed
    kept = {id(paths): replace(v, cells={rc: x for rc, x in v.cells.items() if needed(x[0].node, paths)}) for v, (_, paths) in zip(plan.layouts, tables)}
    plan.layouts = [kept[id(paths)] for _, paths in tables]
    names = [f"blocks.{n}.hook_{s}_out" for n in range(model.info.n_layers) for s in ("attn", "mlp") if f"blocks.{n}.hook_{s}_out" in model.points]
    board = SweepTable(replace(plan, layouts=[layout for layout, _ in tables]))
    fill = partial(fill_paths, plan=plan, board=board, ask=ask, cells=[{p.cell: p for p in paths.values()} for _, paths in tables])
    early = yield from over_bases(plan, fill, (*names, EMBED), board.forget)
    return early or labelled((yield from board.finish()), ask, plan)


def same_cells(tables: list[tuple[Layout, dict]]) -> list[tuple[Layout, dict]]:
    """Each prompt's table with the cells that all of them have."""
    common = set.intersection(*(set(paths) for _, paths in tables))
    if not common:
        raise UserError("there is no path that every prompt of the set has: a receiver has to come after its sender")
    known: dict[int, tuple[Layout, dict]] = {}
    for layout, paths in tables:
        some = lambda x: {rc: value for rc, value in x.items() if rc in common}  # noqa: E731
        known.setdefault(id(paths), (replace(layout, cells=some(layout.cells)), some(paths)))
    return [known[id(paths)] for _, paths in tables]


def fill_paths(
    members: list[int], base: Base, sides: tuple[np.ndarray, ...], plan: Plan, board: SweepTable, ask: PathPatch, cells: list[dict[int, Path]]
) -> Generator[Progress | SweepResult, None, SweepResult | None]:
    """The cells of a few prompts, as many paths at a time as fit; of a dry run the first few, and with them the result: how long all of it takes."""
    if base.reason:
        raise UserError(f"path patching runs the model block by block, and {base.reason}")
    runs = [plan.runs[i] for i in members]
    other = base.beside.get(EMBED)
    other = runs[0].of(plan.other).forward(t.tensor([r.row(plan.other).ids for r in runs]), [EMBED])[1][EMBED] if other is None else other
    base.source["embed"] = aligned(plan, other, base.resid[0], (0, "resid_pre", "z"), runs[0])
    board.begin(members, base, sides)
    waiting = [cells[members[0]][v.cell] for v in board.waiting]
    change = changes(base, list(dict.fromkeys(s for p in waiting for s in p.senders)))
    change = {k: v[:, : base.stop - base.shared] for k, v in change.items()}
    say = lambda _: Progress(board.done, board.total, f"paths: {board.done} of {board.total}")  # noqa: E731

    def work(start: int, stop: int) -> Generator[Progress, None, tuple[list[Path], np.ndarray]]:
        some, found = waiting[start:stop], None
        if ask.convention == "mlps":
            wave = through_mlps(base, list(dict.fromkeys(p.senders for p in some)), change, {r for p in some for r in p.receivers})
            found = yield from forward_progress(wave, say)
        return some, (yield from forward_progress(deliver(base, some, change, found), say))

    began = time.monotonic()
    for part in Chunks("paths", at_once(base), partial(fewer, base)).over(len(waiting), work):
        if isinstance(part, Progress):
            yield part
            continue
        base.at_once = max(base.at_once, len(part[0]))
        board.fill(*part)
        if ask.dry:
            n = len(part[0])
            seconds = (time.monotonic() - began) / n / len(members) * (board.total - board.done) + time.monotonic() - began
            return replace(labelled(board.result(False), ask, plan), warning=f"the whole table: about {seconds:.1f} s, by its first {n} paths")
        if board.done < board.total:
            yield labelled(board.result(False), ask, plan)
    return None


def fewer(base: Base, paths: int) -> None:
    """The base runs that follow begin with as many paths as fit."""
    base.limit = min(base.limit, 2 * paths * base.token_bytes() * (base.stop - base.shared))


def at_once(base: Base) -> int:
    """Paths in one batch: what the limit of bytes holds, and on a CPU what a block does in about a tenth of a second."""
    i, length = base.model.info, base.stop - base.shared
    work = 2 * i.d_model * (4 * i.d_model + 3 * i.d_mlp) * length * len(base.ids)
    fast = int(2 * PIECE * t.get_num_threads() / work) if base.model.device.type == "cpu" else 10**6
    return max(1, min(base.room(length) // 2, fast))


def needed(node: Node, paths: dict) -> bool:
    return any((s.site, s.layer, s.head) == (node.site, node.layer, node.head) for p in paths.values() for s in p.senders)


def labelled(result: SweepResult, ask: PathPatch, plan: Plan) -> SweepResult:
    """A sweep's result as one of path patching, with its convention."""
    model, called = plan.model, plan.runs[0].called
    way = f"{ask.direction}: {called(plan.side)} run, the path carries the {called(plan.other)} value"
    if ask.study.interventions:
        way += f", the {called(plan.other)} run without the interventions"
    if ask.each == "receiver":
        pos = next((p for r in ask.receivers if r != LOGITS and (p := parse_node(r).pos) is not None), None)
        to = "each receiver" + ("" if pos is None else f" at {pos}")
    else:
        to = ", ".join(ask.receivers)
    ends = f"{', '.join(ask.senders) or 'every node'} → {to}"
    words = [f"path patching {ends}", way, CONVENTIONS[ask.convention]]
    if plan.runs[0].pair:
        words.append("a head sends its z, written by the matrices of the model that is changed")
    if model.info.n_kv_heads < model.info.n_heads:
        words.append("k and v are shared by a group of heads")
    if post_scales(model, "attn"):
        words.append("a sender's norm after attention is computed again")
    words += [f"{ask.study.metric.kind}@{ask.study.metric.pos}", model.info.dtype]
    if ask.study.interventions:
        words.append(f"under {', '.join(map(str, ask.study.interventions))}")
    return replace(result, kind="path", effect=ask.convention, convention="; ".join(words))
