"""What features do, against plain Hugging Face hooks and numpy; feature nodes as interventions; all six models."""

from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import CORRUPT, PROMPT
from dictionaries import build, save

from model import interventions as patching
from model import sae as saes
from model.sae_loading import load
from techniques.attribution.requests import Attribution
from techniques.circuits.requests import Discover, Score
from techniques.features.requests import Feature, Features
from techniques.identities.requests import Identities
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from vocabulary.circuit import Circuit
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Metric, read_prompt_set, Study
from utils import ROOT

STUDY = Study(PROMPT)


@pytest.fixture(scope="module")
def sources(engines, tmp_path_factory):
    """SAEs and a transcoder of layer 1 (L0 for `early`), by model."""

    class Sources(dict):
        def __missing__(self, key):
            arch, what = key
            model, folder = engines[arch].model, tmp_path_factory.mktemp("sae")
            info = model.info
            ids = model.row(PROMPT.clean, None, PROMPT.labels).ids
            last = info.n_layers - 1
            match what:
                case "post" | "early" | "last":
                    layer = {"post": 1, "early": 0, "last": last}[what]
                    sae = build("standard", f"blocks.{layer}.hook_resid_post", info.d_model, seed=3)
                case "mid":
                    sae = build("jumprelu", "blocks.1.hook_resid_mid", info.d_model)
                case "z":
                    sae = build("standard", "blocks.1.attn.hook_z", info.n_heads * info.d_head)
                case "attn":
                    sae = build("topk", "blocks.1.hook_attn_out", info.d_model)
                case "mlp":
                    sae = build("gated", "blocks.1.hook_mlp_out", info.d_model)
                case "transcoder" | "skip_transcoder" | "normed" | "mlp_in":
                    hook = {"normed": "blocks.1.ln2.hook_normalized", "mlp_in": "blocks.1.hook_mlp_in"}.get(what, "blocks.1.mlp.hook_in")
                    read = f"blocks.1.hook_resid_{'pre' if model.parallel else 'mid'}" if what == "mlp_in" else hook
                    acts = model.trace(ids, [read, "blocks.1.hook_mlp_out"])
                    kind = what if "transcoder" in what else "jumprelu_transcoder"
                    sae = build(kind, hook, info.d_model, info.d_model, 0, tuple(acts[n][0].float() for n in (read, "blocks.1.hook_mlp_out")))
            self[key] = save(sae, folder / "sae")
            return self[key]

    return Sources()


def loaded(engine, source):
    steps = load(engine.model, source)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def prepared(engine, study):
    steps = patching.prepare(engine.model, study)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def ids_of(engine, text=PROMPT.clean):
    return engine.model.row(text, None, PROMPT.labels if text == PROMPT.clean else ()).ids


def logits_now(engine, study):
    runs = prepared(engine, study)
    return engine.model.forward(t.tensor([runs.row("now").ids]), edits=runs.edits, keep=0)[0][0].numpy()


def do(study, source, *texts, **more):
    return replace(study, interventions=tuple(parse_intervention(x) for x in texts), saes=(source,), **more)


def firing(d, x, pos, n=2):
    f = d.encode(x)[pos]
    return f.argsort(descending=True)[:n].tolist(), f


# ------------------------------------------------------------------ acting


@pytest.mark.slow
@pytest.mark.parametrize("what, place", [("post", "resid_post"), ("mlp", "mlp"), ("z", "z")])
def test_ablation_with_the_error_kept_takes_off_the_decoder_row(engines, references, sources, arch, what, place):
    engine, reference = engines[arch], references[arch]
    d, ids = loaded(engine, sources[arch, what]), ids_of(engine)
    x = d.flat(reference.read(ids, (place, 1))[0])
    (a, b), f = firing(d, x, 4)
    rows = d.sae.W_dec

    def ablate(y):
        y[0, 4] -= (f[a] * rows[a]).view(y.shape[2:])
        y[0, 4] -= (0.5 * f[b] * rows[b]).view(y.shape[2:])

    want = reference.run([ids], [((place, 1), ablate)])[0][0]
    got = logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}@4=zero", f"L1.sae.f{b}@4=scale:0.5"))
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.abs(got - reference.run([ids])[0][0]).max() > 1e-3


@pytest.mark.parametrize("what, place", [("post", "resid_post"), ("mid", "resid_mid"), ("attn", "attn")])
def test_every_operation_at_every_position(engines, references, sources, what, place):
    engine, reference = engines["gpt2"], references["gpt2"]
    d, ids, other = loaded(engine, sources["gpt2", what]), ids_of(engine), ids_of(engine, CORRUPT)
    x, theirs = reference.read(ids, (place, 1))[0], reference.read(other, (place, 1))[0]
    (a, _), _ = firing(d, x, 4)
    f, g = d.encode(x)[:, a], d.encode(theirs)[:, a]
    row = d.rows([a])[0]
    base = reference.run([ids])[0][0]
    new = {"zero": 0 * f, "scale:-1.5": -1.5 * f, "set:2": 0 * f + 2, "add:3": f + 3, "patch": g, "freeze": f}
    put = "attn" if place == "resid_mid" else place  # Hugging Face adds what attention writes to the stream in front of ln2
    for op, values in new.items():
        if op == "patch" and len(ids) != len(other):
            continue

        def change(y, values=values):
            y += ((values - f)[:, None] * row)[None]

        want = reference.run([ids], [((put, 1), change)])[0][0]
        got = logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}={op}"))
        np.testing.assert_allclose(got, want, atol=2e-4, err_msg=op)
        if op == "freeze":
            np.testing.assert_allclose(got, base, atol=1e-5)
    prompts = (PROMPT,)
    mean = logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}=mean", prompt_set=prompts))
    patch = logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}=patch"))
    np.testing.assert_allclose(mean, patch, atol=1e-4)
    other_prompt = (replace(PROMPT, clean=PROMPT.clean, corrupt=CORRUPT, answers=(" John",)),)
    resample = logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}=resample", prompt_set=other_prompt))
    np.testing.assert_allclose(resample, patch, atol=1e-4)
    average = logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}=mean_all", prompt_set=prompts))
    want = reference.run([ids], [((put, 1), lambda y: y.add_(((g[1:].mean() - f)[:, None] * row)[None]))])[0][0]
    np.testing.assert_allclose(average, want, atol=2e-4)


def test_the_error_dropped(engines, references, sources):
    engine, reference = engines["gpt2"], references["gpt2"]
    d, ids = loaded(engine, sources["gpt2", "post"]), ids_of(engine)
    x = reference.read(ids, ("resid_post", 1))[0]
    (a, b), _ = firing(d, x, 4)
    f = d.encode(x)
    f[:, a] = 0
    f[4, b] = 7
    new = d.decode(f, x)

    def change(y):
        y[0, 1:] = new[1:]

    want = reference.run([ids], [(("resid_post", 1), change)])[0][0]
    study = do(STUDY, d.source, f"L1.sae.f{a}=zero", f"L1.sae.f{b}@4=set:7", sae_error=False)
    np.testing.assert_allclose(logits_now(engine, study), want, atol=1e-4)
    assert "error term dropped" in engine.run(Run(study)).convention
    kept, dropped = (engine.run(Run(replace(study, sae_error=e))).now.metric for e in (True, False))
    assert kept != dropped  # the cache tells them apart


@pytest.mark.parametrize("what", ["transcoder", "skip_transcoder", "normed", "mlp_in"])
def test_a_transcoders_feature_changes_what_the_mlp_writes(engines, references, sources, arch, what):
    engine, reference = engines[arch], references[arch]
    d, ids = loaded(engine, sources[arch, what]), ids_of(engine)
    x = engine.model.trace(ids, [d.point])[d.point][0]
    (a, _), f = firing(d, x, 4)

    def change(y):
        y[0, 4] -= f[a] * d.sae.W_dec[a]

    want = reference.run([ids], [(("mlp", 1), change)])[0][0]
    np.testing.assert_allclose(logits_now(engine, do(STUDY, d.source, f"L1.sae.f{a}@4=zero")), want, atol=1e-4)


def test_what_is_refused(engines, sources, tmp_path):
    engine = engines["gpt2"]
    good = sources["gpt2", "post"]
    for study, words in [
        (do(STUDY, good, "L0.sae.f1=zero"), "none of the study's SAEs is of layer 0"),
        (do(STUDY, good, "L1.sae.f9999=zero"), "features 0 to 63"),
        (do(STUDY, good, "L1.sae.f1@99=zero"), "position 99"),
        (do(STUDY, good, "L1.sae.f1=noise"), "a feature takes"),
        (do(STUDY, good, "L1.sae.f1=mean"), "prompt set"),
        (replace(do(STUDY, good, "L1.sae.f1=zero"), saes=(good, sources["gpt2", "mid"])), "both of layer 1"),
        (do(Study(replace(PROMPT, corrupt=None)), good, "L1.sae.f1=patch"), "corrupted"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.run(Run(study))
    for ask, words in [
        (Features(STUDY, good, order="size"), "not an order"),
        (Features(STUDY, good, k=0), "at least 1"),
        (Features(STUDY, good, which="then"), "not a run"),
        (Features(replace(STUDY, metric=Metric("rank")), good, order="attribution"), "no gradient"),
        (Feature(STUDY, good, 64), "features 0 to 63"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.run(ask)


# ------------------------------------------------------------------ seeing


@pytest.mark.parametrize("what", ["post", "mid", "attn", "mlp", "z", "transcoder"])
def test_rows_add_up_and_attribution_is_the_metrics_slope(engines, sources, arch, what):
    engine = engines[arch]
    if what == "mid" and engine.model.parallel:
        return
    source = sources[arch, what]
    found = engine.run(Features(STUDY, source, pos=-2, k=3, order="attribution"))
    d = loaded(engine, source)
    x, y = (engine.model.trace(ids_of(engine), [d.point, d.out])[n][0] for n in (d.point, d.out))
    f = d.encode(x)[found.pos].numpy()
    assert found.active == (f != 0).sum() and found.gap < 1e-4
    np.testing.assert_allclose(found.activation, f[found.index], atol=1e-5)
    size = max(1.0, abs(found.total[1]))
    assert found.attribution.sum() + found.rest[1] + found.bias[1] == pytest.approx(found.reconstruction[1], abs=1e-4 * size)
    assert found.reconstruction[1] + found.error[1] == pytest.approx(found.total[1], abs=1e-4 * size)
    assert found.total[0] == pytest.approx(d.flat(y)[found.pos].norm().item(), abs=1e-3)
    assert (np.diff(np.abs(found.attribution)) <= 1e-6).all()
    step = 0.02
    for i, slope in zip(found.index, found.attribution / found.activation):
        up, down = (engine.run(Run(do(STUDY, source, f"L1.sae.f{i}@-2=add:{s * step}"))).now.metric for s in (1, -1))
        assert (up - down) / (2 * step) == pytest.approx(slope, rel=0.05, abs=2e-3)
    if what == "z":
        return
    direct = engine.run(Features(STUDY, source, k=3, order="direct"))
    assert direct.direct.sum() + direct.rest[2] + direct.bias[2] + direct.error[2] == pytest.approx(direct.total[2], abs=1e-4)


def test_direct_effects_of_the_last_stream_are_the_logit(engines, sources, arch):
    engine = engines[arch]
    found = engine.run(Features(STUDY, sources[arch, "last"], k=1))
    logit = engine.run(Attribution(STUDY))
    assert found.total[2] + logit.cells.norm_bias + logit.cells.unembed_bias == pytest.approx(logit.logit, abs=1e-4)


def test_heads_z_direct_is_attentions(engines, sources, arch):
    engine = engines[arch]
    found, parts = engine.run(Features(STUDY, sources[arch, "z"], k=1)), engine.run(Attribution(STUDY))
    assert found.total[2] == pytest.approx(parts.cells.heads[1].sum(), abs=1e-4)


def test_attribution_stays_whole_under_a_features_intervention(engines, sources, arch):
    engine = engines[arch]
    for what in ("post", "attn", "mlp", "z", "transcoder"):
        d = loaded(engine, sources[arch, what])
        (a, _), _ = firing(d, engine.model.trace(ids_of(engine), [d.point])[d.point][0], -1)
        got = engine.run(Attribution(do(STUDY, d.source, f"L1.sae.f{a}=scale:3")))
        assert got.error < 1e-3, what


def test_a_feature_against_numpy(engines, references, sources, arch):
    engine, reference = engines[arch], references[arch]
    d, ids = loaded(engine, sources[arch, "post"]), ids_of(engine)
    x = reference.read(ids, ("resid_post", 1))[0]
    pos = 5
    (a, _), f = firing(d, x, pos)
    found = engine.run(Feature(STUDY, d.source, a, pos=pos, k=5))
    np.testing.assert_allclose(found.activation, d.encode(x)[:, a].numpy(), atol=1e-4)
    w_enc, w_dec = d.sae.W_enc.double().numpy(), d.sae.W_dec.double().numpy()
    pre = (x.double().numpy() - d.sae.b_dec.double().numpy()) @ w_enc[:, a] + d.sae.b_enc.double().numpy()[a]
    assert found.total == pytest.approx(pre[pos], abs=1e-4) and found.sources.sum() + found.rest == pytest.approx(found.total, abs=1e-4)
    assert found.heads.sum() == pytest.approx(found.sources.sum(), abs=1e-4)
    cosine = (w_dec @ w_dec[a]) / np.linalg.norm(w_dec, axis=1) / np.linalg.norm(w_dec[a])
    cosine[a] = -2
    assert found.cosine == pytest.approx(np.sort(cosine)[::-1][:5], abs=1e-5) and cosine[found.nearest] == pytest.approx(found.cosine, abs=1e-5)
    weight = reference.norm.weight.detach().double().numpy() + (arch == "gemma2")
    row = w_dec[a] - (w_dec[a].mean() if arch in ("gpt2", "neox", "zoo") else 0.0)
    logits = (row * weight) @ reference.unembed.T
    np.testing.assert_allclose(found.top_logits, np.sort(logits)[::-1][:5], atol=1e-4)
    np.testing.assert_allclose(found.bottom_logits, np.sort(logits)[:5], atol=1e-4)
    active = d.encode(x).numpy()[1:] > 0
    both, either = (active & active[:, [a]]).sum(0), (active | active[:, [a]]).sum(0)
    for i, j in zip(found.together, found.jaccard):
        assert j == pytest.approx(both[i] / either[i], abs=1e-6) and i != a


def test_sources_are_what_the_heads_write(engines, references, sources, arch):
    """The heads' part of the pre-activation from Hugging Face's own value projections: replacing W_O's input by one source's share changes it by that."""
    engine, reference = engines[arch], references[arch]
    d, ids = loaded(engine, sources[arch, "post"]), ids_of(engine)
    pos = 6
    (a, _), _ = firing(d, reference.read(ids, ("resid_post", 1))[0], pos)
    found = engine.run(Feature(STUDY, d.source, a, pos=pos))
    model, w = engine.model, d.sae.W_enc[:, a].double().numpy()
    patterns = reference.patterns([ids])
    for layer in (0, 1):
        z = reference.read(ids, ("z", layer))[0].double().numpy().reshape(len(ids), reference.heads, -1)
        out = model.bridge.blocks[layer].attn.W_O.double().numpy()
        for head in range(reference.heads):
            written = z[pos, head] @ out[head]
            if arch == "gemma2":
                norm = reference.blocks[layer].post_attention_layernorm
                o = np.einsum("he,hem->m", z[pos], out)
                written = written / np.sqrt((o**2).mean() + norm.eps) * (1 + norm.weight.detach().double().numpy())
            assert found.heads[layer, head] == pytest.approx(written @ w, abs=1e-4)
            assert patterns[layer][0, head, pos].sum() == pytest.approx(1, abs=1e-5)
    assert (found.heads[2:] == 0).all() and (found.sources[pos + 1 :] == 0).all()


@pytest.mark.parametrize("what", ["attn", "z"])
def test_attention_is_its_sources_and_constants(engines, sources, arch, what):
    engine = engines[arch]
    d = loaded(engine, sources[arch, what])
    x = d.flat(engine.model.trace(ids_of(engine), [d.point])[d.point][0])
    (a, _), _ = firing(d, x, 6)
    found = engine.run(Feature(STUDY, d.source, a, pos=6))
    w, constant = d.reader(a, x[6])
    attn = engine.model.bridge.blocks[1].attn
    if what == "attn" and arch != "gemma2" and attn.b_O is not None:
        constant += (attn.b_O @ w).item()
    assert found.rest == pytest.approx(constant, abs=1e-4) and found.total == pytest.approx((x[6] @ w).item() + d.reader(a, x[6])[1], abs=1e-4)


def test_under_the_centred_view(engines, sources, tmp_path):
    engine = engines["gpt2"]
    source = save(
        build("standard", "blocks.1.hook_resid_post", 32, metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}}), tmp_path / "c"
    )
    found = engine.run(Features(STUDY, source, k=4))
    d = loaded(engine, source)
    x = engine.model.trace(ids_of(engine), [d.point])[d.point][0]
    from sae_lens import SAE

    f = SAE.load_from_disk(source).encode(x - x.mean(-1, keepdim=True))[found.pos].detach().numpy()
    np.testing.assert_allclose(found.activation, f[found.index], atol=1e-5)
    assert found.info.view == "centred" and found.gap < 1e-4
    one = engine.run(Feature(STUDY, source, int(found.index[0]), pos=found.pos))
    assert one.total == pytest.approx(f[found.index[0]], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["post", "mid", "attn", "z", "transcoder"])
def test_identities(engines, sources, arch, what):
    if what == "mid" and engines[arch].model.parallel:
        return
    study = replace(STUDY, saes=(sources[arch, what],))
    rows = engines[arch].run(Identities(study)).rows[-2:]
    assert all(r.ok and study.saes[0] in r.name for r in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["saes", "preflight SAE", "features SAE", "feature SAE --index 3", "feature-graph --up SAE --target -1", "sweep --kind features --op zero --node L2.sae"],
)
@pytest.mark.parametrize("json", [False, True])
def test_commands(capsys, command, json):
    from engine import main

    sae = "zoo/L2.resid_post"
    study = [] if command == "saes" else ["--answer", " Mary", "--foil", " John", "--sae", sae]
    args = [*command.replace("SAE", sae).split(), *study, *["--json"] * json]
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert sae in out and not err
    if json:
        from json import loads

        loads(out)
    assert main([*args[:1], "--model", "/nowhere"] if command == "saes" else [a.replace("L2.resid_post", "L9.resid_post") for a in args]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_labels(engines, sources, monkeypatch):
    import io
    import json

    from techniques.features import reading as features

    known = saes.labels("zoo/L2.resid_post")
    index = next(iter(known))
    found = engines["zoo"].run(Feature(STUDY, "zoo/L2.resid_post", index))
    assert found.label == known[index] and found.info.source == "zoo/L2.resid_post"
    many = engines["zoo"].run(Features(STUDY, "zoo/L2.resid_post", k=700))
    assert many.labels and all(many.labels[i] == known[i] and i in many.index for i in many.labels)
    assert features.neuronpedia("gpt2-small/8-res-jb", 5) == ""  # off
    monkeypatch.setattr(features, "settings", lambda: {"LOUPE_NEURONPEDIA": "1"})
    reply = {"explanations": [{"description": "the word cat"}]}
    monkeypatch.setattr(features.urllib.request, "urlopen", lambda url, timeout: io.BytesIO(json.dumps(reply).encode()))
    assert features.neuronpedia("gpt2-small/8-res-jb", 5) == "the word cat"
    for bad in (b"<html>", b"[]", b'{"explanations": [{}]}'):
        monkeypatch.setattr(features.urllib.request, "urlopen", lambda url, timeout, bad=bad: io.BytesIO(bad))
        assert features.neuronpedia("gpt2-small/8-res-jb", 5) == ""


# ------------------------------------------------------------------ sweeping


@pytest.mark.slow
@pytest.mark.parametrize("what", ["post", "mid", "attn", "mlp", "transcoder"])
@pytest.mark.parametrize("op", ["zero", "patch"])
def test_a_sweep_over_features_is_one_intervention_a_cell(engines, sources, arch, what, op):
    engine = engines[arch]
    if what == "mid" and engine.model.parallel:
        return
    study = replace(STUDY, saes=(sources[arch, what],), base="corrupt" if op == "patch" else "clean", prompt=replace(PROMPT, corrupt=SAME))
    found = engine.run(Sweep(study, "features", op, node="L1.sae", k=3))
    assert found.rows and all(r.startswith("L1.sae.f") for r in found.rows) and found.values.shape == (len(found.rows), len(found.tokens.ids))
    assert not np.isnan(found.values).any() and found.address(1, 4) == f"{found.rows[1]}@4"
    differ = next(i for i, (a, b) in enumerate(zip(ids_of(engine), ids_of(engine, SAME))) if a != b)
    for r, c in ((0, -1), (1, differ), (2, differ + 1), (0, 2)):
        c %= found.values.shape[1]
        now = engine.run(Run(replace(study, interventions=(parse_intervention(f"{found.rows[r]}@{c}={op}"),)))).now.metric
        assert found.values[r, c] == pytest.approx(now, abs=2e-4)
    one = engine.run(Sweep(study, "features", op, nodes=(found.rows[2], found.rows[0])))
    np.testing.assert_allclose(one.values, found.values[[2, 0]], atol=1e-4)


SAME = PROMPT.clean.replace("John gave", "Mary gave")


def test_features_that_can_not_be_swept(engines, sources):
    engine = engines["gpt2"]
    study = replace(STUDY, saes=(sources["gpt2", "post"],))
    for ask, words in [
        (Sweep(study, "features", "zero"), "needs one SAE"),
        (Sweep(study, "features", "zero", node="L0.sae"), "of layer 0"),
        (Sweep(study, "features", "noise", node="L1.sae"), "zero or patch"),
        (Sweep(study, "features", "zero", nodes=("L1H0",)), "needs one SAE"),
        (Sweep(study, "features", "zero", nodes=("L1.sae.f999",)), "features 0 to"),
        (Sweep(replace(study, saes=(sources["gpt2", "z"],)), "features", "zero", node="L1.sae"), "swept where"),
        (Sweep(STUDY, "features", "zero", node="L1.sae"), "no SAE is chosen"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.run(ask)


def test_gradients_are_kept_apart(engines, sources):
    """The same run, other metrics, positions and answers: each has its own gradient."""
    engine = engines["gpt2"]
    source, study = sources["gpt2", "early"], replace(STUDY, metric=Metric("kl"), base="corrupt", prompt=replace(PROMPT, corrupt=SAME))
    studies = [
        STUDY,
        replace(STUDY, metric=Metric("logprob")),
        replace(STUDY, metric=Metric("logit_diff", -3)),
        replace(STUDY, prompt=replace(PROMPT, foils=(" Mary",), answers=(" John",))),
    ]
    found = [engine.run(Features(s, source, pos=3, order="attribution")).total[1] for s in (*studies, study, *studies, study)]
    assert found[:5] == found[5:] and len(set(found)) == 5 and found[3] == pytest.approx(-found[0], abs=1e-5)


# ------------------------------------------------------------------ in circuits


@pytest.mark.slow
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("rest", ["zero", "patch"])
def test_a_circuit_of_features_by_hooks(engines, references, sources, arch, rest, kept):
    """Only some features left: what the SAE writes, by hand; one feature away: the intervention, but for position 0."""
    engine, reference = engines[arch], references[arch]
    d, ids, other = loaded(engine, sources[arch, "post"]), ids_of(engine), ids_of(engine, PROMPT.corrupt)
    x, theirs = (reference.read(i, ("resid_post", 1))[0] for i in (ids, other))
    f = d.encode(x)
    some = f[4].argsort(descending=True)[:3].tolist()
    alone = (d.encode(theirs) if rest == "patch" else t.zeros_like(f)).clone()
    alone[:, some] = f[:, some]

    def put(y):
        change = (alone - f) @ d.sae.W_dec if kept else d.decode(alone, x) - x
        y[0, 1:] += change[1:]

    def away(y):
        new = d.encode(theirs) if rest == "patch" else t.zeros_like(f)
        y[0, 1:] += ((new - f)[:, some[0], None] * d.sae.W_dec[some[0]])[1:]

    answer, foil = (engine.model.answer(PROMPT.clean, a).ids[0] for a in (PROMPT.answers[0], PROMPT.foils[0]))
    metric = lambda edits: (lambda row: row[answer] - row[foil])(reference.run([ids], edits)[0][0][-1])  # noqa: E731
    nodes = tuple(f"L1.sae.f{i}" for i in some)
    study = replace(STUDY, saes=(d.source,), sae_error=kept)
    r = engine.run(Score(study, Circuit("c", "", nodes), ("faithfulness", "effects", "completeness", "minimality"), rest))
    assert r.model.mean == pytest.approx(metric([]), abs=1e-4)
    assert r.alone.mean == pytest.approx(metric([(("resid_post", 1), put)]), abs=1e-4)
    assert r.effects[0] == pytest.approx(metric([(("resid_post", 1), away)]) - r.model.mean, abs=1e-4)
    assert ("kept" if kept else "dropped") in r.convention and "position 0" in r.convention and "heads, MLPs" in r.convention
    at = engine.run(Score(study, Circuit("c", "", tuple(f"{nodes[0]}@{p}" for p in range(1, len(ids)))), rest=rest)).alone.mean
    assert at == pytest.approx(engine.run(Score(study, Circuit("c", "", nodes[:1]), rest=rest)).alone.mean, abs=1e-4)


@pytest.mark.parametrize("what", ["post", "mid", "z", "mlp", "attn", "transcoder"])
def test_all_features_are_the_model(engines, sources, what):
    """Every feature kept, with the error term: faithfulness 1. Beside all heads too. Without it, less."""
    engine = engines["zoo" if what == "z" else "gpt2"]
    d = loaded(engine, sources["zoo" if what == "z" else "gpt2", what])
    info, study = engine.model.info, replace(STUDY, saes=(d.source,))
    features = tuple(f"L1.sae.f{i}" for i in range(d.d_sae))
    whole = engine.run(Score(study, Circuit("c", "", features), rest="zero"))
    assert whole.faithfulness.mean == pytest.approx(1, abs=1e-4) and whole.alone.mean == pytest.approx(whole.model.mean, abs=1e-4)
    heads = tuple(f"L{n}H{h}" for n in range(info.n_layers) for h in range(info.n_heads))
    both = engine.run(Score(study, Circuit("c", "", (*heads, *features)), rest="patch"))
    assert both.alone.mean == pytest.approx(whole.model.mean, abs=1e-4)
    assert both.empty.mean != pytest.approx(whole.model.mean, abs=1e-3)
    dropped = engine.run(Score(replace(study, sae_error=False), Circuit("c", "", features), rest="zero"))
    assert (abs(dropped.alone.mean - whole.model.mean) > 1e-4) == (what != "transcoder"), "which is fitted without error"


def test_means_of_features_in_a_circuit(engines, sources):
    """The rest at its mean over the set's corrupted prompts, by numpy; edges and features do not mix."""
    zoo = engines["zoo"]
    d = loaded(zoo, sources["zoo", "early"])
    prompts = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:4]
    study = Study(prompts[0], prompt_set=prompts, saes=(d.source,))
    acts = [zoo.model.trace(zoo.model.row(p.corrupt, None).ids, [d.point])[d.point][0] for p in prompts]
    want = {"mean": t.stack([d.encode(x) for x in acts]).mean(0), "mean_all": t.stack([d.encode(x[1:]).mean(0) for x in acts]).mean(0)}
    for rest, mean in want.items():
        found = []
        for p in prompts:
            ids = zoo.model.row(p.clean, None).ids
            x = zoo.model.trace(ids, [d.point])[d.point][0]
            new = mean.expand(len(ids), -1).clone()
            new[:, 3] = d.encode(x)[:, 3]
            change = (new - d.encode(x)) @ d.sae.W_dec
            change[0] = 0
            logits = zoo.model.forward(t.tensor([ids]), edits=[(d.out, lambda y, c=change: y + c)], keep=1)[0][0, -1]
            a, b = (zoo.model.answer(p.clean, w).ids[0] for w in (p.answers[0], p.foils[0]))
            found.append(float(logits[a] - logits[b]))
        r = zoo.run(Score(study, Circuit("c", "", ("L0.sae.f3",)), rest=rest))
        np.testing.assert_allclose(r.alone.values, found, atol=1e-4)
    with pytest.raises(UserError, match="features have none"):
        zoo.run(Score(study, Circuit("c", "", ("L0H1", "L0.sae.f3"), ("L0H1->L1H1.k",))))
    with pytest.raises(UserError, match="has features 0 to"):
        zoo.run(Score(study, Circuit("c", "", ("L0.sae.f99999",))))
    with pytest.raises(UserError, match="SAE"):
        zoo.run(Score(replace(study, saes=()), Circuit("c", "", ("L0.sae.f3",))))


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["zero", "patch"])
def test_scores_of_all_features_add_up(engines, sources, arch, rest):
    """Gradients integrated along the replacement: the scores' sum is what replacing all of them does to the metric."""
    engine = engines[arch]
    d = loaded(engine, sources[arch, "post"])
    study = replace(STUDY, saes=(d.source,))
    found = engine.run(Discover(study, "features", nodes=5, steps=300 if rest == "zero" else 60, rest=rest))
    r = engine.run(Score(study, Circuit("c", "", found.edges[:1]), rest=rest))
    assert abs(r.empty.mean - r.model.mean) > 1e-2
    assert float(found.scores.sum()) == pytest.approx(r.empty.mean - r.model.mean, rel=0.03, abs=1e-3)
    assert len(found.circuit.nodes) == 5 and set(found.circuit.nodes) == set(found.edges[:5])
    checked = engine.run(Score(study, found.circuit, rest=rest)).faithfulness.mean
    assert found.score == pytest.approx(checked, abs=1e-4) == pytest.approx(float(found.faithfulness[-1]), abs=1e-4)


def test_a_circuit_of_features_on_the_zoo(engines):
    """Of 768 features in layer 2, thirty carry the IOI task."""
    prompts = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:8]
    study = Study(prompts[0], prompt_set=prompts, saes=("zoo/L2.resid_post",))
    found = engines["zoo"].run(Discover(study, "features", nodes=30))
    assert found.score > 0.85 and (np.diff(found.counts) > 0).all() and "error term kept" in found.convention
    few = engines["zoo"].run(Discover(study, "features", nodes=3))
    assert few.circuit.nodes != found.circuit.nodes and few.score == pytest.approx(float(found.faithfulness[found.counts.tolist().index(3)]), abs=1e-4)
    dry = engines["zoo"].run(Discover(study, "features", dry=True))
    assert dry.expected > 0 and not dry.circuit.nodes
    for ask, words in ((replace(study, saes=()), "load one first"), (replace(study, metric=Metric("rank")), "gives no score")):
        with pytest.raises(UserError, match=words):
            engines["zoo"].run(Discover(ask, "features"))
