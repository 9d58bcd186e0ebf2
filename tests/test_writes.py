"""What heads and MLPs write into the stream, against Hugging Face's own modules; and directions of the stream taken back to heads."""

import pytest
import torch as t
from conftest import PROMPT

from model.writes import adds, attention_out, bias_write, change_of_head, frozen_norm, head_writes, heads_write, over_scale, post_norm, pull_back, to_heads

TOL = {"atol": 1e-4, "rtol": 1e-4}
LAYER = 1


@pytest.fixture
def read(engine, reference):
    """Of the clean prompt: attention's z and output, neurons and the MLP's output in Hugging Face's own run; Loupe's scales of the norms after them."""
    model, ids = engine.model, engine.model.check(PROMPT).clean.ids
    got = reference.run([ids], read=[(site, LAYER) for site in ("z", "attn", "neuron", "mlp", "resid_post")])[1]
    acts = model.trace(ids, [post[1] for part in ("attn", "mlp") if (post := post_norm(model, LAYER, part))])
    scale = {part: acts[post[1]] if (post := post_norm(model, LAYER, part)) else None for part in ("attn", "mlp")}
    z = got["z", LAYER].view(1, len(ids), model.info.n_heads, model.info.d_head)
    return model, z, {site: x for (site, _), x in got.items()}, scale, acts


@t.no_grad()
def test_heads_and_biases_are_attention(read):
    model, z, got, scale, _ = read
    parts = over_scale(z, scale["attn"])
    each, bias = head_writes(model, LAYER, parts), bias_write(model, LAYER, scale["attn"])
    t.testing.assert_close(each.sum(0) + bias, got["attn"], **TOL)
    t.testing.assert_close(heads_write(model, LAYER, parts), each.sum(0), **TOL)
    t.testing.assert_close(attention_out(model, LAYER, z), got["attn"], **TOL)
    t.testing.assert_close(adds(model, LAYER, "attn", z.flatten(2), scale["attn"]) + bias, got["attn"], **TOL)


@t.no_grad()
def test_neurons_and_a_bias_are_the_mlp(read):
    """The bias is what positions have in common that their neurons do not give."""
    model, _, got, scale, _ = read
    rest = got["mlp"] - adds(model, LAYER, "mlp", got["neuron"], scale["mlp"])
    t.testing.assert_close(rest, rest[:, :1].expand_as(rest), **TOL)


@t.no_grad()
def test_a_head_with_another_z(read, reference):
    """What changes in attention's output when one head's z is doubled, the norm after it computed again; and at the frozen scale where there is no norm."""
    model, z, got, scale, _ = read
    new, where = z.clone(), reference.columns("z", 1)
    new[:, :, 1] *= 2

    def double(x: t.Tensor) -> None:
        x[..., where] *= 2

    ids = model.check(PROMPT).clean.ids
    want = reference.run([ids], [(("z", LAYER), double)], [("attn", LAYER)])[1]["attn", LAYER] - got["attn"]
    t.testing.assert_close(change_of_head(model, LAYER, 1, z, new), want, **TOL)
    if scale["attn"] is None:
        t.testing.assert_close(head_writes(model, LAYER, z, [1])[0], want, **TOL)


@t.no_grad()
def test_a_direction_taken_back_to_heads(read):
    """Heads . direction and the biases' part are attention's output . direction."""
    model, z, got, _, acts = read
    u = t.randn(z.shape[1], model.info.d_model, generator=t.Generator().manual_seed(0))
    back, constant = to_heads(model, LAYER, {name: x[0] for name, x in acts.items()}, u)
    t.testing.assert_close((z[0] * back).sum((-1, -2)).double() + constant, (got["attn"][0] * u).sum(-1).double(), **TOL)


@t.no_grad()
def test_the_frozen_final_norm(read, reference):
    """At its own scale a frozen norm and its bias are the norm; a direction pulled back through it reads the same."""
    model, _, _, _, _ = read
    ids = model.check(PROMPT).clean.ids
    x = reference.run([ids], read=[("resid_post", model.info.n_layers - 1)])[1]["resid_post", model.info.n_layers - 1][0]
    scale, norm = model.trace(ids, ["ln_final.hook_scale"])["ln_final.hook_scale"][0], model.bridge.ln_final
    bias = getattr(reference.norm, "bias", None)
    t.testing.assert_close(frozen_norm(model, norm, scale, x) + (0 if bias is None else bias), reference.norm(x), **TOL)
    u = t.randn(len(x), x.shape[1], generator=t.Generator().manual_seed(0))
    behind, constant = pull_back(model, norm, scale, u)
    t.testing.assert_close((x * behind).sum(-1).double() + constant, (reference.norm(x) * u).sum(-1).double(), **TOL)
