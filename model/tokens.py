"""Text as a model's tokens and tokens as text, and what is wrong with a prompt."""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch as t
from torch import Tensor

from model import chats
from vocabulary import alignment as align
from vocabulary.chat import Chat
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, TokenRow
from vocabulary.requests import CheckResult, ModelInfo

BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_OF = {chr(b): b for b in BYTES} | {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in BYTES)}


def bos_habit(tokenizer, trained: bool | None) -> tuple[bool, str]:
    """Whether prompts get BOS unasked, and why: as the model's config says that it was trained (`trained_with_bos`), else as its tokenizer does by itself."""
    if tokenizer.bos_token_id is None:
        return False, "no BOS: this tokenizer has none"
    if trained is not None:
        return (
            trained,
            "BOS in front: the model's config says that it was trained so" if trained else "no BOS: the model's config says that it was trained without",
        )
    own, plain = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (True, False))
    front = own[: next((i for i in range(len(own)) if own[i : i + len(plain)] == plain), 0)]
    if front == [tokenizer.bos_token_id]:
        return True, "BOS in front: this tokenizer adds it"
    others = " ".join(tokenizer.convert_ids_to_tokens(front))
    return False, f"no BOS: this tokenizer puts {others} in front, which is left out" if front else "no BOS: this tokenizer adds none"


class Tokens:
    """What a tokenizer knows, for a model with `n_embed` embeddings. Rows and spellings are remembered."""

    refused: dict[str, str] = {}  # what can't be asked of a model with these tokens, and why

    def __init__(self, tokenizer, info: ModelInfo, n_embed: int):
        self.tokenizer, self.info, self.n_embed, self.bos = tokenizer, info, n_embed, tokenizer.bos_token_id
        self.texts: dict[int, str] = {}
        self.rows: dict[tuple, TokenRow] = {}

    def text(self, i: int) -> str:
        """The text of one token, alone: spaces kept, an incomplete UTF-8 sequence as its bytes (\\xe4)."""
        if i not in self.texts:
            self.texts[i] = self.spell(i)
        return self.texts[i]

    def decode(self, ids: Iterable[int]) -> str:
        """Tokens as one text; an incomplete character at the end is �."""
        return self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)

    def output_text(self, i: int) -> str:
        """The text of a token that the model predicts."""
        return self.text(i)

    def spell(self, i: int) -> str:
        piece = self.tokenizer.convert_ids_to_tokens(i) if i < len(self.tokenizer) else None
        if piece is None:
            return f"[unused {i}]"
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
            code = int(byte[1], 16)
            return chr(code) if code < 128 else f"\\x{code:02x}"
        if "▁" in piece:
            return piece.replace("▁", " ")
        text = self.tokenizer.decode([i], clean_up_tokenization_spaces=False)
        if "\ufffd" in text and all(c in BYTE_OF for c in piece):
            return bytes(BYTE_OF[c] for c in piece).decode("utf-8", errors="backslashreplace")
        return text

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=self.tokenizer.is_fast, verbose=False)
        return list(out["input_ids"]), [tuple(o) for o in out.get("offset_mapping", [])]

    def written(self, text: str | Chat) -> str:
        """The text of a prompt: a chat's as the tokenizer's template writes it."""
        return text if isinstance(text, str) else chats.render(self.tokenizer, text)

    def row(self, text: str | Chat, bos: bool | None, labels: tuple[tuple[str, int], ...] = ()) -> TokenRow:
        key = (text, bos, labels)
        if key not in self.rows:
            if len(self.rows) > 8192:
                self.rows.clear()
            self.rows[key] = (self.read_row if isinstance(text, str) else self.read_chat)(text, bos, labels)
        return self.rows[key]

    def read_row(self, text: str, bos: bool | None, labels: tuple[tuple[str, int], ...]) -> TokenRow:
        """A text as tokens. A text that starts with BOS gets no second one; asked for one, that is an error."""
        ids, offsets = self.encode(text)
        starts = self.bos is not None and ids[:1] == [self.bos]
        if bos and self.bos is None:
            raise UserError("this model's tokenizer has no BOS token: turn BOS off")
        if bos and starts:
            raise UserError(f"the text starts with {self.info.bos} itself, and BOS would come twice: take it out of the text or turn BOS off")
        add = not starts and (self.info.default_bos if bos is None else bos)
        if labels and not self.tokenizer.is_fast:
            raise UserError("labels need a fast tokenizer (tokenizer.json)")
        where = {}
        for name, offset in labels:
            covering = [i for i, (a, b) in enumerate(offsets) if a <= offset < b]
            if not covering:
                raise UserError(f"label {name}: no token covers character {offset} of the prompt")
            where[name] = covering[-1] + add
        ids = [self.bos] * add + ids
        if ids:
            where["END"] = len(ids) - 1
        return TokenRow(tuple(ids), tuple(self.text(i) for i in ids), where, add or starts)

    def read_chat(self, chat: Chat, bos: bool | None, labels: tuple[tuple[str, int], ...]) -> TokenRow:
        """A chat as the tokens of what its template writes; BOS is there where the template has it, and nowhere else."""
        text = self.written(chat)
        own = self.own(chat)
        if labels and own is None:
            raise UserError(f"label {labels[0][0]}: this chat template changes what the turns say, so a label's place in them is not known")
        places = [(name, chats.character(own, place)) for name, place in labels]
        if lost := [name for name, place in places if place is None]:
            raise UserError(f"label {lost[0]}: the chat template leaves its character out")
        ids, offsets = self.encode(text)
        starts = self.bos is not None and ids[:1] == [self.bos]
        if bos is not None and bos is not starts:
            raise UserError(f"a chat is asked as its template has it, {'with' if starts else 'without'} BOS: let BOS be as it is by itself (<, or no --bos)")
        row = self.read_row(text, False, tuple(places))
        return replace(row, template=chats.template_tokens(own, offsets) if own is not None else ())

    def own(self, chat: Chat) -> chats.Own | None:
        """Which characters of a chat's text are its turns' own; None where that can't be told."""
        return chats.own_characters(self.tokenizer, chat, self.written(chat)) if self.tokenizer.is_fast else None

    def answer(self, clean: str | Chat, text: str) -> TokenRow:
        """An answer as the tokens that would follow the clean prompt; alone when it merges with the prompt's end."""
        clean = self.written(clean)
        base, full = self.encode(clean)[0], self.encode(clean + text)[0]
        ids = full[len(base) :] if base and full[: len(base)] == base else self.encode(text)[0]
        return TokenRow(tuple(ids), tuple(self.text(i) for i in ids), {"END": len(ids) - 1} if ids else {})

    def check(self, prompt: Prompt, how: str = "") -> CheckResult:
        """The prompt's rows, its alignment (`how` of ALIGNMENTS), and what is wrong with it."""
        problems, hints = [], []
        clean, corrupt, pairs = self.pair(prompt, how, problems, hints)
        text = prompt.clean if clean.ids else ""
        sides = [self.side(what, texts, text, problems, hints) for what, texts in (("answer", prompt.answers), ("foil", prompt.foils))]
        both = {r.ids[:1] for r in sides[0]} & {r.ids[:1] for r in sides[1]}
        if both and not problems:
            hints.append(
                "a token is both answer and foil" if all(len(r.ids) == 1 for side in sides for r in side) else "an answer and a foil begin with the same token"
            )
        return CheckResult(clean, corrupt, *sides, tuple(problems), tuple(hints), pairs)

    def pair(self, prompt: Prompt, how: str, problems: list[str], hints: list[str]) -> tuple[TokenRow, TokenRow | None, align.Pairs]:
        """The clean and the corrupted prompt as tokens, and their alignment; what is wrong with them is added to the problems and hints."""
        pairs = ()

        def read(what: str, text: str | Chat, labels: tuple = ()) -> TokenRow:
            try:
                row = self.row(text, prompt.bos, labels)
            except UserError as error:
                problems.append(f"{what}: {error}")
                return TokenRow()
            if not text:
                problems.append(f"{what} is empty: type a text")
            elif len(row.ids) > self.info.n_ctx:
                problems.append(f"{what} has {len(row.ids)} tokens and the model's context holds {self.info.n_ctx}: shorten it")
            elif bad := [i for i in row.ids if i >= self.n_embed]:
                problems.append(f"{what}: token {bad[0]} ({self.text(bad[0])!r}) is not among the model's {self.n_embed} embeddings")
            if isinstance(text, tuple):
                hints.extend([f"{what}: the tokens of this chat template can't be told from those of the turns, which it changes"] * (self.own(text) is None))
            elif prompt.bos is None and self.info.default_bos and text and not problems and self.encode(text)[0][:1] == [self.bos]:
                hints.append(f"{what} starts with {self.info.bos} itself: none was added")
            return row

        clean = read("the clean prompt", prompt.clean, prompt.labels)
        corrupt = None if prompt.corrupt is None else read("the corrupted prompt", prompt.corrupt, prompt.corrupt_labels)
        if corrupt is not None and clean.ids and corrupt.ids:
            n, m = len(clean.ids), len(corrupt.ids)
            if prompt.alignment or how:
                try:
                    corrupt = replace(corrupt, labels=align.find_labels(clean, corrupt, prompt.alignment))
                    pairs = align.align(prompt, clean, corrupt, how)
                except UserError as error:
                    problems.append(str(error))
            elif n == m:
                corrupt, pairs = replace(corrupt, labels={**clean.labels, **corrupt.labels}), align.align(prompt, clean, corrupt)
            else:
                hints.append(f"clean has {n} tokens and corrupted {m}: patching by position needs equal lengths, or an alignment (diff or labels)")
            if pairs and not align.is_by_index(pairs, n, m):
                hints.append(align.words(pairs, n, m))
        return clean, corrupt, pairs

    def side(self, what: str, texts: tuple[str, ...], prompt: str | Chat, problems: list[str], hints: list[str]) -> tuple[TokenRow, ...]:
        """The answers (or foils) as tokens; what is wrong with them is added to the problems and hints."""
        chat, clean = isinstance(prompt, tuple), self.written(prompt)
        rows = []
        for text in texts:
            try:
                row = self.answer(clean, text)
            except UserError as error:
                problems.append(f"{what}: {error}")
                rows.append(TokenRow())
                continue
            spaced = self.answer(clean, " " + text) if text and not text[0].isspace() else TokenRow()
            advice = f"; {' ' + text!r} with a leading space is one token" if len(spaced.ids) == 1 and spaced.ids != row.ids else ""
            parts = " ".join(repr(s) for s in row.texts)
            if not row.ids:
                problems.append(f"{what} {text!r} is no token" if text else f"an {what} is empty")
            elif len(row.ids) > 1 and advice:
                problems.append(f"{what} {text!r} is {len(row.ids)} tokens ({parts}){advice}")
            elif row.ids[0] >= self.info.d_vocab:
                problems.append(f"{what} {text!r} is token {row.ids[0]}, which the model can't predict")
            elif len(row.ids) > 1:
                hints.append(
                    f"{what} {text!r} is {len(row.ids)} tokens ({parts}): the first, {row.texts[0]!r}, stands for it; the metric logprob_sum takes all of them"
                )
            elif advice and not clean[-1:].isspace():
                hints.append(f"{what} {text!r} has no leading space: after this prompt {' ' + text!r} is the usual token")
            elif chat and text[:1] == " " and clean[-1:].isspace() and len(self.answer(clean, text.lstrip()).ids) == 1:
                hints.append(f"{what} {text!r} has a leading space: at the start of the assistant's answer {text.lstrip()!r} is the usual token")
            rows.append(row)
        return tuple(rows)

    def random_ids(self, n: int, rows: int = 1, seed: int = 0) -> Tensor:
        """Random tokens, none of them special."""
        return random_ids(self.tokenizer, self.n_embed, n, rows, seed)


def random_ids(tokenizer, n_embed: int, n: int, rows: int = 1, seed: int = 0) -> Tensor:
    """Random tokens [rows, n] of a model with so many embeddings, none of them special."""
    special = set(tokenizer.all_special_ids)
    usual = t.tensor([i for i in range(min(len(tokenizer), n_embed)) if i not in special])
    return usual[t.randint(len(usual), (rows, n), generator=t.Generator().manual_seed(seed))]
