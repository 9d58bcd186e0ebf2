"""EAP-IG with its steps at left, right and mid, against plain autograd on Hugging Face's own classes; and what titles say of the steps."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch as t
from torch import Tensor

from conftest import PROMPT
from techniques.circuits.requests import Discover
from techniques.patching.requests import Estimate
from vocabulary.circuit import parse_edge
from vocabulary.integral import fractions, steps_in_words
from vocabulary.nodes import UserError, parse_node
from vocabulary.prompts import Study

STUDY, STEPS = Study(PROMPT), 3


def norms(ref, i: int) -> tuple:
    """The norms before attention and before the MLP."""
    b = ref.blocks[i]
    return (b.ln_1, b.ln_2) if ref.arch == "gpt2" else (b.input_layernorm, b.post_attention_layernorm)


def back(module, x: Tensor, g: Tensor) -> Tensor:
    """The gradient before a module on x, from the one behind it."""
    x = x.detach().requires_grad_(True)
    return t.autograd.grad(module(x), x, g)[0]


class Plain:
    """Every edge's (corrupted - clean sender) . gradient at the receiver, of a model whose first block gets a mix of the two prompts' embeddings."""

    def __init__(self, ref, clean: tuple, corrupt: tuple, answer: int, foil: int):
        self.ref, self.clean, self.answer, self.foil, self.n = ref, clean, answer, foil, len(ref.blocks)
        at = [("resid_pre", 0), *((site, i) for i in range(self.n) for site in ("z", "mlp"))]
        self.own, self.other = ({spot: ref.read(ids, spot) for spot in at} for ids in (clean, corrupt))

    def sent(self, name: str) -> Tensor:
        """The change of what a sender writes [1, seq, d_model]."""
        if name == "embed":
            return self.other["resid_pre", 0] - self.own["resid_pre", 0]
        node = parse_node(name)
        if node.site == "mlp":
            return self.other["mlp", node.layer] - self.own["mlp", node.layer]
        project, columns = self.ref.place("z", node.layer)[0], self.ref.columns("z", node.head)
        change = t.zeros_like(self.own["z", node.layer])
        change[..., columns] = (self.other["z", node.layer] - self.own["z", node.layer])[..., columns]
        with t.no_grad():
            return project(change) - project(t.zeros_like(change))

    def gradients(self, share: float) -> None:
        """One run at a share of the way from corrupted to clean, and its backward pass."""
        ref, self.x, self.g = self.ref, {}, {}
        mix = self.other["resid_pre", 0] + share * (self.own["resid_pre", 0] - self.other["resid_pre", 0])

        def keep(name):
            def fn(_, args, kwargs, out):
                x = args[0] if args else kwargs["hidden_states"]
                self.x[name] = x.detach()
                out.retain_grad()
                self.g[name] = out

            return fn

        def begin(_, args, kwargs):
            return ((mix.clone().requires_grad_(True), *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": mix.clone().requires_grad_(True)})

        with ExitStack() as stack, t.enable_grad():
            stack.callback(ref.blocks[0].register_forward_pre_hook(begin, with_kwargs=True).remove)
            for i in range(self.n):
                for site, module in [*((p, ref.place(p, i)[0]) for p in "qkv"), ("norm1", norms(ref, i)[0]), ("norm2", norms(ref, i)[1])]:
                    stack.callback(module.register_forward_hook(keep((site, i)), with_kwargs=True).remove)
            stack.callback(ref.norm.register_forward_hook(keep("end"), with_kwargs=True).remove)
            logits = ref.hf(t.tensor([self.clean]), use_cache=False).logits[0, -1]
            (logits[self.answer] - logits[self.foil]).backward()

    def slope(self, name: str) -> Tensor:
        if name == "logits":
            return back(self.ref.norm, self.x["end"], self.g["end"].grad)
        node = parse_node(name)
        if node.site == "mlp":
            return back(norms(self.ref, node.layer)[1], self.x["norm2", node.layer], self.g["norm2", node.layer].grad)
        at, columns = (node.part, node.layer), self.ref.columns(node.part, node.head)
        g = t.zeros_like(self.g[at].grad)
        g[..., columns] = self.g[at].grad[..., columns]
        inner = back(self.ref.place(node.part, node.layer)[0], self.x[at], g)
        return back(norms(self.ref, node.layer)[0], self.x["norm1", node.layer], inner)


@pytest.mark.parametrize("name", ("zoo", "neox", "llama"))
@pytest.mark.parametrize("at", ("left", "right", "mid", ""))
def test_eap_ig_is_plain_autograd_at_the_same_steps(engines, references, name, at):
    engine = engines[name]
    check = engine.model.check(PROMPT)
    plain = Plain(references[name], check.clean.ids, check.corrupt.ids, check.answers[0].ids[0], check.foils[0].ids[0])
    found = engine.run(Discover(STUDY, "eap-ig", edges=10, steps=STEPS, steps_at=at))
    shares = {"left": (0, 1 / 3, 2 / 3), "mid": (1 / 6, 3 / 6, 5 / 6)}.get(at, (1 / 3, 2 / 3, 1))
    edges = [parse_edge(e) for e in found.edges]
    some = [i for i, e in enumerate(edges) if not (name == "llama" and e.receiver[-2:] in (".k", ".v"))]  # of a group of heads: whose they are is a convention
    sent, want = {e.sender: plain.sent(e.sender) for e in edges}, np.zeros(len(edges))
    for share in shares:
        plain.gradients(share)
        slopes = {edges[i].receiver: plain.slope(edges[i].receiver) for i in some}
        want += [float((sent[e.sender] * slopes[e.receiver]).sum()) / STEPS if e.receiver in slopes else 0 for e in edges]
    size = np.abs(want).max()
    assert len(some) > 50 and size > 1e-2
    np.testing.assert_allclose(found.scores[some], want[some], atol=1e-4 * max(1, size))
    assert f"({at or 'right'}:" in found.convention


def test_left_and_right_are_different_numbers(engines):
    left, right = (engines["zoo"].run(Discover(STUDY, "eap-ig", edges=10, steps=5, steps_at=at)).scores for at in ("left", "right"))
    assert np.abs(left - right).max() > 0.01 * np.abs(right).max()


def test_steps_in_words_and_their_errors(engines):
    assert fractions(4, "left") == [0, 0.25, 0.5, 0.75] and fractions(4, "right") == [0.25, 0.5, 0.75, 1] and fractions(2, "mid") == [0.25, 0.75]
    assert steps_in_words(5, "left", "corrupted to clean") == "5 steps at 0 to 4 of 5 (left: 0 to 0.8 of the way from corrupted to clean)"
    for ask in (Discover(STUDY, "eap-ig", steps_at="middle"), Estimate(STUDY, method="ig", steps_at="middle")):
        with pytest.raises(UserError, match="use left, right, mid"):
            engines["zoo"].run(ask)


def test_an_estimate_says_where_its_steps_are(engines):
    """Estimate ig takes the middles, as its title says; left and right are had too, and their mean is not the middle."""
    run = lambda **how: engines["zoo"].run(Estimate(STUDY, "z", "ig", **how))  # noqa: E731
    mid, left, right = run(), run(steps_at="left"), run(steps_at="right")
    assert "5 steps at the middles (mid: 0.1 to 0.9 of the way from base to source)" in mid.convention and "(left:" in left.convention
    assert "steps" not in engines["zoo"].run(Estimate(STUDY, "z", "atp")).convention
    np.testing.assert_allclose(run(steps=10, steps_at="left").values, (left.values + mid.values) / 2, atol=1e-3)
    np.testing.assert_allclose(run(steps=10, steps_at="right").values, (mid.values + right.values) / 2, atol=1e-3)
