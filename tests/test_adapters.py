"""Adapters (PEFT's LoRA folders) against PEFT's own forward pass, at full and half scale; beside their base; what is refused."""

import json

import numpy as np
import pytest
import torch as t
from conftest import PROMPT
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM

from engine import Engine
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from vocabulary.nodes import UserError
from vocabulary.prompts import Study
from vocabulary.requests import Load

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "neox": ["query_key_value", "dense"], "llama": ["q_proj", "v_proj", "o_proj", "down_proj"]}


def adapter(base, out, arch: str, **more):
    """A random LoRA on the middle and last layer, saved by PEFT."""
    t.manual_seed(5)
    hf = AutoModelForCausalLM.from_pretrained(base, dtype=t.float32)
    some = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[arch], "layers_to_transform": [1, 2], "fan_in_fan_out": arch == "gpt2"}
    wrapped = get_peft_model(hf, LoraConfig(**some | more, task_type="CAUSAL_LM"))
    with t.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name:
                p += 0.2 * t.randn_like(p)
    wrapped.save_pretrained(out)
    return out


def peft_logits(base, folder, ids, scale: float) -> np.ndarray:
    """PEFT's own forward pass: x W0 + scale x A B, never merged."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=t.float32, attn_implementation="eager"), folder).eval()
    for m in model.modules():
        if isinstance(m, LoraLayer):
            m.scale_layer(scale)
    with t.no_grad():
        return model(t.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("arch", [pytest.param("gpt2", marks=pytest.mark.table), "llama", "neox"])  # the last: fused matrices, of which the Bridge holds copies
def test_an_adapter_is_pefts_own_at_every_scale(folders, tmp_path, arch):
    base, folder = folders[arch], adapter(folders[arch], tmp_path / "adapter", arch)
    engine = Engine(Load(str(folder), scale=0.5))
    ids = engine.model.check(PROMPT).clean.ids
    seen = {}
    for scale in (0.5, 1.0, 0.0):
        info = engine.run(Load(str(folder), scale=scale))
        assert info.scale == scale and info.base == str(base) and f"× {scale:g}" in info.key
        seen[scale] = engine.model.forward(t.tensor([ids]), keep=0)[0][0].numpy()
        np.testing.assert_allclose(seen[scale], peft_logits(base, folder, ids, scale), atol=1e-4)
        fast, plain = (engine.run(Sweep(Study(PROMPT), "nodes", plain=p)).values for p in (False, True))
        np.testing.assert_allclose(fast, plain, atol=1e-4)
    assert np.abs(seen[1.0] - seen[0.5]).max() > 0.05 < np.abs(seen[0.5] - seen[0.0]).max(), "a weak test"
    alone = Engine(str(base)).model.forward(t.tensor([ids]), keep=0)[0][0].numpy()
    np.testing.assert_array_equal(seen[0.0], alone)


def test_an_adapter_beside_its_base(folders, tmp_path):
    """Patched from the base, at two scales, either of the two being the first; only what the adapter leaves alone is shared."""
    base, folder = str(folders["llama"]), str(adapter(folders["llama"], tmp_path / "adapter", "llama"))
    engine = Engine(Load(folder, against=base))
    study = Study(PROMPT, against=base)
    own, other = (dict(m.bridge.original_model.named_parameters()) for m in engine.model.pair)
    apart = {n for n in own if own[n].data_ptr() != other[n].data_ptr()}
    assert len(apart) == 2 * len(TARGETS["llama"]) and len(apart) < len(own) / 2
    whole = engine.run(Run(study))
    engine.run(Load(folder, against=base, scale=0.0))
    none = engine.run(Run(study))
    assert none.names == ("adapter × 0", "llama") and none.clean.metric == pytest.approx(whole.corrupt.metric, abs=1e-5) != whole.clean.metric
    engine.run(Load(base, against=folder, scale=0.5))
    half = engine.run(Run(Study(PROMPT, against=folder)))
    assert half.names == ("llama", "adapter × 0.5") and half.clean.metric == pytest.approx(whole.corrupt.metric, abs=1e-5)
    row = peft_logits(base, folder, half.clean.tokens.ids, 0.5)[-1]
    assert half.corrupt.metric == pytest.approx(row[half.answers[0]] - row[half.foils[0]], abs=1e-4)
    engine.run(Load(base, against=folder, scale=1.0))
    assert engine.run(Run(Study(PROMPT, against=folder))).corrupt.metric == pytest.approx(whole.clean.metric, abs=1e-5)


def test_what_is_no_scaled_change_is_refused(folders, tmp_path):
    base = folders["llama"]
    for more, why in ({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"):
        with pytest.raises(UserError, match=why):
            Engine(str(adapter(base, tmp_path / why, "llama", **more)))
    with pytest.raises(UserError, match="does not fit"):
        Engine(Load(str(adapter(base, tmp_path / "a", "llama")), base=str(folders["qwen3"])))
    other = tmp_path / "b"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="kind IA3"):
        Engine(str(other))
    with pytest.raises(UserError, match="is no adapter"):
        Engine(Load(str(base), scale=0.5))
    with pytest.raises(UserError, match="from 0 to 1"):
        Engine(Load(str(base), scale=1.5))
