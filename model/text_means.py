"""Means of hook points over a text file: over all positions but the first, or position by position. Kept on disk under the text's and the model's digests."""

import hashlib
from collections.abc import Callable, Generator, Iterable
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.artefacts import fingerprint, save
from model.bridge import Model
from vocabulary.files import folder
from vocabulary.nodes import UserError
from vocabulary.prompts import ReferenceText
from vocabulary.requests import Progress
from vocabulary.typed import read_text, user_path

WINDOW = 128  # tokens of a window that is averaged over all positions


@lru_cache(4)
def read_file(path: Path, changed: int, size: int) -> tuple[str, str]:
    """A text and the first eight digits of its sha256; read once as long as it is as it was."""
    text = read_text(path)
    return text, hashlib.sha256(text.encode()).hexdigest()[:8]


def pinned(text: ReferenceText) -> tuple[str, ReferenceText]:
    """The text, and its name with the digest that it has now. UserError where it is missing or not what was chosen."""
    if not text.path:
        raise UserError("a mean over a text needs one: --mean-text FILE on the command line, A on the screen")
    path = user_path(text.path).resolve()
    if not path.is_file():
        raise UserError(f"there is no text file {path} to take means over")
    words, digest = read_file(path, path.stat().st_mtime_ns, path.stat().st_size)
    if text.digest and text.digest != digest:
        raise UserError(f"{path.name} has changed since it was chosen ({text.digest}, now {digest}): choose it again with A")
    return words, ReferenceText(str(path), text.tokens, digest)


def windows(model: Model, text: ReferenceText, seq: int | None) -> list[tuple[int, ...]]:
    """
    The text's first tokens as rows, one after the other, BOS in front of each where the model's prompts have it: of `seq` tokens for means by position; None:
    of WINDOW tokens, the last one of what is left.
    """
    if text.tokens < 1:
        raise UserError(f"{text.tokens} tokens of a text: at least 1")
    words, text = pinned(text)
    characters = 16 * text.tokens + 1000  # far more than so many tokens have
    ids = [i for i in model.encode(words[:characters])[0] if i < model.n_embed][: text.tokens]
    bos = [model.bos] * (model.info.default_bos and model.bos is not None)
    own = (min(WINDOW, model.info.n_ctx) if seq is None else seq) - len(bos)
    rows = [tuple(bos + ids[i : i + own]) for i in range(0, len(ids), own)] if own > 0 else []
    rows = [r for r in rows if (len(r) > 1 if seq is None else len(r) == seq)]
    if not rows:
        need = 2 - len(bos) if seq is None else own
        raise UserError(f"{Path(text.path).name}: its first {text.tokens} tokens are {len(ids)}, and a row needs {need}: take more tokens or a longer text")
    return rows


def text_means(
    model: Model, text: ReferenceText, names: Iterable[str], by_position: bool, seq: int, averaged: Callable
) -> Generator[Progress, None, dict[str, Tensor]]:
    """Means of hook points, as `replacements.means` gives them: [1, seq, ...] position by position, else [1, 1, ...]. From memory, from disk, or anew by `averaged`."""
    rows = windows(model, text, seq if by_position else None)
    key = (hashlib.sha256(repr((fingerprint(model), model.info.dtype, by_position, rows)).encode()).hexdigest(),)
    names = list(dict.fromkeys(names))
    out = {n: v for n in names if (v := model.cache.get((key, ("text",), n))) is not None}
    for name in [n for n in names if n not in out]:
        if (x := from_disk(key[0], name)) is not None:
            out[name] = x.to(model.device, model.dtype)
    if missing := [n for n in names if n not in out]:
        found = yield from averaged(model, rows, missing, by_position, f"means over {Path(text.path).name}")
        for name, x in found.items():
            save(folder("means"), file_name(key[0], name), {"mean": x.float()}, {"hook_point": name, "text": text.path})
            out[name] = x
    for name, x in out.items():
        model.cache.put((key, ("text",), name), x)
    return out


def file_name(key: str, name: str) -> str:
    return f"{key[:24]}-{name}.safetensors"


def from_disk(key: str, name: str) -> Tensor | None:
    """A kept mean; None where there is none that can be read."""
    path = folder("means") / file_name(key, name)
    try:
        return load_file(path)["mean"] if path.is_file() else None
    except (SafetensorError, OSError, KeyError):
        return None
