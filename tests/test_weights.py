"""Weights against numpy on plain Hugging Face state dicts: full token × token and d_model × d_model matrices, which the program never makes."""

import json
import math

import numpy as np
import pytest
import torch as t
from transformers import AutoModelForCausalLM, AutoTokenizer

from techniques.weights import matrices
from techniques.weights import heads as weights
from techniques.weights.requests import Composition, HeadWeights, HeadWeightsResult, Singular
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Progress
from vocabulary.wire import encode, Frame, read_frame
from reference import Reference

LAYER, HEAD = 1, 3
ROTARY = ("neox", "llama", "gemma2", "qwen3")


class Plain:
    """Matrices of one model from its state dict, in double."""

    def __init__(self, ref: Reference, folder):
        self.ref, self.arch, self.config = ref, ref.arch, ref.config
        self.centred = self.arch in ("gpt2", "gpt_neox")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        special = set(tokenizer.all_special_ids)
        self.ids = np.array([i for i in range(len(tokenizer)) if i not in special])
        scale = self.config.hidden_size**0.5 if self.arch == "gemma2" else 1
        self.embed = double(ref.embed.weight)[self.ids] * scale
        self.unembed = ref.unembed[self.ids]
        self.b_u = ref.b_u[self.ids] if isinstance(ref.b_u, np.ndarray) else 0

    def head(self, part: str, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """[d_model, d_head] and its bias."""
        module, where = self.ref.place(part, layer)[0], self.ref.columns(part, head)
        w = double(module.weight)
        bias = getattr(module, "bias", None)
        return (w if self.arch == "gpt2" else w.T)[:, where], 0 if bias is None else double(bias)[where]

    def out(self, layer: int, head: int) -> np.ndarray:
        module, where = self.ref.place("z", layer)[0], self.ref.columns("z", head)
        w = double(module.weight)
        return (w if self.arch == "gpt2" else w.T)[where]

    def ln1(self, layer: int):
        b = self.ref.blocks[layer]
        return b.ln_1 if self.arch == "gpt2" else b.input_layernorm

    def ln2(self, layer: int):
        b = self.ref.blocks[layer]
        return b.ln_2 if self.arch == "gpt2" else b.pre_feedforward_layernorm if self.arch == "gemma2" else b.post_attention_layernorm

    def gain(self, norm) -> np.ndarray:
        return double(norm.weight) + (self.arch == "gemma2")

    def unit(self, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(-1, keepdims=True) if self.centred else x
        eps = getattr(self.config, "layer_norm_epsilon", None) or getattr(self.config, "layer_norm_eps", None) or self.config.rms_norm_eps
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)

    def norm(self, norm, x: np.ndarray) -> np.ndarray:
        return self.unit(x) * self.gain(norm) + (double(norm.bias) if self.centred else 0)

    def centring(self) -> np.ndarray:
        d = self.config.hidden_size
        return np.eye(d) - (1 / d if self.centred else 0)

    def fold(self, norm, w: np.ndarray) -> np.ndarray:
        return self.centring() @ np.diag(self.gain(norm)) @ w

    def post(self, layer: int, name: str = "post_attention_layernorm") -> np.ndarray:
        return np.diag(self.gain(getattr(self.ref.blocks[layer], name))) if self.arch == "gemma2" else np.eye(self.config.hidden_size)

    @property
    def scale(self) -> float:
        return (getattr(self.config, "query_pre_attn_scalar", None) or self.ref.d_head) ** -0.5

    def effective(self) -> np.ndarray:
        """Embeddings plus MLP 0 of them, by Hugging Face's own modules."""
        b, x = self.ref.blocks[0], t.tensor(self.embed).float()[None]
        with t.no_grad():
            y = b.mlp(self.ln2(0)(x))
            y = b.post_feedforward_layernorm(y) if self.arch == "gemma2" else y
        return (x + y)[0].double().numpy()

    def ov(self, x: np.ndarray, layer: int, head: int) -> np.ndarray:
        """[source token, written token], without biases, final gain folded."""
        v = self.unit(x) @ np.diag(self.gain(self.ln1(layer))) @ self.head("v", layer, head)[0]
        return v @ self.out(layer, head) @ self.post(layer) @ self.fold(self.ref.norm, self.unembed.T)

    def qk(self, x: np.ndarray, layer: int, head: int, distance: int) -> np.ndarray:
        """[destination, source] scores before the softmax; the rotation by Hugging Face's functions."""
        n = self.norm(self.ln1(layer), x)
        (wq, bq), (wk, bk) = self.head("q", layer, head), self.head("k", layer, head)
        q, k = n @ wq + bq, n @ wk + bk
        if self.arch == "qwen3":
            attn = self.ref.attn(layer)
            q, k = self.unit(q) * double(attn.q_norm.weight), self.unit(k) * double(attn.k_norm.weight)
        if self.arch != "gpt2":
            import importlib

            body = self.ref.hf.gpt_neox if self.arch == "gpt_neox" else self.ref.hf.model
            turn = importlib.import_module(type(self.ref.hf).__module__).apply_rotary_pos_emb
            cos, sin = body.rotary_emb(t.zeros(1, 1, 1), t.arange(distance + 1)[None])
            heads = lambda z: t.tensor(z).float()[None, :, None]  # noqa: E731  (one "head" a token)
            q = turn(heads(q), heads(q), cos[:, -1:], sin[:, -1:])[0][0, :, 0].double().numpy()
            k = turn(heads(k), heads(k), cos[:, :1], sin[:, :1])[1][0, :, 0].double().numpy()
        return q @ k.T * self.scale

    def circuits(self, layer: int, head: int) -> tuple[np.ndarray, np.ndarray]:
        """Folded OV and QK, d_model × d_model."""
        q, k, v = (self.fold(self.ln1(layer), self.head(p, layer, head)[0]) for p in "qkv")
        if self.arch == "qwen3":
            attn = self.ref.attn(layer)
            q, k = q * double(attn.q_norm.weight), k * double(attn.k_norm.weight)
        return v @ self.out(layer, head) @ self.post(layer) @ self.centring(), q @ k.T


def double(w: t.Tensor) -> np.ndarray:
    return w.detach().double().numpy()


@pytest.fixture
def plain(reference, folders, arch) -> Plain:
    return Plain(reference, folders[arch])


def cells(pairs, plain: Plain, full: np.ndarray) -> np.ndarray:
    where = {int(i): n for n, i in enumerate(plain.ids)}
    return np.array([full[where[a], where[b]] for a, b in pairs.ids.tolist()])


def check_pairs(best, worst, plain: Plain, full: np.ndarray, k: int) -> None:
    ordered = np.sort(full.ravel())
    size = np.abs(full).max()
    for pairs, want in ((best, ordered[::-1][:k]), (worst, ordered[:k])):
        assert pairs.scores.shape == (k,) and pairs.ids.shape == (k, 2) and len(set(map(tuple, pairs.ids.tolist()))) == k
        np.testing.assert_allclose(pairs.scores, want, atol=2e-5 * size)
        np.testing.assert_allclose(pairs.scores, cells(pairs, plain, full), atol=2e-5 * size)


# ------------------------------------------------------------------ OV and QK in tokens


@pytest.mark.slow
@pytest.mark.parametrize("mlp0", [False, True])
def test_pairs_are_those_of_the_full_matrices(engine, plain, mlp0):
    for distance in (0, 5):
        r = engine.run(HeadWeights(LAYER, HEAD, 15, distance, mlp0))
        x = plain.effective() if mlp0 else plain.embed
        assert r.vocabulary == len(plain.ids) and r.kv_head == HEAD // (plain.ref.heads // plain.ref.kv_heads)
        check_pairs(r.ov_top, r.ov_bottom, plain, plain.ov(x, LAYER, HEAD), 15)
        check_pairs(r.qk_top, r.qk_bottom, plain, plain.qk(x, LAYER, HEAD, distance), 15)
        assert r.error < 1e-4
        assert all(int(i) in r.texts for p in (r.ov_top, r.qk_bottom) for i in p.ids.ravel())


def test_qk_at_a_distance_is_what_layer_0_attends_by(engines, references, folders):
    """Two sources of one destination: the log ratio of their attention, against the destination's to itself, in Hugging Face's own run."""
    for arch in ROTARY:
        r, ref = engines[arch].run(HeadWeights(0, 2, 1000, 4)), references[arch]
        by_destination: dict[int, list] = {}
        for (a, b), score in zip(r.qk_top.ids.tolist(), r.qk_top.scores.tolist()):
            by_destination.setdefault(a, []).append((b, score))
        a, sources = max(by_destination.items(), key=lambda item: len(item[1]))
        (one, x), (two, y) = sources[0], sources[-1]
        rows = [(s, 40, 41, 42, a) for s in (one, two)]
        logs = [np.log(ref.patterns([row])[0][0, 2, -1].astype(np.float64)) for row in rows]
        x, y = (50 * math.tanh(s / 50) if arch == "gemma2" else s for s in (x, y))
        assert one != two
        assert abs((logs[0][0] - logs[0][-1]) - (logs[1][0] - logs[1][-1]) - (x - y)) < 2e-4, arch


def test_distance_does_nothing_without_rotation_and_something_with_it(engine, arch):
    near, far = (engine.run(HeadWeights(LAYER, HEAD, 3, d)).qk_top.scores for d in (0, 9))
    assert np.array_equal(near, far) == (arch not in ROTARY)


def test_copying_scores(engine, plain, monkeypatch):
    assert engine.run(HeadWeights(LAYER, HEAD, 1)).sampled == min(weights.SAMPLE, len(plain.ids))
    monkeypatch.setattr(weights, "SAMPLE", 10_000)
    for mlp0 in (False, True):
        r = engine.run(HeadWeights(LAYER, HEAD, 1, 0, mlp0))
        x = plain.effective() if mlp0 else plain.embed
        w, b = plain.head("v", LAYER, HEAD)
        o = (plain.norm(plain.ln1(LAYER), x) @ w + b) @ plain.out(LAYER, HEAD)
        if plain.arch == "gemma2":
            o = plain.norm(plain.ref.blocks[LAYER].post_attention_layernorm, o)
        logits = plain.norm(plain.ref.norm, o) @ plain.unembed.T + plain.b_u
        own = np.diag(logits)[:, None]
        assert r.sampled == len(plain.ids)
        assert abs(r.copying - ((logits > own).sum(1) < 5).mean()) < 1.5 / r.sampled
        assert abs(r.anti_copying - ((logits < own).sum(1) < 5).mean()) < 1.5 / r.sampled


def test_a_head_made_to_copy(engines, monkeypatch):
    """An unembedding that reads back what the head writes: it copies; with the sign turned it does the opposite."""
    engine = engines["llama"]
    head, tokens = matrices.Head(engine.model, LAYER, HEAD), matrices.Tokens(engine.model)
    v, written = head.values(tokens(tokens.ids)), head.written()
    for sign, want in ((1, 0), (-1, 1)):
        table = sign * t.linalg.pinv(written) @ v.T
        monkeypatch.setattr(matrices.Tokens, "unembed", lambda self, a, b, table=table: table[:, a:b])
        scores = drain(weights.copying(head, tokens, (written @ table).T))[-1]
        assert scores[want] > 0.2 and scores[1 - want] == 0


def drain(steps) -> list:
    out = []
    while True:
        try:
            out.append(next(steps))
        except StopIteration as stop:
            return [*out, stop.value]


def test_eigenvalues_are_those_of_the_full_matrix(engine, plain, arch):
    r = engine.run(HeadWeights(LAYER, HEAD, 1))
    x, layer = plain.embed, LAYER
    if arch == "zoo":  # the same product, turned round to d_model × d_model
        read = plain.unit(x) @ np.diag(plain.gain(plain.ln1(layer)))
        write = plain.out(layer, HEAD) @ plain.fold(plain.ref.norm, plain.unembed.T)
        full = plain.head("v", layer, HEAD)[0] @ write @ read
    else:
        full = plain.ov(x, layer, HEAD)
    want = np.linalg.eigvals(full)
    want = want[np.argsort(-np.abs(want))][: plain.ref.d_head]
    got = r.eigenvalues[:, 0] + 1j * r.eigenvalues[:, 1]
    assert r.eigenvalues.shape == (plain.ref.d_head, 2)
    np.testing.assert_allclose(np.abs(got), np.abs(want), rtol=1e-3, atol=1e-4 * np.abs(want).max())
    assert max(np.abs(want - g).min() for g in got) < 1e-4 * np.abs(want).max()
    assert abs(r.positivity - want.real.sum() / np.abs(want).sum()) < 1e-4


@pytest.mark.parametrize("arch", ["gpt2", "zoo"])
def test_position_term(engine, plain, arch):
    r = engine.run(HeadWeights(LAYER, HEAD, 7))
    table = double(plain.ref.hf.transformer.wpe.weight)
    full = plain.qk(table, LAYER, HEAD, 0)
    n = len(table)
    np.testing.assert_allclose(r.position, [np.diag(full, -d).mean() for d in range(n)], atol=1e-4)
    allowed = np.where(np.tri(n, dtype=bool), full, -np.inf)
    np.testing.assert_allclose(r.position_pairs.scores, np.sort(allowed.ravel())[::-1][:7], atol=1e-4)
    np.testing.assert_allclose(r.position_pairs.scores, [allowed[i, j] for i, j in r.position_pairs.ids], atol=1e-4)


def test_no_position_term_without_learned_positions(engines):
    r = engines["llama"].run(HeadWeights(LAYER, HEAD, 3))
    assert r.position.size == 0 and len(r.position_pairs.scores) == 0


def test_partial_results_come_first_and_go_over_the_wire(engines):
    parts = []
    r = engines["qwen3"].run(HeadWeights(LAYER, HEAD, 4), parts.append)
    partial = [p for p in parts if isinstance(p, HeadWeightsResult)]
    assert [(len(p.ov_top.scores), len(p.qk_top.scores)) for p in partial] == [(0, 0), (4, 0)]
    assert partial[0].copying == r.copying and any(isinstance(p, Progress) and p.text == "QK pairs" for p in parts)
    for body in (*partial, r, engines["qwen3"].run(Singular(0, 0)), engines["qwen3"].run(Composition(0, 0)), HeadWeights(1, 2, mlp0=True)):
        data = encode(Frame("result", 1, body=body))
        view = memoryview(data)
        state = {"at": 0}

        def read(n, view=view, state=state):
            state["at"] += n
            return bytes(view[state["at"] - n : state["at"]])

        back = read_frame(read).body
        assert type(back) is type(body)
        if isinstance(body, HeadWeightsResult):
            assert np.array_equal(back.ov_top.ids, body.ov_top.ids) and back.texts == body.texts


def test_extremes_in_blocks(monkeypatch):
    """Small blocks, so that lines end early by length; ties and short inputs too."""
    g = t.Generator().manual_seed(0)
    monkeypatch.setattr(weights, "CHUNK_BYTES", 4 * 16 * 16)
    for n, m, d, k in ((100, 70, 3, 9), (5, 3, 2, 40), (64, 64, 1, 5), (33, 90, 8, 300)):
        a = t.randn(n, d, generator=g) * t.rand(n, 1, generator=g) ** 4
        b = t.randn(m, d, generator=g) * t.rand(m, 1, generator=g) ** 4
        steps = drain(weights.extremes(a, b, k, "x"))
        full = (a @ b.T).numpy()
        best, worst = steps[-1]
        k = min(k, n * m)
        np.testing.assert_allclose(best.scores, np.sort(full.ravel())[::-1][:k], atol=1e-6)
        np.testing.assert_allclose(worst.scores, np.sort(full.ravel())[:k], atol=1e-6)
        np.testing.assert_allclose(full[tuple(best.ids.T)], best.scores, atol=1e-6)
        np.testing.assert_allclose(full[tuple(worst.ids.T)], worst.scores, atol=1e-6)
    a = t.linspace(-1, 1, 200)[:, None]
    assert len(drain(weights.extremes(a, a, 3, "x"))) == 2  # one of 169 blocks: the rest can't reach what the first one found


def test_chunks_make_no_difference(engines, monkeypatch):
    engine = engines["gemma2"]
    asks = HeadWeights(LAYER, HEAD, 6, 3), Singular(LAYER, HEAD, "OV", 3, 5)
    whole = [engine.run(a) for a in asks]
    monkeypatch.setattr(weights, "CHUNK_BYTES", 4 * 32 * 50)
    monkeypatch.setattr(matrices, "CHUNK_BYTES", 4 * 32 * 50)
    parts = [engine.run(a) for a in asks]
    for n in ("ov_top", "ov_bottom", "qk_top", "qk_bottom"):
        np.testing.assert_allclose(getattr(parts[0], n).scores, getattr(whole[0], n).scores, rtol=1e-4)
    assert parts[0].copying == whole[0].copying and abs(parts[0].positivity - whole[0].positivity) < 1e-5
    for a, b in zip(parts[1].sides, whole[1].sides):
        assert np.array_equal(a.top_ids, b.top_ids) and np.array_equal(a.bottom_ids, b.bottom_ids)


# ------------------------------------------------------------------ singular directions


def check_readout(plain: Plain, directions: dict[str, np.ndarray], sides, r: int, k: int) -> None:
    """`directions` [r, n of entries] in the order of the sides: entries of each side up to one common sign a direction."""
    assert [s.name for s in sides] == list(directions)
    for i in range(r):
        first = next(iter(directions.values()))[i]
        sign = 1 if first.max() >= -first.min() else -1
        for side in sides:
            want = sign * directions[side.name][i]
            ids = np.arange(len(want)) if side.name == "neurons" else plain.ids
            where = {int(j): n for n, j in enumerate(ids)}
            size = np.abs(want).max()
            np.testing.assert_allclose(side.top_scores[i], np.sort(want)[::-1][:k], atol=2e-3 * size)
            np.testing.assert_allclose(side.bottom_scores[i], np.sort(want)[:k], atol=2e-3 * size)
            np.testing.assert_allclose(side.top_scores[i], [want[where[j]] for j in side.top_ids[i].tolist()], atol=2e-3 * size)
            np.testing.assert_allclose(side.bottom_scores[i], [want[where[j]] for j in side.bottom_ids[i].tolist()], atol=2e-3 * size)


@pytest.mark.parametrize("which", ["OV", "QK", "mlp_in", "mlp_out", "mlp_gate"])
def test_singular_directions_are_those_of_the_full_matrix(engine, plain, arch, which):
    gated = arch not in ("gpt2", "neox", "zoo")
    head = None if which.startswith("mlp") else HEAD
    if which == "mlp_gate" and not gated:
        with pytest.raises(UserError, match="no W_gate"):
            engine.run(Singular(LAYER, None, which))
        return
    got = engine.run(Singular(LAYER, head, which, 3, 6))
    read, write = plain.unit(plain.embed), plain.fold(plain.ref.norm, plain.unembed.T)
    if head is not None:
        ov, qk = plain.circuits(LAYER, HEAD)
        matrix = ov if which == "OV" else qk * plain.scale
    else:
        mlp = plain.ref.blocks[LAYER].mlp
        names = {"gpt2": ("c_fc", "c_proj"), "gpt_neox": ("dense_h_to_4h", "dense_4h_to_h")}.get(plain.arch, ("up_proj", "down_proj"))
        module = mlp.gate_proj if which == "mlp_gate" else getattr(mlp, names[which == "mlp_out"])
        w = double(module.weight) if plain.arch == "gpt2" else double(module.weight).T
        matrix = (w @ plain.post(LAYER, "post_feedforward_layernorm")).T if which == "mlp_out" else plain.fold(plain.ln2(LAYER), w)
    u, s, vh = np.linalg.svd(matrix)
    np.testing.assert_allclose(got.values, s[:3], rtol=1e-4)
    np.testing.assert_allclose(got.share, s[:3] ** 2 / (s**2).sum(), rtol=1e-3)
    u, v = u[:, :3], vh[:3].T
    match which:
        case "OV":
            directions = {"reads": (read @ u).T, "writes": v.T @ write}
        case "QK":
            directions = {"destination": (read @ u).T, "source": (read @ v).T}
        case "mlp_out":
            directions = {"writes": u.T @ write, "neurons": v.T}
        case _:
            directions = {"reads": (read @ u).T, "neurons": v.T}
    check_readout(plain, directions, got.sides, 3, 6)
    assert all(int(i) in got.texts for side in got.sides if side.name != "neurons" for i in side.top_ids.ravel())


# ------------------------------------------------------------------ composition


def brute_composition(plain: Plain, sender: tuple, receiver: tuple) -> dict[str, float]:
    (ov, _), (ov2, qk) = plain.circuits(*sender), plain.circuits(*receiver)
    f = np.linalg.norm
    return {n: f(ov @ x) / f(ov) / f(x) for n, x in (("q", qk), ("k", qk.T), ("v", ov2))}


def test_composition_is_the_ratio_of_full_norms(engine, plain):
    r = engine.run(Composition(LAYER, HEAD))
    info = engine.model.info
    for n in "qkv":
        assert getattr(r, n).shape == (info.n_layers, info.n_heads) and np.isnan(getattr(r, n)[LAYER]).all()
    for layer in range(info.n_layers):
        for head in range(info.n_heads):
            if layer != LAYER:
                pair = ((layer, head), (LAYER, HEAD)) if layer < LAYER else ((LAYER, HEAD), (layer, head))
                for n, want in brute_composition(plain, *pair).items():
                    assert getattr(r, n)[layer, head] == pytest.approx(want, rel=1e-4), (n, layer, head)


@pytest.fixture(scope="session")
def processed(folders) -> dict:
    """TransformerLens bridges with folded norms and centred writes, as its papers' tools have them."""
    from transformer_lens.model_bridge import TransformerBridge

    out = {}
    for arch in ("gpt2", "llama"):
        hf = AutoModelForCausalLM.from_pretrained(folders[arch], dtype=t.float32)
        tokenizer = AutoTokenizer.from_pretrained(folders[arch])
        out[arch] = TransformerBridge.boot_transformers(str(folders[arch]), hf_model=hf, tokenizer=tokenizer, dtype=t.float32)
        out[arch].enable_compatibility_mode(disable_warnings=True)
    return out


@pytest.mark.parametrize("arch", ["gpt2", "llama"])
def test_composition_and_singular_values_equal_transformer_lens(engines, processed, arch):
    """On folded weights. Of raw ones TransformerLens's scores differ: it leaves norm gains out; of Gemma and Qwen3, post-norm and query/key gains."""
    engine, bridge = engines[arch], processed[arch]
    r = engine.run(Composition(LAYER, HEAD))
    for n in "qkv":
        theirs = bridge.all_composition_scores(n.upper()).scores.detach().numpy()
        np.testing.assert_allclose(getattr(r, n)[:LAYER], theirs[:LAYER, :, LAYER, HEAD], rtol=1e-4)
        np.testing.assert_allclose(getattr(r, n)[LAYER + 1 :], theirs[LAYER, HEAD, LAYER + 1 :], rtol=1e-4)
    for which, theirs, scale in (("OV", bridge.OV, 1), ("QK", bridge.QK, engine.model.info.d_head**-0.5)):
        ours = engine.run(Singular(LAYER, HEAD, which, 4, 1)).values
        np.testing.assert_allclose(ours, theirs[LAYER, HEAD].S[:4].detach().numpy() * scale, rtol=1e-4)


def test_scores_do_not_depend_on_the_basis_of_the_head_space(engine):
    model = engine.model
    one, two = (matrices.Layer(model, i).folded for i in (0, LAYER))
    turn = t.linalg.qr(t.randn(model.info.d_head, model.info.d_head, generator=t.Generator().manual_seed(1)))[0]
    turned = lambda f: (f[0] @ turn, f[1] @ turn, f[2] @ turn, turn.T @ f[3])  # noqa: E731
    this = tuple(x[HEAD][None] for x in two)
    for n, score in weights.compose(one, this).items():
        np.testing.assert_allclose(weights.compose(turned(one), turned(this))[n].numpy(), score.numpy(), rtol=1e-4)
    v, o = this[2][0], this[3][0]
    np.testing.assert_allclose(weights.factored_svd(v @ turn, (turn.T @ o).T)[1], weights.factored_svd(v, o.T)[1], rtol=1e-4, atol=1e-5)


def test_random_baseline_is_that_of_random_heads(engines):
    r = engines["llama"].run(Composition(LAYER, HEAD))
    g = np.random.default_rng(5)
    info, scores = engines["llama"].model.info, []
    for _ in range(200):
        a, b, c, d = (g.standard_normal((info.d_model, info.d_head)) for _ in range(4))
        scores.append(np.linalg.norm(a @ b.T @ c @ d.T) / np.linalg.norm(a @ b.T) / np.linalg.norm(c @ d.T))
    assert abs(r.baseline - np.mean(scores)) < 4 * np.std(scores) / math.sqrt(weights.RANDOM_HEADS)
    assert 0.5 < r.spread / np.std(scores) < 2
    assert r.baseline == engines["llama"].run(Composition(0, 0)).baseline


# ------------------------------------------------------------------ conventions, dtype, bad input, command line


def test_conventions_say_what_was_done(engines):
    said = {a: engines[a].run(HeadWeights(LAYER, HEAD, 1, 9)) for a in ("gpt2", "neox", "llama", "gemma2", "qwen3")}
    assert "LayerNorm" in said["gpt2"].convention and "learned positions" in said["gpt2"].qk_convention
    assert "2 of 8 dimensions rotate" in said["neox"].qk_convention and "destination 9 after source" in said["neox"].qk_convention
    assert "key/value head = head // 2" in said["llama"].convention and "RMSNorm" in said["llama"].convention
    assert "norm after attention" in said["gemma2"].convention and "soft cap 50" in said["gemma2"].qk_convention
    assert "query and key norm applied" in said["qwen3"].qk_convention
    window = engines["gemma2"].run(HeadWeights(0, HEAD, 1, 9)).qk_convention
    assert "outside the sliding window of 8" in window and "sliding window" not in said["gemma2"].qk_convention


def test_bfloat16_weights_are_read_in_float32(folders, engines):
    from engine import Engine

    half = Engine(Load(str(folders["llama"]), dtype="bfloat16"))
    a, b = (e.run(HeadWeights(LAYER, HEAD, 5, 3)) for e in (half, engines["llama"]))
    np.testing.assert_allclose(a.ov_top.scores, b.ov_top.scores, rtol=0.05)
    np.testing.assert_allclose(a.qk_top.scores, b.qk_top.scores, rtol=0.05)
    assert a.ov_top.scores.dtype == np.float32


def test_an_architecture_read_wrongly_is_refused(engines, monkeypatch):
    monkeypatch.setattr(matrices.Head, "rotate", lambda self, x, end: x)
    with pytest.raises(UserError, match="off the model's own"):
        engines["llama"].run(HeadWeights(LAYER, HEAD, 3, 5))


@pytest.mark.slow
def test_other_kinds_of_attention(tmp_path):
    """ALiBi; a model without scale whose attention is Hugging Face's own; embeddings scaled outside the embedding; rotary in pairs, which is refused."""
    import transformers as tr
    from conftest import tokenizer
    from engine import Engine

    tok = tokenizer(bos=True)
    small = {"vocab_size": len(tok), "initializer_range": 0.25, "bos_token_id": 0, "eos_token_id": 1}
    configs = {
        "ALiBi": tr.BloomConfig(**small, hidden_size=32, n_layer=2, n_head=4),
        "scale 1": tr.GPTNeoConfig(**small, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], max_position_embeddings=64),
        "scale 0.2": tr.GraniteConfig(**small, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, embedding_multiplier=6.0, attention_multiplier=0.2),
        "": tr.GPTJConfig(**small, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    }
    for i, (words, config) in enumerate(configs.items()):
        t.manual_seed(i)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(i))
        tok.save_pretrained(tmp_path / str(i))
        engine = Engine(str(tmp_path / str(i)))
        if words:
            r = engine.run(HeadWeights(1, 1, 3, 4))
            assert words in r.qk_convention and r.error < 1e-4
        else:
            with pytest.raises(UserError, match="off the model's own"):
                engine.run(HeadWeights(1, 1, 3, 4))


@pytest.mark.parametrize(
    "ask, words",
    [
        (HeadWeights(9, 0), "no layer 9"),
        (HeadWeights(-1, 0), "no layer -1"),
        (HeadWeights(0, 4), "no head 4"),
        (HeadWeights(0, 0, 0), "k is 0"),
        (HeadWeights(0, 0, 3, 64), "distance 64: give 0 to 63"),
        (HeadWeights(0, 0, 3, -1), "distance -1"),
        (HeadWeights(0, 0, 3, 0, True), "layer 0 read before MLP 0"),
        (Composition(0, -1), "no head -1"),
        (Composition(3, 0), "no layer 3"),
        (Singular(0, 0, "VO"), "not a matrix"),
        (Singular(0, None, "OV"), "belongs to a head"),
        (Singular(0, 1, "mlp_in"), "belongs to an MLP"),
        (Singular(7, None, "mlp_in"), "no layer 7"),
        (Singular(0, 0, "OV", 0), "r is 0"),
    ],
)
def test_bad_input(engines, ask, words):
    with pytest.raises(UserError, match=words):
        engines["llama"].run(ask)


def test_a_model_without_mlps(engines, monkeypatch):
    engine = engines["llama"]
    for layer in (0, LAYER):
        monkeypatch.delitem(engine.model.bridge.blocks[layer]._modules, "mlp")
    with pytest.raises(UserError, match="no MLP$"):
        engine.run(Singular(LAYER, None, "mlp_in"))
    with pytest.raises(UserError, match="no MLP 0"):
        engine.run(HeadWeights(LAYER, 0, mlp0=True))


@pytest.mark.slow
def test_command_line(folders, capsys):
    from engine import main

    common = ["weights", "--model", str(folders["llama"])]
    assert main([*common, "--head", "L1H3", "--k", "3", "--distance", "2", "--json"]) == 0
    got = json.loads(capsys.readouterr().out)
    assert (got["layer"], got["head"], got["kv_head"], len(got["qk_top"]["ids"])) == (1, 3, 1, 3)
    for more, words in (
        (["--head", "L1H3"], "OV, most written"),
        (["--head", "1.3", "--view", "composition"], "random heads"),
        (["--head", "L1H3", "--view", "QK"], "destination +"),
        (["--head", "L2.mlp", "--view", "mlp_out"], "neurons +"),
    ):
        assert main([*common, *more]) == 0
        assert words in capsys.readouterr().out
    assert main([*common, "--head", "L1.mlp", "--view", "OV"]) == 2
    assert main([*common, "--head", "L1H9"]) == 2
