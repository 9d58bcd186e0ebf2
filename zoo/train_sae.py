"""Train the zoo's SAEs through sae_lens (training.py) and write zoo/saes; or measure what is there.

uv run zoo/train_sae.py                 train, store in fp16, measure: two to three minutes an SAE on one core;
                                        an interrupted run goes on, and one that zoo/runs/saes holds is not trained again
uv run zoo/train_sae.py --measure-only  the table of zoo/README.md; exits non-zero when a target is missed
"""

import json
import sys
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch as t
import tyro
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import corpus as c

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # Loupe's rooms
gray, green, cyan, red, endc = "\x1b[38;2;127;127;127m", "\x1b[38;2;0;255;0m", "\x1b[38;2;0;255;255m", "\x1b[38;2;255;0;0m", "\033[0m"

# seeds of text: the model was trained with 1128 and 1256, corpus.txt has 777777, name_features.py 33000 and 34000
TRAIN_SEED, HELD_SEED = 31_000, 32_000
LENGTH = 128
ARCHITECTURES = {"L0.resid_post": "topk", "L1.resid_post": "topk", "L2.resid_post": "batchtopk"}  # the last is stored as JumpReLU
TARGETS = {"explained": (">=", 0.9), "recovered": (">=", 0.98), "recovered_mean": (">=", 0.98), "dead": ("<=", 0.02)}


@dataclass
class SaesConfig:
    out: Path = HERE / "saes"
    hooks: tuple[str, ...] = tuple(ARCHITECTURES)
    features: int = 768
    k: int = 12
    tokens: int = 1_500_000
    lr: float = 2e-3
    seed: int = 0
    held_tokens: int = 100_000
    measure_only: bool = False


def rows(model, tokens: int, seed: int) -> t.Tensor:
    """Documents packed to rows [n, 128], each after a BOS, as the model was trained on them."""
    return t.from_numpy(c.build_rows(model.tokenizer, tokens, LENGTH, seed).astype(np.int64))[: tokens // LENGTH]


def finish(jobs: Generator) -> object:
    """Run to the end, with a bar."""
    with tqdm(bar_format="{desc}", leave=False) as bar:
        while True:
            try:
                bar.set_description_str(str(next(jobs).text))
            except StopIteration as stop:
                return stop.value


def measured(model, folder: Path, held: t.Tensor) -> tuple[dict, object]:
    """An SAE on disk against held-out rows: explained variance, L0, dead fraction, loss recovered against zeros and against the mean."""
    from sae_lens import SAE

    from vocabulary.nodes import parse_node
    from techniques.features.training import measure, recovered

    sae = SAE.load_from_disk(folder)
    got = finish(measure(model, sae, parse_node(folder.name), sae.cfg.metadata.hook_name, held))
    got |= {"recovered": recovered(got), "recovered_mean": recovered(got, "loss_mean"), "dead": (got["density"] == 0).float().mean().item()}
    return got, sae


def train(model, cfg: SaesConfig, hook: str) -> None:
    from techniques.features.requests import TrainSae
    from techniques.features.training import fit

    architecture = ARCHITECTURES.get(hook, "topk")
    run = HERE / "runs/saes" / f"{hook}_{architecture}_{cfg.features}_{cfg.k}_{cfg.tokens}_{cfg.lr:g}_{cfg.seed}"
    held = rows(model, cfg.held_tokens, HELD_SEED)
    if not (run / "cfg.json").is_file():
        how = {"architecture": architecture, "features": cfg.features, "k": cfg.k, "tokens": cfg.tokens, "lr": cfg.lr, "seed": cfg.seed}
        ask = TrainSae(hook, out=str(run), length=LENGTH, resume=(run / "checkpoint.safetensors").is_file(), **how)
        print(finish(fit(model, ask, rows(model, int(cfg.tokens * 1.2), TRAIN_SEED), held[:64], "zoo/corpus.py")).convention)
    folder = cfg.out / hook
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in load_file(run / "sae_weights.safetensors").items()}
    assert all(v.isfinite().all() for v in weights.values()), "a weight does not fit fp16"
    save_file(weights, folder / "sae_weights.safetensors")
    (folder / "sae_weights.safetensors").chmod(0o644)
    config = json.loads((run / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps(config) + "\n")
    got, _ = measured(model, folder, held)
    facts = {"l0": got["l0"], "explained_variance": got["explained"], "loss_recovered": got["recovered"], "loss_recovered_mean": got["recovered_mean"]}
    facts |= {k: got[k] for k in ("loss", "loss_spliced", "loss_zero", "loss_mean")} | {"dead_fraction": got["dead"]}
    config["metadata"] |= {k: round(v, 6) for k, v in facts.items()} | {"held_out_tokens": got["tokens"], "stored": "float16"}
    (folder / "cfg.json").write_text(json.dumps(config) + "\n")


def main(cfg: SaesConfig) -> None:
    from engine import Engine

    model = Engine("zoo").model
    for hook in cfg.hooks:
        if not cfg.measure_only:
            train(model, cfg, hook)
    held, missed = rows(model, cfg.held_tokens, HELD_SEED), 0
    print(f"{gray}{'SAE':16} {'explained':>10} {'L0':>6} {'recovered':>10} {'(mean)':>8} {'dead':>7} {'loss':>7} {'spliced':>8} {'zero':>7} {'mean':>7}{endc}")
    for hook in cfg.hooks:
        got, sae = measured(model, cfg.out / hook, held)
        passed = all(got[k] >= v if sense == ">=" else got[k] <= v for k, (sense, v) in TARGETS.items())
        missed += not passed
        numbers = f"{got['explained']:10.4f} {got['l0']:6.2f} {got['recovered']:10.4f} {got['recovered_mean']:8.4f} {got['dead']:7.4f}"
        numbers += f" {got['loss']:7.3f} {got['loss_spliced']:8.3f} {got['loss_zero']:7.3f} {got['loss_mean']:7.3f}"
        print(
            f"{green if passed else red}{hook:16}{endc} {cyan}{numbers}{endc}{gray}  {sae.cfg.architecture()}, {sae.cfg.d_sae} features, {got['tokens']} tokens{endc}"
        )
    sys.exit(missed > 0)


if __name__ == "__main__":
    main(tyro.cli(SaesConfig))
