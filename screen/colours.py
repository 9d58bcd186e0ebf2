"""Colours of the terminal: a theme for dark and for light backgrounds and one of 16 colours; the ramps of maps; the styles of text. No widgets, no app."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from rich.style import Style

from utils import settings


@dataclass(frozen=True)
class Theme:
    """
    Ramps of terminal colours, from what is like the background to what stands out most (a test holds their luminance monotone): one for sizes (after
    viridis), and two outward from zero, blue and orange, which the colour-blind tell apart. `text` are the colours of words by their role.
    """

    sizes: tuple[int, ...]
    below: tuple[int, ...]
    above: tuple[int, ...]
    cursor: int  # in no ramp: it means the cursor alone
    text: dict[str, int]


DARK = Theme(
    (236, 54, 55, 24, 25, 30, 36, 72, 77, 113, 149, 185, 221, 227),
    (236, 19, 20, 26, 32, 74, 117, 153),
    (236, 88, 94, 130, 166, 208, 214, 221),
    213,
    {"dim": 245, "head": 117, "good": 114, "warn": 221, "bad": 203, "changed": 215, "positive": 208, "negative": 74, "rule": 239},
)
LIGHT = Theme(
    (255, 187, 151, 115, 79, 73, 37, 31, 25, 19, 18, 17),
    (255, 153, 117, 74, 32, 26, 20, 18),
    (255, 223, 215, 208, 166, 130, 88, 52),
    201,
    {"dim": 242, "head": 25, "good": 28, "warn": 130, "bad": 160, "changed": 166, "positive": 166, "negative": 26, "rule": 250},
)
SIXTEEN = Theme(  # the terminal's own colours, which it may show as it likes; the numbers stay
    (0, 4, 6, 11, 15),
    (0, 4, 12, 14),
    (0, 1, 3, 11),
    13,
    {"dim": 7, "head": 14, "good": 10, "warn": 11, "bad": 9, "changed": 3, "positive": 3, "negative": 12, "rule": 8},
)
THEMES = {"dark": DARK, "light": LIGHT, "16": SIXTEEN}
SYSTEM_LUMINANCE = (0, 0.1, 0.13, 0.25, 0.05, 0.12, 0.2, 0.55, 0.2, 0.25, 0.5, 0.75, 0.3, 0.35, 0.65, 1)  # roughly, of the first 16


def luminance(code: int) -> float:
    """Relative luminance of a colour of xterm's 256, 0 to 1."""
    if code < 16:
        return SYSTEM_LUMINANCE[code]
    steps = (0, 95, 135, 175, 215, 255)
    rgb = (8 + 10 * (code - 232),) * 3 if code >= 232 else tuple(steps[(code - 16) // n % 6] for n in (36, 6, 1))
    lin = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * lin[0] + 0.7152 * lin[1] + 0.0722 * lin[2]


@lru_cache(512)
def on(code: int, text: bool = False) -> Style:
    """A cell's style: white or black on its colour. The terminal's own black costs fewer bytes, but may be grey; `text` is to be read and gets a real one."""
    return Style(color="bright_white" if luminance(code) < 0.18 else "color(16)", bgcolor=f"color({code})")


def chosen() -> Theme:
    """The theme of LOUPE_THEME in .env: dark, light or 16."""
    name = settings().get("LOUPE_THEME") or "dark"
    assert name in THEMES, f"LOUPE_THEME {name!r}: choose one of {', '.join(THEMES)}"
    return THEMES[name]


THEME = chosen()
RAMP, BELOW, ABOVE, SIGNED_RAMP = [], [], [], []  # terminal colours, filled by `use`


def use(theme: Theme) -> None:
    """Draw maps in the ramps of a theme: a terminal of 16 colours gets its own, whatever LOUPE_THEME says. Words are brought to its nearest colours anyway."""
    for ramp, codes in ((RAMP, theme.sizes), (BELOW, theme.below), (ABOVE, theme.above), (SIGNED_RAMP, (*reversed(theme.below), *theme.above))):
        ramp[:] = codes


use(THEME)


def word(role: str, **more: bool) -> Style:
    return Style(color=f"color({THEME.text[role]})", **more)


PLAIN = Style()
DIM, RULE = word("dim"), word("rule")
BOLD = Style(bold=True)
HEAD = word("head", bold=True)
GOOD, WARN, BAD, CHANGED = word("good"), word("warn"), word("bad", bold=True), word("changed")
POSITIVE, NEGATIVE = word("positive"), word("negative")  # as in the signed maps: orange is above zero, blue below
CURSOR = Style(color="color(16)", bgcolor=f"color({THEME.cursor})", bold=True)
CURSOR_PLAIN = Style(reverse=True, bold=True)
FOCUS = Style(color="color(16)" if THEME is not LIGHT else "color(231)", bgcolor=f"color({THEME.text['head']})", bold=True)


def heat_code(value: float, signed: bool) -> int:
    """The colour of a size of 0 to 1, or of a signed share of -1 to 1."""
    ramp = RAMP if not signed else ABOVE if value >= 0 else BELOW
    return ramp[min(int(abs(value) * len(ramp)), len(ramp) - 1)]


@lru_cache(4096)
def half_style(front: int | None, back: int | None) -> Style:
    """Of what shows two colours in one character, or one (None: the terminal's own)."""
    return Style(color=None if front is None else f"color({front})", bgcolor=None if back is None else f"color({back})")


def half_block(above: int | None, below: int | None) -> tuple[str, Style]:
    """Two cells above each other in one character."""
    if above is None and below is None:
        return " ", PLAIN
    return ("▀", half_style(above, below)) if above is not None else ("▄", half_style(below, None))


SHADES = " ░▒▓█"


def shade(value: float) -> str:
    """A size of 0 to 1 without colour; NaN is blank."""
    return " " if value != value else SHADES[min(int(value * len(SHADES)), len(SHADES) - 1)]


def bars(counts: Iterable[int]) -> str:
    """A distribution in one line; what is not zero is seen."""
    counts = list(counts)
    top = max(counts, default=0) or 1
    return "".join(" ▁▂▃▄▅▆▇█"[0 if not c else max(1, round(8 * c / top))] for c in counts)
