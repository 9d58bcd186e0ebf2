"""QK attribution: every entry against Hugging Face's own modules, sums against the scores that its softmax gets; checks by the real path; set, shell, screen."""

import json

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, PROMPT
from torch.overrides import TorchFunctionMode
from ui import grid, make_app, press, reply, shown

import engine as program
from techniques.circuits.requests import PathPatch
from techniques.qk.requests import QK, QKCheck, QKResult, QKSet
from utils import ROOT
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Study, read_prompt_set

STUDY = Study(PROMPT)
DEFAULT = ("gemma2", "llama")
EACH = [pytest.param(a, marks=() if a in DEFAULT else pytest.mark.table) for a in ARCHS]
ONE = [pytest.param(a, marks=() if a == "gemma2" else pytest.mark.table) for a in ARCHS]
IOI = ROOT / "zoo" / "prompts" / "ioi_baba.jsonl"


class ToSoftmax(TorchFunctionMode):
    """What each softmax of Hugging Face's model gets, in order."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (t.nn.functional.softmax, t.softmax, t.Tensor.softmax):
            self.seen.append(args[0].clone())
        return func(*args, **(kwargs or {}))


def pre_softmax(ref, ids, layer):
    """Scores [head, destination, source] that the layer's softmax gets: after the soft cap where there is one."""
    with ToSoftmax() as caught, t.no_grad():
        ref.hf(t.tensor([ids]), use_cache=False)
    return caught.seen[layer][0]


def uncapped(ref, scores):
    cap = getattr(ref.config, "attn_logit_softcapping", None)
    return cap * t.atanh(scores / cap) if cap else scores


@pytest.mark.parametrize("arch", EACH)
def test_sums_are_the_scores_of_hugging_face(engines, references, arch):
    """Against the mean, another source, and nothing; every layer; the model's own score beside it."""
    ref, engine = references[arch], engines[arch]
    for layer in range(engine.model.info.n_layers):
        for head, source, instead in ((0, 9, "mean"), (3, 8, 10), (2, 12, "none")):
            r = engine.run(QK(STUDY, layer, head, -1, source, instead))
            caught = pre_softmax(ref, r.tokens.ids, layer)[head, -1].double()
            row = uncapped(ref, caught.double())
            other = {"mean": row[caught > -1e9].mean(), "none": 0.0}.get(instead, row[10])
            want = float(row[source] - other)
            assert abs(r.values.sum(dtype=np.float64) - want) < 1e-4 * max(1, abs(want)) and abs(r.score - want) < 1e-4 * max(1, abs(want))
            assert r.error < 1e-4 * max(1, abs(want)) and r.queries == r.keys and r.values.shape == (len(r.queries),) * 2
            if r.cap:
                seen = caught - {"mean": caught[caught > -1e9].mean(), "none": 0.0}.get(instead, caught[10])
                assert abs(r.capped - float(seen[source])) < 1e-4


@pytest.mark.parametrize("arch", ONE)
def test_an_entry_is_its_own_product(engines, references, arch):
    """
    One component in the query and one in the key, by Hugging Face's modules alone: the projections are fed with what the component adds through the frozen norm, and
    the score is linear in each, so an entry is what is left of four scores with biases out of both.
    """
    ref, engine, layer, head, source = references[arch], engines[arch], 1, 2, 9
    r = engine.run(QK(STUDY, layer, head, -1, source, "none"))
    ids, last = r.tokens.ids, len(r.tokens.ids) - 1
    stream, mlp = ref.read(ids, ("resid_pre", layer)), ref.read(ids, ("mlp", 0))
    block = ref.blocks[layer]
    norm = block.ln_1 if ref.arch == "gpt2" else block.input_layernorm
    q, k = ref.read(ids, ("q", layer)), ref.read(ids, ("k", layer))
    own = {"q": q[0, last, ref.columns("q", head)], "k": k[0, source, ref.columns("k", head)]}
    module = {p: ref.place(p, layer)[0] for p in "qk"}
    with t.no_grad():
        zero = norm(t.zeros_like(stream))
        centred = t.allclose(norm(stream + 1), norm(stream), atol=1e-4)
        centre = (lambda x: x - x.mean(-1, keepdim=True)) if centred else (lambda x: x)
        normed = centre(mlp) * (norm(stream) - zero) / centre(stream)
        part = {p: (m(normed) - m(t.zeros_like(normed)))[0] for p, m in module.items()}
        part = {"q": part["q"][last, ref.columns("q", head)], "k": part["k"][source, ref.columns("k", head)]}

    def score(dq, dk):
        """The score when the head's query and key are their own and so much more; norms of q and k frozen by undoing what they do to the length."""

        def put(spot, vector, columns):
            def fn(x):
                x[0, spot, columns] = vector

            return fn

        edits = [(("q", layer), put(last, own["q"] + dq, ref.columns("q", head))), (("k", layer), put(source, own["k"] + dk, ref.columns("k", head)))]
        with ToSoftmax() as caught:
            ref.run([ids], edits)
        row = uncapped(ref, caught.seen[layer][0].double())[head, last, source]
        return row * float(length(own["q"] + dq, "q") / length(own["q"], "q") * length(own["k"] + dk, "k") / length(own["k"], "k"))

    def length(x, p):
        return (x.square().mean() + ref.config.rms_norm_eps).sqrt() if ref.arch == "qwen3" else t.ones(())

    nothing = t.zeros(())
    want = float(score(part["q"], part["k"]) - score(part["q"], nothing) - score(nothing, part["k"]) + score(nothing, nothing))
    i = r.queries.index("L0.mlp")
    assert abs(float(r.values[i, i]) - want) < 2e-4 * max(1, abs(want))


@pytest.mark.parametrize("arch", ONE)
def test_a_check_is_path_patching(engines, arch):
    """The metric of a checked path is that of the path patch into q or k; small changes do to the score what the sum says."""
    engine = engines[arch]
    for side in "qk":
        for component in ("L0H1", "L0.mlp"):
            found = engine.run(QKCheck(STUDY, 1, 2, "END", 9, component=component, side=side, op="patch"))
            path = engine.run(PathPatch(STUDY, (component,), (f"L1H2.{side}" + "@END" * (side == "q"),)))
            assert abs(found.metric[1] - path.values[np.isfinite(path.values)].item()) < 1e-4
    before = engine.run(QK(STUDY, 1, 2, "END", 9))
    taken = engine.run(QKCheck(STUDY, 1, 2, "END", 9, component="L0.mlp"))
    assert abs(taken.predicted + before.values[before.queries.index("L0.mlp")].sum()) < 1e-4


def test_interventions_are_a_row_of_their_own(engines):
    study = Study(PROMPT, tuple(parse_intervention(x) for x in ("L0.mlp=scale:0.5", "L1H2.q@END=scale:2", "L0H1=zero")))
    r = engines["zoo"].run(QK(study, 1, 2, "END", 4))
    assert r.error < 1e-4 and r.queries[-1] == "interventions" and abs(r.values[-1].sum()) > 0.1 and not r.values[r.queries.index("L0H1")].any()
    assert engines["zoo"].run(QK(study, 1, 2, "END", 4, which="clean")).queries[-1] == "bias"


def test_what_cannot_be_is_said(engines):
    run = engines["gemma2"].run
    for ask, words in (
        (QK(STUDY, 9), "no layer 9"),
        (QK(STUDY, 0, 9), "no head 9"),
        (QK(STUDY, 0, 0, 3, 5), "source 5 can't be seen from destination 3: it comes after it"),
        (QK(STUDY, 0, 0, -1, 1), "is outside the head's window"),
        (QK(STUDY, 0, 0, -1, 9, 9), "against itself is nothing"),
        (QKSet(STUDY, 0, 0, -1), "there is no prompt set"),
        (QKCheck(STUDY, 1, 0, -1, 9, component="L2H1"), "L2H1 is no component that writes into L1H0"),
        (QKCheck(Study(PROMPT.__class__(PROMPT.clean)), 1, 0, -1, 9, component="embed", op="patch"), "no corrupted prompt"),
    ):
        with pytest.raises(UserError, match=words):
            run(ask)


def test_over_a_set(engines):
    """Means and intervals are those of the single prompts' tables."""
    prompts = read_prompt_set(IOI)[:4]
    study = Study(prompts[0], prompt_set=prompts)
    whole = engines["zoo"].run(QKSet(study, 2, 1, "END", "IO", "S2"))
    each = np.stack([engines["zoo"].run(QK(Study(p), 2, 1, "END", "IO", "S2")).values for p in prompts]).astype(float)
    half = 3.182 * each.std(0, ddof=1) / 2
    np.testing.assert_allclose(whole.values, each.mean(0), atol=1e-5)
    np.testing.assert_allclose(whole.low, each.mean(0) - half, atol=1e-4)
    np.testing.assert_allclose(whole.high, each.mean(0) + half, atol=1e-4)
    np.testing.assert_allclose(whole.totals, each.sum((1, 2)), atol=1e-4)
    with pytest.raises(UserError, match="the source has to be one"):
        engines["zoo"].run(QKSet(study, 2, 1, "END"))


def test_the_hunt_of_the_docs(engines):
    """The numbers of docs/qk.md."""
    r, page = (
        engines["zoo"].run(QK(Study(read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[0]), 2, 0, "END", 4)),
        (ROOT / "docs" / "qk.md").read_text(encoding="utf-8"),
    )
    rows, cols = dict(zip(r.queries, r.values.sum(1).tolist())), dict(zip(r.keys, r.values.sum(0).tolist()))
    assert f"attention {r.attention:.3f}".replace("0.", ".") in page and f"The sum says {r.total:+.2f} against" in page
    assert max(rows, key=rows.get) == "L0.mlp" and max(cols, key=cols.get) == "L1.mlp"
    for words in (
        f"MLP 0 at the destination ({rows['L0.mlp']:+.2f})",
        f"L1H3 ({rows['L1H3']:+.2f})",
        f"L1H0 ({rows['L1H0']:+.2f})",
        f"MLP 1 at the source ({cols['L1.mlp']:+.2f})",
    ):
        assert words in page, words


def test_from_the_shell(engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    words = ["qk", "--clean", PROMPT.clean, "--layer", "2", "--head", "1", "--answer", " Mary", "--foil", " John"]
    assert program.main([*words, "--source", "4", "--instead", "2", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    want = engines["zoo"].run(QK(Study(PROMPT.__class__(PROMPT.clean)), 2, 1, None, 4, 2))
    np.testing.assert_allclose(got["values"], want.values, rtol=1e-6)
    assert program.main(words) == 0
    assert "less the mean over the 15 sources in sight" in capsys.readouterr().out
    assert program.main([*words, "--check", "L0H1", "--side", "k", "--op", "zero"]) == 0
    assert "L0H1 → L2H1.k taken away" in capsys.readouterr().out


async def test_on_the_screen(engines, tmp_path):
    """enter twice from the map of heads: the cell's score, its entries checked and kept."""
    app = make_app(engines["zoo"], tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2")
        app.move(layer=2, head=1, comp="head", pos=14)
        await press(app, pilot, "enter", "enter")
        assert app.pane == "qk" and "9 QK" in shown(app)
        r = reply(app, "qk")
        assert isinstance(r, QKResult) and (r.layer, r.head, r.dest, r.source) == (2, 1, 14, app.cursor.src)
        assert abs(grid(app).values[0, 0] - r.total) < 1e-4 and f"model {r.score:+.4f}" in shown(app)
        await press(app, pilot, "j", "l", "c")
        assert len(app.state.current.edges) == 2 and all(">L2H1." in e for e in app.state.current.edges)
        await press(app, pilot, "C")
        assert "the sum says" in shown(app)
        await press(app, pilot, "enter", *"none", "enter")
        assert reply(app, "qk").instead == ""
        await press(app, pilot, "enter", *"mean", "enter", "P")
        assert reply(app, "qk").instead.startswith("the mean")
        assert grid(app).rows[1:] == list(r.queries)[: len(grid(app).rows) - 1] or "rest" in grid(app).rows
