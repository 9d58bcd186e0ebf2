"""Where panes stand: how many fit, and each one's region of the body."""

from textual.geometry import Region

from screen.pane import Pane


def count_that_fit(width: int, height: int, fixed: str) -> int:
    """One, two or three by the terminal's size, unless LOUPE_PANES says how many."""
    return int(fixed) if fixed in ("1", "2", "3") else 1 if width < 100 or height < 30 else 2 if width < 160 or height < 40 else 3


def regions(shown: list[Pane], width: int, height: int) -> dict[str, Region]:
    """One pane fills the body; two are stacked, each as high as it needs; a third stands on the right, as wide as it can use."""
    right = [p for p in shown if not p.wide][-1:] or shown[2:] if len(shown) == 3 else []
    stack = [p for p in shown if p not in right]
    left = width - min(78, right[0].width_needed()) if right else width
    first = shared([(p.height_least(), p.height_needed()) for p in stack], height) if len(stack) == 2 else height
    places = {stack[0].key: Region(0, 0, left, first)} | {p.key: Region(0, first, left, height - first) for p in stack[1:]}
    return places | {p.key: Region(left, 0, width - left, height) for p in right}


def shared(needs: list[tuple[int, int]], height: int) -> int:
    """Lines of the upper of two panes, given the least and the most that each can use: the least first, then line by line in turn what is left."""
    (a, most_a), (b, most_b) = needs
    if most_a + most_b <= height:
        return most_a
    if a + b > height:
        return a if a < height // 2 else height - b if b < height // 2 else height // 2
    left, lack_a, lack_b = height - a - b, max(0, most_a - a), max(0, most_b - b)
    return a + (lack_a if lack_a <= left // 2 else left - lack_b if lack_b <= left // 2 else left // 2)
