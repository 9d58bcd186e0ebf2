"""
How often the certificates of `engine.py certify` are right: each beside the full sweep, on prompts made from templates. One JSON line a case, then the counts.

A case is one prompt (or, with --set, a whole set), direction, kind, top and confidence. `held`: no cell outside the listed is larger than the bound. `wrong`: it was certified, and a cell
outside is larger than the last of the top. `claims`: cells that were called certain, `false` those of them that do not belong to the top. Intervals: Clopper and Pearson, 95 %.

    uv run benchmarks/certify.py                                                      # the zoo, a minute
    uv run benchmarks/certify.py --model FOLDER --device cuda --set 32 --out certify.jsonl   # on a card: stops beginning new cases after --seconds
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from scipy.stats import beta

from engine import Engine
from techniques.patching.requests import Certify, CertifyResult, Sweep, SweepResult
from techniques.sets.requests import MakeSet
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Load

TASKS = ("ioi", "agreement", "capitals", "greater-than", "induction", "docstring", "pronouns")
SETTINGS = ((10, 0.95), (5, 0.95), (20, 0.95), (10, 0.9), (10, 0.99))
SAME = 1e-4  # of the metric: effects that differ by less are not told apart


@dataclass(frozen=True)
class Case:
    model: str
    task: str
    prompts: int
    clean: str
    kind: str
    direction: str
    top: int
    confidence: float
    certified: bool
    wrong: bool
    held: bool
    claims: int
    false: int
    share: float
    cells: int
    bound: float
    last: float  # the last of the top, by the full sweep
    outside: float  # the largest outside what certify listed, by the full sweep
    seconds: float
    sweep_seconds: float


def compared(truth: SweepResult, found: CertifyResult) -> dict[str, object]:
    """What a certificate said beside the full sweep."""
    names = truth.nodes or tuple(f"{r} × {c}" for r in truth.rows for c in truth.cols)
    effects = {name: abs(e) for name, e in zip(names, (truth.values - truth.base).ravel().tolist(), strict=True) if np.isfinite(e)}
    sizes = np.sort(list(effects.values()))[::-1]
    outside = max((e for name, e in effects.items() if name not in found.nodes), default=0.0)
    last, sure = min(effects[n] for n in found.nodes), [n for n, c in zip(found.nodes, found.certain.tolist()) if c]
    return {
        "certified": found.certified, "wrong": found.certified and outside > last + SAME, "held": outside <= found.bound + SAME,
        "claims": len(sure), "false": sum(int((sizes > effects[n] + SAME).sum()) >= len(found.nodes) for n in sure), "share": found.ran / found.cells, "cells": found.cells,
        "bound": found.bound, "last": float(sizes[len(found.nodes) - 1]), "outside": outside,
    }  # fmt: skip


def cases(engine: Engine, task: str, prompts: tuple[Prompt, ...], args: argparse.Namespace, kind: str, direction: str) -> Iterator[Case]:
    """Over all these prompts where there are several: the full sweep, and a certificate for each setting."""
    over, study = len(prompts) > 1, Study(prompts[0], prompt_set=prompts if len(prompts) > 1 else ())
    begun = time.monotonic()
    truth = engine.run(Sweep(study, kind, "patch", direction, over_set=over))
    swept = time.monotonic() - begun
    for top, confidence in SETTINGS:
        begun = time.monotonic()
        try:
            found = engine.run(Certify(study, kind, top, args.method, direction, confidence, args.share, args.seed, over_set=over))
        except UserError as error:
            print(f"{task} {kind} top {top}: {error}", file=sys.stderr)
            continue
        facts = compared(truth, found)
        clean = str(prompts[0].clean)
        yield Case(
            args.model,
            task,
            len(prompts),
            clean,
            kind,
            direction,
            top,
            confidence,
            **facts,
            seconds=round(time.monotonic() - begun, 2),
            sweep_seconds=round(swept, 2),
        )


def interval(k: int, n: int) -> list[float]:
    """Clopper and Pearson's of k in n, 95 %."""
    low, high = beta.ppf(0.025, k, n - k + 1) if k else 0.0, beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return [round(float(low), 4), round(float(high), 4)]


def counts(some: list[Case]) -> dict[str, object]:
    n, certified, claims = len(some), sum(c.certified for c in some), sum(c.claims for c in some)
    wrong, lost = sum(c.wrong for c in some), n - sum(c.held for c in some)
    return {
        "cases": n, "certified": certified, "gave up": n - certified, "wrong": wrong, "wrong of certified": interval(wrong, certified) if certified else None,
        "bound exceeded": lost, "exceeded of cases": interval(lost, n), "claims": claims, "false claims": sum(c.false for c in some),
        "mean share": round(float(np.mean([c.share for c in some])), 3),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="zoo")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=3, help="of each task, one by one")
    parser.add_argument("--set", type=int, default=0, help="IOI prompts that are swept together first; 0: none")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--kinds", nargs="+", default=[], help="unset: z, and of the zoo z_pos, attn_mlp, mlp")
    parser.add_argument("--method", default="atp_qk")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--seed", type=int, default=1000, help="of prompts and subsets")
    parser.add_argument("--seconds", type=float, default=210, help="after these no new prompt is begun")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    begun, found = time.monotonic(), []
    engine = Engine(Load(args.model, device=args.device))
    kinds = args.kinds or (["z_pos", "attn_mlp", "mlp"] if args.model == "zoo" else ["z"])

    def put(line: dict) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as f:
                f.write(text + "\n")

    def take(task: str, prompts: tuple[Prompt, ...]) -> None:
        for kind in kinds:
            for direction in ("noise", "denoise"):
                if time.monotonic() - begun < args.seconds:
                    for case in cases(engine, task, prompts, args, kind, direction):
                        found.append(case)
                        put(asdict(case))

    if args.set:
        take("ioi", engine.run(MakeSet("ioi", args.set, args.seed, measured=False)).prompts)
    sets = {}
    for task in args.tasks:
        try:
            sets[task] = engine.run(MakeSet(task, args.prompts, args.seed, templates=15 if task == "ioi" else 1, measured=False)).prompts
        except UserError as error:
            print(f"{task}: {error}", file=sys.stderr)
    for i in range(args.prompts):  # tasks in turn, so that what is cut off is of all of them
        for task, prompts in sets.items():
            take(task, prompts[i : i + 1])
    groups = defaultdict(list)
    for c in found:
        groups[f"top {c.top} at {c.confidence:.0%}, {'set' if c.prompts > 1 else 'one prompt'}"].append(c)
        groups[f"top 10 at 95%, {c.kind}, {c.direction}, {'set' if c.prompts > 1 else 'one prompt'}"] += [c] if (c.top, c.confidence) == SETTINGS[0] else []
    for name, some in groups.items():
        if some:
            put({"counts": name, "model": args.model, "device": str(engine.model.device), **counts(some)})


if __name__ == "__main__":
    main()
