"""A prompt that grows token by token: its interventions on the prompt's positions or on every new token too, with a cache of keys and values where that is exact."""

from collections.abc import Callable

import torch as t
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from model.bridge import Edit, Model
from model.memory import is_out_of_memory
from model.probes import rounded

TRIAL = 8  # tokens, the last two one by one


class Growth:
    """
    Several continuations [sample] of one prompt. `edits` are of the prompt's positions, `new` of one token behind it. `start` and `step` give the logits
    [sample, vocab] after the last token, in float32.
    """

    def __init__(self, model: Model, ids: tuple[int, ...], edits: list[Edit], new: list[Edit], samples: int, cached: bool):
        self.model, self.edits, self.new, self.length = model, edits, new, len(ids)
        self.rows = t.tensor([ids]).repeat(samples, 1)
        self.cache = new_cache(model) if cached else None

    def start(self) -> Tensor:
        """After the prompt: one run for all samples."""
        logits, _ = self.model.forward(self.rows[:1], (), self.edits, cache=self.cache)
        if self.cache is not None:
            self.cache.batch_repeat_interleave(len(self.rows))
        return logits[:, -1].float().expand(len(self.rows), -1)

    def step(self, tokens: Tensor) -> Tensor:
        """After one more token for each sample [sample]."""
        self.rows = t.cat([self.rows, tokens[:, None]], 1)
        if self.cache is not None:
            logits, _ = self.model.forward(tokens[:, None], (), self.new, cache=self.cache)
        else:
            logits, _ = self.model.forward(self.rows, (), grown(self.edits, self.new, self.length))
        return logits[:, -1].float()


def new_cache(model: Model) -> DynamicCache:
    return DynamicCache(config=model.bridge.original_model.config)


def grown(edits: list[Edit], new: list[Edit], length: int) -> list[Edit]:
    """The edits of a whole run: those of the prompt on its first `length` positions, those of a new token on the rest."""
    return [(name, on_part(name, fn, 0, length)) for name, fn in edits] + [(name, on_part(name, fn, length, None)) for name, fn in new]


def on_part(name: str, fn: Callable, start: int, stop: int | None) -> Callable[[Tensor], Tensor | None]:
    """A function on some positions of what passes; of a pattern [batch, head, destination, source] on some destinations, and the sources up to them."""

    def apply(x: Tensor) -> Tensor | None:
        part = (slice(None), slice(None), slice(start, stop), slice(None, stop)) if name.endswith("hook_pattern") else (slice(None), slice(start, stop))
        if not x[part].numel() or (new := fn(x[part])) is None:
            return None
        out = x.clone()
        out[part] = new
        return out

    return apply


def why_not_cached(model: Model) -> str:
    """Why new tokens can't go on from kept keys and values on this model, "" where they can: tried once, on random tokens."""
    trials = model.notes.trials
    if "growth" not in trials:
        trials["growth"] = trial(model)
    return trials["growth"]


def trial(model: Model) -> str:
    if not isinstance(model.bridge.original_model.config, PretrainedConfig):
        return "its blocks keep no keys and values"
    if model.info.n_ctx < 3:
        return "its context is too short to try it"
    ids, logits = model.random_ids(min(TRIAL, model.info.n_ctx), rows=2), []
    want, _ = model.forward(ids, keep=0)
    try:
        cache, n = new_cache(model), ids.shape[1]
        for a, b in [(0, n - 2), (n - 2, n - 1), (n - 1, n)]:
            logits.append(model.forward(ids[:, a:b], keep=0, cache=cache)[0])
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        return f"its cache of keys and values can't be used here ({type(error).__name__})"
    same = rounded(model, model.identity("growth", t.cat(logits, 1), want))
    return "" if same.ok else f"with a cache of keys and values its logits are off by {same.error:.1g}"
