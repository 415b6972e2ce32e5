"""`RequestNotes`: what a request collects for its record on its way; the writer's thread builds the record. Pure."""

import hmac
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import orjson

from depo_gateway.estimator.records.types import Record, RoutingSettings
from depo_gateway.gateway.openai.api import AnswerPiece, Api, Prompt
from depo_gateway.gateway.openai.query import Query
from depo_gateway.gateway.openai.server_sent_events import data_lines, json_of
from depo_gateway.gateway.openai.usage import Usage
from depo_gateway.gateway.routing import Decision
from depo_gateway.gateway.scoring import Scored

ANSWER_BYTES = 2 << 20  # of a stream, some 10,000 tokens; the text of a longer answer is not recorded
LAST_CHUNKS = 4  # of a stream, enough for its finish reason
NOT_PARAMETERS = frozenset(("model", "stream", "stream_options"))
REFERENCE_HEADER = b"x-depo-reference"


class StreamCopy:
    """A stream's chunks as they went to the client: all of them, or only the last where no text is recorded."""

    __slots__ = ("chunks", "size", "whole")

    def __init__(self, whole: bool) -> None:
        self.whole = whole
        self.chunks: deque[bytes] = deque(maxlen=None if whole else LAST_CHUNKS)
        self.size = 0

    def add(self, chunk: bytes) -> None:
        self.chunks.append(chunk)
        if self.whole:
            self.size += len(chunk)
            if self.size > ANSWER_BYTES:
                self.whole, self.size, self.chunks = False, 0, deque(self.chunks, maxlen=LAST_CHUNKS)


@dataclass(slots=True, eq=False)
class RequestNotes:
    """What a record is made of. References only: the request's path computes nothing for it."""

    api: Api
    id: str
    key: str | None = None  # None: the caller is unknown or over its rate, and nothing is recorded
    group: str = ""  # the name of the prompt's task
    reference: bytes = b""
    query: Query | None = None
    eligible: tuple[str, ...] = ()
    scored: Scored | None = None
    decision: Decision | None = None
    served: bool = False  # a backend answered
    usage: Usage | None = None
    whole: Any = None  # the JSON of an answer that was no stream
    whole_bytes: int = 0  # its size as it came
    stream: StreamCopy | None = None
    first_token_seconds: float | None = None
    status: int = 0
    time: float = 0.0
    total_seconds: float = 0.0
    settings: RoutingSettings | None = None

    @property
    def size(self) -> int:
        """Bytes that this object refers to, about."""
        received = len(self.reference) + (len(self.query.body) if self.query else 0)
        return received + self.whole_bytes + (self.stream.size if self.stream else 0)


def record_of(notes: RequestNotes, prompts: str, hash_key: bytes) -> Record:
    """The record of a finished request, with as much text as `prompts` (none, hash, full) allows."""
    query, decision, scored = notes.query, notes.decision, notes.scored
    usage = notes.usage or {}
    answer, finish_reason = _answer(notes)
    key, prompt = notes.key or "", (query.prompt or None) if query is not None else None
    full = prompts == "full"
    fields = query.fields if full and query is not None else {}
    return Record(
        id=notes.id,
        time=notes.time,
        key=key,
        endpoint=notes.api.name,
        conversation=_hmac(hash_key, "conversation", key, _first_turn(prompt)) if prompt is not None else "",
        group=notes.group,
        pool=decision.pool if decision is not None and notes.served else "",
        reason=decision.reason.value if decision is not None else "",
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
        prompt_hash=_hmac(hash_key, "prompt", "", prompt) if prompts == "hash" and prompt is not None else "",
        asked=prompt if full else None,
        parameters={
            name: value
            for name, value in fields.items()
            if name not in NOT_PARAMETERS and name not in notes.api.text_fields
        },
        answer=answer if full else None,
        reference=reference_text(notes.reference) if full and notes.reference else None,
        settings=notes.settings,
    )


def reference_text(value: bytes) -> str:
    """The text of an x-depo-reference header: UTF-8, of which any byte may be written as %XX."""
    return unquote_to_bytes(value).decode(errors="replace")


def _first_turn(prompt: Prompt) -> Any:
    """How all turns of a conversation begin; without system text, because applications put the time of day there."""
    if isinstance(prompt, str):
        return prompt
    turns = [message for message in prompt if message.get("role") not in ("system", "developer")]
    return turns[0].get("content") if turns else None


def _hmac(hash_key: bytes, use: str, key: str, value: Any) -> str:
    return hmac.digest(hash_key, orjson.dumps([use, key, value]), "sha256").hex()


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _answer(notes: RequestNotes) -> tuple[str | None, str]:
    """The text of the answer, None where not all of it is known, and why it ended."""
    read = notes.api.answer_piece
    if read is None:
        return None, ""
    if notes.stream is None:
        piece = _checked(read(notes.whole, False))
        return (None, "") if piece is None else (piece.text, piece.finish_reason)
    text, finish_reason = [], ""
    for data in data_lines(b"".join(notes.stream.chunks)):
        piece = _checked(read(json_of(data), True))
        if piece is not None:
            text.append(piece.text)
            finish_reason = piece.finish_reason or finish_reason
    return "".join(text) if notes.stream.whole else None, finish_reason


def _checked(piece: AnswerPiece | None) -> AnswerPiece | None:
    """The piece. Raises TypeError where a reader took something else for text, which no database would store."""
    if piece is not None and not (isinstance(piece.text, str) and isinstance(piece.finish_reason, str)):
        raise TypeError(f"the answer's text or finish reason is no string: {piece.text!r}, {piece.finish_reason!r}")
    return piece
