"""What is fitted on a model and kept in a folder: which model it belongs to, the text it is fitted on, and files that are whole or absent."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch as t
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from model.bridge import Model
from model.memory import first_line
from utils import ROOT
from vocabulary.files import replacing, typed_path
from vocabulary.typed import read_text
from vocabulary.nodes import UserError

WHOLE = {1: t.int8, 2: t.int16, 4: t.int32, 8: t.int64}  # as wide as a number of so many bytes
BROKEN = (RuntimeError, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError, pickle.UnpicklingError, SafetensorError)


def why_broken(error: BaseException) -> str:
    """In a few words. A pickle that holds more than tensors is refused for good: loading it can run any program, so torch's advice to allow that is left out."""
    return "it is a pickle of more than tensors, which could run any program" if isinstance(error, pickle.UnpicklingError) else first_line(error)


def unembed_hash(model: Model) -> str:
    """As the tuned-lens package makes it: sha256 of how numpy prints the unembedding [vocab, d_model] with one digit, its corners only."""
    weight = model.bridge.original_model.get_output_embeddings().weight.detach()
    corners = weight.cpu() if weight.dtype != t.bfloat16 else weight.float().cpu()
    with np.printoptions(threshold=1000, edgeitems=3, linewidth=75, suppress=False):
        return hashlib.sha256(np.array_str(corners.numpy(), precision=1).encode()).hexdigest()


@t.no_grad()
def sampled(hf: t.nn.Module) -> str:
    """Sixteen digits for the weights: 64 numbers of every parameter. Quick, the same on every device; an edit of a few rows can escape it (`fingerprint` sees it)."""
    digest = hashlib.sha256()
    for name, p in hf.named_parameters():
        flat = p.reshape(-1)
        some = flat[(t.arange(n := min(64, len(flat))) * (len(flat) - 1) // max(n - 1, 1)).to(p.device)]
        digest.update(f"{name} {tuple(p.shape)}".encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@t.no_grad()
def fingerprint(model: Model) -> str:
    """A digest of the config and of all weights, the same on every device: each parameter's bits as whole numbers, summed, and 64 of its numbers. Made once a scale."""
    known, key = model.notes.measured, ("fingerprint", model.info.scale)
    if key not in known:
        hf = model.bridge.original_model
        config = hf.config.to_json_string() if isinstance(hf.config, PretrainedConfig) else repr(hf.config)
        bits = [p.reshape(-1).view(WHOLE[p.element_size()]).sum(dtype=t.int64).item() for p in hf.parameters()]
        known[key] = hashlib.sha256(repr((config, model.info.repairs, sampled(hf), model.info.scale, bits)).encode()).hexdigest()
    return known[key]


def windows(model: Model, file: Path, length: int, seed: int) -> Tensor:
    """A text file as rows of `length` tokens, BOS first where the model wants it, in a random order; a shuffle by `seed`."""
    if not file.is_file():
        raise UserError(f"no text at {file}: give a text file")
    if not 2 <= length <= model.info.n_ctx:
        raise UserError(f"length must be 2 to {model.info.n_ctx}, the model's context")
    ids = model.encode(read_text(file))[0]
    ids = [i for i in ids if i < model.n_embed]
    bos = [model.bos] * (model.info.default_bos and model.bos is not None)
    own = length - len(bos)
    rows = [bos + ids[i : i + own] for i in range(0, len(ids) - own + 1, own)]
    if len(rows) < 4:
        raise UserError(f"{file} has {len(ids)} tokens: a fit needs at least {4 * own}")
    return t.tensor(rows)[t.randperm(len(rows), generator=t.Generator().manual_seed(seed))]


def corpus(text: str) -> Path:
    """The text file of that name, or the zoo's own."""
    return typed_path(text) if text else ROOT / "zoo" / "corpus.txt"


def save(out: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Whole or not at all."""
    with replacing(out / name, SafetensorError) as part:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, part, metadata)
