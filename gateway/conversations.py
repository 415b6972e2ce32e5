"""Which pool serves a conversation, remembered from one turn to the next.

A conversation has no id in the OpenAI API: it is recognised by its key and its own messages. A follow-up repeats the
messages of an earlier request and then the assistant's answer; so each served request leaves a digest of (key,
messages), and a follow-up finds the longest of its own beginnings, up to an assistant's turn, that was left there.
"""

import hashlib
import time
from collections import OrderedDict
from typing import Any

import orjson

CAPACITY = 65_536  # conversations; about 10 MB
TTL_SECONDS = 3_600.0


class Conversations:
    """Digest of a conversation's beginning -> pool. Bounded: the oldest go first, and each after an hour's silence."""

    def __init__(self, capacity: int = CAPACITY, ttl_seconds: float = TTL_SECONDS) -> None:
        self._pools: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._capacity, self._ttl_seconds = capacity, ttl_seconds

    def find(self, key: str, messages: list[dict[str, Any]], now: float | None = None) -> str | None:
        """The pool that served this conversation's last known turn, or None for a new one."""
        now = time.monotonic() if now is None else now
        found = None
        digest = _start(key)
        for before, message in enumerate(messages):
            if before and message.get("role") == "assistant":
                entry = self._pools.get(digest.digest())
                if entry is not None and now - entry[1] <= self._ttl_seconds:
                    found = entry[0]
            _extend(digest, message)
        return found

    def remember(self, key: str, messages: list[dict[str, Any]], pool: str, now: float | None = None) -> None:
        """Notes which pool served `messages`."""
        digest = _start(key)
        for message in messages:
            _extend(digest, message)
        name = digest.digest()
        self._pools[name] = (pool, time.monotonic() if now is None else now)
        self._pools.move_to_end(name)
        while len(self._pools) > self._capacity:
            self._pools.popitem(last=False)

    def __len__(self) -> int:
        return len(self._pools)


def in_tool_loop(messages: list[dict[str, Any]]) -> bool:
    """True while the last message answers a tool call: the same turn of the user's is still being worked on."""
    return messages[-1].get("role") in ("tool", "function")


def _start(key: str) -> "hashlib.blake2b":
    return hashlib.blake2b(key.encode() + b"\0", digest_size=16)


def _extend(digest: "hashlib.blake2b", message: dict[str, Any]) -> None:
    # Clients add and drop empty fields (refusal, audio) when they send an answer back: role and substance identify it.
    kept = [message.get(name) or None for name in ("role", "content", "tool_calls", "tool_call_id")]
    digest.update(orjson.dumps(kept))
