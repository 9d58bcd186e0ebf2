"""
The README's pictures at 120×36, keys pressed as a user would: a hunt, a sweep, a circuit, as SVG in docs/pictures/. `uv run benchmarks/screenshot.py`
makes them on the embedded model; `--sweep-model FOLDER` takes the sweep on another (the one in the README is HuggingFaceTB/SmolLM2-135M).
"""

import argparse
import asyncio
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vocabulary.requests import Load
from screen.session import Session
from tui import Loupe, first_state
from utils import ROOT, endc, green

PICTURES = ROOT / "docs" / "pictures"


@dataclass(frozen=True)
class Moment:
    """What is pressed, one key a word, and the title of the window."""

    keys: str
    title: str = "uv run tui.py"


MOMENTS = {
    "hunt": Moment("2 slash L 1 H 0 enter a"),
    "sweep": Moment("4 S H enter plus"),
    "circuit": Moment("5 U e a p - i g enter enter enter S slash L 3 H 2 enter"),
}


async def picture(moment: Moment, size: tuple[int, int], path: Path, model: str) -> None:
    folder = Path(tempfile.mkdtemp())
    state = first_state({})
    app = Loupe(Session(replace(state, model=Load(model)), folder / "session.jsonl"), log=folder / "engine.log")
    async with app.run_test(size=size) as pilot:
        await app.settle()
        for key in moment.keys.split():
            await pilot.press(key)
            await pilot.pause()
            await app.settle()
        await pilot.pause()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(app.export_screenshot(title=moment.title), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=list(MOMENTS), default=None)
    parser.add_argument("--size", default="120x36")
    parser.add_argument("--sweep-model", default="zoo")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    for name, moment in MOMENTS.items():
        if args.only in (None, name):
            model = args.sweep_model if name == "sweep" else "zoo"
            moment = replace(moment, title=f"uv run tui.py --model {Path(model).name}") if model != "zoo" else moment
            asyncio.run(picture(moment, (width, height), PICTURES / f"{name}.svg", model))
            print(f"{green}wrote {PICTURES / f'{name}.svg'}{endc}")
