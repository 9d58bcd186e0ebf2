"""Train the zoo model on one CPU core and export it as a GPT-2 folder.

uv run zoo/train.py --seed 2 --out zoo/runs/s2                  train; the finished folder is zoo/runs/s2/model
uv run zoo/train.py --export-only --out zoo/runs/s2 --folder x  write the folder of an unfinished run's last checkpoint
"""

import math
import json
import time
import zlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as t
import torch.nn.functional as F
import tyro
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import corpus as c
from evaluate import behaviour

purple, cyan, yellow = "\x1b[38;2;255;0;255m", "\x1b[38;2;0;255;255m", "\x1b[38;2;255;255;0m"
green, gray, endc = "\x1b[38;2;0;255;0m", "\x1b[38;2;127;127;127m", "\033[0m"

HERE = Path(__file__).parent


@dataclass
class TrainingConfig:
    out: Path = HERE / "runs/x"
    folder: Path = HERE
    seed: int = 0
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    d_mlp: int = 512
    last_mlp: bool = False
    tokens: float = 12e6
    hold: float = 0.6
    warmup: int = 100
    batch_tokens: int = 4096
    long_share: float = 0.25
    lr: float = 3e-3
    muon_lr: float = 0.02
    weight_decay: float = 0.05
    answer_weight: float = 3.0
    name_weight: float = 4.0
    repeat_share: float = 0.2
    first_weight: float = 0.02
    short_repeats: float = 0.25
    head_dropout: float = 0.1
    dropout_from: float = 0.35
    init: Path | None = None
    corpus_tokens: float = 11e6
    bf16: bool = True
    eval_every: float = 1e6
    export_only: bool = False

    def asdict(self) -> dict:
        return {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()}


# ---------------------------------------------------------------- model


class Block(nn.Module):
    def __init__(self, cfg: TrainingConfig, has_mlp: bool):
        super().__init__()
        d = cfg.d_model
        self.n_head, self.head_dropout = cfg.n_head, 0.0
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.has_mlp = has_mlp
        if has_mlp:
            self.fc, self.proj = nn.Linear(d, cfg.d_mlp), nn.Linear(cfg.d_mlp, d)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, d = x.shape
        normed = self.ln_1(x)
        q, k, v = (w(normed).view(batch, seq, self.n_head, -1).transpose(1, 2).float() for w in (self.q, self.k, self.v))
        with t.autocast("cpu", enabled=False):  # torch's bf16 attention on CPU is several times slower than its fp32 one
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            if self.training and self.head_dropout:  # whole heads of a row: no head may be the only one to do a job
                keep = 1 - self.head_dropout
                z = z * t.bernoulli(t.full((batch, self.n_head, 1, 1), keep)) / keep
        x = x + self.o(z.transpose(1, 2).reshape(batch, seq, d))
        if self.has_mlp:
            x = x + self.proj(F.gelu(self.fc(self.ln_2(x)), approximate="tanh"))
        return x


class GPT2(nn.Module):
    def __init__(self, cfg: TrainingConfig, vocab_size: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, cfg.d_model), nn.Embedding(c.N_CTX, cfg.d_model)
        self.blocks = nn.ModuleList([Block(cfg, cfg.last_mlp or i < cfg.n_layer - 1) for i in range(cfg.n_layer)])
        self.ln_f, self.head = nn.LayerNorm(cfg.d_model), nn.Linear(cfg.d_model, vocab_size, bias=False)
        for name, p in self.named_parameters():
            if name.startswith(("wte", "wpe", "head")):
                nn.init.normal_(p, 0, 0.02)
            elif p.dim() == 2:
                writes = name.endswith(("o.weight", "proj.weight"))
                nn.init.normal_(p, 0, 1 / math.sqrt(p.shape[1] * (2 * cfg.n_layer if writes else 1)))
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.wte(ids) + self.wpe.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


# ---------------------------------------------------------------- export


def export(model: GPT2, cfg: TrainingConfig, folder: Path) -> None:
    """
    Write a GPT-2 folder in fp16. TransformerLens' centring is baked in (an exact change for a pre-LN model): all writes to the residual
    stream have mean 0 over d_model and the unembedding has mean 0 over the vocabulary, so raw and processed residual streams agree.
    A missing last MLP is exported as an MLP that writes zeros.
    """
    d = cfg.d_model
    weights = {
        "transformer.wte.weight": model.wte.weight,
        "transformer.wpe.weight": model.wpe.weight,
        "transformer.ln_f.weight": model.ln_f.weight,
        "transformer.ln_f.bias": model.ln_f.bias,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        p = f"transformer.h.{i}."
        fc = block.fc if block.has_mlp else nn.Linear(d, cfg.d_mlp)
        proj = block.proj if block.has_mlp else nn.Linear(cfg.d_mlp, d)
        if not block.has_mlp:
            for w in (fc.weight, fc.bias, proj.weight, proj.bias):
                nn.init.zeros_(w)
        for name, norm in (("ln_1", block.ln_1), ("ln_2", block.ln_2)):
            weights |= {p + name + ".weight": norm.weight, p + name + ".bias": norm.bias}
        weights[p + "attn.c_attn.weight"] = t.cat([block.q.weight, block.k.weight, block.v.weight]).T
        weights[p + "attn.c_attn.bias"] = t.cat([block.q.bias, block.k.bias, block.v.bias])
        for name, layer in (("attn.c_proj", block.o), ("mlp.c_fc", fc), ("mlp.c_proj", proj)):
            weights |= {p + name + ".weight": layer.weight.T, p + name + ".bias": layer.bias}
    weights = {key: value.detach().float() for key, value in weights.items()}
    for key in weights:
        if key.endswith(("wte.weight", "wpe.weight", "c_proj.weight", "c_proj.bias")):
            weights[key] = weights[key] - weights[key].mean(-1, keepdim=True)
    weights["lm_head.weight"] = weights["lm_head.weight"] - weights["lm_head.weight"].mean(0, keepdim=True)
    folder.mkdir(parents=True, exist_ok=True)
    halves = {key: value.half().contiguous() for key, value in weights.items()}
    assert all(value.isfinite().all() for value in halves.values()), "a weight does not fit fp16"
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": model.wte.weight.shape[0],
        "n_positions": c.N_CTX,
        "n_ctx": c.N_CTX,
        "n_embd": d,
        "n_layer": cfg.n_layer,
        "n_head": cfg.n_head,
        "n_inner": cfg.d_mlp,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
        "trained_with_bos": True,
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


# ---------------------------------------------------------------- data


def load_rows(cfg: TrainingConfig, tokenizer: PreTrainedTokenizerFast) -> dict[int, np.ndarray]:
    """Rows of both lengths, built once per tokenizer and corpus.py."""
    rows, key = {}, zlib.crc32(tokenizer.backend_tokenizer.to_str().encode() + (HERE / "corpus.py").read_bytes())
    for length, share in ((c.N_CTX // 2, 1 - cfg.long_share), (c.N_CTX, cfg.long_share)):
        path = HERE / f"runs/rows_{length}_{key:08x}.npy"
        if not path.exists():
            (HERE / "runs").mkdir(exist_ok=True)
            np.save(path, c.build_rows(tokenizer, int(cfg.corpus_tokens * share), length, c.TRAIN_SEED + length))
        rows[length] = np.load(path)
    return rows


class AnswerWeights:
    """The tokens that a task turns on weigh more: a name after " to", a pronoun, the second year."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, weight: float, name_weight: float):
        def mask(words: list[str]) -> Tensor:
            result = t.zeros(len(tokenizer), dtype=t.bool)
            result[[tokenizer.encode(word)[0] for word in words]] = True
            return result

        self.weight, self.name_weight = weight, name_weight
        self.to = tokenizer.encode(" to")[0]
        self.names = mask([" " + name for name in c.NAMES])
        self.pronouns = mask([" he", " she", " his", " her"])
        self.years = mask([f"{i:02d}" for i in range(100)])
        self.centuries = mask([f" {century}" for century in c.CENTURIES])

    def __call__(self, ids: Tensor) -> Tensor:
        before, target = ids[:, :-1], ids[:, 1:]
        hit = self.pronouns[target]
        hit[:, 1:] |= self.years[target[:, 1:]] & self.centuries[before[:, 1:]] & (before[:, :-1] == self.to)
        received = self.names[target] & (before == self.to)
        return t.where(received, self.name_weight, t.where(hit, self.weight, 1.0))


def repeated_rows(n: int, length: int, longest: int, vocab_size: int, rng: np.random.Generator, first_weight: float) -> tuple[Tensor, Tensor]:
    """Rows of a random token string repeated until the row is full; its first, unpredictable occurrence counts little."""
    ids, weights = t.zeros(n, length, dtype=t.long), t.ones(n, length - 1)
    for i in range(n):
        period = int(rng.integers(6, longest))
        string = t.from_numpy(rng.integers(1, vocab_size, period))
        ids[i, 1:] = string.repeat(math.ceil(length / period))[: length - 1]
        weights[i, :period] = first_weight
    return ids, weights


# ---------------------------------------------------------------- training


def make_optimizers(model: GPT2, cfg: TrainingConfig) -> list[t.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    hidden = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    embeddings = [model.wte.weight, model.wpe.weight, model.head.weight]
    groups = [{"params": embeddings, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [
        t.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.97), fused=True),
        t.optim.Muon(hidden, lr=cfg.muon_lr, momentum=0.95, weight_decay=0.0),
    ]


def train(cfg: TrainingConfig) -> None:
    t.set_num_threads(1)
    t.manual_seed(cfg.seed)
    rng = np.random.default_rng(cfg.seed)
    cfg.out.mkdir(parents=True, exist_ok=True)
    if not (cfg.folder / "tokenizer.json").exists():
        c.build_tokenizer(cfg.folder)
    tokenizer = AutoTokenizer.from_pretrained(cfg.folder)
    vocab_size = len(tokenizer)
    rows = load_rows(cfg, tokenizer)
    model = GPT2(cfg, vocab_size)
    if cfg.init:
        model.load_state_dict(t.load(cfg.init / "checkpoint.pt")["state"])
    n_params = sum(p.numel() for p in model.parameters())
    print(f"{purple}=== seed {cfg.seed}: {cyan}{n_params / 1e6:.2f}M params, vocabulary {vocab_size}{purple} ==={endc}", flush=True)
    optimizers = make_optimizers(model, cfg)
    peak = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    weigh = AnswerWeights(tokenizer, cfg.answer_weight, cfg.name_weight)
    order = {length: iter(()) for length in rows}
    log = cfg.out / "log.jsonl"
    log.write_text(json.dumps(cfg.asdict()) + "\n")
    start, cpu_start = time.time(), time.process_time()
    tokens, steps, next_eval, running = 0, 0, cfg.eval_every, None

    def report() -> None:
        model.eval()
        figures = {key: round(value, 4) for key, value in behaviour(model, tokenizer, n=100).items()}
        model.train()
        times = {"seconds": round(time.time() - start), "cpu_seconds": round(time.process_time() - cpu_start)}
        with log.open("a") as file:
            file.write(json.dumps({"tokens": tokens, "loss": round(running, 4), **times, **figures}) + "\n")
        keys = "ioi ioi_third_name ioi_unknown_words greater_than capitals agreement successor pronouns docstring induction_second".split()
        shown = " ".join(f"{key}={figures[key]:.3f}" for key in keys)
        print(f"\n{gray}{tokens / 1e6:.2f}M {times['seconds']}s loss {running:.3f} {cyan}{shown}{endc}", flush=True)
        t.save({"cfg": cfg.asdict(), "state": model.state_dict()}, cfg.out / "checkpoint.pt")

    with tqdm(total=int(cfg.tokens), unit="tok", unit_scale=True, mininterval=60) as bar:
        while tokens < cfg.tokens:
            progress = tokens / cfg.tokens
            scale = min(1, (steps + 1) / cfg.warmup) * min(1, (1 - progress) / (1 - cfg.hold))
            for optimizer, lrs in zip(optimizers, peak):
                for group, lr in zip(optimizer.param_groups, lrs):
                    group["lr"] = lr * scale

            for block in model.blocks:
                block.head_dropout = cfg.head_dropout if progress >= cfg.dropout_from else 0.0
            length = c.N_CTX if rng.random() < cfg.long_share else c.N_CTX // 2
            n_rows = cfg.batch_tokens // length
            n_repeat = round(n_rows * cfg.repeat_share)
            picked = list(zip(range(n_rows - n_repeat), order[length]))
            if len(picked) < n_rows - n_repeat:
                order[length] = iter(rng.permutation(len(rows[length])).tolist())
                picked = list(zip(range(n_rows - n_repeat), order[length]))
            ids = t.from_numpy(rows[length][[i for _, i in picked]].astype(np.int64))
            longest = 24 if progress < cfg.short_repeats else length // 2
            repeats, repeat_weights = repeated_rows(n_repeat, length, longest, vocab_size, rng, cfg.first_weight)
            ids, weights = t.cat([ids, repeats]), t.cat([weigh(ids), repeat_weights])

            with t.autocast("cpu", t.bfloat16, enabled=cfg.bf16):
                logits = model(ids[:, :-1])
            losses = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view_as(weights)
            loss = (losses * weights).sum() / weights.sum()
            loss.backward()
            nn.utils.clip_grad_norm_([p for group in optimizers[0].param_groups for p in group["params"]], 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            assert loss.isfinite(), f"loss is {loss.item()} at step {steps}"
            running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
            steps, tokens = steps + 1, tokens + ids.numel()
            bar.update(ids.numel())
            if tokens >= next_eval and tokens < cfg.tokens:
                next_eval += cfg.eval_every
                report()
    report()
    export(model, cfg, cfg.out / "model")
    tokenizer.save_pretrained(cfg.out / "model")
    print(f"{green}Done: {cyan}{time.time() - start:.0f} s, {time.process_time() - cpu_start:.0f} CPU s{endc}")


if __name__ == "__main__":
    cfg = tyro.cli(TrainingConfig)
    if not cfg.export_only:
        train(cfg)
    else:
        saved = t.load(cfg.out / "checkpoint.pt")
        fields = {key: value for key, value in saved["cfg"].items() if key not in ("out", "folder", "init")}  # all but the paths
        model = GPT2(TrainingConfig(**fields), saved["state"]["wte.weight"].shape[0])
        model.load_state_dict(saved["state"])
        export(model, TrainingConfig(**fields), cfg.folder)
        AutoTokenizer.from_pretrained(HERE).save_pretrained(cfg.folder)
        print(f"{green}Exported {cfg.out} to {cfg.folder}{endc}")
