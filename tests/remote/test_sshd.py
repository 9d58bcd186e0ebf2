"""`--via` through a real sshd on loopback, to an engine that stays there: a banner, a line that breaks, one that is silent. Skipped where sshd isn't there."""

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from remote.sshd import THERE, sshd
from test_far import LONG_ENOUGH, alive, run, until

from screen import line as lines
from screen.client import Client, EngineDied
from vocabulary.requests import Load

pytestmark = pytest.mark.skipif(not THERE, reason="no sshd: apt-get install openssh-server")


@pytest.fixture
def via(near):
    """What carries the engine: ssh, a module system that greets, and a `uv` that starts the pretended engine, which stays."""
    (near / "bin").mkdir()
    uv = near / "bin" / "uv"
    uv.write_text(f"#!/bin/sh\necho Loading module cuda/12.4\nexec {sys.executable} {Path(__file__).parents[1] / 'kept.py'} {near} {LONG_ENOUGH}\n")
    uv.chmod(0o700)
    with sshd(near) as words:
        yield f"{words} PATH={near}/bin:/usr/bin:/bin"
    for pid in map(int, (near / "started").read_text().split()):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


async def test_a_far_engine_outlives_the_line(via, near, monkeypatch):
    monkeypatch.setattr(Client, "kept", True)
    monkeypatch.setattr(lines, "EVERY", 0.1)
    monkeypatch.setattr(lines, "SILENT", 0.5)
    monkeypatch.setattr(lines, "STEPS", (0.5, 10))
    link, parts = Client(near / "log", via), []
    await link.start()
    await link.ask("load", Load("model "))
    await until(lambda: link.line.times)
    task = asyncio.create_task(link.ask("sweep", run(600), 1, parts.append))
    await until(lambda: len(parts) > 2)
    os.kill(link.process.pid, signal.SIGSTOP)  # the line is silent
    await until(lambda: link.line.words() == "line silent for 0.5 s")
    os.kill(link.process.pid, signal.SIGCONT)
    await until(lambda: not link.line.words())
    link.process.kill()  # and breaks
    with pytest.raises(EngineDied):
        await task
    heard = []
    link = Client(near / "log", via, on_news=heard.append)
    await link.start()
    await link.ask("load", Load("model "))
    assert (await link.ask("sweep", run(600))).choices[0].name == "600"
    assert len((near / "started").read_text().split()) == 1, "no second engine"
    await link.stop()
