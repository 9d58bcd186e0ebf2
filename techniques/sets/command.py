"""The command line of this room: set."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from techniques.sets.requests import MAKES, MakeSet, SetResult
from techniques.shell import CYAN, GRAY, PURPLE, YELLOW, options, plain, table
from utils import show_token
from vocabulary.files import write_text
from vocabulary.prompts import line_of, read_prompt_set
from vocabulary.typed import user_path


@dataclass
class SetCommand(options(MakeSet, hide=("prompts",), first=("make",))):
    """Make a prompt set from templates in words that are one token each in this model; or look which prompts of a set fit it, and why others don't."""

    out: Path | None = None
    """a .jsonl file for the prompts"""

    def request(self) -> MakeSet:
        request = super().request()
        return request if request.make in MAKES or not request.make.endswith(".jsonl") else replace(request, prompts=read_prompt_set(request.make))

    def finish(self, result: SetResult, engine, show: Callable[[object], None]) -> SetResult:
        if self.out:
            write_text(user_path(self.out), "".join(map(line_of, result.prompts)))
        return result


COMMANDS = {"set": SetCommand}


# ------------------------------------------------------------------ tables


def show_set(out: Console, r: SetResult) -> None:
    out.print(plain(r.summary, CYAN))
    for p in r.prompts[:3]:
        out.print(plain(f"{show_token(p.clean)} → {' '.join(map(show_token, p.answers[:3]))}{' …' * (len(p.answers) > 3)}", PURPLE))
        out.print(
            plain(f"{show_token(p.corrupt) if p.corrupt else 'no corrupted prompt'} | {' '.join(map(show_token, p.foils[:3]))}{' …' * (len(p.foils) > 3)}")
        )
    if r.left:
        rows = table(f"left out: {len(r.left)}", "prompt", "why")
        for i, reason in r.left:
            rows.add_row(plain(str(i + 1)), plain(reason, YELLOW))
        out.print(rows)
    out.print(plain(r.convention, GRAY))


SHOW = {SetResult: show_set}
