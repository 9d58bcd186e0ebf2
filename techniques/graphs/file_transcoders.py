"""
Transcoders of a folder in circuit-tracer's layout, read when they are needed: a cross-layer one (W_enc_0.safetensors, W_dec_0.safetensors, …: features of a layer
write to its MLP's output and to those of all later layers), or one a layer (layer_0.safetensors, …). Its config.yaml names the hook points.
"""

from functools import cached_property
from pathlib import Path

import torch as t
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.bridge import Model
from model.memory import first_line
from model.sae import check_width, read_point, site
from utils import ROOT
from vocabulary.files import typed_path
from vocabulary.nodes import UserError

CHUNK = 32 << 20  # bytes of encoder rows at once
KINDS = {"cross_layer_transcoder": "W_enc_{}.safetensors", "transcoder_set": "layer_{}.safetensors"}


class FileTranscoder:
    """The features of one layer: `W_enc` [feature, d_model] and `W_dec` [feature, (layers written to,) d_model] stay in the file, biases are held. JumpReLU with a threshold, else ReLU."""

    transcoder, kind = True, "transcoder"

    def __init__(self, model: Model, source: str, folder: Path, layer: int, last: int, hooks: tuple[str, str, str]):
        self.source, self.layer, self.last, self.crosses = source, layer, last, hooks[0] == "cross"
        self.mark, file = f"_{layer}" if self.crosses else "", f"W_enc_{layer}" if self.crosses else f"layer_{layer}"
        self.encoder = folder / f"{file}.safetensors"
        self.decoder = folder / f"W_dec_{layer}.safetensors" if self.crosses else self.encoder
        hook, self.hook_out = (f"blocks.{layer}.{h}" for h in hooks[1:])
        self.point, self.site, self.out, self.device = read_point(model, source, hook), site(hook), read_point(model, source, self.hook_out), model.device
        held = lambda name: self.held(f"{name}{self.mark}")  # noqa: E731
        self.stamp = hooks, *((p.stat().st_mtime_ns, p.stat().st_size) for p in (self.encoder, self.decoder) if p.is_file())
        self.b_enc, self.b_dec, self.skip = held("b_enc"), held("b_dec"), held("W_skip")
        self.threshold = self.held(f"threshold{self.mark}" if self.crosses else "activation_function.threshold")
        if self.b_enc is None or self.b_dec is None:
            raise UserError(f"{self.encoder} has no b_enc{self.mark} and b_dec{self.mark}: it is not in circuit-tracer's layout")
        self.d_sae, self.d_in, width = self.b_enc.numel(), self.rows_in.get_shape()[-1], self.b_dec.numel()
        fits(self.encoder, "W_enc", self.rows_in.get_shape(), [self.d_sae, self.d_in])
        fits(self.decoder, "W_dec", self.rows_out.get_shape(), [self.d_sae, *([last - layer + 1] if self.crosses else []), width])
        for name, x, want in (
            ("b_enc", self.b_enc, [self.d_sae]),
            ("b_dec", self.b_dec, [width]),
            ("threshold", self.threshold, [self.d_sae]),
            ("W_skip", self.skip, [width, self.d_in]),
        ):
            fits(self.encoder, name, want if x is None else list(x.shape), want)
        check_width(model, source, self.point, self.d_in)
        check_width(model, source, self.out, width)

    @cached_property
    def rows_in(self):
        return self.rows(self.encoder, f"W_enc{self.mark}")

    @cached_property
    def rows_out(self):
        return self.rows(self.decoder, f"W_dec{self.mark}")

    def rows(self, path: Path, name: str):
        if name not in (f := self.file(path)).keys():
            raise UserError(f"{path} has no {name}: it is not in circuit-tracer's layout")
        return f.get_slice(name)

    def file(self, path: Path):
        try:
            return safe_open(path, "pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or not a safetensors file ({first_line(error)}): copy it again") from error

    def held(self, name: str) -> Tensor | None:
        f = self.file(self.encoder)
        return t.atleast_1d(f.get_tensor(name).to(self.device, t.float32).squeeze()) if name in f.keys() else None

    @property
    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        return sum(x.nbytes for x in (self.b_enc, self.b_dec, self.threshold, self.skip) if x is not None)

    @property
    def key(self) -> tuple:
        return self.source, self.layer

    def flat(self, x: Tensor) -> Tensor:
        return x.to(self.device, t.float32)

    def fire(self, x: Tensor, w: Tensor, some: slice | Tensor) -> Tensor:
        """Activations [n, feature] of features whose encoder rows are w."""
        pre = self.flat(x) @ w.to(self.device, t.float32).T + self.b_enc[some]
        return t.relu(pre) if self.threshold is None else pre * (pre > self.threshold[some])

    def pieces(self) -> list[slice]:
        size = max(1, CHUNK // (4 * self.d_in))
        return [slice(i, min(i + size, self.d_sae)) for i in range(0, self.d_sae, size)]

    @t.no_grad()
    def active(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of an input [seq, d_in] the features that fire: positions, indices and values [n], by position."""
        parts = []
        for piece in self.pieces():
            f = self.fire(x, self.rows_in[piece], piece)
            where, index = f.nonzero(as_tuple=True)
            parts.append((where, index + piece.start, f[where, index]))
        where, index, value = (t.cat(p) for p in zip(*parts))
        order = (where * self.d_sae + index).argsort()
        return where[order], index[order], value[order]

    @t.no_grad()
    def each(self, x: Tensor, index: Tensor) -> Tensor:
        """Of an input [n, d_in], one a feature, the feature's activation [n]."""
        index = index.cpu()
        return self.fire(x, self.rows_in[index], index.to(self.device)).diagonal()

    def reader(self, index: int, x: Tensor) -> tuple[Tensor, float]:
        """A feature's pre-activation: direction [d_in] and constant."""
        return self.rows_in[index : index + 1][0].to(self.device, t.float32), self.b_enc[index].item()

    def offset(self, x: Tensor) -> Tensor:
        """What is written beside the features [..., d_model] to its own layer: the bias, and a skip connection."""
        return self.b_dec.expand(*x.shape[:-1], -1) + (0.0 if self.skip is None else self.flat(x) @ self.skip.T)

    def writes(self, index: Tensor) -> Tensor:
        """What one unit of features writes [n, layers written to, d_model]."""
        rows = self.rows_out[index.cpu()].to(self.device, t.float32)
        return rows if self.crosses else rows[:, None]


def fits(path: Path, name: str, shape: list[int], want: list[int]) -> None:
    if shape != want:
        raise UserError(f"{path}: {name} has the shape {shape}, and {want} is needed, as its other tensors are")


def folder_of(source: str) -> Path | None:
    """A folder in circuit-tracer's layout, or None."""
    folder = typed_path(source)
    folder = folder if folder.is_absolute() or folder.is_dir() else ROOT / folder
    return folder if any((folder / file.format(0)).is_file() for file in KINDS.values()) else None


def read_all(model: Model, source: str, folder: Path) -> list[FileTranscoder]:
    """A transcoder for each layer. UserError where files, hooks or shapes do not fit."""
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        hooks = config["feature_input_hook"], config["feature_output_hook"]
        file = KINDS[config["model_kind"]]
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValueError, RecursionError) as error:
        words = f"model_kind ({' or '.join(KINDS)}), feature_input_hook and feature_output_hook"
        raise UserError(f"{folder / 'config.yaml'} can't be read ({type(error).__name__}): it holds {words}, as circuit-tracer's do") from error
    if bad := [h for h in hooks if not isinstance(h, str) or len(h.split()) != 1]:
        raise UserError(f"{folder / 'config.yaml'}: {bad[0]!r} is no hook point: feature_input_hook and feature_output_hook are one word each")
    crosses = config["model_kind"] == "cross_layer_transcoder"
    n = model.info.n_layers
    some = [layer for layer in range(n) if (folder / file.format(layer)).is_file()]
    if crosses and some != list(range(n)) or (folder / file.format(n)).is_file():
        raise UserError(f"{folder} has files of other layers than the model's 0 to {n - 1}: it is of another model")
    return [FileTranscoder(model, source, folder, layer, n - 1 if crosses else layer, ("cross" if crosses else "own", *hooks)) for layer in some]
