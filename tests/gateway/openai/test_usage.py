"""Token counts, read as answers pass."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from depo_gateway.gateway.openai.server_sent_events import json_of
from depo_gateway.gateway.openai.usage import UsageFilter, usage_field

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
    remove=st.booleans(),
    asked=st.booleans(),
    torn=st.integers(0, 40),
)
def test_any_split_of_a_stream_gives_the_same_bytes(
    ending: str, cuts: list[int], remove: bool, asked: bool, torn: int
) -> None:
    events, usage = stream(ending)
    whole = b"".join([*events[:-1], usage, events[-1]] if asked else events)
    whole = whole[: len(whole) - torn]
    events_filter = UsageFilter(usage_field, remove=remove)
    at = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
    out = b"".join(events_filter.feed(whole[start:end]) for start, end in itertools.pairwise(at))
    out += events_filter.end()
    expected = whole.replace(usage, b"") if remove else whole
    assert out == expected
    if asked and torn < len(events[-1]):
        assert events_filter.usage == USAGE


def test_events_are_not_held_back_and_torn_ones_are() -> None:
    events_filter = UsageFilter(usage_field, remove=True)
    assert events_filter.feed(b'data: {"choices":[1]}\n\n') == b'data: {"choices":[1]}\n\n'
    assert events_filter.feed(b'data: {"a":1}\n\ndata: {"b"') == b'data: {"a":1}\n\n'
    assert events_filter.feed(b":2}\n") == b""
    assert events_filter.feed(b"\n") == b'data: {"b":2}\n\n'
    assert events_filter.feed(b'data: {"choices":[],"us') == b""
    assert events_filter.feed(b'age":{"prompt_tokens":1}}\n\n') == b""
    assert events_filter.usage == {"prompt_tokens": 1}
    assert events_filter.feed(b"data: [DON") == b""
    assert events_filter.end() == b"data: [DON"
    assert events_filter.end() == b""


def test_an_event_without_end_is_let_go_in_time() -> None:
    events_filter = UsageFilter(usage_field, remove=True)
    piece = b"x" * 65_536
    out = b"".join(events_filter.feed(piece) for _ in range(40))
    assert len(out) >= 16 * len(piece)
    assert out + events_filter.end() == piece * 40


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
    assert usage_field(json_of(body)) == usage
