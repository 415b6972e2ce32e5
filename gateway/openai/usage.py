"""Token counts of answers, read as the answers pass."""

from collections.abc import Callable, Mapping
from typing import Any

from depo_gateway.gateway.openai.server_sent_events import EVENT_END, data_lines, json_of

LONGEST_EVENT = 1 << 20

Usage = Mapping[str, Any]  # "prompt_tokens" and "completion_tokens", as the backend counts them


def usage_field(answer: Any) -> Usage | None:
    """The `usage` object of a complete answer, or of a stream's chunk, in OpenAI's chat and completions."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    return usage if isinstance(usage, dict) else None


class UsageFilter:
    """Reads a stream's usage as it passes, and removes the chunk that only the gateway requested.

    Whole events pass at once. The beginning of a torn event waits for its rest, so that an error which follows a broken
    connection is a separate event.

    Args:
        read: the usage of one event's JSON, None where it has none.
        remove: whether to remove the event that carries nothing but usage.
    """

    __slots__ = ("_read", "_remove", "_rest", "usage")

    def __init__(self, read: Callable[[Any], Usage | None], remove: bool) -> None:
        self.usage: dict[str, Any] | None = None
        self._read, self._remove = read, remove
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Takes the backend's bytes and returns those for the client."""
        whole = self._rest + data if self._rest else data
        if b'"usage"' not in whole and whole.endswith(b"\n\n"):  # nearly every chunk
            self._rest = b""
            return whole
        passed = []
        start = 0
        for end in (match.end() for match in EVENT_END.finditer(whole)):
            event = whole[start:end]
            if not (self._only_usage(event) and self._remove):
                passed.append(event)
            start = end
        self._rest = whole[start:]
        if len(self._rest) > LONGEST_EVENT:  # whatever it is, it is no usage chunk
            passed.append(self._rest)
            self._rest = b""
        return b"".join(passed)

    def end(self) -> bytes:
        """The beginning of an event that never ended, once the backend is done."""
        rest, self._rest = self._rest, b""
        return rest

    def _only_usage(self, event: bytes) -> bool:
        """Adds the event's usage to `usage`; returns whether the event carries nothing else."""
        if b'"usage"' not in event:
            return False
        chunk = json_of(b"".join(data_lines(event)))
        usage = self._read(chunk)
        if usage is None:
            return False
        self.usage = {**(self.usage or {}), **usage}
        return isinstance(chunk, dict) and chunk.get("choices") == []
