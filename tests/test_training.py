"""Training SAEs: the figures against plain Hugging Face hooks, the weights against sae_lens's own loop, resume, and input that can't be used."""

import json
import signal

import numpy as np
import pytest
import torch as t
from reference import log_softmax
from safetensors.torch import load_file

from techniques.features import training
from techniques.lens import translators as tuned
from engine import main
from techniques.features.requests import TrainSae
from vocabulary.nodes import UserError
from vocabulary.requests import Progress
from test_tuned import text  # noqa: F401

pytestmark = pytest.mark.slow

TINY = {"features": 64, "k": 4, "tokens": 1280, "batch": 64, "length": 16, "lr": 0.005, "seed": 3}
SPOTS = {"resid_pre": ("resid_pre", 1), "resid_mid": ("resid_mid", 1), "resid_post": ("resid_post", 1), "attn": ("attn", 1), "mlp": ("mlp", 1)}


def losses_by_hand(reference, rows, mask, spot, swap=None) -> float:
    """Mean next-token loss in nats of the predictions made where `mask` says so; what passes `spot` there is swapped."""

    def edit(x):
        x[mask] = swap(x[mask])

    logits, _ = reference.run(rows.tolist(), edits=[(spot, edit)] if swap else ())
    logp = np.take_along_axis(log_softmax(logits[:, :-1].astype(np.float64)), rows[:, 1:, None].numpy(), -1)[..., 0]
    return -logp[mask[:, :-1].numpy()].mean()


def check_figures(engine, reference, text, out, site, **more):  # noqa: F811
    """Train, load with sae_lens, and compute every figure again from Hugging Face's activations."""
    from sae_lens import SAE

    got = engine.run(TrainSae(f"L1.{site}", text, str(out), **(TINY | more)))
    assert [p.name for p in sorted(out.iterdir())] == ["cfg.json", "sae_weights.safetensors"]
    sae = SAE.load_from_disk(out)
    rows = tuned.windows(engine.model, tuned.corpus(text), 16, 3)
    held = rows[: len(rows) // 10]
    mask = t.ones_like(held, dtype=t.bool) if engine.model.bos is None else held != engine.model.bos
    mask[:, 0] = False
    x = reference.run(held.tolist(), read=[SPOTS[site]])[1][SPOTS[site]][mask]
    with t.no_grad():
        f = sae.encode(x)
        rebuilt = sae.decode(f)
    explained = 1 - ((x - rebuilt) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert got.explained == pytest.approx(explained.item(), abs=1e-4)
    assert got.l0 == pytest.approx((f > 0).sum(1).float().mean().item(), abs=1e-3)
    assert got.dead <= (f > 0).any(0).logical_not().float().mean().item()
    with t.no_grad():
        kinds = {"loss": None, "loss_spliced": lambda h: sae(h), "loss_zero": t.zeros_like, "loss_mean": lambda h: x.mean(0).expand_as(h)}
        want = {k: losses_by_hand(reference, held, mask, SPOTS[site], swap) for k, swap in kinds.items()}
    for k, v in want.items():
        assert sae.cfg.metadata[k] == pytest.approx(v, abs=1e-4), k
    gap = want["loss_zero"] - want["loss"]
    assert got.recovered == pytest.approx((want["loss_zero"] - want["loss_spliced"]) / gap, abs=3e-4 / abs(gap))
    assert len(got.losses) * 64 == got.tokens
    return got, sae


def test_figures_on_every_model(engine, reference, text, tmp_path):  # noqa: F811
    got, sae = check_figures(engine, reference, text, tmp_path / "sae", "resid_post")
    about = sae.cfg.metadata
    assert (
        (about.hook_name, about.model_name, about.context_size)
        == ("blocks.1.hook_resid_post", engine.model.info.name, 16)
        == (got.hook, *(about.model_name, 16))
    )
    assert about.prepend_bos == engine.model.info.default_bos and about.unembed_hash == tuned.unembed_hash(engine.model)
    assert about.l0 == pytest.approx(4) and about.explained_variance == pytest.approx(got.explained, abs=1e-5)
    assert "position 0" in got.convention and "zero" in got.convention


POINTS = [("gpt2", "resid_pre"), ("gpt2", "resid_mid"), ("gpt2", "attn"), ("gpt2", "mlp"), ("neox", "attn"), ("neox", "mlp")]
POINTS += [("gemma2", "resid_mid"), ("gemma2", "attn"), ("gemma2", "mlp"), ("qwen3", "resid_mid")]


@pytest.mark.parametrize("arch, site", POINTS)
def test_figures_at_every_point(engines, references, text, tmp_path, arch, site):  # noqa: F811
    check_figures(engines[arch], references[arch], text, tmp_path / "sae", site)


@pytest.mark.parametrize("architecture, stored", [("topk", "topk"), ("batchtopk", "jumprelu"), ("standard", "standard"), ("jumprelu", "jumprelu")])
def test_every_architecture(engines, references, text, tmp_path, architecture, stored):  # noqa: F811
    how = {"architecture": architecture, "tokens": 64 * 150, "l1": 1.0}
    got, sae = check_figures(engines["llama"], references["llama"], text, tmp_path / "sae", "resid_post", **how)
    assert got.explained > 0.5
    assert sae.cfg.architecture() == stored and sae.cfg.metadata.training_architecture == architecture
    assert sae.cfg.normalize_activations == "none" and sae.cfg.d_sae == 64 and got.architecture == architecture


def test_the_weights_are_those_of_sae_lens(engines, text):  # noqa: F811
    """The same batches through SAETrainer.fit give the same SAE."""
    model, ask = engines["gpt2"].model, TrainSae("L1.resid_post", text, **TINY)
    rows = tuned.windows(model, tuned.corpus(text), 16, 3)
    rows = rows[len(rows) // 10 :]
    data = [b for b, _ in zip((b for b in training.batches(model, "blocks.1.hook_resid_post", rows, 64, 3) if isinstance(b, t.Tensor)), range(20))]
    theirs = training.make_trainer(ask, 32, "cpu")
    theirs.data_provider = iter(data)
    theirs.activation_scaler.scaling_factor = 32**0.5 / data[0].norm(dim=1).mean().item()
    theirs.sae.b_dec.data = data[0].mean(0) * theirs.activation_scaler.scaling_factor
    want = theirs.fit()
    from sae_lens import SAE

    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr(training, "write", lambda out, sae: kept.append(sae))
        patch.setattr(training, "keep", lambda *a: None)
        engines["gpt2"].run(ask)
    assert isinstance(kept[0], SAE)
    x = data[0]
    with t.no_grad():
        t.testing.assert_close(kept[0].decode(kept[0].encode(x)), want.decode(want.encode(x)), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------ data


def test_batches_follow_from_the_seed(engines, text, monkeypatch):  # noqa: F811
    model = engines["gpt2"].model
    rows = tuned.windows(model, tuned.corpus(text), 16, 3)
    hook = "blocks.1.hook_resid_post"
    n = int(training.counted(model, rows).sum())

    def take(count: int, skip: int = 0) -> t.Tensor:
        found = (b for b in training.batches(model, hook, rows, 32, 7, skip) if isinstance(b, t.Tensor))
        return t.stack([next(found) for _ in range(count)])

    per_epoch = n // 32
    for room in (training.BUFFER, 4 * 32 * 16 * 6):
        monkeypatch.setattr(training, "BUFFER", room)
        long = take(per_epoch + 8)
        t.testing.assert_close(take(8, per_epoch), long[per_epoch:])
        t.testing.assert_close(take(3, 2), long[2:5])
        assert not t.equal(long[0], long[per_epoch])
    acts = model.forward(rows, [hook])[1][hook][training.counted(model, rows)]
    distance = t.cdist(long[0], acts, compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    assert distance.max() < 1e-4, "a batch holds nothing but activations of positions that count"
    first = [(acts[0] - b).abs().max(-1).values.min() for b in long]
    assert min(first) < 1e-4


def test_position_0_and_bos_do_not_count(engines):
    model = engines["gpt2"].model
    ids = t.tensor([[model.bos, 5, 6, model.bos, 7], [5, 5, 6, 7, 8]])
    assert training.counted(model, ids).tolist() == [[False, True, True, False, True], [False, True, True, True, True]]


# ------------------------------------------------------------------ progress, cancel, resume


def test_progress_in_words(engines, text, tmp_path):  # noqa: F811
    parts = []
    engines["gpt2"].run(TrainSae("L1.mlp", text, str(tmp_path / "sae"), **TINY), parts.append)
    assert all(isinstance(p, Progress) for p in parts)
    said = [p for p in parts if "FVU" in p.text]
    assert [p.done for p in said] == list(range(1, 20)) and {p.total for p in said} == {20} and "L0 4.0" in said[-1].text and "loss" in said[-1].text


@pytest.mark.parametrize("architecture", training.ARCHITECTURES)
def test_resume_is_the_same_run(engines, text, tmp_path, architecture):  # noqa: F811
    engine, how = engines["gpt2"], TINY | {"architecture": architecture}
    whole = engine.run(TrainSae("L2.resid_pre", text, str(tmp_path / "a"), **how))
    for stop in (9, 17):
        jobs = engine.jobs(TrainSae("L2.resid_pre", text, str(tmp_path / "b"), **how, resume=stop > 9))
        for part in jobs:
            if part.done == stop and "FVU" in part.text:
                break
        jobs.close()
        assert [p.name for p in (tmp_path / "b").iterdir()] == [tuned.CHECKPOINT]
    again = engine.run(TrainSae("L2.resid_pre", text, str(tmp_path / "b"), **how, resume=True))
    np.testing.assert_array_equal(whole.losses, again.losses)
    a, b = (load_file(tmp_path / n / "sae_weights.safetensors") for n in "ab")
    assert a.keys() == b.keys() and all(t.equal(a[k], b[k]) for k in a)
    assert (whole.explained, whole.dead, whole.recovered) == (again.explained, again.dead, again.recovered)


def test_cancelled_while_it_measures(engines, text, tmp_path):  # noqa: F811
    """The checkpoint of the last step stays, and a resumed run only measures."""
    engine, ask = engines["gpt2"], TrainSae("L2.resid_pre", text, str(tmp_path / "sae"), **TINY)
    jobs = engine.jobs(ask)
    for part in jobs:
        if "held-out" in part.text:
            break
    jobs.close()
    engine.check_hooks()
    parts = []
    got = engine.run(TrainSae("L2.resid_pre", text, str(tmp_path / "sae"), **TINY, resume=True), parts.append)
    assert len(got.losses) == 20 and not any("FVU" in p.text for p in parts)


# ------------------------------------------------------------------ input that can't be used


@pytest.mark.parametrize(
    "change, says",
    [
        ({"hook": "L1H2"}, "no point to train an SAE at"),
        ({"hook": "L1.resid_post@3"}, "without a position"),
        ({"hook": "nonsense"}, "not a hook point"),
        ({"hook": "L9.resid_post"}, "layers 0 to 2"),
        ({"features": 1}, "features: write 2 to"),
        ({"k": 0}, "not sparse"),
        ({"k": 40}, "not sparse: write 1 to 32"),
        ({"architecture": "gated"}, "topk, batchtopk, standard, jumprelu"),
        ({"architecture": "standard", "l1": 0.0}, "l1 coefficient"),
        ({"tokens": 10}, "at least one batch"),
        ({"lr": 2.0}, "learning rate"),
        ({"text": "/nowhere.txt"}, "no text at"),
        ({"length": 4096}, "length must be"),
        ({"batch": 100_000, "tokens": 200_000}, "fewer than a batch"),
        ({"resume": True}, "nothing to resume"),
    ],
)
def test_errors_in_words(engines, text, tmp_path, change, says):  # noqa: F811
    ask = {"hook": "L1.resid_post", "text": text, "out": str(tmp_path / "sae"), **TINY} | change
    with pytest.raises(UserError, match=says):
        engines["gpt2"].run(TrainSae(**ask))
    assert not (tmp_path / "sae").exists()


def test_a_short_text_and_a_parallel_model(engines, tmp_path):
    (tmp_path / "short.txt").write_text("When Mary")
    with pytest.raises(UserError, match="needs at least"):
        engines["gpt2"].run(TrainSae("L1.resid_post", str(tmp_path / "short.txt"), str(tmp_path / "sae"), **TINY))
    with pytest.raises(UserError, match="in parallel"):
        engines["neox"].run(TrainSae("L1.resid_mid", str(tmp_path / "short.txt"), str(tmp_path / "sae"), **TINY))


def test_folders(engines, text, tmp_path):  # noqa: F811
    engine, out = engines["gpt2"], tmp_path / "sae"
    ask = {"hook": "L1.resid_post", "text": text, "out": str(out), **TINY}
    jobs = engine.jobs(TrainSae(**ask))
    for part in jobs:
        if part.done == 3:
            break
    jobs.close()
    with pytest.raises(UserError, match="holds a checkpoint: go on with --resume"):
        engine.run(TrainSae(**ask))
    with pytest.raises(UserError, match="made with other settings"):
        engine.run(TrainSae(**(ask | {"k": 5, "resume": True})))
    with pytest.raises(UserError, match="made with other settings"):
        engines["llama"].run(TrainSae(**(ask | {"resume": True})))
    (out / tuned.CHECKPOINT).write_bytes((out / tuned.CHECKPOINT).read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        engine.run(TrainSae(**(ask | {"resume": True})))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        engine.run(TrainSae(**(ask | {"out": str(tmp_path / "full")})))
    with pytest.raises(UserError, match="is a file"):
        engine.run(TrainSae(**(ask | {"out": text})))
    with pytest.raises(UserError, match="can't be made"):
        engine.run(TrainSae(**(ask | {"out": text + "/sae"})))


@pytest.mark.slow
def test_a_point_where_nothing_passes(engines, tmp_path):
    """The zoo's last MLP writes zeros."""
    with pytest.raises(UserError, match="never changes"):
        engines["zoo"].run(TrainSae("L3.mlp", "", str(tmp_path / "sae"), **TINY))


# ------------------------------------------------------------------ the command


@pytest.mark.slow
def test_command(folders, text, tmp_path, capsys):  # noqa: F811
    args = [
        "train-sae",
        "--model",
        str(folders["gpt2"]),
        "--text",
        text,
        "--hook",
        "L1.resid_post",
        "--out",
        str(tmp_path / "sae"),
        "--features",
        "64",
        "--k",
        "4",
    ]
    args += ["--tokens", "1280", "--batch", "64", "--length", "16"]
    assert main([*args, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["features"] == 64 and len(got["losses"]) == 20 and got["l0"] == pytest.approx(4)
    assert main(args) == 2 and "not empty" in capsys.readouterr().err
    args[args.index("--out") + 1] = str(tmp_path / "three")
    assert main(args) == 0
    said = capsys.readouterr().out
    assert "explained variance" in said and "loss recovered" in said and "blocks.1.hook_resid_post" in said


@pytest.mark.slow
def test_ctrl_c_leaves_a_whole_checkpoint(folders, text, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The command ends after the step it is at, and the resumed run is the uninterrupted one."""
    args = ["train-sae", "--model", str(folders["gpt2"]), "--text", text, "--hook", "L1.resid_post", "--features", "64", "--k", "4", "--tokens", "1280"]
    args += ["--batch", "64", "--length", "16", "--json"]
    assert main([*args, "--out", str(tmp_path / "a")]) == 0
    whole = json.loads(capsys.readouterr().out)
    batches = training.batches

    def interrupted(*how):
        for i, batch in enumerate(batches(*how)):
            if i == 15:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(training, "batches", interrupted)
    assert main([*args, "--out", str(tmp_path / "b")]) == 130 and "interrupted" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "b").iterdir()] == [tuned.CHECKPOINT]
    monkeypatch.undo()
    assert main([*args, "--out", str(tmp_path / "b"), "--resume"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["losses"] == whole["losses"] and again["explained"] == whole["explained"]
