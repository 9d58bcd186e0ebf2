"""What heads and MLPs write into the residual stream, and norms with their scale frozen."""

import torch as t
from torch import Tensor

from model.bridge import Model


def frozen_norm(norm: t.nn.Module, scale: Tensor, x: Tensor, model: Model) -> Tensor:
    """A norm as the linear map it is with its scale frozen, without its bias. LayerNorm takes the mean off first."""
    weight = norm.weight + 1 if getattr(model.cfg, "rmsnorm_uses_offset", False) else norm.weight
    x = x if model.cfg.uses_rms_norm else x - x.mean(-1, keepdim=True)
    return (x / scale * weight).to(x.dtype)
