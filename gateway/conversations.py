"""Remembers which pool serves a conversation, from one turn to the next.

A conversation has no id in the chat API. It is recognised by its API key, its turns and the assistant's own answers: a
follow-up repeats the messages of an earlier request and the answer to it. So each answered request stores a digest of
(key, messages, answer), and a follow-up looks up the digests of its own beginnings; the longest that is stored counts.
A prompt with few-shot examples in the form of a conversation is not recognised, because no client received those
answers. Where an endpoint gives its answers ids (Api.continued_answer), a follow-up may name an answer instead.

The digest leaves system text out, because applications put the time of day into it. Of an answer it takes only the
beginning, so that an answer which its user interrupted is recognised too.
"""

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import orjson

from depo_gateway.estimator.text import text_of_content
from depo_gateway.gateway.openai.api import AnswerPiece, Messages
from depo_gateway.gateway.openai.choices import call_ids
from depo_gateway.gateway.openai.server_sent_events import data_lines, json_of

CAPACITY = 65_536  # turns; about 10 MB
TTL_SECONDS = 3_600.0
HEAD_CHARACTERS = 256


class Conversations:
    """Digest of a conversation's beginning -> pool. Bounded: the oldest go first, and each after an hour unused."""

    def __init__(self, capacity: int = CAPACITY, ttl_seconds: float = TTL_SECONDS) -> None:
        self._pools: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._capacity, self._ttl_seconds = capacity, ttl_seconds

    def find(self, key: str, messages: Messages, answer_id: str = "", now: float | None = None) -> str | None:
        """The pool that served this conversation's last known turn; None for a new conversation.

        Args:
            answer_id: of the answer that the request goes on from, where it names one.
        """
        self._forget(time.monotonic() if now is None else now)
        if not self._pools:
            return None
        if answer_id and (entry := self._pools.get(_digest_of_id(key, answer_id))) is not None:
            return entry[0]
        found = None
        digest = _new_digest(key)
        for message in messages:
            _add(digest, message)
            if message.get("role") == "assistant":
                entry = self._pools.get(digest.digest())
                if entry is not None:
                    found = entry[0]
        return found

    def remember(self, key: str, messages: Messages, answer: "AnswerHead", pool: str, now: float | None = None) -> None:
        """Stores which pool gave `answer` to `messages`; not for an empty answer, which identifies nothing."""
        now = time.monotonic() if now is None else now
        if answer.id:
            self._store(_digest_of_id(key, answer.id), pool, now)
        if answer.head and messages:
            digest = _new_digest(key)
            for message in messages:
                _add(digest, message)
            digest.update(answer.head)
            self._store(digest.digest(), pool, now)

    def __len__(self) -> int:
        return len(self._pools)

    def _store(self, name: bytes, pool: str, now: float) -> None:
        self._pools[name] = (pool, now)
        self._pools.move_to_end(name)
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._pools:
            _, stored = next(iter(self._pools.values()))
            if len(self._pools) <= self._capacity and now - stored <= self._ttl_seconds:
                return
            self._pools.popitem(last=False)


class AnswerHead:
    """The beginning of an answer, gathered from a stream or from a whole answer by `read` (Api.answer_piece)."""

    __slots__ = ("_calls", "_read", "_text", "complete", "id")

    def __init__(self, read: Callable[[Any, bool], AnswerPiece | None]) -> None:
        self._read = read
        self._text, self._calls = "", ""
        self.id = ""
        self.complete = False  # later events can't change `head`

    @property
    def head(self) -> bytes:
        return _head(self._text, self._calls)

    def feed(self, events: bytes) -> bool:
        """Takes whole server-sent events; returns whether the head is complete now."""
        for data in data_lines(events):
            if not self.complete:
                event = json_of(data)
                if event is None:  # [DONE]
                    self.complete = True
                else:
                    self._add(self._read(event, True))
        return self.complete

    def whole(self, answer: Any) -> None:
        """Takes the JSON of a whole answer."""
        self._add(self._read(answer, False))
        self.complete = True

    def _add(self, piece: AnswerPiece | None) -> None:
        if piece is not None:
            self._text += _without_blanks(piece.text)
            self._calls += piece.call_ids
            self.id = piece.answer_id or self.id
            if piece.finish_reason or len(self._text) >= HEAD_CHARACTERS:
                self.complete = True


def in_tool_loop(messages: Messages) -> bool:
    """Whether the last message answers a tool call: the model is still working on the same turn of the user."""
    return bool(messages) and messages[-1].get("role") in ("tool", "function")


def _new_digest(key: str) -> "hashlib.blake2b":
    return hashlib.blake2b(key.encode() + b"\0", digest_size=16)


def _digest_of_id(key: str, answer_id: str) -> bytes:
    digest = _new_digest(key)
    digest.update(orjson.dumps(["id", answer_id]))
    return digest.digest()


def _add(digest: "hashlib.blake2b", message: dict[str, Any]) -> None:
    role = message.get("role")
    if role == "assistant":
        digest.update(_head(_without_blanks(text_of_content(message.get("content"))), call_ids(message)))
    elif role not in ("system", "developer"):
        try:
            digest.update(orjson.dumps([role, message.get("content"), message.get("tool_call_id")]))
        except orjson.JSONEncodeError:  # orjson reads 1,024 levels but writes 254; no real message is so deep
            digest.update(b"\0")


def _head(text: str, calls: str) -> bytes:
    """What identifies an answer: clients add and drop empty fields and blanks when they send it back."""
    if not text and not calls:
        return b""
    # Calls come after the text, so an answer whose head is full of text may not have shown its calls yet.
    return orjson.dumps([text[:HEAD_CHARACTERS], "" if len(text) >= HEAD_CHARACTERS else calls])


def _without_blanks(text: str) -> str:
    return "".join(text[: 16 * HEAD_CHARACTERS].split())[:HEAD_CHARACTERS]
