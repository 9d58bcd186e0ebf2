"""Chats: the same ids as the tokenizer's own apply_chat_template, Hugging Face's logits on them, template tokens, labels, sets, the command line, scripts, sessions."""

import json
from dataclasses import replace

import pytest
import torch as t
from conftest import build
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from engine import Engine
from vocabulary.script import python_script
from screen.session import State
from techniques.circuits.drawings import circuit_script
from techniques.circuits.requests import Score
from techniques.output.requests import Run
from techniques.shell import read_command
from test_scripts import printed
from vocabulary.chat import as_typed, label_json, messages, read_typed, ROLES, text_json, Turn
from vocabulary.circuit import Circuit
from vocabulary.nodes import parse_intervention, UserError
from vocabulary.prompts import Prompt, Study, as_chat, read_prompt
from vocabulary.requests import Load
from vocabulary.wire import from_json, to_json

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # BOS in its text, contents trimmed, the system's inside the user's, turns that must alternate
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}"
    "{% for m in loop_messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + m['content'] if loop.index0 == 0 and system else m['content'] %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
SHOUTS = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | upper + '\n' }}{% endfor %}"
TALK = (Turn("system", "she gave Tom milk"), Turn("user", "When Mary and John went to the store, John gave a drink to"))
PREFIX = (*TALK, Turn("assistant", "Mary and"))
CHATS = (TALK, TALK[1:], PREFIX, (*PREFIX, Turn("user", "  red green blue\n"), Turn("assistant", "a drink ")), (Turn("user", "Mary"),))


TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "gemma": GEMMA, "shouts": SHOUTS, "none": None}


class Made(dict):
    """One small model; made[name] is its engine with that chat template."""

    def __getitem__(self, name: str) -> Engine:
        engine = super().__getitem__("engine")
        engine.model.tokenizer.chat_template = TEMPLATES[name]
        engine.model.tokens.rows.clear()
        return engine


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = build("llama", tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    return Made(engine=Engine(str(folder)))


@pytest.fixture(scope="module")
def theirs(made):
    """Hugging Face's own model and tokenizer, of the same folder."""
    folder = made["none"].model.folder
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval(), AutoTokenizer.from_pretrained(folder)


def plain(tokenizer, name: str, chat) -> list[int]:
    """What transformers alone makes of a chat."""
    prefix = chat[-1].role == "assistant"
    how = {"add_generation_prompt": not prefix, "continue_final_message": prefix}
    return tokenizer.apply_chat_template(messages(chat), chat_template=TEMPLATES[name], tokenize=True, return_dict=False, **how)


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3", "gemma", "shouts"])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_ids_are_those_of_transformers_and_logits_those_of_hugging_face(made, theirs, name, chat):
    engine = made[name]
    if name == "shouts" and chat[-1].role == "assistant" or name == "gemma" and chat[0].role == "system":
        with pytest.raises(UserError, match="the chat template refuses these turns: " + ("System role not supported" if name == "gemma" else "continue_final")):
            engine.model.row(chat, None)
        return
    row, want = engine.model.row(chat, None), plain(theirs[1], name, chat)
    assert list(row.ids) == want and row.labels["END"] == len(want) - 1
    assert row.bos is (name not in ("chatml", "shouts")) is (want[0] == engine.model.bos) and want[1] != engine.model.bos
    got = engine.model.forward(t.tensor([row.ids]), keep=0)[0]
    with t.no_grad():
        assert (got - theirs[0](t.tensor([want])).logits).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["chatml", "llama2", "llama3"])
@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
def test_template_tokens_are_those_that_hold_nothing_of_a_turn(made, name, chat):
    """Independent: the contents, found by hand in the decoded text, are exactly what the other tokens hold."""
    row = made[name].model.row(chat, None)
    rest = [i for i in range(len(row.ids)) if i not in row.template]
    assert row.template and rest
    own = "".join(made[name].model.tokenizer.decode([row.ids[i]]) for i in rest)
    want = "".join(turn.content.strip() if name != "chatml" or turn is chat[-1] else turn.content for turn in chat)
    assert own.replace(" ", "") == want.replace(" ", "")
    assert (row.labels["END"] in row.template) is (chat[-1].role != "assistant")


def test_labels_count_characters_of_the_turns(made):
    line = {"messages": messages(TALK), "labels": {"IO": [1, 5], "Tom": [0, 9]}, "answer": "Mary"}
    prompt = read_prompt(line)
    for name in ("chatml", "llama2"):
        row = made[name].model.check(prompt).clean
        assert [row.texts[row.labels[k]] for k in ("IO", "Tom")] == [" Mary", " Tom"]
    check = made["shouts"].model.check(prompt)
    assert "a label's place in them is not known" in check.problems[0]
    with pytest.raises(UserError, match="pair .message, character offset"):
        read_prompt(line | {"labels": {"IO": 5}})
    with pytest.raises(UserError, match="pair .message, character offset"):
        read_prompt(line | {"labels": {"IO": [2, 0]}})


def test_what_can_not_be_asked_is_one_line(made):
    row = lambda name, chat, bos=None: made[name].model.row(chat, bos)  # noqa: E731
    for call, words in (
        (lambda: row("none", TALK), "no chat template"),
        (lambda: row("llama2", (TALK[1], TALK[1])), "the chat template refuses these turns: Conversation roles must alternate"),
        (lambda: row("llama2", (TALK[0], TALK[0], TALK[1])), "must alternate"),
        (lambda: row("chatml", (*TALK, Turn("assistant", " "))), "the assistant's turn at the end is empty"),
        (lambda: row("chatml", TALK, True), "as its template has it, without BOS"),
        (lambda: row("llama2", TALK, False), "as its template has it, with BOS"),
        (lambda: read_prompt({"messages": [{"role": "narrator", "content": "x"}]}), "roles are system"),
        (lambda: read_prompt({"messages": []}), "a chat is a list of messages"),
        (lambda: read_prompt({"clean": [{"role": "user", "content": 3}]}), "message 0 of the chat"),
    ):
        with pytest.raises(UserError, match=words) as error:
            call()
        assert "\n" not in str(error.value)
    assert row("llama2", TALK, True) == row("llama2", TALK)


def test_answers_follow_the_rendered_text(made, theirs):
    """In ChatML the answer begins after a newline, and so without a space."""
    check = made["chatml"].model.check(Prompt(TALK, None, ("a",), (" a",)))
    own = made["chatml"].model.tokenizer
    assert [r.ids for r in (*check.answers, *check.foils)] == [tuple(own.encode(x, add_special_tokens=False)) for x in ("a", " a")]
    assert check.clean.texts[-1] == "\n" and not check.problems
    assert [h for h in check.hints if "foil ' a' has a leading space" in h] and not [h for h in check.hints if h.startswith("answer")]
    run = made["chatml"].run(Run(Study(Prompt(TALK, None, ("a",), (" a",)))))
    with t.no_grad():
        logits = theirs[0](t.tensor([plain(theirs[1], "chatml", TALK)])).logits[0, -1]
    assert run.now.metric == pytest.approx(float(logits[check.answers[0].ids[0]] - logits[check.foils[0].ids[0]]), abs=1e-4)


turns = st.builds(
    Turn,
    st.sampled_from(ROLES),
    st.text(st.sampled_from("a \\\n:\n") | st.sampled_from("usertoolé"), max_size=12)
    | st.sampled_from(["\nuser:", "user:\n", "\n", "x\nuser: y", "\\user: z\n\\\\tool:"]),
)


@given(st.lists(turns, min_size=1, max_size=4).map(tuple))
def test_what_is_typed_is_read_back(chat):
    assert read_typed(as_typed(chat)) == chat


def test_turns_are_typed_loosely_too():
    want = (Turn("user", "When"), Turn("assistant", "it"))
    assert read_typed("When\nassistant: it") == read_typed("user:When\nassistant:it") == read_typed("user:\nWhen\nassistant:\nit") == want
    assert read_typed("user:\nassistant: it") == (Turn("user", ""), Turn("assistant", "it")) and read_typed("my user: x") == (Turn("user", "my user: x"),)


def test_a_chat_goes_through_json_as_messages():
    prompt = Prompt(PREFIX, TALK, ("Mary",), (), (("IO", 22),))
    assert json.loads(json.dumps(to_json(prompt)))["clean"] == messages(PREFIX)
    assert from_json(json.loads(json.dumps(to_json(prompt))), Prompt) == prompt
    for wrong in ({"clean": [{"role": "user"}]}, {"clean": [3]}, {"clean": "a", "corrupt": [{"role": "user", "content": 3}]}, {"clean": {}}):
        with pytest.raises(UserError):
            from_json(wrong, Prompt)


def test_plain_text_to_chat_and_back():
    prompt = Prompt("When Mary", "When Anna", (" a",), (), (("IO", 5),), True)
    chat = as_chat(prompt, True)
    assert (chat.clean, chat.corrupt, chat.labels, chat.bos) == ((Turn("user", "When Mary"),), (Turn("user", "When Anna"),), (("IO", 5),), None)
    assert as_chat(chat, False) == Prompt("When Mary", "When Anna", (" a",), (), (("IO", 5),))
    long = Prompt((Turn("system", "be brief"), *chat.clean, Turn("assistant", "She")), None, (), (), (("IO", 13), ("be", 0)))
    assert as_chat(long, False) == Prompt("When Mary", None, (), (), (("IO", 5),))


def test_a_set_of_chats_and_what_is_copied_of_it():
    line = {"clean": messages(PREFIX), "corrupt": messages(TALK), "answer": ["Mary"], "labels": {"IO": [1, 5], "P": [2, 0]}, "corrupt_labels": {"IO": [1, 5]}}
    prompt = read_prompt(line)
    assert prompt.clean == PREFIX and prompt.corrupt == TALK and dict(prompt.labels) == {"IO": 22, "P": 17 + 58} and dict(prompt.corrupt_labels) == {"IO": 22}
    assert {name: label_json(place, prompt.clean) for name, place in prompt.labels} == line["labels"]
    assert text_json(prompt.clean) == line["clean"] and text_json("x") == "x" and label_json(3, "text") == 3


def test_a_chat_on_the_command_line(made, tmp_path):
    words = ["run", "--clean", "When Mary", "--answer", "a"]
    study = lambda *more: read_command([*words, *more]).study()  # noqa: E731
    assert study("--chat").prompt.clean == (Turn("user", "When Mary"),)
    assert study("--system", "red").prompt.clean == (Turn("system", "red"), Turn("user", "When Mary"))
    assert study("--chat", "--corrupt", "user: Anna\nassistant: it").prompt.corrupt == (Turn("user", "Anna"), Turn("assistant", "it"))
    assert study("--chat", "--corrupt", json.dumps(messages(PREFIX))).prompt.corrupt == PREFIX
    with pytest.raises(UserError, match="a system's turn of its own"):
        study("--system", "red", "--corrupt", "system: blue\nuser: x")
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps({"clean": "When Mary", "labels": {"IO": 5}}) + "\n" + json.dumps({"messages": messages(PREFIX)}) + "\n")
    study = read_command(["run", "--set", str(file), "--chat"]).study()
    assert study.prompt == Prompt((Turn("user", "When Mary"),), labels=(("IO", 5),)) == study.prompt_set[0]
    assert study.prompt_set[1].clean == PREFIX
    with pytest.raises(UserError, match="the set has chats"):
        read_command(["run", "--set", str(file), "--system", "red"]).study()
    file.write_text(json.dumps({"clean": "When Mary", "labels": {"IO": 5}}))
    study = read_command(["run", "--set", str(file), "--system", "red"]).study()
    assert study.prompt == Prompt((Turn("system", "red"), Turn("user", "When Mary")), labels=(("IO", 8),)) == study.prompt_set[0]


@pytest.mark.parametrize("name", ["chatml", "llama2"])
def test_scripts_ask_the_template_and_print_the_number(made, name):
    engine = made[name]
    engine.model.tokenizer.save_pretrained(engine.model.folder)
    other = Prompt(PREFIX, (*TALK, Turn("assistant", "she and")), ("a",), ("it",))
    state = State(Load(str(engine.model.folder)), other, prompt_set=(other, replace(other, corrupt=PREFIX)), interventions=(parse_intervention("L1H1=mean"),))
    run = engine.run(Run(state.study))
    assert printed(python_script(state, engine.model.info, run)) == pytest.approx(run.now.metric, abs=1e-4)
    circuit = Circuit("c", str(engine.model.folder), ("L0H1", "L1H2", "L2H0@3"))
    study = Study(other, prompt_set=state.prompt_set)
    want = engine.run(Score(study, circuit)).faithfulness.mean
    assert printed(circuit_script(circuit, study, engine.model.info, state.model)) == pytest.approx(want, abs=1e-4)
    with pytest.raises(UserError, match="labels in plain text only"):
        circuit_script(replace(circuit, nodes=("L0H1@IO",)), study, engine.model.info, state.model)
    code = python_script(state, engine.model.info, run).replace("When Mary", "Then Mary")
    with pytest.raises(AssertionError, match="another chat template"):
        printed(code)
