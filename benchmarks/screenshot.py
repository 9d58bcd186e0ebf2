"""The README's picture: the third step of its tour at 120×36, keys pressed as a user would, saved as `screenshot.svg`. `uv run benchmarks/screenshot.py`."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from screen.session import Session
from tui import Loupe, first_state
from utils import ROOT, endc, green

KEYS = "2 slash L 1 H 0 enter a"


async def picture(keys: list[str], size: tuple[int, int], path: Path) -> None:
    folder = Path(tempfile.mkdtemp())
    app = Loupe(Session(first_state({}), folder / "session.jsonl"), log=folder / "engine.log")
    async with app.run_test(size=size) as pilot:
        await app.settle()
        for key in keys:
            await pilot.press(key)
            await pilot.pause()
            await app.settle()
        await pilot.pause()
        path.write_text(app.export_screenshot(title="uv run tui.py"), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", default=KEYS)
    parser.add_argument("--size", default="120x36")
    parser.add_argument("--out", type=Path, default=ROOT / "screenshot.svg")
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    asyncio.run(picture(args.keys.split(), (width, height), args.out))
    print(f"{green}wrote {args.out}{endc}")
