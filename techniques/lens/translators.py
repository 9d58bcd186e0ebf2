"""Tuned and Jacobian lenses: published artefacts read and checked against the model, and both fitted here."""

import hashlib
import json
import math
import time
import warnings
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import numpy as np
import torch as t
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from model.artefacts import BROKEN, corpus, save, unembed_hash, why_broken, windows
from model.bridge import FINAL, Model
from model.loading import is_hub_name, read_json
from model.memory import Chunks, first_line, halved, is_out_of_memory, out_of_memory, ran_out
from techniques.lens.jacobian_parts import changed_by, save_part
from techniques.lens.requests import FitJacobian, FitJacobianResult, TuneLens, TuneLensResult
from utils import ROOT, settings
from vocabulary.files import CHECKPOINT, check_place, replacing, typed_path
from vocabulary.names import same_model
from vocabulary.nodes import Node, UserError
from vocabulary.requests import Progress
from vocabulary.sets import EmptyPart

SPACE = "AlignmentResearch/tuned-lens"
SAVE_EVERY = 50
HELD_OUT = 64
ROW_BYTES = 32 << 20


@dataclass
class Translators:
    """
    Affine maps from the stream at a depth to the last layer's, before the final norm. Depth i is the input of block i, which is the output of block
    i - 1; the output of the last block is read as it is. `maps` holds (W, b) by depth: h + W h + b, or W h when `whole`.
    """

    name: str
    what: str
    convention: str
    maps: dict[int, tuple[Tensor, Tensor | None]]
    n_layers: int
    whole: bool = False

    def depth(self, node: Node) -> int:
        return node.layer + (node.site == "resid_post")

    def reads(self, node: Node) -> bool:
        return node.site in ("resid_pre", "resid_post") and (self.depth(node) in self.maps or self.depth(node) == self.n_layers)

    @t.no_grad()
    def translate(self, node: Node, h: Tensor) -> Tensor:
        if self.depth(node) == self.n_layers:
            return h
        weight, bias = (None if x is None else x.to(h.device) for x in self.maps[self.depth(node)])
        out = h.float() @ weight.T
        out = out if self.whole else h.float() + out
        return out if bias is None else out + bias


def is_this_model(model: Model, what: str, name: str | None, its_hash: str | None) -> None:
    """By the hash of the unembedding where there is one, else by the last part of the model's name."""
    if its_hash:
        if its_hash != unembed_hash(model):
            raise UserError(f"{what} is for another model{f' ({name})' if name else ''}: its hash of the unembedding is not {model.info.name}'s")
    elif name and not any(same_model(name, mine) for mine in (model.info.name, model.folder.resolve().name, model.base.resolve().name)):
        raise UserError(f"{what} is for {name}, and the model is {model.info.name}: load that model, or give its own lens")


def read_translators(model: Model, kind: str, artefact: str) -> Generator[Progress, None, Translators]:
    """Read an artefact, or give the one read before when its file is still the same."""
    file = yield from (find_tuned if kind == "tuned" else find_jacobian)(model, artefact)
    key = (kind, str(file), file.stat().st_mtime_ns)
    known = model.notes.translators
    if key not in known:
        known.clear()
        known[key] = read_tuned(model, file) if kind == "tuned" else read_jacobian(model, file)
    return known[key]


def fetch(model: Model, name: str, **where) -> Path:
    """A hub file, from the cache when it is there."""
    try:
        try:
            return Path(huggingface_hub.hf_hub_download(**where, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(huggingface_hub.hf_hub_download(**where, etag_timeout=10, token=settings().get("HF_TOKEN") or False))
    except (EntryNotFoundError, HFValidationError, HfHubHTTPError, HTTPError, OSError) as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        why = "the hub has none" if missing else "it is not in the hub cache and can't be downloaded"
        raise UserError(f"no lens for {name}: {why}; give the artefact's folder, or fit one (uv run engine.py tune-lens)") from error


# ------------------------------------------------------------------ the tuned lens: reading


def find_tuned(model: Model, artefact: str) -> Generator[Progress, None, Path]:
    """The file of parameters: in the folder named, beside the model, or in the tuned lens' hub space under the model's name."""
    path = typed_path(artefact) if artefact else model.folder / "tuned_lens"
    path = path.parent if path.is_file() else path
    if path.is_dir():
        files = [path / n for n in ("params.safetensors", "params.pt") if (path / n).is_file()]
        if not files or not (path / "config.json").is_file():
            raise UserError(f"{path} is not a tuned lens: it needs config.json and params.pt (or params.safetensors)")
        return files[0]
    name = artefact or model.info.name
    if not is_hub_name(name) or name == "zoo":
        raise UserError(f"no tuned lens at {path}: give its folder, or fit one (uv run engine.py tune-lens --model {model.info.name})")
    where = {"repo_id": SPACE, "repo_type": "space", "subfolder": f"lens/{name}"}
    yield Progress(0, 0, f"looking for the tuned lens of {name}")
    fetch(model, name, filename="config.json", **where)
    return fetch(model, name, filename="params.pt", **where)


def read_tuned(model: Model, file: Path) -> Translators:
    folder, info = file.parent, model.info
    what = f"the tuned lens {folder}"
    try:
        config = read_json(folder / "config.json")
        size = {n: int(config[n]) for n in ("d_model", "num_hidden_layers")}
        name, its_hash = (x if isinstance(x := config.get(n), str) else None for n in ("base_model_name_or_path", "unembed_hash"))
    except (UserError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise UserError(f"{what} has a config.json that can't be read ({type(error).__name__}: {first_line(error)})") from error
    if config.get("lens_type", "linear_tuned_lens") != "linear_tuned_lens":
        raise UserError(f"{what} is of type {config['lens_type']!r}: Loupe reads linear tuned lenses")
    if size != {"d_model": info.d_model, "num_hidden_layers": info.n_layers}:
        raise UserError(
            f"{what} is for another model: it has {size['num_hidden_layers']} layers of width {size['d_model']},"
            f" and {info.name} has {info.n_layers} of width {info.d_model}"
        )
    is_this_model(model, what, name, its_hash)
    try:
        state = load_file(file) if file.suffix == ".safetensors" else t.load(file, map_location="cpu", weights_only=True)
        state = {k.removeprefix("layer_translators."): v.float() for k, v in state.items()}
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{file} is truncated or not a tuned lens ({why_broken(error)}): copy or download it again") from error
    wanted = {f"{i}.weight": (info.d_model, info.d_model) for i in range(info.n_layers)}
    if config.get("bias", True):
        wanted |= {f"{i}.bias": (info.d_model,) for i in range(info.n_layers)}
    wrong = [k for k, shape in wanted.items() if k not in state or tuple(state[k].shape) != shape or not state[k].isfinite().all()]
    if wrong:
        raise UserError(f"{file} lacks {wrong[0]} of the right shape, or it is not finite: copy or download it again")
    maps = {i: (state[f"{i}.weight"].to(model.final_device), state.get(f"{i}.bias")) for i in range(info.n_layers)}
    reads = "a tuned lens reads resid_pre and resid_post (what stands between blocks), not the middle of one or a component"
    note = f"h + W h + b before the final norm, from {folder}"
    return Translators("tuned lens", reads, note, maps, info.n_layers)


# ------------------------------------------------------------------ the tuned lens: fitting


def log_probs(model: Model, h: Tensor) -> Tensor:
    """The model's own read-out of a stream [rows, d_model], with gradients."""
    return model.capped(model.bridge.unembed(model.bridge.ln_final(h.to(model.dtype)))).log_softmax(-1)


def stream_names(model: Model) -> list[str]:
    return [f"blocks.{i}.hook_resid_pre" for i in range(model.info.n_layers)]


def kl_by_layer(model: Model, ids: Tensor, weight: Tensor | None, bias: Tensor | None, backward: bool = False, total_rows: int = 0) -> Tensor:
    """
    Mean KL(final || lens) at every depth [layer], a stretch of rows at a time; with `backward`, gradients of their mean are left on the parameters.
    `total_rows`: of how many positions it is the mean, where the ids are a part of them.
    """
    names = stream_names(model)
    acts = model.forward(ids, [*names, FINAL])[1]
    last = acts[FINAL].flatten(0, 1)
    stream = [acts[n].flatten(0, 1).to(model.final_device) for n in names]
    total = t.zeros(len(names))
    size, n = max(1, ROW_BYTES // (4 * model.info.d_vocab)), total_rows or len(last)
    for begin in range(0, len(last), size):
        rows = slice(begin, begin + size)
        final = model.log_probs(last[rows])
        p = final.exp()
        for i, h in enumerate(stream):
            with t.set_grad_enabled(backward):
                x = h[rows].float()
                x = x if weight is None else x + x @ weight[i].T + bias[i]
                kl = (p * (final - log_probs(model, x))).sum() / n
                if backward:
                    (kl / len(names)).backward()
            total[i] += kl.detach().cpu()
    return total


class Fitting:
    """Translators that are being fitted, all layers at once: parameters, optimiser and losses. A checkpoint keeps them for the same `recipe`."""

    def __init__(self, model: Model, out: Path, recipe: str, lr: float):
        info, device = model.info, model.final_device
        self.out, self.recipe, self.losses = out, recipe, []
        self.weight = t.nn.Parameter(t.zeros(info.n_layers, info.d_model, info.d_model, device=device))
        self.bias = t.nn.Parameter(t.zeros(info.n_layers, info.d_model, device=device))
        self.params = [self.weight, self.bias]
        self.optimiser = t.optim.Adam(self.params, lr=lr)
        self.chunks = Chunks("texts", 1 << 20)

    def keep(self) -> None:
        """Write the checkpoint; nothing before the first step."""
        if not self.losses:
            return
        state = {f"param.{i}": p for i, p in enumerate(self.params)}
        state |= {"step": t.tensor(len(self.losses)), "losses": t.tensor(self.losses, dtype=t.float64)}
        state |= {f"{n}.{i}": self.optimiser.state[p][n] for i, p in enumerate(self.params) for n in ("exp_avg", "exp_avg_sq")}
        save(self.out, CHECKPOINT, state, {"recipe": self.recipe})

    def restore(self) -> None:
        """Go on from the checkpoint, which must have been made with this recipe."""
        file = self.out / CHECKPOINT
        if not file.is_file():
            raise UserError(f"nothing to resume: {self.out} has no {CHECKPOINT}. Start without resume")
        try:
            with safe_open(file, "pt") as h:
                theirs, got = h.metadata()["recipe"], {k: h.get_tensor(k) for k in h.keys()}
            if theirs != self.recipe:
                raise UserError(f"the checkpoint in {self.out} was made with other settings ({theirs}): give the same, or start without resume")
            for i, p in enumerate(self.params):
                p.data.copy_(got[f"param.{i}"])
                moments = {n: got[f"{n}.{i}"].to(p.device) for n in ("exp_avg", "exp_avg_sq")}
                self.optimiser.state[p] = {"step": got["step"].float().clone(), **moments}
            self.losses = got["losses"].tolist()
        except BROKEN as error:
            if is_out_of_memory(error):
                raise
            raise UserError(f"{file} is truncated or not a checkpoint ({first_line(error)}): start without resume") from error

    def step(self, model: Model, ids: Tensor, lr: float) -> Generator[Progress]:
        """One step of Adam on the mean KL of some rows of tokens, as many at a time as fit."""
        self.optimiser.param_groups[0]["lr"] = lr
        loss, gradients = 0.0, []

        def part(start: int, stop: int) -> tuple[float, list[Tensor]]:
            self.optimiser.zero_grad(set_to_none=True)
            value = kl_by_layer(model, ids[start:stop], self.weight, self.bias, True, ids.numel()).mean().item()
            return value, [p.grad for p in self.params]

        for found in self.chunks.over(len(ids), part):
            if isinstance(found, Progress):
                yield found
                continue
            loss, gradients = loss + found[0], [a + b for a, b in zip(gradients, found[1])] if gradients else found[1]
        for p, gradient in zip(self.params, gradients):
            p.grad = gradient
        if not np.isfinite(loss):
            raise UserError("the fit's KL is not finite: load the model in float32 or lower the learning rate")
        t.nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimiser.step()
        self.losses.append(loss)

    def run(self, model: Model, ask: TuneLens, rows: Tensor) -> Generator[Progress]:
        """All steps that are left. Every step's batch follows from the seed; a cancelled run leaves a checkpoint."""
        per_epoch = max(1, len(rows) // ask.batch)
        try:
            while (step := len(self.losses)) < ask.steps:
                words = f"tuned lens: {f'KL {self.losses[-1]:.4f} nats' if self.losses else 'starting'}"
                yield Progress(step, ask.steps, words, values={"kl": self.losses[-1]} if self.losses else {})
                epoch, place = divmod(step, per_epoch)
                order = t.randperm(len(rows), generator=t.Generator().manual_seed(ask.seed * 1_000_003 + epoch))
                yield from self.step(model, rows[order[place * ask.batch : (place + 1) * ask.batch]], ask.lr * (1 - step / ask.steps))
                if (step + 1) % SAVE_EVERY == 0 and step + 1 < ask.steps:
                    self.keep()
        except BaseException as error:
            if isinstance(error, GeneratorExit) or is_out_of_memory(error):
                self.keep()
            raise

    def write(self, config: dict) -> None:
        """The artefact, as the tuned-lens package names its parts; the checkpoint goes."""
        n = len(self.weight)
        with replacing(self.out / "config.json") as part:  # last in its place: with it the lens is whole
            part.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            save(self.out, "params.safetensors", {f"{i}.weight": self.weight[i] for i in range(n)} | {f"{i}.bias": self.bias[i] for i in range(n)})
        (self.out / CHECKPOINT).unlink(missing_ok=True)


def check_folder(out: Path) -> None:
    """UserError where a fit would write over what is no tuned lens, such as a model's config.json."""
    file = out / "config.json"
    check_place(file)
    if file.exists() and b'"lens_type"' not in file.read_bytes():
        raise UserError(f"{out} holds something else (its config.json is not a tuned lens's): give another folder")


def tune(model: Model, ask: TuneLens) -> Generator[Progress, None, TuneLensResult]:
    """
    Fit translators h + W h + b, from W = 0 and b = 0, to KL(final || lens), all layers at once, by Adam with a rate that falls linearly to 0. A tenth
    of the text is held out. A resumed fit is the same fit.
    """
    if min(ask.steps, ask.batch) < 1 or not 0 < ask.lr < 1:
        raise UserError("steps and batch must be at least 1, and the learning rate between 0 and 1")
    if FINAL not in model.points:
        raise UserError(f"{model.info.architecture} has no final norm that Loupe knows: there is no lens on it")
    [model.point(n) for n in stream_names(model)]
    check_folder(typed_path(ask.out))
    start, file, out, info = time.time(), corpus(ask.text), typed_path(ask.out), model.info
    rows = windows(model, file, ask.length, ask.seed)
    n_held = min(HELD_OUT, max(1, len(rows) // 10))
    held, rows = rows[:n_held], rows[n_held:]
    text_hash = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    recipe = f"steps {ask.steps}, batch {ask.batch}, length {ask.length}, lr {ask.lr:g}, seed {ask.seed}, text {text_hash}, model {unembed_hash(model)[:16]}"
    fit = Fitting(model, out, recipe, ask.lr)
    if ask.resume:
        fit.restore()
    yield from fit.run(model, ask, rows)
    before, after = t.zeros(info.n_layers), t.zeros(info.n_layers)

    def measure(start: int, stop: int) -> tuple[Tensor, Tensor]:
        some, n = held[start:stop], held.numel()
        return kl_by_layer(model, some, None, None, total_rows=n), kl_by_layer(model, some, fit.weight.detach(), fit.bias.detach(), total_rows=n)

    for i, part in enumerate(Chunks("texts", min(ask.batch, fit.chunks.most)).over(len(held), measure)):
        yield part if isinstance(part, Progress) else Progress(i, math.ceil(len(held) / ask.batch), "tuned lens: KL on held-out text")
        if not isinstance(part, Progress):
            before, after = before + part[0], after + part[1]
    fit.write(
        {
            "base_model_name_or_path": info.name,
            "d_model": info.d_model,
            "num_hidden_layers": info.n_layers,
            "bias": True,
            "base_model_revision": None,
            "unembed_hash": unembed_hash(model),
            "lens_type": "linear_tuned_lens",
            "kl_before": [round(v, 5) for v in before.tolist()],
            "kl_after": [round(v, 5) for v in after.tolist()],
            "held_out_tokens": held.numel(),
            "text": file.name if file.is_relative_to(ROOT) else str(file),
            "text_sha256": text_hash,
            "fit": {"steps": ask.steps, "batch": ask.batch, "length": ask.length, "lr": ask.lr, "seed": ask.seed, "optimiser": "Adam, linear decay"},
        }
    )
    points = tuple(f"L{i}.resid_pre" for i in range(info.n_layers))
    note = f"mean KL(final || lens) in nats on {held.numel()} held-out tokens of {file.name} · {recipe} · raw weights · {info.dtype}"
    curves = (x.numpy().astype(np.float32) for x in (before, after))
    return TuneLensResult(str(out), points, *curves, np.array(fit.losses, np.float32), len(fit.losses), held.numel(), time.time() - start, note)


# ------------------------------------------------------------------ the Jacobian lens, through TransformerLens's own tool


def find_jacobian(model: Model, artefact: str) -> Generator[Progress, None, Path]:
    from transformer_lens.tools.analysis import jacobian_lens

    path = typed_path(artefact) if artefact else model.folder / "jacobian_lens.pt"
    if path.is_file():
        return path
    if path.is_dir():
        files = sorted(path.glob("*.pt"))
        if len(files) != 1:
            raise UserError(f"{path} holds {len(files)} .pt files: give the one that is the Jacobian lens")
        return files[0]
    name = artefact or model.info.name
    entry = jacobian_lens._resolve_registry_entry(name)
    if entry is None:
        raise UserError(f"no Jacobian lens at {path}, and none is published for {name}: give its .pt file, or fit one (uv run engine.py fit-jacobian)")
    yield Progress(0, 0, f"looking for the Jacobian lens of {name}")
    return fetch(model, name, repo_id=entry[0], filename=entry[1])


def read_jacobian(model: Model, file: Path) -> Translators:
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    what = f"the Jacobian lens {file}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lens = JacobianLens.load(str(file))
    except BROKEN as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{file} is truncated or not a Jacobian lens ({why_broken(error)}): copy or download it again") from error
    skip = lens.metadata.get("skip_first_positions", 16)
    is_this_model(model, what, lens.metadata.pop("model_name", None), lens.metadata.get("unembed_hash"))
    try:
        lens.validate_model(model.bridge)
    except (ValueError, TypeError) as error:
        raise UserError(f"{what} does not fit {model.info.name}: {first_line(error)}") from error
    if not all(m.isfinite().all() for m in lens.jacobians.values()):
        raise UserError(f"{file} holds numbers that are not finite: copy or download it again")
    maps = {layer + 1: (m.to(model.final_device), None) for layer, m in lens.jacobians.items()}
    reads = f"a Jacobian lens reads block outputs (L0.resid_post on) and no component; this one has layers {lens.source_layers[0]} to {lens.source_layers[-1]}"
    note = f"J h before the final norm, mean over {lens.n_prompts} prompts, fitted without the first {skip} positions and the last (read them with care)"
    return Translators("Jacobian lens", reads, note, maps, model.info.n_layers, whole=True)


def fit_one(model: Model, text: str, size: int, how: dict) -> Generator[Progress, None, tuple]:
    """TransformerLens's fit to one text, `size` rows of the Jacobian at a time or as many as fit; and how many that were."""
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return JacobianLens.fit(model.bridge, [text], show_progress=False, dim_batch=size, **how | {"metadata": dict(how["metadata"])}), size
        except (ValueError, TypeError) as error:
            raise UserError(f"TransformerLens can't fit a Jacobian lens to {model.info.name}: {first_line(error)}") from error
        except Exception as error:
            ran_out(error)
            if size == 1:
                raise out_of_memory(error) from None
        yield halved(size, size := size // 2, "rows of the Jacobian")


def fit_jacobian(model: Model, ask: FitJacobian) -> Generator[Progress, None, FitJacobianResult]:
    """TransformerLens's fit, a prompt at a time so that it can be cancelled between two; the mean is merged by its own function."""
    from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

    start, file, out = time.time(), corpus(ask.text), typed_path(ask.out)
    if ask.prompts < 1 or not 0 <= ask.skip < ask.length - 2:
        raise UserError("a fit needs at least one prompt, and length must be larger than skip + 2")
    if model.info.n_layers < 2:
        raise UserError("a Jacobian lens needs a model of at least two layers")
    every = windows(model, file, ask.length, ask.seed)[: ask.prompts].tolist()
    rows = every if ask.part is None else every[slice(*ask.part)]
    if not rows:
        raise EmptyPart(f"{file.name} has {len(every)} pieces of {ask.length} tokens")
    known = {"unembed_hash": unembed_hash(model), "seed": ask.seed}
    check_place(out)
    lens, change, rows_at_once = None, float("inf"), min(32, model.info.d_model)
    for i, row in enumerate(rows):
        yield Progress(i, len(rows), f"Jacobian lens: {f'changed by {change:.3f}' if i > 1 else 'prompt by prompt'}")
        text = model.tokenizer.decode(row[row[:1] == [model.bos] :], clean_up_tokenization_spaces=False)
        settings_ = {"corpus": file.name, "max_seq_len": ask.length, "skip_first_positions": ask.skip, "metadata": known}
        one, rows_at_once = yield from fit_one(model, text, rows_at_once, settings_)
        merged = one if lens is None else JacobianLens.merge([lens, one])
        if lens is not None:
            change = changed_by(merged.jacobians, lens.jacobians)
        lens = merged
    if ask.part is None:
        with replacing(out, RuntimeError) as part:
            lens.save(str(part), dtype=t.float32)
    else:
        save_part(out, lens, one.jacobians if ask.part[1] >= len(every) else {}, hashlib.sha256(file.read_bytes()).hexdigest())
    note = f"mean over {lens.n_prompts} prompts of {ask.length} tokens of {file.name}, first {ask.skip} positions and the last left out · raw weights · {model.info.dtype}"
    return FitJacobianResult(str(out), tuple(lens.source_layers), lens.n_prompts, change if np.isfinite(change) else 0.0, time.time() - start, note)
