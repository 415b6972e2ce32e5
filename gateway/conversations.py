"""Which pool serves a conversation, remembered from one turn to the next.

A conversation has no id in the OpenAI API: it is recognised by its key, its turns and the assistant's own answers. A
follow-up repeats the messages of an earlier request and the answer that it got; so each answered request leaves a
digest of (key, messages, answer), and a follow-up finds the longest of its own beginnings that was left there. A prompt
whose examples are made to look like a conversation is none of ours: nobody was given those answers.

System text is left out of the digest, since applications put the time of day into it. Of an answer only its head
counts, so that one which its user interrupted is recognised too.
"""

import hashlib
import time
from collections import OrderedDict
from typing import Any

import orjson

from depo_gateway.estimator.text import text_of_content

CAPACITY = 65_536  # turns; about 10 MB
TTL_SECONDS = 3_600.0
HEAD_CHARACTERS = 256


class Conversations:
    """Digest of a conversation's beginning -> pool. Bounded: the oldest go first, and each after an hour's silence."""

    def __init__(self, capacity: int = CAPACITY, ttl_seconds: float = TTL_SECONDS) -> None:
        self._pools: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._capacity, self._ttl_seconds = capacity, ttl_seconds

    def find(self, key: str, messages: list[dict[str, Any]], now: float | None = None) -> str | None:
        """The pool that served this conversation's last known turn, or None for a new one."""
        self._forget(time.monotonic() if now is None else now)
        if not self._pools:
            return None
        found = None
        digest = _start(key)
        for message in messages:
            _extend(digest, message)
            if message.get("role") == "assistant":
                entry = self._pools.get(digest.digest())
                if entry is not None:
                    found = entry[0]
        return found

    def remember(
        self, key: str, messages: list[dict[str, Any]], answer: "AnswerHead", pool: str, now: float | None = None
    ) -> None:
        """Notes which pool gave `answer` to `messages`; an empty answer tells nothing apart and is not noted."""
        if not answer.head:
            return
        digest = _start(key)
        for message in messages:
            _extend(digest, message)
        digest.update(answer.head)
        name = digest.digest()
        now = time.monotonic() if now is None else now
        self._pools[name] = (pool, now)
        self._pools.move_to_end(name)
        self._forget(now)

    def __len__(self) -> int:
        return len(self._pools)

    def _forget(self, now: float) -> None:
        while self._pools:
            _, noted = next(iter(self._pools.values()))
            if len(self._pools) <= self._capacity and now - noted <= self._ttl_seconds:
                return
            self._pools.popitem(last=False)


class AnswerHead:
    """The beginning of an answer's first choice, gathered from a stream or from a whole answer."""

    __slots__ = ("_calls", "_text", "complete")

    def __init__(self) -> None:
        self._text, self._calls = "", ""
        self.complete = False  # what comes now can't change `head`

    @property
    def head(self) -> bytes:
        return _head(self._text, self._calls)

    def feed(self, events: bytes) -> bool:
        """Takes whole server-sent events; whether the head is complete now."""
        for line in events.splitlines():
            if line.startswith(b"data:") and not self.complete:
                try:
                    self._take(orjson.loads(line[5:]), "delta")
                except orjson.JSONDecodeError:  # [DONE]
                    self.complete = True
        return self.complete

    def whole(self, answer: Any) -> None:
        """The JSON of an answer that is no stream."""
        self._take(answer, "message")
        self.complete = True

    def _take(self, parsed: Any, field: str) -> None:
        choices = parsed.get("choices") if isinstance(parsed, dict) else None
        for choice in choices if isinstance(choices, list) else ():
            part = choice.get(field) if isinstance(choice, dict) and choice.get("index", 0) == 0 else None
            if not isinstance(part, dict):
                continue
            self._text += _squeezed(text_of_content(part.get("content")))
            self._calls += _call_ids(part)
            if choice.get("finish_reason") or len(self._text) >= HEAD_CHARACTERS:
                self.complete = True


def in_tool_loop(messages: list[dict[str, Any]]) -> bool:
    """True while the last message answers a tool call: the same turn of the user's is still being worked on."""
    return messages[-1].get("role") in ("tool", "function")


def _start(key: str) -> "hashlib.blake2b":
    return hashlib.blake2b(key.encode() + b"\0", digest_size=16)


def _extend(digest: "hashlib.blake2b", message: dict[str, Any]) -> None:
    role = message.get("role")
    if role == "assistant":
        digest.update(_head(_squeezed(text_of_content(message.get("content"))), _call_ids(message)))
    elif role not in ("system", "developer"):
        try:
            digest.update(orjson.dumps([role, message.get("content"), message.get("tool_call_id")]))
        except orjson.JSONEncodeError:  # orjson reads 1,024 levels and writes 254: no turn of anybody's
            digest.update(b"\0")


def _head(text: str, calls: str) -> bytes:
    """What stands for an answer: clients add and drop empty fields and blanks when they send it back."""
    if not text and not calls:
        return b""
    # Calls come after the text, so an answer whose head is full of text may not have shown its calls yet.
    return orjson.dumps([text[:HEAD_CHARACTERS], "" if len(text) >= HEAD_CHARACTERS else calls])


def _squeezed(text: str) -> str:
    return "".join(text[: 16 * HEAD_CHARACTERS].split())[:HEAD_CHARACTERS]


def _call_ids(part: dict[str, Any]) -> str:
    """The ids of the tool calls in a message, or in a stream's piece of one, which names each id once."""
    calls = part.get("tool_calls")
    ids = [call.get("id") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return "".join(f"{name}," for name in ids if isinstance(name, str) and name)
