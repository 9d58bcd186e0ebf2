"""`.env`, terminal colours, token display and formatting. Torch only inside `tec()`."""

import io
import unicodedata
from functools import lru_cache
from pathlib import Path

from dotenv import dotenv_values
from rich.cells import cell_len, set_cell_size

from vocabulary.typed import read_text, whole_number
from vocabulary.nodes import UserError

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
    texts = [read_text(f) for f, _ in files if f.is_file()]
    return {k: v or "" for text in texts for k, v in dotenv_values(stream=io.StringIO(text), interpolate=False).items()}


def setting_of_megabytes(name: str, default: int) -> int:
    """A setting that is a number of megabytes."""
    text = settings().get(name) or str(default)
    number = whole_number(text)
    if number is None or number < 0:
        raise UserError(f"{name} in .env (or .env.local) is {text!r}: write a number of megabytes")
    return number


# ------------------------------------------------------------------ tokens

VISIBLE = {"\n": "↵", "\t": "⇥", "\r": "␍", "\x1b": "␛", "\x7f": "␡"}
JAMO = (*range(0x1160, 0x1200), *range(0xD7B0, 0xD800))  # vowels and finals of Hangul, drawn into the syllable before
UNSURE = {*range(0x1F3FB, 0x1F400), *range(0x1F1E6, 0x1F200), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), 0x34F}  # terminals differ in their cells


class Glyphs(dict):
    """Code point -> what is drawn for it: itself, or a picture of what a terminal would obey, hide, reorder, or draw in other cells than are counted."""

    def __missing__(self, code: int) -> str:
        c, kind = chr(code), unicodedata.category(chr(code))
        if c in VISIBLE:
            out = VISIBLE[c]
        elif code < 32:
            out = chr(0x2400 + code)
        elif kind == "Zs" and c != " ":
            out = "⍽"
        elif c != " " and (not c.isprintable() or code in UNSURE or cell_len(c) == 0 and kind[0] != "M" and code not in JAMO):
            out = f"⟨{code:x}⟩"
        else:
            out = c
        self[code] = out
        return out


GLYPHS = Glyphs()


def printable(text: str) -> str:
    """
    Text as a terminal may have it: controls (C0, C1, DEL), bidi and other format characters, lone surrogates and what has no certain width are drawn as
    pictures or codes, so that no text is ever a command. All that is drawn or printed passes here (`strip_of`, the compositor, the command line's console).
    """
    if text.isascii() and text.isprintable():
        return text
    out = text.translate(GLYPHS)
    return f"⟨{ord(out[0]):x}⟩{out[1:]}" if out and cell_len(out[0]) == 0 else out  # a mark would join what stands before it


def visible(text: str) -> str:
    """As `printable`, with a leading space as `·`: how a token reads."""
    text = printable(text)
    return f"·{text[1:]}" if text.startswith(" ") else text


def width_of(text: str) -> int:
    """Cells that a text takes on the screen."""
    return cell_len(printable(text))


def fit(text: str, width: int) -> str:
    """A text cut or padded to `width` cells."""
    return set_cell_size(printable(text), width)


def shortened(text: str, width: int) -> str:
    """A text padded to `width` cells; one that is too long ends in …."""
    return fit(text, width) if width_of(text) <= width else fit(text, width - 1).rstrip() + "…" if width > 0 else ""


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


def model_name(model: str) -> str:
    """A model as it is shown: the last part of its folder or of its name on the hub."""
    return visible(Path(model).name or model)


def two_names(one: str, other: str) -> tuple[str, str]:
    """Two models as they are shown beside each other: with the folder above where their names are the same."""
    a, b = model_name(one), model_name(other)
    return (a, b) if a != b else tuple(visible("/".join(Path(x).parts[-2:])) for x in (one, other))


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
