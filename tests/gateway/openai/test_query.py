"""Bytes in, bytes out: what is read of a request, and that nothing else of it changes."""

import json
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depo_gateway.gateway.openai.api import Api
from depo_gateway.gateway.openai.chat import CHAT
from depo_gateway.gateway.openai.embeddings import EMBEDDINGS
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.query import Query, forwarded_body, json_object, query_of

MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'
ASKED = b'"stream_options":{"include_usage":true},'


def parsed(body: bytes, api: Api = CHAT) -> Query:
    return query_of(api, json_object(body), body)


def refusal(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        forwarded_body(parsed(body), "m")
    assert caught.value.status == 400
    return caught.value


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
    assert forwarded_body(parsed(before % MESSAGES), "M") == after % MESSAGES
    streamed = before.replace(b"%b", b'"stream":true,%b') % MESSAGES
    expected = after.replace(b"%b", b'"stream":true,%b') % MESSAGES
    brace = expected.index(b"{") + 1
    assert forwarded_body(parsed(streamed), "M") == expected[:brace] + ASKED + expected[brace:]


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
        body = b'{"model":"a","stream":true, "' + key + b'": %b ,' + MESSAGES + b"}"
        expected = body.replace(b'"a"', b'"M"') % forwarded
        assert forwarded_body(parsed(body % options), "M") == expected


def test_what_is_no_stream_is_not_asked_for_usage() -> None:
    body = b'{"model":"M","stream":false,"stream_options":null,%b}' % MESSAGES
    assert forwarded_body(parsed(body), "M") == body
    embeddings = b'{"model":"M","stream":true,"input":"x"}'
    assert forwarded_body(parsed(embeddings, EMBEDDINGS), "M") == embeddings


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
    assert refusal(body % MESSAGES).code == "duplicate_field"


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
    query = parsed(json.dumps(sent, ensure_ascii=ascii_only, indent=indent).encode())
    received = json.loads(forwarded_body(query, "org/the-model"))
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
        b"\xef\xbb\xbf" + b'{"model":"a",%b}' % MESSAGES,
        b'{"model":"a",%b,"x":NaN}' % MESSAGES,
        b'{"model":"a",%b,"x":Infinity}' % MESSAGES,
        b'{"model":"a",%b,"x":-Infinity}' % MESSAGES,
        b'{"model":"a",%b,"x":"\\ud800"}' % MESSAGES,
        b'{"model":"a",%b,"x":"\xff"}' % MESSAGES,
        b'{"model":"a",%b,"x":"\xed\xa0\x80"}' % MESSAGES,
        b'{"model":"a",%b,"x":' % MESSAGES + b"[" * 1025 + b"]" * 1025 + b"}",
        b'{"model":"a",%b,}' % MESSAGES,
        b'{"model":"a",%b} x' % MESSAGES,
    ],
)
def test_what_is_not_strict_json_is_refused(body: bytes) -> None:
    assert refusal(body).code == "invalid_json"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b"{%b}" % MESSAGES, "model"),
        (b'{"model":"",%b}' % MESSAGES, "model"),
        (b'{"model":null,%b}' % MESSAGES, "model"),
        (b'{"model":["a"],%b}' % MESSAGES, "model"),
        (b'{"model":"a"}', "messages"),
        (b'{"model":"a","messages":[]}', "messages"),
        (b'{"model":"a","messages":"hi"}', "messages"),
        (b'{"model":"a","messages":["hi"]}', "messages"),
        (b'{"model":"a","stream":"yes",%b}' % MESSAGES, "stream"),
        (b'{"model":"a","stream":1,%b}' % MESSAGES, "stream"),
        (b'{"model":"a","stream_options":true,%b}' % MESSAGES, "stream_options"),
    ],
)
def test_a_field_that_routing_reads_is_checked(body: bytes, param: str) -> None:
    error = refusal(body)
    assert error.param == param
    assert f"'{param}'" in error.message


def test_depth_up_to_1024_passes() -> None:
    body = b'{"model":"a",%b,"x":' % MESSAGES + b"[" * 1000 + b"]" * 1000 + b"}"
    assert forwarded_body(parsed(body), "a") == body


def test_context_needed_counts_the_answers_room_but_not_a_picture() -> None:
    def tokens(content: Any, **fields: Any) -> int:
        body = {"model": "auto", "messages": [{"role": "user", "content": content}], **fields}
        return parsed(orjson.dumps(body)).context_needed

    assert 1000 <= tokens("abcd" * 1000) <= 1050
    assert tokens("x", max_tokens=500) - tokens("x") in range(500, 510)
    assert tokens("x", max_completion_tokens=500) - tokens("x") in range(500, 515)
    picture = [{"type": "image_url", "image_url": {"url": "data:" + "A" * 100_000}}, {"type": "text", "text": "what?"}]
    assert tokens(picture) < 10
    assert tokens([*picture, {"type": "text", "text": "abcd" * 1000}]) in range(1000, 1010)
