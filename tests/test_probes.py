"""What every load proves, and what it refuses by name: faults planted into a model; pattern writes against plain hooks on Hugging Face's own modules."""

import numpy as np
import pytest
import torch as t
import transformers as tr

from conftest import PROMPT, tokenizer
from engine import Engine
from families.configs import build
from model import bridge as bridge_module, live_hooks, loading
from model.changed_blocks import ChangedBlocks
from techniques.attention.requests import Attention, AttentionSet, Detect, HeadStats
from techniques.attribution.requests import Attribution
from techniques.circuits.requests import Discover, PathPatch, Score
from techniques.identities.requests import Identities
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Study

SMALL = {"vocab_size": 430, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
WIDE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GROUPED = WIDE | {"num_key_value_heads": 2}
CONFIGS = {
    "gptj": ("GPTJConfig", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}),
    "opt": ("OPTConfig", {**WIDE, "ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "pad_token_id": 1}),
    "gpt_neo": ("GPTNeoConfig", {**WIDE, "num_layers": 2, "num_heads": 4, "window_size": 8, "attention_types": [[["global", "local"], 1]]}),
    "llama": ("LlamaConfig", GROUPED),
    "cohere": ("CohereConfig", GROUPED | {"logit_scale": 1.0}),
    "falcon": ("FalconConfig", {**WIDE, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}),
    "hunyuan": ("HunYuanDenseV1Config", GROUPED | {"head_dim": 8}),
    "gpt_oss": ("GptOssConfig", GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "mamba": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "jamba": (
        "JambaConfig",
        GROUPED
        | {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 4, "num_experts": 2, "use_mamba_kernels": False},
    ),
}
ATTENTION = {"gptj": "attn", "opt": "self_attn", "gpt_neo": "attn.attention"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random folder of each family, made when first asked for."""

    class Folders(dict):
        def __missing__(self, family: str) -> str:
            name, fields = CONFIGS[family]
            t.manual_seed(0)
            hf = tr.AutoModelForCausalLM.from_config(getattr(tr, name)(**SMALL | fields))
            with t.no_grad():
                for p in hf.parameters():
                    if p.ndim == 1:
                        p += 0.3 * t.randn_like(p)
            self[family] = str(tmp_path_factory.mktemp(family))
            hf.save_pretrained(self[family])
            tokenizer(bos=True).save_pretrained(self[family])
            return self[family]

    return Folders()


@pytest.fixture(scope="module")
def loaded(folders):
    class Loaded(dict):
        def __missing__(self, family: str) -> Engine:
            self[family] = Engine(folders[family])
            return self[family]

    return Loaded()


def under(*texts: str) -> Study:
    return Study(PROMPT, interventions=tuple(parse_intervention(x) for x in texts))


# ------------------------------------------------------------------ patterns, written where attention is Hugging Face's own code


class Plain:
    """Hugging Face's own model with z made anew from a pattern and the values, by hooks on its modules."""

    def __init__(self, family: str, folder: str, model):
        self.hf = tr.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        body = self.hf.transformer.h if family != "opt" else self.hf.model.decoder.layers
        self.attention = [b.get_submodule(ATTENTION[family]) for b in body]
        check = model.check(PROMPT)
        self.ids = {side: t.tensor([row.ids]) for side, row in (("clean", check.clean), ("corrupt", check.corrupt))}
        self.answer, self.foil = (rows[0].ids[0] for rows in (check.answers, check.foils))

    def patterns(self, side: str) -> tuple[t.Tensor, ...]:
        with t.no_grad():
            return self.hf(self.ids[side], output_attentions=True).attentions

    def metric(self, side: str, layer: int, pattern: t.Tensor, head: int | None) -> t.Tensor:
        """The metric when a head (None: every head) of a layer attends by `pattern` [1, head, destination, source]; gradients pass."""
        values, attention = {}, self.attention[layer]

        def z(_, args: tuple) -> tuple:
            own = args[0].unflatten(-1, (pattern.shape[1], -1))
            new = (pattern @ values["v"].unflatten(-1, (pattern.shape[1], -1)).transpose(1, 2)).transpose(1, 2)
            keep = t.tensor([head in (None, h) for h in range(pattern.shape[1])])[:, None]
            return (t.where(keep, new, own).flatten(2),)

        handles = [attention.v_proj.register_forward_hook(lambda m, a, out: values.__setitem__("v", out)), attention.out_proj.register_forward_pre_hook(z)]
        try:
            last = self.hf(self.ids[side]).logits[0, -1]
        finally:
            for h in handles:
                h.remove()
        return last[self.answer] - last[self.foil]


@pytest.mark.parametrize("family", ["gptj", "opt", "gpt_neo"])
def test_patterns_are_written_where_attention_is_hugging_faces_own(loaded, folders, family):
    engine = loaded[family]
    plain = Plain(family, folders[family], engine.model)
    clean, corrupt = plain.patterns("clean"), plain.patterns("corrupt")
    swept, guessed = engine.run(Sweep(Study(PROMPT), "pattern")), engine.run(Estimate(Study(PROMPT), "pattern"))
    for layer in range(2):
        leaf = corrupt[layer].clone().requires_grad_()
        (slope,) = t.autograd.grad(plain.metric("corrupt", layer, leaf, None), leaf)
        for head in range(4):
            with t.no_grad():
                want = plain.metric("corrupt", layer, clean[layer], head).item()
                zero = plain.metric("clean", layer, 0 * clean[layer], head).item()
            by_pattern, by_z = (engine.run(Run(under(f"L{layer}H{head}{part}=zero"))).now.metric for part in (".pattern", ""))
            np.testing.assert_allclose([by_pattern, by_z], zero, atol=1e-4)
            np.testing.assert_allclose(swept.values[layer, head], want, atol=1e-4)
            change = (slope * (clean[layer] - corrupt[layer]))[0, head].sum().item()
            np.testing.assert_allclose(guessed.values[layer, head] - guessed.base, change, atol=1e-4)
        shown = engine.run(Attention(Study(PROMPT), layer, "clean"))
        seen = ~np.isnan(shown.pattern)
        assert (seen | (clean[layer][0].numpy() == 0)).all(), "blank where a head can't look, and there alone"
        np.testing.assert_allclose(shown.pattern[seen], clean[layer][0].numpy()[seen], atol=1e-5)
    engine.check_hooks()


# ------------------------------------------------------------------ the whole forward pass


@pytest.mark.parametrize("family", ["cohere", "falcon"])
def test_families_that_transformer_lens_misreads(loaded, folders, family):
    model = loaded[family].model
    hf = tr.AutoModelForCausalLM.from_pretrained(folders[family], attn_implementation="eager").eval()
    ids = model.random_ids(20, 2, seed=3)
    with t.no_grad():
        np.testing.assert_allclose(model.forward(ids, keep=0)[0], hf(ids).logits, atol=1e-4)
    assert not model.notes.refused and all(c.ok for c in model.info.checks)


EVERY = (
    Run(Study(PROMPT)),
    Lens(Study(PROMPT)),
    Attention(Study(PROMPT)),
    Attribution(Study(PROMPT)),
    Sweep(Study(PROMPT), "resid_pre"),
    Estimate(Study(PROMPT), "z"),
    PathPatch(Study(PROMPT), receivers=("logits",)),
    Discover(Study(PROMPT), method="eap"),
    Score(Study(PROMPT), Circuit(nodes=("L0H0",))),
)


def all_refused(engine: Engine, why: str, *asks) -> None:
    for ask in asks:
        with pytest.raises(UserError, match=why):
            engine.run(ask)
        engine.check_hooks()


def test_another_forward_pass_than_hugging_faces_is_refused_everywhere(folders, monkeypatch):
    all_refused(Engine(folders["hunyuan"]), "HunYuanDenseV1ForCausalLM: TransformerLens's forward pass is not Hugging Face's own", *EVERY)
    monkeypatch.setattr(live_hooks, "turn_neighbours", lambda bridge: None)
    engine = Engine(folders["cohere"])
    all_refused(engine, "CohereForCausalLM: TransformerLens's forward pass is not Hugging Face's own", *EVERY)
    assert "not Hugging Face's own" in engine.model.info.warning
    assert "not Hugging Face's own" in engine.run(Identities(Study(PROMPT))).convention
    assert next(c for c in engine.model.info.checks if c.name == "forward pass = Hugging Face's own").ok is False


# ------------------------------------------------------------------ single sites


def test_a_dead_hook_is_refused_by_name(folders, monkeypatch):
    monkeypatch.setattr(bridge_module, "live_points", lambda bridge, dtype: dict(bridge.hook_dict))
    engine = Engine(folders["gptj"])
    why = "GPTJForCausalLM: writing attention patterns does not reach this model"
    asks = (Run(under("L0H1.pattern=zero")), Sweep(Study(PROMPT), "pattern"), Estimate(Study(PROMPT), "pattern"), Attention(Study(PROMPT)))
    all_refused(engine, why, *asks, HeadStats(Study(PROMPT)), Detect(Study(PROMPT)), AttentionSet(Study(PROMPT, prompt_set=(PROMPT,))))
    assert engine.model.info.warning == why
    assert engine.run(Run(under("L0H1=zero"))).now.metric != engine.run(Run(Study(PROMPT))).now.metric
    rows = engine.run(Identities(Study(PROMPT))).rows
    assert all(r.ok is not False for r in rows)


def test_hook_points_that_stand_for_another_site_are_refused(folders, monkeypatch):
    def crossed(bridge, dtype):
        points = dict(bridge.hook_dict)
        k, v = "blocks.1.attn.hook_k", "blocks.1.attn.hook_v"
        return points | {k: points[v], "blocks.0.hook_mlp_out": points["blocks.0.hook_attn_out"]}

    monkeypatch.setattr(bridge_module, "live_points", crossed)
    engine = Engine(folders["llama"])
    assert {"k", "parts"} <= set(engine.model.notes.refused)
    all_refused(engine, "LlamaForCausalLM: writing keys is .* off", Run(under("L0H0.k=zero")), Sweep(Study(PROMPT), "k"), Estimate(Study(PROMPT), "k"))
    all_refused(engine, "does not add up", Attribution(Study(PROMPT)), PathPatch(Study(PROMPT), receivers=("logits",)), Discover(Study(PROMPT), method="acdc"))


def test_a_broken_resume_is_found_at_load_and_sweeps_are_whole_passes(folders, monkeypatch):
    inner = ChangedBlocks.attended
    monkeypatch.setattr(ChangedBlocks, "heads_apart", lambda self, part: True)
    monkeypatch.setattr(ChangedBlocks, "attended", lambda *args: 1.1 * inner(*args))
    engine = Engine(folders["llama"])
    assert next(c for c in engine.model.info.checks if c.name == "resumed sweep = whole passes").ok is False
    found, plain = (engine.run(Sweep(Study(PROMPT), "z", plain=p)) for p in (False, True))
    np.testing.assert_allclose(found.values, plain.values, atol=1e-5)
    assert "off" in found.mechanism


def test_every_site_is_probed_and_holds(loaded):
    model = loaded["llama"].model
    names = {c.name: c for c in model.info.checks}
    assert "forward pass = Hugging Face's own" in names and all(c.ok for c in names.values())
    for site in ("queries", "keys", "values", "heads' outputs (z)", "attention patterns", "attention outputs", "MLP outputs", "neurons"):
        assert names[f"writing {site}"].error < 1e-4


# ------------------------------------------------------------------ what has no attention, or a sink


def test_a_state_space_model_says_at_load_what_it_lacks(loaded):
    engine = loaded["mamba"]
    assert engine.model.info.warning.startswith("MambaForCausalLM: it has no attention outputs") and "\n" not in engine.model.info.warning
    assert np.isfinite(engine.run(Run(under("L1.resid_pre@-1=zero"))).now.metric)
    assert engine.run(Lens(Study(PROMPT))) is not None
    assert np.isfinite(engine.run(Sweep(Study(PROMPT), "resid_pre")).values).all()
    all_refused(engine, "MambaForCausalLM", Attention(Study(PROMPT)), Attribution(Study(PROMPT)), Sweep(Study(PROMPT), "z"), *EVERY[6:])


def test_a_hybrid_says_which_layers_lack_attention(loaded):
    engine = loaded["jamba"]
    assert "JambaForCausalLM: layer 0 has no" in engine.model.info.warning
    assert np.isfinite(engine.run(Run(Study(PROMPT))).now.metric)
    assert np.isfinite(engine.run(Sweep(Study(PROMPT), "resid_pre", only=((1, 3),))).values[1, 3])
    all_refused(engine, "JambaForCausalLM: layer 0 has no", Attention(Study(PROMPT)), Sweep(Study(PROMPT), "z"))


def test_an_attention_sink_is_a_column_of_its_own(loaded, folders):
    from techniques.attention.pictures import pattern_grid

    engine = loaded["gpt_oss"]
    assert all(c.ok for c in engine.model.info.checks)
    found = engine.run(Attention(Study(PROMPT), 1, "clean"))
    hf = tr.AutoModelForCausalLM.from_pretrained(folders["gpt_oss"], attn_implementation="eager").eval()
    with t.no_grad():
        pattern = hf(t.tensor([engine.model.check(PROMPT).clean.ids]), output_attentions=True).attentions[1][0]
    np.testing.assert_allclose(found.sink, 1 - pattern.sum(-1), atol=1e-5)
    assert found.sink.max() > 0.01
    grid = pattern_grid(found, 2)
    assert grid.cols[-1] == "sink" and np.allclose(np.nansum(grid.values, 1), 1, atol=1e-5)


# ------------------------------------------------------------------ heads and neurons are what they are called


def test_heads_cut_at_another_width_than_w_o_reads_are_refused(tmp_path, monkeypatch):
    folder = str(build("youtu", tmp_path / "youtu"))
    assert Engine(folder).model.info.d_head == 8
    monkeypatch.setattr(live_hooks, "cut_heads", lambda bridge: None)
    all_refused(Engine(folder), "heads' outputs .z. of layer 0 are not cut into 4 heads", Run(under("L0H2=zero")), Sweep(Study(PROMPT), "z"))


def test_a_layer_of_experts_has_no_neurons(loaded, tmp_path):
    all_refused(loaded["gpt_oss"], "it has no neurons", Run(under("L0.mlp.n3=zero")), Sweep(Study(PROMPT), "neurons", node="L0.mlp"))
    engine = Engine(str(build("laguna", tmp_path / "laguna")))
    all_refused(engine, "layer 1 has no neurons, but experts", Run(under("L1.mlp.n3=zero")), Sweep(Study(PROMPT), "neurons", node="L1.mlp"))
    assert engine.run(Run(under("L0.mlp.n47=zero"))).now.metric != engine.run(Run(Study(PROMPT))).now.metric


def test_an_eager_attention_that_is_not_the_default_one_is_refused(tmp_path, monkeypatch):
    folder = str(build("falcon-alibi", tmp_path / "falcon"))
    assert not Engine(folder).model.notes.refused
    monkeypatch.setattr(loading, "alibi_once", lambda hf: None)
    all_refused(Engine(folder), "is not its default attention", Run(Study(PROMPT)), Sweep(Study(PROMPT), "z"))
