"""Weights: what the matrices of a head or an MLP say without a prompt. From factors of a head's size, fp32, in chunks over the vocabulary."""

import math
import time
from collections.abc import Generator
from dataclasses import replace

import numpy as np
import torch as t
from torch import Tensor

from techniques.weights.matrices import CHUNK_BYTES, NOTHING, Gain, Head, Layer, Tokens, final_gain, read_gain
from techniques.weights.requests import Composition, CompositionResult, HeadWeights, HeadWeightsResult, Pairs, Readout, Singular, SINGULAR, SingularResult
from vocabulary.nodes import UserError
from vocabulary.requests import Progress
from model.bridge import Model
from model.writes import multiplier, post_norm, pre_norm

SAMPLE = 1024  # tokens the copying score is taken over
NEAR_TOP = 5
RANDOM_HEADS = 32
LAST_COPY = "copying: own logit among the 5 highest of final norm (recomputed) of what the head writes for a token, unembedded, with the head's biases"


# ------------------------------------------------------------------ pairs: the largest and smallest cells of a product too large to make


@t.no_grad()
def extremes(a: Tensor, b: Tensor, k: int, text: str) -> Generator[Progress, None, tuple[Pairs, Pairs]]:
    """
    The k largest and the k smallest inner products of rows of a with rows of b, exactly, block by block. Rows go by falling length, so that a
    block whose |a||b| does not reach what was found ends its line.
    """
    long_a, long_b = a.norm(dim=1), b.norm(dim=1)
    order_a, order_b = long_a.argsort(descending=True), long_b.argsort(descending=True)
    a, b, long_a, long_b = a[order_a], b[order_b], long_a[order_a].cpu() * (1 + 1e-5), long_b[order_b].cpu()
    side = math.isqrt(CHUNK_BYTES // 4)
    k = min(k, len(a) * len(b))
    best = [(t.empty(0, device=a.device), t.empty(0, 2, dtype=t.long, device=a.device))] * 2
    floor = -math.inf
    for i in range(0, len(a), side):
        for j in range(0, len(b), side):
            if (long_a[i] * long_b[j]).item() <= floor:
                break
            cells = a[i : i + side] @ b[j : j + side].T
            lowest, highest = cells.aminmax()
            for n, (sign, reach) in enumerate(((1, highest), (-1, -lowest))):
                scores, ids = best[n]
                if len(scores) == k and reach <= scores[-1]:
                    continue
                cells = cells if sign == 1 else -cells
                found = cells.flatten().topk(min(k, cells.numel())) if len(scores) < k else None
                where = found.indices if found else (cells > scores[-1]).flatten().nonzero()[:, 0]
                scores = t.cat([scores, cells.flatten()[where]])
                ids = t.cat([ids, t.stack([where // cells.shape[1] + i, where % cells.shape[1] + j], 1)])
                top = scores.topk(min(k, len(scores)))
                best[n] = top.values, ids[top.indices]
            floor = min(s[-1].item() for s, _ in best) if len(best[0][0]) == k else floor
            yield Progress(i * len(b) + min(j + side, len(b)) * min(side, len(a) - i), len(a) * len(b), text)
    ids = [t.stack([order_a[p[:, 0]], order_b[p[:, 1]]], 1).int().cpu().numpy() for _, p in best]
    return Pairs(ids[0], best[0][0].cpu().numpy()), Pairs(ids[1], -best[1][0].cpu().numpy())


def pairs(tokens: Tokens, a: Tensor, b: Tensor, k: int, text: str) -> Generator[Progress, None, tuple[Pairs, Pairs]]:
    """`extremes` in token ids."""
    ids = tokens.ids.int().numpy()
    best, worst = yield from extremes(a, b, k, text)
    return Pairs(ids[best.ids], best.scores), Pairs(ids[worst.ids], worst.scores)


def pace(m: dict[str, Tensor]) -> float:
    """Seconds that all pairs of OV and QK take at most, by one block of them (lines that can't reach what was found are left out)."""
    a, b = m["v"][:2048], m["w"][:2048]
    begun = time.monotonic()
    float((a @ b.T).aminmax().max)
    return 2 * (time.monotonic() - begun) * (len(m["v"]) / len(a)) * (len(m["w"]) / len(b))


def no_pairs() -> Pairs:
    return Pairs(np.zeros((0, 2), np.int32), np.zeros(0, np.float32))


# ------------------------------------------------------------------ OV and QK of a head


@t.no_grad()
def sides(head: Head, tokens: Tokens) -> Generator[Progress, None, dict[str, Tensor]]:
    """Four matrices [token, d_head]: v (without biases) and w, whose product is OV; q and k, whose product is QK."""
    layer, out = head.layer, {n: [] for n in "vwqk"}
    read, write = layer.norm.fold(layer.v[head.kv]), head.written()
    for start, stop in tokens.chunks():
        x = tokens.vectors(start, stop)
        out["v"].append(layer.norm.scale(x) @ read)
        out["w"].append((write @ tokens.unembed(start, stop)).T)
        out["q"].append(head.queries(x))
        out["k"].append(head.keys(x))
        yield Progress(stop, tokens.n, "token vectors")
    return {n: t.cat(parts) for n, parts in out.items()}


@t.no_grad()
def eigenvalues(v: Tensor, w: Tensor) -> tuple[np.ndarray, float]:
    """Of OV [token, token] = v wᵀ, whose eigenvalues that are not zero are those of wᵀ v; [d_head, 2], largest first, and their positivity."""
    small = np.zeros((v.shape[1], v.shape[1]))
    size = max(1, CHUNK_BYTES // (16 * v.shape[1]))
    for i in range(0, len(v), size):
        small += (w[i : i + size].cpu().double().T @ v[i : i + size].cpu().double()).numpy()
    values = np.linalg.eigvals(small)
    values = values[np.argsort(-np.abs(values), kind="stable")]
    total = np.abs(values).sum()
    return np.stack([values.real, values.imag], 1).astype(np.float32), float(values.real.sum() / total) if total else math.nan


@t.no_grad()
def copying(head: Head, tokens: Tokens, w: Tensor) -> Generator[Progress, None, tuple[float, float, int]]:
    """Fractions of tokens whose own logit is among the highest and among the lowest of what the head writes when it attends to them alone."""
    model, final = head.model, final_gain(head.model)
    chosen = t.randperm(tokens.n, generator=t.Generator().manual_seed(0))[:SAMPLE]
    v, written = head.values(tokens(tokens.ids[chosen])), head.written()
    chosen = chosen.to(w.device)
    lin = v @ written
    exact = final(head.layer.post(v @ head.layer.o[head.index])) - final.bias
    v = v * ((exact * lin).sum(-1, keepdim=True) / (lin * lin).sum(-1, keepdim=True).clamp_min(1e-30))
    b_u = model.bridge.unembed.b_U
    b_u = 0.0 if b_u is None else b_u.to(w.device).float() * model.logit_scale
    size = max(1, CHUNK_BYTES // (4 * model.info.d_model))
    constant = t.zeros(tokens.n, device=w.device) + (b_u[tokens.ids.to(w.device)] if isinstance(b_u, Tensor) else b_u)
    if isinstance(final.bias, Tensor):
        for i in range(0, tokens.n, size):
            constant[i : i + size] += final.bias @ tokens.unembed(i, min(i + size, tokens.n))
    own = (v * w[chosen]).sum(-1) + constant[chosen]
    above, below = (t.zeros(len(chosen), dtype=t.long, device=w.device) for _ in range(2))
    size = max(1, CHUNK_BYTES // (4 * len(chosen)))
    for i in range(0, tokens.n, size):
        logits = v @ w[i : i + size].T + constant[i : i + size]
        here = ((chosen >= i) & (chosen < i + logits.shape[1])).nonzero()[:, 0]
        logits[here, chosen[here] - i] = own[here]  # so that rounding does not rank a token against itself
        above += (logits > own[:, None]).sum(-1)
        below += (logits < own[:, None]).sum(-1)
        yield Progress(min(i + size, tokens.n), tokens.n, "copying score")
    return (above < NEAR_TOP).float().mean().item(), (below < NEAR_TOP).float().mean().item(), len(chosen)


@t.no_grad()
def positions(head: Head, k: int) -> tuple[np.ndarray, Pairs]:
    """The position term of learned positions: mean score by offset [n], and the best (destination, source) positions; nothing for other models."""
    model = head.model
    if "hook_pos_embed" not in model.points or model.info.positions != "learned":
        return np.zeros(0, np.float32), no_pairs()
    table, ids = model.bridge.pos_embed.W_pos, model.random_ids(2)
    _, got = model.forward(ids, ["hook_pos_embed"])
    rows = table[max(0, len(table) - model.info.n_ctx) :][: model.info.n_ctx].float().to(model.final_device)
    if not model.identity("positions", rows[:2], got["hook_pos_embed"].float().reshape(-1, 2, rows.shape[1])[0]).ok:
        raise UserError(f"{model.info.architecture}: its table of positions is not read the way Loupe reads it")
    q, key, n = head.queries(rows), head.keys(rows), len(rows)
    total, best, ids = t.zeros(n, device=q.device), t.empty(0, device=q.device), t.empty(0, 2, dtype=t.long, device=q.device)
    size, j = max(1, CHUNK_BYTES // (8 * n)), t.arange(n, device=q.device)
    for start in range(0, n, size):
        i = t.arange(start, min(start + size, n), device=q.device)[:, None]
        cells = q[start : start + size] @ key.T
        total.scatter_add_(0, (i - j).clamp_min(0).flatten(), cells.masked_fill(j > i, 0).flatten())
        cells = cells.masked_fill(j > i, -math.inf).flatten()
        top = cells.topk(min(k, len(cells)))
        best, ids = t.cat([best, top.values]), t.cat([ids, t.stack([top.indices // n + start, top.indices % n], 1)])
        keep = best.topk(min(k, len(best)))
        best, ids = keep.values, ids[keep.indices]
    real = best.isfinite()
    return (total / (n - j)).cpu().numpy(), Pairs(ids[real].int().cpu().numpy(), best[real].cpu().numpy())


def check_k(k: int, what: str = "k") -> None:
    if not 1 <= k <= 1000:
        raise UserError(f"{what} is {k}: give 1 to 1000")


def words(model: Model, *ids: np.ndarray) -> dict[int, str]:
    return {i: model.token_text(i) for i in np.unique(np.concatenate([x.ravel() for x in ids])).tolist()}


def token_words(tokens: Tokens, layer: Layer) -> str:
    what = "embedding + MLP 0 of it" if tokens.mlp0 else "embedding"
    return f"a token's vector is its {what}, without position{'' if layer.norm is NOTHING else ', norm recomputed on it'}, all {tokens.n} tokens that are not special"


def head_weights(model: Model, ask: HeadWeights) -> Generator[Progress | HeadWeightsResult, None, HeadWeightsResult]:
    """OV and QK of a head in tokens; first a partial result without pairs, which need the whole vocabulary squared."""
    check_k(ask.k)
    head = Head(model, ask.layer, ask.head)
    if ask.mlp0 and ask.layer == 0:
        raise UserError("heads of layer 0 read before MLP 0 writes: turn mlp0 off or go to a later layer")
    tokens = Tokens(model, ask.mlp0)
    error = head.check(tokens, ask.distance)
    m = yield from sides(head, tokens)
    if not all(x.isfinite().all() for x in m.values()):
        raise UserError("the weights make numbers that are not finite")
    values, positivity = eigenvalues(m["v"], m["w"])
    copies = yield from copying(head, tokens, m["w"])
    profile, position_pairs = positions(head, ask.k)
    shape = (ask.layer, ask.head, head.kv, ask.distance, ask.mlp0, tokens.n, *copies, values, positivity)
    said = f"{head.layer.says()}, {token_words(tokens, head.layer)}"

    def result(ov: tuple[Pairs, Pairs], qk: tuple[Pairs, Pairs]) -> HeadWeightsResult:
        texts = words(model, *(p.ids for p in (*ov, *qk)))
        return HeadWeightsResult(*shape, *ov, *qk, profile, position_pairs, error, texts, said, ov_words(head), qk_words(head, ask.distance))

    none = no_pairs(), no_pairs()
    if not ask.pairs:
        return replace(result(none, none), expected=pace(m))
    yield result(none, none)
    ov = yield from pairs(tokens, m["v"], m["w"], ask.k, "OV pairs")
    yield result(ov, none)
    qk = yield from pairs(tokens, m["q"], m["k"], ask.k, "QK pairs")
    return result(ov, qk)


def ov_words(head: Head) -> str:
    parts = ["OV pairs: logits of the written token per token attended to, final gain folded and final scale left out, constants (biases) left out", LAST_COPY]
    parts.append("eigenvalues of the token × token matrix of these pairs")
    parts += ["norm after attention recomputed for copying, its scale left out of pairs"] * (head.layer.post is not NOTHING)
    return ", ".join(parts)


def qk_words(head: Head, distance: int) -> str:
    layer, kind = head.layer, head.model.info.positions
    scale = f"scale {layer.scaling:.4g} ({'1/sqrt(d_head)' if math.isclose(layer.scaling, head.model.info.d_head**-0.5, rel_tol=1e-4) else 'the model’s own'})"
    parts = ["QK pairs: attention score before the softmax, content term, biases included", scale]
    parts += ["query and key norm applied"] * (layer.q_norm is not NOTHING)
    if kind == "rotary":
        share = len(head.rotation[0][0]) if head.rotation else 0
        part = "" if share == head.model.info.d_head else f", {share} of {head.model.info.d_head} dimensions rotate"
        parts.append(f"rotary, destination {distance} after source{part}")
    elif kind == "learned":
        parts.append("learned positions: the content term has no distance, the position term stands beside it (cross terms left out)")
    elif kind == "alibi":
        parts.append("ALiBi's penalty, the same for all pairs at a distance, left out")
    parts += [f"before the soft cap {layer.cap:g}"] * bool(layer.cap)
    parts += [f"outside the sliding window of {layer.window}: never attended to"] * bool(layer.window and distance >= layer.window)
    return ", ".join(parts)


# ------------------------------------------------------------------ composition


def norm_of(g_left: Tensor, middle: Tensor, g_right: Tensor) -> Tensor:
    """‖A M Bᵀ‖ from the Gram matrices AᵀA and BᵀB; all [..., d_head, d_head]."""
    g_left, middle, g_right = (x.cpu().double() for x in (g_left, middle, g_right))
    return ((g_left @ middle) * (middle @ g_right)).sum((-2, -1)).clamp_min(0).sqrt()


def gram(w: Tensor) -> Tensor:
    return w.mT @ w


def compose(sender: tuple[Tensor, ...], receiver: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Q, K and V composition of senders with receivers, both (Q, K, V, O) of shape [head or 1, ...]: ‖OV X‖ / (‖OV‖ ‖X‖), X the receiver's QK, KQ or OV."""
    v1, o1 = gram(sender[2]), sender[3]
    q, k, v, o = receiver
    out = {}
    size = lambda a, b: (a.cpu().double() * b.cpu().double()).sum((-2, -1)).sqrt()  # noqa: E731
    sent = size(v1, gram(o1.mT))
    for name, reads, rest in (("q", q, gram(k)), ("k", k, gram(q)), ("v", v, gram(o.mT))):
        out[name] = norm_of(v1, o1 @ reads, rest) / (sent * size(gram(reads), rest))
    return out


def random_baseline(d_model: int, d_head: int) -> tuple[float, float]:
    """Mean and standard deviation of composition between heads of independent standard Gaussian matrices."""
    g = t.Generator().manual_seed(0)
    draw = lambda: (*(t.randn(1, d_model, d_head, generator=g) for _ in range(3)), t.randn(1, d_head, d_model, generator=g))  # noqa: E731
    scores = t.cat([compose(draw(), draw())["q"] for _ in range(RANDOM_HEADS)])
    return scores.mean().item(), scores.std().item()


@t.no_grad()
def composition(model: Model, ask: Composition) -> Generator[Progress, None, CompositionResult]:
    head = Head(model, ask.layer, ask.head)
    head.check(Tokens(model), 0)
    i = model.info
    this = tuple(x[ask.head][None] for x in head.layer.folded)
    scores = {n: np.full((i.n_layers, i.n_heads), math.nan, np.float32) for n in "qkv"}
    for layer in range(i.n_layers):
        if layer != ask.layer:
            other = Layer(model, layer).folded
            for n, row in (compose(other, this) if layer < ask.layer else compose(this, other)).items():
                scores[n][layer] = row.float().numpy()
        yield Progress(layer + 1, i.n_layers, "composition")
    parts = ["‖OV · X‖ / (‖OV‖ ‖X‖), Frobenius norms, OV the earlier head's, X the later one's QK read by queries (Q), by keys (K), or its OV (V)"]
    parts += ["content term of QK, without rotation"] * (i.positions == "rotary")
    parts += ["what heads write is centred, as later norms take its mean away"] * head.layer.norm.centred
    parts.append(f"baseline: {RANDOM_HEADS} pairs of heads of independent Gaussian matrices of the same shapes, seed 0")
    said = ", ".join([*parts, head.layer.says()])
    return CompositionResult(ask.layer, ask.head, head.kv, *(scores[n] for n in "qkv"), *random_baseline(i.d_model, i.d_head), said)


# ------------------------------------------------------------------ singular directions


def factored_svd(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, d], values [d], V [n, d] of a bᵀ, through the QR of both factors."""
    (qa, ra), (qb, rb) = (t.linalg.qr(x) for x in (a, b))
    u, s, vh = t.linalg.svd(ra @ rb.mT)
    return qa @ u, s, qb @ vh.mT


def tall_svd(w: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [d_model, r], values [r], V [d_mlp, r] of w [d_model, d_mlp], through the Gram matrix of its shorter side in fp64."""
    short = w if w.shape[0] <= w.shape[1] else w.T
    g = (short @ short.T).cpu().double()
    values, vectors = t.linalg.eigh(g)
    u = vectors.flip(1)[:, :r].to(w.device, w.dtype)
    s = values.flip(0)[:r].clamp_min(0).sqrt().to(w.device, w.dtype)
    other = short.T @ u / s.clamp_min(1e-30)
    return (u, s, other) if short is w else (other, s, u)


def mlp_matrix(model: Model, layer: int, which: str) -> tuple[Tensor, Gain]:
    """[d_model, d_mlp] in the basis of the stream, norm gain folded; and the norm it reads through (of W_out: writes through)."""
    if not 0 <= layer < model.info.n_layers:
        raise UserError(f"there is no layer {layer}: the model has layers 0 to {model.info.n_layers - 1}")
    block = model.bridge.blocks[layer]
    mlp = block._modules.get("mlp")
    name = {"mlp_in": "W_in", "mlp_gate": "W_gate", "mlp_out": "W_out"}[which]
    w = None if mlp is None else getattr(mlp, name, None)
    if not isinstance(w, Tensor) or w.ndim != 2:
        missing = "no MLP" if mlp is None else f"no {name} (its MLP has no gate)" if which == "mlp_gate" else f"an MLP without one {name}"
        raise UserError(f"layer {layer} of {model.info.architecture} has {missing}")
    w = w.detach().to(model.final_device).float()
    if which == "mlp_out":
        post = read_gain(model, post_norm(model, layer, "mlp"))
        return (w * multiplier(model, layer) * post.weight).T, post
    norm = read_gain(model, pre_norm(model, layer, "mlp"))
    return norm.fold(w), norm


def keep_best(best: tuple[Tensor, Tensor] | None, scores: Tensor, start: int, k: int) -> tuple[Tensor, Tensor]:
    """The k highest of each row so far, and their ids, after another chunk of columns [r, n] that begins at `start`."""
    ids = t.arange(start, start + scores.shape[1], device=scores.device).expand_as(scores)
    if best is not None:
        scores, ids = t.cat([best[0], scores], 1), t.cat([best[1], ids], 1)
    top = scores.topk(min(k, scores.shape[1]), 1)
    return top.values, ids.gather(1, top.indices)


@t.no_grad()
def singular(model: Model, ask: Singular) -> Generator[Progress, None, SingularResult]:
    check_k(ask.k)
    check_k(ask.r, "r")
    if ask.which not in SINGULAR:
        raise UserError(f"{ask.which!r} is not a matrix: use one of {', '.join(SINGULAR)}")
    if (ask.head is None) != ask.which.startswith("mlp"):
        raise UserError(f"{ask.which} belongs to {'an MLP: give no head' if ask.head is not None else 'a head: say which'}")
    tokens = Tokens(model)
    final = final_gain(model)
    yield Progress(0, tokens.n, "singular directions")
    reads: dict[str, tuple[Gain, Tensor]] = {}  # name: the norm it reads through, directions [d_model, r]
    writes: dict[str, Tensor] = {}
    neurons = None
    if ask.head is not None:
        head = Head(model, ask.layer, ask.head)
        head.check(tokens, 0)
        q, k, v, o = (x[ask.head] for x in head.layer.folded)
        norm, said = head.layer.norm, head.layer.says()
        if ask.which == "OV":
            u, s, w = factored_svd(v, o.T)
            reads, writes = {"reads": (norm, u)}, {"writes": w}
        else:
            u, s, w = factored_svd(q * head.layer.scaling, k)
            reads = {"destination": (norm, u), "source": (norm, w)}
            said += f", scale {head.layer.scaling:.4g} included, {'content term without rotation, ' * (model.info.positions == 'rotary')}biases left out"
    else:
        matrix, norm = mlp_matrix(model, ask.layer, ask.which)
        u, s, neurons = tall_svd(matrix, min(ask.r, *matrix.shape))
        reads, writes = ({}, {"writes": u}) if ask.which == "mlp_out" else ({"reads": (norm, u)}, {})
        folded = "no gain to fold" if norm is NOTHING else "gain of the norm after the MLP folded" if ask.which == "mlp_out" else "norm gain folded"
        said = f"raw Hugging Face weights in fp32, {folded}{', centred' * (norm.centred and ask.which != 'mlp_out')}"
    whole = (s.double().square().sum() if ask.head is not None else matrix.double().square().sum()).item()
    r = min(ask.r, len(s))
    best: dict[str, list] = {n: [None, None] for n in (*reads, *writes)}
    for start, stop in tokens.chunks():
        scores = {}
        if reads:
            x = tokens.vectors(start, stop)
            scores = {n: (gain.scale(x) @ d[:, :r]).T for n, (gain, d) in reads.items()}
        if writes:
            table = tokens.unembed(start, stop)
            scores |= {n: final.fold_written(d[:, :r].T) @ table for n, d in writes.items()}
        for n, row in scores.items():
            best[n] = [keep_best(best[n][0], row, start, ask.k), keep_best(best[n][1], -row, start, ask.k)]
        yield Progress(stop, tokens.n, "singular directions")
    if neurons is not None:
        best["neurons"] = [keep_best(None, neurons[:, :r].T, 0, ask.k), keep_best(None, -neurons[:, :r].T, 0, ask.k)]
    first = best[next(iter(best))]
    flip = (first[1][0][:, 0] > first[0][0][:, 0])[:, None]
    out = []
    for n, (top, bottom) in best.items():
        pick = lambda a, b: t.where(flip, a, b).cpu().numpy()  # noqa: E731
        ids = [x.astype(np.int32) for x in (pick(bottom[1], top[1]), pick(top[1], bottom[1]))]
        ids = ids if n == "neurons" else [tokens.ids.int().numpy()[x] for x in ids]
        out.append(Readout(n, ids[0], pick(bottom[0], top[0]), ids[1], -pick(top[0], bottom[0])))
    said += f", reading sides: tokens' embeddings, norm recomputed, times the direction, writing sides: final gain folded, scale left out, all {tokens.n} tokens that are not special"
    said += ", signs: the first side's largest entry is positive"
    texts = words(model, *(x for side in out if side.name != "neurons" for x in (side.top_ids, side.bottom_ids)))
    share = (s[:r].double().square() / (whole or math.nan)).float()
    return SingularResult(ask.layer, ask.head, ask.which, s[:r].cpu().numpy(), share.cpu().numpy(), tuple(out), texts, said)
