"""Two models of one shape: the run of the other model against plain hooks on two Hugging Face models; patching across them; what is refused."""

import json
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
from techniques.circuits.requests import Discover, PathPatch, Score
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from techniques.weights.requests import WeightDifference
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError, parse_intervention
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


def product(reference, layer: int, part: str, head: int) -> t.Tensor:
    """W_V W_O or W_Q W_K^T [d_model, d_model] of one head, from Hugging Face's own matrices."""
    a, d, g = reference.attn(layer), reference.d_head, reference.arch == "gpt2"
    rows = lambda p: (getattr(a, f"{p}_proj").weight if not g else a.c_attn.weight.T)[reference.columns(p, head)].detach()  # noqa: E731
    out = (a.c_proj.weight.T if g else a.o_proj.weight).detach()[:, head * d : (head + 1) * d]
    return rows("v").T @ out.T if part == "OV" else rows("q").T @ rows("k")


@pytest.mark.parametrize("arch", QUICK)
def test_the_map_of_weight_differences(twos, arch):
    two = twos[arch]
    r = two.engine.run(WeightDifference())
    for part in ("OV", "QK"):
        for layer, head in ((0, 1), (1, 3)):
            x, y = (product(m, layer, part, head).flatten().double() for m in (two.first, two.second))
            assert r.heads[part][layer, head] == pytest.approx((x @ y / x.norm() / y.norm()).item(), abs=1e-4)
    state = [m.hf.state_dict() for m in (two.first, two.second)]
    name = next(n for n in state[0] if ".1." in n and n.endswith(("down_proj.weight", "mlp.c_proj.weight")))
    x, y = (s[name] for s in state)
    at = next(i for i, p in enumerate(r.parts) if name.endswith(p))
    assert r.values[1, at] == pytest.approx(((y - x).norm() / x.norm()).item(), abs=1e-5)
    assert np.nanmax(r.values[0]) == 0 and np.nanmin(r.values[1]) > 0, "only layer 1 was moved"
    x, y = (m.attn(1).c_attn.weight.T[m.columns("q", 2)] if arch == "gpt2" else m.attn(1).q_proj.weight[m.columns("q", 2)] for m in (two.first, two.second))
    assert r.heads["Q"][1, 2] == pytest.approx(((y - x).norm() / x.norm()).item(), abs=1e-5)
    assert {v for n, v in r.rest.items() if "norm" not in n and "ln_f" not in n} == {0.0}, "the embeddings are the same"


def test_equal_tensors_are_held_once(twos):
    two = twos["llama"]
    one, other = (dict(m.bridge.original_model.named_parameters()) for m in two.engine.model.pair)
    same = {n for n in one if one[n].data_ptr() == other[n].data_ptr()}
    assert same == {n for n in one if t.equal(one[n], other[n])} and len(same) > len(one) / 2
    assert "of its weights are shared" in two.engine.model.info.beside


def test_what_can_not_be_compared_is_refused(engines, folders, twos, tmp_path):
    zoo = Engine("zoo")
    for other, why in ((folders["llama"], "one architecture"), (folders["gpt2"], "another shape")):
        with pytest.raises(UserError, match=why):
            zoo.run(Load("zoo", against=str(other)))
        assert zoo.run(Run(Study(PROMPT))).corrupt is not None, "the first model stays"
    llama = twos["llama"]
    with pytest.raises(UserError, match="is not loaded beside"):
        zoo.run(Run(Study(ALONE, against="elsewhere")))
    with pytest.raises(UserError, match="is a second one"):
        llama.engine.run(Estimate(llama.study, "mlp", "ig"))
    with pytest.raises(UserError, match="is a second one"):
        llama.engine.run(Discover(llama.study, "eap-ig", rest="patch"))
    llama.engine.run(Load(str(folders["llama"])))
    assert llama.engine.model.pair is None and llama.engine.run(Run(Study(PROMPT))).names == ("clean", "corrupted")
    del twos["llama"]


def test_another_tokenizer_is_refused(folders, tmp_path):
    other = tuned(folders["llama"], tmp_path / "other")
    tok = json.loads((other / "tokenizer.json").read_text())
    vocab = tok["model"]["vocab"]
    vocab["ĠMary"], vocab["ĠJohn"] = vocab["ĠJohn"], vocab["ĠMary"]
    (other / "tokenizer.json").write_text(json.dumps(tok))
    engine = Engine(Load(str(folders["llama"]), against=str(other)))
    with pytest.raises(UserError, match="other tokens"):
        engine.run(Run(Study(ALONE, against=str(other))))
