"""Greedy discovery: take away the head whose loss costs the least faithfulness, again and again."""

import time
from collections.abc import Generator

import numpy as np

from model.bridge import Model
from techniques.circuits.bench import NONE, Bench
from techniques.circuits.requests import REST, Discover, DiscoverResult
from vocabulary.circuit import Circuit
from vocabulary.nodes import Node, UserError
from vocabulary.progress import forward_progress, time_left
from vocabulary.requests import Progress


def greedy(model: Model, ask: Discover) -> Generator[Progress, None, DiscoverResult]:
    """Take away the head whose loss costs the least faithfulness, again and again, until `nodes` are left or the next one would go below `target`."""
    begun, info = time.monotonic(), model.info
    if not 0 < ask.target <= 1.5 or ask.nodes < 0:
        raise UserError("the target is a faithfulness above 0, and nodes are not negative (0: as few as the target allows)")
    bench = Bench(model, ask.study, ask.rest, 0, False, False, True)
    yield from bench.prepare()
    left = [str(Node("head", n, h)) for n in range(info.n_layers) for h in range(info.n_heads)]
    (empty,) = yield from bench.values([(NONE, NONE)], "pace")
    t0, tries = time.monotonic(), [(frozenset(left) - {x}, NONE) for x in left[:4]]
    yield from bench.values(tries, "pace")
    expected = t0 - begun + (time.monotonic() - t0) / len(tries) * len(left) * (len(left) + 1) / 2
    gap = float((bench.whole - empty).mean())
    if abs(gap) < 1e-9:
        raise UserError("without any head the metric is the same: there is nothing to find; another metric or rest?")
    curve, scores, done, total = [(len(left), 1.0)], {}, 0, len(left) * (len(left) + 1) // 2
    faithful = 1.0

    def say(part: Progress) -> Progress:
        now, spent = done + part.done, time.monotonic() - begun
        words = f"greedy: {len(left)} heads left, faithfulness {faithful:.3f}, at most {time_left(spent / max(now, 1) * (total - now))}"
        return Progress(now, total, words)

    while left and not ask.dry and len(left) > max(ask.nodes, 1 if ask.nodes == 0 else 0):
        tries = [frozenset(left) - {x} for x in left]
        found = yield from forward_progress(bench.values([(k, NONE) for k in tries], "greedy"), say)
        found = (found - empty).mean(1) / gap
        done += len(left)
        best = int(np.argmax(found))
        if not ask.nodes and found[best] < ask.target:
            break
        scores[left[best]] = faithful - float(found[best])
        faithful = float(found[best])
        left.pop(best)
        curve.append((len(left), faithful))
    curve.append((0, 0.0))
    words = [f"greedy over heads, MLPs and embeddings stay; a head that is left out is set to {REST[ask.rest]}", f"{ask.study.metric.kind}@{ask.study.metric.pos}",
             f"until {ask.nodes} heads" if ask.nodes else f"while faithfulness stays at {ask.target:g} or above", f"{len(bench.whole)} prompts", info.dtype]  # fmt: skip
    found = Circuit(ask.name or "greedy", info.name, () if ask.dry else tuple(left), found="; ".join(words))
    order = list(scores)
    counts, values = (np.array(x) for x in zip(*sorted(curve)))
    if ask.dry:
        counts, values = np.zeros(0), np.zeros(0)
    return DiscoverResult(
        found, "greedy", tuple(order), np.array([scores[x] for x in order], np.float32), counts.astype(np.int32), values.astype(np.float32),
        faithful, expected, time.monotonic() - begun, bench.left_out, "; ".join(words),
    )  # fmt: skip
