"""
The hunt of docs/real_models.md: IOI on a real model, by the commands of that page, one after the other on one loaded model. What real_model.py runs with --hunt.
"""

import shlex
import time
from pathlib import Path

import numpy as np

STEPS = {
    "set": "set ioi --model {model} --corruption swap --out {folder}/ioi.jsonl",
    "attribution": "attribution --model {model} --set {folder}/ioi.jsonl --which clean --mean",
    "attention": "attention --model {model} --set {folder}/ioi.jsonl --which clean --mean",
    "path": "path --model {model} --set {folder}/ioi.jsonl --mean --receiver {mover}.q@END",
    "discover": "discover --model {model} --set {folder}/ioi.jsonl --method {method} --edges {edges} --out {folder}/ioi_circuit.json",
    "score": "score --model {model} --set {folder}/ioi.jsonl --circuit {folder}/ioi_circuit.json --rest patch --what faithfulness",
}


def top(values: np.ndarray, names: list[str], k: int = 5, size: bool = False) -> dict[str, float]:
    """The k largest (by size) of some named numbers; NaN is none."""
    flat = np.where(np.isnan(values), 0, values).ravel()
    order = np.argsort(-np.abs(flat) if size else -flat, kind="stable")[:k]
    return {names[i]: round(float(flat[i]), 4) for i in order}


# The mover is, of the heads that write the most of the logit difference, the one whose last position looks at IO the most (Wang et al. 2022).


def figures(name: str, result: object, info: object, known: dict) -> dict:
    """What the page says of a step."""
    heads = [f"L{n}H{h}" for n in range(info.n_layers) for h in range(info.n_heads)]
    match name:
        case "set":
            return {
                "prompts": len(result.prompts),
                "tokens": result.lengths[0],
                "right": result.right,
                "clean": round(result.clean, 4),
                "corrupted": round(result.corrupt, 4),
            }
        case "attribution":
            return {"heads": top(result.mean.heads, heads), "mean": round(float(result.logits.mean()), 4), "error": result.error}
        case "attention":
            end, io = result.labels.index("END"), result.labels.index("IO")
            rows = {a: [round(float(x), 4) for x in result.mean[(*map(int, a[1:].split("H")), end)]] for a in known["heads"]}
            return {"mover": max(rows, key=lambda a: rows[a][io]), "END to": list(result.labels), **rows}
        case "path":
            names = [result.address(r, c) for r in range(len(result.rows)) for c in range(len(result.cols))]
            change = (result.values - result.base) / (result.clean - result.corrupt)
            return {"base": round(result.base, 4), "senders": top(change, names, size=True)}
        case "discover":
            return {"edges": len(result.circuit.edges), "nodes": len(result.circuit.nodes), "faithfulness": round(result.score, 4)}
        case "score":
            f = result.faithfulness
            return {"faithfulness": round(f.mean, 4), "low": round(f.low, 4), "high": round(f.high, 4), "model": round(result.model.mean, 4), "alone": round(result.alone.mean, 4), "empty": round(result.empty.mean, 4)}  # fmt: skip
    raise AssertionError(name)


def hunt(engine: object, model: str, folder: Path, method: str = "eap-ig", edges: int = 300, only: tuple[str, ...] = tuple(STEPS)) -> dict[str, dict]:
    """Of each step its command, seconds and figures."""
    from techniques import shell

    known, out = {"model": model, "folder": str(folder), "method": method, "edges": edges}, {}
    for name in only:
        line = STEPS[name].format(**known)
        command, begun = shell.read_command(shlex.split(line)), time.monotonic()
        result = engine.run(command.request())
        command.finish(result, engine, lambda part: None)
        out[name] = {"command": f"engine.py {line}", "seconds": round(time.monotonic() - begun, 1), **figures(name, result, engine.model.info, known)}
        known |= {key: out[name][key] for key in ("heads", "mover") if key in out[name] and name in ("attribution", "attention")}
    return out
