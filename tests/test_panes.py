"""Attribution, weights, and the further views of lens and attention, on the screen, against the engine's own answers."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from ui import LocalClient, Superseded, grid, make_app, press, reply, shown

from screen.client import Job

from techniques.attention.requests import Detect
from techniques.attribution.requests import Attribution, AttributionSet
from techniques.output.requests import Run
from techniques.patching.requests import Sweep
from techniques.weights.requests import Composition, HeadWeights
from vocabulary.nodes import parse_intervention
from vocabulary.prompts import Study
from tui import first_state
from screen.overlays import Panel, Picker


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(80, 24), (120, 36), (200, 50)])
async def test_attribution(zoo, tmp_path, size):
    state = first_state({})
    app = make_app(zoo, tmp_path, state)
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, "3")
        direct = zoo.run(Attribution(Study(state.prompt)))
        assert f"sum {direct.total:+.4f}" in shown(app) and f"model {direct.logit:+.4f}" in shown(app)
        name, value = max(direct.cells.rows(), key=lambda r: abs(r[1]))
        assert f"{value:+.3f}" in shown(app) and name in shown(app)
        while app.cursor.head != 3:
            await press(app, pilot, "l")
        await press(app, pilot, "enter")
        assert app.state.views["attribution.view"] == "drill" and "by source" in shown(app) and "10 ·John" in shown(app)
        while app.cursor.comp != "mlp":
            await press(app, pilot, "l")
        await press(app, pilot, "k")
        assert "by neuron" in shown(app)
        await press(app, pilot, "v", "v")
        whole = zoo.run(AttributionSet(Study(state.prompt, prompt_set=state.prompt_set)))
        assert f"{len(state.prompt_set)} prompts" in shown(app) and f"{whole.logits.mean():+.3f}" in shown(app)
        await press(app, pilot, "W")
        assert app.state.index == whole.worst
        await press(app, pilot, "v", "v", "h")
        here = app.cursor
        await press(app, pilot, "comma")
        assert app.cursor.pos == here.pos - 1 and "ranked" == app.state.views["attribution.view"]


@pytest.mark.slow
async def test_weights(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "7")
        for expected in ("copying", "destination → source", "Q-composition", "K-composition", "V-composition", "OV", "QK", "mlp_out", "mlp_in"):
            assert expected in shown(app) and not app.requests.error("weights")
            await press(app, pilot, "v", "v")
        head = zoo.run(HeadWeights(app.cursor.layer, app.cursor.head, 40))
        assert f"copying {head.copying:.2f}" in shown(app)
        await press(app, pilot, *"vv" * 2, "g")
        assert app.cursor.layer == 0
        comp = zoo.run(Composition(0, app.cursor.head))
        assert f"{comp.baseline:.3f} ± {comp.spread:.3f}" in shown(app)


@pytest.mark.slow
async def test_more_of_the_lens(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "L")
        assert app.query_one(Panel) and "clean" in shown(app) and "corrupted" in shown(app)
        await press(app, pilot, "escape")
        for stat in ("kl_pair", "promoted", "suppressed"):
            app.act("view", name="lens.stat", value=stat)
            await press(app, pilot)
            assert not app.requests.error("lens")
        app.act("view", name="lens.points", value="components")
        await press(app, pilot, "k")
        assert "L3.attn" in shown(app) and app.node().site in ("attn", "mlp")
        app.act("view", name="lens.points", value="heads")
        await press(app, pilot, "g", "j")
        assert app.node().site == "head" and (app.cursor.layer, app.cursor.head) == (0, 1)
        app.act("lens", kind="tuned", artefact=str(tmp_path / "none"))
        await press(app, pilot)
        assert app.requests.error("lens") and "u" in app.requests.error("lens")
        await press(app, pilot, "u")
        assert not app.requests.error("lens")
        await press(app, pilot, "K")
        assert app.query_one(Picker)
        await press(app, pilot, "escape")


@pytest.mark.slow
async def test_more_of_attention(zoo, tmp_path):
    state = first_state({})
    app = make_app(zoo, tmp_path, state)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "2", "O")
        assert "▀" in shown(app) and "H3" in shown(app)
        await press(app, pilot, "V", "V", "O", "Z")
        assert "‖value written‖" in shown(app)
        await press(app, pilot, "Z", "H")
        stats = reply(app, "heads").stats["induction"]
        best = divmod(int(np.abs(np.nan_to_num(stats)).argmax()), stats.shape[1])
        await press(app, pilot, "enter")
        assert (app.cursor.layer, app.cursor.head) == best
        await press(app, pilot, "C")
        app.query_one("Editor").fields[0].value = "14>2"
        await press(app, pilot, "enter")
        await press(app, pilot)
        scores = zoo.run(Detect(state.study, "now", "cells", ((14, 2),))).scores
        best = divmod(int(np.abs(scores).argmax()), scores.shape[1])
        await press(app, pilot, "enter")
        assert (app.cursor.layer, app.cursor.head) == best
        await press(app, pilot, "C")
        app.query_one("Editor").fields[0].value = "nonsense"
        await press(app, pilot, "enter")
        assert "previous_token_head" in shown(app)


@pytest.mark.slow
async def test_patching(zoo, tmp_path):
    state = first_state({})
    app = make_app(zoo, tmp_path, state)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot, "4")
        assert "noising" in shown(app) and "estimate · S runs the truth" in shown(app)
        await press(app, pilot, "S")
        truth = zoo.run(Sweep(Study(state.prompt), "z", "patch", "noise"))
        assert f"truth {truth.total}/{truth.total}" in shown(app)
        np.testing.assert_allclose(grid(app).values, truth.normalised - 1, atol=1e-5)
        row, col = divmod(int(np.abs(truth.normalised - 1).argmax()), truth.values.shape[1])
        await press(app, pilot, "H", "enter")
        assert (app.cursor.layer, app.cursor.head) == (row, col)
        assert f"metric {truth.values[row, col]:+.4f}" in shown(app)
        patched = zoo.run(Run(Study(state.prompt, (parse_intervention(f"L{row}H{col}=patch"),))))
        assert patched.now.metric == pytest.approx(float(truth.values[row, col]), abs=1e-4)
        await press(app, pilot, "enter")
        assert str(app.state.interventions[0]) == f"L{row}H{col}=patch" and reply(app, "run").now.metric == pytest.approx(patched.now.metric)
        await press(app, pilot, "u", "d")
        assert "denoising" in shown(app) and "estimate · S runs the truth" in shown(app)
        for key in ("P", "P", "P", "P", "P", "P", "P", "Z", "Z"):
            await press(app, pilot, key)
            assert not app.requests.error("sweep") and not app.requests.error("estimate")
        app.act("view", name="patching.kind", value="resid_pre")
        await press(app, pilot, "S", "l", "j", "h")
        truth = zoo.run(Sweep(Study(state.prompt), "resid_pre"))
        row, pos = app.cursor.layer, app.cursor.pos
        assert f"metric {truth.values[row, pos]:+.4f}" in shown(app) and "·Mary" in shown(app)
        await press(app, pilot, "R", "S")
        assert "over the set" in shown(app) and f"/{truth.total * len(state.prompt_set)}" in shown(app) and "95 %" in shown(app)
        app.act("view", name="patching.op", value="mean")
        await press(app, pilot, "S")
        assert "mean ablation" in shown(app) and not app.requests.error("sweep")
        app.act("view", name="patching.over", value="prompt")
        for kind in ("cells", "neurons", "nodes", "z_pos", "pairs", "cumulative"):
            for op in ("patch", "zero"):
                app.act("view", name="patching.op", value=op)
                app.act("view", name="patching.kind", value=kind)
                await press(app, pilot)
                assert not app.requests.error("estimate"), (kind, app.requests.error("estimate"))
                await press(app, pilot, "S", "j", "l")
                assert not app.requests.error("sweep") and "truth" in shown(app), kind
                cells, got = grid(app), reply(app, "sweep")
                assert (np.isfinite(cells.values) == np.isfinite(got.values)).all(), f"{kind}: the map is that of another result"


def test_pictures_are_kept_by_the_results_themselves():
    """A result that is gone leaves its place in memory to the next one, and id with it."""
    from techniques.lens.pane import PANE
    from widgets import Same

    pane, made = PANE(), []
    for n in range(20):
        pane.picture("slot", (Same(np.full(3, n)), "view"), lambda n=n: made.append(n))
    assert made == list(range(20))
    one = np.zeros(3)
    assert pane.picture("slot", (Same(one),), lambda: "first") == pane.picture("slot", (Same(one),), lambda: "second") == "first"


@pytest.mark.slow
async def test_over_the_set(zoo, tmp_path):
    """Significant cells stand out in the p map and come first in its list; another prompt of the set and an SAE leave the set's results where they are."""
    state = first_state({})
    app = make_app(zoo, tmp_path, replace(state, prompt_set=state.prompt_set[:12]))
    async with app.run_test(size=(140, 40)) as pilot:
        await press(app, pilot, "4", "R", "S")
        assert "truth 192/192" in shown(app)
        app.act("view", name="patching.show", value="p")
        await press(app, pilot)
        cells, got = grid(app), reply(app, "sweep")
        best = np.unravel_index(np.nanargmin(got.p), got.p.shape)
        assert cells.values[best] == np.nanmax(cells.values) > 0.9 and cells.shown[best] == got.p[best] < 0.002
        await press(app, pilot, "H")
        assert any(name in shown(app) for name in ("L3H2", "L3H3")) and "+0.0005" in shown(app)
        await press(app, pilot, "escape", ")")
        assert app.state.index == 1 and "truth 192/192" in shown(app)
        app.act("saes", sources=["zoo/L2.resid_post"])
        await press(app, pilot)
        assert "truth 192/192" in shown(app)
        await press(app, pilot, "6", "H")
        assert "nothing to rank" in shown(app)


async def test_output_of_prompts_of_unequal_length(zoo, tmp_path):
    state = first_state({})
    prompt = replace(state.prompt, corrupt="When Mary and John went to the store, then Alice gave a drink to")
    app = make_app(zoo, tmp_path, replace(state, prompt=prompt, prompt_set=(), set_path="", align="diff"))
    async with app.run_test(size=(120, 40)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "0")
        assert "next token after 14 ·to, corrupted after 15 ·to" in shown(app) and "aligned by diff" in shown(app)
        run = app.requests.result("run", object)
        first = lambda side: f"{float(side.top_probs[-1, 0]):.4f}"  # noqa: E731
        assert first(run.clean) in shown(app) and first(run.corrupt) in shown(app)
        await press(app, pilot, "d", ".")
        assert "next token after 15 ·to, clean after 14 ·to" in shown(app) and first(run.clean) in shown(app) and first(run.corrupt) in shown(app)


async def test_patching_says_what_is_missing(zoo, tmp_path):
    state = first_state({})
    app = make_app(zoo, tmp_path, replace(state, prompt=replace(state.prompt, corrupt=None), prompt_set=(), set_path=""))
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "S")
        assert "sweeps live in pane 4" in shown(app)
        await press(app, pilot, "4", "S")
        assert "no corrupted prompt" in shown(app)
        await press(app, pilot, "b", "R", "S")
        assert "no prompt set is open" in shown(app)


class Waiting(LocalClient):
    """A client on which a sweep shows a part and then goes on until it is cancelled."""

    async def ask(self, slot, request, priority=1, on_partial=None):
        if not isinstance(request, Sweep):
            return await super().ask(slot, request, priority, on_partial)
        self.asked.append((slot, request))
        whole = self.engine.run(request)
        job = self.jobs[len(self.asked)] = Job(len(self.asked), slot, request, asyncio.get_running_loop().create_future(), None)
        on_partial(replace(whole, done=3))
        return await job.future

    def cancel(self, ident):
        self.jobs.pop(ident).future.set_exception(Superseded())


@pytest.mark.slow
async def test_a_cancelled_sweep_stays_cancelled(zoo, tmp_path):
    link = Waiting(zoo)
    app = make_app(link, tmp_path, first_state({}))
    async with app.run_test(size=(160, 45)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "4")
        await pilot.press("S")
        await pilot.pause()
        await pilot.press("J")
        await pilot.pause()
        assert "Sweep" in shown(app)
        await press(app, pilot, "x", "escape")
        assert not link.jobs and "truth 3/16, cancelled: S runs it again" in shown(app)
        await press(app, pilot, "=")
        assert "z = every head" in shown(app) or "output z" in shown(app)
        await press(app, pilot, "escape", "l", "j")
        assert sum(isinstance(r, Sweep) for _, r in link.asked) == 1
        await pilot.press("S")
        await pilot.pause()
        assert sum(isinstance(r, Sweep) for _, r in link.asked) == 2
        await press(app, pilot, "ctrl+c")


@pytest.mark.slow
async def test_alignment(zoo, tmp_path):
    state = first_state({})
    prompt = replace(state.prompt, corrupt="When Mary and John went to the store, then Alice gave a drink to")
    app = make_app(zoo, tmp_path, replace(state, prompt=prompt, prompt_set=(), set_path=""))
    async with app.run_test(size=(120, 40)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "2", "p")
        assert "or align them" in shown(app) and not app.state.interventions
        await press(app, pilot, "%")
        assert "position by position, 0 pairs" in shown(app)
        await press(app, pilot, *"diff", "enter")
        assert app.state.align == "diff"
        await press(app, pilot, "%")
        assert "9 ↔ 9" in shown(app) and "14 ↔ 15" in shown(app)
        await press(app, pilot, *"edit", "enter")
        await press(app, pilot, "ctrl+u", *"0-0 3-99", "enter")
        assert "has no position 99" in shown(app)
        await press(app, pilot, "ctrl+u", *"0-0 9-9 14-15", "enter")
        assert app.state.prompt.alignment == ((0, 0), (9, 9), (14, 15))
        await press(app, pilot, "p")
        assert app.state.interventions and "metric" not in shown(app).split("\n")[-2]
        await press(app, pilot, "4", "S")
        assert "truth" in shown(app)
        await press(app, pilot, "u", "u")
        assert not app.state.prompt.alignment and app.state.align == "diff"
