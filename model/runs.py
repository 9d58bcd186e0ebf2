"""The runs of a study (clean, corrupted, now) that every analysis reads."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch as t
from torch import Tensor

from vocabulary import alignment as align
from vocabulary.nodes import FROM_TEXT, Node, OPS, UserError
from vocabulary.prompts import METRICS, RUNS, Study, TokenRow
from model import own_metric
from model.own_metric import OwnMetric
from model.text_means import pinned
from model.places import find_position, hook_name, where
from model.bridge import Edit, Model

NAMES = {"clean": "the clean prompt", "corrupt": "the corrupted prompt", "now": "the prompt"}


def edit(spot: tuple, op: str, factor: float | None, value: Tensor | None) -> Callable[[Tensor], Tensor]:
    """A function that returns the tensor with one spot replaced; its input stays as it was."""

    def apply(x: Tensor) -> Tensor:
        new = x.clone()
        match op:
            case "zero":
                new[spot] = 0
            case "scale":
                new[spot] = x[spot] * factor
            case "set":
                new[spot] = factor
            case "noise" | "add":
                new[spot] = x[spot] + value[spot].to(x)
            case "mean_all":
                new[spot] = value[(slice(None), slice(None), *spot[2:])].to(x)
            case _:
                new[spot] = value[spot].to(x)
        return new

    return apply


@dataclass
class Runs:
    """The runs of a study: clean, corrupted, and now (the base prompt under the interventions)."""

    model: Model
    study: Study
    rows: dict[str, TokenRow | None]
    answers: list[int]
    foils: list[int]
    edits: list[Edit]
    done: tuple
    alignment: align.Pairs = ()
    own: OwnMetric | None = None
    behind: bool = False  # whether "now" stands for a token behind the prompt

    def row(self, which: str) -> TokenRow:
        row = self.rows.get(which)
        if row is None:
            if which in RUNS:
                raise UserError("there is no corrupted prompt: type one first")
            raise UserError(f"{which!r} is not a run: use one of {', '.join(RUNS)}")
        return row

    def trace(self, which: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Activations of a run, from the cache when it ran before."""
        edits, done = (self.edits, self.done) if which == "now" else ((), ())
        return self.model.trace(self.row(which).ids, names, edits, done)

    def visit(self, which: str, names: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        """take(name, activations [1, ...]) of one point of a run after the other: a long prompt's as they pass, and none is held."""
        ids = self.row(which).ids
        if self.model.likely(len(ids)):
            for name, x in self.trace(which, names).items():
                take(name, x)
        else:
            self.model.forward(t.tensor([ids]), names, self.edits if which == "now" else (), keep=None, take=take)

    def position(self, which: str, pos: int | str) -> int:
        return find_position(pos, self.row(which), NAMES[which])

    def placed(self, node: Node, which: str = "now") -> Node:
        """The node with its position as an index into a run."""
        return node if node.pos is None else replace(node, pos=self.position(which, node.pos))

    @property
    def by_index(self) -> bool:
        """Whether a position stands for the same index in clean and corrupted."""
        rows = self.rows["clean"], self.rows["corrupt"]
        return None in rows or not self.alignment or align.is_by_index(self.alignment, *(len(r.ids) for r in rows))

    def partners(self, base: str) -> tuple[int, ...] | None:
        """For every position of a prompt its partner in the other one (-1: none); None: the same index. Unequal lengths need an alignment."""
        clean, corrupt = (len(self.row(w).ids) for w in ("clean", "corrupt"))
        if not self.alignment and clean != corrupt:
            raise UserError(
                f"clean has {clean} tokens and corrupted {corrupt}: align them (% on the screen, --align diff or labels), or patch prompts of equal length"
            )
        return None if self.by_index else align.partners(self.alignment, base, len(self.row(base).ids))

    def metric_position(self, which: str) -> int:
        """The metric's position in a run. Under an alignment a number means the clean prompt's, and in the corrupted one its partner."""
        pos = self.study.metric.pos
        if isinstance(pos, str) or self.by_index or (self.study.base if which == "now" else which) == "clean":
            return self.position(which, pos)
        partner = dict(self.alignment)
        if (i := self.position("clean", pos)) not in partner:
            raise UserError(f"the metric's position {pos} has no partner in the corrupted prompt: use END or a label of both, or edit the alignment")
        return partner[i]

    def place(self, which: str, pos: int | str | None = None) -> int:
        """A position as an index into a run; None: the metric's."""
        return self.metric_position(which) if pos is None else self.position(which, pos)

    def pair(self, which: str) -> tuple[str, str]:
        """The two runs of a difference, of equal length."""
        a, _, b = which.partition("-")
        na, nb = len(self.row(a).ids), len(self.row(b).ids)
        if na != nb:
            raise UserError(f"a difference needs runs of equal length: {a} has {na} tokens and {b} has {nb}")
        if not self.by_index:
            raise UserError("a difference of runs goes position by position, and the prompt's alignment does not: look at one run at a time")
        return a, b

    def edits_anywhere(self) -> tuple[list[Edit], list[str]]:
        """Those interventions that make sense on any tokens (zero and scale at all positions), and what is left out."""
        fits = [i for i in self.study.interventions if i.op in ("zero", "scale") and i.node.pos is None and i.node.site not in ("resid_mid", "sae")]
        edits = [(hook_name(self.model, i.node), edit(where(self.model, i.node, self.row("now"), NAMES[self.study.base]), i.op, i.value, None)) for i in fits]
        return edits, [str(i) for i in self.study.interventions if i not in fits]

    @property
    def aligned(self) -> str:
        """Where the alignment comes from, and what it leaves out."""
        source = "the prompt's own" if self.study.prompt.alignment else f"by {self.study.align}"
        return f"{source}: {align.words(self.alignment, *(len(self.row(w).ids) for w in ('clean', 'corrupt')))}"

    @property
    def convention(self) -> str:
        """What was done to the model, for the titles."""
        some = self.study.interventions
        if not some:
            return ""
        notes = [f"now = {self.study.base} under {', '.join(str(i) for i in some)}"]
        parts = {i.node.part for i in some if i.node.site == "head"}
        if parts & {"k", "v"} and self.model.info.n_kv_heads < self.model.info.n_heads:
            notes.append("k and v are shared by a group of heads")
        if parts & {"q", "k"} and self.model.info.positions == "rotary":
            notes.append("q and k before the rotation")
        ops = dict.fromkeys(i.op for i in some)
        notes += [f"{op} = {OPS[op]}" for op in ops if op not in ("zero", "scale")]
        notes += [f"seed {self.study.seed}"] * ("resample" in ops or "noise" in ops)
        notes += [self.study.text.words] * bool(ops.keys() & set(FROM_TEXT))
        if "patch" in ops and not self.by_index:
            notes.append(f"patched across an alignment, {self.aligned}")
        if "pattern" in parts:
            notes.append("a pattern's position is the destination")
        if any(i.node.site == "sae" for i in some):
            kept = "kept" if self.study.sae_error else "dropped (but at position 0, unless it is named)"
            notes.append(f"features of {', '.join(self.study.saes)}, their error term {kept}")
        return "; ".join(notes)


def read_study(model: Model, study: Study) -> Runs:
    """The study's prompts as tokens, without its interventions; what stops an analysis is an error."""
    if study.base not in ("clean", "corrupt"):
        raise UserError(f"{study.base!r} is not a prompt to act on: use clean or corrupt")
    if study.metric.kind not in METRICS:
        raise UserError(f"{study.metric.kind!r} is not a metric: use one of {', '.join(METRICS)}")
    if study.metric.kind == "loss":
        model.require("loss")
    own = own_metric.read(study.metric) if study.metric.kind == "own" else None
    if study.text.path and any(i.op in FROM_TEXT for i in study.interventions):
        study = replace(study, text=pinned(study.text)[1])
    if own:
        study = replace(study, metric=replace(study.metric, own=f"{own.file}:{own.name}", digest=own.digest))
    check = model.check(study.prompt, study.align)
    if check.problems:
        raise UserError("; ".join(check.problems))
    rows = {"clean": check.clean, "corrupt": check.corrupt}
    rows["now"] = rows[study.base]
    if rows["now"] is None:
        raise UserError("the interventions act on the corrupted prompt, and there is none: type one first")
    answers, foils = (list(dict.fromkeys(r.ids[0] for r in side)) for side in (check.answers, check.foils))
    return Runs(model, study, rows, answers, foils, [], (), check.alignment, own)
