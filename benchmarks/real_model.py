"""
What each analysis costs on a real model: seconds, the same as forward passes on the same tokens, and peak memory over what was held before it.

    uv run benchmarks/real_model.py FOLDER --tokens 2000 --only attention,statistics
    uv run benchmarks/real_model.py FOLDER --hunt          what docs/real_models.md prints, as JSON

On a CPU passes are counted in processor time, which what else the machine does moves little, on another device in seconds. The last line, or with
--json the only one, is a JSON object.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import bold, cyan, endc, gray, red

WORDS = " the of and to in a is that for it as was with be by on not he his at".split(" ")[1:]
NAMES = ("attention", "next layer", "statistics", "run", "lens", "attribution", "sweep", "path", "eap-ig", "score")
STATUS, REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Row:
    """One analysis: seconds, forward passes, peak memory over before (MB); or why it failed."""

    name: str
    seconds: float
    passes: float
    peak_mb: float
    error: str = ""
    needs: float = 0.0  # the forward passes that the question itself needs, where that is known


# ------------------------------------------------------------------ measuring


def peak_bytes(fn: Callable[[], object], device: str) -> int:
    """The most memory while fn runs, over what was held before: torch's allocator on CUDA, else what the system counts for this process (Linux)."""
    import torch as t

    if device.startswith("cuda"):
        t.cuda.synchronize()
        t.cuda.reset_peak_memory_stats()
        before = t.cuda.memory_allocated()
        fn()
        t.cuda.synchronize()
        return t.cuda.max_memory_allocated() - before
    read = lambda key: next(int(x.split()[1]) << 10 for x in STATUS.read_text().splitlines() if x.startswith(key))  # noqa: E731
    REFS.write_text("5")
    before = read("VmRSS:")
    fn()
    return read("VmHWM:") - before


def measure(name: str, fn: Callable[[], object], device: str, unit: float = 0.0) -> Row:
    """fn once; its error, if it has one, is said and does not stop the rest. `unit` is a forward pass (0: none yet)."""
    took: list[float] = []

    def timed() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        fn()
        if device.startswith("cuda"):
            import torch as t

            t.cuda.synchronize()
        took[:] = [time.perf_counter() - wall, time.process_time() - cpu]

    try:
        peak = peak_bytes(timed, device)
    except Exception as error:
        return Row(name, 0.0, 0.0, 0.0, f"{type(error).__name__}: {str(error)[:200]}")
    work = took[1] if device == "cpu" else took[0]
    return Row(name, took[0], work / unit if unit else work, peak / 1e6)


def forward(engine: object, ids: object, runs: int) -> Row:
    """A pass with the logits of the last position; `passes` holds its seconds of work, the unit of the others."""
    device = engine.model.device.type
    engine.model.forward(ids)
    rows = [measure("forward", lambda: engine.model.forward(ids), device) for _ in range(runs)]
    middle = lambda key: statistics.median(getattr(r, key) for r in rows)  # noqa: E731
    return Row("forward", middle("seconds"), middle("passes"), middle("peak_mb"))


# ------------------------------------------------------------------ what is measured


def study(engine: object, tokens: int) -> object:
    """A prompt of so many tokens (a word is one in most tokenizers), and one that differs in a word."""
    from vocabulary.prompts import Prompt, Study

    rng, words = random.Random(0), []
    count = lambda: len(engine.model.check(Prompt("".join(words))).clean.ids)  # noqa: E731
    words = [f" {rng.choice(WORDS)}" for _ in range(tokens)]
    while len(words) > 2 and count() > tokens:
        words.pop()
    other = [*words]
    other[len(words) // 2] = " he" if words[len(words) // 2] != " he" else " his"
    return Study(Prompt("".join(words), "".join(other), (" the",), (" of",)))


def requests(engine: object, ask: object) -> dict[str, tuple[object, bool]]:
    """By name the request, and whether what earlier ones left in the cache is given up first."""
    from techniques.attention.requests import Attention, HeadStats
    from techniques.attribution.requests import Attribution
    from techniques.lens.requests import Lens
    from techniques.output.requests import Run
    from techniques.patching.requests import Sweep
    from techniques.circuits.requests import Discover, PathPatch, Score
    from vocabulary.circuit import Circuit

    info = engine.model.info
    layer = info.n_layers // 2
    circuit = Circuit("some", info.name, ("L0H0", f"L{layer}H1", f"L{layer}.mlp"))
    out = {
        "attention": Attention(ask, layer, "clean"), "next layer": Attention(ask, layer + 1, "clean"), "statistics": HeadStats(ask, "clean"), "run": Run(ask),
        "lens": Lens(ask, "clean", pair=False), "attribution": Attribution(ask, "clean"), "sweep": Sweep(ask, "z"), "path": PathPatch(ask),
        "eap-ig": Discover(ask, "eap-ig"), "score": Score(ask, circuit, rest="patch"),
    }  # fmt: skip
    return {name: (request, name != "next layer") for name, request in out.items()}


def first_answer(engine: object, request: object) -> None:
    """Until the first partial result; the whole one where there is none."""
    steps = engine.jobs(request)
    for part in steps:
        if hasattr(part, "clean"):
            break
    steps.close()


def run_all(folder: str, tokens: int, device: str, only: list[str]) -> tuple[dict, list[Row]]:
    from engine import Engine
    from vocabulary.requests import Load

    held: list[Engine] = []
    rows = [measure("load", lambda: held.append(Engine(Load(folder, device=device))), "cpu")]
    if not held:
        sys.exit(rows[0].error)
    engine = held[0]
    import torch as t

    ask, kind = study(engine, tokens), engine.model.device.type
    ids = t.tensor([engine.model.check(ask.prompt).clean.ids])
    base = forward(engine, ids, 2)
    for row in (*rows, base):
        show(row)
    rows.append(base)
    unit, n = base.passes, engine.model.info.n_layers
    needed = {"attention": (n // 2 + 0.5) / n, "next layer": 1 / n, "statistics": 1.0, "run": 2.0, "attribution": 1.0}  # run: clean and corrupted
    for name, (request, afresh) in requests(engine, ask).items():
        if only and name not in only:
            continue
        todo = {name: lambda request=request: engine.run(request)}
        if name == "run":
            todo = {"run, first answer": lambda request=request: first_answer(engine, request)} | todo
        for what, fn in todo.items():
            if afresh:
                engine.model.cache.clear()
            rows.append(replace(measure(what, fn, kind, unit), needs=needed.get(name, 0.0)))
            show(rows[-1])
    about = {"model": engine.model.info.name, "device": engine.model.info.device, "dtype": engine.model.info.dtype, "tokens": ids.shape[1]}
    return about, rows


def hunt_of(folder: str, device: str) -> dict:
    """The hunt on a model: what was loaded, its identities, each step's command, seconds and figures, and the memory of the process at the end."""
    from engine import Engine, rss
    from hunt import hunt
    from vocabulary.requests import Load

    begun = time.monotonic()
    engine = Engine(Load(folder, device=device))
    info, seconds = engine.model.info, round(time.monotonic() - begun, 1)
    checks = {c.name: {"error": c.error, "tolerance": c.tolerance, "ok": c.ok} for c in info.checks}
    with tempfile.TemporaryDirectory() as place:
        steps = hunt(engine, folder, Path(place))
    about = {"model": info.name, "device": info.device, "dtype": info.dtype, "parameters": info.n_params, "load seconds": seconds}
    return about | {"identities": checks, "steps": steps, "memory MB": rss() >> 20}


# ------------------------------------------------------------------ the table


def show(row: Row) -> None:
    """On stderr as it comes: what is measured next may take minutes."""
    sys.stderr.write(f"{gray}{row.name} {row.error or f'{row.seconds:.2f} s'}{endc}\n")


def table(about: dict, rows: list[Row]) -> None:
    print(f"{bold}{about['model']}, {about['tokens']} tokens, {about['dtype']} on {about['device']}{endc}")
    print(f"{'':20}{'seconds':>10}{'passes':>10}{'needs':>10}{'peak MB':>10}")
    for r in rows:
        passes = "" if r.name in ("load", "forward") else f"{r.passes:.2f}"
        print(
            f"{r.name:20}"
            + (f"{red}{r.error}{endc}" if r.error else f"{r.seconds:10.2f}{cyan}{passes:>10}{endc}{f'{r.needs:.2f}' if r.needs else '':>10}{r.peak_mb:10.0f}")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--only", default="", help=f"of {', '.join(NAMES)}; with commas")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hunt", action="store_true", help="instead: the hunt of docs/real_models.md, and the identities of the load, as JSON")
    args = parser.parse_args()
    if args.hunt:
        print(json.dumps(hunt_of(args.folder, args.device), indent=1))
        return
    only = [n for n in args.only.split(",") if n]
    if unknown := [n for n in only if n not in NAMES]:
        sys.exit(f"{unknown[0]} is not measured here: use some of {', '.join(NAMES)}")
    about, rows = run_all(args.folder, args.tokens, args.device, only)
    if not args.json:
        table(about, rows)
    print(json.dumps(about | {"rows": [asdict(r) for r in rows]}))


if __name__ == "__main__":
    main()
