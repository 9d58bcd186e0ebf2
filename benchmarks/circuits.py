"""
Path patching against hand-written hooks on a HookedTransformer (two runs a sender, as its users write it): a random model of gpt2-small's shape, 15 tokens,
every head to one head's q, the first 2 or 10 tokens shared. Then the times of scores and of discovery on the embedded model's IOI set, and how well
attribution ranks the edges that were really cut. CPU seconds on one thread, both sides in turn, medians; equal to 1e-4 first. The last line is JSON.

    uv run benchmarks/circuits.py            # five rounds
    uv run benchmarks/circuits.py --quick    # one round, fewer senders by hand
"""

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch as t
from transformers import GPT2LMHeadModel

from techniques.circuits.edges import edge_runs
from engine import Engine
from techniques.circuits.requests import Discover, PathPatch, Score
from vocabulary.circuit import Circuit
from vocabulary.prompts import read_prompt_set, Study
from utils import ROOT, bold, cyan, endc, gray, purple, yellow

spec = importlib.util.spec_from_file_location("setting", Path(__file__).parent / "patching.py")  # the same random model, prompts and tolerance
setting = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setting)
RECEIVER = (10, 3)


def by_hand(model, study: Study, engine: Engine, senders: list[tuple[int, int]]) -> list[float]:
    """Through MLPs, noising: for each sender the run with other heads frozen, in which the receiver's q is read, then the run that gets it."""
    p = study.prompt
    clean, corrupt = (t.tensor([engine.model.row(x, False).ids]) for x in (p.clean, p.corrupt))
    a, f = (engine.model.answer(p.clean, x).ids[0] for x in (p.answers[0], p.foils[0]))
    names = [f"blocks.{n}.attn.hook_z" for n in range(12)]
    base = model.run_with_cache(clean, names_filter=lambda n: n in names)[1]
    new = model.run_with_cache(corrupt, names_filter=lambda n: n in names)[1]
    layer, head = RECEIVER
    at, out = f"blocks.{layer}.attn.hook_q", []
    for s, h in senders:
        got = {}

        def freeze(z, hook):
            return base[hook.name].clone()

        def patch(z, hook, h=h):
            z = base[hook.name].clone()
            z[:, :, h] = new[hook.name][:, :, h]
            return z

        def put(x, hook, got=got):
            x[:, :, head] = got["x"][:, :, head]
            return x

        hooks = [(n, patch if i == s else freeze) for i, n in enumerate(names[:layer])] + [(at, lambda x, hook, got=got: got.__setitem__("x", x.clone()))]
        model.run_with_hooks(clean, fwd_hooks=hooks, stop_at_layer=layer + 1)
        logits = model.run_with_hooks(clean, fwd_hooks=[(at, put)])[0, -1]
        out.append(float(logits[a] - logits[f]))
    return out


def timed(what) -> tuple[float, object]:
    t0 = time.process_time()
    out = what()
    return time.process_time() - t0, out


def path_patching(quick: bool) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        setting.build(Path(folder))
        engine = Engine(folder)
        model = setting.hooked_transformer(GPT2LMHeadModel.from_pretrained(folder))
        figures = {}
        rng = np.random.default_rng(0)
        every = [(n, h) for n in range(RECEIVER[0]) for h in range(12)]
        some = [every[i] for i in rng.choice(len(every), 6 if quick else 24, replace=False)]
        for shared in (2, 10):
            study = Study(setting.prompts(1, shared)[0])
            ask = PathPatch(study, tuple(f"L{n}H{h}" for n, h in every), (f"L{RECEIVER[0]}H{RECEIVER[1]}.q",), convention="mlps")
            engine.run(ask)  # what is tried once a model is not timed
            ours, theirs = [], []
            for _ in range(1 if quick else 5):
                engine.model.cache.clear()
                seconds, result = timed(lambda ask=ask: engine.run(ask))
                ours.append(seconds)
                seconds, values = timed(lambda study=study: by_hand(model, study, engine, some))
                theirs.append(seconds / len(some) * len(every))
            error = max(abs(float(result.values[n + 1, h]) - v) for (n, h), v in zip(some, values))
            assert error < setting.TOL, f"the two differ by {error:.2g}"
            ratio = statistics.median(theirs) / statistics.median(ours)
            figures[f"path_{shared}"] = round(ratio, 1)
            print(
                f"{cyan}every head -> L{RECEIVER[0]}H{RECEIVER[1]}.q, {shared} shared: {statistics.median(ours):.2f} s, {ratio:.1f} times as fast, error {error:.1g}{endc}"
            )
    return figures


def zoo(quick: bool) -> dict[str, float]:
    engine, figures = Engine("zoo"), {}
    some = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[: 8 if quick else 32]
    study = Study(some[0], prompt_set=some)
    for method in ("eap", "eap-ig", "clean-corrupted", "eap-ig-activations", "acdc", "greedy"):
        seconds, r = timed(lambda method=method: engine.run(Discover(study, method, threshold=0.15)))
        figures[method] = round(seconds, 2)
        heads = sum("H" in n for n in r.circuit.nodes)
        print(f"{cyan}{method:20}{seconds:7.1f} s (estimate {r.expected:.1f}), {heads} heads, {len(r.circuit.edges)} edges, faithfulness {r.score:.3f}{endc}")
    for what in (("faithfulness", "effects"), ("completeness",), ("minimality",)):
        seconds, _ = timed(lambda what=what: engine.run(Score(study, Circuit("c", "zoo", ("L0H1", "L0H3", "L3H2", "L3H3")), what, "patch")))
        figures[what[0]] = round(seconds, 2)
        print(f"{cyan}{' and '.join(what):28}{seconds:7.1f} s{endc}")

    def ended(steps):
        while True:
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value

    runs = ended(edge_runs(engine.model, study, "patch"))
    rank = lambda x: np.argsort(np.argsort(np.abs(x)))  # noqa: E731
    for method in ("eap", "eap-ig"):
        r = engine.run(Discover(study, method))
        true = np.concatenate([ended(run.run([run.mask(None, [e]) for e in r.edges])) for run in runs], 1).mean(1) - float(
            np.concatenate([x.value for x in runs]).mean()
        )
        figures[f"{method}_rank"] = round(float(np.corrcoef(rank(true), rank(r.scores))[0, 1]), 3)
        print(f"{purple}{method} against {len(r.edges)} edges really cut: rank correlation of sizes {figures[f'{method}_rank']:.3f}{endc}")
        for i in np.argsort(-np.abs(true - r.scores))[:5].tolist():
            print(f"{gray}  {r.edges[i]:18} cut {true[i]:+.3f}, score {r.scores[i]:+.3f}{endc}")
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    t.set_num_threads(1)
    print(f"{bold}circuits, one thread{endc}{yellow}{' (quick)' if quick else ''}{endc}")
    with t.no_grad():
        figures = path_patching(quick)
    print(json.dumps(figures | zoo(quick)))
