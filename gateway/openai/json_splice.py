"""Replaces values in JSON text without changing any other byte."""

import re
from collections.abc import Iterable

import orjson

from depo_gateway.gateway.openai.errors import ApiError

STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TOKEN = re.compile(STRING + rb"|[{}\[\]:,]")
_NESTED = re.compile(STRING + rb"|[{}\[\]]")  # inside a value only its end matters


def top_level_spans(body: bytes, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where the values of the named top-level keys are in a JSON object that is known to be valid.

    Raises:
        ApiError: 400 when a key is there twice, so that two readers could see different values.
    """
    spans: dict[str, tuple[int, int]] = {}
    depth, key, value_start, expect_key, position = 0, "", 0, True, 0
    while match := (_TOKEN if depth == 1 else _NESTED).search(body, position):
        token, position = match.group(), match.end()
        first = token[:1]
        if depth == 1 and first in (b",", b"}"):
            if key in names:
                if key in spans:
                    raise ApiError(400, f"'{key}' is written twice.", "duplicate_field", key)
                spans[key] = _without_blanks(body, value_start, match.start())
            key, expect_key = "", True
        if depth == 1 and first == b'"' and expect_key:
            key, expect_key = orjson.loads(token), False
        elif depth == 1 and first == b":":
            value_start = position
        if first in (b"{", b"["):
            depth += 1
        elif first in (b"}", b"]"):
            depth -= 1
    return spans


def replaced(body: bytes, edits: Iterable[tuple[int, int, bytes]]) -> bytes:
    """`body` with each (start, end, value) in place of what was there."""
    for start, end, value in sorted(edits, reverse=True):
        body = body[:start] + value + body[end:]
    return body


def _without_blanks(body: bytes, start: int, end: int) -> tuple[int, int]:
    value = body[start:end]
    return start + len(value) - len(value.lstrip()), end - (len(value) - len(value.rstrip()))
