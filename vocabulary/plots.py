"""
Pictures for papers and notebooks: tables of numbers drawn by plotly as one HTML file that needs nothing else, or as plain SVG. Never imports torch;
plotly is imported where it draws.
"""

import html
import math
from dataclasses import dataclass, fields, is_dataclass

import numpy as np

from utils import visible
from vocabulary.nodes import UserError

AXES = (("rows", "cols"), ("points", "positions"))  # fields that name the first two axes of a result's tables
LEFT_OUT = ("top_ids", "up_ids", "down_ids", "per_prompt", "seconds", "counts_by_prompt")
MOST = 12  # pictures of one result
PANELS = 64  # of one picture with a third axis


@dataclass(frozen=True)
class Picture:
    """Numbers [rows, columns] with names, as a map; of one row a line over the columns. NaN is blank. `signed`: colours go outward from zero; `text` stands in the cells."""

    title: str
    values: np.ndarray
    rows: tuple[str, ...]
    cols: tuple[str, ...]
    signed: bool = False
    text: tuple[tuple[str, ...], ...] = ()

    @property
    def line(self) -> bool:
        return len(self.rows) == 1 and not self.text


def unlike(names) -> tuple[str, ...]:
    """Names for an axis: plotly puts what has one name in one place, so those that stand there twice get their number."""
    names = [visible(str(n)).strip() for n in names]
    return tuple(f"{i} {n}".strip() if names.count(n) > 1 else n or str(i) for i, n in enumerate(names))


def picture(title: str, values: np.ndarray, rows, cols, signed: bool | None = None, text=()) -> Picture:
    values = np.asarray(values, dtype=float)
    some = values[np.isfinite(values)]
    signed = bool(some.size and some.min() < 0 < some.max()) if signed is None else signed
    return Picture(title, values, unlike(rows), unlike(cols), signed, tuple(tuple(visible(x).strip() for x in row) for row in text))


# ------------------------------------------------------------------ of a result


def axes(result: object) -> dict[int, list[tuple[str, ...]]]:
    """Names by length: those of rows and columns, and of the prompt's positions."""
    out: dict[int, list[tuple[str, ...]]] = {}
    tokens = getattr(result, "tokens", None)
    for names in (getattr(result, name, ()) for pair in AXES for name in pair):
        if names and not all(type(n) is int for n in names):
            out.setdefault(len(names), []).append(tuple(map(str, names)))
    if tokens is not None and len(getattr(tokens, "texts", ())):
        out.setdefault(len(tokens.texts), []).append(tuple(f"{i} {t}" for i, t in enumerate(tokens.texts)))
    return out


def pictures_of(result: object) -> list[Picture]:
    """Every table of floats in a result, the first MOST: [n] as a line, [rows, columns] as a map, of three axes a map for each of the first."""
    names, out = axes(result), []

    def named(n: int, letter: str) -> tuple[str, ...]:
        return names[n][0] if n in names else tuple(f"{letter}{i}" for i in range(n))

    def add(value: np.ndarray, name: str) -> None:
        if not np.isfinite(value).any():
            return
        heads = "heads" in name or "stats" in name or name in ("scores",) and value.ndim == 2
        match value.ndim:
            case 1 if value.size > 1:
                out.append(picture(name, value[None], [name], named(value.size, "")))
            case 2:
                pair = getattr(result, "rows", None), getattr(result, "cols", None)
                rows, cols = pair if pair[0] and pair[1] and (len(pair[0]), len(pair[1])) == value.shape else (named(len(value), ""), named(value.shape[1], ""))
                if heads and not pair[0]:
                    rows, cols = [f"L{n}" for n in range(len(value))], [f"H{n}" for n in range(value.shape[1])]
                out.append(picture(name, value, rows, cols))
            case 3 if len(value) <= PANELS:
                for n, part in enumerate(value):
                    if np.isfinite(part).any():
                        label = f"L{result.layer}H{n}" if hasattr(result, "layer") and name == "pattern" else f"{name} {n}"
                        out.append(picture(label, part, named(len(part), ""), named(part.shape[1], "")))

    def walk(value: object, name: str) -> None:
        if isinstance(value, np.ndarray):
            if value.dtype.kind == "f":
                add(value.astype(float), name)
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{name} {key}".strip())
        elif is_dataclass(value):
            for f in fields(value):
                if f.name not in LEFT_OUT:
                    walk(getattr(value, f.name), f"{name} {f.name}".strip())

    walk(result, "")
    return out[: max(MOST, sum(p.title.startswith("L") for p in out))]


# ------------------------------------------------------------------ drawing


def figure(p: Picture):
    """A picture by plotly express."""
    import plotly.express as px

    if p.line:
        return px.line(x=list(p.cols), y=p.values[0], title=p.title, markers=True, labels={"x": "", "y": ""})
    colours = {"color_continuous_scale": "RdBu", "color_continuous_midpoint": 0} if p.signed else {"color_continuous_scale": "Blues"}
    drawn = px.imshow(p.values, x=list(p.cols), y=list(p.rows), title=p.title, aspect="auto", **colours)
    return drawn.update_traces(text=[list(row) for row in p.text], texttemplate="%{text}") if p.text else drawn


def page(title: str, pictures: list[Picture], note: str = "") -> str:
    """An HTML page with the pictures and plotly itself: it opens without a network. UserError without a picture."""
    if not pictures:
        raise UserError(f"{title}: there is no table of numbers to draw here")
    parts = [figure(p).to_html(full_html=False, include_plotlyjs=n == 0) for n, p in enumerate(pictures)]
    head = f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{html.escape(title)}</title></head>\n<body style="font-family: sans-serif">\n'
    return f"{head}<h2>{html.escape(title)}</h2>\n<p>{html.escape(note)}</p>\n" + "\n".join(parts) + "\n</body></html>\n"


def code(p: Picture) -> str:
    """Python that draws the picture from its numbers (numpy as np, plotly.express as px)."""
    rows = ",\n".join("    [" + ", ".join("np.nan" if math.isnan(v) else f"{v:.6g}" for v in row) + "]" for row in p.values.tolist())
    text = f"values = np.array([\n{rows},\n])\nrows, cols = {list(p.rows)!r}, {list(p.cols)!r}\n"
    if p.line:
        return text + f"px.line(x=cols, y=values[0], title={p.title!r}, markers=True).show()\n"
    if not p.text:
        return text + show_map("values", p)
    shown = show_map("values", p).removesuffix(".show()\n")
    return f'{text}text = {[list(row) for row in p.text]!r}\n{shown}.update_traces(text=text, texttemplate="%{{text}}").show()\n'


def show_map(name: str, p: Picture) -> str:
    colours = 'color_continuous_scale="RdBu", color_continuous_midpoint=0' if p.signed else 'color_continuous_scale="Blues"'
    return f'px.imshow({name}, x=cols, y=rows, title={p.title!r}, aspect="auto", {colours}).show()\n'


# ------------------------------------------------------------------ SVG

CELL, GAP, FONT = (46, 22), 8, 11  # points


def colour(share: float, signed: bool) -> str:
    """Of -1 to 1 red to blue through white; of 0 to 1 white to blue."""
    ends = (103, 0, 31) if share < 0 else (5, 48, 97)
    r, g, b = (round(255 + (e - 255) * min(abs(share), 1)) for e in ends)
    return f"#{r:02x}{g:02x}{b:02x}"


def svg(p: Picture) -> str:
    """A map as SVG without anything from outside: cells with their numbers, names, a title; text stays text, in a generic font."""
    if p.line:
        return line_svg(p)
    width, height = CELL
    left = 12 + 7 * max(map(len, p.rows), default=0)
    tall = 14 + 7 * max((len(c) for c in p.cols), default=0) if max((len(c) for c in p.cols), default=0) > 6 else 20
    top, size = 30 + tall, np.nanmax(np.abs(p.values), initial=1e-12)
    low = 0.0 if p.signed else float(np.nanmin(p.values, initial=0))
    out = [text_at(12, 20, p.title, 14, bold=True)]
    for c, name in enumerate(p.cols):
        x = left + (c + 0.5) * width
        out.append(text_at(x, top - 8, name, FONT, "middle") if tall == 20 else text_at(x + 4, top - 8, name, FONT, turn=-90))
    for r, name in enumerate(p.rows):
        out.append(text_at(left - 6, top + (r + 0.7) * height, name, FONT, "end"))
        for c, v in enumerate(p.values[r].tolist()):
            if not math.isnan(v):
                share = v / size if p.signed else (v - low) / max(size - low, 1e-12)
                fill = colour(share, p.signed)
                x, y = left + c * width, top + r * height
                out.append(f'<rect x="{x:g}" y="{y:g}" width="{width}" height="{height}" fill="{fill}"/>')
                out.append(
                    text_at(
                        x + width / 2, y + height * 0.7, p.text[r][c][:8] if p.text else f"{v:.3g}", 9, "middle", fill="white" if abs(share) > 0.6 else "black"
                    )
                )
    return framed(out, max(left + len(p.cols) * width, 12 + 8 * len(p.title)) + 12, top + len(p.rows) * height + 12)


def line_svg(p: Picture) -> str:
    """A curve as SVG."""
    wide, high, left, top = max(360, 18 * len(p.cols)), 200, 60, 40
    y, found = p.values[0], np.isfinite(p.values[0])
    low, high_value = float(y[found].min()), float(y[found].max())
    x_at = lambda n: left + n * wide / max(1, len(y) - 1)  # noqa: E731
    y_at = lambda v: top + high * (1 - (v - low) / max(high_value - low, 1e-12))  # noqa: E731
    pieces = "".join("  " if math.isnan(v) else f"{x_at(n):.1f},{y_at(v):.1f} " for n, v in enumerate(y.tolist())).split("  ")  # none across a gap
    lines = [f'<polyline points="{piece.strip()}" fill="none" stroke="#053061" stroke-width="1.5"/>' for piece in pieces if piece.strip()]
    dots = [f'<circle cx="{x_at(n):.1f}" cy="{y_at(v):.1f}" r="2" fill="#053061"/>' for n, v in enumerate(y.tolist()) if not math.isnan(v)]
    out = [text_at(12, 20, p.title, 14, bold=True), *lines, *dots]
    out += [text_at(left - 6, y_at(v) + 4, f"{v:.4g}", FONT, "end") for v in (low, high_value)]
    step = -(-len(p.cols) * 12 // wide)
    out += [text_at(x_at(n) + 4, top + high + 10, name, FONT, "end", -90) for n, name in enumerate(p.cols) if n % step == 0]
    return framed(out, max(left + wide, 12 + 8 * len(p.title)) + 20, top + high + 24 + 7 * max(map(len, p.cols)))


def text_at(x: float, y: float, text: str, size: int, anchor: str = "start", turn: int = 0, bold: bool = False, fill: str = "black") -> str:
    turned = f' transform="rotate({turn} {x:g} {y:g})"' if turn else ""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}{turned}>{html.escape(text)}</text>'


def framed(parts: list[str], width: float, height: float) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" font-family="Helvetica, Arial, sans-serif">'
    return "\n".join([head, f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *parts, "</svg>"]) + "\n"
