"""A Jacobian lens fitted in parts: the mean of each lies in a safetensors file, and TransformerLens's own function merges them."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor
import torch as t

from model.artefacts import BROKEN, save, why_broken
from vocabulary.files import replacing
from vocabulary.nodes import UserError


def changed_by(new: dict[int, Tensor], old: dict[int, Tensor]) -> float:
    """Mean relative change of the matrices."""
    return float(np.mean([((new[n] - m).norm() / m.norm()).item() for n, m in old.items()]))


def save_part(out: Path, lens: object, last: dict[int, Tensor], text: str) -> None:
    """The mean of one part of the prompts, by layer; of the part with the last prompt, that prompt's own matrices too."""
    tensors = {f"mean.{n}": m for n, m in lens.jacobians.items()} | {f"last.{n}": m.clone() for n, m in last.items()}
    save(out.parent, out.name, tensors, {"about": json.dumps({"n_prompts": lens.n_prompts, "d_model": lens.d_model, "metadata": lens.metadata}), "text": text})


def read_part(file: Path) -> tuple[object, dict[int, Tensor], str]:
    """What `save_part` wrote. UserError where it can't be read."""
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    try:
        with safe_open(file, "pt") as f:
            meta, found = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
        mean, last = ({int(k.partition(".")[2]): m for k, m in found.items() if k.startswith(f"{name}.")} for name in ("mean", "last"))
        return JacobianLens(mean, **json.loads(meta["about"])), last, meta["text"]
    except BROKEN as error:
        raise UserError(f"{file} is no part of a Jacobian lens ({why_broken(error)}): remove it, and scatter the same words again") from error


def merge_jacobian(files: Iterable[Path], out: Path) -> tuple[int, float]:
    """The lens over the prompts of all parts, written to `out`; over how many that is, and how much the last prompt changed it. UserError where the text changed meanwhile."""
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    lens, last, text = None, {}, None
    for file in files:
        one, last, its_text = read_part(file)
        if text not in (None, its_text):
            raise UserError(f"{file}: the text changed while the tasks ran: remove the parts, and scatter the same words again")
        lens, text = one if lens is None else JacobianLens.merge([lens, one]), its_text
    n, change = lens.n_prompts, 0.0
    if n > 1 and last:
        change = changed_by(lens.jacobians, {layer: (n * lens.jacobians[layer] - m) / (n - 1) for layer, m in last.items()})
    with replacing(out, RuntimeError) as part:
        lens.save(str(part), dtype=t.float32)
    return n, change
