"""A study's interventions as edits on hook points: `prepare` reads a study and makes its runs ready."""

from collections.abc import Callable, Generator
from dataclasses import replace

from torch import Tensor

from model import directions, steering
from model.bridge import Edit, Model, write_mid
from model.places import hook_name, where
from model.replacements import corrupted_rows, gaussian, mean_in_words, means, noise_scale, place_in_set, resampled, set_key
from model.runs import NAMES, Runs, edit, read_study
from vocabulary.nodes import FROM_TEXT, Intervention, NOISE, OPS, UserError
from vocabulary.prompts import Study, TokenRow
from vocabulary.requests import Progress


def prepare(model: Model, study: Study, with_answer: bool = False) -> Generator[Progress, None, Runs]:
    """Read the study and turn its interventions into edits, in order; a write at resid_mid comes after those at the attention it is written through."""
    runs = read_study(model, study, with_answer)
    runs.edits, runs.done = yield from edits_of(runs, study.interventions)
    return runs


def edits_of(runs: Runs, some: tuple[Intervention, ...]) -> Generator[Progress, None, tuple[list[Edit], tuple]]:
    """Interventions as edits of the run "now", and what names them in the cache."""
    base, row = runs.study.base, runs.row("now")
    other = "corrupt" if base == "clean" else "clean"
    edits, late, done, layers = [], [], [], set()
    for i in some:
        if i.node.site == "sae":  # all features of one SAE are one edit
            if i.node.layer not in layers:
                layers.add(i.node.layer)
                runs.require_first("an SAE")
                found, mark = yield from steering.edits(runs, [j for j in some if (j.node.site, j.node.layer) == ("sae", i.node.layer)])
                (late if len(found) == 2 else edits).extend(found)  # two: what is read is another point than what is written
                done.append(mark)
            continue
        fn, mark = yield from one_edit(runs, i, row, base, other)
        if i.node.site == "resid_mid":
            late += write_mid(i.node.layer, fn)
        else:
            edits.append((hook_name(runs.model, i.node), fn))
        done.append(mark)
    return edits + late, tuple(done)


FROM_PROMPT = ("patch", "freeze", "resample", "mean", "mean_text_pos", "noise")  # what they write is known for the prompt's own positions alone


def edits_of_new(runs: Runs) -> Generator[Progress, None, list[Edit]]:
    """The interventions at all positions as edits of one new token behind the prompt. UserError for those whose values only the prompt's positions have."""
    some = tuple(i for i in runs.study.interventions if i.node.pos is None)
    for i in some:
        if i.op in FROM_PROMPT:
            raise UserError(f"{i}: {i.op} has values for the prompt's positions and none for a new token: hold the interventions on the prompt (held prompt)")
    one = replace(runs, rows=runs.rows | {"now": TokenRow((0,), ("",))}, behind=True)
    return (yield from edits_of(one, some))[0]


def one_edit(runs: Runs, i: Intervention, row: TokenRow, base: str, other: str) -> Generator[Progress, None, tuple[Callable, object]]:
    """The function of one intervention, and what names it in the cache: the intervention and the tokens its value comes from."""
    model, node = runs.model, i.node
    name, spot = hook_name(model, node), where(model, node, row, NAMES[base])
    match i.op:
        case "zero":
            return edit(spot, "zero", None, None), (str(i), spot_key(spot))
        case "scale":
            if i.value is None:
                raise UserError(f"{i}: scale needs a factor, {node}=scale:0.5")
            return edit(spot, "scale", i.value, None), (str(i), spot_key(spot))
        case "set":
            if node.site != "neuron":
                raise UserError(f"{i}: set is for a feature (L8.sae.f12) or a neuron (L3.mlp.n412); use zero, scale or patch")
            return edit(spot, "set", i.value, None), (str(i), spot_key(spot))
        case "patch":
            source = runs.rows[other]
            if source is None:
                raise UserError(f"{i}: patching needs a corrupted prompt: E types one (in a shell --corrupt)")
            try:
                there = runs.partners(base)
            except UserError as error:
                raise UserError(f"{i}: {error}") from error
            value = runs.trace(other, [name])[name]
            mark = (str(i), spot_key(spot), source.ids, runs.study.against)
            return (edit(spot, "patch", None, value), mark) if there is None else (across(spot, value, there, i), (*mark, there))
        case "freeze":
            return edit(spot, "patch", None, model.trace(row.ids, [name])[name]), (str(i), spot_key(spot), row.ids)
        case "resample":
            n = len(row.ids) - row.tail
            ids = resampled(model, runs.study, n, row.ids[:n], runs.study.seed) + row.ids[n:]
            return edit(spot, "patch", None, model.trace(ids, [name])[name]), (str(i), spot_key(spot), ids)
        case "noise":
            shape = model.trace(row.ids, [name])[name].shape[1:]
            key = (runs.study.seed, place_in_set(runs.study), (node.layer, node.site, node.part))
            noise = (NOISE if i.value is None else i.value) * noise_scale(model) * gaussian(shape, key)[None].to(model.device)
            return edit(spot, "noise", None, noise), (str(i), spot_key(spot), repr(key))
        case "add" | "steer":
            return pushed(runs, i, row, spot)
        case "mean" | "mean_all" | "mean_text" | "mean_text_pos":
            if i.op in ("mean_all", "mean_text") and node.part == "pattern" and node.site == "head":
                raise UserError(f"{i}: a pattern has no mean over positions; use mean with a set of one template, or zero")
            values = yield from means(model, runs.study, [name], i.op, [row])
            kind = "mean_all" if i.op in ("mean_all", "mean_text") else "mean"
            return edit(spot, kind, None, values[name]), (str(i), spot_key(spot), *source_key(runs, i.op, row, values[name]))
    raise UserError(f"{i.op!r} is not an operation: use one of {', '.join(OPS)}")


def source_key(runs: Runs, op: str, row: TokenRow, values: Tensor) -> tuple:
    """What names in the cache that which a mean is taken over: the text, or the set's corrupted prompts and, where it may go by label, how."""
    if op in FROM_TEXT:
        return (runs.study.text,)
    rows = corrupted_rows(runs.model, runs.study.prompt_set, runs.study.align)
    how = "" if op != "mean" else repr(values.shape) + mean_in_words(runs.model, runs.study, [row]) + repr(row.labels)
    return set_key([r.ids for r in rows]), how, how and tuple(sorted((r.ids, tuple(sorted(r.labels.items()))) for r in rows))


def pushed(runs: Runs, i: Intervention, row: TokenRow, spot: tuple) -> tuple[Callable, object]:
    """The function that adds a number of times a direction: the answers', or a kept one."""
    if i.node.site in ("head", "neuron"):
        raise UserError(f"{i}: a direction lies in the residual stream; add it at resid_pre, resid_mid, resid_post, attn, mlp or embed")
    if i.op == "steer":
        if i.value is None or not i.source:
            raise UserError(f"{i}: steer needs a direction and a number, {i.node}=steer:NAME:2")
        u = directions.vector(runs.model, i.source)
        mark = (directions.digest(u),)
    else:
        u, mark = answer_direction(runs), (tuple(runs.answers), tuple(runs.foils))
    return edit(spot, "add", None, (i.value * u).expand(1, len(row.ids), -1)), (str(i), spot_key(spot), *mark)


def across(spot: tuple, value: Tensor, there: tuple[int, ...], i: Intervention) -> Callable[[Tensor], Tensor]:
    """A function that takes values [1, seq of the other prompt, ...] to the positions they are aligned with; what has no partner stays."""
    if i.node.site == "head" and i.node.part == "pattern":
        raise UserError(f"{i}: a pattern's row holds sources without partner in the other prompt; patch z, q, k or v")
    here = [p for p in range(len(there))[spot[1]] if there[p] >= 0]
    if not here:
        raise UserError(f"{i}: this position has no partner in the other prompt: choose another, or edit the alignment")
    new = value[(slice(None), [there[p] for p in here], *spot[2:])]

    def apply(x: Tensor) -> Tensor:
        out = x.clone()
        out[(slice(None), here, *spot[2:])] = new.to(x)
        return out

    return apply


def answer_direction(runs: Runs) -> Tensor:
    """The unit vector [d_model] of the answers' minus the foils' columns of the unembedding, means of several."""
    if not runs.answers:
        raise UserError("add steers along the answer's direction, and there is no answer: give one, with its leading space")
    w = runs.model.bridge.W_U
    u = w[:, runs.answers].float().mean(1)
    u = u - w[:, runs.foils].float().mean(1) if runs.foils else u
    if u.norm() == 0:
        raise UserError("answer and foil have the same direction: give another foil")
    return u / u.norm()


def spot_key(spot: tuple) -> str:
    """An index into a hook point's tensor as text for the cache; every batch is alike."""
    return str(spot[1:])
