"""A model of 48 × 64 heads and a prompt of 1,000 tokens on the screen, at three sizes, and what a step of the cursor costs there."""

import pytest
from conftest import PROMPT, tokenizer
from test_bytes import cost
from ui import Wire, make_app, press, screen, shown

from screen.session import State
from vocabulary.prompts import Prompt
from vocabulary.requests import Load

SIZES = [(80, 24), (120, 36), (200, 50)]


def engine_of(folder, n_layers: int, n_heads: int, n_positions: int):
    """A random model of that shape, two dimensions a head."""
    import torch as t
    import transformers as tr

    from engine import Engine

    tok = tokenizer(bos=True)
    t.manual_seed(0)
    shape = {"n_embd": 2 * n_heads, "n_layer": n_layers, "n_head": n_heads, "n_positions": n_positions, "n_inner": 32}
    config = tr.GPT2Config(vocab_size=len(tok) + 3, initializer_range=0.25, bos_token_id=0, eos_token_id=1, **shape)
    tr.GPT2LMHeadModel(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return Engine(str(folder))


@pytest.mark.slow
async def test_48_by_64_heads(tmp_path, monkeypatch):
    """The map of heads is whole at 200×50; where it is not, the strip of maxima stands beside it. A step in it costs at most 1.3 KB, a step in a small one 1.2."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("COLORTERM", raising=False)
    engine = engine_of(tmp_path / "deep", 48, 64, 64)
    for size in SIZES:
        app = make_app(engine, tmp_path, State(model=Load(str(tmp_path / "deep")), prompt=PROMPT), driver_class=Wire)
        async with app.run_test(size=size, headless=False) as pilot:
            await press(app, pilot)
            await press(app, pilot, "2")
            await press(app, pilot, "k", "l")
            view = app.panes["attention"].map
            lines = screen(app)
            assert view.density.per == 2 and view.across >= 64 and all(len(line) <= size[0] for line in lines)
            if size == (200, 50):
                assert view.lines_of() == 24 <= view.down and not len(view.right), "every head is in view"
                assert any(line.startswith("L0  " + "▀" * 64) for line in lines) and any(line.startswith("L46 " + "▀" * 64) for line in lines)
            else:
                assert len(view.right) == view.down < 24
            assert "L46H1 " in shown(app) and " of 3072 " in shown(app) and "← " in shown(app)
            assert "resid_post" in app.panes["lens"].said[0] or size == (80, 24)
            for key in "lhjk":
                assert await cost(app, pilot, key) <= 1_300, (size, key)
            await press(app, pilot, "enter")
            assert app.panes["attention"].pattern.display, "the pattern that had no room beside the map is shown when it is drilled into"


@pytest.mark.slow
async def test_a_thousand_tokens(tmp_path):
    """Positions keep their numbers, tokens their names, and nothing is wider than the screen."""
    engine = engine_of(tmp_path / "long", 2, 4, 1100)
    prompt = Prompt("When" + " Mary and John went to the store," * 124 + " Mary", None, (" Mary",), (" John",))
    for size in SIZES:
        app = make_app(engine, tmp_path, State(model=Load(str(tmp_path / "long")), prompt=prompt))
        async with app.run_test(size=size) as pilot:
            await press(app, pilot)
            n = app.length()
            assert n > 990
            await press(app, pilot, "1", "h", "h")
            rows = screen(app)
            numbers = [line.split() for line in rows[3:8]]
            assert any(str(n - 3) in line for line in numbers), "the cursor's position is named above the tokens"
            await press(app, pilot, "2", "enter")
            rows, view = screen(app), app.panes["attention"].pattern
            assert all(len(line) <= size[0] for line in rows) and view.at[0] == n - 3
            assert any(line.strip().startswith(f"{n - 3} ") or f" {n - 3} " in line for line in rows), "the row under the cursor is named"
            assert len(view.right) == view.down and str(view.at[1]) in "".join(t for t, _ in view.ticks(range(view.origin[1], view.origin[1] + view.across)))
