"""What a second model and an adapter's scale change in the state of a hunt."""

from dataclasses import replace

from vocabulary.nodes import UserError


def against(state, name: str, scale: float | None = None):
    """The other run: the prompt in a second model of this name; "": the corrupted prompt again. `scale`: of an adapter's change from then on."""
    model = replace(state.model, against=str(name))
    return replace(state, model=model if scale is None else replace(model, scale=float(scale)))


def adapter_scale(state, value: float):
    """How much of an adapter's change to its base counts, 0 to 1."""
    if isinstance(value, bool) or not 0 <= float(value) <= 1:
        raise UserError(f"{value!r} is not a scale of an adapter: give a number from 0 to 1")
    return replace(state, model=replace(state.model, scale=float(value)))


ACTIONS = (against, adapter_scale)
