"""Attribution against an independent computation: Hugging Face's modules, numpy in double, and norms applied to vectors instead of directions."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import CLEAN, CORRUPT, PROMPT, SHORT
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import direct_logit_attribution
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import main
from techniques.attention.requests import AttentionSet, Detect
from techniques.attribution.requests import Attribution, AttributionNeurons, AttributionSet, AttributionSources
from techniques.identities.requests import Identities
from techniques.output.requests import Run
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Metric, Prompt, Study, WHICH
from vocabulary.wire import encode, Frame, read_frame, to_json

TOL = 1e-4
STUDY = Study(PROMPT)
SET = (PROMPT, replace(PROMPT, clean=CORRUPT, corrupt=CLEAN), Prompt(CLEAN), Prompt(SHORT, SHORT, (" Mary", " Anna")), replace(PROMPT, answers=(" Tom",)))


def double(x) -> np.ndarray:
    return x.detach().double().numpy()


class Parts:
    """One run of a reference at one position: every component's vector in the residual stream, and their logits, in double."""

    def __init__(self, reference, ids, pos, answers, foils, edits=()):
        self.ref, self.pos, self.gemma = reference, pos, reference.arch == "gemma2"
        layers = range(len(reference.blocks))
        places = [(s, i) for s in ("z", "mlp", "neuron", "v", "attn") for i in layers] + [("resid_pre", 0), ("resid_post", layers[-1])]
        logits, got = reference.run([ids], edits, places)
        self.got = {k: double(v[0]) for k, v in got.items()}
        self.logits, self.final = logits[0, pos].astype(np.float64), self.got["resid_post", layers[-1]][pos]
        self.answers, self.foils = answers, foils
        u = reference.unembed
        self.u = u[answers].mean(0) - (u[foils].mean(0) if foils else 0.0)

    def difference(self, x: np.ndarray) -> float:
        return x[self.answers].mean() - (x[self.foils].mean() if self.foils else 0.0)

    def frozen(self, norm, x: np.ndarray, at: np.ndarray) -> np.ndarray:
        """The norm as it acts on the term x of its input `at`: gain and (LayerNorm) centring, the scale of `at`, no bias."""
        gain, layer_norm = double(norm.weight), hasattr(norm, "bias") and norm.bias is not None
        eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
        if layer_norm:
            return (x - x.mean(-1, keepdims=True)) / np.sqrt(at.var() + eps) * gain
        return x / np.sqrt((at**2).mean() + eps) * (gain + 1 if self.gemma else gain)

    def logit(self, x: np.ndarray) -> np.ndarray:
        return self.frozen(self.ref.norm, x, self.final) @ self.u

    def linear(self, module) -> tuple[np.ndarray, np.ndarray]:
        """Weight [in, out] and bias of a Linear or of GPT-2's Conv1D."""
        w = double(module.weight)
        return (w if self.ref.arch == "gpt2" else w.T), (0 * w.sum(0 if self.ref.arch == "gpt2" else 1) if module.bias is None else double(module.bias))

    def head_vectors(self, layer: int, head: int, values: np.ndarray) -> np.ndarray:
        """Vectors of d_head numbers as W_O (and a norm after attention) writes them."""
        w, _ = self.linear(self.ref.place("z", layer)[0])
        out = values @ w[self.ref.columns("z", head)]
        return self.frozen(self.ref.blocks[layer].post_attention_layernorm, out, self.got["z", layer][self.pos] @ w) if self.gemma else out

    def heads(self) -> np.ndarray:
        def one(i: int, h: int) -> float:
            return self.logit(self.head_vectors(i, h, self.got["z", i][self.pos][self.ref.columns("z", h)]))

        return np.array([[one(i, h) for h in range(self.ref.heads)] for i in range(len(self.ref.blocks))])

    def sources(self, layer: int, head: int, pattern: np.ndarray) -> np.ndarray:
        v = self.got["v", layer][:, self.ref.columns("v", head)]
        return self.logit(self.head_vectors(layer, head, pattern[:, None] * v))

    def attn_bias(self) -> np.ndarray:
        return np.array([self.logit(self.linear(self.ref.place("z", i)[0])[1]) for i in range(len(self.ref.blocks))])

    def mlps(self) -> np.ndarray:
        return np.array([self.logit(self.got["mlp", i][self.pos]) for i in range(len(self.ref.blocks))])

    def neurons(self, layer: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Activations, contributions, and b_out's."""
        w, b = self.linear(self.ref.place("neuron", layer)[0])
        act = self.got["neuron", layer][self.pos]
        vectors = act[:, None] * w
        if self.gemma:
            vectors = self.frozen(self.ref.blocks[layer].post_feedforward_layernorm, vectors, act @ w)
        return act, self.logit(vectors), self.logit(b)

    def embeds(self) -> tuple[float, float | None]:
        whole = self.got["resid_pre", 0][self.pos]
        if self.ref.arch != "gpt2":
            return self.logit(whole), None
        position = double(self.ref.hf.transformer.wpe.weight)[self.pos]
        return self.logit(whole - position), self.logit(position)

    def norm_bias(self) -> float:
        bias = getattr(self.ref.norm, "bias", None)
        return 0.0 if bias is None else double(bias) @ self.u

    def raw(self) -> float:
        """The logit (difference) before a soft cap."""
        with t.no_grad():
            return self.difference(double(self.ref.norm(t.tensor(self.final, dtype=t.float32))) @ self.ref.unembed.T + self.ref.b_u)


def parts(engine, reference, prompt=PROMPT, side="clean", pos="END", edits=()) -> Parts:
    check = engine.model.check(prompt)
    row = getattr(check, side)
    index = row.labels[pos] if isinstance(pos, str) else pos % len(row.ids)
    return Parts(reference, row.ids, index, [r.ids[0] for r in check.answers], [r.ids[0] for r in check.foils], edits)


def compare(got, want: Parts) -> None:
    cells, (embed, position) = got.cells, want.embeds()
    np.testing.assert_allclose(cells.heads, want.heads(), atol=TOL, err_msg="heads")
    np.testing.assert_allclose(cells.mlps, want.mlps(), atol=TOL, err_msg="MLPs")
    np.testing.assert_allclose(cells.attn_bias, want.attn_bias(), atol=TOL, err_msg="b_O")
    np.testing.assert_allclose(cells.embed, embed, atol=TOL, err_msg="embed")
    assert cells.position == (None if position is None else pytest.approx(position, abs=TOL))
    np.testing.assert_allclose(cells.norm_bias, want.norm_bias(), atol=TOL, err_msg="bias of the final norm")
    np.testing.assert_allclose(cells.unembed_bias, 0.0, atol=TOL)
    np.testing.assert_allclose(got.logit, want.raw(), atol=TOL, err_msg="logit")
    np.testing.assert_allclose(got.total, got.logit, atol=TOL, err_msg="sum")
    np.testing.assert_allclose(got.total, sum(v for _, v in cells.rows()), atol=TOL)
    np.testing.assert_allclose(got.total, cells.total, atol=TOL)
    after = got.logit if got.capped is None else got.capped
    np.testing.assert_allclose(after, want.difference(want.logits), atol=TOL, err_msg="the model's own logit")
    assert got.error == abs(got.total - got.logit)


@pytest.mark.parametrize("pos", ["END", "S2", 4, -3])
def test_every_cell(engine, reference, pos):
    for side in ("clean", "corrupt"):
        compare(engine.run(Attribution(STUDY, side, pos)), parts(engine, reference, side=side, pos=pos))


def test_answers_alone_and_several(engine, reference):
    for answers, foils in (((" Mary",), ()), ((" Mary", " the"), (" John", " and", " a"))):
        prompt = replace(PROMPT, answers=answers, foils=foils)
        compare(engine.run(Attribution(Study(prompt))), parts(engine, reference, prompt))


def test_unembedding_bias(engines):
    """No fixture has one; put one in and take it out."""
    engine = engines["neox"]
    bridge, check = engine.model.bridge, engine.model.check(PROMPT)
    inner = bridge.unembed.original_component
    assert (inner.bias == 0).all()  # the Bridge's own
    inner.bias.copy_(t.linspace(-2, 2, inner.weight.shape[0]))
    try:
        got = engine.run(Attribution(STUDY))
        want = inner.bias[check.answers[0].ids[0]] - inner.bias[check.foils[0].ids[0]]
    finally:
        inner.bias.zero_()
    assert got.cells.unembed_bias == pytest.approx(want.item(), abs=1e-6) and abs(want) > 0.01
    assert got.error < TOL


@pytest.mark.parametrize("which", WHICH)
def test_runs_and_differences(engine, which):
    """A difference is what its name says, cell by cell; the metric it sums to is the run's own."""
    do = (parse_intervention("L0.mlp=zero"), parse_intervention("L1H2=patch"))
    study = replace(STUDY, interventions=do)
    got = engine.run(Attribution(study, which))
    sides = [engine.run(Attribution(study, s)) for s in which.split("-")]
    sign = (1, -1)
    for field in ("heads", "mlps", "attn_bias", "embed", "norm_bias"):
        want = sum(s * getattr(r.cells, field) for s, r in zip(sign, sides))
        np.testing.assert_allclose(getattr(got.cells, field), want, atol=TOL)
    assert got.error < TOL
    run = engine.run(Run(study))
    metric = {"now": run.now.metric, "clean": run.clean.metric, "corrupt": run.corrupt.metric}
    want = sum(s * metric[name] for s, name in zip(sign, which.split("-")))
    assert (got.logit if got.capped is None else got.capped) == pytest.approx(want, abs=TOL)


# ------------------------------------------------------------------ interventions


def zero(x):
    x.zero_()


def halve_end(x):
    x[:, -1] *= 0.5


def zero_columns(columns):
    def fn(x):
        x[..., columns] = 0

    return fn


def test_under_a_silenced_head_and_neuron(engine, reference):
    """Every row of a run under interventions, against Hugging Face's modules edited the same way: nothing is left for an extra row."""
    ref = reference
    do = (parse_intervention("L0H1=zero"), parse_intervention("L1.mlp.n5=zero"), parse_intervention("L2.mlp@END=scale:0.5"))
    edits = [(("z", 0), zero_columns(ref.columns("z", 1))), (("neuron", 1), zero_columns(5)), (("mlp", 2), halve_end)]
    got = engine.run(Attribution(replace(STUDY, interventions=do)))
    compare(got, parts(engine, ref, edits=edits))
    assert got.cells.interventions == 0 and (got.cells.heads[0, 1] == 0).all()


def test_a_scaled_attention(engine, reference):
    """Heads and b_O of an attention scaled by a half count by half, without a remainder."""
    got = engine.run(Attribution(replace(STUDY, interventions=(parse_intervention("L1.attn=scale:0.5"),))))

    def halve(x):
        x *= 0.5

    want = parts(engine, reference, edits=[(("attn", 1), halve)])
    heads, bias = want.heads(), want.attn_bias()
    heads[1], bias[1] = heads[1] * 0.5, bias[1] * 0.5
    np.testing.assert_allclose(got.cells.heads, heads, atol=TOL)
    np.testing.assert_allclose(got.cells.attn_bias, bias, atol=TOL)
    assert abs(got.cells.interventions) < TOL and got.error < TOL
    assert got.logit == pytest.approx(want.raw(), abs=TOL)


def test_a_replaced_attention(engine, reference):
    """Its heads add nothing, and what was written there is the interventions' row."""
    got = engine.run(Attribution(replace(STUDY, interventions=(parse_intervention("L2.attn=patch"),))))
    written = double(reference.read(engine.model.check(PROMPT).corrupt.ids, ("attn", 2))[0])

    def patch(x):
        x.copy_(t.tensor(written, dtype=x.dtype))

    want = parts(engine, reference, edits=[(("attn", 2), patch)])
    assert (got.cells.heads[2] == 0).all() and got.cells.attn_bias[2] == 0
    assert got.cells.interventions == pytest.approx(want.logit(written[-1]), abs=TOL)
    assert got.error < TOL and got.logit == pytest.approx(want.raw(), abs=TOL)


@pytest.mark.parametrize("site", ["resid_pre", "resid_mid", "resid_post"])
def test_a_scaled_residual_stream(engine, reference, site):
    """Halved at one point and position: the interventions' row is minus the half, and the rest is as it is in that run."""
    if engine.model.parallel and site == "resid_mid":
        with pytest.raises(UserError, match="no resid_mid"):
            engine.run(Attribution(replace(STUDY, interventions=(parse_intervention("L1.resid_mid@END=scale:0.5"),))))
        return
    got = engine.run(Attribution(replace(STUDY, interventions=(parse_intervention(f"L1.{site}@END=scale:0.5"),))))
    want = parts(engine, reference, edits=[((site, 1), halve_end)])
    kept = reference.run([engine.model.check(PROMPT).clean.ids], [((site, 1), halve_end)], [(site, 1)])[1][site, 1][0, -1]
    assert got.cells.interventions == pytest.approx(want.logit(-double(kept)), abs=TOL)
    np.testing.assert_allclose(got.cells.mlps, want.mlps(), atol=TOL)
    np.testing.assert_allclose(got.cells.heads, want.heads(), atol=TOL)
    assert got.error < TOL and got.logit == pytest.approx(want.raw(), abs=TOL)


def test_many_interventions_at_once(engine):
    """Whatever is done, the cells sum to the metric, and so do the drill downs to their rows."""
    texts = "L1H2=zero L0.mlp=scale:0.5 L1.attn@END=scale:0.3 L2.resid_pre@END=patch L2.attn=patch L1.resid_post=scale:0.9 embed@S2=patch L2H1.pattern=patch"
    texts += " L1H0.v=zero L2.mlp=patch L0.attn@S2=zero L0.resid_pre=scale:2" + ("" if engine.model.parallel else " L1.resid_mid=scale:0.7")
    study = replace(STUDY, interventions=tuple(parse_intervention(x) for x in texts.split()))
    got = engine.run(Attribution(study))
    assert got.error < TOL and abs(got.cells.interventions) > 1e-3
    after = got.logit if got.capped is None else got.capped
    assert after == pytest.approx(engine.run(Run(study)).now.metric, abs=TOL)
    for layer in range(3):
        mlp = engine.run(AttributionNeurons(study, layer=layer, k=1000))
        assert mlp.total == pytest.approx(got.cells.mlps[layer], abs=TOL)
        assert mlp.contribution.sum() + mlp.bias + mlp.interventions == pytest.approx(mlp.total, abs=TOL)
        for head in range(4):
            one = engine.run(AttributionSources(study, layer=layer, head=head))
            assert one.total == pytest.approx(got.cells.heads[layer, head], abs=TOL)
            assert one.sources.sum() + one.interventions == pytest.approx(one.total, abs=TOL)


# ------------------------------------------------------------------ drill downs


@pytest.mark.parametrize("pos", ["END", "S2"])
def test_sources(engine, reference, pos):
    whole = engine.run(Attribution(STUDY, "clean", pos))
    want = parts(engine, reference, pos=pos)
    patterns = reference.patterns([engine.model.check(PROMPT).clean.ids])
    for layer in range(engine.model.info.n_layers):
        for head in range(engine.model.info.n_heads):
            got = engine.run(AttributionSources(STUDY, "clean", layer, head, pos))
            pattern = patterns[layer][0, head, want.pos].astype(np.float64)
            np.testing.assert_allclose(got.pattern, pattern, atol=TOL)
            np.testing.assert_allclose(got.sources, want.sources(layer, head, pattern), atol=TOL)
            assert got.sources.sum() == pytest.approx(whole.cells.heads[layer, head], abs=TOL)
            assert got.total == pytest.approx(whole.cells.heads[layer, head], abs=1e-5) and got.error < TOL and got.interventions == 0
            assert got.kv_head == head * engine.model.info.n_kv_heads // engine.model.info.n_heads
    assert (got.sources[want.pos + 1 :] == 0).all()


def test_neurons(engine, reference):
    whole, want = engine.run(Attribution(STUDY, "clean")), parts(engine, reference)
    for layer in range(engine.model.info.n_layers):
        act, contribution, bias = want.neurons(layer)
        every = engine.run(AttributionNeurons(STUDY, "clean", layer, k=len(act)))
        assert sorted(every.index.tolist()) == list(range(len(act)))
        np.testing.assert_allclose(every.activation, act[every.index], atol=TOL)
        np.testing.assert_allclose(every.contribution, contribution[every.index], atol=TOL)
        assert (np.diff(every.contribution) <= 0).all()
        assert every.bias == pytest.approx(bias, abs=TOL) and every.rest == pytest.approx(0, abs=1e-6)
        few = engine.run(AttributionNeurons(STUDY, "clean", layer, k=3))
        np.testing.assert_array_equal(few.index, np.concatenate([every.index[:3], every.index[-3:]]))
        for got in (every, few):
            assert got.contribution.sum() + got.rest + got.bias == pytest.approx(whole.cells.mlps[layer], abs=TOL)
            assert got.total == pytest.approx(whole.cells.mlps[layer], abs=1e-5) and got.error < TOL


def test_drill_downs_of_a_difference(engine):
    a, b, d = (engine.run(AttributionSources(STUDY, w, 2, 1)) for w in ("clean", "corrupt", "clean-corrupt"))
    np.testing.assert_allclose(d.sources, a.sources - b.sources, atol=1e-5)
    a, b, d = (engine.run(AttributionNeurons(STUDY, w, 2, k=1000)) for w in ("clean", "corrupt", "clean-corrupt"))
    by_neuron = [dict(zip(r.index.tolist(), r.contribution.tolist())) for r in (a, b, d)]
    for i, value in by_neuron[2].items():
        assert value == pytest.approx(by_neuron[0][i] - by_neuron[1][i], abs=1e-5)
    assert d.error < TOL and d.total == pytest.approx(a.total - b.total, abs=1e-5)


# ------------------------------------------------------------------ TransformerLens


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "qwen3"])
def test_equal_to_transformer_lens(engines, folders, name):
    """
    Its direct_logit_attribution needs compatibility mode: value biases, with what ln1's bias adds to them, folded into b_O (so that its heads lack
    (b_V + b_ln1 W_V) W_O, which ours hold and which every head adds once, its attention rows summing to one), W_U folded with the final norm and centred (which a logit difference does not see),
    the final norm's bias in b_U, of which it says nothing. Gemma-2 is left out: it has no heads behind a norm after attention.
    """
    engine, folder = engines[name], folders[name]
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=t.float32, attn_implementation="eager")
    bridge = TransformerBridge.boot_transformers(str(folder), hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(folder), dtype=t.float32)
    bridge.enable_compatibility_mode()
    check = engine.model.check(PROMPT)
    ids, answer, foil = t.tensor([check.clean.ids]), check.answers[0].ids[0], check.foils[0].ids[0]
    got = engine.run(Attribution(STUDY, "clean")).cells
    with t.no_grad():
        theirs = {u: direct_logit_attribution(bridge, ids, t.tensor([answer]), t.tensor([foil]), unit=u) for u in ("head", "component")}
    rows = {u: dict(zip(r.labels, r.attribution.flatten().tolist())) for u, r in theirs.items()}
    raw, info = engine.model.bridge, engine.model.info
    u = raw.W_U[:, answer] - raw.W_U[:, foil]
    scale = engine.model.trace(tuple(check.clean.ids), ["ln_final.hook_scale"])["ln_final.hook_scale"][0, -1]
    direction = u * raw.ln_final.weight
    direction = (direction if info.norm == "RMS" else direction - direction.mean()) / scale
    for layer in range(info.n_layers):
        attn = raw.blocks[layer].attn
        folded = np.zeros(info.n_heads)
        if attn.b_V is not None:
            b_v = attn.b_V.reshape(info.n_heads, info.d_head) + t.einsum("m,hme->he", raw.blocks[layer].ln1.bias, attn.W_V)
            folded = t.einsum("he,hem,m->h", b_v, attn.W_O, direction).numpy()
        assert (np.abs(folded).max() > 1e-3) == (name in ("gpt2", "neox"))
        for head in range(info.n_heads):
            assert got.heads[layer, head] - folded[head] == pytest.approx(rows["head"][f"L{layer}H{head}"], abs=TOL)
        assert got.heads[layer].sum() + got.attn_bias[layer] == pytest.approx(rows["component"][f"{layer}_attn_out"], abs=TOL)
        assert got.mlps[layer] == pytest.approx(rows["component"][f"{layer}_mlp_out"], abs=TOL)
    assert got.embed == pytest.approx(rows["component"]["embed"], abs=TOL)
    assert got.position is None or got.position == pytest.approx(rows["component"]["pos_embed"], abs=TOL)


# ------------------------------------------------------------------ the prompt set


@pytest.mark.parametrize("which", ["clean", "now", "clean-corrupt"])
@pytest.mark.parametrize("do", ["", "L1H2@END=patch L0.mlp=zero L2.resid_pre@END=scale:0.5 L1.attn@S2=zero"])
def test_set_is_the_mean_of_single_runs(engine, which, do):
    prompts = SET[:3] + SET[4:] if do else SET
    study = replace(STUDY, interventions=tuple(parse_intervention(x) for x in do.split()), prompt_set=prompts)
    shown = []
    got = engine.run(AttributionSet(study, which), shown.append)
    used = [i for i, p in enumerate(prompts) if p.answers]
    single = [engine.run(Attribution(replace(study, prompt=prompts[i]), which)) for i in used]
    assert got.prompts.tolist() == used
    for field in ("embed", "heads", "mlps", "attn_bias", "norm_bias", "unembed_bias", "interventions"):
        values = np.stack([getattr(s.cells, field) for s in single]).astype(np.float64)
        np.testing.assert_allclose(getattr(got.mean, field), values.mean(0), atol=1e-5, err_msg=field)
        np.testing.assert_allclose(getattr(got.std, field), values.std(0), atol=1e-5, err_msg=field)
    np.testing.assert_allclose(got.totals, [s.total for s in single], atol=1e-5)
    np.testing.assert_allclose(got.logits, [s.logit for s in single], atol=1e-5)
    np.testing.assert_allclose(got.capped, [s.capped for s in single if s.capped is not None], atol=1e-5)
    assert got.worst == used[int(np.argmin([s.logit for s in single]))] and got.error < TOL
    assert got.mean.total == pytest.approx(got.totals.mean(), abs=TOL)
    assert shown and shown[-1].done == shown[-1].total
    assert (got.mean.position is None) == (single[0].cells.position is None)


def test_set_at_a_label(engines):
    """A label is found in every prompt of its own."""
    engine = engines["llama"]
    moved = replace(PROMPT, clean="the red milk then " + CLEAN, corrupt=None, labels=(("S2", 38 + 18),))
    study = replace(STUDY, prompt_set=(PROMPT, moved))
    got = engine.run(AttributionSet(study, "clean", "S2"))
    want = [engine.run(Attribution(Study(p), "clean", "S2")) for p in study.prompt_set]
    assert want[0].pos != want[1].pos
    np.testing.assert_allclose(got.totals, [w.total for w in want], atol=1e-5)


# ------------------------------------------------------------------ words, honesty, command line, bad input


def test_on_the_wire(engines):
    """Every request and its result go through the frames and JSON unchanged."""
    study = replace(STUDY, prompt_set=SET[:2])
    asks = (Attribution(study, "clean", "S2"), AttributionSources(study, head=2), AttributionNeurons(study, k=3), AttributionSet(study), AttentionSet(study))
    for ask in (*asks, Detect(study, cells=((9, 3), (14, 0)))):
        for body in (ask, engines["gemma2"].run(ask)):
            back = read_frame(io.BytesIO(encode(Frame("result", 1, body=body))).read).body
            assert type(back) is type(body) and json.dumps(to_json(back)) == json.dumps(to_json(body), allow_nan=False)


def test_half_precision(folders):
    """bfloat16: the sum is off by its rounding, which the error says."""
    from engine import Engine
    from vocabulary.requests import Load

    engine = Engine(Load(str(folders["gpt2"]), dtype="bfloat16"))
    got = engine.run(Attribution(STUDY))
    assert 0 < got.error < 0.1 and "bfloat16" in got.convention
    assert engine.run(AttributionSet(replace(STUDY, prompt_set=SET))).error < 0.1


def test_conventions(engines):
    words = {name: engines[name].run(Attribution(STUDY)).convention for name in ("gpt2", "neox", "llama", "gemma2")}
    assert "LayerNorm, centred on the fly" in words["gpt2"] and "RMSNorm without centring" in words["llama"]
    assert "before the soft cap 5" in words["gemma2"] and "frozen norm after them" in words["gemma2"] and "soft cap" not in words["llama"]
    assert all("value biases b_V inside the heads" in w and "float32" in w and "at END" in w for w in words.values())
    assert "no foil" in engines["gpt2"].run(Attribution(Study(replace(PROMPT, foils=())))).convention
    assert "kv head 1" in engines["llama"].run(AttributionSources(STUDY, head=3)).convention


@pytest.mark.parametrize("prompt", [PROMPT, Prompt(CLEAN)])
def test_identity(engine, prompt):
    rows = [r for r in engine.run(Identities(Study(prompt))).rows if "attribution sums" in r.name]
    assert len(rows) == 1 and rows[0].ok and rows[0].error < TOL
    assert ("likeliest token" in rows[0].note) == (not prompt.answers)


def test_a_wrong_row_is_seen(engines, monkeypatch):
    """The check is no tautology: a layer's MLP that is left out shows in the error, with interventions too."""
    engine = engines["gpt2"]
    from techniques.attribution import logits

    split = logits.split
    monkeypatch.setattr(logits, "split", lambda *a: {k: v * (k != "mlps") for k, v in split(*a).items()})
    for do in ((), (parse_intervention("L1.resid_pre=scale:0.5"),)):
        got = engine.run(Attribution(replace(STUDY, interventions=do)))
        assert got.error > 1e-2 and got.error == abs(got.total - got.logit)
    assert any(r.ok is False for r in engine.run(Identities(STUDY)).rows if "attribution sums" in r.name)


def test_drill_downs_need_no_second_pass(engines, monkeypatch):
    engine = engines["gemma2"]
    engine.model.cache.clear()
    engine.run(Attribution(STUDY))
    monkeypatch.setattr(engine.model, "forward", lambda *a, **k: pytest.fail("a second forward pass"))
    for layer in range(3):
        engine.run(AttributionNeurons(STUDY, layer=layer))
        engine.run(AttributionSources(STUDY, layer=layer, pos=3))
    engine.run(Attribution(STUDY, pos=3))


@pytest.mark.slow
def test_command_line(capsys, folders, tmp_path):
    options = ["--model", str(folders["llama"]), "--clean", CLEAN, "--corrupt", CORRUPT, "--answer", " Mary", "--foil", " John"]

    def run(*args: str) -> str:
        assert main([*args, *options]) == 0
        return capsys.readouterr().out

    got = json.loads(run("attribution", "--json", "--which", "clean-corrupt"))
    assert got["which"] == "clean-corrupt" and len(got["cells"]["heads"]) == 3 and got["error"] < TOL
    table = run("attribution")
    assert "b_O" in table and "final norm's bias" in table and "error" in table
    assert "attention" in run("attribution", "--by", "L1H2") and "L2.mlp.n" in run("attribution", "--by", "L2.mlp", "--k", "2")
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"clean": CLEAN, "answer": " Mary", "foil": " John", "labels": {"IO": 5, "S2": 38}}) + "\n")
    mean = run("attribution", "--mean", "--set", str(file))
    assert "worst prompt 1" in mean and "+-" in mean
    assert "END to IO" in run("attention", "--mean", "--set", str(file))
    assert json.loads(run("attention", "--weighted", "--json"))["weighted"] is True
    assert json.loads(run("detect", "--cells", "14,2", "9,4", "--json"))["cells"] == [[9, 4], [14, 2]]
    assert "attention to the previous token" in run("detect")
    assert main(["detect", "--cells", "14", *options]) == 2
    assert "destination,source pairs" in capsys.readouterr().err
    assert main(["attribution", "--by", "embed", *options]) == 2
    assert "--by takes a head" in capsys.readouterr().err


@pytest.mark.parametrize(
    "ask, text",
    [
        (Attribution(Study(Prompt(CLEAN))), "attribution needs an answer"),
        (AttributionSources(Study(Prompt(CLEAN))), "attribution needs an answer"),
        (Attribution(STUDY, pos=40), "position 40 is outside the prompt, which has 15 tokens"),
        (Attribution(STUDY, "corrupt", pos="S9"), "the corrupted prompt has no position labelled 'S9'"),
        (Attribution(replace(STUDY, metric=Metric(pos=99))), "position 99 is outside"),
        (Attribution(Study(replace(PROMPT, answers=("Mary",)))), "with a leading space is one token"),
        (Attribution(STUDY, "yesterday"), "'yesterday' is not a run or a difference"),
        (Attribution(Study(replace(PROMPT, corrupt=SHORT)), "clean-corrupt"), "clean has 15 tokens and corrupt has 14"),
        (Attribution(Study(replace(PROMPT, corrupt=None)), "corrupt"), "there is no corrupted prompt"),
        (AttributionSources(STUDY, layer=3), "there is no layer 3: the model has layers 0 to 2"),
        (AttributionSources(STUDY, head=4), "there is no head 4: the model has heads 0 to 3"),
        (AttributionNeurons(STUDY, layer=-1), "there is no layer -1"),
        (AttributionNeurons(STUDY, k=0), "k must be at least 1"),
        (AttributionSet(STUDY), "there is no prompt set: open one first"),
        (AttributionSet(replace(STUDY, prompt_set=(Prompt(CLEAN),))), "no prompt of the set has an answer"),
        (AttributionSet(replace(STUDY, prompt_set=(replace(PROMPT, answers=("Mary",)),))), "prompt 1 of the set: answer 'Mary'"),
        (
            AttributionSet(replace(STUDY, prompt_set=(Prompt(SHORT, None, (" Mary",)),)), pos="S2"),
            "prompt 1 of the set: the prompt has no position labelled 'S2'",
        ),
        (AttributionSet(replace(STUDY, prompt_set=(PROMPT,)), "dreams"), "'dreams' is not a run"),
    ],
)
def test_bad_requests(engines, ask, text):
    with pytest.raises(UserError) as error:
        engines["gpt2"].run(ask)
    assert text in str(error.value) and "\n" not in str(error.value)


def test_an_answer_outside_the_vocabulary(engines, monkeypatch):
    engine = engines["qwen3"]
    answer = engine.model.check(PROMPT).answers[0].ids[0]
    monkeypatch.setattr(engine.model.tokens, "info", replace(engine.model.info, d_vocab=answer))
    with pytest.raises(UserError, match=f"answer ' Mary' is token {answer}, which the model can't predict"):
        engine.run(Attribution(STUDY))


@pytest.mark.parametrize(
    "gone, text",
    [
        ("ln_final.hook_scale", "has no final norm that can be read"),
        ("blocks.1.hook_mlp_out", "has no MLP in layer 1 that can be read"),
        ("blocks.0.attn.hook_z", "has no attention heads in layer 0"),
    ],
)
def test_models_without_a_part(engines, monkeypatch, gone, text):
    engine = engines["gpt2"]
    monkeypatch.setattr(engine.model, "points", {k: v for k, v in engine.model.points.items() if k != gone})
    for ask in (Attribution(STUDY), AttributionSet(replace(STUDY, prompt_set=SET))):
        with pytest.raises(UserError, match=text):
            engine.run(ask)


def test_neurons_of_a_mixture_of_experts(engines, monkeypatch):
    engine = engines["gpt2"]
    monkeypatch.setattr(engine.model, "points", {k: v for k, v in engine.model.points.items() if k != "blocks.1.mlp.hook_post"})
    with pytest.raises(UserError, match="has no blocks.1.mlp.hook_post"):
        engine.run(AttributionNeurons(STUDY, layer=1))


def test_not_finite_is_an_error(engines, monkeypatch):
    engine = engines["llama"]
    engine.model.cache.clear()
    weight = engine.model.bridge.ln_final.original_component.weight
    kept = weight.clone()
    weight.fill_(float("nan"))
    try:
        with pytest.raises(UserError, match="not finite: load the model in float32"):
            engine.run(Attribution(STUDY))
    finally:
        weight.copy_(kept)
        engine.model.cache.clear()
