"""SAEs, and what is fitted: lenses, an SAE, examples, a feature graph."""

import shutil
import time
from dataclasses import replace
from pathlib import Path

import torch as t

from gpu_checks.bench import Bench, Outcome, difference, number, one_line
from gpu_checks.loupe import (
    Engine,
    Examples,
    Feature,
    FeatureGraph,
    Features,
    FitJacobian,
    Lens,
    Load,
    Preflight,
    Run,
    Study,
    Sweep,
    TrainSae,
    TuneLens,
    parse_intervention,
    zoo_prompt,
)


def perfect_sae(path: Path, d: int, n: int, layer: int) -> None:
    """An SAE of n features that reproduces any activation: orthonormal bases and their negatives, the other features silent."""
    from sae_lens import SAE

    g, copies = t.Generator().manual_seed(0), n // (2 * d)
    bases = [t.linalg.qr(t.randn(d, d, generator=g))[0] for _ in range(copies)]
    both = t.cat([x for q in bases for x in (q, -q)], 1)
    rest = 0.01 * t.randn(d, n - both.shape[1], generator=g)
    about = {"hook_name": f"blocks.{layer}.hook_resid_post"}
    sae = SAE.from_dict({"architecture": "standard", "d_in": d, "d_sae": n, "apply_b_dec_to_input": True, "metadata": about})
    with t.no_grad():
        sae.W_enc.copy_(t.cat([both, rest], 1))
        sae.W_dec.copy_(t.cat([both / copies, rest], 1).T)
        sae.b_enc.zero_()
        sae.b_enc[both.shape[1] :] = -1
        sae.b_dec.zero_()
    sae.save_model(path)


def features(b: Bench) -> Outcome:
    """An SAE of 16,384 features: preflight, features, one feature, a sweep of them; against the CPU."""
    e, cpu = b.engine("gpt2", "float32"), b.engine("gpt2", "float32", "cpu")
    info, n = e.model.info, 256 if b.tiny else 16384
    layer, path = info.n_layers * 2 // 3, b.work / "sae"
    if not path.is_dir():
        perfect_sae(path, info.d_model, n, layer)
    source = str(path)
    s = replace(b.study(e), saes=(source,))
    asks = {
        "preflight": Preflight(s, source),
        "features": Features(s, source, order="attribution"),
        "features direct": Features(s, source, order="direct"),
        "feature": Feature(s, source, 3),
        "sweep": Sweep(s, "features", node=f"L{layer}.sae", k=4),
        "intervention": Run(replace(s, interventions=(parse_intervention(f"L{layer}.sae.f3=zero"),))),
    }
    rows, broken, worst = {}, {}, 0.0
    for name, ask in asks.items():
        try:
            b.fresh(e, ask)  # the SAE is read the first time
            got, seconds, gib = b.measured(lambda ask=ask: b.fresh(e, ask))
            found = difference(b.fresh(cpu, ask), got)
            rows[name] = {"s": number(seconds, 3), "gib": number(gib, 3), "relative": number(found["relative"], 2)}
            if name in ("preflight", "intervention", "sweep"):
                worst = max(worst, found["relative"])
        except Exception as error:
            broken[name] = one_line(error)
    return not broken and worst < 2e-3, {"features": n, "layer": layer, "analyses": rows, "broken": broken}


def fits(b: Bench) -> Outcome:
    """What trains, a few steps each on the zoo's model."""
    e, s, out = Engine(Load("zoo", device=b.device)), Study(zoo_prompt()), b.work / "fits"
    shutil.rmtree(out, ignore_errors=True)
    tuned, jacobian, n = str(out / "tuned"), str(out / "jacobian.pt"), 1000 if b.tiny else 5000
    asks = {
        "tuned lens": TuneLens(out=tuned, steps=4, batch=2),
        "its reading": Lens(s, kind="tuned", artefact=tuned),
        "jacobian lens": FitJacobian(out=jacobian, prompts=2, length=32),
        "its reading ": Lens(s, kind="jacobian", artefact=jacobian),
        "sae": TrainSae(out=str(out / "sae"), tokens=4 * n),
        "examples": Examples("zoo/L2.resid_post", tokens=n),
        "graph": FeatureGraph(s, "zoo/L1.resid_post", "zoo/L2.resid_post", 263),
    }
    rows, broken = {}, {}
    for name, ask in asks.items():
        start = time.monotonic()
        try:
            e.run(ask)
            b.sync()
            rows[name] = round(time.monotonic() - start, 2)
        except Exception as error:
            broken[name] = one_line(error)
    return not broken, {"seconds_each": rows, "broken": broken}
