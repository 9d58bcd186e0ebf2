"""Are the cells of a resumed sweep those of whole runs? Tried at every load on a few cells of each kind; where not, sweeps run as whole passes."""

import math
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.base_run import patch_site
from model.bridge import HOOKS, Model
from model.runs import Runs
from model.untouched import Untouched
from model.variants import Base, Variant
from vocabulary.nodes import PARTS, Node
from vocabulary.prompts import Prompt, Study, TokenRow
from vocabulary.requests import Identity, Progress

NAME = "resumed sweep = whole passes"


class LastRow:
    """Stands in for a metric: the last position's row of the stream, along a fixed direction."""

    whole, base = False, None

    def __init__(self, seq: int, width: int):
        self.places = [seq - 1]
        self.direction = t.randn(width, generator=t.Generator().manual_seed(0)) / width**0.5

    def of(self, x: Tensor, start: int) -> np.ndarray:
        return (x[:, -1].float() @ self.direction.to(x.device)).cpu().numpy()[:, None]


def cells(model: Model, layer: int, pos: int) -> list[Node]:
    """One of each kind of a layer: heads' parts at all positions and z, pattern and the others at one."""
    nodes = [Node("head", layer, 0, part) for part in PARTS] + [Node("head", layer, 0, pos=pos)]
    nodes += [Node(site, layer, pos=pos) for site in ("resid_pre", "resid_mid", "resid_post", "attn", "mlp")]
    usable = [n for n in nodes if model.has(f"blocks.{layer}.{HOOKS[n.part if n.site == 'head' else n.site]}")]
    return [n for n in usable if n.site != "resid_mid" or not model.parallel and model.has(f"blocks.{layer}.hook_attn_out")]


def resumed(model: Model, untouched: Untouched) -> Generator[Progress, None, Identity]:
    """The largest difference over the probed layers; a sweep that begins later tries the mechanism again, on its own prompts."""
    ids, seq = [tuple(row) for row in untouched.ids.tolist()], untouched.ids.shape[1]
    runs = Runs(model, Study(Prompt("")), {"now": TokenRow(ids[0], ("",) * seq, {})}, [], [], [], ())
    got, want, why = [], [], ""
    n = model.info.n_layers  # late layers, since a cell runs all blocks behind its own: the last of each kind, and one block behind it
    for layer in sorted({min(layer, max(0, n - 2)) for layer in untouched.patched if layer >= n // 2}):
        nodes, z = cells(model, layer, seq // 2), f"blocks.{layer}.attn.hook_z"
        spots = [patch_site(model, n) for n in nodes]
        reads = {s.key: f"blocks.{layer}.{HOOKS[s.node.part if s.node.site == 'head' else s.node.site]}" for s in spots}
        names = dict.fromkeys([*reads.values(), *(s.name for s in spots), *([z] * (any(n.site == "head" for n in nodes) and model.has(z)))])
        base = Base([runs], names, 1 << 28, beside=untouched.ids[1:])
        base.begin(LastRow(seq, model.info.d_model))
        base.source = {key: base.beside[name] for key, name in reads.items()}
        if why := base.reason:
            break
        variants = [Variant(i, (spot,)) for i, spot in enumerate(spots)]
        for variant in variants:  # each alone, as kinds come in sweeps
            got += [values.item() for _, values in (x for x in base.all([variant]) if not isinstance(x, Progress))]
            yield Progress(4, 5, "checking: resumed sweeps")
        edits = base.write([(i, spot) for i, spot in enumerate(spots)], len(spots), 0)
        last = f"blocks.{model.info.n_layers - 1}.hook_resid_post"
        begin = (layer, base.resid[layer].repeat(len(spots), 1, 1)) if layer and model.resumes else None
        _, whole = model.forward(untouched.ids[:1].repeat(len(spots), 1), [last], edits, None, begin=begin)
        want += base.score.of(whole[last], 0)[:, 0].tolist()
        yield Progress(4, 5, "checking: resumed sweeps")
    model.notes.trials.clear()  # a longer prompt may hold what this one does not, such as a window
    model.notes.calls.clear()
    model.cache.clear()
    if why or not got:
        return Identity(NAME, math.nan, 0.0, None, f"whole passes: {why or 'no cell'}")
    row = model.identity(NAME, t.tensor(got), t.tensor(want), f"{len(want)} cells")
    if not row.ok:
        model.notes.trials[False] = f"resumed cells of {model.info.architecture} are off by {row.error:.1g}"
    return row
