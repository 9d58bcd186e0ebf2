"""Run by test_memory.py: requests with a limit on the address space of this process, one JSON line each."""

import gc
import json
import resource
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import conftest  # which finds the project
import numpy as np
import torch as t

from engine import Engine
from model.memory import give_way
from techniques.attention.requests import Attention
from techniques.circuits.requests import Score
from techniques.patching.requests import Sweep
from vocabulary.circuit import Circuit
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Load, Progress

WORDS = [w for w in conftest.WORDS.replace(",", "").replace(".", "").split() if w != "When"]
HARD = resource.getrlimit(resource.RLIMIT_AS)[1]


def pages(which: int) -> int:
    """Bytes of this process: 0 its address space, 1 what lies in memory."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize()


@contextmanager
def limited(megabytes: int):
    gc.collect()
    resource.setrlimit(resource.RLIMIT_AS, (pages(0) + (megabytes << 20), HARD))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (HARD, HARD))


def long_model(folder: Path) -> Path:
    """GPT-2 of two narrow layers with a long context: its patterns are what takes memory."""
    plain = conftest.config

    def config(arch: str, n_vocab: int):
        made = plain(arch, n_vocab)
        made.n_positions, made.n_layer = 2048, 2
        return made

    conftest.config = config
    return conftest.build("gpt2", folder)


def huge_model(folder: Path, small: Path) -> Path:
    """A folder whose weights would be 2 GB: a file with a hole in it."""
    shutil.copytree(small, folder)
    header = json.dumps({"w": {"dtype": "F32", "shape": [500_000_000], "data_offsets": [0, 2_000_000_000]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2_000_000_000)
    return folder


def prompt(tokens: int, seed: int) -> Prompt:
    words = ["When", *np.random.default_rng(seed).choice(WORDS, tokens - 2).tolist(), "to"]
    return Prompt(" ".join(words), " ".join([*words[:3], "Tom" if words[3] != "Tom" else "Anna", *words[4:]]), (" Mary",), (" John",))


def tell(name: str, **found) -> None:
    print(json.dumps({"name": name} | found), flush=True)


def main(folder: Path) -> None:
    t.set_num_threads(1)
    engine = Engine(str(long_model(folder / "model")))
    prompts = tuple(prompt(300, i) for i in range(4))
    study, long = Study(prompts[0], prompt_set=prompts), Study(prompt(2000, 9))
    sweep, notices = Sweep(study, "z", plain=True, chunk_mb=100_000), []
    sets = Score(study, Circuit("c", nodes=("L0H1", "L1H2")), ("faithfulness", "effects", "completeness"), "patch", greedy=0, subsets=4)
    show = lambda part: notices.append(part.text) if isinstance(part, Progress) and part.notice else None  # noqa: E731
    for name, ask, megabytes, value in (("sweep", sweep, 12, lambda r: r.values), ("sets", sets, 40, lambda r: r.effects)):
        want = value(engine.run(ask))
        give_way()
        notices.clear()
        with limited(megabytes):
            got = value(engine.run(ask, show))
        tell(name, error=float(np.nanmax(np.abs(got - want))), notices=notices)
        give_way()
    before, huge = pages(1), huge_model(folder / "huge", folder / "model")
    with limited(40):
        for name, ask in (("too long", Attention(long, 1)), ("no memory to load", Load(str(huge)))):
            try:
                engine.run(ask)
                tell(name, said="")
            except UserError as error:
                tell(name, said=str(error))
        got = engine.run(Sweep(Study(prompt(20, 3)), "z")).values
    give_way()
    grown = (pages(1) - before) >> 20
    tell("after", error=float(np.abs(got - engine.run(Sweep(Study(prompt(20, 3)), "z")).values).max()), hooks=engine.model.leaks(), grown_mb=grown)


main(Path(sys.argv[1]))
