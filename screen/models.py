"""`M`: the models that can be named, with their sizes against what is free; and loading one."""

from dataclasses import replace

from screen import beside
from screen.jobs import ends_jobs
from screen.overlays import Item, Picker
from screen.pane import Host
from utils import show_bytes
from vocabulary.names import canonical
from vocabulary.requests import Load, ModelChoice, Models, ModelsResult
from vocabulary.sizes import ways
from widgets import BAD, WARN

SLOT = "models"
USAGE = "(or type a folder or hub name, then dtype=bfloat16 base=gpt2 …)"


def models(app: Host) -> None:
    """Choose a model. The names come at once, the sizes as they are read; esc ends the reading."""
    old = app.state.model
    found = ModelsResult((ModelChoice("zoo", "embedded"),))
    picker = Picker(f"model {USAGE}", listed(app, found), lambda item, typed: chosen(app, item, typed, found), free=True, gone=lambda: stop(app))
    app.open(picker)

    def fill(result: ModelsResult) -> None:
        nonlocal found
        found, room = result, result.room
        picker.items, picker.title = listed(app, result), f"model in {old.dtype}, {show_bytes(room.free)} free on {room.device} {USAGE}"
        if picker.is_mounted and not picker.closing:
            picker.draw()

    app.requests.ask(SLOT, Models(old.dtype, old.device), fill, 0, failed=lambda error: picker.complain(str(error)), any_model=True, on_partial=fill)


def listed(app: Host, found: ModelsResult) -> list[Item]:
    """The models; what compares with a second one comes after the first line."""
    first, *rest = items(found)
    return [first, *beside.items(app), *rest]


def stop(app: Host) -> None:
    """The list is closed: what its sizes are read for is no longer there."""
    for job in [j for j in app.client.jobs.values() if j.slot == SLOT]:
        app.requests.cancel(job)


def items(found: ModelsResult) -> list[Item]:
    """A line a model: its name, its other names and where it lies, its size."""
    return [Item(c.name, " ".join((*c.aliases, c.where)), size(c, found), c) for c in found.choices]


def size(c: ModelChoice, found: ModelsResult) -> str:
    """Layers × heads, parameters, bytes in the chosen dtype, and by how much these are too many; what is not known is left out."""
    least, over = "≥ " * c.at_least, c.need - found.room.free
    words = [f"{c.n_layers}×{c.n_heads}"] if c.n_layers else []
    words += [f"{least}{c.n_params / 1e6:,.0f} M"] if c.n_params else []
    words += [f"{least}{show_bytes(c.need)}{f', {show_bytes(over)} too much' if found.room.free and over > 0 else ''}"] if c.need else []
    return "  ".join([*words, c.note] if c.note else words)


def chosen(app: Host, item: Item | None, typed: str, found: ModelsResult) -> None:
    """Load what was chosen or typed; of a model that is too large, ask how."""
    choice = item.value if item else None
    if isinstance(choice, str):
        beside.chosen(app, item, found)
        return
    if choice is None or not found.room.free or choice.need <= found.room.free:
        load_model(app, [item.key] if item else typed.split())
        return
    others = [Item(option, words, "", option) for option, words in ways(choice.need, choice.dtype, found.room)]
    title = f"{choice.name} is {show_bytes(choice.need - found.room.free)} too large in {choice.dtype}"
    app.open(
        Picker(
            title, [*others, Item("as it is", "try it all the same")], lambda item, typed: item and load_model(app, [choice.name, *filter(None, [item.value])])
        )
    )


def load_model(app: Host, words: list[str]) -> None:
    """A model as it is typed: its name, then base=, dtype=, device=, device_map=, against=."""
    options = dict(w.partition("=")[::2] for w in words[1:])
    old = app.state.model
    if unknown := set(options) - {"base", "dtype", "device", "device_map", "against"}:
        app.say(f"{min(unknown)}=: a model takes base=, dtype=, device=, device_map=, against=", BAD)
        return
    kept = {name: options.get(name, getattr(old, name)) for name in ("dtype", "device", "device_map")}
    load = Load(words[0], options.get("base"), **kept, against=options.get("against", ""))
    if replace(load, model=canonical(load.model)) == replace(old, model=canonical(old.model)) and app.info is not None:
        app.say(f"{load.model} is loaded already: ctrl+e restarts the engine, which reads its weights from disk again", WARN)
        return
    app.guard(lambda: ends_jobs(app, f"loading {load.model}", lambda: app.act("model", load=load)))
