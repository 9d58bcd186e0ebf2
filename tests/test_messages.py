"""The address grammar and the wire: round trips, and garbage as a clear error."""

import asyncio
import dataclasses
import io
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import msgspec
from techniques.attention.requests import Attention, HeadStats, HeadStatsResult
from techniques.identities.requests import Identities
from techniques.lens.requests import Lens, LensResult
from techniques.output.requests import Run
from vocabulary.nodes import AddressError, format_node, Intervention, LABEL, Node, OPS, parse_intervention, parse_node, PARTS, RESIDS, UserError
from vocabulary.prompts import Metric, METRICS, Prompt, read_prompt_set, Study, TokenRow, WHICH
from vocabulary.requests import Check, Load, Models, Status
from vocabulary.wire import DTYPES, encode, Frame, from_json, KINDS, read_frame, read_sealed, read_sealed_async, sealed, to_json, WireError

settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

small = st.integers(0, 10_000)
positions = st.none() | st.integers(-5000, 5000) | st.from_regex(rf"\A{LABEL}\Z", fullmatch=True)
nodes = st.one_of(
    st.builds(Node, st.just("embed"), pos=positions),
    st.builds(Node, st.sampled_from((*RESIDS, "attn", "mlp")), small, pos=positions),
    st.builds(Node, st.just("head"), small, small, st.sampled_from(PARTS), pos=positions),
    st.builds(Node, st.sampled_from(("neuron", "sae")), small, index=small, pos=positions),
)
factors = st.floats(allow_nan=False, allow_infinity=False)
interventions = st.one_of(
    st.builds(Intervention, nodes, st.sampled_from([o for o in OPS if o not in ("scale", "set", "add", "steer")])),
    st.builds(Intervention, nodes, st.sampled_from(["scale", "set", "add"]), factors),
    st.builds(Intervention, nodes, st.just("steer"), factors, st.from_regex(r"\A[\w./:-]{1,20}\Z", fullmatch=True)),
)
texts = st.text(max_size=12)
prompts = st.builds(
    Prompt,
    texts,
    st.none() | texts,
    st.lists(texts, max_size=2).map(tuple),
    st.lists(texts, max_size=2).map(tuple),
    st.lists(st.tuples(st.from_regex(rf"\A{LABEL}\Z", fullmatch=True), small), max_size=2).map(tuple),
    st.none() | st.booleans(),
)
metrics = st.builds(Metric, st.sampled_from(list(METRICS)), st.integers(-50, 50) | st.sampled_from(("END", "S2")))
studies = st.builds(
    Study, prompts, st.lists(interventions, max_size=3).map(tuple), st.sampled_from(("clean", "corrupt")), metrics, st.lists(prompts, max_size=2).map(tuple)
)
requests = st.one_of(
    st.builds(Load, texts, st.none() | texts, texts, texts, st.none() | texts),
    st.builds(Check, prompts),
    st.builds(Run, studies, small),
    st.builds(Lens, studies, st.sampled_from(WHICH), st.lists(texts, max_size=3).map(tuple), small),
    st.builds(Attention, studies, small, st.sampled_from(WHICH)),
    st.builds(HeadStats, studies, st.sampled_from(WHICH), st.sampled_from(("prompt", "random")), st.none() | st.tuples(small, small)),
    st.builds(Identities, studies),
    st.just(Status()),
    st.just(Models()),
)
frames = st.builds(Frame, st.sampled_from(KINDS), st.integers(0, 2**40), texts, st.integers(-5, 5), st.none() | requests, texts)


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    data = draw(st.binary(min_size=np.dtype(dtype).itemsize * math.prod(shape), max_size=np.dtype(dtype).itemsize * math.prod(shape)))
    return np.frombuffer(data, dtype).reshape(shape)


def read(data: bytes) -> Frame | None:
    return read_frame(io.BytesIO(data).read)


def equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return a == b or a != a and b != b


# ------------------------------------------------------------------ addresses


@given(nodes)
def test_node_round_trip(node):
    assert parse_node(format_node(node)) == node


@given(interventions)
def test_intervention_round_trip(intervention):
    assert parse_intervention(str(intervention)) == intervention


@given(st.text(max_size=20))
def test_any_text_is_a_node_or_an_address_error(text):
    try:
        node = parse_node(text)
    except AddressError as error:
        assert "\n" not in str(error)
    else:
        assert parse_node(str(node)) == node


@pytest.mark.parametrize(
    "text, node",
    [
        ("L9H9", Node("head", 9, 9)),
        ("9.9", Node("head", 9, 9)),
        (" l9h9.q@S2 ", Node("head", 9, 9, "q", pos="S2")),
        ("9.9.k@-1", Node("head", 9, 9, "k", pos=-1)),
        ("L0H10.pattern@*", Node("head", 0, 10, "pattern")),
        ("L3.mlp@10", Node("mlp", 3, pos=10)),
        ("L3.mlp.n412", Node("neuron", 3, index=412)),
        ("L8.sae.f1234@END", Node("sae", 8, index=1234, pos="END")),
        ("L5.resid_mid", Node("resid_mid", 5)),
        ("embed@0", Node("embed", pos=0)),
    ],
)
def test_addresses(text, node):
    assert parse_node(text) == node


@pytest.mark.parametrize(
    "text", ["", "L9", "H9", "L9H", "L-1H2", "L9H9@", "L9H9@@1", "L9H9@1.5", "L9.z", "resid_pre", "L9H9 @1x", "L3.mlp.412", "embed.q", "9"]
)
def test_not_addresses(text):
    with pytest.raises(AddressError, match="is not a node"):
        parse_node(text)


@pytest.mark.parametrize(
    "text, why",
    [
        ("L9H9", "is not an intervention"),
        ("L9H9=", "is not an intervention"),
        ("L9H9=boil", "is not an intervention"),
        ("L9H9=scale", "scale needs a factor"),
        ("L9H9=zero:1", "the other operations take none"),
        ("L9H9=scale:x", "is not a number"),
        ("L9H9=add", "add a number"),
        ("L9H9=noise:-1", "a positive number"),
        ("L9H9=scale:inf", "must be finite"),
        ("L9H9=scale:nan", "must be finite"),
        ("nothing=zero", "is not a node"),
    ],
)
def test_not_interventions(text, why):
    with pytest.raises(AddressError, match=why):
        parse_intervention(text)


# ------------------------------------------------------------------ the wire


@given(frames)
def test_frame_round_trip(frame):
    assert equal(read(encode(frame)), frame)


@given(arrays(), arrays(), st.dictionaries(small, texts, max_size=3))
def test_arrays_round_trip(a, b, words):
    body = LensResult(TokenRow((1,), ("x",), {"END": 0}, True), ("p",), a, b, a, a, b, b, a, words, "c")
    assert equal(read(encode(Frame("result", 1, "s", 1, body))).body, body)
    stats = HeadStatsResult({"one": a, "two": b}, "now", "prompt", "")
    assert equal(read(encode(Frame("partial", body=stats))).body, stats)


@given(st.lists(frames, max_size=4))
def test_frames_follow_one_another(some):
    stream = io.BytesIO(b"".join(encode(f) for f in some))
    assert all(equal(read_frame(stream.read), f) for f in some)
    assert read_frame(stream.read) is None


@given(frames)
def test_the_asynchronous_reader_reads_the_same(frame):
    async def go() -> Frame:
        reader = asyncio.StreamReader()
        reader.feed_data(sealed(encode(frame)))
        reader.feed_eof()
        return await read_sealed_async(reader)

    assert equal(asyncio.run(go()), frame) and equal(read_sealed(io.BytesIO(sealed(encode(frame))).read), frame)


@given(frames, st.data())
def test_a_cut_frame_is_an_error(frame, data):
    whole = encode(frame)
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(WireError, match="middle of a frame"):
        read(whole[:cut])


@given(st.binary(min_size=4, max_size=200))
def test_garbage_is_an_error(data):
    try:
        read(data)
    except WireError as error:
        assert str(error)


@given(frames, st.data())
def test_a_changed_byte_is_an_error_or_another_frame(frame, data):
    whole = bytearray(encode(frame))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        got = read(bytes(whole))
    except WireError:
        return
    assert isinstance(got, Frame)


@given(frames, st.data())
def test_a_changed_byte_on_a_line_is_an_error(frame, data):
    whole = bytearray(sealed(encode(frame)))
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(WireError):
        read_sealed(io.BytesIO(whole).read)


@pytest.mark.parametrize(
    "data, why",
    [
        (b"Loading weights: 100%", "does the other side print to stdout"),
        (b"\x00\x00\x00\x00", "a header of 0 bytes"),
        (b"\x00\x00\x00\x01\xc1", "can't be read"),
        (b"\x00\x00\x00\x01\x90", "can't be read"),
    ],
)
def test_garbage_says_what_it_is(data, why):
    with pytest.raises(WireError, match=why):
        read(data)


def test_unknown_messages_and_wild_headers():
    def frame(*fields) -> bytes:
        head = msgspec.msgpack.encode(list(fields))
        return len(head).to_bytes(4, "big") + head

    for fields, why in (
        (("ask", 1, "", 1, "", "Rocket", {}, []), "unknown message 'Rocket'"),
        (("shout", 1, "", 1, "", "", None, []), "kind 'shout'"),
        (("ask", "one", "", 1, "", "", None, []), "id 'one'"),
        (("ask", 1, "", 1, "", "Load", {"model": 3}, []), "a Load that can't be read"),
        (("ask", 1, "", 1, "", "", None, [["<f4", [2**40]]]), "bytes of arrays"),
        (("ask", 1, "", 1, "", "", None, [["<f4", [-1]]]), "an array of type"),
        (("ask", 1, "", 1, "", "", None, [["|O8", [1]]]), "an array of type"),
        (("result", 1, "", 1, "", "AttentionResult", {"tokens": {}, "layer": 0, "pattern": 4, "which": "", "convention": ""}, []), "can't be read"),
    ):
        with pytest.raises(WireError, match=why):
            read(frame(*fields))


# ------------------------------------------------------------------ JSON, prompt sets


@given(studies)
def test_json_round_trip(study):
    back = from_json(json.loads(json.dumps(to_json(study))), Study)
    assert back == study


def test_json_has_no_nan():
    assert to_json(np.array([[1.0, math.nan], [math.inf, 2.0]])) == [[1.0, None], [None, 2.0]]


@pytest.mark.parametrize(
    "line, why",
    [
        ("{", "line 2"),
        ("[]", "at least"),
        ('{"clean": 3}', "at least"),
        ('{"clean": "a", "colour": 1}', "unknown field 'colour'"),
        ('{"clean": "a", "answer": [1]}', "strings"),
        ('{"clean": "abc", "labels": {"S1": 3}}', "character offset"),
        ('{"clean": "abc", "labels": {"1S": 0}}', "character offset"),
        ('{"clean": "abc", "bos": 1}', "true or false"),
    ],
)
def test_prompt_set_errors_name_the_line(tmp_path, line, why):
    file = tmp_path / "set.jsonl"
    file.write_text('{"clean": "When Mary", "answer": " x"}\n' + line + "\n")
    with pytest.raises(UserError, match=why) as error:
        read_prompt_set(file)
    assert str(error.value).startswith("set.jsonl line 2:")


def test_prompt_set(tmp_path):
    with pytest.raises(UserError, match="no prompt set at"):
        read_prompt_set(tmp_path / "none.jsonl")
    file = tmp_path / "set.jsonl"
    file.write_text("\n\n")
    with pytest.raises(UserError, match="holds no prompt"):
        read_prompt_set(file)
    file.write_text('{"clean": "abc", "corrupt": "abd", "answer": " x", "foil": [" y", " z"], "labels": {"S1": 1}, "bos": false}\n')
    assert read_prompt_set(file) == (Prompt("abc", "abd", (" x",), (" y", " z"), (("S1", 1),), False),)
