"""Models trained by hand: HookedTransformer checkpoints against HookedTransformer itself, on every kind of model that they come in."""

import json
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch as t
from safetensors.torch import save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig

from engine import Engine
from model import native
from techniques.attention.requests import Attention
from techniques.attribution.requests import Attribution
from techniques.identities.requests import Identities
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from techniques.weights.requests import HeadWeights
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Metric, Prompt, Study
from vocabulary.requests import Check

SMALL = dict(n_layers=2, d_model=16, d_head=4, n_heads=4, d_mlp=24, n_ctx=5, d_vocab=9, act_fn="relu", normalization_type=None)
KINDS = {
    "grokking": {"d_vocab_out": 8, "n_layers": 1},
    "attention only": {"attn_only": True, "normalization_type": "LN"},
    "bidirectional": {"attention_dir": "bidirectional", "normalization_type": "LN"},
    "folded": {"normalization_type": "LNPre", "act_fn": "gelu_new"},
    "gated": {"normalization_type": "RMS", "gated_mlp": True, "act_fn": "silu", "positional_embedding_type": "rotary", "rotary_adjacent_pairs": True},
    "unscaled": {"use_attn_scale": False, "act_fn": "gelu"},
    "two vocabularies": {"d_vocab_out": 2, "attention_dir": "bidirectional", "normalization_type": "LN"},
}
CLEAN, CORRUPT = "1 2 3 4 8", "1 5 3 4 8"


@dataclass
class Made:
    """A checkpoint's folder and the HookedTransformer that it was saved from."""

    folder: object
    model: HookedTransformer


def make(folder, kind: str, **more) -> Made:
    t.manual_seed(list(KINDS).index(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedTransformer(HookedTransformerConfig(**SMALL | KINDS[kind] | {"device": "cpu"} | more))
    with t.no_grad():
        for name, p in model.named_parameters():
            if not (name.endswith("mlp.b_in") and model.cfg.gated_mlp):
                p += 0.4 * t.randn_like(p)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model.cfg.to_dict(), default=str))
    t.save(model.state_dict(), folder / "model.pt")
    if model.cfg.d_vocab_out == 2:
        (folder / "labels.json").write_text(json.dumps(list("abcdefghi")))
        (folder / "output_labels.json").write_text('["balanced", "not"]')
    return Made(folder, model.eval())


@pytest.fixture(scope="module", params=KINDS)
def both(request, tmp_path_factory):
    made = make(tmp_path_factory.mktemp("native") / "model", request.param)
    return Engine(str(made.folder)), made.model


def study(engine, *do: str, corrupt: bool = True, kind: str = "logit_diff") -> Study:
    words = lambda text: " ".join(engine.model.tokenizer.labels[int(i)] for i in text.split())  # noqa: E731
    outputs = engine.model.tokenizer.outputs
    prompt = Prompt(words(CLEAN), words(CORRUPT) if corrupt else None, (outputs[0],), (outputs[1],))
    return Study(prompt, metric=Metric(kind), interventions=tuple(map(parse_intervention, do)))


def ids(text: str) -> t.Tensor:
    return t.tensor([[int(i) for i in text.split()]])


def diff(logits) -> float:
    return (logits[0, -1, 0] - logits[0, -1, 1]).item()


def test_it_loads_and_proves_itself(both):
    engine, theirs = both
    info = engine.model.info
    assert {c.name: c.ok for c in info.checks}["forward pass = HookedTransformer's"] is True and "model" not in engine.model.notes.refused
    assert all(c.ok is not False for c in info.checks), [c for c in info.checks if c.ok is False]
    assert (info.d_vocab, info.n_layers, info.bos) == (theirs.cfg.d_vocab_out, theirs.cfg.n_layers, "")
    got, _ = engine.model.forward(ids(CLEAN), keep=0)
    assert t.allclose(got, theirs(ids(CLEAN)), atol=1e-4)
    rows = engine.run(Identities(study(engine))).rows
    assert all(r.ok is not False for r in rows) and any(r.name == "forward pass = HookedTransformer's" and r.ok for r in rows)


def test_runs_ablations_and_patterns(both):
    engine, theirs = both
    run = engine.run(Run(study(engine, "L0H1=zero")))
    want, cache = theirs.run_with_cache(ids(CLEAN))
    assert run.clean.metric == pytest.approx(diff(want), abs=1e-4)

    def zero(z, hook):
        z[:, :, 1] = 0
        return z

    assert run.now.metric == pytest.approx(diff(theirs.run_with_hooks(ids(CLEAN), fwd_hooks=[("blocks.0.attn.hook_z", zero)])), abs=1e-4)
    pattern = engine.run(Attention(study(engine), 0)).pattern
    np.testing.assert_allclose(np.nan_to_num(pattern), cache["pattern", 0][0].numpy(), atol=1e-5)
    assert np.isnan(pattern).any() == (theirs.cfg.attention_dir == "causal")


def test_lens_and_attribution(both):
    engine, theirs = both
    _, cache = theirs.run_with_cache(ids(CLEAN))
    table = engine.run(Lens(study(engine)))
    for row, point in enumerate(table.points):
        if point.endswith("resid_post"):
            logits = theirs.unembed(
                theirs.ln_final(cache["resid_post", int(point[1:].partition(".")[0])])
                if theirs.cfg.normalization_type
                else cache["resid_post", int(point[1:].partition(".")[0])]
            )
            best = logits[0].softmax(-1).max(-1)
            np.testing.assert_allclose(table.top_probs[row, :, 0], best.values.detach().numpy(), atol=1e-4)
            assert table.texts[int(table.top_ids[row, -1, 0])] == engine.model.tokenizer.outputs[int(best.indices[-1])]
    cells = engine.run(Attribution(study(engine), "clean")).cells
    d = theirs.W_U[:, 0] - theirs.W_U[:, 1]
    scale = cache["ln_final.hook_scale"][0, -1] if theirs.cfg.normalization_type else 1.0
    gain = getattr(theirs.ln_final, "w", 1.0) if theirs.cfg.normalization_type else 1.0
    centre = (lambda x: x - x.mean(-1, keepdim=True)) if str(theirs.cfg.normalization_type).startswith("LN") else (lambda x: x)
    for layer in range(theirs.cfg.n_layers):
        z = cache["z", layer][0, -1]
        for head in range(4):
            want = (centre(z[head] @ theirs.W_O[layer, head]) / scale * gain) @ d
            assert cells.heads[layer, head] == pytest.approx(want.item(), abs=1e-4)


def test_a_sweep_patches_what_hooks_patch(both):
    """Residual points at every position, those after the metric's too where a model looks ahead."""
    engine, theirs = both
    table = engine.run(Sweep(study(engine), "resid_pre"))
    _, cache = theirs.run_with_cache(ids(CLEAN))
    for layer in range(theirs.cfg.n_layers):
        for pos in range(5):

            def patch(x, hook, pos=pos):
                x[:, pos] = cache[hook.name][:, pos]
                return x

            want = diff(theirs.run_with_hooks(ids(CORRUPT), fwd_hooks=[(f"blocks.{layer}.hook_resid_pre", patch)]))
            assert table.values[layer, pos] == pytest.approx(want, abs=1e-4), (layer, pos)


def problems(engine, clean: str, answer: str = "1") -> tuple[str, ...]:
    return engine.run(Check(Prompt(clean, None, (answer,)))).problems


def test_tokens_by_labels(tmp_path):
    """Words of a list, or numbers; what is none of them is said. An answer is one of what the model predicts, and its label need not be an input's."""
    engine = Engine(str(make(tmp_path / "numbers", "grokking").folder))
    assert engine.run(Check(Prompt("1  7 8", None, ("7",)))).clean.ids == (1, 7, 8)
    assert "'12' is not one of this model's 9 tokens: 0 1 2 3 4 5 6 7 …" in problems(engine, "1 12 8")[0]
    assert "'8' is not one of the 8 tokens that this model predicts" in problems(engine, "1 2 8", "8")[0]
    assert "context holds 5" in problems(engine, "1 2 3 4 5 6")[0] and not problems(engine, "1 2 8", "7")
    with pytest.raises(UserError, match="the loss of a prompt's own tokens is none"):
        engine.run(Run(Study(Prompt("1 2 8"), metric=Metric("loss"))))
    with pytest.raises(UserError, match="output_labels.json says so"):
        engine.run(HeadWeights())
    made = make(tmp_path / "named", "grokking")
    (made.folder / "output_labels.json").write_text(json.dumps([str(i) for i in range(8)]))
    Engine(str(made.folder)).run(HeadWeights())


def test_files_and_what_is_refused(tmp_path, monkeypatch):
    """A file with its config beside it opens, from safetensors too; a checkpoint that is not its config's is refused in words, and no code in it is run."""
    made = make(tmp_path / "model", "grokking")
    state = {n: x.contiguous() for n, x in made.model.state_dict().items() if not n.endswith(("mask", "IGNORE"))}
    save_file(state, tmp_path / "toy.safetensors")
    (tmp_path / "toy.json").write_text((made.folder / "config.json").read_text())
    engine = Engine(str(tmp_path / "toy.safetensors"))
    assert t.allclose(engine.model.forward(ids(CLEAN), keep=0)[0], made.model(ids(CLEAN)), atol=1e-4)
    config = json.loads((made.folder / "config.json").read_text())

    def refusal(change: dict = {}, weights: object = None) -> str:  # noqa: B006
        (made.folder / "config.json").write_text(json.dumps(config | change))
        t.save(state if weights is None else weights, made.folder / "model.pt")
        with pytest.raises(UserError) as error:
            Engine(str(made.folder))
        return str(error.value)

    assert "its config asks for" in refusal({"d_mlp": 25}) and "lacks" in refusal({"n_layers": 2}) and "does not ask for" in refusal({"attn_only": True})
    assert "act_fn 'solu_ln' is not built" in refusal({"act_fn": "solu_ln"}) and "positions are shortformer" in refusal(
        {"positional_embedding_type": "shortformer"}
    )
    assert "parallel_attn_mlp is True" in refusal({"parallel_attn_mlp": True}) and "d_model is 'wide'" in refusal({"d_model": "wide"})
    assert "save model.state_dict()" in refusal(weights={"model": made.model.cfg}) and "holds no state dict" in refusal(weights=[1, 2])
    (made.folder / "labels.json").write_text('["a", "b"]')
    assert "a JSON list of 9 different labels" in refusal()
    (made.folder / "second.pt").write_bytes(b"")
    assert "holds 2 checkpoints: give the file itself" in refusal()
    theirs = native.hooked_logits
    monkeypatch.setattr(native, "hooked_logits", lambda *args: theirs(*args) + 0.1)
    wrong = Engine(str(tmp_path / "toy.safetensors"))
    with pytest.raises(UserError, match="forward pass is not HookedTransformer's"):
        wrong.run(Run(Study(Prompt("1 2 8"))))


def test_a_hub_repository_of_checkpoints(tmp_path, monkeypatch):
    """In the hub cache's own layout, without a network: `NeelNanda/…` and TransformerLens's alias of it, with a checkpoint of the training beside the final one."""
    name, sha = "NeelNanda/Attn_Only_2L512W_C4_Code", "0" * 40
    repo = tmp_path / f"models--{name.replace('/', '--')}"
    made = make(tmp_path / "made", "attention only")
    there = repo / "snapshots" / sha
    (there / "checkpoints").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(sha)
    cfg = made.model.cfg
    raw = {k: getattr(cfg, k) for k in ("d_model", "n_layers", "d_mlp", "d_head", "n_heads", "n_ctx", "d_vocab", "act_fn", "attn_only")}
    raw |= {"normalization": "LN", "shortformer_pos": False, "tokenizer_name": "NeelNanda/gpt-neox-tokenizer-digits", "checkpoint_every_tokens": 10, "seed": 3}
    (there / "config.json").write_text(json.dumps(raw))
    t.save(made.model.state_dict(), there / "model_final.pth")
    t.save({n: 0 * x for n, x in made.model.state_dict().items()}, there / "model_early.pth")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for asked in (name, "attn-only-2l"):
        engine = Engine(asked)
        assert engine.model.info.architecture == native.ARCHITECTURE and "gpt-neox-tokenizer-digits is not in the hub cache" in engine.model.info.warning
        got = engine.model.forward(ids(CLEAN), keep=0)[0]
        assert (got - made.model(ids(CLEAN), prepend_bos=False)).abs().max() < 1e-4
