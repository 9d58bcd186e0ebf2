"""Path patching, scores and discovery over parts of a prompt set, joined."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from techniques.circuits.drawings import write_circuit
from techniques.circuits.edge_index import edge_index, senders_of, strongest_in_words
from techniques.circuits.intervals import interval, ratio, warnings
from techniques.circuits.requests import Discover, DiscoverResult, Interval, PathPatch, Score, ScoreResult
from techniques.patching.scatter import join as join_tables
from vocabulary.circuit import connected
from vocabulary.nodes import UserError
from vocabulary.parts import Scattered
from vocabulary.requests import ModelInfo

SUMMED = ("eap", "eap-ig", "eap-ig-activations", "clean-corrupted")  # methods whose scores are means over prompts


def check(ask: PathPatch | Score | Discover) -> None:
    """What decides by the mean over the whole set, step by step, can't be cut into parts."""
    if ask.dry:
        raise UserError("an estimate of the time is of one machine: leave --dry out")
    if isinstance(ask, Score) and (some := [w for w in ask.what if w not in ("faithfulness", "effects")]):
        raise UserError(f"{some[0]} chooses subsets over the whole set: scatter faithfulness and effects (--what), and score {some[0]} on one machine")
    if isinstance(ask, Discover) and ask.method not in SUMMED:
        raise UserError(f"{ask.method} decides on each part of the circuit over the whole set: scatter {', '.join(SUMMED)}, or run it on one machine")


def join_scores(ask: Score, parts: Sequence[ScoreResult], info: ModelInfo) -> ScoreResult:
    """Intervals and ratios over the prompts of all parts; single effects are means of the parts' means, by their prompts."""
    prompts = np.concatenate([r.prompts for r in parts])
    order, first, counts = np.argsort(prompts), parts[0], [len(r.prompts) for r in parts]
    whole, alone, empty = (np.concatenate([getattr(r, name).values for r in parts])[order].astype(float) for name in ("model", "alone", "empty"))
    effects = np.average([r.effects for r in parts], axis=0, weights=counts).astype(np.float32)
    edges = bool(ask.circuit.edges) and ask.edges
    said = warnings(whole, empty, first.floor, not edges or connected(ask.circuit, info))
    return replace(
        first, model=interval(whole), alone=interval(alone), empty=interval(empty), faithfulness=ratio(alone, empty, whole), effects=effects,
        prompts=tuple(prompts[order].tolist()), seconds=sum(r.seconds for r in parts), expected=float("nan"), warning="; ".join(filter(None, (said, first.warning))),
    )  # fmt: skip


def join_discovered(ask: Discover, parts: Sequence[DiscoverResult], info: ModelInfo) -> DiscoverResult:
    """The circuit of the edges with the largest mean score over the prompts of all parts. Its faithfulness is another request's."""
    scores = np.average([r.scores for r in parts], axis=0, weights=[len(r.prompts) for r in parts])
    index, first = edge_index(info), parts[0]
    edges = index.named(scores, index.strongest(scores, ask.edges))
    words = first.convention.replace(strongest_in_words(ask.edges, ask.edges), strongest_in_words(ask.edges, len(edges)))
    circuit = replace(first.circuit, nodes=senders_of(edges), edges=edges, found=words)
    return replace(
        first, circuit=circuit, scores=scores.astype(np.float32), counts=np.array([len(edges)], np.int32), convention=words,
        prompts=tuple(sorted(i for r in parts for i in r.prompts)), seconds=sum(r.seconds for r in parts), expected=float("nan"),
    )  # fmt: skip


def faithfulness(ask: Discover, joined: DiscoverResult) -> Score:
    """What checks a found circuit by true ablation."""
    if not joined.circuit.edges:
        raise UserError("no edge is left on a path from embed to logits: take more edges")
    return Score(ask.study, joined.circuit, ("faithfulness",), ask.rest)


def with_faithfulness(ask: Discover, joined: DiscoverResult, score: ScoreResult) -> DiscoverResult:
    value: Interval = score.faithfulness
    warning = (
        joined.warning
        if np.isfinite(value.mean)
        else "; ".join(filter(None, ("model and empty circuit have the same metric: no faithfulness", joined.warning)))
    )
    return replace(joined, faithfulness=np.array([value.mean], np.float32), score=value.mean, seconds=joined.seconds + score.seconds, warning=warning)


def write(ask: Discover, result: DiscoverResult, parts: object, folder: Path) -> DiscoverResult:
    write_circuit(result.circuit, folder / "circuit.json")
    return result


SCATTERED = {
    PathPatch: Scattered(check, join_tables),
    Score: Scattered(check, join_scores),
    Discover: Scattered(check, join_discovered, faithfulness, with_faithfulness, write),
}
