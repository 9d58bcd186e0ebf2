"""Maximal activating examples against a plain pass over the text."""

import numpy as np
import pytest
import torch as t
from dictionaries import build, save
from test_features import loaded

from techniques.features import examples
from techniques.features.requests import Examples
from vocabulary.nodes import UserError
from techniques.features.training import counted
from techniques.lens.translators import windows


@pytest.fixture
def cache(own_home):
    return own_home / "saes" / ".cache"


@pytest.fixture
def engine(engines):
    return engines["zoo"]


@pytest.fixture
def text(tmp_path):
    from utils import ROOT

    file = tmp_path / "text.txt"
    file.write_text((ROOT / "zoo" / "corpus.txt").read_text()[:6000])
    return file


@pytest.mark.slow
@pytest.mark.parametrize("few", [True, False])
def test_examples_are_the_largest_activations(engine, text, tmp_path, monkeypatch, cache, few):
    if few:  # as if there were too many features to count all pairs, and little room
        monkeypatch.setattr(examples, "ALL_PAIRS", 10)
        monkeypatch.setattr(examples, "CHUNK_BYTES", 1)
    source = save(build("topk", "blocks.1.hook_resid_post", 128, seed=1), tmp_path / "sae")
    d, indices = loaded(engine, source), (3, 40, 200)
    ask = Examples(source, str(text), indices, 4, 100_000, 16)
    found = engine.run(ask)
    rows = windows(engine.model, text, 16, 0)
    x = engine.model.forward(rows, [d.point])[1][d.point]
    f = (d.encode(x) * counted(engine.model, rows)[:, :, None]).numpy()
    assert found.tokens == counted(engine.model, rows).sum() and not found.cached
    for n, i in enumerate(indices):
        best = np.sort(f[:, :, i].max(1))[::-1][:4]
        tops = [e.activation[e.at] for e in found.examples[n]]
        np.testing.assert_allclose(tops, best, rtol=1e-5)
        for e in found.examples[n]:
            r, p = np.argwhere(np.isclose(f[:, :, i], e.activation[e.at], rtol=1e-6))[0]
            first = max(0, p - examples.BEFORE)
            assert e.texts == tuple(engine.model.token_text(int(j)) for j in rows[r, first : first + len(e.texts)]) and e.at == p - first
            np.testing.assert_allclose(e.activation, f[r, first : first + len(e.texts), i], rtol=2e-3, atol=1e-3)
        on = f[:, :, i] > 0
        assert found.density[n] == pytest.approx(on.sum() / found.tokens)
        assert found.counts[n].sum() == on.sum()
        np.testing.assert_array_equal(found.counts[n], np.histogram(f[:, :, i][on], found.edges)[0])
        other = found.together[n][0]
        either = (on | (f[:, :, other] > 0)).sum()
        assert found.jaccard[n][0] == pytest.approx((on & (f[:, :, other] > 0)).sum() / either, abs=1e-6)
    again = engine.run(ask)
    assert again.cached and again.examples == found.examples
    assert not engine.run(Examples(source, str(text), indices, 5, 100_000, 16)).cached
    for file in cache.glob("*.npz"):
        file.write_bytes(b"half")
    assert not engine.run(ask).cached
    assert [f.stat().st_mode & 0o777 for f in cache.iterdir()] == [0o600] * 2


def test_all_features_and_what_is_refused(engine, text, tmp_path):
    source = save(build("standard", "blocks.1.hook_resid_post", 128), tmp_path / "sae")
    found = engine.run(Examples(source, str(text), (), 2, 500, 16))
    assert len(found.examples) == 256 and found.counts.shape == (256, len(found.edges) - 1)
    bad = build("standard", "blocks.1.hook_resid_post", 128)
    with t.no_grad():
        bad.W_dec.normal_()
    for ask, words in [
        (Examples(source, str(tmp_path / "no.txt")), "no text"),
        (Examples(source, str(text), (999,)), "features 0 to 255"),
        (Examples(source, str(text), k=0), "at least 1"),
        (Examples(save(bad, tmp_path / "bad"), str(text), length=16), "does not explain"),
    ]:
        with pytest.raises(UserError, match=words):
            engine.run(ask)


def test_it_can_be_cancelled(engine, text, tmp_path, cache):
    source = save(build("standard", "blocks.1.hook_resid_post", 128), tmp_path / "sae")
    steps = engine.jobs(Examples(source, str(text), (), 2, 5000, 16))
    for part in steps:
        if part.text.startswith("examples"):
            break
    steps.close()
    engine.check_hooks()
    assert not cache.exists()
