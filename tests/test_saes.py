"""Loading SAEs of every architecture, the catalogue without a network, and everything that is refused."""

import json
import math
import sys

import numpy as np
import pytest
import torch as t
from conftest import PROMPT
from dictionaries import KINDS, build, save

from model import sae as saes
from model.sae_catalogue import catalogue, guess_hook, guess_width, trained_on
from model.sae_loading import load
from techniques.features.requests import Feature, Features, Preflight, Saes
from techniques.output.requests import Run
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study

STUDY = Study(PROMPT)


def activations(engine, *names):
    model = engine.model
    return model.trace(model.row(PROMPT.clean, None, PROMPT.labels).ids, names)


def loaded(engine, source):
    steps = load(engine.model, source)
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def make(engine, kind, folder, seed=0, hook=None, **more):
    """An SAE at resid_post of layer 1, or a transcoder of layer 1's MLP."""
    width = engine.model.info.d_model
    if "transcoder" not in kind:
        return save(build(kind, hook or "blocks.1.hook_resid_post", width, seed=seed, **more), folder)
    acts = activations(engine, "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out")
    pairs = tuple(acts[n][0].float().cpu() for n in ("blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"))
    return save(build(kind, hook or "blocks.1.mlp.hook_in", width, width, seed, pairs, **more), folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_what_save_model_writes_is_read_and_encodes_as_sae_lens_does(engines, kind, norm, tmp_path):
    engine = engines["gpt2"]
    source = make(engine, kind, tmp_path / "sae", normalize_activations=norm)
    d = loaded(engine, source)
    from sae_lens import SAE

    theirs = SAE.load_from_disk(source)
    x = activations(engine, d.point)[d.point][0]
    with t.no_grad():
        f = theirs.encode(x)
        want = theirs.decode(f) + (x @ theirs.W_skip.T if "skip" in kind else 0.0)
        if "transcoder" not in kind and norm == "none":
            np.testing.assert_allclose(theirs(x).numpy(), want.numpy(), atol=1e-6)
        np.testing.assert_allclose(d.encode(x).numpy(), f.numpy(), atol=1e-5)
        if not ("skip" in kind and norm != "none"):
            np.testing.assert_allclose(d.decode(f, x).numpy(), want.numpy(), atol=1e-4)
    where, index, value = d.active(x)
    dense = np.zeros(f.shape, np.float32)
    dense[where, index] = value
    np.testing.assert_allclose(dense, f.numpy(), atol=1e-5)
    info = d.info
    assert (info.architecture, info.d_in, info.d_sae, info.layer) == (kind, d.d_in, d.d_sae, 1) and info.normalisation == norm
    assert info.bytes == sum(p.nbytes for p in theirs.parameters())


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka_batchtopk", "topk", "jumprelu", "gated", "standard"])
def test_what_training_writes_is_read(engines, kind, tmp_path):
    engine = engines["gpt2"]
    loaded(engine, make(engine, "standard", tmp_path / "first"))  # imports sae_lens
    from sae_lens import SAE, TrainingSAE
    from sae_lens.registry import get_sae_training_class

    cfg = get_sae_training_class(kind)[1](
        d_in=32, d_sae=48, **({"k": 8} if "topk" in kind else {}), **({"matryoshka_widths": [16]} if "matryoshka" in kind else {})
    )
    sae = TrainingSAE.from_dict(cfg.to_dict())
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    sae.save_inference_model(tmp_path / "sae")
    d, theirs = loaded(engine, str(tmp_path / "sae")), SAE.load_from_disk(tmp_path / "sae")
    x = activations(engine, d.point)[d.point][0]
    np.testing.assert_allclose(d.reconstruct(x).numpy(), theirs(x).detach().numpy(), atol=1e-4)
    np.testing.assert_allclose(d.rows([3, 5]).numpy() @ np.ones(32), (d.decode(t.eye(48)[[3, 5]], x[:2]) - d.offset(x[:2])).sum(-1).numpy(), atol=1e-4)


def test_a_temporal_sae_reads_the_whole_sequence(engines, tmp_path):
    engine = engines["gpt2"]
    loaded(engine, make(engine, "standard", tmp_path / "first"))
    from sae_lens import SAE

    t.manual_seed(0)
    cfg = {
        "architecture": "temporal",
        "d_in": 32,
        "d_sae": 64,
        "n_heads": 2,
        "bottleneck_factor": 4,
        "kval_topk": 5,
        "metadata": {"hook_name": "blocks.1.hook_resid_pre"},
    }
    d = loaded(engine, save(SAE.from_dict(cfg), tmp_path / "sae"))
    x = activations(engine, d.point)[d.point]
    want, f = d.sae(x)[0], d.sae.encode(x)[0]
    np.testing.assert_allclose(d.reconstruct(x[0]).numpy(), want.numpy(), atol=1e-4)
    where, index, value = d.active(x[0])
    assert (f[where, index] == value).all() and len(where) == (f != 0).sum()
    i, v, whole, offset, scale = d.at(x[0], 5)
    np.testing.assert_allclose((v @ d.rows(i) * scale + offset).numpy(), want[5].numpy(), atol=1e-4)
    np.testing.assert_allclose(whole.numpy(), want[5].numpy(), atol=1e-4)


def test_encoding_equals_numpy(engines, tmp_path):
    engine = engines["zoo"]
    d = loaded(engine, make(engine, "jumprelu", tmp_path / "sae"))
    x = activations(engine, d.point)[d.point][0].double().numpy()
    w = {n: p.detach().double().numpy() for n, p in d.sae.named_parameters()}
    pre = (x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]
    f = np.maximum(pre, 0) * (pre > w["threshold"])
    np.testing.assert_allclose(d.reconstruct(t.tensor(x)).numpy(), f @ w["W_dec"] + w["b_dec"], atol=1e-4)
    direction, constant = d.reader(3, t.tensor(x[2], dtype=t.float32))
    assert x[2] @ direction.double().numpy() + constant == pytest.approx(pre[2, 3], abs=1e-5)


@pytest.mark.parametrize("norm", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("view", ["raw", "centred"])
@pytest.mark.parametrize("kind", ["standard", "gated", "topk"])
def test_a_features_pre_activation_as_a_direction(engines, kind, norm, view, tmp_path):
    engine = engines["gpt2"]
    more = {"rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    d = loaded(engine, make(engine, kind, tmp_path / "sae", normalize_activations=norm, **more))
    d.view = view
    x = activations(engine, d.point)[d.point][0]
    f = d.encode(x)
    for index in f[3].nonzero()[:4, 0].tolist():
        w, constant = d.reader(index, x[3])
        assert (x[3] @ w).item() + constant == pytest.approx(f[3, index].item(), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "hook", ["hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_z", "ln2.hook_normalized", "mlp.hook_post"]
)
def test_hook_points(engine, hook, tmp_path):
    info = engine.model.info
    width = info.n_heads * info.d_head if hook.endswith("hook_z") else info.d_mlp if hook.endswith("hook_post") else info.d_model
    source = save(build("standard", f"blocks.1.{hook}", width), tmp_path / "sae")
    if info.parallel and hook in ("hook_resid_mid",):
        with pytest.raises(UserError, match="no such point"):
            loaded(engine, source)
        return
    if f"blocks.1.{hook}" not in engine.model.points:
        return
    found = engine.run(Preflight(STUDY, source))
    assert found.verdict == "good" and found.cosine > 0.95 and found.unexplained < 0.2 and math.isfinite(found.loss_spliced)
    shown = engine.run(Features(STUDY, source, order="attribution"))
    assert shown.gap < 1e-4 and (math.isnan(shown.direct[0]) == hook.endswith(("normalized", "hook_post")))
    assert abs(found.loss_spliced - found.loss) < abs(found.loss_zero - found.loss) + 0.5


def test_the_catalogue_needs_neither_network_nor_sae_lens(engines):
    model, before = engines["gpt2"].model, "sae_lens" in sys.modules
    none = catalogue(engines["zoo"].model)
    assert all(c.where in ("zoo", "folder") for c in none.choices)
    named = catalogue(model).choices  # its folder is called gpt2
    assert ("sae_lens" in sys.modules) == before
    some = {c.source: c for c in named}
    jb = some["gpt2-small-res-jb:blocks.8.hook_resid_pre"]
    assert (jb.l0, jb.explained, jb.hook, jb.neuronpedia, jb.where) == (60.0, 0.9, "blocks.8.hook_resid_pre", "gpt2-small/8-res-jb", "hub")
    assert all(c.model == "gpt2-small" for c in named if c.where in ("hub", "cache")) and len(named) > 100
    every = catalogue(model, True).choices
    assert len(every) > 13_000
    pick = {c.source: c for c in every}
    scope = pick["gemma-scope-2b-pt-res:layer_5/width_16k/average_l0_34"]
    assert (scope.width, scope.hook, scope.l0) == (16384, "blocks.5.hook_resid_post", 34)
    assert pick["gemma-scope-2b-pt-transcoders:layer_0/width_16k/average_l0_76"].note == "transcoder"
    assert isinstance(engines["zoo"].run(Saes()).choices, tuple)


@pytest.mark.parametrize(
    "release, ident, hook, width",
    [
        ("gpt2-small-res-jb-feature-splitting", "blocks.8.hook_resid_pre_12288", "blocks.8.hook_resid_pre", 12288),
        ("gpt2-small-hook-z-kk", "blocks.6.hook_z", "blocks.6.attn.hook_z", 0),
        ("gpt2-small-resid-mid-v5-32k", "blocks.6.hook_resid_mid", "blocks.6.hook_resid_mid", 32768),
        ("gemma-scope-2-270m-pt-att-all", "layer_1_width_16k_l0_big", "blocks.1.attn.hook_z", 16384),
        ("gemma-scope-2b-pt-res", "layer_12/width_262k/average_l0_121", "blocks.12.hook_resid_post", 262144),
        ("gemma-scope-9b-pt-mlp", "layer_27/width_131k/average_l0_487", "blocks.27.hook_mlp_out", 131072),
        ("gemma-scope-2b-pt-res", "layer_5/width_1m/average_l0_9", "blocks.5.hook_resid_post", 1048576),
        ("qwen-scope-3.5-27b-w80k-l50", "layer32", "blocks.32.hook_resid_post", 81920),
        ("sae_bench_gemma-2-2b_topk_width-2pow12_date-1109", "blocks.19.hook_resid_post__trainer_3", "blocks.19.hook_resid_post", 4096),
        ("pythia-70m-deduped-att-sm", "blocks.3.hook_attn_out", "blocks.3.hook_attn_out", 0),
        ("llama_scope_lxm_8x", "l16m_8x", "blocks.16.hook_mlp_out", 0),
    ],
)
def test_what_names_say(release, ident, hook, width):
    assert guess_hook(release, ident, "") == hook and guess_width(release, ident) == width


def test_models_names():
    assert trained_on("openai-community/gpt2") == trained_on("gpt2-small") != trained_on("gpt2-medium")
    assert trained_on("EleutherAI/pythia-70m-deduped") == trained_on("pythia-70m-deduped") != trained_on("pythia-70m")
    assert trained_on("google/gemma-2-2b-it") == trained_on("gemma-2-2b") != trained_on("gemma-2-9b")


def test_what_is_refused_in_one_line(engines, tmp_path):
    engine = engines["gpt2"]
    good = make(engine, "standard", tmp_path / "good")

    def broken(name, change=None, weights=None, metadata=None, **cfg):
        folder = tmp_path / name
        make(engine, "standard", folder)
        old = json.loads((folder / "cfg.json").read_text())
        old["metadata"] |= metadata or {}
        (folder / "cfg.json").write_text(change if change is not None else json.dumps(old | cfg))
        if weights is not None:
            data = (folder / "sae_weights.safetensors").read_bytes()
            (folder / "sae_weights.safetensors").write_bytes(weights(data))
        return str(folder)

    wide = save(build("standard", "blocks.1.hook_resid_post", 48), tmp_path / "wide")
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "cfg.json").write_text((tmp_path / "good" / "cfg.json").read_text())
    for source, words in [
        ("", "no SAE is named"),
        (str(tmp_path / "nowhere"), "no folder"),
        (str(empty), "no cfg.json"),
        (str(bare), "no sae_weights"),
        ("zoo/nothing", "the zoo has no SAE"),
        (wide, "48 wide"),
        (broken("json", "{"), "can't be read"),
        (broken("list", "[]"), "JSON object"),
        (broken("cut", weights=lambda b: b[:200]), "truncated"),
        (broken("nothing", weights=lambda b: b""), "truncated"),
        (broken("kind", architecture="nonsense"), "can't be loaded"),
        (broken("shape", d_sae=5), "can't be loaded|fit"),
        (broken("layer", metadata={"hook_name": "blocks.7.hook_resid_post"}), "layer 7"),
        (broken("hook", metadata={"hook_name": "blocks.1.hook_nonsense"}), "no such point"),
        (broken("query", metadata={"hook_name": "blocks.1.attn.hook_q"}), "can be used at"),
        (broken("hf", metadata={"hook_name": "transformer.h.1"}), "TransformerLens"),
        (broken("nohook", metadata={"hook_name": None}), "names no hook"),
        (broken("head", metadata={"hook_head_index": 3}), "one head"),
        (broken("other", metadata={"model_name": "gemma-2-2b"}), "trained on gemma-2-2b"),
        (broken("hash", metadata={"unembed_hash": "00"}), "other weights"),
        ("gemma-scope-2b-pt-res:layer_5/width_16k/average_l0_34", "trained on gemma-2-2b"),
        ("gpt2-small-res-jb:blocks.99.hook_resid_pre", "has no SAE"),
        ("gpt9-res-jb:blocks.8.hook_resid_pre", "no release"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            loaded(engine, source)
        assert "\n" not in str(error.value)
    assert loaded(engine, good) is loaded(engine, good)
    first = loaded(engine, good)
    make(engine, "topk", tmp_path / "good")
    assert loaded(engine, good) is not first and loaded(engine, good).kind == "topk"


@pytest.mark.slow
def test_a_release_without_a_network_is_a_line_and_quick(engines, monkeypatch):
    import huggingface_hub

    def nothing(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", nothing)
    with pytest.raises(UserError, match="no network"):
        loaded(engines["gpt2"], "gpt2-small-res-jb:blocks.8.hook_resid_pre")
    assert huggingface_hub.constants.HF_HUB_OFFLINE in (False, True)


def test_preflight_refuses_and_says_why(engines, tmp_path):
    engine = engines["gpt2"]

    def verdict(source, view="auto"):
        return engine.run(Preflight(STUDY, source, view))

    good = verdict(make(engine, "standard", tmp_path / "good"))
    assert good.verdict == "good" and good.cause == "" and set(good.cosines) == {"raw", "centred"} and good.info.view == "raw"
    wrong = save(build("standard", "blocks.1.hook_resid_post", 32), tmp_path / "random")
    from sae_lens import SAE

    sae = SAE.load_from_disk(wrong)
    sae.W_dec.data = t.randn(sae.W_dec.shape, generator=t.Generator().manual_seed(1))
    sae.save_model(wrong)
    bad = verdict(wrong)
    assert bad.verdict == "refuse" and bad.cosine < 0.8 and bad.cause
    with pytest.raises(UserError, match="does not explain"):
        engine.run(Features(STUDY, wrong))
    with pytest.raises(UserError, match="not a view"):
        verdict(str(tmp_path / "good"), "sideways")
    centred = make(engine, "standard", tmp_path / "centred", metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    assert verdict(centred).info.view == "centred" and verdict(centred, "raw").info.view == "raw"


@pytest.mark.slow
def test_memory_of_16k_features_on_a_model_as_wide_as_gpt2(tmp_path):
    """The weights and what fires: no dense [seq, d_sae] beyond CHUNK_BYTES on the way, and nothing left behind."""
    import gc

    import transformers as tr
    from conftest import tokenizer
    from torch.utils._python_dispatch import TorchDispatchMode

    from engine import Engine

    tok = tokenizer(True)
    hf = tr.AutoModelForCausalLM.from_config(tr.GPT2Config(vocab_size=len(tok), n_embd=768, n_layer=1, n_head=12, bos_token_id=0, eos_token_id=1))
    hf.save_pretrained(tmp_path / "model")
    tok.save_pretrained(tmp_path / "model")
    del hf
    engine = Engine(str(tmp_path / "model"))
    small = build("gated", "blocks.0.hook_resid_post", 768)
    from sae_lens import SAE

    big = SAE.from_dict(small.cfg.to_dict() | {"d_sae": 16384})
    with t.no_grad():
        for name, p in big.named_parameters():
            old = dict(small.named_parameters())[name]
            p.fill_(-9.0 if name in ("b_gate", "b_mag") else 0.0)
            (p[:, :1536] if name == "W_enc" else p[: len(old)]).copy_(old)
    weights = sum(p.nbytes for p in big.parameters())
    source = save(big, tmp_path / "big")
    del big, small, p, old

    def live() -> int:
        gc.collect()
        some = [x for x in gc.get_objects() if isinstance(x, t.Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in some}.values())

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, t.Tensor) and x.untyped_storage().data_ptr() not in own:
                    largest = max(largest, x.nbytes)
            return out

    study = Study(Prompt(PROMPT.clean * 8, None, PROMPT.answers, PROMPT.foils))
    engine.run(Run(study))
    before = live()
    engine.run(Preflight(study, source))
    d = loaded(engine, source)
    own = {p.untyped_storage().data_ptr() for p in d.sae.parameters()}
    assert d.info.bytes == weights == 16384 * (2 * 768 + 3) * 4 + 768 * 4
    with Watch():
        found = engine.run(Features(study, source, order="attribution"))
        engine.run(Feature(study, source, int(found.index[0])))
        d.reconstruct(t.randn(2000, 768))
    assert largest <= saes.CHUNK_BYTES and 0 < found.active <= 1536
    seq = len(found.tokens.ids)
    assert live() - before <= weights + 40 * seq * 768 * 4, "more than its weights and some activations in the cache"


def test_weights_that_are_not_numbers(engines, tmp_path):
    bad = build("standard", "blocks.1.hook_resid_post", 32)
    with t.no_grad():
        bad.W_dec[3, 4] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        loaded(engines["gpt2"], save(bad, tmp_path / "sae"))


def test_what_the_hub_cache_holds_is_marked(engines, tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--jbloom--GPT2-Small-SAEs-Reformatted" / "snapshots" / "abc" / "blocks.8.hook_resid_pre"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text("{}")
    cached = [c.source for c in catalogue(engines["gpt2"].model).choices if c.where == "cache"]
    assert "gpt2-small-res-jb:blocks.8.hook_resid_pre" in cached and not any("hook_resid_pre" in c and ".8." not in c for c in cached)
