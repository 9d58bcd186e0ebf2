"""What heads, MLPs and edges carry on many families, against plain hooks on Hugging Face's own classes; and what is refused."""

import numpy as np
import pytest
import torch as t
from conftest import PROMPT, tokenizer
from plain import Plain
from test_families import FAMILIES, GROUPED, SMALL, WIDE
from test_paths import ended

from model.writes import linear_norm, trial, trial_values
from techniques.attention.requests import Attention
from techniques.attribution.requests import Attribution, AttributionNeurons, AttributionSources
from techniques.circuits.edges import edge_runs
from techniques.circuits.requests import Discover, PathPatch
from techniques.patching.requests import Estimate, Sweep
from vocabulary.nodes import UserError
from vocabulary.prompts import Study

TWO = {"num_hidden_layers": 2}
SCALED = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 2.0}
MINE = {
    "granite": ("GraniteConfig", SMALL | GROUPED | TWO | SCALED),
    "olmo": ("OlmoConfig", SMALL | GROUPED | TWO),  # a LayerNorm without numbers
    "nemotron": ("NemotronConfig", SMALL | GROUPED | TWO | {"head_dim": 8}),  # a LayerNorm whose gain is an offset from one
    "olmo2": (FAMILIES["olmo2"][0], FAMILIES["olmo2"][1] | TWO),  # norms only behind attention and MLP
    "gptj": (FAMILIES["gptj"][0], FAMILIES["gptj"][1] | {"n_layer": 2}),  # attention and MLP read one norm
    "phi": (FAMILIES["phi"][0], FAMILIES["phi"][1] | TWO),
    "bloom": (FAMILIES["bloom"][0], FAMILIES["bloom"][1] | {"n_layer": 2}),
    "falcon": ("FalconConfig", SMALL | WIDE | TWO | {"ffn_hidden_size": 48, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False}),
    "opt": ("OPTConfig", SMALL | TWO | {"hidden_size": 32, "ffn_dim": 48, "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 32}),
    "bitnet": ("BitNetConfig", SMALL | GROUPED | TWO),  # a norm between values and W_O
}
PICKED = [pytest.param(name, marks=[] if name == "granite" else pytest.mark.slow) for name in MINE]
TOL = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module", params=PICKED)
def family(request, tmp_path_factory):
    import transformers as tr

    from engine import Engine

    name, fields = MINE[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    t.manual_seed(1)
    hf = tr.AutoModelForCausalLM.from_config(getattr(tr, name)(**fields))
    with t.no_grad():
        for p in hf.parameters():
            p += 0.3 * t.randn_like(p) if p.ndim == 1 else 0
    hf.save_pretrained(folder)
    tokenizer(bos=True).save_pretrained(folder)
    engine = Engine(str(folder))
    check = engine.model.check(PROMPT)
    plain = Plain(folder, list(check.clean.ids), list(check.corrupt.ids))
    a, f = check.answers[0].ids[0], check.foils[0].ids[0]
    return request.param, engine, plain, lambda logits: (logits[a] - logits[f]).item()


def test_edges(family):
    """One edge cut, of every kind, is what plain hooks and (where blocks run one by one) direct path patching give; EAP's score is its derivative."""
    name, engine, plain, diff = family
    run, study = ended(edge_runs(engine.model, Study(PROMPT), "patch"))[0], Study(PROMPT)
    kinds: dict = {}
    for edge in run.index.edges:
        sender, receiver = edge.split("->")
        kinds.setdefault((sender[2:3], receiver.split(".")[-1]), []).append(edge)
    picked = [some[len(some) // 2] for some in kinds.values()]
    got = ended(run.run([run.mask(None, [e]) for e in picked]))[:, 0]
    want = [diff(plain.edge(*e.split("->"), again=False)) for e in picked]
    np.testing.assert_allclose(got, want, **TOL)
    assert np.abs(np.array(want) - run.value[0]).max() > 0.02
    if name not in ("bloom", "olmo2"):  # blocks that can not be run one by one; a norm behind heads that paths compute again
        paths = [np.nanmax(engine.run(PathPatch(study, *((x,) for x in e.split("->")))).values) for e in picked[::4]]
        np.testing.assert_allclose(paths, want[::4], **TOL)
    found = engine.run(Discover(study, "eap", edges=5))
    top = int(np.abs(found.scores).argmax())
    near = [diff(plain.edge(*found.edges[top].split("->"), again=False, share=s)) for s in (0.02, -0.02)]
    assert found.scores[top] == pytest.approx((near[0] - near[1]) / 0.04, rel=2e-2)


def test_parts(family):
    """Attribution adds up and is each part's own; direct effects, estimates of whole layers, rows by source and neuron, attention weighted by values."""
    name, engine, plain, diff = family
    study, info = Study(PROMPT), engine.model.info
    (last,) = plain.read(plain.ids, [(plain.norm, "in")])
    x, n = last[0, -1], range(info.n_layers)
    base = diff(plain.logits(x))
    found = engine.run(Attribution(study, "clean"))
    assert found.error < 1e-4 and found.logit == pytest.approx(base, abs=1e-4)
    heads = [[diff(plain.logits(x, plain.head(k, h, plain.own[f"z{k}"], plain.ids)[0, -1])) - base for h in range(info.n_heads)] for k in n]
    np.testing.assert_allclose(found.cells.heads, heads, **TOL)
    np.testing.assert_allclose(found.cells.mlps, [diff(plain.logits(x, plain.own[f"L{k}.mlp"][0, -1] * plain.factor)) - base for k in n], **TOL)
    direct = engine.run(Sweep(study, "nodes", "patch", "noise", effect="direct")).values
    for k in n:
        change = plain.head(k, 1, plain.theirs[f"z{k}"] - plain.own[f"z{k}"], plain.ids)[0, -1]
        assert direct[k, 1] == pytest.approx(diff(plain.logits(x, change)), abs=1e-4)
    guess = engine.run(Estimate(study, "attn_mlp", direction="noise")).values
    for i, part in enumerate(("attn", "mlp")):
        (own,), (other,) = (plain.read(ids, [(plain.writes[part][1], "out")]) for ids in (plain.ids, plain.other))
        steps = [0.02 * (other - own), -0.02 * (other - own)]
        near = [diff(plain.run(plain.ids, [(plain.writes[part][1], "out", lambda y, step=step: y + step)])) for step in steps]
        assert np.nansum(guess[2 + i] - base) == pytest.approx((near[0] - near[1]) / 0.04, rel=2e-2, abs=1e-4)
    assert engine.run(AttributionNeurons(study, layer=1, which="clean")).error < 1e-4
    if name == "bitnet":
        for ask in (AttributionSources(study, layer=1, head=1, which="clean"), Attention(study, 1, "clean", True)):
            with pytest.raises(UserError, match="more than its pattern times its values"):
                engine.run(ask)
        return
    assert engine.run(AttributionSources(study, layer=1, head=1, which="clean")).error < 1e-4
    weighted, bare = (engine.run(Attention(study, 1, "clean", w)).pattern[1] for w in (True, False))
    module, where = plain.projection(1, "v", 1)
    (v,) = plain.read(plain.ids, [(module, "out")])
    alone = t.zeros_like(plain.own["z1"])
    alone[..., info.d_head : 2 * info.d_head] = v[..., where]
    out = plain.o[1]
    size = (out(alone) - out(0 * alone)).norm(dim=-1)[0].detach().numpy() * plain.factor
    np.testing.assert_allclose(weighted, bare * size, **TOL)


def test_a_missing_part_is_refused(family, monkeypatch):
    """A multiplier or a norm that is not what it is taken for: a sentence, not a number."""
    _, engine, _, _ = family
    model = engine.model
    assert not trial(model) and (not trial_values(model)) == (family[0] != "bitnet")
    monkeypatch.setattr("model.writes.multiplier", lambda model, layer: 0.7)
    assert "do not add up" in trial(model)
    monkeypatch.undo()
    norm, linear = model.bridge.ln_final, linear_norm(model, model.bridge.ln_final)
    monkeypatch.setitem(model.notes.measured, norm, type(linear)(t.full((model.info.d_model,), 2.0), linear.bias, linear.centred, linear.eps))
    assert "no linear map" in trial(model)
