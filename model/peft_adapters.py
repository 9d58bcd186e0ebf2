"""
Adapters: PEFT's LoRA folders (adapter_config.json) on their base, W = W0 + s dW with a scale s from 0 to 1.

PEFT reads the folder and says what each matrix changes by; the changed weights are written where the base's were, so that everything else is one plain model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch as t
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.memory import first_line, is_out_of_memory
from vocabulary.nodes import UserError
from vocabulary.typed import parse_json, read_text

NOT_LINEAR = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "trainable_token_indices", "target_parameters", "modules_to_save")


@dataclass
class Adapter:
    """What an adapter changes: matrices as they stand in the model, as they are in the base, and what is added to each at scale 1; `places`: where the module's tensors lie."""

    base: str
    changed: list[tuple[Tensor, Tensor, Callable[[], Tensor]]]
    places: frozenset[int] = frozenset()
    scale: float = 1.0

    @t.no_grad()
    def apply(self, scale: float) -> None:
        """Write W0 + scale dW, made in float32 and rounded once, into every matrix (in place: views of it follow)."""
        for weight, own, change in self.changed:
            weight.copy_(own if scale == 0 else own.float() + scale * change().float().to(own.device))
        self.scale = scale

    @property
    def storages(self) -> set[int]:
        """Where its matrices lie, which no other model may read from."""
        return {weight.untyped_storage().data_ptr() for weight, _, _ in self.changed}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of PEFT's."""
    return (folder / "adapter_config.json").is_file()


def read_settings(folder: Path) -> dict:
    """adapter_config.json. UserError for what is no LoRA whose change can be added to the weights, scaled."""
    config = parse_json(read_text(folder / "adapter_config.json"))
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise UserError(f"{folder} is an adapter of kind {kind}: Loupe reads LoRA, whose change is added to the weights")
    more = [name for name in NOT_LINEAR if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if more:
        raise UserError(
            f"{folder}: an adapter with {', '.join(more)} is not W0 + s dW: merge it with PEFT (merge_and_unload) and compare the two models (--against)"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"{folder} has no adapter_model.safetensors: save the adapter with save_pretrained(safe_serialization=True)")
    return config


def base_of(folder: Path, given: str | None) -> str:
    """The name of an adapter's base: the one that is given, else what its config says."""
    name = given or read_settings(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UserError(f"{folder} does not say what its base is: name it (--base, base=)")
    return name


def put_on(hf: t.nn.Module, folder: Path, base: str, scale: float) -> Adapter:
    """Read an adapter onto Hugging Face's module of its base, which keeps its shape; the change is in its weights at `scale`."""
    from peft import LoraConfig, PeftModel, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    read_settings(folder)
    try:
        with t.random.fork_rng(devices=[]):
            wrapped = PeftModel(hf, LoraConfig.from_pretrained(folder))
        report = set_peft_model_state_dict(wrapped, load_file(folder / "adapter_model.safetensors"))
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the adapter {folder} does not fit {base} ({first_line(error)}): is that its base?") from error
    lost = [k for k in report.missing_keys if "lora_" in k] + list(report.unexpected_keys)
    if lost:
        raise UserError(f"the adapter {folder} does not fit {base} ({len(lost)} tensors, first {min(lost)}): is that its base?")
    layers = [m for m in wrapped.modules() if isinstance(m, LoraLayer)]
    tied = {id(p) for p in (hf.get_input_embeddings().weight,) if p is getattr(hf.get_output_embeddings(), "weight", None)}
    if any(id(m.get_base_layer().weight) in tied for m in layers):
        raise UserError(
            f"{folder} changes embeddings that {base} also uses as its unembedding: merge it with PEFT (merge_and_unload) and compare the two models"
        )
    changed = [(w := m.get_base_layer().weight, w.detach().clone(), partial(m.get_delta_weight, "default")) for m in layers]
    wrapped.unload()
    places = frozenset(x.untyped_storage().data_ptr() for x in hf.parameters())
    adapter = Adapter(base, [(w.detach(), own, change) for w, own, change in changed], places)
    adapter.apply(scale)
    return adapter
