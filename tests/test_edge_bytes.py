"""The bytes that edges are said to take, against every tensor that lives while they are scored, counted as torch makes them."""

import weakref

import numpy as np
import pytest
import torch as t
from conftest import PROMPT
from test_edge_index import LARGE
from test_paths import ended
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from techniques.circuits.edges import cut_bytes, edge_runs, prompt_bytes, senders
from vocabulary.prompts import Study


class Living(TorchDispatchMode):
    """Counts the bytes of storages that are made within and still live, and their most; the model's weights are not counted."""

    def __init__(self, model):
        super().__init__()
        self.sizes, self.now, self.most = {p.untyped_storage()._cdata: 0 for p in model.bridge.original_model.parameters()}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, t.Tensor)):
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self.drop, storage._cdata)
        return out

    def drop(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_bytes(engines, arch):
    model, study = engines[arch].model, Study(PROMPT, prompt_set=(PROMPT,) * 2)
    with Living(model) as living:
        run = ended(edge_runs(model, study, "patch"))[0]
        living.most = living.now
        run.slopes(run.change())
    assert 0.4 < living.most / (2 * prompt_bytes(model.info, run.seq, 4)) < 1.1
    for share in (0.0, 0.02, 0.5):
        cut = run.index.exists & (np.random.default_rng(0).random(run.index.exists.shape) >= share)
        with Living(model) as living:
            run.metrics([cut] * 3)
        assert 0.25 < living.most / run.set_bytes([cut] * 3) < 1.2, share


def test_eight_billion_fits():
    """EAP-IG on 8 prompts of 64 tokens in bfloat16, beside 16 GB of weights on a card of 78 GiB; and a set of as many with each sender held apart."""
    assert 8 * prompt_bytes(LARGE, 64, 2) < 16 << 30
    assert 8 * 64 * (cut_bytes(LARGE, 64, 2) + 2 * len(senders(LARGE)) * LARGE.d_model) < 8 << 30
