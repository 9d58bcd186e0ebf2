"""Tuned lenses: published artefacts by hand, a fit, its resume; Jacobian lenses against TransformerLens's own read-out."""

import hashlib
import json

import numpy as np
import pytest
import torch as t
from conftest import PROMPT
from reference import log_softmax
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

from techniques.lens import translators as tuned
from techniques.lens.requests import FitJacobian, Lens, TuneLens
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study

TOL = 1e-4


def artefact(folder, model, change=lambda state, config: None, weight=0.2):
    """A folder as the tuned-lens package saves it: params.pt of its layer translators and config.json."""
    folder.mkdir()
    i, rng = model.info, t.Generator().manual_seed(1)
    state = {}
    for layer in range(i.n_layers):
        state[f"{layer}.weight"] = weight * t.randn(i.d_model, i.d_model, generator=rng)
        state[f"{layer}.bias"] = weight * t.randn(i.d_model, generator=rng)
    printed = np.array_str(model.bridge.original_model.get_output_embeddings().weight.detach().numpy(), precision=1)
    config = {
        "base_model_name_or_path": "someone/else",
        "d_model": i.d_model,
        "num_hidden_layers": i.n_layers,
        "bias": True,
        "base_model_revision": None,
        "unembed_hash": hashlib.sha256(printed.encode()).hexdigest(),
        "lens_type": "linear_tuned_lens",
    }
    change(state, config)
    t.save(state, folder / "params.pt")
    (folder / "config.json").write_text(json.dumps(config))
    return state


def test_published_format(engine, reference, tmp_path):
    """Translator i acts on the stream before block i (hidden_states[i] of the package); the last block's output is read as it is."""
    state = artefact(tmp_path / "lens", engine.model)
    got = engine.run(Lens(Study(PROMPT), kind="tuned", artefact=str(tmp_path / "lens"), k=3))
    n = engine.model.info.n_layers
    assert got.kind == "tuned" and got.convention.startswith("tuned lens · final norm recomputed")
    assert got.points == ("L0.resid_pre", *(f"L{i}.resid_post" for i in range(n)))
    spots = [("resid_pre", i) for i in range(n)]
    logits, acts = reference.run([got.tokens.ids], read=[*spots, ("resid_post", n - 1)])
    final = log_softmax(logits[0].astype(np.float64))
    for i, spot in enumerate([*spots, ("resid_post", n - 1)]):
        h = acts[spot][0].double()
        h = h if i == n else h + h @ state[f"{i}.weight"].double().T + state[f"{i}.bias"].double()
        logp = log_softmax(reference.logits(h.float()[None])[0])
        np.testing.assert_allclose(got.kl[i], (np.exp(final) * (final - logp)).sum(-1), atol=TOL)
        np.testing.assert_allclose(got.top_probs[i], -np.sort(-np.exp(logp), -1)[:, :3], atol=TOL)
    assert got.kl[-1].max() < 1e-5


def test_identity_is_the_logit_lens(engines, tmp_path):
    engine = engines["gemma2"]
    artefact(tmp_path / "lens", engine.model, weight=0.0)
    points = ("L0.resid_pre", "L1.resid_post", "L2.resid_pre", "L2.resid_post")
    one = engine.run(Lens(Study(PROMPT), points=points))
    two = engine.run(Lens(Study(PROMPT), points=points, kind="tuned", artefact=str(tmp_path / "lens" / "params.pt")))
    for name in ("top_ids", "top_probs", "prob", "rank", "entropy", "kl", "logit_diff", "kl_pair", "up_values", "down_values"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def drop(*keys):
    return lambda state, config: [state.pop(k) for k in keys]


def put(**values):
    return lambda state, config: config.update(values)


@pytest.mark.parametrize(
    "change, text",
    [
        (put(unembed_hash="0" * 64), "is for another model (someone/else)"),
        (put(unembed_hash=None), "is for someone/else, and the model is"),
        (put(d_model=768), "3 layers of width 768"),
        (put(num_hidden_layers=12), "12 layers of width 32"),
        (put(lens_type="cubic"), "of type 'cubic'"),
        (put(d_model="wide"), "config.json that can't be read"),
        (drop("1.weight"), "lacks 1.weight"),
        (drop("2.bias"), "lacks 2.bias"),
        (lambda state, config: state.update({"0.weight": state["0.weight"][:5]}), "lacks 0.weight"),
        (lambda state, config: state["0.bias"].fill_(float("nan")), "not finite"),
    ],
)
def test_artefact_of_another_model(engines, tmp_path, change, text):
    engine = engines["gpt2"]
    artefact(tmp_path / "lens", engine.model, change)
    with pytest.raises(UserError) as error:
        engine.run(Lens(Study(PROMPT), kind="tuned", artefact=str(tmp_path / "lens")))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_names_without_a_hash(engines, tmp_path):
    engine = engines["gpt2"]
    artefact(tmp_path / "lens", engine.model, put(unembed_hash=None, base_model_name_or_path="openai/gpt2"))
    assert engine.run(Lens(Study(PROMPT), kind="tuned", artefact=str(tmp_path / "lens"))).kind == "tuned"


@pytest.mark.parametrize("damage", ["cut", "garbage", "pickle", "empty", "list"])
def test_corrupt_params(engines, tmp_path, damage):
    engine, file = engines["gpt2"], tmp_path / "lens" / "params.pt"
    artefact(tmp_path / "lens", engine.model)
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:2000])
        case "garbage":
            file.write_bytes(b"no lens at all")
        case "pickle":
            t.save({"0.weight": engine.model.info}, file)
        case "empty":
            file.write_bytes(b"")
        case "list":
            t.save([1, 2], file)
    with pytest.raises(UserError) as error:
        engine.run(Lens(Study(PROMPT), kind="tuned", artefact=str(tmp_path / "lens")))
    assert "truncated or not a tuned lens" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "ask, text",
    [
        (lambda p: Lens(Study(PROMPT), kind="tuned", artefact=str(p)), "is not a tuned lens: it needs config.json"),
        (lambda p: Lens(Study(PROMPT), kind="tuned", artefact=str(p / "no" / "where" / "at all")), "no tuned lens at"),
        (lambda p: Lens(Study(PROMPT), kind="jacobian", artefact=str(p)), "holds 0 .pt files"),
        (lambda p: Lens(Study(PROMPT), kind="jacobian", artefact=str(p / "x.pt")), "no Jacobian lens at"),
        (lambda p: TuneLens(str(p / "none.txt"), str(p)), "no text at"),
        (lambda p: TuneLens(__file__, str(p), length=9999), "the model's context"),
        (lambda p: TuneLens(__file__, str(p), steps=0), "at least 1"),
        (lambda p: TuneLens(__file__, str(p), length=16, resume=True), "nothing to resume"),
        (lambda p: FitJacobian(__file__, str(p / "j.pt"), length=16), "length must be larger than skip"),
    ],
)
def test_missing(engines, tmp_path, ask, text):
    with pytest.raises(UserError) as error:
        engines["gpt2"].run(ask(tmp_path))
    assert text in str(error.value) and "\n" not in str(error.value)


def test_points_it_does_not_read(engines, tmp_path):
    engine = engines["gpt2"]
    artefact(tmp_path / "lens", engine.model)
    for point in ("L1.resid_mid", "L1.attn", "L0H1"):
        with pytest.raises(UserError, match="a tuned lens reads resid_pre and resid_post"):
            engine.run(Lens(Study(PROMPT), points=(point,), kind="tuned", artefact=str(tmp_path / "lens")))


def test_model_without_a_norm(engines, monkeypatch):
    engine = engines["gpt2"]
    monkeypatch.delitem(engine.model.points, tuned.FINAL)
    for ask in (Lens(Study(PROMPT)), TuneLens(__file__, length=16)):
        with pytest.raises(UserError, match="has no final norm that Loupe knows"):
            engine.run(ask)


# ------------------------------------------------------------------ fitting


@pytest.fixture
def text(tmp_path):
    words = PROMPT.clean.replace(",", " ,").split()
    rng = np.random.default_rng(0)
    file = tmp_path / "text.txt"
    file.write_text("\n".join(" ".join(rng.choice(words, 12)) for _ in range(80)))
    return str(file)


FIT = {"steps": 12, "batch": 4, "length": 16, "lr": 0.01, "seed": 3}


@pytest.mark.parametrize("arch", ["gpt2", "neox", "gemma2"])
def test_fit_lowers_kl_and_is_read_back(engines, arch, text, tmp_path):
    engine, out, parts = engines[arch], str(tmp_path / "fit"), []
    got = engine.run(TuneLens(text, out, **FIT), parts.append)
    n = engine.model.info.n_layers
    assert got.points == tuple(f"L{i}.resid_pre" for i in range(n)) and got.steps == 12 and len(got.losses) == 12
    assert (got.after < got.before).all() and got.losses[-1] < got.losses[0]
    assert [p.done for p in parts if "held-out" not in p.text] == list(range(12)) and "KL" in parts[3].text
    config = json.loads((tmp_path / "fit" / "config.json").read_text())
    assert config["unembed_hash"] == tuned.unembed_hash(engine.model) and config["fit"]["seed"] == 3 and len(config["kl_after"]) == n
    assert sorted(p.name for p in (tmp_path / "fit").iterdir()) == ["config.json", "params.safetensors"]
    ids = tuned.windows(engine.model, tuned.corpus(text), 16, 3)[0].tolist()
    prompt = Prompt(engine.model.tokenizer.decode(ids[1:]), bos=True)
    points = tuple(f"L{i}.resid_pre" for i in range(n))
    lens = engine.run(Lens(Study(prompt), points=points, kind="tuned", artefact=out))
    plain = engine.run(Lens(Study(prompt), points=points))
    assert (lens.kl.mean(1) < plain.kl.mean(1)).all()
    engine.check_hooks()


def test_resume_is_the_same_fit(engines, text, tmp_path):
    engine = engines["llama"]
    whole = engine.run(TuneLens(text, str(tmp_path / "a"), **FIT))
    jobs = engine.jobs(TuneLens(text, str(tmp_path / "b"), **FIT))
    for _ in range(6):
        next(jobs)
    jobs.close()
    assert [p.name for p in (tmp_path / "b").iterdir()] == [tuned.CHECKPOINT]
    again = engine.run(TuneLens(text, str(tmp_path / "b"), **FIT, resume=True))
    np.testing.assert_array_equal(whole.losses, again.losses)
    np.testing.assert_array_equal(whole.after, again.after)
    assert (tmp_path / "a" / "params.safetensors").read_bytes() == (tmp_path / "b" / "params.safetensors").read_bytes()


def test_resume_with_other_settings(engines, text, tmp_path):
    engine = engines["llama"]
    jobs = engine.jobs(TuneLens(text, str(tmp_path), **FIT))
    for _ in range(3):
        next(jobs)
    jobs.close()
    with pytest.raises(UserError, match="made with other settings"):
        engine.run(TuneLens(text, str(tmp_path), **(FIT | {"seed": 4}), resume=True))
    file = tmp_path / tuned.CHECKPOINT
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        engine.run(TuneLens(text, str(tmp_path), **FIT, resume=True))


# ------------------------------------------------------------------ Jacobian lens


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "qwen3"])
def test_jacobian_lens_is_its_own_tool(engines, arch, text, tmp_path):
    """The fit equals TransformerLens's over the same prompts, and the table its read-out."""
    engine, file = engines[arch], str(tmp_path / "j.pt")
    bridge, got = engine.model.bridge, engine.run(FitJacobian(text, file, prompts=3, length=16, skip=2))
    rows = tuned.windows(engine.model, tuned.corpus(text), 16, 0)[:3].tolist()
    prompts = [engine.model.tokenizer.decode(r[r[:1] == [engine.model.bos] :]) for r in rows]
    own = JacobianLens.fit(bridge, prompts, corpus="c", max_seq_len=16, skip_first_positions=2, show_progress=False)
    saved = JacobianLens.load(file)
    for layer, matrix in own.jacobians.items():
        assert t.allclose(saved.jacobians[layer], matrix, atol=1e-5)
    assert got.layers == (0, 1) and got.prompts == 3 and got.change > 0
    lens = engine.run(Lens(Study(PROMPT), kind="jacobian", artefact=file, k=4))
    assert lens.points == ("L0.resid_post", "L1.resid_post", "L2.resid_post")
    assert "without the first 2 positions" in lens.convention
    want = own.readout(bridge, t.tensor([lens.tokens.ids]), return_full_logits=True)
    for layer in (0, 1):
        p = np.exp(log_softmax(want.lens_logits[layer].double().numpy()))
        np.testing.assert_allclose(lens.top_probs[layer], -np.sort(-p, -1)[:, :4], atol=TOL)
    assert lens.kl[-1].max() < 1e-5
    engine.check_hooks()


def test_jacobian_of_another_model(engines, text, tmp_path):
    engines["gpt2"].run(FitJacobian(text, str(tmp_path / "j.pt"), prompts=1, length=16, skip=2))
    with pytest.raises(UserError, match="is for another model"):
        engines["llama"].run(Lens(Study(PROMPT), kind="jacobian", artefact=str(tmp_path / "j.pt")))
    t.save({"J": {9: t.eye(32)}, "n_prompts": 1, "d_model": 32}, tmp_path / "far.pt")
    with pytest.raises(UserError, match="does not fit"):
        engines["gpt2"].run(Lens(Study(PROMPT), kind="jacobian", artefact=str(tmp_path / "far.pt")))
    (tmp_path / "bad.pt").write_bytes(b"not a lens")
    with pytest.raises(UserError, match="truncated or not a Jacobian lens"):
        engines["gpt2"].run(Lens(Study(PROMPT), kind="jacobian", artefact=str(tmp_path / "bad.pt")))
    with pytest.raises(UserError, match="reads block outputs"):
        engines["gpt2"].run(Lens(Study(PROMPT), points=("L0.resid_pre",), kind="jacobian", artefact=str(tmp_path / "j.pt")))


def test_the_zoos_own_lens(engines):
    """The shipped artefact is this zoo's, is found unasked, and beats the logit lens at every layer on held-out text. Refit it when the zoo changes."""
    engine = engines["zoo"]
    lens = engine.run(Lens(Study(PROMPT), kind="tuned"))
    assert "zoo/tuned_lens" in lens.convention and lens.kl[-1].max() < 1e-5
    config = json.loads((engine.model.folder / "tuned_lens" / "config.json").read_text())
    assert all(after < before for before, after in zip(config["kl_before"], config["kl_after"]))
    maps = next(iter(engine.model.notes.translators.values())).maps
    weight, bias = (t.stack([maps[i][j] for i in sorted(maps)]) for j in (0, 1))
    rows = tuned.windows(engine.model, tuned.corpus(""), config["fit"]["length"], config["fit"]["seed"])[:8]
    assert (tuned.kl_by_layer(engine.model, rows, weight, bias) < tuned.kl_by_layer(engine.model, rows, None, None)).all()
