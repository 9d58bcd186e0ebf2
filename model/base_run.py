"""
One run of a few prompts, kept such that changed runs can go on from any block and any position: what changed_blocks.py and variants.py build on. No model maths of its own.

Kept are every block's input, the keys and values, the hook points that will be changed, what Hugging Face's model calls its blocks with; and the metric.
The self-checks at the end of `begin` decide whether a model's blocks can be run one by one at all.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch as t
from torch import Tensor
from transformer_lens.model_bridge.generalized_components import AttentionBridge, PositionEmbeddingsAttentionBridge
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vocabulary.nodes import Node, UserError
from model.bridge import FINAL, Edit, Model
from model.memory import is_out_of_memory
from model.metrics import MetricReader
from model.places import hook_name, node_index
from model.runs import Runs
from model.fast_blocks import fused, last_rows, quick_attention, slow_modules

DONE = ("a sweep's base run",)  # its mark in the model's cache


@dataclass(frozen=True)
class PatchSite:
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
        pos = slice(None) if self.node.pos is None else self.node.pos - start
        return node_index(self.node, pos, group, slice(None) if self.source is None else self.source)


def patch_site(model: Model, node: Node, source: int | None = None) -> PatchSite:
    """resid_mid is written through the attention's output: the hook of its name does not reach the skip connection."""
    name = hook_name(model, node)
    return PatchSite(node, f"blocks.{node.layer}.hook_attn_out" if node.site == "resid_mid" else name, source)


def id_rows(ids: Tensor) -> tuple:
    """Token ids [prompt, seq] as what names them in the cache."""
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
    return [name for i in range(model.info.n_layers) for end in ends if model.has(name := f"blocks.{i}.{end}")]


def keeps_states(model: Model) -> str:
    """Why a run can't go on behind kept keys and values alone: blocks that keep a state beside them (Falcon-H1); "" where none does."""
    config = model.bridge.original_model.config
    layers = DynamicCache(config=config).layers if isinstance(config, PretrainedConfig) else []
    return "" if all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in layers) else f"{model.info.architecture} keeps states beside keys and values"


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


# ------------------------------------------------------------------ the base run


class BaseRun:
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
        self.score: MetricReader | None = None
        notes = self.model.notes
        known = notes.calls
        if len(known) > 8:
            known.clear()
        self.called = known.setdefault(id_rows(self.ids[:1]), {})  # what blocks are called with
        notes.slow = self.slow = notes.slow or [slow_modules(b) for b in self.model.bridge.blocks]
        self.reason = "asked for" if plain else "not every layer has heads" if "z" in notes.refused else keeps_states(self.model)
        self.at_once = self.peak = 0  # the most variants in one batch, and its bytes as `room` counts them
        self.most = math.inf  # variants at a time, once memory ran out
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
        with fused({} if self.reason else {m: f for some in self.slow for m, f in some.items()}):
            model.forward(ids, edits=[*enter, *self.edits, *catch], keep=None, cache=kept)
        if kept is not None and (len(kept.layers) != self.n or any(layer.keys is None or len(layer.keys) != len(ids) for layer in kept.layers)):
            self.reason = f"{model.info.architecture} keeps its keys and values elsewhere"
        for i, layer in enumerate(kept.layers if kept and not self.reason else ()):
            acts |= {name_of("keys", i): layer.keys, name_of("values", i): layer.values}
        found, n = [], len(self.ids)
        for a, some in zip((0, n), pair):
            found.append({name: x[a : a + n] for name, x in acts.items()})
            for name, x in found[-1].items() if small else ():
                model.cache.put((id_rows(some), DONE, name), x)
        return found

    def begin(self, score: MetricReader) -> np.ndarray:
        """The metric of the base run itself [prompt]; decides whether the fast way gives this model's own numbers."""
        self.score = score
        self.stop = self.ids.shape[1] if score.whole or self.edits or not self.model.causal else max(score.places) + 1
        if score.whole:
            score.stream = self.resid[-1]
        if score.whole and not score.own:
            n = self.ids.shape[1] - 1
            score.nll = t.stack([score.tokens(x[:-1], ids[1:].to(x.device), 0) for x, ids in zip(self.resid[-1], self.ids)]) if n else None
        value = score.base = score.of(self.resid[-1], 0)[0]
        if not np.isfinite(value).all():
            raise UserError("the metric of the unchanged run is not finite: does the model hold NaN? Try float32")
        if not self.reason:
            self.reason = self.why_not(bool(self.edits), self.trial)
        return value

    def why_not(self, shortcut: object, trial: Callable[[], str]) -> str:
        """Why a shortcut can't be taken on this model, "" where it can: tried once, and without it meanwhile."""
        known = self.model.notes.trials
        if shortcut not in known:
            known[shortcut] = "being tried"
            try:
                known[shortcut] = trial()
            except BaseException:  # no answer: the next one tries again
                del known[shortcut]
                raise
        return known[shortcut]

    def trial(self) -> str:
        """
        Every block once more on its own kept input, from the middle position behind the kept prefix: why that does not give the kept output, or ''. Block by
        block, since rounding in bfloat16 grows over a deep model, and that is no fault of the mechanism.
        """
        start = self.stop // 2 if not self.edits else 0
        try:
            for i in range(self.n):
                twice = self.resid[i][:, start : self.stop].repeat(2, 1, 1)  # two variants: what is handed on for one run alone does not fit
                got = self.step(i, twice, start, [])[: len(self.resid[i]), -1]
                same = self.model.identity("resume", got, self.resid[i + 1][:, self.stop - 1])
                if not same.ok:
                    return f"resumed blocks of {self.model.info.architecture} are off by {same.error:.1g}"
        except RuntimeError as error:  # shapes that do not fit (ALiBi), or not implemented
            if is_out_of_memory(error):
                raise
            return f"{self.model.info.architecture}'s blocks can't be run one by one ({type(error).__name__})"
        return ""

    @property
    def packs(self) -> bool:
        """Whether variants of several lengths can share a row: every mask is the model's to give, and a packed run equals the kept one."""
        if self.edits or self.score.whole or set(self.score.places) != {self.stop - 1}:
            return False
        return not self.why_not("packed", self.trial_packed)

    def trial_packed(self) -> str:
        firsts = (self.stop // 2, self.stop - 1)
        tokens = t.cat([t.arange(p, self.stop) for p in firsts])
        ends = [len(tokens) - 2, len(tokens) - 1]
        try:
            for i in range(self.n):
                got = self.step(i, self.resid[i][:, tokens], 0, [], firsts)[:, ends]
                want = self.resid[i + 1][:, [self.stop - 1] * 2]
                if not self.model.identity("packed", got, want).ok:
                    return f"off at layer {i}"
        except RuntimeError as error:  # shapes that do not fit (ALiBi), or not implemented
            if is_out_of_memory(error):
                raise
            return type(error).__name__
        return ""

    def attends_quickly(self) -> bool:
        """Whether attention without hooks may go through torch's scaled dot product: rotary models without a soft cap, tried on every block once."""
        return not self.why_not("attention", self.trial_attention)

    def trial_attention(self) -> str:
        blocks = self.model.bridge.blocks
        if not self.model.bridge.original_model._supports_sdpa or any(type(b.attn) is not PositionEmbeddingsAttentionBridge for b in blocks):
            return "another attention"
        if any(getattr(b.attn.original_component, cap, None) is not None for b in blocks for cap in ("attn_logit_softcapping", "sinks")):
            return "the scores have a soft cap"
        for layer, block in enumerate(blocks):
            x = self.resid[layer][:, : self.stop]
            want = self.step(layer, x, 0, [])
            with quick_attention(block.attn):
                got = self.step(layer, x, 0, [])
            if not self.model.identity("attention", got[:, self.stop - 1], want[:, self.stop - 1]).ok:
                return f"off at layer {layer}"
        return ""

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
        """What blocks are handed for a row of segments, each from its first position to `stop`, behind the keys of the whole kept run."""
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
                if x.ndim < 2 or x.shape[1] != stop:  # ALiBi's slopes by head
                    raise RuntimeError(f"blocks are handed a tensor {list(x.shape)} that has no positions")
                return x[:, places]

            rest = lambda x, cache: x if x is cache else change(x)  # noqa: E731
            full = self.calls(0, stop, True)
            self.called[firsts, stop] = [(tuple(rest(a, c) for a in args), {k: rest(a, c) for k, a in kwargs.items()}, c) for args, kwargs, c in full]
        return self.called[firsts, stop]

    def step(self, layer: int, x: Tensor, start: int, edits: list[Edit], firsts: tuple[int, ...] = (), grad: bool = False, all_rows: bool = False) -> Tensor:
        """
        One block on [rows, positions from start, d_model], rows being variants x prompts; on packed rows of segments from `firsts`. The last block's MLP
        runs on the position that the metric reads only, unless it is edited or `all_rows`.
        """
        args, kwargs, cache = (self.packed_calls(firsts) if firsts else self.calls(start, x.shape[1], start > 0))[layer]
        if cache is not None:
            prefix = Prefix(*(kv[:, :, : self.stop if firsts else start] for kv in self.kept[layer]))
            args = tuple(prefix if a is cache else a for a in args)
            kwargs = {k: prefix if a is cache else a for k, a in kwargs.items()}
        ours = [e for e in self.edits if e[0].startswith(f"blocks.{layer}.")]
        block = self.model.bridge.blocks[layer]
        if type(block.attn).forward is AttentionBridge.forward:  # Hugging Face's own code, of which XGLM's wants a mask for each row
            each = lambda a: a.expand(len(x), *a.shape[1:]) if isinstance(a, Tensor) and a.ndim == 4 and len(a) == 1 else a  # noqa: E731
            args, kwargs = tuple(map(each, args)), {k: each(a) for k, a in kwargs.items()}
        ends = (np.cumsum([self.stop - p for p in firsts]) - 1).tolist() if firsts else [x.shape[1] - 1]
        short = layer == self.n - 1 and x.shape[1] > len(ends) and (bool(firsts) or start + x.shape[1] == self.stop)
        short = short and not self.edits and not self.score.whole and len(set(self.score.places)) == 1 and not any("mlp" in name for name, _ in edits)
        rows = ends if short and not all_rows else []
        plain = not (grad or ours or edits) and "forward" not in vars(block.attn) and self.attends_quickly()
        with (
            t.set_grad_enabled(grad),
            self.model.hooks([*ours, *edits]),
            last_rows(block.mlp, rows),
            fused({} if grad else self.slow[layer]),
            quick_attention(block.attn) if plain else nullcontext(),
        ):
            out = block(x, *args, **kwargs)
        return out[0] if isinstance(out, tuple) else out
