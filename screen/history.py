"""
What undo takes back. What is computed and what is looked at (views) are independent parts of a state, and each has a history of its own.

A history is a list of (state, name of the action): of `past` the state before the action, of `future` the state to return to.
"""

from dataclasses import replace
from pathlib import Path

from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt
from vocabulary.wire import from_json
from screen import graph_steps

VIEW = "view"  # the action that changes views, and only them


def concerns(name: str, of: str) -> bool:
    """Whether an action is of a kind: "work" changes what is computed, "view" what is looked at; "" is either (files of before know no kinds)."""
    return not of or (name == VIEW) == (of == VIEW)


def taken_back(now, stack: list, of: str, way: str) -> tuple:
    """The state without the newest action of a kind, that action's name, and the history that is left. UserError where there is none (`way`: undo or redo)."""
    at = next((n for n in reversed(range(len(stack))) if concerns(stack[n][1], of)), None)
    if at is None:
        raise UserError("no other view to go back to" if of == VIEW else f"nothing to {way}")
    old, name = stack[at]
    part = (lambda state: replace(state, views=old.views)) if of == VIEW else (lambda state: replace(old, views=state.views)) if of else (lambda state: old)
    return part(now), name, [*stack[:at], *((part(state), later) for state, later in stack[at + 1 :])]


def jump(state, to: dict, prompts: list | tuple[Prompt, ...] = ()):
    """Another point of the session, whole but for its set, which comes beside it; the views stay."""
    prompts = prompts if isinstance(prompts, tuple) else from_json(prompts, tuple[Prompt, ...])
    return replace(from_json(to, type(state)), prompt_set=prompts, views=state.views)


def count(stack: list) -> int:
    """Actions that undo or redo would reach."""
    return sum(concerns(name, "work") for _, name in stack)


def words(name: str, before, after) -> str:
    """What an action did, between the states before and after it: short, for a line."""
    gone, new = ([str(i) for i in a.interventions if i not in b.interventions] for a, b in ((before, after), (after, before)))
    match name:
        case "intervene" | "drop" | "clear":
            return " ".join(new) or f"{'restored' if name == 'drop' else 'cleared'} {' '.join(gone)}"
        case "model":
            return f"model {Path(after.model.model).name}"
        case "against":
            return f"compared with {Path(after.model.against).name or 'the corrupted prompt'}"
        case "adapter_scale":
            return f"adapter × {after.model.scale:g}"
        case "prompt":
            return (
                "the prompt's alignment"
                if after.prompt.clean == before.prompt.clean != "" and after.prompt.alignment != before.prompt.alignment
                else "the typed prompt"
            )
        case "go":
            return f"prompt {after.index + 1} of the set"
        case "open_set":
            return f"set {Path(after.set_path).stem}"
        case "metric":
            return f"metric {after.metric.short}"
        case "base" | "ablation" | "lens":
            return f"{name} {getattr(after, name)}"
        case "jump":
            return "a jump to another point"
        case "enable":
            return f"interventions {'on' if after.enabled else 'off'}"
        case "sae_error":
            return f"error term {'kept' if after.sae_error else 'dropped'}"
        case "saes" | "show_sae":
            return f"SAE {after.sae}" if after.sae else "SAEs put away"
        case "receivers" | "senders":
            return f"{name} {' '.join(getattr(after, name)) or 'the node under the cursor'}"
        case "mark_graph" | "open_graph" | "transcoders":
            return graph_steps.words(name, before, after)
    return how_words(name, after) or circuit_words(before, after) or name.replace("_", " ")


def how_words(name: str, after) -> str:
    """What a setting of prompts, means and continuations is now, or ""."""
    match name:
        case "align":
            return f"alignment {after.align or 'position by position'}"
        case "chat":
            return "plain text" if isinstance(after.prompt.clean, str) else "chat"
        case "bos":
            return f"BOS {'as the tokenizer does' if after.prompt.bos is None else 'on' if after.prompt.bos else 'off'}"
        case "generation":
            return f"continuation {after.generation.words}"
        case "text":
            return f"means over {Path(after.text.path).name or 'no text'}"
    return ""


def circuit_words(before, after) -> str:
    """What changed in the circuits, or ""."""
    old, new = ({c.name: c for c in s.circuits} for s in (before, after))
    for circuit in (c for c in after.circuits if c != old.get(c.name)):
        was = old.get(circuit.name)
        if was is None:
            return f"circuit {circuit.name}"
        parts = [
            f"{verb} {x}" for verb, a, b in (("kept", circuit, was), ("dropped", was, circuit)) for x in (*a.nodes, *a.edges) if x not in (*b.nodes, *b.edges)
        ]
        return f"{' '.join(parts[:3]) or 'groups'}{' …' * (len(parts) > 3)} in {circuit.name}"
    gone = [name for name in old if name not in new]
    return f"deleted circuit {gone[0]}" if gone else f"go to circuit {after.circuit}" if after.circuit != before.circuit else ""
