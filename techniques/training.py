"""What a training leaves behind while it runs: a bar on the terminal, and with --wandb a run of Weights & Biases. Both are imported where they are used."""

import dataclasses
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from utils import printable, settings
from vocabulary.files import folder, make_folder
from vocabulary.nodes import UserError
from vocabulary.requests import ModelInfo, Progress
from vocabulary.wire import to_json

PROJECT = "loupe"


@dataclass
class Recorded:
    """An option of commands that train."""

    wandb: bool = False
    """record the losses at Weights & Biases, with WANDB_API_KEY of .env.local (WANDB_PROJECT and WANDB_MODE are read there too)"""

    def request(self) -> object:
        if self.wandb and not settings().get("WANDB_API_KEY", "").strip():
            raise UserError("--wandb needs WANDB_API_KEY in .env.local (the system environment is not read); without --wandb nothing is recorded")
        return super().request()


class Bar:
    """Progress as a tqdm bar for each phase (the words before the colon), with what is said behind it."""

    def __init__(self, file: TextIO):
        self.file, self.bar, self.phase = file, None, None

    def __call__(self, part: object) -> None:
        from tqdm import tqdm

        if not isinstance(part, Progress):
            return
        words, _, rest = printable(part.text).partition(": ")
        if part.notice or part.total < 2:
            self.close()
            tqdm.write(printable(part.text), file=self.file)
            return
        if self.bar is None or (words, part.total) != self.phase:
            self.close(True)
            self.bar, self.phase = tqdm(total=part.total, desc=words, initial=part.done, file=self.file, leave=True), (words, part.total)
        self.bar.set_postfix_str(rest, refresh=False)
        self.bar.update(part.done - self.bar.n)

    def close(self, whole: bool = False) -> None:
        """`whole`: what the bar stands for is done, which its last step did not say."""
        if self.bar is not None:
            self.bar.update(self.bar.total - self.bar.n if whole else 0)
            self.bar.close()
        self.bar = None


class Run:
    """A run of Weights & Biases: the numbers of every step, then those of the result."""

    def __init__(self, request: object, info: ModelInfo):
        values = settings()
        try:
            import wandb
        except ImportError as error:
            raise UserError("--wandb needs the package wandb: `uv add wandb`, or leave it out") from error
        place = folder("logs")
        make_folder(place)
        config = {"model": {k: v for k, v in to_json(info).items() if k != "checks"}, "training": to_json(request)}
        how = wandb.Settings(api_key=values["WANDB_API_KEY"].strip(), mode=values.get("WANDB_MODE") or "online")
        name = f"{type(request).__name__} {info.name.rsplit('/', 1)[-1]}"
        try:
            self.run = wandb.init(project=values.get("WANDB_PROJECT") or PROJECT, name=name, config=config, dir=str(place), settings=how)
        except (wandb.Error, ValueError, OSError) as error:
            raise UserError(
                f"Weights & Biases can't be reached or refuses ({' '.join(str(error).split())[:200]}): WANDB_MODE=offline in .env.local keeps the run here"
            ) from error

    def step(self, part: object) -> None:
        if isinstance(part, Progress) and part.values:
            self.run.log(dict(part.values), step=part.done)

    def end(self, result: object) -> None:
        """What the result says, in the run's summary: numbers, and short curves by place."""
        for f in dataclasses.fields(result):
            value = getattr(result, f.name)
            if isinstance(value, float | int):
                self.run.summary[f.name] = value
            elif isinstance(value, np.ndarray) and value.ndim == 1 and len(value) <= 256 and f.name != "losses":
                self.run.summary.update({f"{f.name}/{n}": float(x) for n, x in enumerate(value)})
            elif f.name == "losses" and len(value):
                self.run.summary["loss"] = float(value[-1])


@contextmanager
def recorded(wandb: bool, request: object, info: ModelInfo) -> Generator[tuple[Callable[[object], None], Callable[[object], None]]]:
    """What is called with every part and with the result. The run is closed in any case, as failed after an error."""
    if not wandb:
        yield lambda part: None, lambda result: None
        return
    run, code = Run(request, info), 1
    try:
        yield run.step, run.end
        code = 0
    finally:
        run.run.finish(exit_code=code)
