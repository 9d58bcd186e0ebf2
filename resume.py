"""
Many changed runs of one model at the price of a few: what sweeps run on. No model maths of its own, the Bridge's blocks do all of it.

1. A `Base` is one run of a few prompts of equal length, kept: every block's input, the keys and values, the hook points that will be changed.
2. A `Variant` is that run with other values (`Source`) at some spots. Variants are the batch.
3. A wave passes over the blocks once. A variant joins at the first block it changes, as the kept residual stream; positions before its first change
   come from the kept keys and values; after the last block only the metric's position is read.
4. Where one position of one block's output changes, the block runs on that single token (its attention is overwritten), and the variant joins after it.
5. Such variants differ in length, so that many are packed into one row: a mask lets each see the kept run before it, and itself.
Between two blocks no hook is on the model, so that a wave is a generator that others may interrupt.
"""

from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch as t
from torch import Tensor
from transformers import DynamicCache

from lens import measure, rows_at_once
from messages import Node, Progress, UserError
from model import FINAL, Edit, Keep, Model, out_of_memory
from patching import Runs, hook_name
from shortcuts import fused, given, last_rows, slow_modules
from utils import tec

TRIED: WeakKeyDictionary[Model, dict[object, str]] = WeakKeyDictionary()  # why a model's runs can't be resumed, with and without interventions
CALLED: WeakKeyDictionary[Model, dict[tuple, dict[tuple, list]]] = WeakKeyDictionary()  # what blocks are called with, of a few prompts
SLOW: WeakKeyDictionary[Model, list[list[t.nn.Module]]] = WeakKeyDictionary()  # of every block what `fused` stands in for
DONE = ("a sweep's base run",)  # its mark in the model's cache
PACK = 160  # tokens of a packed row
FIRST = 12  # variants of a sweep's first wave, so that something is on the screen
PIECE = 11e9  # FLOPs of a block between two pauses, on a CPU's thread
ROWWISE = ("attn", "resid_mid", "head", "neuron")  # one position of these changes the block's output at that position only


@dataclass(frozen=True)
class Spot:
    """A node with its position as an index (None: all), the hook point it is written at, and of a pattern optionally one source position."""

    node: Node
    name: str
    source: int | None = None

    @property
    def key(self) -> tuple:
        return self.node.layer, self.node.site, self.node.part

    @property
    def also(self) -> tuple[str, ...]:
        """Other hook points that its new values are made from."""
        return ()

    def index(self, start: int, group: int) -> tuple:
        """Into [position, ...] behind the batch, of a tensor that begins at `start`; a pattern is [head, destination, source]."""
        n = self.node
        pos = slice(None) if n.pos is None else n.pos - start
        match n.site:
            case "head" if n.part == "pattern":
                return n.head, pos, slice(None) if self.source is None else self.source
            case "head":
                return pos, n.head // group if n.part in ("k", "v") else n.head
            case "neuron":
                return pos, n.index
        return (pos,)


def make_spot(model: Model, node: Node, source: int | None = None) -> Spot:
    """resid_mid is written through the attention's output: the hook of its name does not reach the skip connection."""
    name = hook_name(model, node)
    return Spot(node, f"blocks.{node.layer}.hook_attn_out" if node.site == "resid_mid" else name, source)


@dataclass(frozen=True)
class Variant:
    """A cell and the spots that are changed for it."""

    cell: int
    spots: tuple[Spot, ...]

    @property
    def first(self) -> int:
        return min(s.node.pos or 0 for s in self.spots) if self.spots else 0

    @property
    def layer(self) -> int:
        return min((s.node.layer for s in self.spots), default=0)


def id_rows(ids: Tensor) -> tuple:
    return tuple(map(tuple, ids.tolist()))


def name_of(what: str, layer: int) -> str:
    """The name in the cache of a block's keys or values."""
    return f"blocks.{layer} {what}"


def common(model: Model) -> list[str]:
    """Hook points that some sweep reads."""
    ends = (
        "attn.hook_z",
        "attn.hook_q",
        "attn.hook_k",
        "attn.hook_v",
        "attn.hook_pattern",
        "hook_attn_out",
        "hook_mlp_out",
        "hook_resid_mid",
        "hook_resid_post",
    )
    return [
        name for i in range(model.info.n_layers) for end in ends if (name := f"blocks.{i}.{end}") in model.points and not model.bridge._gated_hook_reason(name)
    ]


class Recorded(Exception):
    """Every block has been called: the rest of the forward pass is not needed."""


class Prefix:
    """Stands in for Hugging Face's cache of keys and values in one block: those of the prefix, for every row of the batch."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        return self.join(self.keys, keys), self.join(self.values, values)

    def join(self, old: Tensor, new: Tensor) -> Tensor:
        b, h, p, d = old.shape
        out = new.new_empty(len(new), h, p + new.shape[2], d)
        out[:, :, :p].view(-1, b, h, p, d).copy_(old)
        out[:, :, p:] = new
        return out

    def get_seq_length(self, *_) -> int:
        return self.keys.shape[2]


# ------------------------------------------------------------------ the metric


class Score:
    """The metric of runs that differ in what reaches the final norm; of a logit difference only the answers' and foils' logits are made."""

    def __init__(self, group: list[Runs], clean: Tensor | None = None, which: str = "now"):
        runs = self.runs = group[0]
        self.model, self.group, self.kind = runs.model, group, runs.study.metric.kind
        self.whole = self.kind == "loss"
        self.ids = [r.row(which).ids for r in group]
        self.places = [len(ids) - 1 if self.whole else r.metric_position(which) for r, ids in zip(group, self.ids)]
        self.base: np.ndarray | None = None  # the metric of the unchanged run [prompt]
        self.clean = clean  # [prompt, d_model] normed, for KL
        self.nll: Tensor | None = None  # of the base run's own tokens [prompt, seq - 1]
        if self.kind == "logit_diff":
            tokens = sorted({i for r in group for i in (*r.answers, *r.foils)})
            self.weights = t.zeros(len(group), len(tokens), dtype=t.float64)
            for row, r in zip(self.weights, group):
                row[[tokens.index(i) for i in r.answers]] += 1 / len(r.answers)
                row[[tokens.index(i) for i in r.foils]] -= 1 / len(r.foils)
            self.columns = self.model.bridge.W_U[:, tokens].contiguous()
            self.bias = self.model.bridge.b_U[tokens].float()

    def diff(self, normed: Tensor) -> Tensor:
        """Logit difference [variant, prompt] of normed rows [variant, prompt, d_model]; differentiable."""
        model = self.model
        logits = ((normed @ self.columns.to(normed.device)).float() + self.bias.to(normed.device)) * model.logit_scale
        logits = model.softcap * t.tanh(logits / model.softcap) if model.softcap else logits
        return (logits.double() * self.weights.to(logits.device)).sum(-1)

    @t.no_grad()
    def of(self, x: Tensor, start: int) -> np.ndarray:
        """[variant, prompt] of the stream after the last block, [variant x prompt, seq from start, d_model]."""
        model, b = self.model, len(self.group)
        x = x.view(-1, b, *x.shape[1:])
        if self.whole:
            return self.losses(x, start)
        out = self.of_normed(model.norm(x[:, t.arange(b, device=x.device), [max(0, p - start) for p in self.places]]))
        for j, place in enumerate(self.places):
            if place < start:  # nothing before `start` changes
                out[:, j] = self.base[j]
        return out

    def of_normed(self, normed: Tensor) -> np.ndarray:
        """[variant, prompt] of normed rows at the metric's positions."""
        model = self.model
        if self.kind == "logit_diff":
            return self.diff(normed).cpu().numpy()
        out = np.zeros(normed.shape[:2])
        for j, r in enumerate(self.group):
            clean = model.unembed(self.clean[j : j + 1])[0] if self.kind == "kl" else None
            for i in range(0, len(normed), size := rows_at_once(model)):
                for k, row in enumerate(model.unembed(normed[i : i + size, j])):
                    out[i + k, j] = measure(self.kind, row, row if clean is None else clean, np.zeros(0), r.answers, r.foils)
        return out

    def losses(self, x: Tensor, start: int) -> np.ndarray:
        model, out = self.model, np.zeros(x.shape[:2])
        for j, ids in enumerate(self.ids):
            target = t.tensor(ids[start + 1 :], device=x.device)
            known = 0.0 if not start else self.nll[j, :start].sum().item()
            flat = x[:, j, : len(target)].flatten(0, 1)
            found = [self.tokens(flat[i : i + rows_at_once(model)], target, i) for i in range(0, len(flat), rows_at_once(model))]
            nll = t.cat(found).view(len(x), -1) if found else t.zeros(len(x), 0)
            out[:, j] = ((nll.sum(1) + known) / (len(ids) - 1)).cpu().numpy()
        return out

    def tokens(self, x: Tensor, target: Tensor, first: int) -> Tensor:
        logits = self.model.unembed(self.model.norm(x)).double()
        right = target[(first + t.arange(len(x), device=x.device)) % len(target)]
        return logits.logsumexp(-1) - logits.gather(-1, right[:, None])[:, 0]


# ------------------------------------------------------------------ the base run


class Base:
    """
    The run that variants change: `resid` the input of every block, and the last block's output; `acts` what passed the named hook points, after the
    study's interventions. Nothing changes before `shared`. `source` gives every spot's new values. `reason` says why variants have to be whole forward passes ("": they need not).
    """

    def __init__(self, group: list[Runs], names: Iterable[str], limit: int, plain: bool = False, shared: int = 0, beside: Tensor | None = None):
        runs = group[0]
        self.model, self.group, self.limit, self.shared = runs.model, group, limit, shared
        self.n, self.edits = self.model.info.n_layers, runs.edits
        assert not self.edits or len(group) == 1 and shared == 0, "interventions differ from prompt to prompt"
        self.ids = t.tensor([r.row("now").ids for r in group])
        self.per_kv = self.model.info.n_heads // self.model.info.n_kv_heads
        self.source: dict[tuple, Tensor] = {}
        self.score: Score | None = None
        known = CALLED.setdefault(self.model, {})
        if len(known) > 8:
            known.clear()
        self.called = known.setdefault(id_rows(self.ids[:1]), {})  # what blocks are called with
        if self.model not in SLOW:
            SLOW[self.model] = [slow_modules(b) for b in self.model.bridge.blocks]
        self.slow = SLOW[self.model]
        self.reason = "asked for" if plain else ""
        self.at_once = self.peak = 0  # the most variants in one batch, and its bytes as `room` counts them
        self.worked, self.work = 0, 1  # tokens through a block: done, and all of them
        self.run(names, beside)

    @t.no_grad()
    def run(self, names: Iterable[str], beside: Tensor | None) -> None:
        """`beside` are the other prompts [prompt, seq], in the same forward pass: self.beside holds what passed the hook points there."""
        pair = [self.ids] if beside is None else [self.ids, beside]
        last = f"blocks.{self.n - 1}.hook_resid_post"
        names = list(dict.fromkeys((*names, FINAL, last)))
        known = [] if self.edits or self.reason else [self.recall(ids, names) for ids in pair]
        if not known or None in known:
            known = self.record(pair, names)
        self.acts, self.beside = known[0], known[-1] if beside is not None else {}
        self.resid = [*(self.acts[self.entry(i)] for i in range(self.n)), self.acts[last]]
        self.kept = [] if self.reason else [(self.acts[name_of("keys", i)], self.acts[name_of("values", i)]) for i in range(self.n)]

    def entry(self, layer: int) -> str:
        """The name of what a block gets: before the interventions, which are made there once more."""
        return f"blocks.{layer} before" if self.edits else f"blocks.{layer}.hook_resid_pre"

    def recall(self, ids: Tensor, names: list[str]) -> dict[str, Tensor] | None:
        """What a run left in the model's cache, if all of it is there."""
        inside = [name for i in range(self.n) for name in (self.entry(i), name_of("keys", i), name_of("values", i))]
        found = {name: self.model.cache.get((id_rows(ids), DONE, name)) for name in (*inside, *names)}
        return None if any(x is None for x in found.values()) else found

    def record(self, pair: list[Tensor], names: list[str]) -> list[dict[str, Tensor]]:
        """Run them together. Kept in the model's cache, with what other sweeps will ask for, where that is small against it."""
        model, ids = self.model, t.cat(pair).to(self.model.device)
        acts: dict[str, Tensor] = {}
        small = (
            not self.edits
            and not self.reason
            and 32 * ids.numel() * self.n * (12 * model.info.d_model + model.info.n_heads * ids.shape[1]) <= model.cache.limit
        )
        names = list(dict.fromkeys((*names, *(common(model) if small else ()))))
        enter = [(f"blocks.{i}.hook_resid_pre", lambda x, i=i: acts.__setitem__(self.entry(i), x.detach())) for i in range(self.n)]
        catch = [(n, lambda x, n=n: acts.__setitem__(n, x.detach())) for n in names]
        kept = None if self.reason else DynamicCache()
        with fused([] if self.reason else [m for some in self.slow for m in some]):
            model.forward(ids, edits=[*enter, *self.edits, *catch], keep=None, cache=kept)
        for i, layer in enumerate(kept.layers if kept else ()):
            acts |= {name_of("keys", i): layer.keys, name_of("values", i): layer.values}
        found, n = [], len(self.ids)
        for a, some in zip((0, n), pair):
            found.append({name: x[a : a + n] for name, x in acts.items()})
            for name, x in found[-1].items() if small else ():
                model.cache.put((id_rows(some), DONE, name), x)
        return found

    def begin(self, score: Score) -> np.ndarray:
        """The metric of the base run itself [prompt]; decides whether the fast way gives this model's own numbers."""
        self.score = score
        self.stop = self.ids.shape[1] if score.whole or self.edits else max(score.places) + 1
        if score.whole:
            n = self.ids.shape[1] - 1
            score.nll = t.stack([score.tokens(x[:-1], ids[1:].to(x.device), 0) for x, ids in zip(self.resid[-1], self.ids)]) if n else None
        value = score.base = score.of(self.resid[-1], 0)[0]
        if not np.isfinite(value).all():
            raise UserError("the metric of the unchanged run is not finite: does the model hold NaN? Try float32")
        if not self.reason:
            known = TRIED.setdefault(self.model, {})
            if bool(self.edits) not in known:
                known[bool(self.edits)] = self.trial()
            self.reason = known[bool(self.edits)]
        return value

    def trial(self) -> str:
        """Resume an unchanged run from the middle and from a prefix: why that does not give the same stream, or ''."""
        start, layer = self.stop // 2 if not self.edits else 0, self.n // 2
        try:
            x = self.resid[layer][:, start : self.stop]
            for i in range(layer, self.n):
                x = self.step(i, x, start, [])
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, t.OutOfMemoryError):
                raise
            return f"{self.model.info.architecture}'s blocks can't be run one by one ({type(error).__name__})"
        rows = range(len(self.ids))
        got = t.stack([x[j, self.score.places[j] - start] for j in rows]) if min(self.score.places) >= start else x[:, -1]
        want = t.stack([self.resid[-1][j, self.score.places[j]] for j in rows]) if min(self.score.places) >= start else self.resid[-1][:, self.stop - 1]
        same = self.model.identity("resume", got, want)
        return "" if same.ok else f"resumed runs of {self.model.info.architecture} are off by {same.error:.1g}"

    @property
    def packs(self) -> bool:
        """Whether variants of several lengths can share a row: every mask is the model's to give, and a packed run equals the kept one."""
        if self.edits or self.score.whole or set(self.score.places) != {self.stop - 1}:
            return False
        known = TRIED[self.model]
        if "packed" not in known:
            known["packed"] = self.trial_packed()
        return not known["packed"]

    def trial_packed(self) -> str:
        firsts, x = (self.stop // 2, self.stop - 1), None
        tokens = t.cat([t.arange(p, self.stop) for p in firsts])
        try:
            for i in range(self.n // 2, self.n):
                x = self.step(i, self.resid[i][:, tokens] if x is None else x, 0, [], firsts)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, t.OutOfMemoryError):
                raise
            return type(error).__name__
        want = self.resid[-1][:, self.stop - 1]
        ends = [len(tokens) - 2, len(tokens) - 1]
        return "" if all(self.model.identity("packed", x[:, e], want).ok for e in ends) else "off"

    # ---------------------------------------------------------------- one block

    def calls(self, start: int, length: int, kept: bool) -> list[tuple[tuple, dict, object]]:
        """What Hugging Face's model hands each block for one row of tokens from `start`: masks, positions, and the cache that stands for the prefix."""
        if (start, length, kept) not in self.called:
            seen: dict[int, tuple] = {}

            def record(layer: int) -> Callable:
                def forward(*args, **kwargs):
                    hidden = args[0] if args else kwargs["hidden_states"]
                    seen[layer] = (args[1:], {k: v for k, v in kwargs.items() if k != "hidden_states"})
                    if layer == self.n - 1:
                        raise Recorded
                    return hidden

                return forward

            blocks, cache = list(self.model.bridge.blocks), DynamicCache() if kept else None
            for i, (keys, values) in enumerate(self.kept if start else []):
                cache.update(keys[:1, :, :start], values[:1, :, :start], i)
            try:
                for i, block in enumerate(blocks):
                    block.__dict__["forward"] = record(i)
                more = {"past_key_values": cache} if kept else {}
                self.model.bridge(self.ids[:1, start : start + length].to(self.model.device), logits_to_keep=1, use_cache=kept, **more)
            except Recorded:
                pass
            finally:
                for block in blocks:
                    block.__dict__.pop("forward", None)
            if cache is not None:
                cache.layers.clear()  # from here on only a sign of where it was
            self.called[start, length, kept] = [(*seen[i], cache) for i in range(self.n)]
        return self.called[start, length, kept]

    def packed_calls(self, firsts: tuple[int, ...]) -> list[tuple[tuple, dict, object]]:
        """The same for a row of segments, each from its first position to `stop`, behind the keys of the whole kept run."""
        stop = self.stop
        if (firsts, stop) not in self.called:
            places = t.cat([t.arange(p, stop) for p in firsts]).to(self.model.device)
            segment = t.cat([t.full((stop - p,), i) for i, p in enumerate(firsts)]).to(self.model.device)
            begins = t.tensor(firsts, device=self.model.device)[segment]

            def change(x: object) -> object:
                if isinstance(x, tuple):
                    return tuple(change(a) for a in x)
                if not isinstance(x, Tensor):
                    return x
                if x.shape[-2:] == (stop, stop) and x.ndim == 4:
                    never = False if x.dtype == t.bool else t.finfo(x.dtype).min
                    before = x[..., places, :].masked_fill(t.arange(stop, device=x.device) >= begins[:, None], never)
                    own = x[..., places[:, None], places].masked_fill(segment[:, None] != segment, never)
                    return t.cat([before, own], -1)
                assert x.ndim >= 2 and x.shape[1] == stop
                return x[:, places]

            rest = lambda x, cache: x if x is cache else change(x)  # noqa: E731
            full = self.calls(0, stop, True)
            self.called[firsts, stop] = [(tuple(rest(a, c) for a in args), {k: rest(a, c) for k, a in kwargs.items()}, c) for args, kwargs, c in full]
        return self.called[firsts, stop]

    def step(self, layer: int, x: Tensor, start: int, edits: list[Edit], firsts: tuple[int, ...] = (), grad: bool = False) -> Tensor:
        """One block on [rows, positions from start, d_model], rows being variants x prompts; on packed rows of segments from `firsts`."""
        args, kwargs, cache = (self.packed_calls(firsts) if firsts else self.calls(start, x.shape[1], start > 0))[layer]
        if cache is not None:
            prefix = Prefix(*(kv[:, :, : self.stop if firsts else start] for kv in self.kept[layer]))
            args = tuple(prefix if a is cache else a for a in args)
            kwargs = {k: prefix if a is cache else a for k, a in kwargs.items()}
        ours = [e for e in self.edits if e[0].startswith(f"blocks.{layer}.")]
        block = self.model.bridge.blocks[layer]
        ends = (np.cumsum([self.stop - p for p in firsts]) - 1).tolist() if firsts else [x.shape[1] - 1]
        short = layer == self.n - 1 and x.shape[1] > len(ends) and (bool(firsts) or start + x.shape[1] == self.stop)
        short = short and not self.edits and not self.score.whole and len(set(self.score.places)) == 1 and not any("mlp" in name for name, _ in edits)
        rows = ends if short else []
        with t.set_grad_enabled(grad), self.model.hooks([*ours, *edits]), last_rows(block.mlp, rows), fused([] if grad else self.slow[layer]):
            out = block(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    def steps(self, layer: int, x: Tensor, rows: list[Variant], start: int, firsts: tuple[int, ...] = ()) -> Generator[None, None, Tensor]:
        """The same in pieces, with a pause after each; edits of this block for the variants that have some."""
        b, out, per = len(self.ids), [], self.piece(x.shape[1])
        for a in range(0, len(x) // b, per):
            piece = x[a * b : (a + per) * b]
            changed = [(j, s) for j, v in enumerate(rows[a : a + per]) if self.moves(v) is None for s in v.spots if s.node.layer == layer]
            out.append(self.step(layer, piece, start, self.write(changed, len(piece) // b, start), firsts))
            self.worked += len(piece) // b * x.shape[1]
            yield
        return out[0] if len(out) == 1 else t.cat(out)

    def piece(self, length: int) -> int:
        """How many variants of so many positions go through a block between two pauses."""
        i = self.model.info
        flops = 2 * i.d_model * (4 * i.d_model + 3 * i.d_mlp) * len(self.ids) * length
        return max(1, int((PIECE * t.get_num_threads() if self.model.device.type == "cpu" else 1e3 * PIECE) / flops))

    def write(self, rows: list[tuple[int, Spot]], n: int, start: int) -> list[Edit]:
        """Edits that give some variants' rows (of n) their new values. What resid_mid lacks is added to the attention's output."""
        by_name: dict[str, list] = {}
        for i, spot in rows:
            by_name.setdefault(spot.name, []).append((i, spot))
        before = {spot.name: Keep() for _, spot in rows if spot.node.site == "resid_mid"}

        def edit(mine: list) -> Callable[[Tensor], Tensor]:
            def apply(x: Tensor) -> Tensor:
                x = x.clone(memory_format=t.contiguous_format)
                y = x.view(n, len(self.ids), *x.shape[1:])
                for i, spot in mine:
                    index = (slice(None), *spot.index(start, self.per_kv))
                    new = self.values(spot, start)[index].to(x)
                    y[i][index] = new - before[spot.name].x.view(y.shape)[i][index] if spot.node.site == "resid_mid" else new
                return x

            return apply

        catch = [(name.replace("attn_out", "resid_pre"), keep) for name, keep in before.items()]
        return [*catch, *((name, edit(mine)) for name, mine in by_name.items())]

    def values(self, spot: Spot, start: int) -> Tensor:
        """New values [prompt, positions from start to stop, ...]."""
        x = self.source[spot.key]
        return x[:, :, start : self.stop, : self.stop] if spot.node.part == "pattern" and spot.node.site == "head" else x[:, start : self.stop]

    # ---------------------------------------------------------------- a wave

    def enters(self, v: Variant) -> int:
        """The block a variant joins at."""
        return v.layer + bool(self.moves(v)) if v.spots else self.n

    def moves(self, v: Variant) -> bool | None:
        """Whether what a variant changes is known as a new residual stream: after its block (True), before it (False), or not (None)."""
        if len(v.spots) != 1 or self.edits:
            return None if v.spots else True
        spot = v.spots[0]
        site, pos = spot.node.site, spot.node.pos
        if site == "resid_pre":
            return False
        one = pos is not None and site in ROWWISE and (site != "head" or spot.node.part == "z")
        return True if one or site in ("resid_post", "mlp") or site == "attn" and self.model.parallel or self.by_heads(spot) else None

    # ---------------------------------------------------------------- heads at all positions

    def by_heads(self, spot: Spot) -> bool:
        """
        Whether a head's change is known as a new z of that head: z itself, and q, k, v or pattern, since heads do not see one another before their
        outputs are added (tried once a model). Then its block needs no attention, only what attention puts out.
        """
        node = spot.node
        if node.site != "head" or node.pos is not None or self.edits or f"blocks.{node.layer}.attn.hook_z" not in self.acts:
            return False
        return self.heads_apart(node.part)

    def heads_apart(self, part: str) -> bool:
        known = TRIED.setdefault(self.model, {})
        if ("heads", part) not in known:
            known["heads", part] = self.trial_heads(part)
        return not known["heads", part]

    def heads_of(self, spot: Spot) -> int | slice:
        """The heads whose z a change moves: one key and value serve a group of them."""
        first = spot.node.head - spot.node.head % self.per_kv
        return slice(first, first + self.per_kv) if spot.node.part in ("k", "v") else spot.node.head

    def trial_heads(self, part: str) -> str:
        """One head changed alone and all heads changed together give that head one z; a block finished from it is the block under that change."""
        layer = next(k for k in self.source if k[1:] == ("head", part))[0]
        spot, kept = make_spot(self.model, Node("head", layer, 0, part)), dict(self.source)
        try:
            self.source = {spot.key: self.acts[spot.name].flip(-1)}
            want = self.step(layer, self.resid[layer][:, : self.stop], 0, self.write([(0, spot)], 1, 0))
            got = self.attended(layer, [spot], 0)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError, RuntimeError, NotImplementedError) as error:
            if isinstance(error, t.OutOfMemoryError):
                raise
            return type(error).__name__
        finally:
            self.source = kept
        return "" if self.model.identity("heads", got[:, self.stop - 1], want[:, self.stop - 1]).ok else "off"

    def z_of(self, layer: int, part: str) -> Tensor:
        """z [prompt, seq, head, d_head] of every head when its own part is changed."""
        if part == "z":
            return self.source[layer, "head", "z"]
        if (layer, "z of", part) not in self.source:
            new, z = self.source[layer, "head", part], f"blocks.{layer}.attn.hook_z"
            got: dict[str, Tensor] = {}
            edits = [(f"blocks.{layer}.attn.hook_{part}", lambda x: new[:, :, : self.stop, : self.stop] if part == "pattern" else new[:, : self.stop])]
            self.step(layer, self.resid[layer][:, : self.stop], 0, [*edits, (z, lambda x: got.__setitem__("z", x.detach()))])
            self.source[layer, "z of", part] = got["z"]
        return self.source[layer, "z of", part]

    @t.no_grad()
    def attended(self, layer: int, spots: list[Spot], start: int) -> Tensor:
        """The stream after a block [variant x prompt, seq from start, d_model] for changes of one head's z each; its attention is not run."""
        block = self.model.bridge.blocks[layer]
        z = self.acts[f"blocks.{layer}.attn.hook_z"][:, start : self.stop]
        z = z.expand(len(spots), *z.shape).clone()
        for i, s in enumerate(spots):
            heads = self.heads_of(s)
            z[i, :, :, heads] = self.z_of(layer, s.node.part)[:, start : self.stop, heads].to(z)
        out = block.attn.o(z.flatten(3).flatten(0, 1))
        x = self.resid[layer][:, start : self.stop]
        with given(block.attn, out):
            return self.step(layer, x.expand(len(spots), *x.shape).flatten(0, 1), start, [])

    def join(self, variants: list[Variant], layer: int, start: int) -> Generator[None, None, Tensor]:
        """The rows of variants that join at a block: the kept stream, changed where the change is known as such."""
        x = self.resid[layer][:, start : self.stop]
        x = x.expand(len(variants), *x.shape).clone()
        single, heads = [], []
        for i, v in enumerate(variants):
            if not v.spots or self.moves(v) is None:
                continue
            spot = v.spots[0]
            if self.by_heads(spot):
                heads.append((i, spot))
            elif self.runs_alone(spot):
                single.append((i, spot))
            else:
                index = (slice(None), *spot.index(start, self.per_kv))
                new = self.values(spot, start)[index].to(x)
                if spot.node.site in ("mlp", "attn"):
                    new = x[i][index] + new - self.acts[spot.name][:, start : self.stop][index]
                x[i][index] = new
        if single:
            for (i, spot), rows in zip(single, self.alone(single)):
                x[i, :, spot.node.pos - start] = rows
            yield
        for a in range(0, len(heads), per := self.piece(x.shape[2])):
            part = heads[a : a + per]
            x[[i for i, _ in part]] = self.attended(layer - 1, [s for _, s in part], start).view(-1, *x.shape[1:])
            yield
        return x.flatten(0, 1)

    def runs_alone(self, spot: Spot) -> bool:
        return spot.node.site in ROWWISE and not (spot.node.site == "attn" and self.model.parallel)

    def alone(self, rows: list[tuple[int, Spot]]) -> Tensor:
        """A block on single tokens, one a variant: what it puts out at the changed position [variant, prompt, d_model]."""
        spots = [s for _, s in rows]
        layer, b = spots[0].node.layer, len(self.ids)
        assert all(s.node.layer == layer for s in spots)
        places = [s.node.pos for s in spots]
        pick = lambda x: x[:, places].transpose(0, 1).flatten(0, 1)[:, None]  # noqa: E731  [variant x prompt, 1, ...]
        zs = {s.name for s in spots if s.node.site == "head"}
        assert not zs or len({s.name for s in spots}) == 1
        frozen = zs or {f"blocks.{layer}.hook_attn_out"}
        fixed = [(name, lambda x, name=name: pick(self.acts[name]).reshape(x.shape)) for name in frozen]
        by_name: dict[str, list] = {}
        for i, s in enumerate(spots):
            by_name.setdefault(s.name, []).append((i, s))
        inputs = pick(self.resid[layer])

        def edit(mine: list) -> Callable[[Tensor], Tensor]:
            def apply(x: Tensor) -> Tensor:
                x = x.clone(memory_format=t.contiguous_format)
                y, before = x.view(len(spots), b, *x.shape[1:]), inputs.view(len(spots), b, *inputs.shape[1:])
                for i, s in mine:
                    tail = s.index(0, self.per_kv)[1:]
                    new = self.source[s.key][(slice(None), s.node.pos, *tail)].to(x)
                    y[(i, slice(None), 0, *tail)] = new - before[i, :, 0] if s.node.site == "resid_mid" else new
                return x

            return apply

        edits = [*fixed, *((name, edit(mine)) for name, mine in by_name.items())]
        return self.step(layer, inputs, 0, edits).view(len(spots), b, -1)

    def wave(self, variants: list[Variant], start: int) -> Generator[None, None, np.ndarray]:
        """Metrics [variant, prompt] of variants that change nothing before `start`; pauses after every block."""
        order = sorted(range(len(variants)), key=lambda i: self.enters(variants[i]))
        waiting, rows, x = [variants[i] for i in order], [], None
        for layer in range(self.enters(waiting[0]), self.n + 1):
            new = [v for v in waiting[len(rows) :] if self.enters(v) == layer]
            if new:
                joined = yield from self.join(new, layer, start)
                x, rows = joined if x is None else t.cat([x, joined]), rows + new
            if layer < self.n:
                x = yield from self.steps(layer, x, rows, start)
        out = np.empty((len(variants), len(self.ids)))
        out[order] = self.score.of(x, start)
        return out

    def packed(self, variants: list[Variant]) -> Generator[None, None, np.ndarray]:
        """The same for variants that are known as a new row of the stream at one position: a packed row holds one for every position, where there is one."""
        b, firsts = len(self.ids), tuple(sorted({v.first for v in variants}))
        tokens = t.cat([t.arange(p, self.stop) for p in firsts])
        begins = dict(zip(firsts, np.cumsum([0, *(self.stop - p for p in firsts)]).tolist()))
        ends = [begins[p] + self.stop - p - 1 for p in firsts]
        place: dict[int, tuple[int, int]] = {}  # of a variant: its packed row and its segment; segments without variant go on as the kept run
        full = dict.fromkeys(firsts, 0)
        n, x = 0, None
        for layer in range(min(self.enters(v) for v in variants), self.n + 1):
            new = [(i, v) for i, v in enumerate(variants) if self.enters(v) == layer]
            if new:
                for i, v in new:
                    place[i] = (full[v.first], firsts.index(v.first))
                    full[v.first] += 1
                if (count := max(full.values()) - n) > 0:
                    kept = self.resid[layer][:, tokens].expand(count, b, len(tokens), -1).flatten(0, 1)
                    x, n = kept.clone() if x is None else t.cat([x, kept]), n + count
                for (i, v), row in zip(new, self.moved([v for _, v in new], layer)):
                    x.view(n, b, len(tokens), -1)[place[i][0], :, begins[v.first]] = row
                yield
            if layer < self.n:
                x = yield from self.steps(layer, x, [], 0, firsts)
        last = x.view(n, b, len(tokens), -1)[:, :, ends].transpose(1, 2)
        picked = t.stack([last[place[i]] for i in range(len(variants))])
        return self.score.of(picked.flatten(0, 1)[:, None], self.stop - 1)

    def moved(self, variants: list[Variant], layer: int) -> list[Tensor]:
        """The new row [prompt, d_model] of each variant's position in the stream that enters a block."""
        alone: dict[int, list] = {}
        for i, v in enumerate(variants):
            if self.runs_alone(v.spots[0]):
                alone.setdefault(v.layer, []).append((i, v.spots[0]))
        rows = {i: row for some in alone.values() for (i, _), row in zip(some, self.alone(some))}
        for i, v in enumerate(variants):
            if i not in rows:
                spot = v.spots[0]
                new = self.source[spot.key][:, v.first]
                add = spot.node.site in ("mlp", "attn")
                rows[i] = self.resid[layer][:, v.first] + new - self.acts[spot.name][:, v.first] if add else new
        return [rows[i].to(self.resid[layer]) for i in range(len(variants))]

    def whole(self, variants: list[Variant]) -> np.ndarray:
        """The same by whole forward passes under hooks."""
        last = f"blocks.{self.n - 1}.hook_resid_post"
        stop, self.stop = self.stop, self.ids.shape[1]
        changed = [(i, s) for i, v in enumerate(variants) for s in v.spots]
        _, got = self.model.forward(self.ids.repeat(len(variants), 1), [last], [*self.edits, *self.write(changed, len(variants), 0)], None)
        self.stop = stop
        return self.score.of(got[last], 0)

    # ---------------------------------------------------------------- all of them

    def room(self, length: int) -> int:
        """How many variants of so many positions fit into the limit of bytes."""
        return max(1, self.limit // (self.token_bytes() * length))

    def token_bytes(self) -> int:
        """Bytes of one position of a variant in the widest block: some twelve rows of the stream, three of the MLP, three patterns."""
        i = self.model.info
        return t.finfo(self.model.dtype).bits // 8 * (12 * i.d_model + 3 * i.d_mlp + 3 * i.n_heads * self.stop) * len(self.ids)

    def plan_work(self, variants: list[Variant]) -> None:
        """Before the first variant: how many tokens have to go through a block."""
        if self.reason:
            self.work = max(1, self.n * self.ids.shape[1] * len(variants))
        else:
            self.work = max(1, sum((self.n - self.enters(v)) * (self.stop - (0 if self.edits else max(self.shared, v.first))) for v in variants))

    @property
    def progress(self) -> float:
        return min(1.0, self.worked / self.work)

    def all(self, variants: list[Variant], begun: bool = False) -> Generator[Progress | tuple[list[Variant], np.ndarray]]:
        """
        Every variant's metric [variant, prompt], in waves: late positions and late layers first, since they are the cheapest. The first wave of a
        sweep (`begun` False) is a small one.
        """
        if self.reason or self.edits or not variants:  # interventions count positions from 0
            groups = [(0, variants, False)] if variants else []
        else:
            some = [v for v in variants if self.packs and self.moves(v) is not None and v.spots[0].node.pos is not None]
            packed = set(some)
            rest = [v for v in variants if v not in packed]
            groups = [*pack_groups(some, self.stop), *((a, g, False) for a, g in position_groups(rest, self.shared, len(self.ids)))]
        for start, group, pack in groups:
            length = self.ids.shape[1] if self.reason else self.stop - start
            size, i = self.room(length), 0
            group = sorted(group, key=lambda v: -(v.layer if self.reason else self.enters(v)))
            while i < len(group):
                part = group[i : i + size]
                if not begun and not self.reason:
                    part = [v for v in part if self.enters(v) == self.enters(part[0])][:FIRST]
                try:
                    found = self.whole(part) if self.reason else (yield from self.paused(self.packed(part) if pack else self.wave(part, start)))
                except t.OutOfMemoryError as error:
                    tec()
                    if len(part) == 1:
                        raise out_of_memory(error) from error
                    size = max(1, len(part) // 2)
                    yield Progress(0, 0, f"out of memory: {size} at a time now")
                    continue
                self.at_once, begun = max(self.at_once, len(part)), True
                self.peak = max(self.peak, len(part) * length * self.token_bytes())
                self.worked += self.n * length * len(part) if self.reason else 0
                yield part, found
                i += len(part)

    def paused(self, wave: Generator) -> Generator[Progress, None, np.ndarray]:
        while True:
            try:
                next(wave)
            except StopIteration as stop:
                return stop.value
            yield Progress(0, 0)


def pack_groups(variants: list[Variant], stop: int) -> list[tuple[int, list[Variant], bool]]:
    """Variants of positions with about as many of them, whose segments make up a packed row; late ones first."""
    counts = Counter(v.first for v in variants)
    groups: list[list[int]] = []
    for p in sorted(counts, key=lambda p: (-counts[p], -p)):
        if groups and sum(stop - q for q in groups[-1]) + stop - p <= PACK and counts[p] > 0.7 * counts[groups[-1][0]]:
            groups[-1].append(p)
        else:
            groups.append([p])
    return [(min(g), [v for v in variants if v.first in g], True) for g in groups]


def position_groups(variants: list[Variant], shared: int, prompts: int) -> list[tuple[int, list[Variant]]]:
    """
    Variants by first changed position, in groups that start at their earliest: more groups save rows, and each costs a pass over the weights
    (worth about 80 rows). Late ones first.
    """
    by_first: dict[int, list[Variant]] = {}
    for v in variants:
        by_first.setdefault(max(shared, v.first), []).append(v)
    firsts = sorted(by_first)
    n = len(firsts)
    wanted = max(1, min(n, round(n * (len(variants) * prompts / max(1, n) / 320) ** 0.5)))
    parts = [p.tolist() for p in np.array_split(firsts, wanted)]
    return [(p[0], [v for f in p for v in by_first[f]]) for p in reversed(parts) if p]
