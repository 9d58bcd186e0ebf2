"""
A prompt's local replacement model: attention patterns and norm scales frozen, every MLP a transcoder's features (each as strong as it is), its bias, its skip
connection, and an error. What is left is affine in what features, errors and tokens write, so one run at zero holds every bias, and its gradients every edge.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch as t
from torch import Tensor

from model.bridge import FINAL, Edit, Model
from model.memory import free_bytes
from model.runs import Runs
from model.sae import SparseAutoencoder
from model.writes import SCALE, embedding, frozen_norm, linear_norm, post_norm, pre_norm, pull_back, require_parts, require_values
from techniques.attribution.logits import direction
from techniques.features.effects import stream_reader
from techniques.features.graph import frozen_at
from techniques.graphs.file_transcoders import FileTranscoder
from utils import show_bytes
from vocabulary.nodes import UserError

FIRST = "blocks.0.hook_resid_pre"
PLACES = ("resid_pre", "resid_mid", "normed", "mlp_in", "mlp_stream")
PIECE = 64 << 20  # bytes of decoder rows at once
SHARE = 4  # what active features write is kept in up to one part in so many of the free memory, else read again for every batch of targets
UNKNOWN = 4 << 30  # bytes that are taken for free where the system does not say
AnyTranscoder = SparseAutoencoder | FileTranscoder


@dataclass
class Targets:
    """What edges lead to, n of them: the stream where each is read, its direction there [n, d_model], its position, a constant, and the value in the model."""

    streams: list[str]
    directions: Tensor
    pos: Tensor
    constant: Tensor
    value: Tensor

    def __getitem__(self, some: slice) -> "Targets":
        return Targets(*(getattr(self, f.name)[some] for f in fields(self)))


def check_transcoder(model: Model, d: AnyTranscoder) -> None:
    if not d.transcoder:
        raise UserError(f"{d.source} is an SAE, and an attribution graph needs transcoders: from what an MLP reads to what it writes")
    if d.out != f"blocks.{d.layer}.hook_mlp_out" or d.site not in PLACES:
        raise UserError(f"{d.source} reads {d.point} and writes {d.out}: a graph needs transcoders from an MLP's input to its output")


def reach(d: AnyTranscoder) -> range:
    """The layers whose MLP outputs a transcoder's features write to: its own, and of a cross-layer one all later ones."""
    return range(d.layer, (d.last if isinstance(d, FileTranscoder) else d.layer) + 1)


def writes(d: AnyTranscoder, index: Tensor) -> list[tuple[int, Tensor]]:
    """What one unit of features writes: by layer, rows [n, d_model]."""
    rows = d.writes(index) if isinstance(d, FileTranscoder) else d.rows(index.to(d.device))[:, None]
    return list(zip(reach(d), rows.unbind(1)))


def toward(d: AnyTranscoder, index: Tensor, start: int) -> Tensor:
    """What features write [n, ...] by which they are compared: decoder rows; of a cross-layer one those to the layers from `start` on, side by side."""
    some = writes(d, index)
    return t.cat([rows for layer, rows in some if layer >= start or len(some) == 1], 1)


def each(d: AnyTranscoder, x: Tensor, index: Tensor) -> Tensor:
    """Of an input [n, d_in], one a feature, the feature's activation [n]."""
    return d.each(x, index) if isinstance(d, FileTranscoder) else d.encode(x)[t.arange(len(index)), index.to(d.device)]


def require(model: Model) -> None:
    model.require("pattern", "mlp")
    require_parts(model)
    require_values(model)


def scales(model: Model) -> list[tuple[t.nn.Module, str]]:
    """The norms around attention, and the hooks of their scales."""
    return [found for layer in range(model.info.n_layers) for near in (pre_norm, post_norm) if (found := near(model, layer, "attn"))]


def freeze(runs: Runs, which: str, batch: int = 1) -> list[Edit]:
    """Edits that hold attention patterns and the scales of the norms around attention at a run's values."""
    model = runs.model
    patterns, norms = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.info.n_layers)], scales(model)
    acts = runs.trace(which, [*patterns, *(scale for _, scale in norms)])
    edits = [(n, lambda x, n=n: acts[n].expand(batch, *acts[n].shape[1:])) for n in patterns]
    for norm, scale in norms:
        edits += frozen_at(model, norm, scale.removesuffix("hook_scale"), acts[scale])
    return edits


class LocalModel:
    """
    The replacement model of one run. Sources in order: `where`, `index`, `layer` of the active features, their `value`; errors [layer, seq, d_model]; tokens
    (their embedding; a position's is a bias) [seq, d_model]. Position 0 has no features, as transcoders are trained without it: there all that an MLP writes
    is error, or, where a BOS stands there and the same is written whatever the prompt, a bias (as in circuit-tracer).
    """

    def __init__(self, runs: Runs, which: str, coders: dict[int, AnyTranscoder], batch: int):
        require(runs.model)
        self.runs, self.which, self.coders, self.model, self.batch = runs, which, coders, runs.model, batch
        self.ids, self.layers = runs.row(which).ids, range(runs.model.info.n_layers)
        self.outs = [f"blocks.{layer}.hook_mlp_out" for layer in self.layers]
        norms = {layer: pre_norm(runs.model, layer, "mlp") for layer, d in coders.items() if d.site in ("normed", "mlp_in")}
        self.norms = {layer: found for layer, found in norms.items() if found}
        points = [*(d.point for d in coders.values()), *(scale for _, scale in self.norms.values())]
        name, factor = embedding(runs.model)
        self.acts = runs.trace(which, [name, FIRST, *self.outs, *points])
        self.tokens = self.acts[name][0].to(self.acts[FIRST].device).float() * factor
        self.bos = self.ids[0] == runs.model.bos
        self.read_features()
        self.let_go()

    @t.no_grad()
    def read_features(self) -> None:
        """Which features fire, and what they leave of each MLP."""
        parts = []
        made = [t.zeros_like(self.acts[n][0], dtype=t.float32) for n in self.outs]
        self.starts: list[Tensor] = []  # by layer, what is written where a BOS stands
        self.errors: list[Tensor] = []
        for layer, name in enumerate(self.outs):
            if (d := self.coders.get(layer)) is not None:
                x = self.acts[d.point][0]
                where, index, value = d.active(x)
                keep = where > 0
                where, index, value = where[keep], index[keep], value[keep]
                parts.append((t.full_like(where, layer).cpu(), where.cpu(), index.cpu(), value.cpu()))
                for p in self.pieces(d, len(where)):
                    for out, rows in writes(d, index[p]):
                        made[out].index_add_(0, where[p].to(made[out].device), (rows * value[p][:, None]).to(made[out].device))
                made[layer] += d.offset(x).to(made[layer])
            error = self.acts[name][0].float() - made[layer]
            start = t.zeros_like(error)
            if self.bos:
                start[0], error[0] = error[0], 0
            self.starts.append(start)
            self.errors.append(error)
        empty = t.zeros(0, dtype=t.long)
        self.layer, self.where, self.index, self.value = (t.cat(p) for p in zip(*parts)) if parts else (empty, empty, empty, t.zeros(0))

    def pieces(self, d: AnyTranscoder, n: int) -> list[slice]:
        """Of n features some at a time, so that what they write fits into PIECE."""
        size = max(1, PIECE // (4 * self.model.info.d_model * len(reach(d))))
        return [slice(i, i + size) for i in range(0, n, size)]

    # ------------------------------------------------------------------ the affine run

    def stream_of(self, layer: int) -> str:
        """The hook point of the stream in front of a layer's transcoder."""
        return f"blocks.{layer}.hook_resid_{'pre' if self.model.parallel or self.coders[layer].site == 'resid_pre' else 'mid'}"

    def input_of(self, layer: int, stream: Tensor) -> Tensor:
        """What a transcoder reads of the stream, its norm's scale frozen."""
        if layer not in self.norms:
            return stream
        norm, name = self.norms[layer]
        scale, linear = self.acts[name], linear_norm(self.model, norm)
        if self.coders[layer].site == "mlp_in":
            x = frozen_norm(self.model, norm, scale, stream)
            return x if linear.bias is None else x + linear.bias.to(x)
        return (stream - stream.mean(-1, keepdim=True) if linear.centred else stream) / scale

    def run(self) -> None:
        """Streams [batch, seq, d_model] where transcoders read and at the end, with a gradient's way back, when nothing but biases is written."""
        model, last, first = self.model, f"blocks.{self.layers[-1]}.hook_resid_post", self.acts[FIRST]
        self.start = (first.float() - self.tokens).to(first).expand(self.batch, -1, -1).clone().requires_grad_(True)
        self.written = [t.zeros_like(self.acts[n].expand(self.batch, -1, -1), requires_grad=True) for n in self.outs]
        streams: dict[str, Tensor] = {}

        def mlp(layer: int) -> Tensor:
            out, d = self.written[layer] + self.starts[layer].to(self.written[layer]), self.coders.get(layer)
            if d is None:
                return out
            x = self.input_of(layer, streams[self.stream_of(layer)])
            return out + d.offset(x).to(out)

        edits = [*freeze(self.runs, self.which, self.batch), (FIRST, lambda x: self.start)]
        edits += [(name, lambda x, layer=layer: mlp(layer)) for layer, name in enumerate(self.outs)]
        reads = dict.fromkeys([*(self.stream_of(layer) for layer in self.coders), last])
        ids = t.tensor([self.ids] * self.batch)
        with t.enable_grad(), model.hooks([*edits, *((n, lambda x, n=n: streams.__setitem__(n, x)) for n in reads)]):
            model.bridge(ids.to(model.device), use_cache=False, logits_to_keep=1)
        self.streams = streams

    def let_go(self, batch: int = 0) -> None:
        """Of what only edges need: the run with its gradients' way back, and what features write. The next run has this batch."""
        self.streams, self.written, self.start, self.kept = {}, [], None, {}  # kept: by layer, what its active features write
        free = free_bytes(self.tokens.device)
        self.batch, self.left = batch or self.batch, (UNKNOWN if free is None else free) // SHARE  # left: bytes that may still be kept

    # ------------------------------------------------------------------ targets

    @t.no_grad()
    def features(self, some: Tensor) -> Targets:
        """Features (indices among the active ones) as targets."""
        rows = []
        for layer, pos, index in zip(*(x[some].tolist() for x in (self.layer, self.where, self.index))):
            d = self.coders[layer]
            x = self.acts[d.point][0, pos]
            reader = d.reader(index, x)
            assert reader is not None, f"{d.kind} has no linear pre-activation"
            _, w, constant = stream_reader(self.runs, d, self.which, reader[0], pos)
            value = (d.flat(x).double() @ reader[0].double()).item() + reader[1]
            rows.append((self.stream_of(layer), w.to(self.tokens.device), constant + reader[1], value))
        streams, w, constant, value = zip(*rows)
        return Targets([*streams], t.stack(w), self.where[some], t.tensor(constant), t.tensor(value))

    @t.no_grad()
    def logits(self, ids: list[int], pos: int) -> Targets:
        """Tokens' logits less the mean over the vocabulary, before a soft cap."""
        model, w = self.model, self.model.bridge.W_U.float()
        u = (w[:, ids] - w.mean(1, keepdim=True)).T * model.logit_scale
        b = model.bridge.b_U.double().cpu()
        scores = self.scores(pos)
        return self.at_end(u, (b[ids] - b.mean()) * model.logit_scale, scores[ids] - scores.mean(), pos)

    @t.no_grad()
    def difference(self, pos: int) -> Targets:
        """The answers' mean logit less the foils', before a soft cap."""
        runs = self.runs
        if not (runs.answers and runs.foils):
            raise UserError("the logit difference needs an answer and a foil: give them, or take --target logits")
        u, bias = direction(self.model, runs.answers, runs.foils)
        scores = self.scores(pos)
        return self.at_end(u[None], t.tensor([bias]), (scores[runs.answers].mean() - scores[runs.foils].mean())[None], pos)

    def scores(self, pos: int) -> Tensor:
        return self.model.scores(self.runs.trace(self.which, [FINAL])[FINAL][:1, pos])[0].double().cpu()

    def at_end(self, u: Tensor, bias: Tensor, value: Tensor, pos: int) -> Targets:
        scale = self.runs.trace(self.which, [SCALE])[SCALE][0, pos][None].expand(len(u), -1)
        w, constant = pull_back(self.model, self.model.bridge.ln_final, scale, u)
        return Targets([f"blocks.{self.layers[-1]}.hook_resid_post"] * len(u), w, t.full((len(u),), pos), constant + bias, value)

    # ------------------------------------------------------------------ edges

    @property
    def n_sources(self) -> int:
        return len(self.value) + (len(self.layers) + 1) * len(self.ids)

    def edges(self, targets: Targets, out: Tensor) -> Tensor:
        """Into `out` [target, source] what every source adds to each of at most `batch` targets, by one backward pass of the run; what biases add [target] in float64."""
        bias, seeds = targets.constant.double().clone(), {}
        for name in dict.fromkeys(targets.streams):
            stream, mine = self.streams[name], t.tensor([i for i, s in enumerate(targets.streams) if s == name])
            u, pos = targets.directions[mine].to(stream), targets.pos[mine].to(stream.device)
            seeds[name] = t.zeros_like(stream)
            seeds[name][mine.to(stream.device), pos] = u
            bias[mine] += (u.cpu().double() * stream[0, pos].detach().cpu().double()).sum(-1)
        inputs = [self.start, *self.written]
        grads = t.autograd.grad([self.streams[n] for n in seeds], inputs, [*seeds.values()], retain_graph=True, allow_unused=True)
        top = max(i for i, x in enumerate(grads) if x is not None)  # nothing that later layers write comes here
        self.fill(out, t.stack([t.zeros_like(self.tokens).expand(len(out), -1, -1) if x is None else x[: len(out)].to(self.tokens) for x in grads[: top + 1]]))
        return bias

    @t.no_grad()
    def fill(self, out: Tensor, grads: Tensor) -> None:
        """Rows of edges [target, source] from gradients: of each feature at its position alone, in one product for all that fire there."""
        n, width, done = len(grads) - 1, self.tokens.shape[-1], len(self.value)
        for layer in [x for x in self.coders if x < n]:
            for some, rows in self.written_by(layer):
                layers = min(rows.shape[1] // width, n - layer)
                into, rows, parts = grads[1 + layer : 1 + layer + layers].transpose(0, 1), rows[:, : layers * width], []
                places, counts = self.where[some].unique_consecutive(return_counts=True)
                for pos, block in zip(places.tolist(), rows.split(counts.tolist())):
                    parts.append(into[:, :, pos].flatten(1) @ block.T)
                out[:, some] = t.cat(parts, 1).to(out)
        for layer, error in enumerate(self.errors[:n]):
            out[:, done + layer * len(error) : done + (layer + 1) * len(error)] = t.einsum("bsd,sd->bs", grads[1 + layer], error.to(grads)).to(out)
        out[:, -len(self.ids) :] = t.einsum("bsd,sd->bs", grads[0], self.tokens).to(out)

    def written_by(self, layer: int) -> Iterator[tuple[slice, Tensor]]:
        """Of a layer's active features some at a time (a slice of all), in the order of positions: what each adds to the MLP outputs that it writes to, side by side [feature, layers * d_model]."""
        if layer in self.kept:
            yield from self.kept[layer]
            return
        d, start, end = self.coders[layer], *(int(t.searchsorted(self.layer, x)) for x in (layer, layer + 1))
        size, found = self.bytes_written(layer), []
        for p in self.pieces(d, end - start):
            some = slice(start + p.start, min(start + p.stop, end))
            rows = t.cat([rows.to(self.tokens) for _, rows in writes(d, self.index[some])], 1)
            rows *= self.value[some].to(rows)[:, None]
            if size <= self.left:
                found.append((some, rows))
            yield some, rows
        if size <= self.left:
            self.kept[layer], self.left = found, self.left - size

    def bytes_written(self, layer: int) -> int:
        return 4 * self.model.info.d_model * len(reach(self.coders[layer])) * int((self.layer == layer).sum())

    def room(self, features: int, logits: int) -> tuple[str, int]:
        """What a graph of so many features will hold, in words, and in bytes: rows of edges, what features write, and what pruning makes of the square of all nodes."""
        n, held = self.n_sources, sum(bytes_of(d) for d in self.coders.values())
        rows, nodes = 4 * (features + logits) * n, features + n - len(self.value) + logits
        need = rows + min(self.left, sum(map(self.bytes_written, self.coders))) + 6 * 8 * nodes**2
        words = f"{len(self.value)} active features, {n} sources; transcoders hold {show_bytes(held)}, edges of {features} features and {logits} logits {show_bytes(rows)}"
        return f"{words}, at most {show_bytes(need)} as they are put together and pruned", need


def bytes_of(d: AnyTranscoder) -> int:
    return d.nbytes if isinstance(d, FileTranscoder) else sum(p.nbytes for p in d.sae.parameters())
