"""ASGI types, and the steps that all endpoints share: authenticate, read the body, common headers."""

import asyncio
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from depo_gateway.gateway.config import Config, key_digest
from depo_gateway.gateway.openai.authorization import BEARER_HEADER
from depo_gateway.gateway.openai.errors import ApiError
from depo_gateway.gateway.routing import Decision
from depo_gateway.gateway.state import Gateway, Live, RequestState

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]
HeaderList = list[tuple[bytes, bytes]]

CLIENT_GONE = 499  # nginx's status for a client that hung up; no client ever sees it


def authenticate(live: Live, api_key: str, key_header: str = BEARER_HEADER) -> str:
    """The name of an API key; "" where the gateway is open.

    Args:
        key_header: how the client should have sent it.

    Raises:
        ApiError: 401 for a missing or unknown key.
    """
    if not live.keys:
        return ""
    if not api_key:
        raise ApiError(401, f"No API key: send it as '{key_header}'.", "missing_api_key")
    name = live.keys.get(key_digest(api_key))
    if name is None:
        raise ApiError(401, "The API key is not known here.", "invalid_api_key")
    return name


async def read_body(receive: Receive, headers: Mapping[bytes, bytes], config: Config) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: 413 for a body over `limits.body_bytes`, 408 for one that does not come in time, CLIENT_GONE.
    """
    limit = config.limits.body_bytes
    close = ((b"connection", b"close"),)
    too_large = ApiError(413, f"The body is larger than limits.body_bytes ({limit}).", "body_too_large", headers=close)
    if int(headers.get(b"content-length", b"0")) > limit:
        raise too_large
    parts, size = [], 0
    limits = config.timeouts
    until = time.monotonic() + limits.total_s
    while True:
        try:
            async with asyncio.timeout(min(limits.idle_s, until - time.monotonic())):
                message = await receive()
        except TimeoutError:
            why = f"The body stopped coming for {limits.idle_s:g} s, or took longer than {limits.total_s:g} s."
            raise ApiError(408, why, "body_timeout", headers=close) from None
        if message["type"] == "http.disconnect":
            raise ApiError(CLIENT_GONE, "The client hung up.", "client_gone")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_large
        parts.append(part)
        if not message.get("more_body"):
            return parts[0] if len(parts) == 1 else b"".join(parts)


def request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's x-request-id if it is short and plain, otherwise a new one."""
    given = headers.get(b"x-request-id", b"").decode("latin-1")
    return given if re.fullmatch(r"[\w.:-]{1,128}", given, re.ASCII) else "req-" + secrets.token_hex(12)


def decision_headers(config: Config, decision: Decision) -> HeaderList:
    headers = [
        (b"x-depo-pool", decision.pool.encode()),
        (b"x-depo-reason", decision.reason.encode()),
        (b"x-depo-estimator", decision.estimator.encode()),
    ]
    if config.routing.expose_scores:
        if decision.confidence is not None:
            headers.append((b"x-depo-confidence", b"%.4f" % decision.confidence))
        if decision.threshold is not None:
            headers.append((b"x-depo-threshold", b"%.4f" % decision.threshold))
    return headers


def common_headers(gateway: Gateway, request: RequestState) -> HeaderList:
    headers = [(b"x-request-id", request.id.encode())]
    if gateway.draining:
        headers.append((b"connection", b"close"))  # the client's next request finds another replica
    return headers
