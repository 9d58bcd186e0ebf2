"""Every analysis once, as a table of requests: for the checks of numbers and of half precision, and for the tests on a pretended device."""

from dataclasses import replace

from gpu_checks.loupe import (
    Attention,
    AttentionSet,
    Attribution,
    AttributionNeurons,
    AttributionSet,
    AttributionSources,
    Certify,
    Check,
    Circuit,
    Compare,
    Composition,
    Detect,
    Discover,
    Estimate,
    Generate,
    HeadStats,
    HeadWeights,
    Identities,
    Lens,
    Metric,
    PathPatch,
    QK,
    QKCheck,
    QKSet,
    Run,
    Sampling,
    Score,
    Singular,
    Study,
    Sweep,
    parse_intervention,
)

SWEEPS = ("z", "q", "k", "v", "pattern", "resid_pre", "resid_mid", "resid_post", "attn_mlp", "z_pos")


def readings(s: Study, over: Study, layer: int) -> dict[str, object]:
    """Outputs, lenses, attention, attribution and weights."""
    return {
        "check": Check(s.prompt),
        "run": Run(s),
        "lens": Lens(s),
        "lens_components": Lens(s, points=("L1.attn", "L1.mlp", "L1H1")),
        "attention": Attention(s, layer),
        "attention_weighted": Attention(s, layer, weighted=True),
        "attention_set": AttentionSet(replace(over, prompt_set=tuple(replace(p, labels=(("S", 0),)) for p in over.prompt_set)), labels=("S", "END")),
        "head_stats": HeadStats(s, source="random"),
        "attribution": Attribution(s),
        "attribution_set": AttributionSet(over),
        "attribution_sources": AttributionSources(s, layer=layer, head=1),
        "attribution_neurons": AttributionNeurons(s, layer=layer),
        "detect": Detect(s),
        "weights": HeadWeights(layer, 1, k=5),
        "singular": Singular(layer, 1, r=3),
        "composition": Composition(layer, 1),
        "identities": Identities(s),
        "qk": QK(s, layer, 1, source=2),
        "qk check": QKCheck(s, layer, 1, source=2, component="L0.mlp"),
        "qk set": QKSet(replace(over, prompt_set=tuple(replace(p, labels=(("S", 0),)) for p in over.prompt_set)), layer, 1, source="S"),
        "generate": Generate(replace(s, interventions=(parse_intervention("L1H1=zero"),)), Sampling(8)),
    }


def sweeps(s: Study, over: Study) -> dict[str, object]:
    """Every kind of sweep, every operation, metric and order; estimates."""
    hurt = replace(s, interventions=(parse_intervention("L1H1=zero"),))
    return {f"sweep {kind}": Sweep(s, kind) for kind in SWEEPS} | {
        "sweep cells": Sweep(s, "cells", node="L1H1"),
        "sweep neurons": Sweep(s, "neurons", node="L1.mlp", only=tuple((0, i) for i in range(32))),
        "sweep pairs": Sweep(s, "pairs", k=4),
        "sweep zero": Sweep(s, "nodes", "zero"),
        "sweep noise": Sweep(s, "nodes", "noise"),
        "sweep mean, set": Sweep(over, "nodes", "mean", over_set=True),
        "sweep resample, set": Sweep(over, "z", "resample", over_set=True),
        "sweep kl": Sweep(replace(s, metric=Metric("kl")), "z"),
        "sweep loss": Sweep(replace(s, metric=Metric("loss")), "z", "zero"),
        "sweep prob": Sweep(replace(s, metric=Metric("prob")), "z"),
        "sweep rank": Sweep(replace(s, metric=Metric("rank")), "z"),
        "sweep direct": Sweep(s, "z", effect="direct"),
        "sweep estimate first": Sweep(s, "z_pos", first="estimate"),
        "sweep plain": Sweep(s, "z", plain=True),
        "sweep set": Sweep(over, "attn_mlp", over_set=True),
        "sweep under interventions": Sweep(hurt, "z"),
        "estimate": Estimate(s, "z"),
        "estimate ig": Estimate(s, "resid_pre", "ig"),
        "estimate atp*": Estimate(s, "q", "atp_star"),
        "certify": Certify(s, "z_pos", top=2),
    }


def circuits(s: Study, over: Study, layer: int, name: str) -> dict[str, object]:
    """Paths, discovery, scores, and a run under interventions of every sort."""
    circuit = Circuit("c", name, ("L0H1", "L1H0", "L1.mlp"))
    changes = ("L1H1=zero", "L1.mlp=scale:0.5", "L0.resid_pre@3=patch", "L1H0=noise:1")
    return {
        "path": PathPatch(s, receivers=(f"L{layer + 1}H0.q",), convention="mlps"),
        "path direct": PathPatch(s),
        "eap": Discover(s, "eap"),
        "eap-ig": Discover(s, "eap-ig"),
        "clean-corrupted": Discover(s, "clean-corrupted"),
        "greedy": Discover(over, "greedy", nodes=3),
        "score": Score(over, circuit, ("faithfulness", "completeness", "minimality", "effects"), subsets=2, greedy=1),
        "compare": Compare(circuit, Circuit("d", name, ("L0H1", "L1H1"))),
        "interventions": Run(replace(s, interventions=tuple(parse_intervention(x) for x in changes))),
    }


def every(s: Study, over: Study, layer: int, name: str) -> dict[str, object]:
    """For a prompt, a set of prompts, a layer in the middle and the model's name."""
    return readings(s, over, layer) | sweeps(s, over) | circuits(s, over, layer, name)
