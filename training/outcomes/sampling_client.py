"""Client by which `depo-train collect` samples k completions of one pool's OpenAI server."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import aiohttp

from depo_gateway.training.judging.openai_client import (
    BUSY,
    AttemptError,
    NoAnswerError,
    error_text,
    post_json,
    retry,
    token_confidence,
)
from depo_gateway.training.outcomes.completions import ABORTED, CUT_OFF, Completion
from depo_gateway.training.rewards.reasoning import final_text

SAMPLING_TRIES = 6  # the waits between them sum to 15 s, in which a backend may restart
PROBE_SECONDS = 60.0
ABORTS = frozenset({"abort", "error"})  # finish reasons of vLLM and SGLang: the server gave the completion up
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
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # further fields of each request
    many: bool = True  # takes n > 1
    logprobs: bool = True


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn."""

    k: int
    temperature: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A backend refuses, or keeps failing at, one prompt."""

    message: str  # the server's


async def sample_completions(
    session: aiohttp.ClientSession, gate: asyncio.Semaphore, backend: Backend, messages: Messages, sampling: Sampling
) -> list[Completion] | Refusal:
    """k completions. Raises BackendError where it does not answer the simplest chat either."""
    sizes = [sampling.k] if backend.many else [1] * sampling.k
    batches = await asyncio.gather(*(_sample(session, gate, backend, messages, sampling, size) for size in sizes))
    completions: list[Completion] = []
    for batch in batches:
        if isinstance(batch, Refusal):
            return batch
        completions += batch
    return completions


async def _sample(
    session: aiohttp.ClientSession,
    gate: asyncio.Semaphore,
    backend: Backend,
    messages: Messages,
    sampling: Sampling,
    count: int,
) -> list[Completion] | Refusal:
    """The completions of one request for `count`."""
    async with gate:
        try:
            status, answer = await complete_chat(session, backend, sampling_request(backend, messages, sampling, count))
        except BackendError as error:
            if not await is_alive(session, backend):
                raise
            return Refusal(str(error))
    if status != 200:
        return Refusal(f"{status} {error_text(answer)}")
    return completions_of(answer)


def completions_of(answer: Mapping[str, Any]) -> list[Completion]:
    """The completions in a chat's answer.

    vLLM's `--reasoning-parser` puts reasoning into another field of the message (`reasoning`; before 0.11.1
    `reasoning_content`), and its log-probabilities are of all tokens, reasoning included. Only the content is graded.
    """
    choices = answer["choices"]
    lengths = [len((choice.get("logprobs") or {}).get("content") or []) for choice in choices]
    total = (answer.get("usage") or {}).get("completion_tokens")
    if isinstance(total, int) and total > sum(lengths):  # it counts tokens without log-probabilities, too
        if len(choices) == 1:
            lengths = [total]
        elif all(lengths):  # llama.cpp counts one choice alone, which is less than the sum
            lengths = [round(length * total / sum(lengths)) for length in lengths]
    return [
        Completion(
            choice["message"].get("content") or "",
            _end(choice),
            token_confidence(choice),
            length or None,
        )
        for choice, length in zip(choices, lengths, strict=True)
    ]


def _end(choice: Mapping[str, Any]) -> str:
    """Why a completion did not finish; "" if it did. A server that gives no reason may stop inside the reasoning."""
    reason = choice.get("finish_reason")
    if reason == "length" or (not reason and final_text(choice["message"].get("content") or "") is None):
        return CUT_OFF
    return ABORTED if reason in ABORTS else ""


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
    return {**body, **backend.extra_body}


def key_headers(flag: str, variable: str | None) -> dict[str, str]:
    """The headers with the API key in an environment variable. ValueError names the flag where it is not set."""
    if variable is None:
        return {}
    if variable not in os.environ:
        raise ValueError(f"{flag}: the environment has no {variable}")
    return {"Authorization": f"Bearer {os.environ[variable]}"}


async def served_model(
    session: aiohttp.ClientSession, name: str, base: str, wanted: str | None, headers: Mapping[str, str], flag: str
) -> str:
    """The model that the server at `base` serves. `flag`: how the user chooses among several.

    Raises:
        BackendError: nothing answers there.
        ValueError: it serves several models, or not the wanted one.
    """
    try:
        async with session.get(f"{base}/v1/models", headers=headers) as response:
            if response.status != 200:
                raise BackendError(f"{name}: {base}/v1/models answers {response.status}")
            models: list[str] = [entry["id"] for entry in (await response.json(content_type=None))["data"]]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{name}: no OpenAI server at {base} ({str(error) or type(error).__name__})") from None
    if wanted is None and len(models) != 1:
        raise ValueError(f"{name}: {base} serves {', '.join(models) or 'no model'}; choose by {flag}")
    if wanted is not None and wanted not in models:
        raise ValueError(f"{name}: {base} serves {', '.join(models)}, not {wanted!r}")
    return wanted or models[0]


async def probe(session: aiohttp.ClientSession, backend: Backend, sampling: Sampling) -> Backend:
    """The backend with the fields that it supports, found by short requests: n, log-probabilities.

    It asks for as many tokens as the prompts will, so that a limit beyond the server's context fails here already.
    """
    reason = ""
    for logprobs in (True, False):
        for many in (True, False) if sampling.k > 1 else (True,):
            trial = replace(backend, many=many, logprobs=logprobs)
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
