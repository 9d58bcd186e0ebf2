"""GGUF files: what transformers needs to open one, and what its header says. Their weights are dequantised as they are read."""

import struct
from collections import Counter
from functools import lru_cache
from pathlib import Path

import torch as t

from model.memory import first_line
from vocabulary.nodes import UserError

PLAIN = {"F32": t.float32, "F16": t.float16, "BF16": t.bfloat16}


def is_gguf(place: Path) -> bool:
    return place.suffix == ".gguf"


def place_of(place: Path) -> dict[str, str]:
    """A model's folder or GGUF file, as the arguments of transformers' `from_pretrained`."""
    return {"pretrained_model_name_or_path": str(place.parent), "gguf_file": place.name} if is_gguf(place) else {"pretrained_model_name_or_path": str(place)}


def read_kinds(file: Path) -> tuple[Counter, int]:
    """How many tensors of each type (Q4_1, F32 ...) a GGUF file holds, and its number of parameters. UserError for what is no whole GGUF file."""
    return read_header(file, file.stat().st_mtime_ns)


@lru_cache(4)
def read_header(file: Path, changed: int) -> tuple[Counter, int]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UserError(f"{file} is a GGUF file, and the package gguf, which reads these, is not installed: run uv sync") from error
    try:
        reader = GGUFReader(file)
        if (count := reader.get_field("split.count")) is not None and count.contents() > 1:
            raise UserError(f"{file} is one of {count.contents()} parts of a model: join them first (llama-gguf-split --merge)")
        return Counter(x.tensor_type.name for x in reader.tensors), sum(int(x.n_elements) for x in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError, OverflowError, struct.error) as error:
        raise UserError(f"{file} is truncated or not a GGUF file ({first_line(error)}): copy or download it again") from error


def dequantised(kinds: Counter) -> str:
    """The line that says what the weights were; "" where they were not quantised."""
    some = [name for name, _ in kinds.most_common() if name not in PLAIN]
    return f"weights dequantised from {', '.join(some)}: the numbers are this file's, not the published checkpoint's" if some else ""
