"""Two circuits side by side: what both hold, and of scored edges (or nodes) the ROC curve against the other one."""

import numpy as np

from techniques.circuits.drawings import published
from techniques.circuits.requests import Compare, CompareResult
from vocabulary.circuit import LOGITS, owner, parse_edge
from vocabulary.names import same_model
from vocabulary.nodes import UserError, parse_node


def compare(ask: Compare) -> CompareResult:
    """Overlap with another circuit, and of scored edges (or nodes) the ROC curve against it."""
    there = ask.other
    if ask.published:
        there, _ = published(ask.published)
    if not there.nodes and not there.edges:
        raise UserError("compare with what? Name a published circuit, a file or another circuit")
    heads = lambda c: {owner(n) for n in c.nodes}  # noqa: E731
    mine, theirs = heads(ask.circuit), heads(there)
    a, b = set(ask.circuit.edges), set(there.edges)
    if not same_model(ask.circuit.model, there.model):
        raise UserError(f"{ask.circuit.name} is a circuit of {ask.circuit.model} and {there.name} one of {there.model}")
    overlap = lambda x, y: len(x & y) / len(x | y) if x | y else np.nan  # noqa: E731
    wrong = right = np.zeros(0)
    area = np.nan
    if ask.edges and ask.scores:
        names, values = list(ask.edges), np.abs(np.array(ask.scores))
        truth = b
        if not b or "->" not in names[0]:  # the circuit has no edges: every node by its best edge
            best: dict[str, float] = {}
            for e, v in zip(names, values.tolist()):
                for end in {owner(parse_edge(e).sender), owner(parse_edge(e).receiver)} - {"embed", LOGITS} if "->" in e else {owner(e)}:
                    best[end] = max(v, best.get(end, 0.0))
            names, values, truth = list(best), np.array(list(best.values())), theirs
        hit = np.array([e in truth for e in names])
        if hit.any() and not hit.all():
            order = np.argsort(-values, kind="stable")
            last = np.append(np.diff(values[order]) != 0, True)  # ties are one step
            right = np.append(0.0, (np.cumsum(hit[order]) / hit.sum())[last])
            wrong = np.append(0.0, (np.cumsum(~hit[order]) / (~hit).sum())[last])
            area = float(np.trapezoid(right, wrong))
    words = ["nodes compared as whole heads and MLPs, positions left out", "overlap: in both / in either (Jaccard)"]
    words += ["ROC by |score|, ties in one step"] * (len(wrong) > 0)
    key = lambda x: (x.count("->"), parse_node(x.split("->")[0]).layer or 0, x)  # noqa: E731
    return CompareResult(
        ask.circuit.name, there.name, tuple(sorted((mine & theirs) | (a & b), key=key)), tuple(sorted((mine - theirs) | (a - b), key=key)),
        tuple(sorted((theirs - mine) | (b - a), key=key)), float(overlap(mine, theirs)), float(overlap(a, b)), wrong.astype(np.float32),
        right.astype(np.float32), area, there.found, "; ".join(words),
    )  # fmt: skip
