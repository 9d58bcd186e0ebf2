"""The one wrapper around TransformerBridge: hook points, forward passes and traces, the unembedding. Raw Hugging Face weights."""

import copy
import math
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from functools import cached_property
from pathlib import Path

import torch as t
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from model import adapters  # noqa: F401  registers the corrected ones
from model.cache import Cache
from model.live_hooks import live_points, put_right
from model.notes import Notes
from model.peft_adapters import Adapter
from model.memory import is_out_of_memory, out_of_memory, ran_out
from model.native import HandTrained, Labels, LabelTokens, bridge_of
from model.tokens import Tokens, bos_habit
from vocabulary.chat import Chat
from vocabulary.names import OWN_SOFTMAX
from vocabulary.nodes import PARTS, RESIDS, UserError
from vocabulary.prompts import Prompt, TokenRow
from vocabulary.requests import CheckResult, Identity, Load, ModelInfo

FINAL = "ln_final.hook_out"
LEVEL = 7001
TOLERANCE = {t.float32: 1e-4, t.bfloat16: 5e-2, t.float16: 5e-3}
STRETCH = 1024
POSITIONS = {"standard": "learned"}
Edit = tuple[str, Callable[[Tensor], Tensor | None]]
HOOKS = {  # of a layer's sites, the hook point in its block
    **{site: f"hook_{site}" for site in RESIDS},
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "neuron": "mlp.hook_post",
    **{part: f"attn.hook_{part}" for part in PARTS},
}
SITE_OF = {hook: site for site, hook in HOOKS.items()}


def site_of(name: str) -> str:
    """The site that a hook point of a block is; "" for any other."""
    block = re.fullmatch(r"blocks\.\d+\.(.+)", name)
    return SITE_OF.get(block[1], "") if block else ""


def neurons(block: t.nn.Module) -> int:
    """How many neurons a block's MLP has: the rows of its one output matrix; 0 where it has none such (a mixture of experts)."""
    try:
        return block.mlp.W_out.shape[0]
    except AttributeError:
        return 0


class Passed(Exception):
    """All that was asked for has been passed: the rest of the forward pass is not needed."""


def stop(x: Tensor) -> None:
    """A function on a hook point that ends the pass there."""
    raise Passed


class Keep:
    """A function on a hook point that remembers what leaves it: it comes after all others there."""

    x: Tensor

    def __call__(self, x: Tensor) -> None:
        self.x = x


@contextmanager
def entered(blocks: list[t.nn.Module], layer: int, x: Tensor) -> Generator:
    """A forward pass meanwhile enters at block `layer` with the stream x: what the blocks before it hand on is not looked at."""
    inner = blocks[layer].forward

    def enter(*args, **kwargs):
        return inner(x, *args[1:], **kwargs) if args else inner(**kwargs | {"hidden_states": x})

    try:
        for block in blocks[:layer]:
            block.__dict__["forward"] = lambda *_, **__: x
        blocks[layer].__dict__["forward"] = enter
        yield
    finally:
        for block in blocks[: layer + 1]:
            block.__dict__.pop("forward", None)


def wrapped(hf: t.nn.Module, tokenizer, base: Path, dtype: t.dtype) -> TransformerBridge:
    """The Bridge around Hugging Face's modules, where their weights are."""
    theirs = copy.deepcopy(tokenizer)
    theirs.init_kwargs["add_bos_token"] = True  # else the Bridge fetches the tokenizer a second time, from the hub if it likes
    where = hf.get_input_embeddings().weight.device  # else the Bridge takes the accelerator, wherever the weights are
    return TransformerBridge.boot_transformers(str(base), hf_model=hf, tokenizer=theirs, dtype=dtype, device=where).eval()


class Model:
    """
    A loaded model. `points` maps hook names (TransformerLens's) to hook points, resolved once; an unknown name is an error.
    Nothing outside this class adds a hook or runs the model.
    """

    def __init__(self, ask: Load, hf: t.nn.Module, tokenizer, folder: Path, base: Path, dtype: t.dtype, cache_mb: int):
        self.folder, self.base, self.dtype, self.tokenizer = folder, base, dtype, tokenizer
        self.device_map = ask.device_map or None
        self.bridge = bridge_of(hf, dtype) if isinstance(hf, HandTrained) else wrapped(hf, tokenizer, base, dtype)
        for p in self.bridge.original_model.parameters():
            p.requires_grad_(False)
        cfg = self.cfg = self.bridge.cfg
        self.repairs = put_right(self.bridge, dtype)
        self.points = live_points(self.bridge, dtype)
        self.unique = list({id(p): p for p in self.points.values()}.values())
        self.parallel = bool(cfg.parallel_attn_mlp) or "blocks.0.hook_resid_mid" not in self.points
        self.rescaled = any(hasattr(b, "residual_contribution_scale") for b in getattr(self.bridge, "blocks", ()))
        self.softcap = max(float(getattr(cfg, "output_logits_soft_cap", None) or 0), 0.0)
        text_config = hf.config.get_text_config()
        self.logit_scale = (getattr(text_config, "logit_scale", None) or 1) / (getattr(text_config, "logits_scaling", None) or 1)
        self.causal = not getattr(text_config, "bidirectional", False)
        self.widths = [neurons(block) for block in getattr(self.bridge, "blocks", ())]
        self.cache, self.notes = Cache(cache_mb << 20), Notes()
        self.pair: tuple[Model, Model] | None = None  # with a second model: the first and the second (beside.py)
        self.adapter: Adapter | None = None  # whose change is in the weights
        self.bos, self.n_embed = tokenizer.bos_token_id, hf.get_input_embeddings().weight.shape[0]
        self.info = described(self, ask.model, hf)
        self.tokens = (LabelTokens if isinstance(tokenizer, Labels) else Tokens)(tokenizer, self.info, self.n_embed)
        self.notes.refused |= self.tokens.refused

    @property
    def device(self) -> t.device:
        return t.device(self.bridge.cfg.device)

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.bridge.original_model.parameters())

    # ---------------------------------------------------------------- running

    @contextmanager
    def hooks(self, fns: Iterable[Edit]) -> Generator:
        """Functions on hook points, in order; None leaves the value. Gone afterwards, whatever happens."""
        self.require("model")
        added = []
        try:
            for name, fn in sorted(fns, key=lambda e: isinstance(e[1], Keep)):
                point = self.point(name)
                point.add_hook(lambda x, hook, fn=fn: fn(x), level=LEVEL)
                if self.rescaled and t.is_grad_enabled():  # else Granite's blocks drop a value equal to their own, and the gradient with it
                    point.add_hook(lambda g, hook: None, dir="bwd", level=LEVEL)
                added.append(point)
            yield
        finally:
            for point in added:
                point.remove_hooks("both", level=LEVEL)

    def point(self, name: str) -> object:
        """The hook point of a name, to read or to write at. UserError where there is none, or the checks at load refused its site."""
        self.require(site_of(name), name)
        if not self.has(name):
            raise UserError(f"{self.info.architecture} has no {name}")
        return self.points[name]

    def has(self, name: str) -> bool:
        """Whether there is a hook point of this name whose site the checks at load did not refuse."""
        return name in self.points and not self.bridge._gated_hook_reason(name) and not {site_of(name), name} & self.notes.refused.keys()

    def require(self, *names: str) -> None:
        """UserError where the checks made at load found one of these sites ("pattern", "q", "mlp" ...) or identities ("parts") wrong on this model."""
        for name in names:
            if why := self.notes.refused.get(name):
                raise UserError(f"{self.info.architecture}: {why}")

    def leaks(self) -> int:
        return sum(len(p.fwd_hooks) for p in self.unique)

    def remove_hooks(self) -> None:
        for point in self.unique:
            point.remove_hooks()

    @t.no_grad()
    def forward(
        self,
        ids: Tensor,
        names: Iterable[str] = (),
        edits: Iterable[Edit] = (),
        keep: int | None = 1,
        cache: object = None,
        take: Callable[[str, Tensor], None] | None = None,
        begin: tuple[int, Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """
        Run [batch, seq] ids under edits; logits of the last `keep` positions (0: all; None: no logits, it ends when the names have passed, without
        names at the final norm) and what passed the named points after the edits; `take` gets it instead as it passes, and nothing is held. `cache`
        is Hugging Face's, for keys and values. `begin`: a block and its input in such a run, instead of the blocks before it.
        """
        got: dict[str, Tensor] = {}
        left = dict.fromkeys(names)
        take = take or got.__setitem__

        def catch(name: str) -> Edit:
            def fn(x: Tensor) -> None:
                take(name, x.detach())
                left.pop(name, None)
                if keep is None and not left:
                    raise Passed

            return name, fn

        more = {} if cache is None else {"past_key_values": cache}
        with self.hooks([*edits, *map(catch, left), *([(FINAL, stop)] if keep is None else [])]):
            with nullcontext() if begin is None else entered(list(self.bridge.blocks), *begin):
                try:
                    logits = self.bridge(ids.to(self.device), use_cache=cache is not None, logits_to_keep=keep or 0, **more)
                except Passed:
                    logits = None
        return logits, got

    def trace(self, ids: tuple[int, ...], names: Iterable[str], edits: Iterable[Edit] = (), done: tuple = ()) -> dict[str, Tensor]:
        """
        Activations [1, ...] of one run, in the order of `names`, from the cache or from a forward pass that begins as late and ends as early as it
        can. `done` names the edits, for the cache. The pass also keeps what the panes will ask for next: lens points and patterns where these are small against the
        cache, else, when one layer is looked at, the inputs of the blocks up to it.
        """
        names, edits = list(dict.fromkeys(names)), list(edits)
        found = {n: v for n in names if (v := self.cache.get((ids, done, n))) is not None}
        missing = [n for n in names if n not in found]
        if missing:
            wanted = [*missing, *(n for n in self.likely(len(ids)) if (ids, done, n) not in self.cache.items)]
            places = {self.place(n) for n in wanted}
            begin = self.nearest(ids, done, min(places), edits)
            beside: dict[str, Tensor] = {}
            if not self.likely(len(ids)) and len(places - {self.info.n_layers}) == 1:
                edits += [(n, lambda x, n=n: beside.__setitem__(n, x.detach())) for n in self.inputs(len(ids)) if self.place(n) <= min(places)]
            try:
                _, got = self.forward(t.tensor([ids]), wanted, edits, keep=None, begin=begin)
            except Exception as error:
                begin = None
                beside.clear()
                ran_out(error)
                got = None
            if got is None:
                got = self.once_more(ids, missing, edits)
            for n, v in (got | beside).items():
                self.cache.put((ids, done, n), v)
            found |= {n: got[n] for n in missing}
        return {n: found[n] for n in names}

    def once_more(self, ids: tuple[int, ...], names: list[str], edits: list[Edit]) -> dict[str, Tensor]:
        """What is asked for and nothing beside it, from the first block on; OutOfMemory where that does not fit either."""
        try:
            return self.forward(t.tensor([ids]), names, edits, keep=None)[1]
        except Exception as error:
            ran_out(error)
            raise out_of_memory(error) from None

    def place(self, name: str) -> int:
        """The layer of a hook point; -1 before the blocks, n_layers behind them."""
        if block := re.match(r"blocks\.(\d+)\.", name):
            return int(block[1])
        return self.info.n_layers if name.startswith("ln_final.") else -1

    def inputs(self, seq: int) -> list[str]:
        """The inputs of every block, or of every n-th so that they fit into a quarter of the cache."""
        need = self.info.n_layers * seq * self.info.d_model * t.finfo(self.dtype).bits // 8
        every = max(1, math.ceil(need / max(1, self.cache.limit // 4)))
        return [f"blocks.{layer}.hook_resid_pre" for layer in range(every, self.info.n_layers, every)]

    def nearest(self, ids: tuple[int, ...], done: tuple, layer: int, edits: list[Edit]) -> tuple[int, Tensor] | None:
        """The last block up to a layer whose input in this run is at hand, and the input. Not one with an edit in it: it would act twice."""
        found, written = None, {self.place(name) for name, _ in edits}
        for k in range(1, min(layer, self.info.n_layers - 1) + 1):
            for name in (f"blocks.{k}.hook_resid_pre", f"blocks.{k - 1}.hook_resid_post"):
                if (x := self.cache.get((ids, done, name))) is not None and k not in written:
                    found = k, x
        return found if found and self.resumes else None

    @cached_property
    def resumes(self) -> bool:
        """Whether passes that begin at a block give what whole ones give: not where blocks hand on more than the stream."""
        ids, n = self.random_ids(min(8, self.info.n_ctx)), self.info.n_layers
        layers = [k for k in {n // 2, n - 1} if k]
        _, want = self.forward(ids, [*(f"blocks.{k}.hook_resid_pre" for k in layers), FINAL], keep=None)
        try:
            got = [self.forward(ids, [FINAL], keep=None, begin=(k, want[f"blocks.{k}.hook_resid_pre"]))[1][FINAL] for k in layers]
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:  # a model whose own loop over its blocks wants more
            if is_out_of_memory(error):
                raise
            return False
        return all(self.identity("resumed", x, want[FINAL]).ok for x in got)

    def likely(self, seq: int) -> list[str]:
        i, size = self.info, t.finfo(self.dtype).bits // 8
        need = i.n_layers * size * seq * (3 * i.d_model + i.n_heads * seq)
        patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in range(i.n_layers)]
        return [FINAL, *self.lens_points(), *filter(self.has, patterns)] if need <= self.cache.limit // 16 else []

    def lens_points(self) -> list[str]:
        sites = ("post",) if self.parallel or "resid_mid" in self.notes.refused else ("mid", "post")
        return ["blocks.0.hook_resid_pre", *(f"blocks.{layer}.hook_resid_{s}" for layer in range(self.info.n_layers) for s in sites)]

    def capped(self, raw: Tensor) -> Tensor:
        """fp32 logits of what W_U and b_U give: the logit scale and the soft cap of models that have them. Gradients pass."""
        logits = raw.float() * self.logit_scale
        return self.softcap * t.tanh(logits / self.softcap) if self.softcap else logits

    @t.no_grad()
    def unembed(self, x: Tensor) -> Tensor:
        """fp32 logits [..., vocab] of normed rows [..., d_model]: W_U, b_U, the soft cap where the model has one."""
        logits = self.scores(x)
        return logits if not self.softcap else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    @t.no_grad()
    def scores(self, x: Tensor) -> Tensor:
        """fp32 logits before the soft cap. A CPU takes a stretch of the vocabulary at a time: for few rows that is nearly twice as fast."""
        head = getattr(self.bridge.unembed, "original_component", None)
        if x.device.type != "cpu" or type(head) is not t.nn.Linear or head.weight.dtype != t.float32:
            logits = self.bridge.unembed(x.to(self.dtype)).float()  # Mamba's stream is float32 in every dtype
            return logits if self.logit_scale == 1 else logits * self.logit_scale
        rows, weight, size = x.flatten(0, -2), head.weight, STRETCH * t.get_num_threads()
        logits = rows.new_empty(len(rows), len(weight))
        for i in range(0, len(weight), size):
            t.mm(rows, weight[i : i + size].T, out=logits[:, i : i + size])
        if head.bias is not None:
            logits += head.bias
        if self.logit_scale != 1:
            logits *= self.logit_scale
        return logits.view(*x.shape[:-1], -1)

    @t.no_grad()
    def log_probs(self, x: Tensor) -> Tensor:
        return self.unembed(x).log_softmax(-1)

    @t.no_grad()
    def norm(self, x: Tensor) -> Tensor:
        """The final norm, its scale computed from x itself."""
        return self.bridge.ln_final(x.to(self.final_device))

    @property
    def final_device(self) -> t.device:
        return self.bridge.W_U.device

    # ---------------------------------------------------------------- tokens

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text, without BOS, and the characters that each covers."""
        return self.tokens.encode(text)

    def row(self, text: str | Chat, bos: bool | None, labels: tuple[tuple[str, int], ...] = ()) -> TokenRow:
        """A prompt's text or chat as tokens with labels; bos None is what bos_habit says."""
        return self.tokens.row(text, bos, labels)

    def answer(self, clean: str | Chat, text: str) -> TokenRow:
        """The tokens of an answer to a prompt."""
        return self.tokens.answer(clean, text)

    def token_text(self, i: int) -> str:
        """The text of one token."""
        return self.tokens.text(i)

    def check(self, prompt: Prompt, how: str = "") -> CheckResult:
        """A prompt's tokens and alignment, and what is wrong with it."""
        return self.tokens.check(prompt, how)

    def random_ids(self, n: int, rows: int = 1, seed: int = 0) -> Tensor:
        """Random token ids [rows, n], none of them special."""
        return self.tokens.random_ids(n, rows, seed)

    # ---------------------------------------------------------------- identities

    def identity(self, name: str, got: Tensor, want: Tensor, note: str = "") -> Identity:
        """Largest absolute difference against a tolerance that grows with the values' size; anything not finite is broken."""
        got, want = got.float(), want.float().to(got.device)
        assert got.shape == want.shape, f"{name}: {tuple(got.shape)} against {tuple(want.shape)}"
        error = (got - want).abs().max().item()
        tolerance = TOLERANCE[self.dtype] * max(1.0, want.abs().max().item() / (32 if self.dtype == t.float32 else 4))
        return Identity(name, error, tolerance, error <= tolerance, note)


def described(model: Model, name: str, hf: t.nn.Module) -> ModelInfo:
    """What is said of a model; the number of parameters and the seconds are the loader's to add."""
    cfg = model.cfg
    return ModelInfo(
        name=name,
        architecture=cfg.architecture,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=max(model.widths, default=0) or cfg.d_mlp or 0,
        d_vocab=hf.get_output_embeddings().weight.shape[0],
        n_ctx=cfg.n_ctx,
        n_params=0,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        positions=POSITIONS.get(cfg.positional_embedding_type, cfg.positional_embedding_type),
        norm="RMS" if cfg.uses_rms_norm else "LN" if cfg.normalization_type else "none",
        parallel=model.parallel,
        softcap=model.softcap,
        bos="" if model.bos is None else model.tokenizer.bos_token,
        **dict(zip(("default_bos", "bos_habit"), bos_habit(model.tokenizer, getattr(hf.config.get_text_config(), "trained_with_bos", None)))),
        seconds=0.0,
        chat_template=bool(getattr(model.tokenizer, "chat_template", None)),
        repairs=model.repairs + (OWN_SOFTMAX,) * any(model.points[n] is not p for n, p in model.bridge.hook_dict.items() if n in model.points),
    )


def write_mid(layer: int, fn: Callable[[Tensor], Tensor]) -> list[Edit]:
    """resid_mid is written through attn_out: the hook of its name reaches the MLP but not the skip connection."""
    pre = Keep()
    return [(f"blocks.{layer}.hook_resid_pre", pre), (f"blocks.{layer}.hook_attn_out", lambda x: fn(pre.x + x) - pre.x)]


def has_sink(model: Model, layer: int) -> bool:
    """Whether a learned score of each head joins the softmax and has no value, so that rows of the pattern sum to less than one (gpt-oss)."""
    attention = getattr(model.bridge.blocks[layer], "attn", None)
    return isinstance(getattr(getattr(attention, "original_component", None), "sinks", None), Tensor)
