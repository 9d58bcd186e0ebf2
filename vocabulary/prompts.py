"""Prompts and prompt sets, metrics, and the study that every analysis runs on. Never imports torch."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from vocabulary.chat import Chat, label_json, last_user, read_label, read_messages, start_of, text_json, turned
from vocabulary.typed import parse_json, read_text, user_path, whole_number
from vocabulary.nodes import Intervention, LABEL, UserError

Labels = tuple[tuple[str, int], ...]
Align = Literal["", "diff", "labels"]
ALIGNMENTS: dict[Align, str] = {
    "": "position by position, which needs equal lengths",
    "diff": "equal tokens, and replaced stretches of equal length (difflib)",
    "labels": "equal labels",
}


@dataclass(frozen=True)
class Prompt:
    """
    A clean text (or a chat), an optional corrupted one, answers and foils (of several tokens: the first stands for it, and the metric logprob_sum takes all).
    `labels` name positions: (label, character offset into `clean`, of a chat into its contents one after another),
    the token that covers the character; END, the last token, needs no label; `corrupt_labels` do so for the corrupted text (missing ones: the aligned
    positions). `bos` None means what the model's tokenizer does by itself (ModelInfo.bos_habit). `alignment`: pairs (clean index, corrupted index) of positions that are patched
    across, for prompts of unequal length (empty: none of its own, ALIGNMENTS).
    """

    clean: str | Chat
    corrupt: str | Chat | None = None
    answers: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    labels: Labels = ()
    bos: bool | None = None
    corrupt_labels: Labels = ()
    alignment: tuple[tuple[int, int], ...] = ()


FAR = 10**9  # no prompt has so many positions


def read_prompt(obj: object) -> Prompt:
    """
    A prompt from one object of a prompt set: clean, corrupt, answer, foil (a string or a list of strings), labels, corrupt_labels, alignment. Clean (also named
    messages) and corrupt may be chats; then a label is a pair, [number of the message, character offset in its content].
    """
    if isinstance(obj, dict) and "messages" in obj and "clean" not in obj:
        obj = {"clean" if k == "messages" else k: v for k, v in obj.items()}
    if not isinstance(obj, dict) or not isinstance(obj.get("clean"), str | list):
        raise UserError('a prompt needs an object with at least "clean": "text" (or "messages": a chat)')
    unknown = set(obj) - {"clean", "corrupt", "answer", "foil", "labels", "bos", "corrupt_labels", "alignment"}
    if unknown:
        raise UserError(f"unknown field {min(unknown)!r}: a prompt has clean, corrupt, answer, foil, labels, bos, corrupt_labels, alignment")
    clean, corrupt = (read_messages(v) if isinstance(v := obj.get(k), list) else v for k in ("clean", "corrupt"))
    many = {k: [v] if isinstance(v := obj.get(k, []), str) else v for k in ("answer", "foil")}
    labels = obj.get("labels", {})
    if not all(isinstance(v, list) and all(isinstance(s, str) for s in v) for v in many.values()):
        raise UserError("answer and foil are strings or lists of strings")
    read = lambda x, text: [(k, read_label(v, text)) for k, v in x.items()] if isinstance(x, dict) else [("", -1)]  # noqa: E731
    theirs, pairs = read(obj.get("corrupt_labels", {}), corrupt if isinstance(corrupt, str | tuple) else ""), obj.get("alignment", [])
    labels = read(labels, clean)
    for name, some, text in (("labels", labels, clean), ("corrupt_labels", theirs, corrupt)):
        if not all(re.fullmatch(LABEL, k) and v >= 0 for k, v in some):
            which = "clean" if name == "labels" else "corrupted"
            of = (
                f"character offset inside the {which} text"
                if not isinstance(text, tuple)
                else f"pair [message, character offset in its content] of the {which} chat"
            )
            raise UserError(f"{name} map a name to a {of}")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 and all(type(i) is int and 0 <= i < FAR for i in p) for p in pairs):
        raise UserError("alignment is a list of pairs of positions, [[0, 0], [1, 1]]")
    if not isinstance(corrupt, str | tuple | None) or not isinstance(obj.get("bos"), bool | None):
        raise UserError("corrupt is a string and bos is true or false")
    return Prompt(
        clean,
        corrupt,
        tuple(many["answer"]),
        tuple(many["foil"]),
        tuple(labels),
        obj.get("bos"),
        tuple(theirs),
        tuple(map(tuple, pairs)),
    )


def as_chat(prompt: Prompt, on: bool, system: str | None = None) -> Prompt:
    """
    A prompt of plain text with its texts as users' turns (behind a system's turn), and BOS as the template has it; back: the texts of the last users' turns.
    Labels stay where their text does. A prompt that is one already stays as it is.
    """
    if isinstance(prompt.clean, str) is not on:
        return prompt
    spots = [placed(labels, text, on, system) for labels, text in ((prompt.labels, prompt.clean), (prompt.corrupt_labels, prompt.corrupt))]
    texts = [turned(text, on, system) for text in (prompt.clean, prompt.corrupt)]
    return Prompt(*texts, prompt.answers, prompt.foils, spots[0], None, spots[1])


def placed(labels: Labels, text: str | Chat | None, on: bool, system: str | None) -> Labels:
    """The labels of a text that was turned into a chat, or back."""
    if on or not isinstance(text, tuple):
        return tuple((name, place + len(system or "")) for name, place in labels)
    number = last_user(text)
    first, last = start_of(text, number), start_of(text, number + 1)
    return tuple((name, place - first) for name, place in labels if first <= place < last)


def line_of(p: Prompt) -> str:
    """A prompt as a line of a prompt set: what read_prompt reads."""
    labels, others = ({name: label_json(place, text) for name, place in some} for some, text in ((p.labels, p.clean), (p.corrupt_labels, p.corrupt)))
    line = {"clean": text_json(p.clean), "corrupt": text_json(p.corrupt), "answer": list(p.answers), "foil": list(p.foils), "labels": labels}
    more = {"bos": p.bos, "corrupt_labels": others or None, "alignment": list(map(list, p.alignment)) or None}
    return json.dumps(line | {k: v for k, v in more.items() if v is not None}, ensure_ascii=False) + "\n"


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

MetricKind = Literal["logit_diff", "prob", "prob_diff", "logprob", "logprob_sum", "rank", "loss", "kl", "own"]
METRICS: dict[MetricKind, str] = {
    "logit_diff": "mean logit of the answers minus mean logit of the foils",
    "prob": "probability of the answers (summed)",
    "prob_diff": "probability of the answers minus probability of the foils (summed)",
    "logprob": "log probability of the answers (of their summed probability), nats",
    "logprob_sum": "log probability of the whole answer: of its tokens one after the other, each after those before it, summed, nats",
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
        """Whether it is read at several positions, or from the whole run."""
        return self.kind in ("loss", "logprob_sum", "own")

    @property
    def needs_answer(self) -> bool:
        return self.kind not in ("kl", "loss", "own")

    @property
    def words(self) -> str:
        """Kind and position in words; of one's own the function, its file and what pins it."""
        if self.kind == "own":
            file, _, name = self.own.rpartition(":")
            return f"{name} ({Path(file).name}{' ' * bool(self.digest)}{self.digest})"
        return self.kind if self.kind == "loss" else f"{self.kind} at {self.pos}"

    @property
    def short(self) -> str:
        """As it is typed; one's own in words."""
        return self.words if self.kind == "own" else f"{self.kind}@{self.pos}"

    @property
    def name(self) -> str:
        """Its kind, or the name of the function of one's own."""
        return self.own.rpartition(":")[2] if self.kind == "own" else self.kind


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
    of ALIGNMENTS: how positions of clean and corrupted are matched where the prompt says nothing. `seed` is that of noise and resample. `against`: the
    name of a second model, whose run of the clean prompt is the corrupted run. `text`: for means over one. `part`: only the prompts from (counted from 0) up
    to, not including, to of the set run, for each one's own values; means, draws and labels stay those of the whole set.
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
    against: str = ""
    text: ReferenceText = ReferenceText()
    part: tuple[int, int] | None = None


@dataclass(frozen=True)
class TokenRow:
    """
    A tokenised text: ids, the text of each token, the index of each labelled position, whether index 0 is a BOS token put there, and the indices of the
    tokens that are a chat template's, not of its turns. `tail`: so many tokens of an answer stand behind the prompt; END and negative positions are the prompt's.
    """

    ids: tuple[int, ...] = ()
    texts: tuple[str, ...] = ()
    labels: dict[str, int] = field(default_factory=dict)
    bos: bool = False
    template: tuple[int, ...] = ()
    tail: int = 0
