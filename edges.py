"""
The edge machine: the model with some of its edges cut, every receiver reading its own sum of senders. What ACDC, edge circuits and EAP run on.

A sender adds to the residual stream: the embeddings, every head (its z through W_O), every MLP. A receiver reads it: every head's q, k and v, every MLP,
the logits. Where an edge is cut, the receiver gets the sender's other value (of the corrupted run, a mean, ...) in place of the one of this run.
"""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from lens import frozen_norm
from messages import ModelInfo, Node, Progress, Study, Sweep, UserError, parse_node
from model import FINAL, Edit, Model, out_of_memory
from patching import Runs, means
from kept import Score
from sweeps import Plan, check_lengths, chunk_bytes, others, read_member
from utils import tec
from wiring import LOGITS, REST, Edge, parse_edge

EMBED = "blocks.0.hook_resid_pre"
PARTS = ("q", "k", "v")


def senders(info: ModelInfo) -> tuple[str, ...]:
    """Every sender in the order of its writing."""
    layers = ([str(Node("head", n, h)) for h in range(info.n_heads)] + [str(Node("mlp", n))] for n in range(info.n_layers))
    return ("embed", *(s for layer in layers for s in layer))


def receivers(info: ModelInfo) -> tuple[str, ...]:
    """Every receiver in the order of its reading; with grouped heads k and v are those of the group, named by its first head."""
    per, out = info.n_heads // info.n_kv_heads, []
    for n in range(info.n_layers):
        out += [str(Node("head", n, h, p)) for p in PARTS for h in range(0, info.n_heads, 1 if p == "q" else per)] + [str(Node("mlp", n))]
    return (*out, LOGITS)


def seen(info: ModelInfo, receiver: str) -> int:
    """How many of `senders` a receiver reads: those before it."""
    if receiver == LOGITS:
        return 1 + info.n_layers * (info.n_heads + 1)
    node = parse_node(receiver)
    return 1 + node.layer * (info.n_heads + 1) + (info.n_heads if node.site == "mlp" and not info.parallel else 0)


def all_edges(info: ModelInfo) -> tuple[str, ...]:
    """Every edge of the model, receivers in the order of their reading."""
    names = senders(info)
    return tuple(str(Edge(s, r)) for r in receivers(info) for s in names[: seen(info, r)])


def own_edge(info: ModelInfo, text: str) -> str:
    """An edge in this model's spelling: no positions, k and v named by their group's first head. UserError when the model has no such edge."""
    edge = parse_edge(text)
    if "@" in text:
        raise UserError(f"{text}: edges are scored without positions; write it without @")
    receiver = edge.receiver
    if receiver != LOGITS:
        node = parse_node(receiver)
        per = info.n_heads // info.n_kv_heads
        if node.site == "head" and node.part in ("k", "v"):
            receiver = str(replace(node, head=node.head // per * per))
    names = senders(info)
    if edge.sender not in names or receiver not in receivers(info):
        raise UserError(f"{text}: the model has layers 0 to {info.n_layers - 1} with heads 0 to {info.n_heads - 1}")
    if names.index(edge.sender) >= seen(info, receiver):
        raise UserError(f"{text}: the receiver comes before the sender")
    return str(Edge(edge.sender, receiver))


# ------------------------------------------------------------------ a group of prompts


@contextmanager
def split(model: Model) -> Generator:
    """The Bridge's blocks with an input of its own for every head's q, k and v and for the MLP."""
    bridge = model.bridge
    bridge.set_use_split_qkv_input(True)
    bridge.set_use_hook_mlp_in(True)
    try:
        yield
    finally:
        bridge.set_use_split_qkv_input(False)
        bridge.set_use_hook_mlp_in(False)


class EdgeRun:
    """A few prompts of equal length. `other` [prompt, seq, sender, d_model] is what cut edges carry; `more` hook points to read beside."""

    more: tuple[str, ...] = ()

    def __init__(self, model: Model, group: list[Runs], indices: list[int], plan: Plan, rest: str, limit: int):
        self.model, self.group, self.info, self.limit = model, group, model.info, limit
        self.ids = t.tensor([r.row("clean").ids for r in group])
        self.seq = self.ids.shape[1]
        self.names, self.readers = senders(self.info), receivers(self.info)
        self.where = {e: (self.readers.index(parse_edge(e).receiver), self.names.index(parse_edge(e).sender)) for e in all_edges(self.info)}
        self.stride = self.info.n_heads + 1
        self.plan, self.rest, self.indices = plan, rest, indices
        self.zs = [f"blocks.{n}.attn.hook_z" for n in range(self.info.n_layers)]
        self.mlps = [f"blocks.{n}.hook_mlp_out" for n in range(self.info.n_layers)]
        self.scales = [f"blocks.{n}.ln1_post.hook_scale" for n, b in enumerate(model.bridge.blocks) if hasattr(b, "ln1_post")]

    def prepare(self) -> Generator[Progress]:
        """The clean run, the corrupted one where there is one, and what cut edges carry."""
        model, last = self.model, f"blocks.{self.info.n_layers - 1}.hook_resid_post"
        names = [EMBED, *self.zs, *(m for m in self.mlps if m in model.points), *self.scales, *self.more, last, FINAL]
        _, self.clean = model.forward(self.ids, names)
        corrupt = None
        if all(r.rows["corrupt"] is not None for r in self.group) and len({len(r.rows["corrupt"].ids) for r in self.group} | {self.seq}) == 1:
            _, corrupt = model.forward(t.tensor([r.row("corrupt").ids for r in self.group]), names)
        normed = None
        if self.group[0].study.metric.kind == "kl":
            normed = t.stack([x[r.position("clean", r.study.metric.pos)] for r, x in zip(self.group, self.clean[FINAL])])
        self.score = Score(self.group, normed, "clean")
        if self.score.whole:
            raise UserError("circuits are scored at one position, and loss has none: use another metric")
        self.score.base = self.value = self.score.of(self.clean[last], 0)[0]
        self.corrupted = None if corrupt is None else Score(self.group, normed, "corrupt").of(corrupt[last], 0)[0]
        match self.rest:
            case "patch":
                if corrupt is None:
                    raise UserError(
                        "cut edges carry the corrupted run, and a prompt has none of equal length: use zero, or mean and resample with prompts of one length"
                    )
                acts = corrupt
            case "resample":
                _, acts = model.forward(t.tensor([others(self.plan, i) for i in self.indices]), names)
            case "zero":
                acts = {n: t.zeros_like(x) for n, x in self.clean.items()} | {s: self.clean[s] for s in self.scales}
            case _:
                some = [n for n in names if n not in (last, FINAL, *self.scales)]
                acts = yield from means(model, self.plan.ask.study.prompt_set, some, self.rest, self.seq)
                acts = {n: x.expand_as(self.clean[n]) for n, x in acts.items()} | {s: self.clean[s] for s in self.scales}
        self.keep(acts)
        if not np.isfinite(self.value).all():
            raise UserError("the metric is not finite: does the model hold NaN? Try float32")

    def keep(self, acts: dict[str, Tensor]) -> None:
        """What cut edges carry, of the run that says it."""
        self.other = self.written(acts)

    def written(self, acts: dict[str, Tensor]) -> Tensor:
        """What every sender adds [prompt, seq, sender, d_model] in a run."""
        parts = [acts[EMBED][:, :, None]]
        for n in range(self.info.n_layers):
            parts += [self.heads(n, acts[self.zs[n]], acts.get(f"blocks.{n}.ln1_post.hook_scale")), self.mlp(n, acts)]
        return t.cat(parts, 2)

    def heads(self, layer: int, z: Tensor, scale: Tensor | None) -> Tensor:
        """What every head adds [prompt, seq, head, d_model], a norm after attention with its scale frozen as in that run."""
        block = self.model.bridge.blocks[layer]
        x = t.einsum("bshe,hed->bshd", z, block.attn.W_O.to(z))
        return x if scale is None else frozen_norm(block.ln1_post, scale[:, :, None], x, self.model)

    def mlp(self, layer: int, acts: dict[str, Tensor]) -> Tensor:
        x = acts.get(self.mlps[layer])
        return t.zeros_like(acts[EMBED])[:, :, None] if x is None else x[:, :, None]

    # ---------------------------------------------------------------- cut edges

    def mask(self, kept: Iterable[str]) -> Tensor:
        """1 where an edge is cut [receiver, sender]."""
        cut = t.zeros(len(self.readers), len(self.names))
        for r, s in self.where.values():
            cut[r, s] = 1
        for e in kept:
            cut[self.where[e]] = 0
        return cut

    def room(self) -> int:
        """Sets of cut edges in one batch."""
        i = self.info
        token = 4 * i.d_model * (2 * len(self.names) + 6 * i.n_heads + 12) + 12 * i.d_mlp
        return max(1, self.limit // (token * self.seq * len(self.ids)))

    @t.no_grad()
    def metrics(self, cuts: list[Tensor]) -> np.ndarray:
        """The metric [set, prompt] with the edges of each mask [receiver, sender] gone."""
        model, info, b, n = self.model, self.info, len(self.ids), len(cuts)
        cut = t.stack(cuts).to(model.device).repeat_interleave(b, 0)  # [row, receiver, sender]
        other = self.other.repeat(n, 1, 1, 1)
        diffs: list[Tensor] = []  # what senders so far add here, less what cut edges carry [row, seq, senders, d_model]
        scale: dict[int, Tensor] = {}
        done = 0

        def add(x: Tensor) -> None:
            nonlocal done
            diffs.append(x - other[:, :, done : done + x.shape[2]].to(x))
            done += x.shape[2]

        def lost(first: int, count: int, k: int) -> Tensor:
            """Of `count` receivers from `first`, what their cut edges take away [row, seq, receiver, d_model]."""
            d = t.cat(diffs, 2)[:, :, :k]
            return t.einsum("nsmd,nrm->nsrd", d, cut[:, first : first + count, :k])

        per_layer = info.n_heads + 2 * info.n_kv_heads + 1
        edits: list[Edit] = [(EMBED, lambda x: add(x[:, :, None]))]
        for layer in range(info.n_layers):
            first, block = layer * per_layer, f"blocks.{layer}."
            before = 1 + layer * self.stride
            at = first
            for part, count in zip(PARTS, (info.n_heads, info.n_kv_heads, info.n_kv_heads)):
                edits.append((f"{block}hook_{part}_input", lambda x, at=at, c=count, k=before: x - lost(at, c, k)))
                at += count
            if self.scales:
                edits.append((f"{block}ln1_post.hook_scale", lambda x, n=layer: scale.__setitem__(n, x)))
            held: dict[int, Tensor] = {}
            edits.append((self.zs[layer], lambda x, n=layer, held=held: held.__setitem__(n, x)))
            edits.append((f"{block}hook_attn_out", lambda x, n=layer, held=held: add(self.heads(n, held[n], scale.get(n)))))
            k = before if info.parallel else before + info.n_heads
            if self.mlps[layer] in model.points:
                edits.append((f"{block}hook_mlp_in", lambda x, at=at, k=k: x - lost(at, 1, k)[:, :, 0]))
                edits.append((self.mlps[layer], lambda x: add(x[:, :, None])))
            else:
                edits.append((f"{block}hook_resid_post", lambda x: add(t.zeros_like(x)[:, :, None])))
        last = f"blocks.{info.n_layers - 1}.hook_resid_post"
        got: dict[str, Tensor] = {}
        edits.append((last, lambda x: got.__setitem__(last, x - lost(len(self.readers) - 1, 1, len(self.names))[:, :, 0])))
        with split(model), model.hooks(edits):
            model.bridge(self.ids.repeat(n, 1).to(model.device), use_cache=False, logits_to_keep=1)
        return self.score.of(got[last], 0)

    def run(self, cuts: list) -> Generator[Progress, None, np.ndarray]:
        """The same for many sets, as many at once as the limit of bytes allows; out of memory halves that."""
        found, i, size = [], 0, self.room()
        while i < len(cuts):
            try:
                found.append(self.metrics(cuts[i : i + size]))
            except t.OutOfMemoryError as error:
                tec()
                if size == 1:
                    raise out_of_memory(error) from error
                size = max(1, size // 2)
                continue
            i += size
            yield Progress(min(i, len(cuts)), len(cuts))
        return np.concatenate(found)

    # ---------------------------------------------------------------- gradients

    def gradients(self, embed: Tensor | None = None, mix: tuple[str, Tensor] | None = None) -> Tensor:
        """
        The metric's gradient at every receiver's input [prompt, seq, receiver, d_model] of the clean run; with `embed` in place of the embeddings, or `mix`
        (a hook point and its value).
        """
        from estimates import metric

        model, info = self.model, self.info
        leaves: dict[str, Tensor] = {}

        def leaf(name: str) -> Edit:
            def apply(x: Tensor) -> Tensor:
                leaves[name] = t.zeros_like(x).requires_grad_(True)
                return x + leaves[name]

            return name, apply

        last = f"blocks.{info.n_layers - 1}.hook_resid_post"
        edits = [] if embed is None else [(EMBED, lambda x: embed.to(x))]
        edits += [] if mix is None else [(mix[0], lambda x: mix[1].to(x))]
        for n in range(info.n_layers):
            edits += [leaf(f"blocks.{n}.hook_{p}_input") for p in PARTS]
            edits += [leaf(f"blocks.{n}.hook_mlp_in")] * (self.mlps[n] in model.points)
        got: dict[str, Tensor] = {}

        def end(x: Tensor) -> Tensor:
            leaves[last] = t.zeros_like(x).requires_grad_(True)
            got[last] = x + leaves[last]
            return got[last]

        edits.append((last, end))
        with t.enable_grad(), split(model), model.hooks(edits):
            model.bridge(self.ids.to(model.device), use_cache=False, logits_to_keep=1)
            m = metric(self.score, got[last]).sum()
        found = t.autograd.grad(m, list(leaves.values()), allow_unused=True)
        grads = {n: t.zeros_like(leaves[n]) if g is None else g for n, g in zip(leaves, found)}
        parts = []
        for n in range(info.n_layers):
            parts += [grads[f"blocks.{n}.hook_{p}_input"] for p in PARTS]
            mlp = grads.get(f"blocks.{n}.hook_mlp_in")
            parts.append((t.zeros_like(grads[last]) if mlp is None else mlp)[:, :, None])
        parts.append(grads[last][:, :, None])
        return t.cat(parts, 2).detach()


# ------------------------------------------------------------------ over prompts


def edge_runs(model: Model, study: Study, rest: str, seed: int = 0, kind: type = EdgeRun) -> Generator[Progress, None, list[EdgeRun]]:
    """One EdgeRun a length of prompt, over the set or the one prompt. Interventions of the study are left out: an edge circuit is one of the model itself."""
    if rest not in REST:
        raise UserError(f"{rest!r} is not a value for what is left out: use one of {', '.join(REST)}")
    members = list(enumerate(study.prompt_set)) or [(0, study.prompt)]
    study = replace(study, interventions=(), base="clean")
    runs = []
    for i, prompt in members:
        try:
            runs.append(read_member(model, replace(study, prompt=prompt), rest == "patch"))
            check_lengths(runs[-1:], "clean", Sweep(study, op=rest))
        except UserError as error:
            raise UserError(f"prompt {i + 1} of the set: {error}" if study.prompt_set else str(error)) from error
    plan = Plan(model, Sweep(study, "nodes", rest, seed=seed), members, runs, "clean", "corrupt", None, chunk_bytes(model, 0))
    out = []
    for length in sorted({len(r.row("clean").ids) for r in runs}):
        same = [i for i, r in enumerate(runs) if len(r.row("clean").ids) == length]
        per = max(1, plan.limit // (4 * length * model.info.d_model * 3 * len(senders(model.info))))
        for a in range(0, len(same), per):
            part = same[a : a + per]
            run = kind(model, [runs[i] for i in part], part, plan, rest, plan.limit)
            yield from run.prepare()
            out.append(run)
            yield Progress(len(out), len(runs), "runs of the prompts")
    return out


def gather(runs: list[EdgeRun], found: list[np.ndarray]) -> np.ndarray:
    """Values [..., prompt] of each run's prompts, in the order of the set."""
    order = np.argsort([i for r in runs for i in r.indices], kind="stable")
    return np.concatenate(found, -1)[..., order]


def edge_values(model: Model, study: Study, kept: list[frozenset[str]], rest: str = "patch", seed: int = 0) -> Generator[Progress, None, np.ndarray]:
    """The metric [set, prompt] of the clean run when only the `kept` edges carry it, the others what `rest` says."""
    known = [[own_edge(model.info, e) for e in some] for some in kept]
    runs = yield from edge_runs(model, study, rest, seed)
    found = []
    for run in runs:
        found.append((yield from run.run([run.mask(some) for some in known])))
    return gather(runs, found)
