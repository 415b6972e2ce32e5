"""Values are replaced in JSON text, and nothing else changes."""

import pytest

from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.json_splice import replaced, top_level_spans

BODY = b'{"a" : [1, {"b": 2}] , "x": {"a": "}"},\n"b":"\\"a\\":" }'


def test_values_of_top_level_keys_are_found_without_their_blanks() -> None:
    spans = top_level_spans(BODY, ("a", "b", "c"))
    assert {name: BODY[start:end] for name, (start, end) in spans.items()} == {
        "a": b'[1, {"b": 2}]',
        "b": b'"\\"a\\":"',
    }


def test_several_values_are_replaced_whatever_their_order() -> None:
    spans = top_level_spans(BODY, ("a", "b"))
    edits = [(*spans["b"], b"null"), (*spans["a"], b"longer than it was")]
    expected = b'{"a" : longer than it was , "x": {"a": "}"},\n"b":null }'
    assert replaced(BODY, edits) == replaced(BODY, edits[::-1]) == expected


def test_a_key_written_twice_is_refused() -> None:
    assert top_level_spans(b'{"a":1,"a":2,"b":3}', ("b",)) == {"b": (17, 18)}
    with pytest.raises(ApiError, match="'a' is written twice"):
        top_level_spans(b'{"a":1,"\\u0061":2}', ("a",))
