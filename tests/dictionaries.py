"""Small SAEs of every architecture, saved by sae_lens's own classes: nearly exact on any activation, so that the preflight lets them pass."""

import math
from pathlib import Path

import torch as t

KINDS = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "abstopk",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
NOISE = 0.05


def build(kind: str, hook: str, width: int, d_out: int | None = None, seed: int = 0, pairs: tuple | None = None, model: str | None = None, **more):
    """
    An SAE whose encoder is an orthogonal basis and its negative, and whose decoder is the same, somewhat off. A transcoder's decoder is fitted to
    `pairs` of inputs and outputs.
    """
    from sae_lens import SAE

    g = t.Generator().manual_seed(seed)
    rand = lambda *shape: t.randn(*shape, generator=g)  # noqa: E731
    basis = t.linalg.qr(rand(width, width))[0]
    both = basis if kind == "abstopk" else t.cat([basis, -basis], 1)
    n = both.shape[1]
    trans = "transcoder" in kind
    cfg = {
        "architecture": kind,
        "d_in": width,
        "d_sae": n,
        "apply_b_dec_to_input": not trans,
        "metadata": {"hook_name": hook, "model_name": model} | more.pop("metadata", {}),
    }
    cfg |= {"d_out": d_out or width} if trans else {}
    cfg |= {"k": width - 2} if "topk" in kind else {}
    cfg |= {"reshape_activations": "hook_z"} if hook.endswith("hook_z") else {}
    cfg |= {"residual_threshold": 1e-3} if kind == "matching_pursuit" else {}
    sae = SAE.from_dict(cfg | more)
    with t.no_grad():
        if kind == "matching_pursuit":
            sae.W_dec.copy_(both.T)
        else:
            sae.W_enc.copy_(both)
            sae.W_dec.copy_(both.T * (1 + NOISE * rand(n, 1))) if not trans else None
        if hasattr(sae, "b_enc") and sae.b_enc is not None:
            sae.b_enc.copy_(0.01 * rand(n))
        if not trans:
            sae.b_dec.copy_(0.05 * rand(width))
        if kind == "gated":
            sae.r_mag.copy_(0.1 * rand(n))
            sae.b_mag.copy_(0.01 * rand(n))
            sae.W_dec.mul_((-sae.r_mag).exp()[:, None])
        if "jumprelu" in kind:
            sae.threshold.copy_(0.02 * rand(n).abs())
        if trans:
            x, y = pairs
            if "skip" in kind:
                sae.W_skip.copy_(0.1 * rand(*sae.W_skip.shape) / math.sqrt(width))
                y = y - x @ sae.W_skip.T
            sae.b_dec.copy_(y.mean(0))
            f = sae.encode(x)
            sae.W_dec.copy_(t.linalg.lstsq(f, y - sae.b_dec, driver="gelsd").solution)
    return sae


def save(sae, folder: Path) -> str:
    sae.save_model(folder)
    return str(folder)


def build_cross(folder: Path, reads: str, inputs: list[t.Tensor], outputs: list[t.Tensor], seed: int = 0, crosses: bool = True, threshold: bool = True) -> str:
    """
    Random transcoders of every layer in circuit-tracer's layout, of inputs and outputs [seq, width] by layer; decoders fitted to them, position 0 left out.
    `crosses`: one whose features write to all later layers too.
    """
    from safetensors.torch import save_file

    g, width, n = t.Generator().manual_seed(seed), inputs[0].shape[1], len(inputs)
    rand = lambda *shape: t.randn(*shape, generator=g)  # noqa: E731
    folder.mkdir(parents=True)
    kind = "cross_layer_transcoder" if crosses else "transcoder_set"
    (folder / "config.yaml").write_text(f"model_kind: {kind}\nfeature_input_hook: {reads}\nfeature_output_hook: hook_mlp_out\nscan: random\n")
    encoders = [rand(2 * width, width) / math.sqrt(width) for _ in range(n)]
    biases, thresholds = [0.1 * rand(2 * width) for _ in range(n)], [0.02 * rand(2 * width).abs() * threshold for _ in range(n)]
    pre = [x @ w.T + b for x, w, b in zip(inputs, encoders, biases)]
    features = [(f * (f > bar)).clamp(min=0) for f, bar in zip(pre, thresholds)]
    means = [y[1:].mean(0) for y in outputs]
    decoders: list[list] = [[] for _ in range(n)]
    for out in range(n):
        some = range(out + 1) if crosses else [out]
        rows = t.linalg.lstsq(t.cat([features[i][1:] for i in some], 1), outputs[out][1:] - means[out], driver="gelsd").solution * 0.9
        for i, part in zip(some, rows.split(2 * width)):
            decoders[i].append(part)
    for i in range(n):
        held = {"W_enc": encoders[i], "b_enc": biases[i], "b_dec": means[i]}
        if crosses:
            held |= {"threshold": thresholds[i]} if threshold else {}
            save_file({f"{k}_{i}": v.contiguous() for k, v in held.items()}, folder / f"W_enc_{i}.safetensors")
            save_file({f"W_dec_{i}": t.stack(decoders[i], 1)}, folder / f"W_dec_{i}.safetensors")
        else:
            held |= {"activation_function.threshold": thresholds[i]} if threshold else {}
            save_file({k: v.contiguous() for k, v in (held | {"W_dec": decoders[i][0]}).items()}, folder / f"layer_{i}.safetensors")
    return str(folder)
