"""Scattered jobs as a screen asks about them: start one, see how far it is, cancel it, go on, take its joined result. Never imports torch."""

import re

import numpy as np

from vocabulary.wire import message, request


@request(needs_model=False)
class StartShards:
    """
    Lay out a request over a prompt set in a folder and start its tasks. `frames`: the model (Load) and the request, as frames of the wire. `here`: so many processes
    on the engine's machine; 0: a job array by `sbatch`, with these options. `shard` 0: four shards a task. Answer: Shards.
    """

    frames: bytes
    folder: str
    tasks: int = 8
    here: int = 0
    sbatch: str = ""
    shard: int = 0


@request(needs_model=False)
class WatchShards:
    """How far the jobs of some folders are, as it was found last; asking makes a thread of the engine look again, so nothing waits. Answer: Watched."""

    folders: tuple[str, ...] = ()


@request(needs_model=False)
class CancelShards:
    """End the tasks of a folder; its parts stay. Answer: Shards."""

    folder: str = ""


@request(needs_model=False)
class GoOnShards:
    """Start what is missing of a folder again, in the way its job was started. Answer: Shards."""

    folder: str = ""


@request(needs_model=False)
class TakeShards:
    """What is joined so far of a folder; without its request where that of this stamp is `known`. Answer: Joined."""

    folder: str = ""
    known: int = 0


@message
class Shards:
    """
    How far one folder is: shards done of all, tasks in words, whether any runs or waits (`live`), and the time left. `asks` names the request in words, `model` its
    model, `prompts` its set's size. `joined`: which join of its parts is the last, 0 where there is nothing to take; `whole`: all are. `more`: a second pass, or what is missing,
    waits to be started. `error`: what went wrong last, in a line.
    """

    folder: str
    asks: str = ""
    model: str = ""
    prompts: int = 0
    done: int = 0
    total: int = 0
    tasks: str = ""
    live: bool = False
    left: str = ""
    joined: int = 0
    whole: bool = False
    more: bool = False
    error: str = ""


@message
class Watched:
    """Folders, in the order asked."""

    jobs: tuple[Shards, ...] = ()


@message
class Joined:
    """
    A joined result: `frames` (bytes) are the model that answered (ModelInfo) and the result, then the model as it was asked for (Load) and the request, unless these
    are known; `said` how much of the whole it is. `stamp`: when the request was written.
    """

    folder: str
    frames: np.ndarray
    stamp: int
    said: str
    whole: bool = False


def cut_along(request: object) -> str:
    """How much a request is over, in words."""
    if hasattr(request, "study"):
        return f"over {len(request.study.prompt_set)} prompts"
    return f"over {request.tokens} tokens of text" if hasattr(request, "part") else "as one task"


def named(request: object) -> str:
    """A request as it is named on the command line, with what tells it from others of its kind."""
    name = {"PathPatch": "path"}.get(type(request).__name__, re.sub("(?<=[a-z])(?=[A-Z])", "-", type(request).__name__.removesuffix("Set")).lower())
    some = [str(getattr(request, f)) for f in ("kind", "op", "method", "source") if isinstance(getattr(request, f, None), str)]
    more = [f"L{request.layer}H{request.head}"] if hasattr(request, "head") else some or [n for n in (getattr(request, "name", ""),) if n]
    return " ".join([name, *more, *getattr(request, "receivers", ())])
