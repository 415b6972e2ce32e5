"""The few OpenAI fields that we read; every other byte is forwarded untouched.

OpenAI API reference: https://platform.openai.com/docs/api-reference/chat and /completions.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from depo_gateway.estimator.text import prompt_of_messages

Endpoint = Literal["chat", "completions", "embeddings"]
PATHS: dict[str, Endpoint] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/embeddings": "embeddings",
}
AUTO = "auto"
# A token of JSON text is seldom shorter than four bytes of English; one too many estimates is settled by the backend.
BYTES_PER_TOKEN = 4


class ApiError(Exception):
    """An answer that is an OpenAI error object: {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> bytes:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})


@dataclass(frozen=True, slots=True)
class Query:
    """A parsed request. `fields` is the client's JSON object, `body` its bytes."""

    endpoint: Endpoint
    model: str
    stream: bool
    asked_usage: bool  # the client itself asked for the stream's usage chunk
    prompt: str  # text of /v1/completions' `prompt`
    needs: frozenset[str]  # modalities beyond text
    prompt_tokens: int  # an estimate; the backend's tokenizer has the last word
    fields: dict[str, Any]
    body: bytes

    @property
    def messages(self) -> list[dict[str, Any]]:
        return self.fields["messages"] if self.endpoint == "chat" else []

    @property
    def asked(self) -> str | list[dict[str, Any]]:
        """What is scored; how much of it, the checkpoint says."""
        return self.fields["messages"] if self.endpoint == "chat" else self.prompt


def parse(endpoint: Endpoint, body: bytes) -> Query:
    """Bytes -> Query.

    Raises:
        ApiError: 400 for what is not strict JSON (RFC 8259; NaN, lone surrogates, depth over 1,024) or lacks a field
            that routing reads.
    """
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, f"The body is not valid JSON: {error}.", "invalid_json") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "The body must be a JSON object.", "invalid_json")
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
    needs: frozenset[str] = frozenset()
    if endpoint == "chat":
        needs = _needs(fields, _messages(fields))
    return Query(
        endpoint=endpoint,
        model=model,
        stream=bool(stream),
        asked_usage=bool(options and options.get("include_usage")),
        prompt=_prompt_text(fields) if endpoint == "completions" else "",
        needs=needs,
        prompt_tokens=_prompt_tokens(fields, body, needs),
        fields=fields,
        body=body,
    )


def forwarded(query: Query, model: str) -> bytes:
    """The client's body with `model` set, and a stream's usage asked for; not another byte changes.

    Raises:
        ApiError: 400 when the client wrote a field twice, so that client and backend could read different requests.
    """
    ask_usage = query.stream and query.endpoint != "embeddings" and not query.asked_usage
    body, name = query.body, orjson.dumps(model)
    options = query.fields.get("stream_options")
    insert = ask_usage and "stream_options" not in query.fields
    matches = list(itertools.islice(_MODEL.finditer(body), 2))
    # A letter of a key may be written as an escape (\u006d); then this regular expression doesn't find every model key.
    if len(matches) == 1 and b"\\u006" not in body and (insert or not ask_usage):
        edits = [(*matches[0].span(1), name)]
    else:
        spans = _top_level_spans(body, ("model", "stream_options"))
        edits = [(*spans["model"], name)]
        if ask_usage and not insert:
            start, end = spans["stream_options"]
            edits.append((start, end, b'{"include_usage":true}' if options is None else _asking(body[start:end])))
    if insert:
        brace = body.index(b"{") + 1
        edits.append((brace, brace, b'"stream_options":{"include_usage":true},'))
    for start, end, value in sorted(edits, reverse=True):
        body = body[:start] + value + body[end:]
    return body


def wanted_threshold(model: str) -> float | None:
    """The threshold in `auto-0.85`, or None for `auto`.

    Raises:
        ApiError: 404 for `auto-` and no number between 0 and 1.
    """
    if model == AUTO:
        return None
    number = model.removeprefix(AUTO + "-")
    if not re.fullmatch(r"[01]|[01]?\.[0-9]+", number) or float(number) > 1:
        raise ApiError(
            404,
            f"The model {model!r} does not exist: a threshold is a number between 0 and 1, as in auto-0.85.",
            "model_not_found",
            "model",
        )
    return float(number)


class UsageTap:
    """Reads a stream's usage on its way through, and drops the usage chunk where the client didn't ask for it.

    Server-sent events end with an empty line (WHATWG HTML 9.2). Whole events pass at once; an event's torn end waits
    for its rest, so that what follows a broken connection still starts a new event.
    """

    __slots__ = ("_drop", "_rest", "usage")

    def __init__(self, drop: bool) -> None:
        self.usage: dict[str, Any] | None = None
        self._drop = drop
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """Upstream's bytes in, the client's bytes out."""
        whole = self._rest + data if self._rest else data
        if b'"usage"' not in whole and whole.endswith(b"\n\n"):  # nearly every chunk
            self._rest = b""
            return whole
        kept = []
        start = 0
        for end in (match.end() for match in _EVENT_END.finditer(whole)):
            event = whole[start:end]
            if not (self._is_usage(event) and self._drop):
                kept.append(event)
            start = end
        self._rest = whole[start:]
        if len(self._rest) > _LONGEST_EVENT:  # no usage chunk, whatever else it is
            kept.append(self._rest)
            self._rest = b""
        return b"".join(kept)

    def end(self) -> bytes:
        """What still waits for the end of its event when upstream is done."""
        rest, self._rest = self._rest, b""
        return rest

    def _is_usage(self, event: bytes) -> bool:
        if b'"usage"' not in event:
            return False
        data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
        try:
            chunk = orjson.loads(data)
        except orjson.JSONDecodeError:
            return False
        if not isinstance(chunk, dict) or not isinstance(chunk.get("usage"), dict):
            return False
        self.usage = chunk["usage"]
        return chunk.get("choices") == []


def answer_of(body: bytes) -> Any:
    """A complete answer's JSON, None if it is none."""
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def usage_of(answer: Any) -> dict[str, Any] | None:
    """The `usage` object of a complete answer, if it has one."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    return usage if isinstance(usage, dict) else None


def _messages(fields: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(item, dict) for item in messages):
        raise ApiError(400, "'messages' must be a non-empty list of objects.", "invalid_messages", "messages")
    return messages


def _prompt_text(fields: dict[str, Any]) -> str:
    """The text of `prompt`: a string, or strings; prompts of token ids have none (they are one model's own)."""
    prompt = fields.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(isinstance(item, str) for item in prompt):
        return "\n".join(prompt)
    return ""


def _needs(fields: dict[str, Any], messages: list[dict[str, Any]]) -> frozenset[str]:
    needs = {"tools"} if fields.get("tools") or fields.get("functions") else set()
    for part in _parts(messages):
        kind = part.get("type")
        if isinstance(kind, str) and kind != "text":
            needs.update(modality for modality in ("image", "audio") if modality in kind)
    return frozenset(needs)


def _parts(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        content = message.get("content")
        if isinstance(content, list):
            yield from (part for part in content if isinstance(part, dict))


def _prompt_tokens(fields: dict[str, Any], body: bytes, needs: frozenset[str]) -> int:
    """Prompt and reserved completion, estimated. Pictures and sound travel as base64, so with them only text counts."""
    size = sum(map(len, prompt_of_messages(fields["messages"]))) if needs & {"image", "audio"} else len(body)
    wanted = fields.get("max_completion_tokens") or fields.get("max_tokens") or 0
    return size // BYTES_PER_TOKEN + (wanted if isinstance(wanted, int) else 0)


def _asking(options: bytes) -> bytes:
    """`stream_options` with include_usage true."""
    spans = _top_level_spans(options, ("include_usage",))
    if "include_usage" in spans:
        start, end = spans["include_usage"]
        return options[:start] + b"true" + options[end:]
    separator = b"," if orjson.loads(options) else b""
    return b'{"include_usage":true' + separator + options[1:]


_LONGEST_EVENT = 1 << 20
_EVENT_END = re.compile(rb"\r?\n\r?\n")
_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
# Quotes inside a JSON string are escaped, so this can match only a key; one match is then the top level's.
_MODEL = re.compile(rb'(?<!\\)"model"\s*:\s*(' + _STRING + rb")")
_TOKEN = re.compile(_STRING + rb"|[{}\[\]:,]")
_DEEPER = re.compile(_STRING + rb"|[{}\[\]]")  # inside a value only its end matters


def _top_level_spans(body: bytes, names: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    """Where the values of the named top-level keys stand in a JSON object already known to be valid."""
    spans: dict[str, tuple[int, int]] = {}
    depth, key, value_start, expect_key, position = 0, "", 0, True, 0
    while match := (_TOKEN if depth == 1 else _DEEPER).search(body, position):
        token, position = match.group(), match.end()
        first = token[:1]
        if depth == 1 and first in (b",", b"}"):
            if key in names:
                if key in spans:
                    raise ApiError(400, f"'{key}' is written twice.", "duplicate_field", key)
                spans[key] = _stripped(body, value_start, match.start())
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


def _stripped(body: bytes, start: int, end: int) -> tuple[int, int]:
    value = body[start:end]
    return start + len(value) - len(value.lstrip()), end - (len(value) - len(value.rstrip()))
