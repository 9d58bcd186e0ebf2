"""From the local replacement model to the graph: targets in the order of their influence, the matrix of edges, the check that each adds up."""

import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch as t
from torch import Tensor

from model.bridge import FINAL
from model.memory import Chunks, free_bytes
from model.runs import Runs
from techniques.graphs.file_transcoders import FileTranscoder
from techniques.graphs.influence import shares
from techniques.graphs.replacement import AnyTranscoder, LocalModel, Targets
from techniques.graphs.requests import OfGraph
from utils import show_bytes
from vocabulary.nodes import UserError
from vocabulary.progress import time_left
from vocabulary.requests import Progress

PIECE = 256  # rows of edges in float64 at once
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


class Rows:
    """The incoming edges of logits, then of features in the order in which they came, `taken` of all active ones: float32 `edges` [target, source], `bias` and `whole` [target]."""

    def __init__(self, local: LocalModel, end: Targets, features: int):
        self.local, self.logits, self.features = local, len(end.pos), features
        self.edges = t.zeros(self.logits + features, local.n_sources)
        self.bias, self.whole, self.taken = t.zeros(len(self.edges), dtype=t.float64), [], t.zeros(0, dtype=t.long)
        self.chunks, self.spent, self.passes = Chunks("targets", local.batch, local.let_go), 0.0, 0

    def add(self, targets: Targets) -> Generator[Progress]:
        start = sum(map(len, self.whole))
        self.whole.append(targets.value.double())

        def work(i: int, stop: int) -> Progress:
            if not self.local.streams:
                self.local.run()
            rows, begun = slice(start + i, start + stop), time.monotonic()
            self.bias[rows] = self.local.edges(targets[i:stop], self.edges[rows])
            self.spent, self.passes = self.spent + time.monotonic() - begun, self.passes + 1
            left = self.spent / self.passes * (len(self.edges) - rows.stop) / self.local.batch
            return Progress(
                rows.stop - self.logits, self.features, f"direct effects of {self.features} features, {self.local.n_sources} sources, {time_left(left)}"
            )

        yield from self.chunks.over(len(targets.pos), work)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """In float64, some at a time."""
        for i in range(0, len(self.edges), PIECE):
            yield slice(i, i + PIECE), self.edges[i : i + PIECE].double()

    def influence(self, weights: Tensor) -> Tensor:
        """Of every active feature, by the rows that are there: as edges lead to later layers only, each layer's is whole when its turn comes, from the last on."""
        n, layers = len(self.local.value), self.local.layer[self.taken]
        found = weights.double() @ shares(self.edges[: self.logits].double())[:, :n]
        for layer in layers.unique().flip(0).tolist():
            for mine in (layers == layer).nonzero()[:, 0].split(PIECE):
                found += found[self.taken[mine]] @ shares(self.edges[self.logits + mine].double())[:, :n]
        return found

    def choose(self, weights: Tensor, step: int) -> Generator[Progress]:
        """Add the features of most influence that are not there yet, at most `step`."""
        score, n = self.influence(weights), min(step, self.features - len(self.taken))
        score[self.taken] = -1
        some = score.argsort(descending=True, stable=True)[:n].sort().values
        yield from self.add(self.local.features(some))
        self.taken = t.cat([self.taken, some])


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
    rows = Rows(local, end, total)
    yield from rows.add(end)
    while len(rows.taken) < total:
        yield from rows.choose(weights, total if total == n else max(ask.batch, -(-total // ROUNDS)))
    local.let_go()
    yield Progress(total, total, "edges are put together")
    return put_together(rows, end, ids, probability, weights, pos)


def put_together(rows: Rows, end: Targets, ids: list[int], probability: Tensor, weights: Tensor, pos: int) -> Built:
    local, k, some, inner = rows.local, rows.logits, *rows.taken.sort()
    n, f, whole = len(local.value), len(some), t.cat(rows.whole)
    size = f + local.n_sources - n + k
    place = t.cat([t.arange(size - k, size), t.argsort(inner)])  # of each row
    chosen = t.zeros(n, dtype=t.bool)
    chosen[some] = True
    matrix, left_out = t.zeros(size, size, dtype=t.float64), t.zeros(size, dtype=t.float64)
    sums, largest = rows.bias.clone(), 0.0
    for piece, edges in rows.pieces():
        sums[piece] += edges.sum(1)
        largest = max(largest, float(edges.abs().sum(1).max()))
        left_out[place[piece]] = edges[:, :n][:, ~chosen].sum(1)
        matrix[place[piece], : size - k] = t.cat([edges[:, :n][:, some], edges[:, n:]], 1)
    check(local, sums, whole, largest)

    def spread(x: Tensor) -> Tensor:
        out = t.zeros(size, dtype=t.float64)
        out[place] = x
        return out

    of_logits = lambda x: t.cat([t.zeros(size - k, dtype=t.float64), x.double()])  # noqa: E731
    error = (sums - whole).abs().max().item()
    return Built(local, some, matrix, spread(rows.bias), left_out, spread(whole), of_logits(weights), of_logits(probability), ids, pos, end, error)


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


def check(local: LocalModel, sums: Tensor, whole: Tensor, largest: float) -> None:
    """UserError where edges and bias do not add up to the model's own pre-activations and logits (edges' absolute values add up to `largest` at most): then something is not linear that should be."""
    row = local.model.identity("graph", sums, whole)
    if not row.error <= row.tolerance * max(1.0, largest / 32):
        half = "" if local.model.info.dtype == "float32" else f" in {local.model.info.dtype}: load it in float32"
        raise UserError(
            f"{local.model.info.architecture}: what flows into a feature or logit is not the sum of its edges and biases (off by {row.error:.2g}{half})"
        )
