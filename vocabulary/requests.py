"""What is asked of a model itself: load one, check a prompt, memory, which there are. Never imports torch."""

from dataclasses import dataclass, field

from vocabulary.prompts import Align, Prompt, TokenRow
from vocabulary.sizes import Room
from vocabulary.wire import message, request


@request(needs_model=False)
class Load:
    """
    Load a model: `zoo`, a Hugging Face folder or a hub name; `base` names the architecture when `model` holds only fine-tuned weights, or an adapter's
    base. `against`: a second model of the same shape beside it, whose run of the prompt is the corrupted run. `scale`: of an adapter's change, 0 to 1.
    """

    model: str = "zoo"
    base: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    against: str = ""
    scale: float = 1.0


@request
class Check:
    """Tokenise a prompt, its answers and foils, align its positions (ALIGNMENTS), and say what stops an analysis."""

    prompt: Prompt
    align: Align = ""


@request(needs_model=False)
class Status:
    """Memory and what the activation cache holds."""


@request(needs_model=False)
class LoadForAll:
    """Load a model also where other screens look at the one that goes."""

    load: Load = Load()


@request(needs_model=False)
class Where:
    """Where the engine runs, who looks at its model, and what goes on in it. `name` is what others are told about who asks."""

    name: str = ""


@request(needs_model=False)
class Models:
    """
    The models that can be named: the zoo, folders beside the program, what the hub cache holds, TransformerLens's table; their sizes in `dtype` against what
    `device` has free. The names come first, as a partial result.
    """

    dtype: str = "auto"
    device: str = "auto"


# ------------------------------------------------------------------ results


@dataclass(frozen=True)
class Identity:
    """One self-check: the largest absolute error, the tolerance it was held against, and what was compared. `ok` None means not applicable."""

    name: str
    error: float
    tolerance: float
    ok: bool | None
    note: str = ""


@message
class ModelInfo:
    """
    What is loaded. `bos` is the text of the BOS token ("" when there is none) and `default_bos` whether prompts get it unasked (`bos_habit`: why). `warning`: a GPU that is
    here and not used, or filled by others. `repairs`: what Loupe puts right in TransformerLens on this model (model/live_hooks.py), and a script of
    TransformerLens alone lacks. `chat_template`: whether its tokenizer can write chats. `against`: the second model, `beside` what the two share,
    `names` both as they are shown; `scale` of an adapter (None: it is none) and its `base`; `beside_scale` where the second model is one; `weights`: a digest of some of them.
    """

    name: str
    architecture: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    n_ctx: int
    n_params: int
    dtype: str
    device: str
    positions: str
    norm: str
    parallel: bool
    softcap: float
    bos: str
    default_bos: bool
    seconds: float
    checks: tuple[Identity, ...] = ()
    warning: str = ""
    bos_habit: str = ""
    repairs: tuple[str, ...] = ()
    chat_template: bool = False
    against: str = ""
    beside: str = ""
    names: tuple[str, ...] = ()
    scale: float | None = None
    base: str = ""
    beside_scale: float | None = None
    weights: str = ""

    @property
    def key(self) -> str:
        """What replies are marked with that were computed on this model."""
        return f"{self.name}{self.scaled}, {self.dtype} on {self.device}" + f", against {self.against} × {self.beside_scale}" * bool(self.against)

    @property
    def identity(self) -> tuple:
        """What results that belong together have in common: all of the model but where it ran."""
        return self.name, self.weights, self.scaled, self.dtype, self.n_params, self.against, self.beside_scale, self.default_bos

    @property
    def scales(self) -> float | None:
        """The scale that can be changed: the first model's, else the second one's."""
        return self.beside_scale if self.scale is None else self.scale

    @property
    def scaled(self) -> str:
        """The scale of an adapter, in words."""
        return "" if self.scale is None else f" × {self.scale:g}"


@message
class CheckResult:
    """
    A prompt as the model reads it. `problems` stop an analysis; `hints` are advice such as a missing leading space. `alignment` holds the pairs
    (clean index, corrupted index) that patching goes across; empty when there is no corrupted prompt, or nothing says how to align unequal lengths.
    """

    clean: TokenRow
    corrupt: TokenRow | None
    answers: tuple[TokenRow, ...]
    foils: tuple[TokenRow, ...]
    problems: tuple[str, ...]
    hints: tuple[str, ...]
    alignment: tuple[tuple[int, int], ...] = ()


@message
class StatusResult:
    """Bytes: the process, the accelerator (0 without one), the activation cache and its limit; `entries` says what the cache holds."""

    memory: int
    device_memory: int
    device_total: int
    cache: int
    cache_limit: int
    entries: tuple[str, ...]


@message
class WhereResult:
    """
    `minutes`: how long the engine stays when the last screen went; 0: it ends with its screen. `screens` are the others that look, `running` what is computed
    for them, `left` the jobs, finished or not, of screens that went. `loaded`: the model as it was asked for.
    """

    host: str
    pid: int
    log: str
    socket: str
    memory: int
    minutes: float
    started: float
    loaded: Load | None = None
    screens: tuple[str, ...] = ()
    running: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@message
class News:
    """A line that comes unasked; `load`: the model that another screen loads, `stopped`: the engine ends."""

    text: str
    load: Load | None = None
    stopped: bool = False


@dataclass(frozen=True)
class ModelChoice:
    """
    A model that can be named: where it lies (embedded, folder, hub cache, hub), its other names, and what its config or TransformerLens's table says: 0 where
    neither is at hand. `at_least`: `n_params` counts only the matrices that the table gives. `need`: bytes of the weights in `dtype`.
    """

    name: str
    where: str
    note: str = ""
    aliases: tuple[str, ...] = ()
    n_layers: int = 0
    n_heads: int = 0
    n_params: int = 0
    at_least: bool = False
    dtype: str = ""
    need: int = 0


@message
class ModelsResult:
    """Models, and the room that one of them has."""

    choices: tuple[ModelChoice, ...]
    room: Room = Room()


@message
class Progress:
    """
    How far an analysis is. A `notice` is a line that the user should have read when it is over: it passes every analysis that words another's progress.
    `values` are a training's numbers after `done` steps, by name.
    """

    done: int
    total: int
    text: str = ""
    notice: bool = False
    values: dict[str, float] = field(default_factory=dict)


@message
class Failure:
    """An error as a result: one line for the screen; the full story is in the engine's log. `kind` is "user" or "internal"."""

    message: str
    kind: str = "internal"
