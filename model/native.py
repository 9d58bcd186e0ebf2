"""
Models trained by hand: a TransformerLens HookedTransformer checkpoint (a state dict in `.pt` or safetensors) with its config as JSON, its tokens named by a list
of labels. It runs as TransformerBridge's native model; HookedTransformer's own logits are what it is held against.
"""

import copy
import inspect
import pickle
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch as t
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformer_lens.model_bridge.generalized_components import NormalizationBridge
from transformer_lens.model_bridge.sources.native import NativeModel
from transformer_lens.model_bridge.supported_architectures.native import NativeArchitectureAdapter
from transformer_lens.utilities.activation_functions import SUPPORTED_ACTIVATIONS

from model.memory import first_line, is_out_of_memory
from model.tokens import Tokens
from vocabulary.nodes import UserError
from vocabulary.prompts import TokenRow
from vocabulary.requests import ModelInfo
from vocabulary.typed import parse_json, read_text

ARCHITECTURE = "HookedTransformer"
SUFFIXES = (".pt", ".pth", ".safetensors")
OWNERS = ("NeelNanda/", "ArthurConmy/", "Baidicoot/")  # of hub repositories that hold HookedTransformer checkpoints, as TransformerLens has them
NEEDED = {"n_layers", "d_model", "n_ctx", "d_head"}
INSIDE = ("state_dict", "model_state_dict", "model")  # where a checkpoint may keep its state dict
BUFFERS = ("mask", "IGNORE", "rotary_sin", "rotary_cos")
KEPT = (
    "d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_mlp", "d_vocab", "d_vocab_out", "n_key_value_heads", "gated_mlp", "eps",
    "normalization_type", "final_rms", "attention_dir", "attn_scores_soft_cap", "output_logits_soft_cap", "positional_embedding_type", "rotary_dim", "rotary_base",
    "rotary_adjacent_pairs",
)  # fmt: skip
ACTIVATIONS = {name: fn for name, fn in SUPPORTED_ACTIVATIONS.items() if name not in ("solu_ln", "xielu")}  # these two have weights of their own
UNBUILT = {  # what HookedTransformer has and the native model has not; each with the value that means it is off
    "use_qk_norm": False, "clip_qkv": None, "use_logn_attn": False, "use_local_attn": False, "parallel_attn_mlp": False, "num_experts": None,
    "post_embedding_ln": False, "use_normalization_before_and_after": False, "use_NTK_by_parts_rope": False, "use_yarn_rope": False, "use_dynamic_ntk_rope": False,
    "use_attention_sinks": False, "rotary_base_local": None, "rotary_scaling_factor": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint's parts lie: its config, its weights, and its labels and output labels where there are files of them."""

    config: Path
    weights: Path
    labels: Path
    output_labels: Path


def find(place: Path) -> Checkpoint | None:
    """The checkpoint of a folder or a weights file; None where the config beside it is not HookedTransformer's. UserError where the weights are not one file."""
    folder = place.parent if place.is_file() else place
    if place.suffix == ".gguf":
        return None
    configs = [place.with_suffix(".json")] * place.is_file() + [folder / "config.json"]
    config = next((c for c in configs if c.is_file()), None)
    try:
        read = parse_json(read_text(config)) if config else None
    except UserError:  # the loader of Hugging Face folders says what is wrong with it
        return None
    if not isinstance(read, dict) or not NEEDED <= read.keys() or "model_type" in read:
        return None
    files = [place] if place.is_file() else sorted(f for f in folder.iterdir() if f.suffix in SUFFIXES)
    files = [f for f in files if f.name.endswith("final.pth")] or files  # of a hub repository with the checkpoints of its training
    if len(files) != 1:
        raise UserError(f"{folder} holds {len(files)} checkpoints: give the file itself" if files else f"{folder} holds no .pt, .pth or .safetensors file")
    return Checkpoint(config, files[0], folder / "labels.json", folder / "output_labels.json")


def tokenizer_name(found: Checkpoint) -> str:
    """The tokenizer that a checkpoint's config names, "" where it names none or labels stand beside it."""
    name = parse_json(read_text(found.config)).get("tokenizer_name")
    return name if isinstance(name, str) and not found.labels.is_file() else ""


def read_config(found: Checkpoint) -> HookedTransformerConfig:
    """The checkpoint's config, as HookedTransformer reads it. UserError for what the native model can't be."""
    raw = parse_json(read_text(found.config))
    if "normalization" in raw:  # as the models of Neel Nanda's hub repositories write it
        raw.setdefault("normalization_type", raw["normalization"])
    if raw.get("shortformer_pos"):
        raw["positional_embedding_type"] = "shortformer"
    known = set(inspect.signature(HookedTransformerConfig).parameters) - {"device", "dtype", "n_devices", "init_weights", "n_params", "seed", "tokenizer_name"}
    act = raw.get("act_fn")
    if not raw.get("attn_only") and act not in ACTIVATIONS:
        raise UserError(f"{found.config}: act_fn {act!r} is not built: there are {', '.join(ACTIVATIONS)}")
    try:
        cfg = HookedTransformerConfig(**{k: v for k, v in raw.items() if k in known}, device="cpu", init_weights=False)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"{found.config} is no HookedTransformerConfig: {first_line(error)}") from error
    for name in ("d_model", "d_head", "n_layers", "n_ctx", "n_heads", "d_vocab", "d_vocab_out", *(() if cfg.attn_only else ("d_mlp",))):
        if not isinstance(n := getattr(cfg, name), int) or n < 1:
            raise UserError(f"{found.config}: {name} is {n!r}: write a whole number of at least 1")
    for name, off in UNBUILT.items():
        if getattr(cfg, name) != off:
            raise UserError(f"{found.config}: {name} is {getattr(cfg, name)!r}, which is not built for models trained by hand")
    rotary = cfg.positional_embedding_type == "rotary"
    if cfg.positional_embedding_type != "standard" and not (rotary and cfg.rotary_adjacent_pairs):
        which = "rotary without rotary_adjacent_pairs" if rotary else cfg.positional_embedding_type
        raise UserError(f"{found.config}: positions are {which}: learned ones (standard) and rotary ones of adjacent pairs are built")
    return cfg


def read_state(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, by HookedTransformer's names, without its buffers. No code is run that a file holds."""
    try:
        state = load_file(file) if file.suffix == ".safetensors" else t.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(f"{file} can't be read as tensors alone ({first_line(error)}): save model.state_dict(), by torch.save or safetensors") from error
    state = next((state[n] for n in INSIDE if isinstance(state, dict) and isinstance(state.get(n), dict)), state)
    if not isinstance(state, dict) or not state or not all(isinstance(x, Tensor) for x in state.values()):
        raise UserError(f"{file} holds no state dict: save model.state_dict()")
    return {name: x for name, x in state.items() if name.rpartition(".")[2] not in BUFFERS}


def converted(state: dict[str, Tensor], cfg: HookedTransformerConfig) -> dict[str, Tensor]:
    """HookedTransformer's tensors by the native model's names and layouts: torch's Linear holds [out, in]."""
    out = {}
    norms = {"ln1": "ln1", "ln2": "ln2", "ln_final": "ln_out"}
    for name, x in state.items():
        *path, leaf = name.split(".")
        where, leaf = f"layers.{path[1]}" if path[0] == "blocks" else "", leaf.removeprefix("_")
        match path[-1], leaf:
            case ("embed", "W_E"):
                out["tok_embed.weight"] = x
            case ("pos_embed", "W_pos"):
                out["pos.weight"] = x
            case ("unembed", "W_U" | "b_U"):
                out[f"head.{'weight' if leaf == 'W_U' else 'bias'}"] = x.T if x.ndim == 2 else x
            case ("attn", "W_Q" | "W_K" | "W_V"):
                out[f"{where}.attn.{leaf[-1].lower()}.weight"] = x.transpose(1, 2).flatten(0, 1)
            case ("attn", "W_O"):
                out[f"{where}.attn.o.weight"] = x.flatten(0, 1).T
            case ("attn", "b_Q" | "b_K" | "b_V" | "b_O"):
                out[f"{where}.attn.{leaf[-1].lower()}.bias"] = x.flatten()
            case ("mlp", "W_in" | "W_out" | "W_gate" | "b_in" | "b_out"):
                part = leaf[2:] if cfg.gated_mlp else f"fc_{leaf[2:]}"
                out[f"{where}.mlp.{part}.{'weight' if leaf[0] == 'W' else 'bias'}"] = x.T if x.ndim == 2 else x
            case (norm, "w" | "b") if norm in norms:
                out[".".join(filter(None, (where, norms[norm], "weight" if leaf == "w" else "bias")))] = x
            case _:
                raise UserError(f"the checkpoint's {name} is not known: is the config its own?")
    if cfg.gated_mlp:
        for name in [n for n in out if n.endswith("mlp.in.bias")]:
            if out.pop(name).any():  # HookedTransformer adds it behind the gate, the native model has no such place
                raise UserError("a gated MLP with a b_in that is not zero is not built")
    return out


class HandTrained(NativeModel):
    """
    TransformerLens's native model with the few things that Hugging Face's have and Loupe asks for, and what HookedTransformer has beyond it. The MLPs of an
    attention-only model are stand-ins: one neuron whose weights are zero, so that they add exactly nothing.
    """

    _supports_sdpa = False

    def __init__(self, cfg: HookedTransformerConfig):
        kept = {k: getattr(cfg, k) for k in KEPT} | ({"d_mlp": 1, "gated_mlp": False} if cfg.attn_only else {})
        super().__init__(TransformerBridgeConfig(**kept, act_fn="relu", uses_rms_norm=str(cfg.normalization_type).startswith("RMS")))
        self.config = SimpleNamespace(num_hidden_layers=cfg.n_layers, bidirectional=cfg.attention_dir != "causal", get_text_config=lambda **_: self.config)
        self.head = nn.Linear(cfg.d_model, cfg.d_vocab_out)
        for layer, block in enumerate(self.layers):
            scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
            block.attn.scale = float(scale) * (layer + 1 if cfg.scale_attn_by_inverse_layer_idx else 1)
            if cfg.attn_only:
                continue
            block.mlp.act = ACTIVATIONS[cfg.act_fn]
            if cfg.gated_mlp:
                block.mlp.out = nn.Linear(cfg.d_mlp, cfg.d_model)

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0, **_) -> SimpleNamespace:
        """Logits [batch, seq or the last `logits_to_keep`, d_vocab_out]; blocks may hand on a tensor or a tuple."""
        places = t.arange(input_ids.shape[1], device=input_ids.device)[None].expand(len(input_ids), -1)
        x = self.tok_embed(input_ids)
        x = x if self.pos is None else x + self.pos(places)
        for block in self.layers:
            x = block(x, position_ids=places)
            x = x[0] if isinstance(x, tuple) else x
        logits = self.head(self.ln_out(x)[:, -logits_to_keep:])
        cap = self.output_logits_soft_cap
        return SimpleNamespace(logits=cap * t.tanh(logits / cap) if cap > 0 else logits)


def read_model(cfg: HookedTransformerConfig, state: dict[str, Tensor], dtype: t.dtype, device: t.device) -> HandTrained:
    """The model with the checkpoint's weights; missing, further or misshapen ones are an error."""
    model, found = HandTrained(cfg), converted(state, cfg)
    own, stand_in = {n: tuple(p.shape) for n, p in model.named_parameters()}, {}
    if cfg.attn_only:
        stand_in = {n: t.zeros_like(p) for n, p in model.named_parameters() if ".mlp." in n or ".ln2." in n}
        own = {n: shape for n, shape in own.items() if n not in stand_in}
    if lacking := sorted(own.keys() - found.keys()):
        raise UserError(f"the checkpoint lacks {len(lacking)} tensors that its config asks for (first: {lacking[0]})")
    if more := sorted(found.keys() - own.keys()):
        raise UserError(f"the checkpoint has {len(more)} tensors that its config does not ask for (first: {more[0]})")
    if other := sorted(n for n, shape in own.items() if tuple(found[n].shape) != shape):
        raise UserError(f"the checkpoint's {other[0]} is {tuple(found[other[0]].shape)}, and its config asks for {own[other[0]]}")
    model.load_state_dict({n: x.contiguous() for n, x in (found | stand_in).items()}, strict=False)
    return model.to(device=device, dtype=dtype).eval()


class NoNorm(NormalizationBridge):
    """The place of a norm that a model has not: its scale is one, so that what reads through norms reads through it."""

    def forward(self, hidden_states: Tensor, **_) -> Tensor:
        x = self.hook_in(hidden_states)
        return self.hook_out(self.hook_normalized(x / self.hook_scale(t.ones_like(x[..., :1]))))


class HandTrainedAdapter(NativeArchitectureAdapter):
    """TransformerLens's adapter, with a place for the norms that a model without any does not have."""

    def __init__(self, cfg: TransformerBridgeConfig):
        super().__init__(cfg)
        if cfg.normalization_type is None:
            self.component_mapping["ln_final"] = NoNorm("ln_out", cfg)
            self.component_mapping["blocks"].submodules |= {name: NoNorm(name, cfg) for name in ("ln1", "ln2")}


ArchitectureAdapterFactory.register_adapter(ARCHITECTURE, HandTrainedAdapter)


def bridge_of(model: HandTrained, dtype: t.dtype) -> TransformerBridge:
    """The Bridge around the native model."""
    cfg = copy.deepcopy(model.cfg)
    return build_bridge_from_module(
        model, architecture=ARCHITECTURE, tl_config=cfg, tokenizer=None, dtype=dtype, device=model.head.weight.device, model_name="native"
    )


@t.no_grad()
def hooked_logits(cfg: HookedTransformerConfig, state: dict[str, Tensor], ids: Tensor, dtype: t.dtype) -> Tensor:
    """What HookedTransformer itself says [batch, seq, d_vocab_out], on the CPU: nothing of the native model's or of Loupe's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = HookedTransformer(copy.deepcopy(cfg), move_to_device=False)
    found = model.load_state_dict(state, strict=False)
    assert not found.unexpected_keys and not [n for n in found.missing_keys if n.rpartition(".")[2] not in BUFFERS], found
    return model.to(dtype, print_details=False).eval()(ids, prepend_bos=False)


# ------------------------------------------------------------------ tokens


class Labels:
    """Stands in for a tokenizer: a token is one of a list of labels, written with spaces between; `outputs` names what the model predicts."""

    bos_token_id, bos_token, is_fast, all_special_ids = None, None, True, ()

    def __init__(self, labels: list[str], outputs: list[str], same: bool):
        self.same = same  # whether output i is input token i, as far as there are outputs
        self.labels, self.outputs, self.ids = labels, outputs, {label: i for i, label in enumerate(labels)}

    def __len__(self) -> int:
        return len(self.labels)

    def __call__(self, text: str, return_offsets_mapping: bool = False, **_) -> dict:
        ids, offsets, at = [], [], 0
        for word in text.split():
            at = text.index(word, at)
            if word not in self.ids:
                some = " ".join(self.labels[:8]) + (" …" if len(self.labels) > 8 else "")
                raise UserError(f"{word!r} is not one of this model's {len(self)} tokens: {some}")
            ids.append(self.ids[word])
            offsets.append((at, at + len(word)))
            at += len(word)
        return {"input_ids": ids} | ({"offset_mapping": offsets} if return_offsets_mapping else {})

    def decode(self, ids: list[int], **_) -> str:
        return " ".join(self.labels[i] for i in ids)


def read_labels(file: Path, n: int) -> list[str]:
    """The labels of n tokens: a JSON list of words, or the numbers 0 to n - 1 where there is no such file."""
    if not file.is_file():
        return [str(i) for i in range(n)]
    labels = parse_json(read_text(file))
    if not isinstance(labels, list) or len(labels) != n or len({str(x) for x in labels}) != n:
        raise UserError(f"{file} must be a JSON list of {n} different labels")
    words = [str(x) for x in labels]
    if wrong := [w for w in words if not w or len(w.split()) != 1 or w != w.strip()]:
        raise UserError(f"{file}: the label {wrong[0]!r} is empty or has a space in it, and spaces stand between labels")
    return words


def read_tokens(found: Checkpoint, cfg: HookedTransformerConfig) -> Labels:
    """The tokens of a checkpoint. What it predicts goes by labels of its own, else by those of the inputs where there are as many, else by numbers."""
    labels = read_labels(found.labels, cfg.d_vocab)
    if cfg.d_vocab_out == cfg.d_vocab and not found.output_labels.is_file():
        return Labels(labels, labels, True)
    outputs = read_labels(found.output_labels, cfg.d_vocab_out)
    return Labels(labels, outputs, found.output_labels.is_file() and outputs == labels[: len(outputs)])


class LabelTokens(Tokens):
    """Tokens by labels. An answer is one of what the model predicts."""

    def __init__(self, tokenizer: Labels, info: ModelInfo, n_embed: int):
        super().__init__(tokenizer, info, n_embed)
        self.outputs = {label: i for i, label in enumerate(tokenizer.outputs)}
        loss = "it predicts other tokens than it reads, so the loss of a prompt's own tokens is none"
        two = "what it predicts need not be the tokens that it reads (where it is, output_labels.json says so with their names)"
        self.refused = ({} if tokenizer.same else {"one vocabulary": two}) | ({} if tokenizer.same and info.d_vocab == n_embed else {"loss": loss})

    def spell(self, i: int) -> str:
        return self.tokenizer.labels[i]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.tokenizer.labels[i] for i in ids)

    def output_text(self, i: int) -> str:
        return self.tokenizer.outputs[i]

    def answer(self, clean: str, text: str) -> TokenRow:
        """One or more labels of outputs, by their places among these."""
        words = text.split()
        if unknown := [w for w in words if w not in self.outputs]:
            some = " ".join(self.tokenizer.outputs[:8]) + (" …" if len(self.outputs) > 8 else "")
            raise UserError(f"{unknown[0]!r} is not one of the {len(self.outputs)} tokens that this model predicts: {some}")
        return TokenRow(tuple(self.outputs[w] for w in words), tuple(words), {"END": len(words) - 1} if words else {})
