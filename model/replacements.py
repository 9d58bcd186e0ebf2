"""What an activation is replaced by: means over the prompt set, another prompt of it, noise."""

import hashlib
import zlib
from collections.abc import Generator, Iterable

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from model.memory import Chunks, block_bytes, chunk_bytes
from model.text_means import text_means
from vocabulary.nodes import FROM_TEXT, UserError
from vocabulary.prompts import Study
from vocabulary.requests import Progress

BATCH = 32


def means(model: Model, study: Study, names: Iterable[str], op: str, seq: int) -> Generator[Progress, None, dict[str, Tensor]]:
    """
    Means of hook points over the corrupted prompts of a study's set, or its text: position by position (equal lengths needed), or over all positions but
    the first. Kept in the cache; the set runs in batches of prompts of equal length.
    """
    if op in FROM_TEXT:
        return (yield from text_means(model, study.text, names, op == "mean_text_pos", seq, averaged))
    prompts = study.prompt_set
    texts = [p.corrupt for p in prompts if p.corrupt is not None]
    if not texts:
        raise UserError("mean ablation needs a prompt set with corrupted prompts: open one first, or ablate to zero")
    rows = [model.row(p.corrupt, p.bos).ids for p in prompts if p.corrupt is not None]
    if too_long := [len(r) for r in rows if not 0 < len(r) <= model.info.n_ctx]:
        raise UserError(f"a corrupted prompt of the set has {too_long[0]} tokens and the context holds {model.info.n_ctx}")
    if op == "mean" and (other := sorted({len(r) for r in rows} - {seq})):
        raise UserError(
            f"a mean position by position needs corrupted prompts as long as the prompt: it has {seq} tokens and the set has some with {other[0]};"
            " use mean_all or a set of one template"
        )
    if op == "mean_all" and max(len(r) for r in rows) < 2:
        raise UserError("mean_all leaves out the first position, and the set's corrupted prompts have no other")
    key = set_key(rows)
    out = {n: v for n in names if (v := model.cache.get((key, (op,), n))) is not None}
    wanted = [n for n in dict.fromkeys(names) if n not in out]
    if wanted:
        out |= yield from averaged(model, rows, wanted, op == "mean", "means over the prompt set")
    for name in wanted:
        model.cache.put((key, (op,), name), out[name])
    return out


def averaged(model: Model, rows: list[tuple[int, ...]], names: list[str], by_position: bool, words: str) -> Generator[Progress, None, dict[str, Tensor]]:
    """Means of hook points over rows of tokens: position by position [1, seq, ...], or over all positions but the first [1, 1, ...]. Equal lengths run together."""
    sums, count, done = dict.fromkeys(names, 0.0), 0, 0
    chunks = Chunks("prompts", lambda _: prompts_at_once(model, length))
    for length in sorted({len(r) for r in rows}):
        same = [r for r in rows if len(r) == length]
        if not by_position and length < 2:
            continue

        def work(start: int, stop: int, same: list = same) -> tuple[int, dict[str, Tensor]]:
            return stop - start, model.forward(t.tensor(same[start:stop]), names)[1]

        for part in chunks.over(len(same), work):
            if isinstance(part, Progress):
                yield part
                continue
            n, got = part
            for name in names:
                x = got[name].float()
                sums[name] = sums[name] + (x.sum(0, keepdim=True) if by_position else x[:, 1:].sum((0, 1)))
            count += n * (1 if by_position else length - 1)
            done += n
            yield Progress(done, len(rows), words)
    means = {name: (total / count).to(model.dtype) for name, total in sums.items()}
    return means if by_position else {name: x[None, None] for name, x in means.items()}


def prompts_at_once(model: Model, length: int) -> int:
    """How many prompts of so many tokens run together: what the limit of bytes holds of the widest block, at most BATCH."""
    return max(1, min(BATCH, chunk_bytes(model.device) // (length * block_bytes(model.info, length, model.dtype.itemsize))))


def resampled(model: Model, study: Study, length: int, own: tuple[int, ...], seed: int) -> tuple[int, ...]:
    """Token ids of another corrupted prompt of the set, as long as the prompt and not its own, drawn with the seed (and the prompt's place in the set)."""
    rows = [model.row(p.corrupt, p.bos).ids for p in study.prompt_set if p.corrupt is not None and p != study.prompt]
    rows = [r for r in rows if len(r) == length and r != own]
    if not rows:
        raise UserError(f"resample ablation needs a prompt set with another corrupted prompt of {length} tokens: open one, or ablate to zero")
    return rows[np.random.default_rng((seed, place_in_set(study))).integers(len(rows))]


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
