"""Client by which `depo-train collect` samples k graded completions of one pool's OpenAI server."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from depo_gateway.training.judging.openai_client import (
    BUSY,
    AttemptError,
    NoAnswerError,
    base_url,
    error_text,
    mean,
    post_json,
    retry,
    token_confidence,
)
from depo_gateway.training.rewards.verifiers import Grader
from depo_gateway.training.rewards.worker_pool import RewardError

SAMPLING_TRIES = 6  # the waits between them sum to 15 s, in which a backend may restart
PROBE_SECONDS = 60.0
Messages = Sequence[Mapping[str, Any]]
SIMPLEST: Messages = ({"role": "user", "content": "1+1="},)


class BackendError(Exception):
    """A backend cannot go on; the message is one line for the user. Rows collected before it stay."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One pool's server, and the request fields that it supports."""

    pool: str
    url: str  # without /v1
    model: str
    headers: Mapping[str, str]
    many: bool = True  # takes n > 1
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn and graded."""

    k: int
    temperature: float
    max_tokens: int
    grader: Grader


@dataclass(frozen=True, slots=True)
class Refusal:
    """A backend refuses, or keeps failing at, one prompt."""

    message: str  # the server's


@dataclass(frozen=True, slots=True)
class Outcome:
    """One model on one prompt: pass rate, and the mean over completions of exp(mean token log-probability)."""

    correct: float | None  # over the completions that could be graded
    token_confidence: float | None


async def sample_outcome(
    session: aiohttp.ClientSession,
    gate: asyncio.Semaphore,
    backend: Backend,
    messages: Messages,
    reference: str,
    sampling: Sampling,
) -> Outcome | Refusal:
    """k completions, graded.

    Raises:
        BackendError: it does not answer the simplest chat either.
        RewardError: the verifier is a function of the user's and failed.
    """
    sizes = [sampling.k] if backend.many else [1] * sampling.k
    batches = await asyncio.gather(*(_sample(session, gate, backend, messages, sampling, size) for size in sizes))
    choices: list[Mapping[str, Any]] = []
    for batch in batches:
        if isinstance(batch, Refusal):
            return batch
        choices += batch
    pairs = [(choice["message"].get("content") or "", reference) for choice in choices]
    rewards = await asyncio.to_thread(sampling.grader.grade, pairs)
    graded = [reward for reward in rewards if reward is not None]
    outside = [reward for reward in graded if not 0 <= reward <= 1]
    if outside:
        raise RewardError(f"the verifier {sampling.grader.name} gave {outside[0]:g}; an outcome is between 0 and 1")
    confidences = [value for choice in choices if (value := token_confidence(choice)) is not None]
    return Outcome(mean(graded) if graded else None, round(mean(confidences), 4) if confidences else None)


async def _sample(
    session: aiohttp.ClientSession,
    gate: asyncio.Semaphore,
    backend: Backend,
    messages: Messages,
    sampling: Sampling,
    count: int,
) -> Sequence[Mapping[str, Any]] | Refusal:
    """The choices of one request for `count` completions."""
    async with gate:
        try:
            status, answer = await complete_chat(session, backend, sampling_request(backend, messages, sampling, count))
        except BackendError as error:
            if not await is_alive(session, backend):
                raise
            return Refusal(str(error))
    if status != 200:
        return Refusal(f"{status} {error_text(answer)}")
    choices: Sequence[Mapping[str, Any]] = answer["choices"]
    return choices


def sampling_request(backend: Backend, messages: Messages, sampling: Sampling, count: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": backend.model,
        "messages": list(messages),
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
    }
    if count > 1:
        body["n"] = count
    if backend.logprobs:
        body |= {"logprobs": True, "top_logprobs": 1}
    return body


async def connect(
    session: aiohttp.ClientSession,
    pool: str,
    url: str,
    wanted: str | None,
    key_variable: str | None,
    sampling: Sampling,
) -> Backend:
    """The backend at `url`: its model, and which fields it supports. BackendError where nothing answers."""
    base = base_url(url)
    headers = {}
    if key_variable is not None:
        if key_variable not in os.environ:
            raise ValueError(f"--api-key-env {pool}: the environment has no {key_variable}")
        headers["Authorization"] = f"Bearer {os.environ[key_variable]}"
    try:
        async with session.get(f"{base}/v1/models", headers=headers) as response:
            if response.status != 200:
                raise BackendError(f"{pool}: {base}/v1/models answers {response.status}")
            models = [entry["id"] for entry in (await response.json(content_type=None))["data"]]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{pool}: no OpenAI server at {base} ({str(error) or type(error).__name__})") from None
    if wanted is None and len(models) != 1:
        raise ValueError(f"{pool}: {base} serves {', '.join(models) or 'no model'}; choose by --model {pool}=NAME")
    if wanted is not None and wanted not in models:
        raise ValueError(f"{pool}: {base} serves {', '.join(models)}, not {wanted!r}")
    return await probe(session, Backend(pool, base, wanted or models[0], headers), sampling)


async def probe(session: aiohttp.ClientSession, backend: Backend, sampling: Sampling) -> Backend:
    """The backend with the fields that it supports, found by short requests: n, log-probabilities.

    It asks for as many tokens as the prompts will, so that a limit beyond the server's context fails here already.
    """
    reason = ""
    for logprobs in (True, False):
        for many in (True, False) if sampling.k > 1 else (True,):
            trial = Backend(backend.pool, backend.url, backend.model, backend.headers, many, logprobs)
            count = sampling.k if many else 1
            status, answer = await complete_chat(session, trial, sampling_request(trial, SIMPLEST, sampling, count))
            if status == 200 and len(answer["choices"]) == count:
                return trial
            reason = (
                f"{status} {error_text(answer)}" if status != 200 else f"{len(answer['choices'])} choices for {count}"
            )
    raise BackendError(f"{backend.pool}: {backend.url} does not complete a chat: {reason}")


async def is_alive(session: aiohttp.ClientSession, backend: Backend) -> bool:
    """Whether the simplest chat is answered now. A server that lists its models may still fail at every chat."""
    body = {"model": backend.model, "messages": list(SIMPLEST), "max_tokens": 1}
    timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS)
    try:
        reply = await post_json(session, _chat_url(backend), body, backend.headers, timeout, follow_redirects=True)
    except (aiohttp.ClientError, TimeoutError):
        return False
    return reply.status == 200


async def complete_chat(session: aiohttp.ClientSession, backend: Backend, body: Mapping[str, Any]) -> tuple[int, Any]:
    """Status and JSON of one chat, retried while the server is busy or the connection fails.

    Raises:
        BackendError: the retries do not help, the API key is refused, or the server does not speak the protocol.
    """

    async def attempt() -> tuple[int, Any]:
        reply = await post_json(session, _chat_url(backend), body, backend.headers, follow_redirects=True)
        if reply.status in BUSY:
            error = reply.json_or_text()
            raise AttemptError(f"answers {reply.status} {error_text(error) if error else ''}".rstrip())
        answer = reply.json() if reply.content.strip() else None
        if reply.status in (401, 403):
            raise BackendError(f"{backend.pool}: {backend.url} answers {reply.status} {error_text(answer)}")
        if reply.status == 200 and not (isinstance(answer, dict) and answer.get("choices")):
            raise BackendError(f"{backend.pool}: {backend.url} answers a chat without choices")
        return reply.status, answer

    try:
        return await retry(attempt, SAMPLING_TRIES)
    except NoAnswerError as error:
        raise BackendError(f"{backend.pool}: {backend.url} {error}, {SAMPLING_TRIES} times in a row") from None


def _chat_url(backend: Backend) -> str:
    return f"{backend.url}/v1/chat/completions"
