"""Errors that clients receive, and the shape that OpenAI gives them."""

import orjson

_KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that is an error: its status, a sentence, a code, the field at fault, headers that go with it."""

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


def error_body(error: ApiError) -> bytes:
    """OpenAI's error object: {"error": {"message", "type", "param", "code"}}."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return orjson.dumps({"error": fields})


def error_event(error: ApiError) -> bytes:
    """The error as the last server-sent event of a stream that has begun; no [DONE] follows it."""
    return b"data: " + error_body(error) + b"\n\n"
