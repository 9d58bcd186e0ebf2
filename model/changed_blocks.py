"""
One block of a kept run under changes: new values written into it, a head's new z without its attention, a single token alone. Between two blocks no hook
is on the model.
"""

from collections.abc import Callable

import torch as t
from torch import Tensor

from model.base_run import BaseRun, PatchSite, patch_site
from model.bridge import Edit, Keep
from model.fast_blocks import given
from model.memory import is_out_of_memory
from vocabulary.nodes import Node

PIECE = 11e9  # FLOPs of a block between two pauses, on a CPU's thread
ROWWISE = ("attn", "resid_mid", "head", "neuron")  # one position of these changes the block's output at that position only


class ChangedBlocks(BaseRun):
    """A kept run whose blocks can be run once more with other values at some sites; `source` holds the values."""

    def piece(self, length: int) -> int:
        """How many variants of so many positions go through a block between two pauses."""
        i = self.model.info
        flops = 2 * i.d_model * (4 * i.d_model + 3 * i.d_mlp) * len(self.ids) * length
        return max(1, int((PIECE * t.get_num_threads() if self.model.device.type == "cpu" else 1e3 * PIECE) / flops))

    def write(self, rows: list[tuple[int, PatchSite]], n: int, start: int) -> list[Edit]:
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

    def values(self, spot: PatchSite, start: int) -> Tensor:
        """New values [prompt, positions from start to stop, ...]."""
        x = self.source[spot.key]
        return x[:, :, start : self.stop, : self.stop] if spot.node.part == "pattern" and spot.node.site == "head" else x[:, start : self.stop]

    # ---------------------------------------------------------------- a head at all positions

    def by_heads(self, spot: PatchSite) -> bool:
        """
        Whether a head's change is known as a new z of that head: z itself, and q, k, v or pattern, since heads do not see one another before their
        outputs are added (tried once a model). Then its block needs no attention, only what attention puts out.
        """
        node = spot.node
        if node.site != "head" or node.pos is not None or self.edits or f"blocks.{node.layer}.attn.hook_z" not in self.acts:
            return False
        return self.heads_apart(node.part)

    def heads_apart(self, part: str) -> bool:
        return not self.why_not(("heads", part), lambda: self.trial_heads(part))

    def heads_of(self, spot: PatchSite) -> int | slice:
        """The heads whose z a change moves: one key and value serve a group of them."""
        first = spot.node.head - spot.node.head % self.per_kv
        return slice(first, first + self.per_kv) if spot.node.part in ("k", "v") else spot.node.head

    def trial_heads(self, part: str) -> str:
        """One head changed alone and all heads changed together give that head one z; a block finished from it is the block under that change."""
        layer = next(k for k in self.source if k[1:] == ("head", part))[0]
        spot, kept = patch_site(self.model, Node("head", layer, 0, part)), dict(self.source)
        try:
            self.source = {spot.key: 2 * self.acts[spot.name].flip(-1) + 0.5}  # of another norm too: some models normalise all heads' q together
            want = self.step(layer, self.resid[layer][:, : self.stop], 0, self.write([(0, spot)], 1, 0))
            got = self.attended(layer, [spot], 0)
        except RuntimeError as error:
            if is_out_of_memory(error):
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
    def attended(self, layer: int, spots: list[PatchSite], start: int) -> Tensor:
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

    # ---------------------------------------------------------------- a single token

    def runs_alone(self, spot: PatchSite) -> bool:
        if not self.model.has(f"blocks.{spot.node.layer}.hook_attn_out"):
            return False
        return spot.node.site in ROWWISE and not (spot.node.site == "attn" and self.model.parallel)

    def alone(self, rows: list[tuple[int, PatchSite]]) -> Tensor:
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
