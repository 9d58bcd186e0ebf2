"""Two models of one shape: the run of the other model against plain hooks on two Hugging Face models; patching across them; what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, PROMPT
from reference import Reference, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import Engine
from techniques.attention.requests import Attention
from techniques.attribution.requests import Attribution
from techniques.circuits.requests import PathPatch, Score
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from vocabulary.circuit import Circuit
from vocabulary.nodes import parse_intervention
from vocabulary.prompts import Metric, Study
from vocabulary.requests import Load

ALONE = replace(PROMPT, corrupt=None)
QUICK = ("gpt2", "llama")
EVERY = [pytest.param(a, marks=() if a in QUICK else pytest.mark.table) for a in ARCHS]


def tuned(folder, out, amount: float = 0.4):
    """A second model: the first, with every tensor of layer 1 and the final norm moved."""
    hf, tok = AutoModelForCausalLM.from_pretrained(folder, dtype=t.float32), AutoTokenizer.from_pretrained(folder)
    t.manual_seed(3)
    with t.no_grad():
        for name, p in hf.named_parameters():
            if ".1." in name or name in ("model.norm.weight", "transformer.ln_f.weight"):
                p += amount * p.std().nan_to_num(0.5).clamp(min=0.05) * t.randn_like(p)
    hf.save_pretrained(out)
    tok.save_pretrained(out)
    return out


class Two:
    """An engine with both models, and both in Hugging Face's own classes."""

    def __init__(self, folder, other):
        self.engine = Engine(Load(str(folder), against=str(other)))
        self.first, self.second = Reference(folder), Reference(other)
        self.study = Study(ALONE, against=str(other))
        check = self.engine.model.check(ALONE)
        self.ids, self.answers, self.foils = check.clean.ids, [r.ids[0] for r in check.answers], [r.ids[0] for r in check.foils]

    def diff(self, logits: np.ndarray) -> float:
        row = logits[0, -1].astype(np.float64)
        return row[self.answers].mean() - row[self.foils].mean()

    def patched(self, place: tuple, pos, cols, swap: bool = False) -> np.ndarray:
        """Logits of one model (the second: `swap`) with what the other one holds at a place."""
        mine, theirs = (self.second, self.first) if swap else (self.first, self.second)
        value = theirs.read(self.ids, place)[0, pos, cols]

        def edit(x: t.Tensor) -> None:
            x[0, pos, cols] = value

        return mine.run([self.ids], edits=[(place, edit)])[0]


@pytest.fixture(scope="module")
def twos(folders, tmp_path_factory) -> dict:
    class Twos(dict):
        def __missing__(self, arch: str) -> Two:
            self[arch] = Two(folders[arch], tuned(folders[arch], tmp_path_factory.mktemp("tuned") / arch))
            return self[arch]

    return Twos()


@pytest.fixture(params=EVERY)
def two(twos, request):
    yield twos[request.param]
    twos[request.param].engine.check_hooks()


def test_each_run_is_its_own_models(two):
    r = two.engine.run(Run(two.study))
    assert r.clean.metric == pytest.approx(two.diff(two.first.run([two.ids])[0]), abs=1e-4)
    assert r.corrupt.metric == pytest.approx(two.diff(two.second.run([two.ids])[0]), abs=1e-4)
    assert abs(r.clean.metric - r.corrupt.metric) > 1e-3, "a weak test"
    kl = two.engine.run(Run(replace(two.study, metric=Metric("kl"))))
    p, q = (log_softmax(m.run([two.ids])[0][0, -1].astype(np.float64)) for m in (two.first, two.second))
    assert kl.corrupt.metric == pytest.approx((np.exp(p) * (p - q)).sum(), abs=1e-4)


@pytest.mark.parametrize("base", ["clean", "corrupt"])
@pytest.mark.parametrize("node", ["L1H2", "L1.resid_post@5", "L1.mlp", "L2H1.q", "L1.attn@-1"])
def test_a_patch_takes_the_other_models_activation(two, node, base):
    do = parse_intervention(f"{node}=patch")
    at = slice(None) if do.node.pos is None else do.node.pos
    place = (do.node.part if do.node.site == "head" else do.node.site, do.node.layer)
    cols = two.first.columns(do.node.part, do.node.head) if do.node.site == "head" else slice(None)
    want = two.diff(two.patched(place, at, cols, base == "corrupt"))
    got = two.engine.run(Run(replace(two.study, interventions=(do,), base=base)))
    assert got.now.metric == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("direction", ["noise", "denoise"])
def test_a_sweep_takes_the_other_models_activations(two, direction):
    plain = two.engine.run(Sweep(two.study, "nodes", direction=direction, plain=True))
    fast = two.engine.run(Sweep(two.study, "nodes", direction=direction))
    np.testing.assert_allclose(fast.values, plain.values, atol=1e-4)
    for layer, head in ((1, 2), (2, 0)):
        want = two.diff(two.patched(("z", layer), slice(None), two.first.columns("z", head), direction == "denoise"))
        assert fast.values[layer, head] == pytest.approx(want, abs=1e-4)
    stream = two.engine.run(Sweep(two.study, "resid_post", direction=direction))
    assert stream.values[1, 4] == pytest.approx(two.diff(two.patched(("resid_post", 1), 4, slice(None), direction == "denoise")), abs=1e-4)


def test_the_estimate_is_a_gradient_times_the_difference(two):
    """Against a finite difference along the way from one model's activation to the other's."""
    guess = two.engine.run(Estimate(two.study, "mlp", "atp", direction="noise"))
    place, eps = ("mlp", 1), 1e-2
    own, theirs = (m.read(two.ids, place)[0, -1] for m in (two.first, two.second))

    def moved(share: float) -> float:
        def edit(x: t.Tensor) -> None:
            x[0, -1] = own + share * (theirs - own)

        return two.diff(two.first.run([two.ids], edits=[(place, edit)])[0])

    slope = (moved(eps) - moved(-eps)) / (2 * eps)
    assert guess.values[1, -1] - guess.base == pytest.approx(slope, abs=2e-3)


def test_a_path_carries_the_other_models_value(two):
    """L1's MLP to the logits, directly: the change of what it writes, added to the final stream."""
    r = two.engine.run(PathPatch(two.study, receivers=("logits",), direction="noise"))
    last = two.first.read(two.ids, ("resid_post", len(two.first.blocks) - 1))
    change = two.second.read(two.ids, ("mlp", 1)) - two.first.read(two.ids, ("mlp", 1))
    assert r.values[2, -1] == pytest.approx(two.diff(two.first.logits(last + change)), abs=1e-4)


def test_the_lens_compares_the_two(two):
    r = two.engine.run(Lens(two.study))
    at = r.points.index("L1.resid_post")
    rows = [log_softmax(m.logits(m.read(two.ids, ("resid_post", 1))[0])) for m in (two.first, two.second)]
    np.testing.assert_allclose(r.kl_pair[at], (np.exp(rows[0]) * (rows[0] - rows[1])).sum(-1), atol=1e-4)
    theirs = two.engine.run(Lens(two.study, "corrupt"))
    np.testing.assert_allclose(theirs.prob[at], np.exp(rows[1][:, two.answers]).sum(-1), atol=1e-4)
    rank = [(x > x[:, two.answers].max(-1, keepdims=True)).sum(-1) for x in rows]
    np.testing.assert_array_equal(r.rank_pair[at], rank[1] - rank[0])


def test_attention_and_attribution_are_subtracted(two):
    ask = Attention(two.study, 1, "clean-corrupt")
    got = two.engine.run(ask).pattern
    want = two.first.patterns([two.ids])[1][0] - two.second.patterns([two.ids])[1][0]
    np.testing.assert_allclose(np.nan_to_num(got), want, atol=1e-4)
    both = [two.engine.run(Attribution(two.study, w)) for w in ("clean", "corrupt", "clean-corrupt")]
    for r, m in zip(both, (two.first, two.second)):
        assert r.error < 1e-3 and (m.softcap or r.logit == pytest.approx(two.diff(m.run([two.ids])[0]), abs=1e-4))
    np.testing.assert_allclose(both[2].cells.heads, both[0].cells.heads - both[1].cells.heads, atol=1e-4)


def test_a_circuit_of_nodes_and_the_rest_of_the_other_model(two):
    heads = tuple(f"L{n}H{h}" for n in range(two.engine.model.info.n_layers) for h in range(two.engine.model.info.n_heads))
    kept = heads[: len(heads) // 2]
    r = two.engine.run(Score(two.study, Circuit("c", "", kept), rest="patch", positions=False))

    def cut(some):
        edits = []
        for head in some:
            do = parse_intervention(f"{head}=zero").node
            cols, place = two.first.columns("z", do.head), ("z", do.layer)
            value = two.second.read(two.ids, place)[..., cols]
            edits.append((place, lambda x, cols=cols, value=value: x[..., cols].copy_(value)))
        return two.diff(two.first.run([two.ids], edits=edits)[0])

    whole, alone, empty = two.diff(two.first.run([two.ids])[0]), cut([h for h in heads if h not in kept]), cut(heads)
    assert r.faithfulness.mean == pytest.approx((alone - empty) / (whole - empty), abs=1e-3)
