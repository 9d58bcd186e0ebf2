"""
What another user of the machine can reach: `python tests/other_user.py BASE UID FILE…`, as root. With the rights of that user it tries to enter what root's
engine and screen wrote, then starts an engine of its own, and prints both as JSON.
"""

import json
import os
import sys
from pathlib import Path

from kept import Pretended  # whatever is imported must be before the rights go

from model import relay
from model.host import Host


def tried(what) -> str:
    try:
        return f"{what()!r:.60}"
    except Exception as error:
        return type(error).__name__


def fork(path: Path) -> None:
    """As `relay.start`, without a Python that may lie in a folder of root's."""
    ready, told = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        Host(Pretended(), str(path), str(told)).keep()
    os.close(told)
    assert os.read(ready, 1)


if __name__ == "__main__":
    base, uid, *files = sys.argv[1:]
    relay.BASE, relay.minutes, relay.start = Path(base), lambda: 1, fork
    theirs = relay.place()
    version = relay.version()
    relay.version = lambda: version
    os.setgroups([])
    os.setgid(int(uid))
    os.setuid(int(uid))
    said = {f: tried(lambda f=f: list(Path(f).iterdir()) if Path(f).is_dir() else Path(f).read_bytes()) for f in (str(theirs.parent), *files)}
    said["socket"] = tried(lambda: relay.call(theirs, "look"))
    line = relay.connect()
    said |= {"place": str(relay.place()), "pid": relay.killed(relay.place()), "squat": tried(lambda: (Path(base) / "loupe-54321").mkdir())}
    print(json.dumps(said))
