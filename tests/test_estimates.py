"""AtP* against its definition by autograd in Hugging Face's own model; a model built so that plain AtP must miss a cell; which cells are the largest for certain."""

import json
import shutil

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, PROMPT
from torch.overrides import TorchFunctionMode
from screen.session import State
from ui import make_app, press, reply, shown

import engine as program
from techniques.patching.certify import Chances, Subsets
from techniques.patching.requests import Certify, Estimate, Sweep
from utils import ROOT
from vocabulary.nodes import UserError
from vocabulary.prompts import Study, read_prompt_set

STUDY = Study(PROMPT)
DEFAULT = ("gemma2", "llama")
EACH = [pytest.param(a, marks=() if a in DEFAULT else pytest.mark.table) for a in ARCHS]
IOI = ROOT / "zoo" / "prompts" / "ioi_baba.jsonl"


class Patterns(TorchFunctionMode):
    """Every layer's pattern, to which `leaves` (where given) are added."""

    def __init__(self, grad=False):
        super().__init__()
        self.seen, self.leaves, self.grad = [], [], grad

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func not in (t.nn.functional.softmax, t.softmax, t.Tensor.softmax):
            return out
        self.seen.append(out.detach())
        if self.grad:
            self.leaves.append(t.zeros_like(out).requires_grad_(True))
            out = out + self.leaves[-1]
        return out


class Hooks:
    """Functions on what Hugging Face's modules get or give, gone afterwards."""

    def __init__(self, ref, some):
        self.ref, self.some, self.handles = ref, some, []

    def __enter__(self):
        for (site, layer), fn in self.some:
            module, end = self.ref.place(site, layer)
            if end == "in":
                self.handles.append(module.register_forward_pre_hook(lambda _, args, fn=fn: (fn(args[0]), *args[1:])))
            else:
                self.handles.append(module.register_forward_hook(lambda _, args, out, fn=fn: (fn(out[0]), *out[1:]) if isinstance(out, tuple) else fn(out)))

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def gradients(ref, ids, answers, drop):
    """dF/dz and dF/dpattern of every layer, with what the attention and the MLP of layer `drop` add taken as constants."""
    n, leaves = len(ref.blocks), {}

    def leaf(x, i):
        leaves[i] = t.zeros_like(x).requires_grad_(True)
        return x + leaves[i]

    some = [(("z", i), lambda x, i=i: leaf(x, i)) for i in range(n)]
    some += [((part, drop), lambda x: x.detach()) for part in ("attn", "mlp") if drop is not None]
    with Hooks(ref, some), Patterns(grad=True) as patterns, t.enable_grad():
        logits = ref.hf(t.tensor([ids]), use_cache=False).logits[0, -1]
        every = [*leaves.values(), *patterns.leaves]
        found = t.autograd.grad(logits[answers[0]] - logits[answers[1]], every, allow_unused=True)
    found = [t.zeros_like(x) if g is None else g for x, g in zip(every, found)]
    return found[:n], found[n:]


def definition(ref, kind, base, source, answers, fixed=True):
    """|AtP*| [layer, head or group] by its definition."""
    n, d, cells = len(ref.blocks), ref.d_head, ref.kv_heads if kind == "k" else ref.heads
    slopes = [gradients(ref, base, answers, drop) for drop in range(n)]
    out = np.zeros((n, cells))
    for i in range(n):
        if kind == "z":
            change = ref.read(source, ("z", i)) - ref.read(base, ("z", i))
            parts = [(change * z[i])[0].sum(0).view(cells, d).sum(-1) for z, _ in slopes]
        else:
            with Patterns() as before, t.no_grad():
                ref.hf(t.tensor([base]), use_cache=False)
            theirs = ref.read(source, (kind, i))

            def put(x, theirs=theirs):
                x = x.clone()
                for h in range(ref.heads):
                    x[..., ref.columns(kind, h)] = theirs[..., ref.columns(kind, h)]
                return x

            with Patterns() as after, Hooks(ref, [((kind, i), put)]), t.no_grad():
                ref.hf(t.tensor([base]), use_cache=False)
            change = after.seen[i] - before.seen[i]
            parts = [(change * pattern[i])[0].sum((-1, -2)).view(cells, -1).sum(-1) for _, pattern in slopes]
        out[i] = np.abs(t.stack(parts).detach().double().numpy()).sum(0) / (n - 1)
    return out


@pytest.mark.parametrize("arch", EACH)
def test_atp_star_is_its_definition(engines, references, arch):
    model, ref = engines[arch].model, references[arch]
    check = model.check(PROMPT)
    answers = check.answers[0].ids[0], check.foils[0].ids[0]
    for kind in ("z", "q", "k"):
        found = engines[arch].run(Estimate(STUDY, kind, "atp_star"))
        want = definition(ref, kind, check.corrupt.ids, check.clean.ids, answers)
        np.testing.assert_allclose(np.abs(found.values - np.float32(found.base)), want, atol=1e-4, rtol=1e-4)


@pytest.mark.table
def test_whole_passes_give_the_same(engines, monkeypatch):
    """Where blocks can't be run one by one, the estimates are those of whole passes."""
    engine, asks = (
        engines["llama"],
        [Estimate(STUDY, kind, m) for kind, m in (("q", "atp_star"), ("k", "atp_qk"), ("attn_mlp", "graddrop"), ("resid_mid", "graddrop"))],
    )
    want = [engine.run(a).values for a in asks]
    monkeypatch.setattr("model.base_run.keeps_states", lambda model: "not here")
    for a, values in zip(asks, want):
        np.testing.assert_allclose(engine.run(a).values, values, atol=1e-4)


@pytest.fixture(scope="module")
def saturated(folders, tmp_path_factory):
    """llama with the first layer's queries forty times as long: attention there is all on one token, where the softmax is flat."""
    from transformers import AutoModelForCausalLM

    from engine import Engine

    folder = tmp_path_factory.mktemp("saturated") / "llama"
    shutil.copytree(folders["llama"], folder)
    hf = AutoModelForCausalLM.from_pretrained(folder)
    with t.no_grad():
        hf.model.layers[0].self_attn.q_proj.weight *= 40
    hf.save_pretrained(folder)
    return Engine(str(folder))


def test_a_saturated_head_is_found(saturated):
    """Plain AtP and GradDrop give the head whose queries do most next to nothing; the pattern computed again gives it its size."""
    effect = lambda r: np.abs(r.values - np.float32(r.base))  # noqa: E731
    truth = effect(saturated.run(Sweep(STUDY, "q")))
    found = {m: effect(saturated.run(Estimate(STUDY, "q", m))) for m in ("atp", "graddrop", "atp_qk", "atp_star")}
    best = 0, int(truth[0].argmax())
    assert truth[best] > 0.1
    assert found["atp"][best] < 0.05 * truth[best] and found["graddrop"][best] < 0.05 * truth[best]
    for m in ("atp_qk", "atp_star"):
        assert 0.3 * truth[best] < found[m][best] < 3 * truth[best]


def test_what_is_said_of_the_zoo(engines):
    """The hunt of docs/estimates.md: AtP says nothing of queries there, and the mended one nearly all."""
    study = Study(read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[0])
    size, said = lambda r: np.abs(r.values - r.base).ravel(), {}
    for way in ("denoise", "noise"):
        truth = size(engines["zoo"].run(Sweep(study, "q", direction=way)))
        said[way] = [np.corrcoef(size(engines["zoo"].run(Estimate(study, "q", m, direction=way))), truth)[0, 1] for m in ("atp", "atp_qk", "atp_star")]
    assert said["denoise"] == pytest.approx([-0.02, 0.998, 0.991], abs=0.006) and said["noise"] == pytest.approx([0.46, 0.992, 0.963], abs=0.006)


# ------------------------------------------------------------------ for certain


def test_the_chances_are_bayes_rule_by_draws():
    """The chances of one cell equal those of draws from the Cauchy error, weighted by how well each explains the subsets' offset."""
    rng, n = np.random.default_rng(0), 40
    guess = rng.standard_t(2, n) * 0.1
    inside = np.zeros((24, n))
    for r in range(3):
        for g, some in enumerate(np.array_split(rng.permutation(n), 8)):
            inside[8 * r + g, some] = 1
    subsets, outside, last = Subsets(inside, inside @ guess + rng.normal(size=24) * 0.3), np.ones(n, bool), 0.8
    found, rest = Chances.of(subsets, guess, outside, last), subsets.effects - inside @ guess
    for i in (0, 7, 30):
        own, others = rest[inside[:, i] == 1], rest[inside[:, i] == 0]
        error = np.hypot(rest.std(ddof=1) * np.sqrt(1 / 3 + 1 / 21), 0.3 * guess[i])
        off = rng.standard_cauchy(500_000) * (0.1 * abs(guess[i]) + 0.01 * last)
        weight = (1 + ((own.mean() - others.mean() - off) / error) ** 2 / 22) ** -11.5 * (np.abs(off) < 10)
        for size in (0.05, 0.2, 0.8):
            want = weight[np.abs(guess[i] + off) > size].sum() / weight.sum()
            assert abs(found.beyond(size)[i] - want) < 0.05 * want + 2e-4
    bound = found.bound(0.95)
    assert found.beyond(bound).sum() <= 0.05 <= found.beyond(0.99 * bound).sum() + 0.005


def test_the_bound_holds_as_often_as_it_says():
    """Where effects add up, most estimates are nearly right and some cells are missed, no cell outside is larger than the bound in 95 % of draws and more."""
    rng, held, n = np.random.default_rng(0), 0, 200
    for _ in range(60):
        guess = rng.standard_t(2, n) * 0.05
        truth = guess + rng.standard_cauchy(n).clip(-50, 50) * (0.1 * np.abs(guess) + 0.002)
        inside = np.zeros((24, n))
        for r in range(3):
            for g, some in enumerate(np.array_split(rng.permutation(n), 8)):
                inside[8 * r + g, some] = 1
        last = np.sort(np.abs(guess))[-10]
        outside = np.abs(guess) < last
        effects = inside @ truth + rng.normal(size=24) * 0.02
        bound = Chances.of(Subsets(inside, effects), np.where(outside, guess, truth), outside, last).bound(0.95)
        held += bool(np.abs(truth[outside]).max() <= bound)
    assert held >= 55


def test_the_top_is_the_sweeps(engines):
    """What is certified is the top of the whole sweep, and no cell outside is larger than the bound."""
    truth = engines["zoo"].run(Sweep(STUDY, "z_pos"))
    effects = np.abs(truth.values - truth.base).ravel()
    found = engines["zoo"].run(Certify(STUDY, "z_pos", 4))
    best = [truth.nodes[i] for i in np.argsort(-effects)[:4]]
    assert found.certified and list(found.nodes) == best and found.certain.all() and found.ran <= 0.25 * found.cells
    np.testing.assert_allclose(np.abs(found.effects), np.sort(effects)[::-1][:4], rtol=1e-3)
    outside = [e for name, e in zip(truth.nodes, effects.tolist()) if name not in found.nodes]
    assert max(outside) < np.abs(found.effects).min()
    over = engines["zoo"].run(Certify(Study(PROMPT, prompt_set=read_prompt_set(IOI)[:3]), "attn_mlp", 2, over_set=True))
    assert over.cells == 120 and "mean over 3 prompts" in over.convention
    for ask, words in ((Certify(STUDY, "z", 10), "raise the share"), (Certify(STUDY, "z", 0), "top at least 1"), (Certify(STUDY, "pairs", 2), "several nodes")):
        with pytest.raises(UserError, match=words):
            engines["zoo"].run(ask)


def test_from_the_shell(engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    pair = ["--clean", PROMPT.clean, "--corrupt", PROMPT.corrupt, "--answer", " Mary", "--foil", " John"]
    assert program.main(["sweep", *pair, "--kind", "q", "--estimate", "atp_star", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["method"] == "atp_star"
    assert program.main(["certify", *pair, "--kind", "z_pos", "--top", "3"]) == 0
    assert "no other cell exceeds" in capsys.readouterr().out


async def test_on_the_screen(engines, tmp_path):
    app = make_app(engines["zoo"], tmp_path, State(prompt=PROMPT))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4", "*", "*", "*", "*")
        assert reply(app, "estimate").method == "atp_star" and "AtP*" in shown(app)
        await pilot.resize_terminal(80, 24)
        for key, name in (("v", ""), ("Q", "by AtP*"), ("*", ""), ("*", "by IG"), ("*", "by QK fix")):
            await press(app, pilot, key)
            assert name in shown(app)
        await press(app, pilot, "S")
        assert "truth 16/16" in shown(app) and "by QK fix" not in shown(app), "the truth is by no estimate"
