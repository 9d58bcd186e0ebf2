"""
The runs of a study (clean, corrupted, now) that every analysis reads.

With a second model beside the first (`Study.against`) the corrupted run is the clean prompt in that model: `Runs.of` is the one place that says which
model makes which run, and what patches takes the other model's activations.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch as t
from torch import Tensor

from vocabulary import alignment as align
from vocabulary.names import canonical
from vocabulary.nodes import FROM_TEXT, Node, OPS, UserError
from vocabulary.prompts import METRICS, RUNS, Prompt, Study, TokenRow
from vocabulary.requests import CheckResult
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
    """
    The runs of a study: clean, corrupted, and now (the base prompt under the interventions), which `model` makes. `pair`: the models of the clean and of
    the corrupted run where these are two.
    """

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
    shortened: tuple[str, ...] = ()  # answers and foils of several tokens, each as its first token of how many
    pair: tuple[Model, Model] | None = None

    def of(self, which: str) -> Model:
        """The model that makes a run."""
        side = self.study.base if which == "now" else which
        return self.pair[side == "corrupt"] if self.pair else self.model

    def at(self, which: str) -> "Runs":
        """These runs for an analysis of one of them alone: `model` is the one that makes it."""
        return self if self.of(which) is self.model else replace(self, model=self.of(which))

    def together(self, *which: str) -> bool:
        """Whether one model makes all of these runs, so that one forward pass can hold them."""
        return len({id(self.of(w)) for w in which}) == 1

    def row(self, which: str) -> TokenRow:
        row = self.rows.get(which)
        if row is None:
            if which in RUNS:
                raise UserError("there is no corrupted prompt: E types one (in a shell --corrupt)")
            raise UserError(f"{which!r} is not a run: use one of {', '.join(RUNS)}")
        return row

    def trace(self, which: str, names: Iterable[str]) -> dict[str, Tensor]:
        """Activations of a run, from the cache when it ran before."""
        edits, done = (self.edits, self.done) if which == "now" else ((), ())
        return self.of(which).trace(self.row(which).ids, names, edits, done)

    def visit(self, which: str, names: Iterable[str], take: Callable[[str, Tensor], None]) -> None:
        """take(name, activations [1, ...]) of one point of a run after the other: a long prompt's as they pass, and none is held."""
        ids = self.row(which).ids
        if self.of(which).likely(len(ids)):
            for name, x in self.trace(which, names).items():
                take(name, x)
        else:
            self.of(which).forward(t.tensor([ids]), names, self.edits if which == "now" else (), keep=None, take=take)

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

    def sides(self, which: str) -> tuple[str, ...]:
        """The run, or the two runs of a difference, which are of equal length."""
        return self.two(which) if "-" in which else (which,)

    def two(self, which: str) -> tuple[str, str]:
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

    def require_first(self, what: str, which: str = "now") -> None:
        """UserError where a run is the second model's, and `what` belongs to the first."""
        if self.pair and self.of(which) is not self.pair[0]:
            raise UserError(f"{what} belongs to {self.called('clean')}, and this run is one of {self.called('corrupt')}: choose a run of the first")

    def called(self, which: str) -> str:
        """A run in words: clean or corrupted, or the model that makes it where these are two."""
        return self.model.info.names[which == "corrupt"] if self.pair else {"clean": "clean", "corrupt": "corrupted"}[which]

    @property
    def compared(self) -> str:
        """Which two models the runs compare, in words."""
        return "clean and corrupted are one prompt in two models: {} and {}".format(*self.model.info.names) if self.pair else ""

    @property
    def first_tokens(self) -> str:
        """For the titles, which answers and foils are there by their first token alone; "" where none is."""
        return f"by its first token alone: {', '.join(self.shortened)}" if self.shortened else ""

    @property
    def convention(self) -> str:
        """What was done to the model, for the titles."""
        some = self.study.interventions
        if not some:
            return "; ".join(filter(None, [self.first_tokens, self.compared]))
        notes = [*filter(None, [self.first_tokens, self.compared]), f"now = {self.study.base} under {', '.join(str(i) for i in some)}"]
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


def whole_answer(model: Model, study: Study, rows: dict[str, TokenRow | None], answers: tuple[TokenRow, ...]) -> dict[str, TokenRow | None]:
    """The prompts with the answer's tokens behind them, which logprob_sum reads the probabilities of."""
    if len(answers) != 1:
        raise UserError(f"logprob_sum is of one answer, and there {'is none' if not answers else f'are {len(answers)}'}: give one, with its leading space")
    if study.metric.pos not in ("END", -1):
        raise UserError("logprob_sum is read from the prompt's end on: its position is END")
    model.require("one vocabulary", "loss")
    if not model.causal:
        raise UserError(f"{model.info.architecture} is not causal: an answer behind the prompt would change the prompt's own activations")
    out, answer = {}, answers[0]
    for which, row in rows.items():
        if row is not None and len(row.ids) + len(answer.ids) > model.info.n_ctx:
            raise UserError(
                f"the prompt with its answer has {len(row.ids) + len(answer.ids)} tokens and the model's context holds {model.info.n_ctx}: shorten it"
            )
        out[which] = row and replace(row, ids=row.ids + answer.ids, texts=row.texts + answer.texts, tail=len(answer.ids))
    return out


def first_tokens(group: list[Runs]) -> str:
    """For a title over several prompts, in how many an answer or foil is there by its first token alone."""
    if len(group) == 1:
        return group[0].first_tokens
    n = sum(bool(r.shortened) for r in group)
    return f"answers of several tokens by their first alone, in {n} of {len(group)} prompts" if n else ""


def read_study(model: Model, study: Study, with_answer: bool = False) -> Runs:
    """
    The study's prompts as tokens, without its interventions; what stops an analysis is an error. `with_answer`: for analyses of the metric, which in the case of
    logprob_sum reads the answer's tokens behind the prompt.
    """
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
    prompt, pair = study.prompt, two_models(model, study) if study.against else None
    if pair:
        prompt = replace(prompt, corrupt=None, corrupt_labels=(), alignment=())
    check = model.check(prompt, study.align)
    if check.problems:
        raise UserError("; ".join(check.problems))
    if pair:
        same_tokens(pair, prompt, check)
        model = pair[study.base == "corrupt"]
    rows = {"clean": check.clean, "corrupt": check.clean if pair else check.corrupt}
    rows["now"] = rows[study.base]
    if rows["now"] is None:
        raise UserError("the interventions act on the corrupted prompt, and there is none: E types one (in a shell --corrupt)")
    answers, foils = (list(dict.fromkeys(r.ids[0] for r in side)) for side in (check.answers, check.foils))
    long = tuple(f"{r.texts[0]!r} (first of {len(r.ids)} tokens)" for r in (*check.answers, *check.foils) if len(r.ids) > 1)
    if long and study.metric.kind in ("logit_diff", "prob_diff") and {*answers} & {*foils}:
        raise UserError(f"answer and foil begin with the same token, {long[0]}: give another foil, or use the metric logprob_sum")
    pairs = check.alignment
    if with_answer and study.metric.kind == "logprob_sum":
        n, m = len(rows["clean"].ids), len(rows["corrupt"].ids) if rows["corrupt"] else 0
        rows, long = whole_answer(model, study, rows, check.answers), ()
        pairs += tuple((n + i, m + i) for i in range(rows["clean"].tail)) if pairs else ()
    return Runs(model, study, rows, answers, foils, [], (), pairs, own, shortened=long, pair=pair)


def two_models(model: Model, study: Study) -> tuple[Model, Model]:
    """The models of the clean and the corrupted run, where the study names a second one."""
    if model.pair is None or not is_named(model.pair[1].info.name, study.against):
        raise UserError(f"{study.against} is not loaded beside {model.info.name}: compare with it (M on the screen, --against in the shell)")
    return model.pair


def is_named(name: str, typed: str) -> bool:
    """Whether a model's name is what was typed, by one of its names."""
    return name in (typed, canonical(typed))


def same_tokens(pair: tuple[Model, Model], prompt: Prompt, check: CheckResult) -> None:
    """UserError where the second model's tokenizer reads the prompt, its answers or its foils as other tokens."""
    other = pair[1].check(replace(prompt, bos=check.clean.bos))
    for what, own, theirs in (("the prompt", [check.clean], [other.clean]), ("an answer", check.answers, other.answers), ("a foil", check.foils, other.foils)):
        if [r.ids for r in own] != [r.ids for r in theirs]:
            raise UserError(f"{pair[1].info.name} reads {what} as other tokens than {pair[0].info.name}: two models are compared on the same tokens only")
