"""The rooms, one a technique: requests.py (what is asked and answered), analysis.py (torch), pane.py (the screen), command.py (the shell)."""

import importlib
from importlib.util import find_spec
from types import ModuleType

from utils import settings
from vocabulary.typed import user_path
from vocabulary.nodes import UserError

ROOMS = (
    "output", "lens", "attention", "attribution", "patching", "weights", "circuits", "features", "generation", "qk", "graphs", "identities", "sets", "record", "cluster", "agents",
)  # fmt: skip


def rooms() -> tuple[str, ...]:
    """ROOMS, then the folders that LOUPE_TECHNIQUES in .env names (a colon between two)."""
    folders = [user_path(p).resolve() for p in settings().get("LOUPE_TECHNIQUES", "").split(":") if p.strip()]
    for folder in folders:
        if not (folder / "requests.py").is_file():
            raise UserError(f"LOUPE_TECHNIQUES in .env names {folder}, which has no requests.py: name the folder of a technique")
        if str(folder.parent) not in __path__:
            __path__.append(str(folder.parent))
    return (*ROOMS, *(folder.name for folder in folders))


def parts(name: str) -> list[ModuleType]:
    """The module of this name of every room that has one, in the order of the rooms."""
    paths = [f"{__name__}.{room}.{name}" for room in rooms()]
    return [importlib.import_module(path) for path in paths if find_spec(path)]
