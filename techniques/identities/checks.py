"""The identities of the honesty panel: what must hold on any model, run on the loaded one and the prompt at hand."""

import gc
import math
from collections.abc import Generator
from dataclasses import replace

import torch as t
from torch import Tensor

from model import native
from model.bridge import FINAL, HOOKS, TOLERANCE, Model
from model.checks import self_check
from model.interventions import prepare
from model.loading import SMALL, read_config, read_weights
from model.memory import free_bytes
from model.noise import noise_floor
from model.probes import rounded
from model.runs import Runs, read_study
from techniques.attribution.logits import attribution
from techniques.features.preflight import sae_identities
from utils import show_bytes, tec
from vocabulary.nodes import Intervention, Node, UserError
from vocabulary.prompts import Study
from vocabulary.requests import Identity, Progress

STEPS = 5


def identities(model: Model, study: Study) -> Generator[Progress, None, tuple[tuple[Identity, ...], str]]:
    """The identities, and the words for how they were computed. A row that can't apply has ok None and says why."""
    runs = read_study(model, study)
    ids = t.tensor([runs.row("clean").ids])
    if why := model.notes.refused.get("model"):
        return model.info.checks, f"{model.info.architecture}: {why}"
    yield Progress(0, STEPS, "hook points")
    rows = list(self_check(model, ids))
    rows.append(attribution_sums(runs))
    yield Progress(1, STEPS, "patching")
    rows.append(patch_nothing(runs, study.base))
    rows.append((yield from patch_everything(runs, study)))
    yield Progress(3, STEPS, "noise floor")
    rows.append((yield from patch_itself(runs, study)))
    rows.append((yield from metric_floor(runs)))
    yield Progress(4, STEPS, "Hugging Face's own forward pass")
    rows.append(hugging_face(model, ids))
    if study.saes:
        for source in study.saes:
            rows += yield from sae_identities(runs, source)
    return tuple(rows), f"largest absolute error on the prompt, raw weights, {model.info.dtype}; tolerances grow with the values' size"


def logits(model: Model, ids: Tensor, edits: list = ()) -> Tensor:
    return model.forward(ids, edits=edits, keep=0)[0]


def attribution_sums(runs: Runs) -> Identity:
    """The cells of direct logit attribution, added up, against the model's own logit (difference) at the metric's position."""
    name, note = "attribution sums to the metric's logit", "before the soft cap" if runs.model.softcap else ""
    try:
        if not runs.answers:
            last = runs.trace("clean", [FINAL])[FINAL][0, -1:]
            runs, note = (
                replace(runs, answers=[int(runs.model.unembed(last)[0].argmax())], foils=[]),
                f"no answer given: of the likeliest token; {note}".rstrip("; "),
            )
        got = attribution(runs, "clean")
    except UserError as error:
        return Identity(name, math.nan, 0.0, None, str(error))
    return runs.model.identity(name, t.tensor([got.total]), t.tensor([got.logit]), note)


def patch_nothing(runs: Runs, base: str) -> Identity:
    """A run in which every hook point is read and none is written, against one without hooks."""
    model, which = runs.model, "corrupt" if runs.rows["corrupt"] is not None else "clean"
    ids = t.tensor([runs.row(which).ids])
    points = model.lens_points() + [f"blocks.{i}.attn.hook_z" for i in range(model.info.n_layers)]
    read, _ = model.forward(ids, filter(model.has, points), keep=0)
    name = "patch nothing = corrupted run" if which == "corrupt" else "patch nothing = the run itself"
    return model.identity(name, read, logits(model, ids), "every hook point read, none written")


def patch_everything(runs: Runs, study: Study) -> Generator[Progress, None, Identity]:
    name, model = "patch everything = clean run", runs.model
    if runs.rows["corrupt"] is None:
        return Identity(name, math.nan, 0.0, None, "needs a corrupted prompt")
    clean, corrupt = (runs.row(w).ids for w in ("clean", "corrupt"))
    if len(clean) != len(corrupt):
        return Identity(name, math.nan, 0.0, None, f"needs prompts of equal length: clean {len(clean)} tokens, corrupted {len(corrupt)}")
    all_of_it = (Intervention(Node("resid_pre", 0), "patch"),)
    try:
        patched = yield from prepare(model, replace(study, interventions=all_of_it, base="corrupt"))
    except UserError as error:
        return Identity(name, math.nan, 0.0, None, str(error))
    got, want = logits(model, t.tensor([corrupt]), patched.edits), logits(model, t.tensor([clean]))
    return model.identity(name, got, want, "L0.resid_pre at all positions")


def metric_floor(runs: Runs) -> Generator[Progress, None, Identity]:
    """The metric's noise floor on this prompt: a figure, not an identity."""
    name, kind = "noise floor of the metric", runs.study.metric.kind
    if runs.study.metric.needs_answer and not runs.answers or kind in ("logit_diff", "prob_diff") and not runs.foils:
        return Identity(name, math.nan, math.nan, None, f"{kind} needs an answer" + " and a foil" * kind.endswith("diff"))
    try:
        floor = yield from noise_floor([read_study(runs.model, runs.study, with_answer=True)])
    except UserError as error:
        return Identity(name, math.nan, math.nan, None, str(error))
    return Identity(name, floor, math.nan, None, f"of {kind}: twice its standard deviation over roundings of the run; smaller changes are noise")


def patch_itself(runs: Runs, study: Study) -> Generator[Progress, None, Identity]:
    """What a patch of every head, MLP and residual point with its own value does to the logits: nothing."""
    model = runs.model
    sites = ("resid_pre", "attn", "mlp", "resid_post") + (() if model.parallel else ("resid_mid",))
    nodes = [Node(s, layer) for layer in range(model.info.n_layers) for s in sites]
    nodes += [Node("head", layer, 0, p) for layer in range(model.info.n_layers) for p in ("z", "q", "k", "v", "pattern")]
    nodes = [n for n in nodes if model.has(f"blocks.{n.layer}.{HOOKS[n.part if n.site == 'head' else n.site]}")]
    same = replace(study.prompt, corrupt=study.prompt.clean)
    own = yield from prepare(model, replace(study, prompt=same, interventions=tuple(Intervention(n, "patch") for n in nodes), base="clean"))
    ids = t.tensor([own.row("clean").ids])
    return model.identity("patch with its own value = the run itself", logits(model, ids, own.edits), logits(model, ids), f"{len(nodes)} nodes at once")


@t.no_grad()
def hugging_face(model: Model, ids: Tensor) -> Identity:
    """The weights read afresh into Hugging Face's own class, eager attention."""
    name, n = "forward pass = Hugging Face's own", model.info.n_params
    tolerance = TOLERANCE[model.dtype]
    if n > SMALL or model.device_map:
        why = "more than 2 B parameters" if n > SMALL else "spread by a device_map"
        return Identity(name, math.nan, tolerance, None, f"not run: a second copy of the model would be needed ({why})")
    need = n * t.finfo(model.dtype).bits // 8
    if (free := free_bytes(model.device)) is not None and free < 1.2 * need:
        return Identity(name, math.nan, tolerance, None, f"not run: needs {show_bytes(need)}, {show_bytes(free)} are free")
    if (found := native.find(model.folder)) is not None:
        want = native.hooked_logits(native.read_config(found), native.read_state(found.weights), ids.cpu(), model.dtype)
        return rounded(model, model.identity("forward pass = HookedTransformer's", logits(model, ids), want))
    hf = read_weights(model.folder, read_config(model.base), model.dtype, model.device, None)
    want = hf(ids.to(model.device), use_cache=False).logits
    del hf
    gc.collect()
    tec()
    return rounded(model, model.identity(name, logits(model, ids), want))
