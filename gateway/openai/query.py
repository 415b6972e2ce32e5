"""The few fields of a request that the gateway reads; it forwards every other byte as it came."""

import itertools
import re
from dataclasses import dataclass
from typing import Any

import orjson

from depo_gateway.estimator.text import prompt_of_messages
from depo_gateway.gateway.openai.api import Api, Fields, Messages, Prompt
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.openai.json_splice import STRING, replaced, top_level_spans
from depo_gateway.gateway.openai.media import MEDIA

# A token of JSON text is seldom shorter than four bytes of English.
BYTES_PER_TOKEN = 4
# Quotes inside a JSON string are escaped, so this can match only a key; a single match is then the top level's.
_MODEL = re.compile(rb'(?<!\\)"model"\s*:\s*(' + STRING + rb")")


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed request. `fields` is the client's JSON object, `body` its bytes."""

    api: Api
    model: str
    stream: bool
    usage_requested: bool  # the client itself asked for the stream's usage chunk
    prompt: Prompt | None  # what is scored, as far as the checkpoint reads it; None: it can't be routed
    continued_answer: str  # the id of an earlier answer that it goes on from; ""
    modalities: frozenset[str]  # beyond text
    context_needed: int  # tokens of prompt and reserved completion, an estimate
    fields: Fields
    body: bytes

    @property
    def adds_usage(self) -> bool:
        """Whether the gateway requests a usage chunk that the client did not request."""
        return self.stream and self.api.usage_on_request and not self.usage_requested

    @property
    def messages(self) -> Messages:
        """The turns of a conversation; empty if the prompt is not one."""
        return self.prompt if isinstance(self.prompt, list) else []


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object of a request's body.

    Raises:
        ApiError: 400 for what is not strict JSON (RFC 8259; NaN, lone surrogates, depth over 1,024) or no object.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
    return fields


def query_of(api: Api, fields: Fields, body: bytes) -> Query:
    """The query of a request's JSON object and its bytes.

    Raises:
        ApiError: 400 where a field that routing reads is missing or malformed.
    """
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        raise ApiError(
            400,
            "'model' must be a non-empty string: 'auto', or a pool or model of GET /v1/models.",
            "invalid_model",
            "model",
        )
    stream = fields.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise ApiError(400, "'stream' must be true or false.", "invalid_stream", "stream")
    options = fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise ApiError(400, "'stream_options' must be an object.", "invalid_stream_options", "stream_options")
    prompt = api.prompt(fields)
    modalities = api.modalities(fields)
    return Query(
        api=api,
        model=model,
        stream=bool(stream),
        usage_requested=bool(options and options.get("include_usage")),
        prompt=prompt,
        continued_answer=api.continued_answer(fields),
        modalities=modalities,
        context_needed=_context_needed(api, fields, body, prompt, modalities),
        fields=fields,
        body=body,
    )


def forwarded_body(query: Query, model: str) -> bytes:
    """The client's body with `model` set, and a stream's usage asked for; not another byte changes.

    Raises:
        ApiError: 400 when the client wrote a field twice, so that client and backend could read different requests.
    """
    body, name = query.body, orjson.dumps(model)
    options = query.fields.get("stream_options")
    insert = query.adds_usage and "stream_options" not in query.fields
    matches = list(itertools.islice(_MODEL.finditer(body), 2))
    # A letter of a key may be written as an escape (\u006d); then this regular expression doesn't find every model key.
    if len(matches) == 1 and b"\\u006" not in body and (insert or not query.adds_usage):
        edits = [(*matches[0].span(1), name)]
    else:
        spans = top_level_spans(body, ("model", "stream_options"))
        edits = [(*spans["model"], name)]
        if query.adds_usage and not insert:
            start, end = spans["stream_options"]
            value = b'{"include_usage":true}' if options is None else _including_usage(body[start:end])
            edits.append((start, end, value))
    if insert:
        brace = body.index(b"{") + 1
        edits.append((brace, brace, b'"stream_options":{"include_usage":true},'))
    return replaced(body, edits)


def _including_usage(options: bytes) -> bytes:
    """`stream_options` with include_usage true."""
    spans = top_level_spans(options, ("include_usage",))
    if "include_usage" in spans:
        return replaced(options, [(*spans["include_usage"], b"true")])
    separator = b"," if orjson.loads(options) else b""
    return b'{"include_usage":true' + separator + options[1:]


def _context_needed(api: Api, fields: Fields, body: bytes, prompt: Prompt | None, modalities: frozenset[str]) -> int:
    """Prompt and reserved completion, estimated. Media travel as base64, so beside them only the text counts."""
    size = len(body)
    if isinstance(prompt, list) and modalities & MEDIA:
        size = sum(len(text) for text in prompt_of_messages(prompt))
    limit = next((value for name in api.output_limits if (value := fields.get(name))), 0)
    return size // BYTES_PER_TOKEN + (limit if isinstance(limit, int) else 0)
