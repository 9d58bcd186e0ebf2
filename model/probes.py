"""
Does a value written at a site do what the site's definition says, on this model? Probed at every load: of each kind of layer the first and the last, on random
tokens, one block at a time. A site that fails is refused by name in every analysis that uses it.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial

import torch as t
from torch import Tensor

from model.bridge import HOOKS, Edit, Model, write_mid
from model.memory import is_out_of_memory
from model.untouched import Untouched
from model.writes import output_module, part_out
from vocabulary.nodes import RESIDS
from vocabulary.requests import Identity, Progress

WORDS = {
    "resid_pre": "resid_pre",
    "resid_mid": "resid_mid",
    "resid_post": "resid_post",
    "attn": "attention outputs",
    "mlp": "MLP outputs",
    "neuron": "neurons",
    "z": "heads' outputs (z)",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "pattern": "attention patterns",
}

MODULES = {  # the Bridge's component in a block, and its side, whose Hugging Face module a site is
    "resid_pre": ("", "in"),
    "resid_mid": ("none", "in"),
    "resid_post": ("", "out"),
    "neuron": ("mlp.out", "in"),
    "z": ("attn.o", "in"),
    "q": ("attn.q", "out"),
    "k": ("attn.k", "out"),
    "v": ("attn.v", "out"),
    "pattern": ("none", "out"),
}


def rounded(model: Model, row: Identity) -> Identity:
    """An identity between the Bridge's code and Hugging Face's: in half precision each rounds at other places, layer by layer; a wrong formula is off by far more."""
    wide = row.tolerance * (1 if model.dtype == t.float32 else 4)
    return replace(row, tolerance=wide, ok=row.error <= wide)


class Probe:
    """The two prompts' run that is written into, and what each site's writes gave: the worst row of all layers."""

    def __init__(self, model: Model, untouched: Untouched, acts: dict[str, Tensor]):
        self.model, self.untouched, self.ids, self.acts = model, untouched, untouched.ids, acts
        self.layers = [i for i in untouched.patched if model.has(f"blocks.{i}.hook_resid_pre") and model.has(f"blocks.{i}.hook_resid_post")]
        self.found: dict[str, Identity] = {}

    def has(self, layer: int, site: str) -> bool:
        needed = [site] + ["attn"] * (site == "resid_mid")
        return all(self.model.has(name := f"blocks.{layer}.{HOOKS[s]}") and name in self.acts for s in needed) and not (
            site == "resid_mid" and self.model.parallel
        )

    def at(self, layer: int, site: str) -> Tensor:
        return self.acts[f"blocks.{layer}.{HOOKS[site]}"]

    def write(self, layer: int, site: str, fn: Callable[[Tensor], Tensor]) -> list[Edit]:
        return write_mid(layer, fn) if site == "resid_mid" else [(f"blocks.{layer}.{HOOKS[site]}", fn)]

    def swap(self, layer: int, site: str) -> list[Edit]:
        """Prompt 1's value written for both."""
        return self.write(layer, site, lambda _: self.at(layer, site)[[1, 1]].clone())

    def out(self, layer: int, edits: list[Edit], alone: bool = True) -> Tensor:
        """The block's output [2, seq, d_model] under edits; of the block alone, on its own kept input."""
        post = f"blocks.{layer}.hook_resid_post"
        begin = (layer, self.at(layer, "resid_pre")) if alone and layer else None
        return self.model.forward(self.ids, [post], edits, keep=None, begin=begin)[1][post]

    def note(self, site: str, layer: int, what: str, got: Tensor, want: Tensor) -> None:
        row, worst = rounded(self.model, self.model.identity(f"writing {WORDS[site]}", got, want, f"layer {layer}: {what}")), self.found.get(site)
        if worst is None or row.ok < worst.ok or row.ok == worst.ok and not row.error <= worst.error:
            self.found[site] = row

    # ---------------------------------------------------------------- what is probed

    def layer(self, layer: int) -> Generator[None]:
        """Every site of a layer, with a pause after each."""
        base = self.at(layer, "resid_post")
        out = partial(self.out, layer, alone=layer > 0 and self.comes_back(layer, base))
        for site in (s for s in HOOKS if self.has(layer, s)):
            own = self.at(layer, site)
            self.note(site, layer, "own value", out(self.write(layer, site, lambda _, own=own: own.clone())), base)
            new = out(self.swap(layer, site))
            if t.equal(new, base) and not t.equal(own[0], own[1]):
                self.note(site, layer, "does not reach", t.full_like(base[0, 0], math.inf), base[0, 0])
                continue
            if (want := self.hugging_face(layer, site)) is not None:
                self.note(site, layer, "another prompt's value = Hugging Face's own module", new[0], want)
            if site in RESIDS:
                self.note(site, layer, "another prompt's value = that prompt's run", new[0], base[1])
            yield
        if self.has(layer, "neuron") and self.has(layer, "mlp"):
            self.note("neuron", layer, "through W_out = the MLP's output", part_out(self.model, layer, "mlp", self.at(layer, "neuron")), self.at(layer, "mlp"))
        if self.has(layer, "z"):
            self.one_head(layer, out)
        if self.has(layer, "pattern") and self.has(layer, "z"):
            yield from self.pattern(layer, out)

    def one_head(self, layer: int, out: Callable[[list[Edit]], Tensor]) -> None:
        """One head's z written as zero is zero in that head's share of what W_O's Hugging Face module gets, and there alone."""
        got, head, z = [], self.model.info.n_heads // 2, self.at(layer, "z")
        hook = output_module(self.model, layer, "attn").original_component.register_forward_pre_hook(lambda _, args: got.append(args[0].detach().clone()))
        try:
            out([])
            out(self.write(layer, "z", lambda x: x.index_fill(2, t.tensor([head], device=x.device), 0.0)))
        finally:
            hook.remove()
        if len(got) == 2 and t.equal(got[0].flatten(), z.flatten()):  # else something comes between z and W_O
            share = got[0].shape[-1] // self.model.info.n_heads
            want = got[0].clone()
            want[..., head * share : (head + 1) * share] = 0
            self.note("z", layer, "one head's zero is zero in its columns of W_O", got[1], want)

    def pattern(self, layer: int, out: Callable[[list[Edit]], Tensor]) -> Generator[None]:
        """A pattern is what z is made from: zero gives zero; with v, another prompt's pattern gives its z; or, where a gate is in z, twice it twice z."""
        both = lambda fn: [out(self.write(layer, site, fn)) for site in ("pattern", "z")]  # noqa: E731
        self.note("pattern", layer, "zero is z = zero", *both(t.zeros_like))
        yield
        got, want = (out(edits) for edits in (self.swap(layer, "pattern") + self.swap(layer, "v") * self.has(layer, "v"), self.swap(layer, "z")))
        if self.model.identity("", got, want).ok:
            return
        yield
        self.note("pattern", layer, "twice it is twice z", *both(lambda x: 2 * x))

    def comes_back(self, layer: int, base: Tensor) -> bool:
        """Whether the block alone, on its kept input, gives its output in the whole run."""
        try:
            return self.model.identity("alone", self.out(layer, []), base).ok
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:  # a model whose own loop over its blocks wants more
            if is_out_of_memory(error):
                raise
            return False

    def hugging_face(self, layer: int, site: str) -> Tensor | None:
        """What the block of the untouched model gave for the same write; None where the site is no module's input or output (resid_mid, parts of one QKV)."""
        block, patched = self.model.bridge.blocks[layer], self.untouched.patched[layer]
        if site in MODULES:
            path, side = MODULES[site]
            component = block
            for name in filter(None, path.split(".")):
                component = getattr(component, name, None)
            return patched.get((getattr(component, "original_component", None), side))
        point = self.model.points[f"blocks.{layer}.{HOOKS[site]}"]  # behind a norm in some families
        return next((patched.get((m.original_component, "out")) for m in block.modules() if getattr(m, "hook_out", None) is point), None)


def probe(model: Model, untouched: Untouched, acts: dict[str, Tensor]) -> Generator[Progress, None, tuple[dict[str, Identity], dict[str, str]]]:
    """By site, its row; and of those that failed, why they are refused. `acts` is the run of untouched.ids at every site of the probed layers."""
    probes = Probe(model, untouched, acts)
    for i, layer in enumerate(probes.layers):
        for _ in probes.layer(layer):
            yield Progress(4, 5, f"checking: what writes do, layer {layer} ({i + 1} of {len(probes.layers)})")
    refused = {}
    for site, row in probes.found.items():
        if not row.ok:
            off = "does not reach this model" if math.isinf(row.error) else f"is {row.error:.2g} off what it should do ({row.note})"
            refused[site] = f"writing {WORDS[site]} {off}"
    return probes.found, refused
