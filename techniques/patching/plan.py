"""
What a sweep runs: its table, and the base runs with every spot's new values.

1. `lay_out` turns a kind into a table: row and column labels, and for each cell the spots that change.
2. `read_plan` reads the study; everything that can be refused is refused there.
3. `over_bases` runs the base prompts, finds the new values (from the other prompt, a mean, zero, ...) and hands them on, a few prompts at a time.
"""

import math
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import PatchSite, patch_site
from model.bridge import FINAL, Model
from model.interventions import prepare
from model.memory import block_bytes, chunk_bytes, halved, out_of_memory, ran_out
from model.metrics import MetricReader
from model.places import hook_name, visible
from model.replacements import gaussian, means, noise_scale, others_of, place_in_set, resampled
from model.runs import Runs, read_study
from model.variants import Base
from techniques.patching import feature_sweep
from techniques.patching.requests import SWEEP_OPS, SWEEPS, Sweep
from vocabulary.nodes import Node, UserError, parse_node
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Progress
from vocabulary.sets import LeftOut, Members, fitting, in_part

BATCH = 32
POSITIONED = ("resid_pre", "resid_mid", "resid_post", "attn", "mlp", "attn_mlp", "z_pos", "cells", "features")  # tables with a column a position


# ------------------------------------------------------------------ cells


@dataclass
class Layout:
    """A table: labels, what each cell changes (missing: no such cell), and the cells' addresses where each is one node."""

    rows: tuple[str, ...]
    cols: tuple[str, ...]
    cells: dict[tuple[int, int], tuple[PatchSite, ...]]
    nodes: tuple[str, ...] = ()


def one_each(runs: Runs, rows: list[str], cols: list[str], node: Callable[[int, int], Node]) -> Layout:
    """A table in which every cell is one node."""
    nodes = {(r, c): node(r, c) for r in range(len(rows)) for c in range(len(cols))}
    spots = {rc: (patch_site(runs.model, runs.placed(n)),) for rc, n in nodes.items()}
    return Layout(tuple(rows), tuple(cols), spots, tuple(str(n) for n in nodes.values()))


def lay_out(runs: Runs, ask: Sweep, labels: tuple[str, ...] = ()) -> Layout:
    """The table of a kind, on the run that is changed; by these labels where the prompts of a set differ in length."""
    model, info, row = runs.model, runs.model.info, runs.row("now")
    where = labels or range(len(row.ids) - row.tail)
    layers, places = [f"L{i}" for i in range(info.n_layers)], [str(p) for p in where]
    match ask.kind:
        case "resid_pre" | "resid_mid" | "resid_post" | "attn" | "mlp":
            return one_each(runs, layers, places, lambda r, c: Node(ask.kind, r, pos=where[c]))
        case "attn_mlp":
            rows = [f"{layer}.{site}" for layer in layers for site in ("attn", "mlp")]
            return one_each(runs, rows, places, lambda r, c: Node(("attn", "mlp")[r % 2], r // 2, pos=where[c]))
        case "z" | "q" | "pattern":
            heads = [f"H{h}" for h in range(info.n_heads)]
            return one_each(runs, layers, heads, lambda r, c: Node("head", r, c, ask.kind))
        case "k" | "v":
            per = info.n_heads // info.n_kv_heads
            heads = [f"H{h}" if per == 1 else f"H{h}-{h + per - 1}" for h in range(0, info.n_heads, per)]
            return one_each(runs, layers, heads, lambda r, c: Node("head", r, c * per, ask.kind))
        case "nodes":
            cols = [*(f"H{h}" for h in range(info.n_heads)), "MLP"]
            return one_each(runs, layers, cols, lambda r, c: Node("mlp", r) if c == info.n_heads else Node("head", r, c))
        case "z_pos":
            rows = [f"L{layer}H{h}" for layer in range(info.n_layers) for h in range(info.n_heads)]
            return one_each(runs, rows, places, lambda r, c: Node("head", r // info.n_heads, r % info.n_heads, pos=where[c]))
        case "cells":
            node = one_node(ask, "head", "L2H3")
            at = [runs.position("now", p) for p in where]
            seen = visible(model, node.layer, len(row.ids))[at][:, at].nonzero().tolist()
            spots = {(d, s): (patch_site(model, replace(node, part="pattern", pos=at[d]), at[s]),) for d, s in seen}
            return Layout(tuple(places), tuple(places), spots)
        case "neurons":
            node = one_node(ask, "mlp", "L3.mlp")
            node = node if isinstance(node.pos, str) and ask.over_set else runs.placed(node)
            model.point(f"blocks.{node.layer}.mlp.hook_post")
            neurons = [f"n{i}" for i in range(model.widths[node.layer])]
            return one_each(runs, [f"L{node.layer}.mlp"], neurons, lambda r, c: Node("neuron", node.layer, index=c, pos=node.pos))
        case "features":
            return Layout(*feature_sweep.lay_out(runs, ask, where))
        case "pairs" | "cumulative":
            spots = [patch_site(model, some_node(a, runs)) for a in ask.nodes]
            names = tuple(ask.nodes)
            if ask.kind == "cumulative":
                return Layout(("together",), ("nothing", *(f"+ {a}" for a in names)), {(0, i): tuple(spots[:i]) for i in range(len(spots) + 1)})
            cells = {(i, j): tuple(spots[k] for k in sorted({i, j})) for i in range(len(spots)) for j in range(len(spots))}
            return Layout(names, names, cells)
    raise AssertionError(ask.kind)


def one_node(ask: Sweep, site: str, example: str) -> Node:
    node = parse_node(ask.node) if ask.node else None
    if node is None or node.site != site:
        raise UserError(f"the sweep {ask.kind!r} needs one {'head' if site == 'head' else 'MLP'}, such as {example}")
    return node


def some_node(address: str, runs: Runs) -> Node:
    node = parse_node(address)
    if node.site == "embed":
        raise UserError(f"{address}: use L0.resid_pre, what comes in at layer 0")
    return runs.placed(node)


# ------------------------------------------------------------------ what is asked for


@dataclass
class Plan:
    """
    The prompts of a sweep (with their indices into the set), which run is changed and where new values come from, and each prompt's table: all have the same
    labels and cells, at the prompt's own positions. `left`: the prompts of the set that can't be asked. `whole`: the runs of the whole set, where `runs` are a part's.
    """

    model: Model
    ask: Sweep
    members: Members
    runs: list[Runs]
    side: str
    other: str
    layouts: list[Layout]
    limit: int
    left: LeftOut = ()
    every: tuple[Runs, ...] = ()

    @property
    def layout(self) -> Layout:
        return self.layouts[0]

    @property
    def whole(self) -> list[Runs]:
        return [*self.every] or self.runs

    @property
    def study(self) -> Study:
        return replace(self.ask.study, base=self.side)

    @property
    def spots(self) -> list[PatchSite]:
        return list(dict.fromkeys(s for spots in self.layout.cells.values() for s in spots))

    @property
    def seq(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(r.row(self.side).ids) for r in self.runs)


def check(ask: Sweep) -> None:
    for what, value, known in (("a sweep", ask.kind, SWEEPS), ("an operation of a sweep", ask.op, SWEEP_OPS)):
        if value not in known:
            raise UserError(f"{value!r} is not {what}: use one of {', '.join(known)}")
    if ask.direction not in ("denoise", "noise"):
        raise UserError(f"{ask.direction!r} is not a direction: use denoise (clean values into the corrupted run) or noise (the reverse)")
    if ask.effect not in ("total", "direct"):
        raise UserError(f"{ask.effect!r} is not an effect: use total or direct")
    if not math.isfinite(ask.noise) or ask.noise <= 0:
        raise UserError("noise is a positive number of the embedding's standard deviations")
    if ask.first not in ("", "estimate"):
        raise UserError(f"{ask.first!r} does not say what runs first: use estimate, or nothing")
    if ask.k < 1:
        raise UserError("k must be at least 1")


def read_plan(model: Model, ask: Sweep) -> Plan:
    """Everything that can be refused is refused here. The plan's model is the one whose run is changed."""
    check(ask)
    study = ask.study
    if ask.over_set and not study.prompt_set:
        raise UserError("there is no prompt set: open one first")
    side = study.base if ask.op != "patch" else {"denoise": "corrupt", "noise": "clean"}[ask.direction]
    other = "corrupt" if side == "clean" else "clean"
    read = lambda prompt: read_member(model, replace(study, prompt=prompt, base=side, interventions=(), part=None), ask.op)  # noqa: E731
    members, runs, left = read_set(model, study, read, side, ask.op) if ask.over_set else ([(0, study.prompt)], [read(study.prompt)], ())
    labels = columns(runs, side, ask)
    layouts = each_layout(runs, named(ask, labels), lambda r: lay_out(r, ask, labels))
    drop_unaligned(layouts, ask, [r.partners(side) if ask.op == "patch" else None for r in runs])
    layout = layouts[0]
    if bad := [rc for rc in ask.only if rc not in layout.cells]:
        raise UserError(f"there is no cell {bad[0]}: the table has {len(layout.rows)} rows and {len(layout.cols)} columns")
    for each in layouts if ask.only else ():
        each.cells = {rc: each.cells[rc] for rc in dict.fromkeys(ask.only) if rc in each.cells}
    model, mine = runs[0].model, in_part(members, study.part)
    some = lambda x: [x[i] for i in mine]  # noqa: E731
    return Plan(model, ask, some(members), some(runs), side, other, some(layouts), chunk_bytes(model.device, ask.chunk_mb), left, tuple(runs))


def read_set(model: Model, study: Study, read: Callable[[Prompt], Runs], *how: object) -> tuple[Members, list[Runs], LeftOut]:
    """The whole set's prompts that `read` takes, its runs of them, and who is left out. Where a part is asked for, kept for the next one."""
    question = (replace(study, part=None), *how)
    if study.part is None:
        return fitting(enumerate(study.prompt_set), read)
    if model.notes.members is None or model.notes.members[0] != question:
        model.notes.members = question, fitting(enumerate(study.prompt_set), read)
    return model.notes.members[1]


def named(ask: Sweep, labels: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The labels that a sweep's cells stand at."""
    nodes = [parse_node(a) for a in (*ask.nodes, *[ask.node] * bool(ask.node and ask.kind != "features"))]
    return tuple(dict.fromkeys((*labels, *(n.pos for n in nodes if isinstance(n.pos, str)))))


def each_layout[T](runs: list[Runs], labels: tuple[str, ...], make: Callable[[Runs], T]) -> list[T]:
    """What `make` gives for each run, made once for those of one length whose labels stand at the same positions."""
    known: dict[tuple, T] = {}
    out = []
    for r in runs:
        row = r.row("now")
        key = (len(row.ids), row.tail, *(r.position("now", name) for name in labels))
        out.append(known[key] if key in known else known.setdefault(key, make(r)))
    return out


def read_member(model: Model, study: Study, op: str) -> Runs:
    """One prompt of a sweep or a circuit; what stops `op` on it is an error."""
    patch = op == "patch"
    if study.prompt.corrupt is None and not study.against and (patch or study.base == "corrupt"):
        raise UserError("there is no corrupted prompt, and patching needs one: E types one (in a shell --corrupt)")
    runs, kind = read_study(model, study, with_answer=True), study.metric.kind
    if study.metric.needs_answer and not runs.answers:
        raise UserError(f"there is no answer, and {kind} needs one: give one, with its leading space")
    if kind in ("logit_diff", "prob_diff") and not runs.foils:
        raise UserError(f"there is no foil, and {kind} needs one: give one, or use the metric logprob")
    if kind == "loss" and len(runs.row("now").ids) < 2:
        raise UserError("loss needs a prompt of two tokens")
    if not study.metric.whole:
        for which in ("clean", "corrupt"):
            if runs.rows[which] is not None:
                runs.metric_position(which)
    if patch:
        runs.partners(study.base)
    if op == "resample":
        row = runs.row("now")
        n = len(row.ids) - row.tail
        others_of(model, study, n, row.ids[:n])
    return runs


def columns(runs: list[Runs], side: str, ask: Sweep) -> tuple[str, ...]:
    """The labels that a table by position goes by where its prompts differ in length, in the first one's order; () where it goes by position, or has none."""
    rows = [r.row(side) for r in runs]
    counts = Counter(len(row.ids) - row.tail for row in rows)
    if len(counts) == 1 or ask.kind not in POSITIONED:
        return ()
    shared = [n for n in sorted(rows[0].labels, key=rows[0].labels.get) if all(n in row.labels for row in rows)]
    if len(shared) < 2:
        words = ", ".join(f"{count} with {n} tokens" for n, count in sorted(counts.items()))
        raise UserError(
            f"a table by position over prompts of several lengths ({words}) goes by label, and they share none but END: give them labels, or sweep heads at all positions"
        )
    return tuple(shared)


def drop_unaligned(layouts: list[Layout], ask: Sweep, sides: list[tuple[int, ...] | None]) -> None:
    """Cells at a position without partner (in some prompt), or that some prompt has not, are no cells. Where there is no other kind of cell, an error."""
    lost = {rc for layout in layouts for rc in layouts[0].cells.keys() ^ layout.cells.keys()}
    for layout, there in {(id(a), b): (a, b) for a, b in zip(layouts, sides) if b is not None}.values():
        if ask.kind == "pattern" or any(
            s.node.part == "pattern" and s.node.site == "head" and s.source is None for spots in layout.cells.values() for s in spots
        ):
            raise UserError("a pattern's row holds sources without partner in the other prompt: sweep z, q, k, v, or one head's cells")
        alone = {i for i, j in enumerate(there) if j < 0}
        mine = {rc for rc, spots in layout.cells.items() if any(s.node.pos in alone or s.source in alone for s in spots)}
        lost |= mine
        if mine and (ask.kind in ("pairs", "cumulative") or len(lost) == len(layout.cells)):
            at = min(alone & {p for rc in mine for s in layout.cells[rc] for p in (s.node.pos, s.source)} - {None})
            raise UserError(f"position {at} has no partner in the other prompt: leave it out, or edit the alignment")
    for layout in layouts:
        layout.cells = {rc: spots for rc, spots in layout.cells.items() if rc not in lost}


# ------------------------------------------------------------------ base runs and new values


def reads(model: Model, spot: PatchSite) -> str:
    """The hook point whose values say what a spot holds."""
    return hook_name(model, spot.node)


def over_bases(
    plan: Plan, work: Callable[[list[int], Base, tuple], Generator], more: tuple[str, ...] = (), undo: Callable[[list[int]], None] = lambda members: None
) -> Generator:
    """
    work(members, base, sides) on a few prompts at a time: their indices, the base run with every spot's new values, and the metric of base, clean and
    corrupted [prompt] each (corrupted NaN where there is none). Under interventions, whose values differ from prompt to prompt, one by one. Where memory
    runs out, what the prompts have done so far is undone and half as many go on; a single one's clean and corrupted run then go one after the other. What
    work returns, unless it is None, ends it.
    """
    ask, model = plan.ask, plan.model
    names = list(dict.fromkeys(name for s in plan.spots for name in {reads(model, s), s.name, *s.also}))
    if not (plan.study.interventions or ask.plain):
        names += [z for s in plan.spots if s.node.site == "head" and s.node.pos is None and (z := f"blocks.{s.node.layer}.attn.hook_z") not in names]
    bytes_each = sum(model.info.d_model for _ in names) * plan.seq * 8
    size = 1 if plan.study.interventions else max(1, min(BATCH, plan.limit // max(1, bytes_each), room(plan)))
    waiting, apart = batches(plan, size), False
    while waiting:
        members = waiting.pop(0)
        try:
            base, sides = yield from base_run(plan, members, names, more, apart)
            found = yield from work(members, base, sides)
        except Exception as error:
            base = sides = None
            ran_out(error)
            undo(members)
            if len(members) == 1 and apart:
                raise out_of_memory(error) from None
        else:
            plan.limit, base = min(plan.limit, base.limit), None
            if found is not None:
                return found
            continue
        if len(members) == 1:
            apart, waiting = True, [members, *waiting]
            yield Progress(0, 0, "out of memory at clean and corrupted run together: going on with one at a time", notice=True)
            continue
        half = len(members) // 2
        waiting = [some[a : a + half] for some in (members, *waiting) for a in range(0, len(some), half)]
        yield halved(len(members), half, "prompts")


def base_run(
    plan: Plan, indices: list[int], names: list[str], more: tuple[str, ...], apart: bool
) -> Generator[Progress, None, tuple[Base, tuple[np.ndarray, ...]]]:
    """The base run of some prompts with every spot's new values, and the metric of base, clean and corrupted; the two in one pass unless `apart`."""
    model, ask, group = plan.model, plan.ask, [plan.runs[i] for i in indices]
    last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    if plan.study.interventions:
        group = [(yield from prepare(model, replace(plan.study, prompt=plan.members[indices[0]][1]), with_answer=True))]
    tensor = lambda which: t.tensor([r.row(which).ids for r in group])  # noqa: E731
    shared = 0
    if ask.op == "patch" and not plan.study.interventions and model.causal and not group[0].pair:
        shared = min(same_start(r, plan.side, plan.other) for r in group)
    both = all(r.rows[w] is not None for r in group for w in ("clean", "corrupt")) and not plan.study.interventions
    both = both and not apart and group[0].together("clean", "corrupt") and tensor("clean").shape == tensor("corrupt").shape
    wanted = [*names, *more, *([FINAL] if ask.study.metric.kind == "kl" else [])]
    base = Base(group, wanted, plan.limit, ask.plain, shared, tensor(plan.other) if both else None)
    acts = ({} if base.edits else {plan.side: base.acts}) | ({plan.other: base.beside} if both else {})
    for which in ("clean", "corrupt"):
        if which not in acts and all(r.rows[which] is not None for r in group):
            acts[which] = group[0].of(which).forward(tensor(which), [last, FINAL, *(names if which == plan.other and ask.op == "patch" else [])], keep=None)[1]
    clean = None
    if ask.study.metric.kind == "kl":
        clean = t.stack([x[r.metric_position("clean")] for r, x in zip(group, acts["clean"][FINAL])])
    sides = {which: MetricReader(group, clean, which).of(a[last], 0)[0] for which, a in acts.items()}
    if not all(np.isfinite(v).all() for v in sides.values()):
        raise UserError("the metric of the clean or corrupted run is not finite: does the model hold NaN? Try float32")
    value = base.begin(MetricReader(group, clean))
    yield from new_values(plan, base, acts.get(plan.other, {}), indices)
    missing = np.full(len(group), math.nan)
    return base, (value, sides.get("clean", missing), sides.get("corrupt", missing))


def batches(plan: Plan, size: int) -> list[list[int]]:
    """Prompts that can run together: base and source runs of one length, aligned in one way, whose cells stand at the same positions."""
    kinds: dict[tuple, list[int]] = {}
    for i, r in enumerate(plan.runs):
        other = r.rows[plan.other]
        partners = r.partners(plan.side) if plan.ask.op == "patch" else None
        key = (id(plan.layouts[i]), len(r.row(plan.side).ids), None if other is None else len(other.ids), partners)
        kinds.setdefault(key, []).append(i)
    return [some[a : a + size] for some in kinds.values() for a in range(0, len(some), size)]


def same_start(runs: Runs, side: str, other: str) -> int:
    """The first position at which a patch can change something: other tokens, or tokens that are aligned with other positions."""
    own, theirs, there = runs.row(side).ids, runs.row(other).ids, runs.partners(side)
    for i, token in enumerate(own):
        if i >= len(theirs) or token != theirs[i] or there is not None and there[i] not in (i, -1):
            return i
    return len(own)


def room(plan: Plan) -> int:
    """Prompts at once such that some 8 variants of all of them fit into a chunk."""
    return max(1, plan.limit // (8 * plan.seq * block_bytes(plan.model.info, plan.seq, 4)))


def new_values(plan: Plan, base: Base, other: dict[str, Tensor], indices: list[int]) -> Generator[Progress]:
    """Fill base.source: for every node that some spot is part of, its new values [prompt, ...]."""
    model, ask = plan.model, plan.ask
    if ask.kind == "features":
        base.source |= feature_sweep.new_values(plan.spots, base, other, [plan.runs[i] for i in indices], ask.op, plan.side)
        return
    hooks = {s.key: reads(model, s) for s in plan.spots}
    if ask.op.startswith("mean"):
        if ask.op in ("mean_all", "mean_text") and any(name.endswith("pattern") for name in hooks.values()):
            raise UserError("a pattern has no mean over positions; use mean with a set of one template, or zero")
        other = yield from means(
            model, ask.study, list(hooks.values()), ask.op, [plan.runs[i].row(plan.side) for i in indices], [r.row(plan.side) for r in plan.whole]
        )
    elif ask.op == "resample":
        _, other = model.forward(t.tensor([others(plan, i) for i in indices]), list(hooks.values()), keep=None)
    deviation = noise_scale(model) * ask.noise if ask.op == "noise" else 0.0
    for key, name in hooks.items():
        own = base.acts[name]
        match ask.op:
            case "zero":
                x = t.zeros_like(own)
            case "noise":
                x = own + deviation * t.stack(
                    [gaussian(own.shape[1:], (ask.seed, place_in_set(replace(plan.study, prompt=plan.members[i][1])), key)) for i in indices]
                ).to(own)
            case _:
                x = aligned(plan, other[name], own, key, plan.runs[indices[0]]) if ask.op == "patch" else other[name].expand_as(own)
        base.source[key] = x


def aligned(plan: Plan, theirs: Tensor, own: Tensor, key: tuple, runs: Runs) -> Tensor:
    """The other run's values [prompt, ...] at the base run's positions; where a position has no partner, its own value."""
    there = runs.partners(plan.side)
    if there is None:
        return theirs
    here = [i for i, j in enumerate(there) if j >= 0]
    x, partner = own.clone(), [there[i] for i in here]
    if key[1:] == ("head", "pattern"):
        x[:, :, t.tensor(here)[:, None], here] = theirs[:, :, t.tensor(partner)[:, None], partner].to(x)
    else:
        x[:, here] = theirs[:, partner].to(x)
    return x


def others(plan: Plan, i: int) -> tuple[int, ...]:
    """The corrupted prompt of the set that a prompt's values are resampled from."""
    row = plan.runs[i].row(plan.side)
    n = len(row.ids) - row.tail
    return resampled(plan.model, replace(plan.study, prompt=plan.members[i][1]), n, row.ids[:n], plan.ask.seed) + row.ids[n:]
