"""Examples of features over parts of a text, joined: the whole text's largest activations, counts and pairs. Numbers alone: it needs no model."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from techniques.features.requests import Examples, ExamplesPart, ExamplesResult, TrainSae
from vocabulary.parts import Scattered, one_fit
from vocabulary.requests import ModelInfo

TOGETHER = 10  # features that are named for firing with one
MOST = 20_000  # examples in one answer


def examples_each(k: int, features: int) -> int:
    """How many examples of each of so many features an answer holds."""
    return max(1, min(k, MOST // features))


def fires_with(indices: Sequence[int], fires: np.ndarray, asked: np.ndarray, both: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each feature those that it fires with, the largest share of tokens (Jaccard) first, and that share [feature, m]; m is 0 where pairs were not counted."""
    where = {int(i): j for j, i in enumerate(asked)}
    m = min(TOGETHER, len(fires) - 1) if all(i in where for i in indices) else 0
    together, jaccard = np.zeros((len(indices), m), np.int32), np.zeros((len(indices), m), np.float32)
    for n, i in enumerate(indices if m else ()):
        share = both[where[i]] / np.maximum(fires + fires[i] - both[where[i]], 1)
        share[i] = -1
        together[n] = np.argsort(-share, kind="stable")[:m]
        jaccard[n] = share[together[n]]
    return together, jaccard


def join(ask: Examples, parts: Sequence[ExamplesPart], info: ModelInfo) -> ExamplesResult:
    """The k largest of all parts, one a piece of text; sums of counts. Equal activations stay in the order of the text."""
    results = [p.result for p in parts]
    first, k = results[0], examples_each(ask.k, len(results[0].indices))
    tokens, fires = sum(r.tokens for r in results), sum(p.fires for p in parts)
    best = lambda n: sorted((e for r in results for e in r.examples[n]), key=lambda e: -e.activation[e.at])[:k]  # noqa: E731
    together, jaccard = fires_with(first.indices, fires, parts[0].asked, sum(p.both for p in parts))
    return replace(
        first, examples=tuple(tuple(best(n)) for n in range(len(first.indices))), counts=sum(r.counts for r in results),
        density=(fires[list(first.indices)] / max(tokens, 1)).astype(np.float32), together=together, jaccard=jaccard, tokens=tokens,
        seconds=sum(r.seconds for r in results), cached=False, convention=first.convention.replace(f": {first.tokens} tokens", f": {tokens} tokens", 1),
    )  # fmt: skip


SCATTERED = {
    Examples: Scattered(
        lambda ask: None,
        join,
        size=lambda ask: max(1, ask.tokens // max(ask.length, 1)),
        cut=lambda ask, start, stop: replace(ask, part=(start, stop)),
        unit="pieces of text",
    ),
    TrainSae: one_fit("sae", "each step of a training depends on the one before"),
}
