"""Sparse autoencoders trained here, through sae_lens's own trainer: any loaded model and text, with progress, cancel and resume."""

import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch as t
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.artefacts import BROKEN, corpus, save, unembed_hash, windows
from model.bridge import Edit, Model, write_mid
from model.loading import TINY
from model.memory import Chunks, first_line, in_chunks, is_out_of_memory
from model.places import hook_name
from techniques.features.requests import TrainSae, TrainSaeResult
from vocabulary.files import CHECKPOINT, PRIVATE_FILE, make_folder, reason, typed_path
from vocabulary.nodes import AddressError, Node, UserError, parse_node
from vocabulary.requests import Progress

ARCHITECTURES = ("topk", "batchtopk", "standard", "jumprelu")
POINTS = ("resid_pre", "resid_mid", "resid_post", "attn", "mlp")
BUFFER = 256 << 20  # bytes of activations that are shuffled together
LOGIT_BYTES = 32 << 20
HELD_OUT_TOKENS = 100_000
SAVE_EVERY = 10.0  # seconds, and never more than a twentieth of the time


def read_hook(model: Model, text: str) -> tuple[Node, str]:
    """A point where an SAE can be trained, as a node and as TransformerLens's name."""
    try:
        node = parse_node(text)
    except AddressError as error:
        raise UserError(f"{text!r} is not a hook point: write {', '.join(f'L2.{p}' for p in POINTS)}") from error
    if node.site not in POINTS or node.pos is not None:
        raise UserError(f"{text} is no point to train an SAE at: write {', '.join(f'L2.{p}' for p in POINTS)}, without a position")
    return node, hook_name(model, node)


def counted(model: Model, ids: Tensor) -> Tensor:
    """True where an activation counts [batch, seq]: position 0 and BOS are outliers and are left out everywhere."""
    mask = t.ones_like(ids, dtype=t.bool) if model.bos is None else ids != model.bos
    mask[:, 0] = False
    return mask


def at_once(model: Model, length: int) -> int:
    """Rows of one forward pass, so that it stays short on this device."""
    tokens = 8192 if model.device.type != "cpu" else 1024 if model.info.n_params < TINY else 128
    return max(1, tokens // length)


def harvest(model: Model, hook: str, rows: Tensor) -> Generator[Progress | None, None, Tensor]:
    """Activations [n, d_in] of the tokens of `rows` that count, in fp32."""
    out, done = None, 0
    n = int(counted(model, rows).sum())

    def run(begin: int, end: int) -> Tensor:
        x = model.forward(rows[begin:end], [hook])[1][hook]
        return x[counted(model, rows[begin:end]).to(x.device)].float()

    for x in in_chunks(len(rows), at_once(model, rows.shape[1]), run, "pieces of text"):
        if isinstance(x, Progress):
            yield x
            continue
        out = x.new_empty(n, x.shape[-1]) if out is None else out
        out[done : done + len(x)] = x
        done += len(x)
        yield None
    return out


def batches(model: Model, hook: str, rows: Tensor, batch: int, seed: int, skip: int = 0) -> Generator[Progress | Tensor | None]:
    """
    Batches of activations [batch, d_in] without end, shuffled within a buffer of rows drawn at random; None while the buffer fills.
    The order follows from the seed alone: `skip` goes on after so many batches. A text that fits the buffer is run once.
    """
    length = rows.shape[1]
    size = max(BUFFER // (4 * model.info.d_model * length), 2 * batch // (length - 1) + 1)
    whole = None
    for epoch in itertools.count():
        gen = t.Generator().manual_seed(seed * 1_000_003 + epoch)
        order, found = t.randperm(len(rows), generator=gen), 0
        for begin in range(0, len(rows), size):
            some = rows[order[begin : begin + size]] if size < len(rows) else rows
            tokens = int(counted(model, some).sum())
            shuffle = t.randperm(tokens, generator=gen)
            found += tokens // batch
            if skip >= tokens // batch:
                skip -= tokens // batch
                continue
            acts = whole if whole is not None else (yield from harvest(model, hook, some))
            whole = acts if size >= len(rows) else None
            for i in range(skip, tokens // batch):
                yield acts[shuffle[i * batch : (i + 1) * batch].to(acts.device)]
            skip = 0
        if not found:
            raise UserError(f"the text has fewer than {batch} tokens to train on: give a longer one, or a smaller batch")


# ------------------------------------------------------------------ measuring


def splice(node: Node, name: str, mask: Tensor, fn) -> list[Edit]:
    """Replace what passes the point, where `mask` [batch, seq] says so."""

    def edit(x: Tensor) -> Tensor:
        out, where = x.clone(), mask.to(x.device)
        out[where] = fn(x[where]).to(x.dtype)
        return out

    return write_mid(node.layer, edit) if node.site == "resid_mid" else [(name, edit)]


def measure(model: Model, sae, node: Node, name: str, rows: Tensor) -> Generator[Progress, None, dict]:
    """
    An SAE against its model on rows of token ids [n, length]: explained variance, L0, how often each feature fires [d_sae], and the next-token losses (nats,
    of predictions made at positions that count) of the model, and with the SAE, zeros, or the mean over these rows [d_in] in the place of what passes there.
    """
    tokens, active, fires, total, square, wrong = 0, 0, t.zeros(sae.cfg.d_sae), 0.0, 0.0, 0.0
    losses: dict[str, float] = {}
    size = max(1, min(at_once(model, rows.shape[1]), LOGIT_BYTES // (4 * rows.shape[1] * model.info.d_vocab)))
    swaps = {
        "loss": None,
        "loss_spliced": lambda x: sae.decode(sae.encode(x.float())),
        "loss_zero": t.zeros_like,
        "loss_mean": lambda x: (total / tokens).to(x).expand_as(x),
    }
    chunks = Chunks("texts", size)

    def lost(begin: int, end: int, swap: Callable | None) -> tuple[int, float, int, Tensor | None]:
        """Where the chunk ends, the sum of losses, the predictions, and what passes the point in the model's own run."""
        ids = rows[begin:end]
        mask = counted(model, ids)
        logits, got = model.forward(ids, () if swap else [name], splice(node, name, mask, swap) if swap else (), keep=0)
        predicts = mask[:, :-1].to(logits.device)
        logp = logits[:, :-1][predicts].float().log_softmax(-1)
        loss = -logp.gather(1, ids[:, 1:].to(logits.device)[predicts][:, None]).double().sum().item()
        return end, loss, len(logp), None if swap else got[name][mask.to(got[name].device)].float().to(sae.device)

    for kind, swap in swaps.items():
        loss = predictions = 0
        yield Progress(0, len(rows), f"SAE: held-out text, {kind.replace('_', ' ')}")
        for part in chunks.over(len(rows), lambda begin, end, swap=swap: lost(begin, end, swap)):
            if isinstance(part, Progress):
                yield part
                continue
            done, loss, predictions, x = part[0], loss + part[1], predictions + part[2], part[3]
            if x is not None:
                with t.no_grad():
                    f = sae.encode(x)
                    wrong += (x - sae.decode(f)).double().square().sum().item()
                tokens, active, fires = tokens + len(x), active + int((f > 0).sum()), fires + (f > 0).sum(0).cpu()
                total, square = total + x.double().sum(0), square + x.double().square().sum().item()
            yield Progress(done, len(rows), f"SAE: held-out text, {kind.replace('_', ' ')}")
        losses[kind] = loss / predictions
    variance = square - (total.square().sum() / tokens).item()
    return {"explained": 1 - wrong / variance, "l0": active / tokens, "density": fires / tokens, "tokens": tokens, **losses}


def recovered(losses: dict, baseline: str = "loss_zero") -> float:
    """(baseline - spliced) / (baseline - model); NaN where the baseline costs nothing."""
    gap = losses[baseline] - losses["loss"]
    return (losses[baseline] - losses["loss_spliced"]) / gap if abs(gap) > 1e-9 else float("nan")


# ------------------------------------------------------------------ training


def make_trainer(ask: TrainSae, d_in: int, device: str):
    """sae_lens's trainer on a fresh SAE: warm-up over a twentieth of the steps, linear decay to 0 over the last fifth."""
    from sae_lens import (
        BatchTopKTrainingSAEConfig,
        JumpReLUTrainingSAEConfig,
        SAETrainer,
        StandardTrainingSAEConfig,
        TopKTrainingSAEConfig,
        TrainingSAE,
    )
    from sae_lens.config import SAETrainerConfig

    steps = ask.tokens // ask.batch
    shared = {"d_in": d_in, "d_sae": ask.features, "device": device, "normalize_activations": "expected_average_only_in"}
    match ask.architecture:
        case "topk":
            cfg = TopKTrainingSAEConfig(**shared, k=ask.k)
        case "batchtopk":
            cfg = BatchTopKTrainingSAEConfig(**shared, k=float(ask.k))
        case "standard":
            cfg = StandardTrainingSAEConfig(**shared, l1_coefficient=ask.l1, l1_warm_up_steps=steps // 20)
        case "jumprelu":  # Gemma Scope 2's penalty, quadratic around a wanted L0; wide kernel and slow warm-up, since few steps move a threshold little
            how = {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": float(ask.k), "l0_coefficient": 0.5, "l0_warm_up_steps": steps // 2}
            how |= {"jumprelu_bandwidth": 1.0, "jumprelu_init_threshold": 0.5, "jumprelu_ste_to_input": True}
            cfg = JumpReLUTrainingSAEConfig(**shared, **how)
    with t.random.fork_rng():
        t.manual_seed(ask.seed)
        sae = TrainingSAE.from_dict(cfg.to_dict())
    how = SAETrainerConfig(
        total_training_samples=steps * ask.batch,
        train_batch_size_samples=ask.batch,
        lr=ask.lr,
        lr_end=ask.lr,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 5,
        dead_feature_window=min(1000, max(10, steps // 10)),
        device=device,
    )
    return SAETrainer(cfg=how, sae=sae, data_provider=iter(()))


COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")


def keep(out: Path, recipe: str, trainer, losses: list[float]) -> None:
    """The whole state of training in one file."""
    state = {f"sae.{k}": v for k, v in trainer.sae.state_dict().items()}
    for i, p in enumerate(trainer.sae.parameters()):
        state |= {f"{k}.{i}": v.detach() for k, v in trainer.optimizer.state[p].items()}
    state |= {n: getattr(trainer, n) for n in ("act_freq_scores", "n_forward_passes_since_fired")}
    state["losses"] = t.tensor(losses, dtype=t.float64)
    facts = {n: getattr(trainer, n) for n in COUNTERS} | {"scale": trainer.activation_scaler.scaling_factor, "lr": trainer.lr_scheduler.state_dict()}
    facts |= {"coefficients": {k: v.state_dict() for k, v in trainer.coefficient_schedulers.items()}}
    save(out, CHECKPOINT, state, {"recipe": recipe, "facts": json.dumps(facts)})


def restore(out: Path, recipe: str, trainer) -> list[float]:
    """The state that `keep` wrote, which must have been made with the same recipe; the losses so far."""
    file = out / CHECKPOINT
    if not file.is_file():
        raise UserError(f"nothing to resume: {out} has no {CHECKPOINT}. Start without --resume")
    try:
        with safe_open(file, "pt") as h:
            notes, got = h.metadata(), {k: h.get_tensor(k) for k in h.keys()}
        if notes["recipe"] != recipe:
            raise UserError(f"the checkpoint in {out} was made with other settings ({notes['recipe']}): give the same, or another folder")
        facts = json.loads(notes["facts"])
        trainer.sae.load_state_dict({k[4:]: v for k, v in got.items() if k.startswith("sae.")})
        for i, p in enumerate(trainer.sae.parameters()):
            trainer.optimizer.state[p] = {n: got[f"{n}.{i}"] if n == "step" else got[f"{n}.{i}"].to(p.device) for n in ("step", "exp_avg", "exp_avg_sq")}
        for n in ("act_freq_scores", "n_forward_passes_since_fired"):
            setattr(trainer, n, got[n].to(trainer.sae.device))
        for n in COUNTERS:
            setattr(trainer, n, facts[n])
        trainer.activation_scaler.scaling_factor = facts["scale"]
        trainer.lr_scheduler.load_state_dict(facts["lr"])
        for n, c in trainer.coefficient_schedulers.items():
            c.load_state_dict(facts["coefficients"][n])
        for group, rate in zip(trainer.optimizer.param_groups, trainer.lr_scheduler.get_last_lr()):
            group["lr"] = rate
        return got["losses"].tolist()
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{file} is truncated or not a checkpoint ({first_line(error)}): delete it and start without --resume") from error


def check(ask: TrainSae, out: Path) -> None:
    if ask.architecture not in ARCHITECTURES:
        raise UserError(f"{ask.architecture!r} is not an architecture that is trained here: write {', '.join(ARCHITECTURES)}")
    if not 2 <= ask.features <= 1 << 20:
        raise UserError(f"{ask.features} features: write 2 to {1 << 20} (usual: 4 to 32 times the width of the point)")
    if ask.architecture != "standard" and not 1 <= ask.k <= ask.features // 2:
        raise UserError(f"k {ask.k} of {ask.features} features is not sparse: write 1 to {ask.features // 2}")
    if ask.architecture == "standard" and not 0 < ask.l1 < float("inf"):
        raise UserError("the l1 coefficient must be larger than 0")
    if ask.batch < 2 or ask.tokens < ask.batch or not 0 < ask.lr < 1:
        raise UserError("batch must be at least 2, tokens at least one batch, and the learning rate between 0 and 1")
    if out.is_file():
        raise UserError(f"{out} is a file: give a folder")
    if not ask.resume and (out / CHECKPOINT).is_file():
        raise UserError(f"{out} holds a checkpoint: go on with --resume, or give another folder")
    if not ask.resume and out.is_dir() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give another folder")


def ready(out: Path) -> None:
    try:
        make_folder(out)
    except OSError as error:
        raise UserError(f"{out} can't be made: {reason(error)}") from error


def train(model: Model, ask: TrainSae) -> Generator[Progress, None, TrainSaeResult]:
    """Train an SAE on a text file. A tenth of the text is held out. A cancelled run leaves a checkpoint, and its resumed run is the same run."""
    out = typed_path(ask.out)
    check(ask, out)
    read_hook(model, ask.hook)
    file = corpus(ask.text)
    rows = windows(model, file, ask.length, ask.seed)
    held = max(1, min(len(rows) // 10, HELD_OUT_TOKENS // ask.length))
    if ask.batch > (most := int(counted(model, rows[held:]).sum())):
        raise UserError(f"{file} has {most} tokens to train on, fewer than a batch of {ask.batch}: give a longer text, or a smaller batch")
    return (yield from fit(model, ask, rows[held:], rows[:held], file.name))


def fit(model: Model, ask: TrainSae, rows: Tensor, held: Tensor, text: str) -> Generator[Progress, None, TrainSaeResult]:
    """Train on token ids [n, length]: `rows` to train on, `held` to measure on; `text` names them. Writes the SAE's folder."""
    start, out = time.time(), typed_path(ask.out)
    check(ask, out)
    node, name = read_hook(model, ask.hook)
    yield Progress(0, 0, "importing sae_lens")
    from sae_lens import SAE

    recipe = f"{ask.architecture}, {ask.features} features, {f'l1 {ask.l1:g}' if ask.architecture == 'standard' else f'k {ask.k}'}, {ask.tokens} tokens, "
    recipe += f"batch {ask.batch}, length {rows.shape[1]}, lr {ask.lr:g}, seed {ask.seed}, {name}"
    text_hash = hashlib.sha256(rows.numpy().tobytes() + held.numpy().tobytes()).hexdigest()[:16]
    trainer, losses = yield from run(model, ask, rows, name, f"{recipe}, text {text_hash}, model {unembed_hash(model)[:16]}")
    trainer.sae.fold_activation_norm_scaling_factor(trainer.activation_scaler.scaling_factor)
    with tempfile.TemporaryDirectory() as folder:
        trainer.sae.save_inference_model(folder)
        sae = SAE.load_from_disk(folder, device=str(model.device))
    got = yield from measure(model, sae, node, name, held)
    got["dead"] = ((got["density"] == 0) & trainer.dead_neurons.cpu()).float().mean().item()
    shares = {"loss_recovered": recovered(got), "loss_recovered_mean": recovered(got, "loss_mean")}
    for key, value in metadata(model, name, rows.shape[1], text, recipe, got, shares).items():
        setattr(sae.cfg.metadata, key, value)
    sae.cfg.device = "cpu"
    write(out, sae)
    window = min(trainer.cfg.dead_feature_window, ask.tokens // ask.batch) * ask.batch
    note = (
        f"held-out: {got['tokens']} tokens of {text}, position 0 and BOS left out of training and of all figures; explained = 1 - ||x - x̂||² / ||x - mean||²; "
        f"recovered = (zero - spliced) / (zero - model) in next-token loss, {got['loss_zero']:.3f}, {got['loss_spliced']:.3f}, {got['loss']:.3f} nats "
        f"(against the mean, {got['loss_mean']:.3f}: {shares['loss_recovered_mean']:.3f}); dead: fires neither there nor in the last {window} training tokens "
        f"· {recipe} · raw weights · {model.info.dtype}"
    )
    return TrainSaeResult(
        str(out), name, ask.architecture, ask.features, got["explained"], got["l0"], got["dead"], shares["loss_recovered"], np.array(losses, np.float32),
        len(losses) * ask.batch, time.time() - start, note,
    )  # fmt: skip


def run(model: Model, ask: TrainSae, rows: Tensor, name: str, recipe: str) -> Generator[Progress, None, tuple]:
    """All steps: sae_lens's trainer and the losses. The checkpoint holds them at the end, now and then before, and when the run is cancelled or memory runs out."""
    steps, out, due = ask.tokens // ask.batch, typed_path(ask.out), time.time() + SAVE_EVERY
    trainer, losses, said = None, [], "starting"
    try:
        if ask.resume:
            trainer = make_trainer(ask, model.info.d_model, str(model.device))
            losses = restore(out, recipe, trainer)
        ready(out)
        for batch in batches(model, name, rows, ask.batch, ask.seed, len(losses)) if len(losses) < steps else ():
            values = {"loss": losses[-1]} if losses and batch is not None else {}
            yield Progress(len(losses), steps, f"SAE: {said if batch is not None else f'activations, {said}'}", values=values)
            if not isinstance(batch, Tensor):
                continue
            if trainer is None:
                trainer = start_at(model, ask, batch)
            said = step(trainer, batch, losses)
            if time.time() > due:
                begun = time.time()
                keep(out, recipe, trainer, losses)
                due = time.time() + max(SAVE_EVERY, 20 * (time.time() - begun))
            if len(losses) == steps:
                break
    except BaseException as error:
        if losses and (isinstance(error, GeneratorExit) or is_out_of_memory(error)):
            keep(out, recipe, trainer, losses)
        raise
    keep(out, recipe, trainer, losses)
    return trainer, losses


def start_at(model: Model, ask: TrainSae, batch: Tensor):
    """A trainer whose input scale and decoder bias come from the first batch."""
    if not 0 < (batch - batch.mean(0)).square().sum().item() < float("inf"):
        raise UserError(f"what passes {ask.hook} never changes or is not finite: there is nothing to train on")
    trainer = make_trainer(ask, model.info.d_model, str(model.device))
    scale = trainer.activation_scaler.scaling_factor = model.info.d_model**0.5 / batch.norm(dim=1).mean().item()
    trainer.sae.b_dec.data = (batch.mean(0) * scale).to(trainer.sae.device)
    return trainer


def step(trainer, batch: Tensor, losses: list[float]) -> str:
    """One step, its loss added to `losses`; and how it went, in words."""
    done = trainer.step(batch)
    trainer.n_training_steps += 1
    losses.append(done.loss.item())
    if not np.isfinite(losses[-1]):
        raise UserError("the SAE's loss is not finite: load the model in float32 or lower the learning rate")
    with t.no_grad():
        unexplained = ((done.sae_out - done.sae_in).square().sum() / (done.sae_in - done.sae_in.mean(0)).square().sum()).item()
        l0 = (done.feature_acts > 0).sum(-1).float().mean().item()
    return f"loss {losses[-1]:.3f}, L0 {l0:.1f}, FVU {unexplained:.3f}"


def metadata(model: Model, name: str, length: int, text: str, recipe: str, got: dict, shares: dict) -> dict:
    """What the SAE's config says of its model, its text and its figures on held-out text."""
    return {
        "model_name": model.info.name,
        "hook_name": name,
        "context_size": length,
        "prepend_bos": bool(model.info.default_bos),
        "exclude_special_tokens": [] if model.bos is None else [model.bos],
        "dataset_path": text,
        "unembed_hash": unembed_hash(model),
        "recipe": recipe,
        "l0": round(got["l0"], 4),
        "explained_variance": round(got["explained"], 6),
        **{k: round(v, 6) if np.isfinite(v) else None for k, v in shares.items()},
        "dead_fraction": round(got["dead"], 6),
        "held_out_tokens": got["tokens"],
        **{k: round(v, 6) for k, v in got.items() if k.startswith("loss")},
    }


def write(out: Path, sae) -> None:
    """sae_lens's folder, cfg.json last: with it the SAE is whole. The checkpoint goes."""
    try:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            for file in map(Path, sae.save_model(folder)):
                file.chmod(PRIVATE_FILE)
                os.replace(file, out / file.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} can't be written: {first_line(error)}") from error
    (out / CHECKPOINT).unlink(missing_ok=True)
