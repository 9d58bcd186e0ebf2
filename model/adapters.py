"""TransformerLens's adapters, corrected where they misread a family's weights. Each load compares with Hugging Face's own forward pass."""

from types import SimpleNamespace

import torch as t
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.supported_architectures import FalconArchitectureAdapter


class FalconAdapter(FalconArchitectureAdapter):
    """Falcon 40B and 180B (`new_decoder_architecture`): each group of heads has its queries, key and value side by side in one matrix."""

    def __init__(self, cfg: object):
        if getattr(cfg, "new_decoder_architecture", False):
            cfg.multi_query = False  # else every head would share one key and value
            cfg.n_key_value_heads = getattr(cfg, "num_kv_heads", None) or cfg.n_key_value_heads
        super().__init__(cfg)

    def _split_falcon_qkv(self, attention: t.nn.Module) -> tuple[t.nn.Linear, t.nn.Linear, t.nn.Linear]:
        if not self._is_new_arch:
            return super()._split_falcon_qkv(attention)
        qkv, groups, size = attention.query_key_value, attention.num_kv_heads, attention.head_dim

        def apart(x: t.Tensor | None) -> t.Tensor | None:
            if x is None:
                return None
            rows = x.detach().view(groups, -1, size, *x.shape[1:])
            return t.cat([part.flatten(0, 2) for part in (rows[:, :-2], rows[:, -2:-1], rows[:, -1:])])

        return super()._split_falcon_qkv(SimpleNamespace(query_key_value=SimpleNamespace(weight=apart(qkv.weight), bias=apart(qkv.bias))))


ArchitectureAdapterFactory.register_adapter("FalconForCausalLM", FalconAdapter)
