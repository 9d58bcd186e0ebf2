"""What every check stands on: a device, random models of real shapes on it, engines, prompts, the clock and the memory."""

import contextlib
import dataclasses
import gc
import math
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch as t
import transformers as tr

from gpu_checks.loupe import Engine, Load, Model, Prompt, Study, read_tokenizer, self_check
from gpu_checks.requests import every

GIB = 2**30
SHARED = 2  # tokens at the start that clean and corrupted have in common
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "pythia-410m": "GPTNeoXForCausalLM", "gemma-2-2b": "Gemma2ForCausalLM", "llama-3.1-8b": "LlamaForCausalLM"}
Outcome = tuple[bool | None, dict]


class Late(Exception): ...


@contextlib.contextmanager
def deadline(seconds: int) -> Generator:
    """Late after so many seconds, whatever runs; the alarm of an outer deadline goes on. Main thread only."""

    def late(*_) -> None:
        raise Late(f"broken off after {seconds} s")

    old, left = signal.signal(signal.SIGALRM, late), signal.alarm(seconds)
    start = time.monotonic()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
        if left:
            signal.alarm(max(1, int(left - (time.monotonic() - start))))


def one_line(error: BaseException) -> str:
    """An error with the last three places in the project that it passed."""
    root = str(Path(__file__).resolve().parents[2])
    where = traceback.extract_tb(error.__traceback__)
    ours = [f for f in where if f.filename.startswith(root) and "site-packages" not in f.filename] or where
    place = " < ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in reversed(ours[-3:]))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:220]} @ {place}"


def number(x: float | None, digits: int = 4) -> float | None:
    """Rounded for a line; None where there is nothing finite."""
    return float(f"{x:.{digits}g}") if isinstance(x, float | int) and math.isfinite(x) else None


# ------------------------------------------------------------------ models


def config(name: str, tiny: bool) -> tr.PretrainedConfig:
    """The real shape; with `tiny` the same architecture, small."""

    def size(d: int, mlp: int, layers: int, heads: int, vocab: int, context: int) -> dict:
        if tiny:
            d, mlp, layers, heads, vocab, context = 48, 64, 3, 4, 600, 160
        wide = {"hidden_size": d, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
        return wide | {"vocab_size": vocab, "max_position_embeddings": context}

    match name:
        case "gpt2":
            found = tr.GPT2Config(**({"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 160, "vocab_size": 600} if tiny else {}))
        case "pythia-410m":
            shape = size(1024, 4096, 24, 16, 50304, 2048)
            found = tr.GPTNeoXConfig(**shape, rotary_pct=0.25, use_parallel_residual=True, hidden_act="gelu", tie_word_embeddings=False)
        case "gemma-2-2b":
            heads = {"num_key_value_heads": 2, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 32} if tiny else {}
            heads = heads or {"num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4096}
            found = tr.Gemma2Config(**size(2304, 9216, 26, 8, 256000, 8192), **heads, final_logit_softcapping=30.0, attn_logit_softcapping=50.0)
        case "llama-3.1-8b":
            found = tr.LlamaConfig(**size(4096, 14336, 32, 32, 128256, 131072), num_key_value_heads=2 if tiny else 8, tie_word_embeddings=False)
        case _:
            raise AssertionError(name)
    found.bos_token_id = found.eos_token_id = found.pad_token_id = 0
    found.architectures = [ARCHITECTURES[name]]
    return found


def liven(hf: t.nn.Module) -> None:
    """Random weights under which heads attend somewhere and patches move the logits."""
    layers = hf.config.num_hidden_layers
    for name, p in hf.named_parameters():
        if p.ndim != 2:
            continue
        conv = isinstance(hf, tr.GPT2LMHeadModel) and not any(n in name for n in ("wte", "wpe", "lm_head"))
        fan = p.shape[0] if conv else p.shape[1]
        if "wpe" in name:
            std = 0.2
        elif "wte" in name:
            std = 0.06
        elif "embed" in name and "out" not in name:
            std = fan**-0.5 if isinstance(hf, tr.Gemma2ForCausalLM) else 1.0
        elif any(n in name for n in ("c_proj", "o_proj", "down_proj", "dense_4h_to_h", "attention.dense")):
            std = (2 * layers * fan) ** -0.5 * 2
        else:
            std = 1.4 * fan**-0.5
        p.normal_(0, std)


def tokenizer(vocab: int) -> tr.PreTrainedTokenizerFast:
    """Every word w0, w1, ... is one token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocab)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tr.PreTrainedTokenizerFast(tokenizer_object=words)


def prompts(n: int, seq: int, vocab: int, shared: int = SHARED, seed: int = 0) -> tuple[Prompt, ...]:
    """Random prompts; the corrupted one has another token at `shared` alone."""
    rng = np.random.default_rng(seed)
    text = lambda ids: " ".join(f"w{i}" for i in ids)  # noqa: E731
    out = []
    for _ in range(n):
        clean = rng.integers(0, vocab, seq)
        corrupt = clean.copy()
        corrupt[shared] = (corrupt[shared] + 1 + rng.integers(0, vocab - 2)) % vocab
        a, b = rng.choice(vocab, 2, replace=False)
        out.append(Prompt(text(clean), text(corrupt), (f" w{a}",), (f" w{b}",), bos=False))
    return tuple(out)


# ------------------------------------------------------------------ the bench


class Bench:
    """A device and the engines on it. `end` is the moment (time.monotonic) after which no further case of a check starts."""

    def __init__(self, device: str, tiny: bool, work: Path):
        self.device, self.tiny, self.end = device, tiny, math.inf
        self.work = work / ("tiny" if tiny else "full")
        self.work.mkdir(parents=True, exist_ok=True)
        self.cuda = t.device(device).type == "cuda"
        self.long = 24 if tiny else 128
        self.engines: dict[tuple, Engine] = {}
        self.rates: dict[str, float] = {}  # FLOPs a second of a large matrix product, by dtype

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    # ---------------------------------------------------------------- clock and memory

    def sync(self) -> None:
        if self.cuda:
            t.cuda.synchronize()

    def wall(self, fn: Callable, repeat: int = 3, warm: int = 1) -> float:
        """Median seconds."""
        for _ in range(warm):
            fn()
        return statistics.median(self.measured(fn)[1] for _ in range(1 if self.tiny else repeat))

    def measured(self, fn: Callable) -> tuple[object, float, float]:
        """What fn returns, its seconds, and the most memory (GiB) that torch held meanwhile above what it held before."""
        self.sync()
        before = self.allocated()
        if self.cuda:
            t.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        out = fn()
        self.sync()
        seconds = time.perf_counter() - start
        return out, seconds, t.cuda.max_memory_allocated() / GIB - before if self.cuda else math.nan

    def allocated(self) -> float:
        return t.cuda.memory_allocated() / GIB if self.cuda else math.nan

    def free(self) -> float:
        return t.cuda.mem_get_info()[0] / GIB if self.cuda else math.nan

    def forget(self) -> None:
        gc.collect()
        if self.cuda:
            t.cuda.empty_cache()

    def lift_limit(self) -> None:
        """Give back what a check left, and any cap it set."""
        if self.cuda:
            t.cuda.set_per_process_memory_fraction(1.0)
        self.forget()

    # ---------------------------------------------------------------- engines

    def build(self, name: str, dtype: t.dtype) -> t.nn.Module:
        """The Hugging Face model with random weights, made on the device."""
        t.manual_seed(0)
        with t.device(self.device):
            hf = tr.AutoModelForCausalLM.from_config(config(name, self.tiny), dtype=dtype, attn_implementation="eager")
        hf.requires_grad_(False)
        liven(hf)
        return hf.eval()

    def folder(self, name: str) -> Path:
        """Its folder with config and tokenizer."""
        path = self.work / name
        if not (path / "tokenizer.json").is_file():
            path.mkdir(parents=True, exist_ok=True)
            config(name, self.tiny).save_pretrained(path)
            tokenizer(config(name, self.tiny).vocab_size).save_pretrained(path)
        return path

    def saved(self, name: str) -> Path:
        """Its folder with weights: float32, Gemma's in bfloat16."""
        path = self.folder(name)
        if not list(path.glob("*.safetensors*")):
            self.build(name, t.bfloat16 if name.startswith("gemma") else t.float32).save_pretrained(path, max_shard_size="8GB")
            self.forget()
        return path

    def engine(self, name: str, dtype: str = "auto", device: str = "") -> Engine:
        """An engine with that model; loading another large one lets the former go."""
        key = name, dtype, device or self.device
        if key not in self.engines:
            if name != "gpt2":
                self.let_go(but="gpt2")
            if name == "llama-3.1-8b":
                self.engines[key] = self.wrapped(name)
            else:
                self.engines[key] = Engine(Load(str(self.saved(name)), device=key[2], dtype=dtype))
        return self.engines[key]

    def wrapped(self, name: str) -> Engine:
        """An engine around weights made on the device, in bfloat16: 16 GB do not go through a file."""
        path = self.folder(name)
        ask, made, hf = Load(str(path), device=self.device, dtype="bfloat16"), Engine(), self.build(name, t.bfloat16)
        made.model = Model(ask, hf, read_tokenizer([path]), path, path, t.bfloat16, 512)
        made.model.info = replace(made.model.info, n_params=sum(p.numel() for p in hf.parameters()))
        made.model.info = replace(made.model.info, checks=self_check(made.model))
        made.loaded = ask
        return made

    def let_go(self, but: str = "") -> None:
        for key in [k for k in self.engines if k[0] != but]:
            del self.engines[key]
        self.forget()

    # ---------------------------------------------------------------- requests

    def study(self, e: Engine, seq: int = 15, batch: int = 1, shared: int = SHARED) -> Study:
        some = prompts(batch, min(seq, e.model.info.n_ctx), min(e.model.info.d_vocab, len(e.model.tokenizer)), shared)
        return Study(some[0], prompt_set=some if batch > 1 else ())

    def every(self, e: Engine) -> dict[str, object]:
        """Each analysis as a request for this model."""
        s = self.study(e)
        return every(s, replace(s, prompt_set=self.study(e, batch=4).prompt_set), e.model.info.n_layers // 2, e.model.info.name)

    def fresh(self, e: Engine, request: object, show: Callable[[object], None] = lambda part: None) -> object:
        """A result computed anew: nothing from the activation cache."""
        e.model.cache.clear()
        return e.run(request, show)


# ------------------------------------------------------------------ two results


def arrays(result: object, path: str = "") -> dict[str, np.ndarray]:
    """The float arrays of a result, by the path to each."""
    out = {}
    for f in dataclasses.fields(result) if dataclasses.is_dataclass(result) else ():
        value = getattr(result, f.name)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.size:
            out[path + f.name] = value.astype(np.float64)
        elif isinstance(value, float) and f.name not in ("seconds", "expected", "peak_mb", "error", "gap"):
            out[path + f.name] = np.array(value)
        elif isinstance(value, dict):
            out |= {f"{path}{f.name}.{k}": np.asarray(v, np.float64) for k, v in value.items() if isinstance(v, np.ndarray | float)}
        elif dataclasses.is_dataclass(value):
            out |= arrays(value, f"{path}{f.name}.")
    return out


def difference(one: object, other: object) -> dict:
    """Largest absolute error over the arrays of two results, the same over each array's largest size (at least 1), and where."""
    a, b, worst, relative, where = arrays(one), arrays(other), 0.0, 0.0, ""
    for name, x in a.items():
        y = b[name]
        if x.shape != y.shape:
            return {"max_error": math.inf, "relative": math.inf, "where": f"{name}: {x.shape} against {y.shape}"}
        if (np.isnan(x) != np.isnan(y)).any():
            return {"max_error": math.inf, "relative": math.inf, "where": f"{name}: NaN in one only"}
        if not np.isfinite(x).any():
            continue
        gap = float(np.nanmax(np.abs(x - y)))
        worst, share = max(worst, gap), gap / max(1.0, float(np.nanmax(np.abs(x))))
        if share > relative:
            relative, where = share, name
    return {"max_error": worst, "relative": relative, "where": where}
