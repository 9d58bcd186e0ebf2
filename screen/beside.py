"""The keys for a second model beside the first, and for an adapter's scale."""

from screen.jobs import ends_jobs
from screen.overlays import Item, Picker
from screen.pane import Host
from screen.compared import adapter_scale
from vocabulary.nodes import UserError
from utils import model_name
from vocabulary.requests import ModelsResult
from widgets import WARN

COMPARE, ALONE = "compare with…", "compare with the corrupted prompt"
SCALES = (1.0, 0.75, 0.5, 0.25, 0.0)


def items(app: Host) -> list[Item]:
    """The lines of the list of models that are about a second one."""
    if name := app.state.model.against:
        return [Item(ALONE, f"and no longer with {model_name(name)}", value=ALONE)]
    return [Item(COMPARE, "this prompt in a second model of the same shape: a fine-tune beside its base", value=COMPARE)]


def chosen(app: Host, item: Item, found: ModelsResult) -> None:
    """Ask with which model to compare, or go back to the corrupted prompt."""
    if item.value == ALONE:
        compare(app, "")
        return
    base = [Item(app.info.base, "the base of this adapter")] if app.info is not None and app.info.base else []
    some = [*base, *(Item(c.name, " ".join((*c.aliases, c.where))) for c in found.choices)]
    title = f"compare {model_name(app.state.model.model)} with (or type a folder or hub name)"
    app.open(Picker(title, some, lambda item, typed: (item or typed.strip()) and compare(app, item.key if item else typed.strip()), free=True))


def compare(app: Host, name: str) -> None:
    """Take the other run from a second model, or (no name) from the corrupted prompt."""
    if name == app.state.model.against:
        app.say(f"{model_name(name)} is beside this model already", WARN)
        return
    whole = {} if app.info is None or app.info.scale is not None else {"scale": 1.0}  # the second model's, which goes
    app.guard(lambda: ends_jobs(app, f"comparing with {model_name(name)}" if name else "one model", lambda: app.act("against", name=name, **whole)))


def scale(app: Host) -> None:
    """Choose how much of an adapter's change counts."""
    app.ready()
    if app.info.scales is None:
        raise UserError("this model is no adapter, and has no scale: M loads one, a folder with adapter_config.json")
    some = [Item(f"{s:g}", "the base" if s == 0 else "the adapter as it was trained" if s == 1 else f"the base and {s:.0%} of the change") for s in SCALES]
    title = f"scale of the adapter (now {app.info.scales:g}; or type a number from 0 to 1)"
    app.open(Picker(title, some, lambda item, typed: app.guard(lambda: rescale(app, item.key if item else typed)), free=True))


def rescale(app: Host, text: str) -> None:
    """Set the scale that was typed."""
    try:
        value = float(text)
    except ValueError:
        raise UserError(f"{text[:20]!r} is not a number: type one from 0 to 1") from None
    adapter_scale(app.state, value)
    ends_jobs(app, f"the adapter at {value:g}", lambda: app.act("adapter_scale", value=value))
