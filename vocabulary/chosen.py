"""
Whose code may run. A session names the file of a metric of one's own, and a session may come from somebody else: what its reader chose on this machine (`m`, --own,
LOUPE_METRICS) runs, nothing else does.
"""

import json

from utils import settings
from vocabulary.files import folder, write_text
from vocabulary.prompts import Metric

FILE = "chosen_metrics.json"
known: dict[str, set[str]] = {}  # by the file of choices, read once


def key(metric: Metric) -> str:
    return f"{metric.own} {metric.digest}"


def choices() -> set[str]:
    path = folder(FILE)
    if str(path) not in known:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            read = []
        known[str(path)] = {x for x in read if isinstance(x, str)} if isinstance(read, list) else set()
    return known[str(path)]


def choose(metric: Metric) -> None:
    """Let a metric's code run, also in sessions that are opened later. UserError when that can't be written down."""
    if key(metric) not in choices():
        choices().add(key(metric))
        write_text(folder(FILE), json.dumps(sorted(choices()), indent=1) + "\n")


def is_chosen(metric: Metric) -> bool:
    """Whether a metric runs no code, or code that the user chose."""
    file = metric.own.rpartition(":")[0]
    return metric.kind != "own" or key(metric) in choices() or file in ("", settings().get("LOUPE_METRICS", "").strip())


def refusal(metric: Metric) -> str:
    return f"the metric {metric.words} is code that this session names: m chooses it and lets it run ({metric.own.rpartition(':')[0]})"
