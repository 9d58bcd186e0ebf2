"""Loading an SAE through sae_lens: of a folder or of its list of published ones, and of this model."""

import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
import torch as t
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, HTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError

from model.artefacts import unembed_hash
from model.bridge import Model
from model.loading import read_json
from model.memory import first_line, is_out_of_memory
from model.sae import SparseAutoencoder
from model.sae_catalogue import directory, known_models, trained_on
from utils import ROOT, settings
from vocabulary.files import typed_path
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

KEPT = 6  # loaded SAEs


def find(source: str) -> Path | None:
    """The folder of a source, or None for one of sae_lens's list."""
    if not source:
        raise UserError("no SAE is named: give a folder, zoo/NAME, or RELEASE:ID of sae_lens's list")
    folder = ROOT / "zoo" / "saes" / source.removeprefix("zoo/") if source.startswith("zoo/") else typed_path(source)
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
    """Names, times and sizes of a folder's files: another stamp, another SAE."""
    return () if folder is None else tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(folder.glob("*")))


def load(model: Model, source: str, of: int = 1) -> Generator[Progress, None, SparseAutoencoder]:
    """The SAE of a source (one `of` so many that are used together), on the model's device; the last few stay loaded as long as their files do not change."""
    folder, kept = find(source), model.notes.saes
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
    if folder is not None:
        sae = read_folder(model, source, folder)
    else:
        published = listed(source)
        check_model(model, source, published["model"])
        sae = yield from read_release(model, source, published["repo_id"])
    check_model(model, source, sae.cfg.metadata.model_name)
    check_weights(model, source, sae.cfg.metadata)
    kept[source] = SparseAutoencoder(source, sae, model, published)
    kept[source].stamp = stamp(folder)
    while len(kept) > max(KEPT, of):
        kept.popitem(last=False)
    return kept[source]


def read_folder(model: Model, source: str, folder: Path) -> t.nn.Module:
    """sae_lens's SAE of a folder. UserError where the files do not hold one."""
    from sae_lens import SAE

    read_json(folder / "cfg.json")
    if not (folder / "sae_weights.safetensors").is_file():
        raise UserError(f"{folder} has no sae_weights.safetensors: copy or train the SAE again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sae = SAE.load_from_disk(folder, device="cpu", dtype="float32")
    except (SafetensorError, OSError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{folder / 'sae_weights.safetensors'} is truncated or not a safetensors file ({first_line(error)}): copy it again") from error
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, json.JSONDecodeError) as error:
        if is_out_of_memory(error):
            raise
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


def fetch(source: str) -> t.nn.Module:
    """The SAE release:id, from the hub cache or the hub. MemoryError where that says, in whatever words, that memory ran out."""
    from sae_lens import SAE

    release, _, ident = source.partition(":")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SAE.from_pretrained(release, ident, device="cpu", dtype="float32")
    except Exception as error:
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        raise


def read_release(model: Model, source: str, repo: str) -> Generator[Progress, None, t.nn.Module]:
    """From the hub cache; else, after one quick question to the hub, downloaded."""
    hub, env = huggingface_hub.constants, {}
    token = settings().get("HF_TOKEN")

    offline = hub.HF_HUB_OFFLINE
    try:
        hub.HF_HUB_OFFLINE = True
        return fetch(source)
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
            found.append(fetch(source))
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
        case MemoryError() as error:
            raise error
        case BaseException() as error:
            raise UserError(f"{source} can't be loaded: {first_line(error)}") from error
    return found[0]


def check_model(model: Model, source: str, theirs: str | None) -> None:
    """An SAE whose metadata names another well-known model than the one that is loaded."""
    if not theirs or trained_on(theirs) == (mine := trained_on(model.info.name)):
        return
    known = known_models()
    if trained_on(theirs) in known and mine in known:
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
