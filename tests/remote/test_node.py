"""
A compute node as they are: no network, a home that can't be written to, models in HF_HOME, a shared checkout that is read-only, a MIG name, and a shell that
prints 100 kB and noise on stdout before the engine's first word and goes on printing after it. The real engine, which stays. Needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import CLEAN, build
from test_far import alive

from screen.client import Client, EngineError
from techniques.output.requests import Run
from utils import ROOT
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Load, Where

TOOLS = (
    os.getuid() == 0 and shutil.which("unshare") and shutil.which("setpriv") and not subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode
)
pytestmark = [pytest.mark.skipif(not TOOLS, reason="needs root, unshare and setpriv"), pytest.mark.table]
NODE = """head -c 100000 /dev/zero | tr '\\0' 'x'
head -c 30000 /dev/urandom
(while sleep 0.02; do printf 'You have new mail in /var/mail\\377\\376'; done) &
noise=$!
cd {copy}
HOME={home} HF_HOME={hf} CUDA_VISIBLE_DEVICES=MIG-0a1b2c3d unshare -n setpriv --inh-caps=-all --bounding-set=-all {python} -B engine.py serve
kill $noise
"""


@pytest.fixture
def node(tmp_path):
    """The words of --via that lead there."""
    copy, home, snapshot = tmp_path / "checkout", tmp_path / "home", tmp_path / "hf" / "hub" / "models--someone--tiny" / "snapshots" / "abc123"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "sessions", "exports", "logs", ".*_cache", ".hypothesis", "runs", ".env.local"),
    )
    (tmp_path / "scratch").mkdir()
    (copy / ".env.local").write_text(f"LOUPE_HOME={tmp_path}/scratch/$USER\nLOUPE_KEEP_ENGINE_MINUTES=1\n")
    home.mkdir()
    snapshot.mkdir(parents=True)
    build("gpt2", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc123")
    for folder in (copy, home, tmp_path / "hf"):
        subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    (tmp_path / "node.sh").write_text(NODE.format(copy=copy, home=home, hf=tmp_path / "hf", python=sys.executable))
    yield f"sh {tmp_path / 'node.sh'}"
    subprocess.run(["chmod", "-R", "u+w", tmp_path], check=True)


async def test_a_node_as_they_are(node, tmp_path, monkeypatch):
    monkeypatch.setattr(Client, "kept", True)
    deaths = []
    link = Client(tmp_path / "log", node, on_death=deaths.append)
    await link.start()
    info = await link.ask("load", Load("someone/tiny"))
    assert info.device == "cpu" and not info.warning, "no GPU is there: nothing is said of one"
    first = await link.ask("run", Run(Study(Prompt(CLEAN))))
    with pytest.raises(EngineError, match="someone/other is not in the hub cache and there is no network"):
        await link.ask("load", Load("someone/other"))
    where = await link.ask("engine", Where("me"))
    try:
        assert Path(where.log).is_relative_to(tmp_path / "scratch" / "root") and Path(where.log).is_file() and where.minutes == 1
        os.killpg(link.process.pid, signal.SIGKILL)  # the line breaks
        await link.reader
        again = Client(tmp_path / "log", node)
        await again.start()
        assert (await again.ask("load", Load("someone/tiny"))).name == info.name
        assert (await again.ask("run", Run(Study(Prompt(CLEAN))))).clean.top_ids.tolist() == first.clean.top_ids.tolist()
        assert (await again.ask("engine", Where("me"))).pid == where.pid
        assert len(deaths) == 1 and deaths[0].startswith("killed by SIGKILL"), "and perhaps what was said last, which is the noise"
        await again.stop()
    finally:
        if alive(where.pid):
            os.kill(where.pid, signal.SIGKILL)
