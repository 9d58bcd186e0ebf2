"""Where features of an SAE fire in a text: maximal activating examples, histograms, density, and what fires with them; kept on disk."""

import contextlib
import hashlib
import math
import time
import zipfile
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch as t
from torch import Tensor

from model.artefacts import corpus, fingerprint, windows
from model.bridge import Model, Passed
from model.memory import in_chunks
from model.sae import CHUNK_BYTES, SparseAutoencoder
from model.sae_fit import REFUSE, choose, fit, views
from model.sae_loading import load
from techniques.features.requests import Example, Examples, ExamplesPart, ExamplesResult
from techniques.features.scatter import examples_each, fires_with
from techniques.features.training import at_once, counted
from vocabulary.files import folder, replacing
from vocabulary.nodes import UserError
from vocabulary.requests import Progress
from vocabulary.sets import EmptyPart

BEFORE, AFTER = 12, 6  # tokens shown around a maximum
EDGES = 2.0 ** (np.arange(-20, 25) / 2)
ALL_PAIRS = 2048  # up to so many features every pair is counted


def examples(model: Model, ask: Examples) -> Generator[Progress, None, ExamplesResult | ExamplesPart]:
    """The k texts in which each feature fires most, one a piece of `length` tokens; from the disk when the same was asked before. EmptyPart behind the text's end."""
    if ask.k < 1 or ask.tokens < 1:
        raise UserError("k and tokens must be at least 1")
    d = yield from load(model, ask.source)
    for index in ask.indices:
        d.check_index(index)
    start, file = time.time(), corpus(ask.text)
    yield Progress(0, 1, f"reading {file.name}")
    rows = windows(model, file, ask.length, 0)
    rows = rows[: max(1, ask.tokens // ask.length)]
    check_text(model, d, rows[:4], file)
    rows = rows if ask.part is None else rows[slice(*ask.part)]
    if not len(rows):
        raise EmptyPart(f"{file.name} has no more than {ask.part[0]} pieces")
    pairs = () if d.d_sae <= ALL_PAIRS else ask.indices
    recipe = (d.digest, d.view, fingerprint(model), model.info.dtype, hashlib.sha256(rows.numpy().tobytes()).hexdigest(), ask.k, pairs)
    kept = folder("saes") / ".cache" / f"{hashlib.sha256(repr(recipe).encode()).hexdigest()[:24]}.npz"
    cached = kept.is_file()
    found = read(kept) if cached else None
    if found is None:
        cached, found = False, (yield from collect(model, d, rows, ask.k, pairs))
        with contextlib.suppress(UserError), replacing(kept) as part:  # a full disk costs the next one time, and this one nothing
            np.savez(part, **found)
    whole = result(model, d, ask, rows, found, file, time.time() - start, cached)
    return whole if ask.part is None else ExamplesPart(whole, *(np.asarray(found[name]) for name in ("fires", "asked", "both")))


def read(file: Path) -> dict[str, np.ndarray] | None:
    try:
        with np.load(file) as data:
            return dict(data)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):  # half a file: made again
        return None


def activations(model: Model, d: SparseAutoencoder, ids: Tensor, out: bool = False) -> tuple[Tensor, ...]:
    """What the SAE reads (and writes) [row, seq, ...]; the forward pass ends there."""
    got: dict[str, Tensor] = {}

    def grab(name: str, last: bool):
        def keep(x: Tensor) -> None:
            got[name] = x.detach()
            if last:
                raise Passed

        return name, keep

    names = [d.point] if not out or d.point == d.out else [d.point, d.out]
    model.forward(ids, edits=[grab(n, n == names[-1]) for n in names])
    return got[d.point], got[names[-1]]


def check_text(model: Model, d: SparseAutoencoder, rows: Tensor, file: Path) -> None:
    x, y = activations(model, d, rows, True)
    here = counted(model, rows).to(x.device)
    found = {v: fit(d, x[here], y[here], v) for v in views(model)}
    d.view = choose(d, found, d.view if d.asked or d.passed else "auto")
    if not found[d.view].cosine >= REFUSE:
        raise UserError(
            f"{d.source} does not explain {file.name} (cosine {found[d.view].cosine:.2f}, at least {REFUSE} is needed): run its preflight on a prompt"
        )


@t.no_grad()
def collect(model: Model, d: SparseAutoencoder, rows: Tensor, k: int, pairs: tuple[int, ...]) -> Generator[Progress, None, dict[str, np.ndarray]]:
    """
    One pass. Of every feature [d_sae, k] the largest values (one a row), their rows and positions, and the activations around them; counts by size
    of activation; of pairs (all, or the features asked for) the tokens on which both fire.
    """
    n, length, width, bins = d.d_sae, rows.shape[1], BEFORE + 1 + AFTER, len(EDGES) - 1
    top, row, pos = t.zeros(n, k), t.full((n, k), -1, dtype=t.int32), t.zeros(n, k, dtype=t.int32)
    around = t.zeros(n, k, width, dtype=t.float16)
    counts, fires, tokens = t.zeros(n * bins, dtype=t.int32), t.zeros(n, dtype=t.int64), 0
    asked = t.tensor(pairs, dtype=t.long) if d.d_sae > ALL_PAIRS else t.arange(n)
    both = t.zeros(len(asked), n)
    edges, offsets = t.tensor(EDGES, dtype=t.float32), t.arange(-BEFORE, AFTER + 1)[None, :, None]
    size = max(1, CHUNK_BYTES // (4 * n * length))
    for part in in_chunks(len(rows), at_once(model, length), lambda a, b: (a, b, activations(model, d, rows[a:b])[0]), "pieces of text"):
        if isinstance(part, Progress):
            yield part
            continue
        begin, end, x = part
        for a in range(0, end - begin, size):
            f, ids = d.encode(x[a : a + size]), rows[begin + a : min(begin + a + size, end)]
            f = f.cpu() * counted(model, ids)[:, :, None]
            tokens += int(counted(model, ids).sum())
            flat = f.flatten(0, 1)
            where, index = flat.nonzero().unbind(1)
            value = flat[where, index].abs()
            fires += t.bincount(index, minlength=n)
            place = (t.bucketize(value, edges, right=True) - 1).clamp(0, bins - 1)
            counts.scatter_add_(0, index * bins + place, t.ones_like(index, dtype=t.int32))
            if len(asked):
                on = (flat != 0).float()
                both += on[:, asked].T @ on
            best, at = f.max(1)
            near = (at[:, None] + offsets).clamp(0, length - 1)
            shown = f.gather(1, near).permute(2, 0, 1)
            better = (best.amax(0) > top[:, -1]).nonzero()[:, 0]
            if len(better):
                m = len(ids)
                values = t.cat([top[better], best.T[better]], 1)
                top[better], order = values.topk(k, 1)
                new = t.arange(begin + a, begin + a + m, dtype=t.int32).expand(len(better), m)
                row[better] = t.cat([row[better], new], 1).gather(1, order)
                pos[better] = t.cat([pos[better], at.T[better].int()], 1).gather(1, order)
                shown = t.cat([around[better], shown[better].half()], 1)
                around[better] = shown.gather(1, order[:, :, None].expand(-1, -1, width))
        yield Progress(end, len(rows), f"examples: {end} of {len(rows)} pieces of text")
    out = {"top": top, "row": row, "pos": pos, "around": around, "counts": counts.view(n, bins), "fires": fires, "asked": asked, "both": both}
    return {name: x.numpy() for name, x in out.items()} | {"tokens": np.array(tokens)}


def result(model: Model, d: SparseAutoencoder, ask: Examples, rows: Tensor, found: dict, file: Path, seconds: float, cached: bool) -> ExamplesResult:
    indices = ask.indices or tuple(range(d.d_sae))
    k = examples_each(ask.k, len(indices))
    shown = tuple(tuple(read_example(model, rows, found, i, j) for j in range(k) if found["top"][i, j] > 0) for i in indices)
    together, jaccard = fires_with(indices, found["fires"], found["asked"], found["both"])
    few = f", {k} of {ask.k} examples each" if k < ask.k else ""
    words = (
        f"{ask.source} over {file.name}: {int(found['tokens'])} tokens in pieces of {rows.shape[1]} without position 0 and BOS; one example a piece{few}; "
        f"histogram of sizes of activations, density: share of tokens; fires with: Jaccard over tokens; {d.view} activation, {model.info.dtype}"
    )
    picked = list(indices)
    return ExamplesResult(
        d.info, indices, shown, found["counts"][picked], EDGES.astype(np.float32), (found["fires"][picked] / max(int(found["tokens"]), 1)).astype(np.float32),
        together, jaccard, int(found["tokens"]), seconds, cached, words,
    )  # fmt: skip


def read_example(model: Model, rows: Tensor, found: dict, index: int, j: int) -> Example:
    ids, at = rows[int(found["row"][index, j])].tolist(), int(found["pos"][index, j])
    first, last = max(0, at - BEFORE), min(len(ids), at + AFTER + 1)
    values = found["around"][index, j].astype(np.float64)[first - at + BEFORE : last - at + BEFORE].tolist()
    values[at - first] = float(found["top"][index, j])
    assert all(math.isfinite(v) for v in values)
    return Example(tuple(model.token_text(i) for i in ids[first:last]), tuple(values), at - first)
