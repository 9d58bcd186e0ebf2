"""What an activation is replaced by: means over the prompt set, another prompt of it, noise."""

import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from model.memory import Chunks, block_bytes, chunk_bytes
from model.text_means import text_means
from vocabulary.nodes import FROM_TEXT, UserError
from vocabulary.prompts import Prompt, Study, TokenRow
from vocabulary.requests import Progress

BATCH = 32


def corrupted_rows(model: Model, prompts: tuple[Prompt, ...], align: str = "") -> list[TokenRow]:
    """The corrupted prompts of a set that the model can read, with their labels."""
    rows = [row for p in prompts if p.corrupt is not None and (row := model.tokens.pair(p, align, [], [])[1]) is not None]
    return [row for row in rows if 0 < len(row.ids) <= model.info.n_ctx and max(row.ids) < model.n_embed]


def kinds_of(row: TokenRow, labels: tuple[str, ...]) -> list[str]:
    """What each position of a prompt is in a mean by label: one of the labels, else the first position, else any other."""
    named = {row.labels[name]: name for name in reversed(labels) if name in row.labels}
    return [named.get(i, "first" if i == 0 else "other") for i in range(len(row.ids))]


def by_label(rows: list[TokenRow], own: list[TokenRow]) -> tuple[str, ...] | None:
    """None where all of these prompts have one length, so that means go position by position; else the labels that all corrupted prompts have."""
    if len({len(row.ids) for row in (*rows, *own)}) == 1:
        return None
    return tuple(name for name in sorted(rows[0].labels, key=rows[0].labels.get) if all(name in row.labels for row in rows))


def mean_in_words(model: Model, study: Study, own: list[TokenRow]) -> str:
    """How a mean over prompts of unequal length is taken; "" where it goes position by position."""
    rows = corrupted_rows(model, study.prompt_set, study.align)
    labels = by_label(rows, own) if rows else None
    if labels is None:
        return ""
    return f"prompts of unequal length, so the mean goes by label ({' '.join(labels)}); of the first position by itself, elsewhere over all other positions"


def means(
    model: Model, study: Study, names: Iterable[str], op: str, own: list[TokenRow], every: list[TokenRow] | None = None
) -> Generator[Progress, None, dict[str, Tensor]]:
    """
    Means of hook points over the corrupted prompts of a study's set, or its text, for the prompts `own` (of one length): [1 or prompt, seq, ...] position by
    position where all, and `every` prompt of the whole question, have one length, by label where they have not; or [1, 1, ...] over all positions but the first. Kept in the cache.
    """
    names = list(dict.fromkeys(names))
    if op in FROM_TEXT:
        return (yield from text_means(model, study.text, names, op == "mean_text_pos", len(own[0].ids), averaged))
    prompts = study.prompt_set
    if not any(p.corrupt is not None for p in prompts):
        raise UserError("mean ablation needs a prompt set with corrupted prompts: open one first, or ablate to zero")
    rows = corrupted_rows(model, prompts, study.align)
    if not rows:
        raise UserError(f"this model can read none of the set's corrupted prompts: its context holds {model.info.n_ctx} tokens")
    if op == "mean_all" and max(len(r.ids) for r in rows) < 2:
        raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
    labels = by_label(rows, every or own) if op == "mean" else ()
    if op == "mean" and any(row.tail for row in own):
        raise UserError("a mean by position says nothing of the answer's own tokens, which logprob_sum reads: use mean_all, patch or zero")
    if labels is None:
        kinds = list(range(len(own[0].ids)))
        of = lambda row: kinds  # noqa: E731
    elif op == "mean":
        kinds = [*labels, "first", "other"]
        of = lambda row: kinds_of(row, labels)  # noqa: E731
        if any(name.endswith("pattern") for name in names):
            raise UserError("a pattern's mean needs corrupted prompts as long as the prompt: use a set of one template, or zero")
        if short := {k for row in own for k in of(row)} - {k for row in rows for k in of(row)}:
            raise UserError(f"a mean by label has no value for the position {min(short)}: no corrupted prompt of the set has one; use mean_all")
    else:
        kinds, of = ["other"], but_first
    how = (op, ("by label", *labels)) if labels else (op,)
    found = yield from sums_by_kind(model, rows, names, kinds, of, how)
    if not labels:
        return {name: x[None] for name, x in found.items()}
    places = t.tensor([[kinds.index(k) for k in of(row)] for row in own])
    return {name: x[places.to(x.device)] for name, x in found.items()}


def but_first(row: TokenRow) -> list[str | None]:
    """All positions are of one kind, but the first is of none."""
    return [None, *["other"] * (len(row.ids) - 1)]


def averaged(model: Model, rows: list[tuple[int, ...]], names: list[str], by_position: bool, words: str) -> Generator[Progress, None, dict[str, Tensor]]:
    """Means of hook points over rows of tokens: position by position [1, seq, ...] (rows of one length), or over all positions but the first [1, 1, ...]."""
    kinds = list(range(len(rows[0]))) if by_position else ["other"]
    of, how = ((lambda row: kinds), ("mean",)) if by_position else (but_first, ("mean_all",))
    found = yield from sum_up(model, [TokenRow(ids) for ids in rows], names, kinds, of, how, words)
    return {name: x[None] for name, x in found.items()}


def sums_by_kind(
    model: Model, rows: list[TokenRow], names: list[str], kinds: list, of: Callable[[TokenRow], list], how: tuple
) -> Generator[Progress, None, dict[str, Tensor]]:
    """The mean [kind, ...] of hook points over all positions of each kind, `of` one row; a kind that no position has is NaN. From the cache, or anew."""
    key = set_key([row.ids for row in rows])
    key += tuple(sorted({(row.ids, tuple(of(row))) for row in rows})) if how[1:] else ()
    out = {n: v for n in names if (v := model.cache.get((key, how, n))) is not None}
    if wanted := [n for n in names if n not in out]:
        found = yield from sum_up(model, rows, wanted, kinds, of, how, "means over the prompt set")
        for name, x in found.items():
            model.cache.put((key, how, name), x)
        out |= found
    return out


def sum_up(
    model: Model, rows: list[TokenRow], names: list[str], kinds: list, of: Callable[[TokenRow], list], how: tuple, words: str
) -> Generator[Progress, None, dict[str, Tensor]]:
    """The mean [kind, ...] of hook points as `sums_by_kind` gives it, in batches of rows of equal length; `words` say what it is for."""
    sums, counts, done = dict.fromkeys(names, 0.0), Counter(k for row in rows for k in of(row)), 0
    chunks = Chunks("prompts", lambda _: prompts_at_once(model, length))
    for length in sorted({len(r.ids) for r in rows}):
        same = [r for r in rows if len(r.ids) == length]

        def work(start: int, stop: int, same: list = same) -> tuple[list[TokenRow], dict[str, Tensor]]:
            return same[start:stop], model.forward(t.tensor([row.ids for row in same[start:stop]]), names)[1]

        for part in chunks.over(len(same), work):
            if isinstance(part, Progress):
                yield part
                continue
            some, got = part
            here = t.tensor([[[float(k == kind) for k in of(row)] for kind in kinds] for row in some]) if how[1:] else None  # [prompt, kind, seq]
            for name in names:
                x = got[name].float()
                match how:
                    case ("mean",):
                        x = x.sum(0)
                    case ("mean_all",):
                        x = x[:, 1:].sum((0, 1))[None]
                    case _:
                        x = t.einsum("pks,psx->kx", here.to(x.device), x.flatten(2)).view(len(kinds), *x.shape[2:])
                sums[name] = sums[name] + x
            done += len(some)
            yield Progress(done, len(rows), words)
    if how == ("mean",):
        return {name: (x / len(rows)).to(model.dtype) for name, x in sums.items()}
    count = t.tensor([counts[k] for k in kinds])
    return {name: (x / count.to(x.device).view(-1, *[1] * (x.ndim - 1))).to(model.dtype) for name, x in sums.items()}


def prompts_at_once(model: Model, length: int) -> int:
    """How many prompts of so many tokens run together: what the limit of bytes holds of the widest block, at most BATCH."""
    return max(1, min(BATCH, chunk_bytes(model.device) // (length * block_bytes(model.info, length, model.dtype.itemsize))))


@dataclass
class Drawable:
    """The set's corrupted prompts of one length, in the set's order, and where those of a prompt and of some token ids stand among them."""

    rows: list[tuple[int, ...]] = field(default_factory=list)
    of_prompt: dict[Prompt, list[int]] = field(default_factory=dict)
    of_ids: dict[tuple[int, ...], list[int]] = field(default_factory=dict)


def drawable(model: Model, study: Study) -> dict[int, Drawable]:
    """What prompts can be resampled from, by length. Read once for a set, which the last one is kept of."""
    known = model.notes.drawable
    if known is None or known[0] is not study.prompt_set or known[1] != study.align:
        found: dict[int, Drawable] = {}
        for prompt in study.prompt_set:
            for row in corrupted_rows(model, (prompt,), study.align):
                some = found.setdefault(len(row.ids), Drawable())
                some.of_prompt.setdefault(prompt, []).append(len(some.rows))
                some.of_ids.setdefault(row.ids, []).append(len(some.rows))
                some.rows.append(row.ids)
        known = model.notes.drawable = (study.prompt_set, study.align, found)
    return known[2]


def others_of(model: Model, study: Study, length: int, own: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The set's corrupted prompts of a length, and which of them are the prompt's own. UserError where there is no other."""
    some = drawable(model, study).get(length, Drawable())
    gone = sorted({*some.of_prompt.get(study.prompt, ()), *some.of_ids.get(own, ())})
    if len(some.rows) == len(gone):
        raise UserError(f"resample ablation needs a prompt set with another corrupted prompt of {length} tokens: open one, or ablate to zero")
    return some.rows, gone


def resampled(model: Model, study: Study, length: int, own: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Token ids of another corrupted prompt of the set, as long as the prompt and not its own, drawn with the seed (and the prompt's place in the set)."""
    rows, gone = others_of(model, study, length, own)
    drawn = int(np.random.default_rng((seed, place_in_set(study))).integers(len(rows) - len(gone)))
    for i in gone:
        drawn += drawn >= i
    return rows[drawn]


def place_in_set(study: Study) -> int:
    """Where the study's prompt stands in its set; 0 where it does not."""
    return study.prompt_set.index(study.prompt) if study.prompt in study.prompt_set else 0


def gaussian(shape: tuple[int, ...], key: tuple) -> Tensor:
    """Standard Gaussian noise, the same for the same key on every machine."""
    return t.randn(shape, generator=t.Generator().manual_seed(zlib.crc32(repr(key).encode())))


@t.no_grad()
def noise_scale(model: Model) -> float:
    """The standard deviation of token embeddings, over (at most) 4096 random tokens."""
    return model.bridge.embed(model.random_ids(4096).to(model.device)).float().std().item()


def set_key(rows: list[tuple[int, ...]]) -> tuple:
    """What names a set of token rows in the cache; their order does not matter."""
    return (hashlib.sha256(repr(sorted(rows)).encode()).hexdigest(),)
