"""A request over a prompt set in shards: joined it is the whole; what is missing or damaged runs again, and only that."""

import json
import subprocess
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch as t
from safetensors.torch import load_file
from transformer_lens.tools.analysis.jacobian_lens import JacobianLens

from engine import Engine, main
from model.replacements import corrupted_rows, resampled
from techniques.attention.requests import AttentionSet
from techniques.attribution.requests import AttributionSet
from techniques.circuits.requests import Discover, PathPatch, Score
from techniques.cluster.command import ScatterCommand
from techniques.cluster.folder import Folder, Job
from techniques.cluster import tasks
from techniques.cluster.tasks import visible_gpus
from techniques.features.requests import Examples
from techniques.lens.requests import FitJacobian, Lens, TuneLens
from techniques.patching.requests import Estimate, Sweep
from techniques.qk.requests import QKSet
from utils import ROOT
from vocabulary.circuit import Circuit
from vocabulary.files import CHECKPOINT
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.parts import read_frames
from vocabulary.prompts import Prompt, Study, read_prompt_set
from vocabulary.requests import Load, Progress

SET = ROOT / "zoo" / "prompts" / "ioi_abba.jsonl"
PROMPTS = read_prompt_set(SET)[:7]
MIXED = tuple(p for pair in zip(PROMPTS, read_prompt_set(SET.with_name("ioi_distractor.jsonl"))) for p in pair)[:7]  # two lengths, in turn
STUDY = Study(PROMPTS[0], prompt_set=PROMPTS)
TIMES = ("seconds", "expected", "peak_mb", "at_once", "sides", "done", "total")


@pytest.fixture(scope="module")
def zoo(engines) -> Engine:
    return engines["zoo"]


def in_parts(zoo: Engine, request: object, path, size: int = 2, tasks: int = 2) -> Folder:
    """Two tasks, one after the other, in this process."""
    folder = Folder(path)
    folder.lay_out(zoo.loaded, request, size, Job(tasks))
    for k in range(tasks):
        assert folder.work(k, tasks, zoo, lambda part: None, lambda line: None) == 0
    return folder


def same(joined: object, whole: object, but: tuple[str, ...] = TIMES, tolerance: float = 1e-5) -> None:
    """Every field, numbers to 1e-5."""
    for f in fields(whole):
        a, b = getattr(joined, f.name), getattr(whole, f.name)
        if f.name in but:
            continue
        if is_dataclass(b):
            same(a, b, (), tolerance)
        elif isinstance(b, np.ndarray | float):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=f.name)
        else:
            assert a == b, f.name


SWEEPS = {
    "patch": Sweep(STUDY, "z", over_set=True),
    "mean": Sweep(STUDY, "nodes", "mean", over_set=True),
    "resample": Sweep(STUDY, "z", "resample", seed=3, over_set=True),
    "noise": Sweep(STUDY, "mlp", "noise", over_set=True),
    "under": Sweep(replace(STUDY, interventions=(parse_intervention("L1H1=mean"), parse_intervention("L0H1=noise"))), "z", "zero", over_set=True),
    "lengths": Sweep(replace(STUDY, prompt_set=MIXED), "attn", over_set=True),
    "estimate": Estimate(STUDY, "z", over_set=True),
    "path": PathPatch(STUDY, receivers=("L3H3.q", "L3H2.q"), over_set=True),
}


@pytest.mark.parametrize("name", [n if n in ("patch", "resample", "lengths", "path") else pytest.param(n, marks=pytest.mark.table) for n in SWEEPS])
def test_a_scattered_table_is_the_whole(zoo, tmp_path, name):
    info, joined = in_parts(zoo, SWEEPS[name], tmp_path / "a").gather()
    same(joined, zoo.run(SWEEPS[name]))
    assert info == zoo.model.info and joined.p.size
    assert read_frames(tmp_path / "a" / "whole.bin")[1].body.prompts == tuple(range(7))


OVER = {
    "attention": AttentionSet(STUDY),
    "attention of a difference": AttentionSet(replace(STUDY, prompt_set=MIXED), "clean-corrupt"),
    "attribution": AttributionSet(STUDY, "clean"),
    "attribution under": AttributionSet(replace(STUDY, interventions=(parse_intervention("L1H1=mean"),))),
    "qk": QKSet(STUDY, 3, 2, "END", "S2"),
}


@pytest.mark.parametrize("name", [n if n in ("attention of a difference", "qk") else pytest.param(n, marks=pytest.mark.table) for n in OVER])
def test_other_questions_over_a_set(zoo, tmp_path, name):
    """Means and deviations of all prompts, from each part's: a task was killed before its last part."""
    folder = in_parts(zoo, OVER[name], tmp_path / "a", 3)
    folder.part(1).unlink()
    assert folder.gather(True)[1].prompts.tolist() == [0, 1, 2, 6]
    folder.work(1, 2, zoo, lambda part: None, lambda line: None)
    same(folder.gather()[1], zoo.run(OVER[name]))


def test_examples_over_parts_of_a_text(zoo, tmp_path):
    """The largest activations, counts, densities and pairs of the whole text; shards behind its end are empty parts."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "zoo" / "corpus.txt").read_text()[:5000])
    ask = Examples("zoo/L1.resid_post", str(text), (3, 40, 200), 4, 2000, 16)
    folder = in_parts(zoo, ask, tmp_path / "a", 25)
    folder.part(1).unlink()
    assert "partial: 4 of 5 shards" in folder.gather(True)[1].convention
    folder.work(1, 2, zoo, lambda part: None, lambda line: None)
    joined = folder.gather()[1]
    same(joined, zoo.run(ask), (*TIMES, "cached"))
    assert joined.tokens and max(map(len, joined.examples)) == 4


FIT = FitJacobian("", "elsewhere.pt", prompts=3, length=12, skip=2)


def test_a_jacobian_lens_fitted_in_parts(engines, tmp_path):
    """Of a killed task's part its matrices are cut, then gone: it runs again. The file, its card and what the fit says are those of one machine."""
    engine, said = engines["gpt2"], []
    whole = engine.run(replace(FIT, out=str(tmp_path / "whole.pt")))
    folder = in_parts(engine, FIT, tmp_path / "a", 1)
    assert len(folder.shards) == 3 and not Path("elsewhere.pt").exists()
    for damage in (lambda f: f.write_bytes(f.read_bytes()[:-8]), lambda f: f.unlink()):
        damage(folder.part(1).with_suffix(".safetensors"))
        with pytest.raises(UserError, match="2 of 3 shards done.*missing: 1"):
            folder.gather()
        assert folder.gather(True)[1].prompts == 2 and not (folder.path / "jacobian_lens.pt").exists()
        assert Folder(folder.path).work(1, 2, engine, lambda part: None, said.append) == 0 and "shards 1 on" in said[-3]
    joined = folder.gather()[1]
    same(joined, whole, ("seconds", "file"))
    one, many = JacobianLens.load(whole.file), JacobianLens.load(joined.file)
    assert (one.metadata, one.n_prompts, one.source_layers) == (many.metadata, many.n_prompts, many.source_layers) and whole.change > 0
    for layer, matrix in one.jacobians.items():
        np.testing.assert_allclose(many.jacobians[layer], matrix, rtol=1e-5, atol=1e-5)
    assert engine.run(Lens(Study(PROMPTS[0]), kind="jacobian", artefact=str(folder.path))).top_probs.size


@pytest.mark.table
def test_a_jacobian_lens_of_a_short_or_changed_text(engines, tmp_path):
    """Prompts behind the end of the text are empty parts; parts of two texts are not merged."""
    engine, text = engines["gpt2"], tmp_path / "text.txt"
    words = (ROOT / "zoo" / "corpus.txt").read_text()
    n = next(n for n in range(20, 2000, 4) if len(engine.model.encode(words[:n])[0]) >= 12 * 5)
    text.write_text(words[:n])
    ask = replace(FIT, text=str(text), prompts=9)
    whole = engine.run(replace(ask, out=str(tmp_path / "whole.pt")))
    folder = in_parts(engine, ask, tmp_path / "a")
    same(folder.gather()[1], whole, ("seconds", "file"))
    assert whole.prompts < 9 == folder.total
    folder.part(1).unlink()
    text.write_text(words[: n + 1])
    folder.work(1, 2, engine, lambda part: None, lambda line: None)
    with pytest.raises(UserError, match="the text changed while the tasks ran"):
        folder.gather()


def test_a_fit_in_steps_is_one_task_that_goes_on(engines, tmp_path):
    """Killed in its middle, it goes on from its checkpoint, and is the fit of one machine."""
    engine, ask = engines["gpt2"], TuneLens("", "elsewhere", steps=6, batch=2, length=12)
    with pytest.raises(UserError, match="TuneLens is not scattered: each step of a fit depends on the one before; --tasks 1"):
        in_parts(engine, ask, tmp_path / "a", 0)
    assert not (tmp_path / "a").exists()
    folder = Folder(tmp_path / "a")
    folder.lay_out(engine.loaded, ask, 0, Job(1))

    def kill(part: object) -> None:
        if isinstance(part, Progress) and part.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        folder.work(0, 1, engine, kill, lambda line: None)
    assert (folder.path / "tuned_lens" / CHECKPOINT).exists() and folder.missing() == [0]
    steps = []
    folder.work(0, 1, engine, lambda part: steps.append(part.done) if part.text.startswith("tuned lens: KL 1") else None, lambda line: None)
    whole = engine.run(replace(ask, out=str(tmp_path / "whole")))
    same(folder.gather()[1], whole, ("seconds", "folder"))
    one, many = (load_file(p / "params.safetensors") for p in (tmp_path / "whole", folder.path / "tuned_lens"))
    assert all(t.allclose(one[name], many[name], atol=1e-6) for name in one) and not (folder.path / "tuned_lens" / CHECKPOINT).exists()


def test_a_scattered_mean_and_noise_are_the_whole(zoo, tmp_path):
    """The mean is the whole set's, and each prompt's noise its own."""
    for op in ("mean", "noise"):
        request = Sweep(STUDY, "z", op, over_set=True, only=((0, 0), (3, 3)))
        same(in_parts(zoo, request, tmp_path / op, 3).gather()[1], zoo.run(request))


def test_scores_and_a_discovery_are_the_whole(zoo, tmp_path):
    circuit = Circuit("some", "zoo", ("L0H1", "L3H2", "L3H3"))
    score = Score(STUDY, circuit, ("faithfulness", "effects"), "resample")
    same(in_parts(zoo, score, tmp_path / "score").gather()[1], zoo.run(score), (*TIMES, "sets"))
    ask = Discover(STUDY, "eap", 12)
    whole, first = zoo.run(ask), in_parts(zoo, ask, tmp_path / "found")
    with pytest.raises(UserError, match="a second checks what it found: 0 of 4 shards done; missing: 0, 1, 2, 3"):
        first.gather()
    for k in range(2):
        first.second.work(k, 2, zoo, lambda part: None, lambda line: None)
    joined = first.gather()[1]
    same(joined, whole, (*TIMES, "counts", "faithfulness", "prompts"))
    assert json.loads((tmp_path / "found" / "circuit.json").read_text())["edges"] == list(whole.circuit.edges)


@pytest.mark.table
@pytest.mark.parametrize("method", ["eap-ig", "clean-corrupted", "eap-ig-activations"])
def test_every_method_that_sums_over_prompts(zoo, tmp_path, method):
    ask = Discover(STUDY, method, 20, steps=2)
    first = in_parts(zoo, ask, tmp_path / "found")
    with pytest.raises(UserError):
        first.gather()
    first.second.work(0, 1, zoo, lambda part: None, lambda line: None)
    same(first.gather()[1], zoo.run(ask), (*TIMES, "counts", "faithfulness", "prompts"))


def test_only_what_is_missing_runs_again(zoo, tmp_path, monkeypatch):
    """A part that is gone, one that is cut, one that is garbage; a whole one stays as it is, and a task without work loads nothing."""
    request = Sweep(STUDY, "z", over_set=True, only=((3, 2),))
    folder = in_parts(zoo, request, tmp_path / "a", 1)
    whole = folder.gather()[1]
    assert len(folder.shards) == 7
    folder.part(1).unlink()
    folder.part(4).write_bytes(folder.part(4).read_bytes()[:-3])
    folder.part(6).write_bytes(b"\0\0\0\5hello")
    before = {i: folder.part(i).stat().st_mtime_ns for i in (0, 2, 3, 5)}
    with pytest.raises(UserError, match="4 of 7 shards done.*missing: 1, 4, 6"):
        folder.gather()
    assert "--array=0-1\n" in (tmp_path / "a" / "job.sbatch").read_text()
    partial = folder.gather(True)[1]
    assert partial.prompts == (0, 2, 3, 5) and partial.warning.startswith("partial: 4 of 7 shards")
    np.testing.assert_allclose(partial.values[3, 2], whole.per_prompt[[0, 2, 3, 5], 3, 2].mean(), rtol=1e-6)
    asked = []
    monkeypatch.setattr(zoo, "run", lambda request, show=None, run=zoo.run: (asked.append(request), run(request))[1])
    again = Folder(tmp_path / "a")
    again.lay_out(zoo.loaded, request, 0, Job(3))
    assert "--array=0,1\n" in (tmp_path / "a" / "job.sbatch").read_text()  # of three tasks shards 1, 4 are the second's, 6 the first's
    for k in range(3):
        again.work(k, 3, zoo, lambda part: None, lambda line: None)
    assert [r.study.part for r in asked if isinstance(r, Sweep)] == [(6, 7), (1, 2), (4, 5)] and sum(isinstance(r, Load) for r in asked) == 2
    assert before == {i: again.part(i).stat().st_mtime_ns for i in before}
    same(again.gather()[1], whole, ("seconds", "peak_mb"))


def test_prompts_that_do_not_fit(zoo, tmp_path):
    """A shard of which none fits is a part like another; the whole says who was left out."""
    bad = Prompt("one two three", None, (" a",), (" b",))
    request = Sweep(replace(STUDY, prompt_set=(*PROMPTS[:3], bad, bad, PROMPTS[3])), "z", over_set=True)
    joined = in_parts(zoo, request, tmp_path / "a", 1).gather()[1]
    same(joined, zoo.run(request))
    assert joined.prompts == (0, 1, 2, 5) and joined.warning.startswith("2 of 6 prompts of the set left out")


def test_what_can_not_be_scattered(zoo, tmp_path):
    part = replace(STUDY, part=(0, 2))
    with pytest.raises(UserError, match="cumulative chooses its nodes over the whole set"):
        zoo.run(Sweep(part, "cumulative", over_set=True))
    with pytest.raises(UserError, match="a part is of an analysis over a set"):
        zoo.run(Sweep(part, "z"))
    with pytest.raises(UserError, match="a part is of an analysis over a set"):
        zoo.run(Sweep(replace(STUDY, part=(5, 9)), "z", over_set=True))
    with pytest.raises(UserError, match="greedy decides"):
        zoo.run(Discover(part, "greedy"))
    with pytest.raises(UserError, match="minimality chooses subsets"):
        zoo.run(Score(part, Circuit("some", "zoo", ("L0H1",)), ("minimality",)))
    Folder(tmp_path).lay_out(zoo.loaded, Sweep(STUDY, "z", over_set=True), 2, Job(2))
    with pytest.raises(UserError, match="another request"):
        Folder(tmp_path).lay_out(zoo.loaded, Sweep(STUDY, "q", over_set=True), 2, Job(2))


def test_parts_of_different_models_are_not_joined(zoo, tmp_path):
    from vocabulary.parts import write_frames

    folder = in_parts(zoo, Sweep(STUDY, "z", over_set=True, only=((3, 2),)), tmp_path / "a", 4)
    info, result = folder.read(1)
    write_frames(folder.part(1), [(0, replace(info, dtype="bfloat16")), (0, result)])
    with pytest.raises(UserError, match="parts are of different models"):
        folder.gather()


def test_what_is_drawn_is_any_other_of_equal_length(zoo):
    """As the words say it: the set's corrupted prompts of that length that are not the prompt's and not equal to it, one by the seed and its place."""
    twice = (*MIXED, MIXED[0], MIXED[3])
    for prompt in twice:
        study, row = Study(prompt, prompt_set=twice), zoo.model.tokens.pair(prompt, "", [], [])[0]
        rows = [r.ids for p in twice if p != prompt for r in corrupted_rows(zoo.model, (p,))]
        rows = [r for r in rows if len(r) == len(row.ids) and r != row.ids]
        for seed in range(5):
            at = np.random.default_rng((seed, twice.index(prompt))).integers(len(rows))
            assert resampled(zoo.model, study, len(row.ids), row.ids, seed) == rows[at]


# ------------------------------------------------------------------ the shell


def test_words_of_scatter_from_among_a_commands():
    words = "sweep --kind z --set a.jsonl --tasks 4 --sbatch=--gres=gpu:1 --out runs/a --mean".split()
    read = ScatterCommand.of_words(words)
    assert read.words == ("sweep", "--kind", "z", "--set", "a.jsonl", "--mean") and (read.tasks, read.sbatch, str(read.out)) == (4, "--gres=gpu:1", "runs/a")
    assert ScatterCommand.of_words(["path", "--sbatch", "--gres=gpu:1 -p a100", "--out", "x"]).sbatch == "--gres=gpu:1 -p a100"


def test_the_job_is_a_script_that_bash_reads(tmp_path, capsys):
    out = tmp_path / "of a % run"
    assert (
        main(["scatter", "sweep", "--kind", "z", "--set", str(SET), "--tasks", "4", "--sbatch", "--gres=gpu:1 -p a100", "--most", "2", "--out", str(out)]) == 0
    )
    said = capsys.readouterr().err
    assert "32 prompts in 16 shards, 4 tasks; 0 of 16 shards done" in said and "engine.py gather" in said
    script = out / "job.sbatch"
    subprocess.run(["bash", "-n", script], check=True)
    text = script.read_text()
    assert "#SBATCH --array=0-3%2\n" in text and "#SBATCH --gres=gpu:1 -p a100\n" in text and "of a %% run/log-%a.txt" in text
    assert Folder(out).request.over_set
    assert main(["gather", str(out)]) == 2 and "missing: 0, 1, 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("lens --set {} --out {}", "Lens can't run over a part of a prompt set"),
        ("gather {1} --out {1}", "gather can't be scattered"),
        ("replay {1} --out {1}", "no session"),
        ("sweep --kind z --out {1}", "give --set"),
        ("sweep --kind z --set {}", "give --out"),
        ("sweep --kind z --set {} --out {} --tasks 0", "--tasks is 1 or more"),
        ("sweep --kind z --set {} --plot a.svg --out {}", "gather FOLDER --plot"),
        ("certify --set {} --out {}", "Certify is not scattered: it decides by the whole set"),
        ("train-sae --out {1}", "TrainSae is not scattered: each step of a training"),
        ("direction --kind set --set {} --out {}", "MakeDirection is not scattered: it is one forward pass a prompt"),
    ],
)
def test_refused_before_anything_runs(tmp_path, capsys, words, line):
    assert main(["scatter", *words.format(SET, tmp_path / "a").split()]) == 2
    assert line in capsys.readouterr().err


@pytest.mark.table
def test_as_processes_of_this_machine(tmp_path, capsys):
    words = ["scatter", "sweep", "--kind", "z", "--set", str(SET), "--local", "2", "--out", str(tmp_path / "a"), "--json"]
    assert main(words) == 0
    joined = json.loads(capsys.readouterr().out)
    assert main(["sweep", "--kind", "z", "--set", str(SET), "--mean", "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    for name in ("values", "normalised", "p", "holm", "per_prompt", "low", "high"):
        np.testing.assert_allclose(joined[name], whole[name], rtol=1e-5, atol=1e-5, err_msg=name)
    assert main(["scatter", "discover", "--method", "eap", "--set", str(SET), "--local", "2", "--out", str(tmp_path / "b")]) == 0
    assert "eap: " in capsys.readouterr().out and (tmp_path / "b" / "circuit.json").exists()


def test_gpus_that_are_visible(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,MIG-a")
    assert visible_gpus() == ["2", "MIG-a"]
    for text, names in (("", []), ("-1", []), ("GPU-8932f937-d72c, 1,-1,2", ["GPU-8932f937-d72c", "1"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", text)
        assert visible_gpus() == names
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(tasks.shutil, "which", lambda name: name)
    listed = "GPU 0: NVIDIA A100 (UUID: GPU-1)\n  MIG 3g.20gb     Device  0: (UUID: MIG-a)\n  MIG 2g.10gb     Device  1: (UUID: MIG-b)\nGPU 1: NVIDIA A100 (UUID: GPU-2)\n"
    monkeypatch.setattr(tasks.subprocess, "run", lambda *words, **how: SimpleNamespace(stdout=listed))
    assert visible_gpus() == ["MIG-a", "MIG-b", "1"], "a GPU that is cut into slices is its slices"
