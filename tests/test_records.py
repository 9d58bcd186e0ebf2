"""Training records: bars on a terminal, and --wandb with the key of .env.local, off by default."""

import io
import os
import sys
import types

import pytest

import engine as program
import techniques.training as training
from vocabulary.requests import Progress

FIT = ["tune-lens", "--steps", "3", "--batch", "2", "--length", "16"]
TRAIN = ["train-sae", "--features", "32", "--tokens", "1024", "--batch", "256", "--length", "16"]


class Fake(types.ModuleType):
    """wandb as far as it is used; keeps what it was told."""

    class Error(Exception):
        pass

    def __init__(self, fails: str = ""):
        super().__init__("wandb")
        self.fails, self.logged, self.summary, self.given, self.code = fails, [], {}, {}, None

    def Settings(self, **kw):
        return kw

    def init(self, **kw):
        if self.fails:
            raise self.Error(self.fails)
        self.given = kw
        return self

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self, exit_code):
        self.code = exit_code


@pytest.fixture
def shell(engines, monkeypatch, tmp_path):
    monkeypatch.setattr(program, "Engine", lambda: engines["zoo"])
    monkeypatch.setattr(training, "folder", lambda name: tmp_path / name)
    return program.main


def with_key(monkeypatch, fake: Fake, **more) -> None:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(training, "settings", lambda: {"WANDB_API_KEY": "secret", "WANDB_MODE": "offline"} | more)


@pytest.mark.parametrize("words, name", [(FIT, "kl"), (TRAIN, "loss")])
def test_a_training_is_recorded(shell, monkeypatch, tmp_path, words, name, capsys):
    fake = Fake()
    with_key(monkeypatch, fake)
    assert shell([*words, "--out", str(tmp_path / "made"), "--wandb"]) == 0
    assert fake.given["project"] == "loupe" and fake.given["settings"] == {"api_key": "secret", "mode": "offline"} and fake.code == 0
    assert fake.given["config"]["model"]["name"] == "zoo" and fake.given["config"]["training"]["out"].endswith("made")
    assert [step for step, _ in fake.logged] == list(range(1, len(fake.logged) + 1)) and all(set(v) == {name} for _, v in fake.logged)
    assert fake.summary["loss"] > 0 and "secret" not in "".join(capsys.readouterr())


def test_off_by_default_and_never_from_the_environment(shell, monkeypatch, tmp_path, capsys):
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setitem(os.environ, "WANDB_API_KEY", "of the environment")
    monkeypatch.setattr(training, "settings", dict)
    assert shell([*FIT, "--out", str(tmp_path / "made")]) == 0 and fake.given == {}
    assert shell([*FIT, "--out", str(tmp_path / "more"), "--wandb"]) == 2
    assert "needs WANDB_API_KEY in .env.local" in capsys.readouterr().err and not (tmp_path / "more").exists()


def test_a_run_that_can_not_begin_or_breaks(shell, monkeypatch, tmp_path, capsys):
    with_key(monkeypatch, Fake("no such key"))
    assert shell([*FIT, "--out", str(tmp_path / "made"), "--wandb"]) == 2
    assert "Weights & Biases can't be reached or refuses (no such key)" in capsys.readouterr().err
    fake = Fake()
    with_key(monkeypatch, fake)
    assert shell([*FIT[:1], "--steps", "0", "--out", str(tmp_path / "made"), "--wandb"]) == 2 and fake.code == 1


def test_bars():
    out = io.StringIO()
    bar = training.Bar(out)
    for part in (
        Progress(0, 0, "importing"),
        Progress(0, 3, "SAE: starting"),
        Progress(2, 3, "SAE: loss 1.5"),
        "a partial result",
        Progress(1, 2, "held out"),
        Progress(0, 0, "mind", True),
    ):
        bar(part)
    bar.close()
    text = out.getvalue()
    assert "importing" in text and "SAE" in text and "loss 1.5" in text and "held out" in text and "mind" in text and bar.bar is None
