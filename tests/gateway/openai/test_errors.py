"""OpenAI's error object."""

import json

import pytest

from depo_gateway.gateway.openai.errors import ApiError, error_body, error_event


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_errors_are_openai_objects(status: int, kind: str) -> None:
    error = ApiError(status, "What. And how.", "the_code", "model")
    shape = {"error": {"message": "What. And how.", "type": kind, "param": "model", "code": "the_code"}}
    assert json.loads(error_body(error)) == shape
    assert error_event(error) == b"data: " + error_body(error) + b"\n\n"
