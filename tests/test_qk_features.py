"""QK attribution by features: every pair, row and sum against Hugging Face's own modules and sae_lens's own encoders; sets, checks, refusals, the zoo's hunt, screen."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch as t
from conftest import ARCHS, PROMPT
from dictionaries import build, save
from test_qk import ToSoftmax, pre_softmax, uncapped
from ui import make_app, press, reply, shown

import engine as program
from techniques.qk import loadings
from techniques.qk.requests import OTHERS, QK, QKCheck, QKFeaturesResult, QKSet
from tui import first_state
from utils import ROOT
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Study, read_prompt_set

PLACES = {
    "stream": ("jumprelu", "blocks.0.hook_resid_post"), "pre": ("standard", "blocks.1.hook_resid_pre"), "mid": ("standard", "blocks.0.hook_resid_mid"),
    "z": ("standard", "blocks.0.attn.hook_z"), "attn": ("topk", "blocks.0.hook_attn_out"), "mlp": ("gated", "blocks.0.hook_mlp_out"),
    "transcoder": ("transcoder", "blocks.0.mlp.hook_in"),
}  # fmt: skip
DEFAULT = (("llama", "stream"), ("gemma2", "z"))
EACH = [pytest.param(a, w, marks=() if (a, w) in DEFAULT else pytest.mark.table) for a in ARCHS for w in PLACES if a != "zoo"]
IOI = read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")
ZOO = Study(IOI[0], saes=("zoo/L1.resid_post",))
LAYER, HEAD, SOURCE, OTHER = 1, 2, 9, 8


@pytest.fixture(scope="module")
def sources(engines, tmp_path_factory):
    """SAEs of layer 0 (or of the stream behind it) of a model, by place."""

    class Sources(dict):
        def __missing__(self, key):
            model, (kind, hook) = engines[key[0]].model, PLACES[key[1]]
            info, more = model.info, {}
            if kind == "transcoder":
                acts = model.trace(model.row(PROMPT.clean, None, PROMPT.labels).ids, [hook, "blocks.0.hook_mlp_out"])
                more = {"pairs": tuple(acts[n][0].float() for n in (hook, "blocks.0.hook_mlp_out")), "d_out": info.d_model}
            sae = build(kind, hook, info.n_heads * info.d_head if key[1] == "z" else info.d_model, **more)
            self[key] = save(sae, tmp_path_factory.mktemp("sae") / "sae")
            return self[key]

    return Sources()


class Plain:
    """What an SAE's features, error and bias write, and what they add to queries and keys: sae_lens's encoder, and Hugging Face's modules alone."""

    def __init__(self, ref, ids, source: str, place: str):
        from sae_lens import SAE

        self.ref, self.ids, self.place, last = ref, ids, place, len(ids) - 1
        sae = SAE.load_from_disk(source, device="cpu", dtype="float32")
        sae.turn_off_forward_pass_hook_z_reshaping()
        spots = {"stream": ("resid_post", 0), "pre": ("resid_pre", 1), "mid": ("resid_mid", 0), "transcoder": ("mlp", 0)}
        y = ref.read(ids, spots.get(place, (place, 0)))[0]
        x = y if place != "transcoder" else ref.read(ids, ("mlp_in", 0))[0]
        with t.no_grad():
            self.f = sae.encode(x)
            self.rows, self.error, self.bias = sae.W_dec, y - sae.decode(self.f), sae.b_dec.expand_as(y)
        self.stream = ref.read(ids, ("resid_pre", LAYER))
        block = ref.blocks[LAYER]
        self.norm = block.ln_1 if ref.arch == "gpt2" else block.input_layernorm
        own = {p: ref.read(ids, (p, LAYER))[0][:, ref.columns(p, HEAD)] for p in "qk"}
        self.own = {"q": own["q"][last], "k": own["k"]}

    @t.no_grad()
    def parts(self, p: str, x: t.Tensor) -> t.Tensor:
        """What a write [seq, width] at the SAE's place adds to the head's queries or keys [seq, d_head], norms frozen."""
        ref, x = self.ref, x[None]
        if self.place == "z":
            m, z = ref.place("z", 0)[0], ref.read(self.ids, ("z", 0))
            x = m(x) - m(t.zeros_like(x))
            if ref.arch == "gemma2":
                after = ref.blocks[0].post_attention_layernorm
                x = x * after(m(z)) / m(z)
        zero = self.norm(t.zeros_like(x))
        centred = t.allclose(self.norm(self.stream + 1), self.norm(self.stream), atol=1e-4)
        centre = (lambda v: v - v.mean(-1, keepdim=True)) if centred else (lambda v: v)
        x = centre(x) * (self.norm(self.stream) - zero) / centre(self.stream)
        m = ref.place(p, LAYER)[0]
        return (m(x) - m(t.zeros_like(x)))[0][:, ref.columns(p, HEAD)]

    def write(self, name: str) -> t.Tensor:
        what = name.rpartition(".")[2]
        return {"error": self.error, "bias": self.bias}[what] if what in ("error", "bias") else self.f[:, [int(what[1:])]] * self.rows[[int(what[1:])]]

    def length(self, x: t.Tensor) -> t.Tensor:
        return (x.square().mean(-1) + self.ref.config.rms_norm_eps).sqrt() if self.ref.arch == "qwen3" else t.ones(x.shape[:-1])

    def scores(self, pairs: list[tuple[t.Tensor, t.Tensor]]) -> np.ndarray:
        """The score at SOURCE less that at OTHER of queries [d_head] and keys [seq, d_head] in the place of the head's own; norms of q and k undone."""
        ref, last = self.ref, len(self.ids) - 1

        def put(p, some, spots):
            def fn(x):
                x[:, spots, ref.columns(p, HEAD)] = t.stack(some).to(x)

            return fn

        both = [SOURCE, OTHER]
        edits = [(("q", LAYER), put("q", [q for q, _ in pairs], last)), (("k", LAYER), put("k", [k[both] for _, k in pairs], both))]
        with ToSoftmax() as caught:
            ref.run([self.ids] * len(pairs), edits)
        rows = uncapped(ref, caught.seen[LAYER].double())[:, HEAD, last, both]
        ratio = t.stack([self.length(q) / self.length(self.own["q"]) * (self.length(k) / self.length(self.own["k"]))[both] for q, k in pairs])
        return ((rows * ratio) @ t.tensor([1.0, -1.0]).double()).numpy()


@pytest.mark.parametrize("arch, place", EACH)
def test_pairs_rows_and_sums_against_hugging_face(engines, references, sources, arch, place):
    ref, engine, source = references[arch], engines[arch], sources[arch, place]
    if place == "transcoder":
        ref.known[engine.model.row(PROMPT.clean, None, PROMPT.labels).ids, ("mlp_in", 0)] = engine.model.trace(
            engine.model.row(PROMPT.clean, None, PROMPT.labels).ids, ["blocks.0.mlp.hook_in"]
        )["blocks.0.mlp.hook_in"].float()
    if place == "mid" and engine.model.parallel:
        pytest.skip("no resid_mid in a parallel block")
    study = Study(PROMPT, saes=(source,))
    r = engine.run(QK(study, LAYER, HEAD, -1, SOURCE, OTHER, features=True, most=15))
    plain = Plain(ref, r.tokens.ids, source, place)
    row = uncapped(ref, pre_softmax(ref, r.tokens.ids, LAYER)[HEAD, -1].double())
    want = float(row[SOURCE] - row[OTHER])
    near = lambda got, want: np.testing.assert_allclose(got, want, atol=1e-4 * max(1, np.abs(want).max()))  # noqa: E731
    near([r.values.sum(dtype=np.float64), r.score, r.total], [want] * 3)
    assert r.error < 1e-4 * max(1, abs(want)) and isinstance(r, QKFeaturesResult) and tuple(i.source for i in r.saes) == (source,)
    pairs = [(plain.parts("q", plain.write(a))[-1], plain.parts("k", plain.write(b))) for a, b in r.pair_names]
    near(r.pair, plain.scores(pairs))
    fire = plain.f != 0
    assert r.fired == (int(fire[-1].sum()), int(fire[[SOURCE, OTHER]].any(0).sum())) and r.pairs == r.fired[0] * r.fired[1]
    some = [i for i, name in enumerate(r.queries) if ".sae." in name]
    near(r.values[some].sum(1), plain.scores([(plain.parts("q", plain.write(r.queries[i]))[-1], plain.own["k"]) for i in some]))
    own = {"stream", "pre"} & {place}
    assert bool(own) == (not any(n.startswith(("embed", "L0H", "L0.mlp")) for n in r.queries)), "what an SAE stands for is no row"
    some = [j for j, name in enumerate(r.keys) if ".sae.f" in name or name.endswith("error")]
    q = plain.own["q"]
    near(r.values[:, some].sum(0), plain.scores([(q, plain.parts("k", plain.write(r.keys[j]))) for j in some]))


@pytest.mark.table
@pytest.mark.parametrize("arch", ARCHS[:-1])
def test_several_at_once(engines, sources, arch):
    """SAEs of several parts, and a stream's with those behind it, against the mean and alone: the sums stay the model's scores."""
    engine, tmp = engines[arch], [sources[arch, w] for w in ("z", "pre")]
    components = engine.run(QK(Study(PROMPT), 2, HEAD, -1, SOURCE))
    both = engine.run(QK(Study(PROMPT, saes=tuple(tmp)), 2, HEAD, -1, SOURCE, features=True))
    assert abs(both.total - components.total) < 1e-4 * max(1, abs(components.total)) and both.saes[0].source == tmp[1] and len(both.saes) == 1
    assert f"{tmp[0]} is part of the stream that {tmp[1]} explains" in both.convention
    one = engine.run(QK(Study(PROMPT, saes=tuple(tmp)), 1, HEAD, -1, SOURCE, "none", features=True, which="corrupt"))
    assert one.error < 1e-4 * max(1, abs(one.score)) and one.saes[0].source == tmp[1]


def test_over_a_set_equals_the_mean_of_its_prompts(engines):
    """Entries, pairs, intervals, and in how many prompts a pair fires; the table's size changes no sum."""
    run, prompts = engines["zoo"].run, IOI[:3]
    study = replace(ZOO, prompt_set=prompts)
    whole = run(QKSet(study, 2, 0, "END", "S1", features=True, most=1000))
    each = [run(QK(replace(ZOO, prompt=p), 2, 0, "END", "S1", features=True, most=1000)) for p in prompts]
    cells = [{(a, b): v for a, line in zip(r.queries, r.values.astype(float)) for b, v in zip(r.keys, line)} for r in each]
    x = np.array([[[c.get((a, b), 0.0) for b in whole.keys] for a in whole.queries] for c in cells])
    half = 4.303 * x.std(0, ddof=1) / np.sqrt(3)
    np.testing.assert_allclose([whole.values, whole.low, whole.high], [x.mean(0), x.mean(0) - half, x.mean(0) + half], atol=1e-4)
    assert (whole.fires == np.sum([[[(a, b) in c for b in whole.keys] for a in whole.queries] for c in cells], 0)).all()
    n = int(whole.pair_fires.argmin())
    assert whole.pair_fires[n] < 3 and abs(whole.pair[n] - np.mean([c.get(whole.pair_names[n], 0.0) for c in cells])) < 1e-5
    assert whole.pairs == len({p for c in cells for p in c if ".sae.f" in p[0] and ".sae.f" in p[1]})
    few = run(QKSet(study, 2, 0, "END", "S1", features=True, most=3))
    assert few.queries.count(OTHERS) == few.keys.count(OTHERS) == 1 and len(few.pair) == 3 and few.pair_names == whole.pair_names[:3]
    np.testing.assert_allclose(few.values.sum(), whole.values.sum(), atol=1e-4)
    np.testing.assert_allclose(few.pair.sum() + few.other_pairs, whole.pair.sum() + whole.other_pairs, atol=1e-4)
    np.testing.assert_allclose(
        few.pair, few.values.dtype.type([whole.values[whole.queries.index(a), whole.keys.index(b)] for a, b in few.pair_names]), atol=1e-5
    )


def test_ranked_in_blocks(monkeypatch, engines):
    ask = QK(ZOO, 2, 0, "END", 4, features=True)
    whole = engines["zoo"].run(ask)
    monkeypatch.setattr(loadings, "BLOCK", 300)
    again = engines["zoo"].run(ask)
    assert again.pair_names == whole.pair_names and again.queries == whole.queries and again.keys == whole.keys and again.pairs == whole.pairs
    np.testing.assert_allclose(again.values, whole.values, atol=1e-6)
    monkeypatch.setattr(loadings, "MOST_BYTES", 1000)
    with pytest.raises(UserError, match="take fewer prompts"):
        engines["zoo"].run(QKSet(replace(ZOO, prompt_set=IOI[:2]), 2, 0, "END", "S1", features=True))


def test_a_check_takes_the_features_write_away(engines, references, sources):
    """Predicted, with norms frozen and computed again, and the metric, by a query (or keys) that Hugging Face's modules make of the stream without the feature."""
    ref, engine, source = references["llama"], engines["llama"], sources["llama", "stream"]
    study = Study(PROMPT, saes=(source,))
    r = engine.run(QK(study, LAYER, HEAD, -1, SOURCE, OTHER, features=True))
    plain, ids = Plain(ref, r.tokens.ids, source, "stream"), r.tokens.ids
    for side, name in (("q", r.pair_names[0][0]), ("k", r.pair_names[0][1]), ("q", "L0.sae.error")):
        got = engine.run(QKCheck(study, LAYER, HEAD, -1, SOURCE, OTHER, features=True, component=name, side=side))
        names = r.queries if side == "q" else r.keys
        entry = r.values.sum(1 if side == "q" else 0)[names.index(name)]
        np.testing.assert_allclose([got.predicted, got.frozen], [-entry] * 2, atol=1e-4)
        with t.no_grad():
            m = ref.place(side, LAYER)[0](plain.norm(plain.stream - plain.write(name)[None]))[0][:, ref.columns(side, HEAD)]
        new = (m[-1], plain.own["k"]) if side == "q" else (plain.own["q"], m)
        change = plain.scores([new]) - plain.scores([(plain.own["q"], plain.own["k"])])
        np.testing.assert_allclose(got.true, change[0], atol=1e-4)

        def put(x, side=side, m=m):
            spot = slice(len(ids) - 1, None) if side == "q" else slice(None)
            x[0, spot, ref.columns(side, HEAD)] = m[spot]

        logits = ref.run([ids], [((side, LAYER), put)])[0][0, -1]
        answer, foil = (engine.model.row(text, False).ids[0] for text in (PROMPT.answers[0], PROMPT.foils[0]))
        np.testing.assert_allclose(got.metric[1], logits[answer] - logits[foil], atol=1e-4)


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["layer_norm", "constant_norm_rescale"])
def test_a_feature_of_the_other_prompt_is_written_at_that_ones_scale(engines, references, tmp_path, arch, how):
    """A patch moves the sum as taking the feature away does, by the ratio of writes: of sae_lens's encoder, with the normalisation of each prompt undone by hand."""
    ref, engine = references[arch], engines[arch]
    source = save(sae := build("standard", "blocks.0.hook_resid_post", engine.model.info.d_model, normalize_activations=how), tmp_path / "sae")
    study = Study(PROMPT, saes=(source,))
    rows = [engine.model.row(text, None, PROMPT.labels if text == PROMPT.clean else ()).ids for text in (PROMPT.clean, PROMPT.corrupt)]
    with t.no_grad():
        x = t.cat([ref.read(ids, ("resid_post", 0))[0, -1:] for ids in rows])
        f = sae.encode(x)
    f = f * (x.std(-1, keepdim=True) if how == "layer_norm" else x.norm(dim=-1, keepdim=True) / x.shape[1] ** 0.5)
    index = int((f[0] > 0).nonzero()[f[0][f[0] > 0].argmax()])
    base = QKCheck(study, LAYER, HEAD, -1, SOURCE, OTHER, which="clean", features=True, component=f"L0.sae.f{index}")
    zero, patch = (engine.run(replace(base, op=op)) for op in ("zero", "patch"))
    assert abs(float(f[1, index] / f[0, index]) - 1) > 1e-3 and abs(zero.predicted) > 1e-3
    want = float((f[0, index] - f[1, index]) / f[0, index]) * zero.predicted
    np.testing.assert_allclose([patch.predicted, patch.frozen], [want] * 2, atol=1e-4)


def test_under_interventions(engines):
    """The sum is that of the changed run; with the SAE's own features changed, the error kept or dropped, and queries written over."""
    name = engines["zoo"].run(QK(ZOO, 2, 0, "END", 4, features=True)).pair_names[0][0]
    for kept in (True, False):
        study = replace(ZOO, interventions=tuple(map(parse_intervention, (f"{name}=zero", "L0H1=zero", "L2H0.q@END=scale:2"))), sae_error=kept)
        r = engines["zoo"].run(QK(study, 2, 0, "END", 4, features=True))
        assert (
            r.error < 1e-4 and name not in r.pair_names[0] and "interventions" in r.queries and "as the SAE reads them under the interventions" in r.convention
        )
        assert abs(r.total - engines["zoo"].run(QK(study, 2, 0, "END", 4)).total) < 1e-4 and ("kept" if kept else "dropped") in r.convention


def test_what_cannot_be_is_said(engines, sources):
    run, tc = engines["zoo"].run, "zoo/transcoders/L0"
    many = replace(ZOO, saes=("zoo/L1.resid_post", "zoo/L2.resid_post", "zoo/L0.resid_post"))
    assert "zoo/L2.resid_post writes blocks.2.hook_resid_post, after what heads of layer 2 read" in run(QK(many, 2, 0, features=True)).convention
    for ask, words in (
        (QK(Study(IOI[0]), 2, 0, features=True), "no SAE is loaded"),
        (QK(ZOO, 1, 0, features=True), "Load one that stands before, such as at blocks.0.hook_resid_post"),
        (QK(ZOO, 2, 0, 99, features=True), "position 99"),
        (QK(ZOO, 2, 0, features=True, most=0), "most must be at least 1"),
        (QK(replace(ZOO, saes=(tc,), interventions=(parse_intervention("L0.mlp=zero"),)), 2, 0, features=True), "no longer what was written"),
        (QKCheck(ZOO, 2, 0, "END", 4, features=True, component="L1.sae.f0"), "it does not fire at the destination"),
        (QKCheck(ZOO, 2, 0, "END", 4, features=True, component="L1.sae.bias"), "no component that writes"),
        (QKCheck(ZOO, 2, 0, "END", 4, features=True, component="L0H1"), "no component that writes"),
    ):
        with pytest.raises(UserError, match=words):
            run(ask)


def test_the_hunt_of_the_docs(engines):
    """The numbers of docs/qk.md."""
    run, page = engines["zoo"].run, (ROOT / "docs" / "qk.md").read_text(encoding="utf-8")
    r = run(QKSet(replace(ZOO, prompt_set=IOI), 2, 0, "END", "S1", features=True))
    for (a, b), x, low, high, fires in zip(r.pair_names[:3], r.pair, r.pair_low, r.pair_high, r.pair_fires):
        assert f"{a} × {b} {x:+.2f} [{low:+.2f}, {high:+.2f}] in {fires}/32" in page, (a, b, x, low, high, fires)
    features = float(r.pair.sum()) + r.other_pairs
    assert f"pairs of features {features:+.2f} of {r.total:+.2f}" in page, features
    name = r.pair_names[0][0]
    c = run(QKCheck(ZOO, 2, 0, "END", 4, features=True, component=name))
    words = f"{c.predicted:+.2f} with norms frozen, {c.true:+.2f} with norms computed again; attention {c.attention[0]:.2f} → {c.attention[1]:.2f}"
    assert words in page, words


def test_from_the_shell(engines, monkeypatch, capsys):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    words = ["qk", "--layer", "2", "--head", "0", "--source", "S1", "--features", "--sae", "zoo/L1.resid_post", "--set", "zoo/prompts/ioi_abba.jsonl"]
    assert program.main([*words, "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert got["saes"][0]["source"] == "zoo/L1.resid_post" and got["pair_names"][0][0].startswith("L1.sae.f")
    assert program.main(words) == 0
    out = capsys.readouterr().out
    assert "pairs of features by size" in out and "other pairs of features" in out and "L1.sae.error" in out
    assert program.main([*words, "--check", got["pair_names"][0][0]]) == 0
    assert "taken away" in capsys.readouterr().out


async def test_on_the_screen(engines, tmp_path):
    """v turns from components to features and pairs; C checks, a ablates the feature, c keeps its nodes."""
    state = replace(first_state({}), saes=("zoo/L1.resid_post",), sae="zoo/L1.resid_post")
    app = make_app(engines["zoo"], tmp_path, state)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "9")
        app.move(layer=2, head=0, comp="head", pos=14, src=4)
        await press(app, pilot, "v", "p")
        r = reply(app, "qk")
        assert isinstance(r, QKFeaturesResult) and f"{r.pair[0]:+.4f}" in shown(app) and "other pairs of features" in shown(app)
        assert r.labels[r.pair_names[0][0]] in shown(app), "a feature's label"
        await press(app, pilot, "C")
        assert "frozen" in shown(app) and "taken away" in shown(app)
        await press(app, pilot, "j", "c")
        assert app.state.current.nodes == tuple(dict.fromkeys(sorted(r.pair_names[1], key=lambda n: int(n[8:]))))
        await press(app, pilot, "a")
        assert str(app.state.interventions[0]) == f"{r.pair_names[1][0]}=zero"
        await press(app, pilot, "u", "v", "f", "j", "l")
        names = app.panes["qk"].sides(app)
        assert names[0] in r.queries and "L1." in shown(app) and "sum" in shown(app)
        await press(app, pilot, "v", "c")
        assert not isinstance(reply(app, "qk"), QKFeaturesResult)
