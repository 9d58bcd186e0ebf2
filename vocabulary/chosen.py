"""
Whose code may run. A session names the file of a metric of one's own, and a session may come from somebody else: what its reader chose on this machine (`m`, --own,
LOUPE_METRICS) runs, nothing else does. So it is with the folder of a scattered job: its metric, and the options of sbatch that its job script gives.
"""

import hashlib
import json
from dataclasses import replace

from utils import settings
from vocabulary.files import folder, write_text
from vocabulary.prompts import Metric
from vocabulary.typed import read_text, user_path

FILE = "chosen_metrics.json"
known: dict[str, set[str]] = {}  # by the file of choices, read once


def key(chosen: Metric | str) -> str:
    return chosen if isinstance(chosen, str) else f"{chosen.own} {chosen.digest}"


def sbatch_key(options: str) -> str:
    """What options of sbatch are chosen by; "" where there is none to choose."""
    return f"sbatch {options.strip()}" if options.strip() else ""


def choices() -> set[str]:
    path = folder(FILE)
    if str(path) not in known:
        try:
            read = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            read = []
        known[str(path)] = {x for x in read if isinstance(x, str)} if isinstance(read, list) else set()
    return known[str(path)]


def choose(chosen: Metric | str) -> None:
    """Let a metric's code run, or a job script's options be used, also in what is opened later. UserError when that can't be written down."""
    if key(chosen) not in choices():
        choices().add(key(chosen))
        write_text(folder(FILE), json.dumps(sorted(choices()), indent=1) + "\n")


def is_chosen(chosen: Metric | str) -> bool:
    """Whether a metric runs no code, or code that the user chose; or these options of a job script were."""
    if isinstance(chosen, str):
        return not chosen or chosen in choices()
    file = chosen.own.rpartition(":")[0]
    return chosen.kind != "own" or key(chosen) in choices() or file in ("", settings().get("LOUPE_METRICS", "").strip())


def refusal(metric: Metric) -> str:
    return f"the metric {metric.words} is code that this session names: m chooses it and lets it run ({metric.own.rpartition(':')[0]})"


def pinned(metric: Metric) -> Metric:
    """A metric with the whole path and the digest of its file as it is now, where it names one that is here."""
    file, _, name = metric.own.rpartition(":")
    path = user_path(file).resolve()
    if metric.kind != "own" or not file or metric.digest or not path.is_file():
        return metric
    return replace(metric, own=f"{path}:{name}", digest=hashlib.sha256(read_text(path).encode()).hexdigest()[:8])
