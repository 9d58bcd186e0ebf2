"""Directions made from prompts, sets, features, heads and files; and the metric over a coefficient."""

from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from model import directions
from model.bridge import Model
from model.interventions import prepare
from model.memory import Chunks
from model.places import find_position, hook_name
from model.replacements import prompts_at_once
from model.sae_loading import for_layer
from model.writes import multiplier
from techniques.generation.requests import Curve, CurveResult, Direction, Directions, DirectionsResult, KINDS, MakeDirection
from techniques.output.analysis import reads_answer, run
from techniques.weights.heads import factored_svd
from techniques.weights.matrices import NOTHING, Head, Tokens
from vocabulary.files import folder, move, replacing, typed_path
from vocabulary.nodes import Node, UserError, parse_intervention, parse_node
from vocabulary.prompts import Prompt, TokenRow, read_prompt_set
from vocabulary.requests import Progress

STREAM = ("embed", "resid_pre", "resid_mid", "resid_post", "attn", "mlp")


def make(model: Model, ask: MakeDirection) -> Generator[Progress, None, Direction]:
    """The direction of a request, kept."""
    if ask.kind not in KINDS:
        raise UserError(f"{ask.kind!r} is no kind of direction: choose one of {', '.join(KINDS)}")
    makers = {"prompts": of_prompts, "set": of_sets, "feature": of_feature, "head": of_head, "file": of_file}
    x, at, words, short = yield from makers[ask.kind](model, ask)
    if len(x) != model.info.d_model:
        raise UserError(f"{words} has {len(x)} numbers, and the model's residual stream {model.info.d_model}")
    out = typed_path(ask.out) if ask.out else None
    name = directions.keep(model, ask.name or short, x, at, words)
    if out is not None:
        copy(name, out)
    return described(name)


def copy(name: str, out) -> None:
    with replacing(out) as part:
        part.write_bytes(directions.place(name).read_bytes())


def described(name: str) -> Direction:
    v = directions.read(name)
    return Direction(name, v.at, v.words, v.model, v.x.norm().item(), str(directions.place(name)))


def spot(model: Model, at: str) -> tuple[Node, str]:
    node = parse_node(at)
    if node.site not in STREAM:
        raise UserError(f"{node}: a difference is taken in the residual stream: at {', '.join(STREAM)}, with a position such as @END or without")
    return node, hook_name(model, node)


def over(x: Tensor, at: int | None) -> Tensor:
    """Activations [seq, d_model] at a position, or their mean over all but the first (of one token: it)."""
    return x[at].float() if at is not None else x[1:].float().mean(0) if len(x) > 1 else x[0].float()


def of_prompts(model: Model, ask: MakeDirection) -> Generator[Progress, None, tuple]:
    node, name = spot(model, ask.at)
    runs = yield from prepare(model, replace(ask.study, interventions=()))
    places = [None if node.pos is None else runs.position(w, node.pos) for w in ("clean", "corrupt")]
    if isinstance(node.pos, int) and node.pos >= 0 and (partners := runs.partners("clean")) is not None:
        places[1] = partners[places[0]]
        if places[1] < 0:
            raise UserError(f"{node}: this position has no partner in the corrupted prompt: choose another, END, or edit the alignment")
    sides = [over(runs.trace(w, [name])[name][0], at) for w, at in zip(("clean", "corrupt"), places)]
    where = "mean over all positions but the first" if node.pos is None else f"position {node.pos}"
    where += f" (its partner there: {places[1]})" if places[0] != places[1] else ""
    what = "{} minus {}, on one prompt".format(*map(runs.called, ("clean", "corrupt"))) if runs.pair else "clean minus corrupted prompt"
    return sides[0] - sides[1], str(replace(node, pos=None)), f"{what}, {where}", "diff"


def of_sets(model: Model, ask: MakeDirection) -> Generator[Progress, None, tuple]:
    node, name = spot(model, ask.at)
    prompts = ask.study.prompt_set
    if not prompts:
        raise UserError("a difference of sets needs a prompt set: open one (--set on the command line)")
    clean, corrupt = rows_of(model, prompts, ask.study.align, "the set")
    other = rows_of(model, read_prompt_set(ask.minus), "", ask.minus)[0] if ask.minus else corrupt
    if not other:
        raise UserError("the set has no corrupted prompts: give another set whose clean prompts are taken away (--minus)")
    one = yield from set_mean(model, clean, node, name)
    two = yield from set_mean(model, other, node, name)
    where = "all positions but the first" if node.pos is None else f"position {node.pos}"
    against = f"that over {len(other)} clean prompts of {ask.minus}" if ask.minus else f"that over its {len(other)} corrupted ones"
    return one - two, str(replace(node, pos=None)), f"mean over {len(prompts)} clean prompts of a set minus {against}, {where}", "mean-diff"


def rows_of(model: Model, prompts: tuple[Prompt, ...], align: str, what: str) -> tuple[list[TokenRow], list[TokenRow]]:
    """The clean prompts of a set and its corrupted ones as tokens. UserError for one that the model can't read."""
    clean, corrupt = [], []
    for n, p in enumerate(prompts, 1):
        problems: list[str] = []
        one, two, _ = model.tokens.pair(p, align, problems, [])
        if problems:
            raise UserError(f"prompt {n} of {what}: {problems[0]}")
        clean.append(one)
        corrupt += [two] * (two is not None)
    return clean, corrupt


def set_mean(model: Model, rows: list[TokenRow], node: Node, name: str) -> Generator[Progress, None, Tensor]:
    """Mean [d_model] over prompts; each weighs the same, whatever its length. Prompts of equal length run together."""
    total, done = 0.0, 0
    for length in sorted({len(r.ids) for r in rows}):
        same = [r for r in rows if len(r.ids) == length]

        def work(start: int, stop: int, same: list = same) -> tuple[list, Tensor]:
            return same[start:stop], model.forward(t.tensor([r.ids for r in same[start:stop]]), [name], keep=None)[1][name]

        for part in Chunks("prompts", prompts_at_once(model, length)).over(len(same), work):
            if isinstance(part, Progress):
                yield part
                continue
            for row, x in zip(*part):
                total = total + over(x, None if node.pos is None else find_position(node.pos, row, "a prompt of the set")).double().cpu()
            done += len(part[0])
            yield Progress(done, len(rows), "means over a set")
    return (total / len(rows)).float()


def of_feature(model: Model, ask: MakeDirection) -> Generator[Progress, None, tuple]:
    node = parse_node(ask.at)
    if node.site != "sae":
        raise UserError(f"{node} is no feature: write L8.sae.f12")
    d = yield from for_layer(model, ask.study.saes, node.layer)
    d.check_index(node.index)
    if d.site_out not in STREAM:
        raise UserError(f"{d.source} does not write into the residual stream: its decoder is no direction there")
    if not d.transcoder and d.normalisation in ("layer_norm", "constant_norm_rescale"):
        raise UserError(f"{d.source} rescales its input: what a feature writes depends on the prompt; steer with {node}=add:3")
    return d.rows([node.index])[0].float(), str(Node(d.site_out, d.layer)), f"decoder row of feature {node.index} of {d.source}", f"f{node.index}"


def of_head(model: Model, ask: MakeDirection) -> Generator[Progress, None, tuple]:
    node = parse_node(ask.at)
    if node.site != "head":
        raise UserError(f"{node} is no head: write L9H9")
    model.require("parts")
    head = Head(model, node.layer, node.head)
    tokens = Tokens(model)
    yield Progress(0, 1, "the head's weights are held against the model")
    head.check(tokens, 0)
    factor = multiplier(model, node.layer)
    short = f"L{node.layer}H{node.head}"
    at = str(Node("attn", node.layer))
    frozen = "" if head.layer.post is NOTHING else "; the norm behind attention at scale 1"
    if not ask.token:
        x = factored_svd(head.o.T, head.layer.folded[2][node.head])[0][:, 0]
        x = x if x[x.abs().argmax()] > 0 else -x
        return x, at, f"first output direction of {short}'s OV, unit length, its largest number positive{frozen}", short
    row = model.answer("", ask.token)
    if len(row.ids) != 1:
        raise UserError(f"{ask.token!r} is {len(row.ids)} tokens and must be one: mind the leading space")
    x = (head.values(tokens(t.tensor([row.ids])))[0, 0] @ head.o) * factor
    return x, at, f"{short}'s OV of the token {ask.token!r}, its bare embedding{frozen}", short


def of_file(model: Model, ask: MakeDirection) -> Generator[Progress, None, tuple]:
    yield Progress(0, 1, "reading a direction")
    if not ask.file:
        raise UserError("name a .safetensors or .npy file")
    v = directions.read(ask.file)
    at = v.at or str(replace(parse_node(ask.at), pos=None))
    return v.x, at, v.words or f"from {ask.file}", directions.place(ask.file).stem[:40]


def listed(model: Model, ask: Directions) -> DirectionsResult:
    """What is kept and fits, the newest first."""
    here = folder("directions")
    if ask.away:
        path = directions.place(ask.away)
        if path.parent != here:
            raise UserError(f"{ask.away} is not one of {here}")
        move(path, here / directions.AWAY)
    some, wrong = [], []
    for path in sorted(here.glob("*.safetensors"), key=lambda p: -p.stat().st_mtime):
        try:
            if len(directions.read(path.stem).x) == model.info.d_model:
                some.append(described(path.stem))
        except UserError as error:
            wrong.append(str(error))
    return DirectionsResult(tuple(some), tuple(wrong))


def curve(model: Model, ask: Curve) -> Generator[Progress, None, CurveResult]:
    """A run of the prompt for each coefficient."""
    steers = [i for i in ask.study.interventions if i.op == "steer"]
    if ask.steer:
        steers = [i for i in steers if i == parse_intervention(ask.steer)]
    if not steers:
        raise UserError("there is no such steering intervention in the study: add one such as L8.resid_post=steer:NAME:2")
    if not ask.coefficients:
        raise UserError("give coefficients")
    one, values, found = steers[-1], [], None
    for n, c in enumerate(ask.coefficients):
        some = tuple(replace(i, value=float(c)) if i == one else i for i in ask.study.interventions)
        runs = yield from prepare(model, replace(ask.study, interventions=some), reads_answer(ask.study))
        found = yield from quietly(run(runs, 1))
        values.append(np.nan if found.now.metric is None else found.now.metric)
        yield Progress(n + 1, len(ask.coefficients), "the metric over the coefficient")
    metric = ask.study.metric
    words = f"{metric.words} under c times {one.source} at {one.node}, raw weights, {model.info.dtype}"
    corrupt = None if found.corrupt is None else found.corrupt.metric
    return CurveResult(str(one), np.array(ask.coefficients), np.array(values, float), found.clean.metric, corrupt, words)


def quietly(steps: Generator) -> Generator[Progress, None, object]:
    """What a generator returns, without its parts."""
    while True:
        try:
            part = next(steps)
        except StopIteration as stop:
            return stop.value
        if isinstance(part, Progress):
            yield part
