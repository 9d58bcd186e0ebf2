"""
Scripts with #%% cells and notebooks: the metric and the pane on the screen with TransformerLens alone, a whole session with its notes, results and pictures.
Never imports torch.
"""

import re
from dataclasses import dataclass

import numpy as np

from utils import visible
from vocabulary import plots
from vocabulary.chat import as_typed
from vocabulary.nodes import Intervention, UserError, parse_node
from vocabulary.plots import Picture
from vocabulary.prompts import Prompt, TokenRow
from vocabulary.requests import ModelInfo
from vocabulary.script import METRIC, Shown, hook_lines, python_script

DRAWS = "import numpy as np\nimport plotly.express as px\n"
RUNS = {"now": ("base", "hooks"), "clean": ("clean", "[]"), "corrupt": ("corrupt", "[]")}
SWEPT = ("resid_pre", "resid_post", "attn", "mlp", "z", "q", "k", "v", "nodes", "z_pos")  # kinds of sweep that a script runs, a cell at a time


@dataclass(frozen=True)
class Cell:
    """A cell: code, or words (Markdown)."""

    text: str
    code: bool = True


# ------------------------------------------------------------------ as files


def as_script(cells: list[Cell]) -> str:
    """Python with #%% cells."""
    words = lambda text: "\n".join(f"# {line}".rstrip() for line in text.strip().split("\n"))  # noqa: E731
    return "\n\n".join(f"#%%\n{c.text.strip()}" if c.code else f"#%% [markdown]\n{words(c.text)}" for c in cells) + "\n"


def as_notebook(cells: list[Cell]) -> str:
    """A Jupyter notebook, without outputs."""
    import nbformat
    from nbformat import v4

    made = [(v4.new_code_cell if c.code else v4.new_markdown_cell)(c.text.strip("\n"), id=f"cell-{n}") for n, c in enumerate(cells)]
    book = v4.new_notebook(cells=made, metadata={"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}})
    nbformat.validate(book)
    return nbformat.writes(book) + "\n"


def quoted(text: str) -> str:
    """A text of the user's as a line of Markdown that means nothing but itself."""
    return re.sub(r"([\\`*_{}\[\]<>#$|~!])", r"\\\1", visible(text))


# ------------------------------------------------------------------ with TransformerLens


def parts(script: str) -> tuple[str, str, str, str]:
    """The parts of a script: loading the model, the prompt's values, the functions, the run."""
    load, rest = script.split("\nclean = t.tensor(", 1)
    values, rest = rest.split("\n\n\ndef run(ids", 1)
    tools, work = rest.split("ALL = slice(None)\n", 1)
    return load, f"clean = t.tensor({values}", f"def run(ids{tools}ALL = slice(None)", work


def metric_cells(shown: Shown, info: ModelInfo, run, loaded: bool = False) -> list[Cell]:
    """The metric of a run: cells that load the model (unless it is loaded), then the prompt, then the run, which prints it."""
    load, values, tools, work = parts(python_script(shown, info, run))
    first = [Cell(load), Cell(DRAWS + tools)] if not loaded else []
    return [*first, Cell(values), Cell(work)]


def pane_cells(shown: Shown, info: ModelInfo, run, request: object, result: object, pictures: list[Picture]) -> list[Cell]:
    """What a pane shows: computed by TransformerLens alone where the request is one that a script can do, and held against the screen; its pictures."""
    code = ""
    if not info.repairs:
        match type(request).__name__:
            case "Lens" if request.kind == "logit" and request.which in RUNS and info.softcap == 0 and all(".resid" in p for p in result.points):
                code = lens_code(request, result)
            case "Attention" if request.which in RUNS and not request.weighted and result.sink is None:
                code = attention_code(request, result)
            case "Sweep" if request.kind in SWEPT and request.op in ("patch", "zero") and request.effect == "total" and not request.over_set:
                code = sweep_code(shown, request, result, info)
    cells = [Cell(f"### {type(request).__name__}: by TransformerLens alone, held against the screen", False), Cell(code)] if code else []
    return cells + (embedded(request, pictures) if pictures else [])


def literal(values: np.ndarray) -> str:
    """Numbers as Python, NaN as np.nan."""
    return re.sub(r"\bnan\b", "np.nan", repr([[float(f"{v:.7g}") for v in row] for row in values.tolist()]))


HELD = 'print(f"largest difference to the screen: {np.nanmax(np.abs(%s - screen)):.1e}")\n'


def lens_code(request, result) -> str:
    """The answer's probability by the logit lens, else the entropy: points × positions."""
    ids, hooks = RUNS[request.which]
    answers = bool(np.isfinite(result.prob).any())
    names = [(p, "blocks.{}.hook_{}".format(p.split(".")[0][1:], p.split(".")[1])) for p in result.points]
    value = "logp.exp()[:, answers].sum(-1)" if answers else "-(logp.exp() * logp).sum(-1)"
    p = plots.picture(f"logit lens, {'probability of the answer' if answers else 'entropy, nats'}", result.prob, result.points, columns(result.tokens, result))
    return (
        f"# {p.title}\npoints = {names!r}\nrows, cols = {list(p.rows)!r}, {list(p.cols)!r}\n"
        f"kept = {{}}\nreading = [(name, lambda x, hook, name=name: kept.__setitem__(name, x.clone())) for _, name in points]\n"
        f"run({ids}, {hooks} + reading)\ntable = []\nfor point, name in points:\n"
        f"    logp = model.unembed(model.ln_final(kept[name]))[0].float().log_softmax(-1)\n    table.append(({value})[{list(result.positions)!r}].cpu().numpy())\n"
        f"table = np.array(table)\nscreen = np.array({literal(result.prob if answers else result.entropy)})\n"
        f"print(table.round(4))\n{HELD % 'table'}{plots.show_map('table', p)}"
    )


def columns(tokens: TokenRow, result) -> list[str]:
    places = getattr(result, "positions", ()) or range(len(tokens.texts))
    return [f"{i} {tokens.texts[i]}" for i in places]


def attention_code(request, result) -> str:
    """The attention patterns of a layer: heads × destinations × sources."""
    ids, hooks = RUNS[request.which]
    names = plots.unlike(f"{i} {t}" for i, t in enumerate(result.tokens.texts))
    flat = result.pattern.reshape(len(result.pattern), -1)
    return (
        f"# attention patterns of layer {result.layer}\nname = 'blocks.{result.layer}.attn.hook_pattern'\nkept = []\n"
        f"run({ids}, {hooks} + [(name, lambda x, hook: kept.append(x.clone()))])\npattern = kept[0][0].float().cpu().numpy()  # head, destination, source\n"
        f"screen = np.array({literal(flat)}).reshape(pattern.shape)  # NaN where a head can't look\n"
        f"print(pattern[:, -1].round(4))\n{HELD % 'pattern'}tokens = {list(names)!r}\n"
        f'px.imshow(pattern, x=tokens, y=tokens, facet_col=0, facet_col_wrap=4, title="attention patterns of layer {result.layer}", '
        f'color_continuous_scale="Blues", labels={{"x": "source", "y": "destination"}}).show()\n'
    )


def sweep_code(shown: Shown, request, result, info: ModelInfo) -> str:
    """A sweep, a whole run a cell: the metric under each, rows × columns. "" where a script would do something else."""
    addresses = [[result.address(r, c) for c in range(len(result.cols))] for r in range(len(result.rows))]
    flat = [a for row in addresses for a in row if a]
    if not flat or any(parse_node(a).site == "resid_mid" for a in flat):
        return ""
    spots = [[spot_of(a, result.tokens, info) if a else None for a in row] for row in addresses]
    runs = ("corrupt", "clean") if request.direction == "denoise" else ("clean", "corrupt")
    if request.op == "zero":
        runs = (shown.study.base, shown.study.base)
    kind, pos = shown.study.metric.kind, shown.study.metric.pos
    at = result.tokens.labels[pos] if isinstance(pos, str) else pos
    lines = ",\n".join("    [" + ", ".join("None" if s is None else f"({s[0]!r}, {s[1]})" for s in row) + "]" for row in spots)
    p = plots.picture(f"{request.kind}, {request.op}, {request.direction}: {kind}", result.values, result.rows, result.cols, False)
    if shown.study.interventions and runs[0] != shown.study.base:
        return ""  # they act on the other prompt here
    setup = f"clean_logp = run(clean)[{at}].log_softmax(-1)\n" if kind == "kl" else ""
    values = "source = value(name, other)" if request.op == "patch" else "source = None"
    make = "lambda x, s=source, spot=spot: s[spot]" if request.op == "patch" else "lambda x: 0"
    return (
        f"# {p.title}; (hook point, what is replaced there) of every cell\ncells = [\n{lines},\n]\nrows, cols = {list(p.rows)!r}, {list(p.cols)!r}\n"
        f"ids, other, pos = {runs[0]}, {runs[1]}, {at}\n{setup}table = np.full((len(rows), len(cols)), np.nan)\n"
        f"for r, line in enumerate(cells):\n    for c, (name, spot) in ((c, cell) for c, cell in enumerate(line) if cell):\n"
        f"        {values}\n        logits = run(ids, hooks + write(name, spot, {make}))\n        table[r, c] = float({METRIC[kind]})\n"
        f"screen = np.array({literal(result.values)})\nprint(table.round(4))\n{HELD % 'table'}{plots.show_map('table', p)}"
    )


def spot_of(address: str, row: TokenRow, info: ModelInfo) -> tuple[str, str]:
    """The hook point of a node and the place in its tensor, as a script writes them."""
    line = hook_lines(Intervention(parse_node(address), "zero"), row, info).split("hooks += write(", 1)[1]
    name, spot = re.match(r"'([^']+)', (\(.*\)), lambda x: 0\)", line).groups()
    return name, spot


def screen_cells(shown: Shown, info: ModelInfo, run, panes: list[tuple[object, object, list[Picture]]]) -> list[Cell]:
    """What is on the screen: the metric, then every pane's request, result and pictures. Where a script can't print the metric, a cell says why."""
    try:
        cells = metric_cells(shown, info, run)
    except UserError as error:
        cells = [Cell(f"The metric is not computed here: {quoted(str(error))}", False), Cell(DRAWS)]
        return cells + [c for request, _, drawn in panes for c in embedded(request, drawn)]
    for request, result, drawn in panes:
        cells += pane_cells(shown, info, run, request, result, drawn)
    return cells


def embedded(request: object, drawn: list[Picture]) -> list[Cell]:
    return [Cell(f"### The pane's maps ({type(request).__name__}): the numbers that Loupe computed", False), *(Cell(plots.code(p)) for p in drawn)]


# ------------------------------------------------------------------ a whole session


def prompt_words(prompt: Prompt) -> str:
    rows = [
        ("prompt", as_typed(prompt.clean)),
        ("corrupted", as_typed(prompt.corrupt or "")),
        ("answer", " ".join(prompt.answers)),
        ("foil", " ".join(prompt.foils)),
    ]
    return "\n".join(f"* {name}: {quoted(text)}" for name, text in rows if text)


def circuit_words(circuit) -> str:
    """A circuit's nodes and edges."""
    rows = [("nodes", circuit.nodes), ("edges", circuit.edges)]
    return f"**circuit {quoted(circuit.name)}**\n\n" + "\n".join(f"* {len(some)} {name}: {quoted(' '.join(some))}" for name, some in rows if some)


def session_cells(title: str, about: str, items: list[tuple]) -> list[Cell]:
    """
    A session as cells. Items in their order: ("note", args), ("circuit", circuit) and ("result", kept Result, the whole result or None, ModelInfo or None).
    A run's metric is computed with TransformerLens alone; other results are drawn from their numbers.
    """
    cells, loaded, prompt = [Cell(f"# {quoted(title)}\n\n{about}", False), Cell(DRAWS)], None, None
    for kind, *rest in items:
        if kind == "note":
            about = " · ".join(quoted(str(rest[0][k])) for k in ("node", "number", "prompt") if rest[0].get(k))
            cells.append(Cell(f"> **{quoted(str(rest[0].get('text', '')))}**\n>\n> {about}", False))
            continue
        if kind == "circuit":
            cells.append(Cell(circuit_words(rest[0]), False))
            continue
        kept, result, info = rest
        study = getattr(kept.request, "study", None)
        if study is not None and study.prompt != prompt:
            prompt = study.prompt
            cells.append(Cell(f"## Prompt\n\n{prompt_words(prompt)}", False))
        cells.append(Cell(f"### {quoted(kept.says)}\n\n{kept.kind} on {quoted(kept.on)}, {kept.time[:19]}", False))
        if result is None:
            cells.append(Cell("Its numbers are not at hand here: `engine.py replay` computes them again and writes a notebook that draws them.", False))
        elif kept.kind == "Run" and info is not None:
            try:
                cells += metric_cells(Shown(kept.load, study), info, result, loaded == info.key)
                loaded = info.key
            except UserError as error:
                cells.append(Cell(f"Not computed here: {quoted(str(error))}", False))
        else:
            if hasattr(result, "circuit"):
                cells.append(Cell(circuit_words(result.circuit), False))
            cells += [Cell(plots.code(p)) for p in plots.pictures_of(result)[:4]]
    return cells
