"""Server-sent events, as streams carry them (WHATWG HTML 9.2)."""

import re
from typing import Any

import orjson

EVENT_END = re.compile(rb"\r?\n\r?\n")


def data_lines(events: bytes) -> list[bytes]:
    """The data of whole events, line by line."""
    return [line[5:] for line in events.splitlines() if line.startswith(b"data:")]


def json_of(data: bytes) -> Any:
    """The JSON of an event's data, or of a whole answer; None where it is none (`[DONE]`)."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None
