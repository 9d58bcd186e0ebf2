"""What differs between the weights of two models: relative norms by matrix and head, cosines of each head's OV and QK. Raw weights, float32."""

import math
from collections.abc import Generator

import numpy as np
import torch as t
from torch import Tensor

from model.bridge import Model
from techniques.weights.matrices import Layer
from techniques.weights.requests import WeightDifference, WeightDifferenceResult
from vocabulary.nodes import UserError
from vocabulary.requests import Progress

OF_HEADS = ("Q", "K", "V", "O", "OV", "QK")


def relative(one: Tensor, other: Tensor) -> float:
    """||other - one|| / ||one||, Frobenius norms; of zeros: 0 where nothing differs, else infinite."""
    change, size = (other.float() - one.float()).norm().item(), one.float().norm().item()
    return change / size if size else 0.0 if change == 0 else math.inf


def cosine(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> float:
    """Of two products a b^T, factors [d_model, d_head] each, with the Frobenius inner product: no [d_model, d_model] matrix is made."""
    inner = lambda x, y: ((x[0].T @ y[0]).double() * (x[1].T @ y[1]).double()).sum().item()  # noqa: E731
    size = math.sqrt(inner(one, one) * inner(other, other))
    return inner(one, other) / size if size else math.nan


def heads(one: Layer, other: Layer, n_heads: int) -> dict[str, list[float]]:
    """OF_HEADS by head, of one layer; the keys and values of a group of heads are each head's own."""
    out: dict[str, list[float]] = {name: [] for name in OF_HEADS}
    for h, kv in zip(range(n_heads), one.groups.tolist()):
        for name, a, b, i in (("Q", one.q, other.q, h), ("K", one.k, other.k, kv), ("V", one.v, other.v, kv), ("O", one.o, other.o, h)):
            out[name].append(relative(a[i], b[i]))
        out["OV"].append(cosine((one.v[kv], one.o[h].T), (other.v[kv], other.o[h].T)))
        out["QK"].append(cosine((one.q[h], one.k[kv]), (other.q[h], other.k[kv])))
    return out


def named(module: t.nn.Module) -> dict[str, Tensor]:
    """The parameters of a module by Hugging Face's names; a joint matrix that stands there as its parts is left out."""
    found = {name.replace("_original_component.", ""): p for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: p for name, p in found.items() if ".qkv." not in name or name.replace(".qkv.", ".q.") not in found}


@t.no_grad()
def differences(model: Model, ask: WeightDifference) -> Generator[Progress, None, WeightDifferenceResult]:
    """Every matrix of the second model against the first one's."""
    if model.pair is None:
        raise UserError("there is no second model: compare with one first (M on the screen, --against in the shell)")
    first, second, info = *model.pair, model.info
    by_head, by_part, why = {name: [] for name in OF_HEADS}, [], ""
    for layer in range(info.n_layers):
        try:
            found = heads(Layer(first, layer), Layer(second, layer), info.n_heads)
        except UserError as error:  # no heads of their own: the parts say it all
            found, why = {name: [math.nan] * info.n_heads for name in OF_HEADS}, str(error)
        for name, row in found.items():
            by_head[name].append(row)
        mine, theirs = (named(m.bridge.blocks[layer].original_component) for m in (first, second))
        by_part.append({name: relative(p, theirs[name]) for name, p in mine.items()})
        yield Progress(layer + 1, info.n_layers, "differences of weights")
    names = tuple(dict.fromkeys(name for row in by_part for name in row))
    inside = {id(p) for m in first.bridge.blocks for p in m.parameters()}
    mine, theirs = (named(m.bridge.original_model) for m in (first, second))
    rest = {name: relative(p, theirs[name]) for name, p in mine.items() if id(p) not in inside}
    array = lambda rows: np.array(rows, np.float32)  # noqa: E731
    words = [f"||{info.names[1]} − {info.names[0]}|| / ||{info.names[0]}||, Frobenius norms, raw Hugging Face weights in fp32, no norm folded"]
    words += ["cosines of W_V W_O and of W_Q W_K^T by head (positions not rotated)"]
    words += ["heads of a group share keys and values"] * (info.n_kv_heads < info.n_heads) + [f"no heads in some layers: {why}"] * bool(why)
    return WeightDifferenceResult(
        info.names, {name: array(rows) for name, rows in by_head.items()}, names, array([[row.get(n, math.nan) for n in names] for row in by_part]), rest,
        "; ".join(words),
    )  # fmt: skip
