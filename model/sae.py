"""
What Loupe uses of an SAE or transcoder: encode, decode, rows and columns.

Everywhere decode is affine in the features once the input x is known: out = scale(x) * (f @ rows) + offset(x). `offset` holds the decoder's bias, a
mean that a normalisation or the centred view took off, a skip connection; `scale` what an input normalisation has to be undone by.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable

import torch as t
from torch import Tensor

from techniques.features.requests import SaeInfo
from vocabulary.nodes import UserError
from model.bridge import Model
from model.memory import first_line
from utils import ROOT

CHUNK_BYTES = 16 << 20  # of feature activations made at once
HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
SITES = {
    "hook_resid_pre": "resid_pre",
    "hook_resid_mid": "resid_mid",
    "hook_resid_post": "resid_post",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "z",
    "ln2.hook_normalized": "normed",
    "mlp.hook_in": "mlp_in",
    "hook_mlp_in": "mlp_stream",
}
OTHERS = ("ln1.hook_normalized", "mlp.hook_pre", "mlp.hook_post")


def number(x: object) -> float:
    """A number from a file, or NaN."""
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else math.nan


class SparseAutoencoder(t.nn.Module):
    """
    An SAE or transcoder in fp32, without hooks. `point` is read, `out` written (the same for an SAE); both are hook points of the model. `site` and
    `site_out` say what they are in Loupe's terms (resid_pre, attn, mlp, z, normed, ...; "" for other points).
    """

    def __init__(self, source: str, sae: t.nn.Module, model: Model, published: dict):
        super().__init__()
        cfg, meta = sae.cfg, sae.cfg.metadata
        self.source, self.kind = source, cfg.architecture()
        self.transcoder = "transcoder" in self.kind
        self.hook, self.hook_out = place(source, meta, self.transcoder)
        self.layer, self.site, self.site_out = int(HOOK.fullmatch(self.hook)[1]), site(self.hook), site(self.hook_out)
        self.point, self.out = read_point(model, source, self.hook), read_point(model, source, self.hook_out)
        if not self.transcoder and self.site == "mlp_stream":
            raise UserError(f"{source}: an SAE at hook_mlp_in writes where this model has no point of its own; use one at resid_mid")
        self.normalisation, self.view = cfg.normalize_activations, "raw"
        if (meta.model_from_pretrained_kwargs or {}).get("center_writing_weights") and not model.cfg.uses_rms_norm:
            self.view = "centred"
        self.verdicts: dict[tuple, object] = {}
        self.asked = self.passed = False  # the view was asked for; it has explained a prompt
        sae.turn_off_forward_pass_hook_z_reshaping()
        self.sae = sae.to(device=str(model.device), dtype=t.float32).eval()
        for p in self.sae.parameters():
            p.requires_grad_(False)
        self.d_in, self.d_sae = cfg.d_in, cfg.d_sae
        self.d_out = cfg.d_out if self.transcoder else cfg.d_in
        check_width(model, source, self.point, self.d_in)
        check_width(model, source, self.out, self.d_out)
        self.rescale = 1 / sae.W_dec.norm(dim=-1) if getattr(cfg, "rescale_acts_by_decoder_norm", False) else None
        self.l0, self.explained = number(published.get("l0", meta.l0)), number(published.get("variance_explained", meta.get("explained_variance")))
        self.neuronpedia = published.get("neuronpedia") or meta.neuronpedia_id or ""
        digest = hashlib.sha256(repr((self.kind, self.hook, self.d_sae)).encode())
        for name, p in sorted(self.sae.named_parameters()):
            digest.update(f"{name} {p.sum(dtype=t.float64).item()!r} {p.flatten()[:64].tolist()!r}".encode())
        self.digest = digest.hexdigest()[:16]

    @property
    def key(self) -> tuple:
        """What names it in caches."""
        return self.source, self.digest, self.view

    @property
    def info(self) -> SaeInfo:
        size = sum(p.nbytes for p in self.sae.parameters())
        return SaeInfo(
            self.source, self.kind, self.hook, self.hook_out, self.layer, self.d_in, self.d_sae, self.view, self.normalisation, self.l0, self.explained,
            self.neuronpedia, size,
        )  # fmt: skip

    @property
    def device(self) -> t.device:
        return self.sae.W_dec.device

    def flat(self, x: Tensor) -> Tensor:
        """A hook point's tensor as [..., d_in], fp32; heads of z side by side."""
        x = x.to(self.device, t.float32)
        return x.flatten(-2) if "z" in (self.site, self.site_out) and x.shape[-1] not in (self.d_in, self.d_out) else x

    def seen(self, x: Tensor) -> Tensor:
        """The view of the activation that the SAE was trained on."""
        x = self.flat(x)
        return x - x.mean(-1, keepdim=True) if self.view == "centred" else x

    def encode(self, x: Tensor) -> Tensor:
        """Features [..., d_sae] of a hook point's tensor."""
        x, sae = self.seen(x), self.sae
        if self.kind == "gated":  # sae_lens makes a second encoder matrix for this
            into = sae.process_sae_in(x) @ sae.W_enc
            return (into + sae.b_gate > 0) * t.relu(into * sae.r_mag.exp() + sae.b_mag)
        if self.kind == "temporal" and x.ndim == 2:
            return sae.encode(x[None])[0]
        return sae.encode(x)

    def weigh(self, f: Tensor) -> Tensor:
        """Features as multiples of the decoder's rows."""
        return f if self.rescale is None else f * self.rescale

    def scale(self, x: Tensor) -> Tensor | float:
        """What decoded features are multiplied by [..., 1]: the input's normalisation undone."""
        if self.transcoder:
            return 1.0
        match self.normalisation:
            case "layer_norm":
                return self.seen(x).std(-1, keepdim=True)
            case "constant_norm_rescale":
                return self.seen(x).norm(dim=-1, keepdim=True) / self.d_in**0.5
            case "constant_scalar_rescale":
                return 1 / self.sae.cfg.activation_normalization_factor
        return 1.0

    def offset(self, x: Tensor) -> Tensor:
        """What decode adds to the features [..., d_out]: bias, skip connection, and the means that were taken off."""
        seen, sae = self.seen(x), self.sae
        if self.kind == "temporal":
            whole = seen if seen.ndim == 3 else seen[None]
            return (sae(whole) - self.weigh(sae.encode(whole)) @ sae.W_dec * self.scale(whole)).view(seen.shape)
        bias = t.zeros_like(sae.b_dec) if self.kind == "matching_pursuit" and not sae.cfg.apply_b_dec_to_input else sae.b_dec
        if self.transcoder:
            return (bias + (seen @ sae.W_skip.T if hasattr(sae, "W_skip") else 0.0)).expand(*seen.shape[:-1], self.d_out)
        out = bias * self.scale(x)
        if self.normalisation == "layer_norm":
            out = out + seen.mean(-1, keepdim=True)
        return (out + (self.flat(x).mean(-1, keepdim=True) if self.view == "centred" else 0.0)).expand(*seen.shape[:-1], self.d_out)

    def decode(self, f: Tensor, x: Tensor) -> Tensor:
        """The reconstruction [..., d_out] of what is written, from features and the input they were read from."""
        return self.weigh(f) @ self.sae.W_dec * self.scale(x) + self.offset(x)

    def rows(self, index: Tensor | list[int]) -> Tensor:
        """Decoder rows [n, d_out]: what one unit of a feature writes (before `scale`)."""
        rows = self.sae.W_dec[index]
        return rows if self.rescale is None else rows * self.rescale[index][..., None]

    def column(self, index: int) -> tuple[Tensor, float] | None:
        """Encoder direction [d_in] and constant of a feature's pre-activation, linear in `seen` (of an unnormalised input); None where it is not."""
        sae = self.sae
        if self.kind in ("temporal", "matching_pursuit"):
            return None
        w, b = sae.W_enc[:, index], getattr(sae, "b_enc", None)
        bias = 0.0 if b is None else b[index].item()
        if self.kind == "gated":
            w, bias = w * sae.r_mag[index].exp(), sae.b_mag[index].item()
        if self.kind in ("topk", "abstopk") and self.rescale is not None:
            w, bias = w / self.rescale[index], bias / self.rescale[index].item()
        if not self.transcoder and sae.cfg.apply_b_dec_to_input:
            bias -= (sae.b_dec @ w).item()
        return w, bias

    def reader(self, index: int, x: Tensor) -> tuple[Tensor, float] | None:
        """A feature's pre-activation at one input x [d_in] as direction [d_in] and constant, scales of normalisations frozen: direction . flat(x) + constant."""
        column = self.column(index)
        if column is None:
            return None
        (w, bias), seen = column, self.seen(x)
        match self.normalisation:
            case "layer_norm":
                w = (w - w.mean()) / ((seen - seen.mean()).std() + 1e-5)
            case "constant_norm_rescale":
                w = w * self.d_in**0.5 / seen.norm()
        return w - w.mean() if self.view == "centred" else w, bias

    def pieces(self, n: int) -> Iterable[slice]:
        """Rows of an input, a few at a time, so that their features fit into CHUNK_BYTES."""
        size = n if self.kind == "temporal" else max(1, CHUNK_BYTES // (4 * self.d_sae))
        return [slice(i, min(i + size, n)) for i in range(0, n, size)]

    @t.no_grad()
    def active(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of an input [seq, ...] the features that fire: positions, indices and values [n], in order."""
        parts = []
        for piece in self.pieces(len(x)):
            f = self.encode(x[piece])
            where = f.nonzero()
            parts.append((where[:, 0] + piece.start, where[:, 1], f[where[:, 0], where[:, 1]]))
        return tuple(t.cat(p) for p in zip(*parts))

    @t.no_grad()
    def at(self, x: Tensor, pos: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float]:
        """Of an input [seq, ...] at one position: indices and values of the features that fire, reconstruction and offset [d_out], and scale."""
        x, row = (x, pos) if self.kind == "temporal" else (x[pos : pos + 1], 0)
        f, scale = self.encode(x), self.scale(x)
        index = f[row].nonzero()[:, 0]
        return index, f[row, index], self.decode(f, x)[row], self.offset(x)[row], scale[row] if isinstance(scale, Tensor) else scale

    @t.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)) of an input [seq, ...], flat."""
        return t.cat([self.decode(self.encode(x[p]), x[p]) for p in self.pieces(len(x))])

    def check_index(self, index: int) -> None:
        if not 0 <= index < self.d_sae:
            raise UserError(f"{self.source} has features 0 to {self.d_sae - 1}, and not {index}")


def labels(source: str) -> dict[int, str]:
    """What the zoo's features were seen to fire on."""
    file = ROOT / "zoo" / "saes" / "features.json"
    if not source.startswith("zoo/") or not file.is_file():
        return {}
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
        return {int(r["feature"]): str(r["fires_on"]) for r in rows if r["sae"] == source}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} can't be read ({first_line(error)}): restore it, or delete it") from error


def place(source: str, meta, transcoder: bool) -> tuple[str, str]:
    """The hook points that an SAE's metadata names."""
    hook = meta.hook_name
    if not isinstance(hook, str) or not hook:
        raise UserError(f"{source}: its cfg.json names no hook point (metadata.hook_name), so it is not known what it reads")
    if meta.hook_head_index is not None:
        raise UserError(f"{source}: an SAE of one head alone ({hook}, head {meta.hook_head_index}) can't be used here")
    if not (m := HOOK.fullmatch(hook)):
        raise UserError(f"{source}: its hook point {hook!r} is not one of a layer in TransformerLens's names (blocks.8.hook_resid_pre)")
    out = meta.hook_name_out or meta.hook_out
    return hook, (out or f"blocks.{m[1]}.hook_mlp_out") if transcoder else hook


def site(hook: str) -> str:
    """What a hook point is in Loupe's terms; "" for one without a name there."""
    return SITES.get(HOOK.fullmatch(hook)[2], "")


def read_point(model: Model, source: str, hook: str) -> str:
    """The model's hook point for a name in an SAE's metadata. hook_mlp_in is the stream that the MLP's norm reads."""
    m = HOOK.fullmatch(hook)
    if m is None:
        raise UserError(f"{source}: its hook point {hook!r} is not one of a layer in TransformerLens's names (blocks.8.hook_resid_pre)")
    if int(m[1]) >= model.info.n_layers:
        raise UserError(f"{source} is for layer {m[1]}, and the model has layers 0 to {model.info.n_layers - 1}: it is of another model")
    if m[2] == "hook_mlp_in":
        hook = f"blocks.{m[1]}.hook_resid_{'pre' if model.parallel else 'mid'}"
    if hook not in model.points or model.bridge._gated_hook_reason(hook):
        raise UserError(f"{source} is for {hook}, and {model.info.architecture} has no such point: it is of another model")
    if m[2] not in (*SITES, *OTHERS):
        raise UserError(f"{source} is for {hook}, and SAEs can be used at {', '.join((*SITES, *OTHERS))} only")
    return hook


def check_width(model: Model, source: str, point: str, width: int) -> None:
    """UserError where an SAE is not as wide as the hook point."""
    i = model.info
    wide = i.n_heads * i.d_head if point.endswith("hook_z") else i.d_mlp if point.endswith(("mlp.hook_pre", "mlp.hook_post")) else i.d_model
    if width != wide:
        raise UserError(f"{source} is {width} wide, and {point} of this model is {wide}: it is of another model")
