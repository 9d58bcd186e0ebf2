"""Scheduling without processes, the server as a process, and the command line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import CLEAN, CORRUPT, PROMPT, SHORT

from model import catalogue
from model.scheduler import Scheduler
from techniques.attention.requests import Attention, HeadStats
from techniques.identities.requests import Identities
from techniques.lens.requests import Lens
from techniques.output.requests import Run
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Prompt, Study
from vocabulary.requests import Check, Failure, Load, Models, Progress, Status
from vocabulary.wire import Frame, encode, read_sealed, sealed
from engine import Engine, main
from utils import ROOT


class Desk:
    """A scheduler whose requests are Runs; `k` says how many chunks one takes. Keeps what was sent and closed."""

    def __init__(self):
        self.sent: list[Frame] = []
        self.closed: list[int] = []
        self.scheduler = Scheduler(self.start, self.sent.append)

    def start(self, body: object):
        n = body.k if isinstance(body, Run) else 1
        try:
            for i in range(n):
                yield Progress(i, n)
            return Progress(n, n, "done")
        finally:
            if isinstance(body, Run):
                self.closed.append(body.k)

    def ask(self, ident: int, chunks: int, slot: str = "", priority: int = 1, body: object = None) -> None:
        self.scheduler.put(Frame("ask", ident, slot, priority, body or Run(Study(PROMPT), chunks)))

    def run(self, steps: int | None = None) -> list[tuple[int, str]]:
        """Step (until idle), and what was sent meanwhile."""
        first = len(self.sent)
        while steps is None or steps > 0:
            steps = None if steps is None else steps - 1
            if not self.scheduler.step():
                break
        return [(f.id, f.kind) for f in self.sent[first:]]


# ------------------------------------------------------------------ scheduling


def test_a_small_request_runs_between_two_chunks_of_a_long_one():
    desk = Desk()
    desk.ask(1, 5, priority=5)
    assert desk.run(2) == [(1, "progress")] * 2
    desk.ask(2, 1, priority=0)
    assert desk.run() == [(2, "progress"), (2, "result"), (1, "progress"), (1, "progress"), (1, "progress"), (1, "result")]


def test_equal_priorities_go_in_order():
    desk = Desk()
    for i in (1, 2, 3):
        desk.ask(i, 1)
    assert desk.run() == [(i, kind) for i in (1, 2, 3) for kind in ("progress", "result")]


def test_a_newer_request_in_a_slot_replaces_the_older():
    desk = Desk()
    desk.ask(1, 3, "lens")
    desk.ask(2, 3, "lens")
    desk.ask(3, 1, "attention")
    desk.ask(4, 1)
    desk.ask(5, 1)
    assert [(f.id, f.kind) for f in desk.sent] == [(1, "cancelled")] and desk.closed == []
    assert desk.run(2) == [(2, "progress")] * 2
    desk.ask(6, 1, "lens")
    assert desk.sent[-1].kind == "cancelled" and desk.sent[-1].id == 2 and desk.closed == [3]
    assert [i for i, kind in desk.run() if kind == "result"] == [3, 4, 5, 6]


def test_cancel_by_id():
    desk = Desk()
    desk.ask(1, 9)
    desk.ask(2, 1)
    desk.run(3)
    desk.scheduler.put(Frame("cancel", 1))
    desk.scheduler.put(Frame("cancel", 77))
    assert desk.closed == [9] and desk.run() == [(2, "progress"), (2, "result")]
    assert [f.kind for f in desk.sent if f.id == 1] == ["progress"] * 3 + ["cancelled"]


def test_replies_carry_id_slot_and_priority():
    desk = Desk()
    desk.ask(8, 1, "heads", 4)
    desk.run()
    assert {(f.id, f.slot, f.priority) for f in desk.sent} == {(8, "heads", 4)}


def test_errors_are_results(capsys):
    sent = []

    def start(body: object):
        yield Progress(0, 1)
        if body.k == 1:
            raise UserError("type a text")
        raise ValueError("two\nlines")

    scheduler = Scheduler(start, sent.append)
    for i in (1, 2):
        scheduler.put(Frame("ask", i, body=Run(Study(PROMPT), i)))
    while scheduler.step():
        pass
    bodies = {f.id: f.body for f in sent if f.kind == "error"}
    assert bodies == {1: Failure("type a text", "user"), 2: Failure("ValueError: two lines", "internal")}
    assert "Traceback" in capsys.readouterr().err


def test_a_leaked_hook_is_an_error_and_goes(engines, capsys):
    engine, sent = engines["gpt2"], []
    scheduler = Scheduler(engine.jobs, sent.append, engine.check_hooks)
    engine.model.points["blocks.0.hook_resid_pre"].add_hook(lambda x, hook: None)
    for i in (1, 2):
        scheduler.put(Frame("ask", i, body=Check(PROMPT)))
    while scheduler.step():
        pass
    assert [f.kind for f in sent] == ["error", "result"] and "1 hooks were left" in sent[0].body.message
    assert engine.model.leaks() == 0 and "AssertionError" in capsys.readouterr().err


def test_out_of_memory_is_an_error_in_words(folders, monkeypatch):
    import torch as t

    engine = Engine(str(folders["gpt2"]))
    with monkeypatch.context() as patch:

        def never(self, x):
            raise t.OutOfMemoryError("CUDA out of memory. Tried to allocate 7.00 GiB. GPU 0 has 1.00 GiB free.")

        patch.setattr(type(engine.model), "unembed", never)
        for ask in (Run(Study(PROMPT)), Lens(Study(PROMPT)), Identities(Study(PROMPT))):
            with pytest.raises(UserError, match="out of memory on cuda:0: 7.5 GB more are needed and 1.1 GB are free"):
                engine.run(ask)
    assert engine.run(Run(Study(PROMPT))).clean.metric is not None


def test_requests_wait_for_a_load():
    """What needs a model waits while one loads, whatever its priority; what needs none does not."""
    desk = Desk()
    desk.ask(1, 2, priority=0)
    desk.run(1)
    desk.ask(2, 0, priority=5, body=Load("a"))
    desk.ask(3, 1, priority=0)
    desk.ask(4, 0, priority=0, body=Status())
    order = [i for i, kind in desk.run() if kind == "result"]
    assert order == [4, 2, 1, 3]


def test_a_new_model_drops_what_ran_on_the_old():
    desk = Desk()
    desk.ask(1, 5)
    desk.ask(2, 5)
    desk.run(1)
    desk.scheduler.behind()
    assert [f.id for f in desk.sent if f.kind == "cancelled"] == [1]
    assert (2, "result") in desk.run()


def test_an_engine_in_the_scheduler(engines):
    """Real analyses in chunks: a lens in parts, a small run between them, and a superseded lens."""
    from model import metrics

    sent = []
    engine = engines["llama"]
    scheduler = Scheduler(engine.jobs, sent.append, engine.check_hooks)
    whole = engine.run(Lens(Study(PROMPT)))
    bound, metrics.VOCAB_BYTES = metrics.VOCAB_BYTES, 4 * engine.model.info.d_vocab * 15
    try:
        scheduler.put(Frame("ask", 1, "lens", 5, Lens(Study(PROMPT))))
        scheduler.step()
        scheduler.step()
        scheduler.put(Frame("ask", 2, "run", 0, Run(Study(PROMPT))))
        scheduler.step()
        assert [(f.id, f.kind) for f in sent] == [(1, "partial"), (1, "partial"), (2, "result")]
        np.testing.assert_allclose(sent[1].body.entropy[0], whole.entropy[1], atol=1e-5)
        scheduler.put(Frame("ask", 3, "lens", 5, Lens(Study(PROMPT), "corrupt")))
        assert (sent[-1].id, sent[-1].kind) == (1, "cancelled") and engine.model.leaks() == 0
        while scheduler.step():
            pass
        assert sent[-1].id == 3 and sent[-1].kind == "result" and sent[-1].body.points == whole.points
    finally:
        metrics.VOCAB_BYTES = bound
    for frame in sent:
        assert read_sealed(__import__("io").BytesIO(sealed(encode(frame))).read).id == frame.id


# ------------------------------------------------------------------ the engine in Python


def test_without_a_model():
    engine = Engine()
    for ask in (Check(PROMPT), Run(Study(PROMPT)), Lens(Study(PROMPT)), Attention(Study(PROMPT)), HeadStats(Study(PROMPT)), Identities(Study(PROMPT))):
        with pytest.raises(UserError, match="no model is loaded"):
            engine.run(ask)
    assert engine.run(Status()).memory > 1 << 20
    choices = {c.name: c for c in engine.run(Models()).choices}
    assert choices["zoo"].where == "embedded" and "needs download" in choices["EleutherAI/pythia-70m"].note


def test_models_lists_folders_and_cache(tmp_path, monkeypatch, folders):
    import huggingface_hub

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(folders["gpt2"])
    snapshot = tmp_path / "hub" / "models--EleutherAI--pythia-70m" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    monkeypatch.setattr(catalogue, "ROOT", tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    choices = {c.name: c.where for c in Engine().run(Models()).choices}
    assert choices[str(tmp_path / "models" / "mine")] == "folder" and choices["EleutherAI/pythia-70m"] == "hub cache" and choices["gpt2"] == "hub"


def test_status_says_what_the_cache_holds(engines):
    engine = engines["gpt2"]
    engine.model.cache.clear()
    engine.run(Run(Study(PROMPT, (parse_intervention("L1H1=zero"),))))
    status = engine.run(Status())
    assert status.cache == sum(v.nbytes for v in engine.model.cache.items.values()) > 0 and status.cache_limit == 512 << 20
    assert any("L1H1=zero" in line for line in status.entries) and any("nothing done" in line for line in status.entries)


# ------------------------------------------------------------------ the server


class Server:
    def __init__(self, *args: str):
        self.process = subprocess.Popen(
            [sys.executable, *(args or ("engine.py", "serve"))], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def ask(self, *frames: Frame) -> None:
        self.process.stdin.write(b"".join(sealed(encode(f)) for f in frames))
        self.process.stdin.flush()

    def read(self) -> Frame | None:
        return read_sealed(self.process.stdout.read)

    def until(self, ident: int, kinds: tuple[str, ...] = ("result", "error", "cancelled")) -> list[Frame]:
        frames = []
        while not frames or frames[-1].id != ident or frames[-1].kind not in kinds:
            frames.append(self.read())
            assert frames[-1] is not None, "the server went"
        return frames


@pytest.fixture(scope="module")
def server():
    """One server for the tests that leave it alive; its library prints to stdout on purpose."""
    noisy = (
        "import sys, engine; real = engine.Engine.status; engine.Engine.status = lambda s: (print('noise on stdout', flush=True), real(s))[1]; engine.serve()"
    )
    server = Server("-c", noisy)
    yield server
    server.process.stdin.close()
    assert server.process.wait(30) == 0
    assert b"noise on stdout" in server.process.stderr.read()


def test_hello_load_run(server, engines):
    hello = server.read()
    assert hello.kind == "hello"
    server.ask(Frame("ask", 1, "load", 0, Load("zoo")), Frame("ask", 2, "run", 1, Run(Study(PROMPT))), Frame("ask", 3, "lens", 1, Lens(Study(PROMPT))))
    frames = server.until(3)
    words = [f.body.text for f in frames if f.kind == "progress" and f.id == 1]
    assert words[:2] == ["importing torch", "importing TransformerLens"] and any("reading weights" in w for w in words) and "checking" in words
    results = {f.id: f.body for f in frames if f.kind == "result"}
    assert results[1].name == "zoo" and all(c.ok for c in results[1].checks)
    assert {f.model for f in frames if f.id > 1} == {results[1].key} and {f.model for f in frames if f.kind == "progress" and f.id == 1} == {""}
    here = engines["zoo"]
    want, lens = here.run(Run(Study(PROMPT))), here.run(Lens(Study(PROMPT)))
    np.testing.assert_allclose(results[2].clean.top_logits, want.clean.top_logits, atol=1e-4)
    assert results[2].normalised == pytest.approx(want.normalised, abs=1e-4) and results[2].texts == want.texts
    np.testing.assert_allclose(results[3].kl, lens.kl, atol=1e-4)


def test_errors_and_noise_do_not_harm_the_protocol(server):
    server.ask(Frame("ask", 10, "run", 1, Run(Study(Prompt("")))), Frame("ask", 11, "", 1, Status()))
    frames = {f.id: f for f in server.until(11)}
    server.ask(Frame("ask", 12, "", 1, Load("/nowhere/at all")))
    frames |= {f.id: f for f in server.until(12)}
    assert frames[10].kind == "error" and frames[10].body == Failure("the clean prompt is empty: type a text", "user")
    assert frames[11].kind == "result" and frames[11].body.memory > 1 << 20
    assert frames[12].kind == "error" and "no folder at" in frames[12].body.message
    server.ask(Frame("ask", 13, "", 1, Check(PROMPT)))
    assert server.until(13)[-1].body.clean.texts[-1] == " to"


def test_a_request_that_can_not_be_read_is_an_error(server):
    """Of another version or a technique that the engine does not have: said, and the engine goes on."""
    wrong = encode(Frame("ask", 30, "", 1, Check(PROMPT, "diff")))
    for other in (wrong.replace(b"\xa5Check", b"\xa5Chuck"), wrong.replace(b"\xa4diff", b"\xa4daff").replace(b"\x1e", b"\x1f", 1)):
        server.process.stdin.write(sealed(other))
    server.ask(Frame("ask", 32, "", 1, Status()))
    frames = {f.id: f for f in server.until(32)}
    assert frames[30].kind == "error" and "an unknown message 'Chuck'" in frames[30].body.message
    assert frames[31].kind == "error" and "a Check that can't be read" in frames[31].body.message and frames[32].kind == "result"


def test_a_superseded_request(server):
    study = Study(PROMPT)
    server.ask(*(Frame("ask", 20 + i, "lens", 1, Lens(study)) for i in range(4)))
    last = {f.id: f.kind for f in server.until(23)}
    assert last[23] == "result" and set(last.values()) <= {"result", "cancelled"}


def test_a_request_before_any_model():
    server = Server()
    try:
        assert server.read().kind == "hello"
        server.ask(Frame("ask", 1, "", 1, Run(Study(PROMPT))), Frame("ask", 2, "", 1, Models()))
        frames = server.until(2)
        assert frames[0].body == Failure("no model is loaded: load one first", "user")
        server.process.stdin.close()
        assert server.process.wait(30) == 0
        assert server.read() is None
    finally:
        server.process.kill()
        server.process.wait()


def test_hello_comes_before_torch():
    """The hello, and the answer to what is there, need nothing heavy: that is imported in a thread meanwhile."""
    code = "import sys, engine; engine.Engine.imports = lambda s: (); real = engine.Engine.status; engine.Engine.status = lambda s: (print([m for m in ('torch', 'transformers', 'tyro') if m in sys.modules], file=sys.stderr), real(s))[1]; engine.serve()"
    server = Server("-c", code)
    assert server.read().kind == "hello"
    server.ask(Frame("ask", 1, "", 1, Status()))
    server.until(1)
    server.process.stdin.close()
    server.process.wait(30)
    assert server.process.stderr.read().strip() == b"[]"


def test_garbage_on_stdin_ends_it():
    server = Server()
    assert server.read().kind == "hello"
    server.process.stdin.write(b"hello there, this is a terminal\n")
    server.process.stdin.flush()
    assert server.process.wait(30) == 1
    assert b"is not Loupe's wire" in server.process.stderr.read()


def test_killed(server):
    """kill -9 leaves a clean end of the stream or a cut frame, never a hang."""
    other = Server()
    assert other.read().kind == "hello"
    other.process.kill()
    assert other.process.wait(30) == -9
    assert other.read() is None


# ------------------------------------------------------------------ the command line


def call(capsys, *args: str) -> tuple[int, str, str]:
    code = main(list(args))
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.mark.parametrize("name, kind", [("run", "clean"), ("lens", "points"), ("attention", "pattern"), ("heads", "stats"), ("check", "rows")])
def test_json(capsys, folders, name, kind):
    code, out, err = call(
        capsys, name, "--model", str(folders["llama"]), "--clean", CLEAN, "--corrupt", CORRUPT, "--answer", " Mary", "--foil", " John", "--json"
    )
    assert code == 0 and err == "" and out.count("\n") == 1
    assert kind in json.loads(out)


@pytest.mark.parametrize("name", ["run", "lens", "attention", "heads", "check"])
def test_tables(capsys, folders, name):
    """Readable, with odd tokens shown harmlessly."""
    clean = CLEAN + " [red]x[/] \x1b[31m"
    code, out, _ = call(capsys, name, "--model", str(folders["gpt2"]), "--clean", clean, "--answer", " Mary", "--foil", " John")
    assert code == 0 and "gpt2" in out and "\x1b" not in out and len(out.splitlines()) > 5


def test_values_of_a_table(capsys, engines, folders):
    study = Study(PROMPT, (parse_intervention("L1H2=patch"), parse_intervention("L0.mlp@-1=scale:0.5")))
    want = engines["gpt2"].run(Run(study))
    words = ("--corrupt", CORRUPT, "--answer", " Mary", "--foil", " John", "--do", "L1H2=patch", "L0.mlp@-1=scale:0.5")
    code, out, _ = call(capsys, "run", "--model", str(folders["gpt2"]), "--clean", CLEAN, *words)
    assert (
        code == 0 and f"clean {want.clean.metric:.4f}  corrupted {want.corrupt.metric:.4f}  now {want.now.metric:.4f}  normalised {want.normalised:.4f}" in out
    )
    assert "now = clean under L1H2=patch, L0.mlp@-1=scale:0.5" in out


def test_prompt_sets(capsys, folders, tmp_path):
    file = tmp_path / "set.jsonl"
    rows = [{"clean": CLEAN, "corrupt": CLEAN.replace("John gave", f"{n} gave"), "answer": " Mary", "foil": " John"} for n in ("Alice", "Tom")]
    file.write_text("\n".join(json.dumps(r) for r in rows))
    code, out, _ = call(capsys, "run", "--model", str(folders["qwen3"]), "--set", str(file), "--do", "L1.mlp=mean", "--json")
    assert code == 0 and json.loads(out)["now"]["metric"] != json.loads(out)["clean"]["metric"]


def test_bad_input(capsys, folders):
    model = ("--model", str(folders["gpt2"]))
    for args, why in (
        (("run", *model, "--clean", ""), "the clean prompt is empty"),
        (("lens", *model, "--do", "L9H9=zero"), "the model has layers 0 to 2"),
        (("lens", *model, "--do", "L9H9"), "is not an intervention"),
        (("run", *model, "--answer", "Mary"), "with a leading space is one token"),
        (("run", *model, "--corrupt", SHORT, "--do", "L1H1=patch"), "15 tokens and corrupted 14"),
        (("run", *model, "--set", "/no/such/set.jsonl"), "no prompt set at"),
        (("check", "/no/such/model here"), "no folder at"),
    ):
        code, out, err = call(capsys, *args)
        assert code == 2 and out == "" and why in err and err.count("\n") == 1, (args, err)


@pytest.mark.slow
def test_check_fails_on_a_broken_model(capsys, folders, monkeypatch):
    from model import bridge as model

    code, out, err = call(capsys, "check", str(folders["gemma2"]))
    assert code == 0 and "BROKEN" not in out
    monkeypatch.setattr(model.Model, "norm", lambda self, x: x)
    code, out, err = call(capsys, "check", str(folders["gemma2"]))
    assert code == 1 and "BROKEN" in out and "identity broken: lens at the last point = logits" in err


@pytest.mark.slow
def test_as_a_program():
    done = subprocess.run(
        [sys.executable, "engine.py", "run", "--model", "zoo", "--answer", " Mary", "--foil", " John", "--json"], cwd=ROOT, capture_output=True, env=os.environ
    )
    assert done.returncode == 0 and b"Error" not in done.stderr, done.stderr
    assert json.loads(done.stdout)["clean"]["tokens"]["texts"][-1] == " to"
