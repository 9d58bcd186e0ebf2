"""Where panes stand: how many fit, and each one's region of the body."""

from textual.geometry import Region

from screen.pane import Pane


def count_that_fit(width: int, height: int, fixed: str) -> int:
    """One, two or three by the terminal's size, unless LOUPE_PANES says how many."""
    return int(fixed) if fixed in ("1", "2", "3") else 1 if width < 100 or height < 30 else 2 if width < 160 or height < 40 else 3


def regions(shown: list[Pane], width: int, height: int) -> dict[str, Region]:
    """One pane fills the body; two are stacked, each as high as it can use; a third that is narrow stands on the right."""
    right = [p for p in shown if not p.wide][-1:] or shown[2:] if len(shown) == 3 else []
    stack, left = [p for p in shown if p not in right], width - 78 if right else width
    first = height
    if len(stack) == 2:
        a, b = (p.height_needed() for p in stack)
        first = a if a + b <= height else height - b if b < height // 2 else min(a, height // 2)
    places = {stack[0].key: Region(0, 0, left, first)} | {p.key: Region(0, first, left, height - first) for p in stack[1:]}
    return places | {p.key: Region(left + 2, 0, width - left - 2, height) for p in right}
