"""Bytes in, bytes out: what is read of a request, and that nothing else of it changes."""

import itertools
import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depo_gateway.estimator.text import TextConfig, extract_text
from depo_gateway.gateway import protocol
from depo_gateway.gateway.protocol import ApiError, Query, UsageTap

CHAT = b'"messages":[{"role":"user","content":"hi"}]'
ASKED = b'"stream_options":{"include_usage":true},'


def chat(body: bytes) -> Query:
    return protocol.parse("chat", body)


def refusal(body: bytes, endpoint: protocol.Endpoint = "chat") -> dict[str, Any]:
    with pytest.raises(ApiError) as caught:
        protocol.forwarded(protocol.parse(endpoint, body), "m")
    error = json.loads(caught.value.body())["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (caught.value.status, error["type"]) == (400, "invalid_request_error")
    return error


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b'{"model":"auto",%b}', b'{"model":"M",%b}'),
        (b'\n{ "model"\t:\r\n"auto" ,\t%b  }\n', b'\n{ "model"\t:\r\n"M" ,\t%b  }\n'),
        (b'{%b,"model": "a\\"u\\\\"}', b'{%b,"model": "M"}'),
        (b'{"a":123456789012345678901,"b":1e5,"model":"x",%b}', b'{"a":123456789012345678901,"b":1e5,"model":"M",%b}'),
        (b'{"u":"\\u00e9\xc3\xa9\\/ \\u006d","model":"x",%b}', b'{"u":"\\u00e9\xc3\xa9\\/ \\u006d","model":"M",%b}'),
        (b'{"metadata":{"model":"keep"},"model":"x",%b}', b'{"metadata":{"model":"keep"},"model":"M",%b}'),
        (b'{"mod\\u0065l":"x","metadata":{"model":"keep"},%b}', b'{"mod\\u0065l":"M","metadata":{"model":"keep"},%b}'),
        (b'{"\\u006Dodel":"x",%b}', b'{"\\u006Dodel":"M",%b}'),
        (b'{"note":"\\"model\\":\\"no\\"","model":"x",%b}', b'{"note":"\\"model\\":\\"no\\"","model":"M",%b}'),
        (b'{"a":"\\\\","model":"x",%b}', b'{"a":"\\\\","model":"M",%b}'),
        (b'{"a":["model","model"],"b":"model","model":"x",%b}', b'{"a":["model","model"],"b":"model","model":"M",%b}'),
        (
            b'{"tools":[{"function":{"parameters":{"properties":{"model":{"type":"string"}},"model":"z"}}}],"model":"x",%b}',
            b'{"tools":[{"function":{"parameters":{"properties":{"model":{"type":"string"}},"model":"z"}}}],"model":"M",%b}',
        ),
    ],
)  # fmt: skip
def test_only_the_model_changes(before: bytes, after: bytes) -> None:
    assert protocol.forwarded(chat(before % CHAT), "M") == after % CHAT
    streamed = before.replace(b"%b", b'"stream":true,%b') % CHAT
    expected = after.replace(b"%b", b'"stream":true,%b') % CHAT
    brace = expected.index(b"{") + 1
    assert protocol.forwarded(chat(streamed), "M") == expected[:brace] + ASKED + expected[brace:]


@pytest.mark.parametrize(
    ("options", "forwarded"),
    [
        (b"null", b'{"include_usage":true}'),
        (b"{}", b'{"include_usage":true}'),
        (
            b'{ "include_usage" : false , "big":12345678901234567890 }',
            b'{ "include_usage" : true , "big":12345678901234567890 }',
        ),
        (b'{"big":123456789012345678901}', b'{"include_usage":true,"big":123456789012345678901}'),
        (b'{"include_usage":true, "x":1e5}', b'{"include_usage":true, "x":1e5}'),
        (b'{"x":{"include_usage":false}}', b'{"include_usage":true,"x":{"include_usage":false}}'),
    ],
)
def test_a_stream_is_asked_for_its_usage(options: bytes, forwarded: bytes) -> None:
    for key in (b"stream_options", b"stream\\u005foptions"):
        body = b'{"model":"a","stream":true, "' + key + b'": %b ,' + CHAT + b"}"
        expected = body.replace(b'"a"', b'"M"') % forwarded
        assert protocol.forwarded(chat(body % options), "M") == expected


def test_what_is_no_stream_is_not_asked_for_usage() -> None:
    body = b'{"model":"M","stream":false,"stream_options":null,%b}' % CHAT
    assert protocol.forwarded(chat(body), "M") == body
    embeddings = b'{"model":"M","stream":true,"input":"x"}'
    assert protocol.forwarded(protocol.parse("embeddings", embeddings), "M") == embeddings


@pytest.mark.parametrize(
    "body",
    [
        b'{"model":"a","model":"b",%b}',
        b'{"model":"a","mod\\u0065l":"b",%b}',
        b'{"mod\\u0065l":"a","mo\\u0064el":"b",%b}',
        b'{"model":"a","stream":true,"stream_options":{},"stream_options":null,%b}',
        b'{"model":"a","stream":true,"stream_options":{"include_usage":false,"include_usage":0},%b}',
    ],
)
def test_a_field_written_twice_is_refused(body: bytes) -> None:
    assert refusal(body % CHAT)["code"] == "duplicate_field"


TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
KEYS = st.sampled_from(["model", "stream", "stream_options", '"model":"x"', "é"]) | TEXT
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
OPTIONS = st.none() | st.dictionaries(st.sampled_from(["include_usage", "continuous", "model"]), JSON, max_size=3)


@settings(max_examples=200, deadline=None)
@given(
    extra=st.dictionaries(TEXT | st.just("metadata"), JSON, max_size=4),
    options=st.just("absent") | OPTIONS,
    stream=st.sampled_from([None, False, True]),
    order=st.randoms(use_true_random=False),
    ascii_only=st.booleans(),
    indent=st.sampled_from([None, 1]),
    name=st.text(st.characters(codec="utf-8"), min_size=1),
)
def test_backends_receive_the_same_json_but_the_model(
    extra: dict[str, Any],
    options: Any,
    stream: bool | None,
    order: Any,
    ascii_only: bool,
    indent: int | None,
    name: str,
) -> None:
    sent = extra | {"model": name, "stream": stream, "messages": [{"role": "user", "content": "é model"}]}
    sent.pop("stream_options", None)
    if options != "absent":
        sent["stream_options"] = options
    items = list(sent.items())
    order.shuffle(items)
    sent = dict(items)
    query = chat(json.dumps(sent, ensure_ascii=ascii_only, indent=indent).encode())
    received = json.loads(protocol.forwarded(query, "org/the-model"))
    assert received.pop("model") == "org/the-model"
    if stream:
        given = dict(sent.get("stream_options") or {})
        if not given.get("include_usage"):
            given["include_usage"] = True
        assert received.pop("stream_options") == given
        sent.pop("stream_options", None)
    del sent["model"]
    assert received == sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'"model"',
        b"\xef\xbb\xbf" + b'{"model":"a",%b}' % CHAT,
        b'{"model":"a",%b,"x":NaN}' % CHAT,
        b'{"model":"a",%b,"x":Infinity}' % CHAT,
        b'{"model":"a",%b,"x":-Infinity}' % CHAT,
        b'{"model":"a",%b,"x":"\\ud800"}' % CHAT,
        b'{"model":"a",%b,"x":"\xff"}' % CHAT,
        b'{"model":"a",%b,"x":"\xed\xa0\x80"}' % CHAT,
        b'{"model":"a",%b,"x":' % CHAT + b"[" * 1025 + b"]" * 1025 + b"}",
        b'{"model":"a",%b,}' % CHAT,
        b'{"model":"a",%b} x' % CHAT,
    ],
)
def test_what_is_not_strict_json_is_refused(body: bytes) -> None:
    assert refusal(body)["code"] == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{%b}" % CHAT, "model"),
        (b'{"model":"",%b}' % CHAT, "model"),
        (b'{"model":null,%b}' % CHAT, "model"),
        (b'{"model":["a"],%b}' % CHAT, "model"),
        (b'{"model":"a"}', "messages"),
        (b'{"model":"a","messages":[]}', "messages"),
        (b'{"model":"a","messages":"hi"}', "messages"),
        (b'{"model":"a","messages":["hi"]}', "messages"),
        (b'{"model":"a","stream":"yes",%b}' % CHAT, "stream"),
        (b'{"model":"a","stream":1,%b}' % CHAT, "stream"),
        (b'{"model":"a","stream_options":true,%b}' % CHAT, "stream_options"),
    ],
)
def test_a_field_that_routing_reads_is_checked(body: bytes, param: str) -> None:
    error = refusal(body)
    assert error["param"] == param
    assert f"'{param}'" in error["message"]


def test_depth_up_to_1024_passes() -> None:
    body = b'{"model":"a",%b,"x":' % CHAT + b"[" * 1000 + b"]" * 1000 + b"}"
    assert protocol.forwarded(chat(body), "a") == body


# What is scored.


def scored(messages: list[Any], **fields: Any) -> tuple[str, str]:
    query = chat(orjson.dumps({"model": "auto", "messages": messages, **fields}))
    return extract_text(TextConfig(), query.asked)


def test_the_last_user_turn_is_scored_with_the_conversation_before_it() -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    assert scored(turns) == ("three", "one\ntwo")


def test_system_developer_and_tool_text_is_never_scored() -> None:
    plain = [{"role": "user", "content": "question"}]
    dressed = [
        {"role": "system", "content": "theorem " * 9999},
        {"role": "developer", "content": "prove"},
        *plain,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "function": {"name": "f"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "result " * 9999},
        {"role": "function", "name": "f", "content": "result"},
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "f", "description": "hard " * 99}}]
    assert scored(dressed, tools=tools) == scored(plain) == ("question", "")


def test_text_parts_of_arrays_are_scored() -> None:
    parts = [
        {"type": "text", "text": "what is"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}},
        {"type": "text", "text": "this?"},
        {"type": "text"},
        "stray",
    ]
    assert scored([{"role": "user", "content": parts}]) == ("what is\nthis?", "")


def test_messages_of_odd_shapes_are_the_backends_to_judge() -> None:
    assert scored([{}, {"role": 3, "content": 4}, {"role": "user", "content": {"a": 1}}]) == ("", "")


def completions(prompt: Any) -> Query:
    return protocol.parse("completions", orjson.dumps({"model": "auto", "prompt": prompt}))


def test_a_completions_prompt_is_scored() -> None:
    assert completions("once upon").asked == completions("once upon").prompt == "once upon"
    assert completions(["once", "upon"]).asked == "once\nupon"
    assert completions([1, 2, 3]).asked == completions([[1, 2], [3]]).asked == ""


@pytest.mark.parametrize(
    ("fields", "needs"),
    [
        ({}, set()),
        ({"tools": []}, set()),
        ({"tools": [{"type": "function"}]}, {"tools"}),
        ({"functions": [{"name": "f"}]}, {"tools"}),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, {"image"}),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]}, {"audio"}),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "image_url"}, {"type": 3}]}]}, set()),
    ],
)
def test_modalities_beyond_text(fields: dict[str, Any], needs: set[str]) -> None:
    body = {"model": "auto", "messages": [{"role": "user", "content": "x"}]} | fields
    assert chat(orjson.dumps(body)).needs == needs


def test_prompt_tokens_count_the_answers_room_but_not_a_picture() -> None:
    def tokens(content: Any, **fields: Any) -> int:
        body = {"model": "auto", "messages": [{"role": "user", "content": content}], **fields}
        return chat(orjson.dumps(body)).prompt_tokens

    assert 1000 <= tokens("abcd" * 1000) <= 1050
    assert tokens("x", max_tokens=500) - tokens("x") in range(500, 510)
    assert tokens("x", max_completion_tokens=500) - tokens("x") in range(500, 515)
    picture = [{"type": "image_url", "image_url": {"url": "data:" + "A" * 100_000}}, {"type": "text", "text": "what?"}]
    assert tokens(picture) < 10
    assert tokens([*picture, {"type": "text", "text": "abcd" * 1000}]) in range(1000, 1010)


# Thresholds in model names.


@pytest.mark.parametrize(
    ("model", "threshold"),
    [("auto", None), ("auto-0.85", 0.85), ("auto-0", 0.0), ("auto-1", 1.0), ("auto-1.0", 1.0), ("auto-.5", 0.5)],
)
def test_a_threshold_for_one_call(model: str, threshold: float | None) -> None:
    assert protocol.wanted_threshold(model) == threshold


@pytest.mark.parametrize(
    "model",
    ["auto-", "auto-x", "auto-1.1", "auto--0.5", "auto-2", "auto-nan", "auto-1e-1", "auto-0.5 ", "auto-.", "auto-01",
     "auto-0.5.5", "auto-٠", "auto-0,5", "auto-+1", "auto-1_0"],
)  # fmt: skip
def test_what_is_no_threshold_is_no_model(model: str) -> None:
    with pytest.raises(ApiError, match="between 0 and 1") as caught:
        protocol.wanted_threshold(model)
    assert (caught.value.status, caught.value.code, caught.value.param) == (404, "model_not_found", "model")


# Usage on its way through.

USAGE = {"prompt_tokens": 7, "completion_tokens": 5}


def stream(ending: str, usage: bool = True) -> tuple[list[bytes], bytes]:
    """(events, the usage event)."""
    texts = ['say "usage" twice', "\n\n", "é", ": [DONE]"]
    events = [f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}{ending}" for text in texts]
    events.insert(1, f": a comment{ending}")
    events.insert(2, f"data: {json.dumps({'choices': [{'delta': {}}], 'usage': None})}{ending}")
    events.insert(3, f"data: {json.dumps({'choices': [{'delta': {}}], 'usage': USAGE})}{ending}")  # continuous usage
    last = f"data: {json.dumps({'choices': [], 'usage': USAGE})}{ending}"
    return [event.encode() for event in events] + [f"data: [DONE]{ending}".encode()], last.encode()


@settings(max_examples=300, deadline=None)
@given(
    ending=st.sampled_from(["\n\n", "\r\n\r\n"]),
    cuts=st.lists(st.integers(0, 700), max_size=20),
    drop=st.booleans(),
    asked=st.booleans(),
    torn=st.integers(0, 40),
)
def test_any_split_of_a_stream_gives_the_same_bytes(
    ending: str, cuts: list[int], drop: bool, asked: bool, torn: int
) -> None:
    events, usage = stream(ending)
    whole = b"".join([*events[:-1], usage, events[-1]] if asked else events)
    whole = whole[: len(whole) - torn]
    tap = UsageTap(drop=drop)
    at = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
    out = b"".join(tap.feed(whole[start:end]) for start, end in itertools.pairwise(at))
    out += tap.end()
    expected = whole.replace(usage, b"") if drop else whole
    assert out == expected
    if asked and torn < len(events[-1]):
        assert tap.usage == USAGE


def test_events_are_not_held_back_and_torn_ones_are() -> None:
    tap = UsageTap(drop=True)
    assert tap.feed(b'data: {"choices":[1]}\n\n') == b'data: {"choices":[1]}\n\n'
    assert tap.feed(b'data: {"a":1}\n\ndata: {"b"') == b'data: {"a":1}\n\n'
    assert tap.feed(b":2}\n") == b""
    assert tap.feed(b"\n") == b'data: {"b":2}\n\n'
    assert tap.feed(b'data: {"choices":[],"us') == b""
    assert tap.feed(b'age":{"prompt_tokens":1}}\n\n') == b""
    assert tap.usage == {"prompt_tokens": 1}
    assert tap.feed(b"data: [DON") == b""
    assert tap.end() == b"data: [DON"
    assert tap.end() == b""


def test_an_event_without_end_is_let_go_in_time() -> None:
    tap = UsageTap(drop=True)
    piece = b"x" * 65_536
    out = b"".join(tap.feed(piece) for _ in range(40))
    assert len(out) >= 16 * len(piece)
    assert out + tap.end() == piece * 40


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (b'{"usage":{"prompt_tokens":1}}', {"prompt_tokens": 1}),
        (b'{"usage":null}', None),
        (b"[]", None),
        (b"not json", None),
        (b"", None),
    ],
)
def test_usage_of_a_whole_answer(body: bytes, usage: dict[str, int] | None) -> None:
    assert protocol.usage_of(protocol.answer_of(body)) == usage


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_errors_are_openai_objects(status: int, kind: str) -> None:
    error = json.loads(ApiError(status, "What. And how.", "the_code", "model").body())
    assert error == {"error": {"message": "What. And how.", "type": kind, "param": "model", "code": "the_code"}}
