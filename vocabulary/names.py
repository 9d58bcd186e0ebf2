"""The names of models: TransformerLens's aliases (`gpt2-small`, `pythia-70m`) and one canonical name a model. Never imports torch or TransformerLens."""

import importlib.util
from functools import cache
from pathlib import Path

from utils import ROOT
from vocabulary.nodes import UserError
from vocabulary.requests import ModelInfo

OWNERS = {"distilgpt2": "distilbert"} | dict.fromkeys(
    ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"), "openai-community"
)  # the hub has these models under both names
OWN_SOFTMAX = "attention patterns, which TransformerLens only copies"  # where attention is Hugging Face's own code


@cache
def aliases() -> dict[str, tuple[str, ...]]:
    """By canonical name every other name of a model that TransformerLens knows, read from the file of its table alone."""
    spec = importlib.util.find_spec("transformer_lens")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("transformer_lens is not installed: run uv sync")
    there = importlib.util.spec_from_file_location("supported_models", Path(spec.submodule_search_locations[0]) / "supported_models.py")
    table = importlib.util.module_from_spec(there)
    there.loader.exec_module(table)
    known = {name: tuple(dict.fromkeys(table.MODEL_ALIASES.get(name, ()))) for name in table.OFFICIAL_MODEL_NAMES}
    return {name: (*some, *(f"{OWNERS[n]}/{n}" for n in (name,) if n in OWNERS)) for name, some in known.items()}


@cache
def by_alias() -> dict[str, str]:
    """The canonical name of every name in the table, by its lower case."""
    return {n.lower(): name for name, some in aliases().items() for n in (*some, name)}


def canonical(name: str) -> str:
    """A model's name as the hub and TransformerLens have it (`gpt2-small`, `openai-community/gpt2`: `gpt2`); any other name, or a path, as it is."""
    return by_alias().get(name.lower(), name)


def spellings(name: str) -> tuple[str, ...]:
    """The names under which the hub, and so its cache, has a model: the canonical one, and that with its owner."""
    name = canonical(name)
    return (name, f"{OWNERS[name]}/{name}") if name in OWNERS else (name,)


def sources(model: str, base: str | None, info: ModelInfo, patterns: bool) -> tuple[str, str]:
    """
    Where a script finds the weights and the base of what was loaded as `model`. UserError where no script can, or where one of TransformerLens alone would print
    other numbers; `patterns`: whether it writes attention patterns.
    """
    if lacking := [words for words in info.repairs if patterns or words != OWN_SOFTMAX]:
        raise UserError(f"a script of TransformerLens alone would print another number: on {info.architecture} Loupe puts right its {' and '.join(lacking)}")
    if info.against or info.scale is not None:
        why = "two models are compared: go back to one (M)" if info.against else "this is an adapter on its base: merge it with PEFT (merge_and_unload)"
        raise UserError(f"a script opens one model from its folder, and {why}")
    place = lambda text: str(ROOT / "zoo") if text == "zoo" else canonical(text)  # noqa: E731
    weights = str(ROOT / "zoo") if model == "zoo" else info.name
    if weights.endswith(".gguf"):
        raise UserError("a script for a GGUF file is not built: save the model as a Hugging Face folder and load that")
    if info.architecture == "HookedTransformer":
        raise UserError("a script for a model trained by hand is not built: HookedTransformer and load_state_dict open it")
    return weights, place(base) if base else weights


def without_owner(name: str) -> str:
    """The last part of a model's canonical name, in lower case; a folder goes by its own name: `models/gpt2-small` is `gpt2`."""
    return Path(canonical(Path(canonical(name)).name)).name.lower()


def same_model(one: str, other: str) -> bool:
    """Whether two names are of one model, whoever owns it; "" fits every name."""
    return not one or not other or without_owner(one) == without_owner(other)
