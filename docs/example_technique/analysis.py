"""The door: `answer(model, request)` for every request of this folder. The only file that imports torch."""

from collections.abc import Generator

import numpy as np
from torch import Tensor

from model.bridge import Model
from model.interventions import prepare

from .requests import Norms, NormsResult


def answer(model: Model, request: Norms) -> Generator:
    """The clean, corrupted and changed runs come from `prepare`; `visit` hands over one hook point after the other."""
    runs = yield from prepare(model, request.study)
    names, norms = model.lens_points(), {}

    def take(name: str, x: Tensor) -> None:  # x is [1, position, d_model]
        norms[name] = x[0].float().norm(dim=-1).cpu().numpy()

    runs.visit(request.which, names, take)
    convention = f"L2 norm of the raw residual stream, d_model {model.info.d_model}"
    return NormsResult(runs.row(request.which), tuple(map(address, names)), np.stack([norms[n] for n in names]), convention)


def address(hook: str) -> str:
    """blocks.2.hook_resid_mid as L2.resid_mid."""
    _, layer, site = hook.split(".")
    return f"L{layer}.{site.removeprefix('hook_')}"
