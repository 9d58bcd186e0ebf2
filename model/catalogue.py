"""Which models can be named, and how large each is: from weights that are here, from configs that are here, from TransformerLens's table. No network."""

from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import torch as t
import transformers

from model.devices import pick_device
from model.loading import DTYPES, SMALL, read_config, read_headers
from model.memory import room
from utils import ROOT
from vocabulary.names import aliases, canonical
from vocabulary.nodes import UserError
from vocabulary.requests import ModelChoice, Models, ModelsResult, Progress


def named() -> list[tuple[ModelChoice, Path | None]]:
    """Every model that can be named, with the folder of its config where one is here."""
    out = [(ModelChoice("zoo", "embedded", "no download"), ROOT / "zoo")] if (ROOT / "zoo" / "config.json").is_file() else []
    out += [(ModelChoice(str(p.parent), "folder"), p.parent) for p in sorted((ROOT / "models").glob("*/config.json"))]
    out += [(ModelChoice(str(p), "GGUF", "dequantised as it is read"), None) for p in sorted((ROOT / "models").glob("**/*.gguf"))]
    cached, configs = set(), {}
    if (cache := Path(huggingface_hub.constants.HF_HUB_CACHE)).is_dir():
        for repo in sorted(huggingface_hub.scan_cache_dir(cache).repos, key=lambda r: r.repo_id):
            found = [(r, {f.file_name for f in r.files}) for r in repo.revisions if repo.repo_type == "model"]
            name = canonical(repo.repo_id)
            if with_weights := [r for r, files in found if "config.json" in files and any(f.endswith((".safetensors", "final.pth")) for f in files)]:
                cached.add(name)
                out.append(
                    (ModelChoice(name, "hub cache", f"{repo.size_on_disk / 1e9:.1f} GB on disk", aliases().get(name, ())), with_weights[0].snapshot_path)
                )
            elif with_config := [r for r, files in found if "config.json" in files]:
                configs[name] = with_config[0].snapshot_path
    out += [(ModelChoice(n, "hub", "needs download", some), configs.get(n)) for n, some in aliases().items() if n not in cached]
    return out


def find_models(ask: Models, held: Callable[[t.device], int] = lambda device: 0) -> Generator[ModelsResult | Progress, None, ModelsResult]:
    """All names at once, then their sizes one by one."""
    some, free = named(), room(pick_device(ask.device), held)
    yield ModelsResult(tuple(choice for choice, _ in some), free)
    yield Progress(0, len(some), "sizes of models")
    out = []
    for choice, folder in some:
        out.append(sized(choice, folder, ask.dtype))
        if folder is not None:
            yield Progress(len(out), len(some), f"sizes of models: {choice.name}")
    return ModelsResult(tuple(out), free)


def sized(choice: ModelChoice, folder: Path | None, dtype: str) -> ModelChoice:
    """A choice with what is known of its size in a dtype."""
    if choice.where == "GGUF":  # its header takes seconds
        return choice
    layers, heads, count, stored = of_folder(folder) if folder is not None else of_table(choice.name)
    known = DTYPES.get(dtype, t.float32 if 0 < count <= SMALL else stored)
    need = count * known.itemsize if count and known else 0
    kind = str(known).removeprefix("torch.") if need else ""
    return replace(choice, n_layers=layers, n_heads=heads, n_params=count, at_least=folder is None and count > 0, dtype=kind, need=need)


def of_folder(folder: Path) -> tuple[int, int, int, t.dtype | None]:
    """Layers, heads, parameters and stored dtype by a folder's config and the headers of its weights, or without these by the modules that the config makes."""
    try:
        config = read_config(folder)
    except UserError:
        return 0, 0, 0, None
    text = config.get_text_config()
    shape = getattr(text, "num_hidden_layers", 0), getattr(text, "num_attention_heads", 0)
    try:
        return *shape, *read_headers(folder)
    except UserError:
        pass
    with t.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return *shape, sum(p.numel() for p in model.parameters()), config.dtype


def of_table(name: str) -> tuple[int, int, int, t.dtype | None]:
    """
    Layers, heads and parameters, and the smallest usual dtype, by the shapes that TransformerLens has written down: the embedding and each block's matrices, without norms, biases and an
    unembedding of its own. Zeros for most models: it has them from the hub.
    """
    from transformer_lens.loading_from_pretrained import convert_hf_model_config  # seconds, where no model is loaded yet

    try:
        c = convert_hf_model_config(name, local_files_only=True)
    except OSError:  # not in the hub cache, where it looks for all but Llama and Gemma
        return 0, 0, 0, None
    attention = 2 * c["d_model"] * c["d_head"] * (c["n_heads"] + (c.get("n_key_value_heads") or c["n_heads"]))
    mlp = (3 if c.get("gated_mlp") else 2) * c["d_model"] * c["d_mlp"] * (c.get("num_experts") or 1)
    return c["n_layers"], c["n_heads"], c["n_layers"] * (attention + mlp) + c["d_vocab"] * c["d_model"], t.bfloat16
