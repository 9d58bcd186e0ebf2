"""What pane 2's own keys do: heads ranked, scored against a pattern, or by mean attention between labels. Each takes the pane and the app."""

import re
from dataclasses import replace

import numpy as np

from techniques.attention.requests import AttentionSet, Detect, DETECTORS, HeadStatsResult
from vocabulary.nodes import UserError
from screen.actions import no_members
from screen.overlays import Editor, Item, Picker
from screen.pane import Host, Pane
from screen.pictures import run_names
from techniques.attention.explained import EXPLAINED
from widgets import BAD


def rank_heads(pane: Pane, app: Host) -> None:
    result, stat = app.requests.result("heads", HeadStatsResult), app.state.views["attention.stat"]
    if result is None or stat not in result.stats:
        raise UserError("the heads map has no numbers yet")
    rank(app, f"heads by {EXPLAINED[stat].name}", result.stats[stat])


def rank(app: Host, title: str, scores: np.ndarray) -> None:
    """Heads by score, to filter and go to."""
    order = [divmod(int(i), scores.shape[1]) for i in np.argsort(-np.abs(np.nan_to_num(scores)), axis=None, kind="stable")]
    choose(app, title, [Item(f"L{x}H{h}", f"{scores[x, h]:+.4f}", "", (x, h)) for x, h in order])


def choose(app: Host, title: str, items: list[Item]) -> None:
    """A list of heads; the chosen one gets the cursor."""
    app.open(Picker(title, items, lambda item, typed: item and app.move(layer=item.value[0], head=item.value[1], comp="head")))


def rank_labels(pane: Pane, app: Host) -> None:
    if app.info is None or not app.state.members:
        app.say(f"mean attention between labels is over a prompt set with labels: {no_members(app)}", BAD)
        return
    request = between_labels(app)

    def show(found) -> None:
        cells = [(x, h, d, s) for x, h, d, s in np.ndindex(*found.mean.shape) if np.isfinite(found.mean[x, h, d, s])]
        cells.sort(key=lambda c: -abs(float(found.mean[c])))
        names = found.labels
        items = [Item(f"L{x}H{h}", f"{names[d]} → {names[s]}  {found.mean[x, h, d, s]:+.3f} ± {found.std[x, h, d, s]:.3f}", "", (x, h)) for x, h, d, s in cells]
        part = app.requests.scattered.partial(found)
        choose(app, f"{part}mean attention over {len(found.prompts)} prompts, {run_names(app.state)[request.which]}", items)

    if (known := app.requests.at_hand(request)) is not None and known.result is not None:
        show(known.result)
    else:
        app.requests.ask("labels", request, show, opens="attention between labels over the set")


def between_labels(app: Host) -> AttentionSet:
    return AttentionSet(replace(app.state.study, prompt_set=app.state.members), app.state.views["which"])


def choose_detector(pane: Pane, app: Host) -> None:
    app.ready()

    def accept(values: list[str]) -> str:
        pattern, measure = values[0].strip(), values[1].strip()
        cells = tuple((int(a), int(b)) for a, b in re.findall(r"([0-9]{1,9})\s*>\s*([0-9]{1,9})", pattern))
        if not cells and pattern not in DETECTORS:
            return f"give cells such as 14>2 10>4, or one of {', '.join(DETECTORS)}"
        request = Detect(app.state.study, app.state.views["which"], pattern if not cells else "cells", cells, error_measure=measure)
        app.requests.ask("detect", request, lambda found: rank(app, f"heads by {found.convention}", found.scores), 0, opens="scoring the heads")
        return ""

    fields = [("pattern", f"{app.cursor.pos}>{app.cursor.src}"), ("measure", "mul")]
    app.open(Editor("detector", fields, accept, 0, 1, f"cells destination>source, or {', '.join(DETECTORS)}; measure mul or abs"))
