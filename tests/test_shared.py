"""One engine, several screens and users: ctrl+e while another screen looks, an engine or a line that says nothing, and another user of the machine."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_far import Bench, alive, bench, minutes, until  # noqa: F401
from ui import LocalClient, make_app, press, shown

from model import relay
from screen import engines
from screen.session import Session, State
from vocabulary.files import open_log
from vocabulary.nodes import UserError
from vocabulary.requests import Load, Where, WhereResult
from vocabulary.wire import Frame


class Kept(LocalClient):
    """An engine that stays, at which another screen looks; or one that never says where it is."""

    def __init__(self, engine):
        super().__init__(engine)
        self.screens, self.dumb, self.sent, self.starts = ("node7 pts/3, process 12",), False, [], 0
        self.send = self.sent.append

    async def start(self):
        self.starts += 1
        self.kept = self.alive = True

    async def ask(self, slot, request, priority=1, on_partial=None):
        if not isinstance(request, Where):
            return await super().ask(slot, request, priority, on_partial)
        if self.dumb:
            await asyncio.Event().wait()
        return WhereResult("node7", 7, "log", "socket", 1, 60, 0.0, screens=self.screens)


async def test_a_restart_asks_where_others_look_or_nobody_answers(engines_of, tmp_path, monkeypatch):
    client = Kept(engines_of)
    app = make_app(client, tmp_path)
    monkeypatch.setattr(engines, "ANSWERS_IN", 0.01)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "ctrl+e")
        assert "restarting ends the engine for others too" in shown(app) and "node7 pts/3, process 12" in shown(app)
        await press(app, pilot, "escape")
        assert client.sent == [] and client.starts == 1
        await press(app, pilot, "ctrl+e")
        await press(app, pilot, "enter")
        assert [f.kind for f in client.sent] == ["stop"] and client.starts == 2
        client.dumb = True
        await press(app, pilot, "ctrl+e")
        assert "the engine does not answer" in shown(app) and "⏎: the engine goes on" in shown(app) and "⏎ connect again · x end it · esc wait" in shown(app)
        client.dumb = False
        await press(app, pilot, "enter")
        assert len(client.sent) == 1 and client.starts == 3, "no stop lies in a line that may come back"
        client.dumb = True
        await press(app, pilot, "ctrl+e")
        client.dumb, client.screens = False, ()
        await press(app, pilot, "x")
        assert len(client.sent) == 2 and client.starts == 4
        await press(app, pilot, "ctrl+e")
        assert len(client.sent) == 3 and client.starts == 5 and app.info is not None, "nobody else: at once"


@pytest.fixture
def engines_of(engines):
    return engines["zoo"]


@pytest.mark.table
async def test_ctrl_e_of_one_screen_is_told_to_the_other_and_both_find_one_engine(bench):  # noqa: F811
    a, b = await bench.client(), await bench.client()
    await asyncio.gather(*(link.ask("load", Load("model ")) for link in (a, b)))
    a.send(Frame("stop"))
    await asyncio.gather(a.reader, b.reader)
    assert b.stopped == "the engine was stopped by another screen" and not a.stopped
    await asyncio.gather(a.start(), b.start())
    await asyncio.gather(*(link.ask("load", Load("model ")) for link in (a, b)))
    first, second = bench.engines()
    assert not alive(first) and alive(second)
    assert len((await a.ask("engine", Where("a"))).screens) == 1


@pytest.mark.table
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
async def test_another_user_of_the_machine(near, minutes, monkeypatch):  # noqa: F811
    near.chmod(0o1777)
    mine = Bench(near, minutes, monkeypatch)
    link = await mine.client()
    await link.ask("load", Load("model "))
    own = near / "home"
    own.mkdir(0o755)  # a home that others may enter
    session = Session(State(), own / "sessions" / "one.jsonl")
    session.do("note", text="mine")
    os.close(open_log(own / "logs" / "engine.log"))
    files = [session.path, session.path.parent, own / "logs", own / "logs" / "engine.log"]
    words = [sys.executable, str(Path(__file__).with_name("other_user.py")), str(near), "65534", *map(str, files)]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, cwd=relay.ROOT)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    denied = [relay.own_folder(), *files, "socket"]
    assert {said[str(f)] for f in denied} == {"PermissionError"}, said
    assert said["place"].startswith(f"{near}/loupe-65534/") and said["pid"] not in mine.engines()
    assert (await link.ask("engine", Where("me"))).pid == mine.engines()[0], "this user's goes on"
    monkeypatch.setattr(os, "getuid", lambda: 54321)  # whose folder the other user has made
    with pytest.raises(UserError, match="not a folder of yours"):
        relay.own_folder()
    monkeypatch.undo()
    await mine.close()
