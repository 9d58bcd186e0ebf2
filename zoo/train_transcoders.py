"""Train the zoo's transcoders, one for each MLP, and write zoo/saes/transcoders; or measure what is there.

uv run zoo/train_transcoders.py                 train with BatchTopK, store as JumpReLU in fp16, measure: a few minutes on two cores
uv run zoo/train_transcoders.py --measure-only  the table of docs/graphs.md; exits non-zero when a target is missed
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as t
import tyro
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

import corpus as c

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # Loupe's rooms
gray, green, cyan, red, endc = "\x1b[38;2;127;127;127m", "\x1b[38;2;0;255;0m", "\x1b[38;2;0;255;255m", "\x1b[38;2;255;0;0m", "\033[0m"

TRAIN_SEED, HELD_SEED = 35_000, 36_000  # of text that nothing else was trained or measured on
LENGTH, ROWS = 128, 32
LAYERS = (0, 1, 2)  # the last block's MLP is zero
TARGET = 0.8  # explained variance


@dataclass
class TranscodersConfig:
    out: Path = HERE / "saes" / "transcoders"
    features: int = 768
    k: int = 16
    steps: int = 400
    lr: float = 2e-3
    seed: int = 0
    held_tokens: int = 100_000
    measure_only: bool = False


def points(layer: int) -> tuple[str, str]:
    """What an MLP reads (behind its norm), and what it writes."""
    return f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out"


def rows(model, tokens: int, seed: int) -> Tensor:
    """Documents packed to rows [n, 128], each after a BOS, as the model was trained on them."""
    return t.from_numpy(c.build_rows(model.tokenizer, tokens, LENGTH, seed).astype(np.int64))[: tokens // LENGTH]


def pairs(model, ids: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """By layer, what the MLP reads and writes [n, 128] at the tokens of rows [n, 128]; position 0 and BOS left out."""
    _, acts = model.forward(ids, [p for layer in LAYERS for p in points(layer)], keep=None)
    counts = ids != model.bos
    counts[:, 0] = False
    return {layer: tuple(acts[p][counts].float() for p in points(layer)) for layer in LAYERS}


class Transcoder(t.nn.Module):
    """BatchTopK: the n · k largest activations of a batch of n; `threshold` follows the smallest of them, and stands for them afterwards."""

    def __init__(self, x: Tensor, y: Tensor, cfg: TranscodersConfig):
        super().__init__()
        rand = t.randn(cfg.features, x.shape[1], generator=t.Generator().manual_seed(cfg.seed))
        self.k, self.threshold = cfg.k, 0.0
        self.W_dec = t.nn.Parameter(rand / rand.norm(dim=1, keepdim=True))
        self.W_enc = t.nn.Parameter(self.W_dec.data.T.clone())
        self.b_enc = t.nn.Parameter(t.zeros(cfg.features))
        self.b_dec = t.nn.Parameter(y.mean(0))
        self.size = (x.norm(dim=1).mean() / x.shape[1] ** 0.5).item(), (y - y.mean(0)).norm(dim=1).mean().item() / y.shape[1] ** 0.5
        self.last = t.zeros(cfg.features)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss: the variance not explained, and a little for features that have not fired for long."""
        x, y = x / self.size[0], (y - self.b_dec) / self.size[1]
        pre = (x @ self.W_enc + self.b_enc).relu()
        least = pre.detach().flatten().topk(self.k * len(x)).values[-1].item()
        self.threshold = least if not self.threshold else 0.98 * self.threshold + 0.02 * least
        f = pre * (pre >= least)
        self.last = t.where((f > 0).any(0), 0, self.last + 1)
        error = y - f @ self.W_dec
        loss = error.square().sum() / y.square().sum()
        if (dead := self.last > 40).any():
            idle = (x @ self.W_enc + self.b_enc)[:, dead].exp().clamp(max=10)
            best = idle.topk(min(32, idle.shape[1]), 1)
            helped = t.zeros_like(idle).scatter(1, best.indices, best.values) @ self.W_dec[dead]
            loss = loss + (helped - error.detach()).square().sum() / y.square().sum() / 32
        return loss

    @t.no_grad()
    def tidy(self) -> None:
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)

    @t.no_grad()
    def weights(self) -> dict[str, Tensor]:
        """As sae_lens's jumprelu_transcoder has them, the inputs' and outputs' sizes folded in."""
        a, b = self.size
        found = {
            "W_enc": self.W_enc * b / a,
            "b_enc": self.b_enc * b,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec,
            "threshold": t.full_like(self.b_enc, self.threshold * b),
        }
        return {k: v.detach().half().contiguous() for k, v in found.items()}


def train(model, cfg: TranscodersConfig) -> dict[int, Transcoder]:
    text, made = rows(model, cfg.steps * ROWS * LENGTH, TRAIN_SEED), {}
    for step in (bar := tqdm(range(cfg.steps), mininterval=5)):
        for layer, (x, y) in pairs(model, text[step * ROWS : (step + 1) * ROWS]).items():
            if not step:
                coder = Transcoder(x, y, cfg)
                made[layer] = coder, t.optim.Adam(coder.parameters(), betas=(0.9, 0.99))
            coder, optimizer = made[layer]
            for group in optimizer.param_groups:
                group["lr"] = cfg.lr * min(1.0, (step + 1) / 20, (cfg.steps - step) / (0.3 * cfg.steps))
            for half in (slice(0, None, 2), slice(1, None, 2)):
                loss = coder(x[half], y[half])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                coder.tidy()
            bar.set_postfix_str(f"layer {layer}: unexplained {loss.item():.3f}", refresh=False)
    return {layer: coder for layer, (coder, _) in made.items()}


@t.no_grad()
def measured(model, folder: Path, held: Tensor) -> dict[str, float]:
    """Of a stored transcoder on held-out rows: explained variance, L0, the share of features that never fire, tokens."""
    from sae_lens import SAE

    sae, layer = SAE.load_from_disk(folder, dtype="float32"), int(folder.name.removeprefix("L"))
    found = [pairs(model, held[i : i + ROWS])[layer] for i in range(0, len(held), ROWS)]
    x, y = (t.cat(some) for some in zip(*found))
    f = sae.encode(x)
    explained = 1 - (y - sae.decode(f)).square().sum() / (y - y.mean(0)).square().sum()
    return {
        "l0": (f > 0).sum(1).float().mean().item(),
        "explained_variance": explained.item(),
        "dead_fraction": 1 - (f > 0).any(0).float().mean().item(),
        "held_out_tokens": len(x),
    }


def write(model, folder: Path, layer: int, weights: dict[str, Tensor], cfg: TranscodersConfig, held: Tensor) -> None:
    import sae_lens

    from model.artefacts import unembed_hash

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    point, out = points(layer)
    recipe = f"BatchTopK, {cfg.features} features, k {cfg.k}, {cfg.steps} steps of {ROWS * LENGTH} tokens, lr {cfg.lr:g}, seed {cfg.seed}, stored as JumpReLU"
    about = {"model_name": "zoo", "hook_name": point, "hook_name_out": out, "context_size": LENGTH, "prepend_bos": True, "exclude_special_tokens": [model.bos]}
    about |= {
        "sae_lens_version": sae_lens.__version__,
        "dataset_path": "zoo/corpus.py",
        "unembed_hash": unembed_hash(model),
        "recipe": recipe,
        "stored": "float16",
    }
    shape = {"d_in": model.info.d_model, "d_out": model.info.d_model, "d_sae": cfg.features}
    config = {
        "architecture": "jumprelu_transcoder",
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
    } | shape
    for more in ({}, None):
        about |= {k: round(v, 6) for k, v in measured(model, folder, held).items()} if more is None else more
        (folder / "cfg.json").write_text(json.dumps(config | {"metadata": about}) + "\n")
    for file in folder.iterdir():
        file.chmod(0o644)


def main(cfg: TranscodersConfig) -> None:
    from engine import Engine

    model = Engine("zoo").model
    held = rows(model, cfg.held_tokens, HELD_SEED)
    if not cfg.measure_only:
        for layer, coder in train(model, cfg).items():
            write(model, cfg.out / f"L{layer}", layer, coder.weights(), cfg, held)
    missed = 0
    print(f"{gray}{'transcoder':12} {'explained':>10} {'L0':>6} {'dead':>7}{endc}")
    for layer in LAYERS:
        got = measured(model, cfg.out / f"L{layer}", held)
        missed += got["explained_variance"] < TARGET
        colour = green if got["explained_variance"] >= TARGET else red
        print(
            f"{colour}L{layer:<11}{endc} {cyan}{got['explained_variance']:10.4f} {got['l0']:6.2f} {got['dead_fraction']:7.4f}{endc}{gray}  {got['held_out_tokens']} tokens{endc}"
        )
    sys.exit(missed > 0)


if __name__ == "__main__":
    main(tyro.cli(TranscodersConfig))
