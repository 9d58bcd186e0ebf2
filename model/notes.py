"""What was found out about a loaded model, and what else is kept for it: one place, which goes when the model goes."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Notes:
    """Empty when a model is loaded."""

    refused: dict[str, str] = field(default_factory=dict)  # by site or identity that the checks found wrong on this model, why; see Model.require
    trials: dict[object, str] = field(default_factory=dict)  # by shortcut, why it can't be taken on this model ("": it can)
    measured: dict[object, object] = field(
        default_factory=dict
    )  # numbers read by running a part: by norm its linear map, of the embeddings their factor (writes.py)
    calls: dict[tuple, dict[tuple, list]] = field(default_factory=dict)  # by prompt, what Hugging Face's model calls its blocks with
    slow: list[dict[object, Callable]] = field(default_factory=list)  # of every block, modules with one operation that can stand in for each
    saes: OrderedDict[str, object] = field(default_factory=OrderedDict)  # the last few that were loaded, by source
    translators: dict[tuple, object] = field(default_factory=dict)  # the last tuned or Jacobian lens that was read
    members: tuple | None = None  # the prompt set whose parts are computed, as it was read: the question, its prompts and their runs
    drawable: tuple | None = None  # the prompt set that was resampled from last, as it was read; see replacements.py
    estimate: tuple | None = None  # the last estimate: its question, values [prompt, cell], the base runs' metric [prompt]
    graph: object | None = None  # the last attribution graph, whole, with what it was asked for
    noise: dict[tuple, float] = field(default_factory=dict)  # by prompt and metric, the metric's variance over roundings; see noise.py
