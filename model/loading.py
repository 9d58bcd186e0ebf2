"""From a name to a model: its folder (downloaded where it has to be), config, tokenizer and weights, each checked before the next is read."""

import copy
import errno
import io
import math
import queue
import re
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import huggingface_hub
import torch as t
import transformers
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformer_lens.utilities.architectures import MASKED_LM_ARCHITECTURES, MULTIMODAL_ARCHITECTURES, SEQ2SEQ_ARCHITECTURES

from model import native, peft_adapters, untouched
from model.artefacts import sampled
from model.bridge import Model
from model.checks import prove, readable
from model.live_hooks import alibi_once
from model.devices import filled_by_others, pick_device, unused_gpu
from model.gguf_files import PLAIN, dequantised, is_gguf, place_of, read_kinds
from model.memory import OutOfMemory, first_line, free_bytes, is_out_of_memory, ran_out, room
from model.tokens import random_ids
from utils import ROOT, settings, show_bytes
from vocabulary.names import canonical, spellings
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Progress
from vocabulary.sizes import ways
from vocabulary.typed import parse_json, read_text, user_path

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

DTYPES = {"float32": t.float32, "bfloat16": t.bfloat16, "float16": t.float16}
STORED = {"F32": t.float32, "BF16": t.bfloat16, "F16": t.float16}
SMALL = 2_000_000_000
SLACK = 512 << 20  # bytes that making a model takes beside its weights
TINY = 20_000_000  # below this a second thread costs more than it brings
CORES = t.get_num_threads()


def is_hub_name(name: str) -> bool:
    """Whether a name can be one of the Hugging Face hub: gpt2, owner/model."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def resolved(ask: Load) -> Load:
    """What is to be loaded, by its canonical name (`gpt2-small` is `gpt2`); a folder of the name that was typed comes first."""
    known = lambda name: name if not name or user_path(name).is_dir() else canonical(name)  # noqa: E731
    return replace(ask, model=known(ask.model), base=known(ask.base), against=known(ask.against))


def find_folder(name: str, weights: bool = True) -> Generator[Progress, None, Path]:
    """The folder (or GGUF file) of `zoo`, of a path or of a name that the hub or TransformerLens knows (downloaded first when the hub cache lacks it)."""
    path = ROOT / "zoo" if name == "zoo" else user_path(name)
    if path.is_dir():
        return path
    if path.is_file() and (is_gguf(path) or path.suffix in native.SUFFIXES):
        return path
    if path.exists():
        raise UserError(
            f"{name} is a file: give a .gguf file, a checkpoint trained by hand (.pt, .safetensors), or the folder that holds config.json and model.safetensors"
        )
    if name == "zoo" or not is_hub_name(name):
        raise UserError(f"no folder at {path}: give a Hugging Face folder, a hub name such as gpt2, or zoo")
    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + ["*final.pth" if canonical(name).startswith(native.OWNERS) else "*.safetensors"] * weights
    token = settings().get("HF_TOKEN") or False
    for spelling in spellings(name):
        try:
            cached = Path(huggingface_hub.snapshot_download(spelling, allow_patterns=patterns, local_files_only=True))
            if (cached / "config.json").is_file() and (not weights or missing_weights(cached) == "" or is_checkpoint(cached)):
                return cached
        except (LocalEntryNotFoundError, IncompleteSnapshotError):
            pass
        except HFValidationError as error:
            raise UserError(f"{name!r} is neither a folder nor a hub name") from error
    return (yield from download(canonical(name), patterns, token))


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder of the hub cache holds a HookedTransformer checkpoint."""
    try:
        return native.find(folder) is not None
    except UserError:
        return False


def own_tokens(found: native.Checkpoint, cfg: object) -> object:
    """A hand-trained model's tokenizer beside it, else its labels, else the tokenizer that its config names where the hub cache has that, else numbers."""
    folder, name = found.config.parent, native.tokenizer_name(found)
    if name and not (folder / "tokenizer.json").is_file():
        with suppress(LocalEntryNotFoundError, IncompleteSnapshotError, HFValidationError):
            folder = Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    return read_tokenizer([folder]) if (folder / "tokenizer.json").is_file() else native.read_tokens(found, cfg)


def download(name: str, patterns: list[str], token: str | bool) -> Generator[Progress, None, Path]:
    """Fetch a hub model in a thread, yielding its progress. One quick question to the hub first, so that no network means no 23 s of retries."""
    events: queue.SimpleQueue = queue.SimpleQueue()

    class Bar(tqdm):
        """Says how many bytes there are; draws nothing."""

        most = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs, file=io.StringIO(), mininterval=1e9)

        def update(self, n=1):
            super().update(n)
            if self.unit == "B" and self.n > Bar.most:
                Bar.most = int(self.n)
                events.put(Progress(Bar.most, int(self.total or 0), f"downloading {name}: {show_bytes(self.n)}"))

    def fetch() -> None:
        try:
            huggingface_hub.HfApi().model_info(name, token=token, timeout=10)
            events.put(Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, token=token, tqdm_class=Bar)))
        except BaseException as error:
            events.put(error)

    threading.Thread(target=fetch, daemon=True).start()
    yield Progress(0, 0, f"asking the hub for {name}")
    while True:
        match event := events.get():
            case Progress():
                yield event
            case Path():
                return event
            case GatedRepoError():
                raise UserError(f"{name} is gated: accept its terms at huggingface.co/{name} and put your HF_TOKEN into .env.local")
            case RepositoryNotFoundError():
                raise UserError(f"the hub has no model {name!r} (or it is private): check the name, or put an HF_TOKEN into .env.local")
            case HfHubHTTPError():
                raise UserError(f"{name} can't be downloaded: {first_line(event)}")
            case HTTPError() | LocalEntryNotFoundError() | ConnectionError():
                raise UserError(f"{name} is not in the hub cache and there is no network: give a folder, the name of a cached model, or zoo")
            case OSError() if event.errno in (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{name} can't be kept: {first_line(event)}. Set HF_HOME to a folder with room and start again (docs/hpc.md)")
            case OSError():
                raise UserError(f"{name} can't be downloaded: {first_line(event)}")
            case _:
                raise event


def read_json(path: Path) -> dict:
    """A file's JSON object. UserError where it can't be read or holds something else."""
    try:
        obj = parse_json(read_text(path))
    except UserError as error:
        raise UserError(f"{path} can't be read ({error}): copy or download the model again") from error
    if not isinstance(obj, dict):
        raise UserError(f"{path} does not hold a JSON object: copy or download the model again")
    return obj


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model's folder should have, by its index where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(n, str) for n in names.values()):
            raise UserError(f"{index} has no weight_map: copy or download the model again")
        return [folder / n for n in sorted(set(names.values()))]
    return [folder / "model.safetensors"]


def missing_weights(folder: Path) -> str:
    """What keeps the folder's weights from being read, or ''."""
    absent = [f.name for f in weight_files(folder) if not f.is_file()]
    if not absent:
        return ""
    if some := sorted(folder.glob("*.gguf")):
        return f"{folder} holds GGUF files: give one of them ({some[0]})"
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        return f"{folder} holds pickled weights only; Loupe reads safetensors: save it with save_pretrained(safe_serialization=True)"
    return f"{folder} has no {absent[0]}: give a folder saved by Hugging Face's save_pretrained"


def read_headers(folder: Path) -> tuple[int, t.dtype]:
    """Number of parameters and stored dtype, from the headers; a truncated file is found here."""
    if is_gguf(folder):
        kinds, count = read_kinds(folder)
        return count, PLAIN.get(kinds.most_common(1)[0][0], t.bfloat16)
    if problem := missing_weights(folder):
        raise UserError(problem)
    count, dtype = 0, None
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as h:
                for key in h.keys():
                    piece = h.get_slice(key)
                    count += math.prod(piece.get_shape())
                    dtype = dtype or STORED.get(piece.get_dtype())
        except (SafetensorError, OSError) as error:
            if is_out_of_memory(error):
                size, free = file.stat().st_size, free_bytes(t.device("cpu"))
                raise OutOfMemory(f"out of memory: {file} needs {show_bytes(size)} and {show_bytes(free or 0)} are free: take a smaller model") from error
            raise UserError(f"{file} is truncated or not a safetensors file ({first_line(error)}): copy or download it again") from error
    return count, dtype or t.float32


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The model's config. UserError for what is no causal language model of text alone."""
    file = folder if is_gguf(folder) else folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a model: it has no config.json. Give a Hugging Face folder, a .gguf file, a hub name, or zoo")
    read_kinds(file) if is_gguf(file) else read_json(file)
    try:
        config = transformers.AutoConfig.from_pretrained(**place_of(folder), local_files_only=True, trust_remote_code=False)
        architecture = determine_architecture_from_hf_config(config)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{file} is of no architecture that Loupe can read: {first_line(error)}") from error
    refused = MULTIMODAL_ARCHITECTURES | SEQ2SEQ_ARCHITECTURES | MASKED_LM_ARCHITECTURES
    names = {architecture, *(config.architectures or [])}
    if names & refused or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{architecture} is not a causal language model of text alone: Loupe reads decoder-only text models")
    return config


def read_tokenizer(folders: list[Path]) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer of the first folder that has one, else a UserError."""
    for folder in folders:
        if is_gguf(folder) or any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
            for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
                if file.is_file():
                    read_json(file)
            try:
                return transformers.AutoTokenizer.from_pretrained(**place_of(folder), local_files_only=True, trust_remote_code=False)
            except Exception as error:  # tokenizers raises nothing narrower
                raise UserError(f"the tokenizer of {folder} can't be read: {first_line(error)}") from error
    raise UserError(f"{folders[0]} has no tokenizer (tokenizer.json): copy the tokenizer files of its base model there")


def read_weights(folder: Path, config: transformers.PretrainedConfig, dtype: t.dtype, device: t.device, device_map: str | None) -> t.nn.Module:
    """The Hugging Face model, eager attention, safetensors only; missing or misshapen weights are an error, never random numbers."""
    where = {"device_map": device_map} if device_map else {}
    try:
        hf, report = transformers.AutoModelForCausalLM.from_pretrained(
            **place_of(folder),
            config=copy.deepcopy(config),
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=not is_gguf(folder),
            local_files_only=True,
            trust_remote_code=False,
            generation_config=transformers.GenerationConfig.from_model_config(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in words
            **where,
        )
        hf = hf if device_map else hf.to(device)
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"the weights of {folder} can't be loaded: {first_line(error)}") from error
    if any(p.device.type == "meta" for p in hf.parameters()):
        why = "its matrices are then not there to be read between two passes, and every number that needs them would be wrong"
        raise UserError(f"device_map {device_map} left weights of {folder} outside the GPUs, on the CPU or the disk: {why}. Take dtype=bfloat16 or device=cpu")
    if other := sorted(report["mismatched_keys"]):
        raise UserError(f"the weights of {folder} have other shapes than this architecture's (first: {other[0][0]}): is the base model right?")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"the weights of {folder} lack {len(missing)} tensors of this architecture (first: {missing[0]}): is the base model right?")
    if is_gguf(folder):  # plain numbers from here on
        hf.hf_quantizer, hf.is_quantized = None, False
        vars(hf.config).pop("quantization_config", None)
    return hf.eval()


def too_large(ask: Load, need: int, dtype: t.dtype, device: t.device, held: int = 0) -> OutOfMemory:
    """Words for a model that does not fit: what its weights need, what is free, by how much that is too little, and what to do."""
    free, kind = free_bytes(device) or 0, str(dtype).removeprefix("torch.")
    place = f"{show_bytes(free)} are free on {device}" + f" and the model that is loaded holds {show_bytes(held)}" * bool(held)
    over = f" ({show_bytes(need - free - held)} too much)" if need > free + held else ""
    others = [f"{option} ({words})" for option, words in ways(need, kind, room(device, lambda where: held if where.type == device.type else 0))]
    return OutOfMemory(
        f"out of memory: the weights of {ask.model} need {show_bytes(need)} in {kind}, some more while they are read; {place}{over}: "
        + ", or ".join(["take a smaller model", *others])
    )


def room_for(ask: Load, n_params: int, dtype: t.dtype, device: t.device, held: int) -> bool:
    """Whether a model fits beside the one of `held` bytes that is loaded on the device; OutOfMemory where it does not even fit in its place."""
    need, free = n_params * dtype.itemsize, None if ask.device_map else free_bytes(device)
    if free is not None and need > free + held:
        raise too_large(ask, need, dtype, device, held)
    return free is not None and free >= 2 * need + SLACK


@dataclass(frozen=True)
class Source:
    """What a model is read from, once all that can be checked before its weights is checked. `read` gives the module, `ask` its own word on two prompts."""

    folder: Path
    base: Path
    n_params: int
    stored: t.dtype
    tokenizer: object
    read: Callable[[t.dtype, t.device], t.nn.Module]
    ask: Callable[[t.nn.Module], untouched.Untouched]
    note: str = ""
    adapter: Path | None = None
    base_name: str = ""


def open_source(ask: Load) -> Generator[Progress, None, Source]:
    """The folder, GGUF file or hand-trained checkpoint that a Load means."""
    folder = yield from find_folder(ask.model)
    if (found := native.find(folder)) is not None:
        return hand_trained(ask, folder, found)
    if folder.is_file() and not is_gguf(folder):
        raise UserError(f"{folder} has no config of HookedTransformer's beside it: put its cfg.to_dict() as JSON into {folder.with_suffix('.json').name}")
    if folder.is_dir() and peft_adapters.is_adapter(folder):
        name = peft_adapters.base_of(folder, ask.base)
        source = yield from open_source(replace(ask, model=name, base=None))
        words = f"an adapter on {name}"
        return replace(source, tokenizer=own_tokenizer(folder, source), adapter=folder, base_name=name, note="; ".join(filter(None, (source.note, words))))
    base = (yield from find_folder(ask.base, weights=False)) if ask.base else folder
    config = read_config(base)
    n_params, stored = read_headers(folder)
    tokenizer = read_tokenizer([base, folder] if is_gguf(folder) else [folder, base])
    read = lambda dtype, device: read_weights(folder, config, dtype, device, ask.device_map or None)  # noqa: E731

    def own(hf: t.nn.Module) -> untouched.Untouched:
        alibi_once(hf)
        return untouched.ask(hf, random_ids(tokenizer, hf.get_input_embeddings().weight.shape[0], untouched.PROBE, 2))

    return Source(folder, base, n_params, stored, tokenizer, read, own, dequantised(read_kinds(folder)[0]) if is_gguf(folder) else "")


def own_tokenizer(folder: Path, base: Source) -> object:
    """The tokenizer beside an adapter where there is one, else its base's."""
    return read_tokenizer([folder]) if (folder / "tokenizer.json").is_file() else base.tokenizer


def hand_trained(ask: Load, folder: Path, found: native.Checkpoint) -> Source:
    """A HookedTransformer checkpoint: small, so its tensors are read here. Its own word is HookedTransformer's logits, and the native modules' writes."""
    if ask.base or ask.device_map:
        raise UserError(f"{ask.model} is a model trained by hand: it takes no {'base' if ask.base else 'device_map'}")
    cfg = native.read_config(found)
    state = native.read_state(found.weights)
    tokenizer = own_tokens(found, cfg)
    stored = next(x.dtype for x in state.values())
    ids = random_ids(tokenizer, cfg.d_vocab, min(untouched.PROBE, cfg.n_ctx), 2)

    def own(model: t.nn.Module) -> untouched.Untouched:
        asked = untouched.ask(model, ids)
        return replace(asked, logits=native.hooked_logits(cfg, state, ids, model.head.weight.dtype), whose="HookedTransformer's")

    read = lambda dtype, device: native.read_model(cfg, state, dtype, device)  # noqa: E731
    notes = ["attention only: an MLP of it adds exactly nothing"] * cfg.attn_only
    if (name := native.tokenizer_name(found)) and isinstance(tokenizer, native.Labels):
        notes.append(f"its tokenizer {name} is not in the hub cache: tokens are numbers")
    note = "; ".join(notes)
    return Source(folder, folder, sum(x.numel() for x in state.values()), stored, tokenizer, read, own, note)


def load(
    ask: Load, cache_mb: int, give_up: Callable[[], None] = lambda: None, held: Callable[[t.device], int] = lambda device: 0
) -> Generator[Progress, None, Model]:
    """
    A model. Everything that can be checked is checked before `give_up` lets go of the one loaded until then, of `held` bytes on a device; where there
    is room for both, that is when the new one stands.
    """
    start = time.time()
    if ask.dtype not in ("auto", *DTYPES):
        raise UserError(f"{ask.dtype!r} is not a dtype: write auto, float32, bfloat16 or float16")
    device = pick_device(ask.device)
    source = yield from open_source(ask)
    n_params = source.n_params
    dtype = DTYPES[ask.dtype] if ask.dtype != "auto" else t.float32 if n_params <= SMALL else source.stored
    both = room_for(ask, n_params, dtype, device, held(device))
    if not both:
        give_up()
    warning = (unused_gpu() if ask.device == "auto" else "") or filled_by_others(device)
    if device.type == "cpu":
        t.set_num_threads(1 if n_params < TINY else CORES)
    yield Progress(2, 5, f"reading weights ({n_params / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')})")
    hf = model = None
    try:
        hf = source.read(dtype, device)
        adapter = source.adapter and peft_adapters.put_on(hf, source.adapter, source.base_name, ask.scale)
        yield Progress(3, 5, "wrapping")
        with readable(hf):
            own = source.ask(hf)
            model = Model(ask, hf, source.tokenizer, source.folder, source.base, dtype, cache_mb)
        if adapter:
            model.adapter = adapter
            model.info = replace(model.info, scale=adapter.scale, base=adapter.base)
        yield Progress(4, 5, "checking")
        checks = yield from prove(model, own)
    except Exception as error:
        hf = model = own = None
        ran_out(error)
        raise too_large(ask, n_params * dtype.itemsize, dtype, device) from None
    lacks = "; ".join(dict.fromkeys(model.notes.refused.values()))
    warning = "; ".join(filter(None, (source.note, lacks and f"{model.info.architecture}: {lacks}", warning)))
    model.info = replace(
        model.info, n_params=n_params, seconds=time.time() - start, checks=checks, warning=warning, weights=sampled(model.bridge.original_model)
    )
    if both:
        give_up()
    return model
