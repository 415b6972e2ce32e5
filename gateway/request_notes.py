"""What a request leaves behind for its record: noted on its way, put together by the writer's thread. Pure."""

import hmac
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from depo_gateway.estimator.records.types import Record
from depo_gateway.estimator.text import text_of_content
from depo_gateway.gateway.protocol import Endpoint, Query, answer_of
from depo_gateway.gateway.routing import Decision
from depo_gateway.gateway.scoring import Scored

ANSWER_BYTES = 2 << 20  # of a stream, some 10,000 tokens; a longer answer is not kept
TAIL_CHUNKS = 4  # a stream's last ones, which say why it ended
NOT_PARAMETERS = frozenset(("model", "stream", "stream_options", "messages", "prompt", "input"))
REFERENCE_HEADER = b"x-depo-reference"


class Answer:
    """A stream's chunks as they went to the client: all of them, or only the last ones where no text is recorded."""

    __slots__ = ("chunks", "size", "whole")

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.chunks: deque[bytes] = deque(maxlen=None if whole else TAIL_CHUNKS)
        self.size = 0

    def add(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
        if self.whole:
            self.size += len(chunk)
            if self.size > ANSWER_BYTES:
                self.whole, self.size, self.chunks = False, 0, deque(self.chunks, maxlen=TAIL_CHUNKS)


@dataclass(slots=True, eq=False)
class Notes:
    """What a record is made of, noted on a request's way. References alone: nothing is worked out here."""

    id: str = ""
    endpoint: Endpoint = "chat"
    key: str | None = None  # None: the caller is not known or comes too often, and nothing is recorded
    reference: bytes = b""
    query: Query | None = None
    eligible: tuple[str, ...] = ()
    scored: Scored | None = None
    decision: Decision | None = None
    served: bool = False  # a backend answered
    usage: Mapping[str, Any] | None = None
    whole: Any = None  # the JSON of an answer that was no stream
    whole_bytes: int = 0  # as it came
    stream: Answer | None = None
    first_token_seconds: float | None = None
    status: int = 0
    time: float = 0.0
    total_seconds: float = 0.0

    @property
    def size(self) -> int:
        """Bytes that this holds, about."""
        asked = len(self.reference) + (len(self.query.body) if self.query else 0)
        return asked + self.whole_bytes + (self.stream.size if self.stream else 0)


def record_of(notes: Notes, prompts: str, hash_key: bytes) -> Record:
    """The record of a finished request, with as much text as `prompts` (none, hash, full) allows."""
    query, decision, scored = notes.query, notes.decision, notes.scored
    usage = notes.usage or {}
    text, finish_reason = _answer(notes)
    key, asked = notes.key or "", _asked_text(query)
    full = prompts == "full"
    fields = query.fields if full and query is not None else {}
    return Record(
        id=notes.id,
        time=notes.time,
        key=key,
        endpoint=notes.endpoint,
        conversation=_hmac(hash_key, "conversation", key, _first_turn(asked)) if asked is not None else "",
        pool=decision.pool if decision is not None and notes.served else "",
        reason=decision.reason if decision is not None else "",
        confidence=decision.confidence if decision is not None else None,
        threshold=decision.threshold if decision is not None else None,
        estimator=decision.estimator if decision is not None else "",
        stage=scored.stage if scored is not None else "",
        propensity=decision.propensity if decision is not None else 1.0,
        pools=notes.eligible,
        quality=scored.quality if scored is not None else {},
        status=notes.status,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        first_token_seconds=notes.first_token_seconds,
        total_seconds=notes.total_seconds,
        finish_reason=finish_reason,
        prompt_hash=_hmac(hash_key, "prompt", "", asked) if prompts == "hash" and asked is not None else "",
        asked=asked if full else None,
        parameters={name: value for name, value in fields.items() if name not in NOT_PARAMETERS},
        answer=text if full else None,
        reference=reference_text(notes.reference) if full and notes.reference else None,
    )


def reference_text(value: bytes) -> str:
    """The header's value: UTF-8, of which any byte may be written as %XX."""
    return unquote_to_bytes(value).decode(errors="replace")


def _asked_text(query: Query | None) -> str | list[dict[str, Any]] | None:
    """What was asked; None where it is no text (embeddings, token ids)."""
    if query is None or query.endpoint == "embeddings" or (query.endpoint == "completions" and not query.prompt):
        return None
    return query.asked


def _first_turn(asked: str | list[dict[str, Any]]) -> Any:
    """What all turns of a conversation begin with; system text is left out, applications put the time of day there."""
    if isinstance(asked, str):
        return asked
    turns = [message for message in asked if message.get("role") not in ("system", "developer")]
    return turns[0].get("content") if turns else None


def _hmac(hash_key: bytes, use: str, key: str, value: Any) -> str:
    return hmac.digest(hash_key, orjson.dumps([use, key, value]), "sha256").hex()


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _answer(notes: Notes) -> tuple[str | None, str]:
    """Text of the first choice, None where it isn't all here, and why it ended."""
    if notes.stream is None:
        return _choice(notes.whole, "message")
    text, finish_reason = [], ""
    for line in b"".join(notes.stream.chunks).splitlines():
        if line.startswith(b"data:"):
            piece, reason = _choice(answer_of(line[5:]), "delta")
            text.append(piece or "")
            finish_reason = reason or finish_reason
    return "".join(text) if notes.stream.whole else None, finish_reason


def _choice(parsed: Any, field: str) -> tuple[str | None, str]:
    choices = parsed.get("choices") if isinstance(parsed, dict) else None
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict) or choice.get("index", 0) != 0:
            continue
        part, reason = choice.get(field), choice.get("finish_reason")
        text = text_of_content(part.get("content")) if isinstance(part, dict) else choice.get("text")
        return text if isinstance(text, str) else "", reason if isinstance(reason, str) else ""
    return None, ""
