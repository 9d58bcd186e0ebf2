"""All of Loupe that the checks use: the one place to change when a module moves. `SECONDS` says what the imports took."""

import time
from importlib import import_module
from pathlib import Path

SECONDS: dict[str, float] = {}
for name in ("torch", "transformers", "transformer_lens", "numpy", "engine"):
    begun = time.monotonic()
    import_module(name)
    SECONDS[name] = round(time.monotonic() - begun, 2)

import engine  # noqa: E402

begun = time.monotonic()
engine.import_model()
SECONDS["engine.import_model"] = round(time.monotonic() - begun, 2)

from engine import Engine  # noqa: E402, F401
from link import EngineDied, Link  # noqa: E402, F401
from messages import (  # noqa: E402, F401
    Attention,
    AttentionSet,
    Attribution,
    AttributionNeurons,
    AttributionSet,
    AttributionSources,
    Check,
    Composition,
    Detect,
    Estimate,
    FitJacobian,
    HeadStats,
    HeadWeights,
    Identities,
    Lens,
    Load,
    Metric,
    Progress,
    Prompt,
    Run,
    Singular,
    Status,
    Study,
    Sweep,
    SweepResult,
    TuneLens,
    UserError,
    parse_intervention,
    read_prompt_set,
)
from model import SMALL, Model, read_tokenizer  # noqa: E402, F401
from sparse import Examples, Feature, FeatureGraph, Features, Preflight, TrainSae  # noqa: E402, F401
from wiring import Circuit, Compare, Discover, PathPatch, Score  # noqa: E402, F401


def screen(device: str, folder: Path) -> object:
    """The app on the zoo's model, its session and log in a folder."""
    from session import Session
    from tui import Loupe, first_state

    return Loupe(Session(first_state({"LOUPE_DEVICE": device}), folder / "session.jsonl"), log=folder / "engine.log")


def zoo_prompt() -> Prompt:
    from utils import ROOT

    return read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[0]
