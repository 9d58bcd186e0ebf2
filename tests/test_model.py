"""Loading, tokens, the cache, the self-check; and what can't be loaded, each with one clear line."""

import errno
import json
import os
import shutil
import threading
import urllib.parse
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch as t
from conftest import ADDS_BOS, ARCHS, CLEAN, CORRUPT, PROMPT, SHORT, tokenizer
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoTokenizer

from model import loading
from model.cache import Cache
from model.memory import Chunks, in_chunks
from model.tokens import bos_habit
from engine import Engine
from techniques.output.requests import Run
from vocabulary.nodes import UserError
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Check, Load, Progress


def failure(ask: Load) -> str:
    with pytest.raises(UserError) as error:
        Engine(ask)
    text = str(error.value)
    assert "\n" not in text and "Traceback" not in text and len(text) < 600
    return text


def copy(folders, tmp_path, arch: str = "gpt2"):
    return shutil.copytree(folders[arch], tmp_path / "copy")


# ------------------------------------------------------------------ what is loaded


def test_info(engine, reference, arch):
    i, c = engine.model.info, reference.config
    assert (i.n_layers, i.n_heads, i.n_kv_heads) == (len(reference.blocks), reference.heads, reference.kv_heads)
    assert i.d_model == reference.unembed.shape[1] and i.d_vocab == reference.unembed.shape[0] == c.vocab_size
    assert i.n_params == sum(p.numel() for p in reference.hf.parameters())
    assert i.parallel == (arch == "neox") and i.dtype == "float32" and i.device == "cpu"
    assert i.positions == ("learned" if arch in ("gpt2", "zoo") else "rotary")
    assert i.norm == ("LN" if arch in ("gpt2", "zoo", "neox") else "RMS")
    assert i.softcap == (5.0 if arch == "gemma2" else 0)
    assert i.n_ctx == (256 if arch == "zoo" else 64)
    assert i.default_bos == (arch in (*ADDS_BOS, "zoo"))


def test_checks_hold(engine, arch):
    checks = {c.name: c.ok for c in engine.model.info.checks}
    assert all(checks.values()), checks
    assert ("write at resid_mid via attn_out" in checks) == (arch != "neox")
    assert {"attention rows sum to one", "lens at the last point = logits", "heads + b_O = attention"} <= set(checks)


def test_logits_are_hugging_faces(engine, reference):
    for text in (CLEAN, CORRUPT, SHORT):
        ids = engine.model.row(text, None).ids
        got = engine.model.forward(t.tensor([ids]), keep=0)[0].numpy()
        np.testing.assert_allclose(got, reference.run([ids])[0], atol=1e-4)


def test_frozen_eval_eager(engine):
    hf = engine.model.bridge.original_model
    assert not any(p.requires_grad for p in hf.parameters()) and not engine.model.bridge.training
    assert hf.config._attn_implementation == "eager"


def test_dtypes(folders):
    for name, kind in (("bfloat16", t.bfloat16), ("float16", t.float16)):
        engine = Engine(Load(str(folders["llama"]), dtype=name))
        assert engine.model.info.dtype == name and next(engine.model.bridge.original_model.parameters()).dtype == kind
        assert all(c.ok for c in engine.model.info.checks), engine.model.info.checks
        assert np.isfinite(engine.run(Run(Study(PROMPT))).clean.top_logits).all()


def test_a_big_model_keeps_its_own_dtype(folders, tmp_path, monkeypatch):
    folder = copy(folders, tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file({k: v.bfloat16() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert Engine(str(folder)).model.info.dtype == "float32"
    monkeypatch.setattr(loading, "SMALL", 10)
    assert Engine(str(folder)).model.info.dtype == "bfloat16"


def test_sharded_weights(folders, engines, tmp_path):
    folder = copy(folders, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(weights.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        save_file(half, folder / f"model-{i}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {k: f"model-{i}.safetensors" for i, half in enumerate(halves) for k in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    got, want = (e.run(Run(Study(PROMPT))).clean.top_logits for e in (Engine(str(folder)), engines["gpt2"]))
    np.testing.assert_array_equal(got, want)
    (folder / "model-1.safetensors").unlink()
    assert "has no model-1.safetensors" in failure(Load(str(folder)))


def test_a_fine_tune_on_its_base(folders, tmp_path):
    """Weights alone, on the architecture and tokenizer of another folder."""
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    weights = load_file(folders["llama"] / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] * 2
    save_file(weights, tuned / "model.safetensors", {"format": "pt"})
    base = Engine(str(folders["llama"])).run(Run(Study(PROMPT))).clean
    got = Engine(Load(str(tuned), base=str(folders["llama"]))).run(Run(Study(PROMPT))).clean
    np.testing.assert_allclose(got.top_logits, 2 * base.top_logits, rtol=1e-4)
    assert "the weights of" in (text := failure(Load(str(tuned), base=str(folders["qwen3"])))) and "base model" in text
    assert "it has no config.json" in failure(Load(str(tuned)))


# ------------------------------------------------------------------ what can't be loaded


def test_not_a_model(tmp_path):
    assert "is not a model: it has no config.json" in failure(Load(str(tmp_path)))
    assert "no folder at" in failure(Load(str(tmp_path / "nothing" / "here")))
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"")
    assert "has no config of HookedTransformer's beside it" in failure(Load(str(file)))


@pytest.mark.parametrize("keep", [0, 5, 100, 4000, -1])
def test_truncated_weights(folders, tmp_path, keep):
    folder = copy(folders, tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated or not a safetensors file" in (text := failure(Load(str(folder)))) and "again" in text


def test_damaged_folders(folders, tmp_path):
    folder = copy(folders, tmp_path)
    config, good = folder / "config.json", (folder / "config.json").read_text()
    for text, why in (
        ("{", "can't be read"),
        ("[]", "does not hold a JSON object"),
        ("{}", "no architecture that Loupe can read"),
        ('{"model_type": "warp-drive"}', "no architecture that Loupe can read"),
        (json.dumps(json.loads(good) | {"n_layer": "three"}), "no architecture that Loupe can read"),
        ('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true}', "decoder-only text models"),
        ('{"model_type": "bert", "architectures": ["BertForMaskedLM"]}', "decoder-only text models"),
        ('{"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"]}', "decoder-only text models"),
    ):
        config.write_text(text)
        assert why in failure(Load(str(folder))), text
    config.write_text(json.dumps(json.loads(good) | {"n_layer": 5}))
    assert "lack" in (text := failure(Load(str(folder)))) and "is the base model right" in text
    config.write_text(json.dumps(json.loads(good) | {"n_embd": 64}))
    assert "the weights of" in failure(Load(str(folder)))
    config.write_text(good)
    (folder / "tokenizer.json").write_text("{ not json")
    assert "tokenizer.json can't be read" in failure(Load(str(folder)))
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer" in failure(Load(str(folder)))
    shutil.copy(folders["gpt2"] / "tokenizer.json", folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "reads safetensors" in failure(Load(str(folder)))
    (folder / "pytorch_model.bin").unlink()
    assert "has no model.safetensors" in failure(Load(str(folder)))


def test_devices_and_dtypes(folders):
    folder = str(folders["gpt2"])
    assert "is not a device" in failure(Load(folder, device="toaster"))
    assert "is not a device" in failure(Load(folder, device="meta"))
    assert f"torch sees {t.cuda.device_count()} CUDA devices" in failure(Load(folder, device="cuda:63"))
    assert "is not a dtype" in failure(Load(folder, dtype="int3"))


def test_an_unusable_model_leaves_the_loaded_one(folders, tmp_path):
    engine = Engine(str(folders["gpt2"]))
    with pytest.raises(UserError):
        engine.run(Load(str(tmp_path)))
    assert engine.run(Check(PROMPT)).problems == ()


class Hub(BaseHTTPRequestHandler):
    """A hub on this machine with one model (`have/model`), one gated (`gated/model`), and nothing else."""

    folder = None
    sha = "0123456789abcdef0123456789abcdef01234567"

    def answer(self, status: int, body: bytes = b"{}", **headers: str) -> None:
        self.send_response(status)
        for k, v in ({"Content-Length": str(len(body)), "Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}).items():
            self.send_header(k, v)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path)
        if "have/model" not in path:
            gated = "gated/model" in path
            return self.answer(403 if gated else 404, X_Error_Code="GatedRepo" if gated else "RepoNotFound")
        files = [f for f in sorted(self.folder.iterdir()) if f.is_file()]
        if "/tree/" in path:
            rows = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "1" * 40} for f in files]
            return self.answer(200, json.dumps(rows).encode())
        if "/resolve/" in path:
            name = path.rpartition("/")[2]
            return self.answer(200, (self.folder / name).read_bytes(), X_Repo_Commit=self.sha, ETag=f'"{name}"')
        return self.answer(200, json.dumps({"id": "have/model", "sha": self.sha, "siblings": [{"rfilename": f.name} for f in files]}).encode())

    do_HEAD = do_GET

    def log_message(self, *args) -> None: ...


@pytest.fixture
def hub(monkeypatch, tmp_path, folders):
    """That hub, and an empty cache. Returns a function that takes the network away."""
    monkeypatch.setattr(Hub, "folder", folders["gpt2"])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    real, here = loading.huggingface_hub.snapshot_download, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", lambda name, **k: real(name, cache_dir=tmp_path, **k))
    monkeypatch.setattr(loading.huggingface_hub.constants, "ENDPOINT", here)
    monkeypatch.setattr(loading.huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", here + "/{repo_id}/resolve/{revision}/{filename}")

    def cut() -> None:
        server.shutdown()
        server.server_close()

    yield cut
    cut()


def test_hub_names(hub):
    assert "the hub has no model 'openai/gpt9'" in (text := failure(Load("openai/gpt9"))) and "HF_TOKEN" in text
    assert "gated/model is gated: accept its terms" in (text := failure(Load("gated/model"))) and ".env.local" in text
    assert "neither a folder nor a hub name" in failure(Load("a--b..c"))
    assert "no folder at" in failure(Load("what is this?"))
    hub()
    assert "gpt2 is not in the hub cache and there is no network" in failure(Load("gpt2"))


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_a_home_without_room(hub, monkeypatch, code):
    def full(name, local_files_only: bool = False, **k):
        if local_files_only:
            raise loading.LocalEntryNotFoundError("none")
        raise OSError(code, os.strerror(code), "/home/me/.cache/huggingface")

    monkeypatch.setattr(loading.huggingface_hub, "snapshot_download", full)
    said = failure(Load("have/model"))
    assert os.strerror(code) in said and "Set HF_HOME to a folder with room and start again" in said and "\n" not in said


def test_download_then_no_network(hub, engines):
    """Progress while it comes; then it loads from the cache, with the hub gone."""
    seen = []
    engine = Engine()
    engine.run(Load("have/model"), seen.append)
    done = [(p.done, p.total) for p in seen if p.text.startswith("downloading have/model: ")]
    assert done and done == sorted(done) and done[-1][0] == done[-1][1] > 100_000
    hub()
    again = Engine("have/model")
    assert again.model.info.name == "have/model"
    want = engines["gpt2"].run(Run(Study(PROMPT))).clean.top_logits
    for one in (engine, again):
        np.testing.assert_array_equal(one.run(Run(Study(PROMPT))).clean.top_logits, want)


# ------------------------------------------------------------------ tokens


def test_rows(engine, reference):
    """Ids are the tokenizer's own, with the model's BOS in front; texts put together give the text back."""
    model = engine.model
    for text in (CLEAN, "x", "  two spaces\n\tand a tab", "naïve café 東京 🙂 \x00\x1b[31m [bold] red[/]"):
        row = model.row(text, False)
        assert list(row.ids) == model.tokenizer(text, add_special_tokens=False)["input_ids"] and not row.bos
        assert row.labels["END"] == len(row.ids) - 1 and len(row.texts) == len(row.ids)
        if "�" not in "".join(row.texts) and "\\x" not in "".join(row.texts):
            assert "".join(row.texts) == text
        if model.bos is not None:
            with_bos = model.row(text, True)
            assert with_bos.ids == (model.bos, *row.ids) and with_bos.bos and with_bos.texts[0] == model.info.bos
        assert model.row(text, None).bos == model.info.default_bos


def test_bytes_of_a_broken_character(engines):
    texts = engines["gpt2"].model.row("東", False).texts
    assert texts == ("\\xe6", "\\x9d", "\\xb1")
    assert engines["gpt2"].model.token_text(engines["gpt2"].model.info.d_vocab - 1).startswith("[unused ")


def test_labels(engine):
    check = engine.run(Check(PROMPT))
    texts = check.clean.texts
    assert [texts[check.clean.labels[k]] for k in ("IO", "S1", "S2", "END")] == [" Mary", " John", " John", " to"]
    assert check.clean.labels["S2"] > check.clean.labels["S1"]
    assert check.corrupt.texts[check.corrupt.labels["S2"]] == " Alice"
    other = engine.run(Check(replace(PROMPT, corrupt=SHORT)))
    assert set(other.corrupt.labels) == {"END"} and "patching by position needs equal lengths" in other.hints[0]


def test_bos(engines):
    gemma, neox, qwen = engines["gemma2"], engines["neox"], engines["qwen3"]
    bos = gemma.model.info.bos
    for engine in (gemma, neox):
        started = engine.run(Check(Prompt(bos + CLEAN)))
        assert started.clean.ids.count(engine.model.bos) == 1 and started.clean.bos
        assert not engine.model.info.default_bos or "starts with" in started.hints[0]
        twice = engine.run(Check(Prompt(bos + CLEAN, bos=True)))
        assert "BOS would come twice" in twice.problems[0]
    none = qwen.run(Check(Prompt(CLEAN, bos=True)))
    assert "no BOS token" in none.problems[0]
    assert gemma.run(Check(Prompt(CLEAN, bos=False))).clean.ids == gemma.run(Check(PROMPT)).clean.ids[1:]
    assert neox.run(Check(Prompt(CLEAN, bos=True))).clean.ids[1:] == neox.run(Check(PROMPT)).clean.ids


def test_bos_is_what_the_tokenizer_does(engine, arch):
    """Against Hugging Face's own call of the tokenizer; the zoo's config says how it was trained."""
    info, ids = engine.model.info, list(engine.run(Check(PROMPT)).clean.ids)
    own = AutoTokenizer.from_pretrained(engine.model.folder)(CLEAN)["input_ids"]
    assert ids == ([engine.model.bos, *own] if arch == "zoo" else own)
    why = {"zoo": "config says", "qwen3": "has none"}.get(arch, "adds it" if arch in ADDS_BOS else "adds none")
    assert why in info.bos_habit and info.bos_habit.startswith("BOS in front" if info.default_bos else "no BOS")


def test_other_tokens_that_a_tokenizer_puts_in_front_are_named():
    tok = tokenizer(bos=True)
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<|eos|> $A", special_tokens=[("<|eos|>", 1)])
    assert bos_habit(tok, None) == (False, "no BOS: this tokenizer puts <|eos|> in front, which is left out")
    assert bos_habit(tok, False) == (False, "no BOS: the model's config says that it was trained without")


def test_answers(engine):
    """One token each, as it follows the prompt; the hint about the leading space."""
    good = engine.run(Check(PROMPT))
    assert good.problems == () and good.hints == () and good.answers[0].texts == (" Mary",)
    bare = engine.run(Check(replace(PROMPT, answers=("Mary",))))
    assert any("' Mary' with a leading space is one token" in p or "' Mary' is the usual token" in p for p in (*bare.problems, *bare.hints))
    two = engine.run(Check(replace(PROMPT, answers=(" Mary Mary",))))
    assert two.problems == () and "answer ' Mary Mary' is 2 tokens (' Mary' ' Mary'): the first, ' Mary', stands for it" in two.hints[0]
    empty = engine.run(Check(replace(PROMPT, foils=("",))))
    assert "foil is empty" in empty.problems[0]
    both = engine.run(Check(replace(PROMPT, foils=(" Mary",))))
    assert "both answer and foil" in both.hints[0]
    bare = engine.run(Check(replace(PROMPT, answers=("she",))))
    assert bool(bare.problems) == (len(bare.answers[0].ids) > 1)  # refused where the word with its space is the one token that was meant


def test_prompts_that_stop_an_analysis(engine):
    n = engine.model.info.n_ctx
    long = " a" * (n + 1)
    for prompt, why in (
        (Prompt(""), "the clean prompt is empty"),
        (Prompt(CLEAN, ""), "the corrupted prompt is empty"),
        (Prompt(long, bos=False), f"the clean prompt has {n + 1} tokens and the model's context holds {n}"),
        (Prompt(CLEAN, long, bos=False), "the corrupted prompt has"),
        (Prompt(CLEAN, labels=(("S1", 900),)), "no token covers character 900"),
    ):
        problems = engine.run(Check(prompt)).problems
        assert any(why in p for p in problems), problems
        with pytest.raises(UserError) as error:
            engine.run(Run(Study(prompt)))
        assert why in str(error.value)
    engine.run(Run(Study(Prompt(" a" * n, bos=False))))


def test_tokens_without_an_embedding(folders, tmp_path):
    """A tokenizer that knows more tokens than the model has embeddings."""
    import transformers

    folder = copy(folders, tmp_path)
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    tok.add_tokens([f"<new{i}>" for i in range(9)])
    tok.save_pretrained(folder)
    engine = Engine(str(folder))
    check = engine.run(Check(Prompt("a <new8>", answers=("<new8>",))))
    assert "is not among the model's" in check.problems[0] and "can't predict" in check.problems[1]


# ------------------------------------------------------------------ hooks and cache


def test_unknown_hooks_are_errors(engine):
    for name in ("blocks.1.hook_nonsense", "blocks.99.hook_resid_pre", "blocks.0.attn.hook_result"):
        with pytest.raises(UserError, match=name):
            engine.model.forward(t.tensor([[1, 2]]), [name])
    assert engine.model.leaks() == 0


def test_hooks_go_even_when_one_fails(engines):
    model = engines["gpt2"].model

    def fail(x):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        model.forward(t.tensor([[1, 2, 3]]), ["blocks.0.hook_resid_pre"], [("blocks.1.hook_resid_pre", fail)])
    assert model.leaks() == 0


def test_cache_bound_and_order():
    cache = Cache(limit=100)
    for i in range(5):
        cache.put(((i,), (), "x"), t.zeros(10, dtype=t.float32))
    assert cache.size == 80 and len(cache.items) == 2
    assert cache.get(((3,), (), "x")) is not None
    cache.put(((9,), (), "x"), t.zeros(10))
    assert cache.get(((4,), (), "x")) is None and cache.get(((3,), (), "x")) is not None
    cache.put(((7,), (), "big"), t.zeros(1000))
    assert cache.get(((7,), (), "big")) is None and cache.size <= 100
    cache.put(((8,), (), "view"), t.zeros(1000)[:5])
    assert cache.items[((8,), (), "view")].untyped_storage().nbytes() == 20


def test_keypresses_do_not_run_the_model_again(engine):
    from techniques.attention.requests import Attention, HeadStats
    from techniques.lens.requests import Lens
    from vocabulary.nodes import parse_intervention

    engine.model.cache.clear()
    calls = []
    real = engine.model.forward
    engine.model.forward = lambda *a, **k: calls.append(1) or real(*a, **k)
    try:
        study = Study(PROMPT)
        engine.run(Run(study))
        assert len(calls) == 2
        for ask in (Lens(study), Lens(study, "corrupt"), Attention(study, 1), Attention(study, 2, "clean-corrupt"), HeadStats(study), Run(study)):
            engine.run(ask)
        assert len(calls) == 2
        under = Study(PROMPT, (parse_intervention("L1.resid_post=patch"),))
        for ask in (Run(under), Lens(under), Attention(under, 1, "now-clean")):
            engine.run(ask)
        assert len(calls) == 3
    finally:
        del engine.model.forward


def test_a_small_cache_changes_nothing(engine):
    wide = engine.run(Run(Study(PROMPT)))
    limit, engine.model.cache.limit = engine.model.cache.limit, 2000
    engine.model.cache.clear()
    try:
        narrow = engine.run(Run(Study(PROMPT)))
        assert engine.model.cache.size <= 2000
    finally:
        engine.model.cache.limit = limit
    np.testing.assert_array_equal(wide.clean.top_logits, narrow.clean.top_logits)


def test_chunks_halve_when_memory_runs_out():
    """A fake limit: more than three items at once do not fit."""
    seen, said = [], []

    def work(a: int, b: int) -> range:
        if b - a > 3:
            raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 1.00 GiB free.")
        return range(a, b)

    for part in in_chunks(20, 16, work, "runs"):
        (said if isinstance(part, Progress) else seen).append(part)
    assert [i for r in seen for i in r] == list(range(20))
    assert [p.text for p in said] == [f"out of memory at {n} runs at a time: going on with {n // 2}" for n in (16, 8, 4)] and all(p.notice for p in said)

    def never(a: int, b: int) -> None:
        raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB. GPU 0 has 1.00 GiB free.")

    with pytest.raises(UserError, match="9.7 GB more are needed and 1.1 GB are free. Shorten the prompt"):
        list(in_chunks(4, 4, never, "runs"))


def test_chunks_of_a_size_that_is_asked_for_and_work_with_pauses():
    """What fits is asked from item to item; out of memory in the middle of a chunk, after a pause, halves it too and is told."""
    told = []

    def work(a: int, b: int):
        yield Progress(a, 9, "a pause")
        if b - a > 2:
            raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
        return list(range(a, b))

    parts = list(Chunks("runs", lambda i: 5 if i < 6 else 1, told.append).over(9, work))
    assert [p for p in parts if isinstance(p, list)] == [[0, 1], [2, 3], [4, 5], [6], [7], [8]] and told == [2]
    assert sum(isinstance(p, Progress) and p.text == "a pause" for p in parts) == 7


def test_forward_out_of_memory_frees_the_cache(folders):
    engine = Engine(str(folders["gpt2"]))
    engine.run(Run(Study(Prompt(SHORT))))
    real, tries = engine.model.forward, []

    def forward(*args, **kwargs):
        tries.append(engine.model.cache.size)
        if len(tries) == 1:
            raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")
        return real(*args, **kwargs)

    engine.model.forward = forward
    engine.run(Run(Study(Prompt(CLEAN))))
    assert tries[0] > 0 and tries[1] == 0

    def never(*args, **kwargs):
        raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has 3.00 MiB free.")

    engine.model.forward = never
    with pytest.raises(UserError, match="out of memory on cuda:0: 1.1 GB more are needed and 3.1 MB are free"):
        engine.run(Run(Study(Prompt(CORRUPT))))


def test_every_architecture_is_here():
    assert len(ARCHS) == 6
