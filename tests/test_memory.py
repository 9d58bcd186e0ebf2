"""Out of memory: what counts as it, that every analysis goes on with fewer at a time and gives the same numbers, and a real limit in a process of its own."""

import dataclasses
import errno
import gc
import itertools
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch as t
from conftest import CLEAN, CORRUPT, PROMPT
from safetensors import SafetensorError
from test_tuned import text  # noqa: F401

from engine import Engine
from model import loading, memory
from model.base_run import BaseRun
from model.cache import Cache
from model.memory import OutOfMemory, is_out_of_memory, out_of_memory
from techniques.attention.requests import AttentionSet
from techniques.attribution.requests import AttributionSet
from techniques.circuits.requests import Discover, PathPatch, Score
from techniques.features.requests import TrainSae
from techniques.lens.requests import FitJacobian, Lens, TuneLens
from techniques.output.requests import Run
from techniques.patching.requests import Estimate, Sweep
from utils import ROOT
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Prompt, Study, read_prompt_set
from vocabulary.requests import Load, Progress

CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes. Error code 12 (Cannot allocate memory)"
CUDA = "CUDA out of memory. Tried to allocate 9.00 GiB. GPU 1 has a total capacity of 79.15 GiB of which 1.00 GiB is free."
COUNTS = [
    RuntimeError(CPU),
    RuntimeError("[enforce fail at alloc_cpu.cpp:82] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    t.OutOfMemoryError(CUDA),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. Could not alloc its workspace"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB, other allocations: 1.00 GB)"),
    RuntimeError("unable to mmap 512 bytes from file </tmp/x>: Cannot allocate memory (12)"),
    MemoryError(),
    MemoryError("std::bad_alloc"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    out_of_memory(MemoryError()),
]
OTHERS = [
    RuntimeError("The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a non-contiguous input."),
    OSError(errno.ENOSPC, "No space left on device"),
    UserError("the prompt 'out of memory' has no corrupted prompt"),
    ValueError("out of memory"),
    KeyboardInterrupt(),
]


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """As in the engine: what is there before a request is no garbage to look through."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.parametrize("error", COUNTS, ids=lambda e: str(e)[:24])
def test_what_counts(error):
    assert is_out_of_memory(error)
    outer = ValueError("the weights can't be read")
    outer.__cause__ = error
    assert is_out_of_memory(outer)
    said = out_of_memory(error)
    assert isinstance(said, UserError) and str(said).startswith("out of memory on ") and "bfloat16" in str(said) and "\n" not in str(said)


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: str(e)[:24])
def test_what_does_not(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)):
        memory.ran_out(error)


def test_needed_and_free_in_words(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 10**9 if device.type == "cpu" else None)
    assert "on cpu: 4.3 GB more are needed and 1.0 GB are free." in str(out_of_memory(RuntimeError(CPU)))
    assert "on cuda:1: 9.7 GB more are needed and 1.1 GB are free." in str(out_of_memory(t.OutOfMemoryError(CUDA)))
    assert "8.6 GB more are needed" in str(out_of_memory(MemoryError("Unable to allocate 8.00 GiB for an array with shape (1073741824,)")))
    assert "on cpu: MemoryError (1.0 GB are free)." in str(out_of_memory(MemoryError()))


def test_free_of_a_control_group(tmp_path):
    """The tightest limit of the group and its parents, page cache not counted as used; none where there is no limit."""
    mine = tmp_path / "cgroup"
    mine.write_text("0::/job/step\n")
    folder = tmp_path / "fs" / "job" / "step"
    folder.mkdir(parents=True)
    for place, limit, used, cached in ((folder, "max", 10, 0), (folder.parent, 1000, 700, 200)):
        for name, value in (("max", limit), ("current", used), ("stat", f"anon 1\ninactive_file {cached}")):
            (place / f"memory.{name}").write_text(f"{value}\n")
    assert memory.group_free(tmp_path / "fs", mine) == 500
    assert memory.group_free(tmp_path / "nothing", mine) is None and memory.group_free(tmp_path, tmp_path / "no") is None
    assert memory.system_free() is None or memory.system_free() > 1 << 20


# ------------------------------------------------------------------ every analysis goes on


FOUR = tuple(Prompt(*(x.replace("store", place) for x in (CLEAN, CORRUPT)), (" Mary",), (" John",)) for place in ("store", "school", "milk", "red"))
SET = Study(FOUR[0], prompt_set=FOUR)
IOI = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[:4]
ON = tuple((r, c) for r in range(3) for c in (9, 11, 14))
CIRCUIT = Circuit("c", nodes=("L0H1", "L2H2", "L2H3"))
EDGES = Circuit("c", nodes=("L0H1",), edges=("embed->L0H1.q", "L0H1->logits"))
UNDER = dataclasses.replace(SET, interventions=(parse_intervention("L1H0=mean"),))
ASKS = {
    "sweep": Sweep(SET, "z"),
    "sweep over a set": Sweep(SET, "z", over_set=True),
    "sweep by position over a set": Sweep(SET, "resid_pre", over_set=True, only=ON),
    "sweep by whole passes": Sweep(SET, "z", over_set=True, plain=True),
    "sweep of means": Sweep(SET, "z", op="mean_all"),
    "direct effects": Sweep(SET, "z", effect="direct", over_set=True),
    "estimate": Estimate(SET, "z", over_set=True),
    "integrated gradients": Estimate(SET, "z", "ig", steps=2, over_set=True),
    "paths": PathPatch(SET, receivers=("L2H1.q",), over_set=True),
    "paths through MLPs": PathPatch(SET, receivers=("L2H1.q",), convention="mlps", over_set=True),
    "scores of nodes": Score(SET, CIRCUIT, ("faithfulness", "completeness", "minimality"), "patch", subsets=4, greedy=2),
    "scores of edges": Score(SET, EDGES, rest="patch"),
    "greedy": Discover(SET, "greedy", nodes=10),
    "EAP-IG": Discover(SET, "eap-ig", edges=10, steps=2),
    "ACDC": Discover(SET, "acdc", threshold=1.0),
    "features": Discover(Study(IOI[0], prompt_set=IOI, saes=("zoo/L1.resid_post",)), "features", nodes=5, steps=1),
    "attention over a set": AttentionSet(SET, "clean", ("END", 3)),
    "attribution over a set": AttributionSet(SET, "clean"),
    "attribution under a mean": AttributionSet(UNDER, "now"),
    "run": Run(SET),
    "lens": Lens(SET),
}
QUICK = ("sweep over a set", "estimate", "paths", "scores of nodes", "EAP-IG", "attention over a set", "lens")
LEFT_OUT = ("seconds", "expected", "at_once", "peak_mb", "error", "p")  # p, where an effect is rounding alone


@contextmanager
def an_allocator(engine: Engine, rows: int):
    """Blocks and the unembedding fail above so many rows, each time in another library's words."""
    errors, model = (
        itertools.cycle([RuntimeError(CPU), t.OutOfMemoryError(CUDA), MemoryError(), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED")]),
        engine.model,
    )
    plain, logits = [], type(model).unembed

    def check(block, args, kwargs):
        if len(args[0] if args else kwargs["hidden_states"]) > rows:
            plain.append(next(errors))
            raise type(plain[-1])(*plain[-1].args)

    def unembed(self, x):
        if x.shape[:-1].numel() > 4 * rows:
            raise RuntimeError(CPU)
        return logits(self, x)

    hooks = [b.register_forward_pre_hook(check, with_kwargs=True) for b in model.bridge.blocks]
    try:
        type(model).unembed = unembed
        yield
    finally:
        type(model).unembed = logits
        for hook in hooks:
            hook.remove()


def numbers(result: object) -> dict[str, np.ndarray]:
    """Every number of a result by its place, times and rounding left out."""
    if dataclasses.is_dataclass(result):
        parts = {f.name: getattr(result, f.name) for f in dataclasses.fields(result) if f.name not in LEFT_OUT}
    elif isinstance(result, dict):
        parts = result
    else:
        return {"": np.asarray(result, float)} if isinstance(result, np.ndarray | float | int) else {}
    return {f"{k}.{rest}": x for k, v in parts.items() for rest, x in numbers(v).items()}


def compare(engine: Engine, ask: object, rows: int) -> list[str]:
    """The notices of an analysis with little memory, whose numbers are those of one with enough."""
    notices: list[str] = []
    engine.model.cache.clear()
    want = numbers(engine.run(ask))
    engine.model.cache.clear()
    with an_allocator(engine, rows):
        got = numbers(engine.run(ask, lambda part: notices.append(part.text) if isinstance(part, Progress) and part.notice else None))
    engine.check_hooks()
    assert want and got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(
            got[name], value, atol=2e-6 * max(1.0, np.nanmax(np.abs(value), initial=0.0, where=~np.isnan(value))), rtol=1e-6, err_msg=name
        )
    assert not any(b.__dict__.get("forward") for b in engine.model.bridge.blocks)
    return notices


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.slow) for n in ASKS])
def test_every_analysis_goes_on_with_fewer(engines, name):
    notices = compare(engines["zoo" if name == "features" else "gemma2"], ASKS[name], 2)
    assert notices and all(n.startswith("out of memory at ") and "going on with" in n for n in notices)


@pytest.mark.slow
def test_fits_go_on_with_fewer(engines, text, tmp_path):  # noqa: F811
    engine, fit, out = engines["gpt2"], {"length": 16, "seed": 3}, (tmp_path / f"out{i}" for i in itertools.count())
    asks = (
        lambda: TuneLens(text, str(next(out)), steps=3, batch=8, lr=0.01, **fit),
        lambda: FitJacobian(text, str(next(out) / "j.pt"), prompts=2, length=16, skip=2),
        lambda: TrainSae("L1.resid_post", text, str(next(out)), features=64, k=4, tokens=640, batch=64, **fit),
    )
    for ask in asks:
        want, notices = numbers(engine.run(ask())), []
        with an_allocator(engine, 4):
            got = numbers(engine.run(ask(), lambda part, notices=notices: notices.append(part) if isinstance(part, Progress) and part.notice else None))
        for name, value in want.items():
            np.testing.assert_allclose(got[name], value, atol=2e-6, rtol=1e-5, err_msg=name)
        assert notices, ask


def test_one_item_that_does_not_fit_is_said_and_the_next_request_works(engines):
    engine = engines["gemma2"]
    want = engine.run(Sweep(SET, "z", over_set=True)).values
    for ask in (
        Sweep(SET, "z", over_set=True),
        Estimate(SET, "z"),
        PathPatch(SET),
        Discover(SET, "eap"),
        Score(SET, CIRCUIT),
        AttentionSet(SET, "clean", ("END", 3)),
        Lens(SET),
        Run(SET),
    ):
        engine.model.cache.clear()
        with an_allocator(engine, 0), pytest.raises(UserError, match=r"(?i)^out of memory on .*(needed|are free|alloc).*Shorten the prompt"):
            engine.run(ask)
        engine.check_hooks()
    assert (engine.run(Sweep(SET, "z", over_set=True)).values == want).all()


def test_one_prompt_is_run_side_by_side_only_where_that_fits(engines):
    """Of one prompt, clean and corrupted run in one pass; where two rows do not fit, in two."""
    notices = compare(engines["gemma2"], Sweep(SET, "resid_pre", only=ON), 1)
    assert any("one at a time" in n for n in notices)


def test_a_trial_without_memory_says_nothing_about_the_model(engines, monkeypatch):
    """The CPU's error is a RuntimeError, as are shapes that do not fit; it must not make a model slow for good."""
    engine = engines["gemma2"]
    monkeypatch.setattr(engine.model.notes, "trials", {})
    step = BaseRun.step

    def short(self, *args, **more):
        raise RuntimeError(CPU)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="out of memory"):
        patch.setattr(BaseRun, "step", short)
        engine.run(Sweep(Study(PROMPT), "z"))
    assert BaseRun.step is step and not engine.model.notes.trials
    assert engine.run(Sweep(Study(PROMPT), "z")).mechanism == "resumed at the changed layer"


def test_the_cache_gives_way_first():
    """Before a chunk is halved, what is kept for later goes; once for each chunk."""
    cache, tried = Cache(1 << 20), []
    cache.put(("a",), t.zeros(100))

    def work(a: int, b: int) -> int:
        tried.append(b - a)
        if cache.size or b - a > 4:
            cache.put(("a",), t.zeros(100))
            raise MemoryError
        return b

    parts = list(memory.in_chunks(8, 8, work, "runs"))
    assert tried == [8, 8, 4, 4] and [p for p in parts if isinstance(p, int)] == [4, 8]


def test_what_failed_is_let_go_of():
    """The frames of the failed work hold no tensor when the smaller chunk runs."""
    alive = []

    class Big:
        pass

    def work(a: int, b: int):
        assert not [x for x in alive if x() is not None]
        import weakref

        big = Big()
        alive.append(weakref.ref(big))
        yield Progress(a, b)
        if b - a > 1:
            raise MemoryError
        return b

    gc.disable()
    try:
        assert [p for p in memory.in_chunks(4, 4, work, "runs") if isinstance(p, int)] == [1, 2, 3, 4]
    finally:
        gc.enable()


# ------------------------------------------------------------------ loading


def test_a_model_that_does_not_fit_leaves_the_one_before(folders, monkeypatch):
    engine = Engine(str(folders["gpt2"]))
    before = engine.model
    monkeypatch.setattr(loading, "free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemory, match=r"weights of zoo need .* in float32; 1 kB are free on cpu and the model that is loaded holds .*bfloat16"):
        engine.run(Load("zoo", dtype="float32"))
    assert engine.model is before and engine.run(Load(str(folders["gpt2"]))) is before.info


@pytest.mark.parametrize("room, kept", [(8 << 30, True), (1 << 20, False)])
def test_memory_that_runs_out_while_loading(folders, monkeypatch, room, kept):
    """Where both fit, the model before stays until the new one stands; else it had to go. In words either way, and a model can be loaded then."""
    engine = Engine(str(folders["gpt2"]))
    before = engine.model.info

    def short(*args, **more):
        raise RuntimeError(CPU)

    with monkeypatch.context() as patch:
        patch.setattr(loading, "free_bytes", lambda device: room)
        patch.setattr(loading.transformers.AutoModelForCausalLM, "from_pretrained", short)
        with pytest.raises(OutOfMemory, match="out of memory on cpu: 4.3 GB more are needed"):
            engine.run(Load(str(folders["llama"])))
    assert (engine.model is not None) == kept and (not kept or engine.model.info is before)
    assert engine.run(Load(str(folders["llama"]))).architecture == "LlamaForCausalLM"


# ------------------------------------------------------------------ a real limit


GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}  # what is freed leaves the address space


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the address space")
def test_under_a_real_limit(tmp_path):
    """In a process of its own, with `ulimit -v` around each request: the numbers of one without, notices, words, memory given back, no hook left."""
    done = subprocess.run([sys.executable, Path(__file__).with_name("limited.py"), tmp_path], capture_output=True, text=True, cwd=ROOT, env=os.environ | GLIBC)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found = {line["name"]: line for line in lines}
    for name in ("sweep", "sets"):
        assert found[name]["error"] < 1e-5 and any("going on with" in n for n in found[name]["notices"]), found[name]
    for name in ("too long", "no memory to load"):
        assert "out of memory" in found[name]["said"] and "are free" in found[name]["said"], found[name]
    assert found["after"]["error"] < 1e-6 and found["after"]["hooks"] == 0 and found["after"]["grown_mb"] < 64
