"""One path into a head's query or keys changed for real: what it does to the score, the attention and the metric, beside what the sum says."""

import torch as t
from torch import Tensor

from model.bridge import FINAL
from model.metrics import MetricReader
from model.writes import change_of_head
from techniques.attention.patterns import pattern_name
from techniques.qk import parts, scores
from techniques.qk.dictionaries import ROW, Wrote
from techniques.qk.requests import BIAS, WRITTEN, QKCheck, QKCheckResult
from techniques.qk.split import Split
from vocabulary.nodes import UserError, parse_node

Acts = dict[str, Tensor]


@t.no_grad()
def checked(split: Split, ask: QKCheck) -> QKCheckResult:
    """The query (or the keys) from a stream in which one component has another value, norms frozen and computed again."""
    model, which, layer, part = split.model, ask.which, ask.layer, ask.side
    if part not in ("q", "k"):
        raise UserError(f"{part!r} is not a side: use q (into the query) or k (into the keys)")
    check_component(split, ask)
    said, change = moved(split, ask.component, other_run(split) if ask.op == "patch" else None)
    stream = f"blocks.{layer}.hook_resid_pre"
    x = split.runs.trace(which, [stream])[stream][0]
    reader, head = split.readers[part], ask.head if part == "q" else split.kv
    turned = reader(said[None])[0]
    again = reader.real(x + change.to(x)) - reader.real(x)  # an intervention on the query itself stays
    _, edits = scores.frozen_norms(model, layer, split.ids, split.q, split.k)
    frozen, _ = score_of(split, part, head, turned, edits)
    true, new = score_of(split, part, head, again)
    own = {"q": split.q[0, split.dest, ask.head], "k": split.k[0, :, split.kv]}
    own = {p: v.cpu().double() for p, v in own.items()}
    if part == "q":
        predicted = float(turned[split.dest] @ split.form.turned(own["k"][None])[0, :-1] + turned[split.dest] @ split.form.query)
    else:
        predicted = float(split.form.turned(turned[None])[0] @ t.cat([own["q"], t.ones(1, dtype=t.float64)]))
    attention, metric = effects(split, ask, f"blocks.{layer}.attn.hook_{part}", new)
    receiver = f"L{layer}H{ask.head}.{part}" + (f"@{split.dest}" if part == "q" else "")
    words = f"{ask.component} {'with its value in the other prompt' if ask.op == 'patch' else 'taken away'} in {receiver} alone, norms computed again, {which}"
    shared = f", keys of kv head {split.kv} at all positions" if part == "k" else ""
    return QKCheckResult(f"{ask.component}->{receiver}", ask.op, predicted, true, attention, metric, words + shared, frozen)


def check_component(split: Split, ask: QKCheck) -> None:
    """UserError for what is no row that can be changed."""
    rows = split.sides.queries if ask.side == "q" else split.sides.keys
    some = [n for n in rows if n not in (BIAS, WRITTEN) and not n.endswith(".sae.bias")]
    if ask.component in some:
        return
    if (m := ROW.fullmatch(ask.component)) and m[2]:
        raise UserError(
            f"{ask.component} is no row here: it does not fire {'at the destination' if ask.side == 'q' else 'at a source'}, or its SAE is not in the sum"
        )
    raise UserError(f"{ask.component} is no component that writes into L{ask.layer}H{ask.head}: use one of {', '.join(some[:40])}{', …' * (len(some) > 40)}")


def score_of(split: Split, part: str, head: int, change: Tensor, edits: list = ()) -> tuple[float, Tensor]:
    """What the score gains when the query at the destination (or the keys) gain so much [seq, d_head], and the new queries or keys."""
    rows = [split.dest] if part == "q" else list(range(len(change)))
    new = (split.q if part == "q" else split.k).clone()
    new[0, rows, head] += change[rows].to(new)
    both = (new, split.k) if part == "q" else (split.q, new)
    after = scores.before_softmax(split.model, split.ask.layer, split.ids, *both, edits)[0, split.ask.head, split.dest].cpu().double()
    return float(((after - split.form.own)[split.sight] * split.weights[split.sight]).sum()), new


# ------------------------------------------------------------------ what the stream gains


def moved(split: Split, name: str, other: tuple[str, Acts] | None) -> tuple[Tensor, Tensor]:
    """What the stream gains [seq, d_model] when a component is taken away or has its value in another run: a norm after attention frozen, and computed again."""
    if m := ROW.fullmatch(name):
        wrote = Wrote(split.runs, split.ask.which, split.saes.of_layer(int(m[1])), split.acts)
        there = None if other is None else Wrote(split.runs, other[0], wrote.d, other[1])
        if m[3]:
            change = -wrote.error() if there is None else there.error() - wrote.error()
        else:
            own, new = wrote.written(int(m[2])), 0.0 if there is None else there.written(int(m[2]))
            change = new - own
        return wrote.to_stream(change), wrote.real(change)
    said = -component(split, split.ask.which, split.acts, name)
    said = said if other is None else said + component(split, *other, name)
    return said, for_real(split, name, said, other)


def component(split: Split, which: str, acts: Acts, name: str) -> Tensor:
    """What one component added to the stream of a run [seq, d_model]."""
    for some, x in parts.written(split.runs, which, split.ask.layer, acts, split.saes):
        if name in some:
            return x[some.index(name)]
    raise AssertionError(name)


def other_run(split: Split) -> tuple[str, Acts]:
    """The other prompt's run that a patch takes values from."""
    runs, base = split.runs, split.runs.study.base if split.ask.which == "now" else split.ask.which
    other = "corrupt" if base == "clean" else "clean"
    if runs.rows[other] is None:
        raise UserError("patch takes the value in the other prompt's run, and there is no corrupted prompt: use zero, or type one")
    if len(runs.row(other).ids) != len(split.row.ids) or not runs.by_index:
        raise UserError("a component is patched position by position here, so clean and corrupted have to be of one length: use zero")
    return other, runs.trace(other, parts.names(split.model, split.ask.layer, split.saes))


def for_real(split: Split, name: str, said: Tensor, other: tuple[str, Acts] | None) -> Tensor:
    """What the stream gains [seq, d_model] by the change, a norm after attention computed again: that is in the way of heads only."""
    node = None if name == "position" or name.endswith(".bias") else parse_node(name)
    if node is None or node.site != "head" or not said.any():
        return said
    z = f"blocks.{node.layer}.attn.hook_z"
    new = t.zeros_like(split.acts[z]) if other is None else other[1][z]
    return change_of_head(split.model, node.layer, node.head, split.acts[z], new)[0]


def effects(split: Split, ask: QKCheck, name: str, new: Tensor) -> tuple[tuple[float, float], tuple[float, float] | None]:
    """The head's attention from destination to source, and the metric, before and after the query or the keys are these."""
    runs, model, which = split.runs, split.model, ask.which
    last, pattern = f"blocks.{model.info.n_layers - 1}.hook_resid_post", pattern_name(ask.layer)
    edits = runs.edits if which == "now" else []
    _, got = model.forward(split.ids, [pattern, last], [*edits, (name, lambda x: new.to(x))], keep=None)
    attention = tuple(float(x[ask.head, split.dest, split.source]) for x in (split.acts[pattern][0], got[pattern][0]))
    if ask.study.metric.whole:
        return attention, None
    if ask.study.metric.needs_answer and (not runs.answers or ask.study.metric.kind in ("logit_diff", "prob_diff") and not runs.foils):
        return attention, None
    clean = runs.trace("clean", [FINAL])[FINAL][0, runs.metric_position("clean")][None] if ask.study.metric.kind == "kl" else None
    score = MetricReader([runs], clean, which)
    before = runs.trace(which, [last])[last]
    return attention, tuple(float(score.of(x, 0)[0, 0]) for x in (before, got[last]))
