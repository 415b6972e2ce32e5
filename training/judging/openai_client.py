"""A retrying client of OpenAI-compatible servers and webhooks: JSON requests, retries with backoff, error texts.

Which replies are worth another attempt differs between callers, so each passes its own attempt to `retry`.
"""

import asyncio
import json
import math
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import aiohttp

FIRST_WAIT_SECONDS = 0.5  # before the second attempt; doubled before each further one
BUSY = frozenset({408, 429, 500, 502, 503, 504})  # statuses that another attempt may mend

T = TypeVar("T")


class NoAnswerError(Exception):
    """Every attempt failed. The message is one line: the reason of the last failure."""


class AttemptError(Exception):
    """One attempt failed, and another may succeed. The message is the reason."""


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A server's reply to one request."""

    status: int
    content: bytes

    def json(self) -> Any:
        """The parsed content. Raises ValueError where it is not JSON."""
        try:
            return json.loads(self.content)
        except RecursionError:
            raise ValueError("the JSON is nested too deeply") from None

    def json_or_text(self) -> Any:
        """The parsed content, or the text where it is not JSON."""
        try:
            return self.json()
        except ValueError:
            return self.content.decode("utf-8", "replace")


async def post_json(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    timeout: aiohttp.ClientTimeout | None = None,
    follow_redirects: bool = False,
    limit: int | None = None,
) -> HttpReply:
    """Posts one request, once.

    Args:
        timeout: None: the session's.
        limit: bytes of the reply that are read at most.
    """
    async with session.post(
        url, json=body, headers=headers, timeout=timeout or session.timeout, allow_redirects=follow_redirects
    ) as response:
        if limit is None:
            return HttpReply(response.status, await response.read())
        content = bytearray()
        async for chunk in response.content.iter_any():
            content += chunk
            if len(content) >= limit:
                break
        return HttpReply(response.status, bytes(content[:limit]))


async def retry(attempt: Callable[[], Awaitable[T]], tries: int) -> T:
    """The result of the first attempt that succeeds.

    Lost connections, timeouts, replies that are not JSON, and AttemptError lead to another attempt, after a wait that
    doubles each time.

    Raises:
        NoAnswerError: all attempts failed.
    """
    reason = ""
    for number in range(tries):
        if number:
            await asyncio.sleep(FIRST_WAIT_SECONDS * 2 ** (number - 1) * random.uniform(0.8, 1.2))
        try:
            return await attempt()
        except AttemptError as error:
            reason = str(error)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            reason = f"fails ({str(error) or type(error).__name__})"
    raise NoAnswerError(reason)


async def together(*calls: Awaitable[T]) -> list[T]:
    """All results, or the first failure once every call has ended, so that no call is left running."""
    results = await asyncio.gather(*calls, return_exceptions=True)
    values: list[T] = []
    for result in results:
        if isinstance(result, BaseException):
            raise result
        values.append(result)
    return values


def base_url(url: str) -> str:
    """A server's address without /v1."""
    return url.rstrip("/").removesuffix("/v1")


def error_text(reply: Any) -> str:
    """The message of an OpenAI error object, on one line."""
    error = reply.get("error", reply) if isinstance(reply, dict) else reply
    message = error.get("message", error) if isinstance(error, dict) else error
    return " ".join(str(message).split())[:300]


def token_confidence(choice: Mapping[str, Any]) -> float | None:
    """exp of the mean token log-probability of one chat completion (1/perplexity); None where the server gave none."""
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return math.exp(mean([min(0.0, token["logprob"]) for token in tokens])) if tokens else None


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
