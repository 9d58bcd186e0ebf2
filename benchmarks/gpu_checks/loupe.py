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
from screen.client import Client, EngineDied  # noqa: E402, F401
from techniques.attention.requests import Attention, AttentionSet, Detect, HeadStats  # noqa: E402, F401
from techniques.attribution.requests import Attribution, AttributionNeurons, AttributionSet, AttributionSources  # noqa: E402, F401
from techniques.circuits.requests import Compare, Discover, PathPatch, Score  # noqa: E402, F401
from techniques.features.requests import Examples, Feature, FeatureGraph, Features, Preflight, TrainSae  # noqa: E402, F401
from techniques.identities.requests import Identities  # noqa: E402, F401
from techniques.generation.requests import Generate, Sampling  # noqa: E402, F401
from techniques.lens.requests import FitJacobian, Lens, TuneLens  # noqa: E402, F401
from techniques.output.requests import Run  # noqa: E402, F401
from techniques.patching.requests import Certify, Estimate, Sweep, SweepResult  # noqa: E402, F401
from techniques.qk.requests import QK, QKCheck, QKSet  # noqa: E402, F401
from techniques.weights.requests import Composition, HeadWeights, Singular, WeightDifference  # noqa: E402, F401
from vocabulary.circuit import Circuit  # noqa: E402, F401
from vocabulary.nodes import parse_intervention, UserError  # noqa: E402, F401
from vocabulary.prompts import Metric, Prompt, read_prompt_set, Study  # noqa: E402, F401
from vocabulary.requests import Check, Load, Progress, Status  # noqa: E402, F401
from model.loading import SMALL, read_tokenizer  # noqa: E402, F401
from model.bridge import Model  # noqa: E402, F401
from model.checks import self_check  # noqa: E402, F401


def screen(device: str, folder: Path) -> object:
    """The app on the zoo's model, its session and log in a folder."""
    from screen.session import Session
    from tui import Loupe, first_state

    return Loupe(Session(first_state({"LOUPE_DEVICE": device}), folder / "session.jsonl"), log=folder / "engine.log")


def zoo_prompt() -> Prompt:
    from utils import ROOT

    return read_prompt_set(ROOT / "zoo" / "prompts" / "ioi_abba.jsonl")[0]
