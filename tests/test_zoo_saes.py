"""The zoo's SAEs as shipped: their figures on held-out text by plain Hugging Face hooks, what is written about them, and what their features fire on."""

import json
import sys

import numpy as np
import pytest
import torch as t
from reference import log_softmax

from utils import ROOT

sys.path.insert(0, str(ROOT / "zoo"))

import corpus
import name_features

SAES = sorted(p.parent.name for p in (ROOT / "zoo" / "saes").glob("*/cfg.json"))
FEATURES = json.loads((ROOT / "zoo" / "saes" / "features.json").read_text())
SEED, LENGTH, ROWS = 35_000, 128, 80  # text that nothing else has seen


@pytest.fixture(scope="module")
def saes():
    return name_features.load_saes()


def test_two_points_and_small_files():
    assert {"L1.resid_post", "L2.resid_post"} <= set(SAES)
    assert sum(f.stat().st_size for f in (ROOT / "zoo" / "saes").rglob("*") if f.is_file()) < 3_000_000
    for name in SAES:
        assert {p.name for p in (ROOT / "zoo" / "saes" / name).iterdir()} == {"cfg.json", "sae_weights.safetensors"}


@pytest.fixture(scope="module")
def rows(engines):
    return corpus.build_rows(engines["zoo"].model.tokenizer, ROWS * LENGTH, LENGTH, SEED)[:ROWS].astype(np.int64)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAES)
def test_figures_on_held_out_text(saes, references, rows, name):
    """Explained variance, L0 and loss recovered, position 0 and BOS left out, without a line of Loupe."""
    sae, reference = saes[f"zoo/{name}"], references["zoo"]
    about = sae.cfg.metadata
    spot = ("resid_post", int(name[1]))
    mask = t.from_numpy(rows != 0)
    mask[:, 0] = False
    keep = mask.numpy()[:, :-1]

    def loss(swap=None, read=()):
        def edit(x):
            x[mask] = swap(x[mask])

        logits, got = reference.run(rows.tolist(), edits=[(spot, edit)] if swap is not None else (), read=read)
        logp = np.take_along_axis(log_softmax(logits[:, :-1]), rows[:, 1:, None], -1)[..., 0]
        return -logp[keep].mean(), got

    clean, got = loss(read=[spot])
    x = got[spot][mask]
    with t.no_grad():
        f = sae.encode(x)
        explained = 1 - ((x - sae.decode(f)) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
        spliced, zero, mean = (loss(swap)[0] for swap in (sae, t.zeros_like, lambda h: x.mean(0).expand_as(h)))
    l0 = (f > 0).sum(1).float().mean().item()
    recovered, against_mean = (zero - spliced) / (zero - clean), (mean - spliced) / (mean - clean)
    assert explained >= 0.9 and recovered >= 0.98 and against_mean >= 0.98
    assert explained.item() == pytest.approx(about.explained_variance, abs=0.01)
    assert recovered == pytest.approx(about.loss_recovered, abs=0.004)
    assert l0 == pytest.approx(about.l0, abs=0.3)


@pytest.mark.parametrize("name", SAES)
def test_what_is_written_about_them(saes, engines, name):
    from techniques.lens.translators import unembed_hash

    cfg = saes[f"zoo/{name}"].cfg
    about = cfg.metadata
    assert about.model_name == "zoo" and about.hook_name == f"blocks.{name[1]}.hook_resid_post" and about.unembed_hash == unembed_hash(engines["zoo"].model)
    assert about.context_size == LENGTH and about.prepend_bos and about.exclude_special_tokens == [0] and cfg.d_in == 128
    assert about.explained_variance >= 0.9 and about.loss_recovered >= 0.98 and about.dead_fraction <= 0.02 and about.held_out_tokens > 90_000


@pytest.mark.slow
def test_features_fire_on_what_they_are_named_by(saes, engines):
    """Precision of at least 0.95 on the 100 strongest activations over 150k tokens, and no more than 2 % dead there."""
    counts = [sum(n["sae"] == f"zoo/{name}" for n in FEATURES) for name in SAES]
    assert min(counts) >= 10 and len({n["fires_on"] for n in FEATURES}) >= 20
    got, dead = name_features.precisions(engines["zoo"].model, saes, FEATURES, 150_000)
    bad = [(n["sae"], n["feature"], n["fires_on"], p) for n, p in zip(FEATURES, got) if p < 0.95]
    assert not bad
    assert max(dead.values()) <= 0.02


def test_card_names_the_features():
    """Every feature of features.json stands in zoo/README.md under the same name, and none has two names."""
    card = (ROOT / "zoo" / "README.md").read_text()
    assert len({(n["sae"], n["feature"]) for n in FEATURES}) == len(FEATURES)
    for n in FEATURES:
        line = next((x for x in card.splitlines() if x.startswith(f"| {n['sae'].removeprefix('zoo/')} | f{n['feature']} |")), "")
        assert n["fires_on"] in line, n
