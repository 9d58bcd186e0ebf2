"""
SAEs and transcoders: which ones fit the model, loading them through sae_lens, and what Loupe uses of them: encode, decode, rows and columns.

Everywhere decode is affine in the features once the input x is known: out = scale(x) * (f @ rows) + offset(x). `offset` holds the decoder's bias, a
mean that a normalisation or the centred view took off, a skip connection; `scale` what an input normalisation has to be undone by.
"""

import hashlib
import importlib.util
import json
import math
import os
import re
import sys
import threading
import warnings
from collections import OrderedDict
from collections.abc import Generator, Iterable
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import huggingface_hub
import torch as t
import yaml
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import Tensor

from techniques.features.requests import SaeChoice, SaeInfo, SaesResult
from vocabulary.nodes import UserError
from vocabulary.requests import Progress
from model.bridge import Model, first_line, out_of_memory, read_json
from model.artefacts import unembed_hash
from utils import ROOT, settings

CHUNK_BYTES = 16 << 20  # of feature activations made at once
KEPT = 6  # loaded SAEs
LOADED: WeakKeyDictionary[Model, OrderedDict[str, "SparseAutoencoder"]] = WeakKeyDictionary()
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
SUFFIXES = re.compile(r"[-_](it|pt|base|instruct|chat|hf|deduped)$")


# ------------------------------------------------------------------ the catalogue


def canonical(name: str) -> str:
    """A model's name without its owner, in sae_lens's and the hub's spellings alike; instruction-tuned and base models count as one."""
    name = Path(name).name.lower()
    name = {"gpt2": "gpt2-small", "meta-llama-3-8b-instruct": "llama-3-8b", "mistral-7b-v0.1": "mistral-7b"}.get(name, name)
    while (short := SUFFIXES.sub("", name)) != name:
        name = short
    return name


@lru_cache(1)
def directory() -> dict:
    """sae_lens's list of published SAEs, read without importing sae_lens."""
    spec = importlib.util.find_spec("sae_lens")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("sae_lens is not installed: run uv sync")
    file = Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml"
    return yaml.load(file.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def known_models() -> set[str]:
    return {canonical(r["model"]) for r in directory().values()} | {"zoo"}


def guess_hook(release: str, ident: str, neuronpedia: str) -> str:
    """Where a published SAE sits, from its names; "" when they do not say."""
    if m := re.search(r"blocks\.(\d+)\.(?:attn\.)?(hook_resid_pre|hook_resid_mid|hook_resid_post|hook_attn_out|hook_mlp_out|hook_z)", ident):
        return f"blocks.{m[1]}.{'attn.' * (m[2] == 'hook_z')}{m[2]}"
    layer = re.search(r"layer_?(\d+)", ident) or re.search(r"/(\d+)-", neuronpedia) or re.match(r"l?(\d+)", ident)
    if not layer:
        return ""
    words = re.split(r"[-_/]", f"{release}/{ident}".lower())
    if "clt" in words or any("transcoder" in w for w in words):
        return f"blocks.{layer[1]}.hook_mlp_out"
    for word, hook in (("mlp", "hook_mlp_out"), ("lxm", "hook_mlp_out"), ("att", "attn.hook_z"), ("lxa", "hook_attn_out"), ("mid", "hook_resid_mid")):
        if word in words:
            return f"blocks.{layer[1]}.{hook}"
    return f"blocks.{layer[1]}.hook_resid_post"


def guess_width(release: str, ident: str) -> int:
    """Number of features, from the names (width_16k, -32k, 2pow14, hook_resid_pre_12288); 0 when they do not say."""
    if m := re.search(r"2pow(\d+)", release):
        return 1 << int(m[1])
    if m := re.search(r"hook_resid_pre_(\d+)$", ident):
        return int(m[1])
    m = re.search(r"width_(\d+)(k|m)", ident) or re.search(r"-w?(\d+)(k)(?:-|$)", release)
    if not m:
        return 0
    power = 1 << round(math.log2(n := int(m[1]) * (1000 if m[2] == "k" else 1_000_000)))
    return power if abs(power - n) < 0.06 * n else int(m[1]) * 1024  # 65k is 65536, and 80k 80 x 1024


def cached_files(repo: str) -> set[str]:
    """What the hub cache holds of a repository."""
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}" / "snapshots"
    return {str(p.relative_to(s)) for s in folder.glob("*") for p in s.rglob("*") if p.is_file()} if folder.is_dir() else set()


def number(x: object) -> float:
    return float(x) if isinstance(x, int | float) and not isinstance(x, bool) else math.nan


def local_choice(folder: Path, source: str, where: str) -> SaeChoice:
    """A folder that SAE.save_model wrote, from its cfg.json alone."""
    try:
        cfg = read_json(folder / "cfg.json")
    except UserError as error:
        return SaeChoice(source, "", "", 0, math.nan, math.nan, "", where, str(error))
    meta = cfg.get("metadata") if isinstance(cfg.get("metadata"), dict) else cfg
    kind = str(cfg.get("architecture", ""))
    explained = meta.get("variance_explained", meta.get("explained_variance", meta.get("explained")))
    return SaeChoice(
        source, str(meta.get("model_name") or ""), str(meta.get("hook_name") or ""), int(number(cfg.get("d_sae")) or 0) if "d_sae" in cfg else 0,
        number(meta.get("l0")), number(explained), str(meta.get("neuronpedia_id") or ""), where, kind,
    )  # fmt: skip


def catalogue(model: Model, every: bool = False) -> SaesResult:
    """What fits the loaded model: shipped ones, folders under saes/, sae_lens's list. No network."""
    mine, out = canonical(model.info.name), []
    for root, where in ((ROOT / "zoo" / "saes", "zoo"), (ROOT / "saes", "folder")):
        for file in sorted(root.glob("*/cfg.json")):
            source = f"zoo/{file.parent.name}" if where == "zoo" else str(file.parent.relative_to(ROOT))
            choice = local_choice(file.parent, source, where)
            named = canonical(choice.model or ("zoo" if where == "zoo" else ""))
            if every or named in ("", mine) or named not in known_models():
                out.append(choice)
    for release, entry in directory().items():
        if not every and canonical(entry["model"]) != mine:
            continue
        files = cached_files(entry["repo_id"])
        for sae in entry["saes"]:
            ident, path, address = sae["id"], sae["path"], sae.get("neuronpedia") or ""
            where = "cache" if any(f == path or f.startswith(path + "/") for f in files) else "hub"
            hook = guess_hook(release, ident, address)
            kind = "transcoder" if "transcoder" in release or "clt" in release else ""
            l0, explained = number(sae.get("l0")), number(sae.get("variance_explained"))
            out.append(SaeChoice(f"{release}:{ident}", entry["model"], hook, guess_width(release, ident), l0, explained, address, where, kind))
    return SaesResult(tuple(out))


# ------------------------------------------------------------------ one SAE


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
    i = model.info
    wide = i.n_heads * i.d_head if point.endswith("hook_z") else i.d_mlp if point.endswith(("mlp.hook_pre", "mlp.hook_post")) else i.d_model
    if width != wide:
        raise UserError(f"{source} is {width} wide, and {point} of this model is {wide}: it is of another model")


# ------------------------------------------------------------------ loading


def find(source: str) -> Path | None:
    """The folder of a source, or None for one of sae_lens's list."""
    if not source:
        raise UserError("no SAE is named: give a folder, zoo/NAME, or RELEASE:ID of sae_lens's list")
    folder = ROOT / "zoo" / "saes" / source.removeprefix("zoo/") if source.startswith("zoo/") else Path(source).expanduser()
    folder = folder if folder.is_absolute() or folder.is_dir() else ROOT / folder
    if folder.is_dir():
        if not (folder / "cfg.json").is_file():
            raise UserError(f"{folder} is not an SAE: it has no cfg.json. Give a folder that SAE.save_model of sae_lens wrote")
        return folder
    if source.startswith("zoo/"):
        have = sorted(p.parent.name for p in (ROOT / "zoo" / "saes").glob("*/cfg.json"))
        raise UserError(f"the zoo has no SAE {source.removeprefix('zoo/')!r}: it has {', '.join(have) or 'none'}")
    if ":" not in source or "/" in source.split(":")[0] and Path(source).parent.exists():
        raise UserError(f"no folder at {folder}: give a folder that SAE.save_model wrote, zoo/NAME, or RELEASE:ID of sae_lens's list")
    return None


def stamp(folder: Path | None) -> tuple:
    return () if folder is None else tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.glob("*")))


def load(model: Model, source: str) -> Generator[Progress, None, SparseAutoencoder]:
    """The SAE of a source, on the model's device; the last few stay loaded as long as their files do not change."""
    folder, kept = find(source), LOADED.setdefault(model, OrderedDict())
    if source in kept and kept[source].stamp == stamp(folder):
        kept.move_to_end(source)
        return kept[source]
    if "sae_lens" not in sys.modules:
        yield Progress(0, 2, "importing sae_lens")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import sae_lens  # noqa: F401
    yield Progress(1, 2, f"loading {source}")
    published: dict = {}
    try:
        if folder is not None:
            sae = read_folder(model, source, folder)
        else:
            published = listed(source)
            check_model(model, source, published["model"])
            sae = yield from read_release(model, source, published["repo_id"])
        check_model(model, source, sae.cfg.metadata.model_name)
        check_weights(model, source, sae.cfg.metadata)
        kept[source] = SparseAutoencoder(source, sae, model, published)
    except t.OutOfMemoryError as error:
        raise out_of_memory(error) from error
    kept[source].stamp = stamp(folder)
    while len(kept) > KEPT:
        kept.popitem(last=False)
    return kept[source]


def read_folder(model: Model, source: str, folder: Path) -> t.nn.Module:
    from sae_lens import SAE

    read_json(folder / "cfg.json")
    if not (folder / "sae_weights.safetensors").is_file():
        raise UserError(f"{folder} has no sae_weights.safetensors: copy or train the SAE again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / 'sae_weights.safetensors'} is truncated or not a safetensors file ({first_line(error)}): copy it again") from error
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(f"{source} can't be loaded: cfg.json and the weights do not fit ({type(error).__name__}: {first_line(error)})") from error
    if other := [n for n, p in sae.named_parameters() if not math.isfinite(p.sum(dtype=t.float64).item())]:
        raise UserError(f"{source}: {other[0]} holds numbers that are not finite: copy or train the SAE again")
    return sae


def listed(source: str) -> dict:
    """What sae_lens's list says about release:id."""
    release, _, ident = source.partition(":")
    entry = directory().get(release)
    if entry is None:
        raise UserError(f"sae_lens's list has no release {release!r}: `saes` shows what fits the model")
    found = [s for s in entry["saes"] if s["id"] == ident]
    if not found:
        some = ", ".join(s["id"] for s in entry["saes"][:3])
        raise UserError(f"release {release} has no SAE {ident!r}: it has {some}, ...")
    return found[0] | {"model": entry["model"], "repo_id": entry["repo_id"]}


def read_release(model: Model, source: str, repo: str) -> Generator[Progress, None, t.nn.Module]:
    """From the hub cache; else, after one quick question to the hub, downloaded."""
    from sae_lens import SAE

    release, _, ident = source.partition(":")
    hub, env = huggingface_hub.constants, {}
    token = settings().get("HF_TOKEN")

    def fetch() -> t.nn.Module:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SAE.from_pretrained(release, ident, device="cpu", dtype="float32")

    offline = hub.HF_HUB_OFFLINE
    try:
        hub.HF_HUB_OFFLINE = True
        return fetch()
    except (OSError, HTTPError, EntryNotFoundError):  # not, or not wholly, in the cache
        pass
    except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{source} can't be loaded from the hub cache: {first_line(error)}") from error
    finally:
        hub.HF_HUB_OFFLINE = offline
    missing = f"{source} is not (or not wholly) in the hub cache and there is no network: give a folder, or an SAE that `saes` shows as zoo, folder or cache"
    if offline:
        raise UserError(missing)
    found: list = []

    def work() -> None:
        try:
            huggingface_hub.HfApi().model_info(repo, token=token or False, timeout=10)
            found.append(fetch())
        except BaseException as error:
            found.append(error)

    if token:  # sae_lens has no argument for it
        env, os.environ["HF_TOKEN"] = {"HF_TOKEN": os.environ.get("HF_TOKEN")}, token
    try:
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        while thread.is_alive():
            yield Progress(0, 0, f"downloading {source}")
            thread.join(0.1)
    finally:
        for name, value in env.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
    match found[0]:
        case GatedRepoError():
            raise UserError(f"{repo} is gated: accept its terms at huggingface.co/{repo} and put your HF_TOKEN into .env.local")
        case RepositoryNotFoundError():
            raise UserError(f"the hub has no {repo} (or it is private): put an HF_TOKEN into .env.local")
        case LocalEntryNotFoundError() | ConnectionError() | TimeoutError():
            raise UserError(missing)
        case HfHubHTTPError() as error:
            raise UserError(f"{source} can't be downloaded: {first_line(error)}")
        case HTTPError():
            raise UserError(missing)
        case BaseException() as error:
            raise UserError(f"{source} can't be loaded: {first_line(error)}") from error
    return found[0]


def check_model(model: Model, source: str, theirs: str | None) -> None:
    """An SAE whose metadata names another well-known model than the one that is loaded."""
    if not theirs or canonical(theirs) == (mine := canonical(model.info.name)):
        return
    known = known_models()
    if canonical(theirs) in known and mine in known:
        raise UserError(f"{source} was trained on {theirs}, and {model.info.name} is loaded: load that model, or another SAE")


def check_weights(model: Model, source: str, meta) -> None:
    """SAEs that Loupe trained carry the hash of their model's unembedding."""
    if isinstance(meta.unembed_hash, str) and meta.unembed_hash != unembed_hash(model):
        raise UserError(
            f"{source} was trained on other weights{f' ({meta.model_name})' if meta.model_name else ''} than {model.info.name}'s: load that model, or another SAE"
        )


def for_layer(model: Model, sources: tuple[str, ...], layer: int) -> Generator[Progress, None, SparseAutoencoder]:
    """The one among a study's SAEs that `L8.sae.f12` speaks of."""
    if not sources:
        raise UserError("no SAE is chosen for this study: load one first (on the command line: --sae SOURCE)")
    found, wrong = [], None
    for source in sources:
        try:
            d = yield from load(model, source)
        except UserError as error:
            wrong = wrong or error
            continue
        found += [d] if d.layer == layer else []
    if not found and wrong:
        raise wrong
    if not found:
        raise UserError(f"none of the study's SAEs is of layer {layer}: it has {', '.join(sources)}")
    if len(found) > 1:
        raise UserError(f"{found[0].source} and {found[1].source} are both of layer {layer}: keep one of them in the study")
    return found[0]
