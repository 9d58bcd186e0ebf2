"""The command line of this room: check."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import tyro
from rich.console import Console

from techniques.identities import published
from techniques.identities.requests import Identities, IdentitiesResult
from techniques.shell import GRAY, GREEN, RED, options, plain, table
from utils import show_number
from vocabulary.requests import Identity, Load


@dataclass
class CheckCommand(options(Identities)):
    """The identities on a model, and of gpt2 the published figures; exits with 1 when one is off."""

    name: Annotated[str, tyro.conf.Positional] = ""
    """the model"""
    corrupt: str | None = "When Mary and John went to the store, Alice gave a drink to"

    def load(self) -> Load:
        return replace(super().load(), model=self.name) if self.name else super().load()

    def finish(self, result: IdentitiesResult, engine, show: Callable[[object], None]) -> IdentitiesResult:
        return replace(result, rows=result.rows + published.rows(engine, engine.model.info, show))

    def checked(self, result: IdentitiesResult) -> tuple[Identity, ...]:
        return result.rows


COMMANDS = {"check": CheckCommand}


# ------------------------------------------------------------------ tables


def show_identities(out: Console, r: IdentitiesResult) -> None:
    rows = table("identities", "", "identity", "error", "tolerance", "")
    for i in r.rows:
        mark, style = {True: ("ok", GREEN), False: ("BROKEN", RED), None: ("n/a", GRAY)}[i.ok]
        mark = "is" if i.ok is None and i.error == i.error else mark  # a figure, nothing that could be broken
        rows.add_row(plain(mark, style), plain(i.name), show_number(i.error, 7), show_number(i.tolerance, 7), plain(i.note, GRAY))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


SHOW = {IdentitiesResult: show_identities}
