"""`.env`, terminal colours, token display and formatting. Torch only inside `tec()`."""

import unicodedata
from functools import lru_cache
from pathlib import Path

from dotenv import dotenv_values
from rich.cells import cell_len, set_cell_size

ROOT = Path(__file__).resolve().parent

purple = "\x1b[38;2;255;0;255m"
blue = "\x1b[38;2;0;0;255m"
cyan = "\x1b[38;2;0;255;255m"
yellow = "\x1b[38;2;255;255;0m"
green = "\x1b[38;2;0;255;0m"
red = "\x1b[38;2;255;0;0m"
gray = "\x1b[38;2;127;127;127m"
orange = "\x1b[38;2;255;165;0m"
bold = "\033[1m"
underline = "\033[4m"
endc = "\033[0m"


def tec() -> None:
    import torch as t

    if t.cuda.is_available():
        t.cuda.empty_cache()


def settings(root: Path = ROOT) -> dict[str, str]:
    """The values of `.env`, overridden by `.env.local`; read again when they changed. The system environment is never read."""
    files = [root / name for name in (".env", ".env.local")]
    return dict(read_settings(*((f, f.stat().st_mtime_ns if f.is_file() else 0) for f in files)))


@lru_cache(4)
def read_settings(*files: tuple[Path, int]) -> dict[str, str]:
    return {k: v or "" for f, _ in files for k, v in dotenv_values(f, interpolate=False).items()}


# ------------------------------------------------------------------ tokens

VISIBLE = {" ": "·", "\n": "⏎", "\t": "→", "\r": "␍", "\x1b": "␛", "\x7f": "␡"}


def visible(text: str) -> str:
    """The text with a leading space as `·` and controls, format characters and combining marks at the start made visible; never an escape sequence."""
    out = []
    for i, c in enumerate(text):
        kind = unicodedata.category(c)
        if c in VISIBLE and (c != " " or i == 0):
            out.append(VISIBLE[c])
        elif ord(c) < 32:
            out.append(chr(0x2400 + ord(c)))
        elif kind == "Zs" and c != " ":
            out.append("⍽")
        elif (not c.isprintable() and c != " ") or (kind in ("Mn", "Me", "Mc") and i == 0):
            out.append(f"⟨{ord(c):x}⟩")
        else:
            out.append(c)
    return "".join(out)


def show_token(text: str, width: int | None = None, fill: bool = True) -> str:
    """A token for the screen: visible first, then cut to `width` cells with … when it is too long; padded to the width unless `fill` is False."""
    text = visible(text) or "∅"
    if width is None:
        return text
    if cell_len(text) > width:
        text = set_cell_size(text, max(width - 1, 0)).rstrip(" ") + "…" if width > 1 else set_cell_size(text, width)
    return set_cell_size(text, width) if fill else text


# ------------------------------------------------------------------ numbers


def show_bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(n) < 1000 or unit == "GB":
            return f"{n:.0f} {unit}" if unit in ("B", "kB") or n >= 100 else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError


def show_count(n: int) -> str:
    return f"{n / 1e9:.1f}B" if n >= 1e9 else f"{n / 1e6:.1f}M" if n >= 1e6 else f"{n / 1e3:.0f}K" if n >= 1e3 else str(n)


def show_number(x: float | None, width: int = 6) -> str:
    """At most `width` cells, as many digits as fit: 12.345, -0.012, 1.2e-05; blank for None and NaN."""
    if x is None or x != x:
        return " " * width
    for digits in range(max(width - 2, 0), -1, -1):
        text = f"{x:.{digits}f}"
        if len(text) <= width and (digits <= 3 or abs(x) < 10):
            break
    if x != 0 and float(text) == 0:
        text = f"{x:.0e}"
    return text[:width].rjust(width) if len(text) <= width else f"{x:.0e}"[:width].rjust(width)
