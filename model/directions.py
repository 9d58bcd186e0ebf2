"""
Directions to steer along: vectors [d_model] in safetensors files, with the hook point they belong to. One that Loupe made lies in `directions/` under a name
that ends in its digest, so that a session that names it never steers along another.
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as t
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.artefacts import save, why_broken
from model.bridge import Model
from vocabulary.files import folder, typed_path
from vocabulary.nodes import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,60}")
DIGEST = re.compile(r"-([0-9a-f]{8})$")
AWAY = "away"  # where directions lie that were put away: sessions that name them still find them


@dataclass(frozen=True)
class Vector:
    """A direction as it was read: float32 [d_model], where it belongs ("" where its file does not say), what it is, of which model."""

    x: Tensor
    at: str = ""
    words: str = ""
    model: str = ""


def digest(x: Tensor) -> str:
    return hashlib.sha256(np.ascontiguousarray(x.detach().cpu().float().numpy()).tobytes()).hexdigest()[:8]


def place(source: str) -> Path:
    """The file of a direction: a path, or a name of `directions/`, also one that was put away. UserError where there is none."""
    if "/" in source or source.endswith((".safetensors", ".npy")):
        path = typed_path(source)
    else:
        path = next((p for p in (folder("directions") / f"{source}.safetensors", folder("directions") / AWAY / f"{source}.safetensors") if p.is_file()), None)
    if path is None or not path.is_file():
        raise UserError(f"there is no direction {source!r}: $ lists those of {folder('directions')}, or give a .safetensors or .npy file")
    return path


def read(source: str) -> Vector:
    """A direction by its name or file. UserError for what is no vector, or not the one that the name's digest says."""
    path = place(source)
    try:
        if path.suffix == ".npy":
            found = Vector(t.from_numpy(np.array(np.load(path, allow_pickle=False), np.float32)))
        else:
            with safe_open(path, "pt") as f:
                names, meta = list(f.keys()), f.metadata() or {}
                if len(names) != 1 and "direction" not in names:
                    raise UserError(f"{path} holds {len(names)} tensors: a direction is one, or the one called direction")
                x = f.get_tensor("direction" if "direction" in names else names[0]).float()
            found = Vector(x, meta.get("hook_point", ""), meta.get("words", ""), meta.get("model", ""))
    except (SafetensorError, OSError, ValueError, TypeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is no direction: {why_broken(error)}") from error
    x = found.x.squeeze()
    if x.ndim != 1:
        raise UserError(f"{path} holds an array of shape {list(found.x.shape)}: a direction is one vector")
    if not x.isfinite().all() or x.norm() == 0:
        raise UserError(f"{path} is zero or not finite: it is no direction")
    if path.parent in (folder("directions"), folder("directions") / AWAY) and (own := DIGEST.search(path.stem)) and own[1] != digest(x):
        raise UserError(f"{path} is not what it was when it was made (its name says {own[1]}, it holds {digest(x)}): make it again")
    return Vector(x, found.at, found.words, found.model)


def vector(model: Model, source: str) -> Tensor:
    """A direction [d_model] on the model's device, float32."""
    x = read(source).x
    if len(x) != model.info.d_model:
        raise UserError(f"the direction {source} has {len(x)} numbers, and the model's residual stream {model.info.d_model}")
    return x.to(model.device)


def keep(model: Model, name: str, x: Tensor, at: str, words: str) -> str:
    """Write a direction to `directions/` with its hook point; the name it got."""
    if not NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a name: letters, digits and _ . + - (at most 60)")
    if not x.isfinite().all() or x.norm() == 0:
        raise UserError("this direction is zero or not finite: the two sides are alike there")
    name = f"{DIGEST.sub('', name)}-{digest(x)}"
    meta = {"hook_point": at, "words": words, "model": model.info.name, "made_by": "loupe"}
    save(folder("directions"), f"{name}.safetensors", {"direction": x.detach().cpu().float()}, meta)
    return name
