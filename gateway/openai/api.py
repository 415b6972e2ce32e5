"""`Api`: everything the gateway knows of one endpoint that serves models. The rest treats all of them alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from depo_gateway.gateway.openai.authorization import BEARER_HEADER, bearer_key
from depo_gateway.gateway.openai.errors import ApiError, error_body, error_event
from depo_gateway.gateway.openai.usage import Usage, usage_field

Fields = Mapping[str, Any]  # a request's JSON object
# A conversation in chat's form, whatever the endpoint's own: role, content (text, or parts of type text), tool_calls,
# tool_call_id.
Messages = list[dict[str, Any]]
Prompt = str | Messages


class AnswerPiece(NamedTuple):
    """The first choice of a whole answer, or what one event of a stream adds to it.

    Attributes:
        finish_reason: `stop`, `length` or `tool_calls`; "" while the answer goes on.
        call_ids: the ids of its tool calls, each with a comma after it; a string, so that a stream's pieces add up.
        answer_id: a later request may name this id to continue the answer. "": it repeats the answer instead.
    """

    text: str
    finish_reason: str = ""
    call_ids: str = ""
    answer_id: str = ""


def nothing_beyond_text(_: Fields) -> frozenset[str]:
    return frozenset()


def no_continuation(_: Fields) -> str:
    return ""


def not_routed(pools: Sequence[str]) -> ApiError:
    message = f"This endpoint is not routed; name a pool as 'model': {', '.join(pools)}."
    return ApiError(400, message, "model_not_routable", "model")


@dataclass(frozen=True, slots=True, eq=False)
class Api:
    """One endpoint: how its requests and its answers are read, and the shape of its errors.

    A new endpoint is a file with one Api, and a line in apis.py. The functions get JSON of any shape: what routing does
    not read is for the backend to judge. The learner shadows the records of REPEATABLE_ENDPOINTS only.

    Attributes:
        name: `endpoint` in metrics and records.
        path: the path, here and at the backends.
        prompt: the text that is scored and recorded, or a conversation as messages, to which `routing.sticky` applies;
            None where there is no text, so that the request can't be routed. Raises ApiError 400 for a malformed field.
        prompt_field: the field that `prompt` reads; /v1/route recognises a body by it. None: /v1/route never does.
        modalities: what the request carries beyond text, as in `pools.*.accepts`. Called after `prompt`, so the field
            is well formed.
        output_limits: the fields that limit the answer's tokens; the first one present counts.
        continued_answer: the id of the earlier answer that the request continues, "" without one. It only prefers the
            pool that gave the answer: the turn may move to another pool, and a pool may have several backends.
        unroutable: the error for a request to route whose `prompt` is None, from the pools' names.
        text_fields: the fields that a record's parameters leave out.
        usage_on_request: a stream reports usage only where `stream_options.include_usage` asks for it.
        api_key: the key in the request's headers, "" without one.
        key_header: how clients send that key, for the error when it is missing.
        forwarded_headers: the client's headers that go on to the backend.
        answer_piece: what the JSON of a whole answer holds or, with True, what one event of a stream adds; None where
            answers are no text.
        usage: `prompt_tokens` and `completion_tokens` of a whole answer or of an event; None where it has none.
        error_body: an error as the body of an answer.
        error_event: an error as the last event of a stream that has begun. It does not see the events before.
    """

    name: str
    path: str
    prompt: Callable[[Fields], Prompt | None]
    prompt_field: str | None = None
    modalities: Callable[[Fields], frozenset[str]] = nothing_beyond_text
    output_limits: tuple[str, ...] = ("max_completion_tokens", "max_tokens")
    continued_answer: Callable[[Fields], str] = no_continuation
    unroutable: Callable[[Sequence[str]], ApiError] = not_routed
    text_fields: frozenset[str] = frozenset(("messages", "prompt", "input"))
    usage_on_request: bool = False
    api_key: Callable[[Mapping[bytes, bytes]], str] = bearer_key
    key_header: str = BEARER_HEADER
    forwarded_headers: tuple[bytes, ...] = (b"traceparent", b"tracestate", b"accept")
    answer_piece: Callable[[Any, bool], AnswerPiece | None] | None = None
    usage: Callable[[Any], Usage | None] = usage_field
    error_body: Callable[[ApiError], bytes] = error_body
    error_event: Callable[[ApiError], bytes] = error_event

    @property
    def continues_answers(self) -> bool:
        """Whether a request may name the answer that it continues."""
        return self.continued_answer is not no_continuation
