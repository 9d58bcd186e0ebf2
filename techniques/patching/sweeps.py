"""
Sweeps: the metric under one change a cell, over one prompt or a set.

1. `lay_out` turns a kind into a table: row and column labels, and for each cell the spots that change.
2. `Plan` reads the study; `bases` runs the base prompts and finds every spot's new values (from the other prompt, a mean, zero, ...).
3. `sweep` lets variants.py run the variants, fills the table as they come, and ends with statistics over the prompts.
"""

import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace

import numpy as np
import torch as t
from torch import Tensor

from techniques.patching import feature_sweep
from techniques.patching.requests import Sweep, SWEEP_OPS, SweepResult, SWEEPS
from vocabulary.nodes import Node, parse_node, UserError
from vocabulary.prompts import METRICS, Prompt, Study, TokenRow
from vocabulary.requests import Progress
from model.bridge import FINAL, Model
from model.runs import Runs, find_position, gaussian, hook_name, means, noise_scale, place_in_set, read_study, resampled
from model.base_run import PatchSite, patch_site
from model.interventions import prepare
from model.metrics import MetricReader
from model.variants import Base, Variant
from utils import settings

CHUNK_MB = 128
BATCH = 32
FLIPS = 4096
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131, 2.12, 2.11, 2.101, 2.093, 2.086)


# ------------------------------------------------------------------ cells


@dataclass
class Layout:
    """A table: labels, what each cell changes (missing: no such cell), and the cells' addresses where each is one node."""

    rows: tuple[str, ...]
    cols: tuple[str, ...]
    cells: dict[tuple[int, int], tuple[PatchSite, ...]]
    nodes: tuple[str, ...] = ()


def one_each(model: Model, rows: list[str], cols: list[str], node: Callable[[int, int], Node]) -> Layout:
    """A table in which every cell is one node."""
    nodes = {(r, c): node(r, c) for r in range(len(rows)) for c in range(len(cols))}
    return Layout(tuple(rows), tuple(cols), {rc: (patch_site(model, n),) for rc, n in nodes.items()}, tuple(str(n) for n in nodes.values()))


def lay_out(model: Model, ask: Sweep, row: TokenRow) -> Layout:
    info, seq = model.info, len(row.ids)
    layers, places = [f"L{i}" for i in range(info.n_layers)], [str(i) for i in range(seq)]
    match ask.kind:
        case "resid_pre" | "resid_mid" | "resid_post" | "attn" | "mlp":
            return one_each(model, layers, places, lambda r, c: Node(ask.kind, r, pos=c))
        case "attn_mlp":
            rows = [f"{layer}.{site}" for layer in layers for site in ("attn", "mlp")]
            return one_each(model, rows, places, lambda r, c: Node(("attn", "mlp")[r % 2], r // 2, pos=c))
        case "z" | "q" | "pattern":
            heads = [f"H{h}" for h in range(info.n_heads)]
            return one_each(model, layers, heads, lambda r, c: Node("head", r, c, ask.kind))
        case "k" | "v":
            per = info.n_heads // info.n_kv_heads
            heads = [f"H{h}" if per == 1 else f"H{h}-{h + per - 1}" for h in range(0, info.n_heads, per)]
            return one_each(model, layers, heads, lambda r, c: Node("head", r, c * per, ask.kind))
        case "nodes":
            cols = [*(f"H{h}" for h in range(info.n_heads)), "MLP"]
            return one_each(model, layers, cols, lambda r, c: Node("mlp", r) if c == info.n_heads else Node("head", r, c))
        case "z_pos":
            rows = [f"L{layer}H{h}" for layer in range(info.n_layers) for h in range(info.n_heads)]
            return one_each(model, rows, places, lambda r, c: Node("head", r // info.n_heads, r % info.n_heads, pos=c))
        case "cells":
            node = one_node(ask, "head", "L2H3")
            spots = {(d, s): (patch_site(model, replace(node, part="pattern", pos=d), s),) for d in range(seq) for s in range(d + 1)}
            return Layout(tuple(places), tuple(places), spots)
        case "neurons":
            node = one_node(ask, "mlp", "L3.mlp")
            pos = None if node.pos is None else find_position(node.pos, row, "the prompt")
            neurons = [f"n{i}" for i in range(info.d_mlp)]
            return one_each(model, [f"L{node.layer}.mlp"], neurons, lambda r, c: Node("neuron", node.layer, index=c, pos=pos))
        case "features":
            return Layout(*feature_sweep.lay_out(model, ask, seq))
        case "pairs" | "cumulative":
            spots = [patch_site(model, some_node(a, row)) for a in ask.nodes]
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


def some_node(address: str, row: TokenRow) -> Node:
    node = parse_node(address)
    if node.site == "embed":
        raise UserError(f"{address}: use L0.resid_pre, what comes in at layer 0")
    return node if node.pos is None else replace(node, pos=find_position(node.pos, row, "the prompt"))


# ------------------------------------------------------------------ what is asked for


@dataclass
class Plan:
    """The prompts of a sweep (with their indices into the set), which run is changed and where new values come from, and the table."""

    model: Model
    ask: Sweep
    members: list[tuple[int, Prompt]]
    runs: list[Runs]
    side: str
    other: str
    layout: Layout
    limit: int

    @property
    def study(self) -> Study:
        return replace(self.ask.study, base=self.side)

    @property
    def spots(self) -> list[PatchSite]:
        return list(dict.fromkeys(s for spots in self.layout.cells.values() for s in spots))

    @property
    def seq(self) -> int:
        return len(self.runs[0].row(self.side).ids)


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
    """Everything that can be refused is refused here."""
    check(ask)
    study = ask.study
    members = list(enumerate(study.prompt_set)) if ask.over_set else [(0, study.prompt)]
    if not members:
        raise UserError("there is no prompt set: open one first")
    side = study.base if ask.op != "patch" else {"denoise": "corrupt", "noise": "clean"}[ask.direction]
    other = "corrupt" if side == "clean" else "clean"
    runs = []
    for i, prompt in members:
        try:
            runs.append(read_member(model, replace(study, prompt=prompt, base=side, interventions=()), ask.op == "patch"))
        except UserError as error:
            raise UserError(f"prompt {i + 1} of the set: {error}" if ask.over_set else str(error)) from error
    check_lengths(runs, side, ask)
    layout = lay_out(model, ask, runs[0].row(side))
    if ask.op == "patch":
        drop_unaligned(layout, ask, [r.partners(side) for r in runs])
    if bad := [rc for rc in ask.only if rc not in layout.cells]:
        raise UserError(f"there is no cell {bad[0]}: the table has {len(layout.rows)} rows and {len(layout.cols)} columns")
    if ask.only:
        layout.cells = {rc: layout.cells[rc] for rc in dict.fromkeys(ask.only)}
    return Plan(model, ask, members, runs, side, other, layout, chunk_bytes(model, ask.chunk_mb))


def read_member(model: Model, study: Study, patch: bool) -> Runs:
    if study.prompt.corrupt is None and (patch or study.base == "corrupt"):
        raise UserError("there is no corrupted prompt, and patching needs one: type one first")
    runs, kind = read_study(model, study), study.metric.kind
    if kind not in ("kl", "loss") and not runs.answers:
        raise UserError(f"there is no answer, and {kind} needs one: give one, with its leading space")
    if kind in ("logit_diff", "prob_diff") and not runs.foils:
        raise UserError(f"there is no foil, and {kind} needs one: give one, or use the metric logprob")
    if kind == "loss" and len(runs.row("now").ids) < 2:
        raise UserError("loss needs a prompt of two tokens")
    if kind != "loss":
        for which in ("clean", "corrupt"):
            if runs.rows[which] is not None:
                runs.metric_position(which)
    return runs


def check_lengths(runs: list[Runs], side: str, ask: Sweep) -> None:
    """Patching goes by position: clean and corrupted have to be of one length or aligned, and the base prompts of a set of one length."""
    for i, r in enumerate(runs):
        if ask.op == "patch":
            try:
                r.partners(side)
            except UserError as error:
                raise UserError((f"prompt {i + 1} of the set: " if ask.over_set else "") + str(error)) from error
    counts: dict[int, int] = {}
    for r in runs:
        n = len(r.row(side).ids)
        counts[n] = counts.get(n, 0) + 1
    if len(counts) > 1:
        words = ", ".join(f"{count} with {n} tokens" for n, count in sorted(counts.items()))
        raise UserError(f"a sweep over a set needs prompts of equal length, and it has {words}: use a set of one template")


def drop_unaligned(layout: Layout, ask: Sweep, sides: list[tuple[int, ...] | None]) -> None:
    """Cells at a position without partner (in some prompt) are no cells. Where there is no other kind of cell, an error."""
    sides = [there for there in sides if there is not None]
    if not sides:
        return
    if ask.kind == "pattern" or any(s.node.part == "pattern" and s.node.site == "head" and s.source is None for spots in layout.cells.values() for s in spots):
        raise UserError("a pattern's row holds sources without partner in the other prompt: sweep z, q, k, v, or one head's cells")
    alone = {i for there in sides for i, j in enumerate(there) if j < 0}
    lost = {rc for rc, spots in layout.cells.items() if any(s.node.pos in alone or s.source in alone for s in spots)}
    if lost and (ask.kind in ("pairs", "cumulative") or len(lost) == len(layout.cells)):
        at = min(alone & {p for rc in lost for s in layout.cells[rc] for p in (s.node.pos, s.source)} - {None})
        raise UserError(f"position {at} has no partner in the other prompt: leave it out, or edit the alignment")
    layout.cells = {rc: spots for rc, spots in layout.cells.items() if rc not in lost}


def chunk_bytes(model: Model, megabytes: int) -> int:
    """Bytes of activations at once: asked for, or LOUPE_SWEEP_MB of .env, or a third of what an accelerator has free."""
    if not megabytes:
        text = settings().get("LOUPE_SWEEP_MB") or "0"
        if not text.isdigit():
            raise UserError(f"LOUPE_SWEEP_MB in .env is {text!r}: write a number of megabytes")
        megabytes = int(text)
    if megabytes:
        return megabytes << 20
    return t.cuda.mem_get_info(model.device)[0] // 3 if model.device.type == "cuda" else CHUNK_MB << 20


# ------------------------------------------------------------------ base runs and new values


def reads(model: Model, spot: PatchSite) -> str:
    """The hook point whose values say what a spot holds."""
    return hook_name(model, spot.node)


def bases(plan: Plan, more: tuple[str, ...] = ()) -> Generator[Progress | tuple]:
    """
    For a few prompts at a time: their indices, the base run with every spot's new values, the metric of base, clean and corrupted [prompt] each
    (corrupted NaN where there is none), and the source run's activations. Under interventions, whose values differ from prompt to prompt, one by one.
    """
    model, ask = plan.model, plan.ask
    last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
    names = list(dict.fromkeys(name for s in plan.spots for name in {reads(model, s), s.name, *s.also}))
    if not (plan.study.interventions or ask.plain):
        names += [z for s in plan.spots if s.node.site == "head" and s.node.pos is None and (z := f"blocks.{s.node.layer}.attn.hook_z") not in names]
    bytes_each = sum(model.info.d_model for _ in names) * plan.seq * 8
    size = 1 if plan.study.interventions else max(1, min(BATCH, plan.limit // max(1, bytes_each), room(plan)))
    for indices in batches(plan, size):
        group = [plan.runs[i] for i in indices]
        if plan.study.interventions:
            group = [(yield from prepare(model, replace(plan.study, prompt=plan.members[indices[0]][1])))]
        tensor = lambda which, group=group: t.tensor([r.row(which).ids for r in group])  # noqa: E731
        shared = 0
        if ask.op == "patch" and not plan.study.interventions:
            shared = min(same_start(r, plan.side, plan.other) for r in group)
        both = all(r.rows[w] is not None for r in group for w in ("clean", "corrupt")) and not plan.study.interventions
        both = both and tensor("clean").shape == tensor("corrupt").shape
        wanted = [*names, *more, *([FINAL] if ask.study.metric.kind == "kl" else [])]
        base = Base(group, wanted, plan.limit, ask.plain, shared, tensor(plan.other) if both else None)
        acts = ({} if base.edits else {plan.side: base.acts}) | ({plan.other: base.beside} if both else {})
        for which in ("clean", "corrupt"):
            if which not in acts and all(r.rows[which] is not None for r in group):
                acts[which] = model.forward(tensor(which), [last, FINAL, *(names if which == plan.other and ask.op == "patch" else [])], keep=None)[1]
        clean = None
        if ask.study.metric.kind == "kl":
            clean = t.stack([x[r.metric_position("clean")] for r, x in zip(group, acts["clean"][FINAL])])
        sides = {which: MetricReader(group, clean, which).of(a[last], 0)[0] for which, a in acts.items()}
        if not all(np.isfinite(v).all() for v in sides.values()):
            raise UserError("the metric of the clean or corrupted run is not finite: does the model hold NaN? Try float32")
        value = base.begin(MetricReader(group, clean))
        yield from new_values(plan, base, acts.get(plan.other, {}), indices)
        missing = np.full(len(group), math.nan)
        yield indices, base, (value, sides.get("clean", missing), sides.get("corrupt", missing))


def batches(plan: Plan, size: int) -> list[list[int]]:
    """Prompts that can run together: source runs of one length, aligned in one way."""
    kinds: dict[tuple, list[int]] = {}
    for i, r in enumerate(plan.runs):
        other = r.rows[plan.other]
        kinds.setdefault((None if other is None else len(other.ids), r.partners(plan.side) if plan.ask.op == "patch" else None), []).append(i)
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
    i = plan.model.info
    return max(1, plan.limit // (8 * 4 * plan.seq * (12 * i.d_model + 3 * i.d_mlp + 3 * i.n_heads * plan.seq)))


def new_values(plan: Plan, base: Base, other: dict[str, Tensor], indices: list[int]) -> Generator[Progress]:
    """Fill base.source: for every node that some spot is part of, its new values [prompt, ...]."""
    model, ask = plan.model, plan.ask
    if ask.kind == "features":
        base.source |= feature_sweep.new_values(plan.spots, base, other, [plan.runs[i] for i in indices], ask.op, plan.side)
        return
    hooks = {s.key: reads(model, s) for s in plan.spots}
    if ask.op in ("mean", "mean_all"):
        if ask.op == "mean_all" and any(name.endswith("pattern") for name in hooks.values()):
            raise UserError("a pattern has no mean over positions; use mean with a set of one template, or zero")
        other = yield from means(model, ask.study.prompt_set, list(hooks.values()), ask.op, plan.seq)
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
    return resampled(plan.model, replace(plan.study, prompt=plan.members[i][1]), plan.seq, plan.runs[i].row(plan.side).ids, plan.ask.seed)


# ------------------------------------------------------------------ the sweep


def sweep(model: Model, ask: Sweep) -> Generator[Progress | SweepResult, None, SweepResult]:
    """Progress and partial results as cells come in; then the result, with statistics over the prompts."""
    if ask.kind in ("pairs", "cumulative") and not ask.nodes:
        check(ask)
        ask = replace(ask, nodes=(yield from largest(model, ask)))
    if ask.kind == "features":
        check(ask)
        ask = replace(ask, nodes=(yield from feature_sweep.find_nodes(model, ask)))
    plan = read_plan(model, ask)
    if ask.effect == "direct":
        from techniques.patching.estimates import direct, direct_names

        more, run = direct_names(plan), direct
    else:
        more, run = (), lambda base, variants, begun: base.all(variants, begun)
    board = Board(plan)
    if model.device.type == "cuda":
        t.cuda.reset_peak_memory_stats(model.device)
    for part in bases(plan, more):
        if isinstance(part, Progress):
            yield part
            continue
        members, base, sides = part
        board.begin(members, base, sides)
        yield board.result(False)
        for i, some in enumerate((yield from rounds(plan, base, board))):
            for step in run(base, some, i > 0):
                if isinstance(step, Progress):
                    yield board.progress(step)
                    continue
                board.fill(*step)
                if board.done < board.total:
                    yield board.result(False)
    return board.result(True)


def rounds(plan: Plan, base: Base, board: "Board") -> Generator[Progress, None, list[list[Variant]]]:
    """
    What runs first when that is asked for: the tenth of the cells with the largest estimated effects, the first quarter of the layers and MLP 0;
    then the rest. One round where an estimate says nothing (a rank, several nodes at once, a direct effect).
    """
    ask, waiting = plan.ask, board.waiting
    if ask.first != "estimate" or ask.effect == "direct" or ask.study.metric.kind == "rank" or any(len(v.spots) != 1 for v in waiting) or len(waiting) < 20:
        return [waiting]
    from techniques.patching.estimates import guess

    size = yield from guess(plan, base, board)
    top = set(sorted(range(len(waiting)), key=lambda i: -size[i])[: math.ceil(len(waiting) / 10)])
    early = max(1, plan.model.info.n_layers // 4)
    soon = [i in top or v.layer < early for i, v in enumerate(waiting)]
    return [[v for v, now in zip(waiting, soon) if now == which] for which in (True, False)]


def largest(model: Model, ask: Sweep) -> Generator[Progress | SweepResult, None, tuple[str, ...]]:
    """The k nodes of the largest effect, heads and MLPs, the largest first."""
    singles = sweep(model, replace(ask, kind="nodes", only=()))
    while True:
        try:
            part = next(singles)
        except StopIteration as stop:
            found = stop.value
            break
        if isinstance(part, Progress):
            yield part
    order = np.argsort(-np.abs(found.values - found.base), axis=None, kind="stable")[: ask.k]
    return tuple(found.nodes[i] for i in order.tolist())


class Board:
    """The table as it fills: every prompt's metric in every cell."""

    def __init__(self, plan: Plan, method: str = "truth"):
        self.plan, self.method, layout = plan, method, plan.layout
        self.shape = len(layout.rows), len(layout.cols)
        self.cells = [r * self.shape[1] + c for r, c in layout.cells]
        n = len(plan.runs)
        self.values = np.full((n, self.shape[0] * self.shape[1]), math.nan)
        self.sides = np.full((3, n), math.nan)  # base, clean, corrupted
        self.total, self.done, self.at_once, self.reason = n * len(self.cells), 0, 0, ""
        self.members, self.base = [], None
        self.started, self.before = time.monotonic(), 0  # of the variants; prompts that are done
        self.peak = 0

    def begin(self, members: list[int], base: Base, sides: tuple[np.ndarray, ...]) -> None:
        """Cells before the first token that differs, or after the metric's position, are the base run."""
        self.before += len(self.members)
        self.members, self.base, self.reason = members, base, base.reason
        self.sides[:, members] = sides
        self.waiting = []
        for cell, spots in zip(self.cells, self.plan.layout.cells.values()):
            variant = Variant(cell, tuple(s for s in spots if s.node.pos is None or base.shared <= s.node.pos < base.stop))
            if variant.spots and max(variant.first, base.shared) < base.stop:
                self.waiting.append(variant)
            else:
                self.values[members, cell] = sides[0]
                self.done += len(members)
        base.plan_work(self.waiting)

    def fill(self, variants: list[Variant], found: np.ndarray) -> None:
        if not np.isfinite(found).all():
            raise UserError("a changed run gave numbers that are not finite: load the model in float32")
        self.values[np.ix_(self.members, [v.cell for v in variants])] = found.T
        self.done += found.size
        self.at_once, self.peak = max(self.at_once, self.base.at_once), max(self.peak, self.base.peak)

    def progress(self, step: Progress) -> Progress:
        """Cells by the work that is done, and the time left in words."""
        part = (self.before + self.base.progress * len(self.members)) / len(self.plan.runs)
        spent = time.monotonic() - self.started
        left = f", {spent * (1 - part) / part:.0f} s left" if part > 0.02 and spent > 1 else ""
        text = f"{self.plan.ask.kind} {self.done}/{self.total}{left}"
        return Progress(max(self.done, int(part * self.total)), self.total, f"{step.text}; {text}" if step.text else text)

    @property
    def peak_mb(self) -> float:
        device = self.plan.model.device
        return (t.cuda.max_memory_allocated(device) if device.type == "cuda" else self.peak) / 2**20

    def result(self, whole: bool) -> SweepResult:
        """Means over the prompts that are done; the rest with the whole table."""
        plan, ask, layout = self.plan, self.plan.ask, self.plan.layout
        known = ~np.isnan(self.sides[0])
        base, clean, corrupt = (float(s[known].mean()) for s in self.sides)
        some = ~np.isnan(self.values)
        count = some.sum(0)
        with np.errstate(invalid="ignore"):
            mean = np.where(some, self.values, 0.0).sum(0) / count
        normalised, warning = normalise(mean, base, self.sides[:, known])
        table = lambda x: np.asarray(x, np.float32).reshape(self.shape)  # noqa: E731
        empty, stats, every = np.zeros((0, 0), np.float32), {}, np.zeros((0, *self.shape), np.float32)
        if whole and ask.over_set:
            stats = {k: table(v) for k, v in statistics(self.values, self.sides[0], ask.seed).items()}
            every = self.values.astype(np.float32).reshape(-1, *self.shape)
        stats = {k: stats.get(k, empty) for k in ("std", "low", "high", "p")}
        return SweepResult(
            ask.kind, ask.op, ask.direction, ask.effect, self.method, layout.rows, layout.cols, layout.nodes, plan.runs[0].row(plan.side),
            table(mean), table(normalised), base, clean, None if math.isnan(corrupt) else corrupt, self.done, self.total, **stats, per_prompt=every,
            prompts=tuple(i for i, _ in plan.members) if ask.over_set else (), mechanism=mechanism(plan, self.reason, self.method), at_once=self.at_once,
            warning=warning, convention=convention(plan, self.method), peak_mb=round(self.peak_mb, 1),
        )  # fmt: skip


def normalise(mean: np.ndarray, base: float, sides: np.ndarray) -> tuple[np.ndarray, str]:
    """(mean - corrupted) / (clean - corrupted), a ratio of means; without a corrupted prompt mean / base. NaN, and why, where that says nothing."""
    clean, corrupt = sides[1], sides[2]
    if np.isnan(corrupt).any():
        if abs(base) < 1e-6:
            return np.full(mean.shape, math.nan), "the base run's metric is 0: not normalised"
        return mean / base, "no corrupted prompt: normalised as a share of the base run's metric"
    gaps = clean - corrupt
    gap, size = gaps.mean(), max(abs(clean.mean()), abs(corrupt.mean()))
    if abs(gap) < 1e-3 * size or gap == 0:
        return np.full(mean.shape, math.nan), f"clean and corrupted differ by {gap:.2g} only: not normalised"
    small = int((np.abs(gaps) < 0.1 * abs(gap)).sum())
    words = f"{small} of {len(gaps)} prompts have a clean - corrupted below a tenth of the mean" if small else ""
    if abs(gap) < 0.05 * size:
        words = f"clean and corrupted differ by {gap:.2g} only: normalised values are large and noisy"
    return (mean - corrupt.mean()) / gap, words


def statistics(values: np.ndarray, base: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """
    Of the effects value - base [prompt, cell], paired by prompt: standard deviation (n - 1), the mean effect's 95 % confidence interval (Student's t), and
    its p-value by sign flips: all of them for up to 12 prompts, else FLIPS drawn with the seed.
    """
    n = len(values)
    effect = values - base[:, None]
    mean = effect.mean(0)
    if n < 2:
        nan = np.full(mean.shape, math.nan)
        return {"std": nan, "low": nan, "high": nan, "p": nan}
    std = effect.std(0, ddof=1)
    df = n - 1
    quantile = T95[df - 1] if df <= len(T95) else 1.959964 + 2.3723 / df + 2.823 / df**2
    half = quantile * std / math.sqrt(n)
    if n <= 12:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.concatenate([np.ones((1, n)), np.random.default_rng(seed).choice((-1.0, 1.0), (FLIPS, n))])
    real = np.abs(effect.sum(0))
    hits = sum((np.abs(part @ effect) >= real * (1 - 1e-9) - 1e-12).sum(0) for part in np.array_split(signs, 16))
    return {"std": std, "low": mean - half, "high": mean + half, "p": np.where(np.isnan(mean), math.nan, hits / len(signs))}


# ------------------------------------------------------------------ words


def mechanism(plan: Plan, reason: str, method: str) -> str:
    if method != "truth":
        return "gradients"
    if plan.ask.effect == "direct":
        return "direct effect, no forward pass a cell"
    return f"whole forward passes under hooks: {reason}" if reason else "resumed at the changed layer"


def convention(plan: Plan, method: str) -> str:
    """What matters first: it is a pane's title."""
    ask, model = plan.ask, plan.model
    metric = ask.study.metric
    assert metric.kind in METRICS
    if ask.op == "patch":
        what = {"denoise": "denoise: clean values into the corrupted run", "noise": "noise: corrupted values into the clean run"}[ask.direction]
    else:
        run = "corrupted" if plan.side == "corrupt" else "clean"
        amount = f" of {ask.noise:g} embedding standard deviations, seed {ask.seed}" if ask.op == "noise" else ""
        seed = f", seed {ask.seed}" if ask.op == "resample" else ""
        what = f"{run} run, {ask.op}: {SWEEP_OPS[ask.op]}{amount}{seed}"
    place = "" if metric.kind == "loss" else f" at {metric.pos}"
    parts = [SWEEPS[ask.kind], what, f"{metric.kind}{place}"]
    parts.append("normalised: corrupted = 0, clean = 1" if plan.runs[0].rows["corrupt"] is not None else "normalised: share of the base run's metric")
    if ask.effect == "direct":
        parts.append("direct effect: later attention, MLPs and norm scales as in the base run")
        parts += ["through the head's own z"] * (ask.kind in ("q", "k", "v", "pattern"))
    elif method == "truth":
        parts.append("total effect: everything after the node recomputed")
    if ask.over_set:
        parts.append(f"mean over {len(plan.runs)} prompts, ratio of means; spread, interval and p of the effect, paired by prompt")
    if ask.kind == "q" or ask.kind == "k":
        parts += ["before the rotation"] * (model.info.positions == "rotary")
    if ask.kind in ("k", "v") and model.info.n_kv_heads < model.info.n_heads:
        parts.append("a column is a group of heads that share keys and values")
    if ask.kind == "features":
        d = feature_sweep.loaded(model, ask.study.saes, parse_node(ask.nodes[0]).layer)
        parts.append(f"SAE {d.source}, {d.view} activation")
    parts.append(f"raw weights, {model.info.dtype}")
    if ask.op == "patch" and not all(r.by_index for r in plan.runs):
        how = plan.runs[0].aligned if len(plan.runs) == 1 else "each prompt's own" + f", else by {ask.study.align}" * bool(ask.study.align)
        parts.append(f"patched across an alignment, {how}; positions without partner stay as they are")
    if plan.study.interventions:
        parts.append(f"base run under {', '.join(str(i) for i in plan.study.interventions)}")
    return " · ".join(parts)
