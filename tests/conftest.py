"""Small random Hugging Face folders of five architectures, with perturbed norms and biases; the zoo; and engines on them."""

import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parents[1]))

import screen.client
import vocabulary.files
from vocabulary.prompts import Prompt
from utils import ROOT

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy one is slow
settings.load_profile("any machine")

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPT = "When Mary and John went to the store, Alice gave a drink to"
SHORT = "When Mary and John went to the store, she gave it to"
PROMPT = Prompt(CLEAN, CORRUPT, (" Mary",), (" John",), (("IO", 5), ("S1", 14), ("S2", 38)))
ARCHS = ("gpt2", "neox", "llama", "gemma2", "qwen3", "zoo")
ADDS_BOS = ("gpt2", "llama", "gemma2")  # their tokenizers put BOS in front (as that of Llama does); that of neox has one and does not; qwen3 has none
QUICK = ("gemma2",)  # what `-m "not slow"` runs on: the family with the most of its own; the tests of screen and command line use the shipped model
LARGE = ("test_the_hunt",)  # runs at every size of the terminal by default; the others at 80×24, and at larger ones with `-m table`
COSTLY = (  # seconds each, and the like of each is tested by another: for `-m table`
    "test_a_checkout_that_can_not_be_written_to", "test_under_a_real_limit", "test_features_fire_on_what_they_are_named_by", "test_what_is_learned_on_a_device",
    "test_figures_on_held_out_text[L1.resid_post]", "test_figures_on_held_out_text[L2.resid_post]", "test_half_precision[gpt2-bfloat16]",
    "test_half_precision[gpt2-float16]", "test_half_precision[gemma2-float16]", "test_half_precision[llama-bfloat16]", "test_half_precision[llama-float16]",
    "test_an_error_that_no_one_foresaw[reply]", "test_an_error_that_no_one_foresaw[picker]", "test_an_error_that_no_one_foresaw[action]",
    "test_an_error_that_no_one_foresaw[editor]", "test_an_error_that_no_one_foresaw[worker]", "test_an_error_that_no_one_foresaw[timer]",
    "test_nothing_of_another_model_is_shown[False]", "test_every_key_before_there_is_a_model[True]", "test_memory_of_16k_features_on_a_model_as_wide_as_gpt2",
    "test_bad_sources", "test_acdc_finds_the_induction_circuit", "test_a_chain_of_removals_is_one_after_the_other", "test_ctrl_c_leaves_a_whole_checkpoint",
    "test_the_script_prints_the_same_faithfulness[False]", "test_an_adapter_beside_its_base", "test_an_engine_of_other_code",
    "test_hostile_names_everywhere", "test_48_by_64_heads", "test_a_thousand_tokens", "test_every_key_before_there_is_a_model[False]", "test_text_on_the_wire[size0]",
    "test_going_far[size0]", "test_figures_on_held_out_text[L0.resid_post]", "test_half_precision[gemma2-bfloat16]", "test_the_benchmark",
    "test_paths_by_position_from_embeddings_and_from_several", "test_history_note_jump_compare_resume",
)  # fmt: skip
WORDS = "When Mary and John went to the store, Alice gave a drink to Mary. she it Tom Anna school milk then red green blue"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items) -> None:
    """A test on every architecture is quick on QUICK and slow on the others; a test at several sizes of the terminal is quick at 80×24, and larger ones are for `-m table`."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        arch, size = params.get("arch"), params.get("size")
        if arch in ARCHS and arch not in QUICK or isinstance(size, tuple) and size != (80, 24):
            item.add_marker(pytest.mark.slow)
        large = isinstance(size, tuple) and size != (80, 24) and item.originalname not in LARGE
        costly = item.name in COSTLY or item.path.stem == "test_storm"
        if large or costly or item.name == "test_a_megabyte_of_controls_is_pasted":  # that one wants a quiet machine
            item.add_marker(pytest.mark.table)


def tokenizer(bos: bool, adds: bool = False):
    """A byte-level BPE in which every word above is one token, with its leading space; `adds` BOS by itself, as those of Llama and Gemma do."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|eos|>"]
    tok.train_from_iterator([WORDS] * 50, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=special))
    if adds:
        tok.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", tok.token_to_id("<|bos|>"))])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="<|eos|>", **({"bos_token": "<|bos|>"} if bos else {}))


def config(arch: str, n_vocab: int):
    import transformers as tr

    small = {"vocab_size": n_vocab, "initializer_range": 0.25, "bos_token_id": 0, "eos_token_id": 1}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 64}
    grouped = wide | {"num_key_value_heads": 2}
    match arch:
        case "gpt2":
            return tr.GPT2Config(**small, n_embd=32, n_layer=3, n_head=4, n_positions=64)
        case "neox":
            return tr.GPTNeoXConfig(**small, **wide, use_parallel_residual=True, rotary_pct=0.25)
        case "llama":
            return tr.LlamaConfig(**small, **grouped)
        case "gemma2":
            return tr.Gemma2Config(**small, **grouped, head_dim=12, query_pre_attn_scalar=12, sliding_window=8, final_logit_softcapping=5.0)
        case "qwen3":
            return tr.Qwen3Config(**small, **grouped, head_dim=12)
    raise AssertionError(arch)


def build(arch: str, folder: Path) -> Path:
    """Save a random model whose norm gains and biases are not the trivial ones."""
    import torch as t
    from transformers import AutoModelForCausalLM

    tok = tokenizer(bos=arch != "qwen3", adds=arch in ADDS_BOS)
    t.manual_seed(ARCHS.index(arch))
    hf = AutoModelForCausalLM.from_config(config(arch, len(tok) + 3))
    with t.no_grad():
        for _, p in hf.named_parameters():
            if p.ndim == 1:
                p += 0.3 * t.randn_like(p)
    hf.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory, monkeypatch) -> Path:
    """LOUPE_HOME of a test: what it writes lies nowhere else, and its engine ends with it."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(vocabulary.files, "home", lambda: folder)
    monkeypatch.setattr(screen.client.Client, "kept", False)  # whatever .env.local says
    return folder


@pytest.fixture
def near():
    """A folder whose path is short enough for a Unix socket in it (107 bytes, 103 on a Mac), which that of tmp_path may not be."""
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        yield Path(place)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {a: build(a, root / a) for a in ARCHS if a != "zoo"} | {"zoo": ROOT / "zoo"}


@pytest.fixture(scope="session")
def engines(folders) -> dict:
    """One engine a model, loaded when first asked for."""
    from engine import Engine

    class Engines(dict):
        def __missing__(self, arch: str) -> Engine:
            self[arch] = Engine("zoo" if arch == "zoo" else str(folders[arch]))
            return self[arch]

    return Engines()


@pytest.fixture(scope="session")
def references(folders) -> dict:
    """The same weights in Hugging Face's own classes, with plain torch hooks."""
    from reference import Reference

    class References(dict):
        def __missing__(self, arch: str) -> Reference:
            self[arch] = Reference(folders[arch])
            return self[arch]

    return References()


@pytest.fixture(params=ARCHS)
def arch(request) -> str:
    return request.param


@pytest.fixture
def engine(engines, arch):
    yield engines[arch]
    engines[arch].check_hooks()


@pytest.fixture
def reference(references, arch):
    return references[arch]
