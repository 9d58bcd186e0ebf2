"""Prompts and prompt sets, metrics, and the study that every analysis runs on. Never imports torch."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from vocabulary.typed import parse_json, read_text, user_path, whole_number
from vocabulary.nodes import Intervention, LABEL, UserError

Align = Literal["", "diff", "labels"]
ALIGNMENTS: dict[Align, str] = {
    "": "position by position, which needs equal lengths",
    "diff": "equal tokens, and replaced stretches of equal length (difflib)",
    "labels": "equal labels",
}


@dataclass(frozen=True)
class Prompt:
    """
    A clean text, an optional corrupted one, single-token answers and foils. `labels` name positions: (label, character offset into `clean`),
    the token that covers the character; END, the last token, needs no label; `corrupt_labels` do so for the corrupted text (missing ones: the aligned
    positions). `bos` None means what the model's tokenizer does by itself (ModelInfo.bos_habit). `alignment`: pairs (clean index, corrupted index) of positions that are patched
    across, for prompts of unequal length (empty: none of its own, ALIGNMENTS).
    """

    clean: str
    corrupt: str | None = None
    answers: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    labels: tuple[tuple[str, int], ...] = ()
    bos: bool | None = None
    corrupt_labels: tuple[tuple[str, int], ...] = ()
    alignment: tuple[tuple[int, int], ...] = ()


FAR = 10**9  # no prompt has so many positions


def read_prompt(obj: object) -> Prompt:
    """A prompt from one object of a prompt set: clean, corrupt, answer, foil (a string or a list of strings), labels, corrupt_labels, alignment."""
    if not isinstance(obj, dict) or not isinstance(obj.get("clean"), str):
        raise UserError('a prompt needs an object with at least "clean": "text"')
    unknown = set(obj) - {"clean", "corrupt", "answer", "foil", "labels", "bos", "corrupt_labels", "alignment"}
    if unknown:
        raise UserError(f"unknown field {min(unknown)!r}: a prompt has clean, corrupt, answer, foil, labels, bos, corrupt_labels, alignment")
    many = {k: [v] if isinstance(v := obj.get(k, []), str) else v for k in ("answer", "foil")}
    labels = obj.get("labels", {})
    if not all(isinstance(v, list) and all(isinstance(s, str) for s in v) for v in many.values()):
        raise UserError("answer and foil are strings or lists of strings")
    named = lambda x, text: isinstance(x, dict) and all(re.fullmatch(LABEL, k) and type(v) is int and 0 <= v < len(text) for k, v in x.items())  # noqa: E731
    if not named(labels, obj["clean"]):
        raise UserError("labels map a name to a character offset inside the clean text")
    theirs, pairs = obj.get("corrupt_labels", {}), obj.get("alignment", [])
    if not named(theirs, obj["corrupt"] if isinstance(obj.get("corrupt"), str) else ""):
        raise UserError("corrupt_labels map a name to a character offset inside the corrupted text")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 and all(type(i) is int and 0 <= i < FAR for i in p) for p in pairs):
        raise UserError("alignment is a list of pairs of positions, [[0, 0], [1, 1]]")
    if not isinstance(obj.get("corrupt"), str | None) or not isinstance(obj.get("bos"), bool | None):
        raise UserError("corrupt is a string and bos is true or false")
    return Prompt(
        obj["clean"],
        obj.get("corrupt"),
        tuple(many["answer"]),
        tuple(many["foil"]),
        tuple(labels.items()),
        obj.get("bos"),
        tuple(theirs.items()),
        tuple(map(tuple, pairs)),
    )


def read_prompt_set(path: str | Path) -> tuple[Prompt, ...]:
    """A .jsonl prompt set, one object a line; the error names file and line."""
    path = user_path(path)
    if not path.is_file():
        raise UserError(f"no prompt set at {path}: give the path of a .jsonl file with one prompt a line")
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                prompts.append(read_prompt(parse_json(line)))
            except UserError as error:
                raise UserError(f"{path.name} line {number}: {error}") from error
    if not prompts:
        raise UserError(f"{path} holds no prompt")
    return tuple(prompts)


# ------------------------------------------------------------------ metrics

MetricKind = Literal["logit_diff", "prob", "prob_diff", "logprob", "rank", "loss", "kl", "own"]
METRICS: dict[MetricKind, str] = {
    "logit_diff": "mean logit of the answers minus mean logit of the foils",
    "prob": "probability of the answers (summed)",
    "prob_diff": "probability of the answers minus probability of the foils (summed)",
    "logprob": "log probability of the answers (of their summed probability), nats",
    "rank": "rank of the best answer, 0 is the top",
    "loss": "mean next-token cross-entropy of the prompt itself, nats",
    "kl": "KL(unpatched clean run || this run) at the metric's position, nats",
    "own": "a function name(logits, tokens) of a Python file of your own",
}


@dataclass(frozen=True)
class Metric:
    """
    What is measured, at which position (an int, or a label such as END or S2). `own` names a function as FILE.py:NAME, `digest` pins its file ("": as it is).
    """

    kind: MetricKind = "logit_diff"
    pos: int | str = "END"
    own: str = ""
    digest: str = ""

    @property
    def whole(self) -> bool:
        """Whether it is of the whole run and no position."""
        return self.kind in ("loss", "own")

    @property
    def needs_answer(self) -> bool:
        return self.kind not in ("kl", "loss", "own")

    @property
    def words(self) -> str:
        """Kind and position in words; of one's own the function, its file and what pins it."""
        if self.kind == "own":
            file, _, name = self.own.rpartition(":")
            return f"{name} ({Path(file).name}{' ' * bool(self.digest)}{self.digest})"
        return self.kind if self.whole else f"{self.kind} at {self.pos}"


def read_place(text: str) -> int | str:
    """A position as it is typed: a number such as 10 or -1, or a label such as END or S2."""
    if (number := whole_number(text)) is not None:
        return number
    if not re.fullmatch(LABEL, text):
        raise UserError(f"{text[:60]!r} is not a position: write a number such as 10 or -1, or a label such as END or S2")
    return text


# ------------------------------------------------------------------ what analyses run on and speak of

Base = Literal["clean", "corrupt"]  # which prompt interventions act on
OneRun = Literal["now", "clean", "corrupt"]
Which = Literal["now", "clean", "corrupt", "clean-corrupt", "now-clean", "now-corrupt"]  # a run, or a difference of two
RUNS = get_args(OneRun)
WHICH = get_args(Which)


@dataclass(frozen=True)
class ReferenceText:
    """A text file that means are taken over: its path, how many of its first tokens, and what pins it ("": as it is)."""

    path: str = ""
    tokens: int = 20_000
    digest: str = ""

    @property
    def words(self) -> str:
        return f"text {Path(self.path).name}{' ' * bool(self.digest)}{self.digest}, its first {self.tokens} tokens"


@dataclass(frozen=True)
class Study:
    """
    What every analysis runs on: the prompt, the interventions, which prompt they act on (`base`), the metric, and the prompt set (for means). `saes`
    are the sources of the SAEs that feature nodes speak of, one a layer; `sae_error`: their error term is kept when a feature is changed. `align`,
    of ALIGNMENTS: how positions of clean and corrupted are matched where the prompt says nothing. `seed` is that of noise and resample. `text`: for means over one.
    """

    prompt: Prompt
    interventions: tuple[Intervention, ...] = ()
    base: Base = "clean"
    metric: Metric = Metric()
    prompt_set: tuple[Prompt, ...] = ()
    saes: tuple[str, ...] = ()
    sae_error: bool = True
    align: Align = ""
    seed: int = 0
    text: ReferenceText = ReferenceText()


@dataclass(frozen=True)
class TokenRow:
    """A tokenised text: ids, the text of each token, the index of each labelled position, and whether index 0 is a BOS token put there."""

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    bos: bool = False
