"""
The command line's common part: a request is its own command. `options(Request)` is the dataclass that tyro reads, made from the request's fields
(their types, defaults, and the text under each) with what its model and prompt need; a room's command.py adds switches of its own and the tables.
"""

import ast
import inspect
import json
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, make_dataclass, replace
from dataclasses import field as data_field
from pathlib import Path
from typing import Annotated, ClassVar

import tyro
from rich.console import Console, RenderHook
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

import techniques
from model import relay
from techniques.training import Bar, recorded
from utils import printable, settings
from vocabulary.chat import asked
from vocabulary.files import check_place, typed_path, write_text
from vocabulary.plots import page, pictures_of, svg
from vocabulary.typed import check_text
from vocabulary.nodes import UserError, parse_intervention
from vocabulary.prompts import Align, Base, Metric, MetricKind, Prompt, ReferenceText, Study, as_chat, read_place, read_prompt_set
from vocabulary.requests import Identity, Load, ModelInfo, Progress
from vocabulary.wire import to_json

GRAY, GREEN, CYAN, YELLOW, RED, PURPLE = (
    "rgb(127,127,127)",
    "rgb(0,255,0)",
    "rgb(0,255,255)",
    "rgb(255,255,0)",
    "rgb(255,0,0)",
    "rgb(255,0,255)",
)
Cells = tuple[tuple[int, int], ...]
Place = int | str | None
NAMES = {"pos": "at", "over_set": "mean"}  # options that are called otherwise than the request's field
ANSWERS, DO, METRIC = ("answer", "foil"), ("do", "base", "do_seed"), ("metric", "pos", "own")  # of a study; what analyses may have no use for


# ------------------------------------------------------------------ options


@dataclass
class ModelOptions:
    """What every command takes. Defaults for model, dtype and device come from .env."""

    model: str | None = None
    """zoo, a Hugging Face folder, or a hub name"""
    base_model: str | None = None
    """the architecture (and tokenizer), when the model is a folder of fine-tuned weights"""
    dtype: str | None = None
    """auto, float32, bfloat16, float16"""
    device: str | None = None
    """auto, cpu, cuda, cuda:1, mps"""
    device_map: str | None = None
    """auto spreads the model over the GPUs"""
    against: str = ""
    """a second model of the same shape: its run of the prompt is the corrupted run, and patches take its activations"""
    adapter_scale: float = Load.scale
    """of an adapter's change to its base, 0 to 1"""
    json: bool = False
    """print the result as JSON, and nothing else"""
    plot: Path | None = None
    """draw the result's tables into this file too: .html by plotly, which needs no network, or .svg (the first table)"""

    asks: ClassVar[tuple[type, ...]] = ()
    names: ClassVar[dict[str, str]] = NAMES
    unused: ClassVar[tuple[str, ...]] = ()
    interruptible: ClassVar[bool] = False  # Ctrl-C waits for the step it is at

    def load(self) -> Load:
        env = settings()
        ask = {"dtype": self.dtype or env.get("LOUPE_DTYPE"), "device": self.device or env.get("LOUPE_DEVICE")}
        name = self.model or env.get("LOUPE_MODEL") or "zoo"
        device_map = self.device_map or env.get("LOUPE_DEVICE_MAP") or None
        return Load(name, self.base_model, **{k: v for k, v in ask.items() if v}, device_map=device_map, against=self.against, scale=self.adapter_scale)

    def ask(self, kind: type, **given: object) -> object:
        """A request of this kind from the options of its fields' names, and what is given here."""
        hints = typing.get_type_hints(kind)
        for f in fields(kind):
            if f.name not in given and hints[f.name] is Study:
                given[f.name] = self.study()
            elif f.name not in given and hasattr(self, name := self.names.get(f.name, f.name)):
                given[f.name] = READ.get(hints[f.name], lambda value, name: value)(getattr(self, name), name)
        return kind(**given)

    def request(self) -> object:
        return self.ask(self.asks[0])

    def printed(self, info: ModelInfo) -> str | None:
        """What is printed without running anything; None: the request is run."""
        return None

    def finish(self, result: object, engine, show: Callable[[object], None]) -> object:
        """What is done with a result before it is shown."""
        return result

    def checked(self, result: object) -> tuple[Identity, ...]:
        """Identities that the exit code is about: 1 when one is broken."""
        return ()


@dataclass
class StudyOptions(ModelOptions):
    """What an analysis of a prompt takes."""

    clean: str = "When Mary and John went to the store, John gave a drink to"
    """the prompt"""
    corrupt: str | None = None
    """the corrupted prompt"""
    chat: bool = False
    """--clean and --corrupt are chats, which the model's chat template writes: what a user says, lines that begin with system: user: assistant:, or messages as JSON; the prompts of --set become what a user says"""
    system: str | None = None
    """the system's turn of both (and of the prompts of --set), as chats"""
    answer: tuple[str, ...] = ()
    """answer tokens, with their leading space"""
    foil: tuple[str, ...] = ()
    """foil tokens"""
    bos: bool | None = None
    """--bos or --no-bos: BOS in front or not, of --set too; unset, what each prompt says, else what the model's tokenizer does by itself"""
    set: Path | None = None
    """a .jsonl prompt set, for means; its first prompt is used when neither --answer nor --corrupt is given and --clean is left alone"""
    do: tuple[str, ...] = ()
    """interventions such as L9H9=zero "L3.mlp@-1=scale:0.5" L5.resid_pre@S2=patch"""
    base: Base = Study.base
    """which prompt the interventions act on"""
    do_seed: int = Study.seed
    """the seed of the interventions resample and noise"""
    align: Align = Study.align
    """how to patch across prompts of unequal length"""
    metric: MetricKind = Metric.kind
    pos: str = str(Metric.pos)
    """the metric's position: a number or a label"""
    own: str = ""
    """a metric of your own, FILE.py:NAME (or NAME of LOUPE_METRICS in .env): a function name(logits, tokens) -> value, whose file is run"""
    mean_text: str = ""
    """a text file for the means mean_text (over positions) and mean_text_pos (position by position)"""
    mean_tokens: int = ReferenceText.tokens
    """how many of its first tokens"""
    sae: tuple[str, ...] = ()
    """SAEs that nodes such as L2.sae.f12 speak of: folders, zoo/NAME, RELEASE:ID"""
    sae_error: bool = Study.sae_error
    """keep what the SAE does not explain when one of its features is changed"""

    def study(self) -> Study:
        prompts = read_prompt_set(self.set) if self.set else ()
        prompts = prompts if self.bos is None else tuple(replace(p, bos=self.bos) for p in prompts)
        chat = self.chat or self.system is not None
        if self.system is not None and any(isinstance(p.clean, tuple) for p in prompts):
            raise UserError("--system goes in front of plain texts, and the set has chats: give these a system message of their own")
        prompts = tuple(as_chat(p, True, self.system) for p in prompts) if chat else prompts
        clean, corrupt = (asked(text, self.system) if chat and text is not None else text for text in (self.clean, self.corrupt))
        prompt = Prompt(clean, corrupt, self.answer, self.foil, bos=self.bos)
        if prompts and self.clean == StudyOptions.clean and prompt == Prompt(clean, bos=self.bos):
            prompt = prompts[0]
        if self.metric == "own" and not self.own:
            raise UserError("--metric own needs --own FILE.py:NAME")
        metric = Metric("own" if self.own else self.metric, read_place(self.pos or str(Metric.pos)), self.own)
        done, text = tuple(parse_intervention(d) for d in self.do), ReferenceText(self.mean_text, self.mean_tokens)
        return Study(prompt, done, self.base, metric, prompts, self.sae, self.sae_error, self.align, self.do_seed, self.against, text)


def place_or_none(text: str, name: str = "") -> Place:
    """A position: a number, a label, or nothing."""
    return read_place(text) if text else None


def read_cells(some: tuple[str, ...], name: str = "") -> Cells:
    pairs = [re.fullmatch(r"([0-9]{1,9}),([0-9]{1,9})", c) for c in some]
    if not all(pairs):
        raise UserError(f"--{name} takes destination,source pairs of positions such as 14,2")
    return tuple((int(p[1]), int(p[2])) for p in pairs)


TYPED: dict[object, tuple[type, object]] = {Place: (str, ""), Cells: (tuple[str, ...], ())}  # how a field is typed, where tyro has no short form for it
READ: dict[object, Callable[[typing.Any, str], object]] = {Place: place_or_none, Cells: read_cells}


def helps(kind: type) -> dict[str, str]:
    """The text under each field of a dataclass and its bases."""
    texts = {}
    for cls in reversed(kind.__mro__):
        if "__dataclass_fields__" not in vars(cls):
            continue
        try:
            body = ast.parse(inspect.cleandoc("\n" + inspect.getsource(cls))).body[0].body
        except (OSError, TypeError):  # made by `options`, without source: its texts are in the types
            continue
        pairs = [(a, b) for a, b in zip(body, body[1:]) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr) and isinstance(b.value, ast.Constant)]
        texts |= {a.target.id: inspect.cleandoc(b.value.value) for a, b in pairs}
    return texts


def options(*kinds: type, hide=(), first=(), unused=(), names: dict[str, str] | None = None, **defaults: object) -> type:
    """
    A dataclass for tyro with the fields of these requests, but those in `hide`; of a name that several have, the first's. `first` are given without
    their name, `unused` are options of the study that make no difference (accepted, but not in the help), `names` call a field otherwise, `defaults` replace the request's.
    """
    names = NAMES | (names or {})
    made = {}
    studied = False
    for kind in kinds:
        hints, texts = typing.get_type_hints(kind), helps(kind)
        for f in fields(kind):
            studied |= hints[f.name] is Study
            name = names.get(f.name, f.name)
            if f.name in hide or name in made or hints[f.name] is Study:
                continue
            typed, empty = TYPED.get(hints[f.name], (hints[f.name], f.default))
            marks = (tyro.conf.Positional,) if f.name in first else ()
            assert f.default is not MISSING, f"{kind.__name__}.{f.name} needs a default to be an option"
            assert not hasattr(StudyOptions, name), f"{kind.__name__}.{f.name}: every command has a {name}; give it another name with names="
            made[name] = (name, Annotated[typed, tyro.conf.arg(help=texts.get(f.name, "")), *marks], data_field(default=defaults.get(name, empty)))
    out = make_dataclass(f"{kinds[0].__name__}Options", list(made.values()), bases=(StudyOptions if studied else ModelOptions,))
    out.asks, out.names, out.unused, out.__doc__ = kinds, names, unused, kinds[0].__doc__
    return out


def without_unused(kind: type) -> type:
    """A command as its help shows it."""
    hidden = [(f.name, Annotated[f.type, tyro.conf.Suppress], data_field(default=f.default)) for f in fields(kind) if f.name in kind.unused]
    return make_dataclass(kind.__name__, hidden, bases=(kind,), namespace={"__doc__": kind.__doc__})


# ------------------------------------------------------------------ tables


UNPRINTABLE = re.compile(r"[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]")  # that JSON does not escape


def escaped(m: re.Match) -> str:
    return f"\\u{ord(m[0]):04x}"


def plain(text: str, style: str = "") -> Text:
    """Text that is never read as markup."""
    return Text(printable(text), style)


class Printable(RenderHook):
    """What is printed on a console passes `printable`, whatever made it: no name in a file is a command to the terminal."""

    def process_renderables(self, renderables: list) -> list:
        return [self.Through(r) for r in renderables]

    @dataclass
    class Through:
        inner: object

        def __rich_console__(self, console: Console, options):
            for text, style, control in console.render(self.inner, options):
                yield Segment(text if control else "\n".join(map(printable, text.split("\n"))), style, control)


def console(**kw) -> Console:
    out = Console(highlight=False, markup=False, emoji=False, **kw)
    out.push_render_hook(Printable())
    return out


def put(text: str) -> None:
    """Text for standard output: as it is into a file, printable on a terminal."""
    sys.stdout.write("\n".join(map(printable, text.split("\n"))) if sys.stdout.isatty() else text)


def table(title: str, *columns: str) -> Table:
    out = Table(title=plain(title, PURPLE) if title else None, title_justify="left", box=None, pad_edge=False)
    for c in columns:
        out.add_column(plain(c, GRAY), no_wrap=True, overflow="fold")
    return out


# ------------------------------------------------------------------ running one


@dataclass
class ServeCommand:
    """Answer requests on stdin and stdout, for tui.py. With LOUPE_KEEP_ENGINE_MINUTES they go to the engine that stays."""


@dataclass
class StopCommand:
    """End the engines of this checkout that stayed (LOUPE_KEEP_ENGINE_MINUTES), with what they compute."""


def with_bos(args: list[str]) -> list[str]:
    """--bos and --no-bos with the value that tyro wants of an option that is also unset."""
    out = []
    for word, after in zip(args, [*args[1:], ""]):
        out += ["--bos", "False"] if word == "--no-bos" else [word, "True"] if word == "--bos" and after not in ("True", "False", "None") else [word]
    return out


def read_command(args: list[str]) -> ModelOptions | ServeCommand | StopCommand:
    """The command that these words call, of every room's."""
    args = with_bos(args)
    every = {name: kind for part in techniques.parts("command") for name, kind in part.COMMANDS.items()}
    if args and hasattr(every.get(args[0]), "of_words"):
        return every[args[0]].of_words(args[1:])
    if {"-h", "--help"} & {*args}:
        every = {name: without_unused(kind) for name, kind in every.items()}
    return tyro.extras.subcommand_cli_from_dict(
        every | {"serve": ServeCommand, "stop": StopCommand}, prog="engine.py", description="Loupe without a screen.", args=args
    )


def tables() -> dict[type, Callable[[Console, object], None]]:
    return {kind: show for part in techniques.parts("command") for kind, show in part.SHOW.items()}


def shower(errors: Console) -> Callable[[object], None]:
    """Prints progress: all of it on a terminal, elsewhere (a log of a batch job) a line every ten seconds; notices always."""
    last = time.monotonic()

    def show(part: object) -> None:
        nonlocal last
        if isinstance(part, Progress) and part.text and (part.notice or errors.is_terminal or time.monotonic() - last >= 10):
            errors.print(plain(part.text, YELLOW if part.notice else GRAY), soft_wrap=True)
            last = time.monotonic()

    return show


@contextmanager
def interruptible(show: Callable[[object], None], number: int = signal.SIGINT) -> Generator[Callable[[object], None]]:
    """Ctrl-C (or another signal) ends a fit after the step it is at, so that its checkpoint is whole; a second one ends it at once."""
    asked = []

    def note(*_) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    def between_steps(part: object) -> None:
        show(part)
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(number, note)
    try:
        yield between_steps
    finally:
        signal.signal(number, before)


def run(command: ModelOptions, engine, show: Callable[[object], None], errors: Console) -> tuple[ModelInfo, object]:
    """What is loaded, and the request's result, or the text of a command that runs nothing."""
    request = command.request()
    info = engine.run(command.load(), show)
    if info.warning:
        errors.print(plain(info.warning, YELLOW), soft_wrap=True)
    if info.beside:
        errors.print(plain(info.beside, GRAY), soft_wrap=True)
    text = command.printed(info)
    if text is not None:
        return info, text
    if command.interruptible:
        bar = Bar(sys.stderr) if errors.is_terminal else show
        with recorded(getattr(command, "wandb", False), request, info) as (step, end), interruptible(bar) as show_or_stop:
            try:
                result = engine.run(request, lambda part: (step(part), show_or_stop(part)))
                if isinstance(bar, Bar):
                    bar.close(True)
            finally:
                if isinstance(bar, Bar):
                    bar.close()
            end(result)
    else:
        result = engine.run(request, show)
    return info, command.finish(result, engine, show)


def main(args: list[str] | None, engine: Callable[[], object], serve: Callable[[], None]) -> int:
    """0, or 1 when an identity is broken (or who reads the output went away), or 2 for input that can't be used, or 130 after Ctrl-C."""
    try:
        return answer(args, engine, serve)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer goes nowhere, without a word
        return 1


def plots_to(path: Path | None) -> None:
    """UserError where a plot could not be written."""
    if path is None:
        return
    if path.suffix not in (".html", ".svg"):
        raise UserError(f"--plot {path}: name a file that ends in .html or .svg")
    check_place(typed_path(path))


def draw(plot: Path | None, result: object, info: ModelInfo, errors: Console) -> None:
    """The result's tables as a picture, where one is wanted."""
    if plot is None:
        return
    drawn = [] if isinstance(result, str) else pictures_of(result)
    name = f"{type(result).__name__.removesuffix('Result')} of {info.name}"
    if not drawn:
        raise UserError(f"{name}: it has no table of numbers to draw; leave --plot out")
    write_text(typed_path(plot), svg(drawn[0]) if plot.suffix == ".svg" else page(name, drawn, getattr(result, "convention", "")))
    errors.print(plain(f"drawn in {plot}", GRAY), soft_wrap=True)


def print_result(info: ModelInfo, result: object, as_json: bool, plot: Path | None, errors: Console, words: str = "") -> int:
    """A result as JSON, or as tables under a line about the model; and as a picture. 0."""
    plots_to(plot)
    draw(plot, result, info, errors)
    if as_json:
        put(UNPRINTABLE.sub(escaped, json.dumps(to_json(getattr(result, "listed", result)), ensure_ascii=False, allow_nan=False)) + "\n")
        return 0
    out = console()
    out.width = out.width if out.is_terminal else 10_000
    model = f"{info.architecture}, {info.n_layers} layers x {info.n_heads} heads, d_model {info.d_model}, {info.dtype} on {info.device}"
    if info.name:  # "": of several models
        out.print(plain(f"{info.name}: {'; '.join(filter(None, (model, words)))}", GRAY))
    tables()[type(result)](out, result)
    return 0


def answer(args: list[str] | None, engine: Callable[[], object], serve: Callable[[], None]) -> int:
    """What `main` does for one command line."""
    errors = console(stderr=True)
    show = shower(errors)
    try:
        args = sys.argv[1:] if args is None else args
        for number, word in enumerate(args, 1):
            check_text(word, f"word {number} of the command")
        command = read_command(args)
        if isinstance(command, ServeCommand):
            serve()
            return 0
        if hasattr(command, "alone"):
            return command.alone(engine(), show, errors)
        if isinstance(command, StopCommand):
            put("".join(f"{line}\n" for line in relay.stop() or ["no engine of this checkout stays"]))
            return 0
        plots_to(command.plot)
        info, result = run(command, engine(), show, errors)
        draw(command.plot, result, info, errors)
    except UserError as error:
        errors.print(plain(str(error), RED), soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        errors.print(plain("interrupted", YELLOW))
        return 130
    if isinstance(result, str):
        put(result)
        return 0
    words = ""
    if isinstance(command, StudyOptions):
        words = (
            "a chat, as its template writes it"
            if isinstance(command.study().prompt.clean, tuple)
            else info.bos_habit
            if command.bos is None
            else "BOS in front: asked for"
            if command.bos
            else "no BOS: asked for"
        )
    print_result(info, result, command.json, None, errors, words)
    rows = command.checked(result)
    broken = [i for i in (*info.checks, *rows) if i.ok is False]
    for i in dict.fromkeys(broken):
        errors.print(plain(f"identity broken: {i.name}, error {i.error:.2g} against {i.tolerance:.2g}. {i.note}", RED), soft_wrap=True)
    return 1 if broken and rows else 0
