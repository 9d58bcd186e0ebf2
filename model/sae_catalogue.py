"""Which SAEs and transcoders there are for a model: the shipped ones, folders, sae_lens's list of published ones. No network."""

import importlib.util
import math
import re
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import yaml

from model.bridge import Model
from model.loading import read_json
from model.sae import number
from techniques.features.requests import SaeChoice, SaesResult
from utils import ROOT
from vocabulary.files import folder, short
from vocabulary.names import aliases, without_owner
from vocabulary.nodes import UserError

SUFFIXES = re.compile(r"[-_](it|pt|base|instruct|chat|hf)$")


def trained_on(name: str) -> str:
    """A model's canonical name without its owner, in lower case; instruction-tuned and base models count as one, since SAEs of one are used on the other."""
    name = without_owner(name)
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
    """Names of the models that published SAEs are of, of those in TransformerLens's table, and of the zoo."""
    return {trained_on(name) for name in (*(r["model"] for r in directory().values()), *aliases(), "zoo")}


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
    mine, out = trained_on(model.info.name), []
    for root, where in ((ROOT / "zoo" / "saes", "zoo"), *((own, "folder") for own in dict.fromkeys((ROOT / "saes", folder("saes"))))):
        for file in (*sorted(root.glob("*/cfg.json")), *sorted(root.glob("transcoders/*/cfg.json"))):
            source = f"zoo/{file.parent.relative_to(root)}" if where == "zoo" else short(file.parent)
            choice = local_choice(file.parent, source, where)
            named = trained_on(choice.model or ("zoo" if where == "zoo" else ""))
            if every or named in ("", mine) or named not in known_models():
                out.append(choice)
    for release, entry in directory().items():
        if not every and trained_on(entry["model"]) != mine:
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
