"""From the local replacement model to the graph: targets in the order of their influence, the matrix of edges, the check that each adds up."""

from collections.abc import Generator
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.bridge import FINAL
from model.memory import free_bytes
from model.runs import Runs
from techniques.graphs.file_transcoders import FileTranscoder
from techniques.graphs.influence import shares
from techniques.graphs.replacement import AnyTranscoder, LocalModel, Targets, in_batches
from techniques.graphs.requests import OfGraph
from utils import show_bytes
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

LARGE = 256 << 20  # bytes that are worth a line that stays
LEAST = 0.5  # cosine of what a folder's transcoders make of the MLPs with these, on average; another model's have some 0
ROUNDS = 8  # in how many steps the features of most influence are found, when not all are taken


@dataclass
class Built:
    """
    Nodes: chosen features (`some` of the active ones), errors by layer and position, tokens, logits. `matrix` [target, source] in float64; of each node
    `bias`, `left_out` and `whole` (0 for errors and tokens); `weights` of the logits; `error`: how far sums are from the model's values, at most.
    """

    local: LocalModel
    some: Tensor
    matrix: Tensor
    bias: Tensor
    left_out: Tensor
    whole: Tensor
    weights: Tensor
    probability: Tensor
    logits: list[int]
    pos: int
    end: Targets
    error: float

    @property
    def errors(self) -> slice:
        return slice(len(self.some), len(self.some) + len(self.local.layers) * len(self.local.ids))

    @property
    def tokens(self) -> slice:
        return slice(self.errors.stop, self.errors.stop + len(self.local.ids))


def ends(local: LocalModel, ask: OfGraph, pos: int) -> tuple[Targets, list[int], Tensor, Tensor]:
    """The logit nodes: targets, token ids (-1: the difference), probabilities, and their weights."""
    if ask.target == "diff":
        return local.difference(pos), [-1], t.zeros(1), t.ones(1)
    if ask.logits < 1 or not 0 < ask.mass <= 1:
        raise UserError("a graph has at least one logit, and a mass above 0 and at most 1")
    final = local.runs.trace(local.which, [FINAL])[FINAL][:1, pos]
    top = local.model.log_probs(final)[0].exp().topk(min(ask.logits, local.model.info.d_vocab))
    n = int((top.values.cumsum(0) < ask.mass).sum()) + 1
    ids, p = top.indices[:n].tolist(), top.values[:n].double().cpu()
    return local.logits(ids, pos), ids, p, p


def build(runs: Runs, ask: OfGraph, coders: dict[int, AnyTranscoder]) -> Generator[Progress, None, Built]:
    """All edges of the graph, or those into its features of most influence. UserError where sums are not the model's own values."""
    if ask.batch < 1 or ask.features < 1:
        raise UserError("batch and features must be at least 1")
    local = LocalModel(runs, ask.which, coders, ask.batch)
    check_files(local)
    pos = runs.place(ask.which)
    end, ids, probability, weights = ends(local, ask, pos)
    n, total = len(local.value), min(len(local.value), ask.features)
    said, need = local.room(total, len(ids))
    yield Progress(0, 1, f"graph: {said}", notice=need > LARGE)
    if (free := free_bytes(t.device("cpu"))) is not None and need > free:
        raise UserError(f"the graph does not fit: {said}, and {show_bytes(free)} are free. Lower --features (now {ask.features}), or shorten the prompt")
    rows, bias, whole = [], [], []

    def take(targets: Targets) -> None:
        for s, edges, constant in in_batches(local, targets, ask.batch):
            rows.append(edges)
            bias.append(constant)
            whole.append(targets.value[s].double())

    take(end)
    order: list[int] = []
    while len(order) < total:
        step = total - len(order) if total == n else max(ask.batch, -(-total // ROUNDS))
        left = t.ones(n, dtype=t.bool)
        left[order] = False
        score = so_far(t.cat(rows), order, len(ids), weights, n) if total < n else t.arange(n, 0, -1)
        next_ones = t.where(left, score, -1.0).argsort(descending=True, stable=True)[: min(step, total - len(order))]
        for layer in coders:
            mine = next_ones[local.layer[next_ones] == layer]
            for piece in mine.split(ask.batch) if len(mine) else ():
                take(local.features(piece))
                order += piece.tolist()
                yield Progress(len(order), total, f"direct effects of {total} features, {local.n_sources} sources")
    local.let_go()
    return put_together(local, rows, bias, whole, order, end, ids, probability, weights, pos)


def so_far(rows: Tensor, order: list[int], n_logits: int, weights: Tensor, n: int) -> Tensor:
    """Influence of every active feature, by the rows that are there."""
    part, found = shares(rows), t.zeros(n, dtype=t.float64)
    now = weights.double()
    parts = part[:n_logits]
    for _ in range(len(order) + 1):
        flow = now @ parts
        found += flow[:n]
        if not order or not (now := flow[order]).any():
            break
        parts = part[n_logits:]
    return found


def put_together(local: LocalModel, rows, bias, whole, order, end, ids, probability, weights, pos) -> Built:
    n, k, some = len(local.value), len(ids), t.tensor(order, dtype=t.long)
    edges, bias, whole = t.cat(rows), t.cat(bias), t.cat(whole)
    check(local, edges, bias, whole)
    error = (edges.sum(1) + bias - whole).abs().max().item()
    inner = t.argsort(some)
    some, place = some[inner], t.cat([k + inner, t.arange(k)])
    edges, bias, whole = edges[place], bias[place], whole[place]
    f, size = len(some), len(some) + edges.shape[1] - n + k
    chosen = t.zeros(n, dtype=t.bool)
    chosen[some] = True
    left_out = edges[:, :n][:, ~chosen].sum(1)
    matrix, at = t.zeros(size, size, dtype=t.float64), t.cat([t.arange(f), t.arange(size - k, size)])
    matrix[at, :f] = edges[:, :n][:, some]
    matrix[at, f : size - k] = edges[:, n:]

    def spread(x: Tensor) -> Tensor:
        out = t.zeros(size, dtype=t.float64)
        out[at] = x
        return out

    of_logits = lambda x: t.cat([t.zeros(size - k, dtype=t.float64), x.double()])  # noqa: E731
    return Built(local, some, matrix, *map(spread, (bias, left_out, whole)), of_logits(weights), of_logits(probability), ids, pos, end, error)


def check_files(local: LocalModel) -> None:
    """UserError where transcoders of a folder, which are not checked one by one, explain no more of this prompt's MLPs than those of another model would."""
    some = [layer for layer, d in local.coders.items() if isinstance(d, FileTranscoder)]
    outs = [local.acts[local.outs[layer]][0, 1:].float() for layer in some]
    if outs and len(local.ids) > 1:
        fit = float(t.stack([t.cosine_similarity(y - local.errors[layer][1:], y, dim=-1).mean().cpu() for layer, y in zip(some, outs)]).mean())
        if not fit >= LEAST:
            raise UserError(
                f"{local.coders[some[0]].source} does not explain this prompt's MLPs (cosine {fit:.2f}, at least {LEAST} is needed): it is of another model, or its config.yaml names other hook points than it was trained at"
            )


def check(local: LocalModel, edges: Tensor, bias: Tensor, whole: Tensor) -> None:
    """UserError where edges and bias do not add up to the model's own pre-activations and logits: then something is not linear that should be."""
    row = local.model.identity("graph", edges.sum(1) + bias, whole)
    size = max(1.0, float(edges.abs().sum(1).max()) / 32)
    if not row.error <= row.tolerance * size:
        half = "" if local.model.info.dtype == "float32" else f" in {local.model.info.dtype}: load it in float32"
        raise UserError(
            f"{local.model.info.architecture}: what flows into a feature or logit is not the sum of its edges and biases (off by {row.error:.2g}{half})"
        )
