"""Where files lie, how they are written, and a checkout that can't be written to."""

import errno
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_house import modules
from ui import make_app, press, shown

from tui import first_state
from utils import ROOT
from vocabulary import files
from vocabulary.circuit import Circuit
from vocabulary.files import replacing, short, typed_path, write_text
from vocabulary.nodes import UserError

HOME = files.home  # before the fixture own_home stands in for it

# ------------------------------------------------------------------ where


@pytest.mark.parametrize("wrong", ["", " ", "\t", "~no-such-user-here/x", "a\0b"])
def test_names_that_no_file_can_have(wrong):
    with pytest.raises(UserError):
        write_text(typed_path(wrong), "x")


def test_own_folders_lie_under_home(own_home, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    assert typed_path("exports/lens") == own_home / "exports" / "lens" and typed_path("saes/mine") == own_home / "saes" / "mine"
    assert typed_path("zoo/saes") == Path("zoo/saes") and typed_path("/exports/a") == Path("/exports/a") and typed_path("~/a") == Path.home() / "a"
    monkeypatch.chdir(tmp_path)
    assert typed_path("exports/lens") == Path("exports/lens"), "elsewhere a relative path is what it always is"
    assert short(ROOT / "exports" / "a") == "exports/a" and short(own_home / "a") == str(own_home / "a")


def test_home_is_asked_for_or_the_checkout_or_the_users(monkeypatch):
    monkeypatch.setattr(files, "settings", lambda: {"LOUPE_HOME": "~/hunts"})
    assert HOME() == Path.home() / "hunts"
    monkeypatch.setattr(files, "settings", lambda: {"LOUPE_HOME": "~no-such-user-here"})
    with pytest.raises(UserError, match="LOUPE_HOME"):
        HOME()
    user = pwd.getpwuid(os.getuid()).pw_name
    for text in ("/scratch/$USER/loupe", "/scratch/${USER}/loupe"):
        monkeypatch.setattr(files, "settings", lambda text=text: {"LOUPE_HOME": text})
        assert HOME() == Path(f"/scratch/{user}/loupe")
    monkeypatch.setattr(files, "settings", lambda: {"LOUPE_HOME": "$SCRATCH/loupe"})
    with pytest.raises(UserError, match=r"only ~ and \$USER are known there"):
        HOME()
    monkeypatch.setattr(files, "settings", dict)
    assert HOME() == ROOT
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert HOME() == Path.home() / ".local" / "share" / "loupe"


# ------------------------------------------------------------------ how


def write_lens(out: Path) -> None:
    import torch as t

    from techniques.lens.translators import Fitting

    Fitting.write(SimpleNamespace(out=out, weight=t.ones(1, 2, 2), bias=t.zeros(1, 2)), {"lens_type": "x"})


def write_sae(out: Path) -> None:
    from techniques.features import training

    def save_model(folder: str) -> list[str]:
        names = [str(Path(folder) / n) for n in ("sae_weights.safetensors", "cfg.json")]
        for name in names:
            with open(name, "w") as f:
                f.write("new")
        return names

    training.write(out, SimpleNamespace(save_model=save_model))


def write_tensors(out: Path) -> None:
    import torch as t

    from model.artefacts import save

    save(out, "t.safetensors", {"a": t.ones(3)})


def write_circuit(out: Path) -> None:
    from techniques.circuits.drawings import write_circuit

    write_circuit(Circuit("a", "zoo", ("L0H1",)), out / "circuit.json")


WRITERS = [write_lens, write_sae, write_tensors, write_circuit, lambda out: write_text(out / "export.tsv", "new\n")]


@pytest.mark.parametrize("writer", WRITERS)
def test_a_writer_that_fails_leaves_what_was_there(tmp_path, monkeypatch, writer):
    out = tmp_path / "out"
    files.make_folder(out)
    writer(out)
    there = {f.name: f.read_bytes() for f in out.iterdir()}
    assert there and all(stat.S_IMODE(f.stat().st_mode) == 0o600 for f in out.iterdir()) and stat.S_IMODE(out.stat().st_mode) == 0o700
    for name in there:
        (out / name).write_bytes(b"old")
    calls = 0
    for call in ("open", "mkdir", "fsync", "replace", "fchmod"):
        real = getattr(os, call)

        def fail(*args, call=call, real=real, **kw):
            nonlocal calls
            if call == "open" and not args[1] & os.O_CREAT:
                return real(*args, **kw)
            calls += 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as m:
            m.setattr(os, call, fail)
            try:
                writer(out)
            except UserError as error:
                assert "No space left" in str(error), error
                assert {f.name: f.read_bytes() for f in out.iterdir()} == dict.fromkeys(there, b"old"), call
            else:  # it does not make this call
                for name in there:
                    (out / name).write_bytes(b"old")
    assert calls >= 1
    writer(out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == there


def test_what_stands_at_the_place(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new" and stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    write_text(Path("/dev/null"), "new")
    assert not Path("/dev/null").is_file()
    for wrong in (tmp_path, tmp_path / "real" / "below", tmp_path / ("x" * 300), tmp_path / "surrogate"):
        with pytest.raises(UserError, match="can't be written"):
            write_text(wrong, "\ud800" if wrong.name == "surrogate" else "x")
    with pytest.raises(KeyError), replacing(tmp_path / "half") as part:
        part.write_text("half")
        raise KeyError
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "real"]


def test_what_takes_long_is_not_begun_where_it_could_not_be_written(engines, tmp_path, monkeypatch):
    import engine as program
    from techniques.lens.requests import FitJacobian, TuneLens

    zoo, asked = engines["zoo"], []
    (tmp_path / "file").write_text("")
    for request in (TuneLens(out=str(tmp_path / "file" / "lens"), steps=1), FitJacobian(out=str(tmp_path / "file" / "lens.pt"))):
        with pytest.raises(UserError, match="can't be written"):
            next(part for part in zoo.jobs(request) if part.total > 1)
    monkeypatch.setattr(program, "Engine", lambda: SimpleNamespace(run=lambda *args: asked.append(args)))
    assert program.main(["discover", "--method", "eap", "--out", str(tmp_path / "file" / "c.json")]) == 2 and not asked
    files.check_place(tmp_path / "new" / "c.json")
    assert [*(tmp_path / "new").iterdir()] == []


def test_a_fit_does_not_write_over_a_model(engines, tmp_path):
    from techniques.lens.requests import TuneLens

    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    for out, words in ((tmp_path, "holds something else"), ("", "empty"), ("  ", "empty")):
        with pytest.raises(UserError, match=words):
            engines["zoo"].run(TuneLens(out=str(out), steps=1))


def test_one_module_writes():
    """Files are made in vocabulary/files.py and vocabulary/log.py; elsewhere only into the `part` that `replacing` gives, or a temporary folder."""
    writes = re.compile(
        r"\.write_text\(|\.write_bytes\(|\bopen\([^)]*[\"'][wax]b?[\"']|\.mkdir\(|makedirs|np\.save|save_file\(|\.save\(|os\.replace|\.rename\(|json\.dump\("
    )
    allowed = re.compile(r"\bpart\b|os\.replace\(file, out / file\.name\)|(self|session)\.log\.save\(\)|^def |^from |^import ")
    found = [
        f"{name}: {line.strip()}"
        for name, path in modules().items()
        if name not in ("vocabulary.files", "vocabulary.log")
        for line in path.read_text(encoding="utf-8").splitlines()
        if writes.search(line) and not allowed.search(line)
    ]
    assert not found


# ------------------------------------------------------------------ nothing can be written


async def test_the_screen_lives_where_nothing_can_be_written(engines, tmp_path, own_home, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(files, "home", lambda: tmp_path / "file")
    app = make_app(engines["zoo"], tmp_path / "file", first_state({}))
    monkeypatch.setattr(app, "copy_to_clipboard", lambda text: None)
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "y", *"text", "enter")
        assert "nothing there was changed" in shown(app)
        await press(app, pilot, "d")
        assert "NOT SAVED" in shown(app) and app.state.base == "corrupt"
        await press(app, pilot, "5", "c", "Y", *"save", "enter")
        assert "nothing there was changed" in shown(app)
        await press(app, pilot, "u")
        assert app.is_running


CHILD = """
import asyncio, dataclasses, os, sys
sys.path[:0] = ["tests", "."]
from pathlib import Path
import engine, tui
from screen.session import Session, read_session
from ui import LocalClient, press, shown
from utils import ROOT
from vocabulary.files import home

assert not os.access(ROOT, os.W_OK) and home() == Path.home() / ".local" / "share" / "loupe", home()

async def main():
    state = tui.first_state({})
    app = tui.Loupe(Session(dataclasses.replace(state, prompt_set=state.prompt_set[:4])))
    log, app.client = app.client.log, LocalClient(engine.Engine("zoo"))
    assert log == home() / "logs" / "engine.log"
    app.copy_to_clipboard = lambda text: None
    async with app.run_test(size=(120, 36)) as pilot:
        await press(app, pilot)
        await press(app, pilot, "a", "y", *"text", "enter")
        assert "copied; also" in shown(app), shown(app)
        await press(app, pilot, "5", "U", *"eap-ig", "enter", "enter", "enter")
        assert app.state.current is not None, shown(app)
        await press(app, pilot, "Y", *"save", "enter")
        assert "written" in shown(app), shown(app)
    app.session.close()
    again, warning = read_session(app.session.path)
    assert not warning and again.state == app.state

asyncio.run(main())
print(*sorted(f"{oct(p.stat().st_mode)[-3:]}:{p.parent.relative_to(home())}" for p in home().rglob("*")))
"""


@pytest.mark.slow
def test_a_checkout_that_can_not_be_written_to(tmp_path):
    """A copy of it without write permission, used without root's right to write all the same."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "sessions", "exports", "logs", ".*_cache", ".hypothesis", "runs"))
    shutil.rmtree(copy / "saes", ignore_errors=True)
    for path in (*copy.rglob("*"), copy):
        path.chmod(0o555 if path.is_dir() else 0o444)
    plain = ["setpriv", "--inh-caps=-all", "--bounding-set=-all"] if os.geteuid() == 0 else []
    if plain and shutil.which("setpriv") is None:
        pytest.skip("root ignores permissions, and there is no setpriv")
    env = os.environ | {"HOME": str(tmp_path / "me"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*plain, sys.executable, "-B", "-c", CHILD], cwd=copy, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {*done.stdout.split()} == {"700:.", "700:exports", "600:exports", "600:exports/circuits", "600:sessions"}
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode | stat.S_IWUSR)
