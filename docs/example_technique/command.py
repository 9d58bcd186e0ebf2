"""The shell command: its options are the fields of the request, its table is the result's."""

from rich.console import Console

from techniques.shell import GRAY, options, plain, table
from utils import show_token

from .requests import Norms, NormsResult


def show_norms(out: Console, r: NormsResult) -> None:
    rows = table("", "point", *(show_token(text) for text in r.tokens.texts))
    for point, norms in zip(r.points, r.norms.tolist()):
        rows.add_row(point, *(f"{v:.2f}" for v in norms))
    out.print(rows)
    out.print(plain(r.convention, GRAY))


COMMANDS = {"norms": options(Norms)}
SHOW = {NormsResult: show_norms}
