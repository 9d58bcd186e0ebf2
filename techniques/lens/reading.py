"""The lens: what the model would predict at every point and position."""

import math
from collections.abc import Callable, Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import FINAL, Model
from model.memory import Chunks
from model.metrics import rows_at_once, vocab_bytes
from model.places import hook_name
from model.runs import Runs
from model.top_tokens import largest, texts
from model.writes import SCALE, adds, embedding, frozen_norm, post_norm, require_parts
from techniques.lens.requests import LENSES, LensResult
from techniques.lens.translators import Translators, read_translators
from vocabulary.nodes import Node, UserError, parse_node
from vocabulary.requests import Progress

CHUNK_BYTES = 16 << 20  # this is how much of several points is made at once
PIECE_BYTES = 2 << 20  # and read at once, on a CPU, so that it stays in the processor's cache
HELD_BYTES = 256 << 20  # activations of a run that stay on a device; more wait in the host's pinned memory
MOST = 3
STATS = ("prob", "rank", "entropy", "kl", "logit_diff")
CELLS = ("top_ids", "top_probs", *STATS, "kl_pair", "rank_pair", "up_ids", "up_values", "down_ids", "down_values")


def default_points(model: Model, lens: Translators | None) -> list[str]:
    """resid_pre of layer 0, then resid_mid (where there is one) and resid_post of every layer; of those, what the lens reads."""
    sites = ("resid_post",) if model.parallel or lens or "resid_mid" in model.notes.refused else ("resid_mid", "resid_post")
    points = ["L0.resid_pre", *(f"L{layer}.{s}" for layer in range(model.info.n_layers) for s in sites)]
    return points if lens is None else [p for p in points if lens.reads(parse_node(p))]


def lens_points(model: Model, points: tuple[str, ...], lens: Translators | None) -> list[Node]:
    nodes = [parse_node(p) for p in points or default_points(model, lens)]
    for node in nodes:
        part = node.site in ("attn", "mlp") or node.site == "head" and node.part == "z"
        if not (node.site.startswith("resid_") or part) or node.pos is not None:
            raise UserError(
                f"{node}: the lens reads resid_pre, resid_mid and resid_post, and what L3.attn, L3.mlp or L2H3 writes, at every position (write no @)"
            )
        hook_name(model, node)
        if lens is not None and not lens.reads(node):
            raise UserError(f"{node}: {lens.what}")
    return nodes


def is_component(node: Node) -> bool:
    return not node.site.startswith("resid_")


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row. A matrix product is not used: it adds up 50 000 numbers one after the other, and entropies came out wrong by 0.004 nats."""
    return t.linalg.vecdot(a, b)


# ------------------------------------------------------------------ what a point's logits are made of


def has_norm(model: Model) -> None:
    if not hasattr(model.bridge, "ln_final") or FINAL not in model.points:
        raise UserError(f"{model.info.architecture} has no final norm that Loupe knows: there is no lens on it")


def names_of(model: Model, nodes: list[Node]) -> list[str]:
    """The hook points that the nodes are read from."""
    names = [hook_name(model, n) for n in nodes]
    if any(is_component(n) for n in nodes):
        model.point(SCALE)
        require_parts(model)
        names.append(SCALE)
    names += [post[1] for n in nodes if n.site == "head" and (post := post_norm(model, n.layer, "attn"))]
    return list(dict.fromkeys([*names, FINAL]))


class Reader:
    """
    The logits of points on one run, a few points and positions at a time: first `go` to the positions, among the `places` that are asked for at all.
    Where the whole prompt's activations are large, only those of these places are held, and wait on the host where they too are large.
    """

    def __init__(self, runs: Runs, which: str, nodes: list[Node], lens: Translators | None, places: list[int]):
        runs = runs.at(which)
        self.model, self.nodes, self.lens = runs.model, nodes, lens
        names = names_of(runs.model, nodes)
        each = len(names) * runs.model.info.d_model * t.finfo(runs.model.dtype).bits // 8
        large = lambda n: runs.model.final_device.type != "cpu" and n * each > HELD_BYTES  # noqa: E731
        self.on_host = large(len(places))
        self.acts: dict[str, Tensor] = {}
        self.where: dict[int, int] | None = None  # the row of every place held, where not all are
        if not large(len(runs.row(which).ids)):
            self.acts = runs.trace(which, names)
            return
        self.where = {p: i for i, p in enumerate(places)}
        runs.visit(which, names, lambda name, x: self.acts.__setitem__(name, self.held(x[:, places])))
        if self.on_host and runs.model.device.type == "cuda":
            t.cuda.synchronize()

    def held(self, x: Tensor) -> Tensor:
        if not self.on_host:
            return x
        pinned = x.device.type == "cuda" and t.cuda.is_initialized()
        return t.empty(x.shape, dtype=x.dtype, pin_memory=pinned).copy_(x, non_blocking=True)

    def go(self, places: Tensor) -> None:
        """To some positions: what is read of them goes to the device here."""
        self.n = len(places)
        rows = places if self.where is None else t.tensor([self.where[p] for p in places.tolist()])
        on = {x.device: rows.to(x.device) for x in self.acts.values()}
        self.rows = {name: x[0][on[x.device]] for name, x in self.acts.items()}
        if self.on_host:
            self.rows = {name: x.to(self.model.final_device) for name, x in self.rows.items()}

    @t.no_grad()
    def normed(self, node: Node) -> Tensor:
        """What the unembedding gets [place, d_model]: the stream through the final norm, or a component through the frozen one."""
        model = self.model
        x = self.rows[hook_name(model, node)]
        if not is_component(node):
            x = x.to(model.final_device)
            return model.norm(x if self.lens is None else self.lens.translate(node, x).to(x.dtype))
        if node.site == "head":
            x = self.written(node, x)
        if node.site == "embed":
            x = x * embedding(model)[1]
        x, scale = x.to(model.final_device), self.rows[SCALE].to(model.final_device)
        return frozen_norm(model, model.bridge.ln_final, scale, x)

    def written(self, node: Node, z: Tensor) -> Tensor:
        """What one head adds to the stream, without b_O; through the frozen norm that some models put after attention."""
        alone, post = t.zeros_like(z), post_norm(self.model, node.layer, "attn")
        alone[:, node.head] = z[:, node.head]
        return adds(self.model, node.layer, "attn", alone.flatten(1)[None], self.rows[post[1]] if post else None)[0]

    @t.no_grad()
    def logits(self, start: int, stop: int) -> Tensor:
        """fp32 [points x places, vocab]; a component's without b_U and before the soft cap."""
        model, nodes = self.model, self.nodes[start:stop]
        if not any(is_component(n) for n in nodes):
            rows = [self.rows[hook_name(model, n)].to(model.final_device) for n in nodes]
            return model.unembed(model.norm(t.cat(rows)) if self.lens is None else t.cat([self.normed(n) for n in nodes]))
        normed = t.cat([self.normed(n) for n in nodes])
        direct = model.scores(normed)
        direct -= model.scores(t.zeros_like(normed[:1]))
        for i, node in enumerate(nodes):
            if not is_component(node):
                rows = slice(i * self.n, (i + 1) * self.n)
                direct[rows] = model.unembed(normed[rows])
        return direct


# ------------------------------------------------------------------ statistics


@t.no_grad()
def statistics(z: Tensor, final: tuple[Tensor, Tensor], answers: list[int] | Tensor, foils: list[int] | Tensor, k: int) -> dict[str, Tensor]:
    """
    Of fp32 logits [points x places, vocab]; their largest is taken off them in place. `final` holds the probabilities [place, vocab] that
    KL(final || this) is taken against, and their negative entropy. One pass over the vocabulary for each line, and one exponential.
    """
    values, ids = largest(z, min(k, z.shape[-1]))
    diff = z[:, answers].mean(-1) - z[:, foils].mean(-1) if len(answers) and len(foils) else None
    z -= values[:, :1]
    p = z.exp()
    total = p.sum(-1)
    lse, nan = total.log(), t.full(total.shape, math.nan, device=z.device)
    out = {"top_ids": ids, "top_probs": (values - values[:, :1] - lse[:, None]).exp()}
    out |= {"prob": nan, "rank": nan, "logit_diff": nan if diff is None else diff, "lse": lse}
    out["entropy"] = (lse - dot(p, z) / total).clamp(min=0)
    if len(answers):
        out["prob"] = p[:, answers].sum(-1) / total
        out["rank"] = ranks(z, answers)
    q, negative = final
    del p
    out["kl"] = ((negative - dot(q, z.unflatten(0, (-1, len(q))))).flatten() + lse).clamp(min=0)
    return out


def ranks(z: Tensor, answers: list[int] | Tensor) -> Tensor:
    """How many tokens of each row of logits lie above the best answer."""
    return (z > z[:, answers].amax(-1, keepdim=True)).sum(-1, dtype=t.int32).float()


@t.no_grad()
def promoted(z: Tensor, lse: Tensor, nodes: list[Node], before: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """
    Of centred logits [points x places, vocab] and log normalisers: the tokens that rose and fell most against the residual row before (at first
    `before`), or that a component writes most for and against.
    """
    n, most = len(z) // len(nodes), min(MOST, z.shape[-1])
    change, offset = t.empty_like(z), t.zeros_like(lse)
    if before is not None and not any(is_component(node) for node in nodes):
        t.sub(z[:n], before[0], out=change[:n])
        t.sub(z[n:], z[:-n], out=change[n:])
        offset = t.cat([before[1], lse[:-n]]) - lse
        nodes = []
    for i, node in enumerate(nodes):
        here = slice(i * n, (i + 1) * n)
        if is_component(node):
            t.sub(z[here], z[here].mean(-1, keepdim=True), out=change[here])
            continue
        if before is None:
            change[here], offset[here] = z[here], math.nan
        else:
            t.sub(z[here], before[0], out=change[here])
            offset[here] = before[1] - lse[here]
        before = z[here], lse[here]
    (up, up_ids), (down, down_ids) = largest(change, most), largest(change, most, False)
    up_ids, down_ids = (ids.masked_fill(offset.isnan()[:, None], 0) for ids in (up_ids, down_ids))
    return {"up_ids": up_ids, "up_values": up + offset[:, None], "down_ids": down_ids, "down_values": down + offset[:, None]}


@t.no_grad()
def pair_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL(softmax a || softmax b), row by row."""
    a, b = (x - x.amax(-1, keepdim=True) for x in (a, b))
    p = a.exp()
    total = p.sum(-1)
    return ((dot(p, a) - dot(p, b)) / total - total.log() + b.exp().sum(-1).log()).clamp(min=0)


def lens_convention(runs: Runs, nodes: list[Node], lens: Translators | None) -> str:
    """What matters first: it is a pane's title."""
    model = runs.model
    parts, resids = [n for n in nodes if is_component(n)], [n for n in nodes if not is_component(n)]
    cap = f"soft cap {model.softcap:g}" if model.softcap else "no soft cap"
    norm = "final norm recomputed" if resids else "final norm's scale frozen"
    first = [*([lens.name] if lens else []), norm, "raw weights", model.info.dtype, cap]
    rest = ["KL(this run's final distribution || point's)"]
    if parts:
        capped = ", before the soft cap" if model.softcap else ""
        rest.append(f"components: direct logits, final norm's scale frozen, no biases{capped}; probabilities as if these were all the logits")
        if any(n.site == "head" and post_norm(model, n.layer, "attn") for n in parts):
            rest.append("heads through the norm after attention, its scale frozen")
    rest += [lens.convention if lens else "", "no resid_mid (parallel block)" if model.parallel and resids else "", runs.convention]
    return " · ".join(first) + " · " + ", ".join(p for p in rest if p)


# ------------------------------------------------------------------ the table


def others(runs: Runs, which: str, pair: bool) -> tuple[str, ...]:
    """The runs to read for KL(clean || corrupted), beside `which`."""
    rows = runs.rows
    if not pair or rows["corrupt"] is None or len(rows["corrupt"].ids) != len(rows["clean"].ids) or not runs.by_index:
        return ()
    now = runs.study.base if which == "now" and not runs.edits else which
    return tuple(r for r in ("clean", "corrupt") if r != now)


def final_of(model: Model, last: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and negative entropies of the run's own predictions."""
    logp = model.log_probs(last)
    p = logp.exp()
    return p, dot(p, logp)


def read_lens(runs: Runs, ask) -> Generator[Progress | LensResult, None, LensResult]:
    """
    The lens at points x positions. Every position's points go one after the other, a few at a time, so that what a point promoted is a difference
    of two rows at hand; a long prompt goes in stretches of positions. Vocabulary-sized tensors stay under VOCAB_BYTES each.
    """
    which, runs = ask.which, runs.at(ask.which)
    model, row = runs.model, runs.row(which)
    if ask.k < 1:
        raise UserError("k must be at least 1")
    if ask.kind not in LENSES:
        raise UserError(f"{ask.kind!r} is not a lens: use {', '.join(LENSES)}")
    has_norm(model)
    lens = None if ask.kind == "logit" else (yield from read_translators(model, ask.kind, ask.artefact))
    if lens is not None:
        runs.require_first(f"the {ask.kind} lens", which)
    nodes = lens_points(model, ask.points, lens)
    places = list(dict.fromkeys(runs.position(which, p) for p in ask.positions)) or list(range(len(row.ids)))
    with_pair, convention = others(runs, which, ask.pair and (lens is None or not runs.pair)), lens_convention(runs, nodes, lens)
    readers = {r: Reader(runs, r, nodes, lens, places) for r in dict.fromkeys((which, *with_pair))}
    table: list[dict[str, np.ndarray]] = []  # one for every stretch of positions, [point, place, ...]

    called = runs.called("clean"), runs.called("corrupt")

    def result(cells: dict[str, np.ndarray], first: int) -> LensResult:
        used = np.concatenate([cells[n].ravel() for n in ("top_ids", "up_ids", "down_ids")])
        names = tuple(str(n) for n in nodes[first : first + len(cells["entropy"])])
        return LensResult(row, names, texts=texts(model, used), convention=convention, positions=tuple(places), kind=ask.kind, names=called, **cells)

    per_point = lambda _: max(1, min(CHUNK_BYTES, vocab_bytes(model)) // (4 * model.info.d_vocab * readers[which].n))  # noqa: E731
    points = Chunks("points", per_point)

    def read(begin: int, end: int) -> Generator[Progress | LensResult, None, dict[str, np.ndarray]]:
        """The cells of all points at some places, in partial results where these are all."""
        work, groups, shown = stretch(runs, which, readers, nodes, t.tensor(places[begin:end]), ask.k), [], 0
        for part in points.over(len(nodes), work):
            if isinstance(part, Progress):
                yield part
                continue
            groups.append(part)
            ready = sum(len(g["entropy"]) for g in groups)
            if ready < len(nodes) and end - begin == len(places):
                yield result(to_host([part]), shown)
            elif ready < len(nodes):
                yield Progress(begin * len(nodes) + ready * (end - begin), len(places) * len(nodes), f"{ask.kind} lens")
            shown = ready
        return to_host(groups)

    for part in Chunks("positions", rows_at_once(model)).over(len(places), read):
        if isinstance(part, dict):
            table.append(part)
        else:
            yield part
    out = result({n: np.concatenate([part[n] for part in table], 1) for n in CELLS}, 0)
    if not np.isfinite(out.entropy).all() or not np.isfinite(out.kl).all():
        raise UserError("the lens gave numbers that are not finite: load the model in float32")
    return out


def stretch(runs: Runs, which: str, readers: dict[str, Reader], nodes: list[Node], places: Tensor, k: int) -> Callable[[int, int], dict[str, Tensor]]:
    """
    A function that reads points [start, stop) at some positions into tensors [point, place, ...]; points must come in order, since each is compared
    with the one before. A CPU takes a piece of one point's rows at a time, another device all of them: it waits for nothing.
    """
    reader, n, device = readers[which], len(places), runs.model.final_device
    for one in readers.values():
        one.go(places)
    final = final_of(runs.model, reader.rows[FINAL].to(device))
    answers, foils = (t.tensor(ids, dtype=t.long, device=device) for ids in (runs.answers, runs.foils))
    size = n if device.type != "cpu" else max(1, PIECE_BYTES // (4 * runs.model.info.d_vocab))
    before: list[tuple[Tensor, Tensor]] = []  # centred logits and log normaliser of the residual row before

    def work(start: int, stop: int) -> dict[str, Tensor]:
        z = reader.logits(start, stop)
        pair = {r: x.logits(start, stop) for r, x in readers.items() if r != which}
        parts, previous, here = [], before[0] if before else None, nodes[start:stop]
        for a, b in [(0, len(here))] if device.type != "cpu" else [(i, i + 1) for i in range(len(here))]:
            lse = []
            for first in range(0, n, size):
                there = slice(first, min(first + size, n))
                rows = slice(a * n + first, (b - 1) * n + there.stop)
                out = statistics(z[rows], (final[0][there], final[1][there]), answers, foils, k)
                lse.append(out.pop("lse"))
                out |= promoted(z[rows], lse[-1], here[a:b], None if previous is None else (previous[0][there], previous[1][there]))
                sides = {r: x[rows] for r, x in pair.items()}
                nan = t.full(lse[-1].shape, math.nan, device=device)
                both = sides.get("clean", z[rows]), sides.get("corrupt", z[rows])
                out["kl_pair"] = pair_kl(*both) if pair else nan
                out["rank_pair"] = ranks(both[1], answers) - ranks(both[0], answers) if pair and runs.pair and len(answers) else nan
                parts.append(out)
            if residual := [i for i in range(a, b) if not is_component(here[i])]:
                last = residual[-1]
                previous = z[last * n : (last + 1) * n], t.cat(lse).view(b - a, n)[last - a]
        before[:] = [] if previous is None else [previous if len(here) == 1 else (previous[0].clone(), previous[1])]
        return {name: t.cat([part[name] for part in parts]).unflatten(0, (len(here), n)) for name in CELLS}

    return work


def to_host(parts: list[dict[str, Tensor]]) -> dict[str, np.ndarray]:
    """Cells [point, place, ...] of several chunks as arrays, in one transfer: a device is waited for once."""
    whole = {name: t.cat([part[name] for part in parts]) for name in CELLS}
    bits = [(x.int() if name.endswith("ids") else x.float().view(t.int32)).reshape(*x.shape[:2], -1) for name, x in whole.items()]
    host, out, first = t.cat(bits, -1).cpu().numpy(), {}, 0
    for (name, x), part in zip(whole.items(), bits):
        cell = np.ascontiguousarray(host[..., first : first + part.shape[-1]])
        out[name] = (cell if name.endswith("ids") else cell.view(np.float32)).reshape(x.shape)
        first += part.shape[-1]
    return out
