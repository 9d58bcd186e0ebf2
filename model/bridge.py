"""The one wrapper around TransformerBridge: loading, tokens, hooks, the activation cache, and the load-time self-check. Raw Hugging Face weights."""

import copy
import io
import json
import math
import queue
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
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
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import determine_architecture_from_hf_config
from transformer_lens.utilities.architectures import MASKED_LM_ARCHITECTURES, MULTIMODAL_ARCHITECTURES, SEQ2SEQ_ARCHITECTURES

from vocabulary import alignment as align
from model.devices import filled_by_others, pick_device, unused_gpu
from techniques.output.requests import Side
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, TokenRow
from vocabulary.requests import CheckResult, Identity, Load, ModelInfo, Progress
from utils import ROOT, settings, show_bytes, tec

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()

FINAL = "ln_final.hook_out"
LEVEL = 7001
DTYPES = {"float32": t.float32, "bfloat16": t.bfloat16, "float16": t.float16}
STORED = {"F32": t.float32, "BF16": t.bfloat16, "F16": t.float16}
TOLERANCE = {t.float32: 1e-4, t.bfloat16: 5e-2, t.float16: 5e-3}
SMALL = 2_000_000_000
STRETCH = 1024
TINY = 20_000_000  # below this a second thread costs more than it brings
CORES = t.get_num_threads()
POSITIONS = {"standard": "learned"}
Edit = tuple[str, Callable[[Tensor], Tensor | None]]


class Passed(Exception):
    """All that was asked for has been passed: the rest of the forward pass is not needed."""


def stop(x: Tensor) -> None:
    raise Passed


class Keep:
    """A function on a hook point that remembers what leaves it: it comes after all others there."""

    x: Tensor

    def __call__(self, x: Tensor) -> None:
        self.x = x


@contextmanager
def entered(blocks: list[t.nn.Module], layer: int, x: Tensor) -> Generator:
    """A forward pass meanwhile enters at block `layer` with the stream x: what the blocks before it hand on is not looked at."""
    inner = blocks[layer].forward

    def enter(*args, **kwargs):
        return inner(x, *args[1:], **kwargs) if args else inner(**kwargs | {"hidden_states": x})

    try:
        for block in blocks[:layer]:
            block.__dict__["forward"] = lambda *_, **__: x
        blocks[layer].__dict__["forward"] = enter
        yield
    finally:
        for block in blocks[: layer + 1]:
            block.__dict__.pop("forward", None)


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def in_chunks(n: int, size: int, work: Callable[[int, int], object]) -> Generator:
    """
    Yield work(start, stop) over range(n), `size` at a time. Out of memory: free, halve the chunk, say so, go on;
    when one item does not fit, fail with what it needed and what was free.
    """
    i, size = 0, max(1, min(size, n))
    while i < n:
        try:
            out = work(i, min(i + size, n))
        except t.OutOfMemoryError as error:
            tec()
            if size == 1:
                raise out_of_memory(error) from error
            size //= 2
            yield Progress(i, n, f"out of memory: {size} at a time now")
            continue
        yield out
        i += size


def out_of_memory(error: t.OutOfMemoryError) -> UserError:
    return UserError(f"out of memory: {first_line(error)} Shorten the prompt, use a smaller dtype or another device")


# ------------------------------------------------------------------ finding and checking a model's folder


def is_hub_name(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")


def find_folder(name: str, weights: bool = True) -> Generator[Progress, None, Path]:
    """The folder of `zoo`, of a path or of a hub name (downloaded first when the hub cache lacks it)."""
    path = ROOT / "zoo" if name == "zoo" else Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{name} is a file: give the folder that holds config.json and model.safetensors")
    if name == "zoo" or not is_hub_name(name):
        raise UserError(f"no folder at {path}: give a Hugging Face folder, a hub name such as gpt2, or zoo")
    patterns = ["*.json", "*.model", "*.txt", "*.jinja"] + ["*.safetensors"] * weights
    token = settings().get("HF_TOKEN") or False
    try:
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if (cached / "config.json").is_file() and (not weights or missing_weights(cached) == ""):
            return cached
    except (LocalEntryNotFoundError, IncompleteSnapshotError):
        pass
    except HFValidationError as error:
        raise UserError(f"{name!r} is neither a folder nor a hub name") from error
    return (yield from download(name, patterns, token))


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
            case OSError():
                raise UserError(f"{name} can't be downloaded: {first_line(event)}")
            case _:
                raise event


def read_json(path: Path) -> dict:
    try:
        obj = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read ({first_line(error)}): copy or download the model again") from error
    if not isinstance(obj, dict):
        raise UserError(f"{path} does not hold a JSON object: copy or download the model again")
    return obj


def weight_files(folder: Path) -> list[Path]:
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
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")):
        return f"{folder} holds pickled weights only; Loupe reads safetensors: save it with save_pretrained(safe_serialization=True)"
    return f"{folder} has no {absent[0]}: give a folder saved by Hugging Face's save_pretrained"


def read_headers(folder: Path) -> tuple[int, t.dtype]:
    """Number of parameters and stored dtype, from the headers; a truncated file is found here."""
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
            raise UserError(f"{file} is truncated or not a safetensors file ({first_line(error)}): copy or download it again") from error
    return count, dtype or t.float32


def read_config(folder: Path) -> transformers.PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model: it has no config.json. Give a Hugging Face folder, a hub name, or zoo")
    read_json(folder / "config.json")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture = determine_architecture_from_hf_config(config)
    except (ValueError, OSError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'} is of no architecture that Loupe can read: {first_line(error)}") from error
    refused = MULTIMODAL_ARCHITECTURES | SEQ2SEQ_ARCHITECTURES | MASKED_LM_ARCHITECTURES
    names = {architecture, *(config.architectures or [])}
    if names & refused or getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{architecture} is not a causal language model of text alone: Loupe reads decoder-only text models")
    return config


def read_tokenizer(folders: list[Path]) -> transformers.PreTrainedTokenizerBase:
    for folder in folders:
        if any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
            for file in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
                if file.is_file():
                    read_json(file)
            try:
                return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except (ValueError, OSError, KeyError, TypeError) as error:
                raise UserError(f"the tokenizer of {folder} can't be read: {first_line(error)}") from error
    raise UserError(f"{folders[0]} has no tokenizer (tokenizer.json): copy the tokenizer files of its base model there")


def read_weights(folder: Path, config: transformers.PretrainedConfig, dtype: t.dtype, device: t.device, device_map: str | None) -> t.nn.Module:
    """The Hugging Face model, eager attention, safetensors only; missing or misshapen weights are an error, never random numbers."""
    where = {"device_map": device_map} if device_map else {}
    try:
        hf, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            config=copy.deepcopy(config),
            dtype=dtype,
            attn_implementation="eager",
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            generation_config=transformers.GenerationConfig.from_model_config(config),
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in words
            **where,
        )
        hf = hf if device_map else hf.to(device)
    except t.OutOfMemoryError as error:
        raise out_of_memory(error) from error
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the weights of {folder} can't be loaded: {first_line(error)}") from error
    if other := sorted(report["mismatched_keys"]):
        raise UserError(f"the weights of {folder} have other shapes than this architecture's (first: {other[0][0]}): is the base model right?")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"the weights of {folder} lack {len(missing)} tensors of this architecture (first: {missing[0]}): is the base model right?")
    return hf.eval()


def load(ask: Load, cache_mb: int, before_weights: Callable[[], None] = lambda: None) -> "Generator[Progress, None, Model]":
    """Everything that can be checked is checked before `before_weights` gives up the model loaded until then."""
    start = time.time()
    if ask.dtype not in ("auto", *DTYPES):
        raise UserError(f"{ask.dtype!r} is not a dtype: write auto, float32, bfloat16 or float16")
    device = pick_device(ask.device)
    folder = yield from find_folder(ask.model)
    base = (yield from find_folder(ask.base, weights=False)) if ask.base else folder
    config = read_config(base)
    n_params, stored = read_headers(folder)
    tokenizer = read_tokenizer([folder, base])
    dtype = DTYPES[ask.dtype] if ask.dtype != "auto" else t.float32 if n_params <= SMALL else stored
    before_weights()
    warning = (unused_gpu() if ask.device == "auto" else "") or filled_by_others(device)
    if device.type == "cpu":
        t.set_num_threads(1 if n_params < TINY else CORES)
    yield Progress(2, 5, f"reading weights ({n_params / 1e6:.1f} M parameters, {str(dtype).removeprefix('torch.')})")
    hf = read_weights(folder, config, dtype, device, ask.device_map or None)
    yield Progress(3, 5, "wrapping")
    model = Model(ask, hf, tokenizer, folder, base, dtype, cache_mb)
    yield Progress(4, 5, "checking")
    checks = model.self_check()
    model.info = replace(model.info, n_params=n_params, seconds=time.time() - start, checks=checks, warning=warning)
    return model


# ------------------------------------------------------------------ the activation cache


class Cache:
    """Activations by (token ids, what was done to them, hook name), bounded in bytes, least recently used out first."""

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.items: OrderedDict[tuple, Tensor] = OrderedDict()
        self.sides: dict[tuple, Side] = {}  # a few finished sides of runs, small

    def get(self, key: tuple) -> Tensor | None:
        if key in self.items:
            self.items.move_to_end(key)
        return self.items.get(key)

    def put(self, key: tuple, value: Tensor) -> None:
        if value.untyped_storage().nbytes() > value.nbytes:
            value = value.clone()
        if key in self.items:
            self.size -= self.items.pop(key).nbytes
        if value.nbytes <= self.limit:
            self.items[key] = value
            self.size += value.nbytes
        while self.size > self.limit:
            self.size -= self.items.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        self.items.clear()
        self.sides.clear()
        self.size = 0

    def entries(self) -> tuple[str, ...]:
        groups: dict[tuple, list[int]] = {}
        for (ids, done, _), value in self.items.items():
            groups.setdefault((ids, done), []).append(value.nbytes)
        words = [" ".join(d[0] if isinstance(d, tuple) else d for d in done) for _, done in groups]
        return tuple(f"{tokens(ids)}, {word or 'nothing done'}: {len(n)} tensors, {show_bytes(sum(n))}" for ((ids, _), n), word in zip(groups.items(), words))


def tokens(ids: tuple) -> str:
    return f"{len(ids)} × {len(ids[0])} tokens" if ids and isinstance(ids[0], tuple) else f"{len(ids)} tokens"


# ------------------------------------------------------------------ tokens

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in BYTES} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in BYTES)}


class Model:
    """
    A loaded model. `points` maps hook names (TransformerLens's) to hook points, resolved once; an unknown name is an error.
    Nothing outside this class adds a hook or runs the model.
    """

    def __init__(self, ask: Load, hf: t.nn.Module, tokenizer, folder: Path, base: Path, dtype: t.dtype, cache_mb: int):
        self.folder, self.base, self.dtype, self.tokenizer = folder, base, dtype, tokenizer
        self.device_map = ask.device_map or None
        theirs = copy.deepcopy(tokenizer)
        theirs.init_kwargs["add_bos_token"] = True  # else the Bridge fetches the tokenizer a second time, from the hub if it likes
        where = hf.get_input_embeddings().weight.device  # else the Bridge takes the accelerator, wherever the weights are
        self.bridge = TransformerBridge.boot_transformers(str(base), hf_model=hf, tokenizer=theirs, dtype=dtype, device=where).eval()
        for p in self.bridge.original_model.parameters():
            p.requires_grad_(False)
        cfg = self.cfg = self.bridge.cfg
        self.points = self.bridge.hook_dict
        self.unique = list({id(p): p for p in self.points.values()}.values())
        self.parallel = bool(cfg.parallel_attn_mlp) or "blocks.0.hook_resid_mid" not in self.points
        self.softcap = max(float(getattr(cfg, "output_logits_soft_cap", None) or 0), 0.0)
        text_config = hf.config.get_text_config()
        self.logit_scale = (getattr(text_config, "logit_scale", None) or 1) / (getattr(text_config, "logits_scaling", None) or 1)
        self.cache = Cache(cache_mb << 20)
        self.texts: dict[int, str] = {}
        self.rows: dict[tuple, TokenRow] = {}
        self.bos = tokenizer.bos_token_id
        self.n_embed = hf.get_input_embeddings().weight.shape[0]
        self.info = ModelInfo(
            name=ask.model,
            architecture=cfg.architecture,
            n_layers=cfg.n_layers,
            n_heads=cfg.n_heads,
            n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
            d_model=cfg.d_model,
            d_head=cfg.d_head,
            d_mlp=cfg.d_mlp or 0,
            d_vocab=hf.get_output_embeddings().weight.shape[0],
            n_ctx=cfg.n_ctx,
            n_params=0,
            dtype=str(dtype).removeprefix("torch."),
            device=str(self.device),
            positions=POSITIONS.get(cfg.positional_embedding_type, cfg.positional_embedding_type),
            norm="RMS" if cfg.uses_rms_norm else "LN",
            parallel=self.parallel,
            softcap=self.softcap,
            bos="" if self.bos is None else tokenizer.bos_token,
            default_bos=self.bos is not None and bool(cfg.default_prepend_bos),
            seconds=0.0,
        )

    @property
    def device(self) -> t.device:
        return t.device(self.bridge.cfg.device)

    # ---------------------------------------------------------------- running

    @contextmanager
    def hooks(self, fns: Iterable[Edit]) -> Generator:
        """Functions on hook points, in order; None leaves the value. Gone afterwards, whatever happens."""
        added = []
        try:
            for name, fn in sorted(fns, key=lambda e: isinstance(e[1], Keep)):
                point = self.point(name)
                point.add_hook(lambda x, hook, fn=fn: fn(x), level=LEVEL)
                added.append(point)
            yield
        finally:
            for point in added:
                point.remove_hooks(level=LEVEL)

    def point(self, name: str) -> object:
        if name not in self.points or self.bridge._gated_hook_reason(name):
            raise UserError(f"{self.info.architecture} has no {name}")
        return self.points[name]

    def leaks(self) -> int:
        return sum(len(p.fwd_hooks) for p in self.unique)

    def remove_hooks(self) -> None:
        for point in self.unique:
            point.remove_hooks()

    @t.no_grad()
    def forward(
        self,
        ids: Tensor,
        names: Iterable[str] = (),
        edits: Iterable[Edit] = (),
        keep: int | None = 1,
        cache: object = None,
        take: Callable[[str, Tensor], None] | None = None,
        begin: tuple[int, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Run [batch, seq] ids under edits; logits of the last `keep` positions (0: all; None: no logits, it ends when the names have passed, without
        names at the final norm) and what passed the named points after the edits; `take` gets it instead as it passes, and nothing is held. `cache`
        is Hugging Face's, for keys and values. `begin`: a block and its input in such a run, instead of the blocks before it.
        """
        got: dict[str, Tensor] = {}
        left = dict.fromkeys(names)
        take = take or got.__setitem__

        def catch(name: str) -> Edit:
            def fn(x: Tensor) -> None:
                take(name, x.detach())
                left.pop(name, None)
                if keep is None and not left:
                    raise Passed

            return name, fn

        more = {} if cache is None else {"past_key_values": cache}
        with self.hooks([*edits, *map(catch, left), *([(FINAL, stop)] if keep is None else [])]):
            with nullcontext() if begin is None else entered(list(self.bridge.blocks), *begin):
                try:
                    logits = self.bridge(ids.to(self.device), use_cache=cache is not None, logits_to_keep=keep or 0, **more)
                except Passed:
                    logits = None
        return logits, got

    def trace(self, ids: tuple[int, ...], names: Iterable[str], edits: Iterable[Edit] = (), done: tuple = ()) -> dict[str, Tensor]:
        """
        Activations [1, ...] of one run, from the cache or from a forward pass that begins as late and ends as early as it can. `done` names the
        edits, for the cache. The pass also keeps what the panes will ask for next: lens points and patterns where these are small against the
        cache, else, when one layer is looked at, the inputs of the blocks up to it.
        """
        names, edits = list(dict.fromkeys(names)), list(edits)
        found = {n: v for n in names if (v := self.cache.get((ids, done, n))) is not None}
        missing = [n for n in names if n not in found]
        if missing:
            wanted = [*missing, *(n for n in self.likely(len(ids)) if (ids, done, n) not in self.cache.items)]
            places = {self.place(n) for n in wanted}
            begin = self.nearest(ids, done, min(places), edits)
            beside: dict[str, Tensor] = {}
            if not self.likely(len(ids)) and len(places - {self.info.n_layers}) == 1:
                edits += [(n, lambda x, n=n: beside.__setitem__(n, x.detach())) for n in self.inputs(len(ids)) if self.place(n) <= min(places)]
            try:
                try:
                    _, got = self.forward(t.tensor([ids]), wanted, edits, keep=None, begin=begin)
                except t.OutOfMemoryError:
                    self.cache.clear()
                    beside.clear()
                    tec()
                    _, got = self.forward(t.tensor([ids]), missing, edits, keep=None)
            except t.OutOfMemoryError as error:
                raise out_of_memory(error) from error
            for n, v in (got | beside).items():
                self.cache.put((ids, done, n), v)
            found |= {n: got[n] for n in missing}
        return found

    def place(self, name: str) -> int:
        """The layer of a hook point; -1 before the blocks, n_layers behind them."""
        if block := re.match(r"blocks\.(\d+)\.", name):
            return int(block[1])
        return self.info.n_layers if name.startswith("ln_final.") else -1

    def inputs(self, seq: int) -> list[str]:
        """The inputs of every block, or of every n-th so that they fit into a quarter of the cache."""
        need = self.info.n_layers * seq * self.info.d_model * t.finfo(self.dtype).bits // 8
        every = max(1, math.ceil(need / max(1, self.cache.limit // 4)))
        return [f"blocks.{layer}.hook_resid_pre" for layer in range(every, self.info.n_layers, every)]

    def nearest(self, ids: tuple[int, ...], done: tuple, layer: int, edits: list[Edit]) -> tuple[int, Tensor] | None:
        """The last block up to a layer whose input in this run is at hand, and the input. Not one with an edit in it: it would act twice."""
        found, written = None, {self.place(name) for name, _ in edits}
        for k in range(1, min(layer, self.info.n_layers - 1) + 1):
            for name in (f"blocks.{k}.hook_resid_pre", f"blocks.{k - 1}.hook_resid_post"):
                if (x := self.cache.get((ids, done, name))) is not None and k not in written:
                    found = k, x
        return found if found and self.resumes else None

    @cached_property
    def resumes(self) -> bool:
        """Whether passes that begin at a block give what whole ones give: not where blocks hand on more than the stream."""
        ids, n = self.random_ids(min(8, self.info.n_ctx)), self.info.n_layers
        layers = [k for k in {n // 2, n - 1} if k]
        _, want = self.forward(ids, [*(f"blocks.{k}.hook_resid_pre" for k in layers), FINAL], keep=None)
        try:
            got = [self.forward(ids, [FINAL], keep=None, begin=(k, want[f"blocks.{k}.hook_resid_pre"]))[1][FINAL] for k in layers]
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:  # a model whose own loop over its blocks wants more
            if isinstance(error, t.OutOfMemoryError):
                raise
            return False
        return all(self.identity("resumed", x, want[FINAL]).ok for x in got)

    def likely(self, seq: int) -> list[str]:
        i, size = self.info, t.finfo(self.dtype).bits // 8
        need = i.n_layers * size * seq * (3 * i.d_model + i.n_heads * seq)
        patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(i.n_layers)]
        return [FINAL, *self.lens_points(), *patterns] if need <= self.cache.limit // 16 else []

    def lens_points(self) -> list[str]:
        sites = ("post",) if self.parallel else ("mid", "post")
        return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_{s}" for layer in range(self.info.n_layers) for s in sites)]

    @t.no_grad()
    def unembed(self, x: Tensor) -> Tensor:
        """fp32 logits [..., vocab] of normed rows [..., d_model]: W_U, b_U, the soft cap where the model has one."""
        logits = self.scores(x)
        return logits if not self.softcap else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    @t.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """fp32 logits before the soft cap. A CPU takes a stretch of the vocabulary at a time: for few rows that is nearly twice as fast."""
        head = getattr(self.bridge.unembed, "original_component", None)
        if x.device.type != "cpu" or type(head) is not t.nn.Linear or head.weight.dtype != t.float32:
            logits = self.bridge.unembed(x).float()
            return logits if self.logit_scale == 1 else logits * self.logit_scale
        rows, weight, size = x.flatten(0, -2), head.weight, STRETCH * t.get_num_threads()
        logits = rows.new_empty(len(rows), len(weight))
        for i in range(0, len(weight), size):
            t.mm(rows, weight[i : i + size].T, out=logits[:, i : i + size])
        if head.bias is not None:
            logits += head.bias
        if self.logit_scale != 1:
            logits *= self.logit_scale
        return logits.view(*x.shape[:-1], -1)

    @t.no_grad()
    def log_probs(self, x: Tensor) -> Tensor:
        return self.unembed(x).log_softmax(-1)

    @t.no_grad()
    def norm(self, x: Tensor) -> Tensor:
        """The final norm, its scale computed from x itself."""
        return self.bridge.ln_final(x.to(self.final_device))

    @property
    def final_device(self) -> t.device:
        return self.bridge.W_U.device

    # ---------------------------------------------------------------- tokens

    def token_text(self, i: int) -> str:
        """The text of one token, alone: spaces kept, an incomplete UTF-8 sequence as its bytes (\\xe4)."""
        if i not in self.texts:
            self.texts[i] = self.spell(i)
        return self.texts[i]

    def spell(self, i: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(i) if i < len(self.tokenizer) else None
        if piece is None:
            return f"[unused {i}]"
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            code = int(byte[1], 16)
            return chr(code) if code < 128 else f"\\x{code:02x}"
        if "▁" in piece:
            return piece.replace("▁", " ")
        text = self.tokenizer.decode([i], clean_up_tokenization_spaces=False)
        if "\ufffd" in text and all(c in BYTE_OF for c in piece):
            return bytes(BYTE_OF[c] for c in piece).decode("utf-8", errors="backslashreplace")
        return text

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast, verbose=False)
        return list(out["input_ids"]), [tuple(o) for o in out.get("offset_mapping", [])]

    def row(self, text: str, bos: bool | None, labels: tuple[tuple[str, int], ...] = ()) -> TokenRow:
        key = (text, bos, labels)
        if key not in self.rows:
            if len(self.rows) > 8192:
                self.rows.clear()
            self.rows[key] = self.read_row(text, bos, labels)
        return self.rows[key]

    def read_row(self, text: str, bos: bool | None, labels: tuple[tuple[str, int], ...]) -> TokenRow:
        """A text as tokens. A text that starts with BOS gets no second one; asked for one, that is an error."""
        ids, offsets = self.encode(text)
        starts = self.bos is not None and ids[:1] == [self.bos]
        if bos and self.bos is None:
            raise UserError("this model's tokenizer has no BOS token: turn BOS off")
        if bos and starts:
            raise UserError(f"the text starts with {self.info.bos} itself, and BOS would come twice: take it out of the text or turn BOS off")
        add = not starts and (self.info.default_bos if bos is None else bos)
        if labels and not self.tokenizer.is_fast:
            raise UserError("labels need a fast tokenizer (tokenizer.json)")
        where = {}
        for name, offset in labels:
            covering = [i for i, (a, b) in enumerate(offsets) if a <= offset < b]
            if not covering:
                raise UserError(f"label {name}: no token covers character {offset} of the prompt")
            where[name] = covering[-1] + add
        ids = [self.bos] * add + ids
        if ids:
            where["END"] = len(ids) - 1
        return TokenRow(tuple(ids), tuple(self.token_text(i) for i in ids), where, add or starts)

    def answer(self, clean: str, text: str) -> TokenRow:
        """An answer as the tokens that would follow the clean prompt; alone when it merges with the prompt's end."""
        base, full = self.encode(clean)[0], self.encode(clean + text)[0]
        ids = full[len(base) :] if base and full[: len(base)] == base else self.encode(text)[0]
        return TokenRow(tuple(ids), tuple(self.token_text(i) for i in ids), {"END": len(ids) - 1} if ids else {})

    def check(self, prompt: Prompt, how: str = "") -> CheckResult:
        """The prompt's rows, its alignment (`how` of ALIGNMENTS), and what is wrong with it."""
        problems, hints, pairs = [], [], ()

        def read(what: str, text: str, labels: tuple = ()) -> TokenRow:
            try:
                row = self.row(text, prompt.bos, labels)
            except UserError as error:
                problems.append(f"{what}: {error}")
                return TokenRow()
            if not text:
                problems.append(f"{what} is empty: type a text")
            elif len(row.ids) > self.info.n_ctx:
                problems.append(f"{what} has {len(row.ids)} tokens and the model's context holds {self.info.n_ctx}: shorten it")
            elif bad := [i for i in row.ids if i >= self.n_embed]:
                problems.append(f"{what}: token {bad[0]} ({self.token_text(bad[0])!r}) is not among the model's {self.n_embed} embeddings")
            if prompt.bos is None and self.info.default_bos and text and not problems and self.encode(text)[0][:1] == [self.bos]:
                hints.append(f"{what} starts with {self.info.bos} itself: none was added")
            return row

        clean = read("the clean prompt", prompt.clean, prompt.labels)
        corrupt = None if prompt.corrupt is None else read("the corrupted prompt", prompt.corrupt, prompt.corrupt_labels)
        if corrupt is not None and clean.ids and corrupt.ids:
            n, m = len(clean.ids), len(corrupt.ids)
            if prompt.alignment or how:
                try:
                    corrupt = replace(corrupt, labels=align.find_labels(clean, corrupt, prompt.alignment))
                    pairs = align.align(prompt, clean, corrupt, how)
                except UserError as error:
                    problems.append(str(error))
            elif n == m:
                corrupt, pairs = replace(corrupt, labels={**clean.labels, **corrupt.labels}), align.align(prompt, clean, corrupt)
            else:
                hints.append(f"clean has {n} tokens and corrupted {m}: patching by position needs equal lengths, or an alignment (diff or labels)")
            if pairs and not align.is_by_index(pairs, n, m):
                hints.append(align.words(pairs, n, m))
        sides = []
        for what, texts in (("answer", prompt.answers), ("foil", prompt.foils)):
            rows = []
            for text in texts:
                row = self.answer(prompt.clean, text)
                spaced = self.answer(prompt.clean, " " + text) if text and not text[0].isspace() else TokenRow()
                advice = f"; {' ' + text!r} with a leading space is one token" if len(spaced.ids) == 1 else ""
                if len(row.ids) != 1:
                    parts = " ".join(repr(s) for s in row.texts)
                    problems.append(f"{what} {text!r} is {len(row.ids)} tokens ({parts}) and must be one{advice}" if text else f"an {what} is empty")
                elif row.ids[0] >= self.info.d_vocab:
                    problems.append(f"{what} {text!r} is token {row.ids[0]}, which the model can't predict")
                elif advice and not prompt.clean[-1:].isspace():
                    hints.append(f"{what} {text!r} has no leading space: after this prompt {' ' + text!r} is the usual token")
                rows.append(row)
            sides.append(tuple(rows))
        both = {r.ids for r in sides[0]} & {r.ids for r in sides[1]}
        if both and not problems:
            hints.append("a token is both answer and foil")
        return CheckResult(clean, corrupt, *sides, tuple(problems), tuple(hints), pairs)

    # ---------------------------------------------------------------- self-check

    def identity(self, name: str, got: Tensor, want: Tensor, note: str = "") -> Identity:
        """Largest absolute difference against a tolerance that grows with the values' size; anything not finite is broken."""
        got, want = got.float(), want.float().to(got.device)
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)} against {tuple(want.shape)}"
        error = (got - want).abs().max().item()
        tolerance = TOLERANCE[self.dtype] * max(1.0, want.abs().max().item() / (32 if self.dtype == t.float32 else 4))
        return Identity(name, error, tolerance, error <= tolerance, note)

    def random_ids(self, n: int, rows: int = 1, seed: int = 0) -> Tensor:
        """Random tokens, none of them special."""
        special = set(self.tokenizer.all_special_ids)
        usual = t.tensor([i for i in range(min(len(self.tokenizer), self.n_embed)) if i not in special])
        return usual[t.randint(len(usual), (rows, n), generator=t.Generator().manual_seed(seed))]

    def self_check(self, ids: Tensor | None = None) -> tuple[Identity, ...]:
        """Do the hook points mean what Loupe takes them to mean, on this model? On random tokens, or on a prompt's."""
        ids = self.random_ids(min(10, self.info.n_ctx)) if ids is None else ids
        layers = range(self.info.n_layers)
        per_layer = ("hook_resid_pre", "hook_resid_post", "hook_attn_out", "hook_mlp_out", "attn.hook_pattern", "attn.hook_z")
        per_layer += () if self.parallel else ("hook_resid_mid",)
        absent = [n for n in (f"blocks.{i}.{s}" for i in layers for s in per_layer) if n not in self.points]
        if absent:
            return (Identity("hook points", math.inf, 0.0, False, f"the model has no {absent[0]}: views that need it do not work"),)
        embeds = [n for n in ("hook_embed", "hook_pos_embed") if n in self.points]
        logits, a = self.forward(ids, [*(f"blocks.{i}.{s}" for i in layers for s in per_layer), FINAL, *embeds], keep=0)
        at = lambda site: t.stack([a[f"blocks.{i}.{site}"].float().cpu() for i in layers])  # noqa: E731
        pre, post, attn, mlp, pattern = (at(s) for s in per_layer[:5])
        rows = [self.identity("residual stream = sum of its terms", pre + attn + mlp, post)]
        if not self.parallel:
            rows.append(self.identity("resid_mid = resid_pre + attention", pre + attn, at("hook_resid_mid")))
        rows.append(self.identity("attention rows sum to one", pattern.sum(-1), t.ones(pattern.shape[:-1])))
        rows.append(self.identity("lens at the last point = logits", self.unembed(self.norm(a[f"blocks.{layers[-1]}.hook_resid_post"])), logits))
        rows.append(self.identity("unembedding of the final norm = logits", self.unembed(a[FINAL]), logits))
        rows.append(self.heads_check(a))
        rows += self.write_checks(ids, a)
        return tuple(rows)

    @t.no_grad()
    def heads_check(self, a: dict[str, Tensor]) -> Identity:
        """Heads plus b_O against attn_out, through the norm that some models put after attention."""
        name, worst, normed = "heads + b_O = attention", None, False
        for layer in range(self.info.n_layers):
            block = self.bridge.blocks[layer]
            z = a[f"blocks.{layer}.attn.hook_z"]
            if z.ndim != 4:
                return Identity(name, math.nan, 0.0, None, "z is not split into heads here")
            out = block.attn.o(z.flatten(2))
            if hasattr(block, "ln1_post"):
                out, normed = block.ln1_post(out), True
            row = self.identity(name, out, a[f"blocks.{layer}.hook_attn_out"])
            worst = row if worst is None or not row.error <= worst.error else worst
        return replace(worst, note="through the norm after attention" if normed else "")

    def write_checks(self, ids: Tensor, a: dict[str, Tensor]) -> list[Identity]:
        """Writing a residual point changes what comes after it, and only that."""
        layer = self.info.n_layers // 2
        noise = lambda x: x + 0.5 * x.float().std().to(x.dtype) * t.sin(t.arange(x.numel(), device=x.device)).view(x.shape).to(x.dtype)  # noqa: E731
        rows = []
        if layer > 0:
            new = noise(a[f"blocks.{layer}.hook_resid_pre"])
            one = self.forward(ids, edits=[(f"blocks.{layer}.hook_resid_pre", lambda x: new)], keep=0)[0]
            two = self.forward(ids, edits=[(f"blocks.{layer - 1}.hook_resid_post", lambda x: new)], keep=0)[0]
            rows.append(self.identity("writing resid_post = writing the next resid_pre", two, one))
        if not self.parallel:
            want, where = noise(a[f"blocks.{layer}.hook_resid_mid"]), f"blocks.{layer}.hook_resid_mid"
            after, mlp = f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.hook_mlp_out"
            _, got = self.forward(ids, [where, after, mlp], write_mid(layer, lambda x: want))
            sums = t.cat([got[where], got[after]])
            rows.append(self.identity("write at resid_mid via attn_out", sums, t.cat([want, want + got[mlp]])))
        return rows


def write_mid(layer: int, fn: Callable[[Tensor], Tensor]) -> list[Edit]:
    """resid_mid is written through attn_out: the hook of its name reaches the MLP but not the skip connection."""
    pre = Keep()
    return [(f"blocks.{layer}.hook_resid_pre", pre), (f"blocks.{layer}.hook_attn_out", lambda x: fn(pre.x + x) - pre.x)]
