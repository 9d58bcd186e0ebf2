"""The screen explains itself: every shown result has its definition, keys and views are listed with what they are for, hints follow the state."""

import pytest
from ui import make_app, press, screen, shown

from screen.glyphs import SIGNS
from screen.keys import helped
from screen.overlays import Panel
from screen.session import VIEWS
from screen.views import TAKEN, letters
from screen.tour import CARDS, compared
from tui import PANES, TABLE, first_state
from utils import ROOT

SIZES = [(80, 24), pytest.param((120, 36), marks=pytest.mark.slow), pytest.param((200, 50), marks=pytest.mark.slow)]


@pytest.fixture
def zoo(engines):
    return engines["zoo"]


def test_every_view_of_every_pane_is_explained():
    """Each value that changes what is measured: name, definition, formula, source."""
    other = {"lens": ("lens=logit", "lens=tuned", "lens=jacobian", "components"), "attention": ("pattern", "weighted=on", "source=random", "difference")}
    other |= {
        "patching": (
            *(f"op={o}" for o in VIEWS["patching.op"]),
            "effect=direct",
            *(f"show={s}" for s in VIEWS["patching.show"][1:]),
            *(f"by={e}" for e in VIEWS["patching.estimate"][1:]),
        )
    }
    other |= {"qk": (*VIEWS["qk.instead"], "set"), "generate": ("all", "prompt")}
    other |= {"circuit": ("path=direct", "path=mlps"), "features": tuple(f"order={o}" for o in VIEWS["features.order"]), "output": ("output",)}
    for pane in PANES.values():
        wanted = {*(VIEWS[pane.view] if pane.view else ()), *other.get(pane.key, ())}
        assert wanted == set(pane.explained), pane.key
        for name, e in pane.explained.items():
            assert e.name and len(e.name) <= 24 and len(e.what) > 20 and len(e.formula) > 2 and e.source and e.frozen, name
            assert e.what != e.name and e.formula not in (e.name, e.what), name


def test_letters_are_different_and_leave_the_lists_own_keys():
    for pane in PANES.values():
        if pane.view:
            by = letters(VIEWS[pane.view])
            assert len(set(by.values())) == len(by) and not set(by.values()) & set(TAKEN), pane.key
    assert letters(("aa", "a", "A")) == {"aa": "a", "a": "A", "A": "1"}


def test_the_panes_own_keys_come_first():
    for pane in PANES.values():
        rows = helped(TABLE, pane)
        own = [a.id for section, a, _ in rows if section == pane.label]
        assert [a.id for _, a, _ in rows[: len(own)]] == own and {a.id for _, a, _ in rows} == {a.id for a in TABLE}
        assert all(text for _, _, text in rows)
    rows = {a.id: text for section, a, text in helped(TABLE, PANES["patching"]) if section == "Patching"}
    assert rows["points"].startswith("Effect, metric") and "lens" not in rows["points"].lower() and rows["sweep"].startswith("Run this pane's sweep")


@pytest.mark.parametrize("size", SIZES)
async def test_help_views_and_definitions(zoo, tmp_path, size):
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, "4")
        assert "S" in screen(app)[-1] and "run sweep" in screen(app)[-1]
        await press(app, pilot, "question_mark")
        lines = screen(app)
        first = next(n for n, line in enumerate(lines) if line.startswith(" keys")) + 2
        assert lines[first].rstrip().endswith("Patching") and "esc close" in lines[-1], "the open list's keys are in the hint line"
        await press(app, pilot, *"newline", "escape")
        assert "view" in screen(app)[-1]
        await press(app, pilot, "v")
        assert "head outputs" in shown(app) and app.state.views["patching.kind"] == "z"
        assert app.query(Panel), "the list of views"


async def test_a_letter_takes_a_view_v_the_next_and_backspace_steps_back(zoo, tmp_path):
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, "2", "v", letters(VIEWS["attention.stat"])["entropy"])
        assert app.state.views["attention.stat"] == "entropy" and not app.query(Panel)
        await press(app, pilot, "v", "v")
        assert app.state.views["attention.stat"] == "pair"
        await press(app, pilot, "backspace", "backspace")
        assert app.state.views["attention.stat"] == "induction"
        await press(app, pilot, "v", "j", "enter", "v", "escape")
        assert app.state.views["attention.stat"] == "previous"


async def test_hints_follow_what_is_going_on(zoo, tmp_path):
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, "2", "enter")
        assert "esc leave the pattern" in screen(app)[-1]
        await press(app, pilot, "escape", "+")
        assert "esc leave the pattern" not in screen(app)[-1] and "_ all panes" in screen(app)[-1]
        for width in range(40, 81, 7):
            await pilot.resize_terminal(width, 24)
            await pilot.pause()
            words = screen(app)[-1].split()
            assert words[-1] in {
                w
                for title in (*(a.title for a in TABLE), *(a.title for p in PANES.values() for a in p.keys), "help", "all panes", "move", str(app.node()))
                for w in title.split()
            }


async def test_what_is_measured_is_defined_in_full(zoo, tmp_path):
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(120, 36)) as pilot:
        for key in PANES:
            await press(app, pilot, next(p.number for p in PANES.values() if p.key == key))
            for name in app.panes[key].variants(app):
                assert name in app.panes[key].explained, (key, name)
            await press(app, pilot, "=")
            text = shown(app)
            assert "formula" in text and "source" in text and "frozen" in text, key
            await press(app, pilot, "escape")


def test_one_sign_one_meaning():
    assert len(set(SIGNS.values())) == len(SIGNS)


# ------------------------------------------------------------------ the tour

NAMES = {"⏎": "enter", "esc": "escape", "/": "slash"}


async def walk(app, pilot, card):
    """The keys that a card names, as one types them."""
    for word in card.keys:
        for key in [NAMES[word]] if word in NAMES else word:
            await pilot.press({".": "full_stop", "_": "underscore"}.get(key, key) if len(word) > 1 else key)
        if word in ("⏎", "esc") or len(word) == 1:
            await press(app, pilot)


@pytest.mark.parametrize("size", SIZES)
async def test_the_tour_ends_with_a_proven_circuit(zoo, tmp_path, size):
    """By the keys that its cards name; its numbers are those of docs/tour.md."""
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=size) as pilot:
        await press(app, pilot, ":", *"tour", "enter")
        at = 1
        while app.tour.at < len(CARDS):
            assert app.tour.at == at, f"{CARDS[at - 1].title}: {app.tour.said}\n{shown(app)}"
            card, tries = CARDS[at], 0
            assert f"tour {at + 1}/{len(CARDS)} · {card.title}" in shown(app) and "  ".join(card.keys) in shown(app), shown(app)
            while app.tour.at == at and tries < (20 if card.again else 1):
                await walk(app, pilot, card)
                tries += 1
            good = app.tour.said[1]
            assert app.tour.at > at and good, f"{card.title}: {app.tour.said}\n{shown(app)}"
            at += 1
        assert any(set(c.nodes) == {"L0H1", "L0H3", "L3H2", "L3H3"} for c in app.state.circuits)
        assert "A proven circuit" in shown(app)
        await press(app, pilot, ":", *"tour", "enter")
        assert not app.query("#tour") and "A proven circuit" not in shown(app)


async def test_the_tour_waits_is_left_and_resumed(zoo, tmp_path):
    app = make_app(zoo, tmp_path, first_state({}))
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, ":", *"tour", "enter")
        assert app.tour.at == 1
        await press(app, pilot, "j", "k", "2", "v", "e")  # no key is taken away, and the card waits
        assert app.tour.at == 1 and app.pane == "attention" and app.state.views["attention.stat"] == "entropy"
        await walk(app, pilot, CARDS[1])
        assert app.tour.at == 2 and "+8.836" in shown(app)
        await press(app, pilot, ":", *"tour", "enter")
        assert not app.query("#tour") and "left at card 3" in shown(app)
    again = make_app(zoo, tmp_path, first_state({}))
    async with again.run_test(size=(80, 24)) as pilot:
        await press(again, pilot, ":", *"tour", "enter")
        assert again.tour.at == 2 and "where it turns" in shown(again)


async def test_on_another_prompt_the_tour_says_the_way(zoo, tmp_path):
    app = make_app(zoo, tmp_path)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot, ":", *"tour", "enter")
        assert app.tour.at == 0 and "M  zoo  ⏎" in shown(app)


def test_numbers_of_another_machine_are_said():
    card = next(c for c in CARDS if c.title == "ablate one")
    assert compared(card, [2.9444]) == ("+2.944: still Mary.", True)
    assert compared(card, [2.95]) == ("+2.950 (the tour has +2.944): still Mary.", False)


def test_the_cards_numbers_are_those_of_the_page():
    page = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    for card in CARDS:
        for number in card.numbers:
            assert number.removeprefix("0") in page, (card.title, number)
