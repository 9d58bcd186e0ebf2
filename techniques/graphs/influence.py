"""Influence, pruning and scores of an attribution graph's matrix A [target, source], as Ameisen et al. 2025 and circuit-tracer define them."""

import numpy as np
import torch as t
from torch import Tensor


def shares(a: Tensor) -> Tensor:
    """|A| with rows that add up to 1 (or are 0)."""
    size = a.abs()
    return size.div_(size.sum(1, keepdim=True).clamp(min=1e-10))


def flow(normalised: Tensor, weights: Tensor) -> Tensor:
    """weights @ (N + N² + ...) [node] of shares N without circles."""
    now = total = weights @ normalised
    for _ in range(len(weights)):
        if not now.any():
            return total
        now = now @ normalised
        total = total + now
    raise AssertionError("the graph has a circle")


def cut(scores: Tensor, share: float) -> Tensor:
    """The smallest score among the largest that make up a share of all."""
    ordered = t.from_numpy(np.sort(scores.flatten().numpy())).flip(0)
    reached = t.searchsorted(ordered.cumsum(0).div_(ordered.sum()), share)
    return ordered[min(int(reached), len(ordered) - 1)]


def cumulative(scores: Tensor) -> Tensor:
    """Of each score the share that it and all larger ones make up."""
    ordered, order = scores.sort(descending=True)
    out = t.zeros_like(scores)
    out[order] = ordered.cumsum(0) / ordered.sum()
    return out


def prune(a: Tensor, weights: Tensor, features: int, kept: int, node_share: float, edge_share: float) -> tuple[Tensor, Tensor, Tensor]:
    """
    Which nodes and edges stay, and every edge's score. Nodes: features first, the last `kept` (tokens and logits) always stay. A feature or an error stays
    only with an edge out of it, a feature only with one into it.
    """
    influence = flow(shares(a), weights)
    nodes = influence >= cut(influence, node_share)
    inner = len(a) - kept
    nodes[inner:] = True
    left = a * nodes[:, None] * nodes
    scores, edges = shares(left), left != 0
    del left
    scores *= (flow(scores, weights) + weights)[:, None]
    edges &= scores >= cut(scores, edge_share)
    while True:
        before = nodes.clone()
        nodes[:inner] &= edges[:, :inner].any(0)
        nodes[:features] &= edges[:features].any(1)
        edges &= nodes[:, None] & nodes
        if bool((before == nodes).all()):
            return nodes, edges, scores


def replacement_and_completeness(a: Tensor, weights: Tensor, errors: slice, tokens: slice) -> tuple[float, float]:
    """
    Replacement: of the influence that ends at tokens or errors, the tokens' part. Completeness: the part of all incoming edges that is not from errors,
    nodes weighted by their influence.
    """
    part = shares(a)
    influence = flow(part, weights)
    ends = influence[tokens].sum(), influence[errors].sum()
    output = influence + weights
    return float(ends[0] / (ends[0] + ends[1])), float(((1 - part[:, errors].sum(1)) * output).sum() / output.sum())
