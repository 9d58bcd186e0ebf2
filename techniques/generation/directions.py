"""The list of directions under `$`: make, load, steer along, save, put away; and the coefficient on keys, with the metric's curve over it. Each takes the pane and the app."""

import math
from dataclasses import replace
from pathlib import Path

from screen.actions import accepted, intervene
from screen.overlays import Editor, Item, Panel, Picker
from screen.pane import Host, Pane
from screen.pictures import chart, run_names
from techniques.generation.requests import Curve, CurveResult, Direction, Directions, DirectionsResult, KINDS, MakeDirection
from vocabulary.files import folder, replacing, typed_path
from vocabulary.nodes import Intervention, UserError, parse_node
from widgets import BOLD, DIM, GOOD, WARN, Spans

STEP = 0.5
AROUND = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # of the curve, times the coefficient


def show_list(pane: Pane, app: Host) -> None:
    app.ready()
    app.requests.ask("directions", Directions(), lambda listed: open_list(app, listed), opens="looking for directions")


def open_list(app: Host, listed: DirectionsResult) -> None:
    items = [Item(d.name, f"{d.at or 'no hook point'}  length {d.norm:.3g}  {d.words}", d.model, lambda d=d: open_one(app, d)) for d in listed.some]
    items += [Item(f"new: {kind}", words, "", lambda kind=kind: edit_new(app, kind)) for kind, words in KINDS.items()]
    items += [Item("unreadable", text, "", lambda text=text: app.say(text, WARN)) for text in listed.wrong]
    chosen = lambda item, typed: app.guard(item.value if item else lambda: make(app, MakeDirection(app.study, "file", file=typed.strip())))  # noqa: E731
    app.open(Picker("directions to steer along (or type a .safetensors or .npy file)", items, chosen, free=True))


def open_one(app: Host, d: Direction) -> None:
    """What can be done with a kept direction."""
    items = [
        Item("steer", f"add it at {d.at or 'a hook point'}, with a coefficient", "", lambda: edit_steer(app, d)),
        Item("save", "write it to a .safetensors file, with its hook point", "", lambda: edit_save(app, d)),
        Item("put away", "out of this list; sessions that name it still find it", "", lambda: put_away(app, d)),
    ]
    app.open(Picker(d.name, items, lambda item, typed: item and app.guard(item.value)))


def edit_steer(app: Host, d: Direction) -> None:
    node = d.at or f"L{app.cursor.layer}.resid_post"

    def put(values: list[str]) -> str:
        try:
            number = float(values[1])
        except ValueError:
            return f"{values[1]!r} is not a number"
        if not math.isfinite(number):
            return "the coefficient must be finite"
        intervene(app, Intervention(parse_node(values[0]), "steer", number, d.name))
        return ""

    hint = f"length {d.norm:.3g} · without @: at all positions"
    app.open(Editor(f"steer along {d.name}", [("node", node), ("times", "1")], accepted(put), 1, 1, hint, True))


def edit_save(app: Host, d: Direction) -> None:
    def put(values: list[str]) -> str:
        target = typed_path(values[0])
        with replacing(target) as part:
            part.write_bytes(Path(d.path).read_bytes())
        app.say(f"written to {target}", GOOD)
        return ""

    if not Path(d.path).is_file():
        raise UserError(f"the engine keeps it on its own machine, at {d.path}: copy it from there")
    app.open(Editor("save a direction", [("file", str(folder("exports") / f"{d.name}.safetensors"))], accepted(put), 0, 1))


def put_away(app: Host, d: Direction) -> None:
    app.requests.ask("directions", Directions(away=d.name), lambda _: app.say(f"{d.name} is put away", GOOD))


def edit_new(app: Host, kind: str) -> None:
    """The fields of a new direction of this kind."""
    c = app.cursor
    stream = f"L{c.layer}.resid_post"
    at = {"prompts": f"{stream}@{c.pos}", "set": f"{stream}@END", "head": f"L{c.layer}H{c.head}", "feature": f"L{c.layer}.sae.f0", "file": stream}[kind]
    more = {"set": [("minus", "")], "head": [("token", "")], "file": [("file", "")]}.get(kind, [])

    def put(values: list[str]) -> str:
        fields = dict(zip(("at", *(name for name, _ in more), "name"), values))
        study = app.study
        if kind == "set":
            study = replace(study, prompt_set=app.state.prompt_set)
        if kind == "feature":
            study = app.state.with_saes(study)
        parse_node(fields["at"])
        make(app, MakeDirection(study, kind, **fields))
        return ""

    app.open(Editor(f"a direction: {KINDS[kind]}", [("at", at), *more, ("name", "")], accepted(put), 0, 1))


def make(app: Host, request: MakeDirection) -> None:
    def made(d: Direction) -> None:
        app.say(f"{d.name}: {d.words}, at {d.at}, length {d.norm:.3g}", GOOD)
        edit_steer(app, d)

    app.requests.ask("direction", request, made, opens="making a direction")


# ------------------------------------------------------------------ the coefficient


def current(app: Host) -> Intervention:
    """The steering intervention that the keys change: the newest."""
    some = [i for i in app.state.interventions if i.op == "steer"]
    if not some:
        raise UserError("nothing is steered: $ lists directions, and takes one")
    return some[-1]


def stepped(value: float, by: int) -> float:
    """A coefficient one step further: half a unit, of the power of ten of a large one."""
    size = STEP * 10 ** max(0, math.floor(math.log10(max(abs(value), 1.0))))
    return round(value + by * size, 10)


def change(pane: Pane, app: Host, by: int) -> None:
    """The coefficient one step up or down."""
    i = current(app)
    new = replace(i, value=stepped(i.value, by))
    app.act("intervene", intervention=new)
    app.say(f"{new.node}: {new.value:g} times {new.source}", GOOD)


def show_curve(pane: Pane, app: Host) -> None:
    """The metric over the coefficient; - and ~ change it meanwhile."""
    i = current(app)
    unit = max(abs(i.value), 1.0)
    request = Curve(app.study, str(i), tuple(sorted({c * unit for c in AROUND} | {i.value})))
    app.requests.ask("curve", request, lambda found: open_curve(pane, app, found), opens="the metric over the coefficient")


def open_curve(pane: Pane, app: Host, found: CurveResult) -> None:
    names = run_names(app.state)

    def turn(by: int) -> None:
        change(pane, app, by)
        panel.replace(rows())

    def rows() -> list[Spans]:
        i = current(app)
        now = [n for n, c in enumerate(found.coefficients) if abs(c - i.value) < 1e-9]
        said = f" now {i.value:g}" + (f": {found.values[now[0]]:+.4f}" if now else "")
        xs, ys = found.coefficients.tolist(), found.values.tolist()
        lines = chart(app.state.metric.name, [f"{c:g}" for c in xs], {"metric": ys}, app.size.width - 2, max(8, app.size.height * 3 // 5 - 1), xs)
        runs = "".join(f"  {name} {v:+.3f}" for name, v in ((names["clean"], found.clean), (names["corrupt"], found.corrupt)) if v is not None)
        return [[(said, BOLD), (runs, DIM)], *lines]

    keys = {"-": lambda _: turn(-1), "~": lambda _: turn(1)}
    panel = Panel("over the coefficient", rows(), f"- and ~ change it · {found.convention}", keys=keys)
    app.open(panel)
