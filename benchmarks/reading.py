"""
The lens, attention and attribution against what they must cost: ratios in one run on a random model of GPT-2 small's shape, 64 tokens, one thread.

`uv run benchmarks/reading.py`; the last line is one JSON object. Ratios of processor time, medians of interleaved runs.
"""

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import cyan, endc, gray, green, red, yellow

TARGETS = {"lens_one_position": 1.2, "lens_table": 1.5, "lens_memory_mb": 200.0, "lens_memory_with_pair_mb": 200.0, "attention_layer": 1.1, "attribution": 1.2}
N = 64
WORDS = " the of and to in a is that for it as was with be by on not he his at".split(" ")[1:]


def save_model(folder: Path) -> None:
    """GPT-2 small's shape with random weights, and a tokenizer with as many tokens."""
    import torch as t
    import transformers as tr
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {c: i for i, c in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"])}
    vocab |= {f"<{i}>": i for i in range(len(vocab), 50_257)}
    tok = Tokenizer(models.BPE(vocab, []))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tr.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|endoftext|>", bos_token="<|endoftext|>").save_pretrained(folder)
    t.manual_seed(0)
    config = tr.GPT2Config(bos_token_id=256, eos_token_id=256)
    tr.GPT2LMHeadModel(config).save_pretrained(folder)


def engine_on(folder: str):
    import torch as t

    from engine import Engine

    engine = Engine(folder)
    t.set_num_threads(1)
    return engine


def study(engine, corrupt: bool = False):
    """A prompt of N tokens, one a byte."""
    from vocabulary.prompts import Prompt, Study

    text = " ".join(WORDS * 3)[: N - 1]
    prompt = Prompt(text, text.replace("w", "v") if corrupt else None, ("a",), ("b",), bos=True)
    assert len(engine.model.check(prompt).clean.ids) == N
    return Study(prompt)


def interleaved(runs: int, *sides: Callable[[], object]) -> list[float]:
    """Median seconds of this thread's own work on each, taken in turns; what other programs do to the machine counts little."""
    times = [[] for _ in sides]
    for side in sides:
        side()
    for _ in range(runs):
        for side, took in zip(sides, times):
            start = time.thread_time()
            side()
            took.append(time.thread_time() - start)
    return [statistics.median(took) for took in times]


def measure(folder: str, runs: int) -> dict[str, float]:
    import torch as t

    from techniques.attention.requests import Attention
    from techniques.attribution.requests import Attribution
    from techniques.lens.requests import Lens

    engine = engine_on(folder)
    model, ask = engine.model, study(engine)
    ids = t.tensor([model.check(ask.prompt).clean.ids])

    def fresh(request) -> Callable[[], object]:
        def run() -> object:
            model.cache.clear()
            return engine.run(request)

        return run

    @t.no_grad()
    def forward() -> object:
        return model.bridge.original_model(ids, use_cache=False).logits

    one = Lens(ask, positions=(-1,), points=tuple(f"L{i}.resid_post" for i in range(12)))
    table = Lens(ask)
    points = 1 + 2 * model.info.n_layers
    x = t.randn(1024, 768)
    w = model.bridge.original_model.get_output_embeddings().weight.detach()
    multiply = lambda: t.nn.functional.linear(x[:512], w[:8192])  # noqa: E731
    sides = (forward, fresh(one), fresh(Attention(ask, 5)), fresh(Attribution(ask)), lambda: engine.run(table), multiply)
    base, lens_one, attention, attribution, full, square = interleaved(runs, *sides)
    rate = 2 * 512 * 768 * 8192 / square
    flops = 2 * N * points * 768 * model.info.d_vocab
    paired = Lens(study(engine, corrupt=True))
    first, whole = interleaved(runs, lambda: engine.run(Lens(ask, positions=tuple(range(12)))), lambda: engine.run(paired))
    seen = []
    start = time.perf_counter()
    engine.run(table, lambda part: seen.append(time.perf_counter() - start) if hasattr(part, "points") else None)
    return {
        "forward_s": base,
        "lens_one_position": lens_one / base,
        "lens_table": full / (flops / rate),
        "attention_layer": attention / base,
        "attribution": attribution / base,
        "matmul_gflops": rate / 1e9,
        "lens_table_s": full,
        "lens_table_first_rows": seen[0] / full,
        "lens_12_positions": first / full,
        "lens_table_with_pair": whole / (2 * flops / rate),
    }


PEAK = """
import sys
sys.path.insert(0, {root!r})
sys.path.insert(0, {here!r})
from reading import engine_on, study
from engine import rss
from pathlib import Path
from techniques.lens.requests import Lens
from techniques.output.requests import Run

engine = engine_on({folder!r})
ask = study(engine, corrupt={pair})
engine.run(Lens(ask, points=("L0.resid_pre",)))  # reads the weights in
before = rss()
Path("/proc/self/clear_refs").write_text("5")
engine.run(Lens(ask))
peak = next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
print(peak - before)
"""


def peak_mb(folder: str, pair: bool) -> float:
    """Peak resident memory of a full table above what the process held with the model loaded, in a process of its own."""
    here = Path(__file__).resolve().parent
    code = PEAK.format(root=str(here.parent), here=str(here), folder=folder, pair=pair)
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return int(out.split()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(f"{gray}building a random model of GPT-2 small's shape{endc}")
        save_model(Path(folder))
        gc.collect()
        figures = measure(folder, args.runs)
        figures["lens_memory_mb"] = peak_mb(folder, pair=False)
        figures["lens_memory_with_pair_mb"] = peak_mb(folder, pair=True)
    for name, value in figures.items():
        target = TARGETS.get(name)
        colour = cyan if target is None else green if value <= target else red
        print(f"{name:26} {colour}{value:10.3f}{endc}" + (f" {yellow}target {target:g} at most{endc}" if target else ""))
    print(json.dumps({k: round(v, 4) for k, v in figures.items()} | {"met": {k: figures[k] <= v for k, v in TARGETS.items()}}))


if __name__ == "__main__":
    main()
